"""Every family's parts are the ones that its forward pass uses."""

import inspect

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from analyzers.engine.adapters import FAMILIES, attention_implementation, parts
from analyzers.errors import ModelUnfit
from tests import tiny

IDS = torch.tensor([list(b"The cat sat on")])
SLIDING = {
    "mistral": (True, True, True),
    "phi3": (True, True, True),
    "qwen3": (True, False, True),
    "gemma2": (True, False, True),
    "gemma3": (True, False, True),
    "cohere2": (True, False, True),
    "gpt_oss": (True, False, True),
}
BY_TYPE = {"qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "cohere2", "qwen2_moe", "gpt_oss"}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny.model(family)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def state(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def heard(modules, run) -> list[list]:
    """The outputs of each module while `run()`."""
    found = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda module, args, output, to=to: to.append(output))
        for module, to in zip(modules, found, strict=True)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_tiny_models_are_neither_flat_nor_stuck(model):
    """What the other tests compare differs from token to token."""
    ids, entropies = IDS, []
    for _ in range(40):
        logprobs = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        entropies.append(float(-(logprobs.exp() * logprobs).sum()))
        ids = torch.cat([ids, logprobs.argmax()[None, None]], 1)
    assert 0.5 < sum(entropies) / 40 < 4.5
    assert len(set(ids[0, IDS.shape[1] :].tolist())) >= 5


def test_the_readout_of_the_last_block_is_the_models_logits(model):
    found = parts(model)
    logits = []
    (outputs,) = heard([found.blocks[-1]], lambda: logits.append(model(input_ids=IDS).logits))
    torch.testing.assert_close(found.readout(state(outputs[0])), logits[0], rtol=1e-4, atol=1e-4)


def test_scale_and_cap_of_the_tiny_models_are_not_trivial():
    assert parts(tiny.model("granitemoe")).scale == parts(tiny.model("cohere2")).scale == 0.25
    assert parts(tiny.model("gemma2")).cap == parts(tiny.model("gemma3")).cap == 20.0
    assert parts(tiny.model("llama")).scale == 1.0


def test_every_part_is_called_once_a_block(family, model):
    found = parts(model)
    modules = [*found.blocks, *found.attention, *found.feed_forward, *found.routers.values()]
    calls = heard(modules, lambda: model(input_ids=IDS))
    assert [len(outputs) for outputs in calls] == [1] * len(modules)
    assert len(found.attention) == len(found.feed_forward) == len(found.blocks) == 3
    tokens, width = IDS.shape[1], model.config.hidden_size
    for outputs in calls[:9]:  # in OPT the feed-forward block sees its rows one after the other
        assert state(outputs[0]).shape in {(1, tokens, width), (tokens, width)}
    assert bool(found.routers) == (family in tiny.MOE)
    for outputs in calls[9:]:
        logits, weights, experts = outputs[0]
        assert logits.shape[0] == tokens and weights.shape == experts.shape == (tokens, 2)


def test_the_first_block_of_deepseek_is_dense():
    assert list(parts(tiny.model("deepseek_v3")).routers) == [1, 2]


def test_what_comes_in_a_tuple(family, model):
    """The state is its first item; attention always comes with its weights."""
    found = parts(model)
    block, attention, feed_forward = heard(
        [found.blocks[1], found.attention[1], found.feed_forward[1]],
        lambda: model(input_ids=IDS),
    )
    assert isinstance(block[0], tuple) == (family == "falcon")
    assert isinstance(attention[0], tuple)
    assert isinstance(feed_forward[0], tuple) == (family == "gpt_oss")


def test_windows_and_masks_are_the_familys(family, model):
    found = parts(model)
    assert found.sliding == SLIDING.get(family, (False, False, False))
    assert found.window == (tiny.WINDOW if family in SLIDING else None)
    assert found.mask_by_type == (family in BY_TYPE)


def test_embeddings_give_what_ids_give(model):
    """Multipliers on the embeddings are applied to both."""
    embedded = parts(model).embeddings(IDS)
    torch.testing.assert_close(
        model(inputs_embeds=embedded).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )


def test_the_engines_arguments_are_taken(model):
    """position_ids move the text; logits_to_keep keeps the last rows."""
    taken = inspect.signature(model.forward).parameters
    assert {"position_ids", "logits_to_keep", "past_key_values", "inputs_embeds"} <= set(taken)
    at = torch.arange(IDS.shape[1])[None]
    full = model(input_ids=IDS, position_ids=at).logits
    torch.testing.assert_close(
        model(input_ids=IDS, position_ids=at, logits_to_keep=2).logits, full[:, -2:]
    )
    stretched = model(input_ids=IDS, position_ids=3 * at).logits
    assert (stretched - full).abs().max() > 1e-2


# A tree behind the prompt: node -> its parent, -1 = the prompt's last token.
TOKENS, PARENTS, DEPTHS = list(b"ABCDE"), (-1, 0, 0, 1, 2), (0, 1, 1, 2, 2)
BRANCHES = ([0, 1, 3], [0, 2, 4])


def tree_mask(past: int, window: int | None) -> torch.Tensor:
    """(1, 1, nodes, past + nodes), additive; the window counts positions, not places."""
    mask = torch.full((len(TOKENS), past + len(TOKENS)), torch.finfo(torch.float32).min)
    for node, depth in enumerate(DEPTHS):
        seen = {place: place for place in range(past)}
        at: int = node
        while at != -1:
            seen[past + at] = past + DEPTHS[at]
            at = PARENTS[at]
        for place, position in seen.items():
            if window is None or past + depth - position < window:
                mask[node, place] = 0.0
    return mask[None, None]


