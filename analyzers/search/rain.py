"""RAIN: the model searches over its own continuations, judges them itself, and goes back.

Source: Li, Wei, Zhao, Zhang and Zhang 2024 (ICLR), arXiv:2309.07124, and its code SafeAILab/RAIN.
Idea:   the text grows by sets of 1, 2, 4, then more tokens. Which set is tried next is decided by
        PUCT: how good the texts behind it were so far, plus how likely and how little looked at it
        is. A set that is tried is written on to the next pause, the model judges the whole text,
        and the value goes into every set that led there, in part also into those whose texts say
        nearly the same. Once a set was visited often and is good it is committed, and what was
        found behind it stays; its siblings are left. Nobody is trained, and the prompt stays.
Differs from the source: budgets are made for a laptop (the paper's: 50 iterations, at least 15 of
        them new, 10 candidates, sets of 1, 2, 4, 10, texts of 2,048 tokens). The judge may also say
        how sure it is instead of voting; a text that it cannot read counts as the middle of the
        scale. Own criteria, and rewards that a program computes, are ours. A simulation is at most
        `rollout` tokens long. The code's bounds of the value start at the ends of the scale, where
        a mean cannot move them: here they are the scale. A user's new turn ends a text only where
        the model says so with an end token. A value is backed up before the set is expanded, which
        changes nothing but what a spent budget leaves. With gamma 0 no sentence vectors are made,
        so no candidates are added later either.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from analyzers.card import Card
from analyzers.common import puct, stops
from analyzers.common.alike import Alike
from analyzers.common.budget import Budget, BudgetSpent, Expected, Forwards
from analyzers.common.embedding import embedder
from analyzers.common.judge_check import told
from analyzers.common.judges import Court, Verdict
from analyzers.common.judging_passes import passes_a_text
from analyzers.common.plain import plain
from analyzers.common.prefixes import Prefixes
from analyzers.common.rollouts import Rollout, never_over, rollouts
from analyzers.common.search_tree import Node, SearchTree
from analyzers.common.self_judges import Kind, asked, judge_of
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import ModelRef, knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Metric, Note, SearchNode, Token

CARD = Card(
    "RAIN",
    family="search",
    source="Li et al. 2024, arXiv:2309.07124; github.com/SafeAILab/RAIN",
    emits=(SearchNode, Candidate, Judgement, Token, Metric, Note),
    needs=("logits",),
)

PAUSES = (",", ".", "?", ":", ";", "\n")
TOP_K = 15
FLAT = 0.05
"""A judge whose values differ by less than this share of its scale gave the search no direction."""
DEFAULTS = {"adversarial": (5, 2.0), "truthful": (16, 1.0)}
"""Visits before a commit, and the temperature of candidates, where they are not (6, 1.0)."""


@dataclass(frozen=True)
class Params:
    """c, gamma, good, visits and temperature are the paper's, the others are for a laptop."""

    criterion: Kind = knob("harmless", "What a good text is; from keywords on, a program says it")
    wish: str = knob(
        "",
        "For own: the wish; keywords: sun, sea; length: 20-40 words; pattern: a regular expression",
    )
    max_new: int = knob(20, "When to stop writing", lo=1, hi=1024, unit="tokens")
    iterations: int = knob(12, "Most looks at the tree before a commit", lo=1, hi=200)
    candidates: int = knob(4, "Continuations to begin with at each place", lo=1, hi=20)
    soft: bool = knob(True, "Judge by probabilities; off = by votes, as in the paper")
    good: float = knob(0.8, "Commit early what is better than this", lo=-1, hi=1)
    visits: int = knob(0, "Visits to exceed for that; 0 = the criterion's", lo=0, hi=100)
    least: int = knob(4, "Looks to allow anew after a commit", lo=1, hi=100)
    c: float = knob(2.0, "How much likely but unvisited texts are preferred", lo=0, hi=20)
    gamma: float = knob(0.2, "How much similar texts share a value; 0 = nothing", lo=0, hi=1)
    lengths: tuple[int, ...] = knob((1, 2, 4, 6), "Tokens of a set, by depth; the last one stays")
    temperature: float = knob(0.0, "Of the candidates; 0 = the criterion's", lo=0, hi=3)
    rollout: int = knob(32, "Longest continuation that is judged", lo=1, hi=2048, unit="tokens")
    budget: int = knob(4000, "Most tokens to write in all", lo=1, hi=1_000_000, unit="tokens")
    judge: ModelRef = knob(ModelRef(""), "Another model as the judge; empty = the model itself")
    reuse: bool = knob(True, "Keep what was computed, write side by side; off = same but slower")

    @property
    def tries(self) -> int:
        """Sets to draw beside the greedy one, at most. The adversarial set-up draws again where
        others would drop what was drawn twice."""
        return (2 if self.criterion == "adversarial" else 1) * self.candidates - 1


