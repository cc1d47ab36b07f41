"""Routing policies: what the routers are made to choose, checked against slow obvious versions."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig

from analyzers.engine.adapters import parts
from analyzers.engine.routing import (
    DEFAULT,
    Policy,
    chosen,
    dynamic,
    entropy,
    experts_in,
    experts_of_row,
    fixed,
    random,
    rank,
    reroute,
    routable,
    top,
)
from analyzers.errors import BadParameter, ModelLacks
from tests import tiny

IDS = torch.tensor([list(b"The cat sat on"), list(b"A dog, my dear")])
RENORMALISED = {"mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3"}


@pytest.fixture(scope="module", params=tiny.MOE)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny.model(family)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@contextmanager
def routed(model, policies, seen=None):
    """Every router follows the policies; `seen` gets (router's own, rerouted) of each."""

    def hook(module, args, output):
        new = reroute(module, model.config, output, policies)
        if seen is not None:
            seen.append((output, new))
        return new

    hooks = [router.register_forward_hook(hook) for router in parts(model).routers.values()]
    yield
    for hook in hooks:
        hook.remove()


def logits(model, policies, ids=IDS, seen=None) -> torch.Tensor:
    with routed(model, policies, seen):
        return model(input_ids=ids).logits


def close(one, other, within=1e-5):
    torch.testing.assert_close(one, other, rtol=within, atol=within)


# A case worked by hand


def by_hand(weights, policy, family="mixtral", **config):
    """Experts and weights of one row whose softmax over all experts is `weights`."""
    scores = torch.tensor([weights]).log()
    own = scores.softmax(-1).topk(2)
    output = (scores, own.values, own.indices)
    config = AutoConfig.for_model(family, **config)
    experts, found = chosen(reroute(nn.Module(), config, output, [policy]))
    return experts_of_row(experts[0], found[0])


@pytest.mark.parametrize(
    ("policy", "experts", "weights"),
    [
        (top(2), (0, 1), (0.625, 0.375)),
        (rank(1), (0,), (1.0,)),
        (rank(2), (1,), (1.0,)),
        (top(3), (0, 1, 2), (0.5263, 0.3158, 0.1579)),
        (top(4), (0, 1, 2, 3), (0.5, 0.3, 0.15, 0.05)),
        (fixed((3, 1)), (1, 3), (0.8571, 0.1429)),
        (fixed((3,)), (3,), (1.0,)),
        (dynamic(0.0), (0,), (1.0,)),
        (dynamic(0.6), (0, 1), (0.625, 0.375)),
        (dynamic(0.9), (0, 1, 2), (0.5263, 0.3158, 0.1579)),
        (top(2, renormalise=False), (0, 1), (0.5, 0.3)),
        (rank(3, renormalise=False), (2,), (0.15,)),
    ],
)
def test_the_hand_worked_case(policy, experts, weights):
    """Four experts of which a row thinks (.5, .3, .15, .05)."""
    found = by_hand((0.5, 0.3, 0.15, 0.05), policy)
    assert found[0] == experts
    assert found[1] == pytest.approx(weights, abs=1e-4)


def test_weights_sum_to_one_where_the_family_says_so():
    """`norm_topk_prob` is the switch; a policy may overrule it either way."""
    weights = (0.5, 0.3, 0.15, 0.05)
    plain = {"family": "qwen2_moe", "norm_topk_prob": False}
    assert by_hand(weights, top(2), **plain)[1] == pytest.approx((0.5, 0.3))
    assert by_hand(weights, top(2, True), **plain)[1] == pytest.approx((0.625, 0.375))
    normed = {"family": "qwen2_moe", "norm_topk_prob": True}
    assert by_hand(weights, top(2), **normed)[1] == pytest.approx((0.625, 0.375))


def test_a_rank_whose_probability_vanishes_still_weighs_one():
    scores = torch.tensor([[0.0, -300.0, -200.0]])
    output = (scores, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))
    config = AutoConfig.for_model("mixtral")
    experts, weights = chosen(reroute(nn.Module(), config, output, [rank(3)]))
    assert (experts.tolist(), weights.tolist()) == ([[1]], [[1.0]])


