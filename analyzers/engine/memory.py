"""What a model will take, and where it will lie: decided from file headers, before loading.

Only the headers of the weight files are read: 8 bytes of length and JSON in safetensors, the table
of tensors in a GGUF. What a quantization packs is told from names and shapes.
"""

import json
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, cast

import psutil
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from analyzers.engine import quantization as quantizing
from analyzers.engine.quantization import Quantization
from analyzers.engine.sources import Source
from analyzers.errors import BadInput, ModelBroken, ModelTooLarge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BITSANDBYTES = ("nf4", "fp4", "int8-bnb")
# Beside the weights while loading: the page cache's share, buffers, the check's one pass.
ALLOWANCE = 1.05
# Rooms of a header beyond this are taken for damage (a trillion parameters have 20 MB).
HEADER_MOST = 100_000_000

HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
TABLES = re.compile(r"embed|embd|wte|wpe")
# Left in float: a wrong choice of expert costs more than the bytes.
ROUTERS = re.compile(r"(^|\.)(gate|router|ffn_gate_inp|shared_expert_gate|router\.proj)\.weight$")
EXPERTS = re.compile(r"\.experts\.|_exps\.")


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the file calls it: "BF16", "Q4_1"
    bytes: int  # in the file


class Group(NamedTuple):
    """Weights of one kind, and the output rows that they have together."""

    parameters: int
    rows: int


@dataclass(frozen=True)
class Headers:
    """What the headers say.

    parameters: of all tensors; bytes: in the files, by their names of dtypes. tied: the head is the
    embedding. matrices: the linear layers without the head, the experts of a mixture and what
    chooses among them. largest: parameters of the largest tensor.
    """

    parameters: int
    bytes: Mapping[str, int]
    tied: bool
    head: Group
    matrices: Group
    experts: Group
    largest: int


@dataclass(frozen=True)
class Plan:
    """How a model will be loaded: every "auto" decided.

    split: over several devices, by accelerate. weights: bytes in memory once loaded. peak: bytes
    while loading. loads_as: the dtype in which the weights arrive before a quantization.
    """

    quantization: Quantization
    dtype: torch.dtype
    device: torch.device
    split: bool
    double: bool
    loads_as: torch.dtype
    weights: int
    peak: int


def headers(source: Source) -> Headers:
    """Raises: ModelBroken when a header cannot be read."""
    try:
        read = _gguf if source.gguf else _safetensors
        tensors = [tensor for path in source.weights for tensor in read(path)]
        return _summary(tensors, _says_tied(source))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelBroken(
            f"The model {source.ref} could not be read (its header makes no sense): "
            "its files are damaged or of an unknown kind."
        ) from error


def plan(
    source: Source,
    quantization: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    double: bool = True,
) -> Plan:
    """Decide what is "auto", and predict.

    Raises: BadInput for settings that are unknown, or that do not go together here; ModelBroken.
    """
    where = check_settings(quantization, dtype, device)
    found = headers(source)
    chosen = cast(Quantization, quantization)
    if chosen == "auto":
        chosen = quantizing.auto(where, 2 * found.parameters, free(where))
    _check_possible(source, chosen, where, device == "split")
    made = _sized(found, chosen, _dtype(dtype, where, chosen), where, double)
    if source.gguf:  # unpacked as a whole before the model takes it
        made = replace(made, peak=made.peak + sum(found.bytes.values()))
    too_much = device == "auto" and where.type == "cuda" and made.peak > free(where)
    return replace(made, split=device == "split" or (too_much and chosen != "int8"))


def free(device: torch.device | str = "auto") -> int:
    """Bytes that can be had on a device: on the CPU also within a container's limit; with "split"
    on all devices together."""
    if device == "split":
        cards = range(torch.cuda.device_count())
        return free("cpu") + sum(torch.cuda.mem_get_info(card)[0] for card in cards)
    where = device if isinstance(device, torch.device) else device_of(device)
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    return max(0, min([psutil.virtual_memory().available, *_rooms_in_container()]))


