"""The numbers of self-assessment against worked examples, scikit-learn and the slow way."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from analyzers.errors import BadInput
from analyzers.evaluation import calibration, ranking, recalibration, trust
from analyzers.evaluation.calibration import numbers

C = numbers([0.95, 0.90, 0.85, 0.80, 0.70, 0.60, 0.55, 0.40, 0.30, 0.10])
Y = numbers([1, 1, 0, 1, 1, 0, 1, 0, 0, 0])


def drawn(n, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    c = rng.random(n)
    right = (rng.random(n) < c).astype(float)
    return (np.round(c, 1) if ties else c), right


# The worked set


def test_worked_calibration():
    assert calibration.brier(C, Y) == pytest.approx(0.16875)
    assert calibration.nll(C, Y) == (pytest.approx(0.512058, abs=1e-6), 0)
    assert calibration.ece(C, Y, 5) == pytest.approx(0.2150)
    assert calibration.ece(C, Y, 5, "mass") == pytest.approx(0.1550)
    assert calibration.rms(C, Y, 5, "width") == pytest.approx(0.2355, abs=5e-5)
    assert calibration.rms(C, Y, 5, "mass") == pytest.approx(0.186748, abs=1e-6)
    assert calibration.overconfidence(C, Y) == pytest.approx(0.115)


def test_worked_decomposition_adds_up():
    parts = calibration.decompose(C, Y, 5)
    assert parts.reliability == pytest.approx(0.034875)
    assert parts.resolution == pytest.approx(0.1)
    assert parts.uncertainty == pytest.approx(0.25)
    assert parts.variance == pytest.approx(0.003875)
    assert parts.covariance == pytest.approx(0.02)


def test_worked_ranks():
    assert ranking.auroc(C, Y) == pytest.approx(0.84)
    assert ranking.auprc(C, Y) == pytest.approx(0.852857, abs=1e-6)
    assert ranking.aurc(C, Y) == pytest.approx(0.272183, abs=1e-6)
    assert ranking.aurc(Y, Y) == pytest.approx(0.177183, abs=1e-6)
    assert ranking.e_aurc(C, Y) == pytest.approx(0.095, abs=1e-6)
    assert ranking.prr(C, Y) == pytest.approx(0.705716, abs=1e-6)


# Against others


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 80), st.integers(0, 10**6), st.booleans(), st.integers(1, 12))
def test_the_decomposition_is_the_brier_score(n, seed, ties, k):
    c, y = drawn(n, seed, ties)
    for rule in ("width", "mass"):
        parts = calibration.decompose(c, y, k, rule)
        total = parts.reliability - parts.resolution + parts.uncertainty
        assert total + parts.variance - parts.covariance == pytest.approx(calibration.brier(c, y))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 80), st.integers(0, 10**6), st.booleans())
def test_equal_to_scikit_learn(n, seed, ties):
    c, y = drawn(n, seed, ties)
    assert calibration.brier(c, y) == pytest.approx(brier_score_loss(y, c, pos_label=1))
    inside = c.clip(calibration.CLIP, 1 - calibration.CLIP)
    assert calibration.nll(c, y)[0] == pytest.approx(log_loss(y, inside, labels=[0, 1]))
    if 0 < y.sum() < n:
        assert trust.quick_auroc(c, y) == pytest.approx(roc_auc_score(y, c))
        assert trust.quick_auprc(c, y) == pytest.approx(average_precision_score(y, c))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 10**6), st.integers(1, 12))
def test_bins_the_slow_way(n, seed, k):
    c, y = drawn(n, seed, ties=True)
    slow = 0.0
    for j in range(k):
        lo, hi = j / k, (j + 1) / k
        held = [i for i in range(n) if (lo < c[i] <= hi) or (j == 0 and c[i] == 0)]
        if held:
            gap = sum(y[i] for i in held) / len(held) - sum(c[i] for i in held) / len(held)
            slow += len(held) / n * abs(gap)
    assert calibration.ece(c, y, k) == pytest.approx(slow)
    for rule in ("width", "mass"):
        found = calibration.bins(c, y, k, rule)
        assert sorted(row for each in found for row in each.rows) == list(range(n))
        by_bins = sum(len(b.rows) / n * abs(b.accuracy - b.confidence) for b in found)
        assert by_bins == pytest.approx(calibration.ece(c, y, k, rule))
        assert calibration.worst(c, y, k, rule) == pytest.approx(
            max(abs(b.accuracy - b.confidence) for b in found)
        )
    sizes = [len(b.rows) for b in calibration.bins(c, y, k, "mass")]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_of_ties_changes_no_ranking_metric():
    c, y = drawn(50, 3, ties=True)
    turned = np.random.default_rng(1).permutation(50)
    for metric in trust.RANKS.values():
        assert metric(c, y) == pytest.approx(metric(c[turned], y[turned]))


def test_random_order_risks_the_error_rate():
    """Scores that are all the same are the mean over all orders."""
    assert ranking.aurc(np.zeros(10), Y) == pytest.approx(0.5)
    assert ranking.prr(np.zeros(10), Y) == pytest.approx(0.0)
    assert ranking.auroc(np.zeros(10), Y) == pytest.approx(0.5)


def test_constant_confidence_at_the_base_rate_is_calibrated_and_knows_nothing():
    c = np.full(10, 0.5)
    assert calibration.ece(c, Y) == 0
    assert calibration.skill(c, Y) == 0
    assert ranking.auroc(c, Y) == 0.5


# The edges


def test_edges_belong_to_the_bin_below_and_zero_to_the_first():
    assert list(calibration.places(numbers([0, 0.1, 0.3, 0.7, 0.70001, 1]), 10)) == [
        *(0, 0, 2, 6, 7, 9)
    ]


def test_fewer_rows_than_bins():
    c, y = numbers([0.2, 0.9]), numbers([0, 1])
    assert len(calibration.bins(c, y, 10, "mass")) == 2
    assert calibration.ece(c, y, 10, "mass") == pytest.approx(0.15)


@pytest.mark.parametrize("value, word", [(1, "right"), (0, "wrong")])
def test_one_class_is_undefined_and_says_so(value, word):
    found = trust.trust([0.2, 0.5, 0.9], [bool(value)] * 3, surer="higher", probability=True)
    assert word in found.why
    assert found.metrics["auroc"].value is None
    assert found.metrics["auroc"].lo is None
    assert found.metrics["auprc"].value is None
    assert found.metrics["prr"].value is None
    assert found.metrics["accuracy"].value == value
    assert found.metrics["brier"].value is not None


def test_nothing_at_all():
    found = trust.trust([None, math.nan], [True, False], surer="lower", probability=False)
    assert (found.n, found.dropped, found.few) == (0, 2, True)
    assert found.metrics["accuracy"].value is None
    assert found.why == "there are no answers"


def test_infinite_scores_rank_and_nan_is_dropped():
    found = trust.trust(
        [math.inf, 3.0, math.nan, -math.inf], [True, True, True, False],
        surer="higher", probability=False,
    )  # fmt: skip
    assert (found.n, found.dropped) == (3, 1)
    assert found.metrics["auroc"].value == 1
    assert ranking.usable(numbers([math.inf, 2, -math.inf])).scores.tolist() == [3, 2, 1]


def test_a_signal_whose_lower_values_are_surer_is_turned_round():
    up = trust.trust(list(C), list(Y == 1), surer="higher", probability=False)
    down = trust.trust(list(-C), list(Y == 1), surer="lower", probability=False)
    assert up.metrics == down.metrics
    assert "ece" not in up.metrics


# Intervals


def test_intervals_hold_their_value_and_repeat():
    c, y = drawn(300)
    found = trust.trust(list(c), list(y == 1), surer="higher", probability=True)
    again = trust.trust(list(c), list(y == 1), surer="higher", probability=True)
    other = trust.trust(list(c), list(y == 1), surer="higher", probability=True, seed=1)
    assert found == again != other
    assert set(found.metrics) == {*trust.RANKS, *trust.PROBABILITIES}
    for name in ("auroc", "auprc", "brier", "aurc", "prr", "nll", "accuracy"):
        measured = found.metrics[name]
        assert measured.lo < measured.value < measured.hi, name
    without = trust.trust(
        list(c), list(y == 1), surer="higher", probability=True, resamples=0
    ).metrics["auroc"]
    assert (without.value, without.lo) == (found.metrics["auroc"].value, None)


def test_an_interval_of_auroc_is_as_wide_as_hanley_and_mcneil_say():
    c, y = drawn(400, 5)
    measured = trust.trust(list(c), list(y == 1), surer="higher", probability=False).metrics[
        "auroc"
    ]
    a, good = measured.value, y.sum()
    bad = len(y) - good
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (good - 1) * (q1 - a * a) + (bad - 1) * (q2 - a * a)) / (good * bad)
    assert (measured.hi - measured.lo) / (2 * 1.96 * math.sqrt(variance)) == pytest.approx(
        1, abs=0.15
    )


def test_correlation_of_signals():
    found = trust.correlations(
        {"a": [1, 2, 3, None, 5], "b": [1, 8, 27, 3, 125], "c": [2, 2, 2, 2, 2]}
    )
    assert found["a", "b"] == pytest.approx(1)
    assert found["a", "c"] is None
    assert trust.mean_ranks(numbers([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]


# Withholding


def test_select():
    chosen = ranking.select(C, Y, 0.7)
    assert (chosen.answered, chosen.withheld, chosen.coverage) == (5, 5, 0.5)
    assert chosen.accuracy == pytest.approx(0.8)
    assert ranking.select(C, Y, 2).accuracy is None
    coverage, risk = ranking.risk_coverage(C, Y)
    assert (coverage[4], risk[4]) == (0.5, pytest.approx(0.2))


# Recalibration


def test_a_temperature_is_found_and_changes_no_order():
    rng = np.random.default_rng(0)
    honest = rng.random(4000).clip(0.01, 0.99)
    y = (rng.random(4000) < honest).astype(float)
    too_sure = 1 / (1 + np.exp(-2.5 * recalibration.logit(honest)))
    fitted = recalibration.fit("temperature", too_sure, y, probability=True)
    assert float(fitted.about.removeprefix("T = ")) == pytest.approx(2.5, rel=0.1)
    mended = fitted.probabilities(too_sure)
    assert calibration.ece(mended, y) < calibration.ece(too_sure, y) / 3
    assert ranking.auroc(mended, y) == pytest.approx(ranking.auroc(too_sure, y))


@pytest.mark.parametrize("way", ["platt", "isotonic"])
def test_scores_that_are_no_probabilities_become_some(way):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=3000) * 40 - 100
    y = (rng.random(3000) < 1 / (1 + np.exp(-(scores + 100) / 20))).astype(float)
    half = recalibration.split([str(i) for i in range(3000)], seed=0)
    fitted = recalibration.fit(way, scores[half], y[half], probability=False)
    made = fitted.probabilities(scores[~half])
    assert not fitted.warning
    assert ((made >= 0) & (made <= 1)).all()
    assert calibration.ece(made, y[~half]) < 0.05
    assert (np.diff(made[np.argsort(scores[~half])]) >= -1e-12).all()


def test_platt_is_the_sigmoid_of_its_own_smoothed_targets():
    """At the fit the mean prediction is the mean target, which stays away from 0 and 1."""
    scores, y = numbers([-2, -1, 1, 2]), numbers([0, 0, 1, 1])
    made = recalibration.fit("platt", scores, y, probability=False).probabilities(scores)
    assert made.mean() == pytest.approx(0.5)
    assert made.max() < 1
    target = numbers([0.25, 0.25, 0.75, 0.75])
    assert (scores @ made) == pytest.approx(scores @ target, abs=1e-3)


def test_a_signal_that_points_the_wrong_way_is_warned_of():
    c, y = drawn(200)
    assert recalibration.fit("platt", 1 - c, y, probability=True).warning
    turned = recalibration.fit("temperature", 1 - c, y, probability=True)
    assert turned.warning
    assert turned.probabilities(c).tolist() == [0.5] * 200


def test_recalibration_refuses_what_cannot_be():
    with pytest.raises(BadInput, match="needs probabilities"):
        recalibration.fit("temperature", C, Y, probability=False)
    with pytest.raises(BadInput, match="all answers are right"):
        recalibration.fit("platt", C, np.ones(10), probability=True)
    assert "at least 50" in recalibration.fit("isotonic", C, Y, probability=True).warning


def test_a_question_stays_on_its_side():
    ids = [f"q{i}" for i in range(1000)]
    half = recalibration.split(ids, seed=3)
    assert 430 < half.sum() < 570
    assert recalibration.split(ids[::-1], seed=3).tolist() == half.tolist()[::-1]
    assert recalibration.split(ids, seed=4).tolist() != half.tolist()
