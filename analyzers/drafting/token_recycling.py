"""Token recycling: what the model once thought of as next is drafted when the same token returns.

Source: Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language
        Models with Token Recycling", arXiv:2408.08696 (ACL 2025); Luowaterbi/TokenRecycling.
Idea:   a matrix holds for every token of the vocabulary the eight tokens that were likeliest the
        last time the model looked behind it. They are its drafts, theirs the drafts behind them,
        and so on in a tree; and every row that checking the tree yields, of rejected drafts as
        well, goes back into the matrix.
Differs from the source: the matrix may begin with the model's own answer to what follows each of
        its commonest tokens, asked for once; zeros in the source, for which it then drafts token 0
        (here a token without successors has no drafts). What followed the same words earlier in
        the text is drafted as well, in the same tree. The tree grows by the slots that came true
        most often and only as far as pays by the cost table; `drafts` "template" is the source's
        own tree of 80 nodes, of which the likeliest are taken (all of them with `budget` 80 and not
        `fit`). Drafts may be sampled from: the source is greedy whatever it is told. The prompt's
        logits are recycled where asked for, never in the source. Measured on 120 prompts of
        Spec-Bench with the default model, tokens a pass: 1.80 as it is by default, with 7 tokens
        drafted at a time; 1.62 from an empty matrix; 1.30 by recycling alone, 1.45 with the prompt.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from analyzers.card import Card
from analyzers.common.acceptance import follow
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.lookup import Finds, Lookup, Slot, Weighed
from analyzers.common.speculation import Drafted, write
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Tree
from analyzers.params import knob
from analyzers.task import Task, chat
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "Token recycling",
    family="drafting",
    source="Luo et al. 2024, arXiv:2408.08696 (ACL 2025); Luowaterbi/TokenRecycling",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)

NAME = "token_recycling"
Matrix = NDArray[np.int32]
"""(vocab, k): likely successors of every token, best first; UNKNOWN where none were seen."""
K = 8
UNKNOWN = -1
NGRAM = 4
"""Longest run of tokens that is looked up; a longer one adds nothing."""
COMMON = 8192
"""Tokens that the model is asked about: merges are numbered by how common they are, and of the
answers to Spec-Bench 87 % of the tokens are below this."""
SECONDS = 6.0
"""Of asking, at most, by the cost table."""
ASKED_WITHOUT_TABLE = 1024
AT_ONCE = 256

PATHS = """
0 1 2 3 4 5 6 7
00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70
000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500
0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000
00000 00001 00002 00010 00020 00100 01000 10000
000000 000001 000100
"""
TEMPLATE = frozenset(tuple(map(int, path)) for path in PATHS.split())
"""The source's tree 2.2.2, as ranks along each path."""

LOOKED_UP = ((0.18, 0.05, 0.03), (0.46, 0.11, 0.04), (0.65, 0.15, 0.05), (0.79, 0.21, 0.20))
"""How often what was looked up came true though the matrix did not have it, by tokens that agreed
(1, 2, 3, more) and by how many other continuations were preferred; the default model on Spec-Bench,
greedy."""
RECYCLED = (0.10, 0.05, 0.03, 0.026, 0.018, 0.013, 0.010, 0.010)
"""How often each rank of a row came true though it was not looked up."""
RECYCLED_ALONE = (0.215, 0.069, 0.041, 0.032, 0.023, 0.017, 0.014, 0.014)
"""The same where nothing is looked up."""
RANKED = tuple(Slot(rank=rank) for rank in range(K))


