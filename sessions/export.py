"""Runs as a file: one JSON object a line, to keep, to send, and to read with other tools.

The first line names the format: {"candor": "runs", "version": 1, "runs": 2}. Then for each run
a line {"run": {...}, "events": 812}, followed by that many lines of events, as `event_line`
writes them. Annotations, blobs and owners stay behind.
"""

import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, TypeGuard

from analyzers.errors import BadImport, StoreUnavailable
from analyzers.trace import KINDS, from_data, kind_of, to_data
from sessions.store import (
    INTERRUPTED,
    RUN_ID,
    RUNNING,
    Row,
    Run,
    Stamped,
    Store,
    encode,
    encoded,
    prompt_text,
)

VERSION = 1
MAX_BYTES = 512 * 2**20
MAX_LINE = 16 * 2**20
"""Bytes; the longest prompt and the widest layer view stay far below."""
_KEPT = (
    "id", "parent", "fork_pos", "method", "model", "identity", "quantization", "prompt", "prefix",
    "params", "seed", "versions", "status", "reason", "created", "seconds", "tokens",
    "mean_logprob", "output",
)  # fmt: skip
_ENDINGS = ("done", "stopped", "failed", INTERRUPTED)
Fits = Callable[[Any], bool]


def event_line(stamped: Stamped) -> str:
    """One event as JSON without a line end: {"seq", "t", "kind", fields...}, in that order."""
    event = stamped.event
    place = {"seq": stamped.seq, "t": stamped.t, "kind": kind_of(event)}
    return encode({**place, **to_data(event)})


