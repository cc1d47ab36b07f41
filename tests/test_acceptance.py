"""Acceptance rules: the numbers of worked examples, and what is written is what the target says."""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, permutations, product
from math import prod
from typing import get_args

import pytest
import torch

from analyzers.common import acceptance
from analyzers.common.acceptance import (
    RULES,
    Rule,
    check,
    follow,
    k_seq,
    leftover,
    pick,
    recursive,
    recursive_independent,
    residual,
    rho,
    transport,
    without,
)
from analyzers.common.drafts import Draft, Drawn, Rows
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
    *(
        tuple(DRAFT.rows[ids].topk(2).indices.tolist())
        for ids in ((), *((id,) for id in DRAFT.rows[()].topk(2).indices.tolist()))
    )
)
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
    "deterministic": lambda rng: LOOKED_UP,
    "without replacement": draw_one_by_one,
    "independent": draw_independent,
}
SOUND = [
    pytest.param(rule, DRAWN[drawn], id=f"{name}, {drawn}")
    for name, (rule, exact) in RULES.items()
    for drawn in exact
]


@pytest.mark.usefixtures("memoised")
@pytest.mark.parametrize(
    "rule, draw", [*SOUND, pytest.param(recursive, draw_chain, id="recursive, one child")]
)
def test_what_is_written_is_distributed_as_the_target(rule, draw):
    assert chi_square(draw, rule) < CRITICAL


@pytest.mark.usefixtures("memoised")
def test_the_same_test_finds_what_is_biased():
    """The likeliest tokens by q, verified as if they were samples of it."""
    assert chi_square(lambda rng: LIKELIEST, recursive, runs=10_000) > 10 * CRITICAL


def siblings_of(q: torch.Tensor, ids: Iterable[int]) -> Draft:
    """One level below the root, drawn from q in this order; equal ones merged, as sequences are."""
    tree, paths = Tree.merged([[id] for id in ids])
    return Draft(tree, rows={-1: q}, sequences=tuple(paths))


def refused(p: torch.Tensor, q: torch.Tensor, ids: Sequence[int], rule: Rule) -> float:
    """The chance that the rule accepts none of these drafts."""
    draft = siblings_of(q, ids)
    coins = iter([1.0] * len(ids) + [0.0])  # 1 accepts nothing
    chances = rule({-1: p}.__getitem__, draft, coins.__next__).chances
    tested = [node for (node,) in draft.sequences]  # k-SEQ can accept an equal one later
    return prod(1 - chances[node] for node in (tested if rule is k_seq else set(tested)))


def accepted(p: torch.Tensor, q: torch.Tensor, k: int, rule: Rule) -> float:
    """The chance that the rule accepts one of k drafts, over all that can be drawn from q."""
    ways = drawn(q, k, alone=rule is recursive)
    return sum(way * (1 - refused(p, q, ids, rule)) for ids, way in ways)


def drawn(q: torch.Tensor, k: int, *, alone: bool) -> Iterator[tuple[tuple[int, ...], float]]:
    """All that k drafts from q can be, with its chance. alone: none of them twice."""
    row, n = q.tolist(), len(q)
    for ids in permutations(range(n), min(k, n)) if alone else product(range(n), repeat=k):
        before = [sum(row[one] for one in ids[:i]) if alone else 0.0 for i in range(len(ids))]
        yield ids, prod(row[id] / (1 - gone) for id, gone in zip(ids, before, strict=True))


TABLE = {  # k: recursive, rho, beta, k-SEQ, without replacement, bound
    1: (0.7, 1.0, 0.7, 0.7, 0.7, 0.7),
    2: (0.76, 1.456776, 0.543224, 0.791355, 0.82, 0.86),
    3: (0.808, 1.792593, 0.478926, 0.858519, 1.0, 0.988),
    4: (0.8464, 2.030036, 0.446301, 0.906007, 1.0, 1.0),
}
"""For P and Q."""


