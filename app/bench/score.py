"""How likely many continuations of one text are: `Engine.score`, against one pass for each.

64 continuations of 8 tokens behind 512, all plain English from the same passages. The engine gets
them in one call, and its time includes the prefix. The other side reads prefix and continuation
anew for each, with the same weights in transformers, and takes the logits of the last 9 positions.
8 of the 64 are timed in each round, others in the next: the time of one hardly depends on which it
is. Continuations that begin alike share those tokens in the engine; here few do.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from transformers import PreTrainedModel

from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.errors import BadInput
from app.bench import Progress, Row, alternate, median_row, row
from app.bench.decode import bare
from app.bench.quality import PASSAGES

ABOUT = "continuations of one text scored a second, against one pass for each"
DTYPES = ("float32", "bfloat16")
SPEED_TARGET = 5.0
"""Times as many a second as with one pass for each."""
EQUAL_TARGET = 1e-4
"""Nats between the two in float32. In bfloat16 rounding depends on the shape of a pass."""
TIMED = 8
"""Continuations that are read one by one in each round."""
TOGETHER, ALONE = "in one call", "one pass for each"


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    prefix: int = 512,
    count: int = 64,
    length: int = 8,
    rounds: int = 9,
) -> list[Row]:
    """`count` continuations of `length` tokens behind a text of `prefix` tokens.

    Raises: BadInput where the passages are shorter than that."""
    rows = []
    for dtype in DTYPES:
        progress(f"Loading the model in {dtype}")
        engine = load(model, quantization="none", dtype=dtype)
        other = bare(model, getattr(torch, dtype))
        text, asked = _texts(engine, prefix, count, length)
        ways: dict[str, Callable[[], float]] = {
            TOGETHER: partial(_together, engine, text, asked),
            ALONE: _one_by_one(other, text, asked),
        }
        with torch.inference_mode():
            rates = alternate(ways, rounds, progress)
            found = [scored.logprobs for scored in engine.score(text, asked)]
            expected = torch.stack([read(other, text, ids) for ids in asked])
        rows += _rows(dtype, rates, (torch.tensor(found) - expected).abs())
    return rows


def read(model: PreTrainedModel, prefix: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """The slow and obvious way: log-probabilities (nats) of `ids` behind `prefix`, (tokens,)."""
    whole = torch.tensor([[*prefix, *ids]], device=model.device)
    # The last row says what would follow; float32: the tail of the softmax vanishes in bfloat16.
    logits = model(input_ids=whole, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    asked = whole[0, -len(ids) :, None]
    return logits.log_softmax(-1).gather(-1, asked)[:, 0].cpu()


def _texts(
    engine: Engine, prefix: int, count: int, length: int
) -> tuple[list[int], list[list[int]]]:
    """The beginning of the passages, and what stands behind it cut into continuations."""
    ids = engine.tokens(PASSAGES.read_text(encoding="utf-8"))
    if len(ids) < prefix + count * length:
        raise BadInput(f"The passages have {len(ids):,} tokens: ask for fewer or shorter texts.")
    starts = range(prefix, prefix + count * length, length)
    return ids[:prefix], [ids[start : start + length] for start in starts]


# Ways to score; each gives continuations a second


def _together(engine: Engine, text: list[int], asked: list[list[int]]) -> float:
    began = time.perf_counter()
    engine.score(text, asked)
    return len(asked) / (time.perf_counter() - began)


def _one_by_one(
    model: PreTrainedModel, text: list[int], asked: list[list[int]]
) -> Callable[[], float]:
    turn = 0

    def some() -> float:
        nonlocal turn
        chosen = [asked[(turn * TIMED + place) % len(asked)] for place in range(TIMED)]
        turn += 1
        began = time.perf_counter()
        for ids in chosen:
            read(model, text, ids)
        return TIMED / (time.perf_counter() - began)

    return some


def _rows(dtype: str, rates: dict[str, list[float]], off: torch.Tensor) -> list[Row]:
    """off: nats between the two ways, (continuations, tokens)."""
    alone = median_row(f"{dtype}: {ALONE}", rates[ALONE], "texts/s", better="more")
    together = median_row(
        f"{dtype}: {TOGETHER}",
        rates[TOGETHER],
        "texts/s",
        better="more",
        baseline=median(rates[ALONE]),
        target=SPEED_TARGET,
    )
    equal = row(
        f"{dtype}: largest difference of a token",
        float(off.max()),
        "nats",
        target=EQUAL_TARGET if dtype == "float32" else None,
        n=off.numel(),
    )
    return [alone, together, equal]
