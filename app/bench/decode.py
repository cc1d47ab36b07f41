"""Time and memory of writing with everything watched, against libraries that write blind.

The default way of this app (`sampling` through the real runner and recorder into a temporary
database, quantization "auto") and transformers' `generate` in bfloat16, bare and keeping its
logits, write greedily from the same prompt. They take turns of a whole text. Time is taken from the
first token to the last, so that start and prompt are left out in the same way. The weights are not
rounded alike, so the texts may part; their lengths are checked.

llama.cpp writes too where it can: CANDOR_LLAMA_GGUF names the file of the built-in model, and
CANDOR_LLAMA_PYTHON an interpreter that has llama-cpp-python, unless this one has it. It runs in a
process of its own and takes its turns there, once bare and once with the log-probabilities of five
tokens. Its time is that of the whole call, which finds the prompt in its cache.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from analyzers.engine import Engine, builtin, token
from analyzers.engine.cache import Past
from analyzers.engine.loading import DEFAULT
from analyzers.errors import CandorError
from analyzers.home import models_folder
from analyzers.task import Task
from analyzers.trace import Event, RunStarted, Token
from app.bench import Progress, Row, alternate, median_row, row
from app.runner import Job, ModelChoice, Run, Runner
from sessions.recorder import Recorder
from sessions.store import Stamped, Store

ABOUT = "tokens a second and memory, against transformers.generate and llama.cpp"
# Its greedy continuation repeats itself and never ends.
PROMPT = "A list of the days of the week"
BARE, LOGITS = "generate, bfloat16", "generate, bfloat16, keeping logits"
OURS = "candor, watched and recorded"
LLAMA_BARE, LLAMA_LOGPROBS = "llama.cpp", "llama.cpp with logprobs=5"
SPEED_TARGET = 1.5
"""Times as fast, watched and recorded, as the others: generate, and llama.cpp with logprobs."""
MEMORY_TARGET = 1.15
"""Only the cache may grow with the text; the rest is room for events and for the allocator."""
COST_TARGET = 0.05
"""Share of a step that watching or recording may take: inspection is nearly free."""

# Answers each line "tokens logprobs" with "tokens seconds". Log-probabilities need a model that
# keeps the logits of all positions, which the bare one does not pay for.
CHILD = """
import sys, time
from llama_cpp import Llama

file, room, threads, prompt = sys.argv[1:]
models = {
    logprobs: Llama(
        file, n_ctx=int(room), n_threads=int(threads), n_threads_batch=int(threads),
        logits_all=logprobs > 0, verbose=False,
    )
    for logprobs in (0, 5)
}
for line in sys.stdin:
    tokens, logprobs = map(int, line.split())
    began = time.perf_counter()
    found = models[logprobs].create_completion(
        prompt, max_tokens=tokens, temperature=0, logprobs=logprobs or None
    )
    seconds = time.perf_counter() - began
    print(found["usage"]["completion_tokens"], seconds, flush=True)
"""


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    tokens: int = 128,
    rounds: int = 9,
    long: int = 4000,
) -> list[Row]:
    """`tokens`: written by each way in each of `rounds`; `long`: in the run that shows memory.

    Raises: CandorError if a way ends before that.
    """
    choice = ModelChoice(model)
    with _runner() as runner, _llama(tokens, progress) as llama:
        runner.prepare(choice, lambda what, share: None)
        engine = runner.engine
        assert engine
        plain = bare(model, torch.bfloat16)
        ways: dict[str, Callable[[], float]] = {
            BARE: lambda: _generate(engine, plain, tokens),
            LOGITS: lambda: _generate(
                engine, plain, tokens, output_logits=True, return_dict_in_generate=True
            ),
            OURS: lambda: _candor(runner, choice, tokens),
        }
        ms = alternate(ways | llama, rounds, progress)
        progress("What watching costs")
        watching = _watching(engine, rounds)
        progress(f"Memory over {long:,} tokens")
        run, growth = _grow(runner, choice, long)
        progress("What recording costs")
        recording = _recording([stamped.event for stamped in run.events], rounds)
        cache = _cache_row(engine)
    step = median(ms[OURS])
    return [
        *_speeds(ms),
        median_row("signals of a token", watching, "ms/token", baseline=step),
        median_row(
            "recording, both threads", recording, "ms/token", baseline=step, target=COST_TARGET
        ),
        row(
            f"memory growth over {long:,} tokens, against the cache",
            growth / 1e3,
            "kB/token",
            baseline=cache / 1e3,
            target=MEMORY_TARGET,
            n=1,
        ),
    ]


def _speeds(ms: dict[str, list[float]]) -> list[Row]:
    """From milliseconds a token of each way."""
    rates = {name: [1e3 / each for each in taken] for name, taken in ms.items()}
    against = {name: median(rates[name]) for name in rates}

    def of(way: str, name: str, **more: Any) -> Row:
        return median_row(name, rates[way], "tokens/s", better="more", **more)

    rows = [
        of(BARE, BARE),
        of(LOGITS, LOGITS, baseline=against[BARE]),
        of(OURS, OURS, baseline=against[BARE], target=SPEED_TARGET),
    ]
    for name, target in ((LLAMA_LOGPROBS, SPEED_TARGET), (LLAMA_BARE, None)):
        if name in rates:
            rows.append(of(OURS, f"candor, against {name}", baseline=against[name], target=target))
    return rows


def _check(name: str, found: int, tokens: int) -> None:
    if found != tokens:
        raise CandorError(f"{name} wrote {found} tokens, not {tokens}: the times would lie.")


# Ways to write; each gives milliseconds a token


class _Clock(BaseStreamer):
    """When each part came; `generate` hands over the prompt first, then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(engine: Engine, model: PreTrainedModel, tokens: int, **kept: Any) -> float:
    ids, clock = engine.encode(Task(PROMPT)), _Clock()
    model.generate(
        torch.tensor([ids], device=model.device),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        streamer=clock,
        **kept,
    )
    _, first, *_, last = clock.times
    _check(BARE, len(clock.times) - 1, tokens)
    return 1e3 * (last - first) / (tokens - 1)