@dataclass(frozen=True)
class Params(Drafted):
    """Defaults are ours, from the same measurement; see the module for the source's own."""

    drafts: Literal["looked up and recycled", "recycled", "template"] = knob(
        "looked up and recycled", "What to draft; the last is the tree of the paper"
    )
    start: Literal["hot", "model", "cold"] = knob(
        "hot", "The matrix begins with earlier runs, the model's own successors, or empty"
    )
    budget: int = knob(16, "Most tokens to draft at once", lo=1, hi=256, unit="tokens")
    fit: bool = knob(True, "Draft only as much as pays by the cost table of this machine")
    prompt: bool = knob(False, "Recycle the prompt's logits as well: a slower start")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree and its Tokens a step, and at the end how many rows of the matrix are
    known; return why the text ended.

    A run from a "hot" matrix leaves it to the next one, when it comes to its end; what it writes
    does not depend on it, how fast it does.
    """
    yield from task.written
    matrix, said = _begun(engine, params, ctx)
    yield Note("info", said)
    cursor = _read(engine, task, params, ctx, matrix)
    drafter = Recycling(matrix, params, ctx)
    why = yield from write(engine, cursor, task, params, ctx, drafter, follow)
    if params.start == "hot":
        ctx.artifacts.put(NAME, "matrix", matrix.tobytes())
    yield Metric("rows of the matrix", cursor.pos, known(matrix), "tokens")
    return why


class Recycling:
    """The drafter. It changes the matrix that it is given."""

    drawn: Drawn = "deterministic"

    def __init__(self, matrix: Matrix, params: Params, ctx: Context) -> None:
        self._matrix = matrix
        self._drafts = params.drafts
        self._looks_up = params.drafts == "looked up and recycled"
        self._lookup = Lookup(NGRAM)
        prior = both if self._looks_up else alone
        self._weighed = Weighed(prior, params.budget, ctx.cost if params.fit else None)

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """Grow a tree from the rows of the matrix, and from the text."""
        if self._looks_up:
            self._lookup.read(text)
        last = text[-1]

        def search(ids: tuple[int, ...], slots: tuple[Slot, ...]) -> Finds:
            found = self._lookup.after(ids) if self._looks_up else {}
            ranks = tuple(slot.rank for slot in slots)
            for rank, id in enumerate(self._matrix[ids[-1] if ids else last].tolist()):
                if id == UNKNOWN:
                    break
                if self._drafts != "template" or (*ranks, rank) in TEMPLATE:
                    here = found.get(id)
                    found[id] = here._replace(rank=rank) if here else RANKED[rank]
            return found

        return self._weighed.draft(search, depth)

    def learn(self, outcome: Outcome) -> None:
        """Recycle what the target said behind the root and behind every node."""
        self._weighed.learn(outcome)
        ids = [outcome.text[-1], *outcome.draft.tree.ids]
        recycle(self._matrix, ids, outcome.checked.raw)


def recycle(matrix: Matrix, ids: Sequence[int], raw: torch.Tensor) -> None:
    """Write the likeliest tokens by raw (tokens, vocab or more) into the rows of `ids` (tokens,);
    where a token comes twice the last one counts."""
    best = raw[:, : len(matrix)].topk(matrix.shape[1]).indices.to("cpu", torch.int32)
    matrix[list(ids)] = best.numpy()  # numpy: of repeated indices the last one is assigned


def successors(engine: Engine, count: int) -> Matrix:
    """What the model says follows each of its first `count` tokens at the beginning of a text.

    One after the other would take as many passes: as children of one root they share some. Polls
    stop between passes."""
    matrix = _empty(engine)
    # Behind whatever this model begins texts with: what stands first in a text says nothing.
    begin = engine.encode(Task(chat("\n") if engine.can_chat else "\n"))[:1]
    cursor = engine.prefill(begin)
    for first in range(0, count, AT_ONCE):
        ids = range(first, min(first + AT_ONCE, count))
        checked = engine.verify(cursor, Tree(tuple(ids), (-1,) * len(ids)))
        recycle(matrix, ids, checked.raw[1:])
        engine.progress(ids.stop, count)
    return matrix


def known(matrix: Matrix) -> int:
    """Tokens whose successors are known."""
    return int((matrix[:, 0] != UNKNOWN).sum())


def both(slot: Slot) -> float:
    """The chance of a slot before this run has shown another one: as if looking up and recycling
    came true independently, which is close to what was measured."""
    looked_up = LOOKED_UP[min(slot.match, NGRAM) - 1][slot.recent] if slot.match else 0.0
    recycled = RECYCLED[slot.rank] if slot.rank >= 0 else 0.0
    return 1 - (1 - looked_up) * (1 - recycled)


def alone(slot: Slot) -> float:
    """The same where nothing is looked up."""
    return RECYCLED_ALONE[slot.rank]


def _begun(engine: Engine, params: Params, ctx: Context) -> tuple[Matrix, str]:
    """The matrix as the run begins with it, and what to say of it."""
    if params.start == "cold":
        return _empty(engine), "The matrix of successors begins empty."
    if params.start == "hot" and (matrix := _kept(engine, ctx, "matrix")) is not None:
        return matrix, f"The matrix of earlier runs knows successors of {known(matrix):,} tokens."
    if (matrix := _kept(engine, ctx, "successors")) is None:
        matrix = successors(engine, _affordable(engine, ctx))
        ctx.artifacts.put(NAME, "successors", matrix.tobytes())
    return matrix, f"The model was asked once what follows each of {known(matrix):,} tokens."


def _kept(engine: Engine, ctx: Context, name: str) -> Matrix | None:
    """A matrix of an earlier run; a copy, which may be changed."""
    if (found := ctx.artifacts.get(NAME, name)) is None:
        return None
    return np.frombuffer(found[0], np.int32).reshape(engine.vocabulary.size, -1).copy()


def _affordable(engine: Engine, ctx: Context) -> int:
    """How many tokens to ask the model about."""
    most = min(COMMON, engine.vocabulary.size)
    return min(most, int(SECONDS * ctx.cost.prefill) if ctx.cost else ASKED_WITHOUT_TABLE)


def _empty(engine: Engine) -> Matrix:
    size = engine.vocabulary.size
    return np.full((size, min(K, size)), UNKNOWN, dtype=np.int32)


def _read(engine: Engine, task: Task, params: Params, ctx: Context, matrix: Matrix) -> Cursor:
    """A cursor behind the prompt, which is recycled where asked for; then all of it is computed,
    even where an earlier run has it still."""
    ids = engine.encode(task)
    if not params.prompt:
        return ctx.begin(engine, ids)
    cursor = engine.start()
    before = None
    for id, step in engine.read(cursor, ids):
        if step is not None and before is not None:
            recycle(matrix, [before], step.raw[None])
        before = id
    return cursor
