"""Checks, runs and records: the one way to a run, for the page, the command line and tests.

One model thread does what was asked, in the order in which it was asked: runs, loading models, and
unloading them. Runs of several visitors wait for each other, whatever their models: two at once
would only slow each other down. Whoever asked follows the work through `Work.updates`; walking away
stops it. Every run that started ends with RunEnded, in the view as in the store.

Several engines stay in memory at once, as many as a budget allows; the one that was used longest
ago goes first.
"""

import gc
import json
import logging
import platform
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Self, get_args

import torch

from analyzers import registry
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, instead, load, memory
from analyzers.engine.cost import Cost, machine, measure
from analyzers.engine.loading import DEFAULT, Progress
from analyzers.engine.quantization import Quantization
from analyzers.engine.sources import resolve
from analyzers.errors import (
    BadInput,
    CandorError,
    ModelLacks,
    ModelTooLarge,
    OutOfContext,
    Stopped,
    StoreError,
)
from analyzers.params import ModelRef, build, knobs
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
# Texts of so many runs are there for methods that learn from what was written before.
READ_RUNS = 500
# Of the memory that is free without any model; the rest is for caches and activations.
BUDGET = 0.7
# What of an identity does not change what a method learns about the model.
OF_THIS_PLACE = ("name", "device", "parameters", "remote_code")
# Method and name of the artifact that holds what passes cost.
COST_TABLE = ("cost", "table")
MAX_SEED = 2**31 - 1
NO_TASK = Task("")


@dataclass(frozen=True)
class ModelChoice:
    """What to load and how; "auto" is decided at loading. double, compute: for the bitsandbytes
    kinds of quantization (nf4, fp4), which quantize their scales again and multiply in a dtype."""

    ref: str = DEFAULT
    quantization: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    double: bool = True
    compute: str = "auto"


@dataclass(frozen=True)
class Fork:
    """Go on from an earlier run: its tokens before `pos` stay, and token `id` stands at `pos`."""

    run: str
    pos: int
    id: int


@dataclass(frozen=True)
class Job:
    """What is asked. seed None: one is chosen and recorded. A fork takes the earlier run's task.

    A knob that names a second model (ModelRef) has it loaded as `model` is, with its quantization,
    dtype and device, unless it says `name@quantization`."""

    method: str
    task: Task = NO_TASK
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: ModelChoice = ModelChoice()
    fork: Fork | None = None
    owner: str = ""


@dataclass(frozen=True)
class Update:
    """What is new since the last one. ahead: work before this, while it waits. doing: what happens
    before the first token, and how far it is (share of 1)."""

    new: Sequence[Stamped] = ()
    ahead: int = 0
    doing: str = ""
    share: float = 0.0
    unsaved: str | None = None


