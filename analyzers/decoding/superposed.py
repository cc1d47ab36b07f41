"""Superposed decoding: several drafts of a short text grow from a single pass a step.

Source: Shen et al. 2024, "Superposed Decoding: Multiple Generations from a Single Autoregressive
        Inference Pass", arXiv:2405.18400; RAIVNLab/SuperposedDecoding for the constants.
Idea:   the model is fed the weighted sum of the word embeddings of all drafts' last tokens; its one
        distribution, mixed with how often each draft's last words went on like that in other texts,
        extends every draft. All share one cache, whose rows belong to none of them.
Differs from the source: n-grams are counted in texts of the user's own (the source has 200,000
        documents of RedPajama). Where a draft's words were seen, a token that never followed them
        is impossible in the source; here it counts like one behind words never seen (-200), so that
        a small corpus still leaves k drafts. alpha and temperature are the source's for 2, 3, 6 and
        10 drafts, and for other k those of the next smaller one; its values for very short prompts
        are left to the knobs. Long texts are not reset to one draft. The believed scores are no
        probabilities, so every draft is read again for its true one.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.common.superposition import Draft, Superposing, corpus, grow, names, tuned, words
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, token
from analyzers.engine.signals import DIGITS
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Lens, Metric, Note, Scores, Token

CARD = Card(
    "Superposed decoding",
    family="decoding",
    source="Shen et al. 2024, arXiv:2405.18400; RAIVNLab/SuperposedDecoding",
    emits=(Candidate, Scores, Lens, Metric, Token, Note),
    needs=("logits", "layers", "tree"),
    starts_as="raw",
    example="The best thing about living near the sea is",
)


@dataclass(frozen=True)
class Params(Superposing):
    """Those of superposing."""


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield, at each step, what the drafts took and their weights; at the end the true
    log-probability of every draft, and the best one as the run's text. Return why that ended.

    A step is one pass, whatever k is; two more read the drafts at the end. Scores: "weights" and
    "n-gram score" over the drafts; "draft 1: words" over the words of the draft so far, its values
    the weight behind each. Lens: "one pass", the distribution that serves all; "drafts", the token
    that each took, its log-probability there, and the draft's believed score.
    Raises: BadParameter for a file that cannot be read; OutOfContext.
    """
    yield from task.written
    ngrams, said = corpus(engine, params, ctx)
    cursor = ctx.begin(engine, engine.encode(task))
    if cursor.pos == engine.context:
        return "context full"
    yield Note("info", said)
    drafts, finished = yield from grow(engine, cursor, params, ngrams)
    # The source's order: by the believed score a token.
    best = sorted([*finished, *drafts], key=lambda draft: -draft.score / len(draft.ids))
    best = best[: params.k]
    yield from _compared(engine, cursor, best)
    yield Note(
        "warning",
        f"The believed scores come from a distribution sharpened to temperature "
        f"{tuned(params)[1]:g}{' and mixed with n-grams' if ngrams else ''}, behind a mixture of "
        "texts: they rank the drafts and are no log-probabilities.",
    )
    yield Note(
        "info",
        "The draft with the best believed score a token is the answer, read again by itself: the "
        "drafts' common cache belongs to none of them and cannot be continued.",
    )
    for id, step in engine.read(cursor, best[0].ids):
        assert step is not None  # a prompt precedes it
        yield token(engine, step, id, origin="drafted", p_sampled=None)
    if engine.ends(best[0].ids[-1]):
        return "end token"
    return "max_new reached" if len(best[0].ids) == params.max_new else "context full"


def _compared(engine: Engine, cursor: Cursor, best: Sequence[Draft]) -> Iterator[Event]:
    """The final drafts, best first: what was believed of each, and how likely it truly is."""
    scored = engine.score(cursor, [draft.ids for draft in best])
    for name, draft, true in zip(names(best), best, scored, strict=True):
        text = engine.vocabulary.decode(draft.ids)
        yield Candidate(name, "drafts", text, round(true.total, DIGITS))
        yield words(cursor.pos + len(draft.ids) - 1, name, draft)
        yield Metric(f"{name}: believed score", len(draft.ids), round(draft.score, DIGITS), "")