def _candor(runner: Runner, model: ModelChoice, tokens: int) -> float:
    run = runner.submit(_job(model, tokens)).finish()
    times = [stamped.t for stamped in run.events if isinstance(stamped.event, Token)]
    _check(OURS, len(times), tokens)
    return 1e3 * (times[-1] - times[0]) / (tokens - 1)


def _job(model: ModelChoice, tokens: int) -> Job:
    settings = {"temperature": 0, "max_new": tokens}
    return Job("sampling", Task(PROMPT), settings, seed=1, model=model)


def bare(ref: str, dtype: torch.dtype) -> PreTrainedModel:
    """A built-in or a folder as transformers loads it: none of the engine's hooks on it."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = Path(ref)
    if ref in builtin.MODELS:
        folder = builtin.ensure(ref, models_folder(), lambda what, share: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Only its end tokens: generate is to search greedily, whatever else the model came with.
    ends = model.generation_config.eos_token_id
    pad = ends[0] if isinstance(ends, list) else ends
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return model.eval()


@contextmanager
def _llama(tokens: int, progress: Progress) -> Iterator[dict[str, Callable[[], float]]]:
    """llama.cpp's ways to write; none of them, and a line that says so, where it is not there.

    Raises: CandorError, from the ways, when its process ends."""
    file, python = os.environ.get("CANDOR_LLAMA_GGUF"), os.environ.get("CANDOR_LLAMA_PYTHON")
    if not python and importlib.util.find_spec("llama_cpp"):
        python = sys.executable
    if not file or not python:
        progress(
            "llama.cpp is left out: set CANDOR_LLAMA_GGUF to the model's file, and "
            "CANDOR_LLAMA_PYTHON to an interpreter that has llama-cpp-python"
        )
        yield {}
        return
    room, threads = str(tokens + 256), str(torch.get_num_threads())
    command = [python, "-c", CHILD, file, room, threads, PROMPT]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError as error:
        raise CandorError(f"{python} could not be started ({error.strerror}).") from error
    with child:
        yield {
            LLAMA_BARE: lambda: _asked(child, LLAMA_BARE, tokens, 0),
            LLAMA_LOGPROBS: lambda: _asked(child, LLAMA_LOGPROBS, tokens, 5),
        }


def _asked(child: "subprocess.Popen[str]", name: str, tokens: int, logprobs: int) -> float:
    assert child.stdin and child.stdout
    answer = ""
    if child.poll() is None:
        child.stdin.write(f"{tokens} {logprobs}\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    if not answer:
        raise CandorError("The process of llama.cpp ended: it cannot read its file, or crashed.")
    written, seconds = answer.split()
    _check(name, int(written), tokens)
    return 1e3 * float(seconds) / tokens


# What it costs


def _watching(engine: Engine, rounds: int) -> list[float]:
    """Milliseconds for the signals of one token: a mean of 50 in each round."""

    def once() -> float:
        began = time.perf_counter()
        for _ in range(50):
            token(engine, step, best)
        return 1e3 * (time.perf_counter() - began) / 50

    with torch.inference_mode():
        step = engine.step(engine.prefill(engine.encode(Task(PROMPT))))
        best = int(step.logits.argmax())
        once()
        return [once() for _ in range(rounds)]


def _recording(events: list[Event], rounds: int) -> list[float]:
    """Milliseconds of processor time a token, the writer's thread included, on disk at the end."""
    tokens = sum(isinstance(event, Token) for event in events)
    started = next(event for event in events if isinstance(event, RunStarted))
    taken = []
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            store = Store(Path(folder) / "runs.db")
            recorder = Recorder(store)
            began = time.process_time()
            run_id = recorder.begin(started)
            for seq, event in enumerate(events[:-1]):
                recorder.record(run_id, Stamped(seq, seq / 30, event))
            recorder.end(run_id, Stamped(len(events), len(events) / 30, events[-1]), timeout=60)
            taken.append(1e3 * (time.process_time() - began) / tokens)
            recorder.close()
            store.close()
    return taken


def _grow(runner: Runner, model: ModelChoice, tokens: int) -> tuple[Run, float]:
    """A long run, and by how many bytes a token the process grew from its first quarter on."""
    process = psutil.Process()
    seen = [(0, process.memory_info().rss)]
    run = runner.submit(_job(model, tokens))
    for _ in run.updates():
        seen.append((len(run.events), process.memory_info().rss))
    _check(OURS, sum(isinstance(stamped.event, Token) for stamped in run.events), tokens)
    late = [each for each in seen if each[0] > tokens / 4]
    if len(late) < 3:  # a tiny model is through before it has been looked at
        late = [seen[0], seen[-1]]
    return run, linear_regression(*zip(*late, strict=True)).slope


def _cache_row(engine: Engine) -> int:
    """Bytes that one token takes in the cache of keys and values."""
    with torch.inference_mode():
        cursor = engine.prefill(engine.encode(Task(PROMPT)))
        engine.step(cursor)
    past = cursor.past
    assert isinstance(past, Past)
    return sum(buffer[:, :, :1].nbytes for layer in past.layers for buffer in layer.buffers or ())


@contextmanager
def _runner() -> Iterator[Runner]:
    with TemporaryDirectory() as folder:
        store = Store(Path(folder) / "runs.db")
        runner = Runner(store, measure=False)  # or it would measure its costs between the turns
        try:
            yield runner
        finally:
            runner.close()
            store.close()