class Work:
    """Something the model thread was asked to do, as its caller sees it."""

    def __init__(self, runner: "Runner", owner: str) -> None:
        self.owner = owner
        self.events: list[Stamped] = []
        self._runner = runner
        self._changed = threading.Condition()
        self._stop_reason = ""
        self._doing = ("", 0.0)
        self._refused: CandorError | None = None
        self._over = False

    def stop(self, reason: str = "stopped by you") -> None:
        """Takes effect before the next forward pass or part of a model; at once while waiting."""
        self._stop_reason = self._stop_reason or reason
        self._runner._drop(self)

    @property
    def over(self) -> bool:
        return self._over

    def updates(self) -> Iterator[Update]:
        """Everything that happens, 12 times a second (4 in a long run), until it is over.

        Closing the iterator early stops the work. Raises: CandorError if it could not be done;
        Stopped if it was stopped before a run began. A run that began ends with RunEnded instead.
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

    def finish(self) -> Self:
        """Wait for the end. Raises: what `updates` raises."""
        for _ in self.updates():
            pass
        return self

    def _wait_beyond(self, seen: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self.events) > seen, timeout=0.5)

    # For the model thread

    def _serve(self) -> None:
        """Do it. Raises: CandorError if it cannot be done."""
        raise NotImplementedError

    def _poll(self) -> None:
        if self._stop_reason:
            raise Stopped(self._stop_reason)

    def _progress(self, doing: str, share: float) -> None:
        self._poll()
        self._doing = (doing, share)

    def _finish(self, refused: CandorError | None = None) -> None:
        with self._changed:
            self._refused = refused
            self._over = True
            self._changed.notify_all()


class Run(Work):
    """A run as its caller sees it. `id` is "" until it has started."""

    def __init__(self, job: Job, runner: "Runner") -> None:
        super().__init__(runner, job.owner)
        self.job = job
        self.id = ""
        self._forwards = 0
        # Seconds before the present turn, and when that began: one value, for it is read from
        # other threads.
        self._clock: tuple[float, float | None] = (0.0, None)
        self._beside: Together | None = None

    @property
    def seconds(self) -> float:
        """Its own clock: of the model thread, since RunStarted. It stands still while others have
        their turn, and goes on until the ending is on disk."""
        before, since = self._clock
        return before if since is None else before + time.monotonic() - since

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._clock = self.seconds, time.monotonic()
        try:
            yield
        finally:
            self._clock = self.seconds, None

    def _serve(self) -> None:
        self._runner._run([self])

    def _progress(self, doing: str, share: float) -> None:
        super()._progress(doing, share)
        if self._beside:
            self._beside._hear(doing, share)

    def _stamp(self, event: Event) -> Stamped:
        if not self.events:
            self._clock = 0.0, time.monotonic()
        return Stamped(len(self.events), round(self.seconds, 6), event)

    def _say(self, stamped: Stamped) -> None:
        with self._changed:
            self.events.append(stamped)
            if len(self.events) > 1:
                self._doing = ("", 0.0)
            self._changed.notify_all()
        if self._beside:
            self._beside._heard(stamped)


class Together(Work):
    """Runs that take turns, so that they can be watched side by side. Each is a run of its own,
    with its own id and its own clock; `events` are those of all of them, as they came.

    fair: whether turns go by the time used, and not token by token.
    """

    def __init__(self, jobs: Sequence[Job], runner: "Runner", fair: bool = False) -> None:
        super().__init__(runner, jobs[0].owner)
        self.fair = fair
        self.runs = [Run(job, runner) for job in jobs]
        for run in self.runs:
            run._beside = self

    def stop(self, reason: str = "stopped by you") -> None:
        for run in self.runs:
            run._stop_reason = run._stop_reason or reason
        super().stop(reason)

    def _serve(self) -> None:
        self._runner._run(self.runs, self.fair)

    def _heard(self, stamped: Stamped) -> None:
        with self._changed:
            self.events.append(stamped)
            if stamped.seq:
                self._doing = ("", 0.0)
            self._changed.notify_all()

    def _hear(self, doing: str, share: float) -> None:
        self._doing = (doing, share)

    def _finish(self, refused: CandorError | None = None) -> None:
        for run in self.runs:
            if not run.over:
                run._finish(refused)
        super()._finish(refused)


class Loading(Work):
    """A model on its way into memory; when it is over without an error, the model is there."""

    def __init__(
        self, choice: ModelChoice, runner: "Runner", owner: str = "", hear: Progress | None = None
    ) -> None:
        super().__init__(runner, owner)
        self.choice = choice
        self._hear = hear

    def _serve(self) -> None:
        self._runner._resident(self.choice, self._progress)

    def _progress(self, doing: str, share: float) -> None:
        super()._progress(doing, share)
        if self._hear:
            self._hear(doing, share)


class Unloading(Work):
    """A model on its way out of memory; nothing happens if it is not there."""

    def __init__(self, choice: ModelChoice, runner: "Runner") -> None:
        super().__init__(runner, "")
        self.choice = choice

    def _serve(self) -> None:
        self._runner._unload(self.choice)


@dataclass(eq=False)
class Resident:
    """A loaded engine and the choices it answers to, the one it was loaded for first.

    tried: its cost is known, or could not be measured."""

    engine: Engine
    choices: list[ModelChoice]
    memory: int
    tried: bool = False

    @property
    def device(self) -> str:
        return str(self.engine.identity["device"])

    def serves(self, choice: ModelChoice) -> bool:
        """Whether `choice` is one of them, or names what the first of them came out as."""
        first, found = vars(self.choices[0]), self.engine.identity
        return choice in self.choices or all(
            value == first[name] or (name != "ref" and value == found.get(name, value))
            for name, value in vars(choice).items()
        )

    def facts(self) -> dict[str, Any]:
        cost = self.engine.cost
        return dict(self.engine.identity) | {
            "memory": self.memory,
            "context": self.engine.context,
            "can_chat": self.engine.can_chat,
            "cost": cost.as_mapping() if cost else None,
            "choice": self.choices[0],
        }


@dataclass(frozen=True)
class Ready:
    """A run that can start. ids: of the whole task. residents: by the ModelRef that names them in
    the knobs; "" is the run's own."""

    run: Run
    method: registry.Method
    task: Task
    ids: Sequence[int]
    params: Any
    residents: Mapping[str, Resident]


