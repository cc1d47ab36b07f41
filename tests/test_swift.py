"""SWIFT: the search keeps what is better, drafts are as long as they may be, the text is plain."""

import json
import random
from collections import Counter
from itertools import pairwise, permutations
from statistics import fmean

import numpy as np
import pytest
import torch

from analyzers.common.acceptance import pick, recursive
from analyzers.common.drafts import NOTHING, siblings
from analyzers.common.proposers import Itself
from analyzers.common.skipping import (
    LENGTHS,
    NOISE,
    GaussianProcess,
    Limits,
    Search,
    matern,
    neighbours,
    random_set,
)
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import swift
from analyzers.drafting.swift import GREEDY, SAMPLED, Params, Swift, label, size_of, switches_of
from analyzers.engine import Engine, Filters, Options, Tree
from analyzers.engine.cost import Cost
from analyzers.errors import ModelLacks
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Scores, Token, text_of
from tests import tiny
from tests.events import ids_of, trees_of

TEXT = Task("The quick brown fox jumps over")
LAYERS = 6
SMALL = {"window": 4, "max_new": 24, "length": 4}


def engine_of(layers: int) -> Engine:
    identity = {"name": "tiny", "hash": "0", "dtype": "float32", "device": "cpu"}
    made = Engine(tiny.model(num_hidden_layers=layers), tiny.tokenizer(), identity)
    made._ends = frozenset()
    return made


@pytest.fixture(scope="module")
def deep() -> Engine:
    return engine_of(LAYERS)


@pytest.fixture(scope="module")
def plain(deep) -> str:
    params = sampling.Params(temperature=0.0, max_new=SMALL["max_new"])
    return text_of(sampling.run(deep, TEXT, params, Context(1)))


def run(engine: Engine, ctx: Context | None = None, **knobs) -> list[Event]:
    return list(swift.run(engine, TEXT, Params(**SMALL | knobs), ctx or Context(1)))


def scores(events: list[Event], name: str) -> list[Scores]:
    return [event for event in events if isinstance(event, Scores) and event.name == name]


def tried(events: list[Event]) -> list[Metric]:
    return [e for e in events if isinstance(e, Metric) and e.name.startswith("matchness, ")]


def chain(tree: DraftTree) -> list[int]:
    """The nodes of the main chain: of siblings the first one goes on."""
    nodes, children = [], siblings(Tree(tree.ids, tree.parents))
    while here := children.get(nodes[-1] if nodes else -1):
        nodes.append(here[0])
    return nodes


# The search


def searched(value, *, seed=1, start=None, switches=20, size=4, **limits) -> Search:
    rng = random.Random(seed)
    search = Search(switches, start or random_set(switches, size, rng), rng, Limits(**limits))
    best = [0.0]
    while not search.over:
        proposal = search.propose()
        assert len(proposal.off) == size and max(proposal.off) < switches
        assert proposal.off not in search.tried
        assert search.register(proposal, value(proposal.off)) == (search.value > best[-1])
        best.append(search.value)
    assert best == sorted(best) and search.value == max([0.0, *search.tried.values()])
    return search


def test_the_search_stops_at_each_of_its_limits():
    assert searched(lambda off: 0.96).over == "96% is good enough"
    assert len(searched(lambda off: 0.96).tried) == 1
    none = searched(lambda off: 0.5, patience=7)
    assert len(none.tried) == 8 and "the last 7 sets" in none.over
    assert "30 sets were tried" in searched(lambda off: 0.0, most=30).over
    assert len(searched(lambda off: 0.0, most=0).tried) == 0
    every = searched(lambda off: 0.0, switches=5, size=2)
    assert len(every.tried) == 10 and every.over == "every set has been tried"
    assert len(searched(lambda off: 0.9, switches=5, size=5).tried) == 1


def test_one_set_in_so_many_is_the_gaussian_process_s():
    rng = random.Random(3)
    search = Search(12, frozenset({0, 1}), rng, Limits(every=4))
    kinds = []
    for _ in range(9):
        proposal = search.propose()
        kinds.append(proposal.kind)
        search.register(proposal, rng.random() / 2)
    assert kinds == ["start", *["random"] * 2, "bayes", *["random"] * 3, "bayes", "random"]
    assert next(iter(search.tried)) == {0, 1}


