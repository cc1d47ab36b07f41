"""What every layer would have written: layers over tokens, the last layer on top.

The HTML grows at its end by one column a token and has no wrapper, as in tokens.py; the style
sheet lays out the direct children of whatever holds it. The head that comes first has the layer
labels, the legend and the choice of colouring: plain radio inputs that the style sheet reads, so
that changing it sends nothing. A column is drawn when its Lens comes; Scores over the layers come
before it.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from analyzers.trace import MAIN, Alternative, Event, Lens, Rewind, Scores, Token
from visualizations.text import counted, escape, number, percent, quoted, spaced, visible

TITLE = "What every layer would have written"
DRAWS = (Token, Rewind, Lens, Scores)

LEVELS = 6
_LONGEST = 10  # characters of a cell; about eight have room
_WRITTEN = "log-probability of the written token"


@dataclass(frozen=True)
class Colouring:
    """What the colour of a cell says, in six levels; a level more = nearer to the answer.

    source: name of the Scores, "" = the scores of the Lens. letter: prefix of the level classes.
    steps: five thresholds from weak to strong, rising where higher is `near`, else falling.
    """

    name: str
    label: str
    letter: str
    source: str
    unit: str
    formula: str
    steps: tuple[float, ...]

    @property
    def rising(self) -> bool:
        return self.steps[0] < self.steps[-1]

    def level(self, value: float) -> int:
        """0 to 5; a value on a threshold has passed it."""
        if self.rising:
            return bisect_right(self.steps, value)
        return bisect_right([-step for step in self.steps], -value)

    def limits(self) -> list[str]:
        """Of the six levels, weakest first."""
        sign, before = ("≥", "<") if self.rising else ("≤", ">")
        return [f"{before} {self.steps[0]:g}", *(f"{sign} {step:g}" for step in self.steps)]


# The thresholds are ours: made for looking at where a column turns, not for calibration.
PROBABILITY = Colouring(
    "probability", "Probability", "p", "", "",
    "what the layer gives to the token that was written", (0.01, 0.05, 0.2, 0.5, 0.8),
)  # fmt: skip
RANK = Colouring(
    "rank", "Rank", "r", "rank of the written token", "",
    "place of the written token in the layer's order, 1 = likeliest", (1000, 100, 10, 3, 1),
)  # fmt: skip
ENTROPY = Colouring(
    "entropy", "Entropy", "h", "entropy", "nats",
    "−Σ p ln p of the layer; low = the layer is sure, of whatever it says", (4, 2, 1, 0.5, 0.1),
)  # fmt: skip
DIVERGENCE = Colouring(
    "divergence", "Divergence", "d", "divergence from the last layer", "nats",
    "KL(last layer ‖ layer); low = the layer says what the last one says", (10, 5, 2, 0.5, 0.1),
)  # fmt: skip
COLOURINGS = (PROBABILITY, RANK, ENTROPY, DIVERGENCE)
# Scores of other kinds have any scale: each is a share of the largest at its token.
SHARE = (0.2, 0.4, 0.6, 0.8, 1.0)


def fits(events: Sequence[Event], lane: str = MAIN) -> bool:
    return any(_is_ours(event) and event.lane == lane for event in events)


def render(events: Sequence[Event], lane: str = MAIN) -> str:
    return LensView(lane).add(events)


@dataclass(frozen=True)
class _Column:
    """One token as drawn. total: the picked layers of this and all earlier columns; n: how many
    of them have one."""

    pos: int
    html: str
    total: float
    n: int


class LensView:
    """Folds the events of one lane into HTML; the work of `add` is that of its events."""

    def __init__(self, lane: str = MAIN) -> None:
        self.lane = lane
        self._words: dict[int, str] = {}
        self._scores: dict[int, dict[str, Scores]] = {}
        self._rows: tuple[str, ...] = ()
        self._colourings: tuple[Colouring, ...] = ()
        self._columns: list[_Column] = []
        self._html = ""

    def add(self, events: Iterable[Event]) -> str:
        """The whole HTML so far; it starts with the former value unless a Rewind came."""
        fresh: list[str] = []
        for event in events:
            if event.lane != self.lane:
                continue
            if isinstance(event, Token):
                self._words[event.pos] = _name(event)
            elif isinstance(event, Scores):
                self._scores.setdefault(event.pos, {})[event.name] = event
            elif isinstance(event, Rewind):
                self._html += "".join(fresh)
                fresh = []
                self._undo(event.to)
            elif isinstance(event, Lens) and event.name == "layers":
                if not self._rows:
                    fresh.append(self._begin(event))
                self._columns.append(self._column(event))
                fresh.append(self._columns[-1].html)
        self._html += "".join(fresh)
        return self._html

    def _undo(self, to: int) -> None:
        for kept in (self._words, self._scores):
            for pos in [pos for pos in kept if pos >= to]:
                del kept[pos]
        while self._columns and self._columns[-1].pos >= to:
            self._html = self._html[: -len(self._columns.pop().html)]

    def _begin(self, lens: Lens) -> str:
        self._rows = lens.rows
        if lens.measure.startswith(_WRITTEN):
            there = self._scores.get(lens.pos, {})
            self._colourings = tuple(c for c in COLOURINGS if not c.source or c.source in there)
        else:
            self._colourings = (_share(lens.measure),)
        return _head(lens, self._colourings)

    def _column(self, lens: Lens) -> _Column:
        pos, places = lens.pos, {row: i for i, row in enumerate(lens.rows)}
        levels = [self._levels(lens, colouring) for colouring in self._colourings]
        cells = []
        for row in reversed(self._rows):
            if (i := places.get(row)) is None:
                cells.append("<b></b>")
                continue
            marks = " ".join(
                [mark for column in levels if (mark := column[i])] + ["k"] * (i == lens.picked)
            )
            word = _cell(lens.top[i][0][1]) if lens.top[i] else ""
            cells.append(f'<b class="{marks}" data-go={pos} data-row={i}>{word}</b>')
        before = self._columns[-1] if self._columns else _Column(-1, "", 0.0, 0)
        total, n, picked = before.total, before.n, ""
        if lens.picked is not None:
            row = lens.rows[lens.picked]
            picked = f" · {_settles(lens)} layer {escape(row)}"
            total, n = total + int(row), n + 1
        word = self._words.get(pos, "")
        title = f"{escape(visible(word[:40]))}{picked}"
        return _Column(
            pos,
            f'<div class="x-lens-col"><button type="button" data-go="{pos}" title="{title}">'
            f"{_cell(word)}</button>{''.join(cells)}</div>{_sum(lens, total, n)}",
            total,
            n,
        )

    def _levels(self, lens: Lens, colouring: Colouring) -> list[str]:
        """The level class of each row of the lens; "" for level 0 and where there is no number."""
        values: Sequence[float | None]
        if colouring.source:
            found = self._scores.get(lens.pos, {}).get(colouring.source)
            by_row = dict(zip(found.over, found.values, strict=True)) if found else {}
            values = [by_row.get(row) for row in lens.rows]
        elif colouring is PROBABILITY:
            values = [math.exp(min(score, 0.0)) for score in lens.scores]
        else:
            largest = max(lens.scores, default=0.0)
            values = [score / largest if largest > 0 else 0.0 for score in lens.scores]
        levels = [0 if value is None else colouring.level(value) for value in values]
        return [f"{colouring.letter}{level}" if level else "" for level in levels]


def _is_ours(event: Event) -> bool:
    return isinstance(event, Lens) and event.name == "layers"


def _share(measure: str) -> Colouring:
    return Colouring(
        "share", "Share of the largest", "p", "", "", f"{measure}, divided by the largest of the "
        "layers at that token", SHARE,
    )  # fmt: skip


def _settles(lens: Lens) -> str:
    return "settled at" if lens.measure.startswith(_WRITTEN) else "chosen:"


def _sum(lens: Lens, total: float, n: int) -> str:
    """Behind every column, because only the end can grow; the style sheet shows the last one."""
    if not n:
        return ""
    return (
        f'<p class="x-lens-sum">{_settles(lens).capitalize()} layer <b>{total / n:.1f}</b> of '
        f"{escape(lens.rows[-1])} on average, over {counted(n, 'token')}</p>"
    )


def _head(lens: Lens, colourings: Sequence[Colouring]) -> str:
    # A form keeps the radio buttons of two such views apart; "dialog" sends nothing anywhere.
    inputs = "".join(
        f'<label><input type="radio" name="by" class="by-{c.name}"'
        f"{' checked' if i == 0 else ''}> {c.label}</label>"
        for i, c in enumerate(colourings)
    )
    labels = "".join(f"<li{_about(lens, row)}>{escape(row)}</li>" for row in reversed(lens.rows))
    mark = (
        "settled: from this layer on the likeliest token stays the same"
        if lens.measure.startswith(_WRITTEN)
        else "the layer that was chosen"
    )
    return (
        f'<form class="x-lens-head" method="dialog">'
        f'<div class="by" role="radiogroup" aria-label="Colour by">{inputs}</div>'
        f"{''.join(map(_legend, colourings))}"
        f'<p><span class="k"></span> {mark} · each cell: the layer’s likeliest token · '
        "click a cell for ten of them</p></form>"
        f'<ol class="x-lens-rows"><li>layer</li>{labels}</ol>'
    )


def _about(lens: Lens, row: str) -> str:
    if row == "0":
        return ' title="0: the word embeddings, before the first layer"'
    return ' title="the last one"' if row == lens.rows[-1] else ""


def _legend(colouring: Colouring) -> str:
    steps = "".join(
        f'<li><b class="{colouring.letter}{level}">{escape(limit)}</b></li>'
        for level, limit in enumerate(colouring.limits())
    )
    unit = f" in {colouring.unit}" if colouring.unit else ""
    return (
        f'<div class="key of-{colouring.name}"><ol>{steps}</ol>'
        f"<p><b>{colouring.label}</b>{unit}: {escape(colouring.formula)}</p></div>"
    )


def _name(token: Token) -> str:
    """Its text; the bytes of one that is only a part of a character."""
    return token.text or f"⟨{token.bytes.upper()}⟩"


def _cell(text: str) -> str:
    """A token as the cell shows it: the space before a word stays as an indent, and nothing but
    spaces becomes dots."""
    shown = visible(text[:_LONGEST])
    return escape(shown if shown.strip() else "·" * len(shown))


# ---- the side panel ------------------------------------------------------------------------------


def detail(events: Sequence[Event], pos: int, row: int | None = None, lane: str = MAIN) -> str:
    """All layers at the token at `pos`; with `row`, what that one layer would have written."""
    token: Token | None = None
    lens: Lens | None = None
    scores: dict[str, Scores] = {}
    for event in events:
        if event.lane != lane:
            continue
        if isinstance(event, Rewind) and event.to <= pos:
            token, lens, scores = None, None, {}
        elif isinstance(event, Token) and event.pos == pos:
            token = event
        elif isinstance(event, Lens) and event.name == "layers" and event.pos == pos:
            lens = event
        elif isinstance(event, Scores) and event.pos == pos:
            scores[event.name] = event
    if lens is None or not (row is None or 0 <= row < len(lens.rows)):
        return ""
    return _layers(lens, token) if row is None else _layer(lens, token, scores, row)


def _at(token: Token | None) -> str:
    return quoted(_name(token)) if token else "this token"


def _layers(lens: Lens, token: Token | None) -> str:
    lines = "".join(_line(lens, i) for i in reversed(range(len(lens.rows))))
    picked = ""
    if lens.picked is not None:
        picked = f"{_settles(lens).capitalize()} layer {escape(lens.rows[lens.picked])}. "
    return (
        f'<section class="candor candor-panel"><h3>Layers at <span>{_at(token)}</span></h3>'
        f'<ol class="x-lens-list">{lines}</ol><p class="note">{picked}Each bar: what the layer '
        "gives to the token it finds likeliest.</p></section>"
    )


def _line(lens: Lens, i: int) -> str:
    _, text, logprob = lens.top[i][0] if lens.top[i] else (0, "", -math.inf)
    p = math.exp(min(logprob, 0.0))
    classes = ' class="k"' if i == lens.picked else ""
    return (
        f'<li{classes}><button type="button" data-go="{lens.pos}" data-row="{i}">'
        f'<span class="n">{escape(lens.rows[i])}</span><span class="w">{spaced(text, 16)}</span>'
        f'<span class="b"><u style="width:{100 * p:.1f}%"></u></span>'
        f'<span class="p">{percent(p)}</span></button></li>'
    )


def _layer(lens: Lens, token: Token | None, scores: Mapping[str, Scores], row: int) -> str:
    bars = "".join(
        _bar(place, entry, token is not None and entry[0] == token.id)
        for place, entry in enumerate(lens.top[row], start=1)
    )
    return (
        f'<section class="candor candor-panel x-lens-one"><h3>Layer {escape(lens.rows[row])} at '
        f'<span>{_at(token)}</span></h3><dl class="facts">{_facts(lens, scores, row)}</dl>'
        f'<ol class="bars">{bars}</ol><p class="note"><button type="button" '
        f'data-go="{lens.pos}">All layers at this token</button></p></section>'
    )


def _facts(lens: Lens, scores: Mapping[str, Scores], row: int) -> str:
    lines = [("written token", percent(math.exp(min(lens.scores[row], 0.0))), "")]
    if not lens.measure.startswith(_WRITTEN):
        lines = [("score", number(lens.scores[row], 4), lens.measure)]
    label = lens.rows[row]
    for name, source, unit in (
        ("its rank", RANK, ""),
        ("entropy", ENTROPY, "nats"),
        ("divergence", DIVERGENCE, "nats, from the last layer"),
    ):
        found = scores.get(source.source)
        if found and label in found.over:
            value = found.values[found.over.index(label)]
            lines.append((name, f"{value:,.0f}" if source is RANK else number(value), unit))
    return "".join(
        f"<div><dt>{name}</dt><dd><b>{value}</b> {escape(unit)}</dd></div>"
        for name, value, unit in lines
    )


def _bar(place: int, entry: Alternative, written: bool) -> str:
    _, text, logprob = entry
    p = math.exp(min(logprob, 0.0))
    return (
        f'<li class="bar{" me" if written else ""}"><span class="n">{place}</span>'
        f'<span class="w">{spaced(text, 24)}</span>'
        f'<span class="b"><u style="width:{100 * p:.1f}%"></u></span>'
        f'<span class="p">{percent(p)}</span>'
        f'<span class="here">{"written" if written else ""}</span></li>'
    )
