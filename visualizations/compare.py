"""Answers side by side: their texts with the differences marked, and their numbers in one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from analyzers.trace import MAIN, Event, RunEnded, Token, surviving
from visualizations.status import reason
from visualizations.summary import summarize
from visualizations.text import duration, escape, number, percent, quoted
from visualizations.tokens import span


@dataclass(frozen=True)
class Lane:
    """One answer: what it is called, its events, and which lane of them is meant."""

    name: str
    events: Sequence[Event]
    lane: str = MAIN

    @property
    def tokens(self) -> list[Token]:
        return surviving(self.events, self.lane)


def differing(tokens: Sequence[Token], reference: Sequence[Token]) -> frozenset[int]:
    """Which of the tokens (by place) are not in the reference, both aligned as in a diff of their
    texts."""
    before, after = ([token.text for token in each] for each in (reference, tokens))
    matcher = SequenceMatcher(a=before, b=after, autojunk=False)
    return frozenset(
        place
        for tag, _, _, first, last in matcher.get_opcodes()
        if tag in ("insert", "replace")
        for place in range(first, last)
    )


def text(lane: Lane, reference: Lane | None = None, choosable: bool = True) -> str:
    """The tinted tokens; those that the reference does not have carry a line above them."""
    tokens = lane.tokens
    marked = differing(tokens, reference.tokens) if reference else frozenset()
    return "".join(
        span(token, "x-compare-new" if place in marked else "", choosable)
        for place, token in enumerate(tokens)
    )


def columns(lanes: Sequence[Lane]) -> str:
    """All answers beside each other, compared with the first; "" for none."""
    parts = [
        f'<div class="x-compare-lane"><h4>{escape(lane.name)}</h4>'
        f'<div class="candor-text" dir="auto">'
        f"{text(lane, lanes[0] if lane is not lanes[0] else None, choosable=False)}</div></div>"
        for lane in lanes
    ]
    return f'<div class="x-compare">{"".join(parts)}</div>' if parts else ""


def table(lanes: Sequence[Lane]) -> str:
    """Signals and costs of every answer; the share that differs is of its own tokens."""
    if not lanes:
        return ""
    head = (
        "<tr><th>answer</th><th>tokens</th><th>differs</th><th>log-prob <small>nats a token</small>"
        "</th><th>perplexity</th><th>least sure</th><th>entropy <small>nats</small></th>"
        "<th>passes</th><th>time</th><th>ended</th></tr>"
    )
    rows = "".join(_row(lane, lanes[0]) for lane in lanes)
    return (
        f'<div class="x-compare-scroll"><table class="x-compare-table">{head}{rows}</table></div>'
        '<p class="note">Log-probability, perplexity and entropy are of the model’s own '
        "distribution (temperature 1, no filters, no contrast): higher log-probability, lower "
        f"perplexity and lower entropy = surer. Differs: share of tokens that {_first(lanes)} "
        "does not have; they carry a line above. Time counts only the answer’s own turns.</p>"
    )


def _first(lanes: Sequence[Lane]) -> str:
    return f"“{escape(lanes[0].name)}”"


def _row(lane: Lane, reference: Lane) -> str:
    own = [event for event in lane.events if not isinstance(event, Token)]
    summary = summarize([*own, *lane.tokens], lane.lane)
    tokens = lane.tokens
    changed = len(differing(tokens, reference.tokens)) if lane is not reference else 0
    ended = next((event for event in lane.events if isinstance(event, RunEnded)), None)
    least = "–"
    if summary.least is not None:
        least = f"{percent(summary.least[2])} {quoted(summary.least[1], 14)}"
    cells = (
        f"{len(tokens):,}",
        "–" if lane is reference or not tokens else percent(changed / len(tokens)),
        _or_dash(summary.mean_logprob),
        _or_dash(summary.perplexity),
        least,
        _or_dash(summary.mean_entropy),
        f"{ended.forwards:,}" if ended and lane.lane == MAIN else "–",
        duration(ended.seconds) if ended and lane.lane == MAIN else "–",
        escape(reason(ended)) if ended and lane.lane == MAIN else "–",
    )
    return f"<tr><th>{escape(lane.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)
