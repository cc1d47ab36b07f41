"""From a reference to an Engine: find the files, see that they fit, load, quantize, check."""

import hashlib
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from analyzers.engine import builtin, memory, quantization, sources
from analyzers.engine.adapters import attention_implementation
from analyzers.engine.core import Engine
from analyzers.engine.memory import BITSANDBYTES, DTYPES, Plan
from analyzers.engine.sources import Progress, Source
from analyzers.errors import CandorError, ModelBroken, ModelTooLarge, ModelUnfit, ModelUnsafe

DEFAULT = "smollm2-135m"
TOKENIZERS = (
    "tokenizer.json", "tokenizer*.model", "spiece.model", "vocab.*", "*.tiktoken", "tekken.json",
    "tokenization_*.py",
)  # fmt: skip

# The bar of this module is tqdm's own: it hears neither of the hook that follows the loading nor
# of the switch that silences bars. The wrapper that the rest of the library uses hears of both.
modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm


def load(
    ref: str = DEFAULT,
    *,
    quantization: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    double: bool = True,
    compute: str = "auto",
    remote_code: bool = False,
    progress: Progress = lambda what, share: None,
) -> Engine:
    """An Engine for a built-in name, a folder with safetensors, a .gguf file or a hub model.

    quantization, dtype, device: `memory.plan` decides what is "auto". double, compute: of nf4 and
    fp4, whether their scales are quantized as well, and the dtype of the products ("auto":
    bfloat16). remote_code: whether the model may bring code of its own. The identity also says how
    much stayed `unquantized` (share of the weights, by number), and what a `picture` is where the
    model writes pictures (as `digits.config` says). progress(what, share of 1) is called with every
    weight; a CandorError from it (a stop) ends the loading.

    Raises: BadInput, ModelNotFound, ModelUnsafe, ModelBroken, ModelTooLarge, ModelUnfit; nothing
    stays in memory.
    """
    memory.check_settings(quantization, dtype, device)
    memory.check_choice("compute", compute, ("auto", *DTYPES))
    products = DTYPES.get(compute, torch.bfloat16)
    try:
        source = sources.resolve(ref, progress, remote_code)
        plan = memory.plan(source, quantization, dtype, device, double)
        _check_files(source)
        memory.check(source, plan)
        return _load(source, plan, products, remote_code, progress)
    except BaseException as error:
        _forget(error)
        raise


def _load(
    source: Source, plan: Plan, products: torch.dtype, remote_code: bool, progress: Progress
) -> Engine:
    what = f"Loading {source.ref}"
    with _quiet(), _as_sentence(source.ref):
        progress(f"{what}: tokenizer", 0.0)
        safely = _safely(source, remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **safely)
        with _followed(lambda share: progress(f"{what}: weights", 0.05 + 0.65 * share)):
            model = _weights(source, plan, products, safely)
        parameters = model.num_parameters()  # before some of them become packed buffers
        if plan.quantization == "int8":
            _quantize(model, plan, lambda share: progress(f"{what}: int8", 0.7 + 0.2 * share))
    checksum = _hash(source, lambda: progress(f"{what}: checksum", 0.9))
    progress(f"{what}: checking", 0.95)
    identity = {
        "name": source.ref,
        "hash": checksum,
        "quantization": plan.quantization,
        "dtype": _name(plan.dtype),
        "device": "split" if plan.split else str(plan.device),
        "parameters": parameters,
    }
    if plan.quantization != "none":
        identity["unquantized"] = round(quantization.weights(model).unquantized, 4)
    if plan.quantization in ("nf4", "fp4"):
        identity |= {"double": plan.double, "compute": _name(products)}
    if any(type(each).__module__.startswith("transformers_modules") for each in (model, tokenizer)):
        identity["remote_code"] = True
    if picture := getattr(model.config, "picture", None):
        identity["picture"] = picture
    engine = _checked(model, tokenizer, identity)
    progress(what, 1.0)
    return engine


