"""Superposed drafts: several quick guesses at the answer beside it, which nothing has checked.

Source: Shen et al. 2024, arXiv:2405.18400, whose drafts share one pass a step.
Idea:   the drafts of `superposed` are shown as lanes beside the greedy answer. Unlike every other
        method here they are not verified: each lane is what a sum of word embeddings led to, and
        is labelled so. How long each agrees with the answer says what its words are worth as
        drafts: that many would have been accepted.
Differs from the source: it has no such comparison. Every lane is read once more by itself, so that
        the numbers of its tokens are the model's true ones and not what was believed of them.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq

from analyzers.card import Card
from analyzers.common.superposition import Draft, Superposing, corpus, grow
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, token
from analyzers.task import Task
from analyzers.trace import Event, Metric, Note, Token

CARD = Card(
    "Superposed drafts (unverified)",
    family="drafting",
    source="Shen et al. 2024, arXiv:2405.18400; RAIVNLab/SuperposedDecoding",
    emits=(Token, Metric, Note),
    needs=("logits", "layers"),
    starts_as="raw",
    example="The best thing about living near the sea is",
)
Drafts = tuple[list[Draft], list[Draft]]
"""Those that go on, and those that ended."""


@dataclass(frozen=True)
class Params(Superposing):
    """Those of superposing; the answer is greedy and as long as the drafts."""


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer, then the Tokens of each draft in a lane of its own, and a Metric a
    draft: how many of its first tokens the answer has as well. Return why the answer ended.

    Raises: BadParameter for a file that cannot be read.
    """
    yield from task.written
    ngrams, said = corpus(engine, params, ctx)
    cursor = ctx.begin(engine, engine.encode(task))
    if cursor.pos == engine.context:
        return "context full"
    yield Note("info", said)
    yield Note("warning", "The drafts beside the answer are unverified: nothing checked them.")
    before = engine.fork(cursor)
    answer, why = yield from _greedy(engine, cursor, params.max_new)
    drafts, finished = _quietly(grow(engine, before, params, ngrams))
    best = sorted([*finished, *drafts], key=lambda draft: -draft.score / len(draft.ids))
    for number, draft in enumerate(best[: params.k], start=1):
        lane = f"draft {number}, unverified"
        for id, step in engine.read(engine.fork(before), draft.ids):
            assert step is not None  # a prompt precedes it
            yield replace(token(engine, step, id, origin="drafted", p_sampled=None), lane=lane)
        same = sum(takewhile(bool, map(eq, draft.ids, answer)))
        yield Metric(f"{lane}: agrees with the answer for", number, same, "tokens")
    return why


def _greedy(
    engine: Engine, cursor: Cursor, most: int
) -> Generator[Event, None, tuple[list[int], str]]:
    """The answer's ids, and why it ended."""
    answer: list[int] = []
    while len(answer) < most:
        if cursor.pos == engine.context:
            return answer, "context full"
        step = engine.step(cursor)
        written = token(engine, step, int(step.logits.argmax()))
        engine.push(cursor, written.id)
        answer.append(written.id)
        yield written
        if engine.ends(written.id):
            return answer, "end token"
    return answer, "max_new reached"


def _quietly(growing: Generator[Event, None, Drafts]) -> Drafts:
    """What it returns; what it says on the way is shown by `superposed`."""
    while True:
        try:
            next(growing)
        except StopIteration as end:
            found: Drafts = end.value
            return found
