"""Whether an answer is right: each way of scoring on answers as models write them."""

from fractions import Fraction

import pytest

from analyzers.errors import BadInput
from analyzers.evaluation.questions import Question, lettered
from analyzers.evaluation.scoring import normalise, numbers, score

CAPITAL = Question("c", "Capital of the USA?", ("Washington, D.C.", "Washington"))
NUMBER = Question("n", "How many?", ("1,234",), how="numeric")
GUINEA = Question("g", "Which country?", ("Guinea",), wrong=("Equatorial Guinea",))
YES = Question("y", "Is it so?", ("Yes",), ("No",), ("Yes", "No"), how="choice")
OPTIONS = ("the horse", "the hippopotamus", "the seal")
LETTERED = Question(
    "l",
    lettered("The whale's relative?", OPTIONS),
    OPTIONS[1:2],
    (OPTIONS[0], OPTIONS[2]),
    OPTIONS,
    how="choice",
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Café, (St. John's). ", "cafe st johns"),
        ("Washington, D.C.", "washington dc"),
        ("N’Djamena", "ndjamena"),
        ("Porto-Novo", "porto novo"),
        ("Ｐａｒｉｓ", "paris"),  # full width: NFKC
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("-1,234.5", "-1234.5"),
        ("50%", "50%"),
        ("A", "a"),
        ("vitamin A", "vitamin a"),
        ("हिन्दी", "हिन्दी"),  # vowel signs are no punctuation
        ("...", ""),
    ],
)
def test_normalising_leaves_what_was_said(text, plain):
    assert normalise(text) == plain
    assert normalise(plain) == plain  # nothing more to take away


def test_exact_minds_case_and_normalised_does_not():
    assert not score("washington dc", CAPITAL, "exact").right
    assert score(" Washington, D.C.\n", CAPITAL, "exact").right
    assert score("washington dc", CAPITAL, "normalised").right
    assert score(" the WASHINGTON.", CAPITAL).right
    assert not score("Washington State", CAPITAL).right
    assert not score("New Washington", CAPITAL).right


def test_only_the_first_line_with_text_is_the_answer():
    assert score("\n\n Washington\nQuestion: What is the capital of Peru?", CAPITAL).right
    assert not score("Lima\nWashington", CAPITAL).right


@pytest.mark.parametrize("how", ["exact", "normalised", "numeric", "containment", "choice"])
@pytest.mark.parametrize("answer", ["", " \n ", "..."])
def test_a_silent_answer_is_wrong_in_every_way(how, answer):
    question = Question("q", "?", ("1",), ("2",), ("1", "2"))
    scored = score(answer, question, how)
    assert not scored.right
    assert scored.how == how
    assert scored.why


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234", [1234]),
        ("1234.0 apples", [1234]),
        ("1.234e3", [1234]),
        ("twenty-one", [21]),
        ("Seventy seven", [77]),
        ("minus five", [-5]),
        ("−5", [-5]),
        ("10-5", [10, 5]),
        ("1/2", [Fraction(1, 2)]),
        ("1/0", []),
        ("two million", [2_000_000]),
        ("one hundred", [100]),
        (".5", [Fraction(1, 2)]),
        ("50 %", [50]),
        ("H2O", []),
        ("someone", []),
        ("1.1", [Fraction(11, 10)]),  # exactly, not as a float
    ],
)
def test_numbers_in_a_text(text, found):
    assert numbers(text) == found


def test_numeric_takes_the_result_and_refuses_to_guess():
    assert score("1234", NUMBER).right
    assert score("1000 + 234 = 1,234.00", NUMBER).right
    assert score("1000 plus 234 is 1234.", NUMBER).right
    assert score("1234, as 1234", NUMBER).right
    several = score("1234 or 1235", NUMBER)
    assert not several.right
    assert several.why == "gives several numbers"
    assert not score("-1234", NUMBER).right
    assert score("no idea", NUMBER).why == "gives no number"


def test_tolerance_is_relative_and_closed():
    hundred = Question("h", "?", ("100",), how="numeric")
    assert not score("101", hundred).right
    assert score("101", hundred, tolerance=0.015625).right
    assert score("101.5625", hundred, tolerance=0.015625).right  # 1/64 is exact in binary
    assert not score("101.5626", hundred, tolerance=0.015625).right
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="tolerance"):
            score("1", hundred, tolerance=wrong)


def test_a_monstrous_number_is_read_without_trouble():
    assert not score("9" * 100_000, NUMBER).right
    assert not score("1e999", NUMBER).right
    assert not score("1e999999999", NUMBER).right


def test_containment_keeps_to_words_and_to_the_longest_name():
    assert score("It is called Guinea, I think", GUINEA, "containment").right
    assert not score("New Guineas", GUINEA, "containment").right
    assert not score("Equatorial Guinea", GUINEA, "containment").right
    both = score("Guinea or Equatorial Guinea", GUINEA, "containment")
    assert not both.right
    assert "equatorial guinea" in both.why
    assert score("Let me think.\nGuinea\nQuestion: Equatorial Guinea?", GUINEA, "containment").right


def test_yes_and_no_are_read_from_sentences_and_letters_are_not():
    assert score(" Yes, it is.", YES).right
    assert score("Yes, there is no doubt.", YES).right  # what stands first counts
    assert not score("No. Yes would be wrong.", YES).right
    assert not score("A", YES).right  # the prompt shows no letters
    assert score("maybe", YES).why == "picks none"
    assert score("either yes or no", YES).why == "picks several"


@pytest.mark.parametrize(
    "answer",
    [
        "(B)",
        "B",
        "b)",
        "B. The hippopotamus",
        "The answer is (B)",
        "the hippopotamus",
        "Hippopotamus!",
    ],
)
def test_an_option_is_picked_by_letter_or_words(answer):
    assert score(answer, LETTERED).right


@pytest.mark.parametrize("answer", ["(A)", "C", "A hippopotamus or a seal", "Z", "seal", "(A) B"])
def test_another_option_is_wrong(answer):
    assert not score(answer, LETTERED).right


def test_a_way_that_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="no options"):
        score("x", CAPITAL, "choice")
    with pytest.raises(BadInput, match="no number"):
        score("x", CAPITAL, "numeric")
    with pytest.raises(BadInput, match="There is no scoring 'psychic': choose one of exact"):
        score("x", CAPITAL, "psychic")
