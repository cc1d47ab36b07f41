"""Where each architecture keeps its parts: the one table of module names.

A family that is not in the table is tried by structure: its one list of blocks, the norm after it,
and within a block the children whose class names say what they are. What cannot be found is
refused with the reason; whether the parts reproduce the model's own logits is checked at loading.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from analyzers.errors import ModelUnfit


@dataclass(frozen=True)
class Names:
    """Dotted paths. From the model: `blocks` and the final `norm`. From a block: `attention`,
    `feed_forward`, and `router` where the family has experts (blocks without one are dense).
    "a|b": some blocks have the one, some the other. Embeddings and head are the model's own
    `get_input_embeddings()` and `get_output_embeddings()`."""

    blocks: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    router: str | None = None


LLAMA_LIKE = Names()
GATED = Names(router="mlp.gate")
FAMILIES: dict[str, Names] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "cohere2": LLAMA_LIKE,
    "gpt2": Names("transformer.h", "transformer.ln_f", "attn"),
    "gpt_neox": Names("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention"),
    "falcon": Names("transformer.h", "transformer.ln_f", "self_attention"),
    # No module of its own holds OPT's feed-forward block; `fc2` is the one that gives its result.
    "opt": Names("model.decoder.layers", "model.decoder.final_layer_norm", feed_forward="fc2"),
    "mixtral": GATED,
    "qwen2_moe": GATED,
    "qwen3_moe": GATED,
    "olmoe": GATED,
    "deepseek_v3": GATED,
    "gpt_oss": Names(router="mlp.router"),
    "granitemoe": Names(feed_forward="block_sparse_moe", router="block_sparse_moe.router"),
}
# Class names of the parts of a block, for families that are not in the table. A recurrent layer or
# a convolution takes the place of attention.
ATTENTION = re.compile(r"(Attention\d*|GatedDeltaNet|Mixer|MambaLayer|ShortConv)$")
FEED_FORWARD = re.compile(r"(MLP|MoE|Moe|MoeBlock|MoEBlock|FeedForward)$")
ROUTER = re.compile(r"Top[kK]Router$")
# What the engine's masks and caches know of `config.layer_types`.
LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv"}
TAKES_DICT = re.compile(r"isinstance\((\w+ := )?attention_mask, dict\)")


@dataclass(frozen=True)
class Parts:
    """The modules themselves.

    attention, feed_forward: one module a block. Some return a tuple whose first item is the state.
    routers: block index, counted from 0 -> its router; empty for a dense model.
    cap, scale: soft-cap and factor of the family on its logits.
    mask_by_type: the forward takes {"full_attention": mask, "sliding_attention": mask}; otherwise
    one 4-D float mask goes to every block.
    window: tokens that a sliding block sees, itself included; sliding: which blocks do.
    tree: a 4-D mask with positions of one's own decides alone what a token sees and where it
    stands; false where the model adds distances of its own (ALiBi).
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    embeddings: nn.Embedding
    attention: tuple[nn.Module, ...]
    feed_forward: tuple[nn.Module, ...]
    routers: Mapping[int, nn.Module]
    cap: float | None
    scale: float
    mask_by_type: bool
    window: int | None
    sliding: tuple[bool, ...]
    tree: bool

    def readout(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab) of a hidden state (..., d_model): norm, head, scale, soft-cap."""
        logits = self.head(self.norm(hidden))
        if self.scale != 1:  # for many rows a pass over all logits is worth sparing
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def parts(model: PreTrainedModel) -> Parts:
    """Raises: ModelUnfit, with the reason, when a part cannot be found or the model attends in a
    way that the engine cannot steer."""
    config = model.config
    head = model.get_output_embeddings()
    if head is None:
        raise ModelUnfit(f"{_family(model)}: it has no head that turns states into logits.")
    if (width := getattr(config, "hidden_size", None)) is None:
        raise ModelUnfit(f"{_family(model)}: it is more than a language model.")
    if head.in_features != width:
        raise ModelUnfit(
            f"{_family(model)}: its head reads {head.in_features} numbers, "
            f"its blocks write {width}."
        )
    if not {"past_key_values", "cache_params"} & set(inspect.signature(model.forward).parameters):
        raise ModelUnfit(f"{_family(model)}: it keeps no past that the engine could hold.")
    names = FAMILIES.get(config.model_type) or _by_structure(model)
    blocks = _part(model, names.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelUnfit(f"{_family(model)}: {names.blocks} is no list of blocks.")
    by_type, window, sliding = _masks(model, len(blocks))
    return Parts(
        blocks=blocks,
        norm=_part(model, names.norm),
        head=head,
        embeddings=model.get_input_embeddings(),
        attention=tuple(_part(block, names.attention) for block in blocks),
        feed_forward=tuple(_part(block, names.feed_forward) for block in blocks),
        routers=_routers(blocks, names.router),
        cap=getattr(config, "final_logit_softcapping", None),
        scale=_scale(config),
        mask_by_type=by_type,
        window=window,
        sliding=sliding,
        tree=not getattr(config, "alibi", "alibi" in _source(model)),
    )


def attention_implementation(config: PreTrainedConfig) -> str:
    """What to load a model with: "sdpa", or "eager" where the family has no such path or caps its
    attention scores (sdpa would leave the cap out, in some families silently).

    Raises: ModelUnfit for a configuration of no known causal language model.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None:
        raise ModelUnfit(f"The architecture {config.model_type!r} is no causal language model.")
    if isinstance(family, tuple):
        family = family[0]
    capped = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if family._supports_sdpa and not capped else "eager"


