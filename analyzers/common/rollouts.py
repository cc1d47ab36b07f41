"""Continuations written side by side, each with its own generator and its own end."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from analyzers.common.budget import Budget
from analyzers.common.speculation import probabilities
from analyzers.engine import Cursor, Engine, Filters
from analyzers.engine.signals import draw

Over = Callable[[Sequence[int]], bool]
"""Whether a continuation with these tokens is done."""


def never_over(ids: Sequence[int]) -> bool:
    return False


@dataclass
class Rollout:
    """logprobs: of each token, raw, nats. chances: of each token among those that the filters
    left, at their temperature. ended: with an end token, which is the last of `ids`."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def chance(self) -> float:
        """Of all of it."""
        product = 1.0
        for chance in self.chances:
            product *= chance
        return product


def rollouts(
    engine: Engine,
    cursor: Cursor | Sequence[Cursor],
    rngs: Sequence[random.Random | None],
    budget: Budget,
    *,
    max_new: int,
    filters: Filters,
    over: Over = never_over,
    together: bool = True,
) -> list[Rollout]:
    """One continuation a generator; None takes the likeliest token at each step.

    cursor: where all begin, or one for each of them; it stays as it is. `filters.temperature` must
    be above 0: it gives the chances. Ends at an end token, after `max_new` tokens, at the model's
    window, and where `over` says so. Every pass is charged before it is made. together: as one
    batch, else one after the other.
    Raises: BudgetSpent, what was written is then lost; Stopped; ModelBroken.
    """
    cursors = [cursor] * len(rngs) if isinstance(cursor, Cursor) else cursor
    if not together:
        return [
            rollouts(engine, its, [rng], budget, max_new=max_new, filters=filters, over=over)[0]
            for its, rng in zip(cursors, rngs, strict=True)
        ]
    found = [Rollout() for _ in rngs]
    going = {
        i: engine.fork(its)
        for i, its in enumerate(cursors)
        if max_new > 0 and its.pos < engine.context
    }
    while going:
        budget.charge("tokens", len(going))
        steps = engine.step(list(going.values()), filters=filters)
        for (i, branch), step in zip(list(going.items()), steps, strict=True):
            rng, rollout = rngs[i], found[i]
            id = int(step.logits.argmax()) if rng is None else draw(step, rng)[0]
            engine.push(branch, id)
            rollout.ids.append(id)
            rollout.logprobs.append(float(step.raw[id] - step.raw.logsumexp(0)))
            rollout.chances.append(float(probabilities(step, filters.temperature)[id]))
            rollout.ended = engine.ends(id)
            full = len(rollout.ids) == max_new or branch.pos == engine.context
            if rollout.ended or full or over(rollout.ids):
                del going[i]
    return found
