"""The numbers of runs as one table, for spreadsheets and statistics: a row a number."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from analyzers.errors import StoreUnavailable
from analyzers.trace import Event, Metric, Scores, Token
from sessions.store import Store

COLUMNS = ("run", "lane", "pos", "name", "unit", "over", "token", "value")
_SIGNALS = (("logprob", "nats"), ("entropy", "nats"), ("margin", "probability"), ("rank", ""))
# A spreadsheet would take a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export_csv(store: Store, ids: Iterable[str], out: Path) -> int:
    """Write the numbers of runs (ids or beginnings of ids) to `out`; returns how many rows.

    The file is there whole or not at all; one that was there is replaced. Raises: RunNotFound,
    StoreUnavailable.
    """
    runs = {run.id: run for run in map(store.run, ids)}
    part = out.with_name(out.name + ".part")
    count = 0
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for id in sorted(runs):
                for row in rows([stamped.event for stamped in store.events(id)]):
                    table.writerow([id, *(_cell(value) for value in row)])
                    count += 1
        part.replace(out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise StoreUnavailable(f"Cannot write {out}: {error.strerror}.") from None
    return count


def rows(events: Sequence[Event]) -> Iterator[tuple[str | int | float, ...]]:
    """(lane, pos, name, unit, over, token, value) of every signal of a token, every score and every
    metric, in the order in which they came.

    over: what a score belongs to (a position, a layer, a head); "" where it is the token's own.
    token: the text at that position. pos of a metric: its step.
    """
    texts: dict[tuple[str, object], str] = {}
    for event in events:
        if isinstance(event, Token):
            texts[event.lane, event.pos] = event.text
            for name, unit in _SIGNALS:
                if (value := getattr(event, name)) is not None:
                    yield event.lane, event.pos, name, unit, "", event.text, value
        elif isinstance(event, Scores):
            for over, value in zip(event.over, event.values, strict=True):
                own = "" if over == event.pos and len(event.over) == 1 else over
                text = texts.get((event.lane, over), "") if isinstance(over, int) else ""
                yield event.lane, event.pos, event.name, event.unit, own, text, value
        elif isinstance(event, Metric):
            yield event.lane, event.step, event.name, event.unit, "", "", event.value


def _cell(value: str | int | float) -> str | int | float:
    """Text that no spreadsheet runs; half characters, which are no UTF-8, are replaced."""
    if not isinstance(value, str):
        return value
    safe = value.encode("utf-8", "replace").decode("utf-8")
    return f"'{safe}" if safe.startswith(_FORMULA) else safe
