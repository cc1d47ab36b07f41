"""Time and memory of writing with everything watched, against transformers writing blind.

Three ways write the same text with the same weights, greedily: transformers' `generate` bare,
`generate` keeping its logits, and `sampling` through the real runner and recorder into a temporary
database. They take turns in one process, in an order that rotates from round to round; the first
round warms up and does not count. Time is taken from the first token to the last, so that start
and prompt are left out of all three in the same way.

The one place beside the engine that touches transformers: it is what the engine is compared with.
"""

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
from analyzers.errors import CandorError
from analyzers.home import models_folder
from analyzers.task import Task
from analyzers.trace import Event, RunStarted, Token
from app.bench import Progress, Row, row
from app.runner import Job, ModelChoice, Run, Runner
from sessions.recorder import Recorder
from sessions.store import Stamped, Store

ABOUT = "time a token and memory, against transformers.generate on the same weights"
# Its greedy continuation repeats itself and never ends.
PROMPT = "A list of the days of the week"
BARE, LOGITS, OURS = "generate", "generate, keeping logits", "candor, watched and recorded"
MEMORY_TARGET = 1.25
"""Only the cache may grow with the text; the rest is room for events and for the allocator."""
COST_TARGET = 0.05
"""Share of a step that watching or recording may take: inspection is nearly free."""

Written = tuple[list[int], float]
"""Ids that were written, and milliseconds a token."""


def measure(
    progress: Progress,
    *,
    model: ModelChoice = ModelChoice(dtype="float32"),  # noqa: B008  (a frozen value)
    tokens: int = 128,
    rounds: int = 5,
    long: int = 1024,
) -> list[Row]:
    """`tokens`: written by each way in each of `rounds`; `long`: in the run that shows memory.

    Raises: CandorError if the model ends before that, or the ways do not write the same.
    """
    with _runner() as runner:
        runner.prepare(model, lambda what, share: None)
        assert runner.engine
        bare = _bare(model)
        ways: dict[str, Callable[[], Written]] = {
            BARE: lambda: _generate(runner.engine, bare, tokens),
            LOGITS: lambda: _generate(
                runner.engine, bare, tokens, output_logits=True, return_dict_in_generate=True
            ),
            OURS: lambda: _candor(runner, model, tokens),
        }
        taken = _alternate(ways, tokens, rounds, progress)
        ms = {name: median(times) for name, times in taken.items()}
        progress("What watching costs")
        watching = _watching(runner.engine, rounds)
        progress(f"Memory over {long:,} tokens")
        run, growth = _grow(runner, model, long)
        progress("What recording costs")
        recording = _recording([stamped.event for stamped in run.events], rounds)
        cache = _cache_row(runner.engine)
    return [
        row(BARE, ms[BARE], "ms/token", n=rounds),
        row(LOGITS, ms[LOGITS], "ms/token", baseline=ms[BARE], n=rounds),
        row(OURS, ms[OURS], "ms/token", baseline=ms[BARE], target=1.0, n=rounds),
        row("signals of a token", watching, "ms/token", baseline=ms[BARE], n=rounds),
        row(
            "recording, both threads",
            recording,
            "ms/token",
            baseline=ms[BARE],
            target=COST_TARGET,
            n=rounds,
        ),
        row(
            "memory growth, against the cache",
            growth / 1e3,
            "kB/token",
            baseline=cache / 1e3,
            target=MEMORY_TARGET,
            n=1,
        ),
    ]