@dataclass(frozen=True)
class StoredArtifacts:
    """The store's artifacts of one model."""

    store: Store
    model: str

    def get(self, method: str, name: str) -> tuple[bytes, Mapping[str, Any]] | None:
        return self.store.get_artifact(self.model, method, name)

    def put(
        self, method: str, name: str, data: bytes, meta: Mapping[str, Any] | None = None
    ) -> None:
        self.store.put_artifact(self.model, method, name, data, meta)


class Runner:
    """Owns the resident engines, the model thread, the recorder and the kept cursors."""

    def __init__(
        self,
        store: Store,
        remote_code: bool = False,
        budget: int | None = None,
        measure: bool = True,
    ) -> None:
        """remote_code: models may bring code of their own, which is then run.

        budget: bytes that resident engines may take together on a device (None: 70 % of what is
        free there without them). It decides who stays beside a new one, and never forbids a model:
        whether that fits at all is found when it is loaded. The caches of kept runs are not
        counted; they go first.
        measure: find out what passes cost, once for each model, while nothing else is asked.
        """
        self.store = store
        self.recorder = Recorder(store)
        self._remote_code = remote_code
        self._budget = budget
        self._budgets: dict[str, int] = {}  # by device
        self._measures = measure
        self._residents: list[Resident] = []  # the one used longest ago comes first
        self._queue: deque[Work] = deque()
        self._wake = threading.Condition()
        self._current: Work | None = None
        self._closing = False
        self._kept: OrderedDict[str, tuple[Engine, Cursor]] = OrderedDict()
        self._recent: OrderedDict[str, Run] = OrderedDict()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Run:
        """Check what can be checked without the model, and line up.

        Raises: BadInput and its kinds, CandorError after `close`; nothing is recorded then.
        """
        _check(job)
        run = Run(job, self)
        self._line_up(run)
        return run

    def submit_together(self, jobs: Sequence[Job], fair: bool = False) -> Together:
        """Have several runs take turns, each recorded as a run of its own. They all start, or none
        does; those without a seed share one.

        Each writes a token at its turn, one after the other; if `fair`, the one that has used the
        model thread least is the next, and so each gets as far as it would in the same time alone.
        Raises: what `submit` raises; BadInput for fewer than two.
        """
        if len(jobs) < 2:
            raise BadInput("There is nothing to compare: choose at least two.")
        for job in jobs:
            _check(job)
        seed = secrets.randbelow(MAX_SEED + 1)
        together = Together([_with_seed(job, seed) for job in jobs], self, fair)
        self._line_up(together)
        return together

    def load(self, choice: ModelChoice, owner: str = "") -> Loading:
        """Have a model in memory before a run asks for it; nothing to do if it is there.

        A load that fails or is stopped leaves the other models where they are, but for those that
        had to make room. Raises: CandorError after `close`; all else from `Loading.updates`.
        """
        loading = Loading(choice, self, owner)
        self._line_up(loading)
        return loading

    def unload(self, choice: ModelChoice) -> Unloading:
        """Give a model's memory back when the work before this is done; `finish` waits for that."""
        unloading = Unloading(choice, self)
        self._line_up(unloading)
        return unloading

    def prepare(self, choice: ModelChoice, progress: Progress) -> None:
        """`load` and wait; `progress` hears of every part. Raises: ModelError, BadInput."""
        loading = Loading(choice, self, hear=progress)
        self._line_up(loading)
        loading.finish()

    def events(self, run_id: str) -> list[Stamped]:
        """Of a live or recent run from memory, of any other from the store.

        Raises: RunNotFound."""
        live = self._recent.get(run_id)
        return list(live.events) if live else self.store.events(run_id)

    def live(self, run_id: str) -> Run | None:
        """The run if it still goes on."""
        run = self._recent.get(run_id)
        return run if run and not run.over else None

    @property
    def engine(self) -> Engine | None:
        """The one that was used last. It belongs to the model thread: look, and run nothing on it
        while anything is asked of the runner or measured by it."""
        with self._wake:
            return self._residents[-1].engine if self._residents else None

    def residents(self) -> list[dict[str, Any]]:
        """Facts of the loaded models, the one used last first: identity with `memory` (bytes),
        `context` (tokens), `can_chat`, `cost` (a Cost as mapping, None until it is measured) and
        `choice` (the ModelChoice that it was loaded for)."""
        with self._wake:
            return [resident.facts() for resident in reversed(self._residents)]

    def model_facts(self, choice: ModelChoice | None = None) -> dict[str, Any] | None:
        """The facts of the model that `choice` is or would be, or of the one used last; None when
        it is not loaded."""
        with self._wake:
            resident = self._find(choice) if choice else next(reversed(self._residents), None)
            return resident.facts() if resident else None

    def measure_again(self, choice: ModelChoice) -> None:
        """Forget what passes of this model cost, and measure it when nothing is asked: the table
        of a machine that was busy is wrong. Nothing happens if the model is not loaded."""
        with self._wake:
            if resident := self._find(choice):
                resident.tried, resident.engine.cost = False, None
                self._wake.notify_all()

    def close(self) -> None:
        """Stop what runs, write everything, end the threads."""
        with self._wake:
            self._closing = True
            waiting = [*self._queue]
            self._wake.notify_all()
        for work in [*waiting, *([self._current] if self._current else [])]:
            work.stop("Candor was closed")
        self._thread.join(timeout=30)
        self.recorder.close()

    # The queue

    def _line_up(self, work: Work) -> None:
        with self._wake:
            if self._closing:
                raise CandorError("Candor is being closed: start it again.")
            self._queue.append(work)
            self._wake.notify_all()

    def _ahead(self, work: Work) -> int:
        with self._wake:
            return self._queue.index(work) + bool(self._current) if work in self._queue else 0

    def _drop(self, work: Work) -> None:
        with self._wake:
            if work not in self._queue:
                return
            self._queue.remove(work)
        work._finish(Stopped("Stopped before it began."))

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing or self._unmeasured())
                self._current = self._queue.popleft() if self._queue else None
                if self._current is None and self._closing:
                    return
            if self._current is None:
                self._measure()
            else:
                self._do(self._current)

    def _do(self, work: Work) -> None:
        refused: CandorError | None = None
        try:
            work._serve()
        except CandorError as error:
            refused = error
        except Exception as error:
            log.exception("something failed outside a method")
            refused = CandorError(_inside(error))
        if refused:
            # Its frames hold an engine, or the half of one; whoever asked may hold the error long.
            refused.__traceback__ = refused.__cause__ = refused.__context__ = None
            gc.collect()
        self._current = None
        work._finish(refused)

    # Engines, in the model thread

    def _resident(
        self, choice: ModelChoice, progress: Progress, needed: Collection[Resident] = ()
    ) -> Resident:
        """The engine of a choice, loaded if it is not there; from now on the one used last.

        Those that are `needed` stay. Raises: ModelError, BadInput, Stopped.
        """
        resident = self._find(choice)
        if resident is None and self._residents:
            decided, need = plan(choice, self._remote_code, progress)
            resident = self._find(decided)
            if resident is None:
                self._make_room(decided, need, needed)
        if resident is None:
            resident = self._loaded(choice, progress)
        with self._wake:
            if choice not in resident.choices:
                resident.choices.append(choice)
            self._residents = [*(r for r in self._residents if r is not resident), resident]
        return resident

    def _find(self, choice: ModelChoice) -> Resident | None:
        return next((each for each in self._residents if each.serves(choice)), None)

    def _make_room(self, choice: ModelChoice, need: int, needed: Collection[Resident]) -> None:
        """Drop kept cursors, then engines, the one used longest ago first, until the `need` bytes
        of `choice` (decided) fit into the budget of its device.

        Raises: ModelTooLarge, and drops nothing, if there is too little memory even so.
        """
        there = [each for each in self._residents if each.device == choice.device]
        others = [each for each in there if each not in needed]
        taken, free = sum(each.memory for each in there), memory.free(choice.device)
        room = free + sum(each.memory for each in others)
        if need > room:
            raise ModelTooLarge(
                f"{choice.ref} needs {need / 1e9:.2f} GB, and there would be {room / 1e9:.2f} GB "
                "with every other model unloaded: choose a stronger quantization."
            )
        budget = self._budget
        if budget is None:  # as much as was free before the first model
            budget = self._budgets.setdefault(choice.device, int(BUDGET * (free + taken)))
        while taken + need > budget:
            self._kept.clear()
            if not others:
                return
            taken -= others[0].memory
            self._evict(others.pop(0))

    def _loaded(self, choice: ModelChoice, progress: Progress) -> Resident:
        engine = load(
            choice.ref,
            quantization=choice.quantization,
            dtype=choice.dtype,
            device=choice.device,
            double=choice.double,
            compute=choice.compute,
            remote_code=self._remote_code,
            progress=progress,
        )
        progress(f"Loading {choice.ref}", 1.0)  # the last chance to stop
        engine.cost = self._stored_cost(engine)
        return Resident(engine, [choice], engine.memory, tried=engine.cost is not None)

    def _unload(self, choice: ModelChoice) -> None:
        resident = self._find(choice)
        if resident:
            self._evict(resident)

    def _evict(self, resident: Resident) -> None:
        with self._wake:
            self._residents.remove(resident)
            engine = resident.engine
            del resident.engine  # others still hold the resident
        for run_id in [name for name, (owner, _) in self._kept.items() if owner is engine]:
            del self._kept[run_id]
        del engine
        gc.collect()  # hooks and modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # What passes cost, found out while nothing is asked

    def _unmeasured(self) -> Resident | None:
        return next(
            (each for each in reversed(self._residents) if self._measures and not each.tried), None
        )

    def _measure(self) -> None:
        """Measure one model and keep the result; whatever is asked meanwhile comes first, and the
        model is measured later."""
        resident = self._unmeasured()
        if resident is None:
            return
        engine = resident.engine
        try:
            cost = measure(engine, self._give_way)
            table = json.dumps(cost.as_mapping()).encode()
            self.store.put_artifact(_cost_key(engine), *COST_TABLE, table)
            engine.cost = cost
        except Stopped:
            return
        except Exception:
            log.exception(
                "the cost of %s could not be measured and stored", engine.identity["name"]
            )
        resident.tried = True

    def _give_way(self) -> None:
        if self._queue or self._closing:
            raise Stopped("something else was asked")

    def _stored_cost(self, engine: Engine) -> Cost | None:
        try:
            found = self.store.get_artifact(_cost_key(engine), *COST_TABLE)
            return Cost.from_mapping(json.loads(found[0])) if found else None
        except (StoreError, KeyError, TypeError, ValueError):
            log.warning("the stored cost of %s cannot be read", engine.identity["name"])
            return None

    # Runs, in the model thread

    def _run(self, runs: Sequence[Run], fair: bool = False) -> None:
        """Drive the runs in turns, each until its next token; the next turn is that of the one
        that has used the least time if `fair`, and otherwise of the one that waited longest.

        Raises: CandorError if one cannot start, and then none has; afterwards each of them always
        ends in RunEnded."""
        ready: list[Ready] = []
        for run in runs:
            ready.append(self._ready(run, [r for one in ready for r in one.residents.values()]))
        going = deque((each.run, self._go(each)) for each in ready)
        while going:
            turn = min(going, key=lambda each: each[0].seconds) if fair else going[0]
            going.remove(turn)
            run, events = turn
            with run._turn():
                goes_on = any(isinstance(event, Token) for event in events)
            if goes_on:
                going.append(turn)
            elif run._beside:
                run._finish()

    def _ready(self, run: Run, needed: Collection[Resident]) -> "Ready":
        """Everything that can be refused. The residents that are `needed` stay."""
        job = run.job
        method = registry.method(job.method)
        own = self._resident(job.model, run._progress, needed)
        engine = own.engine
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
        residents = {"": own}
        for ref in _models_in(params):
            choice = _second(job.model, ref)
            kept = [*needed, *residents.values()]
            residents[ref] = self._resident(choice, run._progress, kept)
        self._resident(job.model, run._progress)  # its own counts as used last
        return Ready(run, method, task, ids, params, residents)

    def _go(self, ready: "Ready") -> Iterator[Event]:
        """The run's events, from RunStarted to RunEnded, each recorded before it is given."""
        run, job, task = ready.run, ready.run.job, ready.task
        engines = {ref: resident.engine for ref, resident in ready.residents.items()}
        engine = engines[""]
        started = RunStarted(
            method=ready.method.name,
            model=engine.identity,
            prompt=task.prompt,
            prompt_ids=tuple(ready.ids[: len(ready.ids) - len(task.written)]),
            params=dict(vars(ready.params)),
            seed=secrets.randbelow(MAX_SEED + 1) if job.seed is None else job.seed,
            prefix=task.prefix,
            cost=engine.cost.as_mapping() if engine.cost else None,
            inputs=task.inputs,
        )
        run.id = self.recorder.begin(
            started,
            parent=job.fork.run if job.fork else None,
            fork_pos=job.fork.pos if job.fork else None,
            owner=job.owner,
            versions=_versions(),
        )
        self._remember(run)
        yield self._record(run, started)
        ctx = Context(
            started.seed,
            kept=lambda engine, ids: self._cursor_for(job.fork, engine, ids),
            engines=engines,
            cost=engine.cost,
            artifacts=StoredArtifacts(self.store, _model_key(engine)),
            history=lambda: self._history(run.id),
            earlier=self._earlier,
            assessors=registry.assessors,
            cancelled=lambda: bool(run._stop_reason),
        )
        status, reason = yield from self._drive(ready, ctx)
        self._keep(run, engine, ctx)
        ended = RunEnded(
            status,
            reason,
            tokens=sum(isinstance(s.event, Token) for s in run.events) - len(task.written),
            forwards=run._forwards,
            seconds=round(run.seconds, 6),
        )
        last = run._stamp(ended)
        run._say(last)
        self.recorder.end(run.id, last)
        yield ended

    def _drive(self, ready: "Ready", ctx: Context) -> Generator[Event, None, tuple[Status, str]]:
        """Draw the events out of the method, inference mode around each and never across them:
        between two of them other runs may have their turn with the same engines."""
        run, engines = ready.run, list(dict.fromkeys(ctx.engines.values()))
        events = ready.method.run(ctx.engine(), ready.task, ready.params, ctx)
        try:
            while True:
                run._poll()
                with _listening(run, engines), torch.inference_mode():
                    event = next(events)
                yield self._record(run, event)
        except StopIteration as end:
            return "done", end.value or "finished"
        except (Stopped, OutOfContext) as stopped:  # what was written until then is whole
            return "stopped", str(stopped)
        except CandorError as error:
            return "failed", str(error)
        except Exception as error:
            log.exception("method %s failed", run.job.method)
            return "failed", _inside(error)
        finally:
            events.close()

    def _earlier(self, run_id: str) -> list[Event]:
        """Raises: RunNotFound."""
        return [stamped.event for stamped in self.events(self.store.run(run_id).id)]

    def _history(self, own: str) -> Iterator[str]:
        """Prompts and answers of the runs before this one, newest first."""
        for run in self.store.runs(limit=READ_RUNS):
            if run.id >= own:  # ids sort by time: itself, and what another process began since
                continue
            yield f"{run.prompt_text}\n{run.prefix}{run.output}"

    def _record(self, run: Run, event: Event) -> Event:
        stamped = run._stamp(event)
        self.recorder.record(run.id, stamped)  # first: what cannot be stored is not shown either
        run._say(stamped)
        return event

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
        return Task(
            started.prompt,
            prefix=started.prefix,
            written=(*kept, forced),
            inputs=started.inputs,
        )

    def _cursor_for(self, fork: Fork | None, engine: Engine, ids: Sequence[int]) -> Cursor | None:
        """The kept cache of the run that is forked, cut to what it shares with `ids`."""
        maker, cursor = self._kept.get(fork.run, (None, None)) if fork else (None, None)
        if cursor is None or maker is not engine:
            return None
        shared = next(
            (n for n, (a, b) in enumerate(zip(cursor.ids, ids, strict=False)) if a != b),
            min(len(cursor.ids), len(ids)),
        )
        branch = engine.fork(cursor, shared)
        engine.extend(branch, ids[shared:])
        return branch

    def _keep(self, run: Run, engine: Engine, ctx: Context) -> None:
        if ctx.cursors:
            self._kept[run.id] = engine, ctx.cursors[0]
        while len(self._kept) > KEPT_CURSORS:
            self._kept.popitem(last=False)

    def _remember(self, run: Run) -> None:
        self._recent[run.id] = run
        while len(self._recent) > RECENT_RUNS:
            self._recent.popitem(last=False)


