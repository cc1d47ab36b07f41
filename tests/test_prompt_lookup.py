"""Prompt lookup: finds what stood there, drafts what pays, and the text is the model's own."""

import random

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from analyzers.common.drafts import Outcome, Verdict
from analyzers.common.lookup import (
    DIFFERENT,
    NODE_MS,
    TRUST,
    Lookup,
    Proposed,
    Slot,
    Weighed,
    grown,
    worthwhile,
)
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import prompt_lookup
from analyzers.drafting.prompt_lookup import CHANCES, Looking, Params, prior
from analyzers.engine import Engine
from analyzers.engine.cost import Cost
from analyzers.task import Task
from analyzers.trace import DraftTree, Token, text_of

TEXTS = ("The quick brown fox. The quick brown", "abcabcabcab", "x")
CHEAP = Cost(10.0, ((1, 1.0), (64, 1.1)), 1000.0, 1)
DEAR = Cost(10.0, ((1, 1.0), (2, 5.0), (64, 99.0)), 1000.0, 1)


def random_text(seed: int, length: int = 120, size: int = 5) -> list[int]:
    rng = random.Random(seed)
    return [min(int(rng.expovariate(0.5)), size - 1) for _ in range(length)]


def run(engine: Engine, text: str, cost: Cost | None = None, **knobs) -> list:
    return list(prompt_lookup.run(engine, Task(text), Params(**knobs), Context(1, cost=cost)))


def proposed(text: list[int], cost: Cost | None = None, depth: int = 99, **knobs):
    return Looking(Params(**knobs), Context(1, cost=cost)).propose(text, depth)


# What is found


def test_longer_matches_come_first_and_then_later_ones():
    lookup = Lookup(3)
    #            0  1  2  3  4  5  6  7  8  9  10 11
    lookup.read([7, 1, 2, 8, 1, 2, 9, 2, 5, 3, 1, 2])
    assert lookup.after(()) == {9: Slot(2, 0), 8: Slot(2, 1), 5: Slot(1, 2)}
    assert lookup.after((8,)) == {1: Slot(3, 0)}  # 1 2 8 stood there
    assert lookup.after((6, 3)) == {1: Slot(1, 0)}  # 6 never stood there
    assert lookup.places() == (2, [3, 6])
    assert lookup.after((6,)) == {} and Lookup(3).places() == (0, ())


@pytest.mark.parametrize("seed", range(4))
def test_reading_a_growing_text_equals_the_slow_obvious_version(seed):
    ids, longest = random_text(seed), 4
    lookup = Lookup(longest)
    for end in (1, 2, 3, 40, 41, 120):
        text = ids[:end]
        lookup.read(text)
        expected: dict[int, Slot] = {}
        for n in range(min(longest, end), 0, -1):
            for place in range(end - 1, n - 1, -1):
                if text[place - n : place] == text[end - n :] and text[place] not in expected:
                    expected[text[place]] = Slot(n, len(expected))
        assert lookup.after(()) == dict(list(expected.items())[:DIFFERENT])


@pytest.mark.parametrize("seed", range(3))
def test_the_first_match_is_that_of_transformers(seed):
    theirs = PromptLookupCandidateGenerator(
        num_output_tokens=10, max_matching_ngram_size=2, max_length=10**6
    )
    for length in range(2, 120, 7):
        text = random_text(seed, length, size=30)
        found, _ = theirs.get_candidates(torch.tensor([text]))
        draft = proposed(text, matches="first", ngram=2, budget=10, fit=False)
        assert [*text, *draft.tree.ids] == found[0].tolist()
        assert draft.tree.parents == tuple(range(-1, len(draft.tree) - 1))


def test_the_latest_match_is_copied_to_the_end_of_the_text():
    text = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2]
    assert proposed(text, matches="latest").tree.ids == (5, 6, 1, 2)
    assert proposed(text, matches="first").tree.ids == (3, 4, 1, 2, 5, 6, 1, 2)
    assert proposed(text, matches="latest", budget=3).tree.ids == (5, 6, 1)
    assert proposed(text, depth=2, matches="latest").tree.ids == (5, 6)
    assert not proposed([1, 2, 3]).tree.ids


# How it is weighed


def test_the_tree_is_the_likeliest_of_all():
    text = random_text(5)
    draft = proposed(text, budget=30, depth=4)
    ids, parents, values = draft.tree.ids, draft.tree.parents, draft.values
    assert len(ids) == 30 and max(draft.tree.depths) == 4
    assert list(values) == sorted(values, reverse=True)
    assert len({*zip(ids, parents, strict=True)}) == 30  # no sibling twice
    everything, lookup = [], Lookup(4)
    lookup.read(text)

    def visit(path: tuple[int, ...], chance: float) -> None:
        for id, slot in lookup.after(path).items():
            everything.append(chance * prior(slot))
            if len(path) < 3:
                visit((*path, id), everything[-1])

    visit((), 1.0)
    assert list(values) == pytest.approx(sorted(everything, reverse=True)[:30])


