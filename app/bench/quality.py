"""What quantization costs the default model in quality, on a few passages of plain English.

Two measures with teacher forcing, passage by passage: perplexity (the exponential of the mean
negative log-likelihood of a token in nats), and how often the likeliest next token is not the one
that the bfloat16 model has there. The passages were written for this file, so no model has read
them before; they are short, and differences below about half a percent mean nothing.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from analyzers.engine import builtin
from analyzers.engine.loading import DEFAULT
from analyzers.engine.quantization import bnb_config, quantize
from analyzers.home import models_folder
from app.bench import Progress, Row, row

ABOUT = "perplexity and agreement of each quantization, against bfloat16"
PASSAGES = Path(__file__).with_name("passages.txt")
BASE = "bfloat16"
PERPLEXITY_TARGET = 1.01
DISAGREEMENT_TARGET = 3.0
"""Percent of the tokens, for int8 as it is used: computing in bfloat16."""
TARGETED = "int8, bfloat16"

Load = Callable[[Path], PreTrainedModel]


@dataclass(frozen=True)
class Reading:
    """perplexity: of all passages together; best: the likeliest next token at every place."""

    perplexity: float
    best: torch.Tensor


def measure(
    progress: Progress, *, folder: Path | None = None, passages: str | None = None
) -> list[Row]:
    """`folder`: a model's safetensors and tokenizer; `passages`: text, with blank lines between."""
    where = folder or builtin.ensure(DEFAULT, models_folder(), lambda what, share: None)
    text = PASSAGES.read_text(encoding="utf-8") if passages is None else passages
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = [tokenizer(part, return_tensors="pt")["input_ids"] for part in text.split("\n\n")]
    readings = {}
    for name, load in WAYS.items():
        progress(f"Reading {sum(part.shape[1] for part in ids):,} tokens with {name}")
        readings[name] = _read(load(where), ids)
        gc.collect()
    return [each for name in readings for each in _rows(name, readings)]


def _rows(name: str, readings: dict[str, Reading]) -> list[Row]:
    base, found = readings[BASE], readings[name]
    targeted = name == TARGETED
    n = len(found.best)
    other = 100 * float((found.best != base.best).double().mean())
    return [
        row(
            f"{name}: perplexity",
            found.perplexity,
            "",
            baseline=base.perplexity,
            target=PERPLEXITY_TARGET if targeted else None,
            n=n,
        ),
        row(
            f"{name}: another likeliest token",
            other,
            "%",
            target=DISAGREEMENT_TARGET if targeted else None,
            n=n,
        ),
    ]


@torch.inference_mode()
def _read(model: PreTrainedModel, passages: list[torch.Tensor]) -> Reading:
    surprise, best = [], []
    for ids in passages:
        # float32: the tail of the softmax vanishes in bfloat16.
        logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float()
        surprise.append(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none"))
        best.append(logits.argmax(-1))
    return Reading(math.exp(float(torch.cat(surprise).mean())), torch.cat(best))


# Ways to load


def _plain(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def _int8(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = _plain(folder, dtype)
    quantize(model)
    return model


def _bnb(folder: Path, kind: Any) -> PreTrainedModel:
    config = bnb_config(kind, torch.bfloat16, double=True)
    return _plain(folder, torch.bfloat16, quantization_config=config)


WAYS: dict[str, Load] = {
    "float32": partial(_plain, dtype=torch.float32),
    BASE: partial(_plain, dtype=torch.bfloat16),
    "int8, float32": partial(_int8, dtype=torch.float32),
    TARGETED: partial(_int8, dtype=torch.bfloat16),
    "nf4": partial(_bnb, kind="nf4"),
    "fp4": partial(_bnb, kind="fp4"),
    "int8-bnb": partial(_bnb, kind="int8-bnb"),
}
