"""Checklists: the numbers of the paper's definitions, and the fast way equals the slow one."""

import random

import pytest

from analyzers.common.asking import MARK, encoded, fitted, instruction, next_labels, user
from analyzers.common.budget import Budget, Forwards
from analyzers.common.checklist import (
    BEGUN,
    FORMS,
    Answer,
    Examiner,
    Requirement,
    Sheet,
    kappa,
    make_checklist,
    read_answer,
    read_checklist,
    read_questions,
    requirements_met,
)
from analyzers.common.prefixes import Prefixes
from analyzers.common.rollouts import Rollout
from analyzers.errors import BadInput, BadParameter
from analyzers.task import Task, chat
from analyzers.trace import Note
from tests import tiny

QUESTIONS = "Is it short?\nDoes it name a dog?\nIs it polite?"


def sheet(*said: bool | None, p: tuple[float, ...] = ()) -> Sheet:
    """The model's answers, with their P(YES)."""
    each = p or (None,) * len(said)
    return Sheet(tuple(Answer(yes, p, "model") for yes, p in zip(said, each, strict=True)))


def examiner(engine, lines: str = QUESTIONS, **options) -> Examiner:
    options = {"by_model": True} | options
    return Examiner(engine, "Write a word.", read_checklist(lines), Budget(), **options)


def test_the_pass_rate_is_the_share_of_yes():
    answers = sheet(True, False, True, True, p=(0.9, 0.4, 0.8, 0.6))
    assert answers.pass_rate == 0.75
    assert answers.soft == pytest.approx(0.675)
    assert not answers.passed and sheet(True, True).passed


def test_what_could_not_be_read_is_left_out():
    assert sheet(True, None, False, True).pass_rate == pytest.approx(2 / 3)
    assert sheet(None, None).pass_rate is None and sheet(None).soft is None
    assert not sheet(True, None).passed


def test_requirements_met_counts_requirements_not_responses():
    sheets = [sheet(True, True, True, False), sheet(True, False)]
    assert requirements_met(sheets) == pytest.approx(4 / 6)
    macro = sum(each.pass_rate for each in sheets) / 2
    assert macro == pytest.approx(0.625)


def test_kappa_is_agreement_beyond_chance():
    assert kappa([(True, True), (False, False)]) == 1
    assert kappa([(True, True), (True, False), (False, True), (False, False)]) == 0
    # 4 of 5 agree; by chance 0.6 * 0.8 + 0.4 * 0.2 would.
    rows = [(True, True)] * 3 + [(False, True), (False, False)]
    assert kappa(rows) == pytest.approx((0.8 - 0.56) / 0.44)
    assert kappa([(True, True)]) is None and kappa([]) is None


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("It is. Answer: YES", True),
        ("Answer: yes, or rather Answer: NO.", False),
        ("**Answer:** No", False),
        ("YES", None),
        ("Answer: yesterday", None),
        ("", None),
    ],
)
def test_the_last_answer_counts(text, yes):
    assert read_answer(text) is yes


def test_questions_lose_their_numbers_and_everything_else_is_dropped():
    text = "1. Is it a poem?\n- Does it rhyme?\nMore:\n3) Is it a poem?\n* Is it 2 lines?\n?"
    assert read_questions(text) == ["Is it a poem?", "Does it rhyme?", "Is it 2 lines?"]


def test_the_id_is_that_of_the_questions():
    assert read_checklist(QUESTIONS).id == read_checklist(QUESTIONS + "\n\n").id
    assert read_checklist(QUESTIONS).id != read_checklist(QUESTIONS + "\nIs it new?").id


def test_lines_for_programs_become_questions_too():
    found = read_checklist("length: 1-3 words\nIs it kind?\nkeywords: sun, sea").requirements
    assert [each.check is None for each in found] == [False, True, False]
    assert found[0].question == "Is the response 1-3 words long?"
    assert found[2].check("the sun and the sea") == 1 > found[2].check("the sun")


def test_bad_lists_are_one_clear_error():
    with pytest.raises(BadParameter, match="checklist is empty"):
        read_checklist(" \n ")
    with pytest.raises(BadParameter):
        read_checklist("length: many")


