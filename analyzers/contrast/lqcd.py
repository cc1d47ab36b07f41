"""Leading-query contrast: the answer moves away from where a hint in the question pushes it.

Source: LQCD: Zhao, Zhang, Xiao, Ke et al. 2024, "Towards Analyzing and Mitigating Sycophancy in
        Large Vision-Language Models", arXiv:2408.11261.
Idea:   two branches answer the same question, asked neutrally and with a leading hint, and write
        the same tokens; s = (1 + a) z(y | neutral) - a z(y | leading), on the tokens that the
        neutral branch finds plausible.
Differs from the source: in text only, pictures are not taken yet. The neutral question is made by
        rule (common/neutral.py), or where the prompt does not lead the hint is added to it. The
        paper's constants are not known to us: a = 1, b = 0.1 are those of VCD, which it follows.
        The decay is ours, for late tokens, where the two answers part in form as well. Left out:
        the sentiment scaler and the adaptive filter of its second version. At a = 0 this is the
        plain answer to the neutral question, which is the baseline to beat: it is written beside.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from math import exp
from statistics import fmean

from analyzers.card import Card
from analyzers.common import contrast
from analyzers.common.contrast import At, Branch, Fused, Rule
from analyzers.common.neutral import neutralise
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Step, token
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadInput, BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import MAIN, Candidate, Event, Lens, Metric, Note, Scores, Token

CARD = Card(
    "Leading-query contrast",
    family="contrast",
    source="Zhao et al. 2024 (LQCD), arXiv:2408.11261",
    emits=(Token, Lens, Scores, Candidate, Metric, Note),
    needs=("logits", "fork"),
)
NEUTRAL, LEADING = "neutral", "leading"
_CUE = re.compile(r"\s*\n[^\n]{0,20}:[ \t]*$")


@dataclass(frozen=True)
class Params:
    """Defaults of VCD, which the paper follows; the hint, the decay and the length are ours."""

    strength: float = knob(
        1.0, "How far to move away from the led answer; 0 = the neutral one", lo=0, hi=1.5
    )  # a
    hint: str = knob(
        "I believe the usual answer has been wrong for years.",
        "What leads, where the prompt does not lead by itself",
        lines=2,
    )
    answers: bool = knob(True, "Also write the plain answers to both questions, greedily")
    alpha: float = knob(
        0.1, "Drop tokens less likely than this times the best; 1 = greedy", lo=0, hi=1
    )  # b
    decay: float = knob(1.0, "Strength at each token, times that at the one before", lo=0, hi=1)
    temperature: float = knob(0.0, "0 = the best score, above 1 flattens", lo=0, hi=2)
    max_new: int = knob(64, "When to stop writing", lo=1, hi=4096, unit="tokens")


@dataclass(frozen=True)
class Asked:
    """The same task with both questions, and what was done to get the one that is missing."""

    neutral: Task
    leading: Task
    told: str


def asked(task: Task, hint: str) -> Asked:
    """Both forms of the last question: of a conversation its last turn, of a raw text what stands
    behind the last empty line.

    Raises: BadInput where nothing is left without what leads, or for a picture; BadParameter where
    neither prompt nor hint leads.
    """
    if "image" in task.inputs:
        raise BadInput("Pictures cannot be contrasted yet: ask in text alone.")
    if task.written and task.written[0].pos == 0:
        raise BadInput("A text that was only read has no question to rephrase: ask one.")
    question = _question(task)
    neutral = neutralise(question)
    if neutral.changes:
        out = ", ".join(
            f"“{was}”" + (f" (now “{now}”)" if now else "") for was, now in neutral.changes
        )
        told = f"The prompt leads: the neutral question is without {out}, and the hint is not used."
        return Asked(_ask(task, neutral.text), task, told)
    if not hint.strip():
        raise BadParameter("The prompt does not lead, so hint must say what does.")
    led = _led(question, hint.strip(), raw=isinstance(task.prompt, str))
    told = f"The prompt does not lead by itself: “{hint.strip()}” is added in the leading question."
    return Asked(task, _ask(task, led), told)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield both prompts; per token of the contrast the Token, the branches, and how far the hint
    pushed it (log p_leading - log p_neutral, nats); then the plain answers in lanes of their own.

    Positions of the main lane are those behind the neutral prompt, also of tokens that stay of an
    earlier run. Raises: as `asked`; OutOfContext.
    """
    both = asked(task, params.hint)
    yield from _kept(engine, both.neutral, MAIN)
    for name, form in ((NEUTRAL, both.neutral), (LEADING, both.leading)):
        yield Candidate(f"{name} prompt", "prompts", _question(form))
    yield Note("info", both.told)
    branches, rule = _branches(engine, both, params, ctx)
    plain = {b.name: engine.fork(b.cursor) for b in branches} if params.answers else {}
    lanes: dict[str, list[Token]] = {MAIN: []}

    def say(at: At) -> Iterator[Event]:
        lanes[MAIN].append(at.token)
        yield contrast.table(at)
        yield contrast.number(at.token.pos, "pushed by the hint", "nats", _pushed(at))

    why = yield from contrast.write(
        ctx,
        branches,
        rule,
        max_new=params.max_new,
        temperature=params.temperature,
        say=say,
    )
    if plain:
        for name, form in ((NEUTRAL, both.neutral), (LEADING, both.leading)):
            yield from _kept(engine, form, name)
        for written in _greedy(engine, plain, params.max_new):
            lanes.setdefault(written.lane, []).append(written)
            yield written
    yield from _compared(lanes)
    return why


