"""Runs that take turns: side by side they are what they would be alone."""

import pytest

from analyzers import registry
from analyzers.card import Card
from analyzers.errors import BadInput, BadParameter, ModelLacks
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import Note, RunEnded, RunStarted, Token
from app.runner import Job, Run, Runner
from tests.test_runner import Nothing, add_method

TEXT = "The quick brown fox jumps over the lazy dog; twice."


def jobs(*many: dict) -> list[Job]:
    return [Job("sampling", Task(TEXT), {"max_new": 8, **each}, seed=5) for each in many]


def events(run: Run) -> list:
    return [stamped.event for stamped in run.events]


def test_two_in_turns_are_two_alone(runner: Runner):
    """Same tokens with the same numbers, whatever runs beside on the same engine."""
    asked = jobs({"temperature": 0.0}, {"temperature": 1.5})
    together = runner.submit_together(asked).finish()
    alone = [runner.submit(each).finish() for each in asked]
    assert [events(run) for run in together.runs] == [events(run) for run in alone]
    written = [[e.id for e in events(run) if isinstance(e, Token)] for run in together.runs]
    assert written[0] != written[1]


def test_they_take_turns_token_by_token(runner: Runner):
    together = runner.submit_together(jobs({"temperature": 0.0}, {"temperature": 1.5})).finish()
    whose = {id(s): place for place, run in enumerate(together.runs) for s in run.events}
    order = [whose[id(s)] for s in together.events if isinstance(s.event, Token)]
    assert order == [0, 1] * 8


def test_each_is_recorded_as_a_run_of_its_own(runner: Runner):
    together = runner.submit_together(jobs({}, {"temperature": 0.0})).finish()
    ids = [run.id for run in together.runs]
    runner.recorder.close()
    assert {run.id for run in runner.store.runs()} == set(ids) and len(set(ids)) == 2
    for run in together.runs:
        stored = [stamped.event for stamped in runner.store.events(run.id)]
        assert isinstance(stored[0], RunStarted) and isinstance(stored[-1], RunEnded)
        assert stored == events(run)


def test_forwards_and_seconds_are_each_ones_own(runner: Runner):
    asked = jobs({"temperature": 0.0}, {"temperature": 0.0, "max_new": 2})
    together = runner.submit_together(asked).finish()
    alone = [runner.submit(each).finish() for each in asked]
    long, short = (events(run)[-1] for run in together.runs)
    assert [long.forwards, short.forwards] == [events(run)[-1].forwards for run in alone]
    assert long.forwards > short.forwards and long.seconds > short.seconds > 0


def test_those_without_a_seed_share_one(runner: Runner):
    asked = [Job("sampling", Task(TEXT), {"max_new": 4, "temperature": 1.0})] * 2
    first, second = runner.submit_together(asked).finish().runs
    assert events(first)[0].seed == events(second)[0].seed
    assert events(first)[1:-1] == events(second)[1:-1]


def test_none_starts_when_one_cannot(runner: Runner, monkeypatch):
    add_method(monkeypatch, "experts", lambda *args: iter(()), needs=("routing",))
    with pytest.raises(ModelLacks):
        runner.submit_together([*jobs({}), Job("experts", Task(TEXT))]).finish()
    with pytest.raises(BadParameter):
        runner.submit_together(jobs({}, {"temperature": -1}))
    with pytest.raises(BadInput, match="at least two"):
        runner.submit_together(jobs({}))
    assert runner.store.count() == 0


def test_one_that_fails_leaves_the_others_going(runner: Runner, monkeypatch):
    def fails(engine, task, params, ctx):
        yield Note("info", "before")
        raise ValueError("inside")

    add_method(monkeypatch, "fails", fails)
    together = runner.submit_together([Job("fails", Task(TEXT), seed=1), *jobs({})]).finish()
    assert [events(run)[-1].status for run in together.runs] == ["failed", "done"]
    assert sum(isinstance(e, Token) for e in events(together.runs[1])) == 8


def test_stopping_ends_all_of_them(runner: Runner):
    asked = jobs({"max_new": 400, "temperature": 1.0}, {"max_new": 400, "temperature": 1.2})
    together = runner.submit_together(asked)
    for update in together.updates():
        if any(isinstance(stamped.event, Token) for stamped in update.new):
            together.stop("enough")
    assert [events(run)[-1].reason for run in together.runs] == ["enough", "enough"]
    assert all(run.over for run in together.runs)


def test_a_method_says_what_it_takes(runner: Runner, monkeypatch):
    card = Card("Extract", "decoding", "made up", (Note,), takes=("passage",))
    seen = []

    def run(engine, task, params, ctx):
        seen.append(task.inputs["passage"])
        yield Note("info", "read")
        return "done"

    monkeypatch.setitem(registry.methods(), "made", Method("made", card, Nothing, run, ""))
    for inputs in ({}, {"passage": "  "}):
        with pytest.raises(BadInput, match="Extract needs a passage"):
            runner.submit(Job("made", Task(TEXT, inputs=inputs)))
    made = runner.submit(Job("made", Task(TEXT, inputs={"passage": "Nairobi."}))).finish()
    assert seen == ["Nairobi."]
    assert events(made)[0].inputs == {"passage": "Nairobi."}


def test_earlier_texts_are_there_for_a_method(runner: Runner, monkeypatch):
    runner.submit(jobs({"temperature": 0.0})[0]).finish()
    texts = []

    def run(engine, task, params, ctx):
        texts.extend(ctx.history())
        yield Note("info", "read")
        return "done"

    add_method(monkeypatch, "reader", run)
    runner.submit(Job("reader", Task(TEXT))).finish()
    assert texts and any(text.startswith(TEXT) for text in texts)
