"""Momentum decoding: greedy text that pays a growing price for walking paths it has walked before.

Source: Lan et al. 2022, "Momentum Decoding: Open-ended Text Generation As Graph Exploration",
        arXiv:2212.02175; github.com/gmftbyGMFTBY/MomentumDecoding.
Idea:   tokens are the nodes of a graph and the text is a walk through it. Of the k likeliest tokens
        the one with the best probability - alpha * f(l) is written, where l is the longest path of
        at most five tokens, the token included, that the text has walked before: 0 = a new token.
Differs from the source: paths are looked up in a set instead of searched at every occurrence,
        which finds the same. The table f is that of the paper's release; later versions of the
        code hold others, all of which can be set. Template tokens can be left out of the graph
        (ours); they are counted by default, as the source counts its whole prompt.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from analyzers.card import Card
from analyzers.common.contrast import number
from analyzers.context import Context
from analyzers.engine import Engine, token
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Metric, Scores, Token

CARD = Card(
    "Momentum decoding",
    family="decoding",
    source="Lan et al. 2022, arXiv:2212.02175; github.com/gmftbyGMFTBY/MomentumDecoding",
    emits=(Token, Scores, Metric),
    starts_as="raw",
    example="The best thing about living near the sea is",
)
LONGEST = 5
"""Of a path that is looked up, in tokens."""
NEW, GREEDY, JUMP = 0, 1, 2
"""The likeliest token is new to the graph; it is not, and is written; it is not, another is."""
SUMMED_EVERY = 16
"""Tokens between two summaries, so that a run that is stopped has one."""


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's, with the table of its release for GPT2-XL. 0, 0, 0, 0 forbids
    every path of four tokens to come again, 1, 1, 2, 3, 4 is the authors' for a larger model."""

    alpha: float = knob(0.2, "Price of one unit of resistance, as a probability", lo=0, hi=2)
    k: int = knob(5, "How many of the likeliest tokens to choose from", lo=1, hi=1000)
    max_new: int = knob(128, "When to stop writing", lo=1, hi=8192, unit="tokens")
    table: tuple[int, ...] = knob(
        (0, 1, 3, 4, 5, 5), "Resistance of paths of 0, 1, 2 … 5 tokens; those left out are barred"
    )
    count_template: bool = knob(True, "Count the prompt as it is; off = without chat template")


class Graph:
    """The paths of up to five tokens that a text has walked."""

    def __init__(self) -> None:
        self._walked: set[tuple[int, ...]] = set()
        self._last: tuple[int, ...] = ()

    def start(self) -> None:
        """Go on somewhere else: no path leads there."""
        self._last = ()

    def walk(self, id: int) -> None:
        self._last = (*self._last, id)[-LONGEST:]
        self._walked.update(self._last[first:] for first in range(len(self._last)))

    def length(self, id: int) -> int:
        """l: tokens of the longest path that ends with `id`, if it came next, and was walked
        before; 0 for a token that never occurred."""
        path = (*self._last, id)[-LONGEST:]
        return next((len(path) - i for i in range(len(path)) if path[i:] in self._walked), 0)


