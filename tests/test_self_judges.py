"""The model as judge: both orders, votes and ties, the fast way against the plain one."""

import math
from collections.abc import Mapping
from functools import partial

import pytest

from analyzers.common import judge_check, self_judges
from analyzers.common.judge_check import FOLLOWS, ITEMS, JudgeCheck, check, note, told
from analyzers.common.judges import Verdict
from analyzers.common.rewards import Planted, keywords
from analyzers.common.self_judges import (
    ADVERSARIAL,
    CUT,
    HARMLESS,
    TRUTHFUL,
    TwoOrders,
    YesNo,
    judge_of,
    own,
)
from analyzers.engine import Engine
from analyzers.engine.scoring import Labels
from analyzers.errors import BadParameter, OutOfContext
from analyzers.task import Task, chat
from analyzers.trace import Note
from tests import tiny

SHORT = own("be kind")
TEXTS = ["Yes, gladly.", "Yes, but no.", "", "Yes, gladly.", "über alles"]
JUDGES = (TwoOrders, YesNo)


def said(mass: float = 0.5, **shares: float) -> Labels:
    return Labels(shares, mass, {label: math.log(share) for label, share in shares.items()})


def answering(engine: Engine, judge, *answers: Labels):
    judge._answers = lambda rows: list(answers)
    return judge


# What is said of a text


@pytest.mark.parametrize(
    ("first", "swapped", "vote", "soft", "verdict", "same"),
    [
        (0.9, 0.2, 1, 0.7, "good", None),
        (0.3, 0.8, -1, -0.5, "bad", None),
        (0.9, 0.8, 0, 0.1, "undecided", "A"),  # the letter A, whatever it stands for
        (0.2, 0.1, 0, 0.1, "undecided", "B"),
        (0.5, 0.5, -1, 0.0, "bad", None),  # ties count against the text
        (0.5, 0.2, 0, 0.3, "undecided", "B"),
    ],
)
def test_votes_of_both_orders(tiny_engine, first, swapped, vote, soft, verdict, same):
    """first, swapped: probability of the letter A, which is the good option in the first order."""
    answers = said(0.7, A=first, B=1 - first), said(A=swapped, B=1 - swapped)
    hard = answering(tiny_engine, TwoOrders(tiny_engine, SHORT, ""), *answers)([""])[0]
    assert (hard.score, hard.verdict, hard.label_mass) == (vote, verdict, 0.5)
    assert hard.detail.get("same letter") == same
    assert hard.detail["swapped"] == pytest.approx({"A": swapped, "B": 1 - swapped})
    found = answering(tiny_engine, TwoOrders(tiny_engine, SHORT, "", soft=True), *answers)([""])[0]
    assert found.score == pytest.approx(soft) and found.verdict == verdict


def test_yes_and_no(tiny_engine):
    for yes, vote in ((0.8, 1), (0.5, -1), (0.1, -1)):
        answers = said(Yes=yes, No=1 - yes)
        hard = answering(tiny_engine, YesNo(tiny_engine, SHORT, ""), answers)([""])[0]
        assert hard.score == vote and hard.detail["first"] == pytest.approx(
            {"Yes": yes, "No": 1 - yes}
        )
        soft = answering(tiny_engine, YesNo(tiny_engine, SHORT, "", soft=True), answers)([""])[0]
        assert soft.score == pytest.approx(2 * yes - 1)


def test_the_options_change_places_and_every_letter_is_as_often_right(tiny_engine, monkeypatch):
    first, swapped = TwoOrders(tiny_engine, SHORT, "Hm?")._questions("So.")
    good, bad = SHORT.good, SHORT.bad
    dialogue = "User: Hm?\nAssistant: So.\nOptions:\n"
    assert first.endswith(f"{dialogue}(A) {good}\n(B) {bad}")
    assert swapped.endswith(f"{dialogue}(A) {bad}\n(B) {good}")
    monkeypatch.setattr(tiny_engine, "context", 8192)
    for question in (HARMLESS, ADVERSARIAL, TRUTHFUL):
        shown = TwoOrders(tiny_engine, question, "")._questions("")[0]
        assert shown.count("is: (A)") == shown.count("is: (B)") == 2
        examples = shown.split("\n\n")[1:-1]
        for (_, answer, worth), example in zip(question.examples, examples, strict=True):
            named = next(line for line in example.splitlines() if line[:3] == example[-3:])
            assert answer in example
            assert named[4:] == (question.good if worth else question.bad)
        asked = YesNo(tiny_engine, question, "")._questions("")[0]
        assert asked.count("is: Yes") == asked.count("is: No") == 2


