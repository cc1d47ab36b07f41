"""Several engines in memory: who is loaded, who has to go, and what the model thread does between
runs."""

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from analyzers import registry
from analyzers.card import Card
from analyzers.engine import Engine
from analyzers.engine.cost import Cost
from analyzers.errors import (
    BadParameter,
    CandorError,
    ModelNotFound,
    ModelTooLarge,
    OutOfContext,
    Stopped,
)
from analyzers.params import ModelRef, knob
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import Note, RunStarted
from app.runner import Fork, Job, ModelChoice, Runner
from sessions.store import Store
from tests import tiny
from tests.test_runner import (
    PATIENCE,
    Gate,
    add_method,
    ending,
    events,
    gate,
    go,
    tokens,
)

__all__ = ["gate"]
SIZE = tiny.engine().memory
COST = Cost(step_ms=10.0, verify=((1, 1.0), (4, 1.5)), prefill=1000.0, memory=SIZE)


@dataclass
class Shelf:
    """Models named by one letter, all of one size; "auto" comes out as int8. loaded: what for."""

    loaded: list[str] = field(default_factory=list)
    engines: list[weakref.ref[Engine]] = field(default_factory=list)
    during: Callable[[Callable[[str, float], None]], None] = lambda progress: None
    size: int = SIZE

    def load(self, ref: str, *, quantization: str, progress, **options) -> Engine:
        self.loaded.append(ref)
        progress(f"Loading {ref}", 0.0)
        self.during(progress)
        if not (len(ref) == 1 and ref.islower()):
            raise ModelNotFound(f"There is no model {ref!r}.")
        engine = tiny.engine(seed=ord(ref))
        engine._ends = frozenset()
        kind = "int8" if quantization == "auto" else quantization
        engine.identity = {**engine.identity, "name": ref, "quantization": kind}
        self.engines.append(weakref.ref(engine))
        return engine

    def plan(self, choice: ModelChoice, remote_code, progress) -> tuple[ModelChoice, int]:
        kind = "int8" if choice.quantization == "auto" else choice.quantization
        decided = replace(choice, quantization=kind, dtype="float32", device="cpu")
        return decided, self.size


@pytest.fixture
def shelf(monkeypatch) -> Shelf:
    made = Shelf()
    monkeypatch.setattr("app.runner.load", made.load)
    monkeypatch.setattr("app.runner.plan", made.plan)
    return made


@pytest.fixture
def runners(tmp_path, shelf) -> Iterator[Callable[..., Runner]]:
    """Makes runners on one store; the first one usually is enough."""
    store, made = Store(tmp_path / "runs.db"), []

    def make(engines: float = 2, measure: bool = False, **options) -> Runner:
        made.append(Runner(store, budget=int(engines * SIZE), measure=measure, **options))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
    store.close()


def job(model: str, method: str = "sampling", text: str = "Once upon a time", **params) -> Job:
    knobs = {"max_new": 4, **params} if method == "sampling" else params
    return Job(method, Task(text), knobs, seed=5, model=ModelChoice(model))


def names(runner: Runner) -> list[str]:
    return [facts["name"] for facts in runner.residents()]


def load(runner: Runner, *refs: str) -> None:
    for ref in refs:
        runner.load(ModelChoice(ref)).finish()


def eventually(true: Callable[[], object]) -> bool:
    end = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


# Who stays


def test_a_model_that_was_loaded_is_there_for_runs_and_its_facts_are_told(runners, shelf):
    runner = runners()
    assert runner.residents() == [] and runner.model_facts() is None and runner.engine is None
    loading = runner.load(ModelChoice("a"), owner="me").finish()
    assert (loading.over, loading.owner, loading.events) == (True, "me", [])
    (facts,) = runner.residents()
    assert facts == runner.model_facts() == runner.model_facts(ModelChoice("a"))
    assert facts["choice"] == ModelChoice("a") and facts["cost"] is None and facts["can_chat"]
    assert (facts["memory"], facts["context"]) == (SIZE, tiny.CONTEXT)
    assert (facts["name"], facts["quantization"]) == ("a", "int8")
    assert runner.model_facts(ModelChoice("b")) is None
    assert ending(go(runner, job("a"))).status == "done" and shelf.loaded == ["a"]


