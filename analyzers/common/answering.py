"""Short answers to many questions at once, and what a signal about such an answer is.

Questions that begin alike are read once up to where they part; answers are written side by side,
each up to the end of its first line.
"""

import json
import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analyzers.common.asking import instruction
from analyzers.common.judges import Scale, Verdict
from analyzers.common.prefixes import shared
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters
from analyzers.engine.signals import chosen, token
from analyzers.errors import BadInput
from analyzers.task import Task
from analyzers.trace import Judgement, Token

SIDE_BY_SIDE = 16
"""Answers that are written at once: more rows a pass, and more that wait for the longest."""
GREEDY = Filters(temperature=0)
Signals = Mapping[str, Scale]
"""The signals of a method, by name. A scale whose third part is "surer" rises with trust, one with
"less sure" falls."""
TRUST = ("workbench", "trust")
"""Method and name of the artifact with what is known about the signals of a model."""
SURER, LESS_SURE = "surer", "less sure"


@dataclass(frozen=True)
class Asked:
    """A question in its place. shown: the worked examples before it, in text. ids: of everything
    behind which it is answered."""

    id: str
    question: str
    shown: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """An answer. tokens: all of them, with the one that ended it. text: its first line with text.
    ended: by itself, with a new line or an end token, and not for lack of room."""

    tokens: tuple[Token, ...]
    text: str
    ended: bool

    @property
    def logprob(self) -> float:
        """Of all its tokens, nats."""
        return math.fsum(token.logprob or 0.0 for token in self.tokens)


@dataclass(frozen=True)
class Answered:
    """What a signal is about: the greedy answer to a question."""

    asked: Asked
    written: Written


Assessments = Iterator[Mapping[str, Verdict]]
"""For each answer, in order: what every signal of a method says of it."""


def trusted(ctx: Context) -> Mapping[str, Mapping[str, Any]]:
    """What the workbench has found out about the signals of this model, by name: their "auroc"
    with "lo" and "hi" of its interval, "ece" or None, on which "data", of how many questions "n".
    """
    found = ctx.artifacts.get(*TRUST)
    known: Mapping[str, Mapping[str, Any]] = json.loads(found[0]) if found else {}
    return known


def trust_of(name: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """For the detail of a Judgement, so that a stored run shows what was known then."""
    return {"trust": dict(known[name])} if name in known else {}


def ask(engine: Engine, id: str, question: str, shown: str = "") -> Asked:
    """The question behind its examples, in the few-shot form of questions.py."""
    ids = engine.tokenizer(f"{shown}Question: {question}\nAnswer:")["input_ids"]
    return Asked(id, question, shown, tuple(ids))


def answers(
    engine: Engine,
    asked: Sequence[Asked],
    max_new: int,
    rngs: Sequence[random.Random | None],
    filters: Filters = GREEDY,
) -> list[Written]:
    """One answer to each question; drawn where a generator is given, else greedy. Gives the same
    whatever is answered beside it, to the accuracy of the arithmetic.

    Raises: OutOfContext, Stopped, ModelBroken; BadInput for a `max_new` below 1."""
    if max_new < 1:
        raise BadInput(f"An answer needs room for a token: max_new is {max_new}.")
    found: list[Written] = []
    for first in range(0, len(asked), SIDE_BY_SIDE):
        some = slice(first, first + SIDE_BY_SIDE)
        cursors = behind(engine, [each.ids for each in asked[some]])
        found += _lines(engine, cursors, rngs[some], max_new, filters)
    return found


def behind(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Cursor]:
    """A cursor behind each prompt; what all begin with is computed once."""
    common = min(shared(prompts[0], prompt) for prompt in prompts)
    # The last token stays pending, and every cursor needs one of its own.
    common = min(common, min(map(len, prompts)) - 1)
    if common < 1:
        return [engine.prefill(prompt) for prompt in prompts]
    stem = engine.prefill(prompts[0][:common])
    known: dict[tuple[int, ...], Cursor] = {}
    cursors = []
    for prompt in map(tuple, prompts):
        if prompt in known:
            cursors.append(engine.fork(known[prompt]))
            continue
        known[prompt] = engine.fork(stem)
        engine.extend(known[prompt], prompt[common:])
        cursors.append(known[prompt])
    return cursors


def spoken(
    engine: Engine, cursor: Cursor, max_new: int
) -> Generator[Token, None, tuple[list[Token], str]]:
    """Yield the greedy answer behind `cursor`, all its lines; return it and why it ended."""
    tokens: list[Token] = []
    while len(tokens) < max_new:
        if cursor.pos == engine.context:
            return tokens, "context full"
        step = engine.step(cursor, filters=GREEDY)
        tokens.append(token(engine, step, int(step.raw.argmax())))
        yield tokens[-1]
        engine.push(cursor, tokens[-1].id)
        if engine.ends(tokens[-1].id):
            return tokens, "end of text"
    return tokens, "max_new reached"


def answered(
    engine: Engine, task: Task, ctx: Context, max_new: int
) -> Generator[Token, None, Answered]:
    """Yield the greedy answer to a prompt; return it as what signals are about.

    Raises: OutOfContext; BadInput for an answer that was begun already."""
    question, ids = instruction(task), engine.encode(task)
    tokens, why = yield from spoken(engine, ctx.begin(engine, ids), max_new)
    text = engine.vocabulary.decode([each.id for each in tokens]).strip()
    asked = Asked("answer", question, "", tuple(ids))
    return Answered(asked, Written(tuple(tokens), text, why == "end of text"))


def judgement(
    name: str, verdict: Verdict, scale: Scale, ctx: Context, *, passes: int, ms: float
) -> Judgement:
    """What a signal says of the answer on the page, with what is known of the signal."""
    return Judgement(
        name,
        "answer",
        name,
        verdict.score,
        scale,
        verdict=verdict.verdict,
        label_mass=verdict.label_mass,
        rationale=verdict.rationale,
        detail={**verdict.detail, **trust_of(name, trusted(ctx))},
        passes=passes,
        ms=round(ms, 3),
    )


def first_line(text: str) -> str:
    """The first line that has text; "" where none has."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def groups(items: Sequence[Answered], size: int) -> Iterator[Sequence[Answered]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _lines(
    engine: Engine,
    cursors: Sequence[Cursor],
    rngs: Sequence[random.Random | None],
    max_new: int,
    filters: Filters,
) -> list[Written]:
    tokens: list[list[Token]] = [[] for _ in cursors]
    texts = [""] * len(cursors)
    ended = [False] * len(cursors)
    going = [place for place, cursor in enumerate(cursors) if cursor.pos < engine.context]
    while going:
        steps = engine.step([cursors[place] for place in going], filters=filters)
        for place, step in zip(tuple(going), steps, strict=True):
            rng = rngs[place]
            if rng is None:
                made = token(engine, step, int(step.raw.argmax()))
            else:
                made = chosen(engine, step, rng, filters.temperature)
            engine.push(cursors[place], made.id)
            tokens[place].append(made)
            texts[place] = engine.vocabulary.decode([each.id for each in tokens[place]])
            ended[place] = engine.ends(made.id) or "\n" in texts[place].lstrip()
            full = len(tokens[place]) == max_new or cursors[place].pos == engine.context
            if ended[place] or full:
                going.remove(place)
    return [
        Written(tuple(its), first_line(text), end)
        for its, text, end in zip(tokens, texts, ended, strict=True)
    ]