def test_the_gaussian_process_finds_what_chance_does_not():
    """Of 20 switches four can be left out, the others cost a little each."""
    free, price = {2, 3, 11, 17}, 0.2

    def value(off):
        return 1 - price * len(off - free)

    def found(every):
        return [searched(value, seed=seed, most=40, every=every).value for seed in range(4)]

    assert fmean(found(3)) > fmean(found(0)) + 0.1


def test_a_gaussian_process_equals_the_textbook():
    rng = np.random.default_rng(1)
    points, values, others = rng.random((7, 3)), rng.random(7), rng.random((5, 3))
    process = GaussianProcess(points, values)
    mean, deviation = process.at(others)

    def kernel(a, b):
        apart = np.linalg.norm(a[:, None] - b[None], axis=-1)
        return matern(apart, process.length)

    given = (values - values.mean()) / values.std()
    inverse = np.linalg.inv(kernel(points, points) + NOISE * np.eye(7))
    across = kernel(others, points)
    np.testing.assert_allclose(mean, values.mean() + values.std() * across @ inverse @ given)
    variance = 1 - np.einsum("ij,jk,ik->i", across, inverse, across)
    np.testing.assert_allclose(deviation, values.std() * np.sqrt(variance))
    assert process.length in LENGTHS


def test_a_gaussian_process_knows_what_it_saw_and_doubts_the_rest():
    points = np.array([[0.0, 0.0], [1.0, 0.0]])
    mean, deviation = GaussianProcess(points, np.array([0.2, 0.8])).at(
        np.array([[0.0, 0.0], [1.0, 0.0], [300.0, 0.0]])
    )
    assert mean == pytest.approx([0.2, 0.8, 0.5], abs=0.02)
    assert deviation[2] == pytest.approx(0.3) and max(deviation[:2]) < 0.1
    same, _ = GaussianProcess(points, np.array([0.4, 0.4])).at(points)
    assert same == pytest.approx([0.4, 0.4])


def test_the_kernel():
    assert matern(np.array([0.0, 1.0]), 1.0) == pytest.approx([1.0, 0.523994])
    assert matern(np.array([3.0]), 3.0) == matern(np.array([1.0]), 1.0)


def test_neighbours_differ_by_one_exchange():
    found = neighbours(frozenset({0, 2}), 4)
    assert len(set(found)) == 4 and all(len(each & {0, 2}) == 1 == len(each) - 1 for each in found)


# Which sub-layers


@pytest.mark.parametrize(("ratio", "size"), [(0, 0), (0.01, 1), (0.1, 5), (0.45, 25), (1, 56)])
def test_the_ratio_says_how_many(ratio, size):
    assert size_of(56, ratio) == size


def test_first_and_last_layer_are_never_left_out(deep):
    events = run(deep, ratio=0.5, floor=0.0)
    (labels,) = {each.over for each in scores(events, "skipped")}
    assert labels == ("a2", "a3", "a4", "a5", "f2", "f3", "f4", "f5")
    assert all(sum(each.values) == 4 for each in scores(events, "skipped"))
    assert [label(switch) for switch in switches_of(deep)] == list(labels)


def test_a_model_of_two_layers_cannot(deep):
    with pytest.raises(ModelLacks, match="has 2 in all"):
        list(swift.run(engine_of(2), TEXT, Params(), Context(1)))


# Runs


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"ratio": 0.0},
        {"ratio": 1.0, "floor": 0.0},
        {"ratio": 0.4, "floor": 0.0, "every": 2},
        {"ratio": 0.4, "floor": 0.5, "alternatives": False},
        {"most": 0, "reuse": False},
    ],
)
def test_greedy_text_is_the_greedy_text_whatever_is_left_out(deep, plain, knobs):
    events = run(deep, **knobs)
    assert text_of(events) == plain and trees_of(events)
    assert {type(event) for event in events} <= set(swift.CARD.emits)


def test_the_smallest_models_draft_with_the_defaults(tiny_engine):
    events = list(swift.run(tiny_engine, TEXT, Params(max_new=12), Context(1)))
    assert trees_of(events) and scores(events, "skipped")[0].over == ("a2", "f2")


def test_with_nothing_left_out_every_draft_is_accepted(deep):
    events = run(deep, ratio=0.0, floor=0.0)
    for tree in trees_of(events)[:-1]:
        assert list(tree.accepted) == chain(tree) and len(tree.accepted) == SMALL["length"]
    (only,) = tried(events)  # the set of nothing is the only one
    assert (only.name, only.value) == ("matchness, start", 1.0)


