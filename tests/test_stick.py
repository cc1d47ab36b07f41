"""STICK: the checklist decides, the best version stays, and the judge is measured."""

import pytest

from analyzers.common.asking import write
from analyzers.common.budget import Budget
from analyzers.common.prefixes import Prefixes
from analyzers.common.rollouts import Rollout
from analyzers.context import Context
from analyzers.errors import BadInput, BadParameter
from analyzers.search import stick
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Judgement, Metric, Note, SearchNode, Token, text_of

TASK = Task(chat("Name the sun and the sea."))
CHECKS = "keywords: sun\nkeywords: sea"


def go(engine, seed: int = 1, task: Task = TASK, **knobs):
    """The events of a run, and why it ended."""
    given = {"checklist": CHECKS, "max_new": 16} | knobs
    run, events = stick.run(engine, task, stick.Params(**given), Context(seed)), []
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


@pytest.fixture
def dictated(monkeypatch):
    """Make the answers be these texts, in order of writing; logprob: of each token."""

    def dictate(*texts: str, logprobs: tuple[float, ...] = ()):
        left = list(zip(texts, logprobs or (-1.0,) * len(texts), strict=True))

        def write(engine, prefixes, ids, rngs, budget, **options):
            found = []
            for _ in rngs:
                text, logprob = left.pop(0)
                ids = engine.tokens(text)
                budget.charge("tokens", len(ids))
                found.append(Rollout(ids, [logprob] * len(ids)))
            return found

        monkeypatch.setattr("analyzers.search.stick.write", write)

    return dictate


def metrics(events, name: str) -> list[float]:
    return [event.value for event in events if isinstance(event, Metric) and event.name == name]


def notes(events) -> str:
    return " ".join(event.text for event in events if isinstance(event, Note))


def nodes(events) -> dict[int, SearchNode]:
    """As they were told last."""
    return {event.node: event for event in events if isinstance(event, SearchNode)}


def test_refining_stops_when_every_question_is_met(own_engine, dictated):
    dictated("nothing", "the sun", "sun and sea", "never written")
    events, why = go(own_engine, rounds=3)
    assert why == "every question is answered YES"
    assert metrics(events, "pass rate") == [0, 0.5, 1]
    assert text_of(events) == "sun and sea"
    assert {event.origin for event in events if isinstance(event, Token)} == {"forced"}
    last = nodes(events)[3]
    assert (last.parent, last.status, last.value) == (2, "committed", 1)


def test_the_best_version_stays_and_that_it_did_not_improve_is_said(own_engine, dictated):
    dictated("the sun", "nothing", "not a word")
    events, why = go(own_engine, rounds=2)
    assert why == "refined 2 times"
    assert text_of(events) == "the sun" and "No improvement" in notes(events)
    assert [node.status for node in nodes(events).values()] == [
        "open", "committed", "pruned", "pruned",
    ]  # fmt: skip
    kept = [e.text for e in events if isinstance(e, Candidate) and e.group == "answers"]
    assert kept == ["the sun", "nothing", "not a word"]


def test_one_list_for_all_versions(own_engine, dictated):
    dictated("a", "b", "c")
    events, _ = go(own_engine, rounds=2)
    used = {event.detail["checklist"] for event in events if isinstance(event, Judgement)}
    assert len(used) == 1


def test_best_of_one_is_the_sample(own_engine):
    events, _ = go(own_engine, mode="best of n", samples=1)
    (plain,) = write(
        own_engine,
        Prefixes(own_engine),
        own_engine.encode(TASK),
        [Context(1).rng("answer", 0)],
        Budget(),
        max_new=16,
        temperature=0.7,
    )
    assert [event.id for event in events if isinstance(event, Token)] == plain.ids
    refined, _ = go(own_engine, rounds=1)
    first = [e for e in refined if isinstance(e, Candidate) and e.key == "answer 0"]
    assert [e for e in events if isinstance(e, Candidate) and e.key == "answer 0"] == first