def check(source: Source, made: Plan) -> None:
    """Raises: ModelTooLarge with what is needed, what there is, and what would fit."""
    room = free("split" if made.split else made.device)
    if made.peak <= room:
        return
    found = headers(source)
    smaller = [
        each
        for choice in quantizing.QUANTIZATIONS
        if choice not in ("auto", "none", made.quantization)
        and _possible(source, choice, made.device, made.split)
        and (each := _sized(found, choice, made.dtype, made.device, made.double)).peak <= room
    ]
    fitting = " or ".join(f"{each.quantization} ({_gb(each.peak)})" for each in smaller)
    help = f"it would fit with {fitting}" if fitting else "no quantization would make it fit"
    raise ModelTooLarge(
        f"The model {source.ref} needs {_gb(made.peak)} of memory to load with quantization "
        f"{made.quantization} and {_gb(room)} are free on {made.device}: {help}."
    )


def check_settings(quantization: str, dtype: str, device: str) -> torch.device:
    """The device. Raises: BadInput that names the known values, or for a device not here."""
    check_choice("quantization", quantization, quantizing.QUANTIZATIONS)
    check_choice("dtype", dtype, ("auto", *DTYPES))
    return device_of(device)


def check_choice(what: str, chosen: str, known: tuple[str, ...]) -> None:
    if chosen not in known:
        raise BadInput(f"The {what} must be one of {', '.join(known)}, not {chosen!r}.")


def device_of(device: str) -> torch.device:
    """The device, or the first one of "split"; "auto" takes CUDA, then MPS, then the CPU.

    Raises: BadInput when it is not there.
    """
    if device in ("auto", "split"):
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        mps = device == "auto" and torch.backends.mps.is_available()
        return torch.device("mps" if mps else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"The device {device!r} is not available here.") from None


# Deciding


def _dtype(dtype: str, device: torch.device, quantization: str) -> torch.dtype:
    """bitsandbytes computes in bfloat16 anyway; plain weights are exact on the CPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu" and quantization == "int8":
        return quantizing.INT8_DTYPE
    exact = device.type == "cpu" and quantization == "none"
    return torch.float32 if exact else torch.bfloat16


def _possible(source: Source, quantization: str, device: torch.device, split: bool) -> bool:
    with suppress(BadInput):
        _check_possible(source, quantization, device, split)
        return True
    return False


def _check_possible(source: Source, quantization: str, device: torch.device, split: bool) -> None:
    if quantization == "int8" and split:
        raise BadInput("A model split over devices cannot be int8; use nf4, fp4, int8-bnb or none.")
    if quantization not in BITSANDBYTES:
        return
    if source.gguf:
        raise BadInput(f"A GGUF file cannot be loaded with {quantization}; use int8 or none.")
    if device.type == "mps":
        raise BadInput(f"Quantization {quantization} is for CUDA and the CPU; use none.")
    if find_spec("bitsandbytes") is None:
        raise BadInput(
            f"Quantization {quantization} needs bitsandbytes: install it with "
            "`pip install bitsandbytes`, or use int8 or none."
        )


def _sized(
    found: Headers,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    double: bool,
) -> Plan:
    weights = _weights(found, quantization, dtype, double)
    loads_as, peak = dtype, weights
    if quantization == "int8":  # packed after loading, so the floats come as narrow as they are
        stored = STORED.get(max(found.bytes, key=found.bytes.__getitem__), torch.float32)
        loads_as = stored if stored.itemsize < dtype.itemsize else dtype
        peak = max(weights, found.parameters * loads_as.itemsize)
    # One tensor at a time exists twice: as it was stored, and as it will be used.
    peak = int((peak + 4 * found.largest) * ALLOWANCE)
    return Plan(quantization, dtype, device, False, double, loads_as, weights, peak)


def _weights(found: Headers, quantization: Quantization, dtype: torch.dtype, double: bool) -> int:
    """Bytes of the weights once they are loaded."""
    if quantization == "none":
        return found.parameters * dtype.itemsize
    packed, rows = found.matrices
    floats = found.parameters - packed
    if quantization == "int8":  # bitsandbytes leaves heads and experts
        for more in (found.head, found.experts):
            packed, rows = packed + more.parameters, rows + more.rows
        floats = found.parameters - packed
        # A tied head becomes a copy of its own beside the embedding.
        floats += found.head.parameters if found.tied else 0
        return packed + (rows + floats) * dtype.itemsize
    if quantization == "int8-bnb":
        return packed + 4 * rows + floats * dtype.itemsize  # a float32 scale for each row
    # Half a byte each, and a scale per 64 of them: float32, or itself 8 bits and a scale per 256.
    scale = (1 + 4 / 256) / 64 if double else 4 / 64
    return math.ceil(packed * (0.5 + scale)) + floats * dtype.itemsize


def _gb(bytes: int) -> str:
    return f"{bytes / 1e9:.2f} GB"


def _rooms_in_container(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Bytes left under each memory limit on this process and the groups above it; only Linux has
    them. Cached files count as free: the system drops them first."""
    names = ("memory.max", "memory.current", "inactive_file")
    names_v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    rooms: list[int] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                rooms += _rooms(groups, path, *names)
            elif "memory" in controllers.split(","):
                rooms += _rooms(groups / "memory", path, *names_v1)
    return rooms


