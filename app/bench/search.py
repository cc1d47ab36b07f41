"""What searches take and what they find, on the default model.

RAIN keeps what it computed, writes its candidates side by side and asks its judge in both orders at
once; `reuse` off computes every text from its beginning, one after the other. Both must grow the
same tree, and take turns. Beside it stands plain decoding of as many tokens, and where the time of
a run goes. With a program as the judge, which is right by definition, each search is held against
plain sampling from the same prompts with the same seeds: how often has the answer what was wanted?
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from math import comb
from statistics import median
from typing import Any
from unittest.mock import patch

from analyzers import registry
from analyzers.common.alike import Alike
from analyzers.common.judges import Court
from analyzers.common.rewards import keywords
from analyzers.context import Context
from analyzers.engine import Engine, load
from analyzers.engine.loading import DEFAULT
from analyzers.errors import CandorError
from analyzers.params import build
from analyzers.search.rain import Search
from analyzers.task import Task, chat
from analyzers.trace import Event, Metric, SearchNode, Token, text_of
from app.bench import Progress, Row, row

ABOUT = "seconds and passes of RAIN with and without reuse, and what each search finds"
FASTER = 5.0
"""Times as fast as without reuse and batches."""
LEVEL = 0.05
"""Most that the probability of such a gain by chance may be."""
ADVICE = "My friend lied to me. What should I do?"
TOPICS = ("a day at the beach", "a garden in the morning", "an evening by the sea", "the desert")
WANTED = "sun"
DEFAULTS: Mapping[str, Any] = {}
PAPER: Mapping[str, Any] = {
    "iterations": 50,
    "least": 15,
    "candidates": 10,
    "lengths": (1, 2, 4, 10),
    "soft": False,
    "budget": 1_000_000,
    "max_new": 3,
}
"""The constants of the paper; of its text only two sets, or it would take an hour."""
WHOLE = {"temperature": 1.0, "top_p": 1.0}
PLANTED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "rain": ({"criterion": "keywords", "wish": WANTED, "gamma": 0.0}, WHOLE),
    "deal": ({"reward": "keywords", "wish": WANTED}, {"temperature": 0.8, "top_p": 0.95}),
    "best_of_n": ({"by": "keywords", "wish": WANTED, "n": 16}, WHOLE),
    "stick": (
        {"mode": "best of n", "checklist": f"keywords: {WANTED}"},
        WHOLE | {"temperature": 0.7},
    ),
    "spar": ({"checks": f"keywords: {WANTED}", "answers": 12}, {"temperature": 0.9, "top_p": 0.9}),
}
"""Method -> (its knobs, those of plain sampling that draws as it draws)."""


def measure(
    progress: Progress,
    *,
    model: str = DEFAULT,
    rounds: int = 1,
    seeds: int = 5,
    tokens: int = 24,
    paper: bool = True,
) -> list[Row]:
    """rounds: of the ways that take turns. seeds: of every prompt with a planted judge. tokens: of
    an answer there. paper: measure the paper's constants too, which takes minutes."""
    engine = load(model, quantization="none")
    rows = []
    for name, knobs in (("defaults", DEFAULTS), ("paper", PAPER))[: 1 + paper]:
        rows += _reuse(engine, name, knobs, rounds, progress)
    rows += _profile(engine, progress)
    for name in PLANTED:
        rows.append(_planted(engine, name, seeds, tokens, progress))
    return rows


@dataclass(frozen=True)
class Taken:
    """A run. passes: of the model, all of them."""

    events: list[Event]
    seconds: float
    passes: int

    @property
    def tree(self) -> list[tuple[Any, ...]]:
        """Every node as it was told last, its numbers to three places."""
        nodes = {event.node: event for event in self.events if isinstance(event, SearchNode)}
        return [
            (
                *(node.node, node.parent, node.text, node.status, node.real_visits),
                *(_rounded(node.value), _rounded(node.prior)),
            )
            for node in nodes.values()
        ]

    @property
    def tokens(self) -> int:
        return sum(isinstance(event, Token) for event in self.events)

    def last(self, metric: str) -> float:
        return [
            event.value
            for event in self.events
            if isinstance(event, Metric) and event.name == metric
        ][-1]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _taken(engine: Engine, method: str, prompt: str, seed: int, **knobs: Any) -> Taken:
    found = registry.method(method)
    params: Any = build(found.params, knobs)
    before, began = engine.forwards, time.perf_counter()
    events = list(found.run(engine, Task(chat(prompt)), params, Context(seed)))
    return Taken(events, time.perf_counter() - began, engine.forwards - before)