def _checked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: dict[str, Any]
) -> Engine:
    """Making an Engine runs the model for the first time."""
    try:
        return Engine(model, tokenizer, identity)
    except CandorError:
        raise
    except Exception as error:
        raise ModelUnfit(
            f"The model {identity['name']} does not run on {identity['device']} with quantization "
            f"{identity['quantization']} in {identity['dtype']} ({_first_line(error)})."
        ) from error


def _safely(source: Source, remote_code: bool) -> dict[str, Any]:
    # Without the first, transformers asks on the console whether to run a model's own code.
    safely = {"trust_remote_code": remote_code, "local_files_only": True}
    return safely | ({"gguf_file": source.gguf} if source.gguf else {})


def _weights(
    source: Source, plan: Plan, products: torch.dtype, safely: Mapping[str, Any]
) -> PreTrainedModel:
    extra: dict[str, Any] = {}
    if source.gguf:  # or a kernel for its blocks would be fetched where that is installed
        extra["quantization_config"] = GgufConfig(dequantize=True)
    elif plan.quantization in BITSANDBYTES:
        extra["quantization_config"] = quantization.bnb_config(
            plan.quantization, products, plan.double
        )
    config = AutoConfig.from_pretrained(source.folder, **safely)
    if not type(config).__module__.startswith("transformers_modules"):  # a known architecture
        extra["attn_implementation"] = attention_implementation(config)
    model, found = AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=plan.loads_as,
        device_map="auto" if plan.split else {"": str(plan.device)},
        use_safetensors=True,
        output_loading_info=True,
        **extra,
        **safely,
    )
    _check_whole(source.ref, sorted(found["missing_keys"]))
    return model


def _quantize(model: PreTrainedModel, plan: Plan, tell: Callable[[float], None]) -> None:
    quantization.quantize(model, lambda done, total: tell(done / total))
    model.to(plan.dtype)


def _check_files(source: Source) -> None:
    """What transformers would say in many words, or not at all."""
    if source.gguf:
        return
    if not any(any(source.folder.glob(pattern)) for pattern in TOKENIZERS):
        raise ModelBroken(
            f"The model {source.ref} has no tokenizer: no tokenizer.json is beside its weights."
        )
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelUnfit(
            f"The model {source.ref} is stored quantized already; take its original weights and "
            "choose a quantization here."
        )


def _check_whole(ref: str, missing: list[str]) -> None:
    """transformers fills what is missing with random numbers."""
    if missing:
        raise ModelBroken(
            f"The model {ref} is not whole: {len(missing)} of the weights its configuration asks "
            f"for are missing, the first is {missing[0]}."
        )


def _hash(source: Source, tick: Callable[[], None]) -> str:
    """SHA-256 over the digests of the weight files; from the manifest where they were made here."""
    manifest = source.folder / builtin.MANIFEST
    if source.gguf is None and manifest.is_file():
        return str(json.loads(manifest.read_text())["sha256"])
    whole = hashlib.sha256()
    for path in source.weights:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                tick()
                digest.update(block)
        whole.update(digest.digest())
    return whole.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _followed(tell: Callable[[float], None]) -> Iterator[None]:
    """Call `tell` with the share that is done before each weight that transformers puts in its
    place: it walks them under a progress bar, whose making can be hooked."""

    def bar(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _telling(args[0], tell) if args else make(*args, **kwargs)

    before = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _telling(items: Iterable[Any], tell: Callable[[float], None]) -> Iterator[Any]:
    every = list(items)
    for done, item in enumerate(every):
        tell(done / len(every))
        yield item


@contextmanager
def _as_sentence(ref: str) -> Iterator[None]:
    """Whatever the libraries raise on a damaged or unknown file becomes one sentence."""
    try:
        yield
    except CandorError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelTooLarge(
            f"The memory ran out while {ref} was loaded: unload other models, or choose a "
            "stronger quantization."
        ) from error
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


def _forget(error: BaseException | None) -> None:
    """Let go of the model in the frames of an error that its reader may keep for long."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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
