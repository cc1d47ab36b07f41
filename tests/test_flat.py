"""The written-out model: a few tokens through it say what the modules say."""

import pytest
import torch

from analyzers.engine import Engine, Tree
from analyzers.engine.flat import FAMILIES
from analyzers.engine.quantization import FEW_ROWS, Int8Linear, _sums_bytes
from analyzers.errors import BadInput
from tests import tiny
from tests.test_engine import CLOSE
from tests.test_trees import TREE, begin


def through_modules(engine: Engine, cursor, tree: Tree, monkeypatch, taps=()):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_flat", None)
        return engine.verify(cursor, tree, taps=taps)


@pytest.fixture(scope="module", params=FAMILIES)
def flat_engine(request) -> Engine:
    made = tiny.engine(request.param)
    assert made._flat is not None
    return made


@pytest.mark.parametrize("tree", [Tree((), ()), Tree.chain(range(70, 80)), TREE])
@pytest.mark.parametrize("length", [1, 5, 30])
def test_a_draft_says_what_the_modules_say(flat_engine, tree, length, monkeypatch):
    """Inside of the sliding window (8), at its edge and past it; rows of keys are left as well."""
    taps = range(flat_engine.layers + 1)
    cursor, other = begin(flat_engine, length), begin(flat_engine, length)
    found = flat_engine.verify(cursor, tree, taps=taps)
    expected = through_modules(flat_engine, other, tree, monkeypatch, taps)
    torch.testing.assert_close(found.raw, expected.raw, **CLOSE)
    for layer in taps:
        torch.testing.assert_close(found.hidden[layer], expected.hidden[layer], **CLOSE)
    for mine, theirs in zip(cursor.past.layers, other.past.layers, strict=True):
        assert mine.length == theirs.length == length + len(tree)
        for one, two in zip(mine.buffers, theirs.buffers, strict=True):
            torch.testing.assert_close(one[:, :, : mine.length], two[:, :, : mine.length], **CLOSE)


def test_drafts_are_not_run_through_the_modules(tiny_engine, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("the modules ran")

    cursor, before = begin(tiny_engine), tiny_engine.forwards
    monkeypatch.setattr(tiny_engine, "_run", run)
    tiny_engine.verify(cursor, TREE, taps=(1,))
    assert tiny_engine.forwards == before + 1


def test_one_node_more_does_not_see_its_siblings(flat_engine):
    """A single token, but not one that may see everything before it."""
    cursor = begin(flat_engine)
    flat_engine.verify(cursor, Tree((70,), (-1,)))
    found = flat_engine.verify(cursor, Tree((70, 71), (-1, -1)))
    alone = flat_engine.step(flat_engine.prefill([*cursor.ids, 71]))
    torch.testing.assert_close(found.raw[2], alone.raw, **CLOSE)


def test_taps_that_are_not_there_are_refused_and_change_nothing(tiny_engine):
    cursor = begin(tiny_engine)
    expected = tiny_engine.verify(cursor, TREE).raw
    with pytest.raises(BadInput, match="no layer 9"):
        tiny_engine.verify(cursor, TREE, taps=(9,))
    assert cursor.checked is None or len(cursor.checked.tree) == len(TREE)
    torch.testing.assert_close(tiny_engine.verify(cursor, TREE).raw, expected, **CLOSE)


def test_exits_are_read_in_the_order_asked_for(tiny_engine):
    step = tiny_engine.step(begin(tiny_engine), exits=(2, 1), taps=(3,))
    assert set(step.hidden) == {1, 2, 3}
    for layer in (1, 2, 3):
        expected = tiny_engine.unembed(step.hidden[layer])
        found = step.exits[layer] if layer < 3 else step.raw
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_layers_side_by_side_are_what_they_are_alone(family):
    """In bfloat16, where every number of rows has its own product; qwen2 has biases."""
    model = tiny.engine(family, int8=True).model.bfloat16()
    attention = model.model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = Int8Linear.joined(modules, torch.cat([m.quantized for m in modules]))
    x = torch.randn(100, joined.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        for rows in (x[:1], x[:FEW_ROWS], x[: FEW_ROWS + 1], x):
            alone = torch.cat([module(rows) for module in modules], -1)
            torch.testing.assert_close(joined.product(rows), alone, atol=0.05, rtol=0.02)


@pytest.mark.skipif(not _sums_bytes(), reason="this processor has no sums of bytes")
class TestByHalves:
    """Products of a few rows with an int8 weight, the rows in two bytes a number."""

    @staticmethod
    def layer(out: int = 80) -> Int8Linear:
        torch.manual_seed(0)
        return Int8Linear(torch.randn(out, 96, dtype=torch.bfloat16), None)

    def test_it_serves_between_few_rows_and_many(self):
        int8, x = self.layer(), torch.randn(200, 96, dtype=torch.bfloat16)
        served = [n for n in range(200) if int8._suits_halves(x[:n]) > int8._suits_kernel(x[:n])]
        assert served == list(range(9, 65))
        assert not int8._suits_halves(x[:16].clone().requires_grad_())
        assert not int8._suits_halves(x[:16].float())

    @pytest.mark.parametrize("largest", [1e-30, 1.0, 1e4])
    def test_only_the_result_is_rounded(self, largest):
        int8, x = self.layer(), torch.randn(16, 96)
        x = (x / x.abs().amax() * largest).bfloat16()
        exact = x.double() @ int8.quantized.double().T * int8.scale.double()
        with torch.inference_mode():
            off = (int8(x).double() - exact).norm() / (exact.bfloat16().double() - exact).norm()
        assert off < 1.05

    def test_one_large_number_costs_the_others_little(self):
        """As the massive activations of a first token."""
        int8, x = self.layer(), torch.randn(16, 96).bfloat16()
        x[:, 5] = 300.0
        int8.quantized[:, 5] = 0  # so that the others are all there is
        exact = x.double() @ int8.quantized.double().T * int8.scale.double()
        with torch.inference_mode():
            assert (int8(x).double() - exact).norm() < 0.005 * exact.norm()

    def test_a_row_does_not_notice_its_company(self, monkeypatch):
        monkeypatch.setattr("analyzers.engine.quantization.PIECE", 96 * 7)  # several pieces
        int8, x = self.layer(), torch.randn(64, 96, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(int8(x)[:10], int8(x[:10]))

    def test_zeros_stay_zero_and_what_is_not_finite_is_not_hidden(self):
        int8, x = self.layer(), torch.randn(16, 96, dtype=torch.bfloat16)
        x[1], x[2, 3], x[3, 3] = 0, torch.nan, torch.inf
        with torch.inference_mode():
            found = int8(x)
        assert found[1].eq(0).all() and found[[0, *range(4, 16)]].isfinite().all()
        assert not found[2].isfinite().any() and not found[3].isfinite().any()
