"""Which sub-layers a model leaves out while it drafts for itself, and how they were found."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from analyzers.trace import Event, Metric, Scores
from visualizations.charts import INK, LEAST, LINE, axis, layout
from visualizations.text import counted, escape, percent

TITLE = "Sub-layers left out while drafting"
DRAWS: tuple[type[Event], ...] = (Scores, Metric)

_ROWS = {"a": "attention", "f": "feed-forward"}
_LABEL = re.compile(r"([af])(\d{1,4})")
_CAME = {
    "start": "the set it began with",
    "random": "drawn at random",
    "bayes": "Gaussian process",
}
_CHANGES = 8  # of the set, in the list
_LEVELS = 5
Cell = tuple[str, int]
"""("a" or "f", layer)."""


@dataclass
class _Set:
    """What is left out from `pos` on. kind, value: where it came from and its matchness, once it
    has been tried."""

    pos: int
    off: frozenset[Cell]
    kind: str = "start"
    value: float | None = None


@dataclass
class _Search:
    """tried: (number, kind, matchness). alone: the matchness without only that sub-layer."""

    cells: dict[Cell, float] = field(default_factory=dict)
    sets: list[_Set] = field(default_factory=list)
    tried: list[tuple[int, str, float]] = field(default_factory=list)
    alone: dict[Cell, float] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """The first and the last have no switch."""
        return max(layer for _, layer in self.cells) + 1


def fits(events: Sequence[Event]) -> bool:
    return bool(_fold(events).sets)


def render(events: Sequence[Event]) -> str:
    """The layers with what is left out now, what each costs by itself, and how the set changed."""
    search = _fold(events)
    if not search.sets:
        return ""
    now = search.sets[-1]
    return (
        f'<div class="x-skips">{_facts(search, now)}'
        f"{_strip(search, dict.fromkeys(now.off, 'off'), _on_off(now))}"
        '<p class="key"><i class="off"></i> left out <i></i> used '
        '<i class="never"></i> always used</p>'
        f"{_alone(search)}{_changes(search)}</div>"
    )


def figures(events: Sequence[Event]) -> list[go.Figure]:
    """The matchness of every set that was tried, and of the best one so far."""
    tried = _fold(events).tried
    if len(tried) < 2:
        return []
    best, most = [], 0.0
    for _, _, value in tried:
        most = max(most, value)
        best.append(most)
    numbers = [number for number, _, _ in tried]
    drawn = go.Figure(layout=_layout(len(tried)))
    drawn.add_trace(
        go.Scatter(
            x=numbers,
            y=best,
            mode="lines",
            line={"color": LINE["both"], "width": 1.8, "shape": "hv"},
            hoverinfo="skip",
            name="best so far",
        )
    )
    for kinds, colour, sign, name in (
        (("start", "random"), INK["both"], "circle", "drawn at random"),
        (("bayes",), LEAST["both"], "diamond", "Gaussian process"),
    ):
        some = [row for row in tried if row[1] in kinds]
        drawn.add_trace(
            go.Scatter(
                x=[number for number, _, _ in some],
                y=[value for _, _, value in some],
                hovertext=[
                    f"set {number:,}: matchness {percent(value)}<br>{_CAME[kind]}"
                    for number, kind, value in some
                ],
                hoverinfo="text",
                mode="markers",
                marker={"color": colour, "symbol": sign, "size": 8 if sign == "diamond" else 6},
                name=name,
            )
        )
    return [drawn]


def _fold(events: Iterable[Event]) -> _Search:
    search = _Search()
    for event in events:
        if isinstance(event, Scores) and event.name == "skipped" and (cells := _cells(event)):
            search.cells = cells
            off = frozenset(cell for cell, value in cells.items() if value)
            search.sets.append(_Set(event.pos, off))
            if search.tried:
                _, search.sets[-1].kind, search.sets[-1].value = search.tried[-1]
        elif isinstance(event, Scores) and event.name == "matchness alone":
            search.alone = _cells(event)
        elif isinstance(event, Metric) and event.name.startswith("matchness, "):
            kind = event.name.removeprefix("matchness, ")
            search.tried.append((event.step, kind if kind in _CAME else "random", event.value))
            if kind == "start" and search.sets:
                search.sets[0].value = event.value
    return search


def _cells(event: Scores) -> dict[Cell, float]:
    """Labels that name no sub-layer are left out."""
    found = {}
    for label, value in zip(event.over, event.values, strict=False):
        if named := _LABEL.fullmatch(str(label)):
            found[named[1], int(named[2])] = value
    return found


def _facts(search: _Search, now: _Set) -> str:
    kinds = [sum(kind == row for kind, _ in now.off) for row in _ROWS]
    facts = [
        f"<b>{len(now.off)}</b> of {counted(len(search.cells), 'sub-layer')} left out: "
        f"{kinds[0]} attention, {kinds[1]} feed-forward"
    ]
    if now.value is not None:
        facts.append(f"matchness <b>{percent(now.value)}</b>")
    if search.tried:
        facts.append(f"{counted(len(search.tried), 'set')} tried")
    else:
        facts.append("not tried yet")
    return (
        f'<p class="facts">{" · ".join(facts)}</p>'
        '<p class="quiet">Matchness: the share of the first tokens of the answer that the model '
        "still likes best without them. Higher = better drafts.</p>"
    )


def _strip(
    search: _Search, classes: Mapping[Cell, str], titles: Mapping[Cell, str], small: bool = False
) -> str:
    """Two rows of cells, one column a layer, with the numbers of some layers below."""
    layers = search.layers
    rows = "".join(
        f'<span class="name">{"" if small else name}</span>'
        + "".join(
            _cell(search, (kind, layer), classes, "" if small else titles.get((kind, layer), ""))
            for layer in range(1, layers + 1)
        )
        for kind, name in _ROWS.items()
    )
    numbers = "" if small else f'<span class="name">layer</span>{_numbers(layers)}'
    return (
        f'<div class="strip{" small" if small else ""}" style="--layers:{layers}">'
        f"{rows}{numbers}</div>"
    )


def _cell(search: _Search, cell: Cell, classes: Mapping[Cell, str], title: str) -> str:
    known = classes.get(cell, "") if cell in search.cells else "never"
    named = f' class="{known}"' if known else ""
    hint = f' title="{title}"' if title else ""
    return f"<i{named}{hint}></i>"


def _numbers(layers: int) -> str:
    """The first, the last, and every fifth or tenth that does not touch them."""
    every = 5 if layers <= 40 else 10
    return "".join(
        f"<small>{layer if layer in (1, layers) or _free(layer, layers, every) else ''}</small>"
        for layer in range(1, layers + 1)
    )


def _free(layer: int, layers: int, every: int) -> bool:
    return layer % every == 0 and layers - layer > every // 2


def _on_off(now: _Set) -> dict[Cell, str]:
    return {
        (kind, layer): f"{name} of layer {layer}: left out"
        for kind, name in _ROWS.items()
        for row, layer in now.off
        if row == kind
    }


def _alone(search: _Search) -> str:
    """The heat strip of what each sub-layer costs when it alone is left out."""
    if not search.alone:
        return ""
    worst = sorted(search.alone.items(), key=lambda each: each[1])[:3]
    named = ", ".join(
        f"{_ROWS[kind]} of layer {layer} ({percent(value)})" for (kind, layer), value in worst
    )
    titles = {
        (kind, layer): f"without {_ROWS[kind]} of layer {layer} alone: matchness {percent(value)}"
        for (kind, layer), value in search.alone.items()
    }
    classes = {cell: f"h{_level(value)}" for cell, value in search.alone.items()}
    keys = "".join(f'<i class="h{n}"></i>' for n in range(_LEVELS + 1))
    return (
        "<h4>What leaving out a single one costs</h4>"
        f"{_strip(search, classes, titles)}"
        f'<p class="key">matchness 100 % {keys} 0 %: the stronger, the more it is needed</p>'
        f'<p class="quiet">Needed most: {escape(named)}.</p>'
    )


def _level(value: float) -> int:
    """0 where nothing is lost, 5 where at most a fifth is left."""
    return 0 if value >= 1 else min(_LEVELS, 1 + int((1 - value) * _LEVELS))


def _changes(search: _Search) -> str:
    """The sets one after the other, newest first."""
    if len(search.sets) < 2:
        return ""
    rows = []
    for place in range(len(search.sets) - 1, -1, -1)[:_CHANGES]:
        one = search.sets[place]
        value = "–" if one.value is None else percent(one.value)
        rows.append(
            f'<li><button type="button" data-go="{one.pos}">from token {one.pos:,}</button>'
            f"{_strip(search, dict.fromkeys(one.off, 'off'), {}, small=True)}"
            f'<span class="v">{value}</span><span class="q">{_CAME[one.kind]}</span></li>'
        )
    left = len(search.sets) - len(rows)
    more = f'<p class="quiet">And {counted(left, "earlier set")}.</p>' if left else ""
    return f'<h4>How the set changed</h4><ol class="sets">{"".join(rows)}</ol>{more}'


def _layout(tried: int) -> dict[str, Any]:
    edge = max(0.6, 0.02 * tried)
    return layout(height=190) | {
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 58, "r": 6, "t": 26, "b": 38},
        "xaxis": axis("sets tried", showgrid=False, range=[1 - edge, tried + edge]),
        "yaxis": axis(
            "matchness",
            range=[-0.04, 1.06],
            tickvals=[0, 0.5, 1],
            ticktext=["0 %", "50 %", "100 %"],
        ),
    }
