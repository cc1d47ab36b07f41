"""The set-up, on a copy of launch.py with tiny local wheels: real venv and pip, no network."""

import ast
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch

SOURCE = Path(launch.__file__)
APP = """
import json, os, sys
def main(argv):
    import tiny
    print(json.dumps([argv, tiny.VERSION, sys.prefix, os.environ.get("CANDOR_INDEX_URL")]))
    return 3
"""


def wheel(folder: Path, name: str, version: str, code: str) -> Path:
    """A wheel with one module, as small as pip accepts."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = [f"{name}.py", *(f"{info}/{file}" for file in ("METADATA", "WHEEL", "RECORD"))]
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in names))
    return path


def project(folder: Path) -> Path:
    """A copy of the project with a stub for the app; `tiny` is all it requires."""
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "__init__.py").touch()
    (folder / "app" / "cli.py").write_text(APP)
    shutil.copy(SOURCE, folder)
    wheel(folder, "tiny", "1.0", "VERSION = 1")
    wheel(folder, "pytest", "0.1", "def main(args): print('tests', args); return 5")
    (folder / "requirements.txt").write_text("./tiny-1.0-py3-none-any.whl\n")
    (folder / "requirements-dev.txt").write_text(
        "-r requirements.txt\n./pytest-0.1-py3-none-any.whl\n"
    )
    return folder


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    """`python launch.py ARGS` with a pip that has no configuration and no index."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean.pop("CANDOR_INDEX_URL", None)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", **env}
    return subprocess.Popen(
        [sys.executable, str(folder / "launch.py"), *args],
        env={**clean, **{name: value for name, value in settings.items() if value}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Also where the tests themselves run in the background, which ignores Ctrl+C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def call(folder: Path, *args: str, **env: str) -> SimpleNamespace:
    process = start(folder, *args, **env)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return SimpleNamespace(status=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> SimpleNamespace:
    """A project that two launches set up at the same time."""
    folder = project(tmp_path_factory.mktemp("launch") / "candor")
    both = [start(folder, "run", "x"), start(folder, "run", "y")]
    said = [process.communicate(timeout=90) for process in both]
    return SimpleNamespace(
        folder=folder,
        status=[process.returncode for process in both],
        out=[out for out, _ in said],
        err=[err for _, err in said],
    )


@pytest.fixture
def ready(first, tmp_path) -> Path:
    """A copy of the finished project that a test may break; pip's own files are only linked."""

    def copy(source: str, target: str) -> None:
        (os.link if "site-packages/pip/" in source else shutil.copy2)(source, target)

    shutil.copytree(first.folder, tmp_path / "candor", symlinks=True, copy_function=copy)
    return tmp_path / "candor"


def site(folder: Path) -> Path:
    return next((folder / ".venv").glob("lib/python*/site-packages"))


def test_two_first_launches_make_one_environment_and_both_run(first):
    venv = str(first.folder / ".venv")
    assert first.status == [3, 3]
    assert [json.loads(out) for out in first.out] == [
        [["run", "x"], 1, venv, None],
        [["run", "y"], 1, venv, None],
    ]
    assert "".join(first.err).count("Setting up Candor") == 1
    assert "GB" in "".join(first.err), "says how much it downloads"


def test_set_up_is_skipped_afterwards(ready):
    (ready / "tiny-1.0-py3-none-any.whl").unlink()  # any pip install would fail now
    again = call(ready, "history", "--json")
    assert (again.status, again.err) == (3, "")
    assert json.loads(again.out)[0] == ["history", "--json"]


def test_changed_requirements_are_installed(ready):
    wheel(ready, "tiny", "2.0", "VERSION = 2")
    (ready / "requirements.txt").write_text("./tiny-2.0-py3-none-any.whl\n")
    changed = call(ready)
    assert json.loads(changed.out)[1] == 2
    assert "requirements.txt has changed" in changed.err
    assert "Making the environment." not in changed.err
    assert call(ready).err == ""


def test_test_installs_the_test_tools_once_and_passes_arguments_and_status(ready):
    tests = call(ready, "test", "-k", "one")
    assert (tests.status, tests.out) == (5, "tests ['-k', 'one']\n")
    assert call(ready, "test").err == ""
    assert call(ready).err == "", "the page needs no second set-up after the tests"


def test_unfinished_set_up_keeps_what_is_whole(ready):
    (ready / ".venv" / "candor-setup.json").unlink()
    (site(ready) / "kept").touch()
    repaired = call(ready)
    assert repaired.status == 3
    assert "has not been finished" in repaired.err
    assert (site(ready) / "kept").exists()


def test_a_half_written_package_is_noticed_and_replaced(ready):
    """What a pip leaves that was killed between the metadata and the end."""
    (ready / ".venv" / "candor-setup.json").unlink()
    (site(ready) / "tiny.py").unlink()
    (site(ready) / "tiny-1.0.dist-info" / "RECORD").unlink()
    repaired = call(ready)
    assert repaired.status == 3
    assert json.loads(repaired.out)[1] == 1
    assert call(ready).err == ""


@pytest.fixture
def broken(ready, monkeypatch) -> None:
    """launch.py as a module, looking at the environment that a test is about to break."""
    monkeypatch.setattr(launch, "VENV", ready / ".venv")
    monkeypatch.setattr(launch, "PYTHON", ready / ".venv" / "bin" / "python")
    monkeypatch.setattr(launch, "STAMP", ready / ".venv" / "candor-setup.json")
    monkeypatch.setattr(launch, "ROOT", ready)


def test_a_python_that_went_away_or_changed_is_noticed(broken, ready):
    assert launch.unready(dev=False) == ""
    stamp = json.loads(launch.STAMP.read_text())
    launch.STAMP.write_text(json.dumps({**stamp, "python": [3, 2, 1]}))
    assert "another version" in launch.unready(dev=False)
    launch.PYTHON.unlink()
    launch.PYTHON.symlink_to("/nowhere/python")
    assert "does not start" in launch.unready(dev=False)
    assert not launch.usable()


@pytest.mark.parametrize("missing", ["RECORD", "tiny.py"])
def test_usable_sees_a_missing_file(broken, ready, missing):
    assert launch.usable()
    next(site(ready).glob(f"**/tiny*/{missing}" if missing == "RECORD" else missing)).unlink()
    assert not launch.usable()


def test_no_network_is_one_sentence(ready):
    (ready / "requirements.txt").write_text("candor-needs-this==1\n")
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        failed = call(ready, PIP_NO_INDEX="", PIP_INDEX_URL=address, PIP_RETRIES="1")
    assert failed.status == 1
    assert "The package index could not be reached" in failed.err
    assert "--index-url URL" in failed.err and "--model FOLDER" in failed.err
    assert not (ready / ".venv" / "candor-setup.json").exists()
    assert not (ready / ".venv" / "candor-downloads").exists()


def test_another_index_is_used_and_handed_on(ready):
    index = ready / "index" / "extra"
    index.mkdir(parents=True)
    name = wheel(index, "extra", "1.0", "").name
    (index / "index.html").write_text(f'<a href="{name}">{name}</a>')
    (ready / "empty").mkdir()
    with (ready / "requirements.txt").open("a") as requirements:
        requirements.write("extra==1.0\n")
    usual = {"PIP_NO_INDEX": "", "PIP_INDEX_URL": (ready / "empty").as_uri()}

    lacking = call(ready, **usual)
    assert lacking.status == 1
    assert "lacks a package" in lacking.err and "extra==1.0" in lacking.err

    address = index.parent.as_uri()
    found = call(ready, "run", "--index-url", address, "x", **usual)
    assert found.status == 3
    argv, _, _, handed_on = json.loads(found.out)
    assert (argv, handed_on) == (["run", "x"], address)


def test_ctrl_c_is_a_sentence_and_leaves_no_stamp(ready):
    (ready / "requirements.txt").write_text("candor-needs-this==1\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        process = start(ready, PIP_NO_INDEX="", PIP_INDEX_URL=address)
        silent.settimeout(30)
        connection, _ = silent.accept()  # pip is at work
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        connection.close()
    assert process.returncode == 130
    assert err.endswith("Interrupted. The next call goes on from here.\n")
    assert "Traceback" not in err
    assert not (ready / ".venv" / "candor-setup.json").exists()


def test_a_second_launch_waits_for_the_lock(ready):
    (ready / ".venv" / "candor-setup.json").unlink()
    with (ready / ".venv" / "candor-setup.lock").open("a+") as handle:
        assert launch.locked(handle.fileno())
        process = start(ready)
        assert process.stderr is not None
        assert "waiting" in process.stderr.readline()
        time.sleep(0.5)
        assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 3


def test_without_set_up_it_runs_in_the_calling_python(tmp_path):
    folder = project(tmp_path / "candor")
    lacking = call(folder, "--no-setup", "run")
    assert lacking.status == 1
    assert "no package tiny" in lacking.err

    (folder / "tiny.py").write_text("VERSION = 7")
    here = call(folder, "--no-setup", "run")
    assert json.loads(here.out)[:3] == [["run"], 7, sys.prefix]
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize(("word", "status"), [("doctor", 1), ("--help", 0)])
def test_doctor_and_help_install_nothing(tmp_path, word, status):
    folder = project(tmp_path / "candor")
    told = call(folder, word)
    assert told.status == status
    assert ("has not been run yet" if word == "doctor" else "--index-url URL") in told.out
    assert not (folder / ".venv").exists()


def test_an_option_without_its_value_is_bad_usage(tmp_path):
    assert call(project(tmp_path / "candor"), "--index-url").status == 2


# What is missing is named before anything is made


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """launch.py as a module, working in an empty project."""
    folder = project(tmp_path / "candor")
    monkeypatch.setattr(launch, "ROOT", folder)
    monkeypatch.setattr(launch, "VENV", folder / ".venv")
    monkeypatch.setattr(launch, "PYTHON", folder / ".venv" / "bin" / "python")
    return folder


def test_a_folder_that_cannot_be_written_is_a_sentence(bare, monkeypatch):
    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied" in refusal(bare) and ".venv" in refusal(bare)


def refusal(bare: Path) -> str:
    with pytest.raises(launch.SetupError) as refused:
        launch.main([])
    assert not (bare / ".venv").exists()
    return str(refused.value)


def python_on_path(folder: Path, name: str, version: str, monkeypatch) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho {version}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 10, 1), (3, 14, 0)])
def test_wrong_python_names_both_and_the_right_one(bare, monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    python_on_path(bare, "python3.12", "3 12 1", monkeypatch)
    said = refusal(bare)
    assert "3.11, 3.12 or 3.13" in said and ".".join(map(str, version)) in said
    assert "`python3.12 launch.py`" in said


def test_a_python_that_only_has_the_name_is_not_offered(bare, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    python_on_path(bare, "python3.13", "none of your business", monkeypatch)
    assert "python3.13" not in refusal(bare)


def test_missing_ensurepip_names_the_package(bare, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ensurepip" else real(name)
    )
    assert "sudo apt install python{}.{}-venv".format(*sys.version_info) in refusal(bare)


def test_a_full_disk_says_how_much_it_needs_and_has(bare, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.2e9))
    said = refusal(bare)
    assert "needs 3 GB" in said and "1.2 GB" in said


@pytest.mark.parametrize(
    ("line", "status", "sentence"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", 1, "The disk is full"),
        ("ERROR: ResolutionImpossible: see dependency resolution", 1, "could not install"),
        ("WARNING: NewConnectionError: [Errno -3] name resolution", 1, "could not be reached"),
        ("Collecting torch", -9, "ended by signal 9"),
    ],
)
def test_each_failure_of_pip_gets_its_own_sentence(line, status, sentence):
    assert sentence in launch.explained([line], status)


def test_an_old_python_can_read_the_file_to_the_end():
    """Syntax of 3.6, and no annotation that an old Python could not evaluate."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    notes = [function.returns for function in functions]
    notes += [arg.annotation for function in functions for arg in function.args.args]
    assert len(notes) > 20
    assert all(isinstance(note, ast.Name | ast.Attribute | ast.Constant) for note in notes)
