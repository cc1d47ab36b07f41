"""What every method promises, visited one by one: a new method is tested by being there."""

import dataclasses
import inspect
import json
from typing import get_args

import pytest

from analyzers import registry
from analyzers.card import Card, Family, Need
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.errors import Stopped
from analyzers.params import build, knobs
from analyzers.registry import Method, lacks
from analyzers.task import Task, chat
from analyzers.trace import KINDS, Event, Note, RunEnded, RunStarted, from_data, kind_of, to_data
from app.runner import Job
from tests import tiny

each = pytest.mark.parametrize("method", registry.methods().values(), ids=lambda m: m.name)
TEXT = "The quick brown fox jumps over the lazy dog; twice. And then it sleeps."
SMALL = {
    "max_new": 12, "temperature": 1.0, "criterion": "keywords", "wish": "fox", "iterations": 4
}  # fmt: skip


INPUTS = {"passage": "The dog sleeps in the sun. The fox is quick."}
"""Something for everything that a method takes beside the prompt."""


def task_for(method: Method, text: str = TEXT) -> Task:
    inputs = {name: INPUTS[name] for name in method.card.takes}
    return Task(chat(text) if method.card.starts_as == "chat" else text, inputs=inputs)


def small(method: Method) -> dict[str, object]:
    """Settings that keep a test short, those of them that the method has."""
    names = {row.name for row in knobs(method.params)}
    return {name: value for name, value in SMALL.items() if name in names}


def routed() -> Engine:
    """A tiny mixture of experts of its own."""
    made = tiny.engine("mixtral")
    made._ends = frozenset()
    return made


@pytest.fixture
def tiny_engine(tiny_engine, method) -> Engine:
    return routed() if "routing" in method.card.needs else tiny_engine


@pytest.fixture
def own_engine(own_engine, method) -> Engine:
    return routed() if "routing" in method.card.needs else own_engine


def run_on(engine: Engine, method: Method, seed: int = 7, text: str = TEXT):
    assert not lacks(method.card, engine.can)
    params = build(method.params, small(method))
    ctx = Context(seed, assessors=registry.assessors)
    return method.run(engine, task_for(method, text), params, ctx)


def traces(engine: Engine) -> dict[str, object]:
    """What a run could leave behind: hooks on any module, and whatever the engine holds."""
    hooks = [
        len(hooks)
        for module in engine.model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("hooks") and hooks is not None
    ]
    held = {
        f"{type(owner).__name__}.{name}": len(value) if hasattr(value, "__len__") else None
        for owner in (engine, engine.vocabulary, engine.tokenizer, engine.model)
        for name, value in vars(owner).items()
    }
    grads = [name for name, weight in engine.model.named_parameters() if weight.requires_grad]
    return {"hooks": hooks, "grads": grads, "training": engine.model.training} | held


def test_there_are_methods():
    assert {"sampling", "read"} <= set(registry.methods())


@each
def test_the_card_is_complete(method):
    card = method.card
    assert isinstance(card, Card)
    assert card.title.strip() == card.title and 0 < len(card.title) <= 40
    assert card.family in get_args(Family)
    assert method.run.__module__ == f"analyzers.{card.family}.{method.name}"
    assert card.source.strip()
    assert card.emits and set(card.emits) <= set(KINDS.values()) - {RunStarted, RunEnded}
    assert card.needs and set(card.needs) <= set(get_args(Need))
    assert all(name.isidentifier() for name in card.takes)
    assert card.starts_as in ("chat", "raw")


@each
def test_the_docstring_says_source_idea_and_differences(method):
    lines = method.about.splitlines()
    assert lines[0].endswith(".") and ":" in lines[0]  # the heading of its panel
    for head in ("Source:", "Idea:", "Differs from the source:"):
        (line,) = [line for line in lines if line.startswith(head)]
        assert line.removeprefix(head).strip()
    assert inspect.getdoc(method.run) and inspect.isgeneratorfunction(method.run)


