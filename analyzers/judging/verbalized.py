"""Verbalized confidence: the model is asked how sure it is, in words or in percent.

Source: Lin, Hilton and Evans 2022 (arXiv:2205.14334), Tian et al. 2023 (arXiv:2305.14975); the
        prompts are our own words in their form.
Idea:   behind the question and the answer the model writes its confidence, greedily, as a number
        from 0 to 100 or as a word of a scale. What it writes is read as it stands; where there is
        nothing to read the signal has no value, and is never taken for low confidence.
Differs from the source: three worked examples show the form, since a model of this size goes on
        with prose otherwise; they can be left out.
"""

import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyzers.card import Card
from analyzers.common.answering import (
    SURER,
    Answered,
    Asked,
    Assessments,
    Signals,
    answered,
    answers,
    judgement,
)
from analyzers.common.judges import Verdict
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Judgement, Note, Token

CARD = Card(
    "Verbalized confidence",
    family="judging",
    source="Lin et al. 2022, arXiv:2205.14334; Tian et al. 2023, arXiv:2305.14975",
    emits=(Token, Judgement, Note),
    example="What is the capital of Australia?",
)
SIGNALS: Signals = {"verbalized": (0.0, 1.0, SURER, True)}
WORDS = {
    "almost certain": 0.95,
    "highly likely": 0.9,
    "very likely": 0.9,
    "likely": 0.75,
    "even": 0.5,
    "unlikely": 0.25,
    "very unlikely": 0.1,
    "almost no chance": 0.05,
}
"""Word -> probability, after what people say they mean by them (Fagen-Ulmschneider 2019)."""
_ASKS = {
    "percent": "How likely is it that this answer is right, from 0 to 100 percent?",
    "words": f"How likely is it that this answer is right? One of: {', '.join(WORDS)}.",
}
_EXAMPLES = (
    ("Which planet is the largest?", "Jupiter", "97 percent", "almost certain"),
    ("How many people live in Lima?", "3 million", "30 percent", "unlikely"),
    ("Which instrument did Paul Klee play?", "the violin", "60 percent", "likely"),
)
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(%|percent|/\s*100|$|[.\s])", re.IGNORECASE)
_SHARE = re.compile(r"^\s*(0?\.\d+|1\.0+)\s*$")
_LONGEST = 8
"""Tokens of a confidence."""


@dataclass(frozen=True)
class Params:
    form: Literal["percent", "words"] = knob("percent", "What the model is asked for")
    examples: bool = knob(True, "Show three worked examples of the form")
    max_new: int = knob(48, "When to stop writing the answer", lo=1, hi=4096, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer and one Judgement of it (target "answer"; rationale = what the model
    wrote). Raises: OutOfContext; BadInput for an answer that was begun already."""
    item = yield from answered(engine, task, ctx, params.max_new)
    before, began = engine.forwards, time.perf_counter()
    (said,) = assess(engine, [item], params, ctx)
    verdict = said["verbalized"]
    yield judgement(
        "verbalized",
        verdict,
        SIGNALS["verbalized"],
        ctx,
        passes=engine.forwards - before,
        ms=1e3 * (time.perf_counter() - began),
    )
    if verdict.score is None:
        yield Note("warning", f"No confidence can be read in {verdict.rationale!r}.")
    return "asked"


def assess(engine: Engine, items: Sequence[Answered], params: Params, ctx: Context) -> Assessments:
    """What the model writes of each answer, side by side."""
    asked = [
        Asked(item.asked.id, item.asked.question, "", tuple(_prompt(engine, item, params)))
        for item in items
    ]
    for its in answers(engine, asked, _LONGEST, [None] * len(asked)):
        score = read(its.text)
        yield {"verbalized": Verdict(score, rationale=its.text, passes=len(its.tokens))}


def read(text: str) -> float | None:
    """The probability that a text says: "90 %", "90 percent", "90/100", "0.9", "very likely"; None
    where it says none, or one above 100 percent."""
    plain = " ".join(text.casefold().split())
    if share := _SHARE.match(plain):
        return float(share[1])
    if number := _PERCENT.search(plain):
        value = float(number[1])
        return value / 100 if value <= 100 else None
    known = [word for word in sorted(WORDS, key=len, reverse=True) if word in plain]
    return WORDS[known[0]] if known else None


def _prompt(engine: Engine, item: Answered, params: Params) -> list[int]:
    asks, place = _ASKS[params.form], 2 if params.form == "percent" else 3
    blocks = [
        f"Question: {each[0]}\nAnswer: {each[1]}\n{asks}\nConfidence: {each[place]}"
        for each in (_EXAMPLES if params.examples else ())
    ]
    last = f"Question: {item.asked.question}\nAnswer: {item.written.text}\n{asks}\nConfidence:"
    for shown in ([*blocks, last], [last]):
        ids: list[int] = engine.tokenizer("\n\n".join(shown))["input_ids"]
        if len(ids) <= engine.context // 2:
            break
    return ids