def _part(of: nn.Module, path: str) -> nn.Module:
    for one in path.split("|"):
        with suppress(AttributeError):
            return of.get_submodule(one)
    raise ModelUnfit(f"The architecture does not fit: {type(of).__name__} has no module {path!r}.")


def _family(model: PreTrainedModel) -> str:
    return f"The architecture {model.config.model_type!r} does not fit"


def _routers(blocks: nn.ModuleList, path: str | None) -> dict[int, nn.Module]:
    if path is None:
        return {}
    modules = (dict(block.named_modules()).get(path) for block in blocks)
    return {index: router for index, router in enumerate(modules) if router is not None}


def _scale(config: PreTrainedConfig) -> float:
    """Granite divides its logits, Cohere multiplies them."""
    factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    return (factor or 1.0) / (divisor or 1.0)


def _masks(model: PreTrainedModel, blocks: int) -> tuple[bool, int | None, tuple[bool, ...]]:
    """`mask_by_type`, `window` and `sliding` of Parts. How a family masks is nowhere declared, so
    it is read from its source; a configuration may name a window that the family never uses."""
    source, config = _source(model), model.config
    types = getattr(config, "layer_types", None) or ("full_attention",) * blocks
    if others := set(types) - LAYER_TYPES:
        raise ModelUnfit(
            f"{_family(model)}: it has layers of type {', '.join(sorted(others))}, "
            "which the engine does not know."
        )
    window = getattr(config, "sliding_window", None) or None
    if window is None or source.count("create_sliding_window_causal_mask") < 2:  # 1 = the import
        window = None
    by_type = hasattr(config, "layer_types") and TAKES_DICT.search(source) is not None
    if by_type:
        sliding = tuple(window is not None and kind == "sliding_attention" for kind in types)
    else:
        sliding = (window is not None,) * blocks
    return by_type, window if any(sliding) else None, sliding


def _source(model: PreTrainedModel) -> str:
    return inspect.getsource(sys.modules[type(model).__module__])


def _by_structure(model: PreTrainedModel) -> Names:
    """The names of a family that is not in the table."""
    blocks = _blocks_path(model)
    parent, _, own = blocks.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    after = siblings[[name for name, _ in siblings].index(own) + 1 :]
    norm = next((name for name, module in after if "Norm" in type(module).__name__), None)
    if norm is None:
        raise ModelUnfit(f"{_family(model)}: no norm was found after its blocks.")
    modules = list(model.get_submodule(blocks).children())
    routers = (_named(block.named_modules(), ROUTER) for block in modules)
    return Names(
        blocks=blocks,
        norm=f"{parent}.{norm}" if parent else norm,
        attention=_child(model, modules, ATTENTION, "attention"),
        feed_forward=_child(model, modules, FEED_FORWARD, "feed-forward"),
        router=next((found[0] for found in routers if found), None),
    )


def _blocks_path(model: PreTrainedModel) -> str:
    base = model.base_model
    count = model.config.num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(module is inner for inner in base.modules())
        and not re.search(r"\.\d+\.", name)  # lists inside a block: experts, projections
    ]
    if len(found) != 1:
        raise ModelUnfit(
            f"{_family(model)}: {len(found)} lists of {count} blocks were found, one is needed."
        )
    return found[0]


def _child(
    model: PreTrainedModel, blocks: list[nn.Module], pattern: re.Pattern[str], what: str
) -> str:
    names = []
    for block in blocks:
        found = _named(block.named_children(), pattern)
        if len(found) != 1:
            raise ModelUnfit(
                f"{_family(model)}: {len(found)} {what} modules were found in a block, "
                "one is needed."
            )
        names += found
    return "|".join(dict.fromkeys(names))


def _named(modules: Iterable[tuple[str, nn.Module]], pattern: re.Pattern[str]) -> list[str]:
    return [name for name, module in modules if pattern.search(type(module).__name__)]
