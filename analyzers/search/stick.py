"""STICK: the model improves or picks its answer by a checklist of YES/NO questions.

Source: Cook et al. 2024, "TICKing All the Boxes" (arXiv:2410.03608), its self-refinement and its
        best-of-N; Qin et al. 2024 (InFoBench) for the share of requirements met.
Idea:   one checklist for the instruction; each answer is held against every question by itself. An
        answer is worth the share of YES. Refining tells the model which questions failed and lets
        it write again; best of n writes several answers and takes the one with most YES.
Differs from the source: no code is published; prompts and sampling are ours (checklist and
        answers to it greedy). YES and NO are read as probabilities unless the model is given room
        to reason. Questions may be the user's; those in the form of a check are answered by a
        program, or tell how often the model answers them right. The best version is the answer, not
        the last; of equal ones that with the higher mean P(YES), then the likelier. An answer to
        something else is held against the same list: where it passes as much, the judge has no
        signal. Of a conversation the last message is the instruction that is judged.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from analyzers.card import Card
from analyzers.common.asking import (
    NEXT_LABELS,
    assistant,
    earlier,
    encoded,
    instruction,
    user,
    write,
)
from analyzers.common.budget import Budget, BudgetSpent, Expected, Forwards
from analyzers.common.checklist import (
    HOLISTIC,
    MADE_TOKENS,
    MOST,
    Checklist,
    Examiner,
    Requirement,
    Sheet,
    kappa,
    make_checklist,
    read_checklist,
    requirements_met,
    sheet_lines,
)
from analyzers.common.judge_check import FOLLOWS, told_of
from analyzers.common.judges import Court
from analyzers.common.plain import plain
from analyzers.common.prefixes import Prefixes
from analyzers.common.rollouts import Rollout
from analyzers.common.search_tree import Node, SearchTree
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.engine import Cursor, Engine
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter, OutOfContext
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Metric, Note, Origin, SearchNode, Token

CARD = Card(
    "STICK (checklist)",
    family="search",
    source="Cook et al. 2024, arXiv:2410.03608",
    emits=(Token, SearchNode, Candidate, Judgement, Metric),
    example="Describe a morning at the sea in 15 to 40 words. Mention the sun, a boat and a dog.",
)
LIST = """length: 15-40 words
keywords: sun, boat, dog
Does the text describe a morning?"""
"""For the example."""
ANOTHER = "To change the battery, open the lid on the back with a coin and lift the old one out."
"""An answer to no instruction that is likely here."""
REFINE = """Your answer was held against these questions:
{}
Write an improved answer to which the answer to every question is YES. Write the answer only."""


@dataclass(frozen=True)
class Params:
    """Defaults are ours; the paper refines up to four times, or picks from 8 samples."""

    mode: Literal["refine", "best of n"] = knob("refine", "Write again, or pick from samples")
    checklist: str = knob(
        LIST,
        "One YES/NO question a line; lines that begin with length:, keywords:, pattern: or json "
        "are checked by a program; empty = the model makes the list",
        lines=4,
    )
    answered_by: Literal["programs", "model"] = knob(
        "programs", "Who answers lines that a program can check; programs measure the model then"
    )
    rounds: int = knob(3, "How often to refine", lo=1, hi=10)
    samples: int = knob(4, "How many samples to pick from", lo=1, hi=32)
    temperature: float = knob(0.7, "0 = greedy, above 1 flattens", lo=0, hi=2)
    max_new: int = knob(64, "Longest answer", lo=1, hi=1024, unit="tokens")
    reasons: int = knob(
        0,
        "Reasoning before each YES or NO; 0 = read their probabilities",
        lo=0,
        hi=256,
        unit="tokens",
    )
    tokens: int = knob(0, "Most tokens to write in all; 0 = no limit", lo=0, hi=100_000)


@dataclass(frozen=True)
class Version:
    """An answer with its key in the events. logprob: mean of its tokens, nats, where it was
    written. sheet: empty until it was held against the checklist."""

    key: str
    node: Node
    text: str
    logprob: float
    sheet: Sheet = field(default_factory=Sheet)

    @property
    def worth(self) -> tuple[float, float, float]:
        """Compares answers; those of which nothing could be read come last."""
        rate, soft = self.sheet.pass_rate, self.sheet.soft
        return -1.0 if rate is None else rate, -1.0 if soft is None else soft, self.logprob


def _asked(params: Params) -> int:
    """Most questions that the model answers about a text. Raises: BadParameter."""
    if not params.checklist.strip():
        return MOST
    by_model = params.answered_by == "model"
    given = read_checklist(params.checklist).requirements
    return sum(by_model or each.check is None for each in given)


def expect(params: Params) -> Expected:
    """For answers as long as they may be and a list that none passes; a list that the model makes
    has as many questions as it may.

    Passes: samples are written side by side; reading a request is one, asking all questions of a
    text at once as many as `next_labels` takes, and writing a token of the answer one.
    Raises: BadParameter for a line of the checklist that cannot be read.
    """
    made = not params.checklist.strip()
    asked = _asked(params)
    answers = 1 + params.rounds if params.mode == "refine" else params.samples
    texts = 1 + answers + bool(asked)  # the plain one, and one that answers something else
    tokens = MADE_TOKENS * made + answers * params.max_new + texts * asked * params.reasons
    turns = answers if params.mode == "refine" else 1
    one = asked * (1 + params.reasons) if params.reasons else NEXT_LABELS * bool(asked)
    passes = (1 + MADE_TOKENS) * made + turns * (1 + params.max_new) + texts * one + params.max_new
    return Expected(min(tokens, params.tokens or tokens), texts, passes)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the checklist (Candidates of the group "checklist"), every answer as Candidate and node
    with its Judgement, and the best one as Tokens; return why the search ended.

    Metrics by version: "pass rate", "soft pass rate" (0..1, higher is better); at the end those of
    the search as a whole and what was spent. Tokens that were written behind a request to refine
    are `forced`, with the log-probabilities that they have behind the prompt itself.
    Raises: BadInput for a begun answer, BadParameter for a line of the checklist that cannot be
    read or a budget that is too small for one answer; OutOfContext.
    """
    stick = Stick(engine, task, params, ctx)
    yield from expect(params).metrics()
    checklist = yield from stick.forwards.of(stick.checklist())
    stick.examine_by(checklist)
    main = ctx.begin(engine, engine.encode(task))
    yield from plain(engine, main, task, ctx, params.max_new, stick.court)
    why = yield from stick.forwards.of(stick.events(main))
    if stick.examiner.asks_model and not params.reasons:
        general = Checklist((Requirement(HOLISTIC),))

        def make(instruction: str) -> Examiner:
            return Examiner(engine, instruction, general, Budget(), by_model=True)

        yield Note("info", f'To examine the judge, it is asked of other texts: "{HOLISTIC}"')
        yield from told_of(Examiner, engine, make, FOLLOWS)
    return why


