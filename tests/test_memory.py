"""What is predicted from file headers is what a loaded model takes."""

import json
import struct
from pathlib import Path

import psutil
import pytest
import torch

from analyzers.engine import load, memory
from analyzers.engine.quantization import INT8_DTYPE, weights
from analyzers.engine.sources import Source, resolve
from analyzers.errors import BadInput, ModelBroken, ModelTooLarge
from tests import tiny
from tests.test_builtin import write_gguf


def saved(folder: Path, family: str = "llama", **options: object) -> Source:
    tiny.model(family).save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return resolve(str(folder))


def write_safetensors(path: Path, tensors: dict[str, tuple]) -> None:
    """The header alone; tensors: name -> (dtype, shape)."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + sizes[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)


def written(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], **config: bool
) -> Source:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return resolve(str(folder))


LAYERS = {
    "model.embed_tokens.weight": ("BF16", (100, 8)),
    "lm_head.weight": ("BF16", (100, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.0.self_attn.q_proj.bias": ("BF16", (8,)),
    "model.layers.0.mlp.gate.weight": ("F32", (4, 8)),
    "model.layers.0.mlp.gate_proj.weight": ("BF16", (16, 8)),
    "model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", (16, 8)),
    "model.norm.weight": ("BF16", (8,)),
}


# Headers


def test_a_header_is_sorted_by_what_a_quantization_does_with_it(tmp_path):
    found = memory.headers(written(tmp_path, LAYERS))
    assert found.parameters == 800 + 800 + 64 + 8 + 32 + 128 + 128 + 8
    assert found.bytes == {"BF16": 2 * (found.parameters - 32), "F32": 128}
    assert not found.tied and found.head == (800, 100) and found.largest == 800
    assert found.matrices == (64 + 128, 8 + 16) and found.experts == (128, 16)


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_head_counts_once(tmp_path, both):
    tensors = {name: about for name, about in LAYERS.items() if both or "lm_head" not in name}
    found = memory.headers(written(tmp_path, tensors, tie_word_embeddings=both))
    assert found.tied and found.parameters == 1168 and found.head == (800, 100)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_header_counts_what_the_model_has(tmp_path, family):
    found = memory.headers(saved(tmp_path, family))
    model = tiny.model(family)
    assert found.parameters == pytest.approx(model.num_parameters(), rel=0.01)  # and a few buffers
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert found.tied == tied


def test_shards_add_up(tmp_path):
    whole = memory.headers(saved(tmp_path / "one"))
    source = saved(tmp_path / "many", max_shard_size="40KB")
    assert len(source.weights) > 2 and memory.headers(source) == whole


def test_a_gguf_header_says_the_same_as_its_reader(tmp_path):
    import gguf

    write_gguf(tmp_path / "m.gguf")
    found = memory.headers(resolve(str(tmp_path / "m.gguf")))
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert found.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert sum(found.bytes.values()) == sum(int(tensor.n_bytes) for tensor in tensors)
    assert set(found.bytes) == {"Q8_0", "Q4_1", "F32"}
    assert found.tied and found.head.rows == 288


@pytest.mark.parametrize(
    "raw",
    [b"", b"abc", b"\xff" * 8, struct.pack("<Q", 50) + b"{}", struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9) + b'{"a": {}}'],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_a_broken_model(tmp_path, raw):
    source = written(tmp_path, LAYERS)
    source.weights[0].write_bytes(raw)
    with pytest.raises(ModelBroken, match="header makes no sense"):
        memory.headers(source)


# Predictions


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("int8", "auto")]
)
def test_the_default_model_takes_what_was_predicted(quantization, dtype):
    source = resolve("smollm2-135m")
    made = memory.plan(source, quantization, dtype)
    engine = load(quantization=quantization, dtype=dtype)
    assert made.weights == memory.plan(source, quantization, dtype).weights
    assert made.weights == pytest.approx(engine.memory, rel=0.01)
    assert engine.identity["parameters"] == memory.headers(source).parameters
    assert made.peak > made.weights


# Falcon's linear layers are of a class of their own, which int8 leaves as it is.
PACKED = [family for family in tiny.FAMILIES if family != "falcon"]


@pytest.mark.parametrize(
    ("family", "quantization"),
    [*((each, "none") for each in tiny.FAMILIES), *((each, "int8") for each in PACKED)],
)
def test_tiny_models_take_what_was_predicted(tmp_path, family, quantization):
    source = saved(tmp_path, family)
    engine = load(source.ref, quantization=quantization, dtype="bfloat16")
    predicted = memory.plan(source, quantization, "bfloat16").weights
    assert predicted == pytest.approx(engine.memory, rel=0.1)


def test_four_bits_are_half_a_byte_and_the_scales(tmp_path):
    found = {"model.embed_tokens.weight": ("BF16", (10, 64)), "a.weight": ("BF16", (64, 64))}
    source = written(tmp_path, found)
    floats, packed = 640 * 2, 4096
    plain = memory.plan(source, "nf4", "bfloat16", "cpu", double=False).weights
    assert plain == floats + packed // 2 + packed // 64 * 4
    double = memory.plan(source, "nf4", "bfloat16", "cpu", double=True).weights
    assert double == floats + packed // 2 + packed // 64 + packed // 64 // 256 * 4 + 1
    assert memory.plan(source, "int8-bnb", "bfloat16", "cpu").weights == floats + packed + 64 * 4


def test_bitsandbytes_is_predicted_for_the_default_model():
    pytest.importorskip("bitsandbytes")
    engine = load(quantization="nf4", device="cpu")
    predicted = memory.plan(resolve("smollm2-135m"), "nf4", device="cpu").weights
    assert predicted == pytest.approx(weights(engine.model).bytes, rel=0.02)
    assert {"double": True, "compute": "bfloat16"}.items() <= engine.identity.items()
    assert engine.identity["parameters"] == 134_515_008


# Choosing


def test_auto_is_decided_before_loading(tmp_path):
    made = memory.plan(written(tmp_path, LAYERS), device="cpu")
    assert (made.quantization, made.dtype, made.split) == ("int8", INT8_DTYPE, False)
    made = memory.plan(written(tmp_path, LAYERS), "none", device="cpu")
    assert (made.quantization, made.dtype) == ("none", torch.float32)


def test_int8_arrives_as_narrow_as_it_is_stored(tmp_path):
    """The floats are all there before they are packed: float32 would double the peak."""
    made = memory.plan(written(tmp_path, LAYERS), "int8", "float32", "cpu")
    assert (made.dtype, made.loads_as) == (torch.float32, torch.bfloat16)


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    source = written(tmp_path, LAYERS)
    with pytest.raises(BadInput, match="split over devices"):
        memory.plan(source, "int8", device="split")
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(BadInput, match="GGUF file cannot be loaded with nf4"):
        memory.plan(resolve(str(tmp_path / "m.gguf")), "nf4")
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs bitsandbytes"):
        memory.plan(source, "nf4")


def test_a_model_too_large_for_the_gpu_alone_is_split(tmp_path, monkeypatch):
    """No GPU here: only what is decided is tested."""
    monkeypatch.setattr(memory, "device_of", lambda device: torch.device("cuda:0"))
    room = {"cuda:0": 10**9}
    monkeypatch.setattr(memory, "free", lambda device: room[str(device)])
    source = written(tmp_path, LAYERS)
    assert not memory.plan(source, "none").split
    room["cuda:0"] = 100
    assert (
        memory.plan(source, "none").split and not memory.plan(source, "none", device="cuda").split
    )


# Room


def test_a_model_too_large_says_what_is_needed_and_what_would_fit(tmp_path, monkeypatch):
    source = written(tmp_path, LAYERS | {"a.weight": ("F32", (1000, 1000))})
    made = memory.plan(source, "none", "float32", "cpu")
    memory.check(source, made)
    packed = memory.plan(source, "int8-bnb", "float32", "cpu")
    monkeypatch.setattr(memory, "free", lambda device: packed.peak)
    with pytest.raises(ModelTooLarge) as caught:
        memory.check(source, made)
    sentence = str(caught.value)
    assert f"needs {made.peak / 1e9:.2f} GB" in sentence
    assert f"{packed.peak / 1e9:.2f} GB are free on cpu" in sentence
    assert "int8-bnb" in sentence and "nf4" in sentence and "int8 (" not in sentence
    monkeypatch.setattr(memory, "free", lambda device: 10)
    with pytest.raises(ModelTooLarge, match="no quantization would make it fit"):
        memory.check(source, made)


def test_loading_checks_the_room_first(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    told: list[str] = []
    with pytest.raises(ModelTooLarge):
        load(saved(tmp_path).ref, progress=lambda what, share: told.append(what))
    assert told == []


def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.write_text("9:cpu:/x\n0::/a/b\n4:name=systemd:/\n3:memory:/v1\n")
    group = tmp_path / "a"
    groups = {
        group: "max 1000 current 700 stat inactive_file:50",
        group / "b": "max max current 700 stat inactive_file:50",
        tmp_path / "memory" / "v1": (
            "limit_in_bytes 5000 usage_in_bytes 10 stat total_inactive_file:0"
        ),
    }
    for place, text in groups.items():
        place.mkdir(parents=True)
        words = text.replace(":", "\n").split(" ")
        for name, value in zip(words[::2], words[1::2], strict=True):
            (place / f"memory.{name}").write_text(value.replace("\n", " ") + "\n")
    rooms = memory._rooms_in_container(tmp_path, own)
    assert sorted(rooms) == [350, 4990]
    assert memory._rooms_in_container(tmp_path, tmp_path / "nothing") == []
    monkeypatch.setattr(memory, "_rooms_in_container", lambda: rooms)
    assert memory.free("cpu") == 350


def test_without_a_container_the_machine_counts(monkeypatch):
    monkeypatch.setattr(memory, "_rooms_in_container", lambda: [])
    available = psutil.virtual_memory().available
    assert memory.free("cpu") == pytest.approx(available, rel=0.5)
