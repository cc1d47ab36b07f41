"""Sampling: the model writes token by token, and every token says how sure it was.

Source: transformers' sampling and its logits processors; Holtzman et al. 2020 (top-p).
Idea:   the next token is drawn from the model's distribution after the filters, or is its most
        likely one at temperature 0. Confidence is always read from the unfiltered distribution.
Differs from the source: the draw inverts the cumulative distribution with a seeded generator, so
        that a seed means the same on every device.
"""

from collections.abc import Generator
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common.stops import HELP, over, stop_texts
from analyzers.context import Context
from analyzers.engine import Engine, Filters, chosen
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Token

CARD = Card(
    "Sampling",
    family="decoding",
    source="transformers generation; Holtzman et al. 2020, arXiv:1904.09751",
    emits=(Token,),
    needs=("logits",),
)


@dataclass(frozen=True)
class Params:
    """Defaults are ours: a little sharper than the model, without its least likely twentieth."""

    temperature: float = knob(0.7, "0 = greedy, above 1 flattens", lo=0, hi=2)
    top_p: float = knob(0.95, "Mass of likely tokens to keep; 1 = all", lo=0.01, hi=1)
    max_new: int = knob(128, "When to stop writing", lo=1, hi=8192, unit="tokens")
    top_k: int = knob(0, "Keep this many of the likeliest tokens; 0 = all", lo=0, hi=1000)
    min_p: float = knob(0.0, "Drop tokens less likely than this times the best", lo=0, hi=1)
    typical_p: float = knob(1.0, "Locally typical sampling: mass to keep; 1 = off", lo=0.01, hi=1)
    repetition_penalty: float = knob(1.0, "Above 1: avoid tokens already there", lo=0.5, hi=2)
    stop: str = knob("", HELP, lines=2)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token per step; return why the text ended.

    A text that goes on from an earlier run starts with that run's tokens, as they were. A stop
    string stays in the text, as in transformers. Ends early when the context is full.
    """
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    rng = ctx.rng("sampling")
    filters = Filters(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
    )
    stops = stop_texts(params.stop)
    answer: list[Token] = [*task.written]
    if why := over(engine, stops, answer):
        return why
    for _ in range(params.max_new):
        if cursor.pos == engine.context:
            return "context full"
        step = engine.step(cursor, filters=filters)
        written = chosen(engine, step, rng, params.temperature)
        engine.push(cursor, written.id)
        answer.append(written)
        yield written
        if why := over(engine, stops, answer):
            return why
    return "max_new reached"
