"""LoRA adapters: read from PEFT's files, added where they belong for the calls that name them.

Source: Hu et al. 2021 (arXiv:2106.09685): W x + (alpha / r) B A x; file format of PEFT
(adapter_config.json and adapter_model.safetensors). rsLoRA divides by sqrt(r) instead of r.
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
    """Raises: ModelNotFound without the two files; ModelBroken when they cannot be read;
    ModelUnfit when the adapter is of another kind or does not match the model."""
    path = Path(folder).expanduser()
    settings_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not settings_file.is_file() or not weights_file.is_file():
        raise ModelNotFound(
            f"There is no LoRA adapter in {folder}: it needs adapter_config.json and "
            "adapter_model.safetensors."
        )
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        tensors = load_file(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelBroken(f"The adapter in {folder} could not be read ({error}).") from error
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        raise ModelUnfit(f"The adapter in {folder} is not a plain LoRA adapter.")
    pairs = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors.get(key.replace(".lora_A.", ".lora_B."))
            pairs[name] = _fitting(name, tensors[key], b, model)
    if not pairs:
        raise ModelUnfit(f"The adapter in {folder} holds no LoRA matrices.")
    rank = int(settings["r"])
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapter(path.name, pairs, float(scale))


def _fitting(
    name: str, a: torch.Tensor, b: torch.Tensor | None, model: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelUnfit(f"The adapter changes {name}, which this model does not have.") from None
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if b is None or (a.shape[1], b.shape[0]) != sizes:
        raise ModelUnfit(f"The adapter's matrices for {name} do not have the model's sizes.")
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
