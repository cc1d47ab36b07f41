"""A table of what follows two tokens, which learns while a text is written; and a search over it.

Source: Liu et al. 2024 (ADED, arXiv:2407.12021, AAAI 2025); liuxukun2000/Adaptix for the constants.
        The formula of the search is that of MuZero (Schrittwieser et al. 2020, arXiv:1911.08265).
Idea:   the weight of c behind (a, b) is how often it came there in a corpus, of all that came; a
        tri-gram of the text itself weighs more each time it is met. Monte-Carlo tree search walks
        the table from the last two tokens and visits most what is likely to go on for long.
Differs from the source: the back-up of a walk adds the weights of its own steps. The source looks
        up another token (`official` does so too) and finds hardly ever anything, so that all walks
        are worth the same. Continuations are tried by weight and then id, where the source has the
        order of a hash table.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np

Pair = tuple[int, int]
Weights = Mapping[int, float]
"""Token -> how much speaks for it; not normalised once the table has learned."""

MOST = 12
"""Continuations of a pair that are kept of a corpus."""
INCREMENT, CAP = 0.04, 3.0
BITS = 21
"""Of a token id: three of them fit into one number of 63 bits."""
C1, C2 = 32.0, 8.0
LENGTH = 3
"""Tokens behind the root that a walk is long; the source counts the root as well."""


class Trigrams:
    """Counted in some texts; `adapt` adds to it. tokens: how many the texts have together.

    The counts of a corpus lie in sorted arrays, 24 bytes a tri-gram; a pair becomes a dictionary
    when it is first asked for."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        parts = [np.asarray(ids, dtype=np.int64) for ids in texts]
        self.tokens = sum(map(len, parts))
        self._pairs, self._thirds, self._shares = _counted(parts)
        self._there: dict[Pair, dict[int, float]] = {}

    def after(self, pair: Pair) -> Weights:
        """What follows the pair; empty when nothing is known."""
        return self._after(pair)

    def adapt(self, ids: Sequence[int], increment: float = INCREMENT, cap: float = CAP) -> int:
        """Every tri-gram of `ids` weighs `increment` more, at most `cap`. How many were new."""
        new = 0
        for a, b, c in zip(ids, ids[1:], ids[2:], strict=False):
            weights = self._after((a, b))
            new += c not in weights
            weights[c] = min(weights.get(c, 0.0) + increment, cap)
        return new

    def _after(self, pair: Pair) -> dict[int, float]:
        if pair not in self._there:
            key = pair[0] << BITS | pair[1]
            first, last = np.searchsorted(self._pairs, (key, key + 1))
            thirds, shares = self._thirds[first:last], self._shares[first:last]
            self._there[pair] = dict(zip(thirds.tolist(), shares.tolist(), strict=True))
        return self._there[pair]


class Node:
    """A pair that the search has reached. id: the token that led here; weight: of that step. score:
    the sum of the values of the walks through it. children: none until it was expanded."""

    __slots__ = ("children", "id", "pair", "score", "visits", "weight")

    def __init__(self, pair: Pair, weight: float = 0.0) -> None:
        self.id = pair[1]
        self.pair = pair
        self.weight = weight
        self.visits = 0
        self.score = 0.0
        self.children: list[Node] = []


def search(
    after: Callable[[Pair], Weights],
    root: Pair,
    iterations: int,
    rng: random.Random,
    official: bool = False,
) -> Node:
    """The tree of so many walks from the root, each up to three tokens long.

    A walk takes the best child by `puct` down to a node without children, gives it children and
    goes on with the first of them, then at random by weight. Its value is 1 and the weights of its
    steps. Of one node several children may be unvisited: the first of these is taken.
    """
    ways: dict[Pair, tuple[list[int], list[float], list[float]]] = {}

    def on(pair: Pair) -> tuple[list[int], list[float], list[float]]:
        """What follows the pair: ids, their weights, and the sums of these up to each."""
        if pair not in ways:
            ids, weights = ordered(after(pair))
            ways[pair] = ids, weights, list(accumulate(weights))
        return ways[pair]

    tree = Node(root)
    for _ in range(iterations):
        walk = _descended(tree)
        last = walk[-1].pair
        if len(walk) <= LENGTH:
            ids, weights, _ = on(last)
            children = map(Node, ((last[1], id) for id in ids), weights)
            walk[-1].children = list(children)
            walk += walk[-1].children[:1]
        pairs = [node.pair for node in walk]
        value = 1.0 + sum(node.weight for node in walk)
        while len(pairs) <= LENGTH and on(pairs[-1])[0]:
            ids, weights, sums = on(pairs[-1])
            way = rng.choices(range(len(ids)), cum_weights=sums)[0]
            pairs.append((pairs[-1][1], ids[way]))
            value += weights[way]
        if official:
            value = 1.0 + sum(after(pair).get(pair[1], 0.0) for pair in pairs[:-1])
        for node in walk:
            node.visits += 1
            node.score += value
    return tree


def puct(score: float, visits: int, weight: float, above: int) -> float:
    """How much a child is worth visiting: its mean value, and more while it was visited little.

    above: visits of its parent. An unvisited child is worth any price."""
    return score / visits + exploration(above) * weight / (1 + visits) if visits else math.inf


def exploration(visits: int) -> float:
    """What a parent's visits add for its children, before weight and their own visits."""
    return (C1 + math.log((visits + C2 + 1) / C2)) * math.sqrt(visits)


def ordered(weights: Weights) -> tuple[list[int], list[float]]:
    """The continuations and their weights, heaviest first, of equal ones the smaller id."""
    ids = sorted(weights, key=lambda id: (-weights[id], id))
    return ids, [weights[id] for id in ids]


def paths(tree: Node) -> Iterator[tuple[tuple[int, ...], Node]]:
    """Every visited node below the root, with the tokens that lead there; parents first."""
    waiting: list[tuple[tuple[int, ...], Node]] = [((), tree)]
    for ids, node in waiting:
        if ids:
            yield ids, node
        waiting += [((*ids, child.id), child) for child in node.children if child.visits]


def _descended(tree: Node) -> list[Node]:
    """The nodes from the root along the best children to one without children, or to the length of
    a walk. `puct` is written out: this is where the time goes."""
    walk = [tree]
    while walk[-1].children and len(walk) <= LENGTH:
        explored = exploration(walk[-1].visits)
        best, most = walk[-1].children[0], -math.inf
        for child in walk[-1].children:
            visits = child.visits
            if not visits:
                best = child
                break
            worth = child.score / visits + explored * child.weight / (1 + visits)
            if worth > most:
                best, most = child, worth
        walk.append(best)
    return walk


def _counted(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (as one number, rising), third tokens and their shares, (tri-grams,) each: of every
    pair the commonest MOST, of equally common ones those with the smaller ids."""
    keys = [(ids[:-2] << BITS | ids[1:-1]) << BITS | ids[2:] for ids in parts if len(ids) > 2]
    if not keys:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    found, counts = np.unique(np.concatenate(keys), return_counts=True)
    pairs, thirds = found >> BITS, found & ((1 << BITS) - 1)
    order = np.lexsort((thirds, -counts, pairs))
    pairs, thirds, counts = pairs[order], thirds[order], counts[order]
    _, first, times = np.unique(pairs, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    shares = counts / np.repeat(totals, times)
    kept = np.arange(len(pairs)) - np.repeat(first, times) < MOST
    return pairs[kept], thirds[kept], shares[kept]
