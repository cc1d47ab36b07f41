"""The workbench: what it tells, what it refuses, and that it goes on where it was broken off."""

import json
import math
from dataclasses import replace
from itertools import cycle, takewhile

import pytest
import torch

from analyzers import registry, workbench
from analyzers.common.answering import Answered, answers, ask, behind, trusted
from analyzers.context import Context
from analyzers.engine import Filters
from analyzers.errors import BadInput, Stopped
from analyzers.evaluation.built_in import built_in
from analyzers.evaluation.scoring import Scored
from analyzers.judging import p_true, token_signals
from analyzers.task import Task
from analyzers.trace import Artifact, Candidate, Judgement, Metric, RunStarted, Token

PLAIN = "sequence_logprob, mean_entropy"
QUESTIONS = [f"What is {a} plus {a}?" for a in range(1, 8)]


def params(**given):
    return workbench.Params(**({"data": "arithmetic", "limit": 6, "signals": PLAIN} | given))


def run(engine, given=None, ctx=None):
    return list(workbench.run(engine, Task("x"), given or params(), ctx or Context(0)))


@pytest.fixture
def engine(own_engine):
    own_engine.context = 4096
    return own_engine


def logits_of(engine, ids):
    """One plain pass of the model over everything."""
    with torch.inference_mode():
        return engine.model(torch.tensor([list(ids)])).logits[0]


# Answering


def test_answers_side_by_side_are_those_of_one_by_one(tiny_engine):
    asked = [
        ask(tiny_engine, str(i), text, "Question: a\nAnswer: b\n\n")
        for i, text in enumerate(QUESTIONS)
    ]
    together = answers(tiny_engine, asked, 6, [None] * len(asked))
    for one, its in zip(asked, together, strict=True):
        (alone,) = answers(tiny_engine, [one], 6, [None])
        assert [token.id for token in its.tokens] == [token.id for token in alone.tokens]
        assert its.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_the_numbers_of_an_answer_are_those_of_a_plain_full_forward(tiny_engine):
    asked = [ask(tiny_engine, str(i), text) for i, text in enumerate(QUESTIONS)]
    for one, its in zip(asked, answers(tiny_engine, asked, 5, [None] * len(asked)), strict=True):
        values = token_signals.measured(its.tokens)
        ids = [*one.ids, *(token.id for token in its.tokens)]
        logits = logits_of(tiny_engine, ids)[len(one.ids) - 1 : -1].double()
        logprobs = logits.log_softmax(-1)
        own = [float(row[token.id]) for row, token in zip(logprobs, its.tokens, strict=True)]
        spread = [float(-(row.exp() * row).sum()) for row in logprobs]
        assert values["sequence_logprob"] == pytest.approx(sum(own), abs=1e-4)
        assert values["mean_logprob"] == pytest.approx(sum(own) / len(own), abs=1e-4)
        assert values["min_logprob"] == pytest.approx(min(own), abs=1e-4)
        assert values["perplexity"] == pytest.approx(math.exp(-sum(own) / len(own)), rel=1e-3)
        assert values["mean_entropy"] == pytest.approx(sum(spread) / len(spread), abs=1e-4)
        assert values["max_entropy"] == pytest.approx(max(spread), abs=1e-4)


def test_prompts_that_share_nothing_or_everything(tiny_engine):
    same, other = tiny_engine.tokens("abc"), tiny_engine.tokens("xyz")
    for prompts in ([same, same], [same, other], [same, same[:2]], [same[:1], same]):
        cursors = behind(tiny_engine, prompts)
        assert [cursor.ids for cursor in cursors] == [list(prompt) for prompt in prompts]


def test_an_answer_ends_with_its_line(tiny_engine, monkeypatch):
    """Two lines of space before the text are not its end."""
    said = iter(tiny_engine.tokens("\n x\n never"))
    monkeypatch.setattr(
        "analyzers.common.answering.token",
        lambda engine, step, id: Token(step.pos, next(said), "", "", -1.0, 1.0, 1, 0.5, 1.0, ()),
    )
    (its,) = answers(tiny_engine, [ask(tiny_engine, "a", "b")], 12, [None])
    assert (its.text, its.ended, len(its.tokens)) == ("x", True, 4)


