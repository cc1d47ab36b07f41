"""SWIFT: the model drafts for itself with some sub-layers left out, and searches for which ones.

Source: Xia et al. 2024, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference
        Acceleration", arXiv:2410.06916 (ICLR 2025); hemingkx/SWIFT for the constants.
Idea:   an attention or feed-forward that is left out changes the text little in a large model. Sets
        of them are tried on the beginning of the answer, while it is being written: matchness is
        the share of its tokens that the model still likes best without them. The best set drafts a
        chain, with the next likeliest tokens beside it; the whole model decides.
Differs from the source: the search has its own list (see `common.skipping`). It begins with a
        random set, not with every second layer, which in a small model drafts nothing right. The
        ratio is .1 instead of .45, because a small model bears less. The window is 16 instead of 32
        tokens and every fifth set comes from the Gaussian process instead of every 25th, because a
        run here tries some dozens of sets, not a thousand. The first token of the answer counts for
        matchness as well. The draft reads the target's own cache instead of a copy; what it adds is
        cropped. When sampling, the residual is divided by its exact sum, and the token behind a
        path that was accepted whole is drawn from the same filtered distribution as all others.
"""

import json
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from analyzers.card import Card
from analyzers.common.acceptance import follow, pick, recursive, without
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.proposers import Itself
from analyzers.common.skipping import Limits, Off, Search, random_set
from analyzers.common.speculation import Drafted, write
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Options, Tree
from analyzers.engine.signals import DIGITS
from analyzers.engine.values import SubLayer
from analyzers.errors import ModelLacks
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Scores, Token

CARD = Card(
    "SWIFT",
    family="drafting",
    source="Xia et al. 2024, arXiv:2410.06916; hemingkx/SWIFT",
    emits=(DraftTree, Token, Metric, Scores, Note),
    needs=("logits", "layers", "tree"),
)

GREEDY, SAMPLED = (3, 5, 8, 10), (1, 3, 5, 10)
"""Tokens side by side where the drafted one is more likely than SURE[0], SURE[1], SURE[2], or not
even that."""
SURE = (0.95, 0.8, 0.5)


