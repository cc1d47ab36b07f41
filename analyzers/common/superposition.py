"""Superposition: several drafts grow from one pass a step, fed with the sum of their last words.

Source: Shen et al. 2024, arXiv:2405.18400; RAIVNLab/SuperposedDecoding for the constants. What
        differs from it is said in `decoding/superposed`.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from analyzers.common.contrast import alternatives
from analyzers.common.ngrams import NGrams, ngrams_of, read_text
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Tree
from analyzers.engine.signals import DIGITS
from analyzers.engine.text import UTF8_MOST
from analyzers.errors import ModelBroken
from analyzers.params import FileRef, knob
from analyzers.trace import Candidate, Event, Lens, Metric, Scores

# Number of drafts -> alpha and temperature, from the source's parameter files.
TUNED = {2: (0.62, 0.06), 3: (0.54, 0.06), 6: (0.52, 0.06), 10: (0.54, 0.12)}
UNSEEN = -200.0
"""Stands for alpha times the logarithm of a count of 0."""
HISTORY_CHARACTERS = 500_000
LINEARITY_STEPS = (1, 5, 10)


@dataclass(frozen=True)
class Superposing:
    """The knobs of superposing. Defaults are the source's, and the length is what it was made for;
    the corpus is ours."""

    k: int = knob(3, "How many drafts to write at once", lo=1, hi=10)
    max_new: int = knob(15, "Length of a draft; long ones drift apart", lo=1, hi=64, unit="tokens")
    corpus: Literal["history", "file", "none"] = knob(
        "history", "Texts whose n-grams tell the drafts apart: earlier runs, a file, or none"
    )
    file: FileRef = knob(FileRef(""), "Text file to count n-grams in, UTF-8, at most 20 MB")
    alpha: float = knob(0.0, "Weight of the n-grams; 0 = the paper's for so many", lo=0, hi=1)
    temperature: float = knob(0.0, "Below 1 sharpens; 0 = the paper's for so many", lo=0, hi=2)
    m: int = knob(0, "Likeliest tokens to choose from; 0 = three a draft", lo=0, hi=200)
    linearity: bool = knob(False, "Check at steps 1, 5 and 10 how well one pass stands for all")


@dataclass(frozen=True)
class Draft:
    """ids: new tokens. score: the sum of what was believed of them. words: their text. weights: the
    draft's share of the superposition behind each of them. last: the newest token's log-probability
    (nats, temperature 1) in the one pass, and its n-gram score."""

    ids: tuple[int, ...] = ()
    score: float = 0.0
    words: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    last: tuple[float, float] = (0.0, 0.0)


def tuned(params: Superposing) -> tuple[float, float]:
    """alpha and temperature."""
    alpha, temperature = TUNED[max((k for k in TUNED if k <= params.k), default=min(TUNED))]
    return params.alpha or alpha, params.temperature or temperature


def shares(scores: Sequence[float]) -> torch.Tensor:
    """The drafts' weights in the superposition, softmax of their scores: (drafts,), float64."""
    return torch.tensor(scores, dtype=torch.float64).softmax(0)


