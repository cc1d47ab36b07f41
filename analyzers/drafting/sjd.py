"""Speculative Jacobi decoding: the model checks the tokens that it drew itself one pass before.

Source: Teng et al. 2025, arXiv:2410.01699 (ICLR 2025); tyshiwo1/Accelerating-T2I-AR-with-SJD.
Idea:   a window of tokens stands behind the text, each with the distribution q it was drawn from.
        One pass gives p for all of them. From the left, a token is kept with probability
        min(1, p / q); the first that is not is drawn anew from what q left of p. The tokens behind
        it are drawn again, from the p of this pass, and the window moves on. No draft model, no
        training; at temperature 0 it is plain Jacobi decoding.
Differs from the source: it is made for images and is used here for text as well, where new places
        of the window are begun with what followed the same two tokens earlier (ours), since a
        random token is almost never right. Vertical initialisers, guidance and forced tokens are
        left out. The residual is not processed a second time, which the published code does and
        which is wrong for temperature and top-p.
"""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from analyzers.card import Card
from analyzers.common.acceptance import follow, pick, recursive
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.speculation import Drafted, write
from analyzers.context import Context
from analyzers.engine import Engine, Tree
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "Speculative Jacobi decoding",
    family="drafting",
    source="Teng et al. 2025, arXiv:2410.01699; tyshiwo1/Accelerating-T2I-AR-with-SJD",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)
MEASURE = "drawn by the model itself (1), or a beginning (0)"
Begin = Literal["lookup", "repeat", "random"]


@dataclass(frozen=True)
class Params(Drafted):
    """The source's window is 15 drafts, for images; ours is what pays on a CPU. Its text is sampled
    with temperature 1, and so are images."""

    window: int = knob(6, "Tokens that stand behind the text", lo=0, hi=64, unit="tokens")
    temperature: float = knob(0.7, "0 = greedy, above 1 flattens", lo=0, hi=2)
    begin: Begin = knob(
        "lookup", "How new places begin: as earlier in the text, the last token again, or anything"
    )
    redraw: bool = knob(True, "Draw untested tokens again from the newest pass; off keeps them")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree a pass, the window as a chain, with the Tokens it gave; return why the text
    ended. Values of the tree: 1 where the model drew the token itself, 0 where it is a beginning.
    """
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    drafter = Window(params, engine.vocabulary.size, ctx.rng("window"))
    rule = recursive if params.temperature > 0 else follow
    return (yield from write(engine, cursor, task, params, ctx, drafter, rule))


@dataclass(frozen=True, eq=False)
class Place:
    """A token of the window and the row (vocab,), float64, it was drawn from; None where it is a
    beginning, which is as if all of q lay on it."""

    id: int
    row: torch.Tensor | None = None


class Window:
    """Drafts the window as it stands; learning moves it on. A row is kept for one pass."""

    drawn: Drawn = "without replacement"

    def __init__(self, params: Params, vocabulary: int, rng: random.Random) -> None:
        self._params = params
        self._vocabulary = vocabulary
        self._rng = rng
        self.places: list[Place] = []

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """A chain of at most `window` places."""
        size = min(self._params.window, depth)
        self.places = self.places[:size]
        while len(self.places) < size:
            ids = [*text, *(place.id for place in self.places)]
            self.places.append(Place(self._beginning(ids)))
        return Draft(
            Tree.chain([place.id for place in self.places]),
            tuple(
                None if place.row is None else float(place.row[place.id].log())
                for place in self.places
            ),
            {node - 1: self._row(place) for node, place in enumerate(self.places)},
            values=tuple(float(place.row is not None) for place in self.places),
            measure=MEASURE,
            ended="the window ends here",
        )

    def learn(self, outcome: Outcome) -> None:
        """The place behind the accepted ones got the target's token; those behind it stay, and the
        row behind the last one begins a new place."""
        done = len(outcome.verdict.path)
        if not self._params.redraw:
            self.places = self.places[done + 1 :]
            return
        rows = [outcome.rows(node) for node in range(done, len(outcome.draft.tree))]
        self.places = [Place(pick(row, self._rng.random()), row) for row in rows]

    def _row(self, place: Place) -> torch.Tensor:
        if place.row is not None:
            return place.row
        row = torch.zeros(self._vocabulary, dtype=torch.float64)
        row[place.id] = 1.0
        return row

    def _beginning(self, ids: Sequence[int]) -> int:
        if self._params.begin == "random":
            return self._rng.randrange(self._vocabulary)
        if self._params.begin == "lookup":
            # The last time that the same two tokens stood side by side.
            for at in range(len(ids) - 3, -1, -1):
                if ids[at] == ids[-2] and ids[at + 1] == ids[-1]:
                    return ids[at + 2]
        return ids[-1]
