"""The signals of one token, from one pass over its distribution.

Everything in float32 from the raw logits (the tail of the softmax vanishes in bf16), rounded to six
decimals: more than float32 carries through a forward, and a third of the size in the database.
"""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from analyzers.engine.values import Step
from analyzers.trace import Alternative, Origin, Token

if TYPE_CHECKING:
    from analyzers.engine.core import Engine

TOP = 10
DIGITS = 6


def token(
    engine: "Engine",
    step: Step,
    id: int,
    *,
    origin: Origin = "sampled",
    p_sampled: float | None = 1.0,
) -> Token:
    """The Token event for writing `id` at `step`. p_sampled: 1 when chosen greedily."""
    size = engine.vocabulary.size
    best, ids = step.raw[:size].topk(min(TOP, size))
    # Below the likeliest, so that the sums keep their digits. All comes from one softmax:
    # log p = below - total, and entropy = -sum p log p.
    below = step.raw - best[0]
    p = torch.softmax(below, dim=-1)
    total = -p[ids[0]].log()
    rank = (below > below[id]).sum() + 1.0
    written, spread, place = torch.stack([below[id] - total, total - p.dot(below), rank]).tolist()
    values = (best - best[0] - total).tolist()
    return Token(
        pos=step.pos,
        id=id,
        text=engine.vocabulary.piece(step.before, id),
        bytes=engine.vocabulary.raw(id).hex(),
        logprob=round(written, DIGITS),
        entropy=round(max(spread, 0.0), DIGITS),
        rank=int(place),
        margin=round(_margin(values), DIGITS),
        p_sampled=None if p_sampled is None else round(p_sampled, DIGITS),
        top=tuple(
            (other, engine.vocabulary.display(other), round(value, DIGITS))
            for other, value in zip(ids.tolist(), values, strict=True)
        ),
        origin=origin,
    )


def first_token(engine: "Engine", id: int) -> Token:
    """The first token of a text that is read: nothing precedes it, so it has no numbers."""
    return Token(
        pos=0,
        id=id,
        text=engine.vocabulary.piece((), id),
        bytes=engine.vocabulary.raw(id).hex(),
        logprob=None,
        entropy=None,
        rank=None,
        margin=None,
        p_sampled=None,
        top=(),
        origin="read",
    )


def instead(engine: "Engine", before: Sequence[int], written: Token, id: int) -> Token:
    """`written` replaced by one of its own alternatives: same place, same distribution, forced.

    Raises: KeyError if `id` is not among them."""
    alternatives: dict[int, Alternative] = {entry[0]: entry for entry in written.top}
    logprob = alternatives[id][2]
    return Token(
        pos=written.pos,
        id=id,
        text=engine.vocabulary.piece(before, id),
        bytes=engine.vocabulary.raw(id).hex(),
        logprob=logprob,
        entropy=written.entropy,
        rank=1 + sum(value > logprob for _, _, value in written.top),
        margin=written.margin,
        p_sampled=None,
        top=written.top,
        origin="forced",
    )


def draw(step: Step, rng: random.Random) -> tuple[int, float]:
    """Sample an id from the processed distribution, and its probability there."""
    probabilities = torch.softmax(step.logits, dim=-1, dtype=torch.float64)
    edges = probabilities.cumsum(dim=-1)
    # Times the last edge: the sum is not exactly 1, and the draw must stay inside.
    id = int(torch.searchsorted(edges, rng.random() * float(edges[-1]), right=True))
    return id, float(probabilities[id])


def chosen(engine: "Engine", step: Step, rng: random.Random, temperature: float) -> Token:
    """The Token that a step's processed logits choose: the likeliest at temperature 0, otherwise
    one that is drawn from them."""
    if temperature == 0:
        return token(engine, step, int(step.logits.argmax()))
    id, p = draw(step, rng)
    return token(engine, step, id, p_sampled=p)


def _margin(logprobs: Sequence[float]) -> float:
    """Between the two likeliest, as probabilities; logprobs: likeliest first."""
    if len(logprobs) < 2:
        return 1.0
    return math.exp(logprobs[0]) - math.exp(logprobs[1])
