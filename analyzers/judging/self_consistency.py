"""Self-consistency: how many further answers, drawn at random, say the same.

Source: Wang et al. 2022 (arXiv:2203.11171) for the share of votes; Kuhn, Gal and Farquhar 2023
        (arXiv:2302.09664) and Farquhar et al. 2024 for semantic entropy, here in its discrete form.
Idea:   draw n answers. The share that agrees with the one that was given is its self-consistency;
        the entropy of how the draws spread over different answers is high where the model guesses.
        Answers are the same when they come to the same in plain words and numbers, or when the
        model itself finds that each follows from the other.
Differs from the source: entailment is asked of the model that answered, in both directions of one
        question each, where the paper has a model for it; the first answer of a cluster stands for
        it. The share is read as a probability, which it is only after recalibration.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyzers.card import Card
from analyzers.common.answering import (
    LESS_SURE,
    SURER,
    Answered,
    Assessments,
    Signals,
    answered,
    answers,
    judgement,
)
from analyzers.common.answers import final_answer
from analyzers.common.asking import next_labels, spellings
from analyzers.common.judges import Verdict
from analyzers.common.prefixes import Prefixes
from analyzers.context import Context
from analyzers.engine import Engine, Filters
from analyzers.engine.signals import DIGITS
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Judgement, Note, Token

CARD = Card(
    "Self-consistency",
    family="judging",
    source="Wang et al. 2022, arXiv:2203.11171; Kuhn et al. 2023, arXiv:2302.09664",
    emits=(Token, Candidate, Judgement, Note),
    example="In one or two words: what is the capital of Australia?",
)
SIGNALS: Signals = {
    "self_consistency": (0.0, 1.0, SURER, True),
    "semantic_entropy": (0.0, 10.0, LESS_SURE, False),
}
LABELS = {"Yes": spellings("Yes", "yes"), "No": spellings("No", "no")}
ENTAILS = "Is that so? Answer:"
Same = Callable[[str, str], bool]


@dataclass(frozen=True)
class Params:
    n: int = knob(10, "Answers to draw", lo=2, hi=100)
    clusters: Literal["same answer", "entailment"] = knob(
        "same answer", "When two answers are the same: in plain words, or by the model's own word"
    )
    temperature: float = knob(1.0, "At which they are drawn", lo=0.05, hi=2)
    max_new: int = knob(48, "When to stop writing an answer", lo=1, hi=4096, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the greedy answer, each draw as a Candidate (group = the cluster it belongs to), and a
    Judgement for both signals (target "answer").

    Raises: OutOfContext; BadInput for an answer that was begun already."""
    item = yield from answered(engine, task, ctx, params.max_new)
    before, began = engine.forwards, time.perf_counter()
    prompt = engine.prefill(item.asked.ids)
    draws = [
        engine.vocabulary.decode([id for id in sample.ids if not engine.ends(id)]).strip()
        for sample in sorted(
            engine.sample(
                prompt,
                params.n,
                rng=ctx.rng,
                max_new=params.max_new,
                filters=Filters(temperature=params.temperature),
            ),
            key=lambda sample: sample.index,
        )
    ]
    same = _same(engine, item.asked.question, params)
    clusters = clustered([item.written.text, *draws], same)
    passes, ms = engine.forwards - before, 1e3 * (time.perf_counter() - began)
    for place, (text, cluster) in enumerate(zip(draws, clusters[1:], strict=True), start=1):
        yield Candidate(f"s{place}", f"answer {cluster + 1}", text)
    for name, verdict in measured(clusters).items():
        # Both rest on the same draws, which are paid once.
        first = name == "self_consistency"
        yield judgement(
            name,
            verdict,
            SIGNALS[name],
            ctx,
            passes=passes if first else 0,
            ms=ms if first else 0.0,
        )
    yield Note("info", f"{len(set(clusters[1:]))} different answers in {params.n} draws.")
    return f"{params.n} answers drawn"


def assess(engine: Engine, items: Sequence[Answered], params: Params, ctx: Context) -> Assessments:
    """Both signals of each answer; the draws of several questions are written side by side."""
    for item in items:
        longest = max(params.max_new if not item.asked.shown else 16, 1)
        drawn = answers(
            engine,
            [item.asked] * params.n,
            longest,
            [ctx.rng("consistency", item.asked.id, place) for place in range(params.n)],
            Filters(temperature=params.temperature),
        )
        same = _same(engine, item.asked.question, params)
        yield measured(clustered([item.written.text, *(its.text for its in drawn)], same))


def clustered(texts: Sequence[str], same: Same) -> list[int]:
    """The cluster of each text, numbered as they come: that of the first text it is the same as."""
    heads: list[str] = []
    found = []
    for text in texts:
        place = next((i for i, head in enumerate(heads) if same(head, text)), len(heads))
        if place == len(heads):
            heads.append(text)
        found.append(place)
    return found


def measured(clusters: Sequence[int]) -> dict[str, Verdict]:
    """From the clusters of the given answer, which comes first, and of the draws."""
    given, draws = clusters[0], clusters[1:]
    counts = Counter(draws)
    detail = {
        "votes": tuple(sorted(counts.values(), reverse=True)),
        "disagreement": round(len(counts) / len(draws), DIGITS),
    }
    share = counts[given] / len(draws)
    entropy = entropy_of(list(counts.values()))
    return {
        "self_consistency": Verdict(round(share, DIGITS), detail=detail),
        "semantic_entropy": Verdict(round(entropy, DIGITS), detail={"unit": "nats", **detail}),
    }


def entropy_of(counts: Sequence[int]) -> float:
    """Of the shares of these counts, nats; 0 = all the same, ln n = all different."""
    n = sum(counts)
    return max(-math.fsum(count / n * math.log(count / n) for count in counts), 0.0)


def _same(engine: Engine, question: str, params: Params) -> Same:
    return _Entailment(engine, question) if params.clusters == "entailment" else _plainly


def _plainly(one: str, other: str) -> bool:
    a, b = final_answer(one), final_answer(other)
    return one.strip() == other.strip() if a is None or b is None else a == b


class _Entailment:
    """Each follows from the other, by the word of the model."""

    def __init__(self, engine: Engine, question: str) -> None:
        self._engine, self._question = engine, question
        self._prefixes = Prefixes(engine)

    def __call__(self, one: str, other: str) -> bool:
        if _plainly(one, other):
            return True
        prompts = [
            self._engine.tokenizer(
                f"Question: {self._question}\nFirst answer: {a}\nSecond answer: {b}\n"
                f"If the first answer is right, the second is right, too. {ENTAILS}"
            )["input_ids"]
            for a, b in ((one, other), (other, one))
        ]
        said = next_labels(self._engine, self._prefixes, prompts, LABELS, ENTAILS)
        return all(each.probabilities["Yes"] > each.probabilities["No"] for each in said)
