"""Signals that ask or draw again: agreement, entropy over meanings, and what the model says."""

import math
from dataclasses import replace

import pytest

from analyzers import registry
from analyzers.common.answering import Answered, Written, answers, ask
from analyzers.context import Context
from analyzers.engine.scoring import Labels
from analyzers.errors import BadInput, OutOfContext
from analyzers.judging import all_signals, p_true, self_consistency, token_signals, verbalized
from analyzers.task import Task
from analyzers.trace import Candidate, Judgement, Note, Token

EACH = pytest.mark.parametrize(
    "module", [p_true, self_consistency, verbalized, token_signals], ids=lambda m: m.__name__
)


@pytest.fixture
def engine(own_engine):
    own_engine.context = 4096
    return own_engine


def items(engine, n=3):
    asked = [ask(engine, str(i), f"What is {i}?") for i in range(n)]
    written = answers(engine, asked, 4, [None] * n)
    return [Answered(one, its) for one, its in zip(asked, written, strict=True)]


@EACH
def test_every_answer_gets_every_signal(module, engine):
    told = list(module.assess(engine, items(engine), module.Params(), Context(0)))
    assert [set(each) for each in told] == [set(module.SIGNALS)] * 3
    for each in told:
        for name, verdict in each.items():
            lo, hi, _, _ = module.SIGNALS[name]
            assert verdict.score is None or lo <= verdict.score <= hi


@EACH
def test_of_an_answer_on_the_page_every_signal_is_told_once(module, engine):
    events = list(module.run(engine, Task("Hi?"), module.Params(max_new=5), Context(0)))
    told = [e for e in events if isinstance(e, Judgement) and e.target == "answer"]
    assert [e.judge for e in told] == list(module.SIGNALS)
    assert [e.scale for e in told] == list(module.SIGNALS.values())
    assert isinstance(events[0], Token)


@pytest.mark.parametrize("module", [p_true, self_consistency, verbalized])
def test_a_begun_answer_is_refused(module, engine):
    with pytest.raises(BadInput, match="begun"):
        list(module.run(engine, Task("Hi?", prefix="So"), module.Params(), Context(0)))


# Self-consistency


def test_the_worked_entropy_of_counts():
    assert self_consistency.entropy_of([6, 3, 1]) == pytest.approx(0.8979, abs=5e-5)
    assert self_consistency.entropy_of([10]) == 0
    assert self_consistency.entropy_of([1] * 10) == pytest.approx(math.log(10))


def test_agreement_is_with_the_given_answer_and_not_with_the_majority():
    found = self_consistency.measured([1, 0, 0, 0, 1])
    assert found["self_consistency"].score == 0.25
    assert found["self_consistency"].detail["votes"] == (3, 1)
    assert found["self_consistency"].detail["disagreement"] == 0.5
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["semantic_entropy"].score == pytest.approx(entropy, abs=1e-6)
    assert self_consistency.measured([2, 0, 1])["self_consistency"].score == 0


def test_a_cluster_is_that_of_the_first_it_is_the_same_as():
    texts = ["Paris.", "the Paris", "42", "42.0", "Rome", ""]
    same = self_consistency._plainly
    assert self_consistency.clustered(texts, same) == [0, 0, 1, 1, 2, 3]
    assert self_consistency.clustered(["a", "b"], lambda a, b: True) == [0, 0]


def test_entailment_has_to_hold_both_ways(engine, monkeypatch):
    """What the model says decides, where the words alone do not."""

    said = {}

    def labels(engine, prefixes, prompts, labels, after):
        return [Labels({"Yes": yes, "No": 1 - yes}, 1.0, {}) for yes in said["yes"]]

    monkeypatch.setattr(self_consistency, "next_labels", labels)
    same = self_consistency._Entailment(engine, "Q?")
    for yes, expected in (((0.9, 0.8), True), ((0.9, 0.2), False), ((0.2, 0.1), False)):
        said["yes"] = yes
        assert same("one", "two") is expected
    assert same("one", "One.")


