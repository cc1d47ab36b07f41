"""The store: what goes in comes out, older files are upgraded, broken ones get a sentence."""

import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from analyzers.errors import RunNotFound, StoreError, StoreTooNew, StoreUnavailable
from analyzers.trace import (
    KINDS,
    Artifact,
    Candidate,
    DraftTree,
    Event,
    Judgement,
    Lens,
    Metric,
    Note,
    Rewind,
    Routing,
    RunEnded,
    RunStarted,
    Scores,
    SearchNode,
    Token,
    Unknown,
    from_data,
)
from sessions import store as store_module
from sessions.migrations import migrations, upgrade
from sessions.store import Stamped, Store

ROOT = Path(__file__).parent.parent
MODEL = {"name": "tiny", "hash": "ab12", "quantization": "none", "dtype": "float32"}
CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
)
START = RunStarted("sampling", MODEL, CHAT, (1, 2), {"temperature": 0.7, "stop": (".",)}, seed=7)


def token(pos: int, text: str = " a", logprob: float | None = -0.5, **more: object) -> Token:
    top = ((pos, text, -0.5), (9, " b", -1.25))
    return Token(
        pos,
        pos,
        text,
        text.encode("utf-8", "replace").hex(),
        logprob,
        0.5,
        1,
        0.2,
        0.6,
        top,
        **more,
    )


LATER = from_data("Note", {"level": "info", "text": "from later", "lane": "main", "hue": [1, 2]})
EVERY_KIND: tuple[Event, ...] = (
    START,
    token(2, "\N{SLIGHTLY SMILING FACE} <b>&\u202e\0"),
    token(3, logprob=None, origin="read", lane="other"),
    token(4, "half \ud83d"),
    Rewind(3, reason="stumbled"),
    Lens(2, ("layer 1", "layer 2"), (((1, "x", -0.1),), ()), (0.25, -0.5), picked=1),
    Scores(2, "attention", "share", (0, 1, "head 2"), (0.5, 0.25, 0.25)),
    Routing(2, 0, (3, 5), (0.75, 0.25), label="weak"),
    DraftTree(
        2, (1, 2), ("a", "b"), (-1, 0), (-0.5, None), (None, -2.0), (0,), 5, "end", verify_ms=2.5
    ),
    SearchNode(0, None, "root", None, 0.5, 2.0, 1, "open", {"why": {"deep": (1,)}}, ("j1",)),
    Candidate("c1", "samples", "maybe", None),
    Judgement(
        "j1",
        "c1",
        "self",
        0.5,
        (0.0, 1.0, "better", True),
        "yes",
        0.9,
        "since",
        {"first": {"A": 0.5}},
        2,
        3.5,
    ),
    Metric("loss", 3, 0.125, "nats"),
    Artifact("blob-1", "probe", {"layers": (1, 2)}),
    Note("warning", "quotes \" ' ` and \\ and ${x} {{y}}"),
    LATER,
    Unknown("Hologram", {"lane": "main", "beams": [1, None, "x"], "deep": {"a": {}}}),
    RunEnded("done", "end of text", 2, 3, 0.75),
)


def stamp(events: tuple[Event, ...] | list[Event]) -> list[Stamped]:
    return [Stamped(seq, seq / 8, event) for seq, event in enumerate(events)]


def add(store: Store, events: list[Event], start: RunStarted = START, **more: object) -> str:
    """A whole run: begun, written, finished."""
    run_id = store.begin(start, **more)
    ended = RunEnded("done", "", len(events), 1, 0.5)
    store.append(run_id, stamp([start, *events, ended]))
    store.finish(run_id, ended)
    return run_id


