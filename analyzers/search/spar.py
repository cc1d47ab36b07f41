"""SPaR: an answer that fails is refined in a tree until a judge says Yes to it.

Source: Cheng et al. 2024, "SPaR: Self-Play with Tree-Search Refinement" (arXiv:2412.11605);
        github.com/thu-coai/SPaR, src/ToT.
Idea:   the model answers several times and judges its answers. One that fails becomes the root: it
        is refined with its critique at hand, each refinement is judged, and the best are refined
        again. The first answer above the gate and the root are a pair that differs in little but in
        following the instruction: what preference training wants.
Differs from the source: fewer and shorter texts by default. Beside sampled critiques the judge may
        be the probability of Yes, or a program; those are no self-play, and the run says so. The
        root keeps the value it was judged at instead of 0. Where nothing is better than the root,
        the root is the answer, "no improvement", and there is no pair; the source returns the last
        of equals. Where no answer fails the best one is the answer. Frontiers are chosen by value
        only, not drawn. Without reflection the model writes the improved answer alone. Equal
        refinements of one answer are one node. Nothing is trained here: the pair is kept. Of a
        conversation the last message is the instruction that is judged.
"""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
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
from analyzers.common.checklist import Checklist, read_checklist
from analyzers.common.critiques import TEMPERATURE, Checks, Critics, YesShare, judge_prompt
from analyzers.common.judge_check import FOLLOWS, told_of
from analyzers.common.judges import Court, Judge
from analyzers.common.plain import plain
from analyzers.common.prefixes import Prefixes
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
    "SPaR (refinement tree)",
    family="search",
    source="Cheng et al. 2024, arXiv:2412.11605; github.com/thu-coai/SPaR",
    emits=(Token, SearchNode, Candidate, Judgement, Metric),
    example="Describe a morning at the sea in 15 to 40 words. Mention the sun, a boat and a dog.",
)
GATE = 0.5
"""An answer is accepted when its value is above (not at) this."""
TOP_P = 0.9
"""Of the first answers, as in the source."""
TRIES = 3
"""To write a refinement that can be read, as in the source."""
REFLECTION = 96
"""Tokens for reflecting, beside those of the answer."""
REFINE = (
    "Use this judgement to improve the output, so that it meets every constraint of the prompt. "
)
ALONE = "Write the improved output only."
REFLECT = """First write "Reflection on how to refine the Output:" and your reflection, then \
"Final Refined Output:" and the improved output between [[start]] and [[end]]."""


@dataclass(frozen=True)
class Params:
    """Defaults are ours, for small models; the source has critiques by 5, 5 answers, branch 3,
    select 2, depth 3, up to 3,072 tokens a refinement."""

    judge: Literal["checks", "probabilities", "critiques"] = knob(
        "checks", "Who says Yes: a program, the model's probability of Yes, or sampled critiques"
    )
    checks: str = knob(
        "length: 15-40 words\nkeywords: sun, boat, dog",
        "One check a line: length:, keywords:, pattern: or json; another judge is measured by them",
        lines=3,
    )
    search: Literal["breadth first", "depth first"] = knob(
        "breadth first", "Level by level, or down from the best at once"
    )
    answers: int = knob(3, "First answers, of which one that fails is refined", lo=1, hi=16)
    branch: int = knob(2, "Refinements of an answer", lo=1, hi=8)
    select: int = knob(1, "How many of the best are refined again", lo=1, hi=8)
    depth: int = knob(2, "How often in a row", lo=1, hi=6)
    critiques: int = knob(3, "Critiques of an answer", lo=1, hi=9)
    critique_tokens: int = knob(64, "Longest critique", lo=1, hi=2048, unit="tokens")
    reflect: bool = knob(False, "Let the model reflect before it refines")
    temperature: float = knob(0.9, "Of the first answers; 0 = greedy", lo=0, hi=2)
    max_new: int = knob(48, "Longest answer", lo=1, hi=1024, unit="tokens")
    tokens: int = knob(0, "Most tokens to write in all; 0 = no limit", lo=0, hi=100_000)