def test_of_equally_likely_finds_the_first_is_drafted():
    finds = {5: Slot(1), 3: Slot(1), 9: Slot(1)}
    nodes = grown(lambda ids, slots: {} if ids else finds, lambda slot: 0.5, 9, 2)
    assert nodes == [Proposed(5, -1, Slot(1), 0.5), Proposed(3, -1, Slot(1), 0.5)]


def test_what_pays_is_what_yields_most_for_its_price():
    chances = (0.5, 0.4, 0.1)
    # 1/1, 1.5/1.2, 1.9/1.4, 2.0/1.6
    assert worthwhile(chances, lambda n: 1 + 0.2 * n) == 2
    assert worthwhile(chances, lambda n: 1.0) == 3
    assert worthwhile(chances, lambda n: 1.0 + n) == 0
    assert worthwhile(chances, lambda n: 1.0 + n, least=1) == 1
    # A dear first node may pay together with the next: 1.5/1.6, 1.9/1.6, 2.0/1.7
    assert worthwhile(chances, (1.0, 1.6, 1.6, 1.7).__getitem__) == 2
    assert worthwhile([], lambda n: 1.0) == 0


def test_only_what_pays_by_the_table_is_drafted():
    text = random_text(1)
    everything = proposed(text, budget=12)
    assert len(everything.tree) == 12 and everything.cost == 0
    cheap = proposed(text, CHEAP, budget=12)
    assert cheap.tree == everything.tree and cheap.cost == pytest.approx(12 * NODE_MS / 10)
    assert cheap.ended == "12 tokens were to be drafted"
    assert not proposed(text, DEAR).tree.ids
    assert proposed(text, DEAR, budget=12, fit=False).tree == everything.tree


def test_a_slot_is_as_likely_as_it_came_true(tiny_engine):
    weighed, slot = Weighed(lambda slot: 0.5, 4, None), Slot(1)
    draft = weighed.draft(lambda ids, _: {9: slot} if ids else {7: slot, 8: slot}, 2)
    assert draft.tree.ids == (7, 8, 9, 9) and draft.values == (0.5, 0.5, 0.25, 0.25)
    cursor = tiny_engine.prefill([1])
    checked = tiny_engine.verify(cursor, draft.tree)
    # Of two nodes that were tested one came true; what stands behind them was never reached.
    verdict = Verdict((1,), 3, "bonus", {0: 0.0, 1: 1.0})
    weighed.learn(Outcome(cursor.ids, draft, checked, verdict, lambda node: torch.ones(1)))
    assert weighed.chance(slot) == pytest.approx((TRUST * 0.5 + 1) / (TRUST + 2))
    assert weighed.chance(Slot(2)) == 0.5


def test_the_prior_is_the_table_and_its_last_row_is_for_all_longer_matches():
    assert prior(Slot(1, 2)) == CHANCES[0][2] and prior(Slot(4)) == prior(Slot(9)) == 0.80


# The text


@pytest.mark.parametrize("matches", ["several", "latest", "first"])
@pytest.mark.parametrize("text", TEXTS)
def test_writes_what_greedy_writes(tiny_engine, text, matches):
    plain = sampling.run(
        tiny_engine, Task(text), sampling.Params(temperature=0.0, max_new=24), Context(1)
    )
    events = run(tiny_engine, text, matches=matches, max_new=24)
    assert text_of(events) == text_of(plain)


def test_what_is_sampled_does_not_depend_on_the_drafts(tiny_engine):
    texts = {
        text_of(run(tiny_engine, TEXTS[0], temperature=1.0, max_new=24, **knobs))
        for knobs in ({}, {"matches": "first"}, {"budget": 1}, {"ngram": 1, "budget": 40})
    }
    assert len(texts) == 1


def test_rejected_drafts_are_recorded_with_their_chances(tiny_engine):
    events = run(tiny_engine, TEXTS[0], max_new=24)
    trees = [event for event in events if isinstance(event, DraftTree)]
    assert trees and any(len(tree.accepted) < len(tree.ids) for tree in trees)
    assert all(tree.measure == "estimated chance" for tree in trees)
    assert all(0 < value < 1 for tree in trees for value in tree.values)
    # The first step looks up " brown": what followed it is at the top.
    assert trees[0].texts[0] == " " and trees[0].values[0] == 0.8


def test_without_repetition_nothing_is_drafted(tiny_engine):
    first, *_ = run(tiny_engine, "x", max_new=1)
    assert isinstance(first, Token) and first.origin == "sampled"
