"""Trace events: what a method says, and the one way to turn it into text and JSON.

Live view, replay, storage, export and tests read these values and nothing else. Every number is
finite (None where there is none); positions count from 0 at the first prompt token;
log-probabilities and entropies are in nats of the model's own distribution (temperature 1, no
filters).
"""

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

MAIN = "main"
Alternative = tuple[int, str, float]
"""(token id, text for display, raw log-probability in nats)."""
Turn = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""
Origin = Literal["sampled", "drafted", "corrected", "bonus", "forced", "read"]
Status = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all kinds. `lane` tells side-by-side runs apart."""

    lane: str = MAIN


@dataclass(frozen=True)
class RunStarted(Event):
    """First event of every run.

    model: identity as a mapping (name, hash, quantization, dtype, device, ...).
    prompt: chat turns, or the raw text.
    prompt_ids: what the model read before writing, the begun answer included; None where unknown.
    prefix: the beginning of the answer that the user wrote.
    inputs: what the method was given beside the prompt, by name.
    cost: the table of what passes cost (`Cost.as_mapping`) that the run may have decided by; None
    where it was not measured yet.
    """

    method: str
    model: Mapping[str, Any]
    prompt: str | tuple[Turn, ...]
    prompt_ids: tuple[int, ...] | None
    params: Mapping[str, Any]
    seed: int
    prefix: str = ""
    cost: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Token(Event):
    """One committed token at `pos`.

    text: the characters that became complete with this token; "" inside an unfinished character.
    bytes: its own bytes in lower-case hex; "" for special tokens, which are no part of the text.
    logprob, entropy (nats), rank (1 = most likely), margin (probability of the most likely minus
    the second): of the raw distribution, None where nothing precedes the token or only a part of
    the distribution is known. p_sampled: probability under the distribution it was drawn from
    (1 when greedy), None when it was not drawn. top: the ten most likely, best first.
    """

    pos: int
    id: int
    text: str
    bytes: str
    logprob: float | None
    entropy: float | None
    rank: int | None
    margin: float | None
    p_sampled: float | None
    top: tuple[Alternative, ...]
    origin: Origin = "sampled"


@dataclass(frozen=True)
class Rewind(Event):
    """Every position >= `to` in the lane is undone."""

    to: int
    reason: str


@dataclass(frozen=True)
class Lens(Event):
    """What each row would have written at `pos`: its likeliest tokens, and one score.

    name: what the rows are, "layers" or "branches". measure: what the scores are, with their unit.
    picked: the row that was chosen, or where a reading settled.
    """

    pos: int
    rows: tuple[str, ...]
    top: tuple[tuple[Alternative, ...], ...]
    scores: tuple[float, ...]
    picked: int | None = None
    name: str = "layers"
    measure: str = ""


@dataclass(frozen=True)
class Scores(Event):
    """One number for each of `over` (token positions, layers, heads, ...) at `pos`.

    Over (pos,) it is a number of that token itself."""

    pos: int
    name: str
    unit: str
    over: tuple[str | int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Routing(Event):
    """Experts used at `pos` by one layer, with their weights; `label` names the pass."""

    pos: int
    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    label: str = "strong"


@dataclass(frozen=True)
class DraftTree(Event):
    """One step of speculative decoding: the drafted tree, what the target thought of it, and what
    survived; rejected drafts stay in it.

    pos: where the children of the root (parent -1, the last written token) stand. Siblings come in
    the order in which they were drawn. draft_logprobs, target_logprobs: of each node behind its
    parent, nats, None where there is none; the target's are its raw ones (temperature 1). accepted:
    the nodes that were written, root side first. extra: the token that the target wrote behind
    them, None when the text ended before it; origin: "corrected" where drafts stood there and were
    refused, "bonus" where none did. chances: of each node, the probability with which it was to be
    accepted, None when it was not tested; coins: what was thrown for it. values: what the drafter
    decided by, `measure` says what that is. ended: why the path ends. cost: what drafting and
    verifying take by the cost table, in plain steps, None without a table. rest_ms: everything
    else of the step.
    """

    pos: int
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    parents: tuple[int, ...]
    draft_logprobs: tuple[float | None, ...]
    target_logprobs: tuple[float | None, ...]
    accepted: tuple[int, ...]
    extra: int | None
    ended: str
    extra_text: str = ""
    origin: Literal["corrected", "bonus", ""] = ""
    chances: tuple[float | None, ...] = ()
    coins: tuple[float | None, ...] = ()
    values: tuple[float | None, ...] = ()
    measure: str = ""
    cost: float | None = None
    draft_ms: float = field(default=0.0, compare=False)
    verify_ms: float = field(default=0.0, compare=False)
    rest_ms: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class SearchNode(Event):
    """A node of a search tree; the same `node` again is an update."""

    node: int
    parent: int | None
    text: str
    prior: float | None
    value: float | None
    visits: float
    real_visits: int
    status: Literal["open", "committed", "rewound", "pruned"]
    detail: Mapping[str, Any] = field(default_factory=dict)
    evals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate(Event):
    """A text considered beside the answer: a sample, rewrite, critique or draft."""

    key: str
    group: str
    text: str
    logprob: float | None = None


@dataclass(frozen=True)
class Judgement(Event):
    """What `judge` says of `target`; scale = (lo, hi, higher_is, is_probability).

    detail: what the score comes from, such as the label probabilities in both orders."""

    key: str
    target: str
    judge: str
    score: float | None
    scale: tuple[float, float, str, bool]
    verdict: str = ""
    label_mass: float | None = None
    rationale: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 0
    ms: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Metric(Event):
    name: str
    step: int
    value: float
    unit: str


@dataclass(frozen=True)
class Artifact(Event):
    """A checkpoint, probe or image, stored as a blob under `key`."""

    key: str
    # "kind" is taken by the event's own name in JSON.
    type: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Note(Event):
    """An approximation, a fallback, a switch-off: said aloud."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class RunEnded(Event):
    """Last event of every run; totals: tokens, forwards, and seconds (which do not compare)."""

    status: Status
    reason: str
    tokens: int = 0
    forwards: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Unknown(Event):
    """An event of a kind this version does not know, kept as it came."""

    NAME: ClassVar[str] = "Unknown"
    name: str
    data: Mapping[str, Any]


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted, Token, Rewind, Lens, Scores, Routing, DraftTree, SearchNode,
        Candidate, Judgement, Metric, Artifact, Note, RunEnded,
    )
}  # fmt: skip
_FIELDS = {kind: frozenset(f.name for f in fields(kind)) for kind in KINDS.values()}


