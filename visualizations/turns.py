"""The earlier turns of a chat, each with a button to edit it and continue from there."""

from collections.abc import Iterable

from analyzers.trace import Event, RunStarted, Turn
from visualizations.text import clipped, escape

_ROLES = {"system": "System", "user": "You", "assistant": "Model"}
_SHORT_CHARS, _SHORT_LINES = 600, 8
# A browser can lay out this much in a blink; the store keeps the rest.
_MOST = 50_000


def render(turns: Iterable[Turn], editable: bool = True) -> str:
    """data-turn counts from 0 in `turns`. Long texts unfold; the HTML of none is empty."""
    parts = [_turn(i, turn, editable) for i, turn in enumerate(turns)]
    return f'<ol class="candor candor-turns">{"".join(parts)}</ol>' if parts else ""


def asked(events: Iterable[Event]) -> str:
    """What a run was asked, above its answer: the turns or the text, and the begun answer."""
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        return ""
    prompt = started.prompt
    said: list[Turn] = (
        [{"role": "text", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    )
    if started.prefix:
        said = [*said, {"role": "begun answer", "content": started.prefix}]
    said += [{"role": name, "content": str(text)} for name, text in started.inputs.items()]
    lines = (
        f"<div><dt>{escape(_ROLES.get(turn['role'], turn['role'].capitalize()))}</dt>"
        f'<dd dir="auto">{escape(clipped(turn["content"], _SHORT_CHARS))}</dd></div>'
        for turn in said
    )
    return f'<dl class="candor-asked">{"".join(lines)}</dl>'


def _turn(index: int, turn: Turn, editable: bool) -> str:
    role = turn["role"]
    known = role if role in _ROLES else "other"
    name = escape(_ROLES.get(role, role))
    label = f"Edit turn {index + 1} and continue from there"
    disabled = "" if editable else " disabled"
    return (
        f'<li class="turn r-{known}"><header><b>{name}</b>'
        f'<button type="button" data-turn="{index}" title="{label}" aria-label="{label}"{disabled}>'
        f"Edit</button></header>{_body(turn['content'])}</li>"
    )


def _body(text: str) -> str:
    start = "\n".join(text[:_SHORT_CHARS].split("\n")[:_SHORT_LINES])
    if start == text:
        return f'<div class="text" dir="auto">{escape(text)}</div>'
    rest = len(text) - _MOST
    more = f'<p class="note">{rest:,} more characters are not shown.</p>' if rest > 0 else ""
    return (
        f'<details><summary><span class="text" dir="auto">{escape(start)}…</span>'
        f'<span class="more">show all {len(text):,} characters</span></summary>'
        f'<div class="text" dir="auto">{escape(text[:_MOST])}</div>{more}</details>'
    )
