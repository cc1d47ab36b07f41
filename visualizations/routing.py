"""Which experts a mixture used: over the whole run, layer by layer, and at one token.

Two readings of a text (strong and weak) stand side by side. What was undone by a Rewind does not
count. How many experts there are is not in the events: it is taken from the highest one used.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyzers.trace import MAIN, Event, Rewind, Routing, Scores, Token, surviving
from visualizations.charts import INK, LEAST, LINE, axis, layout, plain
from visualizations.text import counted, escape, number, percent, quoted

T = TypeVar("T")
TITLE = "Which experts were used"
DRAWS = (Routing, Scores, Token, Rewind)
KL = "KL(strong‖weak)"
BY_RANK = "KL by rank"
ENTROPY = "router entropy"  # of "router entropy (strong)"
STRONG, WEAK = "strong", "weak"
_COLOURS = (LINE["both"], LEAST["both"], "#8b6bc4", INK["both"])  # of the readings, in their order
_MOST = 6  # tokens in the list of those where the readings differ most
_ROW, _COLUMN, _LEFT = 12, 15, 22  # of the dot matrix, in pixels


@dataclass(frozen=True)
class Uses:
    """What the events say of the tokens that stayed.

    at: reading -> position -> layer -> its Routing. numbers: name of a Scores -> position -> it.
    layers: in order. experts: the highest expert used, and one.
    """

    at: Mapping[str, Mapping[int, Mapping[int, Routing]]]
    numbers: Mapping[str, Mapping[int, Scores]]
    tokens: Mapping[int, Token]
    layers: tuple[int, ...]
    experts: int

    @property
    def unchosen(self) -> float | None:
        """Share of the weak reading's choices that the strong one left out; None without both."""
        pairs = [
            (set(weak.experts), set(self.at[STRONG][pos][layer].experts))
            for pos, layers in self.at.get(WEAK, {}).items()
            for layer, weak in layers.items()
            if layer in self.at.get(STRONG, {}).get(pos, {})
        ]
        total = sum(len(weak) for weak, _ in pairs)
        return sum(len(weak - strong) for weak, strong in pairs) / total if total else None

    def load(self, reading: str) -> dict[int, Counter[int]]:
        """layer -> expert -> at how many tokens it was used."""
        found: dict[int, Counter[int]] = {layer: Counter() for layer in self.layers}
        for layers in self.at[reading].values():
            for layer, event in layers.items():
                found[layer].update(event.experts)
        return found

    def shares(self, reading: str) -> list[list[float]]:
        """(layers, experts): the share of the tokens that used the expert."""
        tokens = len(self.at[reading])
        return [
            [load[expert] / tokens for expert in range(self.experts)]
            for load in self.load(reading).values()
        ]

    def busiest(self, reading: str) -> list[float | None]:
        """Of every layer: the load of its busiest expert over the mean; 1 = all alike."""
        return [
            max(load.values()) * self.experts / load.total() if load else None
            for load in self.load(reading).values()
        ]

    def entropy(self, reading: str) -> list[float | None]:
        """Of every layer: the mean router entropy in nats, None where it was not said."""
        found: dict[str, list[float]] = defaultdict(list)
        for scores in self.numbers.get(f"{ENTROPY} ({reading})", {}).values():
            for layer, value in zip(scores.over, scores.values, strict=True):
                found[str(layer)].append(value)
        return [fmean(found[str(layer)]) if str(layer) in found else None for layer in self.layers]


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Routing) for event in events)


def render(events: Sequence[Event]) -> str:
    """What the routing comes to in numbers, and the tokens where it matters most."""
    uses = _uses(events)
    if not uses.at:
        return ""
    cards = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd>{meaning}</dd></div>"
        for label, value, meaning in _facts(uses)
    )
    return (
        f'<div class="x-routing"><dl>{cards}</dl>{_differing(uses)}'
        '<p class="note">The maps show at which share of the tokens each expert was used: the '
        "strongest colour of a map is its most used expert.</p></div>"
    )


def figures(events: Sequence[Event]) -> list[go.Figure]:
    """The usage map; router entropy and load by layer; the divergence of every single rank."""
    uses = _uses(events)
    if not uses.at:
        return []
    drawn = [_usage(uses), _by_layer(uses)]
    if uses.numbers.get(BY_RANK):
        drawn.append(_ranks(uses))
    return drawn


