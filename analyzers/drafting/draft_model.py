"""Draft model: a cheaper model writes a few tokens ahead, and one pass of the real one checks them.

Source: Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318); drafting
        with a part of the model's own layers as in Zhang et al. 2024 (Draft & Verify,
        arXiv:2309.08168) and Elhoushi et al. 2024 (LayerSkip, arXiv:2404.16710).
Idea:   the draft is a chain; each of its tokens is kept with probability min(1, p / q), and the
        first that is not is replaced by a draw from what q left of p. At temperature 0 the draft is
        the draft model's greedy text, kept as far as it is the model's own.
Differs from the source: transformers adapts the length of drafts while it writes; here it is fixed,
        and a draft ends early after a token that the draft model finds unlikely (its confidence
        threshold). A model that drafts for itself reads the cache of the whole model, so no prompt
        is read twice; layers left out are spread evenly over the middle, not searched for (SWIFT
        does that), and neither they nor an early exit were trained for it.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common import acceptance, shapes
from analyzers.common.drafts import Draft
from analyzers.common.proposers import Grown, ModelDrafted, proposing
from analyzers.common.shapes import Proposer
from analyzers.common.speculation import write
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "Draft model",
    family="drafting",
    source="Leviathan et al. 2023, arXiv:2211.17192; transformers assisted generation",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)


@dataclass(frozen=True)
class Params(ModelDrafted):
    """length is ours; floor is transformers' confidence threshold."""

    length: int = knob(4, "How many tokens to draft before each check", lo=1, hi=32, unit="tokens")
    floor: float = knob(0.4, "Stop drafting after a token less likely than this", lo=0, hi=1)


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree a step, a chain, with the Tokens it gave; return why the text ended.

    Raises: BadParameter for a draft model with another tokenizer; BadInput for an early exit behind
    the last layer.
    """
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    sampled = params.temperature > 0
    proposer, rng = proposing(engine, cursor, params, ctx), ctx.rng("drafts")

    def chain(proposer: Proposer, text: Sequence[int], depth: int) -> Draft:
        depth = min(depth, params.length)
        return shapes.chain(proposer, text, depth, rng, floor=params.floor, greedy=not sampled)

    drafter = Grown(proposer, chain, "without replacement" if sampled else "deterministic")
    rule = acceptance.recursive if sampled else acceptance.follow
    return (yield from write(engine, cursor, task, params, ctx, drafter, rule))
