"""What a run gives its method beside the engine, the task and the knobs."""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analyzers.engine.core import Cursor, Engine


class Kept(Protocol):
    """Looks for a cursor of an earlier run whose text `ids` goes on from."""

    def __call__(self, engine: "Engine", ids: "Sequence[int]") -> "Cursor | None": ...


def nothing_kept(engine: "Engine", ids: "Sequence[int]") -> None:
    return None


@dataclass
class Context:
    """seed: of the run. `cursors` collects what `begin` handed out, for the runner to keep."""

    seed: int
    kept: Kept = nothing_kept
    cursors: "list[Cursor]" = field(default_factory=list)

    def rng(self, *keys: object) -> random.Random:
        """A generator for one purpose, from the run's seed and the keys: the same every time."""
        return random.Random(repr((self.seed, *keys)))

    def begin(self, engine: "Engine", ids: "Sequence[int]") -> "Cursor":
        """A cursor after `ids`: forked from the run this one goes on from when its cache is still
        there, computed otherwise."""
        cursor = self.kept(engine, ids) or engine.prefill(ids)
        self.cursors.append(cursor)
        return cursor