def ask(text: str) -> RunStarted:
    return replace(START, prompt=text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "runs.db"


@pytest.fixture
def store(path: Path):
    with_wait = Store(path, wait=0.2)
    yield with_wait
    with_wait.close()


# Rows and events


def test_every_kind_comes_back_as_it_went_in(store):
    assert {type(event) for event in EVERY_KIND} == {*KINDS.values(), Unknown}
    run_id = store.begin(START)
    store.append(run_id, stamp(EVERY_KIND[:5]))
    store.append(run_id, stamp(EVERY_KIND)[5:])
    back = store.events(run_id)
    assert back == stamp(EVERY_KIND)
    assert vars(back[-3].event)["hue"] == [1, 2]
    # Times do not compare in events, and are stored all the same.
    assert back[8].event.verify_ms == 2.5 and back[-1].event.seconds == 0.75


def test_a_run_is_listed_with_what_it_was_asked_and_how_it_ended(store):
    parent = add(store, [])
    run_id = store.begin(START, parent=parent, fork_pos=3, owner="me", versions={"torch": "2"})
    going = store.run(run_id)
    assert (going.status, going.tokens, going.mean_logprob) == ("running", None, None)
    events = [token(2, " no", -4.0), Rewind(2, "stumbled"), token(2, " yes", -1.0)]
    forced = [
        token(3, " or", -9.0, origin="forced"),
        token(4, " no", -2.0),
        token(2, "?", lane="b"),
    ]
    ended = RunEnded("stopped", "you asked", 4, 5, 1.5)
    store.append(run_id, stamp([START, *events, *forced, ended]))
    store.finish(run_id, ended)
    run = store.run(run_id)
    assert (run.parent, run.fork_pos, run.owner, run.versions) == (parent, 3, "me", {"torch": "2"})
    assert (run.method, run.model, run.identity) == ("sampling", "tiny", MODEL)
    assert (run.prompt, run.prompt_text) == (CHAT, "Why is the sky blue?")
    assert (run.params, run.seed) == ({"temperature": 0.7, "stop": ["."]}, 7)
    assert (run.status, run.reason, run.seconds, run.tokens) == ("stopped", "you asked", 1.5, 4)
    assert run.output == " yes or no"
    assert run.mean_logprob == pytest.approx(-1.5)  # neither the undone nor the forced one
    assert run.created.endswith("Z") and run.size > 7 * 100


def test_a_run_that_only_read_has_the_mean_of_what_it_read(store):
    read = [token(0, logprob=None, origin="read"), token(1, logprob=-3.0, origin="read")]
    assert store.run(add(store, read)).mean_logprob == pytest.approx(-3.0)


def test_a_failed_append_leaves_nothing(store):
    run_id = store.begin(START)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append(run_id, stamp([token(1), replace(token(2), entropy=float("nan"))]))
    with pytest.raises(sqlite3.IntegrityError):
        store.append(run_id, [Stamped(0, 0.0, token(1)), Stamped(0, 0.0, token(2))])
    assert store.events(run_id) == [] and store.run(run_id).size == 0


def test_newest_first_and_a_page_at_a_time(store):
    ids = [add(store, [], ask(f"question {n}")) for n in range(5)]
    assert [run.id for run in store.runs()] == ids[::-1]
    assert [run.id for run in store.runs(limit=2, offset=1)] == [ids[3], ids[2]]
    assert [run.id for run in store.runs(ids=[ids[0], ids[4], "nobody"])] == [ids[4], ids[0]]
    assert store.count() == 5


def test_a_part_of_an_id_is_enough_when_it_is_the_only_one(store):
    first, second = add(store, []), add(store, [])
    assert store.run(first.lower()).id == first
    same = next(n for n in range(26) if first[n] != second[n])
    shared = first[:same]
    assert store.run(second[: same + 1]).id == second
    with pytest.raises(RunNotFound, match="Several runs"):
        store.run(shared)
    for wrong in ("", "nobody", "%", "*", "\0", "\ud800", first + "X", "../" + first):
        with pytest.raises(RunNotFound, match="There is no run"):
            store.run(wrong)
    with pytest.raises(RunNotFound):
        store.events("nobody")


# Search


def test_search_finds_words_of_prompt_and_answer(store):
    paris = add(store, [token(1, " Paris"), token(2, " is"), token(3, " café")], ask("Capital?"))
    add(store, [token(1, " Rome")], ask("It's never \"AND\" nor 'OR', 100% a*b"))
    found = lambda text: [run.prompt_text for run in store.runs(text)]  # noqa: E731
    assert found("capital paris") == found("par") == found("is cafe") == ["Capital?"]
    assert found("capital rome") == found("pari capital") == []
    assert len(found("")) == len(found("   ")) == 2
    assert store.count("PARIS") == 1
    store.delete([paris])
    assert found("paris") == []


HOSTILE = (
    '"', '""" "', "*", "a*", "AND", "NOT x", "NEAR(a b)", "output:x", "-x", "(", "%", "{}", "^x",
    "'; DROP TABLE runs", "\0", "a\0b", "\ud800", "\N{PILE OF POO}", "日本", "a" * 100_000,
    "x " * 1000, "\u202e", "²", "\u0301",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_search_takes_any_text_as_plain_words(store, text):
    run_id = add(store, [], ask(f"before {text} after"))
    add(store, [], ask("something else"))
    found = [run.id for run in store.runs(text)]
    assert run_id in found and store.count(text) == len(found) == (2 if text == "\0" else 1)


def test_search_finds_parts_of_scripts_without_spaces_and_signs(store):
    add(store, [token(1, "東京は日本の首都です")], ask("首都 \N{SLIGHTLY SMILING FACE}?"))
    add(store, [token(1, "ローマ")])
    for text in ("日本", "首都です", "\N{SLIGHTLY SMILING FACE}", "東京 首都", "?"):
        assert store.count(text) == (2 if text == "?" else 1)
    assert store.count("大阪") == 0


# Deleting


def test_deleting_gives_the_disk_back(store, path):
    kept = add(store, [token(1)])
    big = [add(store, [token(pos, "x" * 300) for pos in range(1500)]) for _ in range(2)]
    store.delete([])  # merges what waits, so that the file alone counts
    before = path.stat().st_size
    freed = store.delete([*big, "nobody"])
    assert before - path.stat().st_size >= freed * 0.95 > 3_000 * 600
    assert [run.id for run in store.runs()] == [kept] and len(store.events(kept)) == 3
    with pytest.raises(RunNotFound):
        store.events(big[0])


def test_a_blob_goes_with_the_last_run_that_names_it(store):
    for key in ("shared", "own", "loose"):
        store.put_blob(key, key.encode())
    first = add(store, [Artifact("shared", "image"), Artifact("own", "image")])
    second = add(store, [Artifact("shared", "image")])
    store.delete([first])
    assert (store.get_blob("shared"), store.get_blob("own")) == (b"shared", None)
    assert store.get_blob("loose") == b"loose"  # its event may still be on the way
    store.delete([second])
    assert store.get_blob("shared") is None


def test_a_run_that_goes_on_is_not_deleted(store):
    done, going = add(store, [token(1)]), store.begin(START)
    with pytest.raises(StoreError, match="still going on"):
        store.delete([done, going])
    assert store.count() == 2 and store.events(done)


def test_artifacts_are_kept_by_model_method_and_name(store):
    store.put_artifact("ab12", "probe", "layer 3", b"\0\1", {"auroc": 0.7})
    store.put_artifact("ab12", "probe", "layer 3", b"\2", {"auroc": 0.8})
    assert store.get_artifact("ab12", "probe", "layer 3") == (b"\2", {"auroc": 0.8})
    assert store.get_artifact("ab12", "probe", "layer 4") is None


def test_annotations_are_added_and_never_changed(store, path):
    with sqlite3.connect(path) as db:
        db.execute(
            "INSERT INTO annotations (run, target, label, note, author, kind, created) "
            "VALUES ('r', 'run', 'good', '', 'me', 'human', 'now')"
        )
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            db.execute("UPDATE annotations SET label = 'bad'")


# Runs whose process died


def test_runs_of_dead_processes_are_interrupted_and_folded(store, path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    start = psutil.Process(dead.pid).create_time()
    dead.wait()
    mine = psutil.Process()
    processes = {
        "gone": f"{dead.pid}:{start}",
        "number given again": f"{mine.pid}:{mine.create_time() - 60}",
        "nonsense": "x",
        "alive": f"{mine.pid}:{mine.create_time()}",
    }
    ids = {name: store.begin(START) for name in processes}
    for name, run_id in ids.items():
        store.append(run_id, stamp([START, token(1, " one", -1.0), token(2, " two", -3.0)]))
        with sqlite3.connect(path) as db:
            db.execute("UPDATE runs SET process = ? WHERE id = ?", (processes[name], run_id))
    runs = {run.id: run for run in store.runs()}
    assert runs[ids.pop("alive")].status == "running"
    for run_id in ids.values():
        run = runs[run_id]
        assert (run.status, run.output, run.tokens) == ("interrupted", " one two", 2)
        assert (run.mean_logprob, run.seconds) == (-2.0, 0.25) and "process" in run.reason


def test_a_run_killed_after_its_last_event_ended_as_that_says(store, path):
    run_id = store.begin(START)
    store.append(run_id, stamp([START, token(1, " one"), RunEnded("done", "end", 1, 1, 2.0)]))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE runs SET process = '1:1'")
    with_other = Store(path)
    assert (with_other.run(run_id).status, with_other.run(run_id).seconds) == ("done", 2.0)
    with_other.close()


# Upgrades


def later_steps() -> Migrations:
    """The steps as a later version may have them."""
    steps = Migrations("candor")
    for step in migrations.pending(Database(memory=True)):
        steps(name=step.name)(step.fn)

    @steps()
    def m999_label(db: Database) -> None:
        db["runs"].add_column("label", str, not_null_default="")

    return steps


def schema(db: Database) -> set[str]:
    return {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}


STEPS = [step.name for step in migrations.pending(Database(memory=True))]


def test_the_store_knows_the_newest_step():
    assert STEPS[-1] == store_module.NEWEST


@pytest.mark.parametrize("steps", [migrations, later_steps()], ids=["now", "later"])
def test_every_older_version_becomes_the_newest_and_leaves_a_backup(tmp_path, steps):
    names = [step.name for step in steps.pending(Database(memory=True))]
    fresh = Database(sqlite3.connect(tmp_path / "fresh.db", isolation_level=None))
    upgrade(fresh, tmp_path / "fresh.db", steps)
    assert not list(tmp_path.glob("*.before-*"))  # nothing to lose in a new file
    for name in names[1:]:
        path = tmp_path / f"{name}.db"
        old = Database(sqlite3.connect(path, isolation_level=None))
        steps.apply(old, stop_before=name)
        before = schema(old)
        old["blobs"].insert({"key": "k", "data": b"precious"})
        upgrade(old, path, steps)
        assert schema(old) == schema(fresh)
        backup = Database(tmp_path / f"{name}.db.before-{name}")
        assert schema(backup) == before and backup["blobs"].count == old["blobs"].count == 1


def test_a_step_that_fails_changes_nothing(path, store):
    steps = later_steps()

    @steps()
    def m9999_fails(db: Database) -> None:
        db["runs"].drop()
        raise RuntimeError("no")

    run_id = add(store, [])
    db = Database(sqlite3.connect(path, isolation_level=None))
    before = schema(db)
    with pytest.raises(RuntimeError):
        upgrade(db, path, steps)
    assert schema(db) == before and store.run(run_id).status == "done"


def test_another_process_may_make_the_tables_between_two_looks(tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    db = Database(sqlite3.connect(path, isolation_level=None))
    other = Database(sqlite3.connect(path, isolation_level=None, timeout=0))
    looks = iter([True])
    applied = Migrations.applied

    def and_then_the_other(steps: Migrations, seen_by: Database) -> list:
        found = applied(steps, seen_by)
        if seen_by is db and next(looks, False):
            with suppress(sqlite3.OperationalError):  # it has to wait, and does not
                upgrade(other, path)
        return found

    monkeypatch.setattr(Migrations, "applied", and_then_the_other)
    upgrade(db, path)
    upgrade(other, path)
    assert "runs" in db.table_names() and not list(tmp_path.glob("*.before-*"))


def test_a_newer_database_is_refused_and_left_alone(path):
    path.parent.mkdir()
    db = Database(sqlite3.connect(path, isolation_level=None))
    upgrade(db, path, later_steps())
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match=r"runs\.db was written by a newer version.*m999_label"):
        Store(path)
    assert path.read_bytes() == before


# Trouble


@pytest.mark.parametrize(
    "content", [b"no database at all " * 100, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_a_file_that_is_no_database(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreUnavailable, match=r"runs\.db is not a readable database: move it"):
        Store(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    before = path.read_bytes()
    with pytest.raises(StoreUnavailable, match=r"runs\.db is a database of another program"):
        Store(path)
    assert path.read_bytes() == before


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"file cannot be made .*set CANDOR_HOME"):
        Store(tmp_path / "file" / "runs.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreUnavailable, match=r"folder\.db cannot be opened or written"):
        Store(tmp_path / "folder.db")


def test_a_read_only_file_is_still_listed(store, path, monkeypatch):
    run_id = add(store, [token(1)])

    def read_only(*args: object, **more: object) -> sqlite3.Connection:
        db = connect(*args, **more)
        db.execute("PRAGMA query_only = 1")
        return db

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", read_only)  # permissions do not stop root
    reader = Store(path)
    assert [run.id for run in reader.runs()] == [run_id]
    with pytest.raises(StoreUnavailable, match="check its permissions"):
        reader.begin(START)
    reader.close()


def test_a_locked_database_says_so_and_can_still_be_read(store, path):
    run_id = add(store, [token(1)])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"runs\.db is locked by another program"):
        store.begin(START)
    assert store.run(run_id).output == " a"
    Store(path, wait=0.2).close()
    holder.execute("ROLLBACK")
    store.begin(START)


def test_a_new_database_that_is_locked(path):
    path.parent.mkdir()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match="is locked"):
        Store(path, wait=0.1)
    holder.close()


# Many at once


def test_threads_and_stores_write_at_once(path):
    stores: list[Store] = []
    problems: list[BaseException] = []

    def work(n: int) -> None:
        try:
            mine = stores[n] if n < len(stores) else Store(path)
            run_id = mine.begin(ask(f"thread {n}"))
            for seq in range(40):
                mine.append(run_id, [Stamped(seq, seq / 100, token(seq, f" {n}"))])
            mine.finish(run_id, RunEnded("done", "", 40))
            assert mine.run(run_id).output == f" {n}" * 40
        except BaseException as problem:  # noqa: BLE001 - shown by the assertion below
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    with_all = Store(path)
    assert with_all.count("thread") == 6
    assert all(len(with_all.events(run.id)) == 40 for run in with_all.runs())
    with_all.close()


OTHER = """
import sys
from pathlib import Path
from sessions.store import Stamped, Store
from analyzers.trace import Note, RunEnded, RunStarted
store = Store(Path(sys.argv[1]))
run = store.begin(RunStarted("sampling", {"name": "tiny"}, "other process", None, {}, 1))
for seq in range(100):
    store.append(run, [Stamped(seq, 0.0, Note("info", "x"))])
    if seq == 50:
        print(run, flush=True)
        sys.stdin.readline()
store.finish(run, RunEnded("done", ""))
"""


def test_two_processes_share_a_database(path):
    """Both write, and a run that another living process writes is left alone."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    store = Store(path)
    mine = add(store, [token(pos) for pos in range(50)])
    theirs = other.stdout.readline().strip()
    assert store.run(theirs).status == "running"
    other.communicate("go on\n", timeout=20)
    assert other.returncode == 0
    assert {run.id: run.status for run in store.runs()} == {mine: "done", theirs: "done"}
    assert len(store.events(theirs)) == 100
    store.close()
