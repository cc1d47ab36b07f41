"""DeAL against beam search, re-ranking by hand and its own formula."""

import pytest
import torch

from analyzers.common import judge_check
from analyzers.common.judge_check import JudgeCheck
from analyzers.common.judges import Verdict
from analyzers.context import Context
from analyzers.errors import BadParameter
from analyzers.params import build
from analyzers.search import deal
from analyzers.search.deal import Params, value
from analyzers.task import Task
from analyzers.trace import Candidate, Judgement, Metric, Note, SearchNode, Token, text_of
from tests import tiny

PROMPT = "The dog sleeps in the"
SMALL = {"mode": "token", "weight": 0.0, "lookahead": 0, "max_new": 6}


class Planted:
    """Says of a text what a function says, in 0..1."""

    name, scale = "planted", (0.0, 1.0, "better", False)

    def __init__(self, h):
        self.h = h

    def __call__(self, texts):
        return [Verdict(self.h(text)) for text in texts]


@pytest.fixture
def plant(monkeypatch):
    def planted(h):
        monkeypatch.setattr(deal, "judge_of", lambda *given, **options: Planted(h))

    planted(lambda text: 0.5)
    return planted


CHANCE = JudgeCheck(20, 10, 4, 40, 36, "A", 0.4)


def searched(engine, seed=0, prompt=PROMPT, **changes):
    """The events, and why the text ended."""
    params = build(Params, SMALL | changes)
    events = []

    def gathered():
        return (yield from deal.run(engine, Task(prompt), params, Context(seed)))

    run = gathered()
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


def ids_of(events):
    return [event.id for event in events if isinstance(event, Token)]


def tree_of(events):
    """The nodes as they were told last."""
    return {event.node: event for event in events if isinstance(event, SearchNode)}


def text_to(nodes, node):
    event = nodes[node]
    return event.text if event.parent is None else text_to(nodes, event.parent) + event.text


def ending(*ends):
    """A tiny engine of its own, with these end tokens."""
    engine = tiny.engine()
    engine._ends = frozenset(ends)
    return engine


def logprobs(engine, ids):
    """Of the next token, by one plain forward over the whole text; no padding rows."""
    with torch.no_grad():
        row = engine.model(torch.tensor([ids])).logits[0, -1].float()
    return row.log_softmax(0)[: engine.vocabulary.size]


def beam_search(engine, prompt, width, beams, length):
    """(score, ids) of the best text, written plainly; no length penalty."""
    frontier, ended = [(0.0, [])], []
    for _ in range(length):
        found = []
        for score, ids in frontier:
            best = logprobs(engine, prompt + ids).topk(beams)
            found += [
                (score + float(v), [*ids, int(i)])
                for v, i in zip(best.values, best.indices, strict=True)
            ]
        found.sort(key=lambda pair: -pair[0])
        ended += [pair for pair in found[:width] if engine.ends(pair[1][-1])]
        frontier = [pair for pair in found if not engine.ends(pair[1][-1])][:width]
        if len(ended) >= width:
            break
    return max(ended or frontier)


# What the search writes


def test_one_hypothesis_without_a_reward_is_greedy(own_engine, plant):
    ids = own_engine.encode(Task(PROMPT))
    greedy = beam_search(own_engine, ids, 1, 1, 6)[1]
    for lookahead in (0, 3):
        events, why = searched(own_engine, beams=1, keep=1, lookahead=lookahead)
        assert ids_of(events) == greedy and why == "max_new reached"


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_reward_it_is_beam_search(width, family, plant):
    engine = tiny.engine(family)
    engine._ends = frozenset()
    ids = engine.encode(Task(PROMPT))
    events, _ = searched(engine, beams=width, keep=width)
    assert ids_of(events) == beam_search(engine, ids, width, width, 6)[1]
    theirs = engine.model.generate(
        torch.tensor([ids]),
        num_beams=width,
        max_new_tokens=6,
        do_sample=False,
        length_penalty=0.0,
        eos_token_id=None,
        suppress_tokens=list(range(engine.vocabulary.size, tiny.SIZES["vocab_size"])),
    )
    assert ids_of(events) == theirs[0, len(ids) :].tolist()


