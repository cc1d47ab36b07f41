"""Smaller weights: int8 of our own, and the 4- and 8-bit kinds of bitsandbytes.

int8 rounds every row of a weight to 255 levels with one scale a row (symmetric, weights only, no
calibration). The others are NF4 and FP4 (Dettmers et al. 2023, "QLoRA") and LLM.int8() (Dettmers
et al. 2022), which bitsandbytes makes while transformers loads the model.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from analyzers.errors import BadInput

Quantization = Literal["auto", "none", "int8", "nf4", "fp4", "int8-bnb"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
COST: dict[Quantization, float] = {
    "none": 0.0,
    "int8": 0.004,
    "nf4": 0.186,
    "fp4": 0.339,
    "int8-bnb": 0.014,
}
"""How much higher the default model's perplexity is than in float32 (6.25), as a share of it, all
but `none` computing in bfloat16, 4-bit scales quantized too. From the ordinary text of
`app/bench/quality.py`, 2,225 tokens: below half a percent it is noise, and larger models lose less
to 4 bits."""
COMFORT = 0.6
"""Share of a GPU's free memory that weights may take; cache and activations need the rest."""

INT8_DTYPE = torch.bfloat16
"""What int8 models compute in on a CPU. torch's kernel is vectorised for it alone: in float32 a row
takes it about ten times as long."""
FEW_ROWS = 8
"""Up to here torch's int8 kernel is the fastest: it takes four rows at once, and its time grows
with every four (a pass of the default model over 8 tokens, two threads: 49 ms, and 61 by
halves)."""
SOME_ROWS = 64
"""Up to here `_by_halves` is faster than dequantising. One thread, 576 x 49152, ms at 4 / 8 / 16 /
32 rows: kernel 6.6 / 14 / 27 / 51, halves 7.0 / 8.6 / 11 / 17, dequantising 14 / 15 / 19 / 23."""
LEVELS = 127 * 256
"""Of each sign, in two signed bytes that leave -128 to the low one."""
KERNEL_STEP = 32
"""The kernel reads this many weights at once, and past the end of rows that are no multiple."""
PIECE = 1 << 20
"""Weights that are dequantised at once: every layer of the default model in one piece, its head in
pieces that stay in a core's cache. With half of it a prompt is read a tenth slower."""


# int8


class Int8Linear(nn.Linear):
    """A Linear whose weight is int8. Input (..., in_features), output (..., out_features) in the
    input's dtype; differentiable with respect to the input, not to the weight.

    `weight` is dequantised anew each time it is read: for code that looks at it, not for speed;
    changing it in place has no effect.
    """

    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        """weight: (out_features, in_features), of a floating dtype."""
        nn.Module.__init__(self)  # Linear's own would make a weight of full size
        self.out_features, self.in_features = weight.shape
        quantized, scale = _rounded(weight)
        self.quantized = nn.Parameter(quantized, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.quantized.to(self.scale.dtype) * self.scale[:, None]

    @classmethod
    def joined(cls, modules: "Sequence[Int8Linear]", quantized: torch.Tensor) -> "Int8Linear":
        """All of them side by side. quantized: their weights one below the other, which is kept."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = quantized.shape
        made.quantized = nn.Parameter(quantized, requires_grad=False)
        made.register_buffer("scale", torch.cat([each.scale for each in modules]))
        biases = [each.bias.data for each in modules if each.bias is not None]
        bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        made.register_parameter("bias", bias)
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = self.product(input.reshape(-1, self.in_features))
        return found.reshape(*input.shape[:-1], self.out_features)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, in_features) to (n, out_features)."""
        scale = self.scale.to(rows.dtype)
        if self._suits_kernel(rows):
            found = torch._weight_int8pack_mm(rows.contiguous(), self.quantized, scale)
        elif self._suits_halves(rows):
            found = _by_halves(rows, self.quantized, scale)
        else:
            found = _Product.apply(rows, self.quantized, scale)
        return found if self.bias is None else found + self.bias

    def _suits_kernel(self, rows: torch.Tensor) -> bool:
        return len(rows) <= FEW_ROWS and self.in_features % KERNEL_STEP == 0 and _plain_on_cpu(rows)

    def _suits_halves(self, rows: torch.Tensor) -> bool:
        return len(rows) <= SOME_ROWS and _plain_on_cpu(rows) and _sums_bytes()


def _plain_on_cpu(rows: torch.Tensor) -> bool:
    """In bfloat16, and without a gradient."""
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and not (torch.is_grad_enabled() and rows.requires_grad)
    )


