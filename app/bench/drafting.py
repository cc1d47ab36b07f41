"""Drafting on the 120 prompts of Spec-Bench: how many tokens a pass, and how much faster.

Every prompt is answered greedily, with at most 64 tokens, by plain decoding of this engine, by
each drafting method, and by transformers' plain and assisted generation; they take turns prompt by
prompt, in an order that rotates. The time is that of the whole run, the reading of the prompt
included, and the numbers of a category are ratios of totals: the tokens a second of a method over
those of plain decoding with the same weights. "tokens a pass" is the mean acceptance length M.

Ways that lost clearly on few prompts answer only the first of every category, and are compared
with plain decoding of these.

transformers writes in bfloat16 without any signals of its tokens; its confidence threshold is 0, so
that it drafts as many tokens as it is told to. Where two texts differ in half precision, the first
difference is looked at, and how far the two likeliest log-probabilities were apart there: bfloat16
has no numbers between 20 and 20.125, so logits of that size that close may come in either order.

Reads spec-bench-120.jsonl in the folder that --data or CANDOR_DATA names. What is done is kept in
the folder of the app's own files until all of it is, so a benchmark that was interrupted goes on.
"""

import gc
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from analyzers import registry
from analyzers.context import Context, Forgotten
from analyzers.engine import Engine, load
from analyzers.engine.cost import measure as measure_cost
from analyzers.engine.loading import DEFAULT
from analyzers.engine.signals import DIGITS
from analyzers.home import database_path
from analyzers.params import ModelRef, build
from analyzers.task import Task, chat
from analyzers.trace import DraftTree, Token
from app.bench import Progress, Row, data_file, row
from app.bench.decode import bare
from visualizations.race import NEAR_TIE

ABOUT = "tokens a pass and speed of every drafting method on 120 prompts (--limit N for fewer)"
FILE = "spec-bench-120.jsonl"
TOKENS = 64
PLAIN = "plain"
THEIRS, THEIR_LOOKUP, THEIR_EXIT = (
    "transformers: generate",
    "transformers: prompt_lookup_num_tokens",
    "transformers: assistant_early_exit",
)
EXIT = 0.8
"""Share of the layers that transformers' early exit drafts with."""
THEIR_LENGTH = 10
"""Tokens of transformers' drafts: what its documentation uses for prompt lookup."""
TARGET, EVERYWHERE = 1.4, 1.0
"""Times as fast as plain decoding overall; as transformers' best in every category."""
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "prompt_lookup": ("prompt_lookup", {}),
    "token_recycling": ("token_recycling", {}),
    "token_recycling, recycled alone": ("token_recycling", {"drafts": "recycled"}),
    "token_recycling, cold": ("token_recycling", {"drafts": "recycled", "start": "cold"}),
    "aded": ("aded", {}),
    "sjd": ("sjd", {}),
    "draft_model": ("draft_model", {}),
    "draft_model, int8": ("draft_model", {"draft": "@int8", "floor": 0.0}),
    "swift": ("swift", {}),
    "spectr": ("spectr", {}),
    "rsd": ("rsd", {}),
    "dyspec": ("dyspec", {}),
}
"""Name of a way -> the method, and the knobs that are not at their defaults."""
FAST = (PLAIN, "prompt_lookup", "token_recycling", "aded", THEIR_LOOKUP)
"""Ways that answer every prompt."""
PART = 26
"""Prompts that the others answer: two of each category."""


@dataclass(frozen=True)
class Done:
    """One prompt answered in one way. tokens, seconds: of the whole run. passes: of the target
    while writing (0: not known). drafted: nodes. predicted: what the passes take by the cost table,
    in plain steps. same: tokens at the beginning that plain decoding wrote as well. gap: between
    the two likeliest where the texts part, nats."""

    key: str
    way: str
    category: str
    tokens: int
    seconds: float
    passes: int = 0
    drafted: int = 0
    predicted: float = 0.0
    same: int = 0
    gap: float | None = None


@dataclass(frozen=True)
class Written:
    ids: Sequence[int]
    passes: int = 0
    drafted: int = 0
    predicted: float = 0.0
    gaps: Sequence[float] = ()


Way = Callable[[Task], Written]


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    data: str = "",
    limit: int = 0,
    ways: Sequence[str] = (),
) -> list[Row]:
    """Speed-up and tokens a pass of every way, by category and overall, in bfloat16 and `auto`.

    limit: prompts, taken from the categories in turn; 0 = all. ways: only these, beside plain.
    Raises: BadInput where the folder has no such file."""
    prompts = stratified(read(data), limit)
    rows: list[Row] = []
    files: list[Path] = []
    for name, quantization, dtype in (("bfloat16", "none", "bfloat16"), ("auto", "auto", "auto")):
        progress(f"Loading {model}, {name}")
        engine = load(model, quantization=quantization, dtype=dtype)
        engine.cost = measure_cost(engine, lambda: None)
        chosen = _ways(engine, model, theirs=name == "bfloat16", only=ways)
        files.append(_file([model, name, *map(str, engine.identity.values())]))
        rows += _rows(name, _answered(files[-1], name, prompts, chosen, progress))
        del engine, chosen
        gc.collect()
    for file in files:
        file.unlink(missing_ok=True)
    return rows


