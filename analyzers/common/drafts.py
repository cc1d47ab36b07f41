"""What the parts of speculative decoding hand to each other: who proposes, and what is proposed.

Source: the vocabulary of Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023
        (arXiv:2302.01318): p is the target's processed distribution, q the draft's.
Idea:   a drafter proposes a tree of tokens behind the text; the target looks at all of it in one
        pass; an acceptance rule (`acceptance`) decides which path survives. Any drafter goes with
        every rule that is exact for how it draws, and `speculation` is the loop around them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from analyzers.engine import Tree
from analyzers.engine.trees import Checked
from analyzers.trace import Event

Drawn = Literal["deterministic", "without replacement", "independent"]
"""How the children of a node come about: looked up or taken from the top (then they are samples of
nothing); drawn from q one after the other, none twice (one child alone counts as such); or drawn
from q as independent sequences, whose equal beginnings were merged."""
Rows = Callable[[int], torch.Tensor]
"""Node (-1 = the root) -> the target's processed probabilities behind it, (vocab,), float64."""
Coin = Callable[[], float]
"""A uniform number of [0, 1); drawn anew at each call."""
NOTHING = Tree((), ())


@dataclass(frozen=True, eq=False)
class Draft:
    """A tree of proposals behind a text.

    tree: siblings in the order in which they were drawn. logprobs: of each node, nats, under the
    row it was drawn from; None where it has none. rows: node (-1 = the root) -> the row (vocab,),
    float64, that its children were drawn from; empty when deterministic. sequences: of independent
    drafts, their nodes, root side first, equal ones as often as they were drawn. values: one number
    a node that the drafter decided by, for the eyes; `measure` says what it is. ended: why it is no
    larger. cost: what drafting took, in steps of the target, as predicted. events: what else the
    drafter has to say.
    """

    tree: Tree = NOTHING
    logprobs: tuple[float | None, ...] = ()
    rows: Mapping[int, torch.Tensor] = field(default_factory=dict)
    sequences: tuple[tuple[int, ...], ...] = ()
    values: tuple[float | None, ...] = ()
    measure: str = ""
    ended: str = ""
    cost: float = 0.0
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a rule decided. path: the accepted nodes, root side first. extra: the token behind them,
    which is never a draft's merit: "corrected" where drafts stood there and were refused, "bonus"
    where none did. chances: node -> the probability with which it was to be accepted, of every
    node that was tested. coins: node -> the coin thrown for it."""

    path: tuple[int, ...]
    extra: int
    origin: Literal["corrected", "bonus"]
    chances: Mapping[int, float] = field(default_factory=dict)
    coins: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One step as its drafter hears of it. text: the ids before the step. rows: the target's
    processed probabilities behind any node, computed when asked for."""

    text: Sequence[int]
    draft: Draft
    checked: Checked
    verdict: Verdict
    rows: Rows


class Drafter(Protocol):
    """Who proposes. It may look at the whole text and at nothing that the target has not written;
    how many children a node gets may depend on earlier draws, never on the very candidate that
    is being decided, or sampling is biased."""

    @property
    def drawn(self) -> Drawn:
        """How its drafts come about, which decides what rules are exact for them."""

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """A tree of at most `depth` levels (>= 1) behind the text; an empty one for nothing."""

    def learn(self, outcome: Outcome) -> None:
        """Hear what became of it, before the path is committed."""


def siblings(tree: Tree) -> dict[int, list[int]]:
    """Node (-1 = the root) -> its children, in the order in which they were drawn."""
    found: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        found.setdefault(parent, []).append(node)
    return found
