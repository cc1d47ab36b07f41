"""The list of stored runs."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from visualizations.text import clipped, counted, duration, escape, human_size, percent

_STATUS = {
    "done": ("✓", "done"),
    "stopped": ("■", "stopped"),
    "failed": ("✕", "failed"),
    "running": ("▸", "running"),
    "interrupted": ("↯", "interrupted"),
}
# The cell shows two lines and the title a page; a prompt can be a megabyte.
_CELL, _TITLE = 300, 2000


@dataclass(frozen=True)
class RunRow:
    """when: UTC, ISO 8601. method: as people call it. mean_logprob in nats a token. size in bytes
    on disk. parent: the run this one was continued from. tokens, seconds: None while it goes on."""

    id: str
    when: str
    method: str
    model: str
    prompt: str
    output: str = ""
    status: str = "done"
    tokens: int | None = 0
    seconds: float | None = None
    mean_logprob: float | None = None
    size: int | None = None
    parent: str | None = None


_FIELDS = frozenset(field.name for field in fields(RunRow))


def render(
    rows: Iterable[RunRow | Mapping[str, Any]], selected: Collection[str] = (), query: str = ""
) -> str:
    """Newest first is the caller's business. Mappings may hold more than a row needs.

    selected: ids whose box is ticked. query: what was searched for, for the empty list.
    """
    runs = [row if isinstance(row, RunRow) else _row(row) for row in rows]
    if not runs:
        if query:
            said = f"Nothing found for ‘{escape(clipped(query, 80))}’."
        else:
            said = "No runs yet: everything you run is kept here, to replay, compare and export."
        return f'<div class="candor candor-runs"><p class="empty">{said}</p></div>'
    lines = "".join(_line(run, run.id in selected) for run in runs)
    return f'<ul class="candor candor-runs">{lines}</ul>'


def when(stamp: str) -> str:
    """2026-11-23T10:31:07Z as an element that says 2026-11-23 10:31 UTC, which the page turns into
    the time where the visitor is; what is no time comes back as it is, escaped."""
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        return f"<span>{escape(stamp)}</span>"
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    said = time.strftime("%Y-%m-%d %H:%M UTC")
    return f'<time datetime="{time:%Y-%m-%dT%H:%M:%SZ}" title="{said}">{said}</time>'


def _row(row: Mapping[str, Any]) -> RunRow:
    return RunRow(**{name: row[name] for name in row if name in _FIELDS})


def _line(run: RunRow, picked: bool) -> str:
    key = escape(run.id)
    label = escape(f"Pick the run: {' '.join(run.prompt[:60].split())}")
    sign, word = _STATUS.get(run.status, ("?", run.status))
    status = f'<span class="st st-{escape(run.status) if run.status in _STATUS else "other"}">'
    confidence = "–" if run.mean_logprob is None else percent(math.exp(min(run.mean_logprob, 0.0)))
    parent = ""
    if run.parent:
        parent = f'<span title="continued from run {escape(run.parent)}">↪ continued</span>'
    numbers = [] if run.tokens is None else [counted(run.tokens, "token")]
    if run.seconds is not None:
        numbers.append(duration(run.seconds))
    size = "" if run.size is None else f"<span>{human_size(run.size)}</span>"
    return (
        f'<li><input type="checkbox" data-pick="{key}" aria-label="{label}"'
        f"{' checked' if picked else ''}>"
        f'<button type="button" data-run="{key}">'
        f'<span class="said">{_cell("prompt", run.prompt)}{_cell("output", run.output)}</span>'
        f'<span class="meta">{status}<i aria-hidden="true">{sign}</i> {escape(word)}</span>'
        f"<span>{escape(run.method)}</span>"
        '<span class="conf" title="mean confidence: geometric mean of the token probabilities">'
        f"<b>{confidence}</b> confidence</span><span>{escape(run.model)}</span>"
        f"<span>{' · '.join(numbers)}</span>{when(run.when)}{size}{parent}</span>"
        "</button></li>"
    )


def _cell(name: str, text: str) -> str:
    line = " ".join(text[: 2 * _CELL].split())[:_CELL]
    title = escape(clipped(text, _TITLE))
    return f'<span class="{name}" dir="auto" title="{title}">{escape(line) or "&nbsp;"}</span>'
