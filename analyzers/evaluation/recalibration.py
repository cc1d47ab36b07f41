"""Making probabilities of scores: fitted on some questions, used on others.

Source: temperature scaling of Guo et al. 2017 (arXiv:1706.04599), the sigmoid with smoothed targets
        of Platt 1999, isotonic regression of Zadrozny and Elkan 2002; the fits are scikit-learn's.
Temperature needs probabilities; the other two also make probabilities of scores that are none.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from analyzers.errors import BadInput
from analyzers.evaluation.calibration import CLIP, Numbers
from analyzers.evaluation.ranking import one_class

Way = Literal["temperature", "platt", "isotonic"]
FEW = 50
"""Isotonic steps that rest on fewer rows follow chance."""


class Recalibrated:
    """probabilities(scores): the map that was fitted. about: its numbers in words. warning: why not
    to trust it, "" where nothing speaks against it."""

    def __init__(
        self, probabilities: Callable[[Numbers], Numbers], about: str, warning: str = ""
    ) -> None:
        self.probabilities = probabilities
        self.about = about
        self.warning = warning


def fit(way: Way, scores: Numbers, right: Numbers, *, probability: bool) -> Recalibrated:
    """The map from scores (higher = surer) to probabilities of being right.

    probability: whether the scores are probabilities already. Raises: BadInput for temperature
    where they are none, and where all answers are right or all wrong.
    """
    if why := one_class(right):
        raise BadInput(f"Recalibration is not possible: {why}.")
    if way == "temperature":
        if not probability:
            raise BadInput("A temperature needs probabilities: take platt or isotonic.")
        return _temperature(scores, right)
    return _platt(scores, right, probability) if way == "platt" else _isotonic(scores, right)


def split(ids: Sequence[str], seed: int, share: float = 0.5) -> NDArray[np.bool_]:
    """Which rows to fit on; the others are for reporting. The same question falls on the same side
    in every run with this seed, whatever else is asked."""
    digests = (hashlib.sha256(f"{seed}:{id}".encode()).digest() for id in ids)
    return np.array([int.from_bytes(digest[:8]) < share * 2**64 for digest in digests], dtype=bool)


def logit(probabilities: Numbers) -> Numbers:
    inside = probabilities.clip(CLIP, 1 - CLIP)
    return np.log(inside) - np.log1p(-inside)


def _temperature(scores: Numbers, right: Numbers) -> Recalibrated:
    """The only weight of a logistic regression without an intercept is 1 / T."""
    one_over = _logistic(logit(scores), right, np.ones(len(right)), intercept=False)[0]
    if one_over <= 0:
        return Recalibrated(
            lambda new: np.full(len(new), 0.5),
            "T = infinite",
            "The surer the model, the less often it is right: no temperature mends that.",
        )
    return Recalibrated(lambda new: _sigmoid(one_over * logit(new)), f"T = {1 / one_over:.3g}")


def _platt(scores: Numbers, right: Numbers, probability: bool) -> Recalibrated:
    """Targets are drawn in from 0 and 1 by how few rows there are: each row counts as partly right
    and partly wrong."""
    middle, spread = (0.0, 1.0) if probability else (float(scores.mean()), float(scores.std()) or 1)

    def place(values: Numbers) -> Numbers:
        return logit(values) if probability else (values - middle) / spread

    good, bad = right.sum(), len(right) - right.sum()
    target = np.where(right == 1, (good + 1) / (good + 2), 1 / (bad + 2))
    x, twice = place(scores), np.ones(len(right))
    slope, shift = _logistic(
        np.concatenate([x, x]),
        np.concatenate([twice, 0 * twice]),
        np.concatenate([target, 1 - target]),
        intercept=True,
    )
    warning = "The surer the model, the less often it is right." if slope < 0 else ""
    return Recalibrated(
        lambda new: _sigmoid(slope * place(new) + shift),
        f"a = {slope:.3g}, b = {shift:.3g}",
        warning,
    )


def _isotonic(scores: Numbers, right: Numbers) -> Recalibrated:
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, right)
    few = f"Fitted on {len(right)} answers: its steps need at least {FEW}."
    return Recalibrated(
        lambda new: np.asarray(fitted.predict(new), dtype=np.float64),
        f"{len(np.unique(fitted.y_thresholds_))} steps",
        few if len(right) < FEW else "",
    )


def _logistic(
    x: Numbers, right: Numbers, weights: Numbers, *, intercept: bool
) -> tuple[float, float]:
    """(slope, shift) of the likeliest sigmoid, without a penalty."""
    fitted = LogisticRegression(C=np.inf, fit_intercept=intercept, tol=1e-8, max_iter=1000)
    fitted.fit(x[:, None], right, weights)
    return float(fitted.coef_[0, 0]), float(np.atleast_1d(fitted.intercept_)[0])


def _sigmoid(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))
