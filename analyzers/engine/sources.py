"""Where models come from: built-ins, folders, GGUF files, and the Hugging Face hub.

`resolve` turns a reference into files on this disk and fetches what is missing; `find` only looks;
`listed` is what a picker offers. A hub reference is "org/name", or "org/name/file.gguf" for one
file of a repository of GGUFs. A path that exists comes before a hub model of the same spelling.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from analyzers.engine import builtin
from analyzers.errors import CandorError, ModelError, ModelNotFound, ModelUnsafe
from analyzers.home import models_folder

Progress = Callable[[str, float], None]
Kind = Literal["builtin", "folder", "gguf", "hub"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<gguf>[\w.-]+\.gguf))?", re.ASCII)
# What transformers opens of a repository, and nothing else: other copies of the weights stay there.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SINGLE, "model-*.safetensors")
TEXTS = (
    "config.json", "generation_config.json", INDEX, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "tekken.json", "chat_template*",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model's files on this disk. ref: as it was asked for; gguf: the file in `folder`."""

    ref: str
    folder: Path
    gguf: str | None
    kind: Kind

    @property
    def weights(self) -> list[Path]:
        """The files that are loaded, sorted by name; without other copies that lie beside them."""
        return [self.folder / self.gguf] if self.gguf else _weights(self.folder)


@dataclass(frozen=True)
class Listed:
    """A model to pick. size: bytes on disk when ready, else bytes to download (0: it is made from
    what is here); about: a sentence on what it is, where there is something to know."""

    ref: str
    title: str
    kind: Kind
    ready: bool
    size: int
    about: str = ""


def resolve(
    ref: str, progress: Progress = lambda what, share: None, remote_code: bool = False
) -> Source:
    """The model's files, fetched where they are missing. progress(what, share of 1); what it
    raises ends the work. remote_code: fetch a hub model's own code as well.

    Raises: ModelNotFound, ModelUnsafe, ModelBroken, ModelError (no room on the disk).
    """
    if found := find(ref, remote_code):
        return found
    if ref in builtin.MODELS:
        return Source(ref, builtin.ensure(ref, models_folder(), progress), None, "builtin")
    if named := HUB.fullmatch(ref):
        return _fetch(ref, named["repo"], named["gguf"], progress, remote_code)
    raise ModelNotFound(f"There is no model {ref[:200]!r}: {_choices()}.")


def find(ref: str, remote_code: bool = False) -> Source | None:
    """The model's files if all of them are on this disk already; asks no network.

    Raises: ModelNotFound, ModelUnsafe for a folder that is no model.
    """
    if ref in builtin.MODELS:
        ready = [each for each in builtin.cached(models_folder()) if each.name == ref]
        intact = ready and ready[0].intact
        return Source(ref, ready[0].folder, None, "builtin") if intact else None
    with suppress(OSError, RuntimeError, ValueError):  # no path at all, or the home of nobody
        path = Path(ref).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return Source(ref, path.parent, path.name, "gguf")
        if path.is_dir():
            _check_folder(path)
            return Source(ref, path, None, "folder")
    if named := HUB.fullmatch(ref):
        return _cached(ref, named["repo"], named["gguf"], remote_code)
    return None


def listed() -> list[Listed]:
    """The built-ins, then what the Hugging Face cache has whole; by title."""
    folder = models_folder()
    ready = {each.name: each.size for each in builtin.cached(folder) if each.intact}
    found = []
    for name, model in builtin.MODELS.items():
        size = ready.get(name, model.download)
        if isinstance(model, builtin.Carved) and name not in ready and model.made_from in ready:
            size = 0
        about = builtin.about(name, folder)
        found.append(Listed(name, model.title, "builtin", name in ready, size, about))
    return found + sorted(_listed_cache(), key=lambda each: each.title.lower())


def _choices() -> str:
    return (
        f"give a built-in name ({', '.join(builtin.MODELS)}), a folder with a config.json and "
        "safetensors, a .gguf file, or a model on the Hugging Face hub as org/name"
    )


# Folders


def _weights(folder: Path) -> list[Path]:
    """As transformers chooses them: one file, else those that the index names."""
    single, index = folder / SINGLE, folder / INDEX
    if not single.is_file() and index.is_file():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / Path(name).name for name in sorted(set(shards))]
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _check_folder(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"The folder {folder} has weights but no config.json.")
        return
    if pickled := _pickles(path.name for path in folder.iterdir()):
        raise ModelUnsafe(
            f"The folder {folder} has only pickled weights ({pickled[0]}); loading them could run "
            "any code. Convert them to safetensors first."
        )
    raise ModelNotFound(f"The folder {folder} has no weights: no .safetensors file is in it.")


def _pickles(names: Iterator[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES)]


# The Hugging Face cache


