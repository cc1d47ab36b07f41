"""What a model's passes cost on this machine: measured once, kept, and recorded with every run.

A method that plans (how deep to draft, how wide to search) plans with this table and never with the
clock, so that the same seed and the same table give the same run.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from analyzers.engine.core import Engine
from analyzers.engine.trees import Tree
from analyzers.engine.values import Cursor

PAST = 64
"""Tokens that stand before what is timed."""
AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 256
ROUNDS = 5
STEPS = 3
"""Steps in a round: the unit of everything else is worth more samples."""
PREFILLS = 3
SECONDS = 3.0
"""After which no further round begins, of steps as of prefills: a slow model is measured less."""


@dataclass(frozen=True)
class Cost:
    """step_ms: one token after 64 others, in milliseconds. verify: (n, ratio), rising in n: a pass
    over n tokens (the pending one and n - 1 drafts) takes `ratio` steps. prefill: tokens a second
    in one chunk. memory: bytes of the weights. Lower is better in all but prefill."""

    step_ms: float
    verify: tuple[tuple[int, float], ...]
    prefill: float
    memory: int

    def v(self, n: float) -> float:
        """Steps that a pass over `n` tokens takes: linear between what was measured, and beyond
        it as between the last two."""
        if len(self.verify) == 1:
            return self.verify[0][1]
        (low, at_low), (high, at_high) = next(
            (pair for pair in pairwise(self.verify) if n <= pair[1][0]), self.verify[-2:]
        )
        return at_low + (at_high - at_low) * (n - low) / (high - low)

    def as_mapping(self) -> dict[str, Any]:
        """Numbers and tuples, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Cost":
        """The inverse. Raises: KeyError, TypeError or ValueError if it is no such table."""
        return cls(
            step_ms=float(mapping["step_ms"]),
            verify=tuple((int(n), float(ratio)) for n, ratio in mapping["verify"]),
            prefill=float(mapping["prefill"]),
            memory=int(mapping["memory"]),
        )


def measure(engine: Engine, poll: Callable[[], None]) -> Cost:
    """Medians of a few rounds, alternating what is compared; about 3 s on the default model.

    Where the model's window is too small for a number of tokens, that number is left out.
    Raises: whatever `poll` raises, which is asked before every pass. The engine is left as it was.
    """
    before = engine.forwards, engine.poll
    engine.poll = poll
    try:
        with torch.inference_mode():
            return _measure(engine)
    finally:
        engine.forwards, engine.poll = before


def machine(device: str) -> str:
    """What a table holds for beside the model: the GPU, or the processor and its threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _measure(engine: Engine) -> Cost:
    ids = [n % engine.vocabulary.size for n in range(min(CHUNK + 1, engine.context))]
    past = min(PAST, len(ids) // 2)
    cursor = engine.prefill(ids[:past])
    taken: dict[int, list[float]] = {n: [] for n in AT_ONCE if past + n <= engine.context}
    for warm in _rounds(ROUNDS):
        for n, times in taken.items():
            for _ in range(STEPS if n == 1 else 1):
                seconds = _timed(partial(_pass, engine, cursor, ids[:n]))
                engine.rewind(cursor, past)
                times += [seconds] if warm else []
    # A prefill leaves its last token pending.
    prefills = [_timed(partial(engine.prefill, ids)) for _ in _rounds(PREFILLS)][1:]
    step = median(taken[1])
    # More tokens never cost less: what looks so is another program that had the processor.
    ratios = accumulate((median(times) / step for times in taken.values()), max)
    return Cost(
        step_ms=round(1e3 * step, 3),
        verify=tuple((n, round(ratio, 3)) for n, ratio in zip(taken, ratios, strict=True)),
        prefill=round((len(ids) - 1) / median(prefills), 1),
        memory=engine.memory,
    )


def _rounds(count: int) -> Iterator[bool]:
    """False for the first one, which pays for buffers and kernels and does not count; then True up
    to `count` times, and at least once."""
    began = time.perf_counter()
    for done in range(count + 1):
        if done > 1 and time.perf_counter() - began > SECONDS:
            return
        yield done > 0


def _pass(engine: Engine, cursor: Cursor, ids: list[int]) -> None:
    """One pass over as many tokens as there are `ids`, the pending one among them."""
    if len(ids) == 1:
        engine.step(cursor)
    elif "tree" in engine.can:
        engine.verify(cursor, Tree.chain(ids[1:]))
    else:  # such a model takes one token after the other, and the table shall say so
        for _ in engine.read(cursor, ids):
            pass


def _timed(work: Callable[[], object]) -> float:
    """Seconds, until the device is done as well."""
    began = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def _processor() -> str:
    """platform.processor() is empty, or only the architecture, on Linux."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
