"""What a fork and a rewind of a text of 1,000 tokens cost beyond the steps that follow them.

Measured: fork the text, a step on the branch, rewind the text to 900 tokens, a step there. Of that
time two plain steps are taken away, on texts of the same 1,000 and 900 tokens that nobody forked,
measured in the same rounds. What is left is the copying, and whatever the first step on a fresh
copy costs more: memory that is touched for the first time, or a buffer that must grow. Steps vary
from one to the next by more than a fork takes, so the copying is timed by itself, and the steps are
compared by their lower quartiles, because what disturbs a step only ever adds. The sum is
compared with one plain step in bfloat16; a step reads all weights, which leaves nothing of any text
in the processor's caches, so that neither side finds its keys and values warm.

Before each measurement the text is made whole again and one step is taken that does not count, so
that both sides begin in the same state. Letting go of the branch is a row of its own: a search
does that when it likes.
"""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

from analyzers.engine import Cursor, Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.errors import BadInput
from app.bench import Progress, Row, alternate, median_row, row
from app.bench.quality import PASSAGES

ABOUT = "time to fork and rewind 1,000 tokens, as a share of a plain step"
BASE = "bfloat16"
DTYPES = (BASE, "float32")
TARGET = 0.10
"""Share of a plain step in bfloat16, for bfloat16."""


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    length: int = 1000,
    back: int = 900,
    rounds: int = 100,
) -> list[Row]:
    """A text of `length` tokens, forked there and rewound to `back`, in each of `rounds`.

    Raises: BadInput where the passages are shorter than that."""
    engines = {dtype: load(model, quantization="none", dtype=dtype) for dtype in DTYPES}
    ways: dict[str, Callable[[], float]] = {}
    texts: dict[str, _Texts] = {}
    with torch.inference_mode():
        for dtype, engine in engines.items():
            these = texts[dtype] = _Texts(engine, length, back)
            ways |= {f"{dtype}, steps": these.steps, f"{dtype}, forked": these.forked}
        ms = alternate(ways, rounds, progress)
    plain = {dtype: [both / 2 for both in ms[f"{dtype}, steps"]] for dtype in DTYPES}
    base = median(plain[BASE])
    rows = []
    for dtype in DTYPES:
        # The first of each is of the round that warms up.
        copying, free = texts[dtype].copying[1:], texts[dtype].free[1:]
        slower = _quiet(ms[f"{dtype}, forked"]) - _quiet(ms[f"{dtype}, steps"])
        target = TARGET if dtype == BASE else None
        rows += [
            median_row(f"{dtype}: plain step", plain[dtype], "ms"),
            median_row(f"{dtype}: fork and rewind, copying", copying, "ms", baseline=base),
            row(
                f"{dtype}: fork and rewind, first steps included",
                median(copying) + slower,
                "ms",
                baseline=base,
                target=target,
                n=rounds,
            ),
            median_row(f"{dtype}: letting go of it", free, "ms", baseline=base),
        ]
    return rows


class _Texts:
    """A text that is forked and rewound, and two that only step; both ways give the milliseconds
    of two steps. copying: of each fork and rewind beside them; free: of letting go of the branch.
    """

    def __init__(self, engine: Engine, length: int, back: int) -> None:
        ids = engine.tokens(PASSAGES.read_text(encoding="utf-8"))
        if len(ids) < length:
            raise BadInput(f"The passages have {len(ids):,} tokens: ask for a shorter text.")
        self._engine = engine
        self._ids, self._back = ids[:length], back
        self._text, self._long, self._short = (
            engine.prefill(ids[:pos]) for pos in (length, length, back)
        )
        self.copying: list[float] = []
        self.free: list[float] = []

    def steps(self) -> float:
        """Two plain steps."""
        self._engine.step(self._short)
        return _ms(lambda: (self._engine.step(self._long), self._engine.step(self._short)))

    def forked(self) -> float:
        """The first steps after a fork and after a rewind."""
        engine, text = self._engine, self._text
        engine.extend(text, self._ids[text.pos :])
        engine.step(self._short)
        branches: list[Cursor] = []
        forking = _ms(lambda: branches.append(engine.fork(text)))
        first = _ms(lambda: engine.step(branches[0]))
        rewinding = _ms(lambda: engine.rewind(text, self._back))
        second = _ms(lambda: engine.step(text))
        self.copying.append(forking + rewinding)
        self.free.append(_ms(branches.clear))
        return first + second


def _quiet(times: list[float]) -> float:
    """The lower quartile."""
    return quantiles(times, n=4, method="inclusive")[0]


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)
