"""A tuned lens: what a layer's state becomes before it is read as if it were the last one.

Source: Belrose et al. 2023 (arXiv:2303.08112), and the layout of the tuned-lens project: a linear
        map "{i}.weight" (d_model, d_model) and "{i}.bias" (d_model,) for the input of block i,
        which is the state of layer i here. That project's own params.pt is a pickle, which is not
        opened; the same names are expected in a safetensors file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from analyzers.errors import BadParameter


@dataclass(frozen=True, eq=False)
class TunedLens:
    """maps: layer -> (A (d_model, d_model), b (d_model,)), float32."""

    maps: Mapping[int, tuple[torch.Tensor, torch.Tensor]]

    def translate(self, hidden: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """h + A h + b of states (tokens, layers, d_model), float32; a layer without a map stays."""
        states = hidden.float().clone()
        for place, layer in enumerate(layers):
            if layer in self.maps:
                states[:, place] += torch.nn.functional.linear(states[:, place], *self.maps[layer])
        return states


def read(file: str, layers: Sequence[int], d_model: int) -> TunedLens:
    """The maps of these layers from a safetensors file.

    Raises: BadParameter when the file is not there, cannot be read, lacks one of them, or was made
    for a model of another size."""
    maps = {}
    try:
        with safe_open(Path(file).expanduser(), framework="pt") as tensors:
            kept = set(tensors.keys())
            for layer in layers:
                for name in (f"{layer}.weight", f"{layer}.bias"):
                    if name not in kept:
                        raise BadParameter(f"The tuned lens in {file} has no {name}.")
                weight = tensors.get_tensor(f"{layer}.weight").float()
                bias = tensors.get_tensor(f"{layer}.bias").float()
                _check(file, f"{layer}.weight", weight, (d_model, d_model))
                _check(file, f"{layer}.bias", bias, (d_model,))
                maps[layer] = (weight, bias)
    except (OSError, SafetensorError) as error:
        raise BadParameter(f"The tuned lens in {file} could not be read ({error}).") from error
    return TunedLens(maps)


def _check(file: str, name: str, found: torch.Tensor, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise BadParameter(
            f"The tuned lens in {file} is for another model: {name} is {_by(found.shape)}, "
            f"this model needs {_by(shape)}."
        )
    if not found.isfinite().all():
        raise BadParameter(f"The tuned lens in {file} has numbers that are not finite in {name}.")


def _by(shape: Sequence[int]) -> str:
    return " by ".join(map(str, shape)) or "a single number"
