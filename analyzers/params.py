"""The knobs of a method: declared as a frozen dataclass, described for forms, built from input.

A knob's type is its kind: `int` and `float` with a range, `bool`, `Literal`, `str` (one line or
several), `tuple[int, ...]`, and the references ModelRef, AdapterRef and FileRef.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeVar

from analyzers.errors import BadParameter

P = TypeVar("P")


class ModelRef(str):
    """A model: a built-in name, a local folder or file, or a hub id."""


class AdapterRef(str):
    """A LoRA adapter: a local folder."""


class FileRef(str):
    """A local file."""


@dataclass(frozen=True)
class Knob:
    """One parameter as a form shows it. choices: of a Literal. lines: height of a text box."""

    name: str
    kind: type
    default: Any
    help: str
    lo: float | None
    hi: float | None
    unit: str
    choices: tuple[Any, ...]
    lines: int

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize()

    @property
    def range(self) -> str:
        return f"{_shown(self.lo)} to {_shown(self.hi)}" + (f" {self.unit}" if self.unit else "")


def _shown(bound: float | None) -> str:
    """Whole numbers with all their digits."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def knob(
    default: Any,
    help: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    unit: str = "",
    lines: int = 1,
) -> Any:
    """A dataclass field with what a form needs. Numbers must have a range (`lo`, `hi`)."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "lo": lo, "hi": hi, "unit": unit, "lines": lines},
    )


def knobs(params: type) -> list[Knob]:
    """The knobs of a Params class, in the order in which they are declared; its own come before
    those that it inherits, which many methods have."""
    hints = typing.get_type_hints(params)
    declared = [name for cls in params.__mro__ for name in inspect.get_annotations(cls)]
    rows = []
    for field in sorted(dataclasses.fields(params), key=lambda field: declared.index(field.name)):
        hint, meta = hints[field.name], field.metadata
        origin = typing.get_origin(hint)
        rows.append(
            Knob(
                name=field.name,
                kind=origin if origin in (Literal, tuple) else hint,
                default=field.default,
                choices=typing.get_args(hint) if origin is Literal else (),
                **meta,
            )
        )
    return rows


def build(params: type[P], given: Mapping[str, Any]) -> P:
    """A checked instance from values or strings (those of `--set name=value`).

    Raises: BadParameter with the name and what would be accepted.
    """
    known = {row.name: row for row in knobs(params)}
    for name in given:
        if name not in known:
            choices = ", ".join(known) or "none"
            raise BadParameter(f"There is no parameter {name!r}; this method has: {choices}.")
    return params(**{name: _value(known[name], value) for name, value in given.items()})


def _value(row: Knob, value: Any) -> Any:
    if row.kind is Literal:
        return _choice(row, value)
    if row.kind is bool:
        return _bool(row, value)
    if row.kind in (int, float):
        return _number(row, value)
    if row.kind is tuple:
        return _ints(row, value)
    if not isinstance(value, str):
        raise BadParameter(f"{row.name} must be text, not {value!r}.")
    return row.kind(value)


def _choice(row: Knob, value: Any) -> Any:
    for choice in row.choices:
        if value == choice or value == str(choice):
            return choice
    raise BadParameter(f"{row.name} must be one of {', '.join(map(str, row.choices))}.")


def _bool(row: Knob, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise BadParameter(f"{row.name} must be true or false, not {value!r}.")


def _number(row: Knob, value: Any) -> int | float:
    problem = BadParameter(f"{row.name} must be {_article(row)} from {row.range}, not {value}.")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise problem from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise problem
    if not (row.lo is None or row.lo <= number) or not (row.hi is None or number <= row.hi):
        raise problem
    if row.kind is int:
        if number != int(number):
            raise problem
        return int(number)
    return number


def _article(row: Knob) -> str:
    return "a whole number" if row.kind is int else "a number"


def _ints(row: Knob, value: Any) -> tuple[int, ...]:
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        return tuple(int(part) if isinstance(part, str) else index(part) for part in parts)
    except (TypeError, ValueError):
        raise BadParameter(
            f"{row.name} must be whole numbers separated by commas, not {value!r}."
        ) from None
