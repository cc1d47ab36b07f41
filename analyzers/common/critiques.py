"""Judges that say Yes or No to an answer, and what is wrong with it: the model in words, the model
by its probabilities, or a program.

Source: Cheng et al. 2024, SPaR (arXiv:2412.11605); github.com/thu-coai/SPaR, src/ToT.
Differs from the source: the prompt is shortened, for small models. Only the judgement in words is
        the source's; words in brackets behind "Final Judgement" do not count.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from analyzers.common.asking import encoded, fitted, next_labels, spellings, user, write
from analyzers.common.budget import Budget
from analyzers.common.checklist import Checklist
from analyzers.common.judges import Scale, Verdict
from analyzers.common.prefixes import Prefixes
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS

JUDGEMENT = "Final Judgement:"
FORMS = {"Yes": spellings("Yes", "yes", "YES"), "No": spellings("No", "no", "NO")}
TEMPERATURE = 0.7
"""Of critiques, as in the source."""
SCALE: Scale = (0.0, 1.0, "better", False)
JUDGE = """Does the output meet every constraint of the prompt?

Prompt:
{instruction}

Output:
{answer}

Check the constraints one by one, then end with "Final Judgement: Yes" or "Final Judgement: No"."""


@dataclass(frozen=True)
class Votes:
    """value: V, the share of Yes among the critiques that could be read, 0..1; None without one.
    kept: which critique speaks for all: the first that says what most say; of a tie the first."""

    said: tuple[bool | None, ...]

    @property
    def value(self) -> float | None:
        read = [vote for vote in self.said if vote is not None]
        return fmean(read) if read else None

    @property
    def majority(self) -> bool | None:
        """None of a tie, and without a vote."""
        value = self.value
        return None if value is None or value == 0.5 else value > 0.5

    @property
    def kept(self) -> int | None:
        majority = self.majority
        for place, vote in enumerate(self.said):
            if vote is not None and majority in (None, vote):
                return place
        return None


def read_judgement(text: str) -> bool | None:
    """The first Yes or No behind the last "Final Judgement"; None without one."""
    _, mark, behind = text.rpartition("Final Judgement")
    if not mark:
        return None
    found = re.search(r"\b(yes|no)\b", re.sub(r"\([^)]*\)", "", behind), re.IGNORECASE)
    return found[1].lower() == "yes" if found else None


def judge_prompt(instruction: str, answer: str) -> str:
    return JUDGE.format(instruction=instruction, answer=answer)


class Critics:
    """V from sampled critiques. rng: gives the generator of each critique from text and number.

    Verdict.detail: "critiques", (text, "Yes", "No" or "") of each; "tokens" that they took."""

    name = "the model itself, by critiques"
    scale = SCALE

    def __init__(
        self,
        engine: Engine,
        instruction: str,
        budget: Budget,
        rng: Callable[..., random.Random],
        *,
        critiques: int,
        max_new: int,
    ) -> None:
        self._engine = engine
        self._prefixes = Prefixes(engine)
        self._instruction = instruction
        self._budget = budget
        self._rng = rng
        self._critiques = critiques
        self._max_new = max_new

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Raises: BudgetSpent, and as Judge."""
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        before = self._engine.forwards
        found = write(
            self._engine,
            self._prefixes,
            _fitted(self._engine, self._instruction, text, "", self._max_new),
            [self._rng("critique", text, number) for number in range(self._critiques)],
            self._budget,
            max_new=self._max_new,
            temperature=TEMPERATURE,
        )
        written = [self._engine.vocabulary.decode(each.ids).strip() for each in found]
        votes = Votes(tuple(map(read_judgement, written)))
        rows = zip(written, votes.said, strict=True)
        return Verdict(
            score=votes.value,
            verdict="unreadable" if votes.value is None else _word(votes.majority) or "tie",
            rationale="" if votes.kept is None else written[votes.kept],
            detail={
                "critiques": tuple((critique, _word(vote)) for critique, vote in rows),
                "tokens": sum(len(each.ids) for each in found),
            },
            passes=self._engine.forwards - before,
        )


class YesShare:
    """How likely the model says Yes against No where its judgement stands; all texts of a call in
    one pass. detail: "Yes" and "No", the probabilities."""

    name = "the model itself, by probabilities"
    scale = SCALE

    def __init__(self, engine: Engine, instruction: str) -> None:
        self._engine = engine
        self._prefixes = Prefixes(engine)
        self._instruction = instruction

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        before = self._engine.forwards
        room = len(max(FORMS["Yes"], key=len))
        prompts = [
            _fitted(self._engine, self._instruction, text, JUDGEMENT, room) for text in texts
        ]
        found = next_labels(self._engine, self._prefixes, prompts, FORMS, JUDGEMENT)
        passes = self._engine.forwards - before
        verdicts = []
        for labels in found:
            p = labels.probabilities["Yes"]
            word = _word(p > 0.5)
            verdicts.append(
                Verdict(
                    score=p,
                    verdict=word,
                    label_mass=round(labels.mass, DIGITS),
                    rationale=f"{JUDGEMENT} {word}",
                    detail={
                        label: round(value, DIGITS) for label, value in labels.probabilities.items()
                    },
                    passes=passes,
                )
            )
            passes = 0  # they are of all texts, and told once
        return verdicts


class Checks:
    """A program: 1 where every check is met, else half the mean share that is met, below 0.5.

    detail: the share of each."""

    name = "a program"
    scale = SCALE

    def __init__(self, checks: Checklist) -> None:
        self._checks = checks

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        shares = {
            each.question: each.check(text) for each in self._checks.requirements if each.check
        }
        failed = [question for question, share in shares.items() if share < 1]
        word = _word(not failed)
        lines = [*(f"Not met: {question}" for question in failed), f"{JUDGEMENT} {word}"]
        return Verdict(
            score=fmean(shares.values()) / 2 if failed else 1.0,
            verdict=word,
            rationale="\n".join(lines),
            detail={question: round(share, DIGITS) for question, share in shares.items()},
        )


def _fitted(engine: Engine, instruction: str, text: str, begun: str, room: int) -> list[int]:
    """The judge's prompt, which leaves room for so many tokens."""

    def build(answer: str) -> list[int]:
        return encoded(engine, [user(judge_prompt(instruction, answer))], begun)

    return fitted(build, text, engine.context - room)[0]


def _word(vote: bool | None) -> str:
    return "" if vote is None else "Yes" if vote else "No"
