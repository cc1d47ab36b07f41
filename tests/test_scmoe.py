"""SCMoE: the contrast of two routings, against slow versions of itself and plain greedy."""

import json
import math

import pytest
import torch

from analyzers import registry
from analyzers.common import contrast
from analyzers.context import Context
from analyzers.contrast import scmoe
from analyzers.contrast.scmoe import Params, contrasted, run
from analyzers.engine import Engine, Options
from analyzers.engine.routing import DEFAULT, random, rank, top
from analyzers.errors import BadParameter, Stopped
from analyzers.task import Task
from analyzers.trace import (
    Lens,
    Metric,
    Note,
    Routing,
    Scores,
    Token,
    from_data,
    kind_of,
    surviving,
    to_data,
)
from tests import tiny

TASK = Task("The quick brown fox")
KL = "KL(strong‖weak)"


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def moe(request) -> Engine:
    engine = tiny.engine(request.param)
    engine._ends = frozenset()
    return engine


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def go(engine: Engine, seed: int = 3, task: Task = TASK, **knobs):
    """All events, and why the run ended."""
    ran = run(engine, task, Params(**{"max_new": 12, "rank_map": 0} | knobs), Context(seed))
    events = []
    while True:
        try:
            events.append(next(ran))
        except StopIteration as end:
            return events, end.value


def ids(events) -> list[int]:
    return [token.id for token in surviving(events)]


def kept(events, kind, name: str | None = None):
    return [e for e in events if isinstance(e, kind) and (name is None or e.name == name)]


def greedy(engine: Engine, count: int, task: Task = TASK) -> list[int]:
    cursor, found = engine.prefill(engine.encode(task)), []
    for _ in range(count):
        found.append(int(engine.step(cursor).logits.argmax()))
        engine.push(cursor, found[-1])
    return found


# The text


@pytest.mark.parametrize("together", [True, False])
def test_beta_zero_writes_what_greedy_writes(moe, together):
    events, ended = go(moe, beta=0, together=together)
    assert ids(events) == greedy(moe, 12) and ended == "max_new reached"


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_equal_policies_write_what_greedy_writes(moe, beta):
    """`top` with the model's own number is the model's own routing."""
    for strong in ("default", "top"):
        events, _ = go(moe, beta=beta, strong=strong, strong_k=2, weak="top", weak_k=2)
        assert ids(events) == greedy(moe, 12)
        assert all(e.values[0] < 1e-4 for e in kept(events, Scores, KL))
        (unchosen,) = kept(events, Metric, "unchosen use")
        assert unchosen.value == 0


def test_alpha_one_writes_what_greedy_writes(moe):
    assert ids(go(moe, alpha=1, beta=4)[0]) == greedy(moe, 12)


def test_the_default_contrast_changes_the_text(moe):
    assert ids(go(moe)[0]) != greedy(moe, 12)


@pytest.mark.parametrize(
    ("knobs", "strong", "weak"),
    [
        ({}, DEFAULT, rank(2)),
        ({"strong": "top", "strong_k": 3, "weak": "top", "weak_k": 1}, top(3), top(1)),
        ({"renormalise": "yes", "weak": "rank", "weak_k": 3}, DEFAULT, rank(3, True)),
        ({"renormalise": "no"}, DEFAULT, rank(2, False)),
    ],
)
def test_the_slow_version_writes_the_same(moe, knobs, strong, weak):
    """The whole text computed anew under either policy for every token; the formula in full."""
    text, found = moe.encode(TASK), []
    for _ in range(12):
        z_s, z_w = (
            moe.step(
                moe.prefill(text, options=Options(policy=policy)), options=Options(policy=policy)
            ).logits[: moe.vocabulary.size]
            for policy in (strong, weak)
        )
        allowed = z_s >= math.log(0.1) + z_s.max()
        found.append(int((1.5 * z_s - 0.5 * z_w).masked_fill(~allowed, -torch.inf).argmax()))
        text = [*text, found[-1]]
    assert ids(go(moe, **knobs)[0]) == found


