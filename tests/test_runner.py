"""The runner: what was asked is checked, run in order, told and stored alike, and always ended."""

import threading
from dataclasses import dataclass, field, replace

import pytest

from analyzers import registry
from analyzers.card import Card
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine, token
from analyzers.errors import (
    BadInput,
    BadParameter,
    CandorError,
    EmptyPrompt,
    ModelLacks,
    OutOfContext,
    RunNotFound,
    Stopped,
    StoreUnavailable,
)
from analyzers.registry import Method
from analyzers.task import Task, chat
from analyzers.trace import Metric, Note, RunEnded, RunStarted, Token, surviving, text_of
from app.runner import Fork, Job, Run, Runner
from sessions.store import Store
from tests import tiny

TEXT = "The quick brown fox jumps over the lazy dog; twice."
PATIENCE = 30


@dataclass(frozen=True)
class Nothing:
    """A made-up method has no knobs."""


@dataclass
class Gate:
    """A method that waits in its middle until the test opens it."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def run(self, engine, task, params, ctx):
        yield Note("info", "before")
        self.reached.set()
        assert self.opened.wait(PATIENCE)
        yield Note("info", "beyond")
        return "through"


def add_method(monkeypatch, name: str, run, needs=("logits",)) -> None:
    card = Card(name, "decoding", "made up", (Note,), needs)
    monkeypatch.setitem(registry.methods(), name, Method(name, card, Nothing, run, ""))


@pytest.fixture
def gate(monkeypatch) -> Gate:
    made = Gate()
    add_method(monkeypatch, "gate", made.run)
    yield made
    made.opened.set()


def job(text: str = TEXT, method: str = "sampling", seed: int = 5, **params) -> Job:
    knobs = {"max_new": 10, **params} if method == "sampling" else params
    return Job(method, Task(text), knobs, seed)


def go(runner: Runner, asked: Job) -> Run:
    return runner.submit(asked).finish()


def events(run: Run) -> list:
    return [stamped.event for stamped in run.events]


def tokens(run: Run) -> list[Token]:
    return surviving(events(run))


def ending(run: Run) -> RunEnded:
    assert isinstance(events(run)[-1], RunEnded)
    return events(run)[-1]


# One run


def test_a_run_begins_ends_and_is_stored_as_it_was_told(runner):
    run = runner.submit(job())
    told = [stamped for update in run.updates() for stamped in update.new]
    assert told == run.events == runner.store.events(run.id)
    started, *inner, ended = events(run)
    assert isinstance(started, RunStarted) and isinstance(ended, RunEnded)
    assert all(isinstance(event, Token) for event in inner)
    assert [stamped.seq for stamped in told] == list(range(12))
    times = [stamped.t for stamped in told]
    assert times[0] < 0.1 and times == sorted(times)
    assert started.prompt == TEXT and started.prompt_ids == tuple(TEXT.encode())
    assert started.model == runner.engine.identity and started.seed == 5
    assert started.params == vars(sampling.Params(max_new=10))
    assert (ended.status, ended.reason, ended.tokens) == ("done", "max_new reached", 10)
    assert ended.forwards == 1 + 10 and ended.seconds > 0
    stored = runner.store.run(run.id)
    assert (stored.status, stored.tokens, stored.output) == ("done", 10, text_of(inner))
    assert runner.live(run.id) is None and runner.events(run.id) == told


def test_a_seed_is_chosen_and_recorded_and_repeats_the_run(runner):
    first = go(runner, replace(job(), seed=None))
    again = go(runner, job(seed=events(first)[0].seed))
    assert events(again) == events(first)
    assert events(go(runner, replace(job(), seed=None)))[0].seed != events(first)[0].seed


def test_the_runner_changes_nothing_of_what_the_method_says(runner):
    run = go(runner, job(temperature=1.0))
    params = sampling.Params(max_new=10, temperature=1.0)
    assert tokens(run) == list(sampling.run(runner.engine, Task(TEXT), params, Context(5)))


@pytest.mark.parametrize("error", [RuntimeError("CUDA at /root/secret"), KeyError("x")])
def test_a_method_that_breaks_ends_its_run_and_nothing_else(runner, monkeypatch, error):
    def breaks(engine, task, params, ctx):
        yield Note("info", "so far")
        raise error

    add_method(monkeypatch, "breaks", breaks)
    run = go(runner, job(method="breaks"))
    assert ending(run).status == "failed" and runner.store.events(run.id) == run.events
    reason = ending(run).reason
    assert type(error).__name__ in reason and reason.endswith(".") and "\n" not in reason
    assert "Traceback" not in reason and "secret" not in reason
    assert ending(go(runner, job())).status == "done"


def test_a_sentence_of_ours_is_the_reason_as_it_is(runner, monkeypatch):
    def lacks(engine, task, params, ctx):
        yield Note("info", "so far")
        raise ModelLacks("needs 8 layers, tiny has 3")

    add_method(monkeypatch, "lacks", lacks)
    ended = ending(go(runner, job(method="lacks")))
    assert (ended.status, ended.reason) == ("failed", "needs 8 layers, tiny has 3")


def test_a_run_that_fills_the_context_stops_and_says_so(runner, monkeypatch):
    """Also where the method did not look: what was written until then is whole."""

    def run(engine: Engine, task, params, ctx):
        cursor = engine.prefill([65] * (tiny.CONTEXT - 3))
        while True:
            yield token(engine, engine.step(cursor), 66)
            engine.push(cursor, 66)

    add_method(monkeypatch, "endless", run)
    made = runner.submit(Job("endless", Task("x"))).finish()
    ended = made.events[-1].event
    assert (ended.status, ended.tokens) == ("stopped", 4)
    assert "too long: it has 513 tokens" in ended.reason


def test_what_cannot_be_stored_is_not_shown_either(runner, monkeypatch):
    def infinite(engine, task, params, ctx):
        yield Note("info", "so far")
        yield Metric("loss", 1, float("nan"), "nats")

    add_method(monkeypatch, "infinite", infinite)
    run = go(runner, job(method="infinite"))
    assert [type(event) for event in events(run)] == [RunStarted, Note, RunEnded]
    assert ending(run).status == "failed" and runner.store.events(run.id) == run.events


def test_inference_mode_is_never_on_while_the_method_rests(runner, monkeypatch):
    import torch

    seen = []

    def looks(engine, task, params, ctx):
        seen.append(torch.is_inference_mode_enabled())
        yield Note("info", "")
        return "looked"

    say = Run._say

    def listen(run, stamped):
        seen.append(torch.is_inference_mode_enabled())
        say(run, stamped)

    monkeypatch.setattr(Run, "_say", listen)
    add_method(monkeypatch, "looks", looks)
    go(runner, job(method="looks"))
    assert seen == [False, True, False, False]


# Stopping and waiting


def test_stop_acts_within_one_token(runner):
    run = runner.submit(job(max_new=440))
    for _ in run.updates():
        if len(run.events) > 2:
            run.stop()
            told = len(tokens(run))
            break
    go(runner, job())  # what waits behind it is served
    assert len(tokens(run)) <= told + 1
    assert (ending(run).status, ending(run).reason) == ("stopped", "stopped by you")
    assert runner.store.events(run.id) == run.events
    assert runner.store.run(run.id).status == "stopped"


def test_stop_acts_while_the_prompt_is_read(runner, own_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 8)
    forward, done = own_engine._forward, []

    def third_stops(*args, **options):
        done.append(1)
        if len(done) == 3:
            run.stop()
        return forward(*args, **options)

    runner.prepare(job().model, lambda what, share: None)
    monkeypatch.setattr(own_engine, "_forward", third_stops)
    with runner._wake:  # so that `run` has its name before the model thread begins
        run = runner.submit(job("x" * 400))
    run.finish()
    assert ending(run).status == "stopped" and tokens(run) == []
    assert ending(run).forwards == 2  # the third was asked for, and refused


def test_the_second_waits_for_the_first_and_knows_it(runner, gate):
    first = runner.submit(job(method="gate"))
    assert gate.reached.wait(PATIENCE)
    second, third = runner.submit(job()), runner.submit(job())
    following, behind = second.updates(), third.updates()
    assert next(following).ahead == 1 and next(behind).ahead == 2
    assert not first.over and second.id == ""
    gate.opened.set()
    *_, last = following
    assert last.ahead == 0 and ending(second).status == "done"
    list(behind)
    assert first.id < second.id < third.id
    assert first.over and ending(first).reason == "through"


def test_a_waiting_run_that_is_stopped_never_begins(runner, gate):
    runner.submit(job(method="gate"))
    assert gate.reached.wait(PATIENCE)
    waiting, behind = runner.submit(job()), runner.submit(job())
    waiting.stop()
    with pytest.raises(Stopped):
        waiting.finish()
    assert next(behind.updates()).ahead == 1
    gate.opened.set()
    assert waiting.id == "" and waiting.events == [] and runner.store.count() == 1


def test_walking_away_ends_the_run(runner):
    run = runner.submit(job(max_new=440))
    following = run.updates()
    while not any(isinstance(stamped.event, Token) for stamped in next(following).new):
        pass
    following.close()
    go(runner, job())
    assert (ending(run).status, ending(run).reason) == ("stopped", "its reader went away")
    assert runner.store.events(run.id) == run.events
    assert len(tokens(run)) < 440


def test_closing_ends_what_runs_and_refuses_what_comes(runner, gate):
    run, waiting = runner.submit(job(method="gate")), runner.submit(job())
    assert gate.reached.wait(PATIENCE)
    closing = threading.Thread(target=runner.close)
    closing.start()
    with pytest.raises(Stopped):
        waiting.finish()
    gate.opened.set()
    closing.join(PATIENCE)
    assert (ending(run).status, ending(run).reason) == ("stopped", "Candor was closed")
    assert runner.store.events(run.id) == run.events
    with pytest.raises(CandorError, match="closed"):
        runner.submit(job())


def test_runs_asked_from_many_threads_stay_apart(runner):
    asked = [job(f"Text number {n}.", seed=n, temperature=1.0) for n in range(6)]
    made: dict[int, Run] = {}

    def ask(n: int) -> None:
        made[n] = go(runner, asked[n])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len({run.id for run in made.values()}) == 6
    for n, run in made.items():
        params = sampling.Params(max_new=10, temperature=1.0)
        alone = sampling.run(runner.engine, asked[n].task, params, Context(n))
        assert tokens(run) == list(alone)
        assert runner.store.events(run.id) == run.events


# A store in trouble


def test_a_store_that_fails_is_said_and_everything_is_written_later(runner, gate, monkeypatch):
    trouble = "The disk is full: make room where runs.db lies."

    def full(*args: object) -> None:
        raise StoreUnavailable(trouble)

    run = runner.submit(job(method="gate"))
    assert gate.reached.wait(PATIENCE)
    with monkeypatch.context() as broken:
        broken.setattr(runner.store, "append_rows", full)
        runner.recorder.record(run.id, replace(run.events[-1], seq=1000))  # something to write
        following = run.updates()
        assert any(update.unsaved == trouble for update in following)
        assert not run.over
    gate.opened.set()
    *_, last = following
    assert last.unsaved is None and ending(run).status == "done"
    stored = [each for each in runner.store.events(run.id) if each.seq < 1000]
    assert stored == run.events


def test_a_store_that_cannot_begin_a_run_refuses_it(runner, monkeypatch):
    def locked(*args: object, **options: object) -> None:
        raise StoreUnavailable("The database is locked.")

    with monkeypatch.context() as broken:
        broken.setattr(runner.store, "begin", locked)
        with pytest.raises(StoreUnavailable, match="locked"):
            go(runner, job())
    assert ending(go(runner, job())).status == "done"


# Going on from an earlier run


def fork_of(run: Run, at: int, choice: int = 3, **params) -> Job:
    """From `run`'s token number `at`, with its alternative number `choice`."""
    token = tokens(run)[at]
    knobs = {"max_new": 10, "temperature": 0, **params}
    return Job("sampling", params=knobs, seed=9, fork=Fork(run.id, token.pos, token.top[choice][0]))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 8)


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_fork_keeps_what_was_written_and_says_where_it_comes_from(runner, small_chunks, at):
    parent = go(runner, job())
    asked = fork_of(parent, at)
    child = go(runner, asked)
    kept, forced = tokens(child)[:at], tokens(child)[at]
    assert kept == tokens(parent)[:at]
    assert (forced.pos, forced.id, forced.origin) == (asked.fork.pos, asked.fork.id, "forced")
    assert forced.p_sampled is None and forced.top == tokens(parent)[at].top
    assert forced.logprob == forced.top[3][2] and forced.rank == 4
    assert len(tokens(child)) == at + 1 + 10 and ending(child).tokens == 10
    stored = runner.store.run(child.id)
    assert (stored.parent, stored.fork_pos) == (parent.id, asked.fork.pos)
    started, before = events(child)[0], events(parent)[0]
    assert (started.prompt, started.prompt_ids) == (before.prompt, before.prompt_ids)
    assert runner.store.events(child.id) == child.events


