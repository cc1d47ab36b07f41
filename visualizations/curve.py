"""The confidence curve: one signal over the tokens of an answer."""

import math
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from analyzers.trace import MAIN, Event, Token, surviving
from visualizations.charts import LEAST, LINE, Theme, axis, layout, plain
from visualizations.signals import PROBABILITY, Signal
from visualizations.text import number

_MARKERS_UP_TO = 200


def figure(
    events: Iterable[Event],
    signal: Signal = PROBABILITY,
    theme: Theme = "both",
    lane: str = MAIN,
) -> go.Figure:
    """x: place in the answer from 1; customdata: the token's position, for a click to select it.

    The least sure token is marked (the first of equals). Tokens without a value leave a gap.
    """
    tokens = surviving(events, lane)
    values = [signal.value(token) for token in tokens]
    places = list(range(1, len(tokens) + 1))
    hover = [_hover(*row, signal) for row in zip(places, tokens, values, strict=True)]
    line = go.Scatter(
        x=places,
        y=values,
        customdata=[token.pos for token in tokens],
        hovertext=hover,
        hoverinfo="text",
        mode="lines+markers" if len(tokens) <= _MARKERS_UP_TO else "lines",
        line={"color": LINE[theme], "width": 1.6},
        marker={"size": 4, "color": LINE[theme]},
        name=signal.label,
    )
    drawn = go.Figure([line], _layout(signal, theme, values))
    known = [(value, i) for i, value in enumerate(values) if value is not None]
    if known:
        sign = 1 if signal.higher_is == "sure" else -1
        _, i = min(known, key=lambda pair: sign * pair[0])
        side = "right" if i < len(tokens) * 0.1 else "left" if i >= len(tokens) * 0.9 else "center"
        drawn.add_trace(
            go.Scatter(
                x=[places[i]],
                y=[values[i]],
                customdata=[tokens[i].pos],
                hovertext=[hover[i]],
                hoverinfo="text",
                mode="markers+text",
                marker={"size": 9, "color": LEAST[theme]},
                text=[plain(tokens[i].text.strip(" ") or tokens[i].text, 18)],
                # Outside of the curve: the least sure token is its lowest or highest point.
                textposition=f"{'bottom' if sign > 0 else 'top'} {side}",
                textfont={"size": 12, "color": LEAST[theme]},
                cliponaxis=False,
                name="least sure",
            )
        )
    return drawn


def to_json(drawn: go.Figure) -> str:
    """Data and layout for plotly.js; "<", ">" and "/" in texts are escaped, so that the JSON can
    also stand inside a page."""
    return str(drawn.to_json())


def _layout(signal: Signal, theme: Theme, values: list[float | None]) -> dict[str, Any]:
    top = max((value for value in values if value is not None), default=1.0)
    if signal.higher_is == "sure":
        y: dict[str, Any] = {"range": [-0.24, 1.06], "tickvals": [0, 0.5, 1]}
    elif signal.name == "rank":
        high = max(math.log10(max(top, 1.0)), 1.0)
        y = {"type": "log", "range": [-0.06, high * 1.25], "dtick": 1}
    else:
        y = {"range": [-0.04 * max(top, 1.0), 1.25 * max(top, 1.0)], "nticks": 4}
    unit = f" ({signal.unit})" if signal.unit else ""
    edge = max(0.6, 0.012 * len(values))
    few = {"dtick": 1} if len(values) < 12 else {}
    return layout(theme) | {
        "xaxis": axis(
            "token of the answer", showgrid=False, range=[1 - edge, len(values) + edge], **few
        ),
        "yaxis": axis(signal.label.lower() + unit, **y),
    }


def _hover(place: int, token: Token, value: float | None, signal: Signal) -> str:
    shown = "no value" if value is None else number(value, signal.digits)
    unit = f" {signal.unit}" if value is not None and signal.unit else ""
    return f"“{plain(token.text, 60)}”<br>{signal.label.lower()} {shown}{unit}<br>token {place:,}"