@contextmanager
def _listening(run: Run, engines: Sequence[Engine]) -> Iterator[None]:
    """The engines listen to this run, and their passes are counted as its own."""
    before = sum(each.forwards for each in engines)
    for engine in engines:
        engine.poll = run._poll
        engine.progress = lambda done, total: run._progress(
            f"Reading the prompt, {done:,} of {total:,} tokens", done / max(total, 1)
        )
    try:
        yield
    finally:
        for engine in engines:
            engine.poll = _no_poll
            engine.progress = _no_progress
        run._forwards += sum(each.forwards for each in engines) - before


def _check(job: Job) -> None:
    """What can be checked without the model. Raises: BadInput and its kinds."""
    method = registry.method(job.method)
    build(method.params, job.params)
    if job.fork is None:
        check(job.task)
        for name in method.card.takes:
            if not str(job.task.inputs.get(name, "")).strip():
                raise BadInput(f"{method.card.title} needs a {name}: give it beside the prompt.")
    if job.seed is not None and not 0 <= job.seed <= MAX_SEED:
        raise BadInput(f"The seed must be from 0 to {MAX_SEED:,}, not {job.seed}.")


def _with_seed(job: Job, seed: int) -> Job:
    return job if job.seed is not None else replace(job, seed=seed)


def plan(choice: ModelChoice, remote_code: bool, progress: Progress) -> tuple[ModelChoice, int]:
    """The choice with every "auto" decided, and the bytes that loading it takes at its peak; from
    the headers of its files, which are fetched if they are not on this disk.

    Raises: ModelError, BadInput, Stopped.
    """
    source = resolve(choice.ref, progress, remote_code)
    made = memory.plan(source, choice.quantization, choice.dtype, choice.device, choice.double)
    decided = replace(
        choice,
        quantization=made.quantization,
        dtype=str(made.dtype).removeprefix("torch."),
        device="split" if made.split else str(made.device),
    )
    return decided, made.peak


