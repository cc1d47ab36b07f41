"""Recursive speculative decoding: a tree of drafts that are sampled without replacement.

Source: Jeon et al. 2024, "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
        Without Replacement", arXiv:2402.14160; no official code is known. Stochastic beam search is
        that of Kool et al. 2019 (arXiv:1903.06059).
Idea:   two equal drafts are one too many. Constant branching draws several different tokens behind
        every node, by Gumbel-Top-k; beam draws a whole level of different sequences, so that
        unlikely beginnings lose all their children early. A draft that is refused is taken out of
        the draft's distribution as well as out of the model's.
Differs from the source: stochastic beam search is reconstructed from its own paper and checked by
        simulation. Defaults are for a CPU.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Literal

from analyzers.card import Card
from analyzers.common import acceptance, shapes
from analyzers.common.drafts import Draft
from analyzers.common.proposers import Grown, ModelDrafted, proposing
from analyzers.common.shapes import Proposer
from analyzers.common.speculation import write
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "Recursive speculative decoding",
    family="drafting",
    source="Jeon et al. 2024, arXiv:2402.14160",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)
MOST = 256
"""Nodes of a tree; far more than pay."""


@dataclass(frozen=True)
class Params(ModelDrafted):
    """Defaults are ours. At temperature 0 the rule is the greedy walk."""

    temperature: float = knob(1.0, "0 = greedy, above 1 flattens", lo=0, hi=2)
    shape: Literal["beam", "constant"] = knob(
        "beam", "Sample whole sequences (RSD-S), or children behind every node (RSD-C)"
    )
    width: int = knob(3, "Beam: sequences that go on at each level", lo=1, hi=32)
    length: int = knob(4, "Beam: how many levels to draft", lo=1, hi=32, unit="tokens")
    branching: tuple[int, ...] = knob((2, 2, 1), "Constant: children of a node, level by level")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree a step with the Tokens it gave; return why the text ended. Values of a
    tree: the perturbed log-probabilities that decided what was drawn.

    Raises: BadParameter for more children than tokens, a branching that is empty, has a number
    below 1 or makes more than 256 nodes, or a draft model with another tokenizer; BadInput for an
    early exit behind the last layer.
    """
    check(params, engine.vocabulary.size)
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    rng = ctx.rng("drafts")

    def shape(proposer: Proposer, text: Sequence[int], depth: int) -> Draft:
        if params.shape == "constant":
            return shapes.branching(proposer, text, depth, rng, factors=params.branching)
        depth = min(depth, params.length)
        return shapes.beam(proposer, text, depth, rng, width=params.width)

    drafter = Grown(proposing(engine, cursor, params, ctx), shape, "without replacement")
    return (yield from write(engine, cursor, task, params, ctx, drafter, acceptance.recursive))


def check(params: Params, vocabulary: int) -> None:
    """Raises: BadParameter for what the chosen shape cannot draw."""
    name, factors = "width", [params.width]
    if params.shape == "constant":
        name, factors = "branching", [*params.branching]
    if not factors or min(factors) < 1 or sum(accumulate(factors, mul)) > MOST:
        raise BadParameter(
            f"{name} must be whole numbers from 1 that make at most {MOST} nodes, not "
            f"{', '.join(map(str, factors)) or 'empty'}."
        )
    if max(factors) > vocabulary:
        raise BadParameter(
            f"{name} must be at most the {vocabulary:,} tokens of the vocabulary, "
            f"not {max(factors):,}."
        )
