"""The models in memory, and what another one would need."""

from collections.abc import Iterable, Mapping
from typing import Any

from visualizations.header import short_name, weights
from visualizations.text import escape, human_size


def residents(models: Iterable[tuple[str, Mapping[str, Any]]], mine: str) -> str:
    """A list with the buttons Use, Measure and Unload, which carry the key of their row. models:
    key and facts as in `header.render`; mine: the key of the one that this visitor uses."""
    rows = "".join(_row(key, model, key == mine) for key, model in models)
    if not rows:
        return '<div class="candor candor-models"><p class="note">No model is in memory.</p></div>'
    return f'<div class="candor candor-models"><h3>In memory</h3><ul>{rows}</ul></div>'


def needs(kind: str, weights: int, peak: int, free: int) -> str:
    """What loading would take, in bytes: once loaded, at its peak before that, and what is free
    there. kind: the quantization or dtype that it comes to."""
    said = f"{escape(kind)} needs {human_size(weights)}"
    if peak > 1.2 * weights:
        said += f", {human_size(peak)} while loading"
    said += f"; {human_size(free)} free"
    if peak > free:
        return _line("warn", f"{said}: it may not fit beside what is in memory now")
    return _line("", said)


def download(size: int) -> str:
    """Bytes to fetch first."""
    return _line("", f"is fetched first, once: {human_size(size)}")


def made() -> str:
    return _line("", "is made from what is here first, once: about a minute")


def hint(sentence: str) -> str:
    return _line("", escape(sentence))


def _row(key: str, model: Mapping[str, Any], mine: bool) -> str:
    name = str(model["name"])
    about = f'<p class="note">{escape(model["about"])}</p>' if model.get("about") else ""
    first = (
        '<span class="used">in use</span>'
        if mine
        else f'<button type="button" data-use="{escape(key)}">Use</button>'
    )
    return (
        f'<li><span class="what"><b title="{escape(name)}">{escape(short_name(name))}</b> '
        f"<small>{weights(model)}</small></span>{first}"
        f'<button type="button" data-measure="{escape(key)}" title="What a token costs: measure '
        f'it again, when nothing else runs on this machine">Measure</button>'
        f'<button type="button" data-unload="{escape(key)}">Unload</button>{about}</li>'
    )


def _line(kind: str, html: str) -> str:
    return f'<p class="candor-needs {kind}" role="status">{html}</p>'
