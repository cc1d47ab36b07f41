"""What quantization costs the default model in quality, on a few passages of plain English.

Measures with teacher forcing, passage by passage: perplexity (the exponential of the mean negative
log-likelihood of a token in nats), how often the likeliest next token is none that the bfloat16
model has in the first place there (where its logits are exactly equal, any of them counts), and how
many of those places were near-ties. Two texts: the ordinary one,
plain sentences and answers as the model is used for, has the targets; the hard one, of odd and
surprising sentences, is full of near-ties and tells more about rounding than about quality. Both
were written for this folder, so no model has read them before. They are short: half a percent of
perplexity means nothing, nor do 0.4 percent of the tokens.
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from analyzers.engine import builtin
from analyzers.engine.loading import DEFAULT
from analyzers.engine.quantization import bnb_config, quantize
from analyzers.home import models_folder
from app.bench import Progress, Row, row

ABOUT = "perplexity and agreement of each quantization, against bfloat16"
PASSAGES = Path(__file__).with_name("passages.txt")
HARD = Path(__file__).with_name("passages-hard.txt")
CHAT = "[chat]"
"""First line of a passage that is a chat: the next line is the question, the rest the answer."""
BASE = "bfloat16"
PERPLEXITY_TARGET = 1.01
DISAGREEMENT_TARGET = 3.0
"""Percent of the tokens, for int8 as it is used: computing in bfloat16."""
TARGETED = "int8, bfloat16"
NEAR_TIE = 0.25
"""A near-tie: the two highest logits of the base are closer than this. Rounding to bfloat16 alone
moves logits as far."""

Load = Callable[[Path], PreTrainedModel]


@dataclass(frozen=True, eq=False)
class Passage:
    """ids: (1, tokens); first: where judging begins (1 = all that something stands before)."""

    ids: torch.Tensor
    first: int


@dataclass(frozen=True, eq=False)
class Reading:
    """perplexity: of all passages together. At every judged place: best, the likeliest next token,
    and margin, how far its logit is above the second, both (places,); firsts, all tokens that
    share the first place. In bfloat16 that happens: near 20, logits are an eighth apart."""

    perplexity: float
    best: torch.Tensor
    margin: torch.Tensor
    firsts: list[set[int]]


def measure(
    progress: Progress, *, folder: Path | None = None, texts: Mapping[str, str] | None = None
) -> list[Row]:
    """`folder`: a model's safetensors and tokenizer; `texts`: by name, with blank lines between
    passages; the one without a name has the targets."""
    where = folder or builtin.ensure(DEFAULT, models_folder(), lambda what, share: None)
    if texts is None:
        texts = {"": PASSAGES.read_text(encoding="utf-8"), "hard": HARD.read_text(encoding="utf-8")}
    tokenizer = AutoTokenizer.from_pretrained(where)
    passages = {name: _passages(tokenizer, text) for name, text in texts.items()}
    tokens = sum(each.ids.shape[1] for part in passages.values() for each in part)
    readings: dict[str, dict[str, Reading]] = {name: {} for name in texts}
    for way, load in WAYS.items():
        progress(f"Reading {tokens:,} tokens with {way}")
        model = load(where)
        for name, part in passages.items():
            readings[name][way] = _read(model, part)
        del model  # before the next is loaded
        gc.collect()
    return [each for name in texts for way in WAYS for each in _rows(way, name, readings[name])]


def _rows(way: str, text: str, readings: Mapping[str, Reading]) -> list[Row]:
    base, found = readings[BASE], readings[way]
    targeted = way == TARGETED and not text
    title = f"{way}, {text} text" if text else way
    differs = torch.tensor(
        [best not in firsts for best, firsts in zip(found.best.tolist(), base.firsts, strict=True)]
    )
    ties = base.margin[differs] < NEAR_TIE
    rows = [
        row(
            f"{title}: perplexity",
            found.perplexity,
            "",
            baseline=base.perplexity,
            target=PERPLEXITY_TARGET if targeted else None,
            n=len(differs),
        ),
        row(
            f"{title}: another likeliest token",
            100 * float(differs.double().mean()),
            "%",
            target=DISAGREEMENT_TARGET if targeted else None,
            n=len(differs),
        ),
        row(
            f"{title}: another than the first of exact ties",
            100 * float((found.best != base.best).double().mean()),
            "%",
            n=len(differs),
        ),
    ]
    if len(ties):
        share = 100 * float(ties.double().mean())
        rows.append(row(f"{title}: near-ties among these", share, "%", n=len(ties), better="more"))
    return rows


def _passages(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Passage]:
    return [_passage(tokenizer, part) for part in text.strip().split("\n\n")]


def _passage(tokenizer: PreTrainedTokenizerBase, text: str) -> Passage:
    """Of a chat only the answer, with the token that ends it, is judged: what stands before it is
    mostly the template's."""
    if not text.startswith(f"{CHAT}\n"):
        return Passage(tokenizer(text, return_tensors="pt")["input_ids"], first=1)
    _, question, answer = text.split("\n", 2)
    turn = {"role": "user", "content": question}
    asked = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Passage(torch.tensor([[*before, *after, tokenizer.eos_token_id]]), first=len(before))


@torch.inference_mode()
def _read(model: PreTrainedModel, passages: list[Passage]) -> Reading:
    surprise, best, margin, firsts = [], [], [], list[set[int]]()
    for each in passages:
        # float32: the tail of the softmax vanishes in bfloat16.
        logits = model(input_ids=each.ids.to(model.device)).logits[0, each.first - 1 : -1].float()
        wanted = each.ids[0, each.first :].to(logits.device)
        surprise.append(F.cross_entropy(logits, wanted, reduction="none"))
        two = logits.topk(2)
        best.append(two.indices[:, 0])
        margin.append(two.values[:, 0] - two.values[:, 1])
        tops = logits == two.values[:, :1]
        firsts += [set(top.nonzero()[:, 0].tolist()) for top in tops]
    perplexity = math.exp(float(torch.cat(surprise).mean()))
    return Reading(perplexity, torch.cat(best), torch.cat(margin), firsts)


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
