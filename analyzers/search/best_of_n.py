"""Best of N: the model writes many answers, and the one that it thinks most of is kept.

Source: Huang et al. 2024, "Self-Improvement in Language Models: The Sharpening Mechanism",
        arXiv:2412.01951 (best-of-N with the model's own log-probability, and the rule that says
        when enough was drawn); no official code is known.
Idea:   answers are drawn independently at temperature 1. The highest self-reward wins: the
        log-probability of the whole answer, the same per token, how many draws come to the same
        final answer, or what the model or a rule says of it. The greedy answer stands beside them,
        and so does what a random choice among the same answers would have given.
Differs from the source: answers that were cut off are compared by log-probability only where none
        ended, and are marked. Equal votes go to the likelier answer; of the draws with the winning
        answer the likeliest is written. Final answers are read by rules of ours. The source draws
        50 of up to 512 tokens; our defaults are for a CPU. It goes on to train on what was chosen.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log
from random import Random
from statistics import fmean
from typing import Literal, cast

from analyzers.card import Card
from analyzers.common import best_of
from analyzers.common.answers import final_answer, vote
from analyzers.common.budget import Budget, BudgetSpent, Expected, Forwards
from analyzers.common.judge_check import told
from analyzers.common.judges import Court
from analyzers.common.judging_passes import passes_a_text
from analyzers.common.plain import PLAIN
from analyzers.common.search_tree import Node, SearchTree
from analyzers.common.self_judges import Kind, asked, judge_of
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters
from analyzers.engine.scoring import Sample
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Metric, Note, SearchNode, Token

CARD = Card(
    "Best of N",
    family="search",
    source="Huang et al. 2024 (Sharpening), arXiv:2412.01951",
    emits=(SearchNode, Candidate, Judgement, Token, Metric, Note),
    needs=("logits",),
    example="What is the capital of Australia? Answer with one word.",
)
SIDE_BY_SIDE = 8
"""Answers that are written in one batch."""
READ_AT_ONCE = 64
"""Tokens of the choice that are read in one pass, when it is written."""
SEEN = 1e-6
"""Of an answer that is less likely, how many draws find it is of no use."""
MISS = 0.05
_UNITS = {
    "sum": ("log-probability", "nats"),
    "mean": ("log-probability a token", "nats"),
    "majority": ("share of the votes", ""),
}


@dataclass(frozen=True)
class Params:
    """Temperature 1 and the sum are the source's, the rest is ours."""

    n: int = knob(8, "How many answers to draw", lo=1, hi=256)
    by: Literal["sum", "mean", "majority", "truthful", "own", "keywords", "length", "pattern"] = (
        knob(
            "sum",
            "What decides: the log-probability of the answer, the same per token (does not favour "
            "short answers), how many draws have the same final answer, whether the model calls it "
            "true or as you wish it, or a rule (the last three), which shows what choosing can do",
        )
    )
    wish: str = knob(
        "",
        "For your own judgement: what a good answer is; for a rule: the keywords (sun, sea), the "
        "length (20-40 words) or the pattern",
    )
    max_new: int = knob(48, "When to stop writing an answer", lo=1, hi=4096, unit="tokens")
    truth: str = knob("", "The right final answer, if known: shows how often choosing finds it")
    delta: float = knob(
        0.0,
        "Stop drawing when all but this chance speaks against a likelier answer; 0 = draw all n",
        lo=0,
        hi=0.5,
    )
    temperature: float = knob(1.0, "Above 1 flattens, below 1 sharpens", lo=0.05, hi=2)
    tokens: int = knob(
        0, "Most tokens to write in all; 0 = no limit", lo=0, hi=1_000_000, unit="tokens"
    )


def expect(params: Params) -> Expected:
    """For the greedy answer and `n` draws that are never over early; all that are written side by
    side take one pass a token. Reading the prompt is one more, and so is writing the choice."""
    judged = params.by not in _UNITS
    texts = params.n + 1 if judged else 0
    tokens = min((params.n + 1) * params.max_new, params.tokens or inf)
    passes = min((1 + ceil(params.n / SIDE_BY_SIDE)) * params.max_new, tokens)
    passes += texts * passes_a_text(cast(Kind, params.by)) if judged else 0
    reading = 1 + ceil(params.max_new / READ_AT_ONCE)
    return Expected(int(tokens), texts, int(passes) + reading)


