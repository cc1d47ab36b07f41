"""What plain decoding says to the same prompt, to stand beside what a search chose."""

from collections.abc import Generator

from analyzers.common.judges import Court
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters
from analyzers.engine.signals import DIGITS
from analyzers.task import Task
from analyzers.trace import Candidate, Judgement

PLAIN = "plain"
"""Key and group of its Candidate, and target of its Judgement."""


def plain(
    engine: Engine,
    cursor: Cursor,
    task: Task,
    ctx: Context,
    max_new: int,
    court: Court | None = None,
) -> Generator[Candidate | Judgement, None, None]:
    """The greedy answer behind `cursor`, which stays where it is, and what `court` says of all of
    it, its beginning included. Its tokens are not those of the search.

    Raises: BudgetSpent and what the judge raises; the answer was told by then."""
    (sample,) = engine.sample(
        cursor, 1, rng=ctx.rng, max_new=max_new, filters=Filters(temperature=0)
    )
    text = engine.vocabulary.decode(sample.ids)
    yield Candidate(PLAIN, PLAIN, text, round(sum(sample.logprobs), DIGITS))
    if court:
        begun = task.prefix + engine.vocabulary.decode([token.id for token in task.written])
        yield from court.hear([begun + text], PLAIN)
