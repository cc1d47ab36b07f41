"""RAIN: its arithmetic in the paper's own numbers, and the tree that it grows."""

from collections.abc import Callable, Sequence
from itertools import groupby, takewhile

import pytest
import torch

from analyzers.common import puct
from analyzers.common.embedding import Embedder
from analyzers.common.judges import Verdict
from analyzers.common.search_tree import Node
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine
from analyzers.errors import BadParameter
from analyzers.params import build
from analyzers.search import rain
from analyzers.task import Task
from analyzers.trace import (
    Candidate,
    Event,
    Judgement,
    Metric,
    Note,
    SearchNode,
    Token,
    surviving,
    text_of,
)
from tests import tiny

TASK = Task("The dog")
SMALL = {"max_new": 6, "iterations": 6, "candidates": 3, "rollout": 6, "gamma": 0.0}

ALIKE = Embedder("alike", 0.95, 1.0, "a note", lambda texts: torch.ones(len(texts), 4) / 2)


class Scripted:
    """A judge that is a function of the text, from -1 to 1; keeps what it was shown."""

    name = "scripted"
    scale = (-1.0, 1.0, "better", False)

    def __init__(self, value: Callable[[str], float | None]) -> None:
        self.value = value
        self.shown: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        self.shown += texts
        return [Verdict(self.value(text)) for text in texts]


@pytest.fixture
def own_engine(own_engine: Engine) -> Engine:
    """Writes ASCII only, so that every token is a character; with room for a judge's questions."""
    own_engine.vocabulary.size = 128
    own_engine.context = 4096
    return own_engine


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], float | None]], Scripted]:
    """Make a function the judge of the searches of this test."""

    def use(value: Callable[[str], float | None]) -> Scripted:
        judge = Scripted(value)
        monkeypatch.setattr(rain, "judge_of", lambda *args, **knobs: judge)
        monkeypatch.setattr(rain, "told", lambda *args, **knobs: iter(()))
        return judge

    return use


def play(engine: Engine, task: Task = TASK, seed: int = 7, **knobs: object) -> list[Event]:
    return list(rain.run(engine, task, build(rain.Params, SMALL | knobs), Context(seed)))


def why(engine: Engine, **knobs: object) -> str:
    run = rain.run(engine, TASK, build(rain.Params, SMALL | knobs), Context(7))
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def nodes(events: Sequence[Event]) -> dict[int, SearchNode]:
    """The tree as it ended."""
    return {event.node: event for event in events if isinstance(event, SearchNode)}


def until_the_first_commit(engine: Engine, **knobs: object) -> list[Event]:
    run = rain.run(engine, TASK, build(rain.Params, SMALL | knobs), Context(7))
    return list(takewhile(lambda event: not isinstance(event, Token), run))


def looks(events: Sequence[Event]) -> int:
    return max(e.step for e in events if isinstance(e, Metric) and e.name == "best child's visits")


def ups_and_downs(text: str) -> float:
    """Any value, the same for the same text."""
    return (sum(map(ord, text)) % 21 - 10) / 10


# The arithmetic


def test_an_unvisited_likely_child_comes_before_a_good_one():
    value = puct.exploit(0.5, -1, 1), puct.explore(0.6, 4, 9, c=2)
    assert value == pytest.approx((0.749996, 0.72), abs=1e-6)
    unvisited = puct.exploit(None, -1, 1) + puct.explore(0.3, 0, 9, c=2)
    assert unvisited == pytest.approx(1.8) and unvisited > sum(value)


def test_a_similar_sibling_learns_a_part_of_a_visit():
    node = Node(1, None)
    node.visit(-1.0)
    node.value, node.visits = puct.learned(node.value, node.visits, 1.0, 0.97, 0.2)
    assert (node.visits, node.value) == pytest.approx((1.194, -0.675042), abs=1e-6)
    node.visit(1.0)
    assert (node.visits, node.value) == pytest.approx((2.194, 0.088422), abs=1e-6)
    assert node.real_visits == 2


@pytest.mark.parametrize(
    ("greedy", "others", "clamped", "priors"),
    [
        (0.9, [0.02, 0.01], 0.03, [0.5, 0.3333, 0.1667]),
        (0.005, [0.02, 0.01, 0.005], 0.025, [0.4167, 0.3333, 0.1667, 0.0833]),
        (0.3, [], 0.3, [1.0]),
    ],
)
def test_the_greedy_text_is_held_near_the_others(greedy, others, clamped, priors):
    found = puct.clamp_greedy(greedy, others)
    assert found == pytest.approx(clamped)
    assert puct.shares([found, *others]) == pytest.approx(priors, abs=1e-4)


