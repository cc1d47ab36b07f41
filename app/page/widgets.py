"""The two clickable parts that Gradio does not have: views made of our HTML, and charts."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from visualizations.assets import js

PLOTLY = "/candor/plotly.min.js"
RESULT = "candor-result"
"""The class of the column that shows runs: where they are started, the page goes there."""
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of a listener that is only for the page."""
ENGINE: dict[str, Any] = {
    "concurrency_id": "engine",
    "concurrency_limit": None,
    "show_progress": "hidden",
}
"""Options of a listener that runs a model: they line up in the runner, which says how many are
ahead, and not in Gradio's queue."""

# A chart is figure data in the component's value, which the template never shows; plotly.js draws
# it beside, and a click on a point selects the token in every view of the same scope. One drawn in
# a hidden tab gets its size when it is seen.
_CHART = """
const scope = element.closest('.candor-scope') || document;
const box = element.querySelector('.plot');
function draw() {
  if (!window.Plotly) { setTimeout(draw, 100); return; }
  if (!props.value) { window.Plotly.purge(box); box.textContent = ''; return; }
  const figure = JSON.parse(props.value);
  window.Plotly.react(box, figure.data, figure.layout, {responsive: true, displayModeBar: false});
  if (box.dataset.listens) return;
  box.dataset.listens = 'yes';
  box.on('plotly_click', (event) => {
    const pos = Number(event.points[0].customdata);
    scope.dispatchEvent(new CustomEvent('candor:select', {detail: {pos}}));
    trigger('select', {pos});
  });
}
new ResizeObserver(() => {
  if (box.clientWidth && box.data) window.Plotly.Plots.resize(box);
}).observe(box);
watch('value', draw);
draw();
"""


# Views may hold charts: elements with figure data, drawn again when that changed. A click on a
# point selects the token, and the row, that its customdata names.
_FIGURES = """
{
  const drawn = new WeakMap();
  const draw = () => {
    const boxes = element.querySelectorAll('[data-figure]');
    if (boxes.length && !window.Plotly) { setTimeout(draw, 100); return; }
    for (const box of boxes) {
      if (drawn.get(box) === box.dataset.figure && box.firstChild) continue;
      const listens = drawn.has(box);
      drawn.set(box, box.dataset.figure);
      const figure = JSON.parse(box.dataset.figure);
      const options = {responsive: true, displayModeBar: false};
      window.Plotly.react(box, figure.data, figure.layout, options);
      if (listens) continue;
      new ResizeObserver(() => {
        if (box.clientWidth && box.data) window.Plotly.Plots.resize(box);
      }).observe(box);
      box.on('plotly_click', (event) => {
        const [pos, row] = [event.points[0].customdata].flat().map(Number);
        if (!Number.isFinite(pos)) return;
        const scope = element.closest('.candor-scope') || document;
        scope.dispatchEvent(new CustomEvent('candor:select', {detail: {pos}}));
        trigger('select', Number.isFinite(row) ? {pos, row} : {pos});
      });
    }
  };
  watch('value', draw);
  draw();
}
"""


# Gradio would parse the whole text again at every update; here only what is new is. It stands in a
# block of its own before the listeners', so that they find the text drawn.
_GROW = """
{
  const box = element.querySelector('.grown');
  let drawn = '';
  const draw = () => {
    const value = props.value || '';
    if (value.startsWith(drawn)) box.insertAdjacentHTML('beforeend', value.slice(drawn.length));
    else box.innerHTML = value;
    drawn = value;
  };
  watch('value', draw);
  draw();
}
"""

LOCAL_TIMES = """
{
  const form = new Intl.DateTimeFormat([], {dateStyle: 'medium', timeStyle: 'short'});
  const tell = () => {
    for (const time of element.querySelectorAll('time[datetime]')) {
      time.textContent = form.format(new Date(time.dateTime));
    }
  };
  watch('value', tell);
  tell();
}
"""
"""For a view with times: what Python wrote in UTC is shown as the visitor's clock has it."""


def segments(choices: Sequence[tuple[str, Any]], value: Any, label: str, **kwargs: Any) -> gr.Radio:
    """Radio buttons as one segmented control, without a visible label."""
    return gr.Radio(
        choices,
        value=value,
        label=label,
        show_label=False,
        container=False,
        elem_classes="candor-seg",
        **kwargs,
    )


def view(value: str = "", script: str = "", **kwargs: Any) -> gr.HTML:
    """HTML of our own making, with one delegated listener; its `select` brings what was clicked:
    {pos}, {pos, row}, {pos, fork}, {pos, ask}, {turn}, {run}, {run, pos} or {picked}. script: a
    block of its own that comes first."""
    return gr.HTML(value, js_on_load=script + js(), apply_default_css=False, **kwargs)


def growing(**kwargs: Any) -> gr.HTML:
    """A view whose HTML mostly grows at its end: the text of a run."""
    return gr.HTML(
        "",
        html_template='<div class="grown"></div>',
        js_on_load=_GROW + js(),
        apply_default_css=False,
        **kwargs,
    )


def figures(**kwargs: Any) -> gr.HTML:
    """A view that may hold charts."""
    return gr.HTML(
        "",
        js_on_load=_FIGURES + js(),
        apply_default_css=False,
        head=f'<script src="{PLOTLY}" defer></script>',
        **kwargs,
    )


def words(value: str = "", **kwargs: Any) -> gr.HTML:
    """HTML of our own making that nobody clicks."""
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **kwargs)


def chart(**kwargs: Any) -> gr.HTML:
    """A plotly figure, given as JSON; its `select` brings {pos}, the customdata of the point."""
    return gr.HTML(
        "",
        html_template='<div class="plot"></div>',
        apply_default_css=False,
        elem_classes="candor-curve",
        js_on_load=_CHART,
        head=f'<script src="{PLOTLY}" defer></script>',
        **kwargs,
    )


def enabled(needed: Any) -> gr.Button:
    """A button that can be pressed once there is something for it to work on."""
    return gr.Button(interactive=bool(needed))


def chosen(event: gr.EventData) -> dict[str, Any]:
    """What a view or a chart said in its `select`."""
    return dict(event._data or {})
