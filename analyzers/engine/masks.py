"""Attention masks for what the models' own causal masks do not cover: trees, ragged batches, parts
of the layers. Always additive floats: eager attention adds a mask, also a boolean one."""

import torch

from analyzers.engine.adapters import Parts

Mask = torch.Tensor | dict[str, torch.Tensor]


def masks(
    parts: Parts,
    allow: torch.Tensor,
    at: torch.Tensor,
    keys_at: torch.Tensor,
    dtype: torch.dtype,
) -> Mask:
    """What the family's forward takes as `attention_mask`.

    allow: (rows, queries, keys) bool. at: (rows, queries) and keys_at: (rows, keys), the positions
    in the text, from which a sliding window counts."""
    full = _additive(allow, dtype)
    if parts.window is None or not any(parts.sliding):
        return {"full_attention": full} if parts.mask_by_type else full
    near = (at[:, :, None] - keys_at[:, None, :]) < parts.window
    windowed = _additive(allow & near, dtype)
    if parts.mask_by_type:
        return {"full_attention": full, "sliding_attention": windowed}
    return windowed


def _additive(allow: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, 1, queries, keys): 0 where allowed, the lowest number elsewhere."""
    blocked = torch.full(allow.shape, torch.finfo(dtype).min, dtype=dtype, device=allow.device)
    return blocked.masked_fill(allow, 0.0)[:, None]
