"""Killing the process in mid-run loses at most the last 250 ms, and breaks nothing."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sessions.store import LOST, Store

ROOT = Path(__file__).parent.parent
SLACK = 0.1
"""Seconds beyond 250 ms: two processes share the processors with whatever else runs here."""

WRITER = """
import sys, time
from pathlib import Path
from analyzers.trace import RunStarted, Token
from sessions.recorder import Recorder
from sessions.store import Stamped, Store

recorder = Recorder(Store(Path(sys.argv[1])))
started = RunStarted("sampling", {"name": "tiny"}, "Count.", (1,), {}, 1)
run, start = recorder.begin(started), time.monotonic()
top = tuple((n, "x", -1.5) for n in range(10))
recorder.record(run, Stamped(0, 0.0, started))
for seq in range(1, 10_000):
    time.sleep(0.005)
    t = time.monotonic() - start
    text = f" {seq}"
    token = Token(seq, seq, text, text.encode().hex(), -0.5, 1.0, 1, 0.1, 0.5, top)
    recorder.record(run, Stamped(seq, t, token))
    print(seq, t, flush=True)
"""


@pytest.mark.parametrize("after", [0.3, 1.1])
def test_a_killed_process_loses_a_quarter_of_a_second(tmp_path, after):
    path = tmp_path / "runs.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    first = writer.stdout.readline()
    time.sleep(after)
    writer.kill()
    lines = [first, *writer.communicate()[0].splitlines()]
    recorded = [(int(seq), float(t)) for seq, t in (line.split() for line in lines if " " in line)]

    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    store = Store(path)
    (run,) = store.runs()
    events = store.events(run.id)
    store.close()
    assert [stamped.seq for stamped in events] == list(range(len(events)))  # none in between
    assert recorded[-1][1] - events[-1].t <= 0.25 + SLACK
    assert all(abs(events[seq].t - t) < 1e-9 for seq, t in recorded if seq < len(events))
    kept = len(events) - 1
    assert (run.status, run.reason, run.tokens) == ("interrupted", LOST, kept)
    assert run.output == "".join(f" {seq}" for seq in range(1, kept + 1))
    assert run.seconds == events[-1].t
    assert run.mean_logprob == (pytest.approx(-0.5) if kept else None)