def detail(events: Sequence[Event], pos: int, row: int | None = None) -> str:
    """The experts of every layer at one token: a dot for each that was used, the last layer on top,
    larger where its weight is. row: of no use here."""
    uses = _uses(events)
    readings = {name: at[pos] for name, at in uses.at.items() if pos in at}
    if not readings:
        return ""
    layers = sorted({layer for at in readings.values() for layer in at}, reverse=True)
    width, height = _LEFT + _COLUMN * uses.experts, _ROW * len(layers) + 16
    rows = "".join(
        _dots(layer, place, readings, uses.experts) for place, layer in enumerate(layers)
    )
    # Every expert has its number where there is room for two digits.
    numbers = "".join(
        f'<text x="{_x(expert)}" y="{height - 4}">{expert}</text>'
        for expert in range(0, uses.experts, 1 if uses.experts <= 16 else 4)
    )
    keys = "".join(
        f'<li><i class="r{place}"></i>{escape(name)}, {_mean_size([at.values()])} a layer</li>'
        for place, (name, at) in enumerate(readings.items())
    )
    return (
        f'<div class="x-routing"><h3>Experts at this token</h3><ul>{keys}</ul>'
        f'<div class="x-routing-wide"><svg role="img" aria-label="Experts by layer" width="{width}"'
        f' height="{height}" viewBox="0 0 {width} {height}">{rows}{numbers}</svg></div>'
        f'<p class="note">Up: layer. Across: expert. {_unchosen_here(readings)}</p></div>'
    )


# Reading the events


def _uses(events: Sequence[Event]) -> Uses:
    at: dict[str, dict[int, dict[int, Routing]]] = {}
    numbers: dict[str, dict[int, Scores]] = {}
    for event in events:
        if event.lane != MAIN:
            continue
        if isinstance(event, Routing):
            at.setdefault(event.label, {}).setdefault(event.pos, {})[event.layer] = event
        elif isinstance(event, Scores):
            numbers.setdefault(event.name, {})[event.pos] = event
        elif isinstance(event, Rewind):
            at = {name: _before(event.to, by_pos) for name, by_pos in at.items()}
            numbers = {name: _before(event.to, by_pos) for name, by_pos in numbers.items()}
    at = {name: by_pos for name, by_pos in at.items() if by_pos}
    found = [
        event for by_pos in at.values() for layers in by_pos.values() for event in layers.values()
    ]
    return Uses(
        at=at,
        numbers=numbers,
        tokens={token.pos: token for token in surviving(events)},
        layers=tuple(sorted({event.layer for event in found})),
        experts=1 + max((expert for event in found for expert in event.experts), default=-1),
    )


def _before(to: int, by_pos: dict[int, T]) -> dict[int, T]:
    return {pos: value for pos, value in by_pos.items() if pos < to}


def _mean_size(events: Iterable[Collection[Routing]]) -> str:
    """How many experts a layer uses: "2", or "1.4" where that changes."""
    sizes = [len(event.experts) for some in events for event in some]
    return number(fmean(sizes), 0 if len(set(sizes)) == 1 else 1)


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# HTML


def _facts(uses: Uses) -> list[tuple[str, str, str]]:
    """(label, number and unit as HTML, what it means) of each card."""
    first = next(iter(uses.at))
    sizes = [
        f"<b>{_mean_size(layers.values() for layers in at.values())}</b> {escape(name)}"
        for name, at in uses.at.items()
    ]
    what = f"of {uses.experts}, for a token in each of {counted(len(uses.layers), 'layer')}"
    facts = [("experts used", " · ".join(sizes), what)]
    if uses.unchosen is not None:
        what = "choices of the weak reading that the strong one left out"
        facts.append(("unchosen use", f"<b>{percent(uses.unchosen)}</b>", what))
    if entropies := _known(uses.entropy(first)):
        most = number(math.log(uses.experts)) if uses.experts else ""
        what = f"{most} = all experts alike, 0 = sure of one"
        facts.append(("router entropy", f"<b>{number(fmean(entropies))}</b> nats", what))
    if busiest := _known(uses.busiest(first)):
        what = "mean over the layers; 1 = all experts alike"
        facts.append(("busiest expert", f"<b>{number(fmean(busiest))}</b> × the mean", what))
    return facts


def _differing(uses: Uses) -> str:
    """The tokens with the largest divergence between the readings, to be clicked."""
    found = [
        (scores.values[0], pos) for pos, scores in uses.numbers.get(KL, {}).items() if scores.values
    ]
    best = [(value, pos) for value, pos in sorted(found, key=lambda it: -it[0]) if value > 0]
    items = "".join(
        f'<button type="button" data-go="{pos}" title="token at position {pos}">'
        f"{_word(uses, pos)} <small>{number(value)}</small></button>"
        for value, pos in best[:_MOST]
    )
    if not items:
        return ""
    return (
        '<p class="x-routing-most"><span>Where the choice of experts matters most, KL(strong‖weak) '
        f"in nats:</span> {items}</p>"
    )


