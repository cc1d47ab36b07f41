"""Iterative deepening: the budget of tokens grows, and at every edge the model is told to check.

Source: Chen, Koenig and Dilkina 2025, "Iterative Deepening Sampling for Large Language Models",
        arXiv:2502.05449; no code is known.
Idea:   several chains are written side by side. Where a chain reaches a budget, or ends before the
        last one, a fixed sentence is put behind it as if the model had doubted itself, and it
        writes on to the next budget, `growth` times as far. What it would answer is read at every
        edge from a copy. In the end the chains vote.
Differs from the source: read from its abstract and summaries, so that budgets, sentences and the
        rules at the edges are reconstructed, and the defaults are ours. A budget counts all tokens
        behind the prompt, triggers included. A trigger that would leave no room to write is left
        out. Chains that repeat themselves stop. Neutral filler in place of the check, no trigger
        at all, and a fresh start at each budget are there to be compared with. There is no process
        reward model among the selectors.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import exp, fsum
from random import Random
from statistics import fmean
from typing import Literal

from analyzers.card import Card
from analyzers.common.answers import final_answer, vote
from analyzers.common.budget import Budget, BudgetSpent, Expected, Forwards
from analyzers.common.judge_check import told
from analyzers.common.judges import Court
from analyzers.common.judging_passes import passes_a_text
from analyzers.common.plain import plain
from analyzers.common.rollouts import rollouts
from analyzers.common.search_tree import Node, SearchTree
from analyzers.common.self_judges import asked, judge_of
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, draw
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter, OutOfContext
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Metric, Note, SearchNode, Token

CARD = Card(
    "Iterative deepening",
    family="search",
    source="Chen, Koenig and Dilkina 2025, arXiv:2502.05449",
    emits=(SearchNode, Candidate, Judgement, Token, Metric, Note),
    needs=("logits",),
    example="Tom has 3 apples and buys 4 more. Then he eats 2. How many are left?",
)
FILLER = "\n\nAnd so it goes on here, one line after the other, as before."
PROBE_TOKENS = 12
NEAR = 8
"""Tokens on either side of an edge whose entropy is compared."""
GRAM = 4
SAME = 0.9
"""A segment of which more than this share of runs of GRAM tokens stood in the one before repeats
it."""


@dataclass(frozen=True)
class Params:
    """All defaults are ours."""

    chains: int = knob(3, "How many chains to write side by side", lo=1, hi=32)
    first: int = knob(32, "The first budget", lo=1, hi=4096, unit="tokens")
    growth: float = knob(2.0, "Each budget is so many times the one before", lo=1.1, hi=16)
    max_new: int = knob(128, "The last budget", lo=1, hi=8192, unit="tokens")
    edge: Literal["check", "filler", "nothing"] = knob(
        "check",
        "What is put behind a text that reaches a budget: the trigger, as many neutral tokens, or "
        "nothing, which is plain sampling",
    )
    trigger: str = knob(
        "Wait, there may be a mistake. Let me check this again.", "What asks for a check", lines=2
    )
    probe: str = knob(
        "The answer is", "How to read an answer at the edges; empty = from the text as it is"
    )
    select: Literal["vote", "mean", "truthful"] = knob(
        "vote",
        "Which chain is kept: one with the most frequent answer, the one whose tokens were "
        "likeliest on average, or the one that the model calls true",
    )
    truth: str = knob("", "The right final answer, if known: counts what checks mend and break")
    mode: Literal["continue", "restart"] = knob(
        "continue", "Go on from the text that is there, or begin anew at every budget, unchecked"
    )
    temperature: float = knob(0.7, "Above 1 flattens, below 1 sharpens", lo=0.05, hi=2)
    tokens: int = knob(
        0, "Most tokens to write in all; 0 = no limit", lo=0, hi=1_000_000, unit="tokens"
    )


@dataclass
class Segment:
    """What the model wrote between two edges. logprobs, entropies: raw, nats, one a token."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Chain:
    """node: the last one. answers: what was read behind each segment. over: why it does not go on;
    "" while it does. score: what it is selected by."""

    number: int
    cursor: Cursor
    node: Node
    rng: Random
    segments: list[Segment] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    over: str = ""
    score: float | None = None

    @property
    def mean(self) -> float:
        """Log-probability per token that the model wrote, nats; triggers are not its own."""
        logprobs = [each for segment in self.segments for each in segment.logprobs]
        return fmean(logprobs) if logprobs else float("-inf")


