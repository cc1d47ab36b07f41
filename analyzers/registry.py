"""Finds every method: a module in a family's folder with CARD, Params and run."""

import importlib
import pkgutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import analyzers
from analyzers.card import Card, Family
from analyzers.errors import BadInput
from analyzers.trace import Event

if TYPE_CHECKING:
    from analyzers.common.answering import Assessments, Signals
    from analyzers.common.budget import Expected

WORKBENCH = "workbench"
"""It is run like a method and listed with none: it uses them."""


@dataclass(frozen=True)
class Method:
    """name: the module's. about: its docstring. run(engine, task, params, ctx) yields events
    and returns why it ended. expect(params): what it will spend, for a search. signals, and
    assess(engine, answered, params, ctx): what it says of many short answers, for the workbench."""

    name: str
    card: Card
    params: type
    run: Callable[..., Generator[Event, None, str]]
    about: str
    expect: "Callable[..., Expected] | None" = None
    signals: "Signals | None" = None
    assess: "Callable[..., Assessments] | None" = None


@cache
def methods() -> dict[str, Method]:
    """All methods by name, in the order of the families and then of their names."""
    found = {}
    for family in get_args(Family):
        for name in _modules(family):
            found[name] = _method(name, f"analyzers.{family}.{name}")
    return found


def assessors() -> dict[str, Method]:
    """The methods that have signals."""
    return {name: method for name, method in methods().items() if method.signals}


def method(name: str) -> Method:
    """Raises: BadInput with the names there are."""
    if name == WORKBENCH:
        return _method(name, f"analyzers.{name}")
    if name not in methods():
        raise BadInput(f"There is no method {name!r}; there are: {', '.join(methods())}.")
    return methods()[name]


def lacks(card: Card, can: frozenset[Any]) -> str:
    """Why a model that `can` do this much cannot serve the method; "" if it can."""
    missing = [need for need in card.needs if need not in can]
    if not missing:
        return ""
    # Who has a dense model can have a mixture of experts without fetching anything.
    instead = "; the built-in model smollm2-moe does" if missing == ["routing"] else ""
    return f"needs {', '.join(missing)}, which this model does not offer{instead}"


def _method(name: str, path: str) -> Method:
    module = importlib.import_module(path)
    return Method(
        name,
        module.CARD,
        module.Params,
        module.run,
        module.__doc__ or "",
        getattr(module, "expect", None),
        getattr(module, "SIGNALS", None),
        getattr(module, "assess", None),
    )


def _modules(family: str) -> list[str]:
    paths = [f"{root}/{family}" for root in analyzers.__path__]
    return sorted(info.name for info in pkgutil.iter_modules(paths))
