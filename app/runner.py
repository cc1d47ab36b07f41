"""Checks, runs and records: the one way to a run, for the page, the command line and tests.

One model thread runs what was asked, in the order in which it was asked. Whoever asked follows the
run through `Run.updates`; walking away from them stops the run. Every run that started ends with
RunEnded, in the view as in the store.
"""

import logging
import platform
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from analyzers import registry
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, instead, load
from analyzers.engine.loading import DEFAULT, Progress
from analyzers.errors import BadInput, CandorError, ModelLacks, OutOfContext, Stopped
from analyzers.params import build
from analyzers.task import Task, check
from analyzers.trace import Event, RunEnded, RunStarted, Status, Token, surviving
from sessions.recorder import Recorder
from sessions.store import Stamped, Store

log = logging.getLogger(__name__)

UPDATE_SECONDS = 1 / 12
# A browser lays out and paints the whole text at each update, so a long one gets fewer: twice the
# time between two at this many events, three times from twice as many on.
LONG_RUN = 1000
# Caches of recent runs, so that forking off from one of them computes nothing again.
KEPT_CURSORS = 3
# Runs whose events stay in memory for the page; older ones are read from the store.
RECENT_RUNS = 8
MAX_SEED = 2**31 - 1
NO_TASK = Task("")


@dataclass(frozen=True)
class ModelChoice:
    ref: str = DEFAULT
    quantization: str = "none"
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Fork:
    """Go on from an earlier run: its tokens before `pos` stay, and token `id` stands at `pos`."""

    run: str
    pos: int
    id: int


@dataclass(frozen=True)
class Job:
    """What is asked. seed None: one is chosen and recorded. A fork takes the earlier run's task."""

    method: str
    task: Task = NO_TASK
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: ModelChoice = ModelChoice()
    fork: Fork | None = None
    owner: str = ""


@dataclass(frozen=True)
class Update:
    """What is new since the last one. ahead: runs before this one, while it waits. doing: what
    happens before the first token, and how far it is (share of 1)."""

    new: Sequence[Stamped] = ()
    ahead: int = 0
    doing: str = ""
    share: float = 0.0
    unsaved: str | None = None


class Run:
    """A run as its caller sees it. `id` is "" until it has started."""

    def __init__(self, job: Job, runner: "Runner") -> None:
        self.job = job
        self.id = ""
        self.events: list[Stamped] = []
        self._runner = runner
        self._changed = threading.Condition()
        self._stop_reason = ""
        self._doing = ("", 0.0)
        self._refused: CandorError | None = None
        self._over = False
        self._began = 0.0

    def stop(self, reason: str = "stopped by you") -> None:
        """Takes effect before the next forward pass, or at once while waiting."""
        self._stop_reason = self._stop_reason or reason
        self._runner._drop(self)

    @property
    def over(self) -> bool:
        return self._over

    def updates(self) -> Iterator[Update]:
        """Everything that happens, 12 times a second (4 in a long run), until the run is over.

        Closing the iterator early stops the run. Raises: CandorError if it could not start.
        """
        seen = 0
        try:
            while True:
                began = time.monotonic()
                with self._changed:
                    over = self._over
                    new = self.events[seen:]
                    doing, share = self._doing
                seen += len(new)
                if self._refused:
                    raise self._refused
                ahead = self._runner._ahead(self)
                yield Update(new, ahead, doing, share, self._runner.recorder.problem)
                if over:
                    return
                self._wait_beyond(seen)
                pause = UPDATE_SECONDS * (1 + min(seen / LONG_RUN, 2))
                time.sleep(max(0.0, pause - (time.monotonic() - began)))
        finally:
            if not self._over:
                self.stop("its reader went away")

    def finish(self) -> "Run":
        """Wait for the end. Raises: CandorError if it could not start."""
        for _ in self.updates():
            pass
        return self

    def _wait_beyond(self, seen: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self.events) > seen, timeout=0.5)

    # For the model thread

    def _poll(self) -> None:
        if self._stop_reason:
            raise Stopped(self._stop_reason)

    def _progress(self, doing: str, share: float) -> None:
        self._poll()
        self._doing = (doing, share)

    def _stamp(self, event: Event) -> Stamped:
        if not self.events:
            self._began = time.monotonic()
        return Stamped(len(self.events), round(time.monotonic() - self._began, 6), event)

    def _say(self, stamped: Stamped) -> None:
        with self._changed:
            self.events.append(stamped)
            if len(self.events) > 1:
                self._doing = ("", 0.0)
            self._changed.notify_all()

    def _finish(self, refused: CandorError | None = None) -> None:
        with self._changed:
            self._refused = refused
            self._over = True
            self._changed.notify_all()