def test_drawn_answers_are_the_same_whatever_is_beside_them(tiny_engine):
    asked = [ask(tiny_engine, "a", QUESTIONS[0])] * 3
    draws = [Context(0).rng("answer", i) for i in range(3)]
    three = answers(tiny_engine, asked, 5, draws, Filters(temperature=1.0))
    (second,) = answers(
        tiny_engine, asked[:1], 5, [Context(0).rng("answer", 1)], Filters(temperature=1.0)
    )
    assert [t.id for t in three[1].tokens] == [t.id for t in second.tokens]
    assert len({its.text for its in three}) > 1


# P(True)


def test_p_true_is_the_share_of_the_label_read_by_hand(engine):
    asked = ask(engine, "a", "Is water wet?")
    (written,) = answers(engine, [asked], 4, [None])
    given = p_true.Params()
    (said,) = p_true.assess(engine, [Answered(asked, written)], given, Context(0))
    verdict = said["p_true"]
    by_hand = []
    for first, second, letter in (("True", "False", "A"), ("False", "True", "B")):
        text = (
            f"Question: Is water wet?\nProposed answer: {written.text}\nIs the proposed answer:\n"
            f"(A) {first}\n(B) {second}\nThe proposed answer is: ("
        )
        own = logits_of(engine, engine.tokens(text))[-1].double()
        full = {label: float(own[engine.tokens(label)[0]].exp()) for label in "AB"}
        spaced = logits_of(engine, engine.tokens(text + " "))[-1].double().softmax(-1)
        space = float(own.softmax(-1)[engine.tokens(" ")[0]])
        whole = float(own.exp().sum())
        shares = {
            label: full[label] / whole + space * float(spaced[engine.tokens(label)[0]])
            for label in "AB"
        }
        by_hand.append(shares[letter] / sum(shares.values()))
    assert verdict.detail["first"] == pytest.approx(by_hand[0], abs=1e-4)
    assert verdict.detail["swapped"] == pytest.approx(by_hand[1], abs=1e-4)
    assert verdict.score == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert verdict.detail["position bias"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-4)
    assert 0 < verdict.label_mass < 1


def test_p_true_of_many_is_p_true_of_each(engine):
    asked = [ask(engine, str(i), text) for i, text in enumerate(QUESTIONS)]
    items = [
        Answered(one, its)
        for one, its in zip(asked, answers(engine, asked, 4, [None] * 7), strict=True)
    ]
    given = p_true.Params(examples=True)
    together = list(p_true.assess(engine, items, given, Context(0)))
    for item, its in zip(items, together, strict=True):
        (alone,) = p_true.assess(engine, [item], given, Context(0))
        assert its["p_true"].score == pytest.approx(alone["p_true"].score, abs=1e-4)


def test_the_worked_judgements_favour_no_letter():
    for swapped in (False, True):
        letters = ["A" if true != swapped else "B" for _, _, true in p_true.EXAMPLES]
        assert letters.count("A") == letters.count("B")


def test_little_on_the_letters_is_said(engine):
    events = list(p_true.run(engine, Task("Is water wet?"), p_true.Params(max_new=4), Context(0)))
    (judged,) = [event for event in events if isinstance(event, Judgement)]
    assert judged.label_mass < p_true.SMALL_MASS
    assert any("no evidence" in getattr(event, "text", "") for event in events)


# Token signals


def written(engine, text):
    return [
        Token(pos, id, engine.vocabulary.piece((), id), "", -1.0, 1.0, 1, 0.5, 1.0, ())
        for pos, id in enumerate(engine.tokens(text))
    ]


def test_sentences_are_parted_where_they_end(tiny_engine):
    tokens = written(tiny_engine, 'It is 3.14. "Yes." No!\nEnd')
    found = ["".join(each.text for each in its) for its in token_signals.sentences(tokens)]
    assert [text.strip() for text in found] == ["It is 3.14.", '"Yes."', "No!", "End"]
    assert "".join(found) == 'It is 3.14. "Yes." No!\nEnd'
    assert token_signals.sentences([]) == []


