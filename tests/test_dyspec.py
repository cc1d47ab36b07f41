"""DySpec: trees that grow where drafts are likely to be tested."""

from collections import Counter

import pytest

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import dyspec
from analyzers.engine import Tree
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Event
from tests.events import ids_of, trees_of

PROMPT = Task("The quick brown fox")


def written(engine, **knobs) -> list[Event]:
    params = build(dyspec.Params, {"max_new": 16, "skip": 1, "budget": 8, **knobs})
    return list(dyspec.run(engine, PROMPT, params, Context(3)))


@pytest.mark.parametrize(
    "knobs",
    [{}, {"draft_temperature": 2.0}, {"draft_temperature": 0.05}, {"budget": 1}, {"grow": "nodes"}],
)
def test_at_temperature_zero_it_is_the_greedy_text(tiny_engine, knobs):
    plain = sampling.Params(temperature=0.0, max_new=16)
    expected = ids_of(sampling.run(tiny_engine, PROMPT, plain, Context(3)))
    assert ids_of(written(tiny_engine, temperature=0.0, **knobs)) == expected


@pytest.mark.parametrize("grow", ["levels", "nodes"])
def test_the_same_seed_gives_the_same_events(tiny_engine, grow):
    events = written(tiny_engine, grow=grow)
    assert events == written(tiny_engine, grow=grow) and len(ids_of(events)) == 16


def test_values_are_the_products_of_what_came_before(tiny_engine):
    """v of a first child is v of its parent times q; of the next one, what the draw left."""
    trees = trees_of(written(tiny_engine, draft_temperature=1.5, budget=12, length=3))
    assert any(len(set(tree.parents)) < len(tree.parents) for tree in trees)  # siblings
    for tree in trees:
        assert 1 <= len(tree.ids) <= 12 and max(Tree(tree.ids, tree.parents).depths) <= 3
        q = [2.718281828459045**value for value in tree.draft_logprobs]
        left: dict[int, tuple[float, float]] = {-1: (1.0, 1.0)}  # v of the next child, mass left
        for node, parent in enumerate(tree.parents):
            v, mass = left[parent]
            share = q[node] / mass
            assert tree.values[node] == pytest.approx(v, abs=1e-4)
            left[parent] = v * (1 - share), mass - q[node]
            left[node] = v * share, 1.0


def test_every_node_is_as_likely_to_be_tested_as_was_asked(tiny_engine):
    for threshold in (0.05, 0.3):
        for tree in trees_of(written(tiny_engine, threshold=threshold, draft_temperature=1.5)):
            assert min(tree.values) >= threshold
    alone = trees_of(written(tiny_engine, threshold=1.0))
    assert all(tree.parents.count(-1) == 1 for tree in alone)


def test_drafts_are_filtered_at_a_temperature_of_their_own(tiny_engine):
    sharp, flat = (
        trees_of(written(tiny_engine, draft_temperature=t))[0].draft_logprobs[0] for t in (0.05, 2)
    )
    assert flat < -0.1 < -1e-3 < sharp
    for tree in trees_of(written(tiny_engine, draft_temperature=2, budget=32, top_k=2)):
        assert max(Counter(tree.parents).values()) <= 2


def test_node_by_node_the_budget_is_used_and_values_never_rise(tiny_engine):
    trees = trees_of(written(tiny_engine, grow="nodes", budget=6, draft_temperature=1.5))
    assert len(trees[0].ids) == 6
    for tree in trees:
        assert list(tree.values) == sorted(tree.values, reverse=True)


@pytest.mark.parametrize("grow", ["levels", "nodes"])
def test_a_draft_that_is_the_model_is_accepted_on_the_main_path(tiny_engine, grow):
    same = {"skip": 0, "temperature": 0.8, "draft_temperature": 0.8}
    for tree in trees_of(written(tiny_engine, grow=grow, **same)):
        firsts = [tree.parents.index(tree.parents[node]) for node in tree.accepted]
        assert firsts == [*tree.accepted] and (tree.origin == "bonus" or tree.extra is None)


def test_one_node_is_an_ordinary_draft(tiny_engine):
    trees = trees_of(written(tiny_engine, budget=1))
    assert trees and all(len(tree.ids) == 1 and tree.values == (1.0,) for tree in trees)
