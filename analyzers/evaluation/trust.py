"""How far a signal can be trusted: every metric of its scores against right and wrong answers, each
with its interval.

A signal that is no probability has no calibration error: squeezing it into 0 to 1 would only give
its units one. It has ranks, and probabilities once it is recalibrated on other questions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from analyzers.evaluation import calibration, ranking
from analyzers.evaluation.calibration import Numbers
from analyzers.evaluation.intervals import FEW, LEVEL, RESAMPLES, wilson

Surer = Literal["higher", "lower"]
"""Which scores mean that the answer is more likely right."""


@dataclass(frozen=True)
class Measured:
    """A metric with its 95 % interval; None where it is undefined. n: the rows it rests on."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int


@dataclass(frozen=True)
class Trust:
    """metrics: by name, those of RANKS always, those of PROBABILITIES only for probabilities.
    dropped: rows that have no score. why: what makes metrics undefined, "" for nothing. few: too
    few rows for a verdict."""

    surer: Surer
    probability: bool
    metrics: Mapping[str, Measured]
    n: int
    dropped: int
    why: str

    @property
    def few(self) -> bool:
        return self.n < FEW

    def as_mapping(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "surer": self.surer,
            "probability": self.probability,
            "n": self.n,
            "dropped": self.dropped,
            "why": self.why,
            "metrics": {name: asdict(measured) for name, measured in self.metrics.items()},
        }


Metric = Callable[[Numbers, Numbers], float | None]


def _accuracy(scores: Numbers, right: Numbers) -> float:
    return float(right.mean())


def _adaptive(confidence: Numbers, right: Numbers) -> float:
    return calibration.ece(confidence, right, rule="mass")


def _nll(confidence: Numbers, right: Numbers) -> float:
    return calibration.nll(confidence, right)[0]


def _reliability(confidence: Numbers, right: Numbers) -> float:
    return calibration.decompose(confidence, right).reliability


def _resolution(confidence: Numbers, right: Numbers) -> float:
    return calibration.decompose(confidence, right).resolution


RANKS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "auroc": ranking.auroc,
    "auprc": ranking.auprc,
    "aurc": ranking.aurc,
    "e_aurc": ranking.e_aurc,
    "prr": ranking.prr,
}
PROBABILITIES: Mapping[str, Metric] = {
    "ece": calibration.ece,
    "adaptive_ece": _adaptive,
    "rms": calibration.rms,
    "max_ce": calibration.worst,
    "overconfidence": calibration.overconfidence,
    "brier": calibration.brier,
    "skill": calibration.skill,
    "nll": _nll,
    "reliability": _reliability,
    "resolution": _resolution,
}
LESS_IS_BETTER = frozenset(
    ("aurc", "e_aurc", "ece", "adaptive_ece", "rms", "max_ce", "brier", "nll", "reliability")
)


def trust(
    scores: Sequence[float | None],
    right: Sequence[bool],
    *,
    surer: Surer,
    probability: bool,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Trust:
    """Of one score a question; None and nan are dropped and counted.

    probability: the scores are confidences from 0 to 1. resamples: 0 leaves the intervals out, for
    numbers that are shown while they still grow.
    """
    given = calibration.numbers([np.nan if score is None else score for score in scores])
    kept = ranking.usable(given if surer == "higher" else -given)
    its, good = kept.scores, calibration.numbers(right)[kept.rows]
    metrics = {**RANKS, **(PROBABILITIES if probability else {})}
    if not len(its):
        empty = Measured(None, None, None, 0)
        names = dict.fromkeys(metrics, empty)
        return Trust(surer, probability, names, 0, kept.dropped, ranking.one_class(good))
    values = {name: metric(its, good) for name, metric in metrics.items()}
    spread = dict(_intervals(metrics, its, good, seed, resamples))
    share = wilson(int(good.sum()), len(good))
    spread["accuracy"] = share.lo, share.hi
    return Trust(
        surer,
        probability,
        {name: _measured(value, spread.get(name), len(good)) for name, value in values.items()},
        len(good),
        kept.dropped,
        ranking.one_class(good),
    )


def correlations(
    columns: Mapping[str, Sequence[float | None]],
) -> dict[tuple[str, str], float | None]:
    """Spearman's rank correlation of each two signals, over the rows that have both; None for
    fewer than three rows, or where one of them never changes."""
    arrays = {
        name: calibration.numbers([np.nan if value is None else value for value in column])
        for name, column in columns.items()
    }
    return {
        (one, other): _spearman(arrays[one], arrays[other]) for one in arrays for other in arrays
    }


def _spearman(one: Numbers, other: Numbers) -> float | None:
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < 3:
        return None
    a, b = mean_ranks(one[both]), mean_ranks(other[both])
    if not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def mean_ranks(scores: Numbers) -> Numbers:
    """From 1 for the lowest; equal scores share the mean of their ranks."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _measured(value: float | None, ends: tuple[float, float] | None, n: int) -> Measured:
    lo, hi = ends or (None, None)
    return Measured(value, lo, hi, n)


def _intervals(
    metrics: Mapping[str, Metric], scores: Numbers, right: Numbers, seed: int, resamples: int
) -> Iterator[tuple[str, tuple[float, float]]]:
    """The percentile bootstrap. Where a metric is undefined for a resample, that one does not count
    for it."""
    if not resamples:
        return
    rows = np.random.default_rng(seed).integers(0, len(right), (resamples, len(right)))
    fast = {**metrics, "auroc": quick_auroc, "auprc": quick_auprc}
    del fast["accuracy"]
    found: dict[str, list[float]] = {name: [] for name in fast}
    for each in rows:
        its, good = scores[each], right[each]
        for name, metric in fast.items():
            value = metric(its, good)
            if value is not None:
                found[name].append(value)
    tail = 50 * (1 - LEVEL)
    for name, values in found.items():
        if values:
            lo, hi = np.percentile(values, (tail, 100 - tail))
            yield name, (float(lo), float(hi))


# scikit-learn's own take a few milliseconds a call, and there are thousands of resamples.


def quick_auroc(scores: Numbers, right: Numbers) -> float | None:
    """As `ranking.auroc`, from the sum of the ranks of the right answers."""
    good = right.sum()
    bad = len(right) - good
    if not good or not bad:
        return None
    return float((mean_ranks(scores) @ right - good * (good + 1) / 2) / (good * bad))


def quick_auprc(scores: Numbers, right: Numbers) -> float | None:
    """As `ranking.auprc`: the mean precision at the thresholds of the right answers."""
    good = right.sum()
    if not good or good == len(right):
        return None
    _, group = np.unique(-scores, return_inverse=True)
    found = np.bincount(group, right)
    precision = np.cumsum(found) / np.cumsum(np.bincount(group))
    return float(found @ precision / good)