@dataclass(eq=False)
class Answer:
    """key: of its Candidate. parent: what it refines, None for a first answer. logprob: of all that
    was written for it, a reflection included, nats. value: V, 0..1, None until it was judged or
    where no critique could be read. critique: what the refiner is shown."""

    key: str
    parent: "Answer | None"
    node: Node
    text: str
    logprob: float
    value: float | None = None
    critique: str = ""

    @property
    def accepted(self) -> bool:
        return self.value is not None and self.value > GATE

    @property
    def failed(self) -> bool:
        return self.value is not None and self.value < GATE


def expect(params: Params) -> Expected:
    """For answers as long as they may be, none accepted before the last depth, and reflections that
    are read at the last attempt.

    Passes: answers of one request are written side by side; reading a request is one, judging a
    text as many as its judge takes, writing a token of the answer one.
    """
    nodes = refined = 1  # on a level; in all
    for _ in range(params.depth - 1):
        kept = min(params.select, params.branch * (1 if params.search == "depth first" else nodes))
        nodes = nodes * kept if params.search == "depth first" else kept
        refined += nodes
    attempts = TRIES if params.reflect else 1
    length = params.max_new + (REFLECTION if params.reflect else 0)
    texts = 1 + params.answers + refined * params.branch
    tokens = params.answers * params.max_new + texts * _critique(params)
    tokens += refined * attempts * params.branch * length
    asking = {"checks": 0, "probabilities": NEXT_LABELS, "critiques": 1 + params.critique_tokens}
    passes = params.max_new + refined * (1 + attempts * length) + texts * asking[params.judge]
    passes += params.max_new  # the answer
    return Expected(min(tokens, params.tokens or tokens), texts, passes)


