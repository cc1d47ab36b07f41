"""How far a number measured on a few questions can be trusted.

Source: Wilson 1927 for proportions; the percentile bootstrap of Efron 1979 for everything else.
Rows are whole questions: where several answers belong to one question, they are one row.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from statistics import NormalDist, fmean
from typing import TypeVar

Row = TypeVar("Row")
LEVEL = 0.95
RESAMPLES = 2000
FEW = 30
"""With fewer rows the interval is shown without a verdict."""


@dataclass(frozen=True)
class Interval:
    """value: what was measured. lo, hi: the ends of its 95 % interval (or another level's)."""

    value: float
    lo: float
    hi: float


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """The interval of a proportion; of none at all (0 of 0) nothing is known: 0 to 1."""
    if n == 0:
        return Interval(0.0, 0.0, 1.0)
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the exact value; rounding would put it a little outside.
    lo = (middle - half) / scale if successes else 0.0
    hi = (middle + half) / scale if successes < n else 1.0
    return Interval(p, lo, hi)


def bootstrap(
    values: Sequence[float],
    seed: int,
    of: Callable[[Sequence[float]], float] = fmean,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile interval of a statistic; the same seed gives the same interval.

    Raises: ValueError for no values."""
    return _resampled(values, seed, of, resamples, level)


def paired(
    first: Sequence[float],
    second: Sequence[float],
    seed: int,
    of: Callable[[Sequence[float]], float] = fmean,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Of the second minus the first, on the same rows: each resample takes the same rows of both.

    Raises: ValueError for different lengths, or none."""

    def difference(pairs: Sequence[tuple[float, float]]) -> float:
        return of([later for _, later in pairs]) - of([earlier for earlier, _ in pairs])

    pairs = list(zip(first, second, strict=True))
    return _resampled(pairs, seed, difference, resamples, level)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, straight between the two nearest."""
    place = share * (len(ordered) - 1)
    below = floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _resampled(
    rows: Sequence[Row],
    seed: int,
    of: Callable[[Sequence[Row]], float],
    resamples: int,
    level: float,
) -> Interval:
    if not rows:
        raise ValueError("an interval needs at least one row")
    rng = random.Random(seed)
    found = sorted(of(rng.choices(rows, k=len(rows))) for _ in range(resamples))
    tail = (1 - level) / 2
    return Interval(of(rows), percentile(found, tail), percentile(found, 1 - tail))
