"""The workbench: many questions with known answers, and what each signal says before it is known.

Each question is answered greedily behind worked examples; the answer is scored; every signal that
was chosen is read of it. All of it is told as events, a question at a time, so that a run that was
broken off can be gone on with: what it had finished is taken over and never computed again.

It stands beside the registry and not among the methods because it uses them: a method of the
judging family that has SIGNALS and `assess` can be chosen here.
"""

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyzers import registry
from analyzers.card import Card
from analyzers.common.answering import (
    SURER,
    TRUST,
    Answered,
    Signals,
    Written,
    answers,
    ask,
    trusted,
)
from analyzers.common.judges import Scale, Verdict
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadInput
from analyzers.evaluation.built_in import built_in
from analyzers.evaluation.intervals import RESAMPLES, wilson
from analyzers.evaluation.questions import (
    Fingerprint,
    Question,
    QuestionSet,
    fingerprint,
    first,
    refuse_changed,
)
from analyzers.evaluation.reading import read
from analyzers.evaluation.scoring import score
from analyzers.evaluation.trust import PROBABILITIES, RANKS, Surer, Trust, trust
from analyzers.params import FileRef, build, knob
from analyzers.task import Task
from analyzers.trace import Artifact, Candidate, Event, Judgement, Metric, RunStarted

NAME = "workbench"
CARD = Card(
    "Calibration workbench",
    family="judging",
    source="Kadavath et al. 2022, arXiv:2207.05221",
    emits=(Artifact, Candidate, Judgement, Metric),
    starts_as="raw",
)
DEFAULT_SIGNALS = "sequence_logprob, mean_logprob, min_logprob, mean_entropy, p_true"
RIGHT = "right"
"""Judge of the Judgement that says whether the answer is right: score 1 or 0."""
QUESTIONS = "questions"
"""Key of the Artifact that says what was asked."""
BATCH = 16
"""Questions that are answered, scored and told together; a stop loses no more than these."""


@dataclass(frozen=True)
class Params:
    data: str = knob("capitals", "Built-in: capitals, elements, arithmetic, misconceptions")
    file: FileRef = knob(FileRef(""), "Or your own: a CSV or JSON Lines file")
    columns: str = knob("", "Its columns where the guess is wrong: question=Frage, answers=Antwort")
    encoding: str = knob("", "Of the file; empty = UTF-8")
    shots: int = knob(4, "Its first questions that become worked examples", lo=0, hi=100)
    signals: str = knob(DEFAULT_SIGNALS, "What to measure, by commas")
    limit: int = knob(0, "Only so many questions; 0 = all", lo=0, hi=20_000, unit="questions")
    max_new: int = knob(16, "Longest answer", lo=1, hi=512, unit="tokens")
    resume: str = knob("", "Id of a run that was broken off: its questions are not asked again")


@dataclass
class Item:
    """A question, its answer and what is known of it. scores: by signal."""

    question: Question
    answer: str = ""
    logprob: float | None = None
    right: bool = False
    why: str = ""
    scores: dict[str, Verdict] = field(default_factory=dict)