def read(folder: str) -> list[tuple[str, str]]:
    """(category, prompt), the first turn of each. Raises: BadInput."""
    text = data_file(FILE, folder).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["category"], line["turns"][0]) for line in lines]


def stratified(prompts: Sequence[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The first of each category, then the second of each, and so on; `limit` of them."""
    by: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for each in prompts:
        by[each[0]].append(each)
    turns = [each for turn in zip_longest(*by.values()) for each in turn if each]
    return turns[: limit or len(turns)]


def _answered(
    file: Path,
    name: str,
    prompts: Sequence[tuple[str, str]],
    ways: Mapping[str, Way],
    progress: Progress,
) -> list[Done]:
    """What every way did with every prompt; what the file has is not done again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = _kept(file)
    order, found = list(ways), []
    with torch.inference_mode():
        _warm_up(ways)
        for number, (category, prompt) in enumerate(prompts, 1):
            progress(f"{name}: prompt {number} of {len(prompts)}")
            key = _slug([prompt])
            task = Task(chat(prompt))
            plain: Written | None = None
            for way in sorted(order, key=lambda way: way != PLAIN):
                if number > PART and way not in FAST:
                    continue
                done = there.get((key, way))
                if done is None:
                    began = time.perf_counter()
                    written = ways[way](task)
                    seconds = time.perf_counter() - began
                    if way == PLAIN:
                        plain = written
                    plain = plain or ways[PLAIN](task)
                    done = _judged(key, way, category, written, seconds, plain)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(asdict(done)) + "\n")
                found.append(done)
            order = [*order[1:], order[0]]
    return found


def _judged(
    key: str, way: str, category: str, written: Written, seconds: float, plain: Written
) -> Done:
    same = next(
        (n for n, (a, b) in enumerate(zip(written.ids, plain.ids, strict=False)) if a != b),
        min(len(written.ids), len(plain.ids)),
    )
    parted = same < min(len(written.ids), len(plain.ids))
    return Done(
        key,
        way,
        category,
        len(written.ids),
        seconds,
        written.passes,
        written.drafted,
        written.predicted,
        same,
        plain.gaps[same] if parted else None,
    )


def _file(parts: Sequence[str]) -> Path:
    """Where what is done is kept, for this model with these settings."""
    return database_path().parent / "bench" / f"drafting-{_slug(parts)}.jsonl"


def _kept(file: Path) -> dict[tuple[str, str], Done]:
    """What an interrupted benchmark left; a last line that was cut off is done again."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            done = Done(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[done.key, done.way] = done
    return found


def _slug(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _warm_up(ways: Mapping[str, Way]) -> None:
    for way in ways.values():
        way(Task(chat("Say hello.")))


# Ways to answer


def _ways(engine: Engine, model: str, *, theirs: bool, only: Sequence[str]) -> dict[str, Way]:
    there = registry.methods()
    names = [name for name in SETTINGS if SETTINGS[name][0] in there]
    second = None
    ways: dict[str, Way] = {PLAIN: plainly(engine)}
    for name in names:
        if only and name not in only:
            continue
        method, knobs = SETTINGS[name]
        engines = {"": engine}
        if draft := knobs.get("draft"):
            if engine.identity["quantization"] == "int8":
                continue  # the same weights, which is no draft
            second = second or load(model, quantization="int8")
            second.cost = second.cost or measure_cost(second, lambda: None)
            engines[ModelRef(draft)] = second
        ways[name] = drafting(engine, engines, method, knobs)
    if theirs:
        loaded = bare(model, torch.bfloat16)
        layers = int(EXIT * engine.layers)
        for name, more in (
            (THEIRS, {}),
            (THEIR_LOOKUP, {"prompt_lookup_num_tokens": THEIR_LENGTH}),
            (THEIR_EXIT, {"assistant_early_exit": layers}),
        ):
            if not only or name in only:
                ways[name] = _generate(engine, loaded, more)
    return ways


def plainly(engine: Engine, most: int = TOKENS) -> Way:
    """Greedy, one token a pass."""
    method = registry.method("sampling")
    params: Any = build(method.params, {"temperature": 0.0, "max_new": most})

    def answer(task: Task) -> Written:
        events = [e for e in method.run(engine, task, params, Context(0)) if isinstance(e, Token)]
        gaps = [round(event.top[0][2] - event.top[1][2], DIGITS) for event in events]
        return Written([event.id for event in events], len(events), gaps=gaps)

    return answer


def drafting(
    engine: Engine,
    engines: Mapping[str, Engine],
    name: str,
    knobs: Mapping[str, Any],
    most: int = TOKENS,
) -> Way:
    """Greedy by a drafting method. What it learns about the model is kept from one prompt to the
    next, as in the app."""
    method, artifacts = registry.method(name), Forgotten()
    params: Any = build(method.params, {**knobs, "temperature": 0.0, "max_new": most})

    def answer(task: Task) -> Written:
        ctx = Context(0, engines=engines, cost=engine.cost, artifacts=artifacts)
        events = list(method.run(engine, task, params, ctx))
        ids = [event.id for event in events if isinstance(event, Token)]
        trees = [event for event in events if isinstance(event, DraftTree)]
        # A step without a tree writes one token, which is "sampled".
        alone = sum(isinstance(event, Token) and event.origin == "sampled" for event in events)
        predicted = alone + sum(tree.cost or 0.0 for tree in trees)
        drafted = sum(len(tree.ids) for tree in trees)
        return Written(ids, len(trees) + alone, drafted, predicted)

    return answer


def _generate(engine: Engine, model: PreTrainedModel, more: Mapping[str, Any]) -> Way:
    model.generation_config.num_assistant_tokens = THEIR_LENGTH
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0

    def answer(task: Task) -> Written:
        ids = engine.encode(task)
        given = torch.tensor([ids])
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=TOKENS,
            **more,
        )
        return Written(out[0, len(ids) :].tolist())

    return answer


# Rows


def _rows(name: str, done: Sequence[Done]) -> list[Row]:
    ways = list(dict.fromkeys(each.way for each in done))
    categories = ["overall", *dict.fromkeys(each.category for each in done)]
    rows: list[Row] = []
    for category in categories:
        here = [each for each in done if category in ("overall", each.category)]
        by = {way: [each for each in here if each.way == way] for way in ways}
        rows += _beside_plain(f"{name}, {category}", by)
        drafted = [way for way in ways if way in SETTINGS and way in FAST]
        best = max(drafted, key=lambda way: _rate(by[way]), default="")
        theirs = [way for way in (THEIR_LOOKUP, THEIR_EXIT) if way in by]
        if best and theirs:
            other = max(theirs, key=lambda way: _rate(by[way]))
            label = f"{name}, {category}: {best}, against {other}"
            rows.append(_speed(label, by[best], by[other], EVERYWHERE))
        if best and category == "overall":
            target = TARGET if name == "bfloat16" else None
            rows.append(_speed(f"{name}: the best, {best}", by[best], by[PLAIN], target))
    return rows + list(_texts(name, done, [way for way in ways if way in SETTINGS]))


def _beside_plain(label: str, by: Mapping[str, Sequence[Done]]) -> Iterator[Row]:
    """Speed and tokens a pass of every way in one category."""
    for way, done in by.items():
        yield _speed(f"{label}: {way}", done, by[PLAIN])
        passes = sum(each.passes for each in done)
        if passes and way != PLAIN:
            mean = sum(each.tokens for each in done) / passes
            unit = "tokens/pass"
            yield row(f"{label}: {way}, M", mean, unit, n=len(done), better="more")


def _speed(
    label: str, done: Sequence[Done], others: Sequence[Done], target: float | None = None
) -> Row:
    """Tokens a second, beside those of another way with the same prompts."""
    both = {each.key for each in done} & {each.key for each in others}
    rate, base = (_rate([each for each in way if each.key in both]) for way in (done, others))
    unit = "tokens/s"
    return row(label, rate, unit, n=len(both), baseline=base, target=target, better="more")


def _rate(done: Sequence[Done]) -> float:
    """Tokens a second, a ratio of totals."""
    return sum(each.tokens for each in done) / sum(each.seconds for each in done)


def _texts(name: str, done: Sequence[Done], ways: Sequence[str]) -> Iterator[Row]:
    """How many answers are plain decoding's, and how many part at no near-tie."""
    for way in ways:
        here = [each for each in done if each.way == way]
        gaps = [each.gap for each in here if each.gap is not None]
        far = sum(gap > NEAR_TIE for gap in gaps)
        predicted = sum(each.predicted for each in here)
        yield row(
            f"{name}: {way}, the plain text",
            100 * (1 - len(gaps) / len(here)),
            "%",
            n=len(here),
            better="more",
        )
        yield row(f"{name}: {way}, parted at no near-tie", far, "answers", n=len(here))
        yield row(
            f"{name}: {way}, largest gap where they part", max(gaps, default=0), "nats", n=len(here)
        )
        if predicted:
            tokens = sum(each.tokens for each in here)
            yield row(
                f"{name}: {way}, predicted",
                tokens / predicted,
                "x plain",
                n=len(here),
                better="more",
            )