def test_chances_too_small_for_a_float_share_alike():
    assert puct.shares([0.0, 0.0]) == [0.5, 0.5]


def test_every_child_of_the_root_gets_some_looks():
    assert [puct.mix_root(prior, 2) for prior in (0.8, 0.2)] == pytest.approx([0.725, 0.275])


@pytest.mark.parametrize(
    ("values", "commits"),
    [([1] * 7, True), ([1] * 6 + [-1], False), ([1] * 6 + [0], True), ([1] * 6, False)],
)
def test_what_is_committed_early(values, commits):
    node = Node(1, None)
    for value in values:
        node.visit(value)
    assert puct.settled(node.value, node.real_visits, enough=6, good=0.8) is commits


def test_a_node_that_was_never_visited_is_not_settled():
    assert not puct.settled(None, 0, enough=0, good=-1)


# The search


def test_without_similarity_every_visit_is_a_real_one(own_engine, judged):
    judged(ups_and_downs)
    assert all(node.visits == node.real_visits for node in nodes(play(own_engine)).values())
    first = until_the_first_commit(own_engine)
    assert nodes(first)[0].real_visits == looks(first) == SMALL["iterations"]


def test_a_node_is_worth_the_mean_of_what_was_said_of_the_texts_behind_it(own_engine, judged):
    judged(ups_and_downs)
    events = until_the_first_commit(own_engine, max_new=60, iterations=12)
    scores = {event.key: event.score for event in events if isinstance(event, Judgement)}
    tree = nodes(events)

    def below(number: int) -> list[SearchNode]:
        children = [node for node in tree.values() if node.parent == number]
        return [tree[number], *(each for child in children for each in below(child.node))]

    for number, node in tree.items():
        heard = [scores[key] for each in below(number) for key in each.evals]
        assert len(heard) == node.real_visits  # no text is at its end: a leaf is seen once
        if heard:
            assert node.value == pytest.approx(sum(heard) / len(heard), abs=1e-5)


def test_the_answer_is_what_was_committed(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine, lengths=(1, 2, 4), max_new=9)
    kept = [node for node in nodes(events).values() if node.status == "committed"]
    tokens = surviving(events)
    assert len(tokens) == 9 and text_of(events) == "".join(node.text for node in kept)
    assert [token.pos for token in tokens] == list(range(7, 16))
    parents = {node.node: node.parent for node in nodes(events).values()}
    assert [parents[node.node] for node in kept[1:]] == [node.node for node in kept[:-1]]


def test_sets_have_their_lengths_by_depth(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine, lengths=(1, 2, 4), max_new=12)
    runs = groupby(events, lambda event: isinstance(event, Token))
    written = [len(list(tokens)) for are_tokens, tokens in runs if are_tokens]
    assert written == [1, 2, 4, 4, 1]  # the last one is cut where the answer ends


def test_committing_keeps_what_was_found_and_leaves_the_siblings(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine, iterations=8)
    place = next(i for i, event in enumerate(events) if isinstance(event, Token))
    committed = nodes(events[:place])
    top = max(node.node for node in committed.values() if node.status == "committed")
    assert committed[top].real_visits > 1  # the next looks go on from these
    for node in committed.values():
        if node.parent == 0 and node.node != top:
            assert node.status == "rewound"
        if node.parent == top:
            assert node.status == "open"
    again = nodes(events[: place + 40])[top]
    assert again.real_visits >= committed[top].real_visits


def test_where_all_is_good_the_likeliest_is_committed_early(own_engine, judged):
    judged(lambda text: 1.0)
    first = until_the_first_commit(own_engine, iterations=30, visits=3, rollout=2, c=0.5)
    children = [node for node in nodes(first).values() if node.parent == 0]
    best = max(children, key=lambda node: node.prior)
    assert best.status == "committed" and best.real_visits == 4
    assert looks(first) == 5  # one at the root itself
    assert "better than 0.8" in best.detail["reason"]


def test_a_judge_that_never_likes_anything_ends_at_the_limit_of_looks(own_engine, judged):
    judged(lambda text: -1.0)
    assert looks(until_the_first_commit(own_engine)) == SMALL["iterations"]
    events = play(own_engine, max_new=1)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("could hardly tell them apart" in text for text in notes)