def kind_of(event: Event) -> str:
    return event.name if isinstance(event, Unknown) else type(event).__name__


def to_data(event: Event) -> Mapping[str, Any]:
    """The event's fields, ready for `json.dumps`; `kind_of` is kept beside them, not inside."""
    return event.data if isinstance(event, Unknown) else vars(event)


def from_data(kind: str, data: Mapping[str, Any]) -> Event:
    """The inverse of `to_data`, also after JSON made lists of the tuples.

    Fields this version does not know stay on the event and are written out again by `to_data`.
    Raises: TypeError if a field is missing.
    """
    if (cls := KINDS.get(kind)) is None:
        return Unknown(kind, data)
    known = _FIELDS[cls]
    event = cls(**{name: _tuples(value) for name, value in data.items() if name in known})
    event.__dict__.update({name: value for name, value in data.items() if name not in known})
    return event


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def surviving(events: Iterable[Event], lane: str = MAIN) -> list[Token]:
    """The tokens of a lane that no Rewind undid, in order of position."""
    tokens: list[Token] = []
    for event in events:
        if event.lane != lane:
            continue
        if isinstance(event, Token):
            tokens.append(event)
        elif isinstance(event, Rewind):
            while tokens and tokens[-1].pos >= event.to:
                tokens.pop()
    return tokens


def text_of(events: Iterable[Event], lane: str = MAIN) -> str:
    """The text of a run: the bytes of its surviving tokens, joined and decoded once.

    A character still unfinished at the end is left out; bytes that are no UTF-8 become U+FFFD.
    """
    joined = b"".join(bytes.fromhex(token.bytes) for token in surviving(events, lane))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(joined)
