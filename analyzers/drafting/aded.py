"""ADED: a tree search over a table of tri-grams writes the drafts, and the table learns on the way.

Source: Liu et al. 2024, "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
        arXiv:2407.12021 (AAAI 2025); liuxukun2000/Adaptix for the constants.
Idea:   what followed two tokens in a corpus is tried first, by Monte-Carlo tree search; what the
        model really writes weighs more each time, so that drafts turn to the text at hand. No
        model drafts: a step costs one pass and a millisecond or two of searching.
Differs from the source: the table and its search have their own list (see `common.trigrams`). The
        table is made anew for every run, from texts of the user's own, and learns the whole prompt
        once before it drafts; the source keeps one for as long as the program runs, so that results
        depend on what was asked before. The most visited nodes are drafted one by one until there
        are `choices` of them, or as many as the cost table makes worthwhile; the source drops whole
        drafts, those with most different tokens first. When sampling, one token is drawn at each
        node: the source draws anew for every path, which is biased, and samples the first token
        of a step even in greedy writing. Where nothing is known nothing is drafted, not a dummy.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyzers.card import Card
from analyzers.common.acceptance import follow
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.lookup import worthwhile
from analyzers.common.ngrams import PIECE, read_text
from analyzers.common.speculation import Drafted, write
from analyzers.common.trigrams import INCREMENT, Node, Trigrams, ordered, paths, search
from analyzers.context import Context
from analyzers.engine import Engine, Tree
from analyzers.engine.cost import Cost
from analyzers.params import FileRef, knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "ADED",
    family="drafting",
    source="Liu et al. 2024, arXiv:2407.12021; liuxukun2000/Adaptix",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)

RECENT = 16
"""Tokens at the end of the text whose tri-grams are learned, at every step again."""
SEQUENCES = 24
"""The most visited beginnings that are drafted; each gets one token more."""
HISTORY_CHARACTERS = 500_000
ITERATION_MS = 0.012
"""Of the search, about; for the prediction of what drafting costs."""


@dataclass(frozen=True)
class Params(Drafted):
    """iterations, choices and increment are the source's; the corpus is ours."""

    iterations: int = knob(150, "Walks of the search before each draft", lo=1, hi=2000)
    choices: int = knob(64, "Most tokens to draft at once", lo=1, hi=256, unit="tokens")
    increment: float = knob(
        INCREMENT, "What a tri-gram gains when it is met; 0 = learn nothing", lo=0, hi=1
    )
    corpus: Literal["history", "file", "none"] = knob(
        "history", "Texts the table begins with: earlier runs, a file, or none"
    )
    file: FileRef = knob(FileRef(""), "Text file to count tri-grams in, UTF-8, at most 20 MB")
    fit: bool = knob(True, "Draft only as much as pays by the cost table of this machine")
    official: bool = knob(False, "Judge walks as the reference code does: nearly all the same")