@dataclass(eq=False)
class Answer:
    """logprob: of all of it, raw, nats. final: what it comes down to. score: the higher the better;
    None where the judge cannot be read, or before the votes are counted."""

    sample: Sample
    node: Node
    final: str | None
    logprob: float
    score: float | None = None


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield each answer as a node and a Candidate when it is done, then the Tokens of the best one;
    return which one that is, or why there is none.

    Values of nodes are what decides, in its own unit; visits count how often the same answer was
    drawn. An answer is begun only where the budget lets it end.
    Raises: BadParameter for a budget below two answers, a rule for temperatures other than 1, or an
    empty wish; OutOfContext when the judge has no room for its question.
    """
    if params.tokens and params.tokens < 2 * params.max_new:
        raise BadParameter(
            f"A budget of {params.tokens:,} tokens is too small for the greedy answer and one "
            f"draw, which may take {2 * params.max_new:,}: raise tokens or lower max_new."
        )
    if params.delta and params.temperature != 1:
        raise BadParameter(
            "delta needs temperature 1: only there is the probability of an answer the chance "
            "to draw it."
        )
    choice = Choice(engine, task, params, ctx)
    yield from task.written
    yield from expect(params).metrics()
    why = yield from choice.forwards.of(choice.made(task))
    yield from choice.spent()
    if choice.court:
        yield from told(cast(Kind, params.by), engine, soft=True)
    return why


class Choice:
    """pool: the answers that are compared, in the order of their generators."""

    def __init__(self, engine: Engine, task: Task, params: Params, ctx: Context) -> None:
        self.engine, self.params, self.ctx = engine, params, ctx
        self.budget = Budget(tokens=params.tokens)
        self.forwards = Forwards(engine)
        self.tree = SearchTree(engine, self.budget)
        self.tree.root.status = "committed"
        self.tree.root.detail["kind"] = "root"
        self.begun = task.prefix + engine.vocabulary.decode([token.id for token in task.written])
        self.court: Court | None = None
        if params.by in ("sum", "mean", "majority"):
            self.name, self.unit = _UNITS[params.by]
        else:
            by = cast(Kind, params.by)
            judge = judge_of(by, engine, asked(task), spec=params.wish, soft=True)
            self.court = Court(judge, self.budget)
            self.name, self.unit = judge.name, ""
        self.truth = final_answer(params.truth)
        self.pool: list[Answer] = []

    def made(self, task: Task) -> Generator[Event, None, str]:
        """Draw, choose, write."""
        cursor = self.ctx.begin(self.engine, self.engine.encode(task))
        if cursor.pos == self.engine.context:
            return "context full"
        yield from self.tree.news()
        if self.params.temperature != 1:
            yield Note(
                "info",
                f"Log-probabilities are those of the model itself, the answers are drawn at "
                f"temperature {self.params.temperature:g}: a likely one is not the one that is "
                "drawn most.",
            )
        greedy = yield from self.greedy(cursor)
        why = yield from self.draw(cursor)
        yield from self.count_votes()
        best = yield from self.choose()
        self.tree.prune(self.tree.root)
        yield from self.tree.news()
        yield from forced(self.engine, cursor, best.sample.ids)
        yield from self.compare(best, greedy)
        yield from self.curves(best)
        return why or f"answer {1 + self.pool.index(best)} of {len(self.pool)} by {self.name}"

    # Drawing

    def greedy(self, cursor: Cursor) -> Generator[Event, None, Answer]:
        """The plain answer that others are compared with; it is not chosen."""
        (sample,) = self.engine.sample(
            cursor,
            1,
            rng=self.ctx.rng,
            max_new=self.params.max_new,
            filters=Filters(temperature=0),
        )
        return (yield from self.take(sample, 0))

    def draw(self, cursor: Cursor) -> Generator[Event, None, str]:
        """Fill the pool; return what cut it short, "" where nothing did."""
        params = self.params
        while (first := len(self.pool)) < params.n:
            count = min(SIDE_BY_SIDE, params.n - first, self.affordable())
            if not count:
                spent = str(BudgetSpent("tokens", params.tokens))
                yield Note("warning", f"Only {first} of {params.n} answers were drawn: {spent}.")
                return spent

            def rng(name: str, place: int, first: int = first) -> Random:
                return self.ctx.rng(name, first + place)

            filters = Filters(temperature=params.temperature)
            fresh = self.engine.sample(
                cursor, count, rng=rng, max_new=params.max_new, filters=filters
            )
            done = {}
            for sample in fresh:
                done[sample.index] = yield from self.take(sample, first + sample.index + 1)
            self.pool += [done[place] for place in sorted(done)]
            if (stop := self.stop()) is not None:
                for late in self.pool[stop:]:
                    late.node.detail.setdefault("reason", "drawn beside the others, not needed")
                del self.pool[stop:]
                likeliest = max(answer.logprob for answer in self.pool if answer.sample.ended)
                why = f"stopped after {stop} of {params.n}: k * p reached ln(2 / delta)"
                yield Note(
                    "info",
                    f"After {stop} answers the likeliest has probability {exp(likeliest):.3g}: "
                    f"{stop} times that is at least ln(2 / {params.delta:g}) = "
                    f"{log(2 / params.delta):.3f}, so no more were needed.",
                )
                return why
        return ""

    def affordable(self) -> int:
        """How many answers may still be begun, if each takes all that it may."""
        if not self.params.tokens:
            return self.params.n
        return (self.params.tokens - self.budget.spent["tokens"]) // self.params.max_new

    def stop(self) -> int | None:
        """After how many answers enough was drawn; None where that is not so yet. Answers that were
        cut off have no probability to go by."""
        best = float("-inf")
        for drawn, answer in enumerate(self.pool, 1):
            if answer.sample.ended:
                best = max(best, answer.logprob)
            if self.params.delta and best_of.enough(drawn, best, self.params.delta):
                return drawn
        return None

    def take(self, sample: Sample, number: int) -> Generator[Event, None, Answer]:
        """Make a node of it and have it judged. number: of the draw, 0 for the greedy answer."""
        self.budget.charge("tokens", len(sample.ids))
        logprob = sum(sample.logprobs)
        prior = exp(logprob) if self.params.temperature == 1 else None
        detail = {
            "kind": "sample",
            "logprob": round(logprob, DIGITS),
            "mean": round(logprob / len(sample.ids), DIGITS),
            "tokens": len(sample.ids),
            "finished": sample.ended,
        }
        node = self.tree.add(self.tree.root, sample.ids, prior, detail)
        answer = Answer(sample, node, final_answer(self.begun + node.text), logprob)
        if answer.final is not None:
            node.detail["answer"] = answer.final
        node.detail["iteration"] = number
        if not number:
            node.detail["reason"] = "greedy, to compare with"
        key, group = (f"s{number}", "samples") if number else (PLAIN, PLAIN)
        yield Candidate(key, group, node.text, round(logprob, DIGITS))
        if self.params.by == "sum":
            answer.score = logprob
        elif self.params.by == "mean":
            answer.score = logprob / len(sample.ids)
        elif self.court:
            yield from self.tree.news()
            ((judged, verdict),) = yield from self.court.hear(
                [self.begun + node.text], str(node.number) if number else PLAIN
            )
            if judged not in node.evals:
                node.evals.append(judged)
            answer.score = verdict.score
        self.value(answer, drawn=number > 0)
        yield from self.tree.news()
        yield from self.spent(number)
        return answer

    def spent(self, drawn: int = 0) -> Generator[Metric, None, None]:
        """So far; drawn: how many answers that is, all of the pool where it is not said."""
        yield from self.budget.metrics(drawn or len(self.pool), self.forwards.count)

    def value(self, answer: Answer, drawn: bool) -> None:
        """Put its score on its node, which only what is drawn visits."""
        node, score = answer.node, answer.score
        if score is None:
            return
        node.detail |= {"score": round(score, DIGITS), "score_name": self.name}
        if drawn:
            node.visit(score)
        elif node.value is None:
            node.value = score

    # Choosing

    def count_votes(self) -> Generator[Note, None, None]:
        """The score of an answer by majority: how many of the draws come to the same."""
        if self.params.by != "majority":
            return
        counted = vote([answer.final for answer in self.pool])
        for answer in self.pool:
            votes = counted.counts.get(answer.final, 0) if answer.final is not None else 0
            answer.score = votes / len(self.pool)
            self.value(answer, drawn=True)
        if not counted.leaders:
            yield Note(
                "warning",
                "No draw says a final answer (a number, a short text, or what follows "
                '"The answer is"): the likeliest is taken.',
            )
        elif len(counted.leaders) > 1:
            yield Note(
                "info",
                f"The vote is tied between {', '.join(map(repr, counted.leaders[:4]))}: the "
                "likelier answer is taken.",
            )

    def ranked(self) -> list[Answer]:
        """Best first; those that may not be chosen while there are others come last."""
        whole = self.params.by not in ("sum", "mean")
        low = float("-inf")

        def worth(answer: Answer) -> tuple[bool, float, float]:
            score = low if answer.score is None else answer.score
            # Scores that are the same but for rounding are the same.
            return (whole or answer.sample.ended, round(score, DIGITS), answer.logprob)

        return sorted(self.pool, key=worth, reverse=True)

    def choose(self) -> Generator[Note, None, Answer]:
        """The best one, committed."""
        best = self.ranked()[0]
        cut = [answer for answer in self.pool if not answer.sample.ended]
        for answer in cut:
            answer.node.detail.setdefault(
                "reason", f"cut off after {len(answer.sample.ids)} tokens"
            )
        if len(cut) == len(self.pool):
            yield Note(
                "warning",
                f"No draw ended within {self.params.max_new} tokens: beginnings of answers were "
                "compared. Raise max_new.",
            )
        elif cut:
            text = f"{len(cut)} of {len(self.pool)} draws were cut off"
            chosen = "is not chosen" if self.params.by in ("sum", "mean") else "may still be chosen"
            yield Note("info", f"{text}; what is cut off {chosen}.")
        if best.score is None:
            yield Note("warning", "The judge could not be read: the likeliest draw is taken.")
        best.node.status = "committed"
        best.node.detail["reason"] = f"best of {len(self.pool)} by {self.name}"
        return best

    # Telling

    def compare(self, best: Answer, greedy: Answer) -> Generator[Note, None, None]:
        """Whether choosing brought anything."""
        scores = [answer.score for answer in self.pool if answer.score is not None]
        if best.score is not None and self.params.by != "majority":
            others = fmean(scores)
            against = ""
            if greedy.score is not None:
                against = f", the greedy answer {greedy.score:.2f}"
            yield Note(
                "info",
                f"By {self.name} the choice has {best.score:.2f}, one of the draws at random "
                f"{others:.2f}{against}. The best of several is higher by chance alone: whether it "
                "is better only the right answer tells.",
            )
        p, n = exp(best.logprob), len(self.pool)
        if self.params.temperature == 1 and best.sample.ended and p > SEEN:
            yield Note(
                "info",
                f"The choice has probability {p:.3g}: {n} draws miss such an answer with a chance "
                f"of {best_of.missed(p, n):.3g}; {best_of.draws_for(p, MISS):,} draws would with "
                f"one of at most {MISS:g}.",
            )
        if best.node is greedy.node:
            yield Note("info", "Nothing improved: the choice is the greedy answer.")
        elif best.score is not None and greedy.score is not None and best.score <= greedy.score:
            yield Note("info", "Nothing improved: the greedy answer has as much or more.")
        if not best.node.text.strip():
            yield Note("warning", "The choice is an empty answer.")
        if self.params.by == "sum" and greedy.sample.ended and greedy.logprob > log(0.5):
            yield Note(
                "info",
                f"The greedy answer has probability {exp(greedy.logprob):.2f}, more than a half: "
                "no other can be likelier.",
            )

    def curves(self, best: Answer) -> Generator[Metric, None, None]:
        """What smaller N would have given: exact means over all choices of k from the pool. "one at
        random" is the control. With the truth: how often the choice is right, between the shares of
        one at random and of any of the k.

        The share of votes depends on who votes with: there are no means over choices for it."""
        n, ranked = len(self.pool), self.ranked()
        scored = [answer.score for answer in ranked if answer.score is not None]
        voted = self.params.by == "majority"
        right = [float(answer.final == self.truth) for answer in ranked] if self.truth else []
        for k in _sizes(n):
            if len(scored) == n and not voted:
                yield _metric("best of k", k, best_of.best_of(k, scored), self.unit)
            if right and not voted:
                yield _metric("right: best of k", k, best_of.best_of(k, right), "share")
            if right:
                yield _metric("right: any of k", k, best_of.pass_at(k, n, int(sum(right))), "share")
        if scored and not voted:
            yield _metric("one at random", n, fmean(scored), self.unit)
        if right:
            yield _metric("right: one at random", n, fmean(right), "share")
            yield _metric("right: the choice", n, float(best.final == self.truth), "")
        if self.params.temperature == 1 and best.sample.ended:
            # The inverse probability itself leaves every scale.
            yield _metric("coverage of the choice (log)", n, -best.logprob, "nats")
        yield _metric("different final answers", n, len(_finals(self.pool)), "answers")
        yield _metric("divergence at most", n, best_of.divergence_at_most(n), "nats")


def _finals(pool: Sequence[Answer]) -> set[str]:
    return {answer.final for answer in pool if answer.final is not None}


def _sizes(n: int) -> list[int]:
    """1, 2, 4 and so on, and n."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def _metric(name: str, step: int, value: float, unit: str) -> Metric:
    return Metric(name, step, round(value, DIGITS), unit)
