"""What the tokens say: how likely, how open and how close each choice was, summed up.

Source: likelihoods and entropies of the answer as baselines of Kadavath et al. 2022
        (arXiv:2207.05221) and of LM-Polygraph (Fadeeva et al. 2023, arXiv:2311.07383).
Idea:   write the plain answer; every number comes from the distributions that wrote it, so it costs
        no further pass. Sums fall with the length, means hide one bad token: both are shown, with
        the worst token, for the answer and for each of its sentences.
Differs from the source: the token that ends the answer counts as one of its tokens, since an answer
        that goes on is not the same answer; one that was cut off says so.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common.answering import (
    LESS_SURE,
    SURER,
    Answered,
    Assessments,
    Signals,
    spoken,
    trust_of,
    trusted,
)
from analyzers.common.judges import Verdict
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Judgement, Note, Token

CARD = Card(
    "Token signals",
    family="judging",
    source="Kadavath et al. 2022, arXiv:2207.05221; Fadeeva et al. 2023, arXiv:2311.07383",
    emits=(Token, Judgement, Note),
    example="What is the capital of Australia, and what is it known for?",
)
_LOW, _HIGH = -1e4, 1e4
SIGNALS: Signals = {
    "sequence_logprob": (_LOW, 0.0, SURER, False),
    "mean_logprob": (_LOW, 0.0, SURER, False),
    "min_logprob": (_LOW, 0.0, SURER, False),
    "perplexity": (1.0, _HIGH, LESS_SURE, False),
    "mean_entropy": (0.0, 20.0, LESS_SURE, False),
    "max_entropy": (0.0, 20.0, LESS_SURE, False),
    "mean_margin": (0.0, 1.0, SURER, False),
}
UNITS = {"perplexity": "", "mean_margin": "probability"}
"""Of the others: nats."""
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\S(?=\s*\n)")


@dataclass(frozen=True)
class Params:
    max_new: int = knob(48, "When to stop writing", lo=1, hi=4096, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer, then a Judgement for each signal of it (target "answer") and of each
    of its sentences (target "sentence 1" and so on; `detail` has their positions, from "first" to
    "last"). Raises: OutOfContext where the prompt fills the window."""
    cursor = ctx.begin(engine, engine.encode(task))
    yield from task.written
    tokens, why = yield from spoken(engine, cursor, params.max_new)
    if why != "end of text":
        yield Note("info", "The answer was cut off: its sums are those of a beginning.")
    known = trusted(ctx)
    parts = {"answer": tokens} | {
        f"sentence {number}": its for number, its in enumerate(sentences(tokens), start=1)
    }
    for target, its in parts.items():
        if not its:
            continue
        for name, score in measured(its).items():
            yield Judgement(
                f"{name} of {target}",
                target,
                name,
                score,
                SIGNALS[name],
                detail={
                    "first": its[0].pos,
                    "last": its[-1].pos,
                    "unit": UNITS.get(name, "nats"),
                    **(trust_of(name, known) if target == "answer" else {}),
                },
            )
    return why


def assess(
    engine: Engine, answered: Sequence[Answered], params: Params, ctx: Context
) -> Assessments:
    """What each signal says of each answer; no further pass."""
    for each in answered:
        values = measured(each.written.tokens)
        yield {
            name: Verdict(values.get(name), detail={"unit": UNITS.get(name, "nats")})
            for name in SIGNALS
        }


def measured(tokens: Sequence[Token]) -> Mapping[str, float]:
    """Every signal of these tokens; nothing for none."""
    if not tokens:
        return {}
    logprobs = [each.logprob or 0.0 for each in tokens]
    entropies = [each.entropy or 0.0 for each in tokens]
    mean = math.fsum(logprobs) / len(tokens)
    values = {
        "sequence_logprob": math.fsum(logprobs),
        "mean_logprob": mean,
        "min_logprob": min(logprobs),
        "perplexity": min(math.exp(-mean), _HIGH),
        "mean_entropy": math.fsum(entropies) / len(tokens),
        "max_entropy": max(entropies),
        "mean_margin": math.fsum(each.margin or 0.0 for each in tokens) / len(tokens),
    }
    return {name: round(value, DIGITS) for name, value in values.items()}


def sentences(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens of each sentence; one that holds the end of a sentence belongs to it. Space behind
    the last belongs to that."""
    text = "".join(each.text for each in tokens)
    ends = [found.end() for found in _SENTENCE_END.finditer(text) if text[found.end() :].strip()]
    parts: list[list[Token]] = [[] for _ in range(len(ends) + 1)]
    start = 0
    for each in tokens:
        parts[bisect_right(ends, start)].append(each)
        start += len(each.text)
    return [its for its in parts if its]