def test_equal_pass_rates_go_to_the_likelier_and_the_tie_is_told(own_engine, dictated):
    dictated("the sun", "a sea", "nothing", logprobs=(-2.0, -1.0, -0.5))
    events, _ = go(own_engine, mode="best of n", samples=3)
    assert metrics(events, "equally good") == [2]
    assert text_of(events) == "a sea"
    assert {event.origin for event in events if isinstance(event, Token)} == {"sampled"}
    assert metrics(events, "requirements met") == [pytest.approx(1 / 3)]


def test_the_checker_picks_better_than_chance(own_engine, dictated):
    """A known reward rises against the mean of the samples at the same N."""
    dictated("sea", "sun", "sun sea", "", "x", "sea")
    events, _ = go(own_engine, mode="best of n", samples=6)
    rates = metrics(events, "pass rate")
    assert rates == [0.5, 0.5, 1, 0, 0, 0.5] and text_of(events) == "sun sea"


def test_the_model_is_measured_by_the_programs(own_engine, dictated):
    dictated("the sun", "sun and sea")
    events, _ = go(own_engine, mode="best of n", samples=2, answered_by="model")
    rows = [event.detail["answers"] for event in events if isinstance(event, Judgement)]
    said = [[word == "YES" for _, word, _, _ in each] for each in rows[:2]]
    right = sum(a == b for a, b in zip(said[0] + said[1], (1, 0, 1, 1), strict=True))
    assert metrics(events, "question accuracy") == [right / 4]
    assert metrics(events, "YES rate") == [sum(map(sum, said)) / 4]
    assert metrics(events, "pass rate of an unrelated answer")
    assert metrics(events, "checks met on average") == [0.75]
    assert metrics(events, "checks met at best") == [1]
    assert metrics(events, "checks met by the answer") == [1 if "sea" in text_of(events) else 0.5]
    assert f"the model got {right} right" in notes(events)


def test_a_judge_that_says_yes_to_everything_has_no_signal(own_engine, dictated, monkeypatch):
    dictated("the sun", "sun and sea")
    from analyzers.engine.scoring import Labels

    yes = Labels({"YES": 0.9, "NO": 0.1}, 1.0, {})
    monkeypatch.setattr(
        "analyzers.common.checklist.next_labels",
        lambda engine, prefixes, prompts, *rest: [yes] * len(prompts),
    )
    events, why = go(own_engine, rounds=1, answered_by="model")
    assert why == "every question is answered YES"
    assert "no signal" in notes(events) and "YES to all 2 questions" in notes(events)


def test_a_spent_budget_keeps_what_there_is(own_engine, dictated):
    dictated("the sun", "sun and sea")
    events, why = go(own_engine, rounds=2, max_new=8, tokens=9)
    assert why == "the budget of 9 tokens is spent" and why in notes(events)
    assert text_of(events) == "the sun"
    assert metrics(events, "spent tokens")[-1] == 7


def test_what_cannot_be_done_is_said_before_anything_is(own_engine):
    with pytest.raises(BadParameter, match="at least 16"):
        go(own_engine, tokens=15)
    with pytest.raises(BadParameter, match="at least 64"):
        go(own_engine, mode="best of n", samples=4, tokens=63)
    with pytest.raises(BadInput, match="begun"):
        go(own_engine, task=Task(TASK.prompt, prefix="The"))
    assert own_engine.forwards == 0


def test_a_model_that_writes_no_question_is_asked_a_general_one(own_engine, dictated, monkeypatch):
    dictated("the sun", "sea")
    own_engine.context = 4096  # room for the examples in the request
    monkeypatch.setattr(
        "analyzers.common.checklist.write",
        lambda engine, *given, **options: [Rollout(engine.tokens("I do not know."))],
    )
    events, _ = go(own_engine, checklist="", rounds=1)
    asked = [e.text for e in events if isinstance(e, Candidate) and e.group == "checklist"]
    assert asked == [stick.HOLISTIC]
    assert "wrote no question" in notes(events) and "all or nothing" in notes(events)
