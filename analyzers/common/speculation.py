"""Speculative decoding: draft several tokens, look at all of them in one pass, keep what fits.

Source: Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318); trees as in
        SpecInfer (Miao et al. 2024, arXiv:2305.09781).
Idea:   each step a drafter proposes a tree behind the text, one pass gives the target's
        distribution at every node, and a rule walks down the tree as far as drafts are accepted;
        where it stops the target's own token is written. What is written does not depend on the
        drafter: greedy text is the greedy text, sampled text is distributed as plain sampling.
        The drafter changes only how many tokens a pass yields.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from analyzers.common import acceptance
from analyzers.common.acceptance import Rule
from analyzers.common.drafts import Draft, Drafter, Outcome, Verdict
from analyzers.common.stops import HELP, over, stop_texts
from analyzers.context import Context
from analyzers.engine import Checked, Cursor, Engine, Filters, Step, chosen, token
from analyzers.engine.cost import Cost
from analyzers.engine.signals import DIGITS
from analyzers.engine.writing import SOFTMAX_ROWS
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Origin, Token

WINDOW = 12
"""Drafted steps that are looked at to see whether drafting pays."""
PAUSE = 16
"""Plain steps after a loss; twice as many after each further one."""


@dataclass(frozen=True)
class Drafted:
    """The knobs of every drafting method; greedy unless the method is about sampling."""

    max_new: int = knob(64, "When to stop writing", lo=1, hi=8192, unit="tokens")
    temperature: float = knob(0.0, "0 = greedy, above 1 flattens", lo=0, hi=2)
    top_p: float = knob(1.0, "Mass of likely tokens to keep; 1 = all", lo=0.01, hi=1)
    top_k: int = knob(0, "Keep this many of the likeliest tokens; 0 = all", lo=0, hi=1000)
    stop: str = knob("", HELP, lines=2)
    pause: bool = knob(False, "Write plainly for a while where drafting loses here")

    @property
    def filters(self) -> Filters:
        return Filters(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Target:
    """What the target says behind the nodes of a tree (-1 = the root), read when asked for.

    As a function of a node it is `Rows`: the processed probabilities there, (vocab,), float64;
    one-hot at temperature 0."""

    def __init__(self, checked: Checked, filters: Filters) -> None:
        self._checked = checked
        self._filters = filters
        self._steps: dict[int, Step] = {}
        self._rows: dict[int, torch.Tensor] = {}

    def step(self, node: int) -> Step:
        if node not in self._steps:
            self._steps[node] = self._checked.step(node, filters=self._filters)
        return self._steps[node]

    def __call__(self, node: int) -> torch.Tensor:
        if node not in self._rows:
            row = probabilities(self.step(node), self._filters.temperature)
            self._rows[node] = row[: self._checked.vocabulary]
        return self._rows[node]


class Gauge:
    """Whether drafting pays, by the cost table and what was accepted, never by the clock."""

    def __init__(self, cost: Cost | None, pauses: bool) -> None:
        self._cost = cost
        self._pauses = pauses
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._pause = PAUSE
        self._plain = 0
        self._written, self._paid = 0, 0.0

    def drafts(self) -> bool:
        """Whether to draft at the next step."""
        self._plain = max(self._plain - 1, 0)
        return self._plain == 0

    def price(self, draft: Draft) -> float | None:
        """Plain steps that a step with this draft takes; None without a cost table."""
        return self._cost.v(1 + len(draft.tree)) + draft.cost if self._cost else None

    def hear(self, tokens: int, price: float | None) -> Note | None:
        """Of a drafted step; a Note when drafting pauses because of it."""
        if price is None:
            return None
        self._written, self._paid = self._written + tokens, self._paid + price
        self._last.append((tokens, price))
        written, paid = (sum(each) for each in zip(*self._last, strict=True))
        if not self._pauses or len(self._last) < WINDOW or written >= paid:
            return None
        self._last.clear()
        pause, self._pause = self._pause, 2 * self._pause
        self._plain = pause + 1
        return Note(
            "info",
            f"Drafting pauses for {pause} tokens: the last {WINDOW} drafted steps wrote {written} "
            f"tokens and took as long as {paid:.0f} plain ones, by the cost table.",
        )

    def summed_up(self) -> Note | None:
        """What all drafted steps together lost, if they did."""
        if self._written >= self._paid:
            return None
        return Note(
            "info",
            f"Drafting lost here: {self._written} tokens in the time of {self._paid:.0f} plain "
            "steps, by the cost table.",
        )


def write(
    engine: Engine,
    cursor: Cursor,
    task: Task,
    params: Drafted,
    ctx: Context,
    drafter: Drafter,
    rule: Rule,
) -> Generator[Event, None, str]:
    """Go on from the cursor: at each step a DraftTree, then the Tokens that it wrote; return why
    the text ended.

    Tokens have the origin "drafted", then "corrected" or "bonus"; "sampled" where nothing was
    drafted. At the end a Metric tells the mean acceptance length: tokens per pass of the target.
    Raises: BadParameter when the rule is not exact for what the drafter draws.
    """
    acceptance.check(rule, drafter.drawn)
    if params.temperature == 0 and rule is not acceptance.follow:
        rule = acceptance.follow
        yield Note(
            "info",
            "At temperature 0 nothing is sampled: a draft is kept where it is the likeliest token.",
        )
    filters, coin, stops = params.filters, ctx.rng("coins").random, stop_texts(params.stop)
    gauge = Gauge(ctx.cost, params.pause)
    answer = [*task.written]
    passes, start = 0, cursor.pos
    end = min(start + params.max_new, engine.context)
    why = over(engine, stops, answer)
    while not why and cursor.pos < end:
        passes += 1
        if not gauge.drafts():
            step = engine.step(cursor, filters=filters)
            answer.append(chosen(engine, step, ctx.rng("plain", step.pos), params.temperature))
            engine.push(cursor, answer[-1].id)
            yield answer[-1]
            why = over(engine, stops, answer)
            continue
        began, depth, first = time.perf_counter(), end - cursor.pos - 1, len(answer)
        draft = drafter.propose(cursor.ids, depth) if depth else Draft()
        drafted = time.perf_counter()
        checked = engine.verify(cursor, draft.tree)
        target = Target(checked, filters)
        target.step(-1)  # waits for the pass to be done, also on another device
        verified = time.perf_counter()
        verdict = rule(target, draft, coin)
        drafter.learn(Outcome(checked.text, draft, checked, verdict, target))
        for written in _written(engine, target, draft, verdict):
            answer.append(written)
            if why := over(engine, stops, answer):
                break
        tokens = answer[first:]
        path = verdict.path[: len(tokens)]
        engine.commit(cursor, path)
        if len(tokens) > len(path):
            engine.push(cursor, verdict.extra)
        yield from draft.events
        if draft.tree.ids:
            price = gauge.price(draft)
            ms = drafted - began, verified - drafted, time.perf_counter() - verified
            yield _event(engine, checked, draft, verdict, tokens, why, price, ms)
            if note := gauge.hear(len(tokens), price):
                yield note
        yield from tokens
    if passes:
        mean = round((cursor.pos - start) / passes, DIGITS)
        yield Metric("mean acceptance length", passes, mean, "tokens a pass")
    if note := gauge.summed_up():
        yield note
    if why:
        return why
    return "max_new reached" if end == start + params.max_new else "context full"


def probabilities(step: Step, temperature: float) -> torch.Tensor:
    """The processed distribution of a step, (vocab,), float64; at temperature 0 all of it on the
    likeliest token."""
    if temperature > 0:
        return torch.softmax(step.logits, dim=-1, dtype=torch.float64)
    row = torch.zeros(len(step.logits), dtype=torch.float64, device=step.logits.device)
    row[step.logits.argmax()] = 1.0
    return row


def _written(
    engine: Engine, target: Target, draft: Draft, verdict: Verdict
) -> Generator[Token, None, None]:
    """The tokens of a step: the accepted drafts, then the target's own."""
    before = -1
    for node in verdict.path:
        yield _token(engine, target, before, draft.tree.ids[node], "drafted")
        before = node
    origin: Origin = verdict.origin if draft.tree.ids else "sampled"
    yield _token(engine, target, before, verdict.extra, origin)


