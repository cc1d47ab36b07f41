"""Checklists: YES/NO questions about one instruction, answered for each response to it.

Source: Cook et al. 2024, "TICKing All the Boxes" (arXiv:2410.03608); for checklists as a measure
        before it, InFoBench (Qin et al. 2024) and FollowBench (Jiang et al. 2024).
Differs from the source: prompts are ours, those of the paper are not published. Beside YES and NO
        stands how likely YES is; questions may be answered by a program instead of the model.
"""

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from analyzers.common.asking import encoded, fitted, next_labels, spellings, user, write
from analyzers.common.budget import Budget
from analyzers.common.judges import Scale, Verdict
from analyzers.common.prefixes import Prefixes
from analyzers.common.rewards import Kind, Reward, reward
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter

MOST = 8
"""Questions of a list that the model makes; the paper's have 2 to 8."""
MADE_TOKENS = 160
"""Room for such a list."""
HOLISTIC = "Does the response do everything that the instruction asks for?"
BEGUN = "Answer:"
FORMS = {"YES": spellings("YES", "Yes", "yes"), "NO": spellings("NO", "No", "no")}
PROGRAMS: Mapping[Kind, str] = {
    "length": "Is the response {} long?",
    "keywords": "Does the response contain all of these words: {}?",
    "pattern": "Does the response match the regular expression {}?",
    "json": "Is the response valid JSON?",
}
"""Lines of a checklist that a program can check, and how the model is asked the same."""

MAKE = """Write the checklist for an instruction: questions about a response that can be answered \
YES or NO, one a line. Each is about one thing that the instruction asks for, and YES means that \
the response does it.

Instruction: Name three birds that cannot fly, in alphabetical order.
Checklist:
1. Does the response name exactly three birds?
2. Are all of the birds unable to fly?
3. Are the birds in alphabetical order?

Instruction: Write a friendly two-line reply to Ann that declines her invitation for Friday.
Checklist:
1. Is the response a reply to Ann?
2. Does it decline the invitation for Friday?
3. Is it friendly?
4. Does it have two lines?

Instruction: {}"""
ASK = """Instruction:
{instruction}

Response:
{response}

Question about the response: {question}
"""
SHORT = "Answer YES or NO."
LONG = 'Think about it in a sentence or two, then end with "Answer: YES" or "Answer: NO".'


@dataclass(frozen=True)
class Requirement:
    """A question; YES = met. check: the program that knows the answer, where there is one."""

    question: str
    check: Reward | None = None


@dataclass(frozen=True)
class Checklist:
    requirements: tuple[Requirement, ...]

    @property
    def id(self) -> str:
        """The same for the same questions: an edited list is another one."""
        text = "\n".join(each.question for each in self.requirements)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Answer:
    """yes: None where it could not be read. p: how likely YES is against NO, or the share of a
    program's check that is met; None where only words were read. mass: what the model gives to
    both labels."""

    yes: bool | None
    p: float | None
    by: str
    mass: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sheet:
    """The answers about one response, in the order of the checklist."""

    answers: tuple[Answer, ...] = ()

    @property
    def pass_rate(self) -> float | None:
        """Share of YES (PR), 0..1; those that could not be read are left out."""
        read = [answer.yes for answer in self.answers if answer.yes is not None]
        return fmean(read) if read else None

    @property
    def soft(self) -> float | None:
        """Mean P(YES), 0..1."""
        known = [answer.p for answer in self.answers if answer.p is not None]
        return fmean(known) if known else None

    @property
    def passed(self) -> bool:
        return all(answer.yes for answer in self.answers)


def requirements_met(sheets: Sequence[Sheet]) -> float | None:
    """InFoBench's DRFR: the share of all requirements of all responses that are met (micro)."""
    return Sheet(tuple(answer for sheet in sheets for answer in sheet.answers)).pass_rate


def kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's: agreement beyond chance, 1 = always, 0 = as chance would; None where chance alone
    would always agree."""
    n = len(pairs)
    if not n:
        return None
    first, second = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    by_chance = first * second + (1 - first) * (1 - second)
    if by_chance == 1:
        return None
    return (sum(a == b for a, b in pairs) / n - by_chance) / (1 - by_chance)


# Where the questions come from


def read_checklist(lines: str) -> Checklist:
    """One requirement a line: a question, or a line for a program such as "length: 20-40 words".

    Raises: BadParameter for a program's line that cannot be read, or no line at all."""
    found = dict.fromkeys(line.strip() for line in lines.splitlines() if line.strip())
    if not found:
        raise BadParameter("The checklist is empty: write one question a line.")
    return Checklist(tuple(map(_requirement, found)))


def _requirement(line: str) -> Requirement:
    head, _, spec = (part.strip() for part in line.partition(":"))
    for kind, question in PROGRAMS.items():
        if head == kind:
            return Requirement(question.format(spec), reward(kind, spec))
    return Requirement(line)


def make_checklist(
    engine: Engine, prefixes: Prefixes, instruction: str, budget: Budget
) -> Checklist:
    """The model's own, from the instruction alone: a response would bend it. Has no requirements
    when it wrote no question. Raises: OutOfContext, BudgetSpent."""
    ids = encoded(engine, [user(MAKE.format(instruction))], "Checklist:\n1.")
    (written,) = write(engine, prefixes, ids, [None], budget, max_new=MADE_TOKENS)
    questions = read_questions("1." + engine.vocabulary.decode(written.ids))
    return Checklist(tuple(map(Requirement, questions[:MOST])))


