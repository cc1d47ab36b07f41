"""What a call may change about the model: for that call only, and as a changed copy would say."""

import pytest
import torch
from torch import nn

from analyzers.engine import Cursor, Engine, Options, Tree, routing
from analyzers.engine.adapters import parts
from analyzers.engine.values import PLAIN
from analyzers.errors import BadInput, ModelLacks, Stopped
from analyzers.task import Task
from tests import tiny
from tests.test_engine import CLOSE, TEXT, full

LAYERS = tiny.SIZES["num_hidden_layers"]
SKIPS = (
    frozenset({(2, "attention")}),
    frozenset({(1, "feed_forward")}),
    frozenset({(1, "attention"), (3, "attention"), (2, "feed_forward")}),
)


def ids_of(engine: Engine, length: int = 20) -> list[int]:
    return engine.encode(Task(TEXT))[:length]


def rows(engine: Engine, cursor: Cursor, options: Options = PLAIN) -> torch.Tensor:
    """Raw logits of four steps that all write the same ids."""
    found = []
    for id in range(70, 74):
        found.append(engine.step(cursor, options=options).raw)
        engine.push(cursor, id)
    return torch.stack(found)


def expected_rows(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """What `rows` must find, by one forward of a copy that is really changed."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, 70, 71, 72]]), use_cache=False).logits[0].float()
    return logits[len(ids) - 1 :]


def silenced(family: str, skip) -> nn.Module:
    """A fresh model in which hooks set the output of those sub-layers to zero."""
    model = tiny.model(family)
    found = parts(model)

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        zero = torch.zeros_like(first)
        return (zero, *output[1:]) if isinstance(output, tuple) else zero

    for layer, kind in skip:
        getattr(found, kind)[layer - 1].register_forward_hook(hook)
    return model


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt", "qwen3_moe"])
def some_engine(request) -> Engine:
    """One of each kind where the family matters little beside what every family is tested for."""
    return tiny.engine(request.param)


# Early exit


def test_an_early_exit_is_the_readout_of_its_layer(any_engine):
    cursor = any_engine.prefill(ids_of(any_engine))
    layers = range(1, LAYERS + 1)
    taps = any_engine.step(cursor, taps=layers).hidden
    for layer in layers:
        step = any_engine.step(
            any_engine.prefill(cursor.ids, options=Options(upto=layer)),
            taps=(layer,),
            options=Options(upto=layer),
        )
        torch.testing.assert_close(step.raw, any_engine.unembed(taps[layer]), **CLOSE)
        torch.testing.assert_close(step.hidden[layer], taps[layer], atol=1e-3, rtol=1e-4)


def test_early_exits_leave_the_later_layers_behind_and_a_plain_step_catches_up(any_engine):
    ids = ids_of(any_engine)
    cursor = any_engine.prefill(ids)
    early = rows(any_engine, cursor, Options(upto=2))
    lengths = [layer.length for layer in cursor.past.layers]
    assert lengths == [len(ids) + 3, len(ids) + 3, len(ids) - 1]
    assert cursor.cached == len(ids) - 1
    torch.testing.assert_close(
        any_engine.step(cursor).raw, full(any_engine, cursor.ids)[-1], **CLOSE
    )
    assert {layer.length for layer in cursor.past.layers} == {cursor.pos}
    again = any_engine.prefill(ids)
    torch.testing.assert_close(rows(any_engine, again, Options(upto=2)), early, **CLOSE)


# Skipped parts


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_skipped_part_is_one_whose_output_is_zero(family):
    engine = tiny.engine(family)
    ids = ids_of(engine)
    for skip in SKIPS:
        options = Options(skip=skip)
        found = rows(engine, engine.prefill(ids, options=options), options)
        torch.testing.assert_close(found, expected_rows(silenced(family, skip), ids), **CLOSE)


@pytest.mark.parametrize("skip", SKIPS)
def test_skipping_and_going_back_is_as_if_it_had_never_been(some_engine, skip):
    ids = ids_of(some_engine)
    cursor = some_engine.prefill(ids)
    expected = rows(some_engine, cursor)
    some_engine.rewind(cursor, len(ids))
    rows(some_engine, cursor, Options(skip=skip))
    some_engine.rewind(cursor, len(ids))
    torch.testing.assert_close(rows(some_engine, cursor), expected, **CLOSE)


def test_a_batch_under_options_is_one_by_one(some_engine):
    ids = ids_of(some_engine)
    for options in (Options(upto=2), Options(skip=SKIPS[2])):
        cursors = [some_engine.prefill(ids[:n], options=options) for n in (3, 11, 20)]
        for _ in range(3):
            steps = some_engine.step(cursors, taps=(2,), options=options)
            for cursor, step in zip(cursors, steps, strict=True):
                alone = some_engine.prefill(cursor.ids, options=options)
                single = some_engine.step(alone, taps=(2,), options=options)
                torch.testing.assert_close(step.raw, single.raw, **CLOSE)
                some_engine.push(cursor, 75)


def test_interleaved_lanes_with_other_options_are_separate_runs(some_engine):
    ids = ids_of(some_engine)
    lanes = [PLAIN, Options(upto=1), Options(skip=SKIPS[0]), Options(skip=SKIPS[1])]
    apart = [
        rows(some_engine, some_engine.prefill(ids, options=options), options) for options in lanes
    ]
    cursors = [some_engine.prefill(ids, options=options) for options in lanes]
    together: list[list[torch.Tensor]] = [[] for _ in lanes]
    for id in range(70, 74):
        for lane, options in enumerate(lanes):
            together[lane].append(some_engine.step(cursors[lane], options=options).raw)
            some_engine.push(cursors[lane], id)
    for lane, expected in enumerate(apart):
        torch.testing.assert_close(torch.stack(together[lane]), expected, **CLOSE)


@pytest.mark.parametrize("error", [Stopped("stopped"), RuntimeError("broken kernel")])
def test_an_error_inside_leaves_no_options_behind(tiny_engine, error):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    expected = tiny_engine.step(cursor).raw

    def fail(*args):
        raise error

    hook = tiny_engine.model.model.layers[1].register_forward_pre_hook(fail)
    for options in (Options(upto=2), Options(skip=SKIPS[1])):
        with pytest.raises(type(error)):
            tiny_engine.step(cursor, options=options)
    hook.remove()
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)
    torch.testing.assert_close(full(tiny_engine, cursor.ids)[-1], expected, **CLOSE)


def test_what_the_model_does_not_have_is_refused(tiny_engine):
    cursor = tiny_engine.prefill([65, 66])
    for options in (Options(upto=0), Options(upto=LAYERS + 1)):
        with pytest.raises(BadInput, match="Cannot stop after layer"):
            tiny_engine.step(cursor, options=options)
    for options in (Options(policy=routing.top(1)), Options(experts=True)):
        with pytest.raises(ModelLacks, match="needs experts"):
            tiny_engine.step(cursor, options=options)
    for layer in (0, LAYERS + 1):
        with pytest.raises(BadInput, match=f"Cannot skip layer {layer}"):
            tiny_engine.step(cursor, options=Options(skip=frozenset({(layer, "attention")})))


def test_with_everything_skipped_a_token_is_read_out_as_it_is(any_engine):
    """Embedding, position, norm and head are left; and nothing of it stays in the cache."""
    everything = frozenset(
        (layer, part) for layer in range(1, LAYERS + 1) for part in ("attention", "feed_forward")
    )
    options = Options(skip=everything)
    ids = [65, 66, 67, 68]
    cursor = any_engine.prefill(ids)
    expected = any_engine.step(cursor).raw
    step = any_engine.step(cursor, taps=(0,), options=options)
    torch.testing.assert_close(step.raw, any_engine.unembed(step.hidden[0]), **CLOSE)
    checked = any_engine.verify(cursor, Tree.chain([69]), options=options)
    torch.testing.assert_close(checked.raw[0], step.raw, **CLOSE)
    read = list(any_engine.read(cursor, [69], options=options))
    torch.testing.assert_close(read[0][1].raw, step.raw, **CLOSE)
    any_engine.rewind(cursor, len(ids))
    torch.testing.assert_close(any_engine.step(cursor).raw, expected, **CLOSE)


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_a_tap_of_a_layer_that_is_not_there_is_refused(tiny_engine, layer):
    with pytest.raises(BadInput, match=f"no layer {layer}: the model has 3"):
        tiny_engine.step(tiny_engine.prefill([65, 66]), taps=(layer,))


# Experts

POLICIES = (routing.DEFAULT, routing.top(1), routing.rank(2), routing.fixed((1, 3)))


@pytest.fixture(scope="module", params=tiny.MOE)
def moe(request) -> Engine:
    return tiny.engine(request.param)


def test_each_row_of_a_batch_follows_its_own_policy(moe):
    ids = ids_of(moe)
    lengths = (20, 3, 11, 15)
    cursors = [
        moe.prefill(ids[:n], options=Options(policy=policy))
        for n, policy in zip(lengths, POLICIES, strict=True)
    ]
    for _ in range(3):
        steps = moe.step(cursors, options=Options(policy=POLICIES, experts=True))
        for cursor, policy, step in zip(cursors, POLICIES, steps, strict=True):
            options = Options(policy=policy, experts=True)
            single = moe.step(moe.prefill(cursor.ids, options=options), options=options)
            torch.testing.assert_close(step.raw, single.raw, **CLOSE)
            for layer, (experts, weights) in single.experts.items():
                assert step.experts[layer][0] == experts
                assert step.experts[layer][1] == pytest.approx(weights, abs=1e-4)
            moe.push(cursor, 75)


def test_the_experts_tap_is_what_the_routers_said(moe):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    routers = parts(moe.model).routers
    hooks = [
        router.register_forward_hook(lambda module, args, output: seen.append(output[1:]))
        for router in routers.values()
    ]
    cursor = moe.prefill(ids_of(moe))
    seen.clear()
    step = moe.step(cursor, options=Options(experts=True))
    for hook in hooks:
        hook.remove()
    assert list(step.experts) == [index + 1 for index in routers]
    for (experts, weights), (their_weights, their_experts) in zip(
        step.experts.values(), seen, strict=True
    ):
        order = their_weights[0].argsort(descending=True)
        assert experts == tuple(their_experts[0][order].tolist())
        assert weights == pytest.approx(their_weights[0][order].tolist())
    assert torch.equal(moe.step(cursor, options=Options(experts=True)).raw, step.raw)
    torch.testing.assert_close(moe.step(cursor).raw, step.raw, **CLOSE)


def test_routing_otherwise_and_going_back_is_as_if_it_had_never_been(moe):
    ids = ids_of(moe)
    cursor = moe.prefill(ids)
    expected = rows(moe, cursor)
    moe.rewind(cursor, len(ids))
    changed = rows(moe, cursor, Options(policy=routing.rank(2)))
    assert (changed - expected).abs().max() > 1e-2
    moe.rewind(cursor, len(ids))
    torch.testing.assert_close(rows(moe, cursor), expected, **CLOSE)


def test_samples_keep_their_policies_when_others_are_done(moe, monkeypatch):
    from tests.test_scoring import rng

    monkeypatch.setattr(moe, "_ends", frozenset(range(0, 259, 3)))
    policies = (routing.rank(2), routing.DEFAULT, routing.top(1), routing.top(3))
    ids = ids_of(moe)
    together = moe.sample(ids, 4, rng=rng(), max_new=6, options=Options(policy=policies))
    for one in together:
        options = Options(policy=policies[one.index])
        cursor = moe.prefill(ids)
        for id, logprob in zip(one.ids, one.logprobs, strict=True):
            raw = moe.step(cursor, options=options).raw
            assert logprob == pytest.approx(float(torch.log_softmax(raw, -1)[id]), abs=1e-3)
            moe.push(cursor, id)
    with pytest.raises(BadInput, match="4 routing policies for 3 samples"):
        next(moe.sample(ids, 3, rng=rng(), max_new=6, options=Options(policy=policies)))


def test_as_many_policies_as_texts(moe):
    cursor = moe.prefill([65, 66])
    with pytest.raises(BadInput, match="2 routing policies for 1 text"):
        moe.score(cursor, [[70]], options=Options(policy=POLICIES[:2]))
