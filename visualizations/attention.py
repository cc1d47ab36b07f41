"""Attention: the text tinted by where one token looked, and charts by layer and head."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from analyzers.trace import MAIN, Event, Scores, Token, surviving
from visualizations.charts import INK, LINE, axis, layout, plain
from visualizations.text import counted, escape, percent, quoted

TITLE = "Where it looked"
DRAWS: tuple[type[Event], ...] = (Scores, Token)

WARNING = (
    "Attention is not an explanation: it says where information could flow from, not why the model "
    "wrote what it wrote. The first token often takes most of it without meaning anything (an "
    "attention sink)."
)
_ALL = "attention, all layers"
_LAYER = re.compile(r"attention of layer (\d+)(?:, head (\d+))?")
_LISTED = 10
_TICKS_UP_TO = 40  # longer texts have numbers below the columns instead of words

Row = dict[int, float]  # position -> share


@dataclass(frozen=True)
class _Found:
    """pos: the token that looked. over: the positions that were kept. layers: by number, the mean
    over heads; heads: the rows of each layer in order, without the shares that were left out."""

    pos: int
    tokens: dict[int, Token]
    over: list[int]
    mean: Row
    layers: dict[int, Row]
    heads: dict[int, list[Row]]

    def text(self, pos: int) -> str:
        return self.tokens[pos].text if pos in self.tokens else ""

    def ceiling(self, rows: Sequence[Row]) -> float:
        """The share with the full colour: the largest, that of the first token aside."""
        later = [share for row in rows for pos, share in row.items() if pos]
        return max(later, default=0.0) or 1.0


def fits(events: Sequence[Event]) -> bool:
    return any(_is_mean(event) for event in events)


def render(events: Sequence[Event]) -> str:
    found = _find(events)
    if found is None:
        return ""
    ceiling = found.ceiling([found.mean])
    text = "".join(_span(token, found, ceiling) for token in found.tokens.values())
    first = found.mean.get(0, 0.0)
    sink = f" · first token {percent(first)}, beyond the scale" if first > ceiling else ""
    return (
        f'<section class="candor x-attention"><p class="x-warning">{WARNING}</p>'
        f'<p class="x-legend"><span>0 %</span><span class="x-ramp" aria-hidden="true"></span>'
        f"<span>{percent(ceiling)} of the attention of {_name(found, found.pos)}, mean of "
        f"{counted(len(found.layers), 'layer')}{sink}</span></p>"
        f'<div class="x-text" dir="auto">{text}</div></section>'
    )


def figures(events: Sequence[Event]) -> list[go.Figure]:
    """Layers by tokens, averaged over heads; and heads by tokens, of the layer that is chosen."""
    found = _find(events)
    if found is None:
        return []
    charts = [_by_layer(found)]
    return [*charts, _by_head(found)] if found.heads else charts


def detail(events: Sequence[Event], pos: int, row: int | None) -> str:
    """Which heads looked most at the token at `pos`; "" where nothing looked. `row` is not used."""
    found = _find(events)
    if found is None or pos not in found.over:
        return ""
    looks = sorted(
        (
            (share, layer, head)
            for layer, heads in found.heads.items()
            for head, row_of_head in enumerate(heads, start=1)
            if (share := row_of_head.get(pos))
        ),
        key=lambda look: (-look[0], look[1], look[2]),
    )
    bars = "".join(
        f"<li><span>layer {layer}, head {head}</span>"
        f'<span class="x-bar"><u style="width:{100 * min(share, 1):.1f}%"></u></span>'
        f"<span>{percent(share)}</span></li>"
        for share, layer, head in looks[:_LISTED]
    )
    return (
        f'<section class="candor x-attention-detail"><h3>Looks at {_name(found, pos)}</h3>'
        f"<p><b>{percent(found.mean.get(pos, 0.0))}</b> of all attention of "
        f'{_name(found, found.pos)}</p><ol class="x-bars">{bars}</ol></section>'
    )


def _is_mean(event: Event) -> bool:
    return isinstance(event, Scores) and event.name == _ALL and event.lane == MAIN


def _find(events: Sequence[Event]) -> _Found | None:
    """The last look of the run."""
    mean = next((event for event in reversed(events) if _is_mean(event)), None)
    if not isinstance(mean, Scores):
        return None
    layers: dict[int, Row] = {}
    heads: dict[int, list[Row]] = {}
    for event in events:
        if not isinstance(event, Scores) or event.pos != mean.pos or event.lane != MAIN:
            continue
        if not (match := _LAYER.fullmatch(event.name)):
            continue
        if match[2] is None:
            layers[int(match[1])] = _row(event)
        else:
            heads.setdefault(int(match[1]), []).append(_row(event))
    tokens = {token.pos: token for token in surviving(events)}
    over = [int(pos) for pos in mean.over]
    return _Found(mean.pos, tokens, over, _row(mean), layers, heads)


def _row(scores: Scores) -> Row:
    return {int(pos): share for pos, share in zip(scores.over, scores.values, strict=True)}


def _span(token: Token, found: _Found, ceiling: float) -> str:
    """The spaces before a word stand outside of its tint."""
    share = found.mean.get(token.pos)
    word = token.text.lstrip(" ") or token.text
    lead = token.text[: len(token.text) - len(word)]
    classes = "x-t" if token.bytes else "x-t x-special"
    style, hover = "", "not seen from there" if token.pos > found.pos else "left out"
    if share is not None:
        style = f' style="--s:{100 * min(share / ceiling, 1):.0f}%"'
        hover = f"{percent(share)} of the attention"
    if token.pos == found.pos:
        classes += " x-here"
        hover = f"this token looked; at itself {hover}"
    elif token.pos > found.pos:
        classes += " x-later"
    return (
        f'{lead}<span class="{classes}"{style} data-go="{token.pos}" title="{hover}">'
        f"{escape(word)}</span>"
    )


def _name(found: _Found, pos: int) -> str:
    return quoted(found.text(pos)) if found.text(pos) else f"token {pos:,}"


# Charts


def _by_layer(found: _Found) -> go.Figure:
    rows = list(found.layers.values())
    hover = _hover("layer %{y}")
    drawn = go.Figure([_heat(found, rows, [str(layer) for layer in found.layers], hover)])
    drawn.update_layout(_frame(max(170, 96 + 9 * len(rows))))
    drawn.update_xaxes(_tokens_axis(found))
    drawn.update_yaxes(_rows_axis("layer", drawn.data[0].y, at_most=10))
    return drawn


def _by_head(found: _Found) -> go.Figure:
    """Begins with the last layer; the menu replaces the numbers, the hover text and the scale."""
    traces = {
        layer: _heat(
            found,
            rows,
            [str(head) for head in range(1, len(rows) + 1)],
            _hover(f"layer {layer}, head %{{y}}"),
        )
        for layer, rows in found.heads.items()
    }
    last = max(traces)
    drawn = go.Figure([traces[last]])
    buttons = [
        {
            "label": f"layer {layer}",
            "method": "restyle",
            "args": [{"z": [trace.z], "zmax": trace.zmax, "hovertemplate": trace.hovertemplate}],
        }
        for layer, trace in traces.items()
    ]
    frame = _frame(max(200, 134 + 16 * len(found.heads[last])))
    frame["margin"] |= {"t": 40}
    frame["updatemenus"] = [
        {
            "buttons": buttons,
            "active": list(traces).index(last),
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "pad": {"b": 6},
            "bgcolor": "rgba(128,128,128,.12)",
            "bordercolor": "rgba(128,128,128,.3)",
            "font": {"color": INK["both"], "size": 12},
        }
    ]
    drawn.update_layout(frame)
    drawn.update_xaxes(_tokens_axis(found))
    drawn.update_yaxes(_rows_axis("head", drawn.data[0].y, at_most=9))
    return drawn


def _hover(row: str) -> str:
    return f"{row}<br>looked at “%{{text}}”: %{{z:.1%}}<extra></extra>"


def _heat(found: _Found, rows: Sequence[Row], labels: Sequence[str], hover: str) -> go.Heatmap:
    """One row of the picture for each of `rows`, one column for each kept token. Shares that were
    left out are below a thousandth and count as none."""
    words = [plain(found.text(pos), 24) for pos in found.over]
    return go.Heatmap(
        z=[[row.get(pos, 0.0) for pos in found.over] for row in rows],
        y=labels,
        text=[words for _ in rows],
        customdata=[found.over for _ in rows],
        hovertemplate=hover,
        zmin=0,
        zmax=found.ceiling(rows),
        colorscale=[[0, "rgba(24,136,144,.05)"], [1, LINE["both"]]],
        showscale=False,
        xgap=1 if len(found.over) <= _TICKS_UP_TO else 0,
        ygap=1,
    )


def _frame(height: int) -> dict[str, Any]:
    return layout("both", height) | {"margin": {"l": 46, "r": 6, "t": 8, "b": 74}}


def _rows_axis(title: str, labels: Sequence[str], at_most: int) -> dict[str, Any]:
    every = -(-len(labels) // at_most)
    return axis(title, showgrid=False, type="category", tickvals=list(labels[::every]))


def _tokens_axis(found: _Found) -> dict[str, Any]:
    if len(found.over) > _TICKS_UP_TO:
        return axis("token looked at, in the order of the text", showgrid=False)
    return axis(
        showgrid=False,
        tickvals=list(range(len(found.over))),
        ticktext=[plain(found.text(pos).strip(" ") or "·", 12) for pos in found.over],
        tickangle=-50,
    )
