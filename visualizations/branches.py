"""What a contrast changed: the answer tinted by the run's own number, and where the choice flipped.

For every method that writes by a difference between branches. A token is flipped when the first
branch, the model as it is, finds another one likelier.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from analyzers.trace import MAIN, Alternative, Event, Lens, Rewind, Scores, Token, surviving
from visualizations.text import counted, escape, number, percent, quoted, spaced

TITLE = "What the contrast changed"
DRAWS = (Token, Rewind, Lens, Scores)
_FLIPS_SHOWN = 16


@dataclass(frozen=True)
class _Tint:
    """The run's number of a token: its name, unit and value by position. Five steps from its
    quintiles, so that every run shows its own range; a number with both signs has steps of a fifth
    of its largest magnitude, and none around zero."""

    name: str
    unit: str
    values: dict[int, float]

    @property
    def signed(self) -> bool:
        return any(value < 0 for value in self.values.values())

    @property
    def edges(self) -> list[float]:
        """Between the levels of a magnitude, smallest first."""
        values = list(self.values.values())
        if self.signed:
            largest = max(map(abs, values))
            return [largest * fifth / 5 for fifth in range(1, 5)]
        return quantiles(values, n=5, method="inclusive") if len(values) > 1 else []

    def mark(self, pos: int) -> str:
        """Class of a token: "" without a tint, v1 to v5, or n2 to n5 for negative values."""
        value = self.values.get(pos)
        if value is None:
            return ""
        level = 1 + bisect_left(self.edges, abs(value))
        if not self.signed:
            return f" v{level}"
        return "" if level == 1 else f" {'n' if value < 0 else 'v'}{level}"

    def written(self, pos: int) -> str:
        value = self.values.get(pos)
        unit = f" {self.unit}" if self.unit else ""
        return "" if value is None else f"{self.name}: {_short(value)}{unit}"


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Lens) and event.name == "branches" for event in events)


def render(events: Sequence[Event]) -> str:
    tokens, tables = surviving(events), _tables(events)
    shown = [token for token in tokens if token.pos in tables]
    if not shown:
        return ""
    tint = _tint(events, {token.pos for token in shown})
    flipped = [token for token in shown if _flipped(token, tables[token.pos])]
    text = "".join(_span(token, tables.get(token.pos), tint) for token in tokens)
    return (
        '<section class="candor x-branches">'
        f'<p class="x-branches-say">{_count(flipped, len(shown), tables)}</p>'
        f'<div class="x-branches-text" dir="auto">{text}</div>'
        f"{_legend(tint) if tint else ''}{_flips(flipped, tables)}</section>"
    )


def detail(events: Sequence[Event], pos: int, row: int | None) -> str:
    """The branches of one token side by side, the contrast next to the first one, since a narrow
    panel shows two at once; `row` is not used."""
    token = next((token for token in surviving(events) if token.pos == pos), None)
    lens = _tables(events).get(pos)
    if token is None or lens is None:
        return ""
    tint = _tint(events, {pos})
    about = f'<p class="note">{escape(tint.written(pos))}</p>' if tint else ""
    order = dict.fromkeys((0, len(lens.rows) - 1, *range(len(lens.rows))))
    columns = "".join(
        _column(token, lens.rows[row], lens.top[row], lens.scores[row]) for row in order
    )
    return (
        f'<section class="candor x-branches-detail"><h3>Branches at {quoted(token.text)}</h3>'
        f'{about}<div class="x-branches-scroll"><div class="x-branches-columns">{columns}</div>'
        '</div><p class="note">Probability of the ten likeliest tokens of each; the contrast is '
        "spread over the plausible ones only.</p></section>"
    )


def _tables(events: Sequence[Event]) -> dict[int, Lens]:
    return {
        event.pos: event
        for event in events
        if isinstance(event, Lens) and event.name == "branches" and event.lane == MAIN
    }


def _tint(events: Sequence[Event], positions: set[int]) -> _Tint | None:
    """The first number of a token that the run speaks of."""
    own = [
        event
        for event in events
        if isinstance(event, Scores) and event.lane == MAIN and event.over == (event.pos,)
    ]
    named = [event for event in own if event.name == own[0].name and event.pos in positions]
    if not named:
        return None
    return _Tint(named[0].name, named[0].unit, {event.pos: event.values[0] for event in named})


def _flipped(token: Token, lens: Lens) -> bool:
    return bool(lens.top[0]) and lens.top[0][0][0] != token.id


def _span(token: Token, lens: Lens | None, tint: _Tint | None) -> str:
    classes, hover = "x-t", []
    if tint:
        classes += tint.mark(token.pos)
        hover.append(tint.written(token.pos))
    if lens and _flipped(token, lens):
        classes += " flip"
        hover.append(f"{lens.rows[0]} would write “{lens.top[0][0][1]}”")
    word = token.text.lstrip(" ")
    lead = token.text[: len(token.text) - len(word)]
    if not word:
        lead, word = "", token.text
    if not token.bytes:
        classes += " x-special"
    return (
        f'{lead}<span class="{classes}" data-go="{token.pos}" '
        f'title="{escape(" · ".join(filter(None, hover)))}">{escape(word)}</span>'
    )


def _count(flipped: Sequence[Token], total: int, tables: dict[int, Lens]) -> str:
    """How many tokens the first branch would not have written, and how many of them were not the
    contrast's first choice either."""
    said = f"<b>{len(flipped):,} of {counted(total, 'token')}</b> changed"
    if not flipped:
        return f"{said}: the model alone finds each of them likeliest"
    said += f" (underlined): {escape(tables[flipped[0].pos].rows[0])} alone prefers another"
    others = sum(tables[token.pos].top[-1][0][0] != token.id for token in flipped)
    return f"{said}; {others:,} of them by the repetition penalty or the draw" if others else said


