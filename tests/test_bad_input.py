"""Bad models and hostile texts: a clear sentence, nothing lost, and nothing that runs."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from huggingface_hub import constants

from analyzers.engine import Engine, load
from analyzers.errors import (
    BadInput,
    ModelBroken,
    ModelNotFound,
    ModelUnfit,
    ModelUnsafe,
    OutOfContext,
)
from analyzers.task import Task, chat
from analyzers.trace import RunStarted, text_of
from app.runner import Job, Runner
from tests import tiny
from tests.test_builtin import write_gguf


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A tiny model as a folder."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    made = tmp_path / "model"
    made.mkdir()
    for path in saved.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    """Loading never waits for an answer on the console, nor for the hub."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"the console was asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(ref: str | Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        load(str(ref))
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 600
    return sentence


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Models


def test_an_undamaged_folder_loads_exactly(folder, tiny_engine):
    engine = load(str(folder), quantization="none")
    ids = engine.encode(Task("Hello"))
    assert ids == tiny_engine.encode(Task("Hello"))
    found, wanted = (each.step(each.prefill(ids)).raw for each in (engine, tiny_engine))
    assert float((found - wanted).abs().max()) < 1e-5
    assert engine.identity["name"] == str(folder) and len(engine.identity["hash"]) == 64


@pytest.mark.parametrize(
    "ref", ["no-such-model", "org/model", "/no/such/folder", "~nobody-here/model", "x" * 5000,
            "a\0b", "model.gguf", "../*", "\ud800"]
)  # fmt: skip
def test_an_unknown_model_names_the_known_ones(ref):
    with pytest.raises(ModelNotFound, match=r"smollm2-135m.*safetensors.*\.gguf"):
        load(ref)


def test_a_folder_without_weights_says_so(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no weights" in refusal(empty, ModelNotFound)
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder, ModelNotFound)


def test_weights_without_a_config_say_so(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder, ModelNotFound)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_with_the_reason(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    sentence = refusal(folder, ModelUnsafe)
    assert name in sentence and "could run any code" in sentence and "safetensors" in sentence


def test_a_pickle_beside_safetensors_is_never_opened(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % b"/nowhere")
    assert load(str(folder)).layers == 3


def test_code_beside_the_weights_never_runs(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit(folder / "config.json", model_type="own", auto_map=dict.fromkeys(names, "own.Own"))
    sentence = refusal(folder, ModelUnsafe)
    assert "code" in sentence and not ran.exists()


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_cut_weights_are_broken(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "could not be read" in refusal(folder, ModelBroken)


def test_random_weights_are_broken(folder):
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(4096))
    assert "could not be read" in refusal(folder, ModelBroken)


def test_weights_of_another_shape_are_broken(folder):
    edit(folder / "config.json", hidden_size=64)
    refusal(folder, ModelBroken)


def test_missing_weights_are_broken_and_not_made_up(folder):
    edit(folder / "config.json", num_hidden_layers=5)
    assert "model.layers.3.input_layernorm.weight" in refusal(folder, ModelBroken)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_config_is_broken(folder, text):
    (folder / "config.json").write_text(text)
    refusal(folder, ModelBroken)


def test_an_unknown_architecture_is_named(folder):
    edit(folder / "config.json", model_type="perpetuum", architectures=["PerpetuumForCausalLM"])
    assert "perpetuum" in refusal(folder, ModelBroken)


def test_an_architecture_that_does_not_fit_is_named(tmp_path):
    from transformers import CTRLConfig, CTRLLMHeadModel

    sizes = {"n_positions": 32, "n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2}
    CTRLLMHeadModel(CTRLConfig(vocab_size=261, **sizes)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert "'ctrl' does not fit" in refusal(tmp_path, ModelUnfit)


def test_a_model_without_a_tokenizer_is_broken(folder):
    for path in folder.glob("token*"):
        path.unlink()
    assert "has no tokenizer" in refusal(folder, ModelBroken)


def test_a_whole_gguf_loads_and_one_without_a_model_in_it_does_not(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    engine = load(str(tmp_path / "whole.gguf"))
    assert engine.layers == 2 and engine.step(engine.prefill([5, 6])).raw.isfinite().all()
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refusal(tmp_path / "empty.gguf", ModelBroken)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:4],
        lambda raw: raw[:20],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1000],
        lambda raw: raw[:8] + b"\xff" * 16 + raw[24:],  # counts beyond all measure
        lambda raw: raw[:4] + b"\xff" * 4 + raw[8:],  # a version from the future
        lambda raw: random.Random(1).randbytes(5000),
        lambda raw: b"GGUF" + random.Random(2).randbytes(5000),
    ],
)
def test_a_damaged_gguf_is_broken(tmp_path, damage):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    path.write_bytes(damage(path.read_bytes()))
    sentence = refusal(path, ModelBroken)
    assert "model.gguf" in sentence and "damaged" in sentence


def test_unknown_settings_name_the_known_ones(folder):
    for options, known in (
        ({"quantization": "q2"}, "auto, none, int8, nf4, fp4, int8-bnb, not 'q2'"),
        ({"dtype": "int3"}, "float32, bfloat16, float16"),
        ({"compute": "int3"}, "float32, bfloat16, float16"),
        ({"device": "abacus"}, "'abacus' is not available"),
    ):
        with pytest.raises(BadInput, match=known):
            load(str(folder), **options)


def test_a_model_that_fails_to_load_records_nothing(runner, folder, monkeypatch):
    monkeypatch.setattr("app.runner.load", lambda ref, **options: load(str(folder)))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelBroken):
        runner.submit(Job("sampling", Task("hi"))).finish()
    assert runner.store.count() == 0


# Texts

HOSTILE = [
    "<script>alert(1)</script>",
    "${x} {{x}} {% raw %} {{ turns[0].__class__ }} #{x} %s %(x)s {0}",
    "</span></div><img src=x onerror=alert(1)>",
    "``` `id` $(id) ```",
    "\x00\x01\x07\x08\x1b[2J\x7f\x80\x9f",
    "\u202eevil\u202c \u2066x\u2069 \u200b\u200f\ufeff\ufffe\uffff",
    "'; DROP TABLE runs; --",
    "halves of pairs: \ud800 and \udfff",
    "<|end|><|user|><|assistant|>",
    "x\r\n\u2028\u2029\x0b\x0c",
    "\U0010ffff" * 20,
    "a\u0301" * 40,
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("method", ["sampling", "read"])
def test_hostile_texts_are_run_kept_and_read_back(runner: Runner, method, text):
    for task in (Task(text), Task(chat(text, system=text), prefix=text)):
        params = {"max_new": 4, "stop": text} if method == "sampling" else {}
        run = runner.submit(Job(method, task, params, seed=1)).finish()
        assert run.events[-1].event.status == "done"
        assert runner.store.events(run.id) == run.events
        started = run.events[0].event
        assert isinstance(started, RunStarted)
        assert (started.prompt, started.prefix) == (task.prompt, task.prefix)
        row = runner.store.run(run.id)
        assert row.status == "done" and row.prompt == started.prompt
    assert runner.store.count() == 2


def test_what_is_read_is_what_was_given(runner):
    for text in HOSTILE:
        if not any(special in text for special in tiny.SPECIAL):
            run = runner.submit(Job("read", Task(text))).finish()
            whole = text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd")
            assert text_of(stamped.event for stamped in run.events) == whole


@pytest.mark.parametrize("char", ["a", " ", "é", "👍", "\u202e"])
def test_a_megabyte_of_one_character_is_refused_with_both_lengths(
    smollm: Engine, runner, char, monkeypatch
):
    monkeypatch.setattr("app.runner.load", lambda ref, **options: smollm)
    text = "x" + char * (1_000_000 // len(char.encode()))
    with pytest.raises(OutOfContext, match=r"has \d+,\d{3} tokens.* 8,192") as caught:
        runner.submit(Job("sampling", Task(chat(text)))).finish()
    assert len(str(caught.value)) < 200 and runner.store.count() == 0
