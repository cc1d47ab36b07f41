"""Runs that take turns: side by side they are what they would be alone."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

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


@dataclass
class Paced:
    """A method of `steps` steps, each as long as `cost` seconds of a clock that nothing else moves;
    the tokens of a step come all at once."""

    clock: SimpleNamespace
    steps: int
    cost: float
    tokens: int

    def run(self, engine, task, params, ctx):
        for pos in range(0, self.steps * self.tokens, self.tokens):
            self.clock.now += self.cost
            for at in range(pos, pos + self.tokens):
                yield Token(at, 65, "A", "41", -1.0, 1.0, 1, 0.5, 1.0, ())
        return "done"


@pytest.fixture
def paced(monkeypatch) -> list[Job]:
    """A run that writes a token in 2 seconds, and one that writes three in 3 seconds."""
    clock = SimpleNamespace(now=1000.0, sleep=lambda seconds: time.sleep(0.001))
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("app.runner.time", clock)
    add_method(monkeypatch, "plain", Paced(clock, steps=12, cost=2.0, tokens=1).run)
    add_method(monkeypatch, "drafted", Paced(clock, steps=4, cost=3.0, tokens=3).run)
    return [Job(name, Task(TEXT), seed=1) for name in ("plain", "drafted")]


def stamps(run: Run) -> list[float]:
    return [stamped.t for stamped in run.events if isinstance(stamped.event, Token)]


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


@pytest.mark.parametrize("fair", [False, True])
def test_each_has_a_clock_of_its_own(runner: Runner, paced, fair):
    """Replayed later, each goes at its own pace, as if it had been alone."""
    together = runner.submit_together(paced, fair=fair).finish()
    plain, drafted = together.runs
    assert stamps(plain) == [2.0 * n for n in range(1, 13)]
    assert stamps(drafted) == [3.0] * 3 + [6.0] * 3 + [9.0] * 3 + [12.0] * 3
    assert [run.events[-1].t for run in together.runs] == [24.0, 12.0]
    assert [events(run)[-1].seconds for run in together.runs] == [24.0, 12.0]
    assert [run.seconds for run in together.runs] == [24.0, 12.0]
    alone = [runner.submit(each).finish() for each in paced]
    assert [run.events for run in alone] == [run.events for run in together.runs]


def test_a_fair_turn_goes_to_the_one_that_has_used_least(runner: Runner, paced):
    """Neither is ever more than one step of its own ahead of the other's clock."""
    together = runner.submit_together(paced, fair=True).finish()
    used = {id(run): 0.0 for run in together.runs}
    over = {id(run): run.events[-1].t for run in together.runs}
    whose = {id(stamped): id(run) for run in together.runs for stamped in run.events}
    for stamped in together.events:
        mine = whose[id(stamped)]
        assert all(used[mine] <= used[each] or used[each] == over[each] for each in used)
        used[mine] = stamped.t
    ends = [whose[id(s)] for s in together.events if isinstance(s.event, RunEnded)]
    assert ends == [id(run) for run in reversed(together.runs)]


def test_what_comes_before_the_first_token_is_told_no_longer_than_it_lasts(runner: Runner):
    doing = [update.doing for update in runner.submit_together(jobs({}, {})).updates()]
    assert doing[-1] == ""


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
