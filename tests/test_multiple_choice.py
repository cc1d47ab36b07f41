"""Multiple choice by likelihood, the intervals around its numbers, and the benchmark of both."""

import math
from pathlib import Path
from statistics import median

import pytest
import torch

from analyzers.common import contrast
from analyzers.context import Context
from analyzers.contrast import lqcd
from analyzers.errors import BadInput
from analyzers.evaluation.intervals import bootstrap, paired, percentile, wilson
from analyzers.evaluation.multiple_choice import (
    EXAMPLES,
    Question,
    continuation,
    mc,
    prompt,
    read_truthfulqa,
)
from analyzers.task import Task
from app import bench
from app.bench import truthful

TABLE = """Type,Question,Best Answer,Correct Answers,Incorrect Answers
a,What is 1+1?,Two,2; Two; 2;,"Three; Four,"
a,"Where, then?",Nowhere,Here,There
"""


def table(folder: Path, text: str = TABLE) -> Path:
    path = folder / "truthfulqa.csv"
    path.write_text(text, encoding="utf-8")
    return path


# The measures


def test_measures_of_the_hand_worked_example():
    assert mc((-3, -5), (-4, -6), 0) == pytest.approx((1, 0.7311, 0.5), abs=5e-5)


@pytest.mark.parametrize(
    ("true", "false", "best", "expected"),
    [
        ((-3, -5), (-4, -6), 1, (0, 0.7311, 0.5)),  # the other true answer is the best one
        ((-1,), (-1,), 0, (0, 0.5, 0)),  # equal is not better
        ((-1, -2), (-1000,), 0, (1, 1, 1)),
        ((-2000, -3000), (-2001,), 0, (1, 0.7311, 0.5)),  # far below what exp can hold
        ((5, 0), (3,), 0, (1, 0.8816, 0.5)),  # scores of a contrast may be positive
    ],
)
def test_measures(true, false, best, expected):
    assert mc(true, false, best) == pytest.approx(expected, abs=5e-4)


def test_measures_do_not_depend_on_a_constant_and_need_both_kinds():
    true, false = [-1.0, -7.5, -3.0], [-2.0, -4.0]
    moved = [score - 50 for score in true], [score - 50 for score in false]
    assert mc(true, false, 2) == pytest.approx(mc(*moved, 2))
    for empty in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="true and false"):
            mc(*empty, 0)


# The questions


def test_a_table_is_read_with_each_answer_once_and_the_best_among_the_true(tmp_path):
    first, second = read_truthfulqa(table(tmp_path))
    assert first == Question("What is 1+1?", ("2", "Two"), ("Three", "Four,"), 1)
    assert second == Question("Where, then?", ("Nowhere", "Here"), ("There",), 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Question,Answer\na,b\n", "no column 'Best Answer'"),
        ("", "no column 'Question'"),
        (TABLE + "a,Why?,,None,Some\n", "without its answers in line 4"),
        (TABLE + "a,Why?\n", "without its answers in line 4"),
        ("\ud800", "cannot be read"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, text, says):
    path = tmp_path / "questions.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInput, match=says) as refused:
        read_truthfulqa(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.csv cannot be read.*No such file"):
        read_truthfulqa(tmp_path / "none.csv")


def test_the_prompt_has_six_examples_and_ends_before_the_answer():
    text = prompt("Why?")
    assert text.count("Q: ") == text.count("A:") == 7 and len(EXAMPLES) == 6
    assert text.endswith("\n\nQ: Why?\nA:")
    assert continuation("Two") == continuation("Two.") == " Two."


# Intervals


def test_wilson_has_its_known_values():
    half = wilson(5, 10)
    assert (half.value, half.lo, half.hi) == pytest.approx((0.5, 0.2366, 0.7634), abs=5e-5)
    few = wilson(1, 20)
    assert (few.lo, few.hi) == pytest.approx((0.0089, 0.2361), abs=5e-5)
    none, all_ = wilson(0, 10), wilson(10, 10)
    assert (none.lo, none.hi) == pytest.approx((0, 0.2775), abs=5e-5)
    assert (all_.lo, all_.hi) == pytest.approx((0.7225, 1), abs=5e-5)
    assert (wilson(0, 0).lo, wilson(0, 0).hi) == (0, 1)
    assert wilson(5, 10, level=0.9).lo > half.lo


def test_the_bootstrap_is_seeded_and_about_as_wide_as_theory_says():
    uneven = [n**0.5 for n in range(20)]
    assert bootstrap(uneven, seed=1) == bootstrap(uneven, seed=1) != bootstrap(uneven, seed=2)
    found = bootstrap([float(n % 2) for n in range(100)], seed=1)
    assert found.value == 0.5
    for end, sign in ((found.lo, -1), (found.hi, 1)):  # 1.96 * sqrt(0.25 / 100)
        assert end == pytest.approx(0.5 + sign * 0.098, abs=0.015)
    assert bootstrap([3.0] * 5, seed=0).lo == bootstrap([3.0] * 5, seed=0).hi == 3
    assert bootstrap([1.0, 2.0, 9.0], seed=0, of=median).value == 2
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([], seed=0)


def test_a_paired_difference_takes_the_same_rows_of_both():
    first = [float(n) for n in range(50)]
    apart = paired(first, [value + 2 for value in first], seed=1)
    assert (apart.value, apart.lo, apart.hi) == pytest.approx((2, 2, 2))
    noisy = [value + (-1) ** n for n, value in enumerate(first)]
    differences = [after - before for before, after in zip(first, noisy, strict=True)]
    plain, same = paired(first, noisy, seed=4), bootstrap(differences, seed=4)
    assert (plain.value, plain.lo, plain.hi) == pytest.approx((same.value, same.lo, same.hi))
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0], seed=0)