def test_every_token_belongs_to_one_sentence(tiny_engine):
    events = list(
        token_signals.run(tiny_engine, Task("Hello. "), token_signals.Params(), Context(1))
    )
    tokens = [event for event in events if isinstance(event, Token)]
    spans = sorted(
        {
            (event.detail["first"], event.detail["last"])
            for event in events
            if isinstance(event, Judgement) and event.target != "answer"
        }
    )
    covered = [pos for first, last in spans for pos in range(first, last + 1)]
    assert covered == [token.pos for token in tokens]


# The run


def test_every_question_is_answered_scored_and_measured(engine):
    events = run(engine)
    (mark,) = [event for event in events if isinstance(event, Artifact)]
    asked = built_in("arithmetic").questions[:6]
    assert mark.meta["n"] == 6 and mark.meta["name"] == "arithmetic"
    assert [event.key for event in events if isinstance(event, Candidate)] == [q.id for q in asked]
    for question in asked:
        judges = [e.judge for e in events if isinstance(e, Judgement) and e.target == question.id]
        assert judges == ["sequence_logprob", "mean_entropy", "right"]
    assert [e.value for e in events if isinstance(e, Metric) and e.name == "done"][-1] == 1
    found = workbench.items(events)
    assert [item.question.prompt for item in found] == [question.prompt for question in asked]
    assert json.dumps(workbench.report(events))


def test_the_report_has_null_where_there_is_no_probability(engine):
    told = workbench.report(run(engine, params(signals="sequence_logprob, p_true", limit=4)))
    assert (told["n"], told["data"]) == (4, "arithmetic")
    by_name = {row["signal"]: row for row in told["signals"]}
    assert by_name["sequence_logprob"]["ece"] is None
    assert by_name["sequence_logprob"]["direction"] == "higher = surer"
    assert by_name["p_true"]["ece"] is not None
    assert by_name["p_true"]["n"] == 4
    # A tiny model is never right: nothing can be ranked, and that is said.
    assert by_name["p_true"]["auroc"] is None
    assert "all answers are wrong" in by_name["p_true"]["why"]


def test_a_model_that_answers_with_nothing_is_wrong(engine, monkeypatch):
    monkeypatch.setattr(engine, "_ends", frozenset(range(261)))
    found = workbench.items(run(engine))
    assert len(found) == 6
    assert not any(item.right for item in found)
    assert all(math.isfinite(item.scores["sequence_logprob"].score) for item in found)


def started(engine, given):
    return RunStarted("workbench", engine.identity, "x", None, dict(vars(given)), 0)


def earlier_run(engine, given, n):
    """A run that was broken off within the question after the n-th."""
    seen, events = 0, [started(engine, given)]
    for event in workbench.run(engine, Task("x"), given, Context(0)):
        seen += isinstance(event, Candidate)
        events.append(event)
        if seen > n:
            return events
    raise AssertionError("there were fewer questions")


def test_what_was_finished_is_never_computed_again(engine, monkeypatch):
    monkeypatch.setattr(workbench, "BATCH", 2)
    whole = run(engine)
    broken = earlier_run(engine, params(), 4)
    given = params(resume="R1")
    ctx = Context(0, engines={"": engine}, earlier={"R1": broken}.__getitem__)
    before = engine.forwards
    again = run(engine, given, ctx)
    resumed = engine.forwards - before
    before = engine.forwards
    run(engine)
    assert 0 < resumed < (engine.forwards - before) / 2
    assert workbench.report(again) == workbench.report(whole)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"limit": 5}, "there were 6 questions and now are 5"),
        ({"data": "capitals"}, "The questions changed"),
        ({"signals": "mean_logprob"}, "had signals"),
        ({"max_new": 3}, "had max_new"),
    ],
)
def test_a_run_does_not_go_on_from_another(engine, change, words):
    broken = earlier_run(engine, params(), 2)
    ctx = Context(0, engines={"": engine}, earlier=lambda id: broken)
    with pytest.raises(BadInput, match=words):
        run(engine, replace(params(resume="R1"), **change), ctx)