def test_the_one_used_longest_ago_makes_room(runners, shelf):
    runner = runners(engines=2)
    load(runner, "a", "b")
    go(runner, job("a"))
    assert names(runner) == ["a", "b"]
    load(runner, "c")
    assert names(runner) == ["c", "a"]
    load(runner, "a", "b")
    assert names(runner) == ["b", "a"]
    assert shelf.loaded == ["a", "b", "c", "b"]


@pytest.mark.parametrize(("engines", "stay"), [(0, "d"), (1, "d"), (2.9, "dc"), (4, "dcba")])
def test_as_many_stay_as_the_budget_allows_and_the_new_one_always(runners, engines, stay):
    runner = runners(engines=engines)
    load(runner, *"abcd")
    assert names(runner) == list(stay)


def test_without_a_given_budget_small_models_stay_beside_each_other(tmp_path, shelf):
    store = Store(tmp_path / "runs.db")
    runner = Runner(store, measure=False)
    load(runner, *"abc")
    assert names(runner) == ["c", "b", "a"]
    runner.close()
    store.close()


def test_kept_caches_go_before_engines_and_only_when_room_is_needed(runners):
    runner = runners(engines=2)
    parent = go(runner, job("a", text="x y z " * 30))
    place = tokens(parent)[2]
    fork = replace(job("a"), fork=Fork(parent.id, place.pos, place.top[1][0]))
    load(runner, "b")
    assert ending(go(runner, fork)).forwards == 4  # from the kept cache
    load(runner, "c")
    assert names(runner) == ["c", "a"] and not runner._kept
    assert ending(go(runner, fork)).forwards == 1 + 4  # 182 tokens are one chunk here
    assert len(runner._kept) == 1


def test_a_cache_is_never_used_by_another_engine(runners):
    runner = runners(engines=2)
    parent = go(runner, job("a"))
    place = tokens(parent)[2]
    fork = replace(job("a"), fork=Fork(parent.id, place.pos, place.top[1][0]))
    other = replace(fork, model=ModelChoice("a", quantization="none"))
    alone, beside = go(runner, fork), go(runner, other)
    assert len(runner.residents()) == 2
    assert [token.id for token in tokens(beside)] == [token.id for token in tokens(alone)]
    (kept_by,) = {id(owner) for name, (owner, _) in runner._kept.items() if name == beside.id}
    assert kept_by == id(runner.engine)


def test_what_can_never_fit_is_refused_before_anything_goes(runners, shelf):
    runner = runners(engines=2)
    load(runner, "a", "b")
    shelf.size = 10**15
    with pytest.raises(ModelTooLarge, match=r"c needs 1000000.00 GB, .* stronger quantization\.$"):
        load(runner, "c")
    assert names(runner) == ["b", "a"] and shelf.loaded == ["a", "b"]


@pytest.mark.parametrize("kinds", [("auto", "int8"), ("int8", "auto")])
def test_choices_that_come_out_as_the_same_share_an_engine(runners, shelf, kinds):
    runner = runners()
    for kind in (*kinds, *kinds):
        runner.load(ModelChoice("a", quantization=kind)).finish()
    runner.load(ModelChoice("a", "int8", dtype="float32", device="cpu", double=False)).finish()
    assert shelf.loaded == ["a"] and len(runner.residents()) == 1
    for kind in kinds:
        assert runner.model_facts(ModelChoice("a", quantization=kind))["quantization"] == "int8"
    runner.load(ModelChoice("a", quantization="none")).finish()
    assert shelf.loaded == ["a", "a"] and len(runner.residents()) == 2


