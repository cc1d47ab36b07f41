"""How proposals branch: what is drawn is what the draft model says, and the target stays exact."""

import random
from collections import Counter
from functools import partial
from itertools import permutations, product
from math import inf, log, prod

import pytest
import torch

from analyzers.common.acceptance import k_seq, recursive, recursive_independent
from analyzers.common.drafts import Draft, siblings
from analyzers.common.shapes import (
    beam,
    branching,
    chain,
    dynamic,
    gumbels,
    heap,
    independent,
    perturbed,
)
from analyzers.engine import Tree
from tests.test_acceptance import (
    CRITICAL,
    DEPTH,
    DRAFT,
    TARGET,
    Table,
    V,
    chi_square,
    ids_to,
    memoised,  # noqa: F401
)

DRAWS = 6_000
SHAPES = {
    "chain": chain,
    "floor": partial(chain, floor=0.3),
    "branching": partial(branching, factors=(2, 2)),
    "beam": partial(beam, width=3),
    "dynamic": partial(dynamic, most=5, threshold=0.15),
    "heap": partial(heap, most=5),
}


class Listed:
    """A proposer that reads a table."""

    cost = 0.25

    def __init__(self, table: Table) -> None:
        self._table = table
        self.asked: list[Tree] = []

    def rows(self, text, tree: Tree) -> list[torch.Tensor]:
        self.asked.append(tree)
        return [self._table.rows[ids_to(tree, node)] for node in range(-1, len(tree))]


def shaped(shape, seed: int | random.Random = 0, depth: int = DEPTH, table: Table = DRAFT) -> Draft:
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    return shape(Listed(table), [1, 2], depth, rng)


def table_of(**rows: list[float]) -> Table:
    """A table with these rows (`_` = the root, `_0` behind token 0, ...); others are flat."""
    made = Table(0)
    for ids in made.rows:
        given = rows.get("_" + "".join(map(str, ids)), [0.25] * V)
        made.rows[ids] = torch.tensor(given, dtype=torch.float64)
    return made


def chance_of(ids: tuple[int, ...]) -> float:
    return prod(float(DRAFT.rows[ids[:n]][id]) for n, id in enumerate(ids))


def same_as(expected: dict, seen: Counter, runs: int, critical: float) -> bool:
    assert set(seen) <= set(expected)
    return sum((seen[key] - runs * p) ** 2 / (runs * p) for key, p in expected.items()) < critical


@pytest.mark.usefixtures("memoised")
@pytest.mark.parametrize("name", ["floor", "branching", "beam", "dynamic"])
def test_the_target_stays_exact(name):
    draw = partial(shaped, SHAPES[name])
    assert chi_square(draw, recursive, runs=DRAWS) < CRITICAL


@pytest.mark.usefixtures("memoised")
@pytest.mark.parametrize("rule", [k_seq, recursive_independent])
def test_the_target_stays_exact_with_independent_sequences(rule):
    draw = partial(shaped, partial(independent, k=3))
    assert chi_square(draw, rule, runs=DRAWS) < CRITICAL


@pytest.mark.parametrize("name", [*SHAPES, "independent"])
def test_a_draft_says_what_it_was_drawn_from(name):
    shape = SHAPES.get(name, partial(independent, k=3))
    for seed in range(20):
        proposer = Listed(DRAFT)
        draft = shape(proposer, [1, 2], DEPTH, random.Random(seed))
        tree = draft.tree
        assert 1 <= len(tree) == len(draft.logprobs) and max(tree.depths) <= DEPTH
        assert set(draft.rows) >= set(tree.parents)
        for node, (id, parent) in enumerate(zip(tree.ids, tree.parents, strict=True)):
            assert draft.rows[parent] is DRAFT.rows[ids_to(tree, parent)]
            assert draft.logprobs[node] == pytest.approx(log(draft.rows[parent][id]))
        for children in siblings(tree).values():
            assert len({tree.ids[child] for child in children}) == len(children)
        assert draft.cost == pytest.approx(0.25 * len(proposer.asked)) and draft.ended
        for before, after in zip(proposer.asked, proposer.asked[1:], strict=False):
            assert after.begins_with(before) and len(after) > len(before)
        assert bool(draft.values) == bool(draft.measure)
        again = shape(Listed(DRAFT), [1, 2], DEPTH, random.Random(seed))
        assert (again.tree, again.values) == (tree, draft.values)


