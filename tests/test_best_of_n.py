"""Best of N: what is chosen, what choosing could bring, and when enough was drawn."""

import math
from itertools import combinations

import pytest
import torch

from analyzers.common import best_of
from analyzers.common.answers import final_answer, vote
from analyzers.context import Context
from analyzers.engine import Engine, Filters
from analyzers.engine.signals import draw
from analyzers.engine.values import PLAIN_FILTERS, step_after
from analyzers.errors import BadParameter
from analyzers.search import best_of_n
from analyzers.search.best_of_n import Params
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Metric, Note, SearchNode, Token, surviving, text_of
from tests import tiny

PROMPT = "Say something."


def choose(engine: Engine, seed: int = 1, **knobs) -> list:
    return list(best_of_n.run(engine, Task(chat(PROMPT)), Params(**knobs), Context(seed)))


def metrics(events) -> dict[tuple[str, int], float]:
    return {(e.name, e.step): e.value for e in events if isinstance(e, Metric)}


def draws(events) -> list[Candidate]:
    """In the order of their generators."""
    found = [e for e in events if isinstance(e, Candidate) and e.key != "plain"]
    return sorted(found, key=lambda candidate: int(candidate.key[1:]))


def nodes(events) -> list[SearchNode]:
    """As they are in the end."""
    return list({e.node: e for e in events if isinstance(e, SearchNode)}.values())


def notes(events) -> str:
    return " ".join(e.text for e in events if isinstance(e, Note))