def signals() -> dict[str, registry.Method]:
    """Every signal there is, by name, and the method that measures it."""
    return {
        name: method for method in registry.assessors().values() for name in (method.signals or {})
    }


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the set as an Artifact ("questions"), then for each question a Candidate (key = its
    id), a Judgement by "right" and one by each signal, all with the id as target; and while it
    goes on and at the end Metrics: "done", "accuracy", and of each signal its AUROC.

    The task's prompt only names the run. Raises: BadInput for a set, a signal or a run to go on
    from that does not exist or does not fit; OutOfContext for a question that is too long.
    """
    asked = questions(params)
    chosen = chosen_signals(params.signals)
    mark = fingerprint(asked)
    finished = _finished(ctx, params, asked, mark)
    yield Artifact(
        QUESTIONS,
        "questions",
        {
            "name": asked.name,
            "n": len(asked.questions),
            "digest": mark.digest,
            "rows": mark.rows,
            "signals": tuple(chosen),
        },
    )
    done: list[Item] = []
    left = [question for question in asked.questions if question.id not in finished]
    for question in asked.questions:
        if question.id in finished:
            done.append(Item(question))
            for event in finished[question.id]:
                _take_over(done[-1], event)
                yield event
    yield from _progress(done, len(asked.questions))
    for start in range(0, len(left), BATCH):
        fresh = _answered(engine, asked, left[start : start + BATCH], chosen, params, ctx)
        for item in fresh:
            yield from _told(item, chosen)
        done += fresh
        yield from _progress(done, len(asked.questions))
    found = trusts(done, chosen, resamples=RESAMPLES)
    _remember(ctx, asked.name, found)
    for name, each in found.items():
        auroc = each.metrics["auroc"].value
        if auroc is not None:
            yield Metric(f"AUROC of {name}", len(done), round(auroc, DIGITS), "")
    return f"{len(done):,} questions"


def questions(params: Params) -> QuestionSet:
    """The set that the knobs name. Raises: BadInput."""
    limit = params.limit or None
    if not params.file:
        return first(built_in(params.data.strip()), limit)
    return read(
        Path(params.file),
        _columns(params.columns),
        limit,
        shots=params.shots,
        encoding=params.encoding.strip() or None,
    )


def chosen_signals(given: str) -> Signals:
    """The scales of the signals named, in their order. Raises: BadInput."""
    known = signals()
    wanted = dict.fromkeys(part.strip() for part in given.split(",") if part.strip())
    for name in wanted:
        if name not in known:
            raise BadInput(f"There is no signal {name!r}; there are: {', '.join(known)}.")
    if not wanted:
        raise BadInput(f"Choose at least one signal: {', '.join(known)}.")
    return {name: (known[name].signals or {})[name] for name in wanted}


def items(events: Iterable[Event]) -> list[Item]:
    """What a workbench's run has found, in its order; questions that it had not finished are left
    out."""
    by_id: dict[str, Item] = {}
    whole: list[Item] = []
    for event in events:
        if isinstance(event, Candidate):
            by_id[event.key] = Item(Question(event.key, "", ()))
            _take_over(by_id[event.key], event)
        elif isinstance(event, Judgement) and event.target in by_id:
            _take_over(by_id[event.target], event)
            if event.judge == RIGHT:
                whole.append(by_id[event.target])
    return whole


def trusts(
    done: Sequence[Item], chosen: Signals, *, resamples: int = 0, seed: int = 0
) -> dict[str, Trust]:
    """How far each signal can be trusted on these questions."""
    right = [item.right for item in done]
    return {
        name: trust(
            [item.scores[name].score if name in item.scores else None for item in done],
            right,
            surer=surer(scale),
            probability=scale[3],
            seed=seed,
            resamples=resamples,
        )
        for name, scale in chosen.items()
    }


def surer(scale: Scale) -> Surer:
    return "higher" if scale[2] == SURER else "lower"


def report(events: Iterable[Event], *, seed: int = 0) -> dict[str, Any]:
    """A run in numbers, ready for JSON: n, accuracy, and of each signal every metric with its 95 %
    interval, [lo, hi] or null. Metrics that need probabilities are null for other signals."""
    told = list(events)
    mark = next(
        (each for each in told if isinstance(each, Artifact) and each.key == QUESTIONS), None
    )
    done = items(told)
    if mark is None or not done:
        return {"data": mark.meta["name"] if mark else "", "n": 0, "accuracy": None, "signals": []}
    chosen = chosen_signals(",".join(mark.meta["signals"]))
    share = wilson(sum(item.right for item in done), len(done))
    return {
        "data": mark.meta["name"],
        "n": len(done),
        "accuracy": share.value,
        "accuracy_interval": [share.lo, share.hi],
        "signals": [
            _signal(name, found, chosen[name])
            for name, found in trusts(done, chosen, resamples=RESAMPLES, seed=seed).items()
        ],
    }


# Inside


def _signal(name: str, found: Trust, scale: Scale) -> dict[str, Any]:
    told: dict[str, Any] = {
        "signal": name,
        "direction": f"higher = {scale[2]}",
        "probability": found.probability,
        "n": found.n,
        "dropped": found.dropped,
        "why": found.why,
    }
    for metric in (*RANKS, *PROBABILITIES):
        measured = found.metrics.get(metric)
        told[metric] = measured.value if measured else None
        known = measured is not None and measured.lo is not None
        told[f"{metric}_interval"] = [measured.lo, measured.hi] if known and measured else None
    return told


def _answered(
    engine: Engine,
    asked: QuestionSet,
    some: Sequence[Question],
    chosen: Signals,
    params: Params,
    ctx: Context,
) -> list[Item]:
    """These questions answered, scored and measured."""
    put = [ask(engine, each.id, each.prompt, asked.shown) for each in some]
    written = answers(engine, put, params.max_new, [None] * len(put))
    found = [_item(question, its) for question, its in zip(some, written, strict=True)]
    answered = [Answered(each, its) for each, its in zip(put, written, strict=True)]
    for method in {known.name: known for known in map(signals().get, chosen) if known}.values():
        assess: Any = method.assess
        said = assess(engine, answered, build(method.params, {}), ctx)
        for item, verdicts in zip(found, said, strict=True):
            item.scores |= {name: each for name, each in verdicts.items() if name in chosen}
    return found


def _item(question: Question, written: Written) -> Item:
    scored = score(written.text, question)
    logprob = round(written.logprob, DIGITS)
    return Item(question, written.text, logprob, scored.right, scored.why)


def _told(item: Item, chosen: Signals) -> Generator[Event, None, None]:
    """The verdict on the answer comes last: with it the question is finished."""
    question = item.question
    yield Candidate(question.id, "answers", item.answer, item.logprob)
    for name, verdict in item.scores.items():
        yield Judgement(
            f"{name} of {question.id}",
            question.id,
            name,
            verdict.score,
            chosen[name],
            verdict=verdict.verdict,
            label_mass=verdict.label_mass,
            detail=dict(verdict.detail),
            passes=verdict.passes,
        )
    yield Judgement(
        f"{RIGHT} of {question.id}",
        question.id,
        RIGHT,
        float(item.right),
        (0.0, 1.0, "better", False),
        verdict=RIGHT if item.right else "wrong",
        rationale=item.why,
        detail={
            "question": question.prompt,
            "accepted": question.accepted,
            "category": question.category,
            "difficulty": question.difficulty,
        },
    )


def _take_over(item: Item, event: Event) -> None:
    """What an event says of a question."""
    if isinstance(event, Candidate):
        item.answer, item.logprob = event.text, event.logprob
    elif isinstance(event, Judgement) and event.judge == RIGHT:
        item.right, item.why = event.score == 1, event.rationale
        its = event.detail
        item.question = Question(
            event.target,
            str(its.get("question", "")),
            tuple(its.get("accepted", ())),
            difficulty=its.get("difficulty"),
            category=str(its.get("category", "")),
        )
    elif isinstance(event, Judgement):
        item.scores[event.judge] = Verdict(
            event.score, event.verdict, event.label_mass, detail=event.detail, passes=event.passes
        )


def _finished(
    ctx: Context, params: Params, asked: QuestionSet, mark: Fingerprint
) -> Mapping[str, Sequence[Event]]:
    """The events of each question that the run to go on from has finished."""
    if not params.resume.strip():
        return {}
    earlier = list(ctx.earlier(params.resume.strip()))
    _refuse_other(earlier, params, ctx)
    before = next(
        (each for each in earlier if isinstance(each, Artifact) and each.key == QUESTIONS), None
    )
    if before is None:
        return {}
    rows = tuple((str(id), str(digest)) for id, digest in before.meta["rows"])
    refuse_changed(Fingerprint(str(before.meta["digest"]), rows), mark)
    by_id: dict[str, list[Event]] = {}
    whole = set()
    for event in earlier:
        if isinstance(event, Candidate):
            by_id[event.key] = [event]
        elif isinstance(event, Judgement) and event.target in by_id:
            by_id[event.target].append(event)
            if event.judge == RIGHT:
                whole.add(event.target)
    return {id: events for id, events in by_id.items() if id in whole}


def _refuse_other(earlier: Sequence[Event], params: Params, ctx: Context) -> None:
    """Raises: BadInput where the earlier run is not one that this one can go on from."""
    started = next((event for event in earlier if isinstance(event, RunStarted)), None)
    if started is None or started.method != NAME:
        raise BadInput("That run was no run of the workbench: there is nothing to go on from.")
    for name in ("signals", "max_new"):
        before, now = started.params.get(name), getattr(params, name)
        if before != now:
            raise BadInput(f"That run had {name} {before!r} and not {now!r}: start a new one.")
    if started.model.get("hash") != ctx.engine().identity["hash"]:
        raise BadInput("That run was made with another model: load that one to go on with it.")


def _remember(ctx: Context, data: str, found: Mapping[str, Trust]) -> None:
    """Keep what was found of each signal, to stand beside it wherever it appears; too few answers,
    or answers of one kind only, say nothing."""
    known = dict(trusted(ctx))
    for name, each in found.items():
        auroc, ece = each.metrics["auroc"], each.metrics.get("ece")
        if each.few or auroc.value is None:
            continue
        known[name] = {
            "auroc": auroc.value,
            "lo": auroc.lo,
            "hi": auroc.hi,
            "ece": ece.value if ece else None,
            "data": data,
            "n": each.n,
        }
    ctx.artifacts.put(*TRUST, json.dumps(known).encode())


def _progress(done: Sequence[Item], n: int) -> Generator[Metric, None, None]:
    yield Metric("done", len(done), len(done) / n, "share")
    if done:
        share = sum(item.right for item in done) / len(done)
        yield Metric("accuracy", len(done), round(share, DIGITS), "share")


def _columns(given: str) -> dict[str, str] | None:
    pairs = [part.partition("=") for part in given.split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise BadInput("Columns are given as question=NAME, answers=NAME.")
    return {what.strip(): column.strip() for what, _, column in pairs} or None