def _rooms(top: Path, path: str, limit: str, used: str, cached: str) -> Iterator[int]:
    place = top / path.lstrip("/")
    while place.is_relative_to(top):
        with suppress(OSError, ValueError, KeyError):  # not mounted here, or the limit is "max"
            most = int((place / limit).read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            yield most - int((place / used).read_text()) + int(stat[cached])
        place = place.parent


# Reading headers


def _summary(tensors: list[Tensor], tied: bool) -> Headers:
    tensors = [tensor for tensor in tensors if len(tensor.shape) < 4]  # masks that are not loaded
    sizes = {tensor: math.prod(tensor.shape) for tensor in tensors}
    heads = [tensor for tensor in tensors if HEADS.search(tensor.name)]
    tables = [tensor for tensor in tensors if TABLES.search(tensor.name) and tensor not in heads]
    if tied or not heads:
        for tensor in heads:  # a second copy in the file
            del sizes[tensor]
        tied, heads = True, sorted(tables, key=sizes.__getitem__)[-1:]
    linear = [
        tensor
        for tensor in sizes
        if len(tensor.shape) > 1 and tensor not in (*heads, *tables)
        if not ROUTERS.search(tensor.name)
    ]
    bytes: Counter[str] = Counter()
    for tensor in sizes:
        bytes[tensor.dtype] += tensor.bytes
    return Headers(
        parameters=sum(sizes.values()),
        bytes=dict(bytes),
        tied=tied,
        head=_group(heads),
        matrices=_group(tensor for tensor in linear if not EXPERTS.search(tensor.name)),
        experts=_group(tensor for tensor in linear if EXPERTS.search(tensor.name)),
        largest=max(sizes.values()),
    )


def _group(tensors: Iterable[Tensor]) -> Group:
    shapes = [tensor.shape for tensor in tensors]
    return Group(sum(map(math.prod, shapes)), sum(math.prod(shape[:-1]) for shape in shapes))


def _says_tied(source: Source) -> bool:
    """Whether the configuration ties the head to the embedding, even if the file has both."""
    if source.gguf:
        return False
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings"))


def _safetensors(path: Path) -> Iterator[Tensor]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_MOST:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            first, end = about["data_offsets"]
            yield Tensor(name, tuple(about["shape"]), about["dtype"], end - first)


# Bytes of the fixed-size kinds of a GGUF's metadata; 8 is a string and 9 an array.
GGUF_KINDS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf(path: Path) -> Iterator[Tensor]:
    """The table of tensors. `gguf.GGUFReader` makes an object of every token, for half a minute
    where the vocabulary is large."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", raw)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("no GGUF of a version that is known")
        at = 24
        for _ in range(pairs):
            at = _past_string(raw, at)
            (kind,) = struct.unpack_from("<I", raw, at)
            at = _past_value(raw, at + 4, kind)
        for _ in range(tensors):
            begin, at = at + 8, _past_string(raw, at)
            name = raw[begin:at].decode("utf-8")
            (axes,) = struct.unpack_from("<I", raw, at)
            shape = struct.unpack_from(f"<{axes}Q", raw, at + 4)[::-1]  # the fastest comes first
            kind, _ = struct.unpack_from("<IQ", raw, at + 4 + 8 * axes)
            at += 16 + 8 * axes
            stored = GGMLQuantizationType(kind)
            block, bytes = GGML_QUANT_SIZES[stored]
            yield Tensor(name, shape, stored.name, math.prod(shape) // block * bytes)


def _past_string(raw: mmap.mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", raw, at)
    return at + 8 + int(length)


def _past_value(raw: mmap.mmap, at: int, kind: int) -> int:
    if kind == 8:
        return _past_string(raw, at)
    if kind != 9:
        return at + GGUF_KINDS[kind]
    kind, count = struct.unpack_from("<IQ", raw, at)
    if kind in GGUF_KINDS:
        return at + 12 + int(count) * GGUF_KINDS[kind]
    at += 12
    for _ in range(count):
        at = _past_value(raw, at, kind)
    return at
