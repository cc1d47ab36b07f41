"""The benchmark of searches on tiny models: its rows, its chance, and that a difference is seen."""

import pytest

from analyzers.errors import CandorError
from app.bench import search
from tests.test_bench import folder as folder
from tests.test_bench import named, silent


def test_chance_is_that_of_the_pairs_that_differ():
    """Six of seven that differ: 8 of 128 ways are as good or better."""
    pairs = [(True, False)] * 6 + [(False, True)] + [(True, True)] * 9
    assert search.by_chance(pairs) == pytest.approx(8 / 128)
    assert search.by_chance([(True, True)]) == 1


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(search, "DEFAULTS", {"max_new": 3, "iterations": 3, "rollout": 4})
    monkeypatch.setattr(search, "TOPICS", ("it",))
    monkeypatch.setattr(search, "ADVICE", "Hi")
    own = {"criterion": "keywords", "wish": "a"}
    monkeypatch.setattr(search, "DEFAULTS", search.DEFAULTS | own)


def test_it_measures(folder, small, monkeypatch):
    kept = {"rain": search.PLANTED["rain"], "best_of_n": search.PLANTED["best_of_n"]}
    monkeypatch.setattr(search, "PLANTED", kept)
    rows = named(search.measure(silent, model=str(folder), seeds=2, tokens=4, paper=False))
    assert rows["rain, defaults: times as fast"]["target"] == search.FASTER
    shares = [each["value"] for name, each in rows.items() if "share of its time" in name]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1)
    planted = [each for name, each in rows.items() if "planted judge" in name]
    assert [each["n"] for each in planted] == [2, 2]


def test_another_tree_is_no_comparison(folder, small, monkeypatch):
    trees = iter([["one"], ["other"]])
    monkeypatch.setattr(search.Taken, "tree", property(lambda self: next(trees)))
    with pytest.raises(CandorError, match="another tree"):
        search.measure(silent, model=str(folder), paper=False)
