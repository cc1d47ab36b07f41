"""Every run, kept in one SQLite file: rows for lists and search, events for replay.

Written in WAL mode without waiting for the disk at each commit: killing the process loses
nothing that was committed; a power cut may lose the last seconds, and never the file.
"""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from ulid import ULID

from analyzers.errors import RunNotFound, StoreError, StoreUnavailable
from analyzers.trace import (
    Event,
    RunEnded,
    RunStarted,
    Token,
    Turn,
    from_data,
    kind_of,
    surviving,
    text_of,
    to_data,
)

NEWEST = "m001_runs"
"""The last step of `sessions.migrations`, which loads pandas: only an upgrade imports it."""
RUN_ID = re.compile("[0-7][0-9A-HJKMNP-TV-Z]{25}")
RUNNING, INTERRUPTED = "running", "interrupted"
LOST = "The process ended before the run did."
KEY_BYTES = 48
"""About what an event costs beside its JSON: the run's id, seq, t and kind."""

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ascii_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Stamped:
    """An event with its place in the run: seq from 0, t in seconds since the start."""

    seq: int
    t: float
    event: Event


@dataclass(frozen=True)
class Run:
    """A row of the list of runs.

    status: running, done, stopped, failed, or interrupted (its process died). model: its name;
    identity: all that is known of it. prompt_text: what the user wrote, without roles and system
    prompt. created: UTC, ISO 8601. seconds, tokens, mean_logprob (nats; higher = surer): None
    while the run goes on, or where there is none. output: the surviving text of the main lane.
    size: bytes of its events in the database, the pages they lie in not counted.
    """

    id: str
    owner: str
    process: str
    parent: str | None
    fork_pos: int | None
    method: str
    model: str
    identity: Mapping[str, Any]
    quantization: str
    prompt: str | tuple[Turn, ...]
    prompt_text: str
    prefix: str
    params: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    status: str
    reason: str
    created: str
    seconds: float | None
    tokens: int | None
    mean_logprob: float | None
    output: str
    size: int


class Row(NamedTuple):
    """A stamped event as it is written; `data` is the JSON of its fields, `bytes` its length."""

    seq: int
    t: float
    kind: str
    data: str
    bytes: int