def test_one_candidate_of_one_token_is_the_greedy_text(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine, candidates=1, lengths=(1,), iterations=2, least=1)
    greedy = sampling.Params(temperature=0, max_new=6)
    assert text_of(events) == text_of(sampling.run(own_engine, TASK, greedy, Context(0)))


def test_a_planted_judge_is_heard(own_engine, judged):
    """Texts that it likes come far more often than from sampling with the same seeds."""

    def likes(text: str) -> bool:
        return any("n" <= char <= "z" for char in text)

    judged(lambda text: 1.0 if likes(text) else -1.0)
    plain = sampling.Params(temperature=1.0, top_p=1.0, max_new=6)
    seeds = range(8)
    sampled = [text_of(sampling.run(own_engine, TASK, plain, Context(seed))) for seed in seeds]
    knobs = {"lengths": (1, 2), "candidates": 8, "iterations": 12}
    searched = [text_of(play(own_engine, seed=seed, **knobs)) for seed in seeds]
    assert sum(map(likes, sampled)) <= 4
    assert sum(map(likes, searched)) >= 7


def test_reusing_what_was_computed_changes_nothing(own_engine, judged):
    judged(ups_and_downs)
    knobs = {"gamma": 0.2, "lengths": (1, 2), "max_new": 4}
    fast, slow = (play(own_engine, reuse=reuse, **knobs) for reuse in (True, False))
    one, other = nodes(fast), nodes(slow)
    assert text_of(fast) == text_of(slow) and one.keys() == other.keys()
    for number, node in one.items():
        same = other[number]
        assert (node.parent, node.text, node.status) == (same.parent, same.text, same.status)
        assert node.real_visits == same.real_visits
        assert node.prior == pytest.approx(same.prior, abs=1e-4)
        assert node.visits == pytest.approx(same.visits, abs=1e-4)
        assert node.value == pytest.approx(same.value, abs=1e-4)


def test_similar_siblings_share_a_value(own_engine, judged, monkeypatch):
    """The slow obvious version: with vectors that are all alike, what one child is told counts 0.2
    visits for every other that was visited before."""
    judged(ups_and_downs)
    monkeypatch.setattr(rain, "embedder", lambda engine: ALIKE)
    knobs = {"gamma": 0.2, "lengths": (1,), "max_new": 1, "iterations": 12}
    events = play(own_engine, **knobs)
    assert Note("info", ALIKE.note) in events
    children = {number: node for number, node in nodes(events).items() if node.parent == 0}
    looked_at = {
        event.detail["iteration"]: event.node
        for event in events
        if isinstance(event, SearchNode) and event.parent == 0 and "iteration" in event.detail
    }
    assert sorted(looked_at) == list(range(2, 13)) and len(set(looked_at.values())) > 1
    told: dict[int, list[tuple[float, float]]] = {}  # node -> (value, weight)
    for look in sorted(looked_at):
        number = looked_at[look]
        value = ups_and_downs(children[number].text)
        for other in told:
            if other != number and children[number].text.strip() and children[other].text.strip():
                told[other].append((value, 0.2))
        told.setdefault(number, []).append((value, 1.0))
    for number, heard in told.items():
        visits = sum(weight for _, weight in heard)
        mean = sum(value * weight for value, weight in heard) / visits
        node = children[number]
        assert (node.visits, node.value) == pytest.approx((visits, mean), abs=1e-5)
    assert any(node.detail.get("embedding_similarity") == 1.0 for node in children.values())


def test_where_all_is_alike_and_bad_more_is_tried(own_engine, judged, monkeypatch):
    judged(lambda text: -1.0)
    monkeypatch.setattr(rain, "embedder", lambda engine: ALIKE)
    knobs = {"lengths": (1,), "max_new": 1, "iterations": 60}
    for gamma, most in ((0.2, 6), (0.0, 3)):
        events = play(own_engine, gamma=gamma, **knobs)
        children = [node for node in nodes(events).values() if node.parent == 0]
        assert len(children) == most
    step = own_engine.step(own_engine.prefill(own_engine.encode(TASK)))
    top = [own_engine.vocabulary.decode([id]) for id in step.raw[:128].topk(6).indices.tolist()]
    events = play(own_engine, gamma=0.2, **knobs)
    assert [node.text for node in nodes(events).values() if node.parent == 0] == top


