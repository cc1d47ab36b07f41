"""Runs as a file: equal after the way there and back; a file that is not ours changes nothing."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from analyzers.errors import BadImport, RunNotFound, StoreUnavailable
from analyzers.trace import Note
from sessions import export
from sessions.export import event_line, export_jsonl, import_jsonl
from sessions.store import Run, Stamped, Store
from tests.test_store import EVERY_KIND, START, add, ask, stamp, token

HERE = {"owner", "process"}  # what does not travel


@pytest.fixture
def here(tmp_path: Path):
    opened = Store(tmp_path / "here.db")
    yield opened
    opened.close()


@pytest.fixture
def there(tmp_path: Path):
    opened = Store(tmp_path / "there.db")
    yield opened
    opened.close()


def travelled(run: Run) -> dict[str, Any]:
    return {f.name: getattr(run, f.name) for f in fields(run) if f.name not in HERE}


def filled(store: Store) -> list[str]:
    """A run with every kind of event, and one that forked off it."""
    run_id = store.begin(START, owner="me", versions={"torch": "2"})
    store.append(run_id, stamp(EVERY_KIND))
    store.finish(run_id, EVERY_KIND[-1])
    return [run_id, add(store, [token(5)], ask("raw, \ud800"), parent=run_id, fork_pos=3)]


# There and back


def test_an_import_equals_what_was_exported(here, there, tmp_path):
    ids = filled(here)
    out = tmp_path / "runs.jsonl"
    assert export_jsonl(here, reversed(ids), out) == 2
    assert import_jsonl(there, out) == ids
    for run_id in ids:
        assert there.events(run_id) == here.events(run_id)
        assert travelled(there.run(run_id)) == travelled(here.run(run_id))
    assert there.events(ids[0]) == stamp(EVERY_KIND)
    again = tmp_path / "again.jsonl"
    export_jsonl(there, ids, again)
    assert again.read_bytes() == out.read_bytes()
    assert there.count("sky") == 1  # search knows it too


def test_an_event_is_one_line_with_its_place_first():
    line = event_line(Stamped(3, 0.25, Note("info", "é\n\u2028<b>")))
    assert (
        line
        == '{"seq":3,"t":0.25,"kind":"Note","lane":"main","level":"info","text":"é\\n\u2028<b>"}'
    )
    assert "\ud800" not in event_line(Stamped(0, 0.0, Note("info", "\ud800")))
    with pytest.raises(ValueError, match="JSON compliant"):
        event_line(Stamped(0, 0.0, token(1, logprob=float("nan"))))


def test_the_same_runs_again_add_nothing(here, there, tmp_path):
    ids = filled(here)
    out = tmp_path / "runs.jsonl"
    export_jsonl(here, ids, out)
    assert import_jsonl(here, out) == ids and here.count() == 2
    assert import_jsonl(there, out) == import_jsonl(there, out) == ids and there.count() == 2


def test_an_id_that_another_run_has_is_replaced_and_children_follow(here, there, tmp_path):
    ids = filled(here)
    out = tmp_path / "runs.jsonl"
    export_jsonl(here, ids, out)
    import_jsonl(there, out)
    out.write_text(out.read_text().replace("stumbled", "tripped").replace("end of text", "the end"))
    lines = out.read_text().splitlines()
    child = next(n for n, line in enumerate(lines) if ids[1] in line)
    out.write_text(
        "\n".join([*lines[: child + 2], lines[child + 2].replace(" a", " b"), *lines[child + 3 :]])
        + "\n"
    )
    new = import_jsonl(there, out)
    assert not {*new} & {*ids} and there.count() == 4
    assert there.run(new[1]).parent == new[0] and there.run(ids[1]).parent == ids[0]
    assert there.events(new[0])[4].event.reason == "tripped"
    assert there.events(ids[0])[4].event.reason == "stumbled"
    assert new[0][:10] == ids[0][:10]  # its time
    assert import_jsonl(there, out) == new and there.count() == 4


def test_a_run_that_goes_on_is_exported_as_far_as_it_is(here, there, tmp_path):
    run_id = here.begin(START)
    here.append(run_id, stamp([START, token(1)]))
    out = tmp_path / "runs.jsonl"
    export_jsonl(here, [run_id[:-1]], out)
    assert import_jsonl(there, out) == [run_id]
    assert there.run(run_id).status == "interrupted" and len(there.events(run_id)) == 2


def test_an_export_is_there_whole_or_not_at_all(here, tmp_path, monkeypatch):
    ids = filled(here)
    out = tmp_path / "runs.jsonl"
    out.write_text("before")
    with pytest.raises(RunNotFound):
        export_jsonl(here, [*ids, "nobody"], out)

    def fail(_: Stamped) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "event_line", fail)
    with pytest.raises(StoreUnavailable, match=r"runs\.jsonl cannot be written \(No space left"):
        export_jsonl(here, ids, out)
    assert out.read_text() == "before" and not list(tmp_path.glob("*.part"))
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        export_jsonl(here, ids, out / "below a file")


def test_nothing_to_export_is_a_file_without_runs(here, tmp_path):
    out = tmp_path / "runs.jsonl"
    assert export_jsonl(here, [], out) == 0 and import_jsonl(here, out) == []


# Files that are not ours

Lines = list[Any]
RUN, EVENT, TOKEN = 1, 2, 3
"""Places in a file with one run: its first line, RunStarted, and a Token."""


def put(line: int, *keys: Any, value: Any) -> Callable[[Lines], None]:
    def change(lines: Lines) -> None:
        target = lines[line]
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


def drop(line: int, *keys: Any) -> Callable[[Lines], None]:
    def change(lines: Lines) -> None:
        target = lines[line]
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


def swap(line: int, text: Any) -> Callable[[Lines], None]:
    return lambda lines: lines.__setitem__(line, text)


BAD: dict[str, tuple[int, Callable[[Lines], Any]]] = {
    "empty file": (1, list.clear),
    "not JSON": (1, swap(0, "hello")),
    "a list": (1, swap(0, [1])),
    "not ours": (1, put(0, "candor", value="settings")),
    "of a later format": (1, put(0, "version", value=2)),
    "version as text": (1, put(0, "version", value="1")),
    "no number of runs": (1, put(0, "runs", value=-1)),
    "number of runs as text": (1, put(0, "runs", value="1")),
    "fewer runs than said": (8, put(0, "runs", value=2)),
    "more runs than said": (2, put(0, "runs", value=0)),
    "fewer events than said": (8, put(RUN, "events", value=6)),
    "more events than said": (7, put(RUN, "events", value=4)),
    "events endless": (2, put(RUN, "events", value=1e9)),
    "an event where a run begins": (2, lambda lines: lines.pop(RUN)),
    "a run twice": (8, lambda lines: (put(0, "runs", value=2)(lines), lines.append(lines[RUN]))),
    "run is a list": (2, put(RUN, "run", value=[])),
    "run without seed": (2, drop(RUN, "run", "seed")),
    "id like a path": (2, put(RUN, "run", "id", value="../../etc/passwd")),
    "id as number": (2, put(RUN, "run", "id", value=5)),
    "id with a line end": (2, put(RUN, "run", "id", value="01ARZ3NDEKTSV4RRFFQ69G5FAV\n")),
    "parent like a path": (2, put(RUN, "run", "parent", value="/tmp/x")),
    "seed as text": (2, put(RUN, "run", "seed", value="7")),
    "seed beyond the database": (2, put(RUN, "run", "seed", value=2**64)),
    "seed true": (2, put(RUN, "run", "seed", value=True)),
    "status unknown": (2, put(RUN, "run", "status", value="great")),
    "created no time": (2, put(RUN, "run", "created", value="yesterday")),
    "created without zone": (2, put(RUN, "run", "created", value="2026-01-01T00:00:00")),
    "params a list": (2, put(RUN, "run", "params", value=[])),
    "params infinite": (2, swap(RUN, "params 1e999")),
    "mean not finite": (2, put(RUN, "run", "mean_logprob", value=float("nan"))),
    "prompt a number": (2, put(RUN, "run", "prompt", value=3)),
    "turn without content": (2, put(RUN, "run", "prompt", value=[{"role": "user"}])),
    "turn of numbers": (2, put(RUN, "run", "prompt", value=[{"role": 1, "content": 2}])),
    "versions nested": (2, put(RUN, "run", "versions", value={"torch": {}})),
    "seq missing": (3, drop(EVENT, "seq")),
    "seq negative": (3, put(EVENT, "seq", value=-1)),
    "seq twice": (4, put(TOKEN, "seq", value=0)),
    "seq a float": (4, put(TOKEN, "seq", value=1.0)),
    "seq huge": (4, put(TOKEN, "seq", value=10**30)),
    "t missing": (4, drop(TOKEN, "t")),
    "t negative": (4, put(TOKEN, "t", value=-1)),
    "t infinite": (4, put(TOKEN, "t", value=float("inf"))),
    "kind missing": (4, drop(TOKEN, "kind")),
    "kind a list": (4, put(TOKEN, "kind", value=["Token"])),
    "kind with markup": (4, put(TOKEN, "kind", value="<script>")),
    "field missing": (4, drop(TOKEN, "bytes")),
    "pos as text": (4, put(TOKEN, "pos", value="1")),
    "bytes no hex": (4, put(TOKEN, "bytes", value="zz")),
    "origin unknown": (4, put(TOKEN, "origin", value="dreamt")),
    "origin a list": (4, put(TOKEN, "origin", value=[])),
    "logprob not finite": (4, put(TOKEN, "logprob", value=float("-inf"))),
    "logprob as text": (4, put(TOKEN, "logprob", value="-1")),
    "alternative cut short": (4, put(TOKEN, "top", value=[[1, "x"]])),
    "top a mapping": (4, put(TOKEN, "top", value={})),
    "lane a number": (4, put(TOKEN, "lane", value=1)),
    "unknown kind not finite": (7, put(6, "beams", value=float("nan"))),
    "line cut off": (5, lambda lines: lines.__setitem__(slice(4, None), ['{"seq":2,"t":0.'])),
    "nested too deep": (4, swap(TOKEN, "[" * 100_000)),
    "a number without end": (4, swap(TOKEN, '{"seq":' + "9" * 6000 + "}")),
}  # fmt: skip


def file_of(store: Store, out: Path, change: Callable[[Lines], Any]) -> Path:
    """An export of one run of five events, with one thing changed."""
    run_id = store.begin(START)
    store.append(run_id, stamp([EVERY_KIND[n] for n in (0, 1, 2, 4, 16)]))
    store.finish(run_id, EVERY_KIND[-1])
    export_jsonl(store, [run_id], out)
    lines: Lines = [json.loads(line) for line in out.read_text().splitlines()]
    as_it_was = out.read_text().splitlines()
    change(lines)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    text = text.replace("params 1e999", as_it_was[RUN].replace('"temperature":0.7', '"t":1e999'))
    out.write_text(text)
    return out


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_at_its_line_and_nothing_is_imported(here, there, tmp_path, name):
    line, change = BAD[name]
    path = file_of(here, tmp_path / "bad.jsonl", change)
    with pytest.raises(BadImport, match=rf"^Line {line} .*; nothing was imported\.$"):
        import_jsonl(there, path)
    assert there.count() == 0


def test_the_file_that_the_bad_ones_are_made_of_is_good(here, there, tmp_path):
    assert len(import_jsonl(there, file_of(here, tmp_path / "good.jsonl", lambda _: None))) == 1


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_no_damage_gets_past_with_another_error(here, there, tmp_path, damage):
    """Cut anywhere it is refused; a changed byte is refused, or is content like any other."""
    path = file_of(here, tmp_path / "damaged.jsonl", lambda _: None)
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 23):
        cut = damage == "cut"
        path.write_bytes(
            whole[:place]
            if cut
            else whole[:place] + b"\xff{9"[place % 3 :][:1] + whole[place + 1 :]
        )
        try:
            import_jsonl(there, path)
        except BadImport as problem:
            assert str(problem).startswith("Line ")
        else:
            assert not cut
    for run in there.runs():
        assert there.events(run.id)


def test_a_file_that_is_too_large_or_not_there(here, there, tmp_path, monkeypatch):
    path = file_of(here, tmp_path / "big.jsonl", lambda _: None)
    with pytest.raises(BadImport, match=r"at most 100 are taken"):
        import_jsonl(there, path, max_bytes=100)
    monkeypatch.setattr(export, "MAX_LINE", 200)
    with pytest.raises(BadImport, match=r"Line 2 is longer than 200 bytes"):
        import_jsonl(there, path)
    for wrong in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BadImport, match="cannot be read"):
            import_jsonl(there, wrong)
    assert there.count() == 0


def test_a_bad_last_run_takes_the_good_first_one_with_it(here, there, tmp_path):
    ids = [add(here, [token(1)]), add(here, [replace(token(1), text="last")])]
    out = tmp_path / "runs.jsonl"
    export_jsonl(here, ids, out)
    out.write_text(out.read_text().replace('"text":"last"', '"text":5'))
    with pytest.raises(BadImport, match="Line 8"):
        import_jsonl(there, out)
    assert there.count() == 0
