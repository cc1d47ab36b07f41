"""How well scores put right answers before wrong ones, and what is gained by withholding the rest.

Higher scores must mean surer: turn the others round first. Only the order counts. Rows of equal
score count as their mean in every curve, so that the order in which they come changes nothing.

Source: AUROC and average precision as scikit-learn defines them; risk and coverage of Geifman et
        al. 2018 (arXiv:1805.08206); prediction rejection ratio of Malinin et al. 2021, in the form
        of LM-Polygraph (Fadeeva et al. 2023, arXiv:2311.07383).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from analyzers.evaluation.calibration import Numbers

ONE_CLASS = "all answers are {}: there is nothing to tell apart"


@dataclass(frozen=True)
class Usable:
    """What is left of scores when those that are no number are dropped.

    scores: finite; infinite ones became 1 more than the highest, or 1 less than the lowest. rows:
    their places in what was given. dropped: how many had no score."""

    scores: Numbers
    rows: NDArray[np.intp]
    dropped: int


def usable(scores: Numbers) -> Usable:
    rows = np.flatnonzero(~np.isnan(scores))
    kept = scores[rows].copy()
    finite = kept[np.isfinite(kept)]
    top, low = (finite.max(), finite.min()) if len(finite) else (0.0, 0.0)
    kept[kept == np.inf], kept[kept == -np.inf] = top + 1, low - 1
    return Usable(kept, rows, len(scores) - len(rows))


def one_class(right: Numbers) -> str:
    """Why nothing can be ranked; "" where there are right answers and wrong ones."""
    if not len(right):
        return "there are no answers"
    kinds = {0.0: "wrong", 1.0: "right"}
    return ONE_CLASS.format(kinds[float(right[0])]) if (right == right[0]).all() else ""


def auroc(scores: Numbers, right: Numbers) -> float | None:
    """Probability that a right answer has the higher score than a wrong one, ties counted half; 0.5
    = chance. None, and never 0.5, where all are right or all wrong."""
    return None if one_class(right) else float(roc_auc_score(right, scores))


def auprc(scores: Numbers, right: Numbers) -> float | None:
    """Average precision with right answers as positives; chance = the share that is right. None
    where all are right or all wrong."""
    return None if one_class(right) else float(average_precision_score(right, scores))


def roc(scores: Numbers, right: Numbers) -> tuple[Numbers, Numbers]:
    """(share of the wrong, share of the right) above each threshold. Needs both."""
    wrong, found, _ = roc_curve(right, scores)
    return wrong, found


def precision_recall(scores: Numbers, right: Numbers) -> tuple[Numbers, Numbers]:
    """(recall, precision) above each threshold, from none to all. Needs both."""
    precision, recall, _ = precision_recall_curve(right, scores)
    return recall[::-1], precision[::-1]


# Answering only when sure enough


@dataclass(frozen=True)
class Selection:
    """Answering only from a threshold on. accuracy: among what is answered, None for nothing."""

    threshold: float
    coverage: float
    accuracy: float | None
    answered: int
    withheld: int


def select(scores: Numbers, right: Numbers, threshold: float) -> Selection:
    answered = scores >= threshold
    count = int(answered.sum())
    return Selection(
        threshold,
        count / max(len(scores), 1),
        float(right[answered].mean()) if count else None,
        count,
        len(scores) - count,
    )


def risk_coverage(scores: Numbers, right: Numbers) -> tuple[Numbers, Numbers]:
    """(coverage k/n, share that is wrong among the k surest), for k = 1 to n."""
    sizes = np.arange(1, len(right) + 1)
    return sizes / len(right), np.cumsum(1 - surest_first(scores, right)) / sizes


def aurc(scores: Numbers, right: Numbers) -> float:
    """Area under the risk-coverage curve: mean risk over all coverages, lower = better; in random
    order it is the share that is wrong."""
    return float(risk_coverage(scores, right)[1].mean())


def e_aurc(scores: Numbers, right: Numbers) -> float:
    """What is above the best possible AURC; 0 = every right answer before every wrong one."""
    return aurc(scores, right) - aurc(right, right)


def prr(scores: Numbers, quality: Numbers) -> float | None:
    """Prediction rejection ratio with nothing left out: 1 = the best order, 0 = a random one, below
    = worse. None where all are equally good. quality: 0 to 1, higher = better."""
    best, chance = _kept(quality, quality), float(quality.mean())
    return (_kept(scores, quality) - chance) / (best - chance) if best > chance else None


def surest_first(scores: Numbers, values: Numbers) -> Numbers:
    """`values` by falling score; among equal scores each is their mean."""
    _, group = np.unique(-scores, return_inverse=True)
    counts = np.bincount(group)
    return np.repeat(np.bincount(group, values) / counts, counts)


def _kept(scores: Numbers, quality: Numbers) -> float:
    """Mean quality of the k surest, over all k."""
    sizes = np.arange(1, len(quality) + 1)
    return float(np.mean(np.cumsum(surest_first(scores, quality)) / sizes))