def test_draws_are_shown_with_their_cluster(engine):
    given = self_consistency.Params(n=5, max_new=3)
    events = list(self_consistency.run(engine, Task("Hi?"), given, Context(3)))
    draws = [event for event in events if isinstance(event, Candidate)]
    assert [event.key for event in draws] == [f"s{i}" for i in range(1, 6)]
    (votes,) = {e.detail["votes"] for e in events if isinstance(e, Judgement)}
    assert sum(votes) == 5
    assert len({event.group for event in draws}) == len(votes)


def test_drawn_agreement_does_not_hang_on_the_questions_beside_it(engine):
    some = items(engine)
    given = self_consistency.Params(n=6)
    together = list(self_consistency.assess(engine, some, given, Context(1)))
    (alone,) = self_consistency.assess(engine, some[1:2], given, Context(1))
    assert alone == together[1]


# Verbalized


@pytest.mark.parametrize(
    "text, expected",
    [
        ("90 percent", 0.9), ("90%", 0.9), (" 100 %.", 1.0), ("about 75 percent.", 0.75),
        ("0.35", 0.35), ("60/100", 0.6), ("0", 0.0), ("Very unlikely", 0.1), ("likely", 0.75),
        ("unlikely, I think", 0.25), ("almost certain", 0.95), ("150 percent", None), ("", None),
        ("I do not know", None), ("1.0", 1.0), ("7.5 percent", 0.075),
    ],
)  # fmt: skip
def test_what_a_confidence_is_read_as(text, expected):
    assert verbalized.read(text) == expected


def test_every_example_can_be_read_and_they_differ():
    for _, _, percent, word in verbalized._EXAMPLES:
        assert verbalized.read(percent) is not None
        assert verbalized.read(word) == verbalized.WORDS[word]
    assert len({verbalized.read(each[2]) for each in verbalized._EXAMPLES}) == 3


def test_nothing_to_read_is_no_low_confidence(engine, monkeypatch):
    monkeypatch.setattr(
        verbalized, "answers", lambda *given, **more: [Written((), "Hm, well", True)]
    )
    events = list(verbalized.run(engine, Task("Hi?"), verbalized.Params(max_new=3), Context(0)))
    (told,) = [event for event in events if isinstance(event, Judgement)]
    assert told.score is None and told.rationale == "Hm, well"
    assert any(isinstance(event, Note) and "Hm, well" in event.text for event in events)


# All of them


def test_all_signals_of_one_answer_cheapest_first(engine):
    ctx = Context(0, assessors=registry.assessors)
    events = list(all_signals.run(engine, Task("Hi?"), all_signals.Params(max_new=5), ctx))
    told = [event for event in events if isinstance(event, Judgement)]
    known = [name for method in registry.assessors().values() for name in method.signals]
    assert sorted(event.judge for event in told) == sorted(known)
    assert [event.judge for event in told][:7] == list(token_signals.SIGNALS)
    assert not any(event.passes for event in told[:7])
    by_name = {event.judge: event for event in told}
    assert by_name["p_true"].passes > 0
    alone = list(p_true.run(engine, Task("Hi?"), p_true.Params(max_new=5), ctx))
    (same,) = [event for event in alone if isinstance(event, Judgement)]
    assert by_name["p_true"].score == same.score


def test_a_signal_that_does_not_fit_is_told_and_the_others_stay(engine, monkeypatch):
    def refuses(engine, items, params, ctx):
        raise OutOfContext("The question is too long.")

    broken = replace(registry.method("p_true"), assess=refuses)
    kept = {"p_true": broken, "token_signals": registry.method("token_signals")}
    ctx = Context(0, assessors=lambda: kept)
    events = list(all_signals.run(engine, Task("Hi?"), all_signals.Params(max_new=5), ctx))
    assert "P(True) is left out: The question is too long." in [
        event.text for event in events if isinstance(event, Note)
    ]
    assert sum(isinstance(event, Judgement) for event in events) == len(token_signals.SIGNALS)