def test_a_changed_file_is_refused_with_what_changed(engine, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("question,answer\nOne?,1\nTwo?,2\nThree?,3\n", "utf-8")
    given = params(file=str(path), shots=1, limit=0)
    broken = [started(engine, given), *takewhile(lambda e: True, run(engine, given))]
    path.write_text("question,answer\nOne?,1\nTwo?,2\nThree?,33\n", "utf-8")
    ctx = Context(0, engines={"": engine}, earlier=lambda id: broken)
    with pytest.raises(BadInput, match="the first that differs is number 2"):
        run(engine, replace(given, resume="R1"), ctx)


@pytest.mark.parametrize(
    "method, words",
    [("sampling", "no run of the workbench"), ("workbench", "made with another model")],
)
def test_another_kind_of_run_or_model_is_refused(engine, method, words):
    other = replace(started(engine, params()), method=method, model={"hash": "other"})
    ctx = Context(0, engines={"": engine}, earlier=lambda id: [other])
    with pytest.raises(BadInput, match=words):
        run(engine, params(resume="R1"), ctx)


def test_what_does_not_exist_is_refused(engine):
    with pytest.raises(BadInput, match="no signal 'nonsense'"):
        run(engine, params(signals="nonsense"))
    with pytest.raises(BadInput, match="at least one"):
        run(engine, params(signals=" , "))
    with pytest.raises(BadInput, match="no built-in set"):
        run(engine, params(data="nonsense"))
    with pytest.raises(BadInput, match="Columns"):
        workbench.questions(params(file="x.csv", columns="question"))


def test_a_stop_keeps_whole_questions(engine, monkeypatch):
    monkeypatch.setattr(workbench, "BATCH", 2)
    events = []
    with pytest.raises(Stopped):
        for event in workbench.run(engine, Task("x"), params(), Context(0)):
            events.append(event)
            if len(workbench.items(events)) == 2:

                def stop():
                    raise Stopped("by you")

                engine.poll = stop
    assert len(workbench.items(events)) == 2
    assert workbench.report(events)["n"] == 2


def test_every_signal_is_measured_by_the_method_that_has_it():
    known = workbench.signals()
    assert {"sequence_logprob", "mean_logprob", "min_logprob", "mean_entropy", "p_true"} <= set(
        known
    )
    for name, method in known.items():
        assert method.assess and name in method.signals
        assert method.card.family == "judging"
    assert registry.method("workbench").name not in registry.methods()


def test_what_is_known_of_a_signal_stands_beside_it_afterwards(engine, monkeypatch):
    """Only of enough answers, of both kinds."""
    monkeypatch.setattr(workbench, "score", half_right())
    ctx = Context(0)
    run(engine, params(limit=20), ctx)
    assert trusted(ctx) == {}
    run(engine, params(limit=40), ctx)
    assert set(trusted(ctx)) == {"sequence_logprob", "mean_entropy"}
    known = trusted(ctx)["sequence_logprob"]
    assert known["lo"] <= known["auroc"] <= known["hi"]
    assert (known["n"], known["data"], known["ece"]) == (40, "arithmetic", None)
    events = list(token_signals.run(engine, Task("Hello."), token_signals.Params(max_new=4), ctx))
    whole = [e for e in events if isinstance(e, Judgement) and e.target == "answer"]
    told = {e.judge: e.detail["trust"] for e in whole if "trust" in e.detail}
    assert told == trusted(ctx)


def half_right():
    turns = cycle((True, False))
    return lambda answer, question: Scored(next(turns), "exact", "by turns")


def test_the_default_model_knows_capitals_and_its_tokens_say_which(smollm):
    """Few-shot, greedy. P(True) carries no such signal at this size, and may not seem to."""
    given = workbench.Params(data="capitals", limit=64, signals="sequence_logprob, p_true")
    told = workbench.report(workbench.run(smollm, Task("x"), given, Context(0)))
    by_name = {row["signal"]: row for row in told["signals"]}
    assert 0.35 <= told["accuracy"] <= 0.60
    assert by_name["sequence_logprob"]["auroc"] >= 0.75
    assert by_name["p_true"]["auroc_interval"][0] < 0.5
