"""Carving: nothing is lost, the same neurons fall together each time, and it stays a model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeForCausalLM

from analyzers.engine import builtin, carve, load, sources
from analyzers.engine.carve import Recipe
from analyzers.errors import ModelUnfit, Stopped
from analyzers.home import models_folder
from app.bench.quality import PASSAGES
from tests import tiny

RECIPE = Recipe(experts=4, shared=32, active=3)  # of 64 neurons: experts of 8


@pytest.fixture(scope="module")
def dense():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    return carve.passages(carve.CALIBRATION, tiny.tokenizer())[:12]


@pytest.fixture(scope="module")
def mixture(dense, texts) -> Qwen2MoeForCausalLM:
    return carve.carve(dense, texts, RECIPE)


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


# The mixture


def test_with_all_experts_the_mixture_is_the_dense_model(dense, mixture, texts):
    try:
        carve.use(mixture, 4)
        for ids in texts[:3]:
            torch.testing.assert_close(
                logits(mixture, ids), logits(dense, ids), atol=1e-2, rtol=1e-3
            )
    finally:
        carve.use(mixture, 3)


def test_fewer_experts_are_another_model(dense, mixture, texts):
    assert (logits(mixture, texts[0]) - logits(dense, texts[0])).abs().max() > 0.1


def test_what_is_not_feed_forward_is_the_same_tensor(dense, mixture):
    for block, old in zip(mixture.model.layers, dense.model.layers, strict=True):
        assert block.self_attn.q_proj.weight.data_ptr() == old.self_attn.q_proj.weight.data_ptr()
        assert block.self_attn.q_proj.bias is None
    assert mixture.config.num_experts_per_tok == 3
    assert mixture.config.norm_topk_prob is False


def test_weights_of_experts_are_nearly_equal_and_ordered(mixture, texts):
    seen = []
    router = mixture.model.layers[1].mlp.gate
    hook = router.register_forward_hook(lambda module, given, output: seen.append(output))
    logits(mixture, texts[0])
    hook.remove()
    ((scores, weights, experts),) = seen
    assert (weights - 1 / 4).abs().max() < 1e-3
    assert torch.equal(experts, scores.argsort(dim=-1, descending=True)[:, :3])
    assert len(experts.unique()) == 4, "no expert is dead"


def test_the_same_texts_carve_the_same(dense, mixture, texts):
    again = carve.carve(dense, texts, RECIPE).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in mixture.state_dict().items())


def test_the_dense_model_is_not_changed(texts):
    one, other = tiny.model("llama"), tiny.model("llama")
    carve.carve(one, texts[:2], RECIPE)
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name
    assert not any(module._forward_pre_hooks for module in one.modules())


def test_tell_comes_before_every_block_and_can_end_it(dense, texts):
    shares: list[float] = []
    carve.carve(dense, texts[:2], RECIPE, shares.append)
    assert shares == [0, 1 / 3, 2 / 3]

    def stop(share: float) -> None:
        if share > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        carve.carve(dense, texts[:2], RECIPE, stop)


@pytest.mark.parametrize("recipe", [Recipe(5, 32, 3), Recipe(4, 64, 3)])
def test_what_does_not_split_evenly_is_refused(dense, texts, recipe):
    with pytest.raises(ModelUnfit, match=r"^The 64 neurons of a block cannot be carved into"):
        carve.carve(dense, texts[:1], recipe)


# Its parts


def test_every_neuron_is_in_one_place(noise):
    fired = torch.randn(50, 64, generator=noise)
    shared, experts = carve.partition(fired, torch.randn(32, 64, generator=noise), RECIPE)
    assert (shared.shape, experts.shape) == ((32,), (4, 8))
    assert sorted([*shared.tolist(), *experts.flatten().tolist()]) == list(range(64))


def test_shared_neurons_write_most():
    """Activation times column by hand: 1 x 6, 2 x 2, -3 x 1, 0 x 9 -> the first two."""
    fired = torch.tensor([[1.0, 2.0, -3.0, 0.0]])
    down = torch.diag(torch.tensor([6.0, 2.0, 1.0, 9.0]))
    shared, _ = carve.partition(fired, down, Recipe(experts=2, shared=2, active=1))
    assert shared.tolist() == [0, 1]


def test_neurons_that_fire_together_become_one_expert(noise):
    """Four planted groups of 8, in mixed order."""
    patterns = torch.randn(4, 100, generator=noise)
    group = torch.randperm(32, generator=noise) % 4
    points = patterns[group] + 0.3 * torch.randn(32, 100, generator=noise)
    found = carve.clusters(torch.nn.functional.normalize(points, dim=-1), 4)
    assert found.shape == (4, 8)
    assert sorted(found.flatten().tolist()) == list(range(32))
    pure = sum(int(group[members].bincount().max()) for members in found)
    assert pure >= 24, "most of them"


def test_the_best_pair_first_and_a_full_group_takes_no_more():
    alike = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.5], [0.4, 0.3]])
    assert carve._members(alike).tolist() == [[0, 1], [2, 3]]


def test_contributions_are_the_norms_of_what_experts_add(noise):
    fired, down = torch.randn(7, 12, generator=noise), torch.randn(5, 12, generator=noise)
    experts = torch.randperm(12, generator=noise).view(3, 4)
    slow = [[float((down[:, own] @ row[own]).norm()) for own in experts] for row in fired]
    torch.testing.assert_close(carve.contributions(fired, down, experts), torch.tensor(slow))


def test_the_router_foresees_the_order(noise):
    inputs, true = torch.randn(400, 8, generator=noise), torch.randn(3, 8, generator=noise)
    written = (0.3 * inputs @ true.T + 3).exp()
    scores = inputs @ carve.router(inputs, written).T
    agree = scores.argmax(-1) == written.argmax(-1)
    assert agree.float().mean() > 0.95


def test_perplexity_is_that_of_every_token_but_the_first(dense, texts):
    rows = [logits(dense, ids).log_softmax(-1) for ids in texts[:2]]
    told = [
        float(row[at, ids[at + 1]])
        for row, ids in zip(rows, texts[:2], strict=True)
        for at in range(len(ids) - 1)
    ]
    mean = -sum(told) / len(told)
    assert carve.perplexity(dense, texts[:2]) == pytest.approx(2.718281828**mean, rel=1e-4)


# The folder, and the texts


def test_the_folder_is_an_ordinary_mixture(dense, tmp_path, monkeypatch, texts):
    base, made, told = tmp_path / "base", tmp_path / "made", tmp_path / "told.json"
    dense.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    monkeypatch.setattr(carve, "passages", lambda path, tokenizer: texts[:3])
    shares = []
    tell = carve.tell
    monkeypatch.setattr(
        carve, "tell", lambda told, *what: shares.append(what[0]) or tell(told, *what)
    )
    carve.make(base, made, told, RECIPE)
    assert shares == sorted(shares) and shares[-1] == 1.0
    model = AutoModelForCausalLM.from_pretrained(made)
    assert type(model) is Qwen2MoeForCausalLM
    assert model.config.architectures == ["Qwen2MoeForCausalLM"]
    expected = carve.carve(dense, texts[:3], RECIPE)
    torch.testing.assert_close(logits(model, texts[5]), logits(expected, texts[5]))
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer("a b")["input_ids"] == tiny.tokenizer()("a b")["input_ids"]
    found = json.loads(told.read_text())["found"]
    assert found["perplexity_all"] == pytest.approx(found["perplexity_dense"], rel=1e-3)
    assert found["perplexity"] == pytest.approx(carve.perplexity(model, texts[:3]), rel=1e-3)


def test_the_texts_are_many_and_their_own():
    def read(path: Path) -> list[str]:
        return path.read_text(encoding="utf-8").strip().split("\n%%\n")

    calibration, heldout = read(carve.CALIBRATION), read(carve.HELDOUT)
    assert len(calibration) >= 80 and len(heldout) >= 30
    assert len({*calibration, *heldout}) == len(calibration) + len(heldout)
    assert all(len(text) > 80 for text in calibration + heldout)

    def runs(texts: list[str]) -> set[tuple[str, ...]]:
        words = [text.split() for text in texts]
        return {tuple(each[at : at + 9]) for each in words for at in range(len(each) - 8)}

    assert not runs(calibration) & runs(heldout), "nothing held out was seen"
    assert not runs(calibration + heldout) & runs([PASSAGES.read_text(encoding="utf-8")])


# The real one


def test_the_default_model_carved(smollm):
    """All experts give its logits, 12 of 16 nearly its perplexity. Made here if it is missing."""
    folder = builtin.ensure("smollm2-moe", models_folder())
    manifest = json.loads((folder / builtin.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["perplexity"] <= 1.25 * manifest["perplexity_dense"]
    assert manifest["perplexity_all"] == pytest.approx(manifest["perplexity_dense"], rel=1e-3)
    assert f"{manifest['perplexity']:.2f} at 12 of 16" in manifest["about"]
    (listed,) = [each for each in sources.listed() if each.ref == "smollm2-moe"]
    assert listed.ready and listed.about == manifest["about"]
    mixture = load("smollm2-moe", quantization="none")
    assert "routing" in mixture.can
    ids = torch.tensor(mixture.tokenizer("The first person on the Moon was")["input_ids"])
    carve.use(mixture.model, 16)
    found, expected = logits(mixture.model, ids), logits(smollm.model, ids)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_the_carved_model_in_int8_writes(smollm):
    builtin.ensure("smollm2-moe", models_folder())
    engine = load("smollm2-moe", quantization="int8")
    assert engine.identity["quantization"] == "int8"
    cursor = engine.prefill(engine.tokenizer("Two and two are")["input_ids"])
    assert torch.isfinite(engine.step(cursor).logits).all()
