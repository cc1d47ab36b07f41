"""What a judge is: something that says of texts how good they are.

A judge may be the model that wrote the text, another one, or a program. Searches and
self-assessment use the same ones.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from analyzers.common.budget import Budget
from analyzers.engine.signals import DIGITS
from analyzers.trace import Judgement

Scale = tuple[float, float, str, bool]
"""(lowest, highest, what higher means, whether it is a probability)."""


@dataclass(frozen=True)
class Verdict:
    """score: in the judge's scale, None where it could not be read. label_mass: what the model
    gives to the labels, where it was asked for labels. detail: where the score comes from. passes:
    of the model, for this text."""

    score: float | None
    verdict: str = ""
    label_mass: float | None = None
    rationale: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 0


class Judge(Protocol):
    """name: as people read it. Judges of one run may share passes between the texts of a call."""

    name: str
    scale: Scale

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text. Raises: OutOfContext, Stopped, ModelBroken."""
        ...


class Court:
    """A judge with a memory and a budget: no text is judged twice."""

    def __init__(
        self, judge: Judge, budget: Budget, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.judge = judge
        self._budget = budget
        self._clock = clock
        self._known: dict[str, tuple[str, Verdict]] = {}

    def hear(
        self, texts: Sequence[str], target: str
    ) -> Generator[Judgement, None, list[tuple[str, Verdict]]]:
        """Yield a Judgement of each text that is new; return (key, verdict) of each.

        target: what is judged, as events name it. Raises: BudgetSpent, and as the judge."""
        fresh = list(dict.fromkeys(text for text in texts if text not in self._known))
        self._budget.charge("evaluations", len(fresh))
        began = self._clock()
        verdicts = self.judge(fresh) if fresh else []
        ms = 1e3 * (self._clock() - began) / max(len(fresh), 1)
        for text, verdict in zip(fresh, verdicts, strict=True):
            key = f"e{len(self._known)}"
            self._known[text] = key, verdict
            yield Judgement(
                key=key,
                target=target,
                judge=self.judge.name,
                score=None if verdict.score is None else round(verdict.score, DIGITS),
                scale=self.judge.scale,
                verdict=verdict.verdict,
                label_mass=verdict.label_mass,
                rationale=verdict.rationale,
                detail=dict(verdict.detail),
                passes=verdict.passes,
                ms=round(ms, 3),
            )
        return [self._known[text] for text in texts]
