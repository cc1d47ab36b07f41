"""What searches share: the tree, the budget, prefixes that are computed once, and rollouts."""

import random
from dataclasses import fields

import pytest
import torch

from analyzers import registry
from analyzers.common.budget import Budget, BudgetSpent
from analyzers.common.judges import Court, Verdict
from analyzers.common.prefixes import Prefixes, shared
from analyzers.common.rollouts import rollouts
from analyzers.common.search_tree import SearchTree
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Filters
from analyzers.errors import Stopped
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Candidate, Judgement, Metric, SearchNode, text_of

PLAIN = Filters(temperature=1.0)


def test_a_budget_is_kept_exactly():
    budget = Budget(tokens=10)
    budget.charge("tokens", 10)
    with pytest.raises(BudgetSpent, match="the budget of 10 tokens is spent"):
        budget.charge("tokens")
    budget.charge("nodes", 1_000)
    assert budget.spent == {"tokens": 10, "evaluations": 0, "nodes": 1_000}
    told = {metric.name: metric.value for metric in budget.metrics(3, 7)}
    assert told["spent tokens"] == 10 and told["spent forwards"] == 7


def test_the_tree_tells_what_changed_and_no_more(tiny_engine):
    tree = SearchTree(tiny_engine, Budget())
    assert [event.node for event in tree.news()] == [0] and not list(tree.news())
    a = tree.add(tree.root, [104, 105], prior=0.5)
    b = tree.add(tree.root, [111])
    c = tree.add(a, [33])
    assert tree.add(tree.root, [104, 105]) is a and len(tree.nodes) == 4
    assert [(event.node, event.parent) for event in tree.news()] == [(1, 0), (2, 0), (3, 1)]
    c.visit(1.0)
    c.visit(-1.0)
    assert (c.value, c.visits, c.real_visits) == (0.0, 2.0, 2)
    assert [event.node for event in tree.news()] == [3]
    assert tree.text(c) == tiny_engine.vocabulary.decode([104, 105, 33])
    assert c.path == [tree.root, a, c] and c.depth == 2 and c.tokens == [104, 105, 33]
    tree.prune(tree.root, but=a)
    assert [node.status for node in (a, b, c)] == ["open", "pruned", "open"]


def test_a_character_belongs_to_the_node_that_completes_it(tiny_engine):
    """Whatever the borders, the pieces of a path are its text."""
    ids = tiny_engine.tokens("né ☃!")
    for border in range(1, len(ids)):
        tree = SearchTree(tiny_engine, Budget())
        last = tree.add(tree.add(tree.root, ids[:border]), ids[border:])
        pieces = [node.text.rstrip("\ufffd") for node in last.path]
        assert "".join(pieces) == tree.text(last) == "né ☃!"


def test_no_more_nodes_than_the_budget_has(tiny_engine):
    tree = SearchTree(tiny_engine, Budget(nodes=1))
    tree.add(tree.root, [1])
    with pytest.raises(BudgetSpent):
        tree.add(tree.root, [2])
    assert len(tree.nodes) == 2 and list(tree.root.children) == [(1,)]


def test_prefixes_give_what_computing_anew_gives(tiny_engine):
    rng = random.Random(0)
    fast, slow = Prefixes(tiny_engine), Prefixes(tiny_engine, reuse=False)
    texts = [[rng.randrange(3) + 97 for _ in range(rng.randrange(1, 12))] for _ in range(25)]
    before = tiny_engine.forwards
    for ids in texts:
        one, other = fast.cursor(ids), slow.cursor(ids)
        assert one.ids == other.ids == ids
        a, b = (tiny_engine.step(tiny_engine.fork(cursor)).raw for cursor in (one, other))
        assert torch.allclose(a, b, atol=1e-4)
    assert shared([1, 2, 3], [1, 2, 4]) == 2 and shared([], [1]) == 0
    assert tiny_engine.forwards > before


def test_a_text_that_is_there_is_not_computed_again(tiny_engine):
    prefixes = Prefixes(tiny_engine)
    prefixes.cursor([97, 98, 99])
    before = tiny_engine.forwards
    prefixes.cursor([97, 98, 99])
    assert tiny_engine.forwards == before


@pytest.mark.parametrize("together", [True, False])
def test_rollouts_draw_from_their_own_generators(tiny_engine, together):
    """The same whatever stands beside them, and the greedy one is the greedy text."""
    cursor = tiny_engine.prefill(tiny_engine.encode(Task("abc")))
    ctx = Context(5)

    def run(*keys):
        rngs = [None if key is None else ctx.rng(key) for key in keys]
        return rollouts(
            tiny_engine, cursor, rngs, Budget(), max_new=6, filters=PLAIN, together=together
        )

    greedy, one, two = run(None, 1, 2)
    assert run(2)[0].ids == two.ids and run(1)[0].ids == one.ids and cursor.pos == 3
    branch = tiny_engine.fork(cursor)
    for id in greedy.ids:
        step = tiny_engine.step(branch)
        assert id == int(step.raw.argmax())
        tiny_engine.push(branch, id)
    scored = tiny_engine.score(cursor, [one.ids])[0]
    assert one.logprobs == pytest.approx(scored.logprobs, abs=1e-4)
    chance = 1.0
    for logprob in one.logprobs:
        chance *= 2.718281828459045**logprob
    assert one.chance == pytest.approx(chance, rel=1e-3)