# The fast way is the plain way


def plainly(engine: Engine, judge, text: str) -> list[dict[str, float]]:
    """The slow obvious version: each question by itself, each label read token by token."""
    found = []
    for asked in judge._questions(text):
        ids = engine.encode(Task(chat(asked), prefix=judge.begun))
        shares = {}
        for label, texts in judge.variants.items():
            ways = [engine.score(engine.prefill(ids), [list(way.encode())])[0] for way in texts]
            shares[label] = sum(math.exp(way.total) for way in ways)
        found.append({label: share / sum(shares.values()) for label, share in shares.items()})
    return found


def same(one: list[Verdict], other: list[Verdict]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-4)
        assert a.verdict == b.verdict
        assert a.label_mass == pytest.approx(b.label_mass, abs=1e-5)
        assert a.detail.keys() == b.detail.keys()
        for key, shares in a.detail.items():
            if isinstance(shares, Mapping):
                assert shares == pytest.approx(b.detail[key], abs=1e-4)


@pytest.mark.parametrize("kind", JUDGES)
def test_together_says_what_one_by_one_says(tiny_engine, kind):
    fast = kind(tiny_engine, SHORT, "Hello?", soft=True)
    slow = kind(tiny_engine, SHORT, "Hello?", soft=True, together=False)
    expected = slow(TEXTS)
    same(fast(TEXTS), expected)
    same([fast([text])[0] for text in reversed(TEXTS)][::-1], expected)  # from what was kept
    for text, verdict in zip(TEXTS, expected, strict=True):
        for shares, plain in zip(
            [verdict.detail[key] for key in ("first", "swapped") if key in verdict.detail],
            plainly(tiny_engine, fast, text),
            strict=True,
        ):
            assert shares == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("family", ["lfm2", "gemma3"])
def test_other_architectures_agree_with_themselves(family):
    """One of them has no trees."""
    engine = tiny.engine(family)
    fast, slow = (TwoOrders(engine, SHORT, "", together=together) for together in (True, False))
    same(fast(TEXTS[:2]), slow(TEXTS[:2]))


def test_passes_are_counted_once_and_the_beginning_is_computed_once(tiny_engine):
    judge = TwoOrders(tiny_engine, SHORT, "Hello?")
    counts = []
    for _ in range(2):
        before = tiny_engine.forwards
        verdicts = judge(TEXTS)
        counts.append(tiny_engine.forwards - before)
        assert sum(verdict.passes for verdict in verdicts) == counts[-1]
    assert counts[1] < counts[0]
    before = tiny_engine.forwards
    TwoOrders(tiny_engine, SHORT, "Hello?", together=False)(TEXTS)
    assert tiny_engine.forwards - before > 2 * len(TEXTS) > counts[0]
    assert judge([]) == []


def test_a_model_without_chat_template_reads_raw_text(tiny_engine, monkeypatch):
    judge = YesNo(tiny_engine, SHORT, "Hello?")
    monkeypatch.setattr(type(tiny_engine), "can_chat", False)
    (row,) = judge._rows("Hm.")
    shown = tiny_engine.vocabulary.decode(row)
    assert shown.endswith("Assistant: Hm.\nIs the assistant's response as wished?\nThe answer is:")
    assert not any(tiny_engine.vocabulary.special(id) for id in row)


# Too long


def test_examples_that_would_fill_the_window_are_left_out_and_the_name_says_so(
    tiny_engine, monkeypatch
):
    judge = TwoOrders(tiny_engine, HARMLESS, "Hello?")
    assert judge.name == "harmless (A/B, both orders, no room for examples)"
    assert judge(["Yes."])[0].detail.keys() >= {"first", "swapped"}
    monkeypatch.setattr(tiny_engine, "context", 8192)
    judge = TwoOrders(tiny_engine, HARMLESS, "Hello?")
    assert judge.name == "harmless (A/B, both orders)"
    assert HARMLESS.examples[0][0] in judge._questions("Yes.")[1]


def test_a_long_text_is_cut_at_its_beginning_with_a_mark(tiny_engine):
    text = "äbc " * 200 + "the end"
    for kind in JUDGES:
        judge = kind(tiny_engine, SHORT, "Hello?")
        rows, cut = judge._fitting(text)
        assert cut
        for row in rows:
            shown = tiny_engine.vocabulary.decode(row)
            assert f"Assistant: {CUT}" in shown and "the end\n" in shown and "\ufffd" not in shown
        longest = max(map(len, rows))
        assert tiny.CONTEXT - 12 <= longest < tiny.CONTEXT
        assert judge([text])[0].detail["cut"] is True
        assert "cut" not in judge(["short"])[0].detail