@pytest.mark.parametrize("every", [3, 7])
def test_texts_that_end_are_beam_search_too(every, plant):
    engine = ending(*range(0, 256, every))
    ids = engine.encode(Task(PROMPT))
    score, best = beam_search(engine, ids, 3, 4, 10)
    events, why = searched(engine, beams=4, keep=3, max_new=10)
    assert ids_of(events) == best and why == "end token"
    ended = [event for event in events if isinstance(event, Candidate) and event.group == "ended"]
    assert max(event.logprob for event in ended) == pytest.approx(score, abs=1e-4)


def test_segments_at_temperature_0_are_those_of_a_beam_search(own_engine, plant):
    ids = own_engine.encode(Task(PROMPT))
    changes = {"mode": "segment", "lookahead": 4, "max_new": 4, "temperature": 0.0}
    events, _ = searched(own_engine, **changes, beams=3, keep=1)
    assert ids_of(events) == beam_search(own_engine, ids, 3, 3, 4)[1]
    assert sum(node.parent == 0 for node in tree_of(events).values()) == 3


@pytest.mark.parametrize("mode", ["token", "segment"])
@pytest.mark.parametrize("select", ["beam", "best-first"])
def test_a_constant_reward_changes_nothing(mode, select, own_engine, plant):
    changes = {"mode": mode, "select": select, "lookahead": 2, "beams": 3, "keep": 2}
    trees = []
    for weight in (0.0, 7.0):
        events, _ = searched(own_engine, weight=weight, **changes)
        nodes = tree_of(events).values()
        trees.append([(node.parent, node.text, node.status) for node in nodes])
    assert trees[0] == trees[1]


def test_without_look_ahead_it_re_ranks_by_hand(own_engine, plant):
    """A reward that one token decides: c = log P + λ h over the likeliest eight."""
    plant(lambda text: float(text[-1:].isascii() and text[-1:].isalpha()))
    ids, expected = own_engine.encode(Task(PROMPT)), []
    for _ in range(6):
        row = logprobs(own_engine, ids + expected)
        ranked = row.topk(8).indices.tolist()
        h = [PROMPT + own_engine.vocabulary.decode([*expected, id]) for id in ranked]
        c = [
            float(row[id]) + 3.0 * (text[-1].isascii() and text[-1].isalpha())
            for id, text in zip(ranked, h, strict=True)
        ]
        expected.append(ranked[c.index(max(c))])
    assert ids_of(searched(own_engine, beams=8, keep=1, weight=3.0)[0]) == expected
    assert ids_of(searched(own_engine, beams=8, keep=1)[0]) != expected


def test_a_large_weight_takes_what_has_the_reward_ahead(own_engine, plant):
    plant(lambda text: float(sum(map(ord, text)) % 3 == 0))
    changes = {"beams": 6, "keep": 1, "lookahead": 3, "weight": 1000.0}
    nodes = tree_of(searched(own_engine, **changes)[0])
    seen = set()
    for node in nodes.values():
        if node.parent is not None and node.status == "committed":
            level = [each for each in nodes.values() if each.parent == node.parent]
            assert node.detail["h"] == max(each.detail["h"] for each in level)
            assert {each.detail["h"] for each in level} <= {0.0, 1.0}
            seen |= {each.detail["h"] for each in level}
    assert seen == {0.0, 1.0}


def test_the_formula():
    """Worked by hand: the second wins at λ = 1, the first at 0.5, and they tie at 6/7."""
    for weight, first, second in [(1.0, -0.8, -0.7), (0.5, -0.9, -1.15)]:
        assert value(-1.0, 0.2, weight) == pytest.approx(first)
        assert value(-1.6, 0.9, weight) == pytest.approx(second)
    assert value(-1.0, 0.2, 0.6 / 0.7) == pytest.approx(value(-1.6, 0.9, 0.6 / 0.7))