def test_a_fork_from_the_kept_cache_is_the_same_and_cheaper(runner, small_chunks):
    parent = go(runner, job("x y z " * 30))
    quick = go(runner, fork_of(parent, 5))
    runner._kept.clear()
    slow = go(runner, fork_of(parent, 5))
    assert [token.id for token in tokens(quick)] == [token.id for token in tokens(slow)]
    for one, other in zip(tokens(quick), tokens(slow), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert ending(quick).forwards == 10  # the steps alone
    assert ending(slow).forwards == -(-(180 + 5) // 8) + 10
    assert tokens(parent) == surviving([s.event for s in runner.store.events(parent.id)])


def test_a_fork_of_a_fork_and_of_the_token_that_was_taken_anyway(runner):
    parent = go(runner, job(temperature=0))
    child = go(runner, fork_of(parent, 3))
    grandchild = go(runner, fork_of(child, 6))
    assert tokens(grandchild)[:6] == tokens(child)[:6]
    same = go(runner, fork_of(parent, 4, choice=0))
    assert [t.id for t in tokens(same)][:10] == [t.id for t in tokens(parent)]


def test_a_conversation_with_a_begun_answer_can_be_forked(runner):
    parent = go(runner, Job("sampling", Task(chat("hi"), prefix="Well"), {"max_new": 6}, 1))
    child = go(runner, fork_of(parent, 2))
    assert events(child)[0].prompt == events(parent)[0].prompt
    assert events(child)[0].prefix == "Well" and tokens(child)[:2] == tokens(parent)[:2]


def test_a_text_that_was_read_can_be_continued_from_any_place(runner):
    parent = go(runner, job("Once upon a time", method="read"))
    assert ending(parent).tokens == 16
    child = go(runner, fork_of(parent, 5))
    assert tokens(child)[:5] == tokens(parent)[:5] and tokens(child)[5].pos == 5
    assert events(child)[0].prompt_ids == () and ending(child).tokens == 10
    assert [token.pos for token in tokens(child)] == list(range(16))
    assert text_of(events(child)).startswith("Once ")
    again = go(runner, fork_of(child, 8))
    assert tokens(again)[:8] == tokens(child)[:8]


def test_a_stored_run_is_forked_after_a_restart(tmp_path, monkeypatch, runner):
    parent = go(runner, job())
    expected = go(runner, fork_of(parent, 4))
    store = Store(tmp_path / "runs.db")
    later = Runner(store, measure=False)
    found = go(later, fork_of(parent, 4))
    later.close()
    store.close()
    assert [token.id for token in tokens(found)] == [token.id for token in tokens(expected)]


def test_what_cannot_be_forked_is_refused(runner, own_engine, monkeypatch):
    parent = go(runner, job())
    read = go(runner, job("Once", method="read"))
    place = tokens(parent)[3]
    offered = {entry[0] for entry in place.top}
    other = next(id for id in range(256) if id not in offered)
    for fork in (
        Fork(parent.id, place.pos, other),
        Fork(parent.id, place.pos, -1),
        Fork(parent.id, 400, place.id),
        Fork(parent.id, 0, place.id),  # a token of the prompt
        Fork(read.id, 0, tokens(read)[0].id),  # nothing precedes it
    ):
        with pytest.raises(BadInput, match="not among the alternatives"):
            go(runner, Job("sampling", fork=fork))
    with pytest.raises(RunNotFound):
        go(runner, Job("sampling", fork=Fork("0" * 26, 3, 3)))
    monkeypatch.setattr(own_engine, "identity", {**own_engine.identity, "hash": "other"})
    with pytest.raises(BadInput, match="another model"):
        go(runner, Job("sampling", fork=Fork(parent.id, place.pos, place.id)))
    assert runner.store.count() == 2


# What is refused


@pytest.mark.parametrize(
    ("asked", "error", "sentence"),
    [
        (job(""), EmptyPrompt, "prompt is empty"),
        (job(" \n\t"), EmptyPrompt, "prompt is empty"),
        (Job("sampling", Task(chat(""))), EmptyPrompt, "prompt is empty"),
        (Job("sampling", Task(())), EmptyPrompt, "prompt is empty"),
        (job(method="guess"), BadInput, "no method 'guess'; there are: .*sampling"),
        (job(temprature=1), BadParameter, "no parameter 'temprature'"),
        (job(temperature=3), BadParameter, "temperature must be a number from 0 to 2, not 3"),
        (job(max_new="many"), BadParameter, "whole number from 1 to 8,192 tokens"),
        (job(seed=-1), BadInput, "seed must be from 0 to 2,147,483,647, not -1"),
        (job(seed=2**31), BadInput, "seed must be from 0"),
        (job("x" * 600), OutOfContext, r"600 tokens.* 512"),
        (job("x" * 600, method="read"), OutOfContext, r"600 tokens.* 512"),
    ],
)
def test_bad_input_is_refused_and_records_nothing(runner, asked, error, sentence):
    with pytest.raises(error, match=sentence):
        go(runner, asked)
    assert runner.store.runs() == []
    assert ending(go(runner, job())).status == "done"


def test_a_model_without_a_template_takes_raw_text_only(runner, own_engine, monkeypatch):
    monkeypatch.setattr(own_engine.tokenizer, "chat_template", None)
    with pytest.raises(BadInput, match="choose raw text"):
        go(runner, Job("sampling", Task(chat("hi"))))
    assert runner.store.count() == 0
    assert ending(go(runner, job())).status == "done"


def test_a_method_the_model_cannot_serve_says_what_it_needs(runner, monkeypatch):
    add_method(monkeypatch, "deep", Gate().run, needs=("logits", "routing"))
    with pytest.raises(ModelLacks, match="needs routing"):
        go(runner, job(method="deep"))
    assert runner.store.count() == 0


def test_a_prompt_that_fills_the_context_is_taken(runner):
    run = go(runner, job("x" * tiny.CONTEXT))
    assert (ending(run).reason, tokens(run)) == ("context full", [])


def test_another_model_is_loaded_when_it_is_asked_for(runner, monkeypatch):
    loaded: list[str] = []

    def load(ref: str, **options: object) -> Engine:
        loaded.append(ref)
        return tiny.engine(ref)

    monkeypatch.setattr("app.runner.load", load)
    monkeypatch.setattr("app.runner.plan", lambda choice, remote_code, progress: (choice, 0))
    for ref in ("llama", "llama", "gpt2", "llama"):
        asked = job()
        run = go(runner, replace(asked, model=replace(asked.model, ref=ref)))
        assert events(run)[0].model["name"] == f"tiny-{ref}"
        assert runner.model_facts()["name"] == f"tiny-{ref}"
        assert runner.model_facts()["context"] == tiny.CONTEXT
    assert loaded == ["llama", "gpt2"]  # the first one was still there


def test_a_model_that_does_not_load_refuses_the_run_and_leaves_the_runner_alive(
    runner, monkeypatch
):
    def fails(ref: str, **options: object) -> Engine:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr("app.runner.load", fails)
        with pytest.raises(CandorError, match="MemoryError"):
            go(runner, job())
    assert runner.store.count() == 0
    assert ending(go(runner, job())).status == "done"
