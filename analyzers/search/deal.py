"""DeAL: the text is searched for what a reward wants, by looking ahead before each step.

Source: Huang et al. 2024, arXiv:2402.06147 (ACL 2025): mode "token". No code of the authors is
        public; mode "segment" is what the re-implementation in IBM's AISteer360 does.
Idea:   texts are states, next tokens are actions. A few hypotheses are kept; each proposes what
        could come next, and c = log P + λ h ranks the proposals: how likely the text is, and what
        a reward h says of it. A part of a text cannot be judged (a wanted word may still come), so
        in mode "token" h is measured on a greedy look-ahead that is thrown away afterwards. In mode
        "segment" each proposal is as long as the look-ahead and is kept whole.
Differs from the source: h is always brought to 0..1, also that of a model that judges itself. Where
        texts of different length compete (segments end early, best-first) log P is the mean per
        token, else long texts would always lose; the re-implementation has no log P there, which is
        a large λ. Segments are sampled, each from a generator of its own, since those of a beam
        search differ in little; temperature 0 is the beam search. The paper's k is two knobs here:
        proposals per hypothesis, and hypotheses kept. Of texts that read the same only the likelier
        goes on. The look-ahead ends where the text has to. Best-first, the A*-like search, writes
        on only the best hypothesis at a time. The start state is the prompt as it was typed: to ask
        for the wish as well is left to the prompt. All defaults are ours: the paper's were not
        at hand.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from analyzers.card import Card
from analyzers.common.budget import Budget, BudgetSpent, Expected, Forwards
from analyzers.common.judge_check import told
from analyzers.common.judges import Court, Judge
from analyzers.common.judging_passes import passes_a_text
from analyzers.common.plain import plain
from analyzers.common.prefixes import Prefixes
from analyzers.common.rollouts import rollouts
from analyzers.common.search_tree import Node, SearchTree
from analyzers.common.self_judges import Kind, asked, judge_of
from analyzers.common.stops import over
from analyzers.common.written import forced
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Step
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Metric, Note, SearchNode, Token, text_of

CARD = Card(
    "DeAL: search for a reward",
    family="search",
    source="Huang et al. 2024, arXiv:2402.06147",
    emits=(Token, SearchNode, Candidate, Judgement, Metric),
    needs=("logits", "fork"),
    example="Write one sentence about a day outside. Use the words sun, river and friend.",
)


@dataclass(frozen=True)
class Params:
    """weight: one of three words outweighs 1.7 nats a token. The sizes are those of a first look
    on a laptop: about 60 passes for 32 tokens."""

    mode: Literal["segment", "token"] = knob(
        "segment", "What a step keeps: the whole look-ahead, or one token as in the paper"
    )
    reward: Kind = knob("keywords", "What judges the text: the model itself up to own, or a rule")
    wish: str = knob(
        "sun, river, friend",
        "For keywords the words, for length a range (20-40 words), a pattern, or for own the wish",
    )
    weight: float = knob(5.0, "λ: what a full reward is worth", lo=0, hi=1000, unit="nats")
    lookahead: int = knob(8, "How far to look ahead", lo=0, hi=64, unit="tokens")
    beams: int = knob(4, "Proposals per hypothesis", lo=1, hi=16)
    keep: int = knob(2, "Hypotheses that go on", lo=1, hi=8)
    select: Literal["beam", "best-first"] = knob(
        "beam", "Write on all hypotheses side by side, or only the best one"
    )
    pick: Literal["c", "h"] = knob("c", "The answer is the finished text with the highest")
    temperature: float = knob(0.8, "Of sampled segments; 0 = beam search", lo=0, hi=2)
    top_p: float = knob(0.95, "Mass of likely tokens to sample from; 1 = all", lo=0.01, hi=1)
    max_new: int = knob(32, "When to stop writing", lo=1, hi=1024, unit="tokens")
    tokens: int = knob(4096, "Most tokens to write, look-ahead included; 0 = any", lo=0, hi=1 << 20)
    evaluations: int = knob(0, "Most texts to judge; 0 = any", lo=0, hi=1 << 20)
    reuse: bool = knob(True, "Keep what was computed, and write side by side")

    @property
    def mean(self) -> bool:
        """Whether log P is taken per token: texts of different lengths compete."""
        return self.mode == "segment" or self.select == "best-first"


def expect(params: Params) -> Expected:
    """For texts of `max_new` tokens, `keep` of them at each step with `beams` proposals each; in
    best-first order as many, one after the other.

    Passes: a batch counts once a token, and so does a step of a beam search; reading a text that
    goes on is one, so is writing a token of the answer. A model judges each text in passes of its
    own. Best-first may go back to shorter texts, and then write more than this.
    """
    segment, side_by_side = params.mode == "segment", params.select == "beam"
    length = min(max(params.lookahead, 1), params.max_new) if segment else 1
    written = length if segment else 1 + min(params.lookahead, params.max_new - 1)
    steps = math.ceil(params.max_new / length)
    texts = steps * params.keep * params.beams
    tokens = min(texts * written, params.tokens or math.inf)
    evaluations = min(texts + 1, params.evaluations or math.inf)
    turns = steps if side_by_side else steps * params.keep
    if segment and params.temperature == 0:
        turns = steps * params.keep  # one beam search a hypothesis
    passes: float = turns * written if params.reuse else texts * (written + 2)
    passes += steps * params.keep + params.max_new + evaluations * passes_a_text(params.reward)
    return Expected(int(tokens), int(evaluations), int(passes))


@dataclass(eq=False)
class Hypothesis:
    """A text that was considered. log_p: nats, raw, of everything behind the prompt. ahead: the
    look-ahead behind it. h: reward in 0..1 of the text with its look-ahead."""

    node: Node
    log_p: float = 0.0
    ahead: list[int] = field(default_factory=list)
    h: float = 0.0

    def __post_init__(self) -> None:
        self.ids = self.node.tokens


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the tree as it grows, the judgements, and a Token as soon as all that is left of the
    search agrees on it; return why the text ended.

    Node values are the judge's; detail has log P, h, its parts, c and the look-ahead. Texts that
    were finished are Candidates; of them the answer is the best, and without any the best
    unfinished one. A spent budget ends the search with the best so far. The plain answer comes
    first, and last how good a model is that judges; both are no part of what is spent, but for the
    judgement of the plain answer.
    Raises: BadParameter for a wish that is none, no look-ahead for segments, and a budget too small
    for the first step.
    """
    _check(params)
    judge = judge_of(
        params.reward, engine, asked(task), spec=params.wish, soft=True, together=params.reuse
    )
    yield from task.written
    if why := over(engine, (), task.written):
        return why
    search = _Search(engine, task, params, ctx, judge)
    yield from expect(params).metrics()
    if len(search.prompt) >= engine.context:
        return "context full"
    cursor = ctx.begin(engine, search.prompt)
    yield from plain(engine, cursor, task, ctx, params.max_new, search.court)
    why = yield from search.forwards.of(search.run(cursor))
    yield from search.spent()
    yield from told(params.reward, engine, soft=True, together=params.reuse)
    return why


