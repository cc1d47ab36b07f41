"""The recorder: never in the way, never silent about what it could not write."""

import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from analyzers.errors import RunNotFound, StoreError, StoreUnavailable
from analyzers.trace import Note, RunEnded
from sessions.recorder import CLOSED, Recorder
from sessions.store import Stamped, Store
from tests.test_store import START, stamp, token

ENDED = RunEnded("done", "end of text", 3, 4, 0.5)


@pytest.fixture
def store(tmp_path: Path):
    opened = Store(tmp_path / "runs.db", wait=0.05)
    yield opened
    opened.close()


@pytest.fixture
def recorder(store):
    started = Recorder(store)
    yield started
    started.close()


def until(condition, seconds: float = 5.0) -> bool:
    """Whether the condition came true in time."""
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def test_a_run_is_whole_on_disk_when_end_returns(store, recorder):
    run_id = recorder.begin(START, owner="me", parent=None, versions={"torch": "2"})
    assert store.run(run_id).status == "running" and store.run(run_id).owner == "me"
    events = stamp([START, token(1, " one"), token(2, " two"), ENDED])
    for stamped in events[:-1]:
        recorder.record(run_id, stamped)
    assert recorder.end(run_id, events[-1]) is True
    assert store.events(run_id) == events
    run = store.run(run_id)
    assert (run.status, run.reason, run.output) == ("done", "end of text", " one two")
    with pytest.raises(RunNotFound, match="ended"):
        recorder.record(run_id, Stamped(9, 1.0, token(9)))


def test_events_reach_the_disk_within_a_quarter_of_a_second(store, recorder):
    run_id = recorder.begin(START)
    seen: list[float] = []
    for seq in range(3):
        recorder.record(run_id, Stamped(seq, 0.0, token(seq)))
        recorded = time.monotonic()
        assert until(lambda n=seq: len(store.events(run_id)) > n)
        seen.append(time.monotonic() - recorded)
    assert sorted(seen)[1] < 0.25  # the median: another process may have had the processor once


def test_two_runs_at_once_stay_apart(store, recorder):
    ids = [recorder.begin(START) for _ in range(2)]

    def write(run_id: str, text: str) -> None:
        for seq in range(200):
            recorder.record(run_id, Stamped(seq, 0.0, token(seq, text)))
        recorder.end(run_id, Stamped(200, 1.0, ENDED))

    threads = [threading.Thread(target=write, args=pair) for pair in zip(ids, "xy", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.run(run_id).output for run_id in ids] == ["x" * 200, "y" * 200]


def test_what_cannot_be_written_is_kept_said_aloud_and_written_later(store, recorder):
    run_id = recorder.begin(START)
    assert recorder.problem is None
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    recorder.record(run_id, Stamped(0, 0.0, token(0)))
    assert until(lambda: recorder.problem is not None)
    assert "is locked by another program" in recorder.problem
    slowest = 0.0
    for seq in range(1, 50):
        before = time.perf_counter()
        recorder.record(run_id, Stamped(seq, seq / 100, token(seq)))
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.002)
    assert slowest < 0.05  # the writer waits for the lock, the model does not
    assert recorder.end(run_id, Stamped(50, 1.0, ENDED), timeout=0.1) is False
    with pytest.raises(StoreUnavailable, match="locked"):
        recorder.begin(START)
    assert store.events(run_id) == []
    holder.execute("ROLLBACK")
    assert until(lambda: store.run(run_id).status == "done")
    assert [stamped.seq for stamped in store.events(run_id)] == list(range(51))
    assert until(lambda: recorder.problem is None)


def test_a_fault_that_nobody_foresaw_stops_neither_the_thread_nor_the_events(
    store, recorder, monkeypatch
):
    run_id = recorder.begin(START)
    append = store.append_rows

    def fail(*_: object) -> None:
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(store, "append_rows", fail)
    recorder.record(run_id, Stamped(0, 0.0, token(0)))
    assert until(lambda: "cosmic ray" in (recorder.problem or ""))
    monkeypatch.setattr(store, "append_rows", append)
    assert recorder.end(run_id, Stamped(1, 1.0, ENDED))
    assert len(store.events(run_id)) == 2 and until(lambda: recorder.problem is None)


def test_a_number_that_is_none_is_refused_where_it_was_made(recorder):
    run_id = recorder.begin(START)
    with pytest.raises(ValueError, match="JSON compliant"):
        recorder.record(run_id, Stamped(0, 0.0, token(0, logprob=float("-inf"))))
    with pytest.raises(ValueError, match="non-hexadecimal"):
        recorder.record(run_id, Stamped(0, 0.0, replace(token(0), bytes="no hex")))
    assert recorder.end(run_id, Stamped(0, 0.0, ENDED))


def test_an_event_is_recorded_as_it_was_and_not_as_it_became(store, recorder):
    run_id, detail = recorder.begin(START), {"beams": [1]}
    event = Note("info", "x")
    event.__dict__["detail"] = detail
    recorder.record(run_id, Stamped(0, 0.0, event))
    detail["beams"].append(2)
    recorder.end(run_id, Stamped(1, 0.0, ENDED))
    assert vars(store.events(run_id)[0].event)["detail"] == {"beams": [1]}


def test_closing_writes_everything_and_an_ending_where_the_reader_walked_away(store):
    recorder = Recorder(store)
    left, ended = recorder.begin(START), recorder.begin(START)
    for stamped in stamp([START, token(1, " one"), token(2, " two")]):
        recorder.record(left, stamped)
    recorder.end(ended, Stamped(0, 0.0, ENDED))
    recorder.close()
    run, events = store.run(left), store.events(left)
    assert (run.status, run.reason, run.output, run.tokens) == ("stopped", CLOSED, " one two", 2)
    assert events[-1] == Stamped(3, 0.25, RunEnded("stopped", CLOSED, tokens=2))
    assert store.run(ended).status == "done"
    recorder.close()  # again: nothing
    with pytest.raises(StoreError, match="closed"):
        recorder.record(left, Stamped(9, 0.0, token(9)))


def test_closing_says_how_much_is_lost(store):
    recorder = Recorder(store)
    run_id = recorder.begin(START)
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    recorder.record(run_id, Stamped(0, 0.0, token(0)))
    with pytest.raises(StoreUnavailable, match=r"2 events were not recorded.*locked"):
        recorder.close(timeout=0.4)
    holder.execute("ROLLBACK")
    holder.close()
    recorder.close()


def test_the_ending_is_written_though_nobody_waits_for_it(store, recorder):
    run_id = recorder.begin(START)
    recorder.end(run_id, Stamped(0, 0.0, ENDED), timeout=0.0)
    assert until(lambda: store.run(run_id).status == "done")
