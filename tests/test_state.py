"""Models with a recurrent state, or with distances of their own in the attention: they stream, fork
and go back, and say what they lack."""

import pytest
import torch

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine, Filters, Options, Tree
from analyzers.errors import ModelLacks, Stopped
from analyzers.task import Task
from analyzers.trace import Token
from tests import tiny
from tests.test_engine import CLOSE, TEXT, full, ids_of, write


@pytest.fixture(scope="module", params=["lfm2", "qwen3_next"])
def recurrent(request) -> Engine:
    return tiny.engine(request.param)


def test_it_streams_with_confidence(recurrent):
    params = sampling.Params(temperature=0.0, max_new=20)
    events = list(sampling.run(recurrent, Task(TEXT), params, Context(seed=1)))
    assert len(events) > 3 and all(isinstance(event, Token) and event.top for event in events)
    ids = ids_of(recurrent) + [event.id for event in events]
    expected = full(recurrent, ids)[len(ids) - len(events) - 1 : -1].log_softmax(-1)
    for event, row in zip(events, expected, strict=True):
        assert event.logprob == pytest.approx(float(row[event.id]), abs=1e-3)


def test_taps_and_readout_work(recurrent):
    ids = ids_of(recurrent)
    step = recurrent.step(recurrent.prefill(ids), taps=range(recurrent.layers + 1))
    torch.testing.assert_close(recurrent.unembed(step.hidden[recurrent.layers]), step.raw, **CLOSE)


def test_going_back_restores_a_snapshot_and_is_as_if_it_had_never_been(recurrent, monkeypatch):
    monkeypatch.setattr("analyzers.engine.cache.SNAPSHOT_EVERY", 8)
    ids = ids_of(recurrent)
    cursor = recurrent.prefill(ids)
    expected = write(recurrent, cursor, 12)
    write(recurrent, cursor, 15)
    recurrent.rewind(cursor, len(ids) + 2)
    assert 0 < cursor.cached < len(ids) + 2  # the rest is computed again
    recurrent.push(cursor, 65)
    write(recurrent, cursor, 5)
    recurrent.rewind(cursor, len(ids))
    torch.testing.assert_close(
        torch.stack(write(recurrent, cursor, 12)), torch.stack(expected), **CLOSE
    )


def test_snapshots_stay_few(recurrent, monkeypatch):
    monkeypatch.setattr("analyzers.engine.cache.SNAPSHOT_EVERY", 2)
    cursor = recurrent.prefill(ids_of(recurrent))
    write(recurrent, cursor, 60)
    kept = [at for at, _ in cursor.past._saved]
    assert len(kept) <= 8 and kept == sorted(kept)


@pytest.mark.parametrize("to", [None, 20])
def test_a_fork_equals_recomputation(recurrent, to):
    cursor = recurrent.prefill(ids_of(recurrent))
    write(recurrent, cursor, 3)
    branch = recurrent.fork(cursor, to)
    recurrent.push(branch, 90)
    write(recurrent, branch, 3)
    for each in (branch, cursor):
        torch.testing.assert_close(recurrent.step(each).raw, full(recurrent, each.ids)[-1], **CLOSE)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bloom"])
def test_many_cursors_scores_and_samples_are_those_of_one_by_one(family):
    recurrent = tiny.engine(family)
    ids = ids_of(recurrent)
    cursors = [recurrent.prefill(ids[:n]) for n in (1, 9, 30)]
    for cursor, step in zip(cursors, recurrent.step(cursors), strict=True):
        torch.testing.assert_close(step.raw, full(recurrent, cursor.ids)[-1], **CLOSE)
    scored = recurrent.score(ids, [[70, 71], [72]])
    rows = full(recurrent, [*ids, 70, 71]).log_softmax(-1)
    assert scored[0].total == pytest.approx(
        float(rows[len(ids) - 1, 70] + rows[len(ids), 71]), abs=1e-3
    )
    assert scored[1].logprobs[0] == pytest.approx(float(rows[len(ids) - 1, 72]), abs=1e-3)
    rng = Context(seed=2).rng
    samples = list(recurrent.sample(ids, 2, rng=rng, max_new=4, filters=Filters()))
    assert sorted(sample.index for sample in samples) == [0, 1]


def test_a_stopped_call_leaves_the_cursor_as_it_was(recurrent):
    cursor = recurrent.prefill(ids_of(recurrent))
    expected = recurrent.step(cursor).raw
    recurrent.push(cursor, 65)
    ids = list(cursor.ids)

    def fail(*args, **kwargs):
        raise Stopped("stopped")

    late = recurrent._parts.norm.register_forward_pre_hook(fail)
    try:
        for call in (
            lambda: recurrent.step(cursor),
            lambda: recurrent.extend(cursor, [66] * 5),
            lambda: list(recurrent.read(cursor, [66] * 5)),
        ):
            with pytest.raises(Stopped):
                call()
            assert cursor.ids == ids
    finally:
        late.remove()
    torch.testing.assert_close(recurrent.step(cursor).raw, full(recurrent, ids)[-1], **CLOSE)
    recurrent.rewind(cursor, len(ids) - 1)
    torch.testing.assert_close(recurrent.step(cursor).raw, expected, **CLOSE)


def test_what_it_cannot_do_is_said(recurrent):
    assert not {"tree", "attention"} & recurrent.can and "fork" in recurrent.can
    cursor = recurrent.prefill(ids_of(recurrent))
    for call in (
        lambda: recurrent.verify(cursor, Tree.chain([65])),
        lambda: recurrent.attention(cursor, 3),
        lambda: recurrent.forward(torch.zeros(1, 32), (0, 1)),
    ):
        with pytest.raises(ModelLacks, match="recurrent state"):
            call()


def test_alibi_streams_and_says_what_it_lacks():
    engine = tiny.engine("bloom")
    assert not {"tree", "attention"} & engine.can
    cursor = engine.prefill(ids_of(engine))
    write(engine, cursor, 8)
    engine.rewind(cursor, 20)
    engine.push(cursor, 65)
    torch.testing.assert_close(engine.step(cursor).raw, full(engine, cursor.ids)[-1], **CLOSE)
    for call in (
        lambda: engine.verify(cursor, Tree.chain([65])),
        lambda: engine.forward(torch.zeros(1, 32), (0, 1)),
        lambda: engine.step(cursor, options=Options(upto=2)),
    ):
        with pytest.raises(ModelLacks, match="ALiBi"):
            call()