class _Search:
    """frontier: hypotheses to write on, best first. ended: those with an end token. cut: those as
    long as they may be."""

    def __init__(
        self, engine: Engine, task: Task, params: Params, ctx: Context, judge: Judge
    ) -> None:
        self.engine, self.params, self.ctx = engine, params, ctx
        self.prompt = engine.encode(task)
        self.before = task.prefix + text_of(task.written)
        self.budget = Budget(tokens=params.tokens, evaluations=params.evaluations)
        self.forwards = Forwards(engine)
        self.tree = SearchTree(engine, self.budget)
        self.tree.root.detail["kind"] = "root"
        self.court = Court(judge, self.budget)
        self.prefixes = Prefixes(engine, reuse=params.reuse)
        self.frontier = [Hypothesis(self.tree.root)]
        self.ended: list[Hypothesis] = []
        self.cut: list[Hypothesis] = []
        self.rewards: set[float] = set()
        self.iteration = 0

    def run(self, cursor: Cursor) -> Generator[Event, None, str]:
        """The whole search; return why it ended. cursor: where the answer is written."""
        why = ""
        try:
            while self.frontier and len(self.ended) + len(self.cut) < self.params.keep:
                yield from self._step()
                left = self.frontier + self.ended + self.cut
                yield from self._write(cursor, left)
                most = max(each.h for each in left)
                yield Metric("best reward", self.iteration, round(most, DIGITS), "0 to 1")
                yield from self.spent()
        except BudgetSpent as spent:
            why = str(spent)
            yield Note("warning", f"The search was cut: {why}. The best text so far is written.")
        best = self._best()
        yield from self._notes(best)
        yield from self._write(cursor, [best])
        for node in self.tree.nodes:
            if node.status == "open":
                chosen = f"node {best.node.number} was chosen in the end"
                _prune(node, "not judged any more" if node.value is None else chosen)
        yield from self.tree.news()
        length, passes = len(best.ids), self.forwards.count
        yield Metric("reward of the answer", length, round(best.h, DIGITS), "0 to 1")
        yield Metric("passes per token", length, round(passes / length, DIGITS), "forwards")
        if why:
            return why
        if best in self.ended:
            return "end token"
        return "max_new reached" if length == self.params.max_new else "context full"

    def _step(self) -> Generator[Event, None, None]:
        """Write on the hypotheses whose turn it is, judge what they propose, keep the best."""
        self.iteration += 1
        chosen = self.frontier if self.params.select == "beam" else self.frontier[:1]
        for hypothesis in chosen:
            hypothesis.node.detail["iteration"] = self.iteration
        yield from self.tree.news()
        propose = self._segments if self.params.mode == "segment" else self._tokens
        waiting = [each for each in self.frontier if each not in chosen]
        proposed = self._distinct(propose(chosen), [*waiting, *self.ended, *self.cut])
        yield from self.tree.news()
        yield from self._judge(proposed)
        for each in self._keep(sorted(waiting + proposed, key=self.c, reverse=True)):
            group = "ended" if self._ends(each.ids) else "cut"
            text, log_p = self.tree.text(each.node), round(each.log_p, DIGITS)
            yield Candidate(f"node {each.node.number}", group, text, log_p)

    # What could come next

    def _segments(self, chosen: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Pieces of the length of the look-ahead: sampled, or those of a beam search."""
        params, room = self.params, self._room(chosen)
        length, found = min(params.lookahead, room), []
        cursors = [self.prefixes.cursor([*self.prompt, *each.ids]) for each in chosen]
        if params.temperature == 0:
            for parent, cursor in zip(chosen, cursors, strict=True):
                for ids, log_p in self._likeliest(cursor, length):
                    found.append(self._add(parent, ids, log_p))
            return found
        parents = [parent for parent in chosen for _ in range(params.beams)]
        written = rollouts(
            self.engine,
            [cursor for cursor in cursors for _ in range(params.beams)],
            [
                self.ctx.rng("segment", parent.ids, i)
                for parent in chosen
                for i in range(params.beams)
            ],
            self.budget,
            max_new=length,
            filters=Filters(temperature=params.temperature, top_p=params.top_p),
            together=params.reuse,
        )
        return [
            self._add(parent, rollout.ids, sum(rollout.logprobs))
            for parent, rollout in zip(parents, written, strict=True)
        ]

    def _likeliest(self, cursor: Cursor, length: int) -> list[tuple[list[int], float]]:
        """Beam search: the likeliest continuations, up to `length` tokens, with their log P."""
        beams: list[tuple[list[int], float, Cursor]] = [([], 0.0, cursor)]
        for _ in range(min(length, self.engine.context - cursor.pos)):
            found = [beam for beam in beams if self._ends(beam[0])]
            if len(found) == len(beams):
                break
            going = [beam for beam in beams if beam not in found]
            self.budget.charge("tokens", len(going))
            cursors = [self._fork(at, ids[-1:]) for ids, _, at in going]
            for (ids, log_p, _), at, row in zip(going, cursors, self._likely(cursors), strict=True):
                found += [([*ids, id], log_p + logprob, at) for id, logprob in row]
            beams = sorted(found, key=lambda beam: -beam[1])[: self.params.beams]
        return [(ids, log_p) for ids, log_p, _ in beams]

    def _tokens(self, chosen: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Single tokens, each with a greedy look-ahead."""
        cursors = [self.prefixes.cursor([*self.prompt, *each.ids]) for each in chosen]
        self.budget.charge("tokens", len(chosen) * self.params.beams)
        found, branches = [], []
        for parent, cursor, row in zip(chosen, cursors, self._likely(cursors), strict=True):
            for id, logprob in row:
                found.append(self._add(parent, [id], logprob))
                branches.append(self._fork(cursor, [id]))
        going = [i for i, each in enumerate(found) if not self._ends(each.ids)]
        ahead = rollouts(
            self.engine,
            [branches[i] for i in going],
            [None] * len(going),
            self.budget,
            max_new=min(self.params.lookahead, self._room(chosen) - 1),
            filters=Filters(),
            together=self.params.reuse,
        )
        for i, rollout in zip(going, ahead, strict=True):
            found[i].ahead = rollout.ids
            found[i].node.detail |= {
                "rollout": self.tree.text_behind(found[i].node, rollout.ids),
                "rollout_ended": rollout.ended,
            }
        return found

    def _likely(self, cursors: Sequence[Cursor]) -> list[list[tuple[int, float]]]:
        """Behind each cursor the likeliest next tokens, with their raw log-probabilities."""
        if self.params.reuse:
            steps = self.engine.step(cursors)
        else:
            steps = [self.engine.step(cursor) for cursor in cursors]
        return [_top(step, self.params.beams) for step in steps]

    def _fork(self, cursor: Cursor, ids: Sequence[int]) -> Cursor:
        branch = self.engine.fork(cursor)
        for id in ids:
            self.engine.push(branch, id)
        return branch

    def _add(self, parent: Hypothesis, ids: Sequence[int], log_p: float) -> Hypothesis:
        """log_p: of these tokens, nats."""
        detail = {"kind": self.params.mode, "finished": self._ends(ids)}
        node = self.tree.add(parent.node, ids, math.exp(log_p), detail)
        return Hypothesis(node, parent.log_p + log_p)

    def _room(self, chosen: Sequence[Hypothesis]) -> int:
        """Tokens left to write; those that are written on together are equally long."""
        return self.params.max_new - len(chosen[0].ids)

    def _ends(self, ids: Sequence[int]) -> bool:
        return bool(ids) and self.engine.ends(ids[-1])

    # What is kept

    def _distinct(
        self, proposed: Sequence[Hypothesis], there: Sequence[Hypothesis]
    ) -> list[Hypothesis]:
        """Without those that read as a likelier one, or as one that is there."""
        kept = {self._reads(each): each for each in there}
        for each in sorted(proposed, key=lambda each: -each.log_p):
            first = kept.setdefault(self._reads(each), each)
            if first.node is not each.node:
                _prune(each.node, f"reads as node {first.node.number}")
        return [each for each in proposed if kept[self._reads(each)] is each]

    def _reads(self, hypothesis: Hypothesis) -> bytes:
        """Its bytes; special tokens, which have none, by number."""
        raw = self.engine.vocabulary.raw
        return b"".join(raw(id) or b"\xff%d\xff" % id for id in hypothesis.ids)

    def _judge(self, proposed: Sequence[Hypothesis]) -> Generator[Judgement, None, None]:
        """h of each, and what c comes from into its node."""
        decode = self.engine.vocabulary.decode
        texts = [self.before + decode([*each.ids, *each.ahead]) for each in proposed]
        heard = yield from self.court.hear(texts, "text with look-ahead")
        for each, (key, verdict) in zip(proposed, heard, strict=True):
            low, high, *_ = self.court.judge.scale
            # What cannot be read says nothing for or against the text.
            score = (low + high) / 2 if verdict.score is None else verdict.score
            each.h = (score - low) / (high - low)
            self.rewards.add(each.h)
            each.node.visit(score)
            each.node.evals.append(key)
            each.node.detail |= {
                "logprob": round(each.log_p, DIGITS),
                "tokens": len(each.ids),
                "h": round(each.h, DIGITS),
                "parts": dict(verdict.detail),
                "score": round(self.c(each), DIGITS),
                "score_name": "log P per token + λ h" if self.params.mean else "log P + λ h",
            }

    def c(self, hypothesis: Hypothesis) -> float:
        """Higher = better."""
        length = len(hypothesis.ids) if self.params.mean else 1
        return value(hypothesis.log_p / length, hypothesis.h, self.params.weight)

    def _keep(self, ranked: Sequence[Hypothesis]) -> list[Hypothesis]:
        """The best that go on are the frontier; what is over is kept where it is among the best.
        Return that."""
        keep, before = self.params.keep, (len(self.ended), len(self.cut))
        self.frontier = []
        for rank, each in enumerate(ranked, 1):
            where = f"{rank} of {len(ranked)} by c"
            ended = self._ends(each.ids)
            full = len(each.ids) == self.params.max_new
            full |= len(self.prompt) + len(each.ids) == self.engine.context
            kept = self.ended if ended else self.cut if full else self.frontier
            if rank > keep and (kept is not self.frontier or len(self.frontier) == keep):
                _prune(each.node, where)
            else:
                kept.append(each)
                each.node.detail["reason"] = where
        return self.ended[before[0] :] + self.cut[before[1] :]

    # What comes of it

    def _best(self) -> Hypothesis:
        """Of the texts that ended, of those that were cut off, or of those that were begun."""
        return max(
            self.ended or self.cut + self.frontier,
            key=lambda each: (each.h, self.c(each)) if self.params.pick == "h" else self.c(each),
        )

    def _write(
        self, cursor: Cursor, left: Sequence[Hypothesis]
    ) -> Generator[SearchNode | Token, None, None]:
        """Commit what all that are left agree on."""
        for nodes in zip(*(each.node.path for each in left), strict=False):
            if len({node.number for node in nodes}) > 1:
                break
            if nodes[0].status == "open":
                nodes[0].status = "committed"
                yield from self.tree.news()
                yield from forced(self.engine, cursor, nodes[0].ids)
        yield from self.tree.news()

    def spent(self) -> Generator[Metric, None, None]:
        yield from self.budget.metrics(self.iteration, self.forwards.count)

    def _notes(self, best: Hypothesis) -> Generator[Note, None, None]:
        """What a reader should not overlook."""
        if len(self.rewards) == 1 and self.params.weight:
            yield Note(
                "warning", "Every text got the same reward, so it decided nothing: only log P did."
            )
        if best in self.ended and any(self.c(each) > self.c(best) for each in self.cut):
            yield Note("info", "A text that max_new cut off has a higher c than the answer.")
        if best.ahead:
            yield Note("info", "The reward of the answer counts a look-ahead that is not written.")


def value(log_p: float, h: float, weight: float) -> float:
    """c, which ranks hypotheses: higher = better."""
    return log_p + weight * h


def _top(step: Step, count: int) -> list[tuple[int, float]]:
    total = step.raw.logsumexp(0)
    ids = step.logits.topk(min(count, len(step.logits))).indices.tolist()
    return [(id, float(step.raw[id] - total)) for id in ids]


def _prune(node: Node, reason: str) -> None:
    node.status = "pruned"
    node.detail["reason"] = reason


def _check(params: Params) -> None:
    """Raises: BadParameter."""
    if params.mode == "segment" and not params.lookahead:
        raise BadParameter("A segment has the length of the look-ahead: lookahead must be above 0.")
    ahead = min(params.lookahead, params.max_new)
    length = ahead if params.mode == "segment" else 1 + min(ahead, params.max_new - 1)
    if 0 < params.tokens < params.beams * length:
        raise BadParameter(
            f"A budget of {params.tokens} tokens is too small for one step: {params.beams} "
            f"proposals of {length} tokens take {params.beams * length}."
        )
    if 0 < params.evaluations <= params.beams:
        raise BadParameter(
            f"A budget of {params.evaluations} evaluations is too small for one step: it judges "
            f"{params.beams} texts, and the plain answer was judged before."
        )