def expect(params: Params) -> Expected:
    """For a text of `max_new` tokens of which no set is good enough to be committed early.

    Of a commit's looks at least one was made before it, since its set was visited. A look writes on
    for `rollout` tokens, asks the judge, and draws sets as long as the longest. Passes: a batch of
    sets counts once a token; reading a new text is one, the judge's question another, and so is
    what tells texts that say the same. Not counted: what is added later where all was bad.
    """
    longest = max(params.lengths, default=1)
    commits, rest = 0, params.max_new
    while rest > 0 and min(params.lengths, default=0) > 0:
        rest -= params.lengths[min(commits, len(params.lengths) - 1)]
        commits += 1
    looks = params.iterations + max(commits - 1, 0) * max(params.iterations - 1, params.least)
    sets = 1 + params.tries
    tokens = min(looks * (params.rollout + sets * longest), params.budget)
    batches = sets - params.candidates + 1 if params.reuse else sets
    judging = 0 if params.judge else passes_a_text(params.criterion)
    reading = 1 + bool(params.gamma) if params.reuse else 1 + sets
    passes = looks * (params.rollout + batches * longest + judging + reading) + 2 * commits
    return Expected(tokens, looks + 1, passes)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the SearchNodes and Judgements of every look at the tree, and the Tokens of every set
    that is committed; return why the text ended. Before it the plain answer, and behind it how good
    the judge is.

    Metrics count looks (`step`): value and visits of the best child, and what was spent so far
    (forwards of the model that writes; those of a judge are with its Judgements). To read the
    prompt and to write the plain answer is no part of the search.
    Raises: BadParameter for a criterion that is not told, set lengths that are none, or a budget
    below one look; and as the engine.
    """
    yield from task.written
    search = Search(engine, task, params, ctx)
    yield from expect(params).metrics()
    cursor = ctx.begin(engine, search.prompt)
    why = stops.over(engine, [], task.written) or search.why_over(search.top)
    if not why:
        yield from plain(engine, cursor, task, ctx, params.max_new, search.court)
        why = yield from search.forwards.of(search.run(cursor))
    yield from search.summary()
    yield from told(params.criterion, search.judging, soft=params.soft, together=params.reuse)
    return why


class Search:
    """top: the last committed node, from where it is searched; looks: so far."""

    def __init__(self, engine: Engine, task: Task, params: Params, ctx: Context) -> None:
        if not params.lengths or not all(1 <= length <= 64 for length in params.lengths):
            raise BadParameter("lengths must be one or more numbers from 1 to 64: tokens of a set.")
        visits, temperature = DEFAULTS.get(params.criterion, (6, 1.0))
        self.enough = params.visits or visits
        self.filters = Filters(temperature=params.temperature or temperature, top_k=TOP_K)
        first = 1 if params.lengths[0] == 1 else (1 + params.tries) * params.lengths[0]
        if params.budget < params.rollout + first:
            raise BadParameter(
                f"A budget of {params.budget:,} tokens is too small for one look at the tree, "
                f"which may take {params.rollout + first:,}: raise budget or lower rollout."
            )
        self.engine, self.params, self.rng = engine, params, ctx.rng
        self.prompt = engine.encode(task)
        self.room = min(params.max_new, engine.context - len(self.prompt))
        self.begun = task.prefix
        self.written_ids = [token.id for token in task.written]
        self.budget = Budget(tokens=params.budget)
        self.tree = SearchTree(engine, self.budget)
        self.top = self.tree.root
        self.top.status = "committed"
        self.top.detail["kind"] = "root"
        self.prefixes = Prefixes(engine, reuse=params.reuse)
        self.judging = ctx.engine(params.judge) if params.judge else engine
        judge = judge_of(
            params.criterion,
            self.judging,
            asked(task),
            spec=params.wish,
            soft=params.soft,
            together=params.reuse,
        )
        self.court = Court(judge, self.budget)
        self.lo, self.hi = judge.scale[:2]
        self.forwards = Forwards(engine)
        self.alike: Alike | None = None
        self.whole = params.criterion == "truthful"
        self.looks = 0
        self.verdicts: dict[str, Verdict] = {}
        # By number of the node, where it has children: their chances before these were made to add
        # up to 1, and how many were drawn.
        self.chances: dict[int, list[float]] = {}
        self.drawn: dict[int, int] = {}

    # The search

    def run(self, cursor: Cursor) -> Generator[Event, None, str]:
        """Look around and commit in turns until the text ends; return why. cursor: behind the
        prompt, where the answer is written."""
        if self.params.gamma:
            embed = embedder(self.engine)
            self.alike = Alike(embed, self.params.gamma)
            yield Note("info", embed.note)
        why = ""
        while not why:
            try:
                reason = yield from self.look_around()
                yield from self.commit(cursor, reason)
                why = self.why_over(self.top)
            except BudgetSpent as spent:
                yield Note("warning", f"The search was cut short: {spent}; the rest is its best.")
                while self.top.children and (self.best.visits or not self.top.tokens):
                    yield from self.commit(cursor, "budget")
                why = self.why_over(self.top) or str(spent)
        return why

    def look_around(self) -> Generator[Event, None, str]:
        """Look at the tree until a child of `top` may be committed; return why it may."""
        seen = self.top.real_visits
        for _ in range(seen, max(self.params.iterations, seen + self.params.least)):
            yield from self.look()
            best = self.best
            if best.value is not None:
                yield Metric("best child's value", self.looks, round(best.value, DIGITS), "value")
            yield Metric("best child's visits", self.looks, best.real_visits, "visits")
            yield from self.budget.metrics(self.looks, self.forwards.count)
            if puct.settled(best.value, best.real_visits, self.enough, self.params.good):
                return (
                    f"visited {best.real_visits} times, more than {self.enough}, "
                    f"and {best.value:.2f} is better than {self.params.good:g}"
                )
        return f"most visited after {self.top.real_visits} looks"

    def look(self) -> Generator[Event, None, None]:
        """Select a leaf, write on from it, judge the text, tell its ancestors, expand it."""
        self.looks += 1
        leaf = yield from self.select()
        yield from self.tree.news()
        ids = self.simulate(leaf)
        leaf.detail["rollout"] = self.tree.text_behind(leaf, ids)
        text = self.text(leaf, ids)
        if self.whole:
            text = text[: text.rfind(".") + 1] or text
        ((key, verdict),) = yield from self.court.hear([text], str(leaf.number))
        value = (self.lo + self.hi) / 2 if verdict.score is None else verdict.score
        if key not in leaf.evals:
            leaf.evals.append(key)
        self.verdicts[key] = verdict
        self.back_up(leaf, ids, value)
        yield from self.tree.news()
        if not self.why_over(leaf) and not leaf.children:
            self.expand(leaf)
            yield from self.tree.news()

    def select(self) -> Generator[Event, None, Node]:
        """From `top` along the largest PUCT to a node without children."""
        for node in self.tree.nodes:
            node.detail.pop("siblings", None)
        node = self.top
        node.detail["iteration"] = self.looks
        while node.children:
            if self.needs_more(node):
                yield from self.tree.news()
                self.add_one(node)
            terms = {child.number: self.terms(child) for child in node.children.values()}
            chosen = max(node.children.values(), key=lambda child: sum(terms[child.number]))
            exploit, explore = terms[chosen.number]
            node.detail["siblings"] = tuple((number, *both) for number, both in terms.items())
            chosen.detail["puct"] = {"exploit": exploit, "explore": explore}
            chosen.detail["iteration"] = self.looks
            node = chosen
        return node

    def terms(self, child: Node) -> tuple[float, float]:
        """The two parts of PUCT."""
        assert child.parent is not None and child.prior is not None
        exploit = puct.exploit(child.value, self.lo, self.hi)
        explore = puct.explore(child.prior, child.visits, child.parent.visits, self.params.c)
        return round(exploit, DIGITS), round(explore, DIGITS)

    def simulate(self, leaf: Node) -> list[int]:
        """How the text may go on to its next pause, to its end where whole texts are judged."""
        if self.why_over(leaf) or self.pauses(leaf, ()):
            return []
        cursor = self.prefixes.cursor([*self.prompt, *leaf.tokens])
        (found,) = rollouts(
            self.engine,
            cursor,
            [self.rng("simulation", leaf.number)],
            self.budget,
            max_new=self.params.rollout,
            filters=Filters(),
            over=never_over if self.whole else partial(self.pauses, leaf),
        )
        return found.ids

    def back_up(self, leaf: Node, ids: Sequence[int], value: float) -> None:
        """Tell every node from `leaf` to `top` of the value; nodes beside it, as far as the texts
        behind them say the same."""
        path = leaf.path[self.top.depth :]
        if self.alike:
            behind = tuple(ids)
            texts: dict[Node, str] = {}
            for parent, node in reversed(list(pairwise(path))):
                behind = node.ids + behind
                texts[node] = self.tree.text_behind(parent, behind)
            self.alike.hear(texts, value)
        for node in path:
            node.visit(value)

    # Candidates

    def expand(self, node: Node) -> None:
        """Give it its first children."""
        if self.set_length(node) == 1:
            sets, chances = self.likeliest(node, self.params.candidates)
        else:
            sets, chances = self.sampled(node)
        self.chances[node.number] = chances
        for ids, prior in zip(sets, puct.shares(chances), strict=True):
            self.add(node, ids, prior)
        if node is self.top:
            self.mix_top()

    def likeliest(self, node: Node, k: int) -> tuple[list[tuple[int, ...]], list[float]]:
        """The k likeliest tokens behind a node, likeliest first, and their chances."""
        self.budget.charge("tokens")
        cursor = self.prefixes.cursor([*self.prompt, *node.tokens])
        step = self.engine.step(cursor, filters=Filters(temperature=self.filters.temperature))
        found = torch.softmax(step.logits.double(), dim=-1).topk(
            min(k, self.engine.vocabulary.size)
        )
        return [(id,) for id in found.indices.tolist()], found.values.tolist()

    def sampled(self, node: Node) -> tuple[list[tuple[int, ...]], list[float]]:
        """The greedy set behind a node and different ones that are drawn, and their chances."""
        found: dict[tuple[int, ...], float] = {}
        draws: list[int | None] = [None, *range(self.params.candidates - 1)]
        drawn = 0
        while draws:
            for each in self.sets(node, draws):
                found.setdefault(tuple(each.ids), each.chance)
            drawn += sum(draw is not None for draw in draws)
            missing = min(self.params.candidates - len(found), self.params.tries - drawn)
            draws = list(range(drawn, drawn + missing))
        self.drawn[node.number] = drawn
        greedy, *others = found.values()
        return list(found), [puct.clamp_greedy(greedy, others), *others]

    def sets(self, node: Node, draws: Sequence[int | None]) -> list[Rollout]:
        """One set of tokens behind a node for each draw by its number; None is the greedy one."""
        return rollouts(
            self.engine,
            self.prefixes.cursor([*self.prompt, *node.tokens]),
            [None if i is None else self.rng("candidate", node.number, i) for i in draws],
            self.budget,
            max_new=self.set_length(node),
            filters=self.filters,
            together=self.params.reuse,
        )

    def needs_more(self, node: Node) -> bool:
        """Whether all that was tried behind a node says the same, and is bad."""
        children = node.children.values()
        if self.alike is None or len(children) >= 2 * self.params.candidates:
            return False
        return self.alike.all_bad(children, self.set_length(node), (self.lo + self.hi) / 2)

    def add_one(self, node: Node) -> None:
        """One more child: the next likeliest token, or a set that is drawn; nothing where that set
        is there already. What its siblings have as priors stays."""
        chances = self.chances[node.number]
        if self.set_length(node) == 1:
            sets, likely = self.likeliest(node, len(chances) + 1)
            ids, chance = sets[-1], likely[-1]
        else:
            (drawn,) = self.sets(node, [self.drawn[node.number]])
            self.drawn[node.number] += 1
            ids, chance = tuple(drawn.ids), drawn.chance
        if ids not in node.children:
            chances.append(chance)
            prior = puct.shares(chances)[-1]
            self.add(node, ids, puct.mix_root(prior, len(chances)) if node is self.top else prior)

    def add(self, node: Node, ids: Sequence[int], prior: float) -> None:
        child = self.tree.add(node, ids, prior, {"kind": "set"})
        child.detail["finished"] = bool(self.why_over(child))

    def mix_top(self) -> None:
        """Some of the looks at the children of `top` go to all of them alike."""
        for child in self.top.children.values():
            assert child.prior is not None
            child.prior = puct.mix_root(child.prior, len(self.top.children))

    # The answer

    def commit(self, cursor: Cursor, reason: str) -> Generator[SearchNode | Token, None, None]:
        """Write the best child of `top`; it is searched on from there, with what was found."""
        best = self.best
        for sibling in self.top.children.values():
            for node in sibling.below() if sibling is not best else ():
                node.status = "rewound"
        best.status = "committed"
        best.detail["reason"] = reason
        self.top = best
        self.mix_top()
        yield from self.tree.news()
        yield from forced(self.engine, cursor, best.ids)

    @property
    def best(self) -> Node:
        """The child of `top` that was visited most, of those the better one."""
        return max(
            self.top.children.values(),
            key=lambda child: (
                child.visits,
                self.lo if child.value is None else child.value,
                child.prior or 0.0,
            ),
        )

    def why_over(self, node: Node) -> str:
        """Why nothing can follow a node; "" where something can."""
        if node.ids and self.engine.ends(node.ids[-1]):
            return "end token"
        if len(node.tokens) < self.room:
            return ""
        return "max_new reached" if self.room == self.params.max_new else "context full"

    def set_length(self, node: Node) -> int:
        """Tokens of the sets behind a node; its depth counts committed sets, too."""
        lengths = self.params.lengths
        length = lengths[min(node.depth, len(lengths) - 1)]
        return min(length, self.room - len(node.tokens))

    def text(self, node: Node, ids: Sequence[int]) -> str:
        """The whole answer with `ids` behind a node, what it began with included."""
        decode = self.engine.vocabulary.decode
        return self.begun + decode([*self.written_ids, *node.tokens, *ids])

    def pauses(self, node: Node, ids: Sequence[int]) -> bool:
        """Whether the answer can be judged where `ids` end; not in the middle of a clause."""
        return self.text(node, ids).endswith(PAUSES)

    def summary(self) -> Generator[Note | Metric, None, None]:
        """Whether the judge was of any use, and what was spent."""
        name, verdicts = self.court.judge.name, self.verdicts.values()
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if scores and max(scores) - min(scores) < FLAT * (self.hi - self.lo):
            yield Note(
                "warning",
                f"The judge “{name}” gave every text between {min(scores):.2f} and "
                f"{max(scores):.2f}: it could hardly tell them apart, so the search had nothing "
                "to go by.",
            )
        if (same := sum("same letter" in verdict.detail for verdict in verdicts)) * 2 > len(scores):
            yield Note(
                "warning",
                f"The judge “{name}” chose the same letter in both orders of the options for "
                f"{same} of {len(scores)} texts: it went by the letter, not by the text.",
            )
        yield from self.budget.metrics(self.looks, self.forwards.count)