@cache
def _sums_bytes() -> bool:
    """Whether the processor sums products of bytes in 32 bits (VNNI). Without it oneDNN's sums may
    overflow 16 bits on the way."""
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(
        has.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8")
    )


def _by_halves(rows: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows (n, in) times the transpose of quantized (out, in), times scale (out,).

    Every row is rounded to 65,025 levels, two bytes each, and the product is one of bytes: the
    weights are read as they are, the sums are exact, and a row does not notice its company. A level
    is 2^-15 of the row's largest number; bfloat16 itself rounds to 2^-9 of each.
    """
    exact = rows.float()
    unit = exact.abs().amax(-1, keepdim=True).div_(LEVELS)
    unit[unit == 0] = 1  # a row of zeros
    levels = (exact / unit).round_().to(torch.int16)
    halves = torch.cat(((levels + 128) >> 8, levels)).to(torch.int8)  # the low byte wraps around
    parts = []
    for part, by in zip(_pieces(quantized), scale.split(_rows_of_piece(quantized)), strict=True):
        high, low = torch._int_mm(halves, part.t()).chunk(2)
        parts.append((high * 256.0).add_(low).mul_(unit).mul_(by).to(rows.dtype))
    return torch.cat(parts, -1)


class Int8Experts(nn.Module):
    """Stands where a stack of expert weights stood; indexing dequantises the experts asked for."""

    scale: torch.Tensor

    def __init__(self, stack: torch.Tensor, transposed: bool) -> None:
        """stack: (experts, out, in), or (experts, in, out) if `transposed`."""
        super().__init__()
        self.transposed = transposed
        pairs = [_rounded(each.T if transposed else each) for each in stack.detach()]
        quantized, scale = (torch.stack(part) for part in zip(*pairs, strict=True))
        self.quantized = nn.Parameter(quantized, requires_grad=False)
        self.register_buffer("scale", scale)

    def __getitem__(self, expert: torch.Tensor | int) -> torch.Tensor:
        weight = self.quantized[expert].to(self.scale.dtype) * self.scale[expert][..., None]
        return weight.mT if self.transposed else weight


class _Product(torch.autograd.Function):
    """rows (n, in) times the transpose of quantized (out, in), times scale (out,).

    Backward dequantises again, so that a graph does not hold every weight of the model as floats.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(quantized, scale)
        # Scaled before the product, or the result is rounded twice: in bfloat16 logits of 20 were
        # off by 0.045 then (root mean square), by 0.037 so, and by 0.033 in the kernel. It also
        # keeps the sums within float16.
        pairs = zip(_pieces(quantized), scale.split(_rows_of_piece(quantized)), strict=True)
        parts = [F.linear(rows, part.to(rows.dtype).mul_(by[:, None])) for part, by in pairs]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        quantized, scale = ctx.saved_tensors
        scaled = gradients[0] * scale
        return scaled @ quantized.to(scaled.dtype), None, None


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 (out, in) and scale (out,) in the weight's dtype.

    The scale is rounded to that dtype first, so that its rounding adds no error of its own."""
    parts = []
    for part in _pieces(weight.detach()):
        scale = (part.float().abs().amax(-1) / 127).to(weight.dtype)
        scale[scale == 0] = 1  # a row of zeros
        levels = (part.float() / scale.float()[:, None]).round().clamp(-127, 127)
        parts.append((levels.to(torch.int8), scale))
    quantized, scales = zip(*parts, strict=True)
    return torch.cat(quantized), torch.cat(scales)


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(_rows_of_piece(weight))


def _rows_of_piece(weight: torch.Tensor) -> int:
    return max(1, PIECE // weight.shape[1])


def quantize(
    model: PreTrainedModel, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Make int8, in place, of every Linear and Conv1D, the head included, and of stacked experts.

    Routers and gates of a mixture stay as they are: a wrong choice of expert costs more than the
    bytes save. So does the input embedding; a head tied to it becomes an int8 copy of its own.
    progress(done, total) comes before each one; an exception from it leaves the model half done.
    """
    # Names, not modules: a list of these would keep the old weights alive.
    found = list(_quantizable(model))
    experts = False
    for done, (parent, name) in enumerate(found):
        progress(done, len(found))
        old = getattr(parent, name)
        if isinstance(old, nn.Parameter):
            delattr(parent, name)
            setattr(parent, name, Int8Experts(old, bool(parent.is_transposed)))
            experts = True
        else:
            weight = old.weight.T if isinstance(old, Conv1D) else old.weight
            setattr(parent, name, Int8Linear(weight, old.bias).train(old.training))
    if experts:
        # transformers' loop over the chosen experts; its others want all weights in one tensor.
        model.set_experts_implementation("eager")


def _quantizable(parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of all that can be int8, at any depth."""
    if hasattr(parent, "has_gate"):  # transformers' mark of experts with exchangeable forwards
        for name, stack in parent.named_parameters(recurse=False):
            if stack.dim() == 3:
                yield parent, name
    for name, child in parent.named_children():
        if _routes(name, child):
            continue
        # Exactly these: a subclass has a forward of its own that reads the weight.
        if type(child) in (nn.Linear, Conv1D):
            yield parent, name
        else:
            yield from _quantizable(child)


def _routes(name: str, module: nn.Module) -> bool:
    """Whether it chooses or weighs experts: `gate`, `shared_expert_gate`, `router`, but not
    `gate_proj`, which is half of a feed-forward block."""
    return bool(
        re.search(r"(^|_)gate$|router", name) or re.search("Router|Gating", type(module).__name__)
    )


# bitsandbytes


def bnb_config(kind: Quantization, compute: torch.dtype, double: bool) -> BitsAndBytesConfig:
    """For `from_pretrained(quantization_config=...)`; CPU and CUDA.

    compute: dtype of the products of nf4 and fp4; double: their scales are quantized as well.
    Neither matters to int8-bnb. Raises: BadInput for another kind, or without bitsandbytes.
    """
    if kind not in ("nf4", "fp4", "int8-bnb"):
        raise BadInput(f"Quantization {kind!r} is not one of bitsandbytes: nf4, fp4, int8-bnb.")
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_worth_saying)
    if not is_bitsandbytes_available():
        raise BadInput(
            f"Quantization {kind!r} needs the package bitsandbytes, which is not installed here; "
            "int8 works without it."
        )
    if kind == "int8-bnb":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=double,
    )


def _worth_saying(record: logging.LogRecord) -> bool:
    """bitsandbytes warns of a cast in every layer of every step, and of a package not needed."""
    return not str(record.msg).startswith(
        ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")
    )


# Choosing and reporting


def auto(device: torch.device, bf16_bytes: int, free_bytes: int) -> Quantization:
    """What "auto" means. bf16_bytes: of all weights in bfloat16; free_bytes: on that device."""
    if device.type == "cpu":
        return "int8"
    if device.type == "cuda" and bf16_bytes > COMFORT * free_bytes:
        return "nf4"
    return "none"


@dataclass(frozen=True)
class Weights:
    """What a model's weights take.

    bytes: all parameters and buffers, and the scales that bitsandbytes keeps beside them.
    unquantized: share (0 to 1) of the weights, by number, that are still floats; kept: the names of
    those, the largest first, with `*` for the number of a layer.
    """

    bytes: int
    unquantized: float
    kept: tuple[str, ...]


def weights(model: nn.Module) -> Weights:
    """Tensors that two modules share count once."""
    total, kept = 0, dict[str, int]()
    size = sum(buffer.nbytes for buffer in model.buffers())
    for name, value in model.named_parameters():
        state = getattr(value, "quant_state", None)  # of a packed 4-bit weight
        count = state.shape.numel() if state else value.numel()
        size += value.nbytes + _beside(state)
        total += count
        if value.is_floating_point():
            group = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            kept[group] = kept.get(group, 0) + count
    for module in model.modules():
        size += _row_scales(module)
    names = sorted(kept, key=lambda group: -kept[group])
    return Weights(size, sum(kept.values()) / total, tuple(names))


def _beside(state: Any) -> int:
    """Bytes of the tensors in a 4-bit weight's state, and in that of its quantized scales."""
    if state is None:
        return 0
    tensors = [each for each in vars(state).values() if isinstance(each, torch.Tensor)]
    return sum(each.nbytes for each in tensors) + _beside(getattr(state, "state2", None))


def _row_scales(module: nn.Module) -> int:
    """Bytes of the scales of an LLM.int8() layer; its first pass moves them to its own state."""
    weight = getattr(module, "_parameters", {}).get("weight")
    holders = (weight, getattr(module, "state", None))
    return sum(
        scales.nbytes for holder in holders if (scales := getattr(holder, "SCB", None)) is not None
    )