def test_levels_take_one_pass_each_and_the_last_one_none():
    for shape in (chain, partial(independent, k=4), SHAPES["branching"], SHAPES["beam"]):
        proposer = Listed(DRAFT)
        shape(proposer, [1, 2], DEPTH, random.Random(0))
        assert len(proposer.asked) == DEPTH


def test_a_chain_ends_behind_an_unlikely_token():
    table = table_of(_=[0.9, 0.1, 0, 0])
    lengths = {}
    for seed in range(50):
        draft = shaped(partial(chain, floor=0.2), seed, table=table)
        lengths[draft.tree.ids[0]] = len(draft.tree)
        assert draft.ended.startswith("2 tokens" if len(draft.tree) == 2 else "the draft was less")
    assert lengths == {0: 2, 1: 1}
    likeliest = shaped(partial(chain, greedy=True), table=table)
    assert likeliest.tree.ids[0] == 0 and not likeliest.rows
    assert likeliest.logprobs[0] == pytest.approx(log(0.9))


def test_independent_sequences_keep_their_multiplicity():
    seen, rng = Counter(), random.Random(1)
    for _ in range(2_000):
        draft = shaped(partial(independent, k=3), rng)
        assert len(draft.sequences) == 3 and {len(one) for one in draft.sequences} == {DEPTH}
        assert {node for one in draft.sequences for node in one} == set(range(len(draft.tree)))
        seen.update(ids_to(draft.tree, one[-1]) for one in draft.sequences)
        assert all(draft.tree.path(one[-1]) == one for one in draft.sequences)
    ways = {ids: chance_of(ids) for ids in product(range(V), repeat=DEPTH)}
    assert same_as(ways, seen, 6_000, 30.6)  # 15 degrees of freedom, 1 %


def test_gumbel_keys_come_in_the_order_of_drawing():
    """Pairs have the chance q_i q_j / (1 - q_i)."""
    row, rng = DRAFT.rows[()].tolist(), random.Random(1)
    seen = Counter()
    for _ in range(4_000):
        draft = shaped(partial(branching, factors=(2,)), rng, depth=1)
        seen[draft.tree.ids] += 1
        assert draft.values[0] > draft.values[1]
    pairs = {(i, j): row[i] * row[j] / (1 - row[i]) for i, j in permutations(range(V), 2)}
    assert same_as(pairs, seen, 4_000, 24.7)  # 11 degrees of freedom, 1 %


def test_branching_has_its_factors_and_no_more_levels_than_asked():
    for factors, depth, nodes in [((3, 2), 2, 9), ((3, 2), 1, 3), ((2,), 2, 2), ((9, 1), 2, 8)]:
        assert len(shaped(partial(branching, factors=factors), depth=depth).tree) == nodes


@pytest.mark.parametrize("name", ["branching", "beam", "dynamic", "heap"])
def test_no_node_has_more_children_than_its_row_has_tokens(name):
    table = table_of(_=[0.5, 0.5, 0, 0], _0=[0, 0, 1, 0], _1=[0, 1, 0, 0])
    wide = {
        "branching": partial(branching, factors=(4, 4)),
        "beam": partial(beam, width=9),
        "dynamic": partial(dynamic, most=9, threshold=1e-9),
        "heap": partial(heap, most=9),
    }
    for seed in range(20):
        draft = shaped(wide[name], seed, table=table)
        assert {ids_to(draft.tree, node) for node in range(len(draft.tree))} == {
            (0,), (1,), (0, 2), (1, 1)
        }  # fmt: skip


def test_the_largest_child_has_its_parents_perturbed_logprob():
    noise = torch.Generator().manual_seed(4)
    logprobs = torch.stack([DRAFT.rows[(id,)].log() - id for id in range(V)])
    logprobs[2, 1] = -inf
    for scale in (1.0, 30.0, 300.0):  # far in the tails as well
        given = [scale * g for g in (0.5, -1.0, 2.0, -3.0)]
        keys = perturbed(logprobs, given, noise)
        assert keys.amax(-1).tolist() == pytest.approx(given, abs=1e-9)
        assert keys[2, 1] == -inf and not keys.isnan().any()
    free = gumbels(torch.zeros(100_000, dtype=torch.float64), noise)
    assert float(free.mean()) == pytest.approx(0.5772, abs=0.02)
    rng = random.Random(8)
    for _ in range(100):
        draft = shaped(partial(beam, width=3), rng)
        for parent, children in siblings(draft.tree).items():
            values = [draft.values[child] for child in children]
            assert values == sorted(values, reverse=True)
            above = 0.0 if parent < 0 else draft.values[parent]
            assert values[0] == pytest.approx(above, abs=1e-9)


