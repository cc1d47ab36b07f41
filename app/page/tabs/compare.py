"""The Compare tab: one prompt under several methods or settings, streamed side by side; or runs
that are already there."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.errors import BadInput
from analyzers.trace import Event
from app.page.context import PageContext
from app.page.forms import Form, build_form
from app.page.run_view import PICK_SIGNAL, TINTS, Outputs
from app.page.tabs import lanes
from app.page.tabs.ask import OPEN_PROMPT
from app.page.tabs.lanes import LanesTab
from app.page.widgets import QUIET, RESULT, segments, words
from app.runner import Job, Run
from visualizations import compare, legend
from visualizations.compare import Lane
from visualizations.signals import PROBABILITY, SIGNALS

LANES = 4
"""As many answers fit beside each other."""
BASELINE = ("sampling", {"temperature": 0.0})
NONE = "none"
FIRST_METHODS = ("sampling", "dola", NONE)
"""What the lanes beside the baseline offer first."""


class CompareTab(LanesTab):
    """The widgets of the tab, and what they do."""

    name = "compare"

    def __init__(self, ctx: PageContext, can_chat: gr.State) -> None:
        super().__init__(ctx, can_chat)
        self.methods = {
            each.name: each
            for each in registry.methods().values()
            if each.card.family in ("decoding", "contrast") and not each.card.takes
        }
        with gr.Row(elem_classes="candor-page"):
            with (
                gr.Column(scale=2, min_width=280, elem_classes="candor-left"),
                gr.Column(elem_classes="candor-card"),
            ):
                self._draw_form()
            with gr.Column(scale=7, min_width=340, elem_id="compare-view", elem_classes=RESULT):
                self._draw_answers()
        fields: set[Any] = {self.baseline, *self.picks}
        fields |= {w for forms in self.forms for form in forms for w in form.widgets.values()}
        self._listen(fields)

    # What is seen

    def _draw_form(self) -> None:
        self._draw_prompt(OPEN_PROMPT, "Compare")
        self.baseline = gr.Checkbox(True, label="Greedy baseline first", elem_id="compare-baseline")
        self.picks: list[gr.Dropdown] = []
        self.forms: list[list[Form]] = []
        for place, first in enumerate(FIRST_METHODS, start=1):
            first = first if first in self.methods else NONE
            self._draw_pick(place, first)
        self._draw_seed()

    def _draw_pick(self, place: int, first: str) -> None:
        titles = [(each.card.title, name) for name, each in self.methods.items()]
        self.picks.append(
            gr.Dropdown(
                [*titles, ("–", NONE)],
                value=first,
                label=f"Answer {place}",
                elem_id=f"compare-method-{place}",
            )
        )
        with gr.Accordion("Settings", open=False):
            self.forms.append(
                [build_form(each, name == first) for name, each in self.methods.items()]
            )

    def _draw_answers(self) -> None:
        with gr.Column(elem_classes="candor-card"):
            with gr.Row(elem_classes="candor-bar"):
                self.signal = segments(TINTS, PROBABILITY.name, "Tint by")
            self.key = words(legend.render(PROBABILITY))
            self._draw_state()
        self._draw_lanes([""] * LANES, "by-probability")
        self.table = words("", elem_id="compare-table")
        self._draw_panel()

    def _listen(self, fields: set[Any]) -> None:
        super()._listen(fields)
        for pick, forms in zip(self.picks, self.forms, strict=True):
            pick.change(lanes.shown(forms), [pick], [form.group for form in forms], **QUIET)
        self.signal.change(None, self.signal, None, js=PICK_SIGNAL % "#compare-view .candor-scope")
        self.signal.change(
            lambda name: legend.render(SIGNALS[name]), [self.signal], [self.key], **QUIET
        )

    @property
    def outputs(self) -> list[Any]:
        return [*super().outputs, self.table]

    # What happens

    def show(self, run_ids: Sequence[str]) -> Outputs:
        """Runs that are already there. Raises: BadInput for fewer than two, or more than fit;
        RunNotFound."""
        if not 2 <= len(run_ids) <= LANES:
            raise BadInput(f"Tick two to {LANES} runs to compare them, not {len(run_ids)}.")
        found = [[s.event for s in self.ctx.runner.events(id)] for id in run_ids]
        heads = [lanes.heading(lanes.name_of(events)) for events in found]
        return self._blank(heads) | self._whole(run_ids, found)

    def _jobs(self, given: Mapping[Any, Any], request: gr.Request) -> list[Job]:
        asked: list[tuple[str, Mapping[str, Any]]] = [BASELINE] if given[self.baseline] else []
        for pick, forms in zip(self.picks, self.forms, strict=True):
            if given[pick] != NONE:
                form = next(form for form in forms if form.method.name == given[pick])
                asked.append((form.method.name, form.values(given)))
        return [self._job(given, request, method, params) for method, params in asked]

    def _head(self, run: Run) -> str:
        return lanes.heading(lanes.title(run.job))

    def _blank(self, heads: Sequence[str]) -> Outputs:
        return super()._blank(heads) | {self.table: ""}

    def _whole(self, run_ids: Sequence[str], found: Sequence[Sequence[Event]]) -> Outputs:
        answers = [Lane(lanes.name_of(events), events) for events in found]
        whole: Outputs = {self.ids: tuple(run_ids), self.state: lanes.ended(found)}
        whole[self.table] = (
            f'<section class="candor candor-inside"><h3>Signals and costs</h3>'
            f"{compare.table(answers)}</section>"
        )
        for place, answer in enumerate(answers):
            whole[self.heads[place]] = lanes.heading(answer.name)
            whole[self.texts[place]] = compare.text(answer, answers[0] if place else None)
        return whole
