"""TruthfulQA multiple choice: whether a contrast makes the true answers likelier.

100 questions (the first after a shuffle with seed 0), each with all its answers. An answer is
scored behind six examples and the question, by the sum of the method's scores over its tokens,
without plausibility and repetition penalty, as the scripts of DoLa do it. Baseline: the model's own
log-probabilities. For lqcd the neutral form is the question as it stands, and the leading one has
the method's usual hint behind it; so its neutral branch alone is the baseline.

At 135M parameters no difference is expected. The 95 % interval stands behind the name of each
number: of a proportion for MC1, from a bootstrap over questions for the others, and of differences
over the same questions. Reads truthfulqa.csv (TruthfulQA.csv of the original repository) in the
folder that --data or CANDOR_DATA names. Computes in bfloat16, which reads prompts and answers
several times faster on CPUs that have products for it.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from analyzers.common import contrast
from analyzers.context import Context
from analyzers.contrast import dola, lol, lqcd
from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.evaluation.intervals import Interval, bootstrap, paired, wilson
from analyzers.evaluation.multiple_choice import (
    Question,
    continuation,
    mc,
    prompt,
    read_truthfulqa,
)
from analyzers.task import Task
from app.bench import Progress, Row, data_file, row

ABOUT = "TruthfulQA multiple choice by likelihood: the model alone, DoLa, LOL and LQCD"
FILE = "truthfulqa.csv"
SEED = 0
"""Of the shuffle and of the intervals."""
BASE = "model alone"
EVERYTHING = {"alpha": 0.0}  # every token is plausible
MEASURES = ("MC1", "MC2", "MC3")
Scorer = Callable[[Engine, Task, Sequence[Sequence[int]]], list[float]]


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    data: str = "",
    limit: int = 100,
    dtype: str = "bfloat16",
) -> list[Row]:
    """Three measures a method, in percent, and how far each is from the model alone.

    Raises: BadInput where the folder has no TruthfulQA table."""
    questions = chosen(limit, data)
    engine = load(model, quantization="none", dtype=dtype)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    with torch.inference_mode():
        for number, question in enumerate(questions, 1):
            progress(f"Question {number} of {len(questions)}")
            for name, scorer in WAYS.items():
                began = time.perf_counter()
                found[name].append(judged(engine, question, scorer))
                seconds[name] += time.perf_counter() - began
    rows = []
    for name, scores in found.items():
        rows += _rows(name, scores, found[BASE])
        rows.append(
            row(f"{name}: time of a question", seconds[name] / len(scores), "s", n=len(scores))
        )
    return rows


def chosen(count: int, folder: str) -> list[Question]:
    """The first `count` questions after the shuffle."""
    questions = read_truthfulqa(data_file(FILE, folder))
    random.Random(SEED).shuffle(questions)
    return questions[:count]


def judged(engine: Engine, question: Question, scorer: Scorer) -> tuple[float, float, float]:
    """(MC1, MC2, MC3) of one question."""
    text = prompt(question.question)
    answers = [
        engine.tokens(continuation(answer), after=text)
        for answer in (*question.true, *question.false)
    ]
    scores = scorer(engine, Task(text), answers)
    true = len(question.true)
    return mc(scores[:true], scores[true:], question.best)


def _alone(engine: Engine, task: Task, answers: Sequence[Sequence[int]]) -> list[float]:
    return [scored.total for scored in engine.score(engine.encode(task), answers)]


def contrasting(method: ModuleType, knobs: Mapping[str, Any]) -> Scorer:
    """Scores by the rule of a contrast method with these knobs."""

    def scorer(engine: Engine, task: Task, answers: Sequence[Sequence[int]]) -> list[float]:
        params = method.Params(**knobs)
        branches, rule = method.contrasted(engine, task, params, Context(SEED))
        return contrast.score(branches, answers, rule)

    return scorer


WAYS: dict[str, Scorer] = {
    BASE: _alone,
    "dola": contrasting(dola, EVERYTHING),
    "lol": contrasting(lol, EVERYTHING),
    "lqcd": contrasting(lqcd, EVERYTHING),
}


def _rows(
    name: str, scores: list[tuple[float, float, float]], base: list[tuple[float, float, float]]
) -> list[Row]:
    """A row for each measure and its difference from the baseline; the intervals stand beside."""
    rows = []
    for measure, values, others in zip(
        MEASURES, zip(*scores, strict=True), zip(*base, strict=True), strict=True
    ):
        # Of MC1, which is right or wrong, the interval of a proportion.
        interval = (
            wilson(int(sum(values)), len(values)) if measure == "MC1" else bootstrap(values, SEED)
        )
        rows.append(_row(f"{name}: {measure}", interval, len(values)))
        if name != BASE:
            further = paired(others, values, SEED)
            rows.append(_row(f"{name}: {measure}, more than alone", further, len(values)))
    return rows


def _row(name: str, interval: Interval, n: int) -> Row:
    value, lo, hi = (100 * each for each in (interval.value, interval.lo, interval.hi))
    return row(f"{name} [{lo:.1f}, {hi:.1f}]", value, "%", n=n, better="more")