def test_beams_are_distinct_sequences_and_as_many_as_there_is_room_for():
    for seed in range(50):
        draft = shaped(partial(beam, width=3), seed)
        assert Counter(draft.tree.depths) == {1: 3, 2: 3}
        paths = [ids_to(draft.tree, node) for node in range(len(draft.tree))]
        assert len(set(paths)) == len(paths)


def test_a_single_beam_is_a_sample_of_sequences():
    seen, rng = Counter(), random.Random(2)
    for _ in range(3_000):
        draft = shaped(partial(beam, width=1), rng)
        seen[draft.tree.ids] += 1
    ways = {ids: chance_of(ids) for ids in product(range(V), repeat=DEPTH)}
    assert same_as(ways, seen, 3_000, 30.6)


def test_two_beams_are_sequences_drawn_one_after_the_other():
    """The second one: q_a q_b / (1 - q_a), summed over the first."""
    seen, rng = Counter(), random.Random(3)
    for _ in range(3_000):
        draft = shaped(partial(beam, width=2), rng)
        seen[ids_to(draft.tree, len(draft.tree) - 1)] += 1
    q = {ids: chance_of(ids) for ids in product(range(V), repeat=DEPTH)}
    ways = {b: sum(q[a] * q[b] / (1 - q[a]) for a in q if a != b) for b in q}
    assert same_as(ways, seen, 3_000, 30.6)


def test_values_of_the_worked_dynamic_tree():
    """Behind a first draft of probability .6 its child (.6) comes before its sibling (.4)."""
    table = table_of(_=[0.6, 0.3, 0.1, 0], _0=[0.9, 0.1, 0, 0])
    firsts = [shaped(partial(heap, most=3), seed, table=table) for seed in range(40)]
    draft = next(draft for draft in firsts if draft.tree.ids[0] == 0)
    assert draft.tree.parents == (-1, 0, -1)
    assert draft.values == pytest.approx((1.0, 0.6, 0.4))
    assert draft.measure == "estimated chance of being tested"


def test_dynamic_values_never_rise():
    for seed in range(50):
        values = shaped(partial(heap, most=9), seed).values
        assert list(values) == sorted(values, reverse=True)


def test_the_threshold_tree_is_the_heap_tree():
    sizes = set()
    for seed in range(100):
        made = shaped(partial(heap, most=2 + seed % 7), seed)
        sizes.add(len(made.tree))
        same = partial(dynamic, most=99, threshold=min(made.values))
        found, expected = _nodes(shaped(same, seed)), _nodes(made)
        assert expected.items() <= found.items()
        # The only child of a certain token is as likely to be tested as that token.
        assert all(found[ids] == min(made.values) for ids in found.keys() - expected)
    assert len(sizes) == 7


def _nodes(draft: Draft) -> dict[tuple[int, ...], float]:
    """The nodes as their tokens -> value."""
    return {ids_to(draft.tree, node): value for node, value in enumerate(draft.values)}


def test_limits_of_dynamic_trees():
    assert len(shaped(partial(dynamic, most=1, threshold=0.01)).tree) == 1
    assert len(shaped(partial(heap, most=1)).tree) == 1
    full = shaped(partial(dynamic, most=6, threshold=1e-9))
    assert len(full.tree) == 6 and full.ended == "6 nodes were drafted"
    sure = shaped(partial(dynamic, most=6, threshold=1.0))
    assert len(sure.tree) == 1 and "too little chance" in sure.ended
    alone = table_of(**{name: [1.0, 0, 0, 0] for name in ("_", "_0", "_00")})
    assert shaped(partial(heap, most=9), table=alone).tree.ids == (0, 0)
    deep = shaped(partial(dynamic, most=9, threshold=0.5), table=alone)
    assert deep.tree.ids == (0, 0) and deep.ended == "2 levels were drafted"


def test_drafts_of_a_model_for_itself_are_all_accepted_on_the_main_path():
    for seed in range(20):
        draft = shaped(SHAPES["dynamic"], seed, table=TARGET)
        rows = {node: TARGET.rows[ids_to(draft.tree, node)] for node in range(-1, len(draft.tree))}
        verdict = recursive(rows.__getitem__, draft, random.Random(seed).random)
        assert verdict.origin == "bonus" and set(verdict.chances) == set(verdict.path)
        assert [draft.tree.parents.index(draft.tree.parents[node]) for node in verdict.path] == [
            *verdict.path
        ]