def test_more_proposals_are_never_worse_at_one_step(own_engine, plant):
    plant(lambda text: len(set(text)) % 5 / 4)
    best = []
    for beams in (1, 2, 4, 8, 16):
        nodes = tree_of(searched(own_engine, beams=beams, weight=4.0, max_new=1)[0])
        best.append(max(node.detail["score"] for node in nodes.values() if node.parent == 0))
    assert best == sorted(best) and best[0] < best[-1]


def test_a_planted_reward_is_found(own_engine, plant):
    """More of it than at λ = 0, with the same proposals."""
    plant(lambda text: min(1.0, sum(map(text.count, "aeiou")) / 10))
    changes = {"mode": "segment", "lookahead": 4, "beams": 4, "max_new": 12, "temperature": 1.0}
    reward = {}
    for weight in (0.0, 100.0):
        found = [searched(own_engine, seed, weight=weight, **changes)[0] for seed in range(4)]
        reward[weight] = sum(min(1.0, sum(map(text_of(e).count, "aeiou")) / 10) for e in found)
    assert reward[100.0] > reward[0.0]


# The tree


@pytest.mark.parametrize("mode", ["token", "segment"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_reused_changes_nothing(mode, temperature, own_engine, plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    changes = {"mode": mode, "temperature": temperature, "lookahead": 3, "beams": 3, "weight": 3.0}
    (fast, why), (slow, again) = (
        searched(own_engine, reuse=reuse, **changes) for reuse in (True, False)
    )
    assert why == again and ids_of(fast) == ids_of(slow)
    for one, other in zip(tree_of(fast).values(), tree_of(slow).values(), strict=True):
        assert (one.text, one.status, one.evals) == (other.text, other.status, other.evals)
        assert one.detail.get("rollout") == other.detail.get("rollout")
        if "score" in one.detail:
            assert one.detail["score"] == pytest.approx(other.detail["score"], abs=1e-4)


@pytest.mark.parametrize("mode", ["token", "segment"])
@pytest.mark.parametrize("select", ["beam", "best-first"])
def test_the_tree_is_whole(mode, select, own_engine, plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    changes = {"mode": mode, "select": select, "lookahead": 3, "beams": 3, "weight": 3.0}
    events, _ = searched(own_engine, **changes, temperature=1.0)
    nodes = tree_of(events)
    assert {node.status for node in nodes.values()} <= {"committed", "pruned"}
    committed = [node for node in nodes.values() if node.status == "committed"]
    assert [node.parent for node in committed] == [None, *(node.node for node in committed[:-1])]
    # The tiny model writes bytes that are no UTF-8; of those only whole texts are compared.
    assert text_to(nodes, committed[-1].node).replace("\ufffd", "") == text_of(events).replace(
        "\ufffd", ""
    )
    judged = {event.key: event for event in events if isinstance(event, Judgement)}
    for node in nodes.values():
        assert node.detail["kind"] == (mode if node.node else "root")
        if node.node and "score" in node.detail:
            assert judged[node.evals[0]].score == node.value == node.detail["h"]
            length = node.detail["tokens"] if mode == "segment" or select != "beam" else 1
            c = value(node.detail["logprob"] / length, node.detail["h"], 3.0)
            assert node.detail["score"] == pytest.approx(c, abs=2e-6)
    told = {event.name: event.value for event in events if isinstance(event, Metric)}
    assert told["spent nodes"] == len(nodes) - 1
    assert told["spent evaluations"] == len(judged)
    assert told["passes per token"] == pytest.approx(told["spent forwards"] / 6)
    assert told["best reward"] >= told["reward of the answer"]
    assert told["reward of the answer"] == pytest.approx(committed[-1].value)


def test_tokens_are_written_as_soon_as_the_search_agrees(own_engine, plant):
    events, _ = searched(own_engine, beams=2, keep=1)
    places = [i for i, event in enumerate(events) if isinstance(event, Token)]
    spent = [
        i
        for i, event in enumerate(events)
        if isinstance(event, Metric) and event.name == "spent tokens"
    ]
    assert len(places) == 6 and all(a < b for a, b in zip(places, spent, strict=False))


def test_best_first_writes_on_the_best(own_engine, plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    changes = {"select": "best-first", "beams": 3, "keep": 3, "lookahead": 1, "weight": 2.0}
    events, _ = searched(own_engine, **changes, max_new=5)
    chosen, nodes, made = {}, {}, 1
    for event in events:
        if not isinstance(event, SearchNode):
            continue
        iteration = event.detail.get("iteration")
        if iteration and iteration not in chosen:
            assert iteration == made
            chosen[made], made = event.node, made + 1
            waiting = [
                node.detail["score"]
                for node in nodes.values()
                if node.status == "open"
                and "score" in node.detail
                and "iteration" not in node.detail
                and node.detail["tokens"] < 5
            ]
            assert event.node == 0 or event.detail["score"] == max(waiting)
        nodes[event.node] = event
    assert len(set(chosen.values())) == len(chosen) >= 5


def test_a_look_ahead_that_ends_is_flagged_and_no_longer_than_the_text(plant):
    engine = ending(*range(0, 256, 4))
    nodes = tree_of(searched(engine, beams=4, lookahead=4)[0]).values()
    flags = {node.detail["rollout_ended"] for node in nodes if "rollout" in node.detail}
    assert flags == {True, False}
    own = ending()
    for node in tree_of(searched(own, beams=2, lookahead=4, max_new=3)[0]).values():
        if node.node and node.detail["tokens"] == 3:
            assert node.detail["rollout"].strip("\ufffd") == ""


def test_the_answer_is_the_best_that_ended_by_c_or_by_h(plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    engine = ending(*range(0, 256, 5))
    changes = {"beams": 6, "keep": 5, "max_new": 10, "weight": 1.0}
    answers = set()
    for pick in ("c", "h"):
        events, why = searched(engine, **changes, pick=pick)
        nodes = tree_of(events)
        ended = [
            nodes[int(event.key.removeprefix("node "))]
            for event in events
            if isinstance(event, Candidate) and event.group == "ended"
        ]
        assert why == "end token" and len(ended) >= 5
        key = "score" if pick == "c" else "h"
        (best,) = [node for node in ended if node.status == "committed"]
        assert best.detail[key] == max(node.detail[key] for node in ended)
        answers.add(best.node)
    assert len(answers) == 2


def test_equal_samples_are_one_node_and_equal_texts_one_hypothesis(own_engine, plant):
    events, _ = searched(own_engine, mode="segment", lookahead=3, temperature=0.01, max_new=3)
    assert sum(node.parent == 0 for node in tree_of(events).values()) == 1
    params = build(Params, SMALL)
    search = deal._Search(own_engine, Task(PROMPT), params, Context(0), Planted(len))
    root = search.frontier[0]
    apart = search._add(search._add(root, [70], -3.0), [71], -2.0)
    whole = search._add(root, [70, 71], -4.0)
    assert search._distinct([apart, whole], []) == [whole]
    assert apart.node.status == "pruned"
    assert apart.node.detail["reason"] == f"reads as node {whole.node.number}"
    assert search._distinct([whole], [apart]) == []


# What is said, and what is refused


@pytest.mark.parametrize("mode", ["token", "segment"])
@pytest.mark.parametrize("limit", [{"tokens": 40}, {"evaluations": 9}])
def test_a_spent_budget_writes_the_best_so_far(mode, limit, own_engine, plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    changes = {"mode": mode, "lookahead": 3, "beams": 3, "max_new": 40, "temperature": 1.0}
    events, why = searched(own_engine, **changes, **limit)
    ((what, most),) = limit.items()
    assert why == f"the budget of {most} {what} is spent"
    assert any(isinstance(event, Note) and event.level == "warning" for event in events)
    unwritten = any(isinstance(event, Note) and "not written" in event.text for event in events)
    assert unwritten == (mode == "token")
    told = {event.name: event.value for event in events if isinstance(event, Metric)}
    assert 0 < told[f"spent {what}"] <= most
    assert 0 < len(ids_of(events)) < 40
    nodes = tree_of(events).values()
    assert {node.status for node in nodes} == {"committed", "pruned"}
    assert all(node.value is not None for node in nodes if node.status == "committed" and node.node)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "segment", "lookahead": 0},
        {"mode": "segment", "lookahead": 8, "beams": 4, "max_new": 32, "tokens": 31},
        {"mode": "token", "lookahead": 8, "beams": 4, "max_new": 32, "tokens": 35},
        {"beams": 4, "evaluations": 3},
    ],
)
def test_what_cannot_be_searched_is_one_sentence(changes, own_engine, plant):
    before = own_engine.forwards
    with pytest.raises(BadParameter) as refused:
        searched(own_engine, **changes)
    assert str(refused.value).count(". ") == 0 and str(refused.value).endswith(".")
    assert own_engine.forwards == before


def test_the_smallest_budget_is_enough_for_one_step(own_engine, plant):
    for mode, tokens in (("segment", 32), ("token", 36)):
        changes = {"mode": mode, "lookahead": 8, "beams": 4, "max_new": 32, "tokens": tokens}
        for temperature in (0.0, 1.0):
            events, _ = searched(own_engine, **changes, temperature=temperature)
            assert ids_of(events)


def test_a_reward_that_decides_nothing_is_said(own_engine, plant):
    def said(**changes):
        events, _ = searched(own_engine, **changes)
        return [event.text for event in events if isinstance(event, Note)]

    assert any("same reward" in text for text in said(weight=1.0))
    assert not any("same reward" in text for text in said(weight=0.0))
    plant(lambda text: len(set(text)) % 7 / 6)
    assert not any("same reward" in text for text in said(weight=1.0))


def test_a_verdict_that_cannot_be_read_counts_neither_way(own_engine, plant):
    plant(lambda text: None)
    nodes = tree_of(searched(own_engine, weight=1.0)[0]).values()
    assert {node.detail["h"] for node in nodes if "h" in node.detail} == {0.5}


def test_the_window_ends_the_text(own_engine, plant):
    prompt = "a" * (tiny.CONTEXT - 3)
    for mode, lookahead in (("segment", 2), ("token", 2)):
        events, why = searched(own_engine, prompt=prompt, mode=mode, lookahead=lookahead, beams=2)
        assert why == "context full" and len(ids_of(events)) == 3
    events, why = searched(own_engine, prompt="a" * tiny.CONTEXT)
    assert why == "context full" and ids_of(events) == []


def test_keywords_steer_and_show_which_are_there(own_engine):
    """One letter is the word: it comes with the reward, and without it does not."""
    found = {}
    for weight in (0.0, 50.0):
        changes = {"mode": "segment", "lookahead": 4, "max_new": 12, "temperature": 1.0}
        given = {"reward": "keywords", "wish": "b, i", "beams": 8, "keep": 2, "weight": weight}
        events, _ = searched(own_engine, **changes, **given)
        nodes = [
            node for node in tree_of(events).values() if node.node and node.detail.get("parts")
        ]
        assert all(
            node.detail["h"] == sum(node.detail["parts"].values()) / 2
            and set(node.detail["parts"]) == {"b", "i"}
            and node.value == 2 * node.detail["h"] - 1
            for node in nodes
        )
        (found[weight],) = {
            event.value
            for event in events
            if isinstance(event, Metric) and event.name == "reward of the answer"
        }
    assert found[50.0] > found[0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "keywords", "wish": " , "},
        {"reward": "length", "wish": "long"},
        {"reward": "pattern", "wish": "("},
        {"reward": "own", "wish": " "},
    ],
)
def test_a_wish_that_is_none_is_refused_first(changes, own_engine):
    before = own_engine.forwards
    with pytest.raises(BadParameter):
        searched(own_engine, **changes)
    assert own_engine.forwards == before


def test_the_model_can_judge_itself(own_engine):
    changes = {"reward": "own", "wish": "short", "weight": 5.0, "max_new": 2, "beams": 2, "keep": 1}
    events, _ = searched(own_engine, prompt="Hi", **changes)
    judgements = [event for event in events if isinstance(event, Judgement)]
    nodes = [node for node in tree_of(events).values() if node.node]
    assert judgements and all(0 <= node.detail["h"] <= 1 for node in nodes)
    assert all({"first", "swapped"} <= set(event.detail) for event in judgements)


def test_a_judge_at_chance_is_said_behind_the_answer(own_engine, plant, monkeypatch):
    monkeypatch.setitem(judge_check._examined, own_engine, {("harmless", True): CHANCE})
    events = searched(own_engine, reward="harmless")[0]
    (at,) = [i for i, event in enumerate(events) if "at chance" in getattr(event, "text", "")]
    assert events[at].level == "warning"
    assert at > max(i for i, event in enumerate(events) if isinstance(event, Token))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "token"},
        {"mode": "token", "reuse": False},
        {"mode": "segment", "lookahead": 2},
        {"mode": "segment", "lookahead": 2, "temperature": 0.0},
        {"mode": "segment", "lookahead": 2, "select": "best-first"},
    ],
)
def test_no_more_is_spent_than_was_expected(changes, own_engine, plant):
    plant(lambda text: len(set(text)) % 7 / 6)
    events, _ = searched(own_engine, **changes)
    numbers = {event.name: event.value for event in events if isinstance(event, Metric)}
    for what in ("tokens", "evaluations", "forwards"):
        assert 0 < numbers[f"spent {what}"] <= numbers[f"expected {what}"]