def test_one_pass_for_all_questions_says_what_each_says_by_itself(any_engine):
    """The shared prefix and the tree change the speed, never the answers."""
    prompts = [
        encoded(any_engine, [user(f"Of this text: {question}")], BEGUN)
        for question in QUESTIONS.splitlines()
    ]
    together = next_labels(any_engine, Prefixes(any_engine), prompts, FORMS, BEGUN)
    for prompt, found in zip(prompts, together, strict=True):
        alone = any_engine.labels(prompt, FORMS, after=BEGUN)
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
        assert found.mass == pytest.approx(alone.mass, abs=1e-4)


def test_the_order_of_questions_does_not_matter(tiny_engine):
    lines = QUESTIONS.splitlines()
    random.Random(3).shuffle(lines)
    (one,), (other,) = (
        examiner(tiny_engine, text)(["A dog."]) for text in (QUESTIONS, "\n".join(lines))
    )
    assert one.score == other.score
    asked = {question: p for question, _, p, _ in one.detail["answers"]}
    again = {question: p for question, _, p, _ in other.detail["answers"]}
    assert asked == pytest.approx(again, abs=1e-4)


def test_a_program_answers_where_it_can_unless_the_model_is_to(tiny_engine):
    lines = "length: 1-3 words\nIs it kind?"
    mixed = examiner(tiny_engine, lines, by_model=False)
    (verdict,) = mixed(["two words"])
    assert [by for *_, by in verdict.detail["answers"]] == ["program", "model"]
    assert mixed.asks_model and verdict.passes > 0
    alone = examiner(tiny_engine, "length: 1-3 words", by_model=False)
    (verdict,) = alone(["two words"])
    assert not alone.asks_model and verdict.passes == 0 and verdict.score == 1
    (verdict,) = examiner(tiny_engine, lines)(["two words"])
    assert [by for *_, by in verdict.detail["answers"]] == ["model", "model"]


def test_answers_after_reasoning_are_read_from_the_words(tiny_engine, monkeypatch):
    said = iter(["Short. Answer: YES", "No dog in it.", "Rude. Answer: NO"])

    def write(engine, prefixes, ids, rngs, budget, *, max_new):
        return [Rollout(engine.tokens(next(said)))]

    monkeypatch.setattr("analyzers.common.checklist.write", write)
    judge = examiner(tiny_engine, reasons=20)
    (verdict,) = judge(["A word."])
    assert verdict.verdict == "YES, unparsed, NO" and verdict.score == 0.5
    assert verdict.detail["soft"] is None and "Rude." in verdict.rationale


def test_a_long_response_is_cut_where_it_begins(tiny_engine):
    def build(text: str) -> list[int]:
        return tiny_engine.tokens(f"<{text}>")

    ids, cut = fitted(build, "abc " * 100, 60)
    assert cut and len(ids) <= 60
    assert tiny_engine.vocabulary.decode(ids).startswith(f"<{MARK}")
    assert fitted(build, "abc", 60) == (build("abc"), False)
    (verdict,) = examiner(tiny_engine)(["word " * 200])
    assert verdict.score is not None


def test_the_model_makes_a_list_from_the_instruction_alone(monkeypatch):
    engine = tiny.Engine(
        tiny.model("llama", max_position_embeddings=4096),
        tiny.tokenizer(),
        {"name": "tiny", "hash": "", "quantization": "none"},
    )
    made = make_checklist(engine, Prefixes(engine), "Write a word.", Budget())
    assert all(each.question.endswith("?") for each in made.requirements)
    text = " Is it a word?\n2. Is it one?\nThat is all."
    monkeypatch.setattr(
        "analyzers.common.checklist.write",
        lambda engine, *given, **options: [Rollout(engine.tokens(text))],
    )
    made = make_checklist(engine, Prefixes(engine), "Write a word.", Budget())
    assert made.requirements == (Requirement("Is it a word?"), Requirement("Is it one?"))


def test_passes_of_another_run_are_not_counted(own_engine):
    def work(n: int):
        for _ in range(n):
            own_engine.prefill([1, 2, 3])
            yield Note("info", "")
        return n

    counts = [Forwards(own_engine), Forwards(own_engine)]
    runs = [counts[0].of(work(2)), counts[1].of(work(3))]
    for run in (runs[0], runs[1], runs[1], runs[0], runs[1]):
        next(run)
    with pytest.raises(StopIteration) as end:
        next(runs[1])
    assert end.value.value == 3
    assert [count.count for count in counts] == [2, 3]


def test_a_begun_answer_is_refused():
    assert instruction(Task(chat("Do it.", system="Be kind."))) == "Do it."
    with pytest.raises(BadInput, match="begun"):
        instruction(Task("Do it.", prefix="Well"))
