"""Acceptance rules: the numbers of worked examples, and what is written is what the target says."""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import accumulate, permutations, product
from math import prod

import pytest
import torch

from analyzers.common import acceptance
from analyzers.common.acceptance import RULES, Rule, check, leftover, pick, rho, transport
from analyzers.common.drafts import Draft, Rows
from analyzers.engine import Tree
from analyzers.errors import BadParameter

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
DRAWS = 50_000
CRITICAL = 92.0
"""Of chi-square at 1 % with 63 degrees of freedom: 4 x 4 x 4 cells."""
V = 4
DEPTH = 2


class Table:
    """A model of four tokens: a row for every beginning of at most two of them."""

    def __init__(self, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        self.rows = {
            ids: (1.2 * torch.randn(V, generator=made, dtype=torch.float64)).softmax(-1)
            for length in range(DEPTH + 1)
            for ids in product(range(V), repeat=length)
        }

    @cache  # noqa: B019
    def orders(self, ids: tuple[int, ...], k: int) -> tuple[list[tuple[int, ...]], list[float]]:
        """All ways of drawing k tokens behind `ids`, none twice, and their summed chances."""
        row = self.rows[ids].tolist()
        ways = list(permutations(range(V), k))
        chances = (
            prod(row[id] / (1 - sum(row[one] for one in way[:i])) for i, id in enumerate(way))
            for way in ways
        )
        return ways, list(accumulate(chances))

    def draw(self, ids: tuple[int, ...], k: int, rng: random.Random) -> tuple[int, ...]:
        ways, edges = self.orders(ids, k)
        return ways[min(bisect_right(edges, rng.random()), len(ways) - 1)]


TARGET, DRAFT = Table(1), Table(2)


def drawn_from(table: Table, tree: Tree) -> dict[int, torch.Tensor]:
    """The rows of a table behind the root and the nodes that have children."""
    return {node: table.rows[ids_to(tree, node)] for node in {-1, *tree.parents}}


def ids_to(tree: Tree, node: int) -> tuple[int, ...]:
    return tuple(tree.ids[one] for one in tree.path(node))


@cache
def independent(*sequences: tuple[int, ...]) -> Draft:
    tree, paths = Tree.merged(sequences)
    return Draft(tree, rows=drawn_from(DRAFT, tree), sequences=tuple(paths))


@cache
def one_by_one(first: tuple[int, ...], *behind: tuple[int, ...]) -> Draft:
    ids, parents = list(first), [-1] * len(first)
    for parent, those in enumerate(behind):
        ids += those
        parents += [parent] * len(those)
    tree = Tree(tuple(ids), tuple(parents))
    return Draft(tree, rows=drawn_from(DRAFT, tree))


def sequences(k: int, rng: random.Random) -> list[tuple[int, ...]]:
    return [(*(first := DRAFT.draw((), 1, rng)), *DRAFT.draw(first, 1, rng)) for _ in range(k)]


def draw_independent(rng: random.Random) -> Draft:
    return independent(*sequences(3, rng))


def draw_one_by_one(rng: random.Random) -> Draft:
    first = DRAFT.draw((), 3, rng)
    return one_by_one(first, *[DRAFT.draw((id,), 2, rng) for id in first])


def draw_chain(rng: random.Random) -> Draft:
    return independent(*sequences(1, rng))


LIKELIEST = one_by_one(
    *(tuple(DRAFT.rows[ids].topk(2).indices.tolist())
      for ids in ((), *((id,) for id in DRAFT.rows[()].topk(2).indices.tolist())))
)  # fmt: skip
"""No samples of anything."""
LOOKED_UP = Draft(LIKELIEST.tree)


@cache
def target_rows(draft: Draft) -> Rows:
    tree = draft.tree
    return {node: TARGET.rows[ids_to(tree, node)] for node in range(-1, len(tree))}.__getitem__


def chi_square(
    draw: Callable[[random.Random], Draft], rule: Rule, seed: int = 0, runs: int = DRAWS
) -> float:
    """Of the first three tokens against the target's own joint law; what a step leaves open is
    drawn from the target."""
    rng = random.Random(seed)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(runs):
        draft = draw(rng)
        verdict = rule(target_rows(draft), draft, rng.random)
        ids = (*(draft.tree.ids[node] for node in verdict.path), verdict.extra)
        while len(ids) <= DEPTH:
            ids += TARGET.draw(ids, 1, rng)
        seen[ids] += 1
    total = 0.0
    for ids in product(range(V), repeat=DEPTH + 1):
        expected = runs * prod(float(TARGET.rows[ids[:n]][ids[n]]) for n in range(DEPTH + 1))
        total += (seen[ids] - expected) ** 2 / expected
    return total


@pytest.fixture
def memoised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is computed once. Tensors are hashed by identity, so a key is never compared."""
    for name in ("residual", "without", "chance", "rho", "leftover"):
        monkeypatch.setattr(acceptance, name, cache(getattr(acceptance, name)))


DRAWN = {
    "deterministic": [lambda rng: LOOKED_UP],
    "without replacement": [draw_one_by_one, draw_chain],
    "independent": [draw_independent],
}
SOUND = [
    pytest.param(rule, draw, id=f"{name}, {drawn} {i}")
    for name, (rule, exact) in RULES.items()
    for drawn in exact
    for i, draw in enumerate(DRAWN[drawn])
]


@pytest.mark.usefixtures("memoised")
@pytest.mark.parametrize("rule, draw", SOUND)
def test_what_is_written_is_distributed_as_the_target(rule, draw):
    assert chi_square(draw, rule) < CRITICAL


@pytest.mark.usefixtures("memoised")
def test_the_same_test_finds_what_is_biased():
    """The likeliest tokens by q, verified as if they were samples of it."""
    assert chi_square(lambda rng: LIKELIEST, acceptance.recursive, runs=10_000) > 10 * CRITICAL


def levels(*rows: torch.Tensor) -> Draft:
    """A draft whose children stand for nothing but their rows; see `refusing`."""


TABLE = {  # k: recursive, rho, beta, k-SEQ, without replacement, bound
    1: (0.7, 1.0, 0.7, 0.7, 0.7, 0.7),
    2: (0.76, 1.456776, 0.543224, 0.791355, 0.82, 0.86),
    3: (0.808, 1.792593, 0.478926, 0.858519, 1.0, 0.988),
    4: (0.8464, 2.030036, 0.446301, 0.906007, 1.0, 1.0),
}
"""For P and Q; the bound of k = 4 is rounded, and the 1.0 of three draws without replacement is
that of all three tokens."""


@pytest.mark.parametrize("k", TABLE)
def test_numbers_of_the_worked_example(k):
    recursive, divisor, beta, k_seq, without, bound = TABLE[k]
    made = transport(P, Q, k)
    assert made.rho == pytest.approx(divisor, abs=1e-6)
    assert made.beta == pytest.approx(beta, abs=1e-6)
    assert made.k_seq == pytest.approx(k_seq, abs=1e-6)
    assert made.recursive == pytest.approx(recursive, abs=1e-6)
    assert made.optimum == pytest.approx(bound, abs=5e-5)
    assert leftover(P, Q, made.rho, k).tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert accepted(acceptance.recursive, k) == pytest.approx(without, abs=1e-6)
    assert accepted(acceptance.k_seq, k) == pytest.approx(k_seq, abs=1e-6)
    assert accepted(acceptance.recursive_independent, k) == pytest.approx(recursive, abs=1e-6)
