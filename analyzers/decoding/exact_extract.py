"""Exact extraction: the most probable span of a passage, found without trying every span.

Source: Castel et al. 2021, "How Optimal is Greedy Decoding for Extractive Question Answering?",
        arXiv:2108.05857; github.com/ocastel/exact-extract.
Idea:   a span is worth the log-probability of its tokens and of ending behind them. One reading of
        what stands behind a start tells the worth of all spans that begin there. Beside it stands
        the greedy answer: is it a span, is it the best one, how far is it from it?
Differs from the source: a model without an encoder reads the passage in its prompt, the source's
        T5 pattern as raw text, or the same asked for in a chat (ours). All starts are read as one
        tree of shared beginnings, likeliest first, until no other span can come among those that
        are listed: log-probabilities only fall, so the result stays exact (ours). A span holds
        whole words and has the space that a generation would write before it, so scripts without
        spaces have few spans. It may end in one of several ways, whose probabilities are added up
        (ours). White space in the passage counts as one space. The worth is not normalised by
        length.
"""

import heapq
import math
import re
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from analyzers.card import Card
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Step, Tree, token
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadInput, OutOfContext
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Metric, Scores, Token

CARD = Card(
    "Exact extraction",
    family="decoding",
    source="Castel et al. 2021, arXiv:2108.05857; github.com/ocastel/exact-extract",
    emits=(Token, Candidate, Scores, Metric),
    needs=("logits", "tree"),
    takes=("passage",),
)
GREEDY = "greedy"
ANSWER = "Answer:"
ASKED = "Answer the question with the shortest exact span of the text, copied word for word."
MOST_NODES = 512
"""Of a tree that grows; a larger one is begun anew, so that its logits do not fill the memory."""
START = re.compile(r"(?<!\S)\S|(?<!\w)\w")
"""The first character of a word, or of what stands between spaces."""


@dataclass(frozen=True)
class Params:
    """Defaults are ours; the source reads at most 512 tokens of a suffix."""

    spans: int = knob(5, "How many spans that do not overlap to list", lo=1, hi=20)
    longest: int = knob(16, "Longest answer to consider", lo=1, hi=512, unit="tokens")
    end: Literal["line", "sentence", "end token"] = knob(
        "line", "What ends an answer: an end token; or a new line, too; or a full stop, too"
    )
    chunk: int = knob(16, "How many tokens to try in one pass", lo=1, hi=64, unit="tokens")
    prune: bool = knob(True, "Skip what cannot come among the listed; they stay the same")


@dataclass(frozen=True)
class Suffix:
    """What stands behind a start: its token ids, and behind each of them the place in the passage
    where a span may end, None inside a word and behind a space."""

    start: int
    ids: tuple[int, ...]
    ends: tuple[int | None, ...]


@dataclass(frozen=True)
class Span:
    """logprob: S, of the tokens and of ending behind them, nats. end: of ending alone. places:
    (start, end) in the passage, of every occurrence; one of equal spans comes first."""

    ids: tuple[int, ...]
    logprob: float
    end: float
    places: tuple[tuple[int, int], ...]

    def overlaps(self, other: "Span") -> bool:
        return any(a < d and c < b for a, b in self.places for c, d in other.places)


@dataclass(eq=False)
class Node:
    """A beginning that `suffixes` share. logprob: L, of its tokens, nats: no span that begins so
    has more."""

    ids: tuple[int, ...]
    logprob: float
    suffixes: Sequence[Suffix]


