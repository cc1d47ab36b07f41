"""What a search will take, told before it begins."""

from dataclasses import dataclass

import pytest

from analyzers import registry
from analyzers.card import Card
from analyzers.common.budget import Expected
from analyzers.engine.cost import Cost
from analyzers.params import knob
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import Metric, RunEnded, RunStarted
from app.estimate import UNKNOWN, Pace, Paces, estimate, known_of
from app.runner import Job, ModelChoice
from sessions.export import export_jsonl, import_jsonl
from sessions.store import Stamped


@dataclass(frozen=True)
class Params:
    answers: int = knob(3, "How many", lo=1, hi=9)


def expect(params: Params) -> Expected:
    return Expected(tokens=80 * params.answers, evaluations=params.answers, forwards=100)


def run(engine, task, params, ctx):
    for step in (1, 2):
        yield Metric("spent forwards", step, 20 * step, "forwards")
    return "finished"


METHOD = Method("made", Card("Made", "search", "made up", (Metric,)), Params, run, "", expect)
MODEL = {"name": "one", "hash": "abc", "quantization": "int8", "dtype": "float32", "device": "cpu"}
BUDGET = "At most 240 tokens, 3 evaluations, 100 forwards · "


@pytest.fixture
def store(runner):
    return runner.store


def record(store, seconds: float, *, method="made", ends=True, expected=0.0, **model) -> str:
    """A run whose 40 passes took so long, and whatever came after them ten times as much."""
    started = RunStarted(method, MODEL | model, "Hi", None, {}, 1)
    id = store.begin(started)
    spent = Metric("spent forwards", 2, 40.0, "forwards")
    most = Metric("expected forwards", 0, expected or 40.0, "forwards")
    store.append(id, [Stamped(0, 0.0, started), Stamped(1, 0.0, most), Stamped(2, seconds, spent)])
    if ends:
        ended = RunEnded("done", "", 0, 40, 11 * seconds)
        store.append(id, [Stamped(3, 11 * seconds, ended)])
        store.finish(id, ended)
    return id


def told(store, model=MODEL, **given) -> str:
    return estimate(METHOD, given, model, Paces(store))


def test_a_budget_is_told_and_the_time_when_it_is_known(store):
    assert told(store) == BUDGET + UNKNOWN
    assert told(store, answers="1").startswith("At most 80 tokens, 1 evaluation, 100 forwards · ")
    record(store, 6.0)
    assert told(store) == BUDGET + "about 15 s on this model"
    record(store, 120.0)
    assert told(store) == BUDGET + "about 5 min on this model", "the last run counts"


def test_the_last_run_tells_how_much_of_the_most_is_likely(store):
    record(store, 6.0, expected=400.0)
    assert told(store) == BUDGET + "about 2 s if it goes as the last run, at most 15 s"
    record(store, 6.0, expected=20.0)
    assert told(store) == BUDGET + "about 15 s on this model", "no run takes more than its most"


def test_only_runs_of_the_same_kind_that_have_ended_here_tell_the_time(store, tmp_path):
    id = record(store, 6.0)
    export_jsonl(store, [id], tmp_path / "run.jsonl")
    store.delete([id])
    import_jsonl(store, tmp_path / "run.jsonl")
    record(store, 6.0, method="other")
    record(store, 6.0, hash="def")
    record(store, 6.0, quantization="none")
    record(store, 6.0, ends=False)
    assert store.count() == 5 and told(store) == BUDGET + UNKNOWN
    record(store, 6.0)
    assert told(store) != BUDGET + UNKNOWN


def test_a_model_that_is_not_loaded_is_known_by_what_was_chosen(store):
    record(store, 6.0)
    assert "about 15 s" in told(store, known_of(ModelChoice("one")))
    assert "about 15 s" in told(store, known_of(ModelChoice("one", quantization="int8")))
    assert UNKNOWN in told(store, known_of(ModelChoice("one", quantization="none")))
    assert UNKNOWN in told(store, known_of(ModelChoice("two")))


def test_before_the_first_run_the_table_of_costs_tells_the_least_time(store):
    """100 passes over 2.4 tokens (240 in all): a pass over 2 takes 1.2 steps, over 4 1.6."""
    cost = Cost(100.0, ((1, 1.0), (2, 1.2), (4, 1.6)), 500.0, 0).as_mapping()
    assert told(store, MODEL | {"cost": cost}) == BUDGET + "13 s or more on this model"
    record(store, 6.0)
    assert "about 15 s" in told(store, MODEL | {"cost": cost})


def test_a_run_is_read_once(store, monkeypatch):
    record(store, 6.0)
    paces = Paces(store)
    assert paces.last("made", MODEL) == Pace(6.0 / 40)
    monkeypatch.setattr(store, "events", None)
    assert paces.last("made", MODEL) == Pace(6.0 / 40)


def test_wrong_knobs_and_methods_that_cannot_tell_leave_it_out(store):
    assert told(store, answers=10) == told(store, answers="") == told(store, other=1) == ""
    silent = registry.method("sampling")
    assert silent.expect is None and estimate(silent, {}, MODEL, Paces(store)) == ""


def test_what_a_run_took_is_found_for_its_model(runner, monkeypatch):
    monkeypatch.setitem(registry.methods(), "made", METHOD)
    runner.submit(Job("made", Task("Hello"))).finish()
    assert "on this model" in estimate(METHOD, {}, runner.model_facts(), Paces(runner.store))
