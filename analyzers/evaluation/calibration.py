"""How well probabilities match what happens: confidences against right (1) and wrong (0).

Source: expected calibration error of Naeini et al. 2015 and Guo et al. 2017 (arXiv:1706.04599),
        adaptive bins of Nixon et al. 2019 (arXiv:1904.01685); the decomposition of Murphy 1973 with
        the terms inside of bins of Stephenson et al. 2008.
All of them depend on the number of bins and are too high for few rows: give n and an interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Rule = Literal["width", "mass"]
"""width: bins as wide as each other. mass: with as many rows as each other."""
BINS = 10
CLIP = 1e-6
"""Confidences of exactly 0 or 1 would make one mistake infinitely bad."""


@dataclass(frozen=True)
class Bin:
    """Rows of about the same confidence. lo, hi: the edges, of equal mass the least and the most
    confidence in it. confidence, accuracy: means. rows: their places in what was given."""

    lo: float
    hi: float
    confidence: float
    accuracy: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Decomposition:
    """Brier score = reliability - resolution + uncertainty + variance - covariance.

    reliability: what miscalibration costs (lower = better). resolution: what telling right from
    wrong gains (higher = better). uncertainty: of the rows themselves. variance, covariance: of
    what differs inside of bins."""

    reliability: float
    resolution: float
    uncertainty: float
    variance: float
    covariance: float


def places(confidence: Numbers, k: int = BINS, rule: Rule = "width") -> NDArray[np.intp]:
    """The bin of each row, from 0. Of equal width the first includes 0, each its upper edge. Of
    equal mass ties are parted by their order, and there are no more bins than rows."""
    if rule == "width":
        return np.searchsorted(np.arange(1, k) / k, confidence, side="left")
    found = np.empty(len(confidence), dtype=np.intp)
    order = np.argsort(confidence, kind="stable")
    for place, rows in enumerate(np.array_split(order, min(k, max(len(order), 1)))):
        found[rows] = place
    return found


def bins(confidence: Numbers, right: Numbers, k: int = BINS, rule: Rule = "width") -> list[Bin]:
    """Those that have rows, least confident first."""
    where = places(confidence, k, rule)
    found = []
    for place in np.unique(where):
        rows = np.flatnonzero(where == place)
        own = confidence[rows]
        lo, hi = (place / k, (place + 1) / k) if rule == "width" else (own.min(), own.max())
        mean, share = float(own.mean()), float(right[rows].mean())
        found.append(Bin(float(lo), float(hi), mean, share, tuple(rows.tolist())))
    return found


def ece(confidence: Numbers, right: Numbers, k: int = BINS, rule: Rule = "width") -> float:
    """Expected calibration error, 0 to 1, lower = better."""
    weights, gaps = _gaps(confidence, right, k, rule)
    return float(weights @ np.abs(gaps))


def rms(confidence: Numbers, right: Numbers, k: int = BINS, rule: Rule = "mass") -> float:
    """Root of the mean squared calibration error, 0 to 1, lower = better."""
    weights, gaps = _gaps(confidence, right, k, rule)
    return float(np.sqrt(weights @ gaps**2))


def worst(confidence: Numbers, right: Numbers, k: int = BINS, rule: Rule = "width") -> float:
    """Maximum calibration error: of the worst bin, however few rows it has."""
    return float(np.abs(_gaps(confidence, right, k, rule)[1]).max())


def overconfidence(confidence: Numbers, right: Numbers) -> float:
    """Mean confidence less accuracy: above 0 = too sure, below = not sure enough."""
    return float(confidence.mean() - right.mean())


def brier(confidence: Numbers, right: Numbers) -> float:
    """Mean squared difference, 0 to 1, lower = better; 0.25 for always saying one half."""
    return float(np.mean((confidence - right) ** 2))


def base_rate(right: Numbers) -> float:
    """Brier score of always saying how many are right."""
    share = float(right.mean())
    return share * (1 - share)


def skill(confidence: Numbers, right: Numbers) -> float | None:
    """1 = perfect, 0 = as good as always saying how many are right, below = worse; None where all
    are right or all wrong."""
    base = base_rate(right)
    return 1 - brier(confidence, right) / base if base else None


def nll(confidence: Numbers, right: Numbers) -> tuple[float, int]:
    """(mean negative log-likelihood in nats, lower = better; how many confidences were clipped to
    stay CLIP away from 0 and 1)."""
    inside = confidence.clip(CLIP, 1 - CLIP)
    value = -np.mean(right * np.log(inside) + (1 - right) * np.log1p(-inside))
    return float(value), int((inside != confidence).sum())


def decompose(
    confidence: Numbers, right: Numbers, k: int = BINS, rule: Rule = "mass"
) -> Decomposition:
    """Exact: its terms add up to the Brier score."""
    where = places(confidence, k, rule)
    counts = np.bincount(where)
    held = np.maximum(counts, 1)
    weights = counts / len(where)
    mean = np.bincount(where, confidence) / held
    share = np.bincount(where, right) / held
    off, missed = confidence - mean[where], right - share[where]
    return Decomposition(
        reliability=float(weights @ (mean - share) ** 2),
        resolution=float(weights @ (share - right.mean()) ** 2),
        uncertainty=base_rate(right),
        variance=float(np.mean(off**2)),
        covariance=float(2 * np.mean(off * missed)),
    )


def numbers(values: Sequence[float] | Sequence[bool]) -> Numbers:
    return np.asarray(values, dtype=np.float64)


def _gaps(confidence: Numbers, right: Numbers, k: int, rule: Rule) -> tuple[Numbers, Numbers]:
    """(share of the rows, accuracy less confidence) of each bin; a bin without rows has weight 0
    and no gap."""
    where = places(confidence, k, rule)
    counts = np.bincount(where)
    difference = np.bincount(where, right - confidence)
    return counts / len(where), difference / np.maximum(counts, 1)
