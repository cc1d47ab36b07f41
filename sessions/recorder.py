"""The one thread that writes running runs to the store, so that a model never waits for a disk.

Events are written at most BATCH seconds after they were recorded: killing the process loses no
more than the last 250 ms. What cannot be written is kept and tried again, and said aloud.
"""

import atexit
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from analyzers.errors import RunNotFound, StoreError, StoreUnavailable
from analyzers.trace import RunEnded, RunStarted, Token
from sessions.store import Row, Stamped, Store, encoded

BATCH = 0.2
"""Seconds that events wait for company; writing them fits into the rest of 250 ms."""
RETRY = 0.5
"""Seconds between two attempts to write what could not be written."""
CLOSED = "Candor was closed before the run ended."


@dataclass
class _Recording:
    """A run that has begun: what waits to be written, and what an ending would have to say."""

    rows: list[Row] = field(default_factory=list)
    ended: RunEnded | None = None
    seq: int = -1
    t: float = 0.0
    tokens: int = 0
    stored: threading.Event = field(default_factory=threading.Event)

    def add(self, stamped: Stamped, row: Row) -> None:
        self.rows.append(row)
        self.seq, self.t = stamped.seq, stamped.t
        if isinstance(stamped.event, Token):
            self.tokens += 1
        elif isinstance(stamped.event, RunEnded):
            self.ended = stamped.event


class Recorder:
    """Records any number of runs at once, from any threads. Close it when the app ends.

    Memory grows by about a kilobyte a token while the store cannot be written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._runs: dict[str, _Recording] = {}
        self._problems: dict[str, str] = {}
        self._hurry = self._closing = False
        self._thread = threading.Thread(target=self._write_on, name="recorder", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def problem(self) -> str | None:
        """One sentence why events wait in memory; None while all goes well."""
        return next(iter(self._problems.copy().values()), None)

    def begin(
        self,
        started: RunStarted,
        *,
        parent: str | None = None,
        fork_pos: int | None = None,
        owner: str = "",
        versions: Mapping[str, str] | None = None,
    ) -> str:
        """`Store.begin`: on disk when it returns. `started` is then recorded like all events.

        Raises: StoreUnavailable; no run has begun then.
        """
        run_id = self._store.begin(
            started, parent=parent, fork_pos=fork_pos, owner=owner, versions=versions
        )
        with self._changed:
            self._refuse_if_closed()
            self._runs[run_id] = _Recording()
        return run_id

    def record(self, run_id: str, stamped: Stamped) -> None:
        """Take an event, as it is now, for writing; never waits for the disk.

        Raises: ValueError or TypeError if it is no finite JSON (a fault of the method, which
        learns it here); RunNotFound if the run has ended, or did not begin here.
        """
        row = encoded(stamped)
        with self._changed:
            self._refuse_if_closed()
            recording = self._runs.get(run_id)
            if recording is None or recording.ended:
                raise RunNotFound(f"Run {run_id} is not being recorded: it has ended.")
            recording.add(stamped, row)
            if len(recording.rows) == 1:  # the writer may be asleep
                self._changed.notify_all()

    def end(self, run_id: str, stamped: Stamped, timeout: float = 5.0) -> bool:
        """Record the ending (a RunEnded) and wait until the whole run is on disk.

        Returns False if that took longer than `timeout` seconds; it is written as soon as it can
        be, whether or not anybody waits. Raises: what `record` raises.
        """
        if not isinstance(stamped.event, RunEnded):
            raise TypeError(f"A run ends with RunEnded, not {stamped.event!r}.")
        with self._changed:
            recording = self._runs.get(run_id)
        self.record(run_id, stamped)
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
        return recording is not None and recording.stored.wait(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Write everything, give an ending to the runs that have none, and stop the thread.

        Raises: StoreUnavailable with the number of lost events if `timeout` seconds pass first.
        """
        with self._changed:
            for recording in self._runs.values():
                if recording.ended is None:
                    ended = RunEnded(
                        "stopped", CLOSED, tokens=recording.tokens, seconds=recording.t
                    )
                    last = Stamped(recording.seq + 1, recording.t, ended)
                    recording.add(last, encoded(last))
            self._closing = self._hurry = True
            self._changed.notify_all()
        self._thread.join(timeout)
        atexit.unregister(self.close)
        lost = sum(len(recording.rows) for recording in self._runs.copy().values())
        if lost:
            raise StoreUnavailable(f"{lost} events were not recorded. {self.problem or ''}".strip())

    def _refuse_if_closed(self) -> None:
        if self._closing:
            raise StoreError("The recorder is closed: start Candor again.")

    # In the writer's thread

    def _write_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._work())
                if not self._work():
                    return
                self._changed.wait_for(lambda: self._hurry, BATCH)
                self._hurry = False
                work = self._work()
            for run_id in work:
                self._write(run_id)
            if self._problems:
                with self._changed:
                    self._changed.wait(RETRY)

    def _work(self) -> list[str]:
        return [name for name, run in self._runs.items() if run.rows or run.ended]

    def _write(self, run_id: str) -> None:
        recording = self._runs[run_id]
        with self._changed:
            rows, ended = recording.rows.copy(), recording.ended
        try:
            if rows:
                self._store.append_rows(run_id, rows)
                with self._changed:
                    del recording.rows[: len(rows)]
            if ended:
                self._store.finish(run_id, ended)
        except RunNotFound:  # deleted from elsewhere: nobody wants the rest
            recording.rows.clear()
            ended = ended or RunEnded("stopped", "")
        except StoreError as error:
            self._problems[run_id] = str(error)
            return
        except Exception as error:  # noqa: BLE001 - a dead writer would lose every later event
            self._problems[run_id] = f"Run {run_id} cannot be recorded: {error!r}."
            return
        self._problems.pop(run_id, None)
        if ended:
            with self._changed:
                del self._runs[run_id]
            recording.stored.set()
