"""SpecTr: k independent drafts by k-SEQ, and the numbers that it tells of them."""

from math import exp

import pytest

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import spectr
from analyzers.errors import BadParameter
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Event, Note, Scores, Token
from tests import tiny
from tests.events import ids_of, trees_of

PROMPT = Task("The quick brown fox")


def written(engine, **knobs) -> list[Event]:
    params = build(spectr.Params, {"max_new": 16, "skip": 1, **knobs})
    return list(spectr.run(engine, PROMPT, params, Context(3)))


def scores_of(events, name: str) -> list[Scores]:
    return [event for event in events if isinstance(event, Scores) and event.name == name]


@pytest.mark.parametrize("knobs", [{}, {"k": 1, "length": 1}, {"k": 7, "length": 2}, {"upto": 1}])
def test_at_temperature_zero_it_is_the_greedy_text(tiny_engine, knobs):
    events = written(tiny_engine, temperature=0.0, **knobs)
    plain = sampling.Params(temperature=0.0, max_new=16)
    assert ids_of(events) == ids_of(sampling.run(tiny_engine, PROMPT, plain, Context(3)))
    assert sum("likeliest" in event.text for event in events if isinstance(event, Note)) == 1
    assert not [event for event in events if isinstance(event, Scores)]


def test_the_same_seed_gives_the_same_events_and_the_right_size(tiny_engine):
    events = written(tiny_engine)
    assert events == written(tiny_engine) and len(ids_of(events)) == 16
    for tree in trees_of(events):
        assert tree.parents.count(-1) <= 4 and len(tree.ids) <= 16
    assert len(trees_of(events)[0].ids) >= 4


def test_a_draft_that_is_the_model_is_always_accepted(tiny_engine):
    events = written(tiny_engine, skip=0)
    for tree in trees_of(events)[:-1]:
        assert len(tree.accepted) == 4 and tree.origin == "bonus"
    assert all(rho.values == (1.0,) for rho in scores_of(events, "rho"))
    for told in scores_of(events, "acceptance"):
        assert told.values == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=1e-6)


def test_the_numbers_are_those_of_the_places_that_were_tested(tiny_engine):
    events = written(tiny_engine, temperature=1.5, max_new=40)
    wrote = {event.pos: event for event in events if isinstance(event, Token)}
    told = scores_of(events, "acceptance")
    assert told and {one.pos for one in told} <= set(wrote)
    drafted = [pos for pos, token in wrote.items() if token.origin in ("drafted", "corrected")]
    assert sorted(one.pos for one in told) == drafted
    roots, before = {tree.pos for tree in trees_of(events)}, 4
    for one, alive, rho in zip(
        told, scores_of(events, "drafts alive"), scores_of(events, "rho"), strict=True
    ):
        beta, k_seq, recursive, bound = one.values
        k, divisor = alive.values[0], rho.values[0]
        first = one.pos in roots
        assert k == 4 if first else k <= before
        before = k
        assert 1 <= k <= 4 and 1 <= divisor <= k
        assert k_seq == pytest.approx(1 - (1 - beta) ** k, abs=1e-5)
        assert k_seq == pytest.approx(divisor * beta, abs=1e-5)
        assert max(k_seq, recursive) <= bound + 1e-5
        if k == 1:
            assert divisor == 1 and beta == pytest.approx(bound, abs=1e-5)
    assert roots <= {one.pos for one in told}
    assert any(one.values < (4.0,) for one in scores_of(events, "drafts alive"))


def test_where_the_text_ends_among_the_drafts_nothing_more_is_told(own_engine):
    events = written(own_engine, skip=0)
    last = next(e for e in events if isinstance(e, Token) and e.origin == "drafted")
    own_engine._ends = frozenset({last.id})
    events = written(own_engine, skip=0)
    assert trees_of(events)[-1].extra is None
    wrote = [event.pos for event in events if isinstance(event, Token)]
    assert [one.pos for one in scores_of(events, "acceptance")] == wrote


@pytest.mark.parametrize("k", [1, 4])
def test_chances_of_the_tree_are_those_of_the_rule(tiny_engine, k):
    """p / (rho q), at most 1; the ordinary rule's where a sequence is the only one."""
    events = written(tiny_engine, k=k, max_new=40)
    rho = {one.pos: one.values[0] for one in scores_of(events, "rho")}
    assert (max(rho.values()) > 1) == (k > 1)
    wrote = {event.pos: event for event in events if isinstance(event, Token)}
    for tree in trees_of(events):
        roots = [node for node, parent in enumerate(tree.parents) if parent == -1]
        assert tree.chances[0] is not None
        # The raw numbers leave a share to the padding of the model's table.
        padding = wrote[tree.pos].p_sampled / exp(wrote[tree.pos].logprob)
        for node in (node for node in roots if tree.chances[node] is not None):
            ratio = padding * exp(tree.target_logprobs[node] - tree.draft_logprobs[node])
            assert tree.chances[node] == pytest.approx(min(1, ratio / rho[tree.pos]), abs=1e-3)
            assert (tree.coins[node] < tree.chances[node]) == (node in tree.accepted)


def test_more_sequences_than_tokens_are_refused():
    engine = tiny.engine()
    size = engine.vocabulary.size
    with pytest.raises(BadParameter, match=rf"k must be at most the {size} tokens"):
        list(spectr.run(engine, PROMPT, spectr.Params(k=size + 1), Context(1)))