def _critique(params: Params) -> int:
    """Most tokens to judge one text."""
    return params.critiques * params.critique_tokens if params.judge == "critiques" else 0


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield every answer as Candidate and node with its Judgement, the pair (chosen, rejected) as
    Candidates of the group "pair", and the best answer as Tokens; return why the search ended.

    Metrics: "best value" (0..1, higher is better) by depth; "similarity" of the pair (share of
    equal words, 1 = same); "judge agrees" where checks measure another judge; what was spent.
    Tokens that were written behind a request to refine are `forced`, with the log-probabilities
    that they have behind the prompt itself.
    Raises: BadInput for a begun answer, BadParameter for checks that cannot be read or a budget
    that is too small for the first answers; OutOfContext.
    """
    spar = Spar(engine, task, params, ctx)
    yield from expect(params).metrics()
    main = ctx.begin(engine, engine.encode(task))
    yield from plain(engine, main, task, ctx, params.max_new, spar.court)
    why = yield from spar.forwards.of(spar.events(main))
    if params.judge == "critiques":
        yield Note("info", "To examine the judge, it is asked for Yes or No without a critique.")
    if params.judge != "checks":
        yield from told_of(YesShare, engine, partial(YesShare, engine), FOLLOWS)
    return why


class Spar:
    """One run. answers: all, in the order of writing. root: the one that is refined."""

    def __init__(self, engine: Engine, task: Task, params: Params, ctx: Context) -> None:
        self.engine, self.task, self.params, self.ctx = engine, task, params, ctx
        self.budget = Budget(tokens=params.tokens)
        self.forwards = Forwards(engine)
        self.instruction = instruction(task)
        self.checks = _checks(params)
        least = params.answers * params.max_new + _critique(params)
        if params.tokens and params.tokens < least:
            raise BadParameter(
                f"tokens must be 0 or at least {least}, not {params.tokens}: "
                "the first answers take so many, with what is said of the plain one."
            )
        self.court = Court(self._judge(), self.budget)
        self.tree = SearchTree(engine, self.budget)
        self.tree.root.detail["kind"] = "root"
        self.prefixes = Prefixes(engine)
        self.answers: list[Answer] = []
        self.root: Answer | None = None
        self.expanded = 0

    def _judge(self) -> Judge:
        if self.checks and self.params.judge == "checks":
            return Checks(self.checks)
        if self.params.judge == "probabilities":
            return YesShare(self.engine, self.instruction)
        return Critics(
            self.engine,
            self.instruction,
            self.budget,
            self.ctx.rng,
            critiques=self.params.critiques,
            max_new=self.params.critique_tokens,
        )

    def events(self, main: Cursor) -> Generator[Event, None, str]:
        if self.params.judge == "checks":
            yield Note("info", "Checker-guided: a program judges, this is no self-play.")
        try:
            why = yield from self.grow()
        except BudgetSpent as spent:
            why = str(spent)
            yield Note("warning", f"The search was cut short: {why}.")
        except OutOfContext:
            if not self.answers:
                raise
            why = "the next request would not fit into the model's context"
            yield Note("warning", f"The search was cut short: {why}.")
        final = self.best()
        yield from self.told(final)
        yield from self.written(main, final)
        yield from self.spent()
        return why

    # Growing

    def grow(self) -> Generator[Event, None, str]:
        """Answer, choose what to refine, and refine it."""
        yield from self.first()
        failing = [answer for answer in self.answers if answer.failed]
        if not failing:
            return "no answer failed: there was nothing to refine"
        self.root = self.ctx.rng("root").choice(failing)
        for answer in self.answers:
            if answer.node is not self.root.node:
                answer.node.status = "pruned"
                answer.node.detail["reason"] = "another answer is refined"
        found = yield from (
            self.breadth() if self.params.search == "breadth first" else self.down(self.root, 1)
        )
        if found:
            return f"an answer was accepted at depth {found.node.depth - 1}"
        return f"nothing was accepted down to depth {self.params.depth}"

    def breadth(self) -> Generator[Event, None, Answer | None]:
        """Level by level; the first answer that is accepted, the best of its level."""
        assert self.root  # it was chosen
        frontier = [self.root]
        for depth in range(1, self.params.depth + 1):
            level: list[Answer] = []
            for answer in frontier:
                level += yield from self.refined(answer)
            frontier = yield from self.selected(level, depth)
            if frontier and frontier[0].accepted:
                return frontier[0]
        return None

    def down(self, answer: Answer, depth: int) -> Generator[Event, None, Answer | None]:
        """The same within each answer, then down into its best ones in order."""
        level = yield from self.refined(answer)
        chosen = yield from self.selected(level, depth)
        if chosen and chosen[0].accepted:
            return chosen[0]
        if depth < self.params.depth:
            for child in chosen:
                found = yield from self.down(child, depth + 1)
                if found:
                    return found
        return None

    def selected(self, level: list[Answer], depth: int) -> Generator[Event, None, list[Answer]]:
        """The best by value, earlier ones first among equals; the others are pruned."""
        ranked = sorted(level, key=_value, reverse=True)
        chosen = ranked[: self.params.select]
        for answer in ranked[self.params.select :]:
            answer.node.status = "pruned"
            answer.node.detail["reason"] = "not among the best of its level"
        if chosen:
            yield Metric("best value", depth, round(_value(chosen[0]), DIGITS), "V")
        yield from self.tree.news()
        return chosen

    def first(self) -> Generator[Event, None, None]:
        """The first answers, side by side."""
        found = write(
            self.engine,
            self.prefixes,
            self.engine.encode(self.task),
            [self.ctx.rng("answer", number) for number in range(self.params.answers)],
            self.budget,
            max_new=self.params.max_new,
            temperature=self.params.temperature,
            top_p=TOP_P,
        )
        for number, each in enumerate(found):
            self.added(f"answer {number}", None, each.ids, sum(each.logprobs), len(each.ids))
        yield from self.judged(self.answers)

    def refined(self, answer: Answer) -> Generator[Event, None, list[Answer]]:
        """New refinements of an answer that could be judged."""
        answer.node.detail["iteration"] = self.expanded = self.expanded + 1
        ids = self.request(answer)
        waiting = list(range(self.params.branch))
        level: list[Answer] = []
        for attempt in range(TRIES):
            found = write(
                self.engine,
                self.prefixes,
                ids,
                [self.ctx.rng("refine", answer.key, number, attempt) for number in waiting],
                self.budget,
                max_new=self.params.max_new + (REFLECTION if self.params.reflect else 0),
                temperature=TEMPERATURE,
            )
            for number, each in zip(list(waiting), found, strict=True):
                own = self.answer_in(each.ids)
                if own is None:
                    answer.node.detail["tokens"] += len(each.ids)  # they make no node
                    continue
                waiting.remove(number)
                if tuple(own) in answer.node.children:
                    answer.node.children[tuple(own)].detail["tokens"] += len(each.ids)
                    continue
                key = f"{answer.key}.{number}"
                logprob = sum(each.logprobs)
                level.append(self.added(key, answer, own, logprob, len(each.ids)))
            if not waiting:
                break
        if waiting:
            yield Note("warning", f"{len(waiting)} refinements had no output between the marks.")
        yield from self.judged(level)
        return [child for child in level if child.value is not None]

    def request(self, answer: Answer) -> list[int]:
        """The judge's prompt, its critique, and the request to refine."""
        turns = (
            user(judge_prompt(self.instruction, answer.text)),
            assistant(answer.critique),
            user(REFINE + (REFLECT if self.params.reflect else ALONE)),
        )
        return encoded(self.engine, (*earlier(self.task), *turns))

    def answer_in(self, ids: Sequence[int]) -> list[int] | None:
        """The tokens of the refined answer alone; None where it cannot be read."""
        if not self.params.reflect:
            return list(ids)
        text = read_output(self.engine.vocabulary.decode(ids))
        return None if text is None else self.engine.tokens(text)

    def added(
        self, key: str, parent: Answer | None, ids: Sequence[int], logprob: float, tokens: int
    ) -> Answer:
        """Take an answer into the tree. tokens: what was written for it."""
        node = self.tree.add(
            parent.node if parent else self.tree.root,
            ids,
            detail={
                "kind": "refinement" if parent else "sample",
                "logprob": round(logprob, DIGITS),
                "finished": bool(ids) and self.engine.ends(ids[-1]),
                "score_name": "V",
                "tokens": 0,
            },
        )
        node.text = self.engine.vocabulary.decode(ids)  # a whole answer, not a continuation
        node.detail["tokens"] += tokens
        answer = Answer(key, parent, node, node.text.strip(), logprob)
        self.answers.append(answer)
        return answer

    def judged(self, answers: Sequence[Answer]) -> Generator[Event, None, None]:
        """Tell of answers, and what the judge says of each; one that cannot be judged is out."""
        for answer in answers:
            group = "refinements" if answer.parent else "answers"
            yield Candidate(answer.key, group, answer.text, round(answer.logprob, DIGITS))
        yield from self.tree.news()
        for answer in answers:
            ((key, verdict),) = yield from self.court.hear([answer.text], answer.key)
            answer.value, answer.critique = verdict.score, verdict.rationale
            if key not in answer.node.evals:
                answer.node.evals.append(key)
            if verdict.score is None:
                answer.node.status = "pruned"
                answer.node.detail["reason"] = "no critique could be read"
            else:
                answer.node.visit(verdict.score)
            yield from self.tree.news()
            yield from self.spent()

    def spent(self) -> Generator[Metric, None, None]:
        yield from self.budget.metrics(len(self.answers), self.forwards.count)

    # The result

    def best(self) -> Answer:
        """What is accepted, else the best in the tree if it is better than the root, else the root;
        where nothing was refined, the best of the first answers."""
        if self.root is None:
            return max(self.answers, key=_value)
        below = set(map(id, self.root.node.below()))
        inside = [each for each in self.answers if id(each.node) in below]
        best = max(inside, key=_value)
        return best if _value(best) > _value(self.root) else self.root

    def told(self, final: Answer) -> Generator[Event, None, None]:
        """The pair, or that there is none; and what is known of the judge."""
        step = len(self.answers)
        if self.root is None:
            if not final.accepted:
                yield Note("warning", "No answer was judged to fail, and none to be right.")
        elif final is self.root:
            yield Note("info", "No improvement: nothing in the tree is better than its root.")
        elif not final.accepted:
            yield Note("info", "Better than the root, but not accepted: there is no pair.")
        else:
            yield Candidate("chosen", "pair", final.text, round(final.logprob, DIGITS))
            yield Candidate("rejected", "pair", self.root.text, round(self.root.logprob, DIGITS))
            same = SequenceMatcher(None, self.root.text.split(), final.text.split()).ratio()
            yield Metric("similarity", step, round(same, DIGITS), "share of words")
        judged = [answer for answer in self.answers if answer.value is not None]
        said = {answer.accepted for answer in judged}
        if self.params.judge != "checks":
            if len(said) == 1 and len(judged) > 2:
                word = "Yes" if said == {True} else "No"
                yield Note("warning", f"The judge says {word} to all {len(judged)} answers.")
            if not judged:
                yield Note("warning", "Not one critique could be read: nothing was judged.")
            yield from self.measured(judged, step)

    def measured(self, judged: Sequence[Answer], step: int) -> Generator[Event, None, None]:
        """How often the judge agrees with the checks."""
        if not self.checks or not judged:
            return
        verdicts = Checks(self.checks)([answer.text for answer in judged])
        met = [verdict.score == 1 for verdict in verdicts]
        right = sum(answer.accepted == m for answer, m in zip(judged, met, strict=True))
        yield Metric("judge agrees", step, round(right / len(judged), DIGITS), "share")
        yield Note(
            "info",
            f"By the checks {sum(met)} of {len(met)} answers are right; the judge is right about "
            f"{right} of {len(met)}.",
        )

    def written(self, cursor: Cursor, final: Answer) -> Generator[Event, None, None]:
        """Commit the answer."""
        for answer in self.answers:
            if answer.node.status == "open":
                answer.node.status = "pruned"
                answer.node.detail.setdefault("reason", "another one is better")
        final.node.status = "committed"
        final.node.detail["reason"] = "accepted" if final.accepted else "best there was"
        yield from self.tree.news()
        origin: Origin = "forced" if final.parent else "sampled"
        room = self.engine.context - cursor.pos
        yield from forced(self.engine, cursor, final.node.ids[:room], origin)


def read_output(text: str) -> str | None:
    """What stands between the last [[start]] and the [[end]] behind it; None without it."""
    found = re.findall(r"\[\[start\]\]((?:(?!\[\[start\]\]).)*?)\[\[end\]\]", text, re.DOTALL)
    return found[-1].strip() if found else None


def _value(answer: Answer) -> float:
    """For comparing; one that was not judged comes last."""
    return -1.0 if answer.value is None else answer.value


def _checks(params: Params) -> Checklist | None:
    """Raises: BadParameter where one cannot be read, or there is none and a program is to judge."""
    if not params.checks.strip():
        if params.judge == "checks":
            raise BadParameter("checks is empty: write one check a line, or choose another judge.")
        return None
    found = read_checklist(params.checks)
    for each in found.requirements:
        if each.check is None:
            raise BadParameter(
                f"checks has the line {each.question!r}, which no program can check: "
                "begin it with length:, keywords:, pattern: or json."
            )
    return found
