"""What all charts have in common: colours for both themes, a quiet layout, and safe text."""

import html
from typing import Any, Literal

from visualizations.text import visible

Theme = Literal["light", "dark", "both"]
# On "both" every colour keeps a contrast of at least 3 on white and on the dark card.
INK = {"light": "#5f646c", "dark": "#a3a8b0", "both": "#7d828a"}
LINE = {"light": "#0b6e75", "dark": "#4fb3b9", "both": "#188890"}
LEAST = {"light": "#b8400f", "dark": "#f08a4b", "both": "#d0571c"}
GRID = "rgba(128,128,128,.22)"


def layout(theme: Theme = "both", height: int = 170) -> dict[str, Any]:
    """Transparent, without legend or zoom, in the page's type; axes are the caller's."""
    return {
        "template": {},
        "height": height,
        "margin": {"l": 46, "r": 6, "t": 8, "b": 38},
        "showlegend": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK[theme], "size": 12, "family": "Inter, system-ui, sans-serif"},
        "hovermode": "closest",
        "hoverdistance": 40,
        "hoverlabel": {
            "bgcolor": "#23262b",
            "bordercolor": "#23262b",
            "font": {"color": "#f4f4f2", "size": 12},
            "align": "left",
        },
    }


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {
        "gridcolor": GRID,
        "zeroline": False,
        "fixedrange": True,
        "title": {"text": title, "standoff": 6},
        **more,
    }


def plain(text: str, limit: int) -> str:
    """Text that plotly.js shows as it is: no tags of its own small HTML, no TeX between dollars.

    Quotes stay: plotly.js does not know their entities.
    """
    shown = visible(text[:limit]) + ("…" if len(text) > limit else "")
    return html.escape(shown or "part of a character", quote=False).replace("$", "&#36;")
