"""From a name, a folder or a GGUF file to an Engine."""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from analyzers.engine import builtin
from analyzers.engine.core import Engine
from analyzers.errors import BadInput, CandorError, ModelBroken, ModelNotFound, ModelUnsafe
from analyzers.home import models_folder

DEFAULT = "smollm2-135m"
Progress = Callable[[str, float], None]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load(
    ref: str = DEFAULT,
    *,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = lambda what, share: None,
) -> Engine:
    """An Engine for a built-in name, a folder with safetensors, or a .gguf file.

    dtype "auto": bfloat16 on a GPU, float32 on the CPU. progress(what, share of 1) while it loads.
    Raises: ModelNotFound, ModelUnsafe, ModelBroken, ModelUnfit, BadInput; nothing stays in memory.
    """
    if quantization != "none":
        raise BadInput(f"Quantization {quantization!r} is not available; available: none.")
    where = _device(device)
    kind = _dtype(dtype, where)
    folder, gguf = _resolve(ref, progress)
    progress(f"Loading {ref}", 0.0)
    with _quiet(), _as_sentence(ref):
        # Without the first, transformers asks on the console whether to run a model's own code.
        extra: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        extra |= {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
        _check_whole(ref, sorted(found["missing_keys"]))
        model.to(where)
    progress(f"Loading {ref}", 1.0)
    return Engine(
        model,
        tokenizer,
        {
            "name": ref,
            "hash": _hash(folder, gguf),
            "quantization": quantization,
            "dtype": str(kind).removeprefix("torch."),
            "device": str(where),
            "parameters": model.num_parameters(),
        },
    )


def _resolve(ref: str, progress: Progress) -> tuple[Path, str | None]:
    """The folder with the model, and the file in it where that is a GGUF."""
    if ref in builtin.MODELS:
        return builtin.ensure(ref, models_folder(), progress), None
    with suppress(OSError, RuntimeError):  # too long for a path, or the home of nobody
        path = Path(ref).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return path.parent, path.name
        if path.is_dir():
            _check_folder(path)
            return path, None
    raise ModelNotFound(
        f"There is no model {ref[:200]!r}: give a built-in name ({', '.join(builtin.MODELS)}), "
        "a folder with a config.json and safetensors, or a .gguf file."
    )


def _check_folder(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"The folder {folder} has weights but no config.json.")
        return
    if pickled := [path.name for pattern in PICKLES for path in folder.glob(pattern)]:
        raise ModelUnsafe(
            f"The folder {folder} has only pickled weights ({pickled[0]}); loading them could run "
            "any code. Convert them to safetensors first."
        )
    raise ModelNotFound(f"The folder {folder} has no weights: no .safetensors file is in it.")


def _check_whole(ref: str, missing: list[str]) -> None:
    """transformers fills what is missing with random numbers."""
    if missing:
        raise ModelBroken(
            f"The model {ref} is not whole: {len(missing)} of the weights its configuration asks "
            f"for are missing, the first is {missing[0]}."
        )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError):
        raise BadInput(f"The device {device!r} is not available here.") from None


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    known = {
        "auto": torch.float32 if device.type == "cpu" else torch.bfloat16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype not in known:
        raise BadInput(f"The dtype must be one of {', '.join(known)}, not {dtype!r}.")
    return known[dtype]


def _hash(folder: Path, gguf: str | None) -> str:
    """SHA-256 over the weight files; from the manifest where the weights were made here."""
    manifest = folder / builtin.MANIFEST
    if gguf is None and manifest.is_file():
        return str(json.loads(manifest.read_text())["sha256"])
    digest = hashlib.sha256()
    for path in [folder / gguf] if gguf else sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _as_sentence(ref: str) -> Iterator[None]:
    """Whatever the libraries raise on a damaged or unknown file becomes one sentence."""
    try:
        yield
    except CandorError:
        raise
    except Exception as error:
        logging.getLogger(__name__).info("loading %s failed", ref, exc_info=True)
        if "custom code" in str(error):
            raise ModelUnsafe(
                f"The model {ref} cannot be loaded without running code that comes with it; "
                "only architectures that transformers itself knows are loaded."
            ) from error
        raise ModelBroken(
            f"The model {ref} could not be read ({_first_line(error)}): "
            "its files are damaged or of an unknown kind."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice of the libraries on the console while loading."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
