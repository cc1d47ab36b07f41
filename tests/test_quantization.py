"""int8 rounds no worse than it must, differentiates, finds every product and spares the routers."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from analyzers.engine import Engine, builtin
from analyzers.engine.quantization import (
    COST,
    FEW_ROWS,
    QUANTIZATIONS,
    Int8Experts,
    Int8Linear,
    auto,
    bnb_config,
    quantize,
    weights,
)
from analyzers.errors import BadInput
from analyzers.home import models_folder
from app.bench import quality
from tests import tiny

GIGA = 1 << 30
BNB = ("nf4", "fp4", "int8-bnb")


def pair(inside=64, out=48, bias=True, dtype=torch.float32) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(1)
    plain = nn.Linear(inside, out, bias=bias, dtype=dtype).requires_grad_(False)
    return plain, Int8Linear(plain.weight, plain.bias)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm().detach() / wanted.float().norm().detach())


# One product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, FEW_ROWS, 64), (0, 64)])
def test_any_leading_shape_multiplies_with_the_rounded_weight(dtype, bias, shape):
    plain, int8 = pair(bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        found = int8(x)
        exact = int8.quantized.double() * int8.scale.double()[:, None]
        wanted = x.double() @ exact.T + (plain.bias.double() if bias else 0)
    assert found.shape == (*shape[:-1], 48) and found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=0.02)
    assert torch.isfinite(found).all()


def test_rounding_is_off_by_half_a_level_at_most():
    plain, int8 = pair()
    off = (int8.weight - plain.weight).abs()
    assert (off <= 0.5001 * plain.weight.abs().amax(-1, keepdim=True) / 127).all()
    assert int8.quantized.abs().amax(-1).eq(127).all()  # every row uses all of its levels


def test_the_rounding_of_a_bfloat16_scale_adds_nothing():
    plain, int8 = pair(dtype=torch.bfloat16)
    exact = int8.quantized.double() * int8.scale.double()[:, None]
    inside = plain.weight.double().abs() <= 127 * int8.scale.double()[:, None]
    off = (exact - plain.weight.double()).abs() / int8.scale.double()[:, None]
    assert off[inside].max() <= 0.5001 and inside.double().mean() > 0.95
    assert off.max() <= 1.0  # what lies just outside the levels is cut to the last


def test_a_row_of_zeros_stays_zero():
    int8 = Int8Linear(torch.zeros(2, 32), None)
    assert int8(torch.randn(1, 32)).eq(0).all()


def test_both_paths_agree():
    """The kernel serves few rows, dequantising the rest: a row must not notice its company."""
    _, int8 = pair(inside=96, dtype=torch.bfloat16)
    x = torch.randn(4 * FEW_ROWS, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert int8._suits_kernel(x[:FEW_ROWS]) and not int8._suits_kernel(x)
        few = torch.cat([int8(part) for part in x.split(FEW_ROWS)])
        assert relative(few, int8(x)) < 2 * torch.finfo(torch.bfloat16).eps


def test_many_rows_are_hardly_less_exact_than_one_rounding():
    """Large outputs, as the logits of likely tokens are; scaled after the product: 1.5 times."""
    torch.manual_seed(0)
    int8 = Int8Linear(torch.randn(2000, 512, dtype=torch.bfloat16), None)
    x = torch.randn(3 * FEW_ROWS, 512, dtype=torch.bfloat16)
    exact = x.double() @ (int8.quantized.double() * int8.scale.double()[:, None]).T
    large = exact.topk(20).indices

    def off(found: torch.Tensor) -> torch.Tensor:
        return (found.double() - exact).gather(1, large).norm()

    assert off(int8(x)) < 1.2 * off(exact.bfloat16())


@pytest.mark.parametrize("inside", [4, 33, 40])
def test_rows_that_the_kernel_cannot_read_take_the_other_path(inside):
    """torch's kernel ends the process for these."""
    plain, int8 = pair(inside=inside, dtype=torch.bfloat16)
    x = torch.randn(1, inside, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert not int8._suits_kernel(x)
        assert relative(int8(x), plain(x)) < 0.03


def test_a_view_with_gaps_is_read_right():
    _, int8 = pair(dtype=torch.bfloat16)
    x = torch.randn(64, 2, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(int8(x.T), int8(x.T.contiguous()))


@pytest.mark.parametrize("rows", [1, 3 * FEW_ROWS])
def test_the_gradient_of_the_input_is_that_of_the_rounded_weight(rows):
    _, int8 = pair()
    x = torch.randn(rows, 64, requires_grad=True)
    (int8(x) ** 2).sum().backward()
    again = x.detach().clone().requires_grad_()
    (nn.functional.linear(again, int8.weight, int8.bias) ** 2).sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_few_rows_in_bfloat16_have_a_gradient_too():
    """Where the kernel would serve if no gradient were asked for."""
    _, int8 = pair(dtype=torch.bfloat16)
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    int8(x).sum().backward()
    assert relative(x.grad[0], int8.weight.float().sum(0)) < 0.02


def test_sums_too_large_for_float16_are_scaled_in_time():
    plain = nn.Linear(512, 4, bias=False).requires_grad_(False)
    nn.init.constant_(plain.weight, 0.01)
    int8 = Int8Linear(plain.weight.half(), None)
    x = torch.full((1, 512), 60.0, dtype=torch.float16)  # 60 * 512 * 127 is beyond float16
    assert relative(int8(x), plain(x.float())) < 0.01


def test_it_looks_like_a_linear():
    plain, int8 = pair()
    assert isinstance(int8, nn.Linear)
    assert (int8.in_features, int8.out_features) == (64, 48)
    assert int8.bias is plain.bias and int8.weight.shape == plain.weight.shape
    assert not any(parameter.requires_grad for parameter in int8.parameters())
    assert "Int8Linear(in_features=64, out_features=48, bias=True)" in repr(int8)


# A whole model


def with_rounded_weights(plain: nn.Module, int8: nn.Module) -> nn.Module:
    """`plain` with the values that int8 stands for: what it must compute."""
    for name, module in int8.named_modules():
        path, _, last = name.rpartition(".")
        if isinstance(module, Int8Linear):
            old = plain.get_submodule(name)
            weight = module.weight.T if isinstance(old, Conv1D) else module.weight
            old.weight = nn.Parameter(weight.contiguous())  # a new one: the head may be tied
        elif isinstance(module, Int8Experts):
            setattr(plain.get_submodule(path), last, nn.Parameter(module[:].contiguous()))
    return plain


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_computes_with_the_rounded_weights_and_fits_the_engine(family):
    model = tiny.model(family)
    plain, ids = copy.deepcopy(model), torch.arange(1, 30)[None]
    quantize(model)
    left = [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    assert all("gate" in name or "router" in name for name in left)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    with torch.inference_mode():
        found, unrounded = model(ids).logits, plain(ids).logits
        wanted = with_rounded_weights(plain, model)(ids).logits
    assert relative(found, wanted) < 1e-3 < relative(found, unrounded)
    identity = {"name": family, "hash": "0"}
    assert Engine(model, tiny.tokenizer(), identity).layers == 3  # its own check passes


def test_a_tied_head_becomes_a_copy_and_the_embedding_stays():
    model = tiny.model("qwen2")
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    assert model.get_output_embeddings().weight is embedding
    quantize(model)
    head = model.get_output_embeddings()
    assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, before)
    assert relative(head.weight, before) < 0.01
    vocab, width = embedding.shape
    report = weights(model)
    # Embedding as float, head as bytes with one scale a row.
    assert report.bytes >= vocab * width * 4 + vocab * width + vocab * 4
    assert report.kept[0] == "model.embed_tokens.weight"


def test_what_weights_take_is_counted_tensor_by_tensor():
    model = tiny.model("llama")
    plain = weights(model)
    assert plain.bytes == model.get_memory_footprint() and plain.unquantized == 1.0
    quantize(model)
    report = weights(model)
    assert report.bytes == model.get_memory_footprint()
    floats = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    assert report.unquantized == pytest.approx(floats / model.num_parameters())
    assert "model.layers.*.input_layernorm.weight" in report.kept
    assert not any("proj" in name or "lm_head" in name for name in report.kept)


def test_quantizing_reports_each_part_and_can_be_stopped():
    seen = []
    quantize(tiny.model("llama"), lambda done, total: seen.append((done, total)))
    assert seen == [(n, 22) for n in range(22)]  # 3 blocks of 7, and the head

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise InterruptedError

    model = tiny.model("llama")
    with pytest.raises(InterruptedError):
        quantize(model, stop)
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 5


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MIXTURES = {
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager"
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_become_int8_and_routers_do_not(family):
    """gpt_oss keeps its experts transposed, with biases and a gate of its own."""
    torch.manual_seed(0)
    model = MIXTURES[family]().eval().requires_grad_(False)
    plain, ids = copy.deepcopy(model), torch.arange(1, 12)[None]
    quantize(model)
    stacks = [m for m in model.modules() if isinstance(m, Int8Experts)]
    assert len(stacks) == 4  # two layers, two stacks in each
    kept = " ".join(weights(model).kept)
    assert ("gate.weight" in kept) or ("router.weight" in kept)
    assert ("shared_expert_gate" in kept) == (family == "qwen2_moe")
    assert "experts.gate_up_proj " not in f"{kept} " and "experts.down_proj " not in f"{kept} "
    with torch.inference_mode():
        found, wanted = model(ids).logits, plain(ids).logits
    assert 0 < relative(found, wanted) < 0.02


@pytest.mark.parametrize("transposed", [True, False])
def test_an_expert_is_dequantised_alone(transposed):
    stack = torch.randn(3, 8, 16)
    experts = Int8Experts(stack, transposed)
    some = torch.tensor([2, 0])
    assert experts[1].shape == stack[1].shape and experts[some].shape == stack[some].shape
    assert relative(experts[1], stack[1]) < 0.01 and relative(experts[some], stack[some]) < 0.01


# bitsandbytes


@pytest.mark.parametrize("kind", ["auto", "none", "int8", "int3"])
def test_only_its_own_kinds_go_to_bitsandbytes(kind):
    with pytest.raises(BadInput, match="nf4, fp4, int8-bnb"):
        bnb_config(kind, torch.bfloat16, True)


def test_the_options_reach_bitsandbytes():
    config = bnb_config("fp4", torch.float16, False)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "fp4")
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert config.bnb_4bit_use_double_quant is False
    assert bnb_config("nf4", torch.bfloat16, True).bnb_4bit_use_double_quant is True
    assert bnb_config("int8-bnb", torch.bfloat16, True).load_in_8bit is True


def test_a_missing_bitsandbytes_is_one_sentence(monkeypatch):
    monkeypatch.setattr("analyzers.engine.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(BadInput, match=r"needs the package bitsandbytes.*int8 works"):
        bnb_config("nf4", torch.bfloat16, True)


def test_only_two_lines_of_bitsandbytes_are_withheld(caplog):
    bnb_config("int8-bnb", torch.bfloat16, True)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    with caplog.at_level(logging.WARNING):
        logger.warning("MatMul8bitLt: inputs will be cast from %s to float16", torch.float32)
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


LOADING = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from analyzers.engine.quantization import bnb_config, weights
torch.set_num_threads(1)
folder, *kinds = sys.argv[1:]
ids = torch.tensor([[504, 5575, 282, 4649, 314, 260, 3575]])
found = {}
for kind in kinds:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16,
        quantization_config=bnb_config(kind, torch.bfloat16, True),
    ).eval()
    before = weights(model)
    with torch.inference_mode():
        logits = model(ids).logits.float()
    after = weights(model)
    found[kind] = [logits.flatten().tolist(), before.bytes, after.bytes, after.unquantized]
print(json.dumps(found))
"""
ALIKE = {"nf4": 0.95, "fp4": 0.9, "int8-bnb": 0.99}


@pytest.fixture(scope="module")
def first_layers(tmp_path_factory) -> Path:
    """A third of the default model, for what takes as long as there are layers."""
    whole = builtin.ensure("smollm2-135m", models_folder())
    folder = tmp_path_factory.mktemp("layers")
    AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=10).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded_by_bnb(first_layers):
    """In a process of its own: the first import of bitsandbytes is what could speak."""
    return subprocess.run(
        [sys.executable, "-c", LOADING, str(first_layers), *BNB],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_bitsandbytes_loads_the_default_model_quietly(loaded_by_bnb):
    assert loaded_by_bnb.returncode == 0, loaded_by_bnb.stderr
    said = loaded_by_bnb.stderr
    assert "MatMul8bitLt" not in said and "gemm_4bit" not in said and "warn" not in said.lower()


@pytest.mark.parametrize("kind", BNB)
def test_each_kind_loads_the_default_model_well(kind, loaded_by_bnb, first_layers):
    logits, before, after, unquantized = json.loads(loaded_by_bnb.stdout)[kind]
    model = AutoModelForCausalLM.from_pretrained(first_layers).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([[504, 5575, 282, 4649, 314, 260, 3575]])).logits
    both = torch.stack([torch.tensor(logits), wanted.flatten()])
    assert torch.corrcoef(both)[0, 1] > ALIKE[kind]
    parameters = model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()
    # Head and embedding are one tensor, which bitsandbytes leaves alone.
    assert unquantized == pytest.approx(embedding / parameters, rel=0.01)
    bits = 8 if kind == "int8-bnb" else 4
    least = embedding * 2 + (parameters - embedding) * bits / 8
    assert least <= before <= 1.1 * least and least <= after <= 1.1 * least


# Choosing, and what it costs


@pytest.mark.parametrize(
    ("device", "needs", "free", "chosen"),
    [
        ("cpu", 1, 100, "int8"),
        ("cpu", 100, 1, "int8"),
        ("cuda", 6, 10, "none"),
        ("cuda", 7, 10, "nf4"),
        ("cuda:1", 20, 10, "nf4"),
        ("mps", 20, 10, "none"),
    ],
)
def test_auto_depends_on_device_and_room(device, needs, free, chosen):
    assert auto(torch.device(device), needs * GIGA, free * GIGA) == chosen


def test_every_quantization_has_a_measured_cost():
    assert set(COST) == set(QUANTIZATIONS) - {"auto"}
    assert COST["none"] == 0 and COST["int8"] <= 0.01 and COST["nf4"] > COST["int8"]


def test_int8_hardly_changes_the_default_model(smollm):
    folder = builtin.ensure("smollm2-135m", models_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    quantize(model)
    assert weights(model).bytes < 0.55 * weights(smollm.model).bytes
    some = quality._passages(smollm.tokenizer, quality.PASSAGES.read_text(encoding="utf-8"))[:2]
    found, wanted = quality._read(model, some), quality._read(smollm.model, some)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=0.03)
    assert (found.best == wanted.best).double().mean() >= 0.93


def test_quality_compares_every_way_with_bfloat16(tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    ours = {name: way for name, way in quality.WAYS.items() if name not in BNB}
    monkeypatch.setattr(quality, "WAYS", ours)
    texts = {"": "One.\n\nAnother one.\n", "hard": "Three?"}
    rows = quality.measure(lambda what: None, folder=tmp_path, texts=texts)
    by_name = {each["name"]: each for each in rows}
    measured = [name for name in by_name if "near-ties" not in name]
    assert len(rows) == len(by_name) and len(measured) == 2 * 3 * len(ours)
    assert by_name["bfloat16: another likeliest token"]["value"] == 0
    assert "bfloat16: near-ties among these" not in by_name
    base, hard = by_name["bfloat16: perplexity"], by_name["bfloat16, hard text: perplexity"]
    assert base["ratio"] == 1 and base["n"] == len("One.") + len("Another one.") - 2
    assert hard["n"] == len("Three?") - 1
    judged = [each["name"] for each in rows if each["target"] is not None]
    assert judged == [
        f"{quality.TARGETED}: perplexity",
        f"{quality.TARGETED}: another likeliest token",
    ]


def test_near_ties_are_those_of_the_base():
    def reading(best, margin, firsts=None):
        firsts = firsts or [{each} for each in best]
        return quality.Reading(2.0, torch.tensor(best), torch.tensor(margin), firsts)

    base = reading([1, 2, 3, 4, 5], [0.1, 0.1, 3.0, 0.2, 3.0])
    other = reading([1, 0, 0, 0, 5], [3.0, 3.0, 0.1, 0.1, 0.1])
    rows = quality._rows("other", "", {quality.BASE: base, "other": other})
    assert [each["value"] for each in rows[1:]] == pytest.approx([60.0, 60.0, 100 * 2 / 3])
    assert rows[3]["n"] == 3


def test_any_of_the_bases_equal_firsts_is_as_likely_as_the_other():
    """What stands first among exactly equal logits is no choice of the model."""
    base = quality.Reading(2.0, torch.tensor([1, 2]), torch.tensor([0.0, 1.0]), [{1, 7}, {2}])
    other = quality.Reading(2.0, torch.tensor([7, 2]), torch.tensor([1.0, 1.0]), [{7}, {2}])
    rows = quality._rows("other", "", {quality.BASE: base, "other": other})
    assert [each["value"] for each in rows[1:]] == [0.0, 50.0]


def test_of_a_chat_the_answer_is_judged(smollm):
    plain, chat = quality._passages(smollm.tokenizer, "A text.\n\n[chat]\nWhy?\nSo.\nAnd so.\n")
    assert plain.first == 1 and smollm.tokenizer.decode(plain.ids[0]) == "A text."
    assert smollm.tokenizer.decode(chat.ids[0, chat.first :]) == "So.\nAnd so.<|im_end|>"
    asked = smollm.tokenizer.decode(chat.ids[0, : chat.first])
    assert asked.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("file", [quality.PASSAGES, quality.HARD])
def test_the_passages_are_as_many_tokens_as_they_claim(file, smollm):
    passages = quality._passages(smollm.tokenizer, file.read_text(encoding="utf-8"))
    judged = sum(each.ids.shape[1] - each.first for each in passages)
    assert 1900 < judged < 2600 and max(each.ids.shape[1] for each in passages) < 512


def test_perplexity_is_that_of_the_model_itself():
    model, ids = tiny.model(), torch.arange(1, 20)[None]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    passage = quality.Passage(ids, first=1)
    assert quality._read(model, [passage]).perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