class Store:
    """The runs in one SQLite file. Any thread and any number of processes may use it at once.

    A connection is borrowed from a small pool for each call: in WAL mode a reader then never
    waits for the writer, and the threads of a web server, which come and go, leave none behind.
    Raises, from every method: StoreUnavailable if the file cannot be written, is no database, or
    stays locked for longer than `wait` seconds. Whatever raises has changed nothing.
    """

    def __init__(self, path: Path, *, wait: float = 5.0) -> None:
        """Opens the file, or makes it with its folder; marks the runs of dead processes.

        Raises: StoreTooNew if a newer version has written the file.
        """
        self.path, self.wait = Path(path), wait
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"The folder {self.path.parent} cannot be made ({error.strerror}): "
                "set CANDOR_HOME to a folder where you may write."
            ) from error
        with self._connection() as db:
            self._prepare(db)
        self._mark_interrupted()

    def close(self) -> None:
        """Closes what is open; a call that is still going on finishes first."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    # Writing

    def begin(
        self,
        started: RunStarted,
        *,
        parent: str | None = None,
        fork_pos: int | None = None,
        owner: str = "",
        versions: Mapping[str, str] | None = None,
    ) -> str:
        """A new row with status running; returns its id.

        The event itself is stored by `append`, like every other. parent, fork_pos: the run and
        the position this one goes on from.
        """
        model = started.model
        run_id = str(ULID())
        row = {
            "id": run_id,
            "owner": owner,
            "process": this_process(),
            "parent": parent,
            "fork_pos": fork_pos,
            "method": started.method,
            "model": str(model.get("name", "")),
            "identity": encode(model),
            "quantization": str(model.get("quantization") or ""),
            "prompt": encode(started.prompt),
            "prompt_text": prompt_text(started.prompt),
            "prefix": started.prefix,
            "params": encode(started.params),
            "seed": started.seed,
            "versions": encode(versions or {}),
            "status": RUNNING,
            "reason": "",
            "created": now(),
            "seconds": None,
            "tokens": None,
            "mean_logprob": None,
            "output": "",
            "size": 0,
        }
        with self._writing() as db:
            _insert(db, row)
        return run_id

    def append(self, run_id: str, stamped: Iterable[Stamped]) -> None:
        """Store events, all or none. Raises: ValueError or TypeError if one is no finite JSON."""
        self.append_rows(run_id, [encoded(each) for each in stamped])

    def append_rows(self, run_id: str, rows: Sequence[Row]) -> None:
        """The same for events that were encoded before. Raises: RunNotFound if it was deleted."""
        with self._writing() as db:
            grown = db.execute(
                "UPDATE runs SET size = size + ? WHERE id = ?",
                (sum(row.bytes + KEY_BYTES for row in rows), run_id),
            )
            if grown.rowcount == 0:
                raise RunNotFound(f"There is no run {run_id}: it was deleted.")
            db.executemany(
                "INSERT INTO events (run, seq, t, kind, data) VALUES (?, ?, ?, ?, ?)",
                [(run_id, *row[:4]) for row in rows],
            )

    def finish(self, run_id: str, ended: RunEnded) -> None:
        """Set status, length, text and mean log-probability from the ending and the events.

        The mean is over surviving tokens that the model chose; in a run that has only read, over
        the tokens it read.
        """
        self._set_ending(run_id, ended.status, ended.reason, ended.seconds, ended.tokens)

    def _set_ending(
        self, run_id: str, status: str, reason: str, seconds: float, tokens: int | None
    ) -> None:
        text, mean, counted = self._fold(run_id)
        count = counted if tokens is None else tokens
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET status = ?, reason = ?, seconds = ?, tokens = ?, "
                "mean_logprob = ?, output = ? WHERE id = ?",
                (status, _storable(reason), seconds, count, mean, text, run_id),
            )

    def _fold(self, run_id: str) -> tuple[str, float | None, int]:
        """Text, mean log-probability and number of chosen tokens of what is stored so far."""
        with self._connection() as db:
            # The alternatives are most of a token, and have no part in this.
            rows = db.execute(
                "SELECT kind, json_replace(data, '$.top', json('[]')) FROM events "
                "WHERE run = ? AND kind IN ('Token', 'Rewind') ORDER BY seq",
                (run_id,),
            ).fetchall()
        tokens = surviving(from_data(kind, json.loads(data)) for kind, data in rows)
        chosen = [token for token in tokens if token.origin not in ("read", "forced")]
        measured = chosen or [token for token in tokens if token.origin == "read"]
        logprobs = [token.logprob for token in measured if token.logprob is not None]
        mean = sum(logprobs) / len(logprobs) if logprobs else None
        return text_of(tokens), mean, len(measured)

    def delete(self, ids: Iterable[str]) -> int:
        """Remove runs with all that belongs to them; returns the bytes the disk got back.

        Ids that are not there are passed over. Where the file is busy, the room is kept for the
        next runs or given back by the next deletion. Raises: StoreError if one is still running.
        """
        self._mark_interrupted()
        before = self.size()
        wanted = encode(list(ids))
        chosen = "IN (SELECT value FROM json_each(?))"
        with self._writing() as db:
            busy = db.execute(
                f"SELECT id FROM runs WHERE status = ? AND id {chosen}", (RUNNING, wanted)
            ).fetchone()
            if busy:
                raise StoreError(f"Run {busy[0]} is still going on: stop it, then delete it.")
            of_artifacts = "SELECT json_extract(data, '$.key') FROM events WHERE kind = 'Artifact'"
            keys = db.execute(f"{of_artifacts} AND run {chosen}", (wanted,)).fetchall()
            for table, column in (
                ("events", "run"),
                ("annotations", "run"),
                ("evaluations", "run"),
                ("runs", "id"),
            ):
                db.execute(f"DELETE FROM {table} WHERE {column} {chosen}", (wanted,))
            db.executemany(f"DELETE FROM blobs WHERE key = ? AND key NOT IN ({of_artifacts})", keys)
        with suppress(StoreUnavailable), self._connection() as db:
            db.executescript("PRAGMA incremental_vacuum")  # `execute` stops after one page
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return max(0, before - self.size())

    # Reading

    def runs(
        self,
        search: str = "",
        *,
        limit: int = 100,
        offset: int = 0,
        ids: Iterable[str] | None = None,
    ) -> list[Run]:
        """Newest first, without events. search: words of prompt or answer, the last one begun."""
        self._mark_interrupted()
        where, values = _filter(search, ids)
        with self._connection() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM runs WHERE {where} "
                "ORDER BY created DESC, id DESC LIMIT ? OFFSET ?",
                (*values, limit, offset),
            ).fetchall()
        return [_run(row) for row in rows]

    def count(self, search: str = "") -> int:
        """How many runs `runs` would list with this search."""
        where, values = _filter(search, None)
        with self._connection() as db:
            row = db.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchone()
        return int(row[0])

    def run(self, run_id: str) -> Run:
        """The run with this id, or with the only id that begins so. Raises: RunNotFound."""
        self._mark_interrupted()
        wanted = _storable(run_id).strip().upper()
        with self._connection() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM runs WHERE substr(id, 1, ?) = ? LIMIT 2",
                (max(1, len(wanted)), wanted),
            ).fetchall()
        if not rows:
            raise RunNotFound(f"There is no run {run_id[:40]!r}.")
        if len(rows) > 1:
            raise RunNotFound(f"Several runs begin with {run_id!r}: give more of the id.")
        return _run(rows[0])

    def events(self, run_id: str) -> list[Stamped]:
        """All events of a run (its full id) in order. Raises: RunNotFound."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT seq, t, kind, data FROM events WHERE run = ? ORDER BY seq", (run_id,)
            ).fetchall()
            if not rows and not db.execute("SELECT 1 FROM runs WHERE id = ?", (run_id,)).fetchone():
                raise RunNotFound(f"There is no run {run_id[:40]!r}.")
        return [Stamped(seq, t, from_data(kind, json.loads(data))) for seq, t, kind, data in rows]

    def size(self) -> int:
        """Bytes on disk: the database and what is waiting to be merged into it."""
        total = 0
        for name in (self.path, self.path.with_name(self.path.name + "-wal")):
            with suppress(FileNotFoundError):
                total += name.stat().st_size
        return total

    # Blobs and artifacts

    def put_blob(self, key: str, data: bytes) -> None:
        """Keep bytes under a key; what was there is replaced.

        A blob belongs to the runs with an Artifact event of that key, and goes with the last.
        """
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO blobs (key, data) VALUES (?, ?)", (key, data))

    def get_blob(self, key: str) -> bytes | None:
        """The bytes under a key, or None."""
        with self._connection() as db:
            row = db.execute("SELECT data FROM blobs WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put_artifact(
        self,
        identity: str,
        method: str,
        name: str,
        data: bytes,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep what a method learned about a model (its identity as a key); replaces."""
        with self._writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO artifacts (identity, method, name, data, meta, created) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (identity, method, name, data, encode(meta or {}), now()),
            )

    def get_artifact(
        self, identity: str, method: str, name: str
    ) -> tuple[bytes, Mapping[str, Any]] | None:
        """(data, meta), or None."""
        with self._connection() as db:
            row = db.execute(
                "SELECT data, meta FROM artifacts WHERE identity = ? AND method = ? AND name = ?",
                (identity, method, name),
            ).fetchone()
        return (row[0], json.loads(row[1])) if row else None

    # Runs from elsewhere

    def merge(self, incoming: Iterable[tuple[Mapping[str, Any], Iterable[Row]]]) -> list[str]:
        """Add runs that were made elsewhere, all or none; returns their ids here, in order.

        incoming: values by column (without derived ones) and the events, read once and in order.
        A run that is here with the same content is left alone; one whose id is taken by another
        run gets a new id, made from its content, so that merging again adds nothing. Parents
        follow. Everything is collected beside the database first, so that a recorder does not
        have to wait while a long file is read.
        """
        db = self._connect()
        try:
            with self._explained():
                return self._merge(db, incoming)
        finally:
            db.close()

    def _merge(
        self,
        db: sqlite3.Connection,
        incoming: Iterable[tuple[Mapping[str, Any], Iterable[Row]]],
    ) -> list[str]:
        db.execute(
            "CREATE TEMP TABLE staged (run TEXT, seq INTEGER, t REAL, kind TEXT, data TEXT, "
            "PRIMARY KEY (run, seq)) WITHOUT ROWID"
        )
        db.execute("BEGIN")  # of temporary tables: it locks nobody out
        staged: list[tuple[dict[str, Any], bytes]] = []
        for given, rows in incoming:
            run, content, size = dict(given), _content(given), 0
            for row in rows:
                content.update(_line(*row[:4]))
                size += row.bytes + KEY_BYTES
                db.execute("INSERT INTO staged VALUES (?, ?, ?, ?, ?)", (run["id"], *row[:4]))
            staged.append((run | {"size": size}, content.digest()))
        db.execute("COMMIT")

        ids: dict[str, str] = {}  # as given -> as it is here
        added: list[dict[str, Any]] = []
        with _transaction(db):
            for run, digest in staged:
                here = run["id"]
                if _exists(db, here) and self._digest(db, here) != digest:
                    here = str(ULID(ULID.from_str(here).bytes[:6] + digest[:10]))
                ids[run["id"]] = here
                if not _exists(db, here):
                    _insert(db, run | {"id": here})
                    db.execute(
                        "INSERT INTO events SELECT ?, seq, t, kind, data FROM staged WHERE run = ?",
                        (here, run["id"]),
                    )
                    added.append(run)
            for run in added:
                db.execute(
                    "UPDATE runs SET parent = ? WHERE id = ?",
                    (ids.get(run["parent"], run["parent"]), ids[run["id"]]),
                )
        return [ids[run["id"]] for run, _ in staged]

    def _digest(self, db: sqlite3.Connection, run_id: str) -> bytes:
        cursor = db.execute(f"SELECT {_COLUMNS} FROM runs WHERE id = ?", (run_id,))
        content = _content(dict(zip(_NAMES, cursor.fetchone(), strict=True)))
        for row in db.execute(
            "SELECT seq, t, kind, data FROM events WHERE run = ? ORDER BY seq", (run_id,)
        ):
            content.update(_line(*row))
        return content.digest()

    # Runs whose process died

    def _mark_interrupted(self) -> None:
        """Give runs of dead processes an ending, from what they had stored.

        A locked or read-only file is no reason not to show the list: the next call tries again.
        """
        with self._connection() as db:
            running = db.execute(
                "SELECT id, process FROM runs WHERE status = ?", (RUNNING,)
            ).fetchall()
        dead = {process for process in {row[1] for row in running} if not _alive(process)}
        with suppress(StoreUnavailable):
            for run_id, process in running:
                if process in dead:
                    self._interrupt(run_id)

    def _interrupt(self, run_id: str) -> None:
        with self._connection() as db:
            last = db.execute(
                "SELECT t, kind, data FROM events WHERE run = ? ORDER BY seq DESC LIMIT 1",
                (run_id,),
            ).fetchone()
        t, kind, data = last or (0.0, "", "")
        if kind == RunEnded.__name__:  # killed between the ending and the row
            ended = from_data(kind, json.loads(data))
            assert isinstance(ended, RunEnded)
            self.finish(run_id, ended)
        else:
            self._set_ending(run_id, INTERRUPTED, LOST, t, None)

    # Connections

    def _prepare(self, db: sqlite3.Connection) -> None:
        if _newest(db) != NEWEST:
            from sqlite_utils import Database

            from sessions.migrations import upgrade

            # Both are fixed with the first table. Pages of 8 KB hold events of up to 2 KB whole.
            db.execute("PRAGMA page_size = 8192")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            upgrade(Database(db), self.path)
        db.execute("PRAGMA journal_mode = WAL")

    def _connect(self) -> sqlite3.Connection:
        with self._explained():
            db = sqlite3.connect(
                self.path,
                timeout=self.wait,
                isolation_level=None,  # transactions are begun by name, see _transaction
                check_same_thread=False,  # one thread at a time: whoever has borrowed it
            )
            try:
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute(f"PRAGMA journal_size_limit = {32 * 2**20}")
            except sqlite3.Error:
                db.close()
                raise
        return db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._connect()
        try:
            with self._explained():
                yield db
        finally:
            if self._closed:
                db.close()
            else:
                self._idle.append(db)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db, _transaction(db):
            yield db

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            sentence = None if code is None else _SENTENCES.get(code & 0xFF)
            if sentence is None:
                raise
            raise StoreUnavailable(sentence.format(path=self.path)) from error


_LOCKED = "The database {path} is locked by another program: close that program, or wait."
_UNWRITABLE = (
    "The database {path} cannot be opened or written: check its permissions, "
    "or set CANDOR_HOME to a folder where you may write."
)
_BROKEN = (
    "The file {path} is not a readable database: move it away, and a new one is made, "
    "or put a backup in its place."
)
_SENTENCES = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: _UNWRITABLE,
    sqlite3.SQLITE_PERM: _UNWRITABLE,
    sqlite3.SQLITE_AUTH: _UNWRITABLE,
    sqlite3.SQLITE_NOTADB: _BROKEN,
    sqlite3.SQLITE_CORRUPT: _BROKEN,
    sqlite3.SQLITE_FULL: "The disk is full: make room where {path} lies.",
    sqlite3.SQLITE_IOERR: "The disk does not take or give {path}: check it and the room on it.",
}
_NAMES = tuple(field.name for field in fields(Run))
_COLUMNS = ", ".join(_NAMES)
_JSON = ("identity", "prompt", "params", "versions")
_OF_THIS_PLACE = ("id", "parent", "owner", "process", "prompt_text", "size")


def encode(value: Any) -> str:
    """Compact JSON, always storable. Raises: ValueError if a number is not finite."""
    text = _encoder.encode(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair survives as an escape
            return _ascii_encoder.encode(value)
    return text


def encoded(stamped: Stamped) -> Row:
    """The row of an event, a copy of what it holds now.

    Raises: ValueError if a number is not finite or a token's bytes are no hex, TypeError if a
    value has no JSON.
    """
    if isinstance(stamped.event, Token):
        bytes.fromhex(stamped.event.bytes)  # the fold over a stored run must never fail
    data = encode(to_data(stamped.event))
    length = len(data) if data.isascii() else len(data.encode())
    return Row(stamped.seq, stamped.t, kind_of(stamped.event), data, length)


def prompt_text(prompt: str | Sequence[Turn]) -> str:
    """The plain text of a prompt for lists and search: every turn but the system's."""
    if isinstance(prompt, str):
        return _storable(prompt)
    said = [turn.get("content", "") for turn in prompt if turn.get("role") != "system"]
    return _storable("\n\n".join(said))


def now() -> str:
    """UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def this_process() -> str:
    """Number and start of this process: the number alone may be given again."""
    process = psutil.Process()
    return f"{process.pid}:{process.create_time():.2f}"


def _alive(process: str) -> bool:
    """Whether the process that wrote a run still goes on.

    A process of another user, whose start cannot be read, counts as alive. One of another
    container counts as dead: its run shows as interrupted until it ends, and then as it ended.
    """
    number, _, start = process.partition(":")
    try:
        found = psutil.Process(int(number))
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        # The start is computed from the clock, which may have been set since.
        return abs(found.create_time() - float(start)) < 5.0
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError):
        return False


def _newest(db: sqlite3.Connection) -> str | None:
    """Name of the last step that was applied, None where there is no such table."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone():
        return None
    row = db.execute(
        "SELECT name FROM _sqlite_migrations WHERE migration_set = 'candor' ORDER BY id DESC"
    ).fetchone()
    return row[0] if row else None


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. IMMEDIATE: a transaction that turns into a writer cannot wait its turn."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors have ended it already
            db.execute("ROLLBACK")
        raise


def _insert(db: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    values = {k: _storable(v) if isinstance(v, str) else v for k, v in row.items()}
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    db.execute(f"INSERT INTO runs ({names}) VALUES ({places})", values)


def _storable(text: str) -> str:
    """Plain columns cannot hold half of a surrogate pair; it becomes "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _run(row: Sequence[Any]) -> Run:
    values = dict(zip(_NAMES, row, strict=True))
    values |= {name: json.loads(values[name]) for name in _JSON}
    if not isinstance(values["prompt"], str):
        values["prompt"] = tuple(values["prompt"])
    return Run(**values)


def _exists(db: sqlite3.Connection, run_id: str) -> bool:
    return db.execute("SELECT 1 FROM runs WHERE id = ?", (run_id,)).fetchone() is not None


def _content(run: Mapping[str, Any]) -> Any:
    """A hash begun with what a run is, wherever it lies."""
    own = {name: run[name] for name in _NAMES if name not in _OF_THIS_PLACE}
    return sha256(encode(own).encode())


def _line(seq: int, t: float, kind: str, data: str) -> bytes:
    return f"{seq}\t{t!r}\t{kind}\t{data}\n".encode()


# Scripts written without spaces, and signs: the index does not cut them into words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\U0010ffff]")
_MOST_TERMS = 24


def _filter(search: str, ids: Iterable[str] | None) -> tuple[str, tuple[Any, ...]]:
    """The WHERE of a list: every term must occur. Nothing in `search` is an operator."""
    terms = _storable(search).replace("\0", " ").split()[:_MOST_TERMS]
    words = [t for t in terms if any(map(str.isalnum, t)) and not _UNSPACED.search(t)]
    conditions, values = ["1"], []
    if words:
        quoted = " ".join('"' + word.replace('"', '""') + '"' for word in words)
        half_typed = "*" if words[-1] is terms[-1] else ""
        conditions.append("n IN (SELECT rowid FROM runs_text WHERE runs_text MATCH ?)")
        values.append(quoted + half_typed)
    for term in terms:
        if term not in words:
            conditions.append("instr(prompt_text || char(10) || output, ?)")
            values.append(term)
    if ids is not None:
        conditions.append("id IN (SELECT value FROM json_each(?))")
        values.append(encode(list(ids)))
    return " AND ".join(conditions), tuple(values)