def _alternate(
    ways: dict[str, Callable[[], Written]], tokens: int, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds a token of each way in each round but the first."""
    order, taken = list(ways), {name: list[float]() for name in ways}
    for turn in range(rounds + 1):
        progress(f"Round {turn} of {rounds}" if turn else "Warming up")
        texts = {}
        for name in order:
            ids, ms = ways[name]()
            texts[name] = ids
            if turn:
                taken[name].append(ms)
        _check(texts, tokens)
        order = [*order[1:], order[0]]
    return taken


def _check(texts: dict[str, list[int]], tokens: int) -> None:
    first = next(iter(texts.values()))
    for name, ids in texts.items():
        if len(ids) != tokens:
            raise CandorError(f"{name} wrote {len(ids)} tokens, not {tokens}: the times would lie.")
        if ids != first:
            raise CandorError(f"{name} wrote another text: the times cannot be compared.")


# Three ways to write


class _Clock(BaseStreamer):
    """When each part came; `generate` hands over the prompt first, then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(engine: Engine | None, model: PreTrainedModel, tokens: int, **kept: Any) -> Written:
    assert engine
    ids, clock = engine.encode(Task(PROMPT)), _Clock()
    found = model.generate(
        torch.tensor([ids], device=model.device),
        do_sample=False,
        max_new_tokens=tokens,
        streamer=clock,
        **kept,
    )
    sequence = found.sequences[0] if kept else found[0]
    first, last = clock.times[1], clock.times[-1]
    return sequence.tolist()[len(ids) :], 1e3 * (last - first) / (len(clock.times) - 2)


def _candor(runner: Runner, model: ModelChoice, tokens: int) -> Written:
    run = runner.submit(_job(model, tokens)).finish()
    written = [s for s in run.events if isinstance(s.event, Token)]
    first, last = written[0].t, written[-1].t
    ids = [stamped.event.id for stamped in written if isinstance(stamped.event, Token)]
    return ids, 1e3 * (last - first) / (len(written) - 1)


def _job(model: ModelChoice, tokens: int) -> Job:
    settings = {"temperature": 0, "max_new": tokens}
    return Job("sampling", Task(PROMPT), settings, seed=1, model=model)


def _bare(choice: ModelChoice) -> PreTrainedModel:
    """The same weights as transformers loads them: none of the engine's hooks on them."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = Path(choice.ref)
    if choice.ref in builtin.MODELS:
        folder = builtin.ensure(choice.ref, models_folder(), lambda what, share: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Only its end tokens: generate is to search greedily, whatever else the model came with.
    ends = model.generation_config.eos_token_id
    pad = ends[0] if isinstance(ends, list) else ends
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return model.eval()


# What it costs


def _watching(engine: Engine, rounds: int) -> float:
    """Milliseconds for the signals of one token: the median over rounds of 50 tokens."""

    def once() -> float:
        began = time.perf_counter()
        for _ in range(50):
            token(engine, step, best)
        return 1e3 * (time.perf_counter() - began) / 50

    with torch.inference_mode():
        step = engine.step(engine.prefill(engine.encode(Task(PROMPT))))
        best = int(step.logits.argmax())
        once()
        return median(once() for _ in range(rounds))


def _recording(events: list[Event], rounds: int) -> float:
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
    return median(taken)


def _grow(runner: Runner, model: ModelChoice, tokens: int) -> tuple[Run, float]:
    """A long run, and by how many bytes a token the process grew from its first quarter on."""
    process = psutil.Process()
    seen = [(0, process.memory_info().rss)]
    run = runner.submit(_job(model, tokens))
    for _ in run.updates():
        seen.append((len(run.events), process.memory_info().rss))
    _check({OURS: [s.event.id for s in run.events if isinstance(s.event, Token)]}, tokens)
    late = [each for each in seen if each[0] > tokens / 4]
    if len(late) < 3:  # a tiny model is through before it has been looked at
        late = [seen[0], seen[-1]]
    return run, linear_regression(*zip(*late, strict=True)).slope


def _cache_row(engine: Engine) -> int:
    """Bytes that one token takes in the cache of keys and values."""
    with torch.inference_mode():
        cursor = engine.prefill(engine.encode(Task(PROMPT)))
        engine.step(cursor)
    parts = [part for layer in cursor.cache.layers for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in parts) // cursor.cached


@contextmanager
def _runner() -> Iterator[Runner]:
    with TemporaryDirectory() as folder:
        store = Store(Path(folder) / "runs.db")
        runner = Runner(store)
        try:
            yield runner
        finally:
            runner.close()
            store.close()
