"""What a search may spend, counted before it is spent."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from analyzers.trace import Event, Metric

if TYPE_CHECKING:
    from analyzers.engine import Engine

T = TypeVar("T")
What = Literal["tokens", "evaluations", "nodes"]


class BudgetSpent(Exception):
    """What was to be done next is more than what is left; nothing of it was done."""

    def __init__(self, what: What, limit: int) -> None:
        super().__init__(f"the budget of {limit:,} {what} is spent")


@dataclass
class Budget:
    """Most tokens to write, texts to judge and nodes to make; 0 = no limit.

    tokens: every token that is written, in rollouts as in answers; what is only read is not
    counted. spent: what was charged so far."""

    tokens: int = 0
    evaluations: int = 0
    nodes: int = 0
    spent: dict[What, int] = field(
        default_factory=lambda: dict.fromkeys(get_args(What), 0), init=False
    )

    def charge(self, what: What, count: int = 1) -> None:
        """Raises: BudgetSpent when that is more than what is left; then nothing is charged."""
        limit: int = getattr(self, what)
        if limit and self.spent[what] + count > limit:
            raise BudgetSpent(what, limit)
        self.spent[what] += count

    def metrics(self, step: int, forwards: int) -> Generator[Metric, None, None]:
        """What was spent up to this step; forwards: passes of the model since the run began."""
        for what, count in self.spent.items():
            yield Metric(f"spent {what}", step, count, what)
        yield Metric("spent forwards", step, forwards, "forwards")


@dataclass(frozen=True)
class Expected:
    """What a search will spend at most by its knobs, before it begins. forwards: passes of the
    model that writes, those that read several texts at once counted once."""

    tokens: int
    evaluations: int
    forwards: int

    def metrics(self) -> Generator[Metric, None, None]:
        """The same, for the bars that fill while it runs."""
        for what, count in vars(self).items():
            yield Metric(f"expected {what}", 0, count, what)


class Forwards:
    """Counts the passes of the model that one run makes; another run may use the same model between
    its events."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.count = 0

    def of(self, events: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """The same events, and what they return."""
        while True:
            before = self._engine.forwards
            try:
                event = next(events)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self.count += self._engine.forwards - before
            yield event