# Loading


def test_a_load_that_fails_keeps_the_others(runners, shelf):
    runner = runners()
    load(runner, "a")
    with pytest.raises(ModelNotFound, match="no model 'Nowhere'"):
        load(runner, "Nowhere")

    def breaks(progress) -> None:
        raise MemoryError

    shelf.during = breaks
    with pytest.raises(CandorError, match="MemoryError"):
        load(runner, "b")
    assert names(runner) == ["a"]
    assert ending(go(runner, job("a"))).status == "done"


def held(shelf: Shelf) -> tuple[threading.Event, threading.Event]:
    """Loading now waits in its middle, and polls: (reached, go on)."""
    reached, onward = threading.Event(), threading.Event()

    def wait(progress) -> None:
        reached.set()
        while not onward.wait(0.01):
            progress("Loading the middle", 0.5)

    shelf.during = wait
    return reached, onward


def test_loading_tells_how_far_it_is_and_is_cancelled_in_its_middle(runners, shelf):
    runner = runners()
    load(runner, "a")
    reached, onward = held(shelf)
    loading = runner.load(ModelChoice("b"))
    assert reached.wait(PATIENCE)
    following = loading.updates()
    assert any((u.doing, u.share, u.ahead) == ("Loading the middle", 0.5, 0) for u in following)
    behind = runner.submit(job("a"))
    loading.stop()
    with pytest.raises(Stopped, match="stopped by you"):
        list(following)
    assert ending(behind.finish()).status == "done"
    assert names(runner) == ["a"] and shelf.loaded == ["a", "b"]
    onward.set()
    load(runner, "b")
    assert names(runner) == ["b", "a"]


def test_a_stop_in_the_last_moment_drops_what_was_loaded(runners, shelf):
    runner = runners()
    shelf.during = lambda progress: loading.stop()
    with runner._wake:  # so that `loading` has its name before the model thread begins
        loading = runner.load(ModelChoice("a"))
    with pytest.raises(Stopped):
        loading.finish()
    assert runner.residents() == [] and shelf.engines[0]() is None


def test_walking_away_from_a_load_cancels_it(runners, shelf):
    runner = runners()
    reached, _ = held(shelf)
    following = runner.load(ModelChoice("a")).updates()
    next(following)
    assert reached.wait(PATIENCE)
    following.close()
    assert eventually(lambda: not runner._current) and runner.residents() == []


def test_a_load_waits_for_the_run_before_it(runners, shelf, gate: Gate):
    runner = runners()
    run = runner.submit(job("a", "gate"))
    assert gate.reached.wait(PATIENCE)
    loading, dropped = runner.load(ModelChoice("b")), runner.load(ModelChoice("c"))
    assert next(loading.updates()).ahead == 1 and not loading.over
    dropped.stop()
    with pytest.raises(Stopped, match="before it began"):
        dropped.finish()
    again = runner.load(ModelChoice("b"))
    gate.opened.set()
    again.finish()
    assert run.over and ending(run).status == "done" and names(runner) == ["b", "a"]
    assert shelf.loaded == ["a", "b"]


def test_preparing_hears_every_part_and_can_be_broken_off(runners):
    runner = runners()
    heard: list[tuple[str, float]] = []
    runner.prepare(ModelChoice("a"), lambda what, share: heard.append((what, share)))
    assert heard == [("Loading a", 0.0), ("Loading a", 1.0)]

    def refuses(what: str, share: float) -> None:
        raise Stopped("enough")

    with pytest.raises(Stopped, match="enough"):
        runner.prepare(ModelChoice("b"), refuses)
    with pytest.raises(ModelNotFound):
        runner.prepare(ModelChoice("Nowhere"), lambda what, share: None)
    assert names(runner) == ["a"]


