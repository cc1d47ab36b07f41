"""Rows of a file, one at a time and with the number of their line: CSV, whose columns may also be
parted by ";" or tabs, and JSON Lines. Whatever cannot be read is BadInput and says where."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from analyzers.errors import BadInput

LONGEST = 1_000_000
"""Characters of a line."""
Row = Mapping[str, object]
"""{column: value}."""


class Cell(str):
    """The text of a CSV's cell, which may hold several; a string in JSON is one."""


def rows_of(path: Path, encoding: str | None) -> Iterator[tuple[int, Row]]:
    """(number of its line, row) of each; encoding: UTF-8 unless the file says UTF-16.

    Raises, while being read: BadInput for another kind of file, a wrong encoding, a line that is
    too long, and a row that does not fit its columns or is no object."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".ndjson": _json}
    reader = readers.get(path.suffix.casefold())
    if reader is None:
        raise BadInput(f"{path.name} is neither CSV nor JSON Lines (.csv, .tsv, .jsonl, .ndjson).")
    return reader(path, _lines(path, encoding))


def _csv(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Row]]:
    header = next(lines, "")
    divider = max(",;\t", key=header.count)
    rows = csv.reader(_again(header, lines), delimiter=divider)
    try:
        names = [name.strip() for name in next(rows, [])]
        if not any(names):
            raise BadInput(f"{path.name} must begin with a line of column names.")
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise BadInput(f"{path.name} has two columns {twice[0]!r}: give them other names.")
        for cells in rows:
            if len(cells) > len(names):
                raise BadInput(
                    f"{path.name}, line {rows.line_num:,}: {len(cells)} cells for {len(names)}"
                    f" columns; a cell with {divider!r} in it needs quotes."
                )
            if cells:
                yield rows.line_num, dict(zip(names, map(Cell, cells), strict=False))
    except csv.Error as error:
        raise BadInput(f"{path.name}, line {rows.line_num:,}: {error}.") from error


def _json(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:  # half of a character would only fail later, in the store
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path.name}, line {number:,}: no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path.name}, line {number:,}: each line must be an object, {{...}}.")
        yield number, row


def _again(header: str, lines: Iterator[str]) -> Iterator[str]:
    yield header
    yield from lines


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """The lines with their ends. A byte that is not UTF-8 is told with its line."""
    try:
        name = encoding or _marked(path)
        # Wrong bytes pass as lone surrogates, so that the line they stand in is known.
        errors = "surrogateescape" if name == "utf-8-sig" else "strict"
        with path.open(encoding=name, errors=errors, newline="") as file:
            number = 0
            while line := file.readline(LONGEST):
                number += 1
                if len(line) == LONGEST and not line.endswith(("\n", "\r")):
                    raise BadInput(f"{path.name}, line {number:,}: over {LONGEST:,} characters.")
                line.encode()
                yield line
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        raise BadInput(
            f"{path.name} is not UTF-8 in line {number:,} (byte 0x{byte:02X}): save it as UTF-8, or"
            " name its encoding, such as cp1252."
        ) from error
    except UnicodeError as error:
        raise BadInput(f"{path.name} cannot be read as {name}: name its encoding.") from error
    except LookupError as error:
        raise BadInput(
            f"There is no encoding {encoding!r}: try utf-8, utf-16 or cp1252."
        ) from error
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read ({error.strerror or error}).") from error


def _marked(path: Path) -> str:
    """UTF-16 where the file begins with its mark, as spreadsheets write it; else UTF-8."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
