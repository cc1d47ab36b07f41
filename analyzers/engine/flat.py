"""One step of a llama-shaped model, written out: the numbers of its modules at a third of the cost.

On a CPU, half of a step of a small model is not arithmetic but the calling of sixty small
operations a block. Here a block is about twenty: query, key and value are one product, gate and up
another, the norm is one call, and the rotation two. The modules stay as they are (their weights
become views of the joined ones) and serve every pass that asks for more than a plain next token.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from analyzers.engine.adapters import Parts
from analyzers.engine.cache import Past
from analyzers.engine.quantization import KERNEL_STEP, Int8Linear

# Families whose blocks are exactly: norm, attention, sum, norm, gated feed-forward, sum.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """window: tokens that it sees, None = all. turns: whether queries and keys are rotated."""

    first_norm: Product
    qkv: Product
    query_norm: Product | None
    key_norm: Product | None
    out: Product
    second_norm: Product
    gate_up: Product
    activation: Product
    down: Product
    heads: int
    key_heads: int
    dim: int
    scale: float
    turns: bool
    window: int | None


class Flat:
    """See above; `of` makes one where the model allows it."""

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        inner = model.base_model
        self._embed = parts.embeddings
        self._rotary = inner.rotary_emb
        self._readout = parts.readout
        self._device = model.device
        self._blocks = [
            _block(block, parts.window if slides else None)
            for block, slides in zip(parts.blocks, parts.sliding, strict=True)
        ]

    @classmethod
    def of(cls, model: PreTrainedModel, parts: Parts) -> "Flat | None":
        """None for other families, and where weights are spread over devices."""
        spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        if model.config.model_type not in FAMILIES or spread:
            return None
        return cls(model, parts)

    def step(
        self, id: int, past: Past, taps: Collection[int] = (), exits: Collection[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute one token behind `past`: logits (exits + 1, vocab), those of the model last, and
        layer -> (d_model,) of the taps, which have the exits among them."""
        pos = past.length()
        x = self._embed(torch.tensor([id], device=self._device))
        cos, sin = self._rotary(x, torch.tensor([[pos]], device=self._device))
        cos, sin = cos[0], _half_negated(sin[0])
        hidden = {0: x[0]} if 0 in taps else {}
        for index, (block, layer) in enumerate(zip(self._blocks, past.layers, strict=True)):
            x = _through(block, layer, x, cos, sin)
            if index + 1 in taps:
                hidden[index + 1] = x[0]
        if exits:  # one product for all: the head's weights are read from memory once
            x = torch.stack([*(hidden[layer] for layer in exits), x[0]])
        return self._readout(x), hidden


def _through(
    block: Block, layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """One block for one token, (1, d_model) to (1, d_model)."""
    turned = block.heads + block.key_heads
    qkv = block.qkv(block.first_norm(x)).view(turned + block.key_heads, block.dim)
    if block.query_norm and block.key_norm:
        queries, keys = (
            block.query_norm(qkv[: block.heads]),
            block.key_norm(qkv[block.heads : turned]),
        )
        both = torch.cat((queries, keys))
    else:
        both = qkv[:turned]
    if block.turns:
        both = torch.addcmul(both * cos, both.roll(block.dim // 2, -1), sin)
    shape = (1, block.key_heads, -1, block.dim)
    keys, values = layer.update(both[block.heads :].view(shape), qkv[turned:].view(shape))
    if block.window is not None and keys.shape[2] > block.window:
        keys, values = keys[:, :, -block.window :], values[:, :, -block.window :]
    # The queries of one key head lie side by side: no head is repeated.
    seen = F.scaled_dot_product_attention(
        both[: block.heads].view(shape), keys, values, scale=block.scale
    )
    x = x + block.out(seen.view(1, -1))
    gate, up = block.gate_up(block.second_norm(x)).chunk(2, -1)
    return x + block.down(block.activation(gate) * up)


def _half_negated(sin: torch.Tensor) -> torch.Tensor:
    """So that x cos + roll(x) sin is x cos + rotate_half(x) sin."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), -1)


def _block(block: Any, window: int | None) -> Block:
    attention, mlp = block.self_attn, block.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    dim = attention.head_dim
    return Block(
        first_norm=_norm(block.input_layernorm),
        qkv=_joined(qkv),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=_joined([attention.o_proj]),
        second_norm=_norm(block.post_attention_layernorm),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj]),
        activation=mlp.act_fn,
        down=_joined([mlp.down_proj]),
        heads=qkv[0].out_features // dim,
        key_heads=qkv[1].out_features // dim,
        dim=dim,
        scale=attention.scaling,
        turns=bool(getattr(attention, "use_rope", True)),
        window=window,
    )


def _norm(module: Any) -> Product:
    weight, eps = module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _joined(modules: Sequence[Any]) -> Product:
    """The outputs of several linear modules side by side, in one product where they allow it;
    their weights become views of the joined one, so nothing is held twice."""
    if all(type(module) is nn.Linear for module in modules):
        weight, bias = _one([m.weight for m in modules]), _bias(modules)
        return lambda x: F.linear(x, weight, bias)
    if all(type(module) is Int8Linear and _has_kernel(module) for module in modules):
        weight = _one([m.quantized for m in modules])
        scale, bias = torch.cat([m.scale for m in modules]), _bias(modules)
        if bias is None:
            return lambda x: torch._weight_int8pack_mm(x, weight, scale)
        return lambda x: torch._weight_int8pack_mm(x, weight, scale) + bias
    return lambda x: torch.cat([module(x) for module in modules], -1)


def _has_kernel(module: Int8Linear) -> bool:
    """Whether torch's int8 kernel serves this layer, as `Int8Linear.forward` decides."""
    return (
        module.scale.dtype == torch.bfloat16
        and module.scale.device.type == "cpu"
        and module.in_features % KERNEL_STEP == 0
    )


def _one(weights: Sequence[nn.Parameter]) -> torch.Tensor:
    if len(weights) == 1:
        return weights[0].data
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return whole


def _bias(modules: Sequence[Any]) -> torch.Tensor | None:
    biases = [module.bias for module in modules]
    return None if biases[0] is None else torch.cat([bias.data for bias in biases])
