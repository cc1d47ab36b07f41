"""The tables of the database, as a list of steps; a change is a new step, never an edit.

`sqlite_utils` runs each step in one transaction with the record that it ran. This module adds
what a user's only copy needs: a backup before an older database is changed, and the refusal of
one that a newer version has written.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from analyzers.errors import StoreTooNew, StoreUnavailable

migrations = Migrations("candor")


@migrations()
def m001_runs(db: Database) -> None:
    """`runs.n` is there because full-text search needs a number that never changes."""
    for statement in (
        """CREATE TABLE runs (
            n INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            process TEXT NOT NULL,
            parent TEXT,
            fork_pos INTEGER,
            method TEXT NOT NULL,
            model TEXT NOT NULL,
            identity TEXT NOT NULL,
            quantization TEXT NOT NULL,
            prompt TEXT NOT NULL,
            prompt_text TEXT NOT NULL,
            prefix TEXT NOT NULL,
            params TEXT NOT NULL,
            seed INTEGER NOT NULL,
            versions TEXT NOT NULL,
            status TEXT NOT NULL,
            reason TEXT NOT NULL,
            created TEXT NOT NULL,
            seconds REAL,
            tokens INTEGER,
            mean_logprob REAL,
            output TEXT NOT NULL,
            size INTEGER NOT NULL
        )""",
        "CREATE INDEX runs_by_age ON runs (created, id)",
        "CREATE INDEX runs_running ON runs (id) WHERE status = 'running'",
        # Without a row number the key is the table itself, and is stored once.
        """CREATE TABLE events (
            run TEXT NOT NULL,
            seq INTEGER NOT NULL,
            t REAL NOT NULL,
            kind TEXT NOT NULL,
            data TEXT NOT NULL,
            PRIMARY KEY (run, seq)
        ) WITHOUT ROWID""",
        # Tells in one step whether a blob is still wanted; artifacts are few.
        """CREATE INDEX events_artifact ON events (json_extract(data, '$.key'))
            WHERE kind = 'Artifact'""",
        "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB NOT NULL)",
        """CREATE TABLE artifacts (
            identity TEXT NOT NULL,
            method TEXT NOT NULL,
            name TEXT NOT NULL,
            data BLOB NOT NULL,
            meta TEXT NOT NULL,
            created TEXT NOT NULL,
            PRIMARY KEY (identity, method, name)
        )""",
        """CREATE TABLE annotations (
            n INTEGER PRIMARY KEY,
            run TEXT NOT NULL,
            target TEXT NOT NULL,
            label TEXT NOT NULL,
            score REAL,
            note TEXT NOT NULL,
            author TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('human', 'model', 'code')),
            span_from INTEGER,
            span_to INTEGER,
            created TEXT NOT NULL
        )""",
        "CREATE INDEX annotations_by_run ON annotations (run)",
        """CREATE TRIGGER annotations_stay BEFORE UPDATE ON annotations BEGIN
            SELECT raise(ABORT, 'annotations are added, never changed');
        END""",
        """CREATE TABLE datasets (
            name TEXT PRIMARY KEY,
            digest TEXT NOT NULL,
            items TEXT NOT NULL,
            created TEXT NOT NULL
        )""",
        """CREATE TABLE evaluations (
            run TEXT NOT NULL,
            item TEXT NOT NULL,
            dataset TEXT NOT NULL,
            result TEXT NOT NULL,
            created TEXT NOT NULL,
            PRIMARY KEY (run, item)
        )""",
        # The index reads the texts from `runs` instead of keeping a second copy.
        """CREATE VIRTUAL TABLE runs_text USING fts5 (
            prompt_text, output, content='runs', content_rowid='n',
            tokenize='unicode61 remove_diacritics 2'
        )""",
        """CREATE TRIGGER runs_text_added AFTER INSERT ON runs BEGIN
            INSERT INTO runs_text (rowid, prompt_text, output)
            VALUES (new.n, new.prompt_text, new.output);
        END""",
        """CREATE TRIGGER runs_text_deleted AFTER DELETE ON runs BEGIN
            INSERT INTO runs_text (runs_text, rowid, prompt_text, output)
            VALUES ('delete', old.n, old.prompt_text, old.output);
        END""",
        """CREATE TRIGGER runs_text_changed AFTER UPDATE OF prompt_text, output ON runs BEGIN
            INSERT INTO runs_text (runs_text, rowid, prompt_text, output)
            VALUES ('delete', old.n, old.prompt_text, old.output);
            INSERT INTO runs_text (rowid, prompt_text, output)
            VALUES (new.n, new.prompt_text, new.output);
        END""",
    ):
        db.execute(statement)


def upgrade(db: Database, path: Path, steps: Migrations = migrations) -> None:
    """Bring the database to the newest step: all pending ones, or none of them if one fails.

    An older database is copied to `<path>.before-<first pending step>` first; a new one is not.
    Two processes may call this at once. The connection must be in autocommit mode.
    Raises: StoreTooNew if a step was applied that `steps` does not know; StoreUnavailable if the
    file is a database of another program; nothing has been changed then.
    """
    _refuse(db, path, steps)
    if not steps.pending(db):
        return
    db.conn.execute("BEGIN IMMEDIATE")  # another process may be upgrading: wait, then look again
    try:
        _refuse(db, path, steps)
        pending = steps.pending(db)
        if pending and steps.applied(db):
            _back_up(path, path.with_name(f"{path.name}.before-{pending[0].name}"))
        steps.apply(db)
        db.conn.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


def _refuse(db: Database, path: Path, steps: Migrations) -> None:
    with db.atomic():  # one state of the file, while another process may be making its tables
        applied, tables = {step.name for step in steps.applied(db)}, db.table_names()
    with closing(Database(memory=True)) as empty:  # where every step is still to be done
        known = {step.name for step in steps.pending(empty)}
    if unknown := applied - known:
        raise StoreTooNew(
            f"The database {path} was written by a newer version of Candor "
            f"({', '.join(sorted(unknown))}): update Candor, or set CANDOR_HOME to another folder."
        )
    if tables and not applied:
        raise StoreUnavailable(
            f"The file {path} is a database of another program: "
            "move it away, or set CANDOR_HOME to another folder."
        )


def _back_up(path: Path, copy: Path) -> None:
    """Copy what is committed, through a second connection: the first one holds the lock."""
    part = copy.with_name(copy.name + ".part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(part)) as target:
        source.backup(target)
    part.replace(copy)