def _token(engine: Engine, target: Target, node: int, id: int, origin: Origin) -> Token:
    return token(engine, target.step(node), id, origin=origin, p_sampled=float(target(node)[id]))


def _event(
    engine: Engine,
    checked: Checked,
    draft: Draft,
    verdict: Verdict,
    tokens: Sequence[Token],
    why: str,
    price: float | None,
    seconds: tuple[float, float, float],
) -> DraftTree:
    """tokens: what was written of the path and the extra token. why: the text is over."""
    tree, path = draft.tree, verdict.path[: len(tokens)]
    extra = tokens[-1] if len(tokens) > len(path) else None
    draft_ms, verify_ms, rest_ms = (round(1e3 * each, 3) for each in seconds)
    return DraftTree(
        pos=tokens[0].pos,
        ids=tree.ids,
        texts=tuple(engine.vocabulary.display(id) for id in tree.ids),
        parents=tree.parents,
        draft_logprobs=_rounded(draft.logprobs or (None,) * len(tree)),
        target_logprobs=_rounded(raw_logprobs(checked)),
        accepted=path,
        extra=extra.id if extra else None,
        ended=f"the text is over: {why}" if why else _ending(draft, verdict),
        extra_text=engine.vocabulary.display(extra.id) if extra else "",
        origin=verdict.origin if extra else "",
        chances=_rounded([verdict.chances.get(node) for node in range(len(tree))]),
        coins=_rounded([verdict.coins.get(node) for node in range(len(tree))]),
        values=_rounded(draft.values),
        measure=draft.measure,
        cost=None if price is None else round(price, DIGITS),
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        rest_ms=rest_ms,
    )


def raw_logprobs(checked: Checked) -> list[float]:
    """Of each node behind its parent, nats, of the target's own distribution (temperature 1)."""
    tree = checked.tree
    parents = sorted(set(tree.parents))
    totals: dict[int, float] = {}
    for start in range(0, len(parents), SOFTMAX_ROWS):
        some = parents[start : start + SOFTMAX_ROWS]
        rows = checked.raw[[parent + 1 for parent in some]].float()
        totals |= dict(zip(some, rows.logsumexp(-1).tolist(), strict=True))
    logits = checked.raw[[parent + 1 for parent in tree.parents], list(tree.ids)].tolist()
    return [logit - totals[parent] for logit, parent in zip(logits, tree.parents, strict=True)]


def _ending(draft: Draft, verdict: Verdict) -> str:
    """Why the path is no longer, in words."""
    if verdict.origin == "corrected":
        return "no draft here was accepted: the model wrote its own token"
    return f"every draft on the path was accepted; {draft.ended or 'the tree ends here'}"


def _rounded(values: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if value is None else round(value, DIGITS) for value in values)