def likeliest(
    logits: torch.Tensor, temperature: float, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The m likeliest ids of logits (vocab,), likeliest first, and log P: the model's sharpened
    distribution over them alone, (m,), float64."""
    best, ids = logits.topk(min(m, len(logits)))
    return ids, (best.double() / temperature).log_softmax(0)


def believed(logp: torch.Tensor, seen: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """What a draft believes of the candidates (m,) from log P and the n-gram scores G, None without
    n-grams: (1 - alpha) log P + alpha log G, -inf where G is 0 though it is not for others."""
    if seen is None:
        return logp
    if not seen.any():
        return (1 - alpha) * logp + UNSEEN
    return (1 - alpha) * logp + alpha * seen.log()


def superposition(engine: Engine, drafts: Sequence[Draft]) -> torch.Tensor:
    """The weighted sum of the embeddings of the drafts' last tokens, (1, d_model)."""
    rows = engine.embeddings([draft.ids[-1] for draft in drafts])
    weights = shares([draft.score for draft in drafts]).to(rows.device, torch.float32)
    return (weights @ rows.float())[None].to(rows.dtype)


def corpus(engine: Engine, params: Superposing, ctx: Context) -> tuple[NGrams | None, str]:
    """The n-grams, None where there are none; and what to say of them."""
    alone = "the drafts are told apart by the model alone and differ little"
    if params.corpus == "none":
        return None, f"No n-grams are used: {alone}."
    if params.corpus == "file":
        text = read_text(params.file)
        ngrams, name = ngrams_of(engine, [text], len(text)), "the chosen file"
    else:
        ngrams, name = ngrams_of(engine, ctx.history(), HISTORY_CHARACTERS), "earlier runs"
    if not ngrams.tokens:
        return None, f"There are no earlier runs to count n-grams in: {alone}."
    return ngrams, (
        f"The drafts are told apart by n-grams of {name}, {ngrams.tokens:,} tokens: very little "
        "beside the 200,000 documents of the paper."
    )


def grow(
    engine: Engine, cursor: Cursor, params: Superposing, ngrams: NGrams | None
) -> Generator[Event, None, tuple[list[Draft], list[Draft]]]:
    """Write the drafts behind the cursor, which stays where it is; return those that still go on
    and the best k of those that ended with an end token."""
    common = engine.fork(cursor)
    logits = engine.step(common).raw  # computes the prompt's last token
    drafts, finished = [Draft()], list[Draft]()
    steps = min(params.max_new, engine.context - cursor.pos)
    for n in range(1, steps + 1):
        pos = cursor.pos + n - 1
        grown = _extended(engine, cursor.ids, drafts, logits, params, ngrams)
        ended = [draft for draft in grown if engine.ends(draft.ids[-1])]
        if ended:
            # An end token gets no weight: nothing comes behind it.
            finished += [replace(draft, weights=(*draft.weights, 0.0)) for draft in ended]
            finished = sorted(finished, key=lambda draft: -draft.score)[: params.k]
            for i, draft in enumerate(finished, start=1):
                text = engine.vocabulary.decode(draft.ids)
                yield Candidate(f"finished {i}", "finished", text)
        drafts = _weighed([draft for draft in grown if draft not in ended][: params.k])
        if not drafts:
            break
        yield from _told(engine, pos, logits, drafts, ngrams)
        if n == steps:
            break
        # Its row in the cache stands at `pos`, where no token is committed.
        state = engine.forward(superposition(engine, drafts), (0, engine.layers), cursor=common)
        logits = engine.unembed(state)[0]
        if not logits.isfinite().all():
            raise ModelBroken(
                f"The model's numbers stop being finite where drafts are added up, at position "
                f"{pos}; the precision may be too low."
            )
        if params.linearity and n in LINEARITY_STEPS:
            cosine = _linearity(engine, cursor, drafts, state[0])
            yield Metric("cosine, last layer", n, round(cosine, DIGITS), "")
    return drafts, finished


def _extended(
    engine: Engine,
    prompt: Sequence[int],
    drafts: Sequence[Draft],
    logits: torch.Tensor,
    params: Superposing,
    ngrams: NGrams | None,
) -> list[Draft]:
    """The best 2k continuations of the drafts by one token from the logits (vocab,), best first;
    of equal ones the earlier draft's, and of these the likelier token."""
    alpha, temperature = tuned(params)
    logits = logits[: engine.vocabulary.size]
    ids, logp = likeliest(logits, temperature, params.m or 3 * params.k)
    raw = (logits[ids] - logits.logsumexp(0)).tolist()
    nothing = torch.zeros_like(logp)
    found = []
    for draft in drafts:
        before = [*prompt, *draft.ids]
        seen = ngrams.score(before, ids).to(logp.device) if ngrams else None
        values = believed(logp, seen, alpha)
        # Below all others, and so taken only where a small corpus leaves too few.
        values = torch.where(values.isinf(), believed(logp, nothing, alpha), values)
        counts = (nothing if seen is None else seen).tolist()
        for id, value, p, count in zip(ids.tolist(), values.tolist(), raw, counts, strict=True):
            found.append((draft.score + value, draft, before[-UTF8_MOST:], id, (p, count)))
    found.sort(key=lambda each: -each[0])
    return [
        Draft(
            (*draft.ids, id),
            score,
            (*draft.words, engine.vocabulary.piece(before, id)),
            draft.weights,
            last,
        )
        for score, draft, before, id, last in found[: 2 * params.k]
    ]


def _weighed(drafts: Sequence[Draft]) -> list[Draft]:
    """With their weights in the next superposition."""
    weights = shares([draft.score for draft in drafts]).tolist()
    return [
        replace(draft, weights=(*draft.weights, round(weight, DIGITS)))
        for draft, weight in zip(drafts, weights, strict=True)
    ]


def _told(
    engine: Engine, pos: int, logits: torch.Tensor, drafts: Sequence[Draft], ngrams: NGrams | None
) -> Iterator[Event]:
    """What one step did: the distribution that served all drafts, and what each took from it."""
    labels = names(drafts)
    logprobs = logits.log_softmax(-1)
    entropy = -float((logprobs.exp() * logprobs).sum())
    yield Lens(
        pos,
        ("one pass",),
        alternatives(engine, logprobs[None]),
        (round(entropy, DIGITS),),
        name="one pass",
        measure="entropy, nats",
    )
    yield Lens(
        pos,
        labels,
        tuple(
            (
                (
                    draft.ids[-1],
                    engine.vocabulary.display(draft.ids[-1]),
                    round(draft.last[0], DIGITS),
                ),
            )
            for draft in drafts
        ),
        tuple(round(draft.score, DIGITS) for draft in drafts),
        name="drafts",
        measure="believed score, no log-probability",
    )
    yield Scores(pos, "weights", "share", labels, tuple(draft.weights[-1] for draft in drafts))
    if ngrams:
        counts = tuple(round(draft.last[1], DIGITS) for draft in drafts)
        yield Scores(pos, "n-gram score", "", labels, counts)
    for name, draft in zip(labels, drafts, strict=True):
        yield Candidate(name, "drafts", engine.vocabulary.decode(draft.ids))
        yield words(pos, name, draft)


def names(drafts: Sequence[Draft]) -> tuple[str, ...]:
    return tuple(f"draft {i}" for i in range(1, len(drafts) + 1))


def words(pos: int, name: str, draft: Draft) -> Scores:
    return Scores(pos, f"{name}: words", "share", draft.words, draft.weights)


def _linearity(
    engine: Engine, cursor: Cursor, drafts: Sequence[Draft], state: torch.Tensor
) -> float:
    """The cosine between the superposition's last layer, `state` (d_model,), and the weighted sum
    of the last layers of the drafts, each read by itself; 1 = one pass stands for all of them."""
    tree, paths = Tree.merged([draft.ids for draft in drafts])
    layer = engine.layers
    checked = engine.verify(engine.fork(cursor), tree, taps=(layer,))
    rows = checked.hidden[layer][[path[-1] + 1 for path in paths]].float()
    weights = shares([draft.score for draft in drafts]).to(rows)
    return float(torch.cosine_similarity(weights @ rows, state.float(), dim=0))