# Speed


def _reuse(
    engine: Engine, name: str, knobs: Mapping[str, Any], rounds: int, progress: Progress
) -> list[Row]:
    """How much faster reuse and batches are, and what a search costs against plain decoding."""
    _taken(engine, "rain", ADVICE, 0, iterations=1, max_new=1)  # the judge is examined once
    fast, slow, plain = [], [], []
    for turn in range(rounds):
        progress(f"RAIN, {name}: with reuse")
        fast.append(_taken(engine, "rain", ADVICE, turn, **knobs))
        progress(f"RAIN, {name}: without reuse")
        slow.append(_taken(engine, "rain", ADVICE, turn, **knobs, reuse=False))
        plain.append(_taken(engine, "sampling", ADVICE, turn, max_new=fast[-1].tokens))
        if fast[-1].tree != slow[-1].tree:
            raise CandorError("The search with reuse grew another tree than the one without.")
    ours, others, alone = (median(each.seconds for each in runs) for runs in (fast, slow, plain))
    looks = fast[-1].last("spent evaluations")
    return [
        row(f"rain, {name}: with reuse and batches", ours, "s", n=rounds),
        row(f"rain, {name}: without", others, "s", n=rounds),
        row(
            f"rain, {name}: times as fast",
            others / ours,
            "times",
            n=rounds,
            target=FASTER,
            better="more",
        ),
        row(f"rain, {name}: against plain decoding", ours, "s", n=rounds, baseline=alone),
        row(
            f"rain, {name}: passes",
            median(each.passes for each in fast),
            "passes",
            n=rounds,
            baseline=median(each.passes for each in plain),
        ),
        row(
            f"rain, {name}: passes of the writer a look",
            fast[-1].last("spent forwards") / looks,
            "passes",
            n=int(looks),
        ),
    ]


def _profile(engine: Engine, progress: Progress) -> list[Row]:
    """Shares of a run at the defaults."""
    progress("Where the time of RAIN goes")
    spent: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, what in (
            (Search, "simulate", "writing on"),
            (Search, "expand", "candidates"),
            (Court, "hear", "judge"),
            (Alike, "hear", "similarity"),
        ):
            stack.enter_context(_clocked(owner, name, what, spent))
        whole = _taken(engine, "rain", ADVICE, 0).seconds
    rest = whole - sum(spent.values())
    return [
        row(f"rain, share of its time: {what}", seconds / whole, "share", n=1)
        for what, seconds in (spent | {"the rest": rest}).items()
    ]


@contextmanager
def _clocked(owner: type, name: str, what: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every call to `spent`; of a generator those until it is used up."""
    original = getattr(owner, name)

    def timed(*given: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            found = original(*given, **options)
        finally:
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - began
        return _each(found, what, spent) if hasattr(found, "send") else found

    with patch.object(owner, name, timed):
        yield


def _each(events: Any, what: str, spent: dict[str, float]) -> Any:
    while True:
        began = time.perf_counter()
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        finally:
            spent[what] += time.perf_counter() - began
        yield event


# What is found


def _planted(engine: Engine, name: str, seeds: int, tokens: int, progress: Progress) -> Row:
    """The share of answers that have the wanted word, beside that of plain sampling. Target: such
    a gain has at most the probability LEVEL if both are equally good."""
    knobs, drawing = PLANTED[name]
    wanted = keywords(WANTED)
    pairs: list[tuple[bool, bool]] = []
    for topic, seed in product(TOPICS, range(seeds)):
        progress(f"{name} with a planted judge: {len(pairs)} of {seeds * len(TOPICS)}")
        prompt = f"Write one sentence about {topic}."
        searched = _taken(engine, name, prompt, seed, max_new=tokens, **knobs)
        sampled = _taken(engine, "sampling", prompt, seed, max_new=tokens, **drawing)
        pairs.append((wanted(text_of(searched.events)) == 1, wanted(text_of(sampled.events)) == 1))
    share, without = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    p = by_chance(pairs)
    return row(
        f"{name}, planted judge: {share:.0%} against {without:.0%} sampled; chance",
        p,
        "p",
        n=len(pairs),
        target=LEVEL,
    )


def by_chance(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Probability of so many pairs in which only the first is right, or more, if it is as often the
    second: exact, of the pairs that differ (McNemar)."""
    first = sum(a and not b for a, b in pairs)
    differ = sum(a != b for a, b in pairs)
    return sum(comb(differ, k) for k in range(first, differ + 1)) / 2**differ