def contrasted(
    engine: Engine, task: Task, params: Params, ctx: Context
) -> tuple[list[Branch], Rule]:
    """The neutral and the leading branch behind their prompts, and how they are fused."""
    return _branches(engine, asked(task, params.hint), params, ctx)


def fused_by(strength: float, alpha: float, decay: float, start: int) -> Rule:
    """The rule of this method. Its strength at position t is strength * decay ** (t - start)."""

    def rule(steps: Sequence[Step]) -> Fused:
        neutral, leading = steps
        a = strength * decay ** (neutral.pos - start)
        return contrast.fuse(neutral.logits, [(1 + a, neutral.raw), (-a, leading.raw)], alpha)

    return rule


def _branches(
    engine: Engine, both: Asked, params: Params, ctx: Context
) -> tuple[list[Branch], Rule]:
    neutral = Branch(NEUTRAL, engine, ctx.begin(engine, engine.encode(both.neutral)))
    leading = Branch(LEADING, engine, engine.prefill(engine.encode(both.leading)))
    start = neutral.cursor.pos - len(both.neutral.written)
    return [neutral, leading], fused_by(params.strength, params.alpha, params.decay, start)


# The two questions


def _question(task: Task) -> str:
    """The part of the prompt that is neutralised or led."""
    if isinstance(task.prompt, str):
        return task.prompt.rpartition("\n\n")[2]
    return task.prompt[-1]["content"]


def _ask(task: Task, question: str) -> Task:
    """The same task with another question."""
    if isinstance(task.prompt, str):
        before, gap, _ = task.prompt.rpartition("\n\n")
        return replace(task, prompt=f"{before}{gap}{question}")
    return replace(task, prompt=(*task.prompt[:-1], {**task.prompt[-1], "content": question}))


def _led(question: str, hint: str, raw: bool) -> str:
    """The hint follows the question; in a raw text it stands before a cue like "A:" at the end, and
    in front of a sentence that breaks off, because that must go on as it was."""
    cue = _CUE.search(question) if raw else None
    end = cue.start() if cue else len(question.rstrip())
    if raw and not cue and question[:end][-1:] not in ".!?":
        return f"{hint} {question}"
    return f"{question[:end]} {hint}{question[end:]}"


# The lanes


def _kept(engine: Engine, task: Task, lane: str) -> Iterator[Token]:
    """The tokens of an earlier run, where they stand behind this prompt."""
    start = len(engine.encode(replace(task, written=())))
    for pos, written in enumerate(task.written, start):
        yield replace(written, pos=pos, lane=lane)


def _greedy(engine: Engine, cursors: dict[str, Cursor], max_new: int) -> Iterator[Token]:
    """What the model writes behind each, side by side; the lane is the cursor's name."""
    going = dict(cursors)
    for _ in range(max_new):
        going = {lane: cursor for lane, cursor in going.items() if cursor.pos < engine.context}
        if not going:
            return
        steps = engine.step(list(going.values()))
        for (lane, cursor), step in zip(list(going.items()), steps, strict=True):
            written = token(engine, step, int(step.logits.argmax()))
            engine.push(cursor, written.id)
            yield replace(written, lane=lane)
            if engine.ends(written.id):
                del going[lane]


def _pushed(at: At) -> float:
    """How much likelier the hint made the written token, nats."""
    neutral, leading = (step.raw.log_softmax(-1)[at.token.id] for step in at.steps)
    return float(leading - neutral)


def _compared(lanes: dict[str, list[Token]]) -> Iterator[Metric]:
    """How sure the model was of each answer, and how much of one is not in the other."""
    names = {MAIN: "contrast", NEUTRAL: NEUTRAL, LEADING: LEADING}
    for lane, tokens in lanes.items():
        sure = [exp(each.logprob) for each in tokens if each.logprob is not None]
        if sure:  # a full context leaves none
            mean = round(fmean(sure), DIGITS)
            yield Metric(f"mean confidence, {names[lane]}", 0, mean, "probability")
    for first, second in ((NEUTRAL, LEADING), (NEUTRAL, MAIN), (LEADING, MAIN)):
        if first in lanes and second in lanes:
            share = changed([each.id for each in lanes[first]], [each.id for each in lanes[second]])
            name = f"tokens that change, {names[first]} to {names[second]}"
            yield Metric(name, 0, round(share, DIGITS), "share")


def changed(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of the tokens of two texts that the other has not in the same order; 0 = equal texts,
    1 = nothing in common."""
    return 1 - SequenceMatcher(None, first, second, autojunk=False).ratio()
