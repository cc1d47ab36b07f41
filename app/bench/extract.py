"""What exact extraction finds in short passages, against the greedy answer to the same prompt.

50 passages with a question each, written for this folder, so no model has read them before. Right
means what it means for SQuAD: exact match and F1 over words, without case, punctuation and
articles. Intervals hold 95 of 100 times: Wilson's for shares, for F1 that of 1,000 resamples. How
often greedy is a span, and the best one, says what its being greedy costs; what both get right says
what the model can do.
"""

import json
import random
import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, median

from analyzers.context import Context
from analyzers.decoding import exact_extract
from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.errors import BadInput
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Metric
from app.bench import Progress, Row, median_row, row

ABOUT = "exact extraction against greedy answers on 50 short passages"
PASSAGES = Path(__file__).with_suffix(".jsonl")
Z = 1.96
RESAMPLES = 1000
EXACT, GREEDY = "exact", "greedy"


def measure(progress: Progress, *, model: str = DEFAULT, count: int = 50) -> list[Row]:
    """Of the first `count` passages, with the method's own settings and automatic quantization.

    Raises: BadInput for another number of passages than there are."""
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        raise BadInput(f"There are {len(lines)} passages: ask for 1 to {len(lines)}.")
    progress("Loading the model")
    engine = load(model)
    found = []
    for i, line in enumerate(lines[:count]):
        progress(f"Passage {i + 1} of {count}")
        found.append(_one(engine, **json.loads(line)))
    rows = []
    for name in ("right", "f1"):
        values = {who: [each[f"{who} {name}"] for each in found] for who in (EXACT, GREEDY)}
        title = "exact match" if name == "right" else "F1"
        rows += _shares(f"greedy: {title}", values[GREEDY])
        rows += _shares(f"exact: {title}", values[EXACT], 100 * mean(values[GREEDY]) or None)
    rows += _shares("greedy is a span of the passage", [each["extractive"] for each in found])
    rows += _shares("greedy is the best span", [each["optimal"] for each in found])
    rows.append(
        row(
            "tokens read of each passage",
            median(each["read"] for each in found),
            "tokens",
            baseline=median(each["tokens"] for each in found),
            n=count,
        )
    )
    return [*rows, median_row("time of a passage", [each["seconds"] for each in found], "s")]


def _one(engine: Engine, passage: str, question: str, answer: str) -> dict[str, float]:
    began = time.perf_counter()
    task = Task(chat(question), inputs={"passage": passage})
    events = list(exact_extract.run(engine, task, exact_extract.Params(), Context(seed=1)))
    seconds = time.perf_counter() - began
    texts = {e.group: e.text for e in reversed(events) if isinstance(e, Candidate)}
    numbers = {e.name: e.value for e in events if isinstance(e, Metric)}
    exact, greedy = texts["spans"], texts["greedy"]
    return {
        "exact right": float(words(exact) == words(answer)),
        "greedy right": float(words(greedy) == words(answer)),
        "exact f1": f1(exact, answer),
        "greedy f1": f1(greedy, answer),
        "extractive": numbers["extractive"],
        "optimal": numbers["optimal"],
        "tokens": numbers["tokens"],
        "read": numbers["tokens read"],
        "seconds": seconds,
    }


def words(text: str) -> list[str]:
    """As SQuAD compares them: lower case, without punctuation and articles."""
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(given: str, expected: str) -> float:
    """Of the words of an answer, from 0 to 1."""
    said, wanted = words(given), words(expected)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Where the true share lies, 95 of 100 times, after `hits` of `n`."""
    p = hits / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """Where the mean of `values` lies in 95 of 100 resamples."""
    rng = random.Random(seed)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    edge = round(0.025 * RESAMPLES)
    return means[edge], means[-edge - 1]


def _shares(name: str, values: Sequence[float], baseline: float | None = None) -> list[Row]:
    """The mean in percent, and the ends of its interval."""
    whole = all(value in (0.0, 1.0) for value in values)
    low, high = wilson(sum(values), len(values)) if whole else bootstrap(values)
    n = len(values)
    return [
        row(name, 100 * mean(values), "%", n=n, better="more", baseline=baseline),
        row(f"{name}, from", 100 * low, "%", n=n, better="more"),
        row(f"{name}, to", 100 * high, "%", n=n, better="more"),
    ]
