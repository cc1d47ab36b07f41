"""What a run shows beside its text: every view that has something to draw for its events.

A view is a module with TITLE, DRAWS (the kinds it reads), `fits(events)` and `render(events)`; it
may have `figures(events)`, charts below its HTML, and `detail(events, pos, row)`, what it knows of
one token for the panel at the side. SHOWS_LANES says that it shows the other lanes itself; GROWS,
that it is small enough to be drawn again while the run goes on. A new view is a line in VIEWS.
"""

from collections.abc import Sequence
from types import ModuleType

from analyzers.trace import Event
from visualizations import (
    assessment,
    attention,
    attribution,
    branches,
    drafts,
    lanes,
    lens,
    momentum,
    picture,
    routing,
    search_tree,
    skips,
    spans,
    speculation,
    tree,
)
from visualizations.text import escape

VIEWS: tuple[ModuleType, ...] = (
    lens,
    assessment,
    picture,
    lanes,
    branches,
    routing,
    attribution,
    attention,
    momentum,
    spans,
    search_tree,
    drafts,
    tree,
    speculation,
    skips,
)
LIVE = lens
"""The view that grows while the run goes on, and has a place of its own on the page."""


def fitting(events: Sequence[Event]) -> list[ModuleType]:
    """The views that have something to draw."""
    kinds = {type(event) for event in events}
    found = [view for view in VIEWS if kinds & set(view.DRAWS) and view.fits(events)]
    shown = any(getattr(view, "SHOWS_LANES", False) for view in found)
    return [view for view in found if view is not lanes] if shown else found


def render(events: Sequence[Event]) -> str:
    """Every fitting view but the live one as a card with its charts; "" if there is none."""
    return "".join(_card(view, events) for view in fitting(events) if view is not LIVE)


def growing(events: Sequence[Event]) -> str:
    """Of a run that goes on: the views that are drawn again with every update."""
    views = [view for view in VIEWS if getattr(view, "GROWS", False)]
    return "".join(_card(view, events) for view in views if view.fits(events))


def detail(events: Sequence[Event], pos: int, row: int | None = None) -> str:
    """What the fitting views know of the token at `pos` (and of one row there), for the panel."""
    found = [view.detail(events, pos, row) for view in fitting(events) if hasattr(view, "detail")]
    return "".join(
        f'<section class="candor candor-panel candor-more">{html}</section>'
        for html in found
        if html
    )


def _card(view: ModuleType, events: Sequence[Event]) -> str:
    figures = view.figures(events) if hasattr(view, "figures") else []
    charts = "".join(
        f'<div class="candor-figure" data-figure="{escape(str(figure.to_json()))}"></div>'
        for figure in figures
    )
    body = view.render(events) + charts
    heading = f"<h3>{escape(view.TITLE)}</h3>"
    return f'<section class="candor candor-inside">{heading}{body}</section>' if body else ""
