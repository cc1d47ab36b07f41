"""DySpec: the tree of drafts grows where a draft is most likely to be tested.

Source: Xiong et al. 2024, "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure",
        arXiv:2410.11744; no official code is known.
Idea:   take the draft's probability of a token for the chance that it is accepted. Then the chance
        v that the next child of a node is tested is known before it is drawn: its ancestors are
        accepted and its older siblings refused. Growing where v is largest gives the tree with the
        most accepted drafts, deep where the text is easy and wide where it is not.
Differs from the source: two misprints of its listings are put right (a level goes on while v is at
        least the threshold, and coins are uniform). Its order of the nodes, which helps a kernel
        that this engine does not have, is left out. Defaults are for a CPU: 16 nodes, not 64.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyzers.card import Card
from analyzers.common import acceptance, shapes
from analyzers.common.drafts import Draft
from analyzers.common.proposers import Grown, ModelDrafted, proposing
from analyzers.common.shapes import Proposer
from analyzers.common.speculation import write
from analyzers.context import Context
from analyzers.engine import Engine, Filters
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "DySpec",
    family="drafting",
    source="Xiong et al. 2024, arXiv:2410.11744",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)


@dataclass(frozen=True)
class Params(ModelDrafted):
    """Both temperatures are the source's; the others are ours. At temperature 0 the rule is the
    greedy walk, and drafts are drawn all the same."""

    temperature: float = knob(0.6, "0 = greedy, above 1 flattens", lo=0, hi=2)
    budget: int = knob(16, "Most nodes of a tree", lo=1, hi=256)
    threshold: float = knob(
        0.0, "Draw while a draft is tested with this chance; 0 = 1 / budget", lo=0, hi=1
    )
    draft_temperature: float = knob(0.6, "Of the distribution to draft from", lo=0.05, hi=2)
    length: int = knob(6, "Deepest draft", lo=1, hi=32, unit="tokens")
    grow: Literal["levels", "nodes"] = knob(
        "levels", "A level at a time, or always the best node: exactly the budget, more passes"
    )


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree a step with the Tokens it gave; return why the text ended. Values of a
    tree: v, the estimated chance that the node would be tested (higher = drawn earlier).

    Raises: BadParameter for a draft model with another tokenizer; BadInput for an early exit behind
    the last layer.
    """
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    filters = Filters(temperature=params.draft_temperature, top_k=params.top_k, top_p=params.top_p)
    most, rng = params.budget, ctx.rng("drafts")
    threshold = params.threshold or 1 / most

    def shape(proposer: Proposer, text: Sequence[int], depth: int) -> Draft:
        depth = min(depth, params.length)
        if params.grow == "nodes":
            return shapes.heap(proposer, text, depth, rng, most=most)
        return shapes.dynamic(proposer, text, depth, rng, most=most, threshold=threshold)

    proposer = proposing(engine, cursor, params, ctx, filters)
    drafter = Grown(proposer, shape, "without replacement")
    return (yield from write(engine, cursor, task, params, ctx, drafter, acceptance.recursive))
