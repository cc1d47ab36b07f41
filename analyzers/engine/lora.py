"""LoRA adapters: read from PEFT's files, added where they belong for the calls that name them.

Source: Hu et al. 2021 (arXiv:2106.09685): W x + (alpha / r) B A x; file format of PEFT
(adapter_config.json and adapter_model.safetensors). rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732) divides by sqrt(r) instead of r. Anything else in the files (DoRA, trained biases,
whole modules, ranks or alphas of single modules) is refused rather than left out.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from analyzers.errors import ModelBroken, ModelNotFound, ModelUnfit

PREFIX = "base_model.model."
# Settings that ask for more than W x + scale B A x.
BEYOND = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


@dataclass(frozen=True, eq=False)
class Adapter:
    """name: of the folder. pairs: dotted name of a module -> (A (r, in), B (out, r)), float32.
    scale: what B A x is multiplied by."""

    name: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    def delta(self, module: str, states: torch.Tensor) -> torch.Tensor | None:
        """What is added to the module's output (..., out); None where it has no pair."""
        if (pair := self.pairs.get(module)) is None:
            return None
        a, b = (matrix.to(states) for matrix in pair)
        return self.scale * (states @ a.T) @ b.T


def read_adapter(folder: str, model: nn.Module) -> Adapter:
    """The adapter in PEFT's `folder`, checked against the modules of `model`.

    Raises: ModelNotFound without the two files; ModelBroken when they cannot be read or hold
    numbers that are not finite; ModelUnfit when the adapter is of another kind or does not match
    the model."""
    path = Path(folder).expanduser()
    settings_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not settings_file.is_file() or not weights_file.is_file():
        raise ModelNotFound(
            f"There is no LoRA adapter in {folder}: it needs adapter_config.json and "
            "adapter_model.safetensors."
        )
    try:
        settings = dict(json.loads(settings_file.read_text(encoding="utf-8")))
        tensors = load_file(weights_file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelBroken(f"The adapter in {folder} could not be read ({error}).") from error
    if settings.get("peft_type") != "LORA" or any(settings.get(more) for more in BEYOND):
        raise ModelUnfit(f"The adapter in {folder} is not a plain LoRA adapter.")
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelBroken(
            f"The adapter in {folder} does not say its rank r and its lora_alpha."
        ) from error
    pairs = {}
    for key in tensors:
        name, found, side = key.removeprefix(PREFIX).partition(".lora_")
        if side not in ("A.weight", "B.weight") or f"{PREFIX}{name}{found}A.weight" not in tensors:
            raise ModelUnfit(f"The adapter in {folder} is not a plain LoRA adapter: it has {key}.")
        b = tensors.get(f"{PREFIX}{name}{found}B.weight")
        if side == "A.weight":
            pairs[name] = _fitting(name, tensors[key], b, rank, model)
    if not pairs:
        raise ModelUnfit(f"The adapter in {folder} holds no LoRA matrices.")
    return Adapter(path.name, pairs, scale)


def _fitting(
    name: str, a: torch.Tensor, b: torch.Tensor | None, rank: int, model: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelUnfit(f"The adapter changes {name}, which this model does not have.") from None
    # GPT-2's Conv1D is a linear layer that calls its sizes nx and nf.
    inner = getattr(module, "in_features", getattr(module, "nx", None))
    outer = getattr(module, "out_features", getattr(module, "nf", None))
    if b is None or a.shape != (rank, inner) or b.shape != (outer, rank):
        raise ModelUnfit(f"The adapter's matrices for {name} do not have the model's sizes.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelBroken(f"The adapter's matrices for {name} are not finite.")
    return a.float(), b.float()


def wrap(model: nn.Module, adapter: Adapter, active: Callable[[], Adapter | None]) -> None:
    """Let every module that `adapter` changes look at the `active` one in each pass."""
    for name in adapter.pairs:
        module: Any = model.get_submodule(name)
        if not hasattr(module, "plain_forward"):
            module.plain_forward = module.forward
            module.forward = _with_adapter(name, module.plain_forward, active)


def _with_adapter(
    name: str, forward: Callable[[torch.Tensor], torch.Tensor], active: Callable[[], Any]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def adapted(states: torch.Tensor) -> torch.Tensor:
        output = forward(states)
        adapter = active()
        delta = adapter.delta(name, states) if adapter else None
        return output if delta is None else output + delta

    return adapted
