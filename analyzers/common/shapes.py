"""How proposals branch: trees of drafts that are sampled from the rows of a draft model.

Source: Leviathan et al. 2023 (arXiv:2211.17192) for the chain; Sun et al. 2023 (SpecTr,
        arXiv:2310.15141) for independent sequences; Jeon et al. 2024 (RSD, arXiv:2402.14160) for
        Gumbel-Top-k and stochastic beam search (Kool et al. 2019, arXiv:1903.06059); Xiong et al.
        2024 (DySpec, arXiv:2410.11744) for the dynamic tree.
Idea:   a shape asks a proposer for the rows behind the tree so far, and draws children from them.
        Whether it draws another one depends on draws before it alone; then an acceptance rule can
        keep the target's distribution. No node gets more children than its row has tokens.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush, heapreplace
from itertools import count
from typing import Protocol

import torch

from analyzers.common.acceptance import pick, without
from analyzers.common.drafts import Coin, Draft
from analyzers.engine import Tree

TESTED = "estimated chance of being tested"


class Proposer(Protocol):
    """A model that drafts."""

    @property
    def cost(self) -> float:
        """Of one call of `rows`, in steps of the target."""

    def rows(self, text: Sequence[int], tree: Tree) -> Sequence[torch.Tensor]:
        """The processed rows behind the root and behind every node of a tree behind the text: 1 +
        nodes of (vocab,), float64. Of a tree that begins with the one before only what is new is
        computed."""


class Growing:
    """A draft while a shape adds nodes to it."""

    def __init__(self, proposer: Proposer, text: Sequence[int]) -> None:
        self._proposer = proposer
        self._text = text
        self._read: Sequence[torch.Tensor] = ()
        self._calls = 0
        self._ids: list[int] = []
        self._parents: list[int] = []
        self._logprobs: list[float] = []
        self._values: list[float | None] = []
        self._rows: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, node: int) -> torch.Tensor:
        """Behind `node`, (vocab,). One pass of the draft model serves all nodes that were added
        since the last one."""
        if node not in self._rows:
            if node + 1 >= len(self._read):
                self._read = self._proposer.rows(self._text, self._tree)
                self._calls += 1
            self._rows[node] = self._read[node + 1]
        return self._rows[node]

    def add(self, parent: int, id: int, value: float | None = None) -> int:
        """A child of `parent`, drawn from its row; its number."""
        self._ids.append(id)
        self._parents.append(parent)
        self._logprobs.append(math.log(float(self._rows[parent][id])))
        self._values.append(value)
        return len(self) - 1

    @property
    def _tree(self) -> Tree:
        return Tree(tuple(self._ids), tuple(self._parents))

    def draft(
        self,
        ended: str,
        *,
        measure: str = "",
        sequences: Sequence[Sequence[int]] = (),
        sampled: bool = True,
    ) -> Draft:
        return Draft(
            tree=self._tree,
            logprobs=tuple(self._logprobs),
            rows=self._rows if sampled else {},
            sequences=tuple(map(tuple, sequences)),
            values=tuple(self._values) if measure else (),
            measure=measure,
            ended=ended,
            cost=self._calls * self._proposer.cost,
        )


def chain(
    proposer: Proposer,
    text: Sequence[int],
    depth: int,
    rng: random.Random,
    *,
    floor: float = 0.0,
    greedy: bool = False,
) -> Draft:
    """One token a level, `depth` of them or up to the first that is less likely than `floor`.

    Sampled, it counts as drawn without replacement; greedy, as deterministic."""
    growing = Growing(proposer, text)
    node, p = -1, 1.0
    while len(growing) < depth and p >= floor:
        row = growing.row(node)
        id = int(row.argmax()) if greedy else pick(row, rng.random())
        node, p = growing.add(node, id), float(row[id])
    unsure = f"the draft was less than {floor:.0%} sure of its last token"
    ended = unsure if p < floor else f"{len(growing)} tokens were drafted"
    return growing.draft(ended, sampled=not greedy)


def independent(
    proposer: Proposer, text: Sequence[int], depth: int, rng: random.Random, *, k: int
) -> Draft:
    """k sequences of `depth` tokens, none knowing of the others; equal beginnings merged."""
    growing = Growing(proposer, text)
    there: dict[tuple[int, int], int] = {}
    sequences: list[list[int]] = [[] for _ in range(k)]
    for _ in range(depth):
        for sequence in sequences:
            parent = sequence[-1] if sequence else -1
            id = pick(growing.row(parent), rng.random())
            if (parent, id) not in there:
                there[parent, id] = growing.add(parent, id)
            sequence.append(there[parent, id])
    return growing.draft(f"sequences of {depth} tokens were drafted", sequences=sequences)


def branching(
    proposer: Proposer,
    text: Sequence[int],
    depth: int,
    rng: random.Random,
    *,
    factors: Sequence[int],
) -> Draft:
    """RSD-C: every node of level l gets factors[l] children without replacement, by Gumbel-Top-k:
    the largest log q + Gumbel noise, which come in the order of drawing one after the other.

    values: those sums."""
    growing, noise = Growing(proposer, text), _generator(rng)
    level = [-1]
    for factor in factors[:depth]:
        found = []
        for node in level:
            keys = gumbels(growing.row(node).log(), noise)
            found += [growing.add(node, id, key) for id, key in _largest(keys, factor)]
        level = found
    ended = f"{len(factors[:depth])} levels were drafted"
    return growing.draft(ended, measure="log q + Gumbel noise")


def beam(
    proposer: Proposer,
    text: Sequence[int],
    depth: int,
    rng: random.Random,
    *,
    width: int,
) -> Draft:
    """RSD-S: stochastic beam search. Each level keeps the `width` sequences with the largest
    perturbed log-probabilities G; they are samples without replacement of sequences.

    values: G; the largest of a node's children has its parent's."""
    growing, noise = Growing(proposer, text), _generator(rng)
    beams = [(-1, 0.0, 0.0)]  # node, log-probability of its sequence, G
    for _ in range(depth):
        logprobs = torch.stack([phi + growing.row(node).log() for node, phi, _ in beams])
        keys = perturbed(logprobs, [g for *_, g in beams], noise)
        level = []
        for place, g in _largest(keys.flatten(), width):
            row, id = divmod(place, keys.shape[-1])
            level.append((growing.add(beams[row][0], id, g), float(logprobs[row, id]), g))
        beams = level
    return growing.draft(f"{depth} levels were drafted", measure="perturbed log-probability, nats")


def dynamic(
    proposer: Proposer,
    text: Sequence[int],
    depth: int,
    rng: random.Random,
    *,
    most: int,
    threshold: float,
) -> Draft:
    """DySpec, level by level: a node gets one more child while that child would be tested with a
    chance of at least `threshold` (above 0), up to `most` nodes in all.

    The chance is an estimate: as if each draft were accepted with the probability that it was drawn
    with. values: that of each node, known before it was drawn."""
    growing = Growing(proposer, text)
    draws = Draws(growing, rng)
    level = [draws.first(-1, (), 1.0)]
    for _ in range(depth):
        below: list[Pending] = []
        while level[0].v >= threshold and len(growing) < most:
            beside, first = draws.draw(level[0])
            heapreplace(level, beside)
            heappush(below, first)
        if not below:
            break
        level = below
    ended = f"{depth} levels were drafted"
    if len(growing) == most:
        ended = f"{most} nodes were drafted"
    elif level[0].v < threshold:
        ended = "any other draft had too little chance of being tested"
    return growing.draft(ended, measure=TESTED)


def heap(
    proposer: Proposer, text: Sequence[int], depth: int, rng: random.Random, *, most: int
) -> Draft:
    """DySpec, node by node: always the child that is likeliest to be tested, until there are `most`
    nodes. By the estimate of `dynamic` the best tree of that size, at up to one pass of the draft
    model for each node."""
    growing = Growing(proposer, text)
    draws = Draws(growing, rng)
    waiting = [draws.first(-1, (), 1.0)]
    while waiting[0].v > 0 and len(growing) < most:
        beside, first = draws.draw(waiting[0])
        heapreplace(waiting, beside)
        if len(first.path) < depth:
            heappush(waiting, first)
    full = len(growing) == most
    ended = f"{most} nodes were drafted" if full else f"{depth} levels were drafted"
    return growing.draft(ended, measure=TESTED)


@dataclass(frozen=True, order=True)
class Pending:
    """The next child of a node, before it is drawn. The smallest is the likeliest to be tested, and
    of equals the one that was there first. path: the node's ids. rest: of its row, (vocab,), what
    was not drawn; None = all."""

    minus_v: float
    number: int
    node: int = field(compare=False)
    path: tuple[int, ...] = field(compare=False)
    coin: Coin = field(compare=False)
    rest: torch.Tensor | None = field(compare=False, default=None)

    @property
    def v(self) -> float:
        return -self.minus_v


class Draws:
    """Draws children for a dynamic tree. The coins of a node hang on its path alone: they are the
    same in whatever order the nodes get their children."""

    def __init__(self, growing: Growing, rng: random.Random) -> None:
        self._growing = growing
        self._seed = rng.getrandbits(64)
        self._numbers = count()

    def first(self, node: int, path: tuple[int, ...], v: float) -> Pending:
        """The first child of a node."""
        coin = random.Random(f"{self._seed} {path}").random
        return Pending(-v, next(self._numbers), node, path, coin)

    def draw(self, pending: Pending) -> tuple[Pending, Pending]:
        """Draw it; what may come beside it (v = 0 when its row is used up) and below it."""
        v, d = pending.v, pending.rest
        if d is None:
            d = self._growing.row(pending.node)
        id = pick(d, pending.coin())
        share, child = float(d[id]), self._growing.add(pending.node, id, v)
        beside = replace(
            pending, minus_v=-v * (1 - share), number=next(self._numbers), rest=without(d, id)
        )
        return beside, self.first(child, (*pending.path, id), v * share)


# Noise


def gumbels(logprobs: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """`logprobs` and standard Gumbel noise, float64; the noise is made on the CPU."""
    drawn = torch.empty(logprobs.shape, dtype=torch.float64).exponential_(generator=noise)
    return logprobs - drawn.log().to(logprobs.device)


def perturbed(
    logprobs: torch.Tensor, largest: Sequence[float], noise: torch.Generator
) -> torch.Tensor:
    """`gumbels` of each row (beams, vocab), given that the largest of a row is known (beams,)."""
    free = gumbels(logprobs, noise)
    given = torch.tensor(largest, dtype=torch.float64, device=free.device)[:, None]
    # -log(exp(-given) - exp(-max free) + exp(-free)), which underflows when written so. For the
    # largest one v is -inf, and it becomes `given`.
    v = given - free + torch.log1p(-torch.exp(free - free.amax(-1, keepdim=True)))
    return given - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))


def _largest(keys: torch.Tensor, most: int) -> list[tuple[int, float]]:
    """(place, key) of the largest in (n,), largest first, without those that are impossible."""
    top = keys.topk(min(most, len(keys)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(place, key) for place, key in pairs if key > -math.inf]


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(63))
