"""Questions with accepted answers, the prompt they are asked in, and how a changed set is noticed.

The prompt is the few-shot form of Kadavath et al. 2022 (arXiv:2207.05221): worked examples as
"Question: ...\\nAnswer: ...", then the question and "Answer:"; the answer is its first line.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Literal

from analyzers.errors import BadInput

How = Literal["exact", "normalised", "numeric", "containment", "choice"]
"""The ways of scoring an answer: see scoring.py."""


@dataclass(frozen=True)
class Question:
    """One question.

    prompt: its text, with lettered choices where it has some. accepted: the right answers, the
    usual one first. wrong: typical wrong ones, or the other options. options: what there is to
    choose from, in the order in which the prompt names it; empty for an open question.
    difficulty: a whole number, higher = harder, by the rule of its set; None where not known.
    how: the scoring that fits.
    """

    id: str
    prompt: str
    accepted: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    difficulty: int | None = None
    category: str = ""
    how: How = "normalised"


@dataclass(frozen=True)
class QuestionSet:
    """examples: worked ones (question, answer) that are shown first and never evaluated."""

    name: str
    questions: tuple[Question, ...]
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def shown(self) -> str:
        """The examples, equal for all questions: what a batch computes once. Ends in an empty line
        unless there are none."""
        return "".join(f"Question: {asked}\nAnswer: {told}\n\n" for asked, told in self.examples)

    def ask(self, question: Question) -> str:
        """The whole prompt. An answer goes on behind it with a space, and ends with its line."""
        return f"{self.shown}Question: {question.prompt}\nAnswer:"


@dataclass(frozen=True)
class Fingerprint:
    """What a run remembers of its questions.

    digest: SHA-256 over all of them and the examples, in their order. rows: each question's id and
    the beginning of its own digest, which is enough to name the one that changed.
    """

    digest: str
    rows: tuple[tuple[str, str], ...]


def fingerprint(asked: QuestionSet) -> Fingerprint:
    """The same on every machine, and for a file that was only moved, renamed or saved anew."""
    lines = [_canonical(asdict(question)) for question in asked.questions]
    rows = tuple(
        (question.id, _sha256(line)[:12])
        for question, line in zip(asked.questions, lines, strict=True)
    )
    return Fingerprint(_sha256("\n".join([_canonical(asked.examples), *lines])), rows)


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
    """What changed between two fingerprints, as one sentence; None where nothing did."""
    if before.digest == now.digest:
        return None
    changed = []
    if len(before.rows) != len(now.rows):
        changed.append(f"there were {len(before.rows):,} questions and now are {len(now.rows):,}")
    for number, (old, new) in enumerate(zip_longest(before.rows, now.rows), start=1):
        if old != new:
            changed.append(f"the first that differs is number {number:,}, {_named(old, new)}")
            break
    return f"The questions changed: {', and '.join(changed or ['the worked examples differ'])}."


def refuse_changed(before: Fingerprint, now: Fingerprint) -> None:
    """Raises: BadInput where a run cannot go on because its questions are not the same."""
    if what := difference(before, now):
        raise BadInput(f"{what} Start a new run, or bring the old questions back.")


def first(asked: QuestionSet, limit: int | None) -> QuestionSet:
    """At most `limit` questions, from the beginning. Raises: BadInput for a limit below 1."""
    if limit is None:
        return asked
    if limit < 1:
        raise BadInput(f"A limit of {limit:,} leaves no question: give 1 or more.")
    return QuestionSet(asked.name, asked.questions[:limit], asked.examples)


def lettered(question: str, options: Sequence[str]) -> str:
    """The question with its choices as lines " (A) ...", in the source's form."""
    lines = (f" ({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join([question, "Choices:", *lines])


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _named(old: tuple[str, str] | None, new: tuple[str, str] | None) -> str:
    if old is None or new is None or old[0] == new[0]:
        return repr((old or new or ("",))[0])
    return f"{new[0]!r} where {old[0]!r} was"


def _canonical(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
