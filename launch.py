#!/usr/bin/env python3
"""Candor: sets itself up once, then starts.

  python3 launch.py                  open the page (its options: --port, --host, --no-browser)
  python3 launch.py run METHOD ...   work without a page; so do methods, history, export,
                                     import and bench
  python3 launch.py test ...         run all tests (what follows goes to pytest)
  python3 launch.py doctor           what is installed, what works here, what is wrong

  --no-setup         install nothing: use the Python this command is called with
  --index-url URL    a package index to use besides your usual one (or CANDOR_INDEX_URL), such as
                     PyTorch's builds without CUDA: https://download.pytorch.org/whl/cpu

The set-up fills the folder .venv beside this file; delete it to start over.
"""

# Only the standard library, and only syntax and annotations that Python 3.6 accepts: this file
# has to run on whatever `python3` is, to say which one is needed.
import csv
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator  # noqa: UP035  (collections.abc has no [...] before 3.9)

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "candor-setup.json"  # written last: without it the set-up is not finished
LOCK = VENV / "candor-setup.lock"
DOWNLOADS = VENV / "candor-downloads"  # pip's temporary files, so that an interrupted one leaves
# them here and not in /tmp (often too small for torch), and so that they can be watched growing
OLDEST, NEWEST = (3, 11), (3, 13)
NEED_GB = 3  # environment 1.7, downloads 0.4, default model 0.7 while it is converted
NEED_GB_CUDA = 10
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """Its text is for the user: one sentence with the cure, perhaps what pip said below."""


def main(argv: list) -> int:
    """Set up if needed and hand over to the app in the environment; its exit status is ours."""
    argv, here, index = options(argv)
    if index:
        os.environ["CANDOR_INDEX_URL"] = index  # fetching the default model reads it, too
    command = argv[0] if argv else ""
    if here:
        return run_here(argv)
    dev = command == "test"
    reason = unready(dev)
    if command in ("-h", "--help"):
        print(__doc__, flush=True)
        if reason:
            return 0
    elif reason and command == "doctor":
        return doctor(reason)
    elif reason:
        try:
            set_up(dev, index, reason)
        except OSError as error:
            raise SetupError(f"The set-up could not go on: {error}.") from None
        except KeyboardInterrupt:
            say("Interrupted. The next call goes on from here.")
            return 130
    call = [str(PYTHON), str(ROOT / "launch.py"), "--no-setup", *argv]
    if os.name == "nt":  # there, exec returns to the shell before the program ends
        return subprocess.call(call)
    os.execv(call[0], call)
    return 1  # not reached


def options(argv: list) -> tuple:
    """Take our two options out of the arguments: (the other arguments, --no-setup?, index)."""
    rest, here, index = [], False, os.environ.get("CANDOR_INDEX_URL", "")
    words = iter(argv)
    for word in words:
        if word == "--no-setup":
            here = True
        elif word == "--index-url":
            index = next(words, "")
            if not index:
                say("--index-url needs an address after it, such as " + CPU_INDEX)
                sys.exit(2)
        elif word.startswith("--index-url="):
            index = word.split("=", 1)[1]
        else:
            rest.append(word)
    return rest, here, index


def run_here(argv: list) -> int:
    """Run the app, or pytest for `test`, in the Python that is running now."""
    try:
        if argv[:1] == ["test"]:
            import pytest

            os.chdir(str(ROOT))
            return int(pytest.main(argv[1:]))
        from app.cli import main as app_main

        return int(app_main(argv) or 0)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if (ROOT / name).is_dir():  # a module of ours: a mistake, not a missing package
            raise
        lacks = f"{sys.executable} has no package {name}"
        if argv[:1] == ["doctor"]:
            return doctor(lacks)
        cure = "delete the folder .venv and call again"
        if Path(sys.prefix) != VENV:
            cure = "install requirements.txt into it, or call without --no-setup"
        raise SetupError(f"{lacks}: {cure}.") from None


# --- Is there anything to do? This runs at every start, so it reads two files and starts one
# --- bare interpreter (10 ms), which is what notices a Python that was removed or replaced.


