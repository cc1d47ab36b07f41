"""Question sets: the built-in ones, those from files, and how a changed one is noticed."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest

from analyzers.errors import BadInput
from analyzers.evaluation import reading, rows
from analyzers.evaluation.built_in import built_in, names
from analyzers.evaluation.questions import (
    Fingerprint,
    Question,
    QuestionSet,
    difference,
    fingerprint,
    first,
    refuse_changed,
)
from analyzers.evaluation.reading import look, read
from analyzers.evaluation.scoring import normalise, score


@pytest.fixture
def write(tmp_path):
    def to(text, name="data.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return to


def test_there_are_four_sets_and_over_five_hundred_questions():
    assert names() == ("capitals", "elements", "arithmetic", "misconceptions")
    sizes = {name: len(built_in(name).questions) for name in names()}
    assert sizes == {"capitals": 186, "elements": 288, "arithmetic": 192, "misconceptions": 120}
    with pytest.raises(BadInput, match="no built-in set 'trivia': choose one of capitals"):
        built_in("trivia")


@pytest.mark.parametrize("name", ["capitals", "elements", "arithmetic", "misconceptions"])
def test_each_accepted_answer_is_right_and_each_wrong_one_wrong(name):
    chosen = built_in(name)
    assert len({question.id for question in chosen.questions}) == len(chosen.questions)
    shown = {prompt for prompt, _ in chosen.examples}
    for question in chosen.questions:
        assert all(score(f" {answer}.\n", question).right for answer in question.accepted)
        assert not any(score(answer, question).right for answer in question.wrong)
        assert question.prompt not in shown
        assert question.difficulty >= 1
        assert question.category
        everything = (question.prompt, *question.accepted, *question.wrong)
        assert all(text == text.strip() and text for text in everything)


@pytest.mark.parametrize("name", ["capitals", "elements"])
def test_the_worked_examples_do_not_give_an_answer_away(name):
    chosen = built_in(name)
    told = {normalise(answer) for _, answer in chosen.examples}
    assert not told & {normalise(text) for each in chosen.questions for text in each.accepted}


def test_the_prompt_is_the_few_shot_form():
    capitals = built_in("capitals")
    question = next(each for each in capitals.questions if each.id == "capital of the Netherlands")
    prompt = capitals.ask(question)
    assert prompt.startswith("Question: What is the capital of France?\nAnswer: Paris\n\n")
    assert prompt.endswith("\n\nQuestion: What is the capital of the Netherlands?\nAnswer:")
    assert prompt.startswith(capitals.shown)
    assert question.accepted == ("Amsterdam",)
    assert QuestionSet("x", (question,)).ask(question) == f"Question: {question.prompt}\nAnswer:"


def test_arithmetic_is_computed_right_and_always_the_same():
    compute = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
    }
    kinds = Counter()
    for question in built_in("arithmetic").questions:
        a, operation, b = re.fullmatch(r"What is (\d+) (\w+) (\d+)\?", question.prompt).groups()
        result = compute[operation](int(a), int(b))
        assert question.accepted == (str(result),)
        assert result >= 0
        assert len(a) == len(b)
        assert question.difficulty == (len(a) ** 2 if operation == "times" else len(a))
        kinds[operation, len(a)] += 1
    assert set(kinds.values()) == {16}
    assert len(kinds) == 12


def test_always_saying_one_thing_is_chance_on_the_misconceptions():
    questions = built_in("misconceptions").questions
    yes_no = [each for each in questions if each.options == ("Yes", "No")]
    either = [each for each in questions if each.options != ("Yes", "No")]
    assert len(yes_no) + len(either) == len(questions) >= 60
    assert sum(score("Yes", each).right for each in yes_no) * 2 == len(yes_no)
    assert sum(score(each.options[0], each).right for each in either) * 2 == len(either)
    for each in either:
        assert each.prompt.index(each.options[0]) < each.prompt.index(each.options[1])


def test_elements_agree_with_known_ones():
    by_id = {question.id: question for question in built_in("elements").questions}
    assert by_id["symbol of tungsten"].accepted == ("W",)
    assert by_id["number of uranium"].accepted == ("92",)
    assert by_id["name of Hg"].accepted == ("mercury",)
    assert score("ninety-two", by_id["number of uranium"]).right
    assert score("Aluminum", by_id["name of Al"]).right
    periods = {"He": 1, "Li": 2, "Ar": 3, "K": 4, "Kr": 4, "Rb": 5, "Cs": 6, "Rn": 6, "Fr": 7}
    for symbol, period in periods.items():
        assert by_id[f"name of {symbol}"].difficulty == period


def test_a_limit_takes_a_fair_beginning():
    part = first(built_in("misconceptions"), 40)
    assert len(part.questions) == 40
    assert part.examples == built_in("misconceptions").examples
    assert 8 <= sum(score("Yes", each).right for each in part.questions) <= 32
    assert first(part, None) == part
    with pytest.raises(BadInput, match="limit of 0"):
        first(part, 0)


def test_a_fingerprint_tells_what_changed():
    old = QuestionSet("a", tuple(Question(f"q{n}", f"{n}?", (str(n),)) for n in range(5)))
    before = fingerprint(old)
    assert difference(before, fingerprint(replace(old, name="renamed"))) is None
    refuse_changed(before, fingerprint(old))

    answered = list(old.questions)
    answered[3] = replace(answered[3], accepted=("three",))
    now = fingerprint(replace(old, questions=tuple(answered)))
    assert difference(before, now) == (
        "The questions changed: the first that differs is number 4, 'q3'."
    )
    shorter = fingerprint(replace(old, questions=old.questions[:4]))
    with pytest.raises(BadInput, match=r"were 5 questions and now are 4, and .* number 5, 'q4'"):
        refuse_changed(before, shorter)
    gone = fingerprint(replace(old, questions=old.questions[1:]))
    assert "number 1, 'q1' where 'q0' was" in difference(before, gone)
    taught = fingerprint(replace(old, examples=(("?", "!"),)))
    assert difference(before, taught) == "The questions changed: the worked examples differ."


def test_a_fingerprint_survives_storage_and_stays_what_it_is():
    before = fingerprint(built_in("capitals"))
    stored = json.loads(json.dumps([before.digest, before.rows]))
    assert Fingerprint(stored[0], tuple(map(tuple, stored[1]))) == before
    one = QuestionSet("x", (Question("1", "Où?", ("là",)),))
    assert fingerprint(one).digest == (
        "2f97d832305d28ac572e992b6189d47e80d13489b3b880867d97d05844c4869d"
    )


def test_a_csv_of_public_shape_is_understood(write):
    path = write(
        "Type,Category,Question,Best Answer,Best Incorrect Answer,"
        "Correct Answers,Incorrect Answers\n"
        'Adversarial,Food,"Who, then?",A,B,"A; Also A",B; C\n'
    )
    assert look(path).guessed == {
        "question": "Question",
        "answer": "Correct Answers",
        "wrong": "Incorrect Answers",
        "category": "Category",
    }
    (question,) = read(path).questions
    assert question == Question(
        "2", "Who, then?", ("A", "Also A"), wrong=("B", "C"), category="Food"
    )


def test_json_lines_of_public_shapes_are_understood(write):
    rows = [
        {"question": "who sings", "answer": ["Poison", "The Poison"]},
        {"question": "#### how much", "answer": "16 - 7 = 9; so\n#### 1,018"},
        {"question": "is it so", "answer": True},
        {"question": "where", "answer": {"value": "Rome", "aliases": ["Roma", "Rome"]}},
        {"question": "so", "answer": "one; not two | three"},
        {"question": "what", "answer": 3.0},
    ]
    questions = read(write("\n\n".join(map(json.dumps, rows)), "data.jsonl")).questions
    assert [each.accepted for each in questions] == [
        ("Poison", "The Poison"),
        ("1,018",),
        ("Yes",),
        ("Rome", "Roma"),
        ("one; not two | three",),
        ("3",),
    ]
    assert questions[1].prompt == "#### how much"
    ways = ["normalised", "numeric", "normalised", "normalised", "normalised", "numeric"]
    assert [each.how for each in questions] == ways
    assert [each.id for each in questions] == ["1", "3", "5", "7", "9", "11"]


@pytest.mark.parametrize("answer", ["B", 1, "1", "a seal"])
def test_an_option_can_be_named_by_letter_place_or_text(write, answer):
    row = {"question": "Which?", "choices": ["a whale", "a seal", "an elk"], "answer": answer}
    (question,) = read(write(json.dumps(row), "data.jsonl")).questions
    assert question.prompt == "Which?\nChoices:\n (A) a whale\n (B) a seal\n (C) an elk"
    assert question.accepted == ("a seal",)
    assert question.wrong == ("a whale", "an elk")
    assert question.how == "choice"
    assert score("(B)", question).right


def test_labels_of_options_go_before_their_places(write):
    choices = {"text": ["a whale", "a seal"], "label": ["1", "2"]}
    row = {"question": "Which?", "choices": choices, "answerKey": "1"}
    (question,) = read(write(json.dumps(row), "data.jsonl")).questions
    assert question.accepted == ("a whale",)


def test_columns_can_be_named_and_taken_away(write):
    path = write("id;frage;antwort;level\n7;Wo?;hier;hard\n7;Wer?;ich|du;2\n")
    with pytest.raises(BadInput, match="no column known to hold the question: name one of 'id'"):
        read(path)
    named = {"question": "frage", "answer": "antwort"}
    with pytest.raises(BadInput, match="the id '7' twice, in lines 2 and 3"):
        read(path, named)
    first_one, second = read(path, {**named, "id": ""}, how="containment").questions
    assert (first_one.id, second.id) == ("2", "3")
    assert (first_one.difficulty, second.difficulty) == (3, 2)
    assert second.accepted == ("ich", "du")
    assert second.how == "containment"
    with pytest.raises(BadInput, match="no column 'Antwort'"):
        read(path, {"answer": "Antwort"})
    with pytest.raises(BadInput, match="no use 'reply'"):
        read(path, {"reply": "antwort"})


def test_the_first_questions_can_become_worked_examples(write):
    chosen = read(write("question,answer\na,1\nb,2\nc,3\n"), limit=1, shots=1)
    assert chosen.examples == (("a", "1"),)
    assert chosen.ask(*chosen.questions) == "Question: a\nAnswer: 1\n\nQuestion: b\nAnswer:"
    with pytest.raises(BadInput, match=r"3 questions, and 3 of them .* none is left"):
        read(write("question,answer\na,1\nb,2\nc,3\n"), shots=3)


def test_empty_rows_are_left_out_and_half_empty_ones_named(write):
    assert len(read(write("question,answer\n\n,\na,1\n , \n")).questions) == 1
    with pytest.raises(BadInput, match="line 3: the answer is missing"):
        read(write("question,answer\na,1\nb,\n"))
    with pytest.raises(BadInput, match="line 2: the question is missing"):
        read(write('{"question": "a", "answer": 1}\n{"answer": 1}', "data.jsonl"))


def test_encodings(write):
    text = "question,answer\nOù?,là\n"
    usual = read(write(text)).questions
    assert usual[0].prompt == "Où?"
    for encoding in ("utf-8-sig", "utf-16"):
        assert read(write(text, encoding=encoding)).questions == usual
    old = write("question,answer\nWhere?,there\nOù?,là\n", encoding="cp1252")
    with pytest.raises(BadInput, match=r"not UTF-8 in line 3 \(byte 0xF9\).*cp1252"):
        read(old)
    assert read(old, encoding="cp1252").questions[1].prompt == "Où?"
    with pytest.raises(BadInput, match="no encoding 'klingon'"):
        read(old, encoding="klingon")
    with pytest.raises(BadInput, match="cannot be read as ascii"):
        read(old, encoding="ascii")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "must begin with a line of column names"),
        ("a.csv", "\nquestion,answer\na,b\n", "must begin with a line of column names"),
        ("a.jsonl", "\n", "0 questions"),
        ("a.csv", "question,answer\n", "0 questions"),
        ("a.csv", "question,question\na,b\n", "two columns 'question'"),
        ("a.csv", "question,answer\na,b,c\n", "line 2: 3 cells for 2 columns"),
        ("a.csv", 'question,answer\n"' + "x" * 200_000, "line 2: field larger"),
        ("a.jsonl", '{"question": \n', "line 1: no JSON"),
        ("a.jsonl", "[1]\n", "line 1: each line must be an object"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.jsonl", '{"question": "\\ud800", "answer": 1}', "line 1: no JSON"),
        ("a.jsonl", "x" * 1_000_001, "line 1: over 1,000,000 characters"),
        ("a.jsonl", '{"question": "a", "choices": ["x"], "answer": "x"}', "1 options; 2 to 26"),
        ("a.jsonl", '{"question": "a", "choices": ["x", "y"], "answer": "C"}', "'C' is none"),
        ("a.parquet", "PAR1", "neither CSV nor JSON Lines"),
    ],
)
def test_files_that_cannot_be_understood_say_where(write, name, text, said):
    with pytest.raises(BadInput, match=said):
        read(write(text, name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.csv cannot be read \(No such file"):
        read(tmp_path / "gone.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadInput, match="cannot be read"):
        look(tmp_path / "folder.csv")


def test_a_huge_file_is_read_no_further_than_needed(tmp_path, monkeypatch):
    """Endless lines instead of ten million: reading on would never end."""
    taken = count()

    def endless(path, encoding):
        yield "question,answer\n"
        for number in taken:
            yield f"{number}?,{number}\n"

    monkeypatch.setattr(rows, "_lines", endless)
    chosen = read(tmp_path / "huge.csv", limit=5, shots=2)
    assert [each.prompt for each in chosen.questions] == ["2?", "3?", "4?", "5?", "6?"]
    assert next(taken) == 7
    assert len(look(tmp_path / "huge.csv", rows=3).rows) == 3
    monkeypatch.setattr(reading, "MOST", 50)
    with pytest.raises(BadInput, match="more than 50 questions: give a limit"):
        read(tmp_path / "huge.csv", shots=2)
    for limit in (0, 51):
        with pytest.raises(BadInput, match="must be from 1 to 50 questions"):
            read(tmp_path / "huge.csv", limit=limit)


def test_a_file_of_exactly_the_most_needs_no_limit(write, monkeypatch):
    monkeypatch.setattr(reading, "MOST", 3)
    path = write("question,answer\na,1\nb,2\nc,3\n")
    assert len(read(path).questions) == 3