def _legend(tint: _Tint) -> str:
    edges = tint.edges
    limits = [_short(edge) for edge in edges]
    if tint.signed:
        cold = [(f"n{level}", f"&lt; −{limits[level - 2]}") for level in range(5, 1, -1)]
        warm = [(f"v{level}", f"&gt; {limits[level - 2]}") for level in range(2, 6)]
        steps = [*cold, ("", "about 0"), *warm]
    else:
        steps = [(f"v{level}", f"≤ {limit}") for level, limit in enumerate(limits, start=1)]
        steps += [("v5", f"&gt; {limits[-1]}")] if limits else []
    swatches = "".join(f'<li class="x-t {mark}">{limit}</li>' for mark, limit in steps)
    unit = f" in {escape(tint.unit)}" if tint.unit else ""
    how = "steps of a fifth of its largest size" if tint.signed else "a fifth of the tokens a step"
    return (
        f'<div class="x-branches-legend"><ol>{swatches}</ol>'
        f"<p><b>{escape(tint.name)}</b>{unit}: {how}</p></div>"
    )


def _flips(flipped: Sequence[Token], tables: dict[int, Lens]) -> str:
    """What was written, and what it stands in for."""
    if not flipped:
        return ""
    rows = "".join(
        f'<li data-go="{token.pos}" title="Show this token"><i class="w">'
        f'{_word(tables[token.pos].top[0][0][1])}</i> → <b class="w">{_word(token.text)}</b></li>'
        for token in flipped[:_FLIPS_SHOWN]
    )
    more = len(flipped) - _FLIPS_SHOWN
    rest = f'<li class="x-more">and {more:,} more</li>' if more > 0 else ""
    return f'<ul class="x-branches-flips">{rows}{rest}</ul>'


def _column(token: Token, name: str, top: Sequence[Alternative], score: float) -> str:
    place = next((i for i, (id, _, _) in enumerate(top, start=1) if id == token.id), None)
    rank = f"rank {place}" if place else f"rank &gt; {len(top)}"
    bars = "".join(
        f'<li class="{"me" if id == token.id else ""}">'
        f'<u style="width:{100 * _probability(logprob):.1f}%"></u>'
        f'<span class="w">{_word(text)}</span><span class="x-p">{percent(_probability(logprob))}'
        "</span></li>"
        for id, text, logprob in top
    )
    written = f"written: {percent(_probability(score))}<br>{rank}"
    return (
        f'<div class="x-column"><h4>{escape(name)}</h4><p class="note">{written}</p>'
        f"<ol>{bars}</ol></div>"
    )


def _probability(logprob: float) -> float:
    return math.exp(min(logprob, 0.0))


def _word(text: str) -> str:
    return spaced(text, 24) if text else "<em>byte piece</em>"


def _short(value: float) -> str:
    """Three digits that say something, small numbers included."""
    if value == 0 or abs(value) >= 1e-3:
        return number(value, 3 if abs(value) < 1 else 2)
    return f"{value:.1e}".replace("-", "−")
