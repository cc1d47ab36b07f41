"""The bar at the top: the name, the model at work, and what a token costs with it."""

from collections.abc import Mapping
from typing import Any

from visualizations.text import escape, human_size

# Opens the form below the bar; a class of the frame outlives every new rendering of the bar.
_TOGGLE = "this.closest('#model-bar').classList.toggle('open')"


def render(
    model: Mapping[str, Any] | None, chosen: str = "", quality: tuple[float, str] | None = None
) -> str:
    """model: its identity, with `memory` in bytes, `context` in tokens, `can_chat`, and `cost` (the
    stored cost table or None); None = not loaded, and the next run would load `chosen` first.
    quality: what its quantization adds to the perplexity (share; higher = worse), and where that
    was measured."""
    return (
        '<header class="candor-top"><span class="logo">Can<i>dor</i></span>'
        f"{_name(str(model['name']) if model else chosen)}{_chips(model, quality)}"
        '<span class="gap"></span>'
        '<button type="button" class="chip" title="Light or dark" aria-label="Light or dark"'
        ' onclick="candorTheme()">◐</button></header>'
    )


def short_name(name: str) -> str:
    """The last part of a path or a hub id."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def weights(model: Mapping[str, Any]) -> str:
    """How its weights are held, as HTML: int8 · CPU · 162 MB."""
    kind = model["dtype"] if model["quantization"] == "none" else model["quantization"]
    device = str(model["device"]).upper()
    return f"{escape(str(kind))} · {escape(device)} · <b>{human_size(model['memory'])}</b>"


def _name(name: str) -> str:
    shown = escape(short_name(name)) if name else "no model chosen"
    return (
        f'<button type="button" class="chip pick" title="{escape(name)}: choose another model"'
        f' aria-controls="model-panel" onclick="{_TOGGLE}"><b>{shown}</b> ▾</button>'
    )


def _chips(model: Mapping[str, Any] | None, quality: tuple[float, str] | None) -> str:
    if model is None:
        return '<span class="chip">no model loaded</span>'
    chips = (
        f'<span class="chip">{weights(model)}</span>'
        f'<span class="chip wide">context <b>{model["context"]:,}</b> tokens</span>'
    )
    if not model.get("can_chat", True):
        chips += '<span class="chip wide">no chat template: text mode</span>'
    return chips + (_cost(model, model["cost"], quality) if model.get("cost") else "")


def _cost(
    model: Mapping[str, Any], cost: Mapping[str, Any], quality: tuple[float, str] | None
) -> str:
    """A chip that opens the whole cost table. cost: step_ms (one token), verify ((n, time of n
    tokens at once in steps), ...), prefill (tokens a second)."""
    rate, step = 1000 / cost["step_ms"], _ms(cost["step_ms"])
    rows = [("A token", step)]
    rows += [
        (f"{n} tokens checked at once", f"{ratio:.1f} × a token")
        for n, ratio in cost["verify"]
        if n > 1
    ]
    rows += [
        ("Reading a prompt", f"{cost['prefill']:,.0f} tokens/s"),
        ("Memory of the weights", human_size(model["memory"])),
    ]
    if "unquantized" in model:
        rows.append(("Weights left as floats", f"{100 * model['unquantized']:.0f} %"))
    note = "Measured on this computer when the model was first loaded, and recorded with each run."
    if quality:
        share, where = quality
        rows.append(
            (f"Perplexity with {model['quantization']}", f"{100 * share:+.1f} %".replace("-", "−"))
        )
        note += f" Perplexity: against float32, measured on {where}."
    table = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return (
        '<details class="cost"><summary class="chip" title="What this costs here">'
        f"<b>{rate:.0f}</b> tok/s · step {step}</summary>"
        f'<div class="pop"><table>{table}</table><p>{escape(note)}</p></div></details>'
    )


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 9.95 else f"{value:.1f} ms"
