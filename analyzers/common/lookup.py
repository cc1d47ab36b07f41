"""Drafts without a model: what is looked up somewhere, weighed by how often such finds came true.

Source: n-gram matches as in prompt lookup decoding (Saxena 2023); the weighing and the sizing are
        ours, in the spirit of Sequoia (Chen et al. 2024, arXiv:2402.12374), which sizes trees by
        the acceptance rate of each position and by what a pass costs.
Idea:   every find has a slot (how much agreed, how recent, which rank), and each slot a chance that
        is estimated from what became of earlier finds. A tree grows by its likeliest node, and as
        many nodes are drafted as yield most tokens for what the pass costs.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import accumulate, count
from typing import NamedTuple

from analyzers.common.drafts import Draft, Outcome
from analyzers.engine import Tree
from analyzers.engine.cost import Cost

DIFFERENT = 3
"""Continuations that are looked up at one place; a fourth one came true 2 times in 100."""
TRUST = 20.0
"""Finds that an estimate of before the run counts as."""
NODE_MS = 0.1
"""Of looking up a node and hearing what became of it, about; for the prediction of the cost."""


class Slot(NamedTuple):
    """Where a find comes from: finds of the same slot are as likely as each other.

    match: how many tokens agreed before the place that it was copied from, 0 = it was not looked
    up. recent: how many other continuations were preferred to it, having a longer match or standing
    later. rank: in a row of likely successors, 0 = best, -1 = it is not in the row.
    """

    match: int = 0
    recent: int = 0
    rank: int = -1


Finds = Mapping[int, Slot]
Search = Callable[[tuple[int, ...], tuple[Slot, ...]], Finds]
"""The tokens drafted so far on a path, and their slots -> what may follow."""


class Lookup:
    """Where every n-gram of a text, of up to `longest` tokens, goes on."""

    def __init__(self, longest: int) -> None:
        self.text: list[int] = []
        self._longest = longest
        # Positions of the tokens behind the n-gram, in order.
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def read(self, text: Sequence[int]) -> None:
        """Learn what was added to the text since the last time."""
        known = len(self.text)
        self.text.extend(text[known:])
        for place in range(max(known, 1), len(text)):
            for n in range(1, min(self._longest, place) + 1):
                self._places[tuple(self.text[place - n : place])].append(place)

    def after(self, ids: Sequence[int]) -> dict[int, Slot]:
        """What followed the end of the text and then `ids`: the longest matches first, and of
        equally long ones the latest."""
        before = self._end(ids)
        found: dict[int, Slot] = {}
        for n in range(len(before), 0, -1):
            for place in reversed(self._places.get(before[-n:], ())):
                if (id := self.text[place]) not in found:
                    found[id] = Slot(match=n, recent=len(found))
                    if len(found) == DIFFERENT:
                        return found
        return found

    def places(self) -> tuple[int, Sequence[int]]:
        """How many tokens at the end of the text stood there before, at most `longest`, and where
        the text went on behind them, in order; (0, ()) where that is none."""
        before = self._end(())
        for n in range(len(before), 0, -1):
            if places := self._places.get(before[-n:]):
                return n, places
        return 0, ()

    def _end(self, ids: Sequence[int]) -> tuple[int, ...]:
        return (*self.text[-self._longest :], *ids)[-self._longest :]


class Proposed(NamedTuple):
    """A node of a tree that may be drafted. chance: that it is written, its parents included."""

    id: int
    parent: int
    slot: Slot
    chance: float


class Weighed:
    """What makes drafts of finds, and hears what became of them.

    prior: the chance of a slot before anything was tried. most: nodes of a tree. cost: draft only
    what pays by this table; None for always as many as there are.
    """

    def __init__(self, prior: Callable[[Slot], float], most: int, cost: Cost | None) -> None:
        self._prior = prior
        self._most = most
        self._cost = cost
        self._tried: dict[Slot, int] = defaultdict(int)
        self._true: dict[Slot, float] = defaultdict(float)
        self._slots: list[Slot] = []  # of the nodes of the last draft

    def chance(self, slot: Slot) -> float:
        """That a find of this slot is written when what stands before it is."""
        true = TRUST * self._prior(slot) + self._true.get(slot, 0.0)
        return true / (TRUST + self._tried.get(slot, 0))

    def draft(self, search: Search, depth: int) -> Draft:
        """The tree that yields most tokens for its cost; an empty one where none pays."""
        nodes = grown(search, self.chance, depth, self._most)
        chances = [node.chance for node in nodes]
        pays = worthwhile(chances, self._price) if self._cost else len(nodes)
        ended = "more drafts would not have paid" if pays < len(nodes) else "nothing more was found"
        if pays == self._most:
            ended = f"{pays} tokens were to be drafted"
        nodes = nodes[:pays]
        self._slots = [node.slot for node in nodes]
        return Draft(
            Tree(tuple(node.id for node in nodes), tuple(node.parent for node in nodes)),
            values=tuple(node.chance for node in nodes),
            measure="estimated chance",
            ended=ended,
            cost=pays * NODE_MS / self._cost.step_ms if self._cost else 0.0,
        )

    def learn(self, outcome: Outcome) -> None:
        """Of every node that was tested: by how likely the target found it, which at temperature 0
        is whether it was accepted."""
        for node, p in outcome.verdict.chances.items():
            self._tried[self._slots[node]] += 1
            self._true[self._slots[node]] += p

    def _price(self, nodes: int) -> float:
        assert self._cost is not None
        return self._cost.v(1 + nodes) + nodes * NODE_MS / self._cost.step_ms


def grown(search: Search, chance: Callable[[Slot], float], depth: int, most: int) -> list[Proposed]:
    """The likeliest nodes of all trees that the search could make, likeliest first; a node is never
    likelier than its parent and comes behind it."""
    order = count()  # of equally likely ones the first that was found
    waiting: list[tuple[float, int, int, int, Slot]] = []
    nodes: list[Proposed] = []
    known: dict[Slot, float] = {}
    paths: dict[int, tuple[tuple[int, ...], tuple[Slot, ...]]] = {-1: ((), ())}

    def look(parent: int, so_far: float) -> None:
        for id, slot in search(*paths[parent]).items():
            if slot not in known:
                known[slot] = chance(slot)
            heappush(waiting, (-so_far * known[slot], next(order), parent, id, slot))

    look(-1, 1.0)
    while waiting and len(nodes) < most:
        minus, _, parent, id, slot = heappop(waiting)
        ids, slots = paths[parent]
        paths[len(nodes)] = (*ids, id), (*slots, slot)
        nodes.append(Proposed(id, parent, slot, -minus))
        if len(ids) + 1 < depth and len(nodes) < most:
            look(len(nodes) - 1, -minus)
    return nodes


def worthwhile(chances: Sequence[float], price: Callable[[int], float], least: int = 0) -> int:
    """How many nodes with these chances, likeliest first, yield most tokens for the price of a pass
    with them, `least` of them or more: a pass writes one token and, on average, the sum of the
    chances."""
    tokens = accumulate(chances, initial=1.0)
    yields = [expected / price(n) for n, expected in enumerate(tokens)]
    return yields.index(max(yields[least:]), least)