def test_added_sets_are_drawn_anew(own_engine, judged, monkeypatch):
    judged(lambda text: -1.0)
    monkeypatch.setattr(rain, "embedder", lambda engine: ALIKE)
    knobs = {"lengths": (3,), "max_new": 3, "iterations": 20, "candidates": 2}
    children = [
        node for node in nodes(play(own_engine, gamma=0.2, **knobs)).values() if node.parent == 0
    ]
    assert 2 < len(children) <= 4
    assert all(0 < node.prior < 1 for node in children)


# What is judged


def test_texts_are_judged_where_they_pause_and_only_once(own_engine, judged):
    judge = judged(ups_and_downs)
    events = play(own_engine, task=Task("The dog", prefix="So"), max_new=4)
    assert len(judge.shown) == len(set(judge.shown))
    assert all(text.startswith("So") for text in judge.shown)
    rollouts = [node.detail.get("rollout", "") for node in nodes(events).values()]
    for text in rollouts:
        assert not any(char in text[:-1] for char in rain.PAUSES)


def test_whole_texts_are_judged_up_to_their_last_period(own_engine, judged):
    judge = judged(ups_and_downs)
    play(own_engine, criterion="truthful", rollout=40, max_new=2)
    assert judge.shown
    assert all(text.endswith(".") or "." not in text for text in judge.shown)


def test_a_text_that_cannot_be_read_counts_as_neither_good_nor_bad(own_engine, judged):
    judged(lambda text: None)
    visited = [node for node in nodes(play(own_engine, max_new=2)).values() if node.real_visits]
    assert visited and {node.value for node in visited} == {0.0}


def test_keywords_are_planted_and_harmlessness_is_asked_of_the_model():
    own_engine = tiny.engine()
    own_engine.context = 4096  # the question is long in bytes
    planted = play(own_engine, criterion="keywords", wish="dog, sun", max_new=1)
    (judge,) = {event.judge for event in planted if isinstance(event, Judgement)}
    asked = play(own_engine, max_new=1, iterations=2)
    (other,) = {event.judge for event in asked if isinstance(event, Judgement)}
    assert judge != other
    passes = [event.passes for event in asked if isinstance(event, Judgement)]
    assert all(count > 0 for count in passes)


def test_a_look_takes_the_passes_that_its_parts_take(monkeypatch):
    """A pass a token that is written on, two of the judge for both orders (its question is read,
    its labels are asked) and as many of a set's candidates as the set has tokens, whatever their
    number, besides one to read what is not cached; and nothing else but sentence vectors."""
    engine = tiny.engine()
    engine.context = 4096  # the question is long in bytes
    engine._ends = frozenset()
    parts, rows = [], []

    def counted(owner, name):
        original = getattr(owner, name)

        def told(before, own, args, found):
            parts.append((name, engine.forwards - before, own, args, found))

        def generator(self, *args):
            before = engine.forwards
            found = yield from original(self, *args)
            told(before, self, args, found)
            return found

        def plain(self, *args):
            before = engine.forwards
            found = original(self, *args)
            told(before, self, args, found)
            return found

        monkeypatch.setattr(owner, name, generator if name == "look" else plain)

    for name in ("simulate", "expand", "look"):
        counted(rain.Search, name)
    counted(rain.Alike, "hear")
    events = play(engine, max_new=8, iterations=6, candidates=4, lengths=(1, 2, 4))
    judged = iter(
        event.passes for event in events if isinstance(event, Judgement) and event.target != "plain"
    )
    inside = 0
    for name, passes, search, args, found in parts:
        if name == "simulate":
            assert passes <= len(found) + 1
            inside += passes
        elif name == "expand":
            assert passes <= search.set_length(args[0]) + 1
            inside += passes
        elif name == "hear":
            inside += passes
        else:
            rows.append((passes, inside))
            inside = 0
    assert rows
    for whole, accounted in rows:
        judge = whole - accounted
        assert judge == 0 or judge == next(judged) <= 2 + 1


# The tree as it is told