@pytest.mark.parametrize("k", TABLE)
def test_numbers_of_the_worked_example(k):
    made = transport(P, Q, k)
    numbers = made.recursive, made.rho, made.beta, made.k_seq
    alone = accepted(P, Q, k, recursive)
    assert (*numbers, alone, made.optimum) == pytest.approx(TABLE[k], abs=1e-6)
    assert accepted(P, Q, k, k_seq) == pytest.approx(made.k_seq)
    assert accepted(P, Q, k, recursive_independent) == pytest.approx(made.recursive)
    assert leftover(P, Q, made.rho, k).tolist() == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", [recursive, recursive_independent, k_seq])
def test_one_place_has_exactly_the_target_s_law(rule, k, monkeypatch):
    """Summed over all that can be drawn from q: nothing is left to chance."""
    left: list[torch.Tensor] = []
    monkeypatch.setattr(acceptance, "pick", lambda row, coin: left.append(row) or 0)
    for p, q in pairs()[:6]:
        law = torch.zeros(V, dtype=torch.float64)
        for ids, way in drawn(q, k, alone=rule is recursive):
            draft = siblings_of(q, ids)
            # This coin refuses all but what is certain.
            chances = rule(lambda node, p=p: p, draft, lambda: 1 - 2**-53).chances
            for place, id in enumerate(ids):
                again = rule is recursive_independent and id in ids[:place]
                chance = 0.0 if again else chances.get(draft.sequences[place][0], 0.0)
                law[id] += way * chance
                way *= 1 - chance
            law += way * left.pop()
        assert law.tolist() == pytest.approx(p.tolist(), abs=1e-9)


def test_rows_after_a_refused_draft():
    r, d = residual(P, Q), without(Q, 2)
    assert r.tolist() == pytest.approx([1, 0, 0]) and d.tolist() == pytest.approx([0.4, 0.6, 0])
    assert without(without(d, 0), 1).tolist() == [0, 0, 0]


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ways = [ids for length in range(DEPTH + 1) for ids in product(range(V), repeat=length)]
    return [(TARGET.rows[ids], DRAFT.rows[ids]) for ids in ways]


def test_one_draft_is_the_ordinary_rule_by_every_rule():
    for p, q in pairs():
        plain = float(torch.minimum(p, q).sum())
        for rule in (recursive, recursive_independent, k_seq):
            assert accepted(p, q, 1, rule) == pytest.approx(plain)
            for id in range(V):
                assert 1 - refused(p, q, [id], rule) == pytest.approx(min(1, float(p[id] / q[id])))
        assert rho(p, q, 1) == 1
        assert leftover(p, q, 1.0, 1).tolist() == pytest.approx(residual(p, q).tolist())


def test_more_drafts_are_better_and_never_better_than_the_bound():
    for p, q in pairs():
        before = 0.0
        for k in (1, 2, 3, 5, 8, 13):
            made = transport(p, q, k)
            assert before - 1e-9 <= made.k_seq <= made.optimum + 1e-9
            assert made.recursive <= made.optimum + 1e-9
            assert made.k_seq == pytest.approx(made.rho * made.beta)
            assert made.k_seq >= (1 - (1 - 1 / k) ** k) * made.optimum - 1e-9
            before = made.k_seq
            taken = torch.minimum(q, p / made.rho) * made.k_seq / made.beta
            assert float((p - taken).min()) >= -1e-12  # the upper end of the bisection


