"""What a search will take, told before it begins: its budget by its knobs, and its time by what a
pass of the model took in the last run of the same kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analyzers.engine.cost import Cost
from analyzers.errors import BadInput
from analyzers.params import build
from analyzers.registry import Method
from analyzers.trace import Metric
from app.runner import ModelChoice
from sessions.store import RUNNING, Store
from visualizations.text import counted

LOOK_BACK = 200
"""So many of the newest runs are looked at for one of the same kind."""
OF_MODEL = ("name", "hash", "quantization", "dtype", "device")
"""What of a model's identity must be equal for its passes to take the same time."""
UNLIKE = 0.8
"""A run that took less than this share of the most that it might have taken is told of."""
UNKNOWN = "time: known after the first run"


@dataclass(frozen=True)
class Pace:
    """Of one run. seconds: a pass of the model. share: of the passes that it might have made at
    most, those that it made; 1 where that is not known."""

    seconds: float
    share: float = 1.0


class Paces:
    """How fast stored runs were; each run is read once. but: the id of a run
    that does not count."""

    def __init__(self, store: Store, but: str = "") -> None:
        self._store, self._but = store, but
        self._known: dict[str, Pace | None] = {}

    def last(self, method: str, model: Mapping[str, Any]) -> Pace | None:
        """That of the newest run of this method and this model (what is known of its identity)
        that has ended; None where there is none."""
        wanted = {name: model[name] for name in OF_MODEL if name in model}
        for run in self._store.runs(limit=LOOK_BACK):
            if run.id == self._but or run.method != method or run.status == RUNNING:
                continue
            # A run without a process was imported, and may come from a faster machine.
            if not run.process or not wanted.items() <= run.identity.items():
                continue
            if run.id not in self._known:
                self._known[run.id] = self._read(run.id)
            if pace := self._known[run.id]:
                return pace
        return None

    def _read(self, run_id: str) -> Pace | None:
        told = {
            stamped.event.name: (stamped.t, stamped.event.value)
            for stamped in self._store.events(run_id)
            if isinstance(stamped.event, Metric)
        }
        seconds, spent = told.get("spent forwards", (0.0, 0.0))
        _, expected = told.get("expected forwards", (0.0, spent))
        return Pace(seconds / spent, min(1.0, spent / max(expected, 1))) if spent else None


def estimate(
    method: Method, given: Mapping[str, Any], model: Mapping[str, Any], paces: Paces
) -> str:
    """ "At most 240 tokens, 26 evaluations, 310 forwards · about 4 s if it goes as the last run,
    at most 14 s"; "" where the method cannot tell or the knobs are wrong.

    given: the knobs, as `build` takes them. model: what is known of its identity, and its `cost` (a
    Cost as mapping), by which the least time is told before the first run. Raises: StoreError.
    """
    if method.expect is None:
        return ""
    try:
        expected = method.expect(build(method.params, given))
    except BadInput:
        return ""
    most = [counted(count, what[:-1]) for what, count in vars(expected).items() if count]
    time = UNKNOWN
    if pace := paces.last(method.name, model):
        longest = pace.seconds * expected.forwards
        time = f"about {_roughly(longest)} on this model"
        if pace.share < UNLIKE:
            likely = _roughly(pace.share * longest)
            time = f"about {likely} if it goes as the last run, at most {_roughly(longest)}"
    elif model.get("cost"):  # of passes that write; those that read a text for a judge take longer
        cost = Cost.from_mapping(model["cost"])
        width = max(1.0, expected.tokens / max(expected.forwards, 1))  # texts side by side
        seconds = cost.step_ms / 1000 * cost.v(width)
        time = f"{_roughly(seconds * expected.forwards)} or more on this model"
    return f"At most {', '.join(most)} · {time}"


def known_of(choice: ModelChoice) -> dict[str, str]:
    """Of the identity of a model that is not loaded yet: what is not left to be decided."""
    said = {"name": choice.ref} | {name: getattr(choice, name) for name in OF_MODEL[2:]}
    return {name: value for name, value in said.items() if value != "auto"}


def _roughly(seconds: float) -> str:
    """Two digits at most: nobody knows it better."""
    if seconds < 1:
        return "a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