def test_closing_cancels_a_load_and_refuses_the_next(runners, shelf):
    runner = runners()
    reached, _ = held(shelf)
    loading = runner.load(ModelChoice("a"))
    assert reached.wait(PATIENCE)
    runner.close()
    with pytest.raises(Stopped, match="Candor was closed"):
        loading.finish()
    for refused in (runner.load, runner.unload):
        with pytest.raises(CandorError, match="closed"):
            refused(ModelChoice("a"))


@pytest.mark.parametrize("allowed", [True, False])
def test_a_model_may_run_its_own_code_only_if_that_was_allowed(runners, monkeypatch, allowed):
    given = []

    def loads(ref: str, **options: object) -> Engine:
        given.append(options)
        return tiny.engine()

    monkeypatch.setattr("app.runner.load", loads)
    choice = ModelChoice("a", "nf4", "bfloat16", "cpu", double=False, compute="float32")
    runners(remote_code=allowed).load(choice).finish()
    (options,) = given
    assert options.pop("progress")
    assert options == {
        "quantization": "nf4",
        "dtype": "bfloat16",
        "device": "cpu",
        "double": False,
        "compute": "float32",
        "remote_code": allowed,
    }


# Unloading


def test_unloading_gives_the_memory_back(runners, shelf):
    runner = runners(engines=3)
    load(runner, "a", "b")
    go(runner, job("a"))
    with pytest.raises(OutOfContext) as caught:
        go(runner, job("a", text="x" * 600))
    assert shelf.engines[0]() is not None
    runner.unload(ModelChoice("a")).finish()
    assert names(runner) == ["b"] and not runner._kept
    assert shelf.engines[0]() is None, caught  # though somebody still holds the error
    assert ending(go(runner, job("a"))).status == "done" and shelf.loaded == ["a", "b", "a"]


def test_an_engine_that_made_room_is_gone(runners, shelf):
    runner = runners(engines=1)
    load(runner, "a")
    go(runner, job("a"))
    load(runner, "b")
    assert shelf.engines[0]() is None and shelf.engines[1]() is not None


def test_unloading_waits_for_the_run_and_takes_what_the_choice_came_out_as(runners, gate: Gate):
    runner = runners()
    run = runner.submit(job("a", "gate"))
    assert gate.reached.wait(PATIENCE)
    unloading = runner.unload(ModelChoice("a", quantization="int8"))
    assert next(unloading.updates()).ahead == 1 and names(runner) == ["a"]
    unloading = runner.unload(ModelChoice("a"))
    gate.opened.set()
    unloading.finish()
    assert ending(run).status == "done" and runner.residents() == []
    assert runner.unload(ModelChoice("a")).finish().over  # nothing is left to do


# Second models


@dataclass(frozen=True)
class Models:
    draft: ModelRef = knob(ModelRef(""), "A smaller model")
    judge: ModelRef = knob(ModelRef(""), "Another model")


@pytest.fixture
def pairs(monkeypatch) -> list:
    """A method that steps on its own model and on each second one; what it was given."""
    given: list = []

    def run(engine, task, params, ctx):
        given.append((engine, params, ctx))
        for ref in ("", params.draft, params.judge):
            second = ctx.engine(ref)
            cursor = ctx.begin(second, second.encode(task))
            yield Note("info", second.identity["name"])
            second.step(cursor)
        return "through"

    card = Card("pair", "drafting", "made up", (Note,))
    monkeypatch.setitem(registry.methods(), "pair", Method("pair", card, Models, run, ""))
    return given


def test_second_models_are_loaded_before_the_run_begins(runners, shelf, pairs):
    runner = runners(engines=3)
    run = go(runner, job("a", "pair", draft="b", judge="c"))
    assert [e.text for e in events(run) if isinstance(e, Note)] == ["a", "b", "c"]
    started, ended = events(run)[0], ending(run)
    assert isinstance(started, RunStarted) and started.model["name"] == "a"
    assert started.params == {"draft": "b", "judge": "c"}
    assert (ended.status, ended.forwards) == ("done", 6)
    assert names(runner)[0] == "a" and shelf.loaded == ["a", "b", "c"]
    engine, _, ctx = pairs[0]
    assert ctx.engine() is ctx.engine(ModelRef("")) is engine
    assert [id(owner) for owner, _ in runner._kept.values()] == [id(engine)]
    assert len(ctx.cursors) == 1  # of its own engine only
    with pytest.raises(BadParameter, match="'d' was not loaded with this run"):
        ctx.engine("d")