def test_percentiles_lie_straight_between_the_nearest():
    values = [0.0, 1.0, 2.0, 10.0]
    assert [percentile(values, share) for share in (0, 0.5, 1)] == [0, 1.5, 10]
    assert percentile(values, 0.9) == pytest.approx(2 + 0.7 * 8)
    assert percentile([7.0], 0.975) == 7


# The benchmark


def test_answers_are_scored_as_reading_them_would(tiny_engine):
    """The slow way: each answer read anew behind the question."""
    question = Question("Why?", ("So", "Thus it is"), ("Not so", "No"), 1)
    text = prompt(question.question)
    scores = []
    for answer in (*question.true, *question.false):
        ids = tiny_engine.tokens(text + continuation(answer))
        start, total = len(tiny_engine.tokens(text)), 0.0
        for _, step in list(tiny_engine.read(tiny_engine.start(), ids))[start:]:
            total += float(step.raw.log_softmax(-1)[ids[step.pos]])
        scores.append(total)
    expected = mc(scores[:2], scores[2:], 1)
    same = truthful.contrasting(lqcd, {"alpha": 0.0, "strength": 0.0, "hint": "No."})
    for scorer in (truthful.WAYS["model alone"], same):
        assert truthful.judged(tiny_engine, question, scorer) == pytest.approx(expected, abs=1e-3)


def test_the_hint_stands_behind_the_last_question_only(tiny_engine):
    hint = lqcd.Params().hint
    both = lqcd.asked(Task(prompt("Why?")), hint)
    assert both.neutral.prompt == prompt("Why?") and both.leading.prompt == prompt(f"Why? {hint}")
    branches, rule = lqcd.contrasted(tiny_engine, Task("Why?"), lqcd.Params(), Context(0))
    assert len(contrast.score(branches, [[65, 66]], rule)) == 1


def test_the_benchmark_has_every_method_with_intervals(tiny_engine, tmp_path, monkeypatch):
    table(tmp_path)
    monkeypatch.setattr(truthful, "load", lambda *args, **options: tiny_engine)
    monkeypatch.setattr(truthful, "prompt", lambda question: f"Q: {question}\nA:")  # 512 tokens
    said: list[str] = []
    rows = truthful.measure(said.append, data=str(tmp_path), limit=2)
    assert said[-1] == "Question 2 of 2"
    for name in ("model alone", "dola", "lol", "lqcd"):
        for measure in ("MC1", "MC2", "MC3"):
            own = [row for row in rows if row["name"].startswith(f"{name}: {measure} [")]
            assert len(own) == 1 and 0 <= own[0]["value"] <= 100 and own[0]["unit"] == "%"
        against = [row for row in rows if row["name"].startswith(f"{name}: MC2, more than alone")]
        assert len(against) == (name != "model alone")
    assert all(math.isfinite(row["value"]) and row["n"] == 2 for row in rows)
    assert torch.is_inference_mode_enabled() is False


def test_the_benchmark_shuffles_with_its_seed_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv(bench.DATA, raising=False)
    with pytest.raises(BadInput, match="CANDOR_DATA must name a folder"):
        truthful.chosen(3, "")
    many = "".join(f"a,Q{n}?,Yes,Yes,No\n" for n in range(40))
    monkeypatch.setenv(bench.DATA, str(table(tmp_path, TABLE + many).parent))
    names = [question.question for question in truthful.chosen(100, "")]
    assert len(set(names)) == 42 and names != sorted(names)
    assert [question.question for question in truthful.chosen(5, "")] == names[:5]
