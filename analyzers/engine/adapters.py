"""Where each architecture keeps its parts: the one table of module names.

A model that is not in the table, or whose parts do not reproduce its own logits, fails at loading.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from analyzers.errors import ModelUnfit


@dataclass(frozen=True)
class Names:
    """Dotted paths from the model: decoder blocks and final norm. The head is the
    model's own `get_output_embeddings()`."""

    blocks: str
    norm: str


LLAMA_LIKE = Names("model.layers", "model.norm")
FAMILIES: dict[str, Names] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "gpt2": Names("transformer.h", "transformer.ln_f"),
    "gpt_neox": Names("gpt_neox.layers", "gpt_neox.final_layer_norm"),
}


@dataclass(frozen=True)
class Parts:
    """The modules themselves. `readout` maps a hidden state (..., d_model) to logits (..., vocab):
    final norm, head, and the family's soft-cap where the configuration has one."""

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    cap: float | None

    def readout(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(hidden))
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def parts(model: PreTrainedModel) -> Parts:
    """Raises: ModelUnfit for a family that is not in the table."""
    family = model.config.model_type
    if (names := FAMILIES.get(family)) is None:
        raise ModelUnfit(
            f"The architecture {family!r} is not supported yet; "
            f"supported are {', '.join(sorted(FAMILIES))}."
        )
    return Parts(
        blocks=model.get_submodule(names.blocks),
        norm=model.get_submodule(names.norm),
        head=model.get_output_embeddings(),
        cap=getattr(model.config, "final_logit_softcapping", None),
    )