def test_no_second_model_is_the_runs_own(runners, shelf, pairs):
    run = go(runners(), job("a", "pair", draft="a"))
    assert [e.text for e in events(run) if isinstance(e, Note)] == ["a", "a", "a"]
    assert shelf.loaded == ["a"] and ending(run).forwards == 6


def test_a_second_model_is_loaded_as_the_first_one_is(runners, pairs):
    runner = runners()
    asked = replace(job("a", "pair", draft="b"), model=ModelChoice("a", quantization="none"))
    go(runner, asked)
    assert [facts["quantization"] for facts in runner.residents()] == ["none", "none"]


def test_models_of_a_run_stay_however_small_the_budget_is(runners, shelf, pairs):
    runner = runners(engines=1)
    load(runner, "d")
    run = go(runner, job("a", "pair", draft="b", judge="c"))
    assert ending(run).status == "done" and sorted(names(runner)) == ["a", "b", "c"]
    load(runner, "d")
    assert names(runner) == ["d"]


def test_a_second_model_that_cannot_be_loaded_refuses_the_run(runners, pairs):
    runner = runners()
    with pytest.raises(ModelNotFound, match="'Nowhere'"):
        go(runner, job("a", "pair", draft="Nowhere"))
    assert runner.store.count() == 0 and names(runner) == ["a"] and pairs == []


def test_a_stop_reaches_every_engine_of_a_run_and_leaves_none_behind(runners, monkeypatch, pairs):
    runner = runners()
    load(runner, "b")
    second = runner.engine
    prefill = second.prefill

    def stops(ids, **options):
        run.stop()
        return prefill(ids, **options)

    monkeypatch.setattr(second, "prefill", stops)
    with runner._wake:
        run = runner.submit(job("a", "pair", draft="b"))
    run.finish()
    assert (ending(run).status, ending(run).forwards) == ("stopped", 2)
    assert pairs[0][2].cancelled()
    for engine in (second, runner.engine):
        engine.poll()
        engine.progress(0, 1)