def read_questions(text: str) -> list[str]:
    """The lines that end in "?", each once, without their numbers or bullets."""
    lines = (re.sub(r"^\s*(?:\d+[.)]|[-*•])?\s*", "", line).strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line.endswith("?") and len(line) > 1))


def read_answer(text: str) -> bool | None:
    """The last YES or NO behind an "Answer:"; None without one."""
    found = re.findall(r"answer\s*:[\s*\"']*(yes|no)\b", text, re.IGNORECASE)
    return found[-1].lower() == "yes" if found else None


# Who answers


class Examiner:
    """A judge: the share of a checklist's questions whose answer is YES.

    by_model: also what a program could answer is asked of the model. reasons: tokens that the
    model may think in before it answers; 0 reads the probabilities of YES and NO instead, all
    questions about a text in one pass. sheets: of the texts that were judged."""

    scale: Scale = (0.0, 1.0, "better", False)

    def __init__(
        self,
        engine: Engine,
        instruction: str,
        checklist: Checklist,
        budget: Budget,
        *,
        by_model: bool,
        reasons: int = 0,
    ) -> None:
        self.checklist = checklist
        self.sheets: dict[str, Sheet] = {}
        self._engine = engine
        self._prefixes = Prefixes(engine)
        self._instruction = instruction
        self._budget = budget
        self._by_model = by_model
        self._reasons = reasons
        who = "the model itself" if self.asks_model else "a program"
        self.name = f"checklist {checklist.id}, answered by {who}"

    @property
    def asks_model(self) -> bool:
        """Whether any answer is the model's."""
        return any(self._is_asked(each) for each in self.checklist.requirements)

    def _is_asked(self, requirement: Requirement) -> bool:
        return self._by_model or requirement.check is None

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        before = self._engine.forwards
        asked = [each for each in self.checklist.requirements if self._is_asked(each)]
        said = iter(self._said([each.question for each in asked], text) if asked else [])
        sheet = Sheet(
            tuple(
                next(said) if self._is_asked(each) else _checked(each, text)
                for each in self.checklist.requirements
            )
        )
        self.sheets[text] = sheet
        masses = [answer.mass for answer in sheet.answers if answer.mass is not None]
        return Verdict(
            score=sheet.pass_rate,
            verdict=", ".join(_word(answer) for answer in sheet.answers),
            label_mass=round(min(masses), DIGITS) if masses else None,
            rationale="\n".join(answer.reason for answer in sheet.answers if answer.reason),
            detail={
                "checklist": self.checklist.id,
                "soft": sheet.soft,
                "answers": tuple(self._rows(sheet)),
            },
            passes=self._engine.forwards - before,
        )

    def _rows(self, sheet: Sheet) -> Generator[tuple[Any, ...], None, None]:
        """(question, answer, P(YES), who answered)."""
        for requirement, answer in zip(self.checklist.requirements, sheet.answers, strict=True):
            p = None if answer.p is None else round(answer.p, DIGITS)
            yield requirement.question, _word(answer), p, answer.by

    def _said(self, questions: Sequence[str], text: str) -> list[Answer]:
        if self._reasons:
            return [self._reasoned(question, text) for question in questions]
        prompts = [self._prompt(question, text, SHORT, BEGUN) for question in questions]
        found = next_labels(self._engine, self._prefixes, prompts, FORMS, BEGUN)
        return [
            Answer(p >= 0.5, p, "model", labels.mass)
            for labels in found
            for p in [labels.probabilities["YES"]]
        ]

    def _reasoned(self, question: str, text: str) -> Answer:
        ids = self._prompt(question, text, LONG, "")
        most = self._reasons
        (written,) = write(self._engine, self._prefixes, ids, [None], self._budget, max_new=most)
        reason = self._engine.vocabulary.decode(written.ids).strip()
        return Answer(read_answer(reason), None, "model", reason=reason)

    def _prompt(self, question: str, text: str, how: str, begun: str) -> list[int]:
        def build(response: str) -> list[int]:
            asked = ASK.format(instruction=self._instruction, response=response, question=question)
            return encoded(self._engine, [user(asked + how)], begun)

        room = self._engine.context - max(self._reasons, len(max(FORMS["YES"], key=len)))
        return fitted(build, text, room)[0]


def sheet_lines(checklist: Checklist, sheet: Sheet) -> str:
    """The questions with their answers, as a model reads them."""
    return "\n".join(
        f"- {requirement.question} {_word(answer)}"
        + (f" ({answer.reason})" if answer.reason else "")
        for requirement, answer in zip(checklist.requirements, sheet.answers, strict=True)
    )


def _checked(requirement: Requirement, text: str) -> Answer:
    assert requirement.check is not None  # who asks the model does not come here
    share = requirement.check(text)
    return Answer(share == 1, share, "program")


def _word(answer: Answer) -> str:
    return "unparsed" if answer.yes is None else "YES" if answer.yes else "NO"
