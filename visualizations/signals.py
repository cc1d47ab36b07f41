"""The five token signals, and how unsure each value of them is on one scale of six steps.

The numbers are of the model's own distribution p (temperature 1, no filters). Probability, rank
and surprisal look at the written token; entropy and margin look at the whole distribution, so
they also show doubt where the likeliest token was written.

The thresholds are ours. Probability: a token starts to be tinted below 0.8, where another token
can be a quarter as likely; below 0.05 it was a surprise. Margin mirrors it (0.8 against 0.2 leaves
0.6). Entropy: e^H is the number of equally likely tokens, so 1 nat is about 3 and 4 nats about
55. Surprisal starts later than probability (0.5 nats is p = 0.61): it is for reading long texts.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import neg
from typing import Literal

from analyzers.trace import Token

LEVELS = 6


@dataclass(frozen=True)
class Signal:
    """One way to say how sure the model was of a token.

    value: None where the token carries no such number. steps: five thresholds from sure to
    unsure; a value is at level n when it passed n of them. letter: prefix of the level classes
    in the style sheet; the class `by-<name>` on a container picks the signal.
    """

    name: str
    label: str
    letter: str
    formula: str
    unit: str
    higher_is: Literal["sure", "unsure"]
    steps: tuple[float, ...]
    value: Callable[[Token], float | None]
    digits: int = 2

    def level(self, token: Token) -> int:
        """0 (sure, no tint) to 5 (most unsure); 0 also where there is no value."""
        value = self.value(token)
        return 0 if value is None else self.level_of(value)

    def level_of(self, value: float) -> int:
        """A value exactly on a threshold counts as sure when higher is sure, else as unsure."""
        if self.higher_is == "sure":
            return bisect_left(self.steps, -value, key=neg)
        return bisect_right(self.steps, value)

    def mark(self, token: Token) -> str:
        """The level class of a token: letter and level, or letter and x without a value."""
        value = self.value(token)
        return self.letter + ("x" if value is None else str(self.level_of(value)))


def probability(token: Token) -> float | None:
    return None if token.logprob is None else math.exp(min(token.logprob, 0.0))


def _surprisal(token: Token) -> float | None:
    return None if token.logprob is None else max(-token.logprob, 0.0)


PROBABILITY = Signal(
    "probability",
    "Probability",
    "p",
    "p of the written token",
    "",
    "sure",
    (0.8, 0.6, 0.4, 0.2, 0.05),
    probability,
)
ENTROPY = Signal(
    "entropy",
    "Entropy",
    "h",
    "−Σ p ln p over all tokens",
    "nats",
    "unsure",
    (0.5, 1.0, 2.0, 3.0, 4.0),
    lambda token: token.entropy,
)
MARGIN = Signal(
    "margin",
    "Margin",
    "m",
    "p of the likeliest token − p of the second",
    "",
    "sure",
    (0.6, 0.4, 0.2, 0.1, 0.03),
    lambda token: token.margin,
)
RANK = Signal(
    "rank",
    "Rank",
    "r",
    "place of the written token, 1 = likeliest",
    "",
    "unsure",
    (2, 3, 5, 10, 100),
    lambda token: token.rank,
    digits=0,
)
SURPRISAL = Signal(
    "surprisal",
    "Surprisal",
    "s",
    "−ln p of the written token",
    "nats",
    "unsure",
    (0.5, 1.0, 2.0, 3.0, 5.0),
    _surprisal,
)

SIGNALS = {signal.name: signal for signal in (PROBABILITY, ENTROPY, MARGIN, RANK, SURPRISAL)}
