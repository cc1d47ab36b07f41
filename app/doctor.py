"""What is installed, what works on this machine, where the data is, and what is wrong.

Every topic is examined on its own, so that a broken part never hides the others.
"""

import os
import platform
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from analyzers.home import database_path, models_folder

if TYPE_CHECKING:
    import torch

Row = tuple[str, str, bool | None]
Findings = Iterator[tuple[str, bool | None]]

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
PORT = 7860
ENOUGH_MEMORY = 2e9  # bytes; converting the default model takes 1.5 GB, running it less
ENOUGH_DISK = 1e9  # bytes; fetching the default model takes 0.8 GB, a run a few kB to MB


def main() -> tuple[str, int]:
    """The report as text, and the exit status: 0 when nothing is wrong, else 1."""
    rows = report()
    return render(rows), int(any(ok is False for _, _, ok in rows))


def report() -> list[Row]:
    """(topic, text, ok) in reading order; ok is None for what is neither right nor wrong.

    Where ok is False, the text is a sentence with the cure. Never raises, changes nothing on disk,
    and takes the few seconds that importing torch takes.
    """
    looks = {
        "Python": _python,
        "Set-up": _setup,
        "Package": _packages,
        "Device": _devices,
        "Model": _models,
        "Memory": _memory,
        "Disk": _disk,
        "Runs": _runs,
        "Port": _port,
    }
    rows: list[Row] = []
    for topic, look in looks.items():
        try:
            rows.extend((topic, text, ok) for text, ok in look())
        except Exception as error:  # noqa: BLE001  (what a doctor trips over is a finding)
            rows.append((topic, f"could not be examined: {type(error).__name__}: {error}", False))
    return rows


def render(rows: list[Row]) -> str:
    """A line a row: `ok`, `no` or blank, the topic where a new one begins, the text."""
    marks = {True: "ok", False: "no", None: ""}
    lines, before = [], ""
    for topic, text, ok in rows:
        lines.append(f"{marks[ok]:3} {'' if topic == before else topic:8} {text}")
        before = topic
    wrong = sum(ok is False for _, _, ok in rows)
    found = f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong, see the lines with no."
    return "\n".join([*lines, found if wrong else "Nothing is wrong."])


def _python() -> Findings:
    yield f"{platform.python_version()} on {platform.system()} {platform.machine()}", True


def _setup() -> Findings:
    import launch

    reason = launch.unready(dev=False)
    if not reason:
        yield f"finished, in {launch.VENV}", True
    else:  # not wrong by itself: this Python runs, and the packages below tell the rest
        yield f"{reason}: call `python3 launch.py`, or go on with --no-setup", None


def _packages() -> Findings:
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("#")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{name} {version} is missing: call `python3 launch.py` to install it.", False
            continue
        if found.partition("+")[0] == version:  # 2.13.0+cpu is a build of 2.13.0
            yield f"{name} {found}", True
        else:
            cure = "call `python3 launch.py` without --no-setup."
            yield f"{name} is {found} where {version} is pinned: {cure}", False


def _devices() -> Findings:
    import torch

    here = {"cpu": f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        here[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        here["mps"] = "the GPU of this Mac"
    for name, about in here.items():
        faults = {
            str(dtype).removeprefix("torch."): _fault(torch.device(name), dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        good = ", ".join(dtype for dtype, fault in faults.items() if not fault)
        yield f"{name} ({about}): {good or 'no dtype'} works", bool(good)
        for dtype, fault in faults.items():
            if fault:  # float32 is needed everywhere; a half precision less only narrows the choice
                wrong = False if dtype == "float32" else None
                yield (
                    f"{name} cannot do {dtype} ({fault}): choose another --dtype or device.",
                    wrong,
                )
    if len(here) == 1:
        yield "no GPU that this build of torch can use, so everything runs on the CPU", None
    from analyzers.engine.quantization import QUANTIZATIONS

    yield f"quantizations: {', '.join(QUANTIZATIONS)}", None


def _fault(device: "torch.device", dtype: "torch.dtype") -> str:
    """What goes wrong in a tiny matrix product; empty when it comes out right."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        right = bool(((ones @ ones).float() == 8).all())
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return "" if right else "the result is wrong"


def _models() -> Findings:
    folder = models_folder()
    if _writable(folder):
        yield f"models are kept in {folder}", True
    else:
        yield f"{folder} cannot be written: set CANDOR_HOME to a folder that can be.", False

    from analyzers.engine import builtin

    found = {model.name: model for model in builtin.cached(folder)}
    for name, model in builtin.MODELS.items():
        if name not in found:
            terms = f"; {model.terms}" if model.terms else ""
            first = f"downloads {model.download / 1e6:.0f} MB"
            if isinstance(model, builtin.Carved):
                first = f"makes it from {model.made_from}, in about a minute"
            elif isinstance(model, builtin.Trained):
                first = "trains it, in about a minute"
            yield f"{name} is not here yet; its first use {first}{terms}", None
        elif found[name].intact:
            yield f"{name}, {found[name].size / 1e6:.0f} MB, is ready", True
        else:
            yield f"{name} is damaged: use it once while connected, and it is fetched again.", False


def _memory() -> Findings:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available < ENOUGH_MEMORY:
        yield f"only {text}: close other programs before you load a model.", False
    else:
        yield text, True


def _disk() -> Findings:
    folders = [_existing(models_folder()), _existing(database_path().parent)]
    for folder in {folder.stat().st_dev: folder for folder in folders}.values():  # once a disk
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:.1f} GB free in {folder}"
        if free < ENOUGH_DISK:
            yield f"only {text}: make room, or set CANDOR_HOME to a larger disk.", False
        else:
            yield text, True


def _runs() -> Findings:
    path = database_path()
    if not path.exists():
        if _writable(path):
            yield f"none yet; they will be kept in {path}", True
        else:
            yield f"{path} cannot be made: set CANDOR_HOME to a folder that can be written.", False
        return

    from sessions.store import NEWEST

    size = sum(part.stat().st_size for part in path.parent.glob(path.name + "*"))  # with its WAL
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=2)) as db:
            count = db.execute("SELECT count(*) FROM runs").fetchone()[0]
            applied = "SELECT max(name) FROM _sqlite_migrations WHERE migration_set = 'candor'"
            newest = db.execute(applied).fetchone()[0]
    except sqlite3.Error as error:
        cure = "move it away to start with an empty one, or restore a copy of it."
        if "locked" in str(error):
            cure = "close the program that uses it."
        yield f"{path} cannot be read ({error}): {cure}", False
        return
    if newest and newest > NEWEST:  # steps are called m001_..., so names sort by age
        yield f"{path} was written by a newer Candor ({newest}): update this one.", False
    elif not _writable(path):
        yield f"{path} cannot be written: change its permissions, or set CANDOR_HOME.", False
    else:
        yield f"{count} recorded, {size / 1e6:.1f} MB, in {path}", True


def _port() -> Findings:
    with socket.socket() as probe:
        if os.name != "nt":  # there it would allow taking a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:  # not wrong: perhaps the page itself is running
            yield f"{PORT} is in use, by Candor or another program; --port takes another", None
        else:
            yield f"{PORT} is free for the page", True


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _writable(path: Path) -> bool:
    return os.access(_existing(path), os.W_OK)