class Runner:
    """Owns the loaded model, the model thread, the recorder and the kept cursors."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.recorder = Recorder(store)
        self.engine: Engine | None = None
        self._choice: ModelChoice | None = None
        self._queue: deque[Run] = deque()
        self._wake = threading.Condition()
        self._current: Run | None = None
        self._closing = False
        self._kept: OrderedDict[str, Cursor] = OrderedDict()
        self._recent: OrderedDict[str, Run] = OrderedDict()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Run:
        """Check what can be checked without the model, and line up.

        Raises: BadInput and its kinds, CandorError after `close`; nothing is recorded then.
        """
        method = registry.method(job.method)
        build(method.params, job.params)
        if job.fork is None:
            check(job.task)
        if job.seed is not None and not 0 <= job.seed <= MAX_SEED:
            raise BadInput(f"The seed must be from 0 to {MAX_SEED:,}, not {job.seed}.")
        run = Run(job, self)
        with self._wake:
            if self._closing:
                raise CandorError("Candor is being closed: start it again.")
            self._queue.append(run)
            self._wake.notify_all()
        return run

    def events(self, run_id: str) -> list[Stamped]:
        """Of a live or recent run from memory, of any other from the store.

        Raises: RunNotFound."""
        live = self._recent.get(run_id)
        return list(live.events) if live else self.store.events(run_id)

    def live(self, run_id: str) -> Run | None:
        """The run if it still goes on."""
        run = self._recent.get(run_id)
        return run if run and not run.over else None

    def prepare(self, choice: ModelChoice, progress: Progress) -> None:
        """Load a model before the first run asks for it. Raises: ModelError, BadInput."""
        self._engine_for(choice, progress)

    def model_facts(self) -> dict[str, Any] | None:
        """Identity of the loaded model with `memory` (bytes) and `context` (tokens)."""
        engine = self.engine
        if engine is None:
            return None
        return dict(engine.identity) | {"memory": engine.memory, "context": engine.context}

    def close(self) -> None:
        """Stop what runs, write everything, end the threads."""
        with self._wake:
            self._closing = True
            waiting = [*self._queue]
            self._wake.notify_all()
        for run in [*waiting, *([self._current] if self._current else [])]:
            run.stop("Candor was closed")
        self._thread.join(timeout=30)
        self.recorder.close()

    # The queue

    def _ahead(self, run: Run) -> int:
        with self._wake:
            return self._queue.index(run) + bool(self._current) if run in self._queue else 0

    def _drop(self, run: Run) -> None:
        with self._wake:
            if run not in self._queue:
                return
            self._queue.remove(run)
        run._finish(Stopped("Stopped before it began."))

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                self._current = run = self._queue.popleft()
            try:
                self._serve(run)
                run._finish()
            except CandorError as error:
                run._finish(error)
            except Exception as error:
                log.exception("a run failed outside its method")
                run._finish(CandorError(_inside(error)))
            finally:
                self._current = None

    # One run, in the model thread

    def _serve(self, run: Run) -> None:
        """Raises: CandorError if the run cannot start; afterwards it always ends in RunEnded."""
        job = run.job
        method = registry.method(job.method)
        engine = self._engine_for(job.model, run._progress)
        if why := registry.lacks(method.card, engine.can):
            raise ModelLacks(f"{method.card.title} {why}.")
        task = self._forked(job.fork, engine) if job.fork else job.task
        ids = engine.encode(task)
        if len(ids) > engine.context:
            raise OutOfContext(
                f"The prompt is too long: it has {len(ids):,} tokens, "
                f"and the model's context holds {engine.context:,}."
            )
        params: Any = build(method.params, job.params)
        seed = secrets.randbelow(MAX_SEED + 1) if job.seed is None else job.seed
        started = RunStarted(
            method=method.name,
            model=engine.identity,
            prompt=task.prompt,
            prompt_ids=tuple(ids[: len(ids) - len(task.written)]),
            params=dict(vars(params)),
            seed=seed,
            prefix=task.prefix,
        )
        run.id = self.recorder.begin(
            started,
            parent=job.fork.run if job.fork else None,
            fork_pos=job.fork.pos if job.fork else None,
            owner=job.owner,
            versions=_versions(),
        )
        self._remember(run)
        self._record(run, started)
        ctx = Context(seed, kept=lambda engine, ids: self._cursor_for(job.fork, engine, ids))
        before = engine.forwards
        status, reason = self._drive(run, engine, method.run(engine, task, params, ctx))
        self._keep(run, ctx)
        ended = RunEnded(
            status,
            reason,
            tokens=sum(isinstance(s.event, Token) for s in run.events) - len(task.written),
            forwards=engine.forwards - before,
            seconds=round(time.monotonic() - run._began, 6),
        )
        last = run._stamp(ended)
        run._say(last)
        self.recorder.end(run.id, last)

    def _drive(
        self, run: Run, engine: Engine, events: Generator[Event, None, str]
    ) -> tuple[Status, str]:
        """Draw the events out of the method, inference mode around each and never across them."""
        engine.poll = run._poll
        engine.progress = lambda done, total: run._progress(
            f"Reading the prompt, {done:,} of {total:,} tokens", done / max(total, 1)
        )
        try:
            while True:
                run._poll()
                with torch.inference_mode():
                    event = next(events)
                self._record(run, event)
        except StopIteration as end:
            return "done", end.value or "finished"
        except Stopped as stopped:
            return "stopped", str(stopped)
        except CandorError as error:
            return "failed", str(error)
        except Exception as error:
            log.exception("method %s failed", run.job.method)
            return "failed", _inside(error)
        finally:
            events.close()
            engine.poll = _no_poll
            engine.progress = _no_progress

    def _record(self, run: Run, event: Event) -> None:
        stamped = run._stamp(event)
        self.recorder.record(run.id, stamped)  # first: what cannot be stored is not shown either
        run._say(stamped)

    def _engine_for(self, choice: ModelChoice, progress: Progress) -> Engine:
        if self.engine is None or choice != self._choice:
            self._kept.clear()
            self.engine = self._choice = None
            self.engine = load(
                choice.ref,
                quantization=choice.quantization,
                dtype=choice.dtype,
                device=choice.device,
                progress=progress,
            )
            self._choice = choice
        return self.engine

    # Forking off from an earlier run

    def _forked(self, fork: Fork, engine: Engine) -> Task:
        """The earlier run's task, with its tokens up to the place and the other token there."""
        events = [stamped.event for stamped in self.events(fork.run)]
        started = next(event for event in events if isinstance(event, RunStarted))
        if started.model.get("hash") != engine.identity["hash"]:
            raise BadInput("The run was made with another model: load that one to continue it.")
        tokens = surviving(events)
        kept = [token for token in tokens if token.pos < fork.pos]
        written = next((token for token in tokens if token.pos == fork.pos), None)
        if written is None or all(fork.id != entry[0] for entry in written.top):
            raise BadInput("That token is not among the alternatives at this place.")
        before = [*(started.prompt_ids or ()), *(token.id for token in kept)]
        forced = instead(engine, before, written, fork.id)
        return Task(started.prompt, prefix=started.prefix, written=(*kept, forced))

    def _cursor_for(self, fork: Fork | None, engine: Engine, ids: Sequence[int]) -> Cursor | None:
        """The kept cache of the run that is forked, cut to what it shares with `ids`."""
        cursor = self._kept.get(fork.run) if fork else None
        if cursor is None:
            return None
        shared = next(
            (n for n, (a, b) in enumerate(zip(cursor.ids, ids, strict=False)) if a != b),
            min(len(cursor.ids), len(ids)),
        )
        branch = engine.fork(cursor, shared)
        engine.extend(branch, ids[shared:])
        return branch

    def _keep(self, run: Run, ctx: Context) -> None:
        if ctx.cursors:
            self._kept[run.id] = ctx.cursors[0]
        while len(self._kept) > KEPT_CURSORS:
            self._kept.popitem(last=False)

    def _remember(self, run: Run) -> None:
        self._recent[run.id] = run
        while len(self._recent) > RECENT_RUNS:
            self._recent.popitem(last=False)


def _no_poll() -> None:
    return None


def _no_progress(done: int, total: int) -> None:
    return None


def _inside(error: Exception) -> str:
    return f"Something inside failed ({type(error).__name__}); the details are in the log."


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "gradio")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
