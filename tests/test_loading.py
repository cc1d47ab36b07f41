"""Loading: what it tells on the way, how it is stopped, and that nothing of it stays."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from analyzers.engine import load, loading
from analyzers.errors import (
    CandorError,
    ModelBroken,
    ModelTooLarge,
    ModelUnfit,
    ModelUnsafe,
    Stopped,
)
from tests import tiny
from tests.test_builtin import write_gguf


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    tiny.model().save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def after(steps: int) -> Callable[[str, float], None]:
    """A progress that stops at the given call."""
    told = []

    def progress(what: str, share: float) -> None:
        told.append(what)
        if len(told) == steps:
            raise Stopped("enough")

    return progress


def models_alive() -> int:
    gc.collect()
    return sum(type(each).__name__ == "LlamaForCausalLM" for each in gc.get_objects())


# On the way


def test_progress_comes_with_every_weight_and_never_goes_back(folder):
    told: list[tuple[str, float]] = []
    engine = load(str(folder), progress=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    phases = [what.rpartition(": ")[2] for what, _ in told[:-1]]
    wanted = ["tokenizer", "weights", "int8", "checksum", "checking"]
    assert list(dict.fromkeys(phases)) == wanted
    assert phases.count("weights") == len(tiny.model().state_dict())
    assert phases.count("int8") == 3 * 7 + 1
    assert engine.identity["quantization"] == "int8"
    assert 0 < engine.identity["unquantized"] < 0.5  # the embedding and the norms


@pytest.mark.parametrize("gguf", [False, True])
def test_nothing_is_said_on_the_console(folder, tmp_path, capfd, gguf):
    write_gguf(tmp_path / "m.gguf")
    capfd.readouterr()
    load(str(tmp_path / "m.gguf" if gguf else folder))
    assert capfd.readouterr() == ("", "")


def test_a_gguf_tells_its_weights_too(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    told: list[str] = []
    load(str(tmp_path / "m.gguf"), progress=lambda what, share: told.append(what))
    assert sum("weights" in what for what in told) >= 20


@pytest.mark.parametrize("steps", [1, 2, 15, 30, 40, 53, 54, 55, 56])
def test_a_stop_drops_what_was_loaded(folder, steps):
    """At every stage; the error is kept, as a run keeps it, and holds no model."""
    load(str(folder))
    before = models_alive()
    with pytest.raises(Stopped) as caught:
        load(str(folder), progress=after(steps))
    assert caught.value is not None and models_alive() == before
    assert transformers_logging.set_tqdm_hook(None) is None


def test_a_model_that_is_refused_at_the_end_is_let_go(folder, monkeypatch):
    made: list[weakref.ref] = []

    def refuse(model: torch.nn.Module, tokenizer: object, identity: object) -> None:
        made.append(weakref.ref(model))
        raise ModelUnfit("no.")

    monkeypatch.setattr(loading, "Engine", refuse)
    with pytest.raises(ModelUnfit) as caught:
        load(str(folder))
    gc.collect()
    assert made[0]() is None and caught.value.__traceback__ is not None


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_an_engine_that_is_dropped_gives_its_memory_back(folder, quantization):
    engine = load(str(folder), quantization=quantization)
    engine.step(engine.prefill([5, 6, 7]), taps=(1,))
    model = weakref.ref(engine.model)
    del engine
    gc.collect()
    assert model() is None


# What is loaded


def test_the_identity_says_what_was_decided(folder):
    same = load(str(folder)).identity
    assert same == {
        "name": str(folder),
        "hash": same["hash"],
        "quantization": "int8",
        "dtype": "bfloat16",
        "device": "cpu",
        "parameters": tiny.model().num_parameters(),
        "unquantized": same["unquantized"],
    }
    exact = load(str(folder), quantization="none").identity
    assert (exact["dtype"], exact["hash"]) == ("float32", same["hash"])


def test_the_hash_follows_the_weights(folder):
    first = load(str(folder), quantization="none").identity["hash"]
    tiny.model(seed=1).save_pretrained(folder)
    assert load(str(folder), quantization="none").identity["hash"] != first


def test_int8_writes_nearly_what_the_floats_write(folder):
    exact, packed = (
        load(str(folder), quantization=kind, dtype="float32") for kind in ("none", "int8")
    )
    rows = [each.step(each.prefill([72, 101, 108])).raw for each in (exact, packed)]
    assert float(torch.corrcoef(torch.stack(rows))[0, 1]) > 0.99
    assert packed.model.dtype == torch.float32


def test_int8_of_a_narrow_file_can_compute_in_float32(folder):
    tiny.model().to(torch.bfloat16).save_pretrained(folder)
    engine = load(str(folder), quantization="int8", dtype="float32")
    assert engine.model.dtype == torch.float32
    assert engine.step(engine.prefill([1, 2])).raw.isfinite().all()


def test_a_table_larger_than_the_tokenizer_is_padding(folder):
    edit(folder, vocab_size=400)
    tiny_model = tiny.model()
    tiny_model.resize_token_embeddings(400)
    tiny_model.save_pretrained(folder)
    assert load(str(folder)).vocabulary.size < 400


def test_a_tokenizer_larger_than_the_table_is_refused_with_both_sizes(folder):
    small = tiny.model()
    small.resize_token_embeddings(200)
    small.save_pretrained(folder)
    with pytest.raises(ModelUnfit, match=r"259.*200"):
        load(str(folder))


def test_a_model_without_a_tokenizer_says_so(folder):
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ModelBroken, match="has no tokenizer"):
        load(str(folder))


def test_weights_that_are_quantized_already_are_refused(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelUnfit, match="stored quantized already"):
        load(str(folder))


# Code of the model's own


@pytest.fixture
def coded(folder, tmp_path, monkeypatch) -> Path:
    """The tiny model with a file that says when it ran."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "mod"))
    monkeypatch.syspath_prepend(str(tmp_path / "mod"))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w')\n"
        "class Own(LlamaForCausalLM): pass\n"
    )
    edit(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    return folder


def test_code_runs_only_when_it_is_allowed(coded, tmp_path):
    assert "remote_code" not in load(str(coded)).identity and not (tmp_path / "ran").exists()
    engine = load(str(coded), remote_code=True)
    assert engine.identity["remote_code"] is True and (tmp_path / "ran").exists()
    assert type(engine.model).__name__ == "Own"


def test_code_that_was_allowed_but_not_there_is_not_claimed(folder):
    assert "remote_code" not in load(str(folder), remote_code=True).identity


def test_a_model_that_needs_its_code_is_refused_without(coded):
    edit(coded, model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(ModelUnsafe, match="without running code"):
        load(str(coded))


# When it goes wrong


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (MemoryError(), ModelTooLarge, "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), ModelTooLarge, "memory ran out"),
        (RuntimeError("odd\nsecond line"), ModelBroken, r"\(odd\)"),
    ],
)
def test_what_a_library_raises_while_reading_is_a_sentence(
    folder, monkeypatch, raised: Exception, error: type[CandorError], words: str
):
    def fail(*args: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(error, match=words):
        load(str(folder))


def test_a_model_that_does_not_run_is_unfit(folder, monkeypatch):
    def fail(*args: object) -> None:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(loading, "Engine", fail)
    with pytest.raises(ModelUnfit, match=r"does not run on cpu with quantization int8 in bfloat16"):
        load(str(folder))
