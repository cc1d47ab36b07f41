"""Where each token of the answer comes from: a tint of the text beside the confidence signals.

A token carries its origin as a class (`o-drafted`, ...); the class `by-origin` on a container picks
this tint. A thin line begins every pass of the model, and the number behind its last token says
how many tokens it wrote: both are the style sheet's.
"""

from collections.abc import Sequence

import plotly.graph_objects as go

from analyzers.trace import Event
from visualizations.charts import LINE, axis, layout
from visualizations.speculation import fits, steps
from visualizations.text import counted

NAME, LABEL = "origin", "Origin"
_MEANT = (
    ("drafted", "a draft that the model accepted"),
    ("corrected", "the model's own, where drafts were refused"),
    ("bonus", "the model's own, behind a draft accepted whole"),
    ("sampled", "written without a draft"),
)


def legend() -> str:
    """The origins, drawn with the same classes as the tokens themselves."""
    kinds = "".join(
        f'<li><span class="t o-{name}">{name}</span> {meant}</li>' for name, meant in _MEANT
    )
    return (
        f'<div class="candor candor-legend x-origin by-{NAME}"><ul>{kinds}</ul>'
        f"<p><b>{LABEL}</b>: who proposed the token · a line begins every pass of the model, the "
        "small number is how many tokens it wrote</p></div>"
    )


def figure(events: Sequence[Event]) -> go.Figure | None:
    """Tokens of every pass over the answer: each bar is as wide as it is high. None where nothing
    was drafted. customdata: the first position of the pass, for a click to select it."""
    if not fits(events):
        return None
    passes = steps(events)
    first = passes[0].pos
    ends = [step.pos - first + step.tokens for step in passes]
    top = max(step.tokens for step in passes)
    bars = go.Bar(
        x=[end - (step.tokens - 1) / 2 for step, end in zip(passes, ends, strict=True)],
        y=[step.tokens for step in passes],
        width=[step.tokens - 0.08 for step in passes],
        customdata=[step.pos for step in passes],
        hovertext=[
            f"{counted(step.tokens, 'token')} in one pass<br>token {end - step.tokens + 1:,}"
            + (f" to {end:,}" if step.tokens > 1 else "")
            for step, end in zip(passes, ends, strict=True)
        ],
        hoverinfo="text",
        marker={"color": LINE["both"], "opacity": 0.75, "line": {"width": 0}},
        name="tokens a pass",
    )
    return go.Figure(
        [bars],
        layout()
        | {
            "xaxis": axis("token of the answer", showgrid=False, range=[0.4, ends[-1] + 0.6]),
            "yaxis": axis("tokens a pass", range=[0, 1.08 * top], nticks=5, tickformat="d"),
        },
    )