def budgets(first: int, growth: float, most: int) -> list[int]:
    """Of tokens behind the prompt, the last one is `most`; each but the last is an edge."""
    found, budget = [], float(first)
    while int(budget) < most:
        found += [int(budget)] if int(budget) not in found else []
        budget *= growth
    return [*found, most]


def expect(params: Params) -> Expected:
    """For chains that no end token ends. A chain that ended early and was told to check may have a
    longer way to the next budget than the others, so that fewer of its tokens share a pass; passes
    that write are counted as if one chain had the longest way at every level. Probes are written
    side by side, but each is read alone, as is each trigger."""
    edges = budgets(params.first, params.growth, params.max_new)
    levels, probed = len(edges), bool(params.probe.strip())
    restart = params.mode == "restart"
    text = sum(edges) if restart else params.max_new
    tokens = params.chains * (text + levels * PROBE_TOKENS * probed)
    passes = min(sum(edges), params.chains * text)
    passes += levels * (PROBE_TOKENS + params.chains) * probed
    passes += 0 if restart else levels * params.chains
    judged = params.chains if params.select == "truthful" else 0
    passes += judged * passes_a_text("truthful") + params.max_new
    most = params.tokens or tokens
    return Expected(min(tokens, most), judged, passes)


def repeats(now: Sequence[int], before: Sequence[int]) -> bool:
    """Whether a segment says again what the one before it said."""
    known, new = _grams(before), _grams(now)
    return bool(new) and sum(gram in known for gram in new) > SAME * len(new)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield segments, triggers and probes as nodes, level by level, then the Tokens of the chain
    that was kept; return why that one.

    Chain i draws from one generator all along, so that without triggers it is plain sampling.
    Values of segments: the share of the chains that would give the same answer there.
    Raises: BadParameter for an empty trigger, one as long as the last budget, or a budget below
    one segment.
    """
    deepening = Deepening(engine, task, params, ctx)
    yield from task.written
    yield from expect(params).metrics()
    main = ctx.begin(engine, engine.encode(task))
    room = engine.context - main.pos
    if not room:
        return "context full"
    yield from plain(engine, main, task, ctx, min(params.max_new, room))
    why = yield from deepening.forwards.of(deepening.made(main, room))
    if params.select == "truthful":
        yield from told("truthful", engine, soft=True)
    return why


class Deepening:
    """start: where the answer begins. edges: the budgets. level: how many of them were begun.
    trigger, probe: ids that are put behind a text. begun: what stands before it in the answer."""

    def __init__(self, engine: Engine, task: Task, params: Params, ctx: Context) -> None:
        self.engine, self.params, self.ctx = engine, params, ctx
        if params.tokens and params.tokens < params.chains * min(params.first, params.max_new):
            raise BadParameter(
                f"A budget of {params.tokens:,} tokens is too small for the first segments of "
                f"{params.chains} chains: raise tokens, or lower first or chains."
            )
        self.trigger = self._trigger()
        self.budget = Budget(tokens=params.tokens)
        self.forwards = Forwards(engine)
        self.tree = SearchTree(engine, self.budget)
        self.tree.root.status = "committed"
        self.tree.root.detail["kind"] = "root"
        self.filters = Filters(temperature=params.temperature)
        self.truth = final_answer(params.truth)
        self.probe = engine.tokens(f"\n\n{params.probe.strip()}") if params.probe.strip() else []
        self.asked = asked(task)
        self.begun = task.prefix + engine.vocabulary.decode([token.id for token in task.written])
        self.start, self.level = 0, 0
        self.edges: list[int] = []
        self.chains: list[Chain] = []

    def _trigger(self) -> list[int]:
        params = self.params
        if params.edge == "nothing" or params.mode == "restart":
            return []
        if not params.trigger.strip():
            raise BadParameter('The trigger is empty: write one, or choose "nothing" at the edges.')
        ids = self.engine.tokens(f"\n\n{params.trigger.strip()}")
        if params.first < params.max_new <= len(ids):
            raise BadParameter(
                f"The trigger has {len(ids)} tokens, the last budget only {params.max_new}: raise "
                "max_new or shorten the trigger."
            )
        if params.edge == "filler":
            filler = self.engine.tokens(FILLER)
            ids = (filler * len(ids))[: len(ids)]
        return ids

    def made(self, main: Cursor, room: int) -> Generator[Event, None, str]:
        """Write the chains, keep one of them, write it into the answer behind `main`. room: tokens
        that the window has left there."""
        params = self.params
        self.start = main.pos
        self.edges = budgets(params.first, params.growth, min(params.max_new, room))
        yield from self.tree.news()
        if room < params.max_new:
            yield Note("warning", f"The model's window ends the last budget at {room:,} tokens.")
        if params.temperature != 1:
            yield Note(
                "info",
                "Log-probabilities are those of the model itself; the chains are drawn at "
                f"temperature {params.temperature:g}.",
            )
        why = ""
        try:
            if params.mode == "restart":
                yield from self.restart(main)
            else:
                yield from self.deepen(main)
        except BudgetSpent as spent:
            why = str(spent)
            yield Note("warning", f"The chains end where they are: {spent}.")
            yield from self.cut_off()
        best, chosen = yield from self.select()
        yield from self.write(main, best)
        yield from self.tell()
        yield from self.spent()
        return why or chosen

    # Writing

    def deepen(self, main: Cursor) -> Generator[Event, None, None]:
        """Every chain goes on from its own text."""
        self.chains = [
            Chain(i, self.engine.fork(main), self.tree.root, self.ctx.rng("sample", i))
            for i in range(self.params.chains)
        ]
        while going := [chain for chain in self.chains if not chain.over]:
            self.level += 1
            self.write_segments(going, [self.limit(chain) for chain in going])
            for chain in going:
                self.close(chain)
            yield from self.tree.news()
            yield from self.look(going)
            for chain in going:
                if not chain.over and self.trigger:
                    yield from self.check(chain)
            yield from self.tree.news()

    def restart(self, main: Cursor) -> Generator[Event, None, None]:
        """Every budget is written from the prompt."""
        for level, limit in enumerate(self.edges):
            self.level += 1
            last = self.chains
            fresh = [
                Chain(
                    i,
                    self.engine.fork(main),
                    self.tree.root,
                    self.ctx.rng("restart", i, level) if level else self.ctx.rng("sample", i),
                    answers=last[i].answers if last else [],
                )
                for i in range(self.params.chains)
            ]
            # A level that the budget cuts short leaves the one before it.
            self.write_segments(fresh, [limit] * len(fresh))
            self.chains = fresh
            for chain in fresh:
                chain.over = f"budget of {limit:,} tokens"
                self.close(chain)
            yield from self.tree.news()
            yield from self.look(fresh)

    def limit(self, chain: Chain) -> int:
        """The budget of a chain at this level, in tokens behind the prompt; the next one where a
        trigger went beyond it."""
        return next(edge for edge in self.edges[self.level - 1 :] if edge > self.used(chain))

    def used(self, chain: Chain) -> int:
        return chain.cursor.pos - self.start

    def write_segments(self, chains: Sequence[Chain], limits: Sequence[int]) -> None:
        """Each to its limit or its end token, which is then the last of the segment.

        Raises: BudgetSpent; what was written stays in the chains."""
        going = list(zip(chains, limits, strict=True))
        for chain in chains:
            chain.segments.append(Segment())
        while going:
            self.budget.charge("tokens", len(going))
            steps = self.engine.step([chain.cursor for chain, _ in going], filters=self.filters)
            for (chain, _), step in zip(going, steps, strict=True):
                id, _ = draw(step, chain.rng)
                logprobs = step.raw.log_softmax(0)
                self.engine.push(chain.cursor, id)
                segment = chain.segments[-1]
                segment.ids.append(id)
                segment.logprobs.append(float(logprobs[id]))
                segment.entropies.append(float(-logprobs.exp().dot(logprobs)))
            going = [
                (chain, limit)
                for chain, limit in going
                if not self.ended(chain) and self.used(chain) < limit
            ]

    def ended(self, chain: Chain) -> bool:
        """Whether the model said that it is done."""
        ids = chain.segments[-1].ids
        return bool(ids) and self.engine.ends(ids[-1])

    def close(self, chain: Chain) -> None:
        """Decide whether the chain goes on, and make a node of its last segment."""
        segment, ended, used = chain.segments[-1], self.ended(chain), self.used(chain)
        chain.over = chain.over or self.why_over(chain)
        if ended and not chain.over:  # the turn stays open for the trigger
            self.engine.rewind(chain.cursor, chain.cursor.pos - 1)
            for values in (segment.ids, segment.logprobs, segment.entropies):
                values.pop()
        detail = {
            "kind": "segment",
            "iteration": self.level,
            "chain": chain.number + 1,
            "tokens": len(segment.ids),
            "logprob": round(fsum(segment.logprobs), DIGITS),
            "finished": ended,
            "reason": chain.over or ("ended early" if ended else f"reached {used:,} tokens"),
        }
        if segment.entropies:
            detail["entropy"] = round(fmean(segment.entropies), DIGITS)
        chain.node = self.tree.add(chain.node, segment.ids, detail=detail)

    def why_over(self, chain: Chain) -> str:
        """Why a chain that stands at an edge or at its end does not go on; "" if it does."""
        if self.ended(chain):
            last = self.level >= len(self.edges) or not self.trigger
            if last or not self.fits(self.used(chain) - 1):
                return "end token"
        elif self.used(chain) == self.edges[-1]:
            return "last budget"
        if self.trigger and len(chain.segments) > 1:
            now, before = chain.segments[-1].ids, chain.segments[-2].ids
            return "repeats itself" if repeats(now, before) else ""
        return ""

    def fits(self, used: int) -> bool:
        """Whether a trigger behind so many tokens leaves room to write."""
        return used + len(self.trigger) < self.edges[-1]

    def check(self, chain: Chain) -> Generator[Note, None, None]:
        """Put the trigger behind a chain."""
        used = self.used(chain)
        if not self.fits(used):
            yield Note(
                "info",
                f"Chain {chain.number + 1} has no room for a trigger behind {used:,} tokens.",
            )
            return
        self.engine.extend(chain.cursor, self.trigger)
        detail = {"kind": "trigger", "iteration": self.level, "reason": chain.node.detail["reason"]}
        chain.node = self.tree.add(chain.node, self.trigger, detail=detail)

    def cut_off(self) -> Generator[Event, None, None]:
        """Make nodes of what was written when the budget was spent."""
        for chain in self.chains:
            if chain.over:
                continue
            chain.over = "budget spent"
            if chain.segments[-1].ids and len(chain.segments) > len(chain.answers):
                self.close(chain)
                chain.answers.append(self.read(chain))
            while (parent := chain.node.parent) and not chain.node.detail.get("tokens"):
                chain.node = parent  # a trigger that nothing was written behind
        yield from self.tree.news()

    # Answers

    def look(self, chains: Sequence[Chain]) -> Generator[Event, None, None]:
        """Read what each chain would answer, from a copy that is thrown away."""
        for chain in chains:
            chain.answers.append(self.read(chain))
        fits = [
            chain
            for chain in chains
            if self.probe and chain.cursor.pos + len(self.probe) < self.engine.context
        ]
        copies = [self.engine.fork(chain.cursor, self.behind(chain)) for chain in fits]
        for copy in copies:
            self.engine.extend(copy, self.probe)
        found = rollouts(
            self.engine,
            copies,
            [None] * len(copies),
            self.budget,
            max_new=PROBE_TOKENS,
            filters=Filters(),
            over=self.line_done,
        )
        decode = self.engine.vocabulary.decode
        for chain, probe in zip(fits, found, strict=True):
            answer = final_answer(f"{decode(self.probe)}{decode(probe.ids)}")
            chain.answers[-1] = answer
            logprob = fsum(probe.logprobs)
            node = self.tree.add(
                chain.node,
                [*self.probe, *probe.ids],
                prior=exp(logprob),
                detail={
                    "kind": "probe",
                    "iteration": self.level,
                    "logprob": round(logprob, DIGITS),
                    "answer": answer or "",
                    "reason": "a look at the answer, no part of the text",
                },
            )
            node.status = "pruned"
        yield from self.share(chains)
        yield from self.spent()

    def behind(self, chain: Chain) -> int:
        """Where the text of a chain ends, without an end token."""
        return chain.cursor.pos - self.ended(chain)

    def line_done(self, ids: Sequence[int]) -> bool:
        return "\n" in self.engine.vocabulary.decode(ids).lstrip()

    def read(self, chain: Chain) -> str | None:
        """The answer in the text as it is."""
        return final_answer(self.begun + self.tree.text(chain.node))

    def share(self, chains: Sequence[Chain]) -> Generator[Event, None, None]:
        """Tell how many of all chains would answer the same."""
        now = [chain.answers[-1] for chain in self.chains]
        for chain in chains:
            answer = chain.answers[-1]
            chain.node.detail["answer"] = answer or ""
            if len(chain.answers) > 1:
                chain.node.detail["changed"] = answer != chain.answers[-2]
            chain.node.visit(now.count(answer) / len(now) if answer is not None else 0.0)
        yield from self.tree.news()
        yield Metric("votes for the leader", self.level, round(vote(now).share, DIGITS), "share")
        if self.params.mode == "continue" and (change := self.entropy_change(chains)) is not None:
            yield Metric("entropy behind the edge, less before", self.level, change, "nats")

    def spent(self) -> Generator[Metric, None, None]:
        yield from self.budget.metrics(self.level, self.forwards.count)

    def entropy_change(self, chains: Sequence[Chain]) -> float | None:
        """Mean over the chains, of the tokens next to the edge before their last segment."""
        changes = [
            fmean(chain.segments[-1].entropies[:NEAR]) - fmean(chain.segments[-2].entropies[-NEAR:])
            for chain in chains
            if len(chain.segments) > 1
            and chain.segments[-1].entropies
            and chain.segments[-2].entropies
        ]
        return round(fmean(changes), DIGITS) if changes else None

    # Choosing

    def select(self) -> Generator[Event, None, tuple[Chain, str]]:
        """The chain that is kept, and why."""
        how = self.params.select
        final = [chain.answers[-1] for chain in self.chains]
        for chain in self.chains:
            text = self.tree.text(chain.node)
            logprob = fsum(each for segment in chain.segments for each in segment.logprobs)
            yield Candidate(f"c{chain.number + 1}", "chains", text, round(logprob, DIGITS))
        counted = vote(final)
        if how == "vote":
            name = "share of the votes"
            for chain in self.chains:
                votes = counted.counts.get(chain.answers[-1] or "", 0)
                chain.score = votes / len(self.chains)
            if not counted.leaders:
                yield Note("warning", "No chain gives an answer: the likeliest one is kept.")
            elif len(counted.leaders) > 1:
                yield Note(
                    "info",
                    f"The vote is tied between {', '.join(map(repr, counted.leaders[:4]))}: the "
                    "chain with the likelier tokens is kept.",
                )
        elif how == "mean":
            name = "log-probability a token"
            for chain in self.chains:
                chain.score = chain.mean
        else:
            name = yield from self.judge()
        best = max(self.chains, key=_worth)
        for chain in self.chains:
            if chain.score is not None:
                chain.node.detail |= {"score": round(chain.score, DIGITS), "score_name": name}
        return best, f"chain {best.number + 1} of {len(self.chains)} by {name}; {best.over}"

    def judge(self) -> Generator[Event, None, str]:
        """Ask the model whether each chain is true."""
        court = Court(judge_of("truthful", self.engine, self.asked, soft=True), self.budget)
        try:
            for chain in self.chains:
                text = self.begun + self.tree.text(chain.node)
                ((key, verdict),) = yield from court.hear([text], str(chain.node.number))
                chain.score = verdict.score
                if key not in chain.node.evals:
                    chain.node.evals.append(key)
        except OutOfContext as problem:
            yield Note("warning", str(problem))
        if all(chain.score is None for chain in self.chains):
            yield Note("warning", "The judge could not be read: the likeliest chain is kept.")
        return court.judge.name

    def write(self, main: Cursor, best: Chain) -> Generator[Event, None, None]:
        """Commit the chain, with its triggers as what they are."""
        for node in best.node.path:
            node.status = "committed"
        self.tree.prune(self.tree.root)
        yield from self.tree.news()
        for node in best.node.path:
            trigger = node.detail["kind"] == "trigger"
            yield from forced(self.engine, main, node.ids, "forced" if trigger else "sampled")

    def tell(self) -> Generator[Event, None, None]:
        """What the edges did to the answers."""
        if repeating := [chain for chain in self.chains if chain.over == "repeats itself"]:
            yield Note(
                "info", f"{len(repeating)} of {len(self.chains)} chains repeated themselves."
            )
        pairs = [
            pair
            for chain in self.chains
            for pair in zip(chain.answers, chain.answers[1:], strict=False)
        ]
        changed = sum(before != after for before, after in pairs)
        yield Metric("answers changed at an edge", self.level, changed, "answers")
        yield Metric("answers the same at an edge", self.level, len(pairs) - changed, "answers")
        if not self.truth:
            return
        right = sum(chain.answers[-1] == self.truth for chain in self.chains)
        yield Metric("chains right", self.level, right, "chains")
        if not pairs:
            return
        fixed = sum(before != self.truth == after for before, after in pairs)
        broken = sum(before == self.truth != after for before, after in pairs)
        yield Metric("answers fixed", self.level, fixed, "answers")
        yield Metric("answers broken", self.level, broken, "answers")
        verdict = "did not benefit" if fixed <= broken else "became right more often than wrong"
        yield Note(
            "info",
            f"At the edges this model {verdict}: fixed {fixed}, broken {broken} of {len(pairs)}.",
        )


def _worth(chain: Chain) -> tuple[float, float]:
    # Scores that are the same but for rounding are the same.
    score = float("-inf") if chain.score is None else round(chain.score, DIGITS)
    return score, chain.mean


def _grams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + GRAM]) for place in range(len(ids) - GRAM + 1)]
