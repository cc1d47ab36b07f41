"""P(True): the model is shown its own answer and asked whether it is true.

Source: Kadavath et al. 2022 (arXiv:2207.05221), section 3 and appendix; the prompts are our words
        in its form: the question, the proposed answer, "(A) True (B) False", and the letter.
Idea:   P(True) = p(A) / (p(A) + p(B)) of the letter that comes next. It is asked in both orders and
        averaged, since small models like one letter whatever it stands for; the difference is
        shown as position bias, and what the letters have of all probability as label mass.
Differs from the source: both orders (there: one); the worked judgements that can be shown are six
        of our own instead of 20 of the same task, and are left out where they would fill half of
        the model's window. They raise the label mass, and may prime a small model to call what
        looks like a wrong one of them wrong.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common.answering import (
    SURER,
    Answered,
    Assessments,
    Signals,
    answered,
    groups,
    judgement,
)
from analyzers.common.asking import encoded, next_labels, spellings, user
from analyzers.common.judges import Verdict
from analyzers.common.prefixes import Prefixes
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.engine.scoring import Labels
from analyzers.engine.signals import DIGITS
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Judgement, Note, Token

CARD = Card(
    "P(True)",
    family="judging",
    source="Kadavath et al. 2022, arXiv:2207.05221",
    emits=(Token, Judgement, Note),
    example="What is the capital of Australia?",
)
SIGNALS: Signals = {"p_true": (0.0, 1.0, SURER, True)}
BEGUN = "The proposed answer is: ("
LABELS = {"A": spellings("A"), "B": spellings("B")}
SMALL_MASS = 0.5
"""With less on its two letters the model would rather say something else."""
TOGETHER = 12
"""Answers whose questions go through the model in one tree; more would only widen its mask."""
EXAMPLES = (
    ("Which planet is the largest?", "Jupiter", True),
    ("What is 6 plus 7?", "14", False),
    ("Which animal barks?", "a cat", False),
    ("What colour is snow?", "white", True),
    ("How many legs does a spider have?", "eight", True),
    ("Which language is spoken in Brazil?", "Spanish", False),
)
"""Half of them true, so that neither letter is right more often."""


@dataclass(frozen=True)
class Params:
    examples: bool = knob(False, "Show six worked judgements before the question")
    chat: bool = knob(False, "Ask in a conversation, as chat models are used to")
    max_new: int = knob(48, "When to stop writing the answer", lo=1, hi=4096, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer and one Judgement of it (target "answer").

    Raises: OutOfContext; BadInput for an answer that was begun already."""
    item = yield from answered(engine, task, ctx, params.max_new)
    before, began = engine.forwards, time.perf_counter()
    (said,) = assess(engine, [item], params, ctx)
    verdict = said["p_true"]
    yield judgement(
        "p_true",
        verdict,
        SIGNALS["p_true"],
        ctx,
        passes=engine.forwards - before,
        ms=1e3 * (time.perf_counter() - began),
    )
    if verdict.label_mass is not None and verdict.label_mass < SMALL_MASS:
        yield Note(
            "warning",
            f"The letters A and B have {verdict.label_mass:.0%} of the probability there: the "
            "model would rather say something else, and P(True) is no evidence.",
        )
    return "judged"


def assess(engine: Engine, items: Sequence[Answered], params: Params, ctx: Context) -> Assessments:
    """P(True) of each answer, many questions in one pass. Raises: OutOfContext."""
    prefixes = Prefixes(engine)
    for some in groups(items, TOGETHER):
        pairs = [(each.asked.question, each.written.text) for each in some]
        for verdict in _verdicts(engine, pairs, params, prefixes):
            yield {"p_true": verdict}


def _verdicts(
    engine: Engine,
    pairs: Sequence[tuple[str, str]],
    params: Params,
    prefixes: Prefixes,
) -> list[Verdict]:
    """Of (question, answer) pairs, each in the order (A) True (B) False and the other way round."""
    first, swapped = (
        [prompt(engine, question, answer, order, params) for question, answer in pairs]
        for order in (False, True)
    )
    before = engine.forwards
    # With examples before them the two orders part at once, and each has a beginning of its own
    # that is kept; without, each question is read once for both.
    calls = [first, swapped] if params.examples else [[*first, *swapped]]
    said = [
        one for prompts in calls for one in next_labels(engine, prefixes, prompts, LABELS, BEGUN)
    ]
    passes = (engine.forwards - before) // len(pairs)
    return [
        _verdict(one, other, passes)
        for one, other in zip(said[: len(pairs)], said[len(pairs) :], strict=True)
    ]


def _verdict(first: Labels, swapped: Labels, passes: int) -> Verdict:
    a, b = first.probabilities["A"], swapped.probabilities["B"]
    return Verdict(
        round((a + b) / 2, DIGITS),
        verdict="true" if a + b > 1 else "false",
        label_mass=round(min(first.mass, swapped.mass), DIGITS),
        detail={
            "first": round(a, DIGITS),
            "swapped": round(b, DIGITS),
            "position bias": round(a - b, DIGITS),
        },
        passes=passes,
    )


def prompt(engine: Engine, question: str, answer: str, swapped: bool, params: Params) -> list[int]:
    """Ids up to where the letter comes. Worked judgements that would fill half of the model's
    window are left out."""
    last = _question(question, answer, swapped)
    shown = [
        f"{_question(asked, told, swapped)}\n{BEGUN}{'A' if true != swapped else 'B'})"
        for asked, told, true in EXAMPLES
    ]
    for blocks in ([*shown, last] if params.examples else [last], [last]):
        if params.chat and engine.can_chat:
            ids = encoded(engine, [user("\n\n".join(blocks))], BEGUN)
        else:
            ids = engine.tokenizer("\n\n".join(blocks) + f"\n{BEGUN}")["input_ids"]
        if len(ids) <= engine.context // 2:
            break
    return ids


def _question(question: str, answer: str, swapped: bool) -> str:
    first, second = ("False", "True") if swapped else ("True", "False")
    return (
        f"Question: {question}\nProposed answer: {answer}\n"
        f"Is the proposed answer:\n(A) {first}\n(B) {second}"
    )