class Stick:
    """One run. versions: in the order of writing."""

    def __init__(self, engine: Engine, task: Task, params: Params, ctx: Context) -> None:
        self.engine, self.task, self.params, self.ctx = engine, task, params, ctx
        self.budget = Budget(tokens=params.tokens)
        self.forwards = Forwards(engine)
        self.instruction = instruction(task)
        self.given = read_checklist(params.checklist) if params.checklist.strip() else None
        many = params.samples if params.mode == "best of n" else 1
        least = many * params.max_new + (0 if self.given else MADE_TOKENS)
        least += params.reasons * _asked(params)
        if params.tokens and params.tokens < least:
            raise BadParameter(
                f"tokens must be 0 or at least {least}, not {params.tokens}: the checklist and the "
                "first answers take so many, with what is said of the plain one."
            )
        self.tree = SearchTree(engine, self.budget)
        self.tree.root.detail["kind"] = "root"
        self.prefixes = Prefixes(engine)
        self.versions: list[Version] = []

    def examine_by(self, checklist: Checklist) -> None:
        """Have all answers held against this list."""
        self.examiner = Examiner(
            self.engine,
            self.instruction,
            checklist,
            self.budget,
            by_model=self.params.answered_by == "model",
            reasons=self.params.reasons,
        )
        self.court = Court(self.examiner, self.budget)

    def events(self, main: Cursor) -> Generator[Event, None, str]:
        """All but the checklist and the plain answer. main: where the answer is written."""
        try:
            why = yield from self.refine() if self.params.mode == "refine" else self.pick()
        except BudgetSpent as spent:
            why = str(spent)
            yield Note("warning", f"The search was cut short: {why}.")
        try:
            yield from self.control()
        except BudgetSpent:
            yield Note("warning", "Nothing is left for holding an unrelated answer to the list.")
        yield from self.end(main)
        yield from self.spent()
        return why

    def checklist(self) -> Generator[Event, None, Checklist]:
        """The user's, or the model's."""
        checklist = self.given or make_checklist(
            self.engine, self.prefixes, self.instruction, self.budget
        )
        if not checklist.requirements:
            checklist = Checklist((Requirement(HOLISTIC),))
            yield Note("warning", "The model wrote no question: one general question stands in.")
        for number, each in enumerate(checklist.requirements, 1):
            yield Candidate(f"question {number}", "checklist", each.question)
        if len(checklist.requirements) == 1:
            yield Note("warning", "With one question an answer is worth all or nothing.")
        return checklist

    # The two ways

    def refine(self) -> Generator[Event, None, str]:
        """Write, and write again as long as a question fails."""
        ids = self.engine.encode(self.task)
        (first,) = self.written(ids, [0])
        yield from self.judged([(self.tree.root, first)])
        for round in range(1, self.params.rounds + 1):
            last = self.versions[-1]
            if last.sheet.passed:
                return "every question is answered YES"
            try:
                (again,) = self.written(self.revision(last), [round])
            except OutOfContext:
                return "the next request would not fit into the model's context"
            yield from self.judged([(last.node, again)])
        if self.versions[-1].sheet.passed:
            return "every question is answered YES"
        return f"refined {self.params.rounds} times"

    def pick(self) -> Generator[Event, None, str]:
        """Write all samples side by side."""
        found = self.written(self.engine.encode(self.task), range(self.params.samples))
        yield from self.judged([(self.tree.root, each) for each in found])
        return f"{self.params.samples} samples were compared"

    def written(self, ids: Sequence[int], numbers: Sequence[int]) -> list[Rollout]:
        """Answers by their numbers, each with a generator of its own."""
        return write(
            self.engine,
            self.prefixes,
            ids,
            [self.ctx.rng("answer", number) for number in numbers],
            self.budget,
            max_new=self.params.max_new,
            temperature=self.params.temperature,
        )

    def revision(self, last: Version) -> list[int]:
        """The request to improve the last version."""
        asked = REFINE.format(sheet_lines(self.examiner.checklist, last.sheet))
        turns = (user(self.instruction), assistant(last.text), user(asked))
        return encoded(self.engine, (*earlier(self.task), *turns))

    def judged(self, found: Sequence[tuple[Node, Rollout]]) -> Generator[Event, None, None]:
        """Take answers below their parents into the tree, and hold them against the checklist."""
        first = len(self.versions)
        for parent, rollout in found:
            key = f"answer {len(self.versions)}"
            text = self.engine.vocabulary.decode(rollout.ids).strip()
            yield Candidate(key, "answers", text, round(sum(rollout.logprobs), DIGITS))
            logprob = fmean(rollout.logprobs) if rollout.logprobs else 0.0
            self.versions.append(Version(key, self.added(parent, rollout), text, logprob))
        yield from self.tree.news()
        for step in range(first, len(self.versions)):
            yield from self.examined(step)

    def examined(self, step: int) -> Generator[Event, None, None]:
        """Hold one answer against the checklist."""
        version = self.versions[step]
        ((key, verdict),) = yield from self.court.hear([version.text], version.key)
        sheet = self.examiner.sheets[version.text]
        self.versions[step] = replace(version, sheet=sheet)
        if key not in version.node.evals:
            version.node.evals.append(key)
        if verdict.score is not None:
            version.node.visit(verdict.score)
            yield Metric("pass rate", step, round(verdict.score, DIGITS), "share of YES")
        if sheet.soft is not None:
            yield Metric("soft pass rate", step, round(sheet.soft, DIGITS), "probability")
        yield from self.tree.news()
        yield from self.spent()

    def spent(self) -> Generator[Metric, None, None]:
        yield from self.budget.metrics(len(self.versions), self.forwards.count)

    def added(self, parent: Node, rollout: Rollout) -> Node:
        """The node of an answer."""
        kind = "sample" if parent is self.tree.root else "refinement"
        node = self.tree.add(
            parent,
            rollout.ids,
            detail={
                "kind": kind,
                "finished": rollout.ended,
                "logprob": round(sum(rollout.logprobs), DIGITS),
                "score_name": "pass rate",
            },
        )
        node.text = self.engine.vocabulary.decode(node.ids)  # a whole answer, not a continuation
        return node

    # What it was worth

    def control(self) -> Generator[Event, None, None]:
        """Hold an answer to something else against the list, where the model answers."""
        if not self.examiner.asks_model:
            return
        yield Candidate("control", "control", ANOTHER)
        ((_, verdict),) = yield from self.court.hear([ANOTHER], "control")
        best = max(self.versions, key=lambda version: version.worth)
        rate = best.sheet.pass_rate
        if verdict.score is None or rate is None:
            return
        yield Metric("pass rate of an unrelated answer", 0, round(verdict.score, DIGITS), "share")
        if verdict.score >= rate > 0:
            yield Note(
                "warning",
                f"An unrelated answer passes {verdict.score:.0%} of the checklist, the best one "
                f"{rate:.0%}: these answers carry no signal.",
            )

    def end(self, cursor: Cursor) -> Generator[Event, None, None]:
        """Say what is known of the judge, and write the best version."""
        best = max(self.versions, key=lambda version: version.worth)
        equal = [each for each in self.versions if each.worth[0] == best.worth[0]]
        step = len(self.versions)
        yield Metric("equally good", step, len(equal), "answers")
        sheets = [version.sheet for version in self.versions]
        met = requirements_met(sheets)
        if met is not None:
            yield Metric("requirements met", step, round(met, DIGITS), "share")
        unread = sum(answer.yes is None for sheet in sheets for answer in sheet.answers)
        if unread:
            yield Note("warning", f"{unread} answers held no YES or NO: they are left out.")
        yield from self.agreement(best, step)
        yield from self.improvement(best)
        for version in self.versions:
            if version.node is not best.node:
                version.node.status = "pruned"
        best.node.status = "committed"
        best.node.detail["reason"] = (
            f"most YES, of {len(equal)} equals" if len(equal) > 1 else "most YES"
        )
        yield from self.tree.news()
        origin: Origin = "sampled" if best.node.parent is self.tree.root else "forced"
        room = self.engine.context - cursor.pos
        yield from forced(self.engine, cursor, best.node.ids[:room], origin)

    def improvement(self, best: Version) -> Generator[Event, None, None]:
        """Whether refining helped."""
        first = self.versions[0]
        if self.params.mode == "refine" and best is first and len(self.versions) > 1:
            yield Note("info", "No improvement: no later version answers more questions with YES.")

    def agreement(self, best: Version, step: int) -> Generator[Event, None, None]:
        """How often the model says YES, how often it agrees with the programs, and what choosing by
        it was worth: between a random choice and one by the programs."""
        said: list[bool] = []
        pairs: list[tuple[bool, bool]] = []
        for version in self.versions:
            rows = zip(self.examiner.checklist.requirements, version.sheet.answers, strict=True)
            for requirement, answer in rows:
                if answer.by == "model" and answer.yes is not None:
                    said.append(answer.yes)
                    if requirement.check:
                        pairs.append((answer.yes, requirement.check(version.text) == 1))
        if said:
            yield Metric("YES rate", step, round(fmean(said), DIGITS), "share")
            if all(said):
                yield Note("warning", f"The model answered YES to all {len(said)} questions.")
        if pairs:
            met = {version.key: self.met(version) for version in self.versions}
            yield Metric("checks met by the answer", step, round(met[best.key], DIGITS), "share")
            yield Metric("checks met on average", step, round(fmean(met.values()), DIGITS), "share")
            yield Metric("checks met at best", step, round(max(met.values()), DIGITS), "share")
            right = sum(a == b for a, b in pairs)
            yield Metric("question accuracy", step, round(right / len(pairs), DIGITS), "share")
            beyond = kappa(pairs)
            if beyond is not None:
                yield Metric("kappa", step, round(beyond, DIGITS), "agreement beyond chance")
            yield Note(
                "info",
                f"Of {len(pairs)} questions that a program can check, the model got {right} right.",
            )

    def met(self, version: Version) -> float:
        """The share of the program's checks that an answer meets."""
        requirements = self.examiner.checklist.requirements
        return fmean(each.check(version.text) == 1 for each in requirements if each.check)