@each
def test_every_knob_has_help_a_range_and_a_default_inside_it(method):
    assert dataclasses.is_dataclass(method.params)
    assert method.params.__dataclass_params__.frozen
    for row in knobs(method.params):
        assert row.help and not row.help.endswith(".")
        assert row.default is not dataclasses.MISSING
        if row.kind in (int, float):
            assert row.lo is not None and row.hi is not None
            assert row.lo < row.hi and row.lo <= row.default <= row.hi
        elif row.choices:
            assert row.default in row.choices
        else:
            assert isinstance(row.default, row.kind)
    defaults = method.params()
    assert build(method.params, {}) == defaults
    assert build(method.params, vars(defaults)) == defaults
    as_strings = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in vars(defaults).items()
    }
    assert build(method.params, as_strings) == defaults


@each
def test_the_same_seed_gives_the_same_events(method, tiny_engine):
    first = list(run_on(tiny_engine, method))
    assert first and first == list(run_on(tiny_engine, method))


@each
def test_two_runs_step_by_step_are_two_separate_runs(method, tiny_engine):
    asked = [(1, TEXT), (2, "Another text, to be told apart from the first.")]
    apart = [list(run_on(tiny_engine, method, *each)) for each in asked]
    together: list[list[Event]] = [[], []]
    going = dict(enumerate(run_on(tiny_engine, method, *each) for each in asked))
    while going:
        for i, run in list(going.items()):
            if (event := next(run, None)) is None:
                del going[i]
            else:
                together[i].append(event)
    assert together == apart


@each
def test_only_announced_kinds_all_finite_all_through_json(method, tiny_engine):
    for event in run_on(tiny_engine, method):
        assert type(event) in {*method.card.emits, Note}
        data = json.loads(json.dumps(to_data(event), allow_nan=False))
        assert from_data(kind_of(event), data) == event


@each
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_stops_when_asked(method, passes, own_engine, monkeypatch):
    """The pass after the request is not made, and nothing is said any more."""
    monkeypatch.setattr("analyzers.engine.writing.READ_CHUNK", 8)
    expected = list(run_on(own_engine, method))
    before = own_engine.forwards
    said: list[Event] = []

    def poll() -> None:
        if own_engine.forwards - before == passes:
            said.append(Note("info", "asked to stop"))
            raise Stopped("stopped by you")

    own_engine.poll = poll
    run = run_on(own_engine, method)
    with pytest.raises(Stopped):
        said.extend(run)
    assert own_engine.forwards - before == passes
    assert said.pop() == Note("info", "asked to stop")
    assert said == expected[: len(said)] and len(said) < len(expected)
    assert next(run, None) is None
    own_engine.poll = lambda: None
    assert list(run_on(own_engine, method)) == expected


@each
@pytest.mark.parametrize("how", ["to the end", "abandoned", "stopped", "failed"])
def test_leaves_nothing_behind(method, how):
    engine = routed() if "routing" in method.card.needs else tiny.engine()
    list(run_on(engine, method))  # what is made once, on first use, is no leak
    before = traces(engine)

    def poll() -> None:
        raise Stopped("stopped") if how == "stopped" else RuntimeError("broken kernel")

    run = run_on(engine, method)
    if how == "abandoned":
        next(run)
        run.close()
    elif how == "to the end":
        list(run)
    else:
        engine.poll = poll
        with pytest.raises(Stopped if how == "stopped" else RuntimeError):
            list(run)
    assert traces(engine) == before


@each
def test_survives_the_real_runner_and_store(method, runner):
    run = runner.submit(Job(method.name, task_for(method), small(method), seed=7)).finish()
    stored = runner.store.events(run.id)
    assert stored == run.events
    started, *inner, ended = [stamped.event for stamped in stored]
    assert isinstance(started, RunStarted) and started.method == method.name
    assert ended.status == "done" and ended.reason and ended.forwards > 0
    assert inner == list(run_on(runner.engine, method))
    assert runner.store.run(run.id).status == "done"