def test_the_search_is_told_step_by_step(deep):
    events = run(deep, ratio=0.4, length=2, every=3)
    found = tried(events)
    assert [each.step for each in found] == list(range(1, len(found) + 1)) and len(found) > 4
    assert found[0].name == "matchness, start"
    assert {each.name for each in found} >= {"matchness, random", "matchness, bayes"}
    best, off = 0.0, scores(events, "skipped")[0]
    for event, after in pairwise(events):
        if event in found and event.value > best:
            best = event.value
            if event.name != "matchness, start":
                assert isinstance(after, Scores) and after.values != off.values
                off = after
    assert off == scores(events, "skipped")[-1]
    bests = [max(each.value for each in found[: n + 1]) for n in range(len(found))]
    changes = sum(b > a for a, b in pairwise(bests))
    assert len(scores(events, "skipped")) == 1 + changes > 1  # said only where it changed


def test_drafts_come_from_the_best_set_so_far(deep):
    events, off = run(deep, ratio=0.4, length=2, every=3), frozenset()
    ids = [*deep.encode(TEXT), *ids_of(events)]
    for event in events:
        if isinstance(event, Scores):
            pairs = zip(switches_of(deep), event.values, strict=True)
            off = frozenset(switch for switch, value in pairs if value)
        elif isinstance(event, DraftTree):
            alone = Itself(deep, deep.prefill(ids[: event.pos]), Options(skip=off), Filters())
            (row,) = alone.rows(ids[: event.pos], NOTHING)
            expected = float(row[event.ids[0]].log())
            assert event.draft_logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_matchness_is_what_a_slow_reading_says(deep):
    ids = deep.encode(TEXT)
    answer = deep.encode(Task("ed over the"))
    drafter = Swift(deep, deep.prefill(ids), Params(), Context(1), frozenset())
    full = deep.prefill([*ids, *answer])
    for off in ({0}, {1, 6}, set(range(8)), {0, 1, 2, 3}):
        options = Options(skip=frozenset(switches_of(deep)[switch] for switch in off))
        steps = deep.read(deep.fork(full, to=len(ids)), answer, options=options)
        right = [int(step.logits.argmax()) == id for id, step in steps]
        assert drafter._matchness(answer, off) == pytest.approx(fmean(right), abs=1e-6)


def test_each_sub_layer_by_itself(deep):
    events = run(deep, strip=True)
    (strip,) = scores(events, "matchness alone")
    assert len(strip.values) == 2 * (LAYERS - 2) and all(0 <= v <= 1 for v in strip.values)
    at_first = run(deep, strip=True, ratio=0.01)  # where one is left out, it is one of these
    assert tried(at_first)[0].value in scores(at_first, "matchness alone")[0].values


def test_nothing_is_tried_before_there_is_something_to_try_it_on(deep):
    assert not tried(run(deep, window=40))
    events = run(deep, window=10, floor=1.0, length=1)
    first = next(place for place, event in enumerate(events) if event in tried(events))
    assert len([event for event in events[:first] if isinstance(event, Token)]) >= 11