def test_the_numbers_of_the_shared_mechanism():
    """z_s = (2, 1, .5, -2), z_w = (2, 0, 1, 0), alpha = .1: beta .5 and 2, worked by hand."""
    engine = tiny.engine("mixtral")
    z_s, z_w = torch.tensor([2.0, 1.0, 0.5, -2.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    steps = [contrast.Step(0, z, z, (), {}) for z in (z_s, z_w)]
    for beta, expected in ((0.5, (0.5617, 0.3407, 0.0976, 0)), (2, (0.2631, 0.7153, 0.0216, 0))):
        _, rule = contrasted(engine, TASK, Params(beta=beta), Context(0))
        fused = rule(steps)
        assert fused.plausible == 3
        assert fused.scores.softmax(0).tolist() == pytest.approx(expected, abs=1e-4)


def test_one_batch_equals_two_passes_a_token_and_is_one_pass(moe):
    before = moe.forwards
    together, _ = go(moe)
    assert moe.forwards - before == 2 + 12  # two prompts, then one pass a token
    before = moe.forwards
    apart, _ = go(moe, together=False)
    assert moe.forwards - before == 2 + 24
    assert [kind_of(e) for e in together] == [kind_of(e) for e in apart]
    assert ids(together) == ids(apart)
    for one, other in zip(kept(together, Lens), kept(apart, Lens), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-3)
    for one, other in zip(kept(together, Routing), kept(apart, Routing), strict=True):
        assert (one.layer, one.label, one.experts) == (other.layer, other.label, other.experts)
        assert one.weights == pytest.approx(other.weights, abs=1e-4)


def test_every_reading_has_a_cache_of_its_own_and_reads_the_same_tokens(moe):
    """The weak reading routes the prompt its own way, too; and the caches grow alike."""
    params = Params(max_new=6)
    branches, rule = contrasted(moe, TASK, params, Context(0))
    strong, weak = (branch.cursor for branch in branches)
    assert strong.past is not weak.past
    prompt = moe.encode(TASK)
    alone = moe.step(
        moe.prefill(prompt, options=Options(policy=rank(2))), options=Options(policy=rank(2))
    )
    late = moe.step(moe.prefill(prompt), options=Options(policy=rank(2)))
    first = contrast.step_all(branches)[1]
    torch.testing.assert_close(first.raw, alone.raw, rtol=1e-4, atol=1e-4)
    assert (first.raw - late.raw).abs().max() > 1e-2  # the strong prompt would not do
    for event in contrast.write(Context(0), branches, rule, max_new=6):
        assert isinstance(event, Token | Note)
        assert strong.ids == weak.ids and strong.ids[-1] == event.id
        assert strong.cached == weak.cached == event.pos


def test_after_a_run_the_model_is_what_it_was(moe):
    prompt = moe.encode(TASK)
    before = moe.step(moe.prefill(prompt)).raw
    go(moe, rank_map=4, weak="random")
    assert torch.equal(moe.step(moe.prefill(prompt)).raw, before)


def test_only_a_text_of_the_models_own_routing_is_kept_for_other_runs(moe):
    for strong, count in (("default", 1), ("top", 0), ("dynamic", 0)):
        ctx = Context(0)
        contrasted(moe, TASK, Params(strong=strong), ctx)
        assert len(ctx.cursors) == count


def test_it_goes_on_from_a_written_beginning(moe):
    whole, _ = go(moe, max_new=10)
    begun = tuple(surviving(whole)[:4])
    rest, _ = go(moe, max_new=6, task=Task(TASK.prompt, written=begun))
    assert tuple(surviving(rest)[:4]) == begun and ids(rest) == ids(whole)


# Policies


def test_random_experts_are_the_same_for_the_same_seed_only(moe):
    knobs = {"weak": "random", "weak_k": 1, "beta": 1.0}
    first, again, other = go(moe, 3, **knobs), go(moe, 3, **knobs), go(moe, 4, **knobs)
    assert first == again
    weak = [
        [e.experts for e in kept(events, Routing) if e.label == "weak"]
        for events, _ in (first, other)
    ]
    assert weak[0] != weak[1] and all(len(experts) == 1 for experts in weak[0])
    assert len(set(weak[0])) == 4  # anew in every layer, at every token


def test_dynamic_readings_take_as_many_experts_as_the_threshold_asks(moe):
    few, _ = go(moe, strong="dynamic", weak="top", weak_k=1, threshold=0)
    many, _ = go(moe, strong="dynamic", weak="top", weak_k=1, threshold=0.97)
    sizes = [
        sum(len(e.experts) for e in kept(events, Routing) if e.label == "strong")
        for events in (few, many)
    ]
    assert sizes[0] == 3 * 12 < sizes[1]
    assert ids(few) == ids(go(moe, strong="top", strong_k=1, beta=0)[0])


def test_a_single_expert_weighs_one_where_weights_are_renormalised(moe):
    for knobs in ({"renormalise": "yes"}, {"renormalise": "no"}):
        events, _ = go(moe, weak="rank", weak_k=1, **knobs)
        weights = {e.weights for e in kept(events, Routing) if e.label == "weak"}
        assert (weights == {(1.0,)}) is (knobs["renormalise"] == "yes")


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"weak": "rank", "weak_k": 5}, "rank-5 is not possible: the model has 4 experts"),
        ({"weak": "top", "weak_k": 9}, "top-9 is not possible: the model has 4 experts"),
        ({"weak": "random", "weak_k": 5}, "random-5 is not possible: the model has 4 experts"),
        ({"strong": "top", "strong_k": 6}, "top-6 is not possible: the model has 4 experts"),
    ],
)
def test_more_experts_than_there_are_are_refused_before_the_first_pass(moe, knobs, why):
    begun = tuple(surviving(go(moe, max_new=1)[0]))
    before = moe.forwards
    with pytest.raises(BadParameter, match=why):
        next(run(moe, Task(TASK.prompt, written=begun), Params(**knobs), Context(0)))
    assert moe.forwards == before