@pytest.mark.parametrize("rule", [recursive, recursive_independent, k_seq])
def test_equal_rows_accept_all_and_rows_with_nothing_in_common_none(rule):
    assert accepted(Q, Q, 2, rule) == pytest.approx(1)
    assert transport(Q, Q, 2).rho == 1 and transport(Q, Q, 2).k_seq == pytest.approx(1)
    p, q = torch.eye(4, dtype=torch.float64)[:2]
    draft = siblings_of(q, [1, 1, 1] if rule is not recursive else [1])
    verdict = rule({-1: p}.__getitem__, draft, lambda: 0.5)
    assert verdict.path == () and verdict.extra == 0 and verdict.origin == "corrected"
    assert verdict.chances == {0: 0.0} and verdict.coins == {0: 0.5}
    apart = transport(p, q, 3)
    assert (apart.beta, apart.k_seq, apart.recursive, apart.optimum) == (0, 0, 0, 0)
    assert leftover(p, q, apart.rho, 3) is p


def test_all_tokens_as_drafts_are_always_enough():
    """Whatever the coins: the last one left is certain."""
    for p, q in pairs():
        for ids in permutations(range(V)):
            assert refused(p, q, ids, recursive) == pytest.approx(0, abs=1e-9)


def test_follow_goes_where_its_coin_says():
    tree = Tree((0, 1, 2, 0), (-1, -1, 1, 1))
    rows = {-1: P, 1: Q, 3: P}
    coins = iter([0.6, 0.1, 0.95])
    verdict = follow(rows.__getitem__, Draft(tree), coins.__next__)
    assert verdict.path == (1, 3) and verdict.extra == 2 and verdict.origin == "bonus"
    assert verdict.chances == pytest.approx({0: 0.5, 1: 0.3, 2: 0.5, 3: 0.2})
    assert verdict.coins == {0: 0.6, 1: 0.6, 2: 0.1, 3: 0.1}
    stays = follow(rows.__getitem__, Draft(tree), iter([0.9]).__next__)
    assert (stays.path, stays.extra, stays.origin) == ((), 2, "corrected")
    alone = follow(rows.__getitem__, Draft(), iter([0.0]).__next__)
    assert (alone.path, alone.extra, alone.origin) == ((), 0, "bonus")


def test_at_temperature_zero_follow_is_the_greedy_walk():
    likeliest = {node: torch.eye(3, dtype=torch.float64)[id] for node, id in {-1: 1, 1: 2}.items()}
    for thrown in (0.0, 0.5, 1 - 2**-53):
        coins = iter([thrown, thrown])
        verdict = follow(likeliest.__getitem__, Draft(Tree((0, 1), (-1, -1))), coins.__next__)
        assert (verdict.path, verdict.extra) == ((1,), 2)


@pytest.mark.usefixtures("memoised")
def test_the_record_repeats_every_decision():
    """A tested node is accepted where its coin is below its chance."""
    rng = random.Random(5)
    for rule, draw in [(k_seq, draw_independent), (recursive_independent, draw_independent),
                       (recursive, draw_one_by_one)]:  # fmt: skip
        for _ in range(200):
            draft = draw(rng)
            verdict = rule(target_rows(draft), draft, rng.random)
            below = {
                node for node in verdict.chances if verdict.coins[node] < verdict.chances[node]
            }
            assert below == set(verdict.path) and verdict.coins.keys() == verdict.chances.keys()


def test_a_coin_stands_for_the_token_whose_share_it_falls_into():
    assert [pick(P, coin) for coin in (0.0, 0.49, 0.5, 0.79, 0.8, 1 - 2**-53)] == [0, 0, 1, 1, 2, 2]
    assert pick(torch.tensor([0.0, 0.25, 0.0]), 0.0) == 1  # need not sum to 1


@pytest.mark.parametrize(
    "rule, drawn",
    [
        (rule, drawn)
        for rule, exact in RULES.values()
        for drawn in get_args(Drawn)
        if drawn not in exact
    ],
)
def test_unsound_combinations_are_refused(rule, drawn):
    with pytest.raises(BadParameter, match=rf"would bias what is sampled.* these are {drawn}\.$"):
        check(rule, drawn)


def test_sound_combinations_are_not():
    for rule, exact in RULES.values():
        for drawn in exact:
            check(rule, drawn)
