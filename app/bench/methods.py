"""What the methods that look inside cost a token, against greedy writing of the same model.

Every way is the method itself, with all its events, writing the same prompt on; a turn is so many
tokens of it, and its time is divided by their number. Greedy writing is the method sampling at
temperature 0, with its signals. DoLa and the lens are compared on the default model, SCMoE on the
mixture carved from it, with both readings in one batch and one after the other.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch

from analyzers import registry
from analyzers.context import Context
from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Event, Token
from app.bench import Progress, Row, alternate, median_row
from app.bench.decode import PROMPT

ABOUT = "time a token of DoLa, the logit lens and SCMoE, against greedy writing"
MIXTURE = "smollm2-moe"
TURN = 16
"""Tokens of a turn: two groups of the lens."""
LONGEST = 1024
LONG = {"scmoe": {"rank_map": 0}}
"""Settings without which a text would be read once more at its end."""
TARGETS = {"dola": 1.25, "logit_lens": 1.25, "scmoe": 1.5, "scmoe, one by one": 2.2}
"""Of greedy writing, in bfloat16."""
GREEDY = "sampling", {"temperature": 0.0}
Way = Callable[[], float]


def measure(
    progress: Progress, *, model: str = DEFAULT, mixture: str = MIXTURE, rounds: int = 12
) -> list[Row]:
    """Each way writes a turn of 16 tokens in each of `rounds`, and one before them."""
    rows = []
    for ref, others in (
        (model, {"dola": {"repetition_penalty": 1.0}, "logit_lens": {}}),
        (mixture, {"scmoe": {}, "scmoe, one by one": {"together": False}}),
    ):
        for name, quantization, dtype in (
            ("bfloat16", "none", "bfloat16"),
            ("auto", "auto", "auto"),
        ):
            progress(f"Loading {ref}, {name}")
            engine = load(ref, quantization=quantization, dtype=dtype)
            rows += _compared(engine, f"{ref} {name}", others, rounds, progress)
    return rows


def _compared(
    engine: Engine,
    name: str,
    others: Mapping[str, Mapping[str, Any]],
    rounds: int,
    progress: Progress,
) -> list[Row]:
    ways: dict[str, Way] = {"greedy": _way(engine, *GREEDY)}
    for label, params in others.items():
        ways[label] = _way(engine, label.partition(",")[0], params)
    taken = alternate(ways, rounds, progress)
    base = median(taken["greedy"])
    plain = engine.identity["quantization"] == "none"
    return [
        median_row(
            f"{name}: {label}",
            times,
            "ms/token",
            **({} if label == "greedy" else {"baseline": base}),
            target=TARGETS.get(label) if plain else None,
        )
        for label, times in taken.items()
    ]


def _way(engine: Engine, method: str, params: Mapping[str, Any]) -> Way:
    """Milliseconds a token of one turn; each call goes on where the last one ended."""
    events: Iterator[Event] = iter(())

    def turn() -> float:
        nonlocal events
        began, written = time.perf_counter(), 0
        with torch.inference_mode():
            while written < TURN:
                event = next(events, None)
                if event is None:  # the text has ended: another one, its reading not counted
                    events = _begun(engine, method, params)
                    began, written = time.perf_counter(), 0
                written += isinstance(event, Token)
        return 1e3 * (time.perf_counter() - began) / TURN

    return turn


def _begun(engine: Engine, name: str, params: Mapping[str, Any]) -> Iterator[Event]:
    """The events of a method behind its first token."""
    method = registry.method(name)
    made: Any = build(method.params, {**LONG.get(name, {}), **params, "max_new": LONGEST})
    events = method.run(engine, Task(PROMPT), made, Context(seed=0))
    while not isinstance(next(events), Token):
        pass
    return events