def unready(dev: bool) -> str:
    """Why the environment cannot be used as it is, in words; empty when it can."""
    if not VENV.is_dir():
        return "the set-up has not been run yet"
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "the set-up has not been finished"
    version = version_of(str(PYTHON))
    if not version:
        return "the environment's Python does not start"
    if version[:2] != tuple(stamp["python"][:2]):
        return "the environment's Python has been replaced by another version"
    if stamp["requirements"] != digest(dev=False):
        return "requirements.txt has changed since the set-up"
    if dev and stamp["dev"] != digest(dev=True):
        return "the test tools are not installed yet, or have changed"
    return ""


def digest(dev: bool) -> str:
    """SHA-256 over the requirements files that count."""
    names = ["requirements.txt", "requirements-dev.txt"][: 1 + dev]
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def version_of(python: str) -> tuple:
    """(major, minor, micro) of another Python; empty if it does not start."""
    ask = [python, "-I", "-S", "-c", "import sys; print(*sys.version_info[:3])"]
    try:
        answer = subprocess.check_output(ask, stderr=subprocess.DEVNULL, timeout=20)
        return tuple(int(part) for part in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


# --- Setting up.


def set_up(dev: bool, index: str, reason: str) -> None:
    """Make or repair `.venv`; raises SetupError. Whatever interrupts it, the next call repairs."""
    if not version_of(str(PYTHON)):
        check_machine()
    VENV.mkdir(exist_ok=True)
    with only_one() as lock:
        if not unready(dev):
            return  # another launch did it while this one waited
        say(f"Setting up Candor in {VENV} ({reason}).")
        if STAMP.exists():
            STAMP.unlink()
        if usable():
            say("Installing what is missing or has changed.")
        else:
            check_machine()
            make_environment()
            say(announcement(index))
        install(dev, index, lock)
        stamp = {
            "python": version_of(str(PYTHON)),
            "requirements": digest(dev=False),
            "dev": digest(dev=True) if dev else None,
        }
        unfinished = STAMP.with_suffix(".part")
        unfinished.write_text(json.dumps(stamp), encoding="utf-8")
        unfinished.replace(STAMP)
        say("Set-up finished.")


def check_machine() -> None:
    """Raise SetupError naming the first thing missing for an environment to be made."""
    for _, text, ok in machine():
        if not ok:
            raise SetupError(text)


def machine() -> list:
    """What making an environment needs, as (topic, sentence, met)."""
    here = ".".join(map(str, sys.version_info[:3]))
    suited = OLDEST <= sys.version_info[:2] <= NEWEST
    python = f"{here} at {sys.executable}"
    if not suited:
        python = f"Candor needs Python 3.11, 3.12 or 3.13, and this is {here}: {other_python()}"
    short = "{}.{}".format(*sys.version_info[:2])
    complete = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
    tools = "venv and ensurepip are there"
    if not complete:
        tools = (
            f"This Python {short} lacks ensurepip, which makes environments: on Debian or Ubuntu "
            f"run `sudo apt install python{short}-venv`, then call again."
        )
    free = free_gb()
    disk = f"{free:.1f} GB free"
    if free < NEED_GB:
        disk = (
            f"The set-up needs {NEED_GB} GB of free disk space ({NEED_GB_CUDA} GB with CUDA), and "
            f"{ROOT} has {free:.1f} GB: make room, or move this folder to a larger disk."
        )
    return [("Python", python, suited), ("Tools", tools, complete), ("Disk", disk, free >= NEED_GB)]


def free_gb() -> float:
    """Free disk space where the environment goes, in GB (1e9 bytes)."""
    return shutil.disk_usage(str(ROOT)).free / 1e9


def other_python() -> str:
    """How to call this file with a Python that suits, if the PATH has one that starts."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        name = f"python3.{minor}"
        if shutil.which(name) and version_of(name)[:2] == (3, minor):
            return f"call `{name} launch.py`."
    return "install one of them and call it by its name, such as `python3.12 launch.py`."


@contextmanager
def only_one() -> "Iterator[int]":
    """Wait until no other launch works on `.venv`; yields the descriptor that holds the lock."""
    with LOCK.open("a+") as handle:
        told = False
        while not locked(handle.fileno()):
            if not told:
                say("Another set-up is at work in this folder; waiting until it has finished.")
            told = True
            time.sleep(0.3)
        yield handle.fileno()


def locked(descriptor: int) -> bool:
    """Try to lock an open file; the system lets go of it when the last holder ends or dies."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def usable() -> bool:
    """Whether an existing environment can be completed: Python starts, pip and packages are whole.

    A pip that was killed while it wrote leaves a package without its RECORD, or with a RECORD
    that names missing files; pip itself would take such a package for installed.
    """
    if not OLDEST <= version_of(str(PYTHON))[:2] <= NEWEST:
        return False
    if not packages("pip-*.dist-info"):
        return False
    for info in packages("*.dist-info"):
        try:
            lines = (info / "RECORD").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        if not all((info.parent / row[0]).exists() for row in csv.reader(lines) if row):
            return False
    return True


def packages(pattern: str) -> list:
    """Files that match inside the environment's site-packages."""
    folder = "Lib" if os.name == "nt" else "lib/python*"
    return list(VENV.glob(f"{folder}/site-packages/{pattern}"))


def make_environment() -> None:
    """Empty `.venv` but for the lock, and make a new environment in it."""
    say("Making the environment.")
    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(str(entry))
        elif entry != LOCK:
            entry.unlink()
    # From inside an environment (perhaps the one just emptied), its base Python makes the new one.
    base = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run(
        [base, "-I", "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if made.returncode != 0:
        lines = made.stdout.decode(errors="replace").strip().splitlines()
        raise SetupError("The environment could not be made; venv says:" + quoted(lines[-8:]))


def announcement(index: str) -> str:
    """How much is about to be downloaded, as far as can be known before."""
    if index or sys.platform != "linux":
        return "Downloading about 0.4 GB of packages (less if pip has them already)."
    return (
        "Downloading about 0.4 GB of packages if your index has PyTorch's CPU build, several GB\n"
        f"(about {NEED_GB_CUDA} GB on disk) for the CUDA build that PyPI has for Linux. Without an "
        "NVIDIA GPU,\ntake the CPU build: stop with Ctrl+C and call "
        f"`python3 launch.py --index-url {CPU_INDEX}`."
    )


def install(dev: bool, index: str, lock: int) -> None:
    """Run pip with the user's own configuration and show how far it is; raises SetupError."""
    shutil.rmtree(str(DOWNLOADS), ignore_errors=True)
    DOWNLOADS.mkdir()
    listed = ROOT / ("requirements-dev.txt" if dev else "requirements.txt")
    call = [str(PYTHON), "-I", "-u", "-m", "pip", "install", "--progress-bar", "off"]
    call += ["--disable-pip-version-check", "-r", str(listed)]
    call += ["--extra-index-url", index] if index else []
    temporary = {name: str(DOWNLOADS) for name in ("TMPDIR", "TEMP", "TMP")}
    environment = {**os.environ, **temporary, "PIP_USER": "0"}  # a venv refuses `--user`
    pip = subprocess.Popen(
        call,
        cwd=str(ROOT),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=() if os.name == "nt" else (lock,),  # a pip that outlives us keeps the lock
    )
    try:
        said = follow(pip)
    finally:
        if pip.poll() is None:  # Ctrl+C reached pip, too: it cleans up after itself
            try:
                pip.wait(10)
            except subprocess.TimeoutExpired:
                pip.kill()
        shutil.rmtree(str(DOWNLOADS), ignore_errors=True)
    if pip.returncode != 0:
        raise SetupError(explained(said, pip.returncode))


def follow(pip: "subprocess.Popen") -> list:
    """Show pip's work, a line for a download or phase; returns the last lines it wrote."""
    lines = queue.Queue()  # type: queue.Queue

    def read() -> None:
        for line in pip.stdout:  # type: ignore[union-attr]
            lines.put(line.decode(errors="replace").rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    tail = deque(maxlen=60)  # type: deque
    phase, size, before = "looking up packages", 0.0, 0.0  # megabytes, later packages
    began = time.time()
    show(phase)
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if phase.startswith("installing"):
                done = sum(p.stat().st_mtime >= began for p in packages("*.dist-info/RECORD"))
            else:
                done = fetched_mb() - before
            if size:
                show(phase, min(done / size, 1.0))
            continue
        if line is None:
            finish_line()
            pip.wait()
            return list(tail)
        tail.append(line)
        download = re.match(
            r"\s*Downloading (?:\S*/)?(\w[\w.]*?)-(\d[^-]*?)(?:-\S+|\.tar\.gz|\.zip) "
            r"\(([\d.]+) ([kMG]?)B\)",
            line,
        )
        if download and ".metadata " not in line:
            name, version, number, unit = download.groups()
            size = float(number) * {"": 1e-6, "k": 1e-3, "M": 1, "G": 1e3}[unit]
            if size < 1:  # dozens of these pass in a moment
                continue
            phase, before = f"{name} {version}, {number} {unit}B", fetched_mb()
        elif line.startswith("Installing collected packages:"):
            size = 1.0 + line.count(",")
            phase = f"installing {size:.0f} packages"
        else:
            continue
        finish_line()
        show(phase)


def fetched_mb() -> float:
    """Megabytes that pip has put into its temporary folder so far."""
    total = 0
    with suppress(OSError):  # pip deletes files meanwhile; the next look will be whole again
        for path in DOWNLOADS.rglob("*"):
            total += path.stat().st_size
    return total / 1e6


NO_NETWORK = (
    "ConnectionError|Connection (?:broken|refused|reset|aborted)|name resolution|getaddrinfo|"
    "unreachable|[Tt]imed out|ProxyError|SSLError|IncompleteRead"
)


def explained(said: list, status: int) -> str:
    """One sentence for why pip failed and what would help, then its last lines."""
    if status < 0:
        return f"pip was ended by signal {-status}: call again, the set-up goes on from here."
    text = "\n".join(said)
    again = "call again, or name another package index with --index-url URL"
    if "No space left" in text or "not enough space" in text:
        return f"The disk is full ({free_gb():.1f} GB free): make room and call again."
    if re.search(NO_NETWORK, text):
        what = (
            f"The package index could not be reached: connect and {again}. (This is needed once; "
            "the model itself can be one you already have: --model FOLDER.)"
        )
    elif "No matching distribution" in text:
        what = f"The package index lacks a package for this computer and Python: {again}."
    else:
        what = f"pip could not install the packages: {again}."
    errors = [line for line in said if line.startswith("ERROR")]
    return what + " pip says:" + quoted((errors or said)[-6:])


def doctor(reason: str) -> int:
    """What can be told without the app: the machine, and what is still to be set up."""
    rows = [*machine(), ("Set-up", f"{reason}: call `python3 launch.py`", False)]
    for topic, text, ok in rows:
        print(f"{'ok' if ok else 'no':3} {topic:8} {text}")
    return 1


def quoted(lines: list) -> str:
    return "".join("\n    " + line.strip()[:300] for line in lines)


# --- Progress goes to stderr: with `run --json`, stdout belongs to the events.


def say(text: str) -> None:
    finish_line()
    print(text, file=sys.stderr, flush=True)


_line_open = False


def show(phase: str, share: float = 0.0) -> None:
    """A phase and how much of it is done; on a terminal this overwrites its own line."""
    global _line_open
    if sys.stderr.isatty():
        text = f"  {phase}: {share:.0%}" if share else f"  {phase}"
        print("\r" + text.ljust(78), end="", file=sys.stderr, flush=True)
        _line_open = True
    elif not share:
        print("  " + phase, file=sys.stderr, flush=True)


def finish_line() -> None:
    global _line_open
    if _line_open:
        print(file=sys.stderr)
    _line_open = False


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as problem:
        say(str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
