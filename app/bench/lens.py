"""What it costs to read every layer at every token, against a plain step in bfloat16.

The model writes greedily; each way has a cursor of its own, all of the same length. The plain way
only steps. The others tap layers and keep the states of a few tokens; then one call reads the five
likeliest tokens, with exact probabilities, out of all of them. A turn is as many tokens as the
largest group, so every turn holds whole readouts, and its time is divided by its tokens. Quantized
weights ("auto") are compared with the plain step in bfloat16 as well: the promise is about that
one, whatever the weights.
"""

import time
from collections.abc import Callable, Collection
from statistics import median

import torch

from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.task import Task
from app.bench import Progress, Row, alternate, median_row
from app.bench.decode import PROMPT

ABOUT = "time a token with every layer read out, against a plain step in bfloat16"
TOP = 5
CHOSEN = 8
"""Layers that are read, evenly spread, where not all are."""
GROUP = 8
"""Tokens that are read out together. The head's weights are read from memory once a group, so
groups of 4 pay twice for them; groups of 16 save little more, and are seen later."""
GROUPS = (4, GROUP, 16)
TURN = max(GROUPS)
ALL_TARGET, CHOSEN_TARGET = 1.25, 1.15
PLAIN = "plain step"


def measure(progress: Progress, *, model: str = DEFAULT, rounds: int = 24) -> list[Row]:
    """Each way writes a turn of 16 tokens in each of `rounds`, and one before them."""
    engines = {
        "bfloat16": load(model, quantization="none", dtype="bfloat16"),
        "auto": load(model),
    }
    ways: dict[str, Callable[[], float]] = {}
    targets: dict[str, float] = {}
    for name, engine in engines.items():
        every = tuple(range(1, engine.layers + 1))
        ways[f"{name}: {PLAIN}"] = _way(engine, (), GROUP)
        for group in GROUPS:
            ways[_name(name, "all", group)] = _way(engine, every, group)
        ways[_name(name, CHOSEN, GROUP)] = _way(engine, chosen(engine.layers), GROUP)
        targets[_name(name, "all", GROUP)] = ALL_TARGET
        targets[_name(name, CHOSEN, GROUP)] = CHOSEN_TARGET
    with torch.inference_mode():
        taken = alternate(ways, rounds, progress)
    base = f"bfloat16: {PLAIN}"
    rows = []
    for name, times in taken.items():
        more = {} if name == base else {"baseline": median(taken[base])}
        rows.append(median_row(name, times, "ms/token", target=targets.get(name), **more))
    return rows


def chosen(layers: int) -> tuple[int, ...]:
    """Eight of the layers 1 to `layers`, or all where there are fewer; the last is among them."""
    most = min(CHOSEN, layers)
    return tuple(round(layers * (place + 1) / most) for place in range(most))


def _name(engine: str, layers: int | str, group: int) -> str:
    return f"{engine}: {layers} layers, {group} tokens together"


def _way(engine: Engine, taps: Collection[int], group: int) -> Callable[[], float]:
    """Milliseconds a token of one turn; each call goes on where the last one ended."""
    with torch.inference_mode():
        cursor = engine.prefill(engine.encode(Task(PROMPT)))

    def turn() -> float:
        kept: list[torch.Tensor] = []
        began = time.perf_counter()
        for written in range(1, TURN + 1):
            step = engine.step(cursor, taps=taps)
            kept.extend(step.hidden.values())
            engine.push(cursor, int(step.logits.argmax()))
            if taps and written % group == 0:
                ids, logprobs = engine.top_tokens(torch.stack(kept), TOP)
                ids.tolist(), logprobs.exp().tolist()  # as a method would have them
                kept.clear()
        return 1e3 * (time.perf_counter() - began) / TURN

    return turn
