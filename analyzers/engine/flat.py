"""A few tokens through a llama-shaped model, written out: its modules' numbers for less.

On a CPU, half of a step of a small model is not arithmetic but the calling of sixty small
operations a block. Here a block is about twenty: query, key and value are one product, gate and up
another, the norm is one call, and the rotation two. The modules stay as they are (their weights
become views of the joined ones) and serve every pass that changes something about the model.
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
from analyzers.engine.masks import Mask
from analyzers.engine.quantization import Int8Linear

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
        self._device = model.device
        self._blocks = [
            _block(block, parts.window if slides else None)
            for block, slides in zip(parts.blocks, parts.sliding, strict=True)
        ]
        self._windows = {block.window for block in self._blocks}
        self._group = self._blocks[0].heads // self._blocks[0].key_heads

    @classmethod
    def of(cls, model: PreTrainedModel, parts: Parts) -> "Flat | None":
        """None for other families, and where weights are spread over devices."""
        spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        if model.config.model_type not in FAMILIES or spread:
            return None
        return cls(model, parts)

    def run(
        self,
        ids: Sequence[int],
        at: Sequence[int],
        past: Past,
        mask: Mask | None = None,
        taps: Collection[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute `ids`, which stand at the positions `at`, and append them to `past`.

        Gives the states behind the last block, (tokens, d_model), for `readout`, and layer ->
        (tokens, d_model) of the taps. mask: as `masks` makes it, for one row; None lets every
        token see all of the past and all of `ids`, so it serves one token only.
        """
        x = self._embed(torch.tensor(ids, device=self._device))
        cos, sin = self._rotary(x, torch.tensor([at], device=self._device))
        cos, sin = cos[0][:, None], _half_negated(sin[0])[:, None]  # the same for all heads
        allowed = {window: self._mask_of(window, mask) for window in self._windows}
        hidden = {0: x} if 0 in taps else {}
        for index, (block, layer) in enumerate(zip(self._blocks, past.layers, strict=True)):
            x = _through(block, layer, x, cos, sin, allowed[block.window])
            if index + 1 in taps:
                hidden[index + 1] = x
        return x, hidden

    def _mask_of(self, window: int | None, mask: Mask | None) -> torch.Tensor | None:
        """(1, 1, tokens * queries of a key head, keys) for the blocks with that window."""
        if isinstance(mask, dict):
            mask = mask["full_attention" if window is None else "sliding_attention"]
        return None if mask is None else mask.repeat_interleave(self._group, 2)


def _through(
    block: Block,
    layer: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """One block for a few tokens, (tokens, d_model) to (tokens, d_model)."""
    tokens, turned = len(x), block.heads + block.key_heads
    qkv = block.qkv(block.first_norm(x)).view(tokens, turned + block.key_heads, block.dim)
    if block.query_norm and block.key_norm:
        queries, keys = (
            block.query_norm(qkv[:, : block.heads]),
            block.key_norm(qkv[:, block.heads : turned]),
        )
        both = torch.cat((queries, keys), 1)
    else:
        both = qkv[:, :turned]
    if block.turns:
        both = torch.addcmul(both * cos, both.roll(block.dim // 2, -1), sin)
    keys, values = layer.update(
        both[:, block.heads :].transpose(0, 1)[None], qkv[:, turned:].transpose(0, 1)[None]
    )
    if mask is None and block.window is not None and keys.shape[2] > block.window:
        keys, values = keys[:, :, -block.window :], values[:, :, -block.window :]
    # The queries of one key head lie below each other, token by token: no head is repeated.
    queries = both[:, : block.heads].reshape(tokens, block.key_heads, -1, block.dim)
    seen = F.scaled_dot_product_attention(
        queries.transpose(0, 1).reshape(1, block.key_heads, -1, block.dim),
        keys,
        values,
        mask,
        scale=block.scale,
    )
    seen = seen.view(block.key_heads, tokens, -1, block.dim).transpose(0, 1)
    x = x + block.out(seen.reshape(tokens, -1))
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
    if all(type(module) is Int8Linear for module in modules):
        return Int8Linear.joined(modules, _one([m.quantized for m in modules])).product
    return lambda x: torch.cat([module(x) for module in modules], -1)


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