def _word(uses: Uses, pos: int) -> str:
    token = uses.tokens.get(pos)
    return quoted(token.text, 16) if token and token.text else "<em>part of a character</em>"


def _x(expert: int) -> int:
    return _LEFT + _COLUMN * expert + _COLUMN // 2


def _dots(
    layer: int, place: int, readings: Mapping[str, Mapping[int, Routing]], experts: int
) -> str:
    """One layer of the dot matrix: a disc for the first reading, a ring for the second, so that an
    expert of both shows both."""
    y, marks, said = place * _ROW + _ROW // 2, [], []
    for at, (name, layers) in enumerate(readings.items()):
        if (event := layers.get(layer)) is None:
            continue
        most = max(event.weights, default=0) or 1
        pairs = list(zip(event.experts, event.weights, strict=True))
        for expert, weight in pairs:
            size = (2 + 2.5 * math.sqrt(max(weight, 0) / most)) if at == 0 else 5.2
            marks.append(f'<circle class="r{at}" cx="{_x(expert)}" cy="{y}" r="{size:.1f}"/>')
        listed = ", ".join(f"{expert} ({number(weight)})" for expert, weight in pairs)
        said.append(f"{escape(name)}: {listed}")
    right = _LEFT + _COLUMN * experts
    label = f'<text class="l" x="{_LEFT - 6}" y="{y + 3}">{layer}</text>'
    return (
        f"<g><title>layer {layer} · {' · '.join(said)}</title>"
        f'<path d="M{_LEFT} {y}H{right}"/>{label}'
        f"{''.join(marks)}</g>"
    )


def _unchosen_here(readings: Mapping[str, Mapping[int, Routing]]) -> str:
    if not {STRONG, WEAK} <= set(readings):
        return "Larger: more weight."
    strong, weak = readings[STRONG], readings[WEAK]
    pairs = [
        (set(weak[layer].experts), set(strong[layer].experts)) for layer in weak.keys() & strong
    ]
    left_out = sum(len(theirs - own) for theirs, own in pairs)
    total = sum(len(theirs) for theirs, _ in pairs)
    return f"{left_out} of {total} weak choices are experts that the strong reading left out."


# Charts


def _colour(place: int) -> str:
    return _COLOURS[min(place, len(_COLOURS) - 1)]


def _ticks(labels: list[str]) -> list[str]:
    """At most seven of them, with room between."""
    return labels[:: math.ceil(len(labels) / 7)]


def _scale(place: int) -> list[tuple[float, str]]:
    """From nothing to the colour of the reading: clear, so that it serves on white and on dark."""
    r, g, b = (int(_colour(place)[i : i + 2], 16) for i in (1, 3, 5))
    return [(0.0, f"rgba({r},{g},{b},0.03)"), (1.0, f"rgba({r},{g},{b},1)")]


