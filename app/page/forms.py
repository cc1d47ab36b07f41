"""Forms from Params: the whole panel of a method, without a line of its own in the page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from analyzers.params import Knob, ModelRef, knobs
from analyzers.registry import Method
from app.page import model_bar

# So many knobs are seen at once; the others wait under "More settings".
IN_SIGHT = 3


@dataclass(frozen=True)
class Form:
    """The widgets of one method, by knob name, and the group that shows or hides them."""

    method: Method
    group: gr.Column
    widgets: Mapping[str, gr.components.Component]

    def values(self, given: Mapping[gr.components.Component, Any]) -> dict[str, Any]:
        """The knobs from what Gradio hands to a listener; empty number fields keep the default."""
        found = {name: given[widget] for name, widget in self.widgets.items()}
        return {name: value for name, value in found.items() if value is not None}


def build_form(method: Method, visible: bool) -> Form:
    rows = knobs(method.params)
    widgets = {}
    with gr.Column(visible=visible, elem_classes="candor-form") as group:
        for row in rows[:IN_SIGHT]:
            widgets[row.name] = widget(row)
        if len(rows) > IN_SIGHT:
            with gr.Accordion("More settings", open=False):
                for row in rows[IN_SIGHT:]:
                    widgets[row.name] = widget(row)
    return Form(method, group, widgets)


def widget(row: Knob) -> gr.components.Component:
    """The one table from kinds of knobs to widgets."""
    unit = f" ({row.unit})" if row.unit else ""
    common: dict[str, Any] = {"label": row.label + unit, "info": row.help, "value": row.default}
    return _WIDGETS.get(row.kind, _text)(row, common)  # text, and references to files


def _slider(row: Knob, common: dict[str, Any]) -> gr.components.Component:
    step = 1 if row.kind is int else 0.01
    assert row.lo is not None and row.hi is not None, f"{row.name} has no range"
    return gr.Slider(row.lo, row.hi, step=step, **common)


def _text(row: Knob, common: dict[str, Any]) -> gr.components.Component:
    return gr.Textbox(lines=row.lines, max_lines=max(row.lines, 8), **common)


def _model(row: Knob, common: dict[str, Any]) -> gr.components.Component:
    """What the bar offers, or a reference that is typed; an empty one is called "–"."""
    offered = [(label or "–", ref) for label, ref in model_bar.choices(row.default)]
    return gr.Dropdown(offered, allow_custom_value=True, **common)


_WIDGETS: dict[Any, Callable[[Knob, dict[str, Any]], gr.components.Component]] = {
    int: _slider,
    float: _slider,
    bool: lambda row, common: gr.Checkbox(**common),
    Literal: lambda row, common: gr.Dropdown(list(row.choices), **common),
    ModelRef: _model,
    tuple: lambda row, common: gr.Textbox(**common | {"value": ", ".join(map(str, row.default))}),
}