def test_a_prompt_that_leaves_no_room_is_refused(tiny_engine):
    judge = TwoOrders(tiny_engine, SHORT, "x" * 600)
    with pytest.raises(OutOfContext, match=r"without the text it is about has .* holds 512"):
        judge(["hello"])


# From knobs


def test_knobs_make_the_judge(tiny_engine):
    for kind in ("harmless", "adversarial", "own"):
        assert isinstance(judge_of(kind, tiny_engine, "", spec="be kind"), TwoOrders)
    assert isinstance(judge_of("truthful", tiny_engine, "", soft=True), YesNo)
    planted = judge_of("keywords", tiny_engine, "", spec="sun")
    assert [verdict.score for verdict in planted(["a sun", "sunny"])] == [1, -1]
    assert judge_of("own", tiny_engine, "", spec=" be\nkind ").name == (
        "own: be kind (A/B, both orders)"
    )
    with pytest.raises(BadParameter, match="the criterion is empty"):
        judge_of("own", tiny_engine, "", spec=" ")
    assert self_judges.asked(Task("raw")) == "raw"
    assert self_judges.asked(Task(chat("now", "system"))) == "now"


# The check of judges


@pytest.mark.parametrize("items", [*ITEMS.values(), FOLLOWS])
def test_a_judge_that_knows_passes_and_one_that_likes_a_letter_does_not(items):
    goods = {text for good, _ in items.values() for text in good}
    every = [text for both in items.values() for many in both for text in many]
    assert len(every) == len(set(every)) == 20 and len(goods) == 10
    knowing = Says(
        lambda text: Verdict(text in goods, detail=letters(text in goods, False)), (0, 1)
    )
    found = check(lambda prompt: knowing, items)
    assert (found.n, found.right, found.undecided) == (20, 20, 0)
    assert (found.answers, found.says_first, found.label) == (40, 20, "A")
    assert found.letter_bias == pytest.approx(0)
    assert not found.at_chance and note(found).level == "info"

    always = Says(lambda text: Verdict(0.0, detail=letters(True, True)), (-1, 1))
    habit = check(lambda prompt: always, items)
    assert (habit.right, habit.undecided, habit.says_first) == (0, 20, 40)
    assert habit.letter_bias == pytest.approx(0.4)
    assert note(habit) == Note(
        "warning",
        "The judge is at chance: 0 of 20 texts of known worth right and 20 undecided; "
        "it says A 40 of 40 times. Its values are no evidence.",
    )


class Says:
    """A judge that says what a function says."""

    name = "planted"

    def __init__(self, say, ends):
        self.say, self.scale = say, (*ends, "better", False)

    def __call__(self, texts):
        return [self.say(text) for text in texts]


def letters(first: bool, swapped: bool) -> dict[str, dict[str, float]]:
    """Whether A is preferred in each order, at 0.9; when neither tells, B answers the second."""
    return {
        "first": {"A": 0.9, "B": 0.1} if first else {"A": 0.1, "B": 0.9},
        "swapped": {"A": 0.9, "B": 0.1} if swapped or not first else {"A": 0.1, "B": 0.9},
    }


@pytest.mark.parametrize(
    ("right", "chance"), [(20, 2**-20), (15, 0.020695), (14, 0.057659), (10, 0.588099), (0, 1)]
)
def test_chance_is_the_tail_of_the_binomial(right, chance):
    found = JudgeCheck(20, right, 0, 0, 0, "", 0.0)
    assert found.chance == pytest.approx(chance, abs=1e-6)
    assert found.at_chance == (right < 15)


def test_the_check_of_a_program_and_of_a_model(tiny_engine):
    planted = check(lambda prompt: Planted(keywords("a")), ITEMS["truthful"])
    assert planted.answers == 0 and "says" not in note(planted).text
    assert not list(told("keywords", tiny_engine)) and not list(told("own", tiny_engine))
    found = check(partial(judge_of, "truthful", tiny_engine), ITEMS["truthful"])
    assert next(told("truthful", tiny_engine)) == note(found)
    assert (found.n, found.answers, found.label) == (20, 20, "Yes")
    names = {metric.name: metric.value for metric in judge_check.metrics(found)}
    assert names["judge right"] == found.right / 20
    assert names["judge says first"] == found.says_first / 20