@pytest.fixture
def toy(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Three answers: AC and AD with probability .3, and BC with .4, which greedy misses."""
    a, b, c, d = b"ABCD"
    table = {a: {c: 0.5, d: 0.5}, b: {c: 1.0}}

    def step(cursors, *, filters=PLAIN_FILTERS, **_):
        many = cursors if isinstance(cursors, list) else [cursors]
        steps = []
        for cursor in many:
            row = torch.full((own_engine.vocabulary.size,), -1e4)
            for id, p in table.get(cursor.ids[-1], {a: 0.6, b: 0.4}).items():
                row[id] = math.log(p)
            steps.append(step_after(cursor.ids, row, len(row), {}, (), filters))
        return steps if isinstance(cursors, list) else steps[0]

    own_engine._ends = frozenset({c, d})
    monkeypatch.setattr(own_engine, "step", step)
    return own_engine


@pytest.fixture
def short(own_engine: Engine) -> Engine:
    """A model whose texts end soon, but not all of them."""
    own_engine._ends = frozenset(range(60, 110))
    return own_engine


# Arithmetic


def test_pass_at():
    assert best_of.pass_at(5, 10, 3) == pytest.approx(0.916667, abs=1e-6)
    assert best_of.pass_at(1, 10, 3) == pytest.approx(0.3)
    assert best_of.pass_at(8, 10, 3) == 1 and best_of.pass_at(3, 10, 0) == 0


def test_the_best_of_two_of_four():
    weights = best_of.best_weights(2, 4)
    assert weights == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])
    assert best_of.best_of(2, (1, 0, 1, 0)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_order_statistics_are_the_mean_over_all_choices(k):
    ranked = [9.0, 4.0, 4.0, 1.5, -3.0]
    tried = [max(some) for some in combinations(ranked, k)]
    assert best_of.best_of(k, ranked) == pytest.approx(sum(tried) / len(tried))


def test_divergence_misses_and_draws():
    assert best_of.divergence_at_most(1) == 0
    assert best_of.divergence_at_most(4) == pytest.approx(0.636294, abs=1e-6)
    assert best_of.divergence_at_most(16) == pytest.approx(1.835089, abs=1e-6)
    assert best_of.missed(0.1, 10) == pytest.approx(0.348678, abs=1e-6)
    assert best_of.missed(0.05, 50) == pytest.approx(0.076945, abs=1e-6)
    assert best_of.missed(0.2, 20) == pytest.approx(0.011529, abs=1e-6)
    assert best_of.draws_for(0.1, 0.05) == 30


def test_enough_is_13_draws_for_probability_point_3():
    """ln 40 / 0.3 = 12.2963."""
    found = [k for k in range(1, 20) if best_of.enough(k, math.log(0.3), 0.05)]
    assert found[0] == 13
    assert not best_of.enough(10**6, float("-inf"), 0.05)


# Final answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7. The answer is 7.", "7"),
        (r"first \boxed{3}, then \boxed{\text{about } 1,234.50}", "1234.5"),
        (r"\boxed{\frac{1}{2}}", "frac 1 2"),
        ("The answer is: **St. Louis**. It lies in the west.", "st. louis"),
        ("The answer is 4.\nNo: the answer is 5.", "5"),
        ("Answer:\n 12 apples", "12"),
        ("17 pens and 25 more, less 8: 34 pens.", "34"),
        ("10-5", "5"),
        ("-5 degrees", "-5"),
        ("6/4", "1.5"),
        ("1/3", "1/3"),
        ("3.0 %", "3%"),
        ("5/0", "5/0"),
        ("the Louvre.", "louvre"),
        ("  ", None),
        ("", None),
        ("A long text without a mark or a number, which is nobody's final answer.", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_votes():
    counted = vote(["5", None, "7", "5"])
    assert counted.counts == {"5": 2, "7": 1}
    assert counted.leaders == ("5",) and counted.share == 0.5
    assert vote(["1", "2"]).leaders == ("1", "2")
    assert vote([None]).leaders == () and vote([]).share == 0


# Choosing


def test_one_of_one_is_the_plain_sample(own_engine):
    events = choose(own_engine, n=1, max_new=10)
    cursor, rng = own_engine.prefill(own_engine.encode(Task(chat(PROMPT)))), Context(1).rng
    draws_from, start = rng("sample", 0), cursor.pos
    for _ in range(10):
        own_engine.push(cursor, draw(own_engine.step(cursor, filters=Filters()), draws_from)[0])
    assert [token.id for token in surviving(events)] == cursor.ids[start:]


def test_the_likeliest_sequence_is_found_where_greedy_misses_it(toy):
    events = choose(toy, n=24, max_new=5)
    assert text_of(events) == "BC"
    (greedy,) = [e for e in events if isinstance(e, Candidate) and e.key == "plain"]
    assert greedy.text == "AC" and greedy.logprob == pytest.approx(math.log(0.3), abs=1e-5)
    # Three different answers, visited as often as they were drawn.
    found = {node.text: node for node in nodes(events) if node.parent == 0}
    assert set(found) == {"AC", "AD", "BC"}
    assert sum(node.real_visits for node in found.values()) == 24
    assert found["BC"].status == "committed" and found["AC"].status == "pruned"
    assert found["BC"].prior == pytest.approx(0.4, abs=1e-5)
    assert "probability 0.4: 24 draws miss" in notes(events) and "8 draws would" in notes(events)


def test_more_draws_never_find_a_less_likely_best(short):
    few, many = (choose(short, n=n, max_new=6) for n in (4, 12))
    same = [(one.text, other.text) for one, other in zip(draws(few), draws(many), strict=False)]
    assert len(same) == 4 and all(one == other for one, other in same)

    def best(events) -> float:
        (node,) = [n for n in nodes(events) if n.status == "committed" and n.parent == 0]
        return node.detail["logprob"]

    assert best(many) >= best(few)


def test_what_is_cut_off_is_not_chosen_by_likelihood(short):
    events = choose(short, n=12, max_new=3)
    sampled = [n for n in nodes(events) if n.parent == 0]
    ended = [n for n in sampled if n.detail["finished"] and n.real_visits]
    cut = [n for n in sampled if not n.detail["finished"] and n.real_visits]
    assert ended and cut and all(n.detail["reason"].startswith("cut off") for n in cut[1:])
    (best,) = [n for n in sampled if n.status == "committed"]
    assert best.value == max(n.value for n in ended)
    assert "were cut off" in notes(events)


def test_where_none_ends_beginnings_are_compared_and_it_is_said(own_engine):
    events = choose(own_engine, n=3, max_new=4)
    assert len(surviving(events)) == 4 and "Nothing improved: the greedy" in notes(events)
    assert "No draw ended within 4 tokens" in notes(events)


def test_the_mean_is_the_sum_per_token(short):
    events = choose(short, n=6, max_new=6, by="mean")
    for node in nodes(events)[1:]:
        detail = node.detail
        assert detail["score"] == pytest.approx(detail["logprob"] / detail["tokens"], abs=1e-5)


def test_the_majority_wins_and_ties_go_to_the_likelier(toy):
    for seed in range(6):
        events = choose(toy, seed=seed, n=6, max_new=5, by="majority")
        counted = vote([final_answer(each.text) for each in draws(events)])
        chances = {"ac": 0.3, "ad": 0.3, "bc": 0.4}
        assert text_of(events).casefold() in counted.leaders
        assert chances[text_of(events).casefold()] == max(chances[o] for o in counted.leaders)
        assert ("tied" in notes(events)) == (len(counted.leaders) > 1)


def test_a_known_reward_rises_against_the_random_control(own_engine):
    """Selection works where the judge is a rule: the digit is found more often than by chance."""
    chosen, random = [], []
    for seed in range(4):
        events = choose(own_engine, seed=seed, n=12, max_new=8, by="pattern", wish=r"[0-9]")
        found = metrics(events)
        chosen.append(found["best of k", 12])
        random.append(found["one at random", 12])
        assert found["best of k", 1] == pytest.approx(found["one at random", 12], abs=1e-5)
        judged = {each.text: any(c.isdigit() for c in each.text) for each in draws(events)}
        assert any(c.isdigit() for c in text_of(events)) == any(judged.values())
    assert sum(chosen) > sum(random)


def test_the_model_may_judge_its_own_answers():
    made = tiny.model("llama", max_position_embeddings=2048)  # the questions are long in bytes
    wide = Engine(made, tiny.tokenizer(), {"name": "wide"})
    for by in ("truthful", "own"):
        events = choose(wide, n=3, max_new=5, by=by, wish="It is short.")
        judged = [node for node in nodes(events) if node.evals]
        assert len(judged) >= 3
        assert metrics(events)["spent evaluations", 3] == len({n.text for n in judged})


def test_drawing_stops_where_the_rule_says(toy):
    for seed in range(5):
        events = choose(toy, seed=seed, n=30, max_new=5, delta=0.05)
        best, stop = float("-inf"), None
        for k, each in enumerate(draws(events), 1):
            best = max(best, each.logprob)
            if stop is None and k * math.exp(best) >= math.log(40):
                stop = k
        assert stop in (10, 11, 12, 13)
        assert f"After {stop} answers" in notes(events)
        assert ("one at random", stop) in metrics(events)


def test_with_the_truth_the_choice_lies_between_one_and_any(toy):
    found = metrics(choose(toy, n=16, max_new=5, truth="BC"))
    for k in (1, 2, 4, 8, 16):
        low, high = found["right: one at random", 16], found["right: any of k", k]
        # Here the likeliest answer is the right one, so that choosing misses none.
        assert low <= high and found["right: best of k", k] == pytest.approx(high, abs=1e-5)
    assert found["right: the choice", 16] == 1
    assert found["right: any of k", 1] == pytest.approx(found["right: one at random", 16])
    assert found["coverage of the choice (log)", 16] == pytest.approx(-math.log(0.4), abs=1e-5)


def test_the_budget_is_never_overrun_and_what_there_is_is_written(own_engine):
    events = choose(own_engine, n=10, max_new=8, tokens=40)
    found = metrics(events)
    assert found["spent tokens", 4] == 40  # greedy and four draws
    assert "Only 4 of 10 answers" in notes(events) and len(surviving(events)) == 8


def test_other_temperatures_are_said(own_engine):
    events = choose(own_engine, n=2, max_new=4, temperature=0.5)
    assert "temperature 0.5" in notes(events)
    assert all(node.prior is None for node in nodes(events))


def test_a_likely_greedy_answer_and_no_gain_are_said(toy, monkeypatch):
    toy._ends = frozenset(b"A")
    events = choose(toy, n=4, max_new=3)
    assert "more than a half" in notes(events) and "Nothing improved" in notes(events)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"tokens": 10, "max_new": 8}, "too small for the greedy answer"),
        ({"delta": 0.1, "temperature": 0.5}, "needs temperature 1"),
        ({"by": "keywords", "wish": " "}, "Name the words"),
        ({"by": "own"}, "criterion is empty"),
    ],
)
def test_what_cannot_be_done_is_said_first(own_engine, knobs, said):
    before = own_engine.forwards
    with pytest.raises(BadParameter, match=said):
        choose(own_engine, **knobs)
    assert own_engine.forwards == before


def test_a_full_window_leaves_nothing_to_choose(own_engine):
    run = best_of_n.run(own_engine, Task("x" * own_engine.context), Params(), Context(1))
    assert {type(event) for event in run} == {Metric}


def test_a_begun_answer_goes_on(own_engine):
    task = Task(chat(PROMPT), prefix="The answer is ")
    events = list(best_of_n.run(own_engine, task, Params(n=2, max_new=3), Context(1)))
    first = next(e for e in events if isinstance(e, Token))
    assert first.pos == len(own_engine.encode(task))


@pytest.mark.parametrize(
    "knobs", [{"n": 3}, {"n": 9, "tokens": 40}, {"by": "keywords", "wish": "a"}]
)
def test_no_more_is_spent_than_was_expected(own_engine, knobs):
    found = {e.name: e.value for e in choose(own_engine, max_new=8, **knobs) if type(e) is Metric}
    for what in ("tokens", "evaluations", "forwards"):
        assert found[f"spent {what}"] <= found[f"expected {what}"]