# Whole models


def test_the_default_is_the_routers_own_output(model):
    seen = []
    assert logits(model, [DEFAULT], seen=seen).equal(model(input_ids=IDS).logits)
    assert all(own is new for own, new in seen)


def test_as_many_experts_as_the_model_takes_gives_its_own_logits(model):
    assert model.config.num_experts_per_tok == 2
    seen = []
    close(logits(model, [top(2)], seen=seen), model(input_ids=IDS).logits)
    for (_, own_weights, own_experts), (_, weights, experts) in seen:
        assert weights.dtype == own_weights.dtype and experts.dtype == own_experts.dtype
        assert torch.equal(experts.sort(-1)[0], own_experts.sort(-1)[0])


@pytest.mark.parametrize("family", ["qwen3_next", "flex_olmo", "glm4_moe"])
def test_families_found_by_structure_are_routed_too(family):
    model = tiny.model(family)
    close(logits(model, [top(2)]), model(input_ids=IDS).logits, 1e-3)  # a recurrence magnifies
    assert (logits(model, [rank(2)]) - model(input_ids=IDS).logits).abs().max() > 1e-2


def test_another_policy_changes_the_logits(model):
    own = model(input_ids=IDS).logits
    for policy in (top(1), top(3), rank(2), fixed((0,)), dynamic(0.8)):
        assert (logits(model, [policy]) - own).abs().max() > 1e-2, policy


def test_the_best_alone_weighs_one_where_the_family_renormalises(family, model):
    seen = []
    logits(model, [rank(1)], seen=seen)
    factor = getattr(model.config, "routed_scaling_factor", 1.0)
    for own, (router_logits, weights, experts) in seen:
        assert weights.shape == experts.shape == (IDS.numel(), 1)
        if family in RENORMALISED:
            close(weights, torch.full_like(weights, factor))
        else:
            assert (weights < 1).all()
            close(weights, router_logits.softmax(-1).max(-1, keepdim=True)[0])
        best = own[1].argmax(-1, keepdim=True)
        if family != "deepseek_v3":  # there the largest weight need not be the first choice
            assert torch.equal(experts, own[2].gather(1, best))


def test_each_rank_is_another_expert(model):
    """Also in deepseek_v3, where half of the experts are outside of the groups in question."""
    router = next(iter(parts(model).routers.values()))
    outputs = []
    hook = router.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=IDS)
    hook.remove()
    count = outputs[0][0].shape[-1]
    ranks = [reroute(router, model.config, outputs[0], [rank(k)])[2] for k in range(1, count + 1)]
    order = torch.cat(ranks, 1)
    assert torch.equal(order.sort(-1)[0], torch.arange(count).expand(IDS.numel(), -1))
    default = outputs[0][2]
    assert torch.equal(order[:, :2].sort(-1)[0], default.sort(-1)[0])


MIXED = (top(1), top(3), rank(2), fixed((3, 0, 1, 2)), dynamic(0.5))


@pytest.mark.parametrize("policy", MIXED)
def test_sequences_of_one_batch_follow_policies_of_their_own(model, policy):
    """Different k in one batch: the shorter rows are filled up, and it changes nothing."""
    both = logits(model, [DEFAULT, policy])
    close(both[:1], model(input_ids=IDS[:1]).logits, 1e-4)
    close(both[1:], logits(model, [policy], IDS[1:]), 1e-4)