def _models_in(params: Any) -> list[ModelRef]:
    """The second models that the knobs name; "" names none."""
    named = (getattr(params, row.name) for row in knobs(type(params)) if row.kind is ModelRef)
    return [ref for ref in named if ref]


def _second(own: ModelChoice, ref: str) -> ModelChoice:
    """The model that a knob names: loaded as the run's own is, or as `name@quantization` says; a
    name left out is the run's own."""
    name, at, quantization = ref.rpartition("@")
    if not at or quantization not in get_args(Quantization):
        return replace(own, ref=ref)
    dtype = "auto" if quantization != own.quantization else own.dtype
    return replace(own, ref=name or own.ref, quantization=quantization, dtype=dtype)


def _model_key(engine: Engine) -> str:
    """What a model is, wherever it lies and runs."""
    of_it = {k: v for k, v in sorted(engine.identity.items()) if k not in OF_THIS_PLACE}
    return json.dumps(of_it)


def _cost_key(engine: Engine) -> str:
    device = str(engine.identity["device"])
    return f"{_model_key(engine)} on {device}, {machine(device)}"


def _no_poll() -> None:
    return None


def _no_progress(done: int, total: int) -> None:
    return None


def _inside(error: Exception) -> str:
    return f"Something inside failed ({type(error).__name__}); the details are in the log."


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "gradio")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