def test_rollouts_charge_before_each_pass(tiny_engine):
    cursor = tiny_engine.prefill(tiny_engine.encode(Task("abc")))
    budget = Budget(tokens=7)
    rngs = [Context(0).rng(i) for i in range(3)]
    before = tiny_engine.forwards
    with pytest.raises(BudgetSpent):
        rollouts(tiny_engine, cursor, rngs, budget, max_new=9, filters=PLAIN)
    assert budget.spent["tokens"] == 6 and tiny_engine.forwards == before + 2


def test_rollouts_end_where_they_are_told_to_and_at_the_window(tiny_engine):
    cursor = tiny_engine.prefill([97] * (tiny_engine.context - 2))
    full = rollouts(tiny_engine, cursor, [None], Budget(), max_new=9, filters=PLAIN)[0]
    assert len(full.ids) <= 2
    start = tiny_engine.prefill([97])
    over = rollouts(
        tiny_engine, start, [None], Budget(), max_new=9, filters=PLAIN, over=lambda ids: True
    )
    assert len(over[0].ids) == 1


class Counting:
    """Judges by length, and counts what it was asked."""

    name = "length"
    scale = (0.0, 100.0, "longer", False)

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, texts):
        self.asked += texts
        return [Verdict(float(len(text))) for text in texts]


def test_no_text_is_judged_twice():
    judge, budget = Counting(), Budget(evaluations=2)
    court = Court(judge, budget)

    def hear(*texts):
        events, hearing = [], court.hear(texts, "node 1")
        while True:
            try:
                events.append(next(hearing))
            except StopIteration as end:
                return events, end.value

    events, found = hear("ab", "abc", "ab")
    assert all(isinstance(event, Judgement) for event in events)
    assert [event.score for event in events] == [2.0, 3.0]
    assert [(key, verdict.score) for key, verdict in found] == [("e0", 2), ("e1", 3), ("e0", 2)]
    assert hear("abc") == ([], [found[1]]) and judge.asked == ["ab", "abc"]
    with pytest.raises(BudgetSpent):
        hear("new")
    assert judge.asked == ["ab", "abc"]


def test_forced_text_is_in_the_answer_with_the_models_own_signals(tiny_engine):
    cursor = tiny_engine.prefill(tiny_engine.encode(Task("abc")))
    ids = tiny_engine.tokens("hello")
    tokens = list(forced(tiny_engine, cursor, ids))
    assert text_of(tokens) == "hello" and [token.pos for token in tokens] == [3, 4, 5, 6, 7]
    fresh = tiny_engine.prefill(tiny_engine.encode(Task("abc")))
    scored = tiny_engine.score(fresh, [ids])[0]
    assert [token.logprob for token in tokens] == pytest.approx(scored.logprobs, abs=1e-4)


SEARCHES = ("rain", "deal", "best_of_n", "iterative_deepening", "stick", "spar")


def searching(name, engine, seed):
    """A small search with a program as the judge, on a model that may read long questions."""
    engine.context = 4096
    method = registry.method(name)
    given = {
        **{"max_new": 6, "iterations": 2, "n": 2, "chains": 2, "first": 3, "budget": 400},
        **{"criterion": "keywords", "reward": "keywords", "by": "keywords", "wish": "fox"},
        **{"checks": "keywords: fox", "checklist": "keywords: fox", "edge": "nothing"},
    }
    known = {field.name for field in fields(method.params)}
    params = build(method.params, {key: given[key] for key in given.keys() & known})
    return method.run(engine, Task("The dog"), params, Context(seed))


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_tells_the_plain_answer_once_and_what_it_spends(name, own_engine):
    events = list(searching(name, own_engine, 3))
    (told,) = [e for e in events if isinstance(e, Candidate) and e.group == "plain"]
    knobs = sampling.Params(temperature=0, max_new=6)
    assert told.text == text_of(list(sampling.run(own_engine, Task("The dog"), knobs, Context(3))))
    spent = [e.value for e in events if isinstance(e, Metric) and e.name == "spent tokens"]
    assert len(spent) > 1 and spent == sorted(spent) and spent[-1] > 0
    last = {event.name: event.value for event in events if isinstance(event, Metric)}
    for what in ("tokens", "evaluations", "forwards"):
        assert last[f"spent {what}"] <= last[f"expected {what}"]


def timeless(events):
    """Without what tells how long it took."""
    return [event for event in events if not isinstance(event, Judgement)]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_seed_grows_the_same_tree_and_another_one_another(name, own_engine):
    one, again, other = (list(searching(name, own_engine, seed)) for seed in (3, 3, 4))
    assert timeless(one) == timeless(again) != timeless(other)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_stop_anywhere_leaves_a_whole_tree_as_far_as_it_got(name, own_engine):
    """Before any pass, those of an expansion included: what was told until then is the beginning
    of what would have been told, and no node hangs on one that was not told."""
    before = own_engine.forwards
    whole = timeless(searching(name, own_engine, 3))
    passes = own_engine.forwards - before
    sizes = set()
    for most in range(1, passes, max(passes // 12, 1)):
        left = iter(range(most))

        def poll(left=left):
            if next(left, None) is None:
                raise Stopped("stopped")

        own_engine.poll, events = poll, []
        with pytest.raises(Stopped):
            for event in searching(name, own_engine, 3):
                events.append(event)
        assert timeless(events) == whole[: len(timeless(events))]
        nodes = [event for event in events if isinstance(event, SearchNode)]
        numbers = {event.node for event in nodes}
        assert {event.parent for event in nodes} <= numbers | {None}
        sizes.add(len(numbers))
    assert len(sizes) > 1