def of_ids(search, *ids_and_h):
    """Hypotheses of one token each, in this order."""
    found = [search._add(search.frontier[0], [id], -1.0) for id, _ in ids_and_h]
    for each, (_, h) in zip(found, ids_and_h, strict=True):
        each.h = h
    return found


def test_what_ended_takes_no_place_from_what_goes_on():
    engine = ending(70)
    search = deal._Search(engine, Task(PROMPT), build(Params, SMALL), Context(0), Planted(len))
    over, first, second, third = ranked = of_ids(search, (70, 0), (71, 0), (72, 0), (73, 0))
    assert search._keep(ranked) == [over]
    assert search.frontier == [first, second] and third.node.status == "pruned"
    assert search._keep([first, second, over]) == [] and search.ended == [over]


def test_a_text_that_ended_is_the_answer_before_a_better_one_that_was_cut():
    engine = ending(70)
    params = build(Params, SMALL | {"weight": 1.0})
    search = deal._Search(engine, Task(PROMPT), params, Context(0), Planted(len))
    over, better = of_ids(search, (70, 0.0), (71, 1.0))
    search.ended, search.cut, search.frontier = [over], [better], []
    assert search._best() is over
    assert any("cut off" in note.text for note in search._notes(over))


def test_the_judge_reads_the_begun_answer_and_the_look_ahead(own_engine, monkeypatch):
    read = []
    monkeypatch.setattr(
        deal, "judge_of", lambda *given, **options: Planted(lambda text: read.append(text) or 0.5)
    )
    params = build(Params, SMALL | {"lookahead": 3, "beams": 1, "keep": 1, "max_new": 5})
    list(deal.run(own_engine, Task(PROMPT, prefix=" Oh"), params, Context(0)))
    greedy = beam_search(own_engine, own_engine.encode(Task(PROMPT + " Oh")), 1, 1, 5)[1]
    texts = [" Oh" + own_engine.vocabulary.decode(greedy[:end]) for end in (4, 5)]
    assert read == list(dict.fromkeys(texts))  # the plain answer, judged first, is one of them


def test_the_paper_s_mode_reads_its_branches_in_one_pass(own_engine, plant):
    """Proposals of one step are looked behind side by side, though their texts differ: at most one
    pass a hypothesis reads what was kept, one proposes, one looks ahead, and one writes."""
    _, few = spent(own_engine, beams=2)
    _, many = spent(own_engine, beams=8)
    assert few == many <= 6 * (2 + 3)


def spent(engine, **changes):
    events, why = searched(engine, mode="token", lookahead=1, keep=2, weight=5.0, **changes)
    return why, [e.value for e in events if getattr(e, "name", "") == "spent forwards"][-1]
