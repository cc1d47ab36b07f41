"""Benchmarks: what the app costs in time and memory, each number beside its target.

A benchmark is one module of this folder with ABOUT (a line) and measure(progress), which returns
rows made by `row`. Nothing here is timed by the tests: a number is worth something only on a
machine that does nothing else.
"""

import importlib
import inspect
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import Any, Literal

from analyzers.errors import BadInput

DATA = "CANDOR_DATA"
"""Environment variable that names the folder with public data."""
Progress = Callable[[str], None]
Row = dict[str, Any]
Better = Literal["less", "more"]


def names() -> dict[str, str]:
    """Every benchmark, with its line about itself."""
    return {name: _module(name).ABOUT for name in _found()}


def run(name: str, progress: Progress, **options: Any) -> list[Row]:
    """Measure, telling `progress` what is going on; takes minutes. options: for its `measure`.

    Raises: BadInput for an unknown name or option, or for what the machine lacks.
    """
    if name not in _found():
        raise BadInput(f"There is no benchmark {name!r}; there are: {', '.join(_found())}.")
    measure = _module(name).measure
    for option in options:
        if option not in inspect.signature(measure).parameters:
            raise BadInput(f"The benchmark {name} takes no --{option}.")
    rows: list[Row] = measure(progress, **options)
    return rows


def data_file(name: str, folder: str = "") -> Path:
    """A file of the folder with public data, which CANDOR_DATA names where `folder` does not.

    Raises: BadInput where it is not there."""
    folder = folder or os.environ.get(DATA, "")
    path = Path(folder) / name
    if not folder or not path.is_file():
        raise BadInput(f"There is no {name}: --data or {DATA} must name a folder that has it.")
    return path


def row(
    name: str,
    value: float,
    unit: str,
    *,
    n: int,
    baseline: float | None = None,
    target: float | None = None,
    better: Better = "less",
    spread: float | None = None,
) -> Row:
    """One measured number.

    value: in `unit`, the median of `n` measurements where n > 1. baseline: what it is compared
    with, in the same unit; ratio = value / baseline. target: the most, or where more is better the
    least, that the ratio (without a baseline, the value) may be; met: whether it is kept. spread:
    of the measurements, between their quartiles, in `unit`. None where not applicable.
    """
    ratio = value / baseline if baseline else None
    judged = value if ratio is None else ratio
    if not math.isfinite(judged):
        raise ValueError(f"{name} came out as {judged}")
    met = None
    if target is not None:
        met = judged <= target if better == "less" else judged >= target
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "target": target,
        "met": met,
        "n": n,
        "better": better,
        "spread": spread,
    }


def median_row(name: str, values: Sequence[float], unit: str, **more: Any) -> Row:
    """`row` of measurements of the same thing: their median, number and spread."""
    spread = None
    if len(values) > 1:
        first, _, third = quantiles(values, n=4, method="inclusive")
        spread = third - first
    return row(name, median(values), unit, n=len(values), spread=spread, **more)


def alternate(
    ways: Mapping[str, Callable[[], float]], rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """What each way measures in each of `rounds`.

    They take turns, so that a machine that gets slower is slower for all of them, in an order that
    rotates, so that none always follows the same other. A round before these warms up.
    """
    order, taken = list(ways), {name: list[float]() for name in ways}
    for turn in range(rounds + 1):
        progress(f"Round {turn} of {rounds}" if turn else "Warming up")
        for name in order:
            value = ways[name]()
            if turn:
                taken[name].append(value)
        order = [*order[1:], order[0]]
    return taken


def _found() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