def test_a_k_that_is_not_used_is_not_looked_at(moe):
    assert go(moe, max_new=1, strong_k=99, weak="dynamic", weak_k=99)[1] == "max_new reached"


def test_a_dense_model_is_told_which_one_has_experts():
    why = registry.lacks(scmoe.CARD, tiny.engine("llama").can)
    assert why == (
        "needs routing, which this model does not offer; the built-in model smollm2-moe does"
    )
    assert not registry.lacks(scmoe.CARD, tiny.engine("mixtral").can)


# What is said


def test_every_token_comes_with_its_readings_numbers_and_experts(moe):
    events, _ = go(moe, max_new=5)
    written = surviving(events)
    for token in written:
        here = [e for e in events if getattr(e, "pos", None) == token.pos]
        (lens,) = kept(here, Lens)
        assert lens.rows == ("strong", "weak", "contrast") and lens.name == "branches"
        assert lens.scores[0] == pytest.approx(token.logprob, abs=1e-5)
        used = [(e.label, e.layer) for e in kept(here, Routing)]
        assert used == [(label, layer) for label in ("strong", "weak") for layer in (1, 2, 3)]
        assert {e.name: (e.unit, e.over) for e in kept(here, Scores)} == {
            KL: ("nats", (token.pos,)),
            "plausible tokens": ("tokens", (token.pos,)),
            "router entropy (strong)": ("nats", ("1", "2", "3")),
            "router entropy (weak)": ("nats", ("1", "2", "3")),
        }
    assert {len(e.experts) for e in kept(events, Routing) if e.label == "strong"} == {2}
    assert {len(e.experts) for e in kept(events, Routing) if e.label == "weak"} == {1}
    flipped = [token for token in written if token.rank != 1]
    assert flipped  # at temperature 0 the contrast took another one than the model's own


def test_the_divergence_is_that_of_the_whole_distributions(moe):
    events, _ = go(moe, max_new=1, strong="top", strong_k=3, weak="rank", weak_k=4)
    prompt, size = moe.encode(TASK), moe.vocabulary.size
    p, q = (
        moe.step(
            moe.prefill(prompt, options=Options(policy=policy)), options=Options(policy=policy)
        )
        .raw[:size]
        .double()
        .softmax(0)
        for policy in (top(3), rank(4))
    )
    expected = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    assert kept(events, Scores, KL)[0].values == (pytest.approx(expected, abs=1e-4),)


def test_router_entropy_is_that_of_the_routers_own_scores(moe):
    events, _ = go(moe, max_new=1)
    seen = []
    router = moe._parts.routers[0]
    hook = router.register_forward_hook(lambda module, args, output: seen.append(output[0][-1]))
    moe.step(moe.prefill(moe.encode(TASK)))
    hook.remove()
    shares = seen[-1].softmax(0).tolist()
    expected = -sum(share * math.log(share) for share in shares)
    found = kept(events, Scores, "router entropy (strong)")[0].values[0]
    assert 0 < found < math.log(4) and found == pytest.approx(expected, abs=1e-4)


