"""Attention: where every head of every layer looked from one token of the text.

Source: Vaswani et al. 2017 (arXiv:1706.03762); Bahdanau et al. 2015 for reading it as a picture.
Idea:   while a model reads a token, each head of each layer divides a weight of 1 among that token
        and those before it. Shown are these weights, a head at a time, averaged over the heads of a
        layer, and averaged over everything. What follows the token was decided with these looks.
Differs from the source: nothing is computed otherwise. Of long texts only the tokens with the most
        attention are kept, and of a single head those with at least a thousandth; both are said.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch

from analyzers.card import Card
from analyzers.context import Context
from analyzers.engine import Engine, first_token, token
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Note, Scores, Token

CARD = Card(
    "Attention",
    family="inspection",
    source="Vaswani et al. 2017, arXiv:1706.03762",
    emits=(Token, Scores, Note),
    needs=("logits", "attention"),
    starts_as="raw",
    example="The capital of France is",
)

KEPT = 256
"""Positions that are kept of a longer text."""
DIGITS = 4
LEAST = 0.001
"""Smaller shares of a single head are left out: a text has one for each layer, head and token."""


@dataclass(frozen=True)
class Params:
    """The last token by default: the look that decides what comes next."""

    at: int = knob(1, "Whose look: counted from the end, 1 = last token", lo=1, hi=8192)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the Tokens of the text (prompt, begun answer, tokens of an earlier run), then Scores at
    the position that looked; return why it ended.

    Scores: shares of 1, over positions up to its own: "attention, all layers" (the mean),
    "attention of layer L" (mean over its heads; L from 1), "attention of layer L, head H" (H from
    1). They add up to less than 1 where positions were left out, and in families whose heads have
    sinks beside the text.
    Raises: BadParameter when the text has no such token; OutOfContext; ModelLacks.
    """
    ids = engine.encode(task)
    if params.at > len(ids):
        raise BadParameter(f"at is {params.at}, but the text has only {len(ids)} tokens.")
    cursor = engine.start()
    ctx.cursors.append(cursor)
    for id, step in engine.read(cursor, ids[: len(ids) - len(task.written)]):
        if step is None:
            yield first_token(engine, id)
        else:
            yield token(engine, step, id, origin="read", p_sampled=None)
    yield from task.written
    engine.extend(cursor, [entry.id for entry in task.written])
    pos = len(ids) - params.at
    found = engine.attention(cursor, pos)  # (layers, heads, pos + 1)
    over = _most(found.mean((0, 1)), KEPT)
    yield Note(
        "info",
        "Attention says where information could flow from, not why the model wrote what it wrote "
        "(Jain and Wallace 2019; Wiegreffe and Pinter 2019); and the first token often takes much "
        "of it without meaning anything (Xiao et al. 2023).",
    )
    if len(over) <= pos:
        yield Note(
            "info",
            f"The text has {pos + 1:,} tokens up to here; kept are the {len(over)} with the most "
            f"attention, {found.mean((0, 1))[over].sum():.1%} of it.",
        )
    yield _scores(pos, "attention, all layers", over, found.mean((0, 1)))
    for layer, heads in enumerate(found, start=1):
        yield _scores(pos, f"attention of layer {layer}", over, heads.mean(0))
        for head, shares in enumerate(heads, start=1):
            seen = [place for place in over if shares[place] >= LEAST]
            yield _scores(pos, f"attention of layer {layer}, head {head}", seen, shares)
    return "looked"


def _most(shares: torch.Tensor, count: int) -> list[int]:
    """The positions with the largest shares (positions,), in the order of the text."""
    found: list[int] = shares.topk(min(count, len(shares))).indices.sort().values.tolist()
    return found


def _scores(pos: int, name: str, over: list[int], shares: torch.Tensor) -> Scores:
    values = tuple(round(value, DIGITS) for value in shares[over].tolist())
    return Scores(pos, name, "share", tuple(over), values)