def test_siblings_are_told_for_the_last_look_only(own_engine, judged):
    judged(ups_and_downs)
    tree = nodes(until_the_first_commit(own_engine))
    last = max(node.detail.get("iteration", 0) for node in tree.values())
    told = [node for node in tree.values() if "siblings" in node.detail]
    assert told and all(node.detail["iteration"] == last for node in told)
    for node in told:
        below = {each.node for each in tree.values() if each.parent == node.node}
        assert {number for number, _, _ in node.detail["siblings"]} == below
        best = max(node.detail["siblings"], key=lambda row: row[1] + row[2])
        assert tree[best[0]].detail["iteration"] == last
        assert tree[best[0]].detail["puct"] == {"exploit": best[1], "explore": best[2]}


def test_the_same_seed_grows_the_same_tree_and_another_one_another(own_engine, judged):
    judged(ups_and_downs)
    assert play(own_engine) == play(own_engine) != play(own_engine, seed=8)


def test_what_was_written_before_stays(own_engine, judged):
    judge = judged(ups_and_downs)
    first = play(own_engine, max_new=3)
    written = tuple(surviving(first))
    judge.shown.clear()
    going_on = play(own_engine, task=Task("The dog", written=written), max_new=2)
    tokens = surviving(going_on)
    assert tokens[:3] == list(written) and len(tokens) == 5 and judge.shown
    assert all(text.startswith(text_of(first)) for text in judge.shown)


# Ends


def test_why_it_ends(own_engine, judged):
    judged(ups_and_downs)
    assert why(own_engine) == "max_new reached"
    assert why(own_engine, budget=40, max_new=60) == "the budget of 40 tokens is spent"


def test_an_end_token_ends_the_text(own_engine, judged):
    judged(lambda text: 1.0)
    own_engine._ends = frozenset(range(256))
    events = play(own_engine)
    assert len(surviving(events)) == 1
    assert why(own_engine) == "end token"


def test_a_spent_budget_keeps_the_best_so_far(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine, budget=40)
    spent = {e.name: e.value for e in events if isinstance(e, Metric) and "spent" in e.name}
    assert 30 <= spent["spent tokens"] <= 40
    assert text_of(events)
    assert any(isinstance(event, Note) and "cut short" in event.text for event in events)
    kept = [node for node in nodes(events).values() if node.status == "committed"]
    assert kept[-1].detail["reason"] == "budget"


def test_a_full_context_leaves_nothing_to_search(own_engine, judged):
    judged(ups_and_downs)
    own_engine.context = 50
    task = Task("x" * 50)
    run = rain.run(own_engine, task, build(rain.Params, SMALL), Context(7))
    assert not [event for event in run if isinstance(event, Token | SearchNode)]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"budget": 6}, "budget of 6 tokens is too small"),
        ({"budget": 11, "lengths": (2,)}, "may take 12"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": (1, 0)}, "lengths"),
        ({"criterion": "own", "wish": " "}, "criterion is empty"),
        ({"criterion": "keywords", "wish": ""}, "Name the words"),
        ({"criterion": "pattern", "wish": "("}, "no regular expression"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_written(own_engine, knobs, says):
    run = rain.run(own_engine, TASK, build(rain.Params, SMALL | knobs), Context(7))
    before = own_engine.forwards
    with pytest.raises(BadParameter, match=says):
        next(run)
    assert own_engine.forwards == before


@pytest.mark.parametrize("knobs", [{}, {"lengths": (1, 2, 4)}, {"reuse": False, "lengths": (2,)}])
def test_no_more_is_spent_than_was_expected(own_engine, judged, knobs):
    judged(ups_and_downs)
    found = {e.name: e.value for e in play(own_engine, **knobs) if isinstance(e, Metric)}
    for what in ("tokens", "evaluations", "forwards"):
        assert 0 < found[f"spent {what}"] <= found[f"expected {what}"]


def test_the_plain_answer_comes_first_and_is_not_charged(own_engine, judged):
    judged(ups_and_downs)
    events = play(own_engine)
    (plain,) = [i for i, event in enumerate(events) if isinstance(event, Candidate)]
    assert plain < min(i for i, event in enumerate(events) if isinstance(event, SearchNode))
    greedy = sampling.Params(temperature=0, max_new=6)
    assert events[plain].text == text_of(list(sampling.run(own_engine, TASK, greedy, Context(7))))
    (judgement,) = [e for e in events if isinstance(e, Judgement) and e.target == "plain"]
    assert judgement.key == "e0"
    first = next(e for e in events if isinstance(e, Metric) and e.name == "spent tokens")
    assert first.step == 1 and first.value <= SMALL["rollout"] + 1