@dataclass
class Found:
    """spans: all that were tried, best first. starts: words where they begin. tried: nodes."""

    spans: list[Span] = field(default_factory=list)
    starts: set[int] = field(default_factory=set)
    tried: int = 0


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield the passage, the greedy answer in its own lane, the best spans, and the best one as
    the text of the run: read, not written, since its tokens were not drawn.

    Metrics: "best so far" (nats, after each pass); "starts", "starts read", "tokens" behind all of
    them, "tokens read"; "extractive" and "optimal" (of greedy, 1 = yes); "gap" from greedy to the
    best span and "margin" to the second one (nats).
    Raises: BadInput without a passage or a question, or for a begun answer; OutOfContext.
    """
    passage, question = _asked(task)
    ids = engine.encode(_prompt(task, passage, question))
    if len(ids) + params.longest > engine.context:
        raise OutOfContext(
            f"The passage is too long: with the question and an answer it takes "
            f"{len(ids) + params.longest:,} tokens, and the model's context holds "
            f"{engine.context:,}."
        )
    ends = ending(engine, params.end)
    suffixes = suffixes_of(engine, passage, params.longest, ends)
    if not suffixes:
        raise BadInput("The passage has no span that the model could write: type some words.")
    yield Candidate("passage", "passage", passage)
    cursor = engine.prefill(ids)
    first = engine.step(cursor)
    greedy = yield from _greedy(engine, cursor, first, ends, params.longest)
    found = yield from search(engine, cursor, first, suffixes, ends, params)
    best, *others = listed = apart(found.spans, params.spans)
    for span in listed:
        start, end = span.places[0]
        yield Candidate(_key(span), "spans", passage[start:end], round(span.logprob, DIGITS))
    yield from _teacher_forced(engine, cursor, best)
    extractive = greedy.ended and _is_span(greedy.ids, suffixes)
    optimal = extractive and greedy.ids == best.ids
    # A span cannot beat the best one: what is left of it is the rounding of other passes.
    gap = max(best.logprob - greedy.logprob, 0.0) if extractive else best.logprob - greedy.logprob
    yield Metric("starts", 0, len(suffixes), "words")
    yield Metric("starts read", 0, len(found.starts), "words")
    yield Metric("tokens", 0, sum(len(suffix.ids) for suffix in suffixes), "tokens")
    yield Metric("tokens read", 0, found.tried, "tokens")
    yield Metric("extractive", 0, int(extractive), "1 = yes")
    yield Metric("optimal", 0, int(optimal), "1 = yes")
    yield Metric("gap", 0, 0.0 if optimal else round(gap, DIGITS), "nats")
    if others:
        yield Metric("margin", 0, round(best.logprob - others[0].logprob, DIGITS), "nats")
    return "most probable span found"


def _asked(task: Task) -> tuple[str, str]:
    """The passage, white space made plain, and the question."""
    passage = " ".join(str(task.inputs.get("passage", "")).split())
    last = task.prompt if isinstance(task.prompt, str) else task.prompt[-1]["content"]
    if not passage:
        raise BadInput("There is no passage: give the text in which the answer stands.")
    if not last.strip():
        raise BadInput("There is no question: type what to look for in the passage.")
    if task.prefix or task.written:
        raise BadInput("A span is looked for as a whole: it cannot go on from a begun answer.")
    return passage, last.strip()


def _prompt(task: Task, passage: str, question: str) -> Task:
    if isinstance(task.prompt, str):
        return Task(f"Text: {passage}\nQuestion: {question}\n{ANSWER}")
    turn = {"role": "user", "content": f"{ASKED}\n\nText: {passage}\n\nQuestion: {question}"}
    return Task((*task.prompt[:-1], turn), prefix=ANSWER)


def ending(engine: Engine, how: str) -> list[int]:
    """Ids that end an answer: end tokens, line ends where asked for, and full stops."""
    vocabulary = engine.vocabulary
    stops = {"line": (b"\n",), "sentence": (b"\n", b".")}.get(how, ())
    return [
        id
        for id in range(vocabulary.size)
        if engine.ends(id) or (stops and vocabulary.raw(id).startswith(stops))
    ]


def suffixes_of(engine: Engine, passage: str, longest: int, ends: Collection[int]) -> list[Suffix]:
    """What stands behind each start, at most `longest` tokens, and nothing that ends an answer."""
    found = []
    barred = set(ends)
    for match in START.finditer(passage):
        start = match.start()
        # One word more, so that the last token is not cut; a word has at least one token.
        words = " " + " ".join(passage[start:].split(" ", longest + 1)[: longest + 1])
        whole, said = words.encode("utf-8", "replace"), b""
        ids: list[int] = []
        places: list[int | None] = []
        for id in engine.tokens(words, after=ANSWER)[:longest]:
            said += engine.vocabulary.raw(id)
            if id in barred or not whole.startswith(said):
                break
            ids.append(id)
            places.append(_end(passage, said, start))
        if any(place is not None for place in places):
            found.append(Suffix(start, tuple(ids), tuple(places)))
    return found


def _end(passage: str, said: bytes, start: int) -> int | None:
    """Where a span that was said with a space before it ends; None where none may."""
    try:
        text = said.decode("utf-8")
    except UnicodeDecodeError:  # inside a character
        return None
    end = start + len(text) - 1
    inside = re.match(r"\w\w", passage[end - 1 : end + 1]) is not None
    return None if end <= start or text.endswith(" ") or inside else end


def search(
    engine: Engine,
    cursor: Cursor,
    first: Step,
    suffixes: Sequence[Suffix],
    ends: Sequence[int],
    params: Params,
) -> Generator[Metric, None, Found]:
    """The spans behind `cursor`, likeliest beginnings first, until no other can be listed; yields
    the best one's log-probability after each pass. The cursor stays. first: its step."""
    found = Found()
    found, asked, order, passes = Found(), list[tuple[int, ...]](), 0, 0
    waiting: list[tuple[float, int, Node]] = []

    def wait(nodes: Iterable[Node]) -> None:
        nonlocal order
        for node in nodes:
            order += 1  # breaks ties: nodes do not compare
            heapq.heappush(waiting, (-node.logprob, order, node))

    wait(_below(Node((), 0.0, suffixes), first.raw))
    while waiting and -waiting[0][0] >= (floor := _floor(found.spans, params)):
        if len(asked) > MOST_NODES:
            asked = []
        batch: list[Node] = []
        while waiting and len(batch) < params.chunk and -waiting[0][0] >= floor:
            batch.append(heapq.heappop(waiting)[2])
        asked += [node.ids for node in batch]
        # What was asked before comes first, so the engine computes only what is new.
        tree, paths = Tree.merged(asked)
        checked = engine.verify(cursor, tree)
        for node, path in zip(batch, paths[-len(batch) :], strict=True):
            logits = checked.step(path[-1]).raw
            found.spans += _spans(node, logits, ends)
            found.starts.update(suffix.start for suffix in node.suffixes)
            wait(_below(node, logits))
        found.spans.sort(key=lambda span: (-span.logprob, span.places))
        found.tried += len(batch)
        passes += 1
        if found.spans:
            best = round(found.spans[0].logprob, DIGITS)
            yield Metric("best so far", passes, best, "nats")
    return found


