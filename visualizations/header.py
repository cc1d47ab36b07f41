"""The bar at the top: the name, and which model is at work."""

from collections.abc import Mapping
from typing import Any

from visualizations.text import escape, human_size


def render(model: Mapping[str, Any] | None) -> str:
    """model: its identity, with `memory` in bytes and `context` in tokens; None = none loaded."""
    return (
        '<header class="candor-top"><span class="logo">Can<i>dor</i></span>'
        f'{_chips(model)}<span class="gap"></span>'
        '<button type="button" class="chip" title="Light or dark" aria-label="Light or dark"'
        ' onclick="candorTheme()">◐</button></header>'
    )


def _chips(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return '<span class="chip">no model loaded</span>'
    weights = model["dtype"] if model["quantization"] == "none" else model["quantization"]
    return (
        f'<span class="chip"><b>{escape(str(model["name"]))}</b></span>'
        f'<span class="chip">{escape(str(weights))} · {escape(str(model["device"]).upper())} · '
        f"<b>{human_size(model['memory'])}</b></span>"
        f'<span class="chip">context <b>{model["context"]:,}</b> tokens</span>'
    )