@dataclass(frozen=True)
class Proposed:
    """A token that may be drafted. ids: the path to it. visits: None where the search did not go.
    share: of all walks, those through it; an estimate of how likely it is to be written."""

    ids: tuple[int, ...]
    visits: int | None
    share: float


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree with the visits of the search and its Tokens a step, and at the end how
    many tri-grams were new to the table; return why the text ended.

    Raises: BadParameter for a file that cannot be read.
    """
    yield from task.written
    table, said = _table(engine, params, ctx)
    cursor = ctx.begin(engine, engine.encode(task))
    yield Note("info", said)
    drafter = Adaptive(table, params, ctx)
    why = yield from write(engine, cursor, task, params, ctx, drafter, follow)
    if params.increment:
        yield Metric("tri-grams learned", cursor.pos, drafter.learned, "tri-grams")
    return why


class Adaptive:
    """The drafter. learned: tri-grams that were new to the table."""

    drawn: Drawn = "deterministic"

    def __init__(self, table: Trigrams, params: Params, ctx: Context) -> None:
        self.learned = 0
        self._table = table
        self._params = params
        self._cost: Cost | None = ctx.cost
        self._rng = ctx.rng("walks")
        self._known = 0  # tokens of the text that have been learned
        # As if one of two expected tokens had been accepted before.
        self._accepted, self._expected = 1.0, 2.0
        self._shares = 0.0

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """Learn the end of the text, search, and draft what was visited most."""
        self._adapt(text)
        self._shares = 0.0
        if len(text) < 2:
            return Draft()
        pair = (text[-2], text[-1])
        params = self._params
        tree = search(self._table.after, pair, params.iterations, self._rng, params.official)
        found = proposed(self._table, tree, depth)
        some = found[: self._worthwhile(found)]
        if not some:
            return Draft(ended="the table knows nothing that follows")
        self._shares = sum(each.share for each in some)
        drafted, _ = Tree.merged([each.ids for each in some])  # a node each, in this order
        return Draft(
            drafted,
            values=tuple(each.visits for each in some),
            measure="visits",
            cost=params.iterations * ITERATION_MS / self._cost.step_ms if self._cost else 0.0,
        )

    def learn(self, outcome: Outcome) -> None:
        """How good the shares are as estimates; the text is learned before the next draft."""
        self._accepted += len(outcome.verdict.path)
        self._expected += self._shares

    def _adapt(self, text: Sequence[int]) -> None:
        """Add the tri-grams of the whole text at first, then of its last tokens."""
        if self._params.increment:
            # Two tokens before what is new, so that no tri-gram is missed after plain steps.
            first = max(0, min(self._known - 2, len(text) - RECENT)) if self._known else 0
            self.learned += self._table.adapt(text[first:], self._params.increment)
            self._known = len(text)

    def _worthwhile(self, found: Sequence[Proposed]) -> int:
        """How many of them to draft: those that yield most tokens for their cost, at least one
        where there is one."""
        most = min(len(found), self._params.choices)
        if not found or not self._params.fit or self._cost is None:
            return most
        cost, hit = self._cost, self._accepted / self._expected
        chances = [hit * each.share for each in found[:most]]
        return worthwhile(chances, lambda nodes: cost.v(1 + nodes), least=1)


def proposed(table: Trigrams, tree: Node, depth: int) -> list[Proposed]:
    """What a search found, best first and parents before children: the most visited beginnings, and
    the heaviest continuation of each; at most `depth` tokens deep."""
    visited = sorted(paths(tree), key=lambda each: -each[1].visits)[:SEQUENCES]
    found = {ids: Proposed(ids, node.visits, node.visits / tree.visits) for ids, node in visited}
    for ids, node in visited:
        followers, weights = ordered(table.after(node.pair))
        if followers and (*ids, followers[0]) not in found:
            share = found[ids].share * weights[0] / sum(weights)
            found[*ids, followers[0]] = Proposed((*ids, followers[0]), None, share)
    some = (each for each in found.values() if len(each.ids) <= depth)
    return sorted(some, key=lambda each: (-each.share, len(each.ids)))


def _table(engine: Engine, params: Params, ctx: Context) -> tuple[Trigrams, str]:
    """The table as a run begins with it, and what to say of it."""
    if params.corpus == "none":
        return Trigrams(), "The table of tri-grams begins empty and learns from this text alone."
    if params.corpus == "file":
        text = read_text(params.file)
        table, name = Trigrams(_tokens(engine, [text], len(text))), "the chosen file"
    else:
        table, name = Trigrams(_tokens(engine, ctx.history(), HISTORY_CHARACTERS)), "earlier runs"
    if not table.tokens:
        return table, "There are no earlier runs: the table of tri-grams begins empty."
    return table, f"The table of tri-grams begins with {name}, {table.tokens:,} tokens."


def _tokens(engine: Engine, texts: Iterable[str], most: int) -> Iterator[list[int]]:
    """The first `most` characters of the texts in pieces, split by the engine's tokenizer, without
    tokens that the model was never given. Polls stop between pieces; the few tri-grams across a
    seam are lost."""
    for text in texts:
        for first in range(0, min(len(text), most), PIECE):
            engine.poll()
            ids = engine.tokens(text[first : min(first + PIECE, most)])
            yield [id for id in ids if id < engine.vocabulary.size]
        most -= len(text)
        if most <= 0:
            return