def test_the_metrics_are_those_of_the_routing_events(moe):
    events, _ = go(moe, weak="rank", weak_k=3)
    strong, weak = (
        {(e.pos, e.layer): e.experts for e in kept(events, Routing) if e.label == label}
        for label in ("strong", "weak")
    )
    unchosen = [place for place, (expert,) in weak.items() if expert not in strong[place]]
    busiest = []
    for layer in (1, 2, 3):
        used = [e for (_, at), experts in strong.items() if at == layer for e in experts]
        busiest.append(max(map(used.count, used)) / (len(used) / 4))
    entropies = [v for e in kept(events, Scores, "router entropy (strong)") for v in e.values]
    assert {m.name: m.value for m in kept(events, Metric)} == {
        "unchosen use": pytest.approx(len(unchosen) / len(weak), abs=1e-6),
        "router entropy": pytest.approx(sum(entropies) / len(entropies), abs=1e-5),
        "load of the busiest expert": pytest.approx(sum(busiest) / 3, abs=1e-6),
    }
    assert all(m.step == 12 for m in kept(events, Metric))


def test_the_rank_map_reads_the_finished_text_under_every_rank(moe):
    """The rank of the weak reading has the divergence that was said while writing."""
    events, _ = go(moe, rank_map=64, weak="rank", weak_k=2)  # as many as there are experts: 4
    table = kept(events, Scores, "KL by rank")
    assert [e.pos for e in table] == [token.pos for token in surviving(events)]
    assert all(e.over == ("1", "2", "3", "4") and e.unit == "nats" for e in table)
    said = [e.values[0] for e in kept(events, Scores, KL)]
    assert [e.values[1] for e in table] == pytest.approx(said, abs=1e-3)
    assert events.index(table[0]) > max(events.index(token) for token in surviving(events))
    assert not kept(go(moe, rank_map=0)[0], Scores, "KL by rank")


def test_same_seed_same_events_all_finite_through_json(moe):
    first, _ = go(moe, temperature=1.0, rank_map=2)
    assert first == go(moe, temperature=1.0, rank_map=2)[0]
    assert first != go(moe, 4, temperature=1.0, rank_map=2)[0]
    for event in first:
        assert type(event) in {*scmoe.CARD.emits, Note}
        data = json.loads(json.dumps(to_data(event), allow_nan=False))
        assert from_data(kind_of(event), data) == event


@pytest.mark.parametrize("passes", [0, 1, 2, 5, 14, 16])
def test_stops_between_any_two_passes(passes):
    engine = tiny.engine("mixtral")
    engine._ends = frozenset()
    expected, _ = go(engine, rank_map=2)
    before = engine.forwards

    def poll() -> None:
        if engine.forwards - before == passes:
            raise Stopped("stopped by you")

    engine.poll = poll
    said = []
    with pytest.raises(Stopped):
        said.extend(run(engine, TASK, Params(max_new=12, rank_map=2), Context(3)))
    assert engine.forwards - before == passes
    engine.poll = lambda: None
    assert go(engine, rank_map=2)[0] == expected


def test_the_evaluation_scores_continuations_by_the_same_contrast(moe):
    """A one-token continuation scores what the table of the first step says."""
    branches, rule = contrasted(moe, TASK, Params(), Context(0))
    steps = contrast.step_all(branches, together=False)
    best = rule(steps).scores.topk(2).indices.tolist()
    branches, rule = contrasted(moe, TASK, Params(), Context(0))
    found = contrast.score(branches, [[id] for id in best], rule)
    assert found == pytest.approx(rule(steps).scores[best].tolist(), abs=1e-3)


def test_random_routing_does_not_depend_on_how_a_text_is_read(moe):
    """At once, in chunks, in a batch, or token by token: the same experts at the same places."""
    text, options = list(b"The cat sat on the mat."), Options(policy=random(1, 5))
    whole = moe.step(moe.prefill(text, options=options), options=options)
    piecewise = moe.prefill(text[:4], options=options)
    for id in text[4:]:
        moe.step(piecewise, options=options)
        moe.push(piecewise, id)
    other = moe.prefill(list(b"A dog"))
    both = Options(policy=(DEFAULT, random(1, 5)))
    batched = moe.step([other, piecewise], options=both)[1]
    torch.testing.assert_close(batched.raw, whole.raw, rtol=1e-4, atol=1e-4)


def test_the_weak_reading_of_a_model_follows_the_papers_examples():
    """Mixtral takes 2 experts, DeepSeekMoE 6, the mixture made from the default model 12."""
    assert [scmoe.papers(used) for used in (1, 2, 6, 12)] == [
        ("rank", 2),
        ("rank", 2),
        ("top", 2),
        ("top", 4),
    ]