def test_rows_under_the_default_keep_their_numbers(model):
    """Bit for bit, beside rows of every other policy: one policy a row."""
    policies = [DEFAULT, *MIXED, DEFAULT] * (IDS.numel() // 7)
    seen = []
    logits(model, policies, seen=seen)
    own, new = seen[0]
    rows = [row for row, policy in enumerate(policies) if policy == DEFAULT]
    k = own[2].shape[-1]
    assert new[1][rows, :k].equal(own[1][rows]) and new[2][rows, :k].equal(own[2][rows])
    assert not new[1][rows, k:].any()
    assert new[0].equal(own[0])
    for row, policy in enumerate(policies):
        alone = reroute(
            next(iter(parts(model).routers.values())),
            model.config,
            tuple(part[row : row + 1] for part in own),
            [policy],
        )
        ids, weights = experts_of_row(new[2][row], new[1][row])
        ids_alone, weights_alone = experts_of_row(alone[2][0], alone[1][0])
        assert ids == ids_alone and weights == pytest.approx(weights_alone, rel=1e-5)


def test_random_experts_are_given_by_their_numbers(model):
    seen = []
    logits(model, [fixed((2,)), fixed((1, 3))], seen=seen)
    tokens = IDS.shape[1]
    for _, (_, weights, experts) in seen:
        assert (experts[:tokens] == 2).all() and not weights[:tokens, 1:].any()
        assert torch.equal(experts[tokens:], torch.tensor([[1, 3]]).expand(tokens, -1))


# Random experts


def test_random_experts_are_drawn_by_seed_layer_and_position_alone(model):
    """Not by the row they stand in, nor by what stands beside them."""
    router = next(iter(parts(model).routers.values()))
    seen = []
    logits(model, [DEFAULT], seen=seen)
    own = seen[0][0]
    positions = torch.arange(IDS.shape[1]).repeat(2)

    def drawn(policy, layer=1, rows=slice(None)):
        some = tuple(part[rows] for part in own)
        at = positions[rows]
        return reroute(router, model.config, some, [policy], layer=layer, positions=at)[2]

    whole, tokens = drawn(random(1, seed=5)), IDS.shape[1]
    assert whole[:tokens].equal(whole[tokens:])  # the same positions in both texts
    assert drawn(random(1, seed=5), rows=slice(6, 11)).equal(whole[6:11])
    assert len(set(whole.flatten().tolist())) > 2  # 14 draws
    for other in (drawn(random(1, seed=6)), drawn(random(1, seed=5), layer=2)):
        assert not other.equal(whole)
    two = drawn(random(2, seed=5))
    assert two.shape[1] == 2 and (two[:, 0] != two[:, 1]).all()


def test_random_experts_weigh_as_given_ones_do(model):
    """Row by row what `fixed` says for the experts that were drawn."""
    router = next(iter(parts(model).routers.values()))
    seen = []
    logits(model, [random(2, seed=1), DEFAULT], seen=seen)
    own, new = seen[0]
    for row in range(IDS.shape[1]):
        one = tuple(part[row : row + 1] for part in own)
        ids, weights = experts_of_row(new[2][row], new[1][row])
        given = reroute(router, model.config, one, [fixed(ids)])
        expected = experts_of_row(given[2][0], given[1][0])
        assert (ids, weights) == (expected[0], pytest.approx(expected[1], rel=1e-4))


def test_every_expert_is_drawn_about_as_often():
    config = AutoConfig.for_model("mixtral")
    output = (torch.zeros(2000, 8), torch.ones(2000, 1), torch.zeros(2000, 1, dtype=torch.long))
    found = reroute(nn.Module(), config, output, [random(1, seed=0)])[2].flatten().bincount()
    assert len(found) == 8 and found.min() > 190 and found.max() < 310  # 250 expected


# How undecided a router is


@pytest.mark.parametrize(
    ("scores", "nats"),
    [
        ((0.25, 0.25, 0.25, 0.25), 1.386294),
        ((0.5, 0.3, 0.15, 0.05), 1.142118),  # -(.5 ln .5 + .3 ln .3 + .15 ln .15 + .05 ln .05)
        ((1.0, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_router_entropy_worked_by_hand(scores, nats):
    softmax = AutoConfig.for_model("mixtral")
    output = (torch.tensor([scores]).log(), torch.ones(1, 1), torch.zeros(1, 1))
    assert entropy(softmax, output).tolist() == pytest.approx([nats], abs=1e-5)
    # A sigmoid's scores do not sum to 1: made to, they are the same shares.
    sigmoid = AutoConfig.for_model("deepseek_v3")
    output = (torch.logit(0.8 * torch.tensor([scores])), *output[1:])
    assert entropy(sigmoid, output).tolist() == pytest.approx([nats], abs=1e-5)


def test_experts_are_counted_in_every_family(family, model):
    assert experts_in(model.config) == tiny.engine(family).experts
    seen = []
    logits(model, [DEFAULT], seen=seen)
    assert experts_in(model.config) == seen[0][0][0].shape[-1]
    assert experts_in(AutoConfig.for_model("llama")) == tiny.engine("llama").experts == 0


# What the tap says is what the block does


def expert_by_hand(experts: nn.Module, family: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's output for one token (d_model,)."""
    if family != "gpt_oss":
        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
        return experts.down_proj[expert] @ (F.silu(gate) * up)
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return inner @ experts.down_proj[expert] + experts.down_proj_bias[expert]


def shared_by_hand(block: nn.Module, family: str, x: torch.Tensor) -> torch.Tensor:
    """What is added whatever the router says."""
    if family == "deepseek_v3":
        return block.shared_experts(x)
    if family == "qwen2_moe":
        return torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return torch.zeros_like(x)


@pytest.mark.parametrize("policies", [[DEFAULT], [top(3), DEFAULT], [dynamic(0.6), rank(2)]])
def test_the_tapped_experts_and_weights_are_the_ones_used(family, model, policies):
    """The feed-forward block's output, recomputed token by token from what `chosen` says."""
    found, seen, passed = parts(model), [], []
    last = max(found.routers)
    block = found.feed_forward[last]
    hook = block.register_forward_hook(lambda module, args, output: passed.append((args, output)))
    logits(model, policies, seen=seen)
    hook.remove()
    (given,), output = passed[0]
    output = (output[0] if isinstance(output, tuple) else output).reshape(IDS.numel(), -1)
    experts, weights = chosen(seen[-1][1])
    for row, x in enumerate(given.reshape(IDS.numel(), -1)):
        expected = shared_by_hand(block, family, x)
        for expert, weight in zip(*experts_of_row(experts[row], weights[row]), strict=True):
            expected = expected + weight * expert_by_hand(block.experts, family, expert, x)
        close(output[row], expected, 1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_of_running_the_experts_takes_any_k(family, implementation):
    model = tiny.model(family)
    expected = logits(model, [top(3), DEFAULT])
    model.set_experts_implementation(implementation)
    close(logits(model, [top(3), DEFAULT]), expected, 1e-4)


# What cannot be done


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (top(0), "top-0 is not possible: the model has 4 experts"),
        (top(5), "top-5 is not possible: the model has 4 experts"),
        (rank(5), "rank-5 is not possible"),
        (random(5, seed=0), "random-5 is not possible: the model has 4 experts"),
        (fixed(()), "must be different numbers from 0 to 3"),
        (fixed((1, 1)), "must be different numbers"),
        (fixed((4,)), "must be different numbers"),
        (fixed((-1,)), "must be different numbers"),
        (dynamic(1.0), "threshold 1 must be"),
        (dynamic(-0.1), "threshold -0.1 must be"),
    ],
)
def test_policies_that_a_model_cannot_follow_are_refused(policy: Policy, why: str):
    with pytest.raises(BadParameter, match=why):
        logits(tiny.model("mixtral"), [DEFAULT, policy])
    DEFAULT.check(4)


def test_a_family_whose_rule_is_unknown_is_refused():
    """Its own routing is left alone."""
    config = AutoConfig.for_model("phimoe")
    assert not routable(config)
    assert routable(AutoConfig.for_model("mixtral"))
    output = (torch.zeros(1, 4), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))
    assert reroute(nn.Module(), config, output, [DEFAULT]) is output
    with pytest.raises(ModelLacks, match="phimoe"):
        reroute(nn.Module(), config, output, [top(1)])
