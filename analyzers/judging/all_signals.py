"""All signals: everything that the model's own signals say of one answer, on one card.

Source: the comparison of signals side by side follows LM-Polygraph (Fadeeva et al. 2023,
        arXiv:2311.07383); each signal names its own source.
Idea:   write the plain answer, then ask every method that has signals about it, cheapest first;
        what each cost stands beside it.
Differs from the source: nothing is combined into one number: which signal to trust is measured,
        in the workbench, and not decided here.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common.answering import answered, judgement
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.errors import BadInput, OutOfContext
from analyzers.params import build, knob
from analyzers.task import Task
from analyzers.trace import Event, Judgement, Note, Token

CARD = Card(
    "All signals",
    family="judging",
    source="Fadeeva et al. 2023, arXiv:2311.07383",
    emits=(Token, Judgement, Note),
    example="What is the capital of Australia?",
)
CHEAPEST_FIRST = ("token_signals", "p_true", "verbalized")
"""The others follow by name."""


@dataclass(frozen=True)
class Params:
    max_new: int = knob(48, "When to stop writing the answer", lo=1, hi=4096, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer, then a Judgement for each signal there is (target "answer"), each as
    soon as it is known; a method that does not fit the answer is told and left out.

    Raises: OutOfContext; BadInput for an answer that was begun already."""
    item = yield from answered(engine, task, ctx, params.max_new)
    methods = ctx.assessors()
    order = [name for name in CHEAPEST_FIRST if name in methods]
    for name in (*order, *sorted(set(methods) - set(order))):
        method = methods[name]
        assess, signals = method.assess, method.signals
        if assess is None or signals is None:
            continue
        before, began = engine.forwards, time.perf_counter()
        try:
            (said,) = assess(engine, [item], build(method.params, {}), ctx)
        except (BadInput, OutOfContext) as error:
            yield Note("warning", f"{method.card.title} is left out: {error}")
            continue
        passes, ms = engine.forwards - before, 1e3 * (time.perf_counter() - began)
        for place, (signal, verdict) in enumerate(said.items()):
            # Signals of one method share its passes, which are paid once.
            yield judgement(
                signal,
                verdict,
                signals[signal],
                ctx,
                passes=0 if place else passes,
                ms=0.0 if place or not passes else ms,
            )
    return "assessed"
