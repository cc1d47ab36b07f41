"""Each thing that can be wrong, made wrong, and found with its cure."""

import shutil
import socket
import sqlite3
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import launch
from analyzers.engine import builtin
from app import doctor
from sessions.store import Store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty place for models and runs, and a machine on which nothing is wrong."""
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(launch, "unready", lambda dev: "")
    plenty = SimpleNamespace(available=8e9, total=16e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50e9))
    pins = dict(pinned())
    monkeypatch.setattr(metadata, "version", pins.__getitem__)
    return tmp_path / "home"


def pinned() -> list[tuple[str, str]]:
    lines = doctor.REQUIREMENTS.read_text().splitlines()
    return [tuple(line.split("==")) for line in lines if "==" in line and line[0] != "#"]  # type: ignore[misc]


def texts(topic: str, ok: bool | None) -> list[str]:
    return [text for about, text, right in doctor.report() if (about, right) == (topic, ok)]


def test_a_healthy_machine_has_nothing_wrong():
    text, status = doctor.main()
    assert status == 0, text
    assert text.endswith("Nothing is wrong.")
    topics = list(dict.fromkeys(topic for topic, _, _ in doctor.report()))
    assert topics == [
        "Python",
        "Set-up",
        "Package",
        "Device",
        "Model",
        "Memory",
        "Disk",
        "Runs",
        "Port",
    ]


def test_what_is_wrong_is_counted_and_gives_status_1(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9, total=4e9))
    text, status = doctor.main()
    assert status == 1
    assert "no  Memory   only 1.0 of 4.0 GB free: close other programs" in text
    assert text.endswith("1 thing is wrong, see the lines with no.")


def test_versions_are_compared_with_every_pin(monkeypatch):
    versions = {**dict(pinned()), "torch": dict(pinned())["torch"] + "+cpu", "plotly": "0.1"}
    del versions["gguf"]

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    wrong = texts("Package", False)
    assert len(wrong) == 2
    assert any(text.startswith("gguf") and "is missing" in text for text in wrong)
    assert any(text.startswith("plotly is 0.1 where 7") for text in wrong)
    good = texts("Package", True)
    assert len(good) == len(pinned()) - 2 and any(text.endswith("+cpu") for text in good)


def test_an_unfinished_set_up_is_told(monkeypatch):
    monkeypatch.setattr(launch, "unready", lambda dev: "the set-up has not been finished")
    assert "has not been finished: call `python3 launch.py`" in texts("Set-up", None)[0]


def test_dtypes_are_really_tried(monkeypatch):
    assert "float32, bfloat16, float16 works" in texts("Device", True)[0]
    ones = torch.ones

    def no_half(*shape, dtype, **kwargs):
        if dtype is torch.float16:
            raise RuntimeError('"addmm" not implemented for Half\nand more')
        return ones(*shape, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch, "ones", no_half)
    assert "float32, bfloat16 works" in texts("Device", True)[0]
    assert any(
        'cannot do float16 ("addmm" not implemented for Half): choose' in text
        for text in texts("Device", None)
    )


def test_a_device_without_any_dtype_is_wrong(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *shape, **kwargs: torch.zeros(8, 8))
    wrong = texts("Device", False)
    assert any("no dtype works" in text for text in wrong)
    assert any("cannot do float32 (the result is wrong)" in text for text in wrong)


def test_a_missing_and_a_damaged_model_are_told_apart(home, monkeypatch):
    assert any("smollm2-135m is not here yet" in text for text in texts("Model", None))
    (home / "models" / "smollm2-135m").mkdir(parents=True)
    assert any("is damaged" in text for text in texts("Model", False))
    monkeypatch.setattr(builtin, "_intact", lambda *_: True)
    assert any("smollm2-135m, 0 MB, is ready" in text for text in texts("Model", True))


def test_runs_are_counted_without_changing_the_file(home):
    path = home / "runs.db"
    assert "none yet" in texts("Runs", True)[0] and not path.exists()
    Store(path).close()
    before = path.read_bytes()
    assert texts("Runs", True)[0].startswith("0 recorded, ")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database(home):
    home.mkdir()
    (home / "runs.db").write_text("not a database" * 100)
    assert "cannot be read" in texts("Runs", False)[0]
    assert "move it away" in texts("Runs", False)[0]


def test_a_database_of_a_newer_version(home):
    Store(home / "runs.db").close()
    with sqlite3.connect(home / "runs.db") as db:
        db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) "
            "VALUES ('candor', 'm999_future', '')"
        )
    db.close()
    assert "newer Candor (m999_future): update this one" in texts("Runs", False)[0]


def test_folders_that_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "set CANDOR_HOME" in texts("Model", False)[0]
    assert "set CANDOR_HOME" in texts("Runs", False)[0]
    Store(home / "runs.db").close()
    assert "cannot be written" in texts("Runs", False)[0]


def test_a_full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.2e9))
    assert "only 0.2 GB free" in texts("Disk", False)[0]


def test_a_port_in_use_is_told_but_is_no_fault(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORT", port)
        assert f"{port} is in use" in texts("Port", None)[0]
    assert f"{port} is free" in texts("Port", True)[0]


def test_one_broken_topic_hides_no_other(monkeypatch):
    def broken() -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    assert texts("Memory", False) == ["could not be examined: ValueError: no such thing"]
    assert texts("Port", True) or texts("Port", None)


def test_importing_it_is_cheap():
    """The command line imports it; torch comes only with the report."""
    code = "import sys, app.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.call([sys.executable, "-c", code], cwd=doctor.REQUIREMENTS.parent) == 0
