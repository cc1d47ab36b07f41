"""The Race tab: one prompt decoded plainly and with drafts, each lane with a clock of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.params import build, knobs
from analyzers.trace import Event
from app.page import methods
from app.page.context import PageContext
from app.page.forms import build_form
from app.page.run_view import Outputs
from app.page.tabs import lanes
from app.page.tabs.lanes import LanesTab
from app.page.widgets import QUIET, RESULT, words
from app.runner import Job, Run
from visualizations import origin, race
from visualizations.compare import Lane

PLAIN, PLAINLY = "sampling", "Plain decoding"
UNFILTERED = {"temperature": 0.0, "top_p": 1.0}
"""What plain decoding does where the other method has no such knob."""
FIRST_METHOD = "prompt_lookup"
PROMPT = (
    "Correct the spelling mistakes in this text and write it out in full:\n\n"
    "The keeper of the lighthouse lit the lamp at dusk and put out the lamp at dawn. When the fog "
    "came in, the keeper of the lighthouse rang the bell evry two minuts, and when the fog went "
    "out, the keeper of the lighthouse wrote the time in the log. In 1907 the lamp was lit by "
    "electricity, and the keeper of the lighthouse left."
)
"""One whose answer is mostly in it, so that drafts are often right."""
HINT = (
    '<p class="candor-hint x-race-hint">Both lanes share one model, so a clock counts only the '
    "seconds that the model worked for its lane, reading the prompt included; it stands still "
    "while the other has its turn. Turns are given so that each gets as far as it would alone. "
    "Both use the same prompt, seed and settings.</p>"
)


class RaceTab(LanesTab):
    """The widgets of the tab, and what they do.

    Only methods that check their drafts race: the others do not write what plain decoding writes.
    """

    name = "race"
    fair = True

    def __init__(self, ctx: PageContext, can_chat: gr.State) -> None:
        super().__init__(ctx, can_chat)
        self.methods = {
            each.name: each
            for each in registry.methods().values()
            if each.card.family == "drafting" and "tree" in each.card.needs and not each.card.takes
        }
        with gr.Row(elem_classes="candor-page"):
            with (
                gr.Column(scale=2, min_width=280, elem_classes="candor-left"),
                gr.Column(elem_classes="candor-card"),
            ):
                self._draw_form()
            with gr.Column(scale=7, min_width=340, elem_id="race-view", elem_classes=RESULT):
                self._draw_track()
        widgets = {widget for form in self.forms for widget in form.widgets.values()}
        self._listen({self.method, *widgets})

    # What is seen

    def _draw_form(self) -> None:
        self._draw_prompt(PROMPT, "Race")
        first = FIRST_METHOD if FIRST_METHOD in self.methods else next(iter(self.methods))
        self.method = gr.Dropdown(
            [(each.card.title, name) for name, each in self.methods.items()],
            value=first,
            label="Drafts against plain decoding",
            elem_id="race-method",
        )
        self.about = words(methods.about(self.methods[first]))
        self.forms = [build_form(each, name == first) for name, each in self.methods.items()]
        self._draw_seed()

    def _draw_track(self) -> None:
        self._draw_state()
        self.verdict = words("", elem_id="race-verdict")
        heads = [race.head(name, [], 0.0) for name in (PLAINLY, "With drafts")]
        self._draw_lanes(heads, f"by-{origin.NAME}")
        with gr.Column(elem_classes="candor-card"):
            words(origin.legend() + HINT)
        self._draw_panel()

    def _listen(self, fields: set[Any]) -> None:
        super()._listen(fields)
        groups = [form.group for form in self.forms]
        self.method.change(lanes.shown(self.forms), [self.method], groups, **QUIET)
        self.method.change(
            lambda name: methods.about(self.methods[name]), [self.method], [self.about], **QUIET
        )

    @property
    def outputs(self) -> list[Any]:
        return [*super().outputs, self.verdict]

    # What happens

    def _jobs(self, given: Mapping[Any, Any], request: gr.Request) -> list[Job]:
        form = next(form for form in self.forms if form.method.name == given[self.method])
        drafted = self._job(given, request, form.method.name, form.values(given))
        plain = self._job(given, request, PLAIN, plainly(drafted))
        return [plain, drafted]

    def _head(self, run: Run) -> str:
        name = PLAINLY if run.job.method == PLAIN else lanes.title(run.job)
        return race.head(name, [stamped.event for stamped in run.events], run.seconds)

    def _blank(self, heads: Sequence[str]) -> Outputs:
        return super()._blank(heads) | {self.verdict: ""}

    def _whole(self, run_ids: Sequence[str], found: Sequence[Sequence[Event]]) -> Outputs:
        plain, drafted = Lane(PLAINLY, found[0]), Lane(lanes.name_of(found[1]), found[1])
        first = race.winner(plain, drafted)
        whole: Outputs = {self.ids: tuple(run_ids), self.state: lanes.ended(found)}
        whole[self.verdict] = race.verdict(plain, drafted)
        for place, lane in enumerate((plain, drafted)):
            badge = "faster" if lane is first else ""
            whole[self.heads[place]] = race.head(lane.name, lane.events, 0.0, badge)
        return whole


def plainly(drafted: Job) -> dict[str, Any]:
    """The settings of plain decoding that go with those of the other. Raises: BadParameter."""
    params: Any = build(registry.method(drafted.method).params, drafted.params)
    shared = [row.name for row in knobs(registry.method(PLAIN).params) if hasattr(params, row.name)]
    return UNFILTERED | {name: getattr(params, name) for name in shared}