def export_jsonl(store: Store, ids: Iterable[str], out: Path) -> int:
    """Write runs (ids or beginnings of ids) to `out`, oldest first; returns how many.

    The file is there whole or not at all; one that was there is replaced. A run that is still
    going on is written as far as it is stored. Raises: RunNotFound, StoreUnavailable.
    """
    runs = {run.id: run for run in map(store.run, ids)}
    part = out.with_name(out.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(encode({"candor": "runs", "version": VERSION, "runs": len(runs)}) + "\n")
            for run in sorted(runs.values(), key=lambda run: (run.created, run.id)):
                events = store.events(run.id)
                kept = {name: getattr(run, name) for name in _KEPT}
                file.write(encode({"run": kept, "events": len(events)}) + "\n")
                file.writelines(event_line(stamped) + "\n" for stamped in events)
        part.replace(out)
    except OSError as error:
        raise StoreUnavailable(f"{out} cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):  # it is gone when all went well
            part.unlink()
    return len(runs)


def import_jsonl(store: Store, path: Path, *, max_bytes: int = MAX_BYTES) -> list[str]:
    """Add the runs of an export, all or none; returns their ids here, in the file's order.

    What is here already is left alone and keeps its id; a run whose id another run has gets a
    new one, and links to parents follow. Kinds and fields of events that this version does not
    know are kept; those of runs are not. Nothing of the file is run or opened.
    Raises: BadImport naming the line.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise BadImport(f"{path} has {size:,} bytes; at most {max_bytes:,} are taken.")
            return store.merge(_runs(_Lines(file)))
    except OSError as error:
        raise BadImport(f"{path} cannot be read ({error.strerror}).") from error


class _Lines:
    """The lines of a file as JSON objects, and the number of the last one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = 0

    def next(self) -> dict[str, Any]:
        self._number += 1
        raw = self._file.readline(MAX_LINE + 1)
        if not raw:
            self.refuse("is missing: the file is cut off")
        if len(raw) > MAX_LINE:
            self.refuse(f"is longer than {MAX_LINE:,} bytes")
        try:
            value = json.loads(raw.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            self.refuse("is not JSON, or the file is cut off there", error)
        if not isinstance(value, dict):
            self.refuse("is not a JSON object")
        return value

    def end(self) -> None:
        self._number += 1
        if self._file.read(1):
            self.refuse("goes on after the last run that was announced")

    def refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise BadImport(f"Line {self._number} {what}; nothing was imported.") from cause


def _runs(lines: _Lines) -> Iterator[tuple[Mapping[str, Any], Iterator[Row]]]:
    """What `Store.merge` takes; the rows of a run must be read before the next run."""
    first = lines.next()
    if first.get("candor") != "runs":
        lines.refuse("does not begin runs exported by Candor")
    if first.get("version") != VERSION:
        lines.refuse(f"names format version {first.get('version')!r}; this Candor reads {VERSION}")
    seen: set[str] = set()
    for _ in range(_count(lines, first, "runs")):
        line = lines.next()
        run = _run(lines, line.get("run"))
        if run["id"] in seen:
            lines.refuse(f"begins run {run['id']} a second time")
        seen.add(run["id"])
        yield run, _rows(lines, _count(lines, line, "events"))
    lines.end()


def _count(lines: _Lines, line: Mapping[str, Any], name: str) -> int:
    count = line.get(name)
    if not _is_int(count) or count < 0:
        lines.refuse(f"has no number of {name}")
    return count


def _run(lines: _Lines, given: Any) -> dict[str, Any]:
    """The columns of a run. Derived texts are taken as they are, like everything else."""
    if not isinstance(given, dict):
        lines.refuse("does not begin a run")
    for name in _KEPT:
        if name not in given:
            lines.refuse(f"lacks the run's {name}")
        if not _RUN_FITS[name](given[name]):
            lines.refuse(f"has a run whose {name} is not what it should be")
    run = {name: given[name] for name in _KEPT}
    for name in ("id", "parent"):
        if run[name] is not None and not RUN_ID.fullmatch(run[name]):
            lines.refuse(f"has a run whose {name} is no run id")
    turns = run["prompt"] if isinstance(run["prompt"], list) else []
    if not all({"role", "content"} <= turn.keys() for turn in turns):
        lines.refuse("has a prompt with a turn that lacks its role or content")
    if run["status"] == RUNNING:
        run |= {"status": INTERRUPTED, "reason": "It was still going on when it was exported."}
    if run["status"] not in _ENDINGS:
        lines.refuse("has a run whose status is not known")
    try:
        if datetime.fromisoformat(run["created"]).utcoffset() is None:
            lines.refuse("has a run whose created lacks its time zone")
        run["prompt_text"] = prompt_text(run["prompt"])
        for name in ("identity", "prompt", "params", "versions"):
            run[name] = encode(run[name])
    except (ValueError, RecursionError) as error:
        lines.refuse("has a run with a time or number that is none", error)
    for name in ("seconds", "mean_logprob"):  # as the database gives them back
        run[name] = None if run[name] is None else float(run[name]) + 0.0
    return run | {"owner": "", "process": ""}


def _rows(lines: _Lines, count: int) -> Iterator[Row]:
    last = -1
    for _ in range(count):
        data = lines.next()
        seq, t, kind = (data.pop(name, None) for name in ("seq", "t", "kind"))
        if not _is_int(seq) or seq <= last:
            lines.refuse("has a seq that is no whole number above the one before")
        if not _is_float(t) or t < 0:
            lines.refuse("has a t that is no number of seconds")
        if not isinstance(kind, str) or not kind.isidentifier():
            lines.refuse("has no kind of event")
        last = seq
        try:
            event = from_data(kind, data)
            for name, fits in _EVENT_FITS.get(kind, {}).items():
                if not fits(getattr(event, name)):
                    lines.refuse(f"has a {kind} whose {name} is not what it should be")
            row = encoded(Stamped(seq, float(t) + 0.0, event))
        except (TypeError, ValueError, RecursionError) as error:
            lines.refuse(f"has a {kind} with a field that is missing or not finite", error)
        yield row


def _fits(hint: Any) -> Fits:
    """Tells whether a value out of JSON is what a type hint of ours says; lists are tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint is int:
        return _is_int
    if hint is float:
        return _is_float
    if origin is Literal:
        return lambda value: value in args
    parts = tuple(_fits(arg) for arg in args if arg is not Ellipsis)
    if origin in (typing.Union, types.UnionType):
        return lambda value: any(fits(value) for fits in parts)
    if origin is tuple and args[-1] is Ellipsis:
        return lambda value: isinstance(value, list | tuple) and all(map(parts[0], value))
    if origin is tuple:
        return lambda value: (
            isinstance(value, list | tuple)
            and len(value) == len(parts)
            and all(fits(item) for fits, item in zip(parts, value, strict=True))
        )
    if origin is not None:  # a mapping: JSON has seen to its keys
        return lambda value: isinstance(value, dict) and all(map(parts[1], value.values()))
    return lambda value: isinstance(value, hint)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_float(value: Any) -> TypeGuard[float]:
    return math.isfinite(value) if isinstance(value, float) else _is_int(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _fields_fit(cls: type) -> dict[str, Fits]:
    return {name: _fits(hint) for name, hint in typing.get_type_hints(cls).items()}


_RUN_FITS = _fields_fit(Run)
_EVENT_FITS = {name: _fields_fit(kind) for name, kind in KINDS.items()}
