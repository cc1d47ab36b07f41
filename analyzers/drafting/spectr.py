"""SpecTr: several independent drafts at once, and the rule that makes most of them.

Source: Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport",
        arXiv:2310.15141 (NeurIPS 2023); no official code is known.
Idea:   k sequences are sampled from the draft model without knowing of each other. Where the text
        goes on is a transport from their distribution q to the model's p. k-SEQ accepts a token
        with probability min(1, p / (rho q)); rho is as small as it may be so that p comes out, and
        at least 1 - 1/e of what the best rule could accept is accepted.
Differs from the source: the formulas of k-SEQ are reconstructed and checked by their exactness, in
        `common.acceptance`. A tree of the merged sequences is verified in one pass instead of a
        batch. Defaults are for a CPU; the source's best run has 8 sequences of 8 tokens.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common import acceptance, shapes
from analyzers.common.acceptance import transport
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.proposers import ModelDrafted, proposing
from analyzers.common.shapes import Proposer
from analyzers.common.speculation import write
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Scores, Token

CARD = Card(
    "SpecTr",
    family="drafting",
    source="Sun et al. 2023, arXiv:2310.15141",
    emits=(DraftTree, Token, Scores, Metric, Note),
    needs=("logits", "tree"),
)


@dataclass(frozen=True)
class Params(ModelDrafted):
    """Defaults are ours. At temperature 0 the rule is the greedy walk."""

    temperature: float = knob(1.0, "0 = greedy, above 1 flattens", lo=0, hi=2)
    k: int = knob(4, "How many sequences to draft", lo=1, hi=32)
    length: int = knob(4, "How long each of them is", lo=1, hi=32, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree a step, Scores of each place that was tested, and the Tokens; return why
    the text ended.

    Scores: "acceptance" (probability), over "one draft" (beta), "k-SEQ" (one of those alive), the
    same by "recursive" rejection, and the "bound" that no rule for such drafts exceeds; over (pos,)
    "drafts alive" and "rho". None at temperature 0.
    Raises: BadParameter for more sequences than tokens, or a draft model with another tokenizer;
    BadInput for an early exit behind the last layer.
    """
    if params.k > engine.vocabulary.size:
        raise BadParameter(
            f"k must be at most the {engine.vocabulary.size:,} tokens of the vocabulary, "
            f"not {params.k:,}."
        )
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    drafter = Independent(proposing(engine, cursor, params, ctx), params, ctx)
    going = write(engine, cursor, task, params, ctx, drafter, acceptance.k_seq)
    while True:
        try:
            event = next(going)
        except StopIteration as end:
            return str(end.value)
        yield event
        if isinstance(event, DraftTree) and params.temperature > 0:
            yield from drafter.transports(event)


class Independent:
    """Drafts k sequences; remembers a step to tell its numbers."""

    drawn: Drawn = "independent"

    def __init__(self, proposer: Proposer, params: Params, ctx: Context) -> None:
        self._proposer = proposer
        self._params = params
        self._rng = ctx.rng("drafts")
        self._last: Outcome | None = None

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        depth = min(depth, self._params.length)
        return shapes.independent(self._proposer, text, depth, self._rng, k=self._params.k)

    def learn(self, outcome: Outcome) -> None:
        self._last = outcome

    def transports(self, step: DraftTree) -> Iterator[Scores]:
        """The numbers of the places that the step wrote, while there were drafts for them."""
        assert self._last is not None
        draft, rows = self._last.draft, self._last.rows
        written = len(step.accepted) + (step.extra is not None)
        for depth, node in enumerate((-1, *step.accepted)[:written]):
            path = step.accepted[:depth]
            alive = sum(one[:depth] == path and len(one) > depth for one in draft.sequences)
            if not alive:
                return
            pos, p = step.pos + depth, rows(node)
            made = transport(p, draft.rows[node].to(p.device), alive)
            chances = (made.beta, made.k_seq, made.recursive, made.optimum)
            yield Scores(
                pos,
                "acceptance",
                "probability",
                ("one draft", "k-SEQ", "recursive", "bound"),
                tuple(round(value, DIGITS) for value in chances),
            )
            yield Scores(pos, "drafts alive", "sequences", (pos,), (float(alive),))
            yield Scores(pos, "rho", "", (pos,), (round(made.rho, DIGITS),))