def _cached(ref: str, repo: str, gguf: str | None, remote_code: bool) -> Source | None:
    """From the snapshot that the cache calls "main", when everything is there."""
    try:
        # Only asks where it lies: what is whole is decided below, by what will be opened.
        at = hub.snapshot_download(
            repo,
            cache_dir=constants.HF_HUB_CACHE,
            allow_patterns=gguf or "config.json",
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    folder = Path(at)
    if gguf:
        return Source(ref, folder, gguf, "hub") if (folder / gguf).is_file() else None
    if _is_whole(folder):
        lacks_code = remote_code and _has_code(folder) and not any(folder.glob("*.py"))
        return None if lacks_code else Source(ref, folder, None, "hub")
    only = sorted(folder.glob("*.gguf"))
    return Source(ref, folder, only[0].name, "hub") if len(only) == 1 else None


def _is_whole(snapshot: Path) -> bool:
    """A download that was stopped leaves a snapshot with some of the files."""
    listed = any((snapshot / name).is_file() for name in (SINGLE, INDEX))
    weights = _weights(snapshot)
    return (
        (snapshot / "config.json").is_file()
        and listed
        and bool(weights)
        and all(path.is_file() for path in weights)
    )


def _has_code(snapshot: Path) -> bool:
    return "auto_map" in (snapshot / "config.json").read_text(encoding="utf-8")


def _listed_cache() -> Iterator[Listed]:
    """A cache that is missing or damaged has nothing to pick; a damaged model in it is left out."""
    try:
        scanned = hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError, OSError):
        return
    for repo in scanned.repos:
        for revision in repo.revisions:
            if "main" in revision.refs and repo.repo_type == "model" and "/" in repo.repo_id:
                yield from _listed_snapshot(repo.repo_id, revision.snapshot_path)


def _listed_snapshot(repo: str, snapshot: Path) -> Iterator[Listed]:
    if _is_whole(snapshot):
        size = sum(path.stat().st_size for path in _weights(snapshot))
        yield Listed(repo, repo, "hub", True, size)
    for path in snapshot.glob("*.gguf"):
        ref = f"{repo}/{path.name}"
        yield Listed(ref, f"{repo} · {path.name}", "hub", True, path.stat().st_size)


# The hub itself


def _fetch(ref: str, repo: str, gguf: str | None, progress: Progress, remote_code: bool) -> Source:
    """Download what is loaded, texts first; what has arrived stays in the cache for a next try."""
    progress(f"Looking for {repo} on the Hugging Face hub", 0.0)
    with _as_sentence(repo):
        info = hub.HfApi().model_info(repo, files_metadata=True, timeout=10)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        wanted = _wanted(repo, list(sizes), gguf, remote_code)
        total, done = sum(sizes[name] for name in wanted) or 1, 0
        for name in wanted:
            what = f"Fetching {repo}, {total / 1e9:.2f} GB: {name}"
            progress(what, done / total)
            bar = _bar(partial(_tell, progress, what, done, total))
            hub.hf_hub_download(repo, name, cache_dir=constants.HF_HUB_CACHE, tqdm_class=bar)
            done += sizes[name]
    if found := _cached(ref, repo, gguf or _only_gguf(wanted), remote_code):
        return found
    raise ModelNotFound(f"The model {repo} is not whole on the Hugging Face hub: weights missing.")


def _wanted(repo: str, names: Sequence[str], gguf: str | None, remote_code: bool) -> list[str]:
    """The files to download. Raises: ModelNotFound, ModelUnsafe when there is nothing to load."""
    top = [name for name in names if "/" not in name]
    ggufs = [name for name in top if name.endswith(".gguf")]
    if gguf:
        if gguf not in ggufs:
            raise ModelNotFound(f"The hub's {repo} has no file {gguf}; {_named(ggufs)}.")
        return [gguf]
    weights = [name for name in top if any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    if weights:
        texts = [*TEXTS, *(["*.py"] if remote_code else [])]
        return [name for name in top if any(fnmatch(name, each) for each in texts)] + weights
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelNotFound(f"The hub's {repo} has several GGUF files; {_named(ggufs)}.")
    if pickled := _pickles(iter(top)):
        raise ModelUnsafe(
            f"The hub's {repo} has only pickled weights ({pickled[0]}); loading them could run any "
            "code. Nothing was downloaded; look for a copy in safetensors."
        )
    raise ModelNotFound(f"The hub's {repo} has no weights in safetensors or GGUF.")


def _only_gguf(wanted: Sequence[str]) -> str | None:
    return wanted[0] if wanted[0].endswith(".gguf") else None


def _named(ggufs: Sequence[str]) -> str:
    some = ", ".join(ggufs[:6]) + (", …" if len(ggufs) > 6 else "")
    return f"ask for one as org/name/file.gguf: {some or 'there is none'}"


def _tell(progress: Progress, what: str, done: int, total: int, more: int) -> None:
    progress(what, min(1.0, (done + more) / total))


def _bar(tell: Callable[[int], None]) -> type[tqdm]:
    """A progress bar for one file that shows nothing and tells the bytes so far; what `tell` raises
    ends the download."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.so_far = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.so_far += int(n or 0)
            tell(self.so_far)

    return Bar


@contextmanager
def _as_sentence(repo: str) -> Iterator[None]:
    """Whatever the hub's client raises becomes one sentence that says what was tried."""
    tried = f"The model {repo} is not in the Hugging Face cache, and "
    try:
        yield
    except CandorError:
        raise
    except OfflineModeIsEnabled as error:
        raise ModelNotFound(
            f"{tried}HF_HUB_OFFLINE forbids to ask the hub: {_choices()}."
        ) from error
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{tried}the hub gives it only to those who accepted its terms: accept them on the "
            "model's page, then log in on this computer with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"{tried}the hub has no public model of that name: {_choices()}."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise ModelError(
                f"{repo} could not be stored in {constants.HF_HUB_CACHE} ({error.strerror}): "
                "make room there, or set HF_HOME to a folder that can be written."
            ) from error
        raise ModelNotFound(_unanswered(tried, error)) from error
    except Exception as error:
        raise ModelNotFound(_unanswered(tried, error)) from error


def _unanswered(tried: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    return f"{tried}the hub does not answer ({said}): connect once, or {_choices()}."
