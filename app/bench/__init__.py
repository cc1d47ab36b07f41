"""Benchmarks: what the app costs in time and memory, each number beside its target.

A benchmark is one module of this folder with ABOUT (a line) and measure(progress), which returns
rows made by `row`. Nothing here is timed by the tests: a number is worth something only on a
machine that does nothing else.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from analyzers.errors import BadInput

Progress = Callable[[str], None]
Row = dict[str, Any]


def names() -> dict[str, str]:
    """Every benchmark, with its line about itself."""
    return {name: _module(name).ABOUT for name in _found()}


def run(name: str, progress: Progress) -> list[Row]:
    """Measure, telling `progress` what is going on; takes minutes.

    Raises: BadInput for an unknown name, or for what the machine lacks.
    """
    if name not in _found():
        raise BadInput(f"There is no benchmark {name!r}; there are: {', '.join(_found())}.")
    rows: list[Row] = _module(name).measure(progress)
    return rows


def row(
    name: str,
    value: float,
    unit: str,
    *,
    n: int,
    baseline: float | None = None,
    target: float | None = None,
) -> Row:
    """One measured number; smaller is better for all of them.

    value: in `unit`, the median of `n` measurements where n > 1. baseline: what it is compared
    with, in the same unit; ratio = value / baseline. target: the most that the ratio (without a
    baseline, the value) may be; met: whether it is not exceeded. None where not applicable.
    """
    ratio = value / baseline if baseline else None
    judged = value if ratio is None else ratio
    if not math.isfinite(judged):
        raise ValueError(f"{name} came out as {judged}")
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "target": target,
        "met": None if target is None else judged <= target,
        "n": n,
    }


def _found() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