def _floor(spans: Sequence[Span], params: Params) -> float:
    """The least log-probability (nats) that a span can be listed with. It may fall, when a better
    span overlaps two of those listed: then beginnings that wait are looked at again."""
    listed = apart(spans, params.spans)
    full = params.prune and len(listed) == params.spans
    return listed[-1].logprob if full else -math.inf


def _below(node: Node, logits: torch.Tensor) -> list[Node]:
    """What the suffixes of a node go on with, from the logits (vocab,) behind it."""
    depth = len(node.ids)
    going: dict[int, list[Suffix]] = {}
    for suffix in node.suffixes:
        if len(suffix.ids) > depth:
            going.setdefault(suffix.ids[depth], []).append(suffix)
    logprobs = logits.log_softmax(-1)[list(going)].tolist()
    return [
        Node((*node.ids, id), node.logprob + logprob, behind)
        for (id, behind), logprob in zip(going.items(), logprobs, strict=True)
    ]


def _spans(node: Node, logits: torch.Tensor, ends: Sequence[int]) -> list[Span]:
    """The span that ends with this node, if one does."""
    last = len(node.ids) - 1
    places = tuple(
        (suffix.start, end) for suffix in node.suffixes if (end := suffix.ends[last]) is not None
    )
    if not places:
        return []
    over = end_logprob(logits, ends)
    return [Span(node.ids, node.logprob + over, over, places)]


def end_logprob(logits: torch.Tensor, ends: Sequence[int]) -> float:
    """Of any of `ends` coming next, nats, from logits (vocab,)."""
    return float(logits.log_softmax(-1)[list(ends)].logsumexp(-1))


def apart(spans: Sequence[Span], most: int) -> list[Span]:
    """The first of `spans` (best first) that overlap none before them, at most so many."""
    kept: list[Span] = []
    for span in spans:
        if len(kept) == most:
            break
        if not any(span.overlaps(other) for other in kept):
            kept.append(span)
    return kept


@dataclass(frozen=True)
class Greedy:
    """logprob: of the tokens and of ending behind them, nats. ended: before the longest answer."""

    ids: tuple[int, ...]
    logprob: float
    ended: bool


def _greedy(
    engine: Engine, cursor: Cursor, step: Step, ends: Sequence[int], longest: int
) -> Generator[Event, None, Greedy]:
    """The likeliest token again and again, until that is one that ends the answer."""
    branch, start, total = engine.fork(cursor), cursor.pos, 0.0
    while (best := int(step.logits.argmax())) not in ends and branch.pos - start < longest:
        total += float(step.raw.log_softmax(-1)[best])
        yield replace(token(engine, step, best), lane=GREEDY)
        engine.push(branch, best)
        step = engine.step(branch)
    ids = tuple(branch.ids[start:])
    greedy = Greedy(ids, total + end_logprob(step.raw, ends), best in ends)
    text = engine.vocabulary.decode(ids).strip()
    yield Candidate(GREEDY, GREEDY, text, round(greedy.logprob, DIGITS))
    return greedy


def _is_span(ids: tuple[int, ...], suffixes: Iterable[Suffix]) -> bool:
    return any(
        suffix.ids[: len(ids)] == ids and suffix.ends[len(ids) - 1] is not None
        for suffix in suffixes
        if ids
    )


def _teacher_forced(engine: Engine, cursor: Cursor, span: Span) -> Iterator[Event]:
    """The tokens of the span with their numbers, and how likely the answer ends there."""
    for id, step in engine.read(cursor, span.ids):
        assert step is not None  # the prompt stands before it
        yield token(engine, step, id, origin="read", p_sampled=None)
    yield Scores(
        cursor.pos - 1, "ending here", "nats", (cursor.pos - 1,), (round(span.end, DIGITS),)
    )


def _key(span: Span) -> str:
    """Where it stands in the passage, in characters, every occurrence: "c:4-11,40-47"."""
    return "c:" + ",".join(f"{start}-{end}" for start, end in span.places)
