"""The engine's promises with weights of bitsandbytes, really loaded from a folder."""

import pytest
import torch

from analyzers.engine import Engine, Tree, load
from tests import tiny
from tests.test_engine import full, ids_of, write
from tests.test_trees import TREE

CLOSE = {"atol": 0.2, "rtol": 0.02}  # logits reach 14
# Blocks of 64 weights: wider than the other tiny models.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "mixtral"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny.model(request.param, **WIDE).save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_keep_every_promise(folder, kind):
    """To the rounding of bfloat16: on some processors the library's kernel casts to it, whatever
    the dtype, so that a difference in the last digit of float32 may grow to one there."""
    engine = load(str(folder), quantization=kind, dtype="float32", compute="float32")
    assert engine.identity["quantization"] == kind
    kinds = {type(module).__name__ for module in engine.model.modules()}
    assert "Linear4bit" in kinds
    with torch.inference_mode():
        check(engine)


def check(engine: Engine) -> None:
    ids = ids_of(engine)
    cursor = engine.prefill(ids[:20])
    for id in ids[20:]:
        step = engine.step(cursor, taps=(engine.layers,))
        torch.testing.assert_close(step.raw, full(engine, cursor.ids)[-1], **CLOSE)
        torch.testing.assert_close(engine.unembed(step.hidden[engine.layers]), step.raw, **CLOSE)
        engine.push(cursor, id)
    expected = torch.stack(write(engine, cursor, 5))
    engine.rewind(cursor, len(ids) - 9)
    engine.extend(cursor, ids[-9:])
    torch.testing.assert_close(torch.stack(write(engine, cursor, 5)), expected, **CLOSE)
    branch = engine.fork(cursor, 25)
    checked = engine.verify(branch, TREE)
    engine.commit(branch, checked.path(6))
    engine.push(branch, 80)
    raw = full(engine, branch.ids)[-1]
    torch.testing.assert_close(engine.step(branch).raw, raw, **CLOSE)
    steps = engine.step([cursor, branch])
    torch.testing.assert_close(steps[1].raw, raw, **CLOSE)


def test_int8_of_bitsandbytes_streams_forks_and_drafts(folder):
    """It rounds activations row by row, so a step and a full pass differ by more than rounding;
    what can be asked is that the parts fit and that numbers are finite."""
    engine = load(str(folder), quantization="int8-bnb")
    with torch.inference_mode():
        cursor = engine.prefill(ids_of(engine))
        rows = write(engine, cursor, 5)
        checked = engine.verify(engine.fork(cursor), Tree.chain([65, 66]))
    assert torch.stack(rows).isfinite().all() and checked.raw.isfinite().all()