@dataclass(frozen=True)
class Params(Drafted):
    """floor, length and most are the source's; the other numbers are ours."""

    ratio: float = knob(0.1, "Share of the sub-layers to leave out while drafting", lo=0, hi=1)
    floor: float = knob(0.8, "A draft ends after a token less likely than this", lo=0, hi=1)
    length: int = knob(25, "Longest draft", lo=1, hi=64, unit="tokens")
    alternatives: bool = knob(True, "Also check the next likeliest tokens beside each draft")
    window: int = knob(
        16, "Sets are tried on the first tokens of the answer", lo=2, hi=256, unit="tokens"
    )
    most: int = knob(1000, "How many sets to try, one a step; 0 = do not search", lo=0, hi=1000)
    every: int = knob(5, "One set in so many is the Gaussian process's; 0 = none", lo=0, hi=1000)
    reuse: bool = knob(True, "Begin with the best set that an earlier run found")
    strip: bool = knob(False, "Measure every sub-layer by itself: what leaving it out costs")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield what the search does, a DraftTree and Tokens a step; return why the text ended.

    Metric: "matchness, start" (or random, bayes: where the set came from), one a set, step = its
    number. Scores over the sub-layers, "a5" = attention of layer 5, "f5" = its feed-forward:
    "skipped", 1 = left out from here on; "matchness alone", with only that one left out.
    Raises: ModelLacks for a model of two layers.
    """
    yield from task.written
    switches = switches_of(engine)
    size = size_of(len(switches), params.ratio)
    cursor = ctx.begin(engine, engine.encode(task))
    start = random_set(len(switches), size, ctx.rng("start"))
    if params.reuse and (kept := ctx.artifacts.get("swift", _name(size, switches))):
        start = frozenset(json.loads(kept[0]))
        yield Note(
            "info",
            "Drafting begins with the set of sub-layers that an earlier run found; its matchness "
            f"was {kept[1]['matchness']:.0%} there.",
        )
    drafter = Swift(engine, cursor, params, ctx, start)
    rule = recursive if params.temperature > 0 else follow
    return (yield from write(engine, cursor, task, params, ctx, drafter, rule))


def switches_of(engine: Engine) -> tuple[SubLayer, ...]:
    """The sub-layers that may be left out: those of all layers but the first and the last."""
    if engine.layers < 3:
        raise ModelLacks(
            "SWIFT leaves out neither the first layer nor the last, and "
            f"{engine.identity['name']} has {engine.layers} in all."
        )
    inner = range(2, engine.layers)
    return (
        *((layer, "attention") for layer in inner),
        *((layer, "feed_forward") for layer in inner),
    )


def size_of(switches: int, ratio: float) -> int:
    """How many to leave out: rounded down, and at least one unless the ratio is 0."""
    return max(math.floor(switches * ratio + 1e-9), min(1, math.ceil(ratio)))


def label(switch: SubLayer) -> str:
    layer, kind = switch
    return f"{kind[0]}{layer}"


def _name(size: int, switches: Sequence[SubLayer]) -> str:
    """Of what is kept between runs."""
    return f"{size} of {len(switches)}"


class Swift:
    """The drafter: a chain with leaves beside it; before each, one step of the search."""

    def __init__(
        self, engine: Engine, cursor: Cursor, params: Params, ctx: Context, start: Off
    ) -> None:
        self.drawn: Drawn = "without replacement" if params.temperature > 0 else "deterministic"
        self._engine = engine
        self._cursor = cursor
        self._params = params
        self._ctx = ctx
        self._switches = switches_of(engine)
        limits = Limits(most=params.most, every=params.every)
        self._search = Search(len(self._switches), start, ctx.rng("search"), limits)
        self._coin = ctx.rng("draft").random
        self._begins = cursor.pos  # where the answer does
        self._prompt: Cursor | None = None
        self._proposer = self._itself(start)
        self._events: list[Event] = [self._skipped(start, cursor.pos)]
        self._cost = 0.0  # of the search

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """Search a little, then draft with the best set."""
        first = text[self._begins : self._begins + self._params.window + 1]
        if len(first) > self._params.window and not self._search.over:
            self._events += self._look(first, len(text))
        draft = self._draft(text, min(depth, self._params.length))
        self._events, self._cost = [], 0.0
        return draft

    def learn(self, outcome: Outcome) -> None:
        """Nothing: a set is judged by its matchness."""

    # The search

    def _look(self, first: Sequence[int], pos: int) -> Iterator[Event]:
        """Try one set on the first tokens of the answer."""
        search = self._search
        if self._params.strip and not search.tried:
            alone = [self._matchness(first, {switch}) for switch in range(len(self._switches))]
            yield Scores(pos, "matchness alone", "share", self._labels, tuple(alone))
        proposal = search.propose()
        value = self._matchness(first, proposal.off)
        if cost := self._ctx.cost:
            self._cost = cost.v(len(first)) * self._itself(proposal.off).cost
        yield Metric(f"matchness, {proposal.kind}", proposal.number, value, "share")
        if search.register(proposal, value):
            self._ctx.artifacts.put(
                "swift",
                _name(len(search.best), self._switches),
                json.dumps(sorted(search.best)).encode(),
                {"matchness": value},
            )
            if proposal.kind != "start":
                self._proposer = self._itself(search.best)
                yield self._skipped(search.best, pos)
        if search.over:
            yield Note("info", f"The search for sub-layers to leave out is over: {search.over}.")

    def _matchness(self, first: Sequence[int], off: Off | set[int]) -> float:
        """The share of the first tokens that the model without these sub-layers likes best; 0 to
        1, higher is better. One pass, on a copy of the prompt's cache."""
        if self._prompt is None:
            self._prompt = self._engine.fork(self._cursor, to=self._begins)
        tree = Tree.chain(first[:-1])
        checked = self._engine.verify(self._prompt, tree, options=self._options(off))
        best = checked.raw[:, : self._engine.vocabulary.size].argmax(-1).tolist()
        right = sum(a == b for a, b in zip(best, first, strict=True))
        return round(right / len(first), DIGITS)

    def _skipped(self, off: Off, pos: int) -> Scores:
        """What is left out from `pos` on."""
        values = tuple(float(switch in off) for switch in range(len(self._switches)))
        return Scores(pos, "skipped", "1 = left out", self._labels, values)

    def _itself(self, off: Off) -> Itself:
        greedy = self._params.temperature == 0
        # At temperature 0 the draft's likeliest tokens are asked for, and how sure it is of them.
        filters = Filters() if greedy else self._params.filters
        return Itself(self._engine, self._cursor, self._options(off), filters)

    def _options(self, off: Off | set[int]) -> Options:
        return Options(skip=frozenset(self._switches[switch] for switch in off))

    @property
    def _labels(self) -> tuple[str, ...]:
        return tuple(map(label, self._switches))

    # The draft

    def _draft(self, text: Sequence[int], length: int) -> Draft:
        """The main chain, and beside each of its tokens leaves, fewer where it is likely. How many
        depends on the main token alone, which is always drafted, so sampling stays exact."""
        sampled = self.drawn != "deterministic"
        chain: list[int] = []
        ids: list[int] = []
        parents: list[int] = []
        logprobs: list[float | None] = []
        rows: dict[int, torch.Tensor] = {}
        main, p = -1, 1.0
        while len(chain) < length and p >= self._params.floor:
            row = self._proposer.rows(text, Tree.chain(chain))[-1]
            drawn = self._sampled(row) if sampled else self._likeliest(row)
            rows[main] = row
            parents += [main] * len(drawn)
            main = len(ids)  # the first one drawn goes on
            ids += drawn
            logprobs += row[drawn].log().tolist()
            chain.append(drawn[0])
            p = float(row[drawn[0]])
        sure = p >= self._params.floor
        return Draft(
            Tree(tuple(ids), tuple(parents)),
            tuple(logprobs),
            rows if sampled else {},
            ended=f"{len(chain)} tokens were drafted"
            if sure
            else f"the draft was less than {self._params.floor:.0%} sure of its last token",
            cost=self._cost + len(chain) * self._proposer.cost,
            events=tuple(self._events),
        )

    def _likeliest(self, row: torch.Tensor) -> list[int]:
        """The ids to draft from a row (vocab,), likeliest first."""
        best, ids = row.topk(min(max(GREEDY), len(row)))
        count = self._count(float(best[0]), GREEDY)
        return ids[best > 0][:count].tolist()

    def _sampled(self, row: torch.Tensor) -> list[int]:
        """The ids to draft from a row (vocab,), in the order in which they were drawn."""
        drawn, rest = [pick(row, self._coin())], row
        for _ in range(self._count(float(row[drawn[0]]), SAMPLED) - 1):
            rest = without(rest, drawn[-1])
            if not rest.any():
                break
            drawn.append(pick(rest, self._coin()))
        return drawn

    def _count(self, p: float, counts: Sequence[int]) -> int:
        """How many tokens to draft side by side where the first of them has the probability p."""
        if not self._params.alternatives:
            return 1
        return counts[sum(p <= sure for sure in SURE)]
