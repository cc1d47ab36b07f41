"""An adapter for one call is the model with merged weights; without it nothing has changed."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from analyzers.engine import Cursor, Engine, Options, Tree
from analyzers.engine.values import PLAIN
from analyzers.errors import BadInput, ModelBroken, ModelNotFound, ModelUnfit
from tests import tiny
from tests.test_engine import CLOSE

IDS = list(b"A fox, a dog and a crow met.")
MODULES = {
    "llama": ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "opt": ("self_attn.v_proj", "fc1", "fc2"),
    "qwen3_moe": ("self_attn.o_proj",),
    "gemma2": ("self_attn.k_proj", "mlp.gate_proj"),
}
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def matrices(engine: Engine, family: str = "llama", rank: int = 4, seed: int = 1) -> Pairs:
    """Random A (rank, in) and B (out, rank) for modules of every layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in engine.model.named_modules():
        if name.endswith(MODULES[family]):
            outer, inner = module.weight.shape
            if isinstance(module, Conv1D):
                outer, inner = inner, outer
            a = torch.randn(rank, inner, generator=generator) / 4
            found[name] = (a, torch.randn(outer, rank, generator=generator) / 4)
    assert len(found) == engine.layers * len(MODULES[family])
    return found


def write(folder: Path, pairs: Pairs, **settings) -> str:
    """The two files as PEFT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = len(next(iter(pairs.values()))[0]) if pairs else 4
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def merged(engine: Engine, family: str, pairs: Pairs, scale: float) -> Engine:
    """The slow obvious version: a copy of the model with W + scale B A."""
    copy = tiny.model(family)
    for name, (a, b) in pairs.items():
        module = copy.get_submodule(name)
        delta = scale * b @ a
        with torch.no_grad():
            module.weight += delta.T if isinstance(module, Conv1D) else delta
    return Engine(copy, tiny.tokenizer(), engine.identity)


def rows(engine: Engine, cursor: Cursor, options: Options = PLAIN) -> torch.Tensor:
    """Raw logits of four steps that all write the same ids."""
    found = []
    for id in range(70, 74):
        found.append(engine.step(cursor, options=options).raw)
        engine.push(cursor, id)
    return torch.stack(found)


@pytest.fixture
def fresh() -> Engine:
    """Adapters stay in an engine: one for each test."""
    return tiny.engine()


@pytest.mark.parametrize("family", MODULES)
def test_an_adapter_is_the_model_with_merged_weights(family, tmp_path):
    engine = tiny.engine(family)
    plain = rows(engine, engine.prefill(IDS))
    pairs = matrices(engine, family)
    options = Options(adapter=engine.add_adapter(write(tmp_path, pairs)))
    expected = rows(other := merged(engine, family, pairs, 6 / 4), other.prefill(IDS))
    found = rows(engine, engine.prefill(IDS, options=options), options)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", MODULES)
def test_without_the_option_the_model_is_itself_bit_for_bit(family, tmp_path):
    """Before, between and after calls that name the adapter."""
    engine = tiny.engine(family)
    plain = rows(engine, engine.prefill(IDS))
    options = Options(adapter=engine.add_adapter(write(tmp_path, matrices(engine, family))))
    assert torch.equal(rows(engine, engine.prefill(IDS)), plain)
    rows(engine, engine.prefill(IDS, options=options), options)
    assert torch.equal(rows(engine, engine.prefill(IDS)), plain)


def test_every_call_takes_the_adapter(fresh, tmp_path):
    pairs = matrices(fresh)
    options = Options(adapter=fresh.add_adapter(write(tmp_path, pairs)))
    other = merged(fresh, "llama", pairs, 6 / 4)
    cursor, expected = fresh.prefill(IDS, options=options), other.prefill(IDS)
    tree = Tree((70, 71, 72), (-1, -1, 0))
    torch.testing.assert_close(
        fresh.verify(cursor, tree, options=options).raw, other.verify(expected, tree).raw, **CLOSE
    )
    for mine, theirs in zip(
        fresh.score(IDS, [[70, 71], [72]], options=options),
        other.score(IDS, [[70, 71], [72]]),
        strict=True,
    ):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    batch = [fresh.prefill(IDS[:n], options=options) for n in (3, 9)]
    for cursor, step in zip(batch, fresh.step(batch, options=options), strict=True):
        torch.testing.assert_close(step.raw, other.step(other.prefill(cursor.ids)).raw, **CLOSE)
    states = fresh.embeddings(IDS)
    found = fresh.forward(states, (0, 3), options=options)
    torch.testing.assert_close(found, other.forward(states, (0, 3)), atol=1e-3, rtol=1e-4)


def test_gradients_are_those_of_the_base(fresh, tmp_path):
    before = fresh.gradients(IDS, lambda logits: logits[-1, 70])
    options = Options(adapter=fresh.add_adapter(write(tmp_path, matrices(fresh))))
    fresh.step(fresh.prefill(IDS, options=options), options=options)
    after = fresh.gradients(IDS, lambda logits: logits[-1, 70])
    assert torch.equal(after.gradient, before.gradient) and after.value == before.value


def test_adapters_do_not_meet(fresh, tmp_path):
    """Two adapters, of other ranks and other modules, in interleaved lanes beside the base."""
    first = matrices(fresh)
    second = {
        name: pair
        for name, pair in matrices(fresh, rank=2, seed=2).items()
        if name.endswith("mlp.down_proj")
    }
    lanes = [PLAIN]
    for name, pairs in (("first", first), ("second", second)):
        lanes.append(Options(adapter=fresh.add_adapter(write(tmp_path / name, pairs))))
    models = [
        fresh,
        merged(fresh, "llama", first, 6 / 4),
        merged(fresh, "llama", second, 6 / 2),
    ]
    expected = [rows(model, model.prefill(IDS)) for model in models]
    cursors = [fresh.prefill(IDS, options=options) for options in lanes]
    found: list[list[torch.Tensor]] = [[], [], []]
    for id in range(70, 74):
        for lane, options in enumerate(lanes):
            found[lane].append(fresh.step(cursors[lane], options=options).raw)
            fresh.push(cursors[lane], id)
    for lane in range(3):
        torch.testing.assert_close(torch.stack(found[lane]), expected[lane], **CLOSE)


def test_an_adapter_read_again_is_replaced(fresh, tmp_path):
    options = Options(adapter=fresh.add_adapter(write(tmp_path, matrices(fresh))))
    pairs = matrices(fresh, seed=9)
    assert fresh.add_adapter(write(tmp_path, pairs)) == options.adapter
    other = merged(fresh, "llama", pairs, 6 / 4)
    found = rows(fresh, fresh.prefill(IDS, options=options), options)
    torch.testing.assert_close(found, rows(other, other.prefill(IDS)), **CLOSE)


def test_rslora_divides_by_the_root_of_the_rank(fresh, tmp_path):
    pairs = matrices(fresh, rank=4)
    folder = write(tmp_path, pairs, use_rslora=True, lora_alpha=3)
    options = Options(adapter=fresh.add_adapter(folder))
    other = merged(fresh, "llama", pairs, 3 / math.sqrt(4))
    found = rows(fresh, fresh.prefill(IDS, options=options), options)
    torch.testing.assert_close(found, rows(other, other.prefill(IDS)), **CLOSE)


def test_a_fresh_adapter_with_b_at_zero_is_the_base(fresh, tmp_path):
    pairs = {name: (a, torch.zeros_like(b)) for name, (a, b) in matrices(fresh).items()}
    options = Options(adapter=fresh.add_adapter(write(tmp_path, pairs)))
    plain = rows(fresh, fresh.prefill(IDS))
    found = rows(fresh, fresh.prefill(IDS, options=options), options)
    torch.testing.assert_close(found, plain, **CLOSE)


def test_a_failed_call_leaves_no_adapter_behind(fresh, tmp_path):
    options = Options(adapter=fresh.add_adapter(write(tmp_path, matrices(fresh))))
    cursor = fresh.prefill(IDS)
    plain = fresh.step(cursor).raw

    def fail(*args):
        raise RuntimeError("broken kernel")

    hook = fresh.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        fresh.step(cursor, options=options)
    hook.remove()
    assert torch.equal(fresh.step(cursor).raw, plain)


def test_a_half_precision_model_takes_an_adapter(tmp_path):
    plain = tiny.engine()
    engine = Engine(tiny.model().to(torch.bfloat16), tiny.tokenizer(), plain.identity)
    options = Options(adapter=engine.add_adapter(write(tmp_path, matrices(engine))))
    step = engine.step(engine.prefill(IDS, options=options), options=options)
    assert step.raw.isfinite().all()
    assert not torch.equal(step.raw, engine.step(engine.prefill(IDS)).raw)


def test_an_adapter_must_be_added_first(fresh):
    options = Options(adapter="poet")
    for call in (
        lambda: fresh.prefill(IDS, options=options),
        lambda: fresh.step(fresh.prefill(IDS), options=options),
        lambda: fresh.score(IDS, [[70]], options=options),
        lambda: fresh.forward(fresh.embeddings(IDS), (0, 3), options=options),
    ):
        with pytest.raises(BadInput, match="no adapter 'poet'"):
            call()


def refused(engine: Engine, folder: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        engine.add_adapter(folder)


def test_a_folder_that_is_no_adapter_is_refused(fresh, tmp_path):
    refused(fresh, str(tmp_path / "nowhere"), ModelNotFound, "no LoRA adapter in .*nowhere")
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        folder = write(tmp_path, matrices(fresh))
        (tmp_path / missing).unlink()
        refused(fresh, folder, ModelNotFound, "needs adapter_config.json and")


@pytest.mark.parametrize("damage", ["config", "list", "number", "weights", "empty"])
def test_damaged_files_are_refused(fresh, tmp_path, damage):
    folder = write(tmp_path, matrices(fresh))
    settings, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif damage == "empty":
        weights.write_bytes(b"")
    else:
        settings.write_text({"config": "{", "list": '["a", "b"]', "number": "7"}[damage])
    refused(fresh, folder, ModelBroken, "could not be read")


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
)
def test_other_kinds_of_adapters_are_refused(fresh, tmp_path, settings):
    folder = write(tmp_path, matrices(fresh), **settings)
    refused(fresh, folder, ModelUnfit, "not a plain LoRA adapter")


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": None}, {"lora_alpha": "x"}, {"r": [4]}])
def test_an_adapter_must_say_its_rank_and_alpha(fresh, tmp_path, settings):
    folder = write(tmp_path, matrices(fresh), **settings)
    refused(fresh, folder, ModelBroken, "does not say its rank r and its lora_alpha")


def test_matrices_that_do_not_match_the_model_are_refused(fresh, tmp_path):
    name, (a, b) = next(iter(matrices(fresh).items()))
    cases = {
        "wider": ({name: (torch.zeros(4, 33), b)}, "do not have the model's sizes"),
        "taller": ({name: (a, torch.zeros(33, 4))}, "do not have the model's sizes"),
        "ranks": ({name: (a, b[:, :2])}, "do not have the model's sizes"),
        "norm": ({"model.norm": (a, b)}, "matrices for model.norm do not have"),
        "elsewhere": ({"model.layers.9.mlp.up_proj": (a, b)}, "changes model.layers.9.mlp.up_proj"),
        "none": ({}, "holds no LoRA matrices"),
    }
    for case, (pairs, says) in cases.items():
        refused(fresh, write(tmp_path / case, pairs), ModelUnfit, says)
    other_rank = write(tmp_path / "r", {name: (a, b)}, r=8)
    refused(fresh, other_rank, ModelUnfit, "do not have the model's sizes")
    broken = write(tmp_path / "nan", {name: (a, b * torch.nan)})
    refused(fresh, broken, ModelBroken, "are not finite")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "do not have the model's sizes"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", "it has .*lora_B"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "it has .*magnitude"),
        ("model.embed_tokens.lora_embedding_A", "it has .*lora_embedding_A"),
        ("lm_head.weight", "it has .*lm_head.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "it has .*bias"),
    ],
)
def test_what_is_no_pair_of_matrices_is_refused_and_not_left_out(fresh, tmp_path, key, says):
    folder = write(tmp_path, {})
    weights = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": torch.zeros(4, 32)}, weights)
    refused(fresh, folder, ModelUnfit, says)


def test_a_refused_adapter_changes_nothing(fresh, tmp_path):
    plain = fresh.step(fresh.prefill(IDS)).raw
    absent = (torch.zeros(4, 32), torch.zeros(64, 4))
    pairs = matrices(fresh) | {"model.layers.9.mlp.up_proj": absent}
    refused(fresh, write(tmp_path, pairs), ModelUnfit, "does not have")
    assert torch.equal(fresh.step(fresh.prefill(IDS)).raw, plain)
    with pytest.raises(BadInput, match="add it first"):
        fresh.prefill(IDS, options=Options(adapter=str(tmp_path)))