# What passes cost


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The names of the models whose cost was measured; it is made up."""
    made: list[str] = []

    def measure(engine: Engine, poll) -> Cost:
        poll()
        made.append(engine.identity["name"])
        return COST

    monkeypatch.setattr("app.runner.measure", measure)
    return made


def cost_of(runner: Runner, ref: str) -> object:
    facts = runner.model_facts(ModelChoice(ref))
    return facts and facts["cost"]


def test_the_cost_is_measured_once_kept_and_recorded_with_runs(runners, measured, monkeypatch):
    given = []

    def looks(engine, task, params, ctx):
        given.append(ctx.cost)
        yield Note("info", "")
        return "looked"

    add_method(monkeypatch, "looks", looks)
    runner = runners(measure=True)
    load(runner, "a")
    assert eventually(lambda: cost_of(runner, "a")) and cost_of(runner, "a") == COST.as_mapping()
    run = go(runner, job("a", "looks"))
    assert given == [COST] and events(run)[0].cost == COST.as_mapping()
    assert runner.store.events(run.id) == run.events
    later = runners(measure=True)
    load(later, "a", "b")
    assert cost_of(later, "a") == COST.as_mapping()
    assert eventually(lambda: cost_of(later, "b")) and measured == ["a", "b"]


def test_a_cost_can_be_measured_again(runners, measured):
    runner = runners(measure=True)
    load(runner, "a")
    assert eventually(lambda: cost_of(runner, "a"))
    runner.measure_again(ModelChoice("a"))
    runner.measure_again(ModelChoice("not here"))
    assert eventually(lambda: measured == ["a", "a"] and cost_of(runner, "a"))


def test_nothing_is_measured_when_that_was_not_wanted(runners, measured):
    runner = runners(measure=False)
    run = go(runner, job("a"))
    runner.close()
    assert measured == [] and events(run)[0].cost is None


def test_another_quantization_has_a_cost_of_its_own(runners, measured):
    runner = runners(measure=True)
    for kind in ("int8", "none"):
        runner.load(ModelChoice("a", quantization=kind)).finish()
    assert eventually(lambda: len(measured) == 2)


def test_a_run_interrupts_measuring_and_it_is_done_later(runners, shelf, monkeypatch):
    tries, begun = [], threading.Event()

    def measure(engine: Engine, poll) -> Cost:
        tries.append(engine.identity["name"])
        begun.set()
        while len(tries) == 1:
            poll()
            time.sleep(0.01)
        return COST

    monkeypatch.setattr("app.runner.measure", measure)
    runner = runners(measure=True)
    load(runner, "a")
    assert begun.wait(PATIENCE)
    run = runner.submit(job("a"))
    assert next(run.updates()).ahead == 0  # measuring is nobody's turn
    run = go(runner, job("a"))
    assert ending(run).status == "done" and events(run)[0].cost is None
    assert eventually(lambda: cost_of(runner, "a"))
    assert tries == ["a", "a"]


def test_closing_interrupts_measuring(runners, monkeypatch):
    begun = threading.Event()

    def forever(engine: Engine, poll) -> Cost:
        begun.set()
        while True:
            poll()
            time.sleep(0.01)

    monkeypatch.setattr("app.runner.measure", forever)
    runner = runners(measure=True)
    load(runner, "a")
    assert begun.wait(PATIENCE)
    runner.close()
    assert not runner._thread.is_alive()


def test_a_model_that_cannot_be_measured_is_not_tried_again(runners, monkeypatch):
    tries = []

    def breaks(engine: Engine, poll) -> Cost:
        tries.append(1)
        raise RuntimeError("broken kernel")

    monkeypatch.setattr("app.runner.measure", breaks)
    runner = runners(measure=True)
    load(runner, "a")
    assert eventually(lambda: tries)
    assert events(go(runner, job("a")))[0].cost is None
    runner.close()
    assert tries == [1]


def test_a_damaged_table_is_measured_anew(runners, measured):
    runner = runners(measure=True)
    load(runner, "a")
    assert eventually(lambda: cost_of(runner, "a"))
    ((key, data),) = stored_costs(runner.store)
    assert Cost.from_mapping(json.loads(data)) == COST
    runner.store.put_artifact(key, "cost", "table", b"{}")
    later = runners(measure=True)
    load(later, "a")
    assert eventually(lambda: cost_of(later, "a")) and measured == ["a", "a"]


def stored_costs(store: Store) -> list[tuple[str, bytes]]:
    with store._connection() as db:
        return db.execute("SELECT identity, data FROM artifacts WHERE method = 'cost'").fetchall()


# What methods learn


def test_what_a_method_learns_stays_with_the_model(runners, monkeypatch):
    found = []

    def learns(engine, task, params, ctx):
        found.append(ctx.artifacts.get("learns", "probe"))
        ctx.artifacts.put("learns", "probe", b"weights", {"layer": 2})
        yield Note("info", "")
        return "learnt"

    add_method(monkeypatch, "learns", learns)
    runner = runners()
    for asked in (job("a", "learns"), job("a", "learns"), job("b", "learns")):
        go(runner, asked)
    other = replace(job("a", "learns"), model=ModelChoice("a", quantization="none"))
    go(runner, other)
    assert found == [None, (b"weights", {"layer": 2}), None, None]