def _usage(uses: Uses) -> go.Figure:
    """Layer x expert: the share of the tokens that used it, a map for every reading."""
    shares = {name: uses.shares(name) for name in uses.at}
    drawn = make_subplots(
        1,
        len(shares),
        subplot_titles=[
            f"<b>{plain(name, 20)}</b>, up to {plain(percent(max(map(max, rows))), 9)}"
            for name, rows in shares.items()
        ],
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    layers = [str(layer) for layer in uses.layers]
    for place, (name, rows) in enumerate(shares.items()):
        of = counted(len(uses.at[name]), "token")
        hover = [
            [
                f"layer {layer}, expert {expert}<br>used at {plain(percent(share), 9)} of {of}"
                for expert, share in enumerate(row)
            ]
            for layer, row in zip(layers, rows, strict=True)
        ]
        drawn.add_trace(
            go.Heatmap(
                z=rows,
                x=list(range(uses.experts)),
                y=layers,
                zmin=0,
                zmax=max(map(max, rows)),
                hovertext=hover,
                hoverinfo="text",
                colorscale=_scale(place),
                showscale=False,
                xgap=1,
                ygap=1,
                name=plain(name, 20),
            ),
            row=1,
            col=place + 1,
        )
    drawn.update_layout(_frame(min(460, max(150, 74 + 9 * len(layers)))))
    for place, title in enumerate(drawn.layout.annotations):
        title.font = {"size": 12.5, "color": _colour(place)}
    drawn.update_xaxes(axis("expert", showgrid=False))
    drawn.update_yaxes(axis(type="category", tickvals=_ticks(layers), showgrid=False))
    drawn.update_yaxes(title={"text": "layer"}, col=1)
    return drawn


def _by_layer(uses: Uses) -> go.Figure:
    """How undecided the router was, and how unevenly its experts were used, from layer to layer."""
    titles = ["<b>router entropy</b>, nats", "<b>busiest expert</b>, × mean"]
    drawn = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.11)
    for place, name in enumerate(uses.at):
        label = plain(name, 20)
        for column, values, unit in (
            (1, uses.entropy(name), "nats"),
            (2, uses.busiest(name), "× the mean"),
        ):
            if not _known(values):
                continue
            drawn.add_trace(
                go.Scatter(
                    x=list(uses.layers),
                    y=values,
                    hovertext=[
                        f"{label}, layer {layer}<br>{number(value or 0)} {unit}"
                        for layer, value in zip(uses.layers, values, strict=True)
                    ],
                    hoverinfo="text",
                    mode="lines+markers",
                    line={"color": _colour(place), "width": 1.6},
                    marker={"size": 4, "color": _colour(place)},
                    name=label,
                    showlegend=column == 2,
                ),
                row=1,
                col=column,
            )
    drawn.update_annotations(font={"size": 12.5})
    highest = math.log(max(uses.experts, 2))
    for column, y, text in ((1, highest, f"ln {uses.experts}: all alike"), (2, 1.0, "all alike")):
        drawn.add_hline(y=y, line={"color": INK["both"], "width": 1, "dash": "dot"}, col=column)
        drawn.add_annotation(
            x=0, y=y, text=text, showarrow=False, xanchor="left", yanchor="top",
            xref="x domain" if column == 1 else "x2 domain", yref="y" if column == 1 else "y2",
            font={"size": 11},
        )  # fmt: skip
    drawn.update_layout(
        _frame(205),
        showlegend=len(uses.at) > 1,
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.16, "yanchor": "top"},
    )
    edges = [uses.layers[0] - 0.7, uses.layers[-1] + 0.7]
    drawn.update_xaxes(axis("layer", showgrid=False, range=edges, nticks=8))
    drawn.update_yaxes(axis(nticks=5))
    drawn.update_yaxes(range=[0, 1.2 * highest], col=1)
    drawn.update_yaxes(rangemode="tozero", col=2)
    return drawn


def _ranks(uses: Uses) -> go.Figure:
    """Token x rank: how far the reading with the k-th best expert alone is from the strong one.
    customdata: the token's position, for a click to select it."""
    by_pos = uses.numbers[BY_RANK]
    # Counted as the other charts count: from the first token of the answer.
    places = {pos: place for place, pos in enumerate(uses.tokens, start=1)}
    shown = [pos for pos in sorted(by_pos) if pos in places]
    ranks = [str(rank) for rank in by_pos[shown[0]].over] if shown else []
    table = [[by_pos[pos].values[row] for pos in shown] for row in range(len(ranks))]
    drawn = go.Figure(
        go.Heatmap(
            z=table,
            x=[places[pos] for pos in shown],
            y=ranks,
            zmin=0,
            customdata=[shown] * len(ranks),
            hovertext=[
                [
                    f"“{plain(uses.tokens[pos].text, 60)}”<br>{number(value)} nats with rank "
                    f"{rank} alone<br>token {places[pos]:,}"
                    for pos, value in zip(shown, row, strict=True)
                ]
                for rank, row in zip(ranks, table, strict=True)
            ],
            hoverinfo="text",
            colorscale=_scale(1),
            colorbar={
                "thickness": 9,
                "outlinewidth": 0,
                "nticks": 4,
                "len": 1.0,
                "title": {"text": "nats", "side": "top"},
            },
            xgap=1 if len(shown) <= 150 else 0,
            ygap=1,
            name=BY_RANK,
        )
    )
    drawn.update_layout(
        _frame(max(130, 92 + 15 * len(ranks))),
        title={
            "text": "<b>KL(strong‖rank k)</b>: one expert a layer, the k-th best",
            "font": {"size": 12.5},
            "x": 0,
            "xref": "paper",
            "y": 0.99,
            "yanchor": "top",
        },
    )
    drawn.update_xaxes(axis("token of the answer", showgrid=False))
    drawn.update_yaxes(axis("k", type="category", showgrid=False))
    return drawn


def _frame(height: int) -> dict[str, Any]:
    return layout(height=height) | {"margin": {"l": 42, "r": 6, "t": 30, "b": 38}}
