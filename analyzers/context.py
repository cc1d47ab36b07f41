"""What a run gives its method beside the engine, the task and the knobs."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from analyzers.errors import BadInput, BadParameter
from analyzers.params import ModelRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from analyzers.engine.core import Engine
    from analyzers.engine.cost import Cost
    from analyzers.engine.values import Cursor
    from analyzers.registry import Method
    from analyzers.trace import Event


class Kept(Protocol):
    """Looks for a cursor of an earlier run whose text `ids` goes on from."""

    def __call__(self, engine: "Engine", ids: "Sequence[int]") -> "Cursor | None": ...


class Artifacts(Protocol):
    """What methods learned about the run's model and keep between runs (probes, skip sets), by
    method and name. They belong to these very weights: another quantization has its own."""

    def get(self, method: str, name: str) -> tuple[bytes, Mapping[str, Any]] | None:
        """(data, meta), or None."""

    def put(
        self, method: str, name: str, data: bytes, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Keep it; what was there is replaced. meta: finite JSON."""


class Forgotten:
    """Artifacts that live as long as this object."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[bytes, Mapping[str, Any]]] = {}

    def get(self, method: str, name: str) -> tuple[bytes, Mapping[str, Any]] | None:
        return self._kept.get((method, name))

    def put(
        self, method: str, name: str, data: bytes, meta: Mapping[str, Any] | None = None
    ) -> None:
        self._kept[method, name] = data, dict(meta or {})


def nothing_written() -> Iterator[str]:
    return iter(())


def nothing_earlier(run: str) -> "Iterable[Event]":
    raise BadInput(f"There is no run {run!r} to go on from.")


def nothing_assesses() -> "Mapping[str, Method]":
    return {}


def nothing_kept(engine: "Engine", ids: "Sequence[int]") -> None:
    return None


def never() -> bool:
    return False


@dataclass
class Context:
    """seed: of the run. engines: by the ModelRef that names them in the knobs; "" is the run's own.
    cost: what passes of the run's own engine take here, None until that was measured; decisions
    rest on it and never on the clock. history(): the texts of earlier runs, prompt and answer,
    newest first. earlier(id): the events of one of them. assessors(): the methods
    that have signals, by name. cancelled(): whether to stop, for long
    work between two passes (the engine asks before each). `cursors` collects what `begin` handed
    out for the run's own engine, for the runner to keep."""

    seed: int
    kept: Kept = nothing_kept
    cursors: "list[Cursor]" = field(default_factory=list)
    engines: "Mapping[str, Engine]" = field(default_factory=dict)
    cost: "Cost | None" = None
    artifacts: Artifacts = field(default_factory=Forgotten)
    history: Callable[[], Iterator[str]] = nothing_written
    earlier: "Callable[[str], Iterable[Event]]" = nothing_earlier
    assessors: "Callable[[], Mapping[str, Method]]" = nothing_assesses
    cancelled: Callable[[], bool] = never

    def rng(self, *keys: object) -> random.Random:
        """A generator for one purpose, from the run's seed and the keys: the same every time."""
        return random.Random(repr((self.seed, *keys)))

    def engine(self, ref: ModelRef | str = "") -> "Engine":
        """The second model that a knob names (draft, judge, amateur), loaded before the run began.

        Raises: BadParameter for a model that no knob of this run names."""
        if ref not in self.engines:
            raise BadParameter(f"The model {ref!r} was not loaded with this run: no knob names it.")
        return self.engines[ref]

    def begin(self, engine: "Engine", ids: "Sequence[int]") -> "Cursor":
        """A cursor after `ids`: forked from the run this one goes on from when its cache is still
        there, computed otherwise."""
        cursor = self.kept(engine, ids) or engine.prefill(ids)
        if engine is self.engines.get("", engine):
            self.cursors.append(cursor)
        return cursor