@dataclass(frozen=True)
class Choice:
    """The candidates of a step, likeliest first, and which of them is written.

    scores: probability - price; None for one that is barred."""

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    lengths: tuple[int, ...]
    scores: tuple[float | None, ...]
    chosen: int

    @property
    def label(self) -> int:
        if self.lengths[0] == 0:
            return NEW
        return GREEDY if self.chosen == 0 else JUMP


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token per step with its path and the scores of its candidates, and every 16 tokens a
    summary of the answer; return why the text ended.

    Scores over (pos,): "repetition length" (l, tokens), "resistance" (alpha * f(l), probability;
    left out where every candidate is barred) and "path" (0 new, 1 greedy, 2 jump); over the texts
    of the candidates: "probability", "candidate length" (tokens) and "score", without those that
    are barred. Metrics: "greedy ratio" (share of the model's likeliest tokens), "diversity" and
    "rep-2" to "rep-4" (percent). Ends early when the context is full.
    Raises: BadParameter for a table that is empty, too long, or has a number below 0.
    """
    if not 1 <= len(params.table) <= LONGEST + 1 or min(params.table) < 0:
        raise BadParameter(
            f"table must be 1 to {LONGEST + 1} whole numbers from 0, not "
            f"{', '.join(map(str, params.table)) or 'empty'}."
        )
    yield from task.written
    ids = engine.encode(task)
    cursor = ctx.begin(engine, ids)
    graph = walked([ids] if params.count_template else contents(engine, task))
    answer = [*task.written]
    if answer and engine.ends(answer[-1].id):
        return "end token"
    why = "max_new reached"
    for _ in range(params.max_new):
        if cursor.pos == engine.context:
            why = "context full"
            break
        step = engine.step(cursor)
        choice = choose(step.logits, graph, params)
        id = choice.ids[choice.chosen]
        written = token(engine, step, id)
        engine.push(cursor, id)
        graph.walk(id)
        answer.append(written)
        yield written
        yield from _numbers(engine, written.pos, choice)
        if engine.ends(id):
            why = "end token"
            break
        if len(answer) % SUMMED_EVERY == 0:
            yield from _summary(answer)
    yield from _summary(answer)
    return why


def contents(engine: Engine, task: Task) -> list[list[int]]:
    """Ids of what people wrote and of the begun answer, without the template around them."""
    turns = [task.prompt] if isinstance(task.prompt, str) else [t["content"] for t in task.prompt]
    begun = [*engine.tokens(task.prefix), *(token.id for token in task.written)]
    return [*map(engine.tokens, turns), begun]


def walked(texts: Iterable[Sequence[int]]) -> Graph:
    """The graph after several texts, with no path from one to the next."""
    graph = Graph()
    for ids in texts:
        graph.start()
        for id in ids:
            graph.walk(id)
    return graph


def choose(logits: torch.Tensor, graph: Graph, params: Params) -> Choice:
    """The candidate with the best score, of equal ones the likelier; the likeliest of all when
    every candidate is barred. logits: (vocab,), -inf for what is no token."""
    values, found = logits.topk(min(params.k, len(logits)))
    # Of equals, greedy decoding takes the first; topk takes any.
    pairs = sorted((-value, id) for value, id in zip(values.tolist(), found.tolist(), strict=True))
    ids = [id for value, id in pairs if value < torch.inf]
    probabilities = torch.softmax(logits, -1)[ids].tolist()
    lengths = [graph.length(id) for id in ids]
    scores = [
        p - params.alpha * params.table[length] if length < len(params.table) else None
        for p, length in zip(probabilities, lengths, strict=True)
    ]
    ranked = [-torch.inf if score is None else score for score in scores]
    chosen = ranked.index(max(ranked))
    return Choice(tuple(ids), tuple(probabilities), tuple(lengths), tuple(scores), chosen)


def diversity(ids: Sequence[int]) -> tuple[float, dict[int, float]]:
    """The product of (1 - rep_n / 100) for n = 2, 3, 4, in percent, higher = more varied; and
    rep_n, the percent of n-grams that are not the first of their kind. 100 and 0 for too few."""
    product, repeated = 100.0, {}
    for n in (2, 3, 4):
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        share = len(set(grams)) / len(grams) if grams else 1.0
        repeated[n] = 100 * (1 - share)
        product *= share
    return product, repeated


def _numbers(engine: Engine, pos: int, choice: Choice) -> Iterator[Event]:
    score, p = choice.scores[choice.chosen], choice.probabilities[choice.chosen]
    yield number(pos, "repetition length", "tokens", choice.lengths[choice.chosen])
    if score is not None:
        yield number(pos, "resistance", "probability", p - score)
    yield number(pos, "path", "0 new, 1 greedy, 2 jump", choice.label)
    texts = tuple(map(engine.vocabulary.display, choice.ids))
    yield Scores(pos, "probability", "probability", texts, _rounded(choice.probabilities))
    yield Scores(pos, "candidate length", "tokens", texts, choice.lengths)
    over = [text for text, score in zip(texts, choice.scores, strict=True) if score is not None]
    values = _rounded(score for score in choice.scores if score is not None)
    yield Scores(pos, "score", "probability - resistance", tuple(over), values)


def _summary(answer: Sequence[Token]) -> Iterator[Event]:
    """step: tokens of the answer so far."""
    if not answer:
        return
    product, repeated = diversity([token.id for token in answer])
    ratio = sum(token.rank == 1 for token in answer) / len(answer)
    values = [("greedy ratio", ratio, "share"), ("diversity", product, "%")]
    values += [(f"rep-{n}", value, "%") for n, value in repeated.items()]
    for name, value, unit in values:
        yield Metric(name, len(answer), round(value, DIGITS), unit)


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(value, DIGITS) for value in values)
