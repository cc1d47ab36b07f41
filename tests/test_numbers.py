"""Numbers as a table: every one of them once, with its unit, and nothing a spreadsheet runs."""

import csv

import pytest

from analyzers.errors import RunNotFound, StoreUnavailable
from analyzers.trace import Metric, Note, Scores
from sessions.numbers import COLUMNS, export_csv, rows
from sessions.store import Store
from tests.test_store import add, token


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "runs.db")
    yield opened
    opened.close()


EVENTS = [
    token(2, " Paris"),
    token(3, "=1+1"),
    Scores(3, "attribution: occlusion", "nats", (2,), (0.5,)),
    Scores(3, "KL(strong‖weak)", "nats", (3,), (0.25,)),
    Scores(3, "entropy", "nats", ("1", "2"), (1.5, -0.5)),
    Metric("diversity", 16, 87.5, "%"),
    Note("info", "no number"),
]


def test_every_number_has_a_row():
    found = list(rows(EVENTS))
    assert found[:4] == [
        ("main", 2, "logprob", "nats", "", " Paris", -0.5),
        ("main", 2, "entropy", "nats", "", " Paris", 0.5),
        ("main", 2, "margin", "probability", "", " Paris", 0.2),
        ("main", 2, "rank", "", "", " Paris", 1),
    ]
    assert found[8:] == [
        ("main", 3, "attribution: occlusion", "nats", 2, " Paris", 0.5),
        ("main", 3, "KL(strong‖weak)", "nats", "", "=1+1", 0.25),
        ("main", 3, "entropy", "nats", "1", "", 1.5),
        ("main", 3, "entropy", "nats", "2", "", -0.5),
        ("main", 16, "diversity", "%", "", "", 87.5),
    ]


def test_the_file_is_read_back_and_no_cell_is_a_formula(store, tmp_path):
    ids = [add(store, EVENTS), add(store, [token(2, "half \ud83d")])]
    out = tmp_path / "numbers.csv"
    count = export_csv(store, ids, out)
    with out.open(encoding="utf-8", newline="") as file:
        head, *table = csv.reader(file)
    assert tuple(head) == COLUMNS and len(table) == count == 13 + 4
    assert {row[0] for row in table} == set(ids)
    texts = {row[6] for row in table}
    assert "'=1+1" in texts and not any(text.startswith("=") for text in texts)
    assert [row[7] for row in table if row[3] == "entropy" and row[5] == "2"] == ["-0.5"]


def test_what_cannot_be_written_leaves_nothing(store, tmp_path):
    id = add(store, EVENTS)
    with pytest.raises(RunNotFound):
        export_csv(store, ["01NOTTHERE"], tmp_path / "a.csv")
    with pytest.raises(StoreUnavailable):
        export_csv(store, [id], tmp_path / "no folder" / "a.csv")
    assert not list(tmp_path.glob("*.csv*"))
