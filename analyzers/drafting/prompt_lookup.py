"""Prompt lookup: what followed the same words earlier in the text is drafted again.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; transformers'
        PromptLookupCandidateGenerator.
Idea:   summaries, translations and code repeat what stands above them. The last few tokens are
        looked for in the whole text, and what followed them there is the draft: no model drafts,
        and a step costs one pass.
Differs from the source: several continuations go into one tree, the likeliest first, and only as
        much is drafted as pays by the cost table of this machine; the source copies one chain of a
        fixed length from the first match. Measured on 120 prompts of Spec-Bench with the default
        model: 1.58 tokens a pass instead of 1.53, with 5 tokens drafted at a time by either. The
        source's rule is matches "first", ngram 2, budget 10, and not `fit`; an end token that was
        copied stays in the draft, where the source cuts it off: the text ends there anyway.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyzers.card import Card
from analyzers.common.acceptance import follow
from analyzers.common.drafts import Draft, Drawn, Outcome
from analyzers.common.lookup import Finds, Lookup, Slot, Weighed
from analyzers.common.speculation import Drafted, write
from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import DraftTree, Event, Metric, Note, Token

CARD = Card(
    "Prompt lookup",
    family="drafting",
    source="Saxena 2023, apoorvumang/prompt-lookup-decoding; transformers generation",
    emits=(DraftTree, Token, Metric, Note),
    needs=("logits", "tree"),
)

CHANCES = ((0.22, 0.07, 0.05), (0.51, 0.12, 0.07), (0.67, 0.14, 0.13), (0.80, 0.25, 0.24))
"""How often what was looked up came true, by tokens that agreed (1, 2, 3, more) and by how many
other continuations were preferred; the default model on Spec-Bench, greedy."""


@dataclass(frozen=True)
class Params(Drafted):
    """Defaults are ours, from the same measurement; see the module for the source's own."""

    matches: Literal["several", "latest", "first"] = knob(
        "several", "Places to copy from: several as a tree, or one as a chain"
    )
    budget: int = knob(16, "Most tokens to draft at once", lo=1, hi=256, unit="tokens")
    ngram: int = knob(4, "Longest run of tokens to look for", lo=1, hi=16, unit="tokens")
    fit: bool = knob(True, "Draft only as much as pays by the cost table of this machine")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a DraftTree, where anything was found, and its Tokens a step; return why the text
    ended."""
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    drafter = Looking(params, ctx)
    return (yield from write(engine, cursor, task, params, ctx, drafter, follow))


class Looking:
    """The drafter."""

    drawn: Drawn = "deterministic"

    def __init__(self, params: Params, ctx: Context) -> None:
        self._matches = params.matches
        self._lookup = Lookup(params.ngram)
        self._weighed = Weighed(prior, params.budget, ctx.cost if params.fit else None)

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        """Look for the end of the text in all of it."""
        self._lookup.read(text)
        if self._matches == "several":
            return self._weighed.draft(lambda ids, _: self._lookup.after(ids), depth)
        match, places = self._lookup.places()
        if not match:
            return Draft()
        place = places[0 if self._matches == "first" else -1]

        def copied(ids: tuple[int, ...], _: tuple[Slot, ...]) -> Finds:
            here = self._lookup.text[place + len(ids) : place + len(ids) + 1]
            return {id: Slot(match + len(ids)) for id in here}

        return self._weighed.draft(copied, depth)

    def learn(self, outcome: Outcome) -> None:
        self._weighed.learn(outcome)


def prior(slot: Slot) -> float:
    """The chance of a slot before this text has shown another one."""
    return CHANCES[min(slot.match, len(CHANCES)) - 1][slot.recent]
