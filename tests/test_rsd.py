"""Recursive speculative decoding: the shapes of its trees, and whose text it is."""

from collections import Counter

import pytest

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import rsd
from analyzers.engine import Tree
from analyzers.errors import BadParameter
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Event
from tests.events import ids_of, trees_of

PROMPT = Task("The quick brown fox")
CONSTANT = {"shape": "constant"}


def written(engine, **knobs) -> list[Event]:
    params = build(rsd.Params, {"max_new": 16, "skip": 1, **knobs})
    return list(rsd.run(engine, PROMPT, params, Context(3)))


@pytest.mark.parametrize(
    "knobs",
    [{}, {"width": 1}, CONSTANT, {**CONSTANT, "branching": "5"}, {"upto": 1, "length": 2}],
)
def test_at_temperature_zero_it_is_the_greedy_text(tiny_engine, knobs):
    plain = sampling.Params(temperature=0.0, max_new=16)
    expected = ids_of(sampling.run(tiny_engine, PROMPT, plain, Context(3)))
    assert ids_of(written(tiny_engine, temperature=0.0, **knobs)) == expected


@pytest.mark.parametrize("knobs", [{}, CONSTANT])
def test_the_same_seed_gives_the_same_events(tiny_engine, knobs):
    events = written(tiny_engine, **knobs)
    assert events == written(tiny_engine, **knobs) and len(ids_of(events)) == 16


def test_trees_have_the_shape_that_was_asked_for(tiny_engine):
    first = trees_of(written(tiny_engine, **CONSTANT))[0]
    assert Counter(Tree(first.ids, first.parents).depths) == {1: 2, 2: 4, 3: 4}
    first = trees_of(written(tiny_engine, width=3, length=4))[0]
    assert Counter(Tree(first.ids, first.parents).depths) == {1: 3, 2: 3, 3: 3, 4: 3}
    assert first.measure and first.values[0] == 0.0  # the best beam has the root's own G
    assert list(first.values[:3]) == sorted(first.values[:3], reverse=True)


def test_siblings_are_different_and_tested_in_the_order_of_drawing(tiny_engine):
    for tree in trees_of(written(tiny_engine, temperature=1.5, max_new=30)):
        families: dict[int, list[int]] = {}
        for node, parent in enumerate(tree.parents):
            families.setdefault(parent, []).append(node)
        for parent, children in families.items():
            assert len({tree.ids[child] for child in children}) == len(children)
            tested = [tree.chances[child] is not None for child in children]
            assert tested == sorted(tested, reverse=True)
            if parent in (-1, *tree.accepted):
                assert tested[0]


@pytest.mark.parametrize("knobs", [{}, CONSTANT])
def test_a_draft_that_is_the_model_is_always_accepted(tiny_engine, knobs):
    """The first child of every node, which is an ordinary sample."""
    for tree in trees_of(written(tiny_engine, skip=0, **knobs))[:-1]:
        firsts = [tree.parents.index(tree.parents[node]) for node in tree.accepted]
        assert firsts == [*tree.accepted] and tree.origin == "bonus"
        if knobs:  # a beam may end early
            assert len(tree.accepted) == 3


@pytest.mark.parametrize(
    "knobs, match",
    [
        ({"branching": ()}, r"branching must be whole numbers from 1 .* not empty\."),
        ({"branching": (2, 0)}, r"branching must be whole numbers from 1 .* not 2, 0\."),
        ({"branching": (4, 4, 4, 4)}, r"at most 256 nodes, not 4, 4, 4, 4\."),
    ],
)
def test_what_makes_no_tree_is_refused(tiny_engine, knobs, match):
    params = rsd.Params(shape="constant", **knobs)
    with pytest.raises(BadParameter, match=match):
        list(rsd.run(tiny_engine, PROMPT, params, Context(1)))


@pytest.mark.parametrize(
    "name, knobs", [("width", {"width": 12}), ("branching", {**CONSTANT, "branching": (12,)})]
)
def test_more_children_than_tokens_are_refused(name, knobs):
    rsd.check(rsd.Params(**knobs), vocabulary=12)
    with pytest.raises(BadParameter, match=f"{name} must be at most the 11 tokens .* not 12"):
        rsd.check(rsd.Params(**knobs), vocabulary=11)