def test_a_tree_in_one_pass_equals_one_pass_a_branch(model):
    found, past = parts(model), IDS.shape[1]
    assert found.tree
    cache = DynamicCache()
    model(input_ids=IDS, past_key_values=cache, use_cache=True)
    mask = tree_mask(past, found.window)
    tree = model(
        input_ids=torch.tensor([TOKENS]),
        position_ids=torch.tensor([[past + depth for depth in DEPTHS]]),
        attention_mask=(
            {"full_attention": tree_mask(past, None), "sliding_attention": mask}
            if found.mask_by_type
            else mask
        ),
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    for branch in BRANCHES:
        ids = torch.cat([IDS, torch.tensor([[TOKENS[node] for node in branch]])], 1)
        alone = model(input_ids=ids).logits[0, past:]
        torch.testing.assert_close(tree[branch], alone, rtol=1e-4, atol=1e-4)


def test_alibi_takes_no_tree():
    assert not parts(tiny.model("falcon", alibi=True)).tree


def same(one, other) -> bool:
    if isinstance(one, nn.Module):
        return one is other
    if isinstance(one, tuple):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "opt"])
def test_a_family_that_is_not_in_the_table_is_found_by_structure(family, monkeypatch):
    """OPT alone needs the table: its feed-forward block is no module, its norm stands first."""
    model = tiny.model(family)
    listed = parts(model)
    monkeypatch.delitem(FAMILIES, model.config.model_type)
    by_structure = parts(model)
    for field in vars(listed):
        assert same(getattr(listed, field), getattr(by_structure, field)), field


@pytest.mark.parametrize("family", tiny.UNLISTED)
def test_the_readout_of_a_family_found_by_structure(family):
    assert family not in FAMILIES
    test_the_readout_of_the_last_block_is_the_models_logits(tiny.model(family))


def test_what_is_known_of_families_found_by_structure():
    assert parts(tiny.model("starcoder2")).sliding == (True, True, True)
    olmo = parts(tiny.model("olmo3"))
    assert olmo.sliding == (True, False, True) and olmo.mask_by_type
    assert not parts(tiny.model("bloom")).tree  # ALiBi, without a switch in its configuration
    glm = tiny.model("glm4_moe")
    assert parts(glm).routers == {at: glm.model.layers[at].mlp.gate for at in (1, 2)}


def test_a_recurrent_layer_takes_the_place_of_attention():
    for family, named in (("qwen3_next", "linear_attn"), ("lfm2", "conv")):
        model = tiny.model(family)
        first, second, third = model.model.layers
        expected = (getattr(first, named), second.self_attn, getattr(third, named))
        assert same(parts(model).attention, expected)


def test_a_model_that_keeps_no_past_is_refused():
    """RWKV hands its state around under a name of its own."""
    config = AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=3, vocab_size=8)
    with pytest.raises(ModelUnfit, match="keeps no past"):
        parts(AutoModelForCausalLM.from_config(config))


def unlisted(monkeypatch, **changes):
    monkeypatch.delitem(FAMILIES, "llama")
    return tiny.model("llama", **changes)


def test_a_model_without_blocks_is_refused(monkeypatch):
    model = unlisted(monkeypatch)
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelUnfit, match="0 lists of 5 blocks"):
        parts(model)


def test_two_lists_of_blocks_are_refused(monkeypatch):
    model = unlisted(monkeypatch)
    model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ModelUnfit, match="2 lists of 3 blocks"):
        parts(model)


def test_a_block_without_attention_is_refused(monkeypatch):
    model = unlisted(monkeypatch)
    for block in model.model.layers:
        block.self_attn = nn.Identity()
    with pytest.raises(ModelUnfit, match="0 attention modules"):
        parts(model)


def test_a_model_without_a_final_norm_is_refused(monkeypatch):
    model = unlisted(monkeypatch)
    model.model.norm = nn.Identity()
    with pytest.raises(ModelUnfit, match="no norm was found"):
        parts(model)


def test_a_listed_family_without_one_of_its_parts_is_refused():
    with pytest.raises(ModelUnfit, match="final_layer_norm"):
        parts(tiny.model("opt", do_layer_norm_before=False))


def test_a_head_of_another_width_is_refused():
    with pytest.raises(ModelUnfit, match="head reads 16 numbers, its blocks write 32"):
        parts(tiny.model("opt", word_embed_proj_dim=16))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelUnfit, match="no head"):
        parts(tiny.model("llama").model)


def test_attention_that_the_engine_cannot_steer_is_refused():
    model = tiny.model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ModelUnfit, match="chunked_attention"):
        parts(model)


def test_sdpa_where_it_computes_the_same():
    eager = {
        name for name in tiny.FAMILIES if tiny.model(name).config._attn_implementation == "eager"
    }
    assert eager == {"gemma2", "gpt_oss"}
    capped = AutoConfig.for_model("gemma3_text", attn_logit_softcapping=5.0)
    assert attention_implementation(capped) == "eager"


def test_what_is_no_language_model_has_no_attention_to_choose():
    with pytest.raises(ModelUnfit, match="no causal language model"):
        attention_implementation(AutoConfig.for_model("vit"))