def test_the_best_set_is_kept_for_the_next_run(deep):
    ctx = Context(1)
    first = run(deep, ctx, ratio=0.3)
    best = scores(first, "skipped")[-1].values
    data, meta = ctx.artifacts.get("swift", "2 of 8")
    assert json.loads(data) == [switch for switch, value in enumerate(best) if value]
    assert meta["matchness"] == max(each.value for each in tried(first))
    again = run(deep, ctx, ratio=0.3)
    assert scores(again, "skipped")[0].values == best
    assert any(isinstance(event, Note) and "earlier run" in event.text for event in again)
    fresh = run(deep, ctx, ratio=0.3, reuse=False)
    assert scores(fresh, "skipped")[0] == scores(first, "skipped")[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_a_draft_ends_behind_the_first_token_below_the_floor(deep, temperature, floor):
    events = run(deep, temperature=temperature, floor=floor, ratio=0.3)
    counts = SAMPLED if temperature else GREEDY
    for tree in trees_of(events):
        main = chain(tree)
        p = [np.exp(tree.draft_logprobs[node]) for node in main]
        assert len(main) <= SMALL["length"] and all(each >= floor for each in p[:-1])
        children = siblings(Tree(tree.ids, tree.parents))
        for node, each in zip([-1, *main], p, strict=False):
            wide = counts[sum(each <= sure for sure in (0.95, 0.8, 0.5))]
            assert len(children[node]) == wide
            assert len({tree.ids[child] for child in children[node]}) == len(children[node])


def test_how_many_stand_beside_each_other(deep):
    drafter = Swift(deep, deep.prefill([1, 2]), Params(), Context(1), frozenset())
    assert [drafter._count(p, GREEDY) for p in (0.96, 0.95, 0.8, 0.5)] == [3, 5, 8, 10]
    assert [drafter._count(p, SAMPLED) for p in (1.0, 0.81, 0.51, 0.1)] == [1, 3, 5, 10]
    row = torch.tensor([0.7, 0.0, 0.3, 0.0], dtype=torch.float64)
    assert drafter._likeliest(row) == [0, 2]  # what cannot come is not drafted
    assert sorted(drafter._sampled(row)) == [0, 2]


def test_alternatives_are_drawn_one_after_the_other(deep):
    drafter = Swift(deep, deep.prefill([1, 2]), Params(), Context(1), frozenset())
    q, runs = [0.45, 0.3, 0.2, 0.05], 3_000
    row = torch.tensor(q, dtype=torch.float64)
    counts = Counter(tuple(drafter._sampled(row)) for _ in range(runs))
    chi = 0.0
    for a, b, c, d in permutations(range(4)):
        expected = runs * q[a] * q[b] / (1 - q[a]) * q[c] / (q[c] + q[d])
        chi += (counts[a, b, c, d] - expected) ** 2 / expected
    assert counts.total() == runs and chi < 41.6  # 1 % at 23 degrees of freedom


def test_what_a_draft_costs(deep):
    cost = Cost(10.0, ((1, 1.0), (64, 64.0)), 1000.0, 1)
    events = run(deep, Context(1, cost=cost), ratio=0.5, window=20, max_new=20)
    for tree in trees_of(events):  # four of twelve sub-layers are left out
        assert tree.cost == pytest.approx(1 + len(tree.ids) + len(chain(tree)) * 8 / 12)
    searching = run(deep, Context(1, cost=cost), ratio=0.5, window=4, max_new=20)
    tree = trees_of(searching)[-2]
    search = 5 * 8 / 12  # a pass over the first five tokens
    assert tree.cost == pytest.approx(1 + len(tree.ids) + len(chain(tree)) * 8 / 12 + search)


def test_sampling_is_seeded(deep):
    first, again = (run(deep, temperature=1.0, ratio=0.3) for _ in range(2))
    assert first == again and any(tree.coins for tree in trees_of(first))


def test_sampled_texts_are_distributed_as_the_model_s(deep):
    """The law of the first three tokens where each row of p and q is one of a small table; the
    children rule gives one, three, or (up to) all of the four tokens."""
    p = torch.tensor(
        [[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0, 0, 0.5, 0.5]],
        dtype=torch.float64,
    )
    q = torch.tensor(
        [[0.2, 0.3, 0.1, 0.4], [0.01, 0.01, 0.01, 0.97], [0.85, 0.1, 0.05, 0], [0.6, 0, 0.4, 0]],
        dtype=torch.float64,
    )

    class Table:
        cost = 0.5

        def rows(self, text, tree):
            return [q[0], *(q[id] for id in tree.ids)]

    params = Params(temperature=1.0, floor=0.0)
    drafter = Swift(deep, deep.prefill([1, 2]), params, Context(1), frozenset())
    drafter._proposer = Table()
    coin, counts, runs = random.Random(5).random, Counter(), 3_000
    for _ in range(runs):
        draft = drafter._draft([1, 2], 2)
        ids = draft.tree.ids
        verdict = recursive(lambda node, ids=ids: p[ids[node] if node >= 0 else 0], draft, coin)
        written = [*(ids[node] for node in verdict.path), verdict.extra]
        while len(written) < 3:
            written.append(pick(p[written[-1]], coin()))
        counts[tuple(written)] += 1
    chi, cells = 0.0, 0
    for a in range(4):
        for b in range(4):
            for c in range(4):
                if expected := runs * float(p[0][a] * p[a][b] * p[b][c]):
                    chi, cells = chi + (counts[a, b, c] - expected) ** 2 / expected, cells + 1
                else:
                    assert not counts[a, b, c]
    assert 40 < cells <= 64 and chi < 92.0  # 1 % at 63 degrees of freedom
