"""docs/methods.md, written from what the methods say of themselves.

`python -m app.methods_doc`, in the environment, writes it anew; a test compares it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analyzers import registry
from analyzers.params import Knob, knobs

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# Methods

Written by `.venv/bin/python -m app.methods_doc` from the methods themselves: change their cards,
docstrings and knobs, not this file.

Every method runs on the page, and as `python3 launch.py run NAME --prompt TEXT --set knob=value`.
"""
_ANY_OF: dict[Any, str] = {bool: "true, false", tuple: "whole numbers"}


def render() -> str:
    """The whole document, methods in the order of their families."""
    methods = registry.methods().values()
    return "\n".join([HEAD, *(line for each in methods for line in _section(each))])


def _section(method: registry.Method) -> Iterator[str]:
    card = method.card
    heading, *rest = method.about.strip().split("\n\n")
    yield f"## {card.title}\n"
    yield f"`{method.name}` · family: {card.family} · source: {card.source}\n"
    yield heading.partition(": ")[2][:1].upper() + _flat(heading.partition(": ")[2][1:]) + "\n"
    for paragraph in rest:
        yield from _paragraph(paragraph)
    yield from _table(knobs(method.params))
    yield f"- Asks of the model: {', '.join(card.needs) or 'nothing'}."
    if card.takes:
        yield f"- Takes beside the prompt: {', '.join(card.takes)}."
    yield f"- Usually starts from: {'a conversation' if card.starts_as == 'chat' else 'raw text'}."
    yield f"- Emits: {', '.join(kind.__name__ for kind in card.emits)}.\n"


def _paragraph(text: str) -> Iterator[str]:
    """Plain prose, or the labelled lines of a method's docstring ("Source:", "Idea:", ...) as a
    list; an indented line goes on with the one before."""
    entries = re.split(r"\n(?=\S)", text)
    labelled = [re.match(r"([A-Z][a-z ]+):\s+(.*)", entry, re.DOTALL) for entry in entries]
    if not all(labelled):
        yield _flat(text) + "\n"
        return
    for found in labelled:
        if found:
            yield f"- **{found[1]}**: {_flat(found[2])}"
    yield ""


def _table(rows: list[Knob]) -> Iterator[str]:
    if not rows:
        yield "No knobs.\n"
        return
    yield "| knob | default | range | unit | what it does |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        cells = (f"`{row.name}`", _value(row.default), _range(row), row.unit, _cell(row.help))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _range(row: Knob) -> str:
    if row.choices:
        return ", ".join(_value(choice) for choice in row.choices)
    if row.lo is not None and row.hi is not None:
        return f"{row.lo:g} to {row.hi:g}"
    return _ANY_OF.get(row.kind, "text")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`" if value else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


def _cell(text: str) -> str:
    return _flat(text).replace("|", "\\|")


def _flat(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
