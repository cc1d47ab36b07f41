"""The Compare tab: one prompt under several methods or settings, streamed side by side; or runs
that are already there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.errors import BadInput, CandorError
from analyzers.params import knobs
from analyzers.registry import Method
from analyzers.task import Task, chat
from analyzers.trace import Event, RunEnded, RunStarted
from app.page.context import PageContext
from app.page.forms import Form, build_form
from app.page.run_view import PICK_SIGNAL, TINTS, Outputs, token_panel
from app.page.tabs.ask import MODES, OPEN_PROMPT, read_seed
from app.page.widgets import ENGINE, QUIET, chosen, growing, segments, view, words
from app.runner import Job, Run, Together, Update
from visualizations import compare, legend, panel, status, tokens
from visualizations.compare import Lane
from visualizations.signals import PROBABILITY, SIGNALS
from visualizations.text import escape

LANES = 4
"""As many answers fit beside each other."""
BASELINE = ("sampling", {"temperature": 0.0})
NONE = "none"
FIRST_METHODS = ("sampling", "dola", NONE)
"""What the lanes beside the baseline offer first."""
WHY_NOT_HERE = "open this run in History for that"


class CompareTab:
    """The widgets of the tab, and what they do."""

    def __init__(self, ctx: PageContext, can_chat: gr.State) -> None:
        self.ctx = ctx
        self.can_chat = can_chat
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
            with gr.Column(scale=7, min_width=340, elem_id="compare-view"):
                self._draw_lanes()
        self.ids = gr.State(())
        self._listen()

    # What is seen

    def _draw_form(self) -> None:
        self.mode = segments(MODES, "chat", "Kind of prompt", elem_id="compare-mode")
        self.prompt = gr.Textbox(
            OPEN_PROMPT,
            label="Prompt (Ctrl + Enter runs)",
            lines=3,
            max_lines=12,
            elem_id="compare-prompt",
        )
        with gr.Row():
            self.go = gr.Button(
                "Compare",
                variant="primary",
                min_width=80,
                elem_id="compare-run",
                elem_classes="candor-run",
            )
            self.halt = gr.Button("Stop", interactive=False, min_width=80, elem_id="compare-stop")
        self.baseline = gr.Checkbox(True, label="Greedy baseline first", elem_id="compare-baseline")
        self.picks: list[gr.Dropdown] = []
        self.forms: list[list[Form]] = []
        for place, first in enumerate(FIRST_METHODS, start=1):
            first = first if first in self.methods else NONE
            self._draw_pick(place, first)
        self.seed = gr.Textbox(
            "", label="Seed of all", placeholder="new each time", elem_id="compare-seed"
        )

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

    def _draw_lanes(self) -> None:
        with gr.Column(elem_classes="candor-card"):
            with gr.Row(elem_classes="candor-bar"):
                self.signal = segments(TINTS, PROBABILITY.name, "Tint by")
            self.key = words(legend.render(PROBABILITY))
            self.state = words("", elem_id="compare-state", elem_classes="candor-state")
        self.columns: list[gr.Column] = []
        self.names: list[gr.HTML] = []
        self.texts: list[gr.HTML] = []
        with gr.Row(elem_classes="candor-lanes"):
            for place in range(LANES):
                with gr.Column(
                    visible=place < 2,
                    min_width=230,
                    elem_classes="candor-scope candor-card by-probability candor-lane",
                ) as column:
                    self.names.append(words("", elem_id=f"compare-name-{place}"))
                    text = growing(elem_id=f"compare-text-{place}", elem_classes="candor-text")
                    self.texts.append(text)
                self.columns.append(column)
        self.table = words("", elem_id="compare-table")
        with gr.Column(elem_classes="candor-card"):
            self.panel = view(panel.empty(), elem_id="compare-panel")

    def _listen(self) -> None:
        fields: set[Any] = {self.mode, self.prompt, self.baseline, self.seed, *self.picks}
        fields |= {w for forms in self.forms for form in forms for w in form.widgets.values()}
        self.go.click(
            self.start, fields, [*self.outputs, self.go, self.halt], api_name="compare", **ENGINE
        )
        self.halt.click(self.stop, None, None, **QUIET)
        for pick, forms in zip(self.picks, self.forms, strict=True):
            pick.change(_shown(forms), [pick], [form.group for form in forms], **QUIET)
        for place, text in enumerate(self.texts):
            text.select(self._opener(place), [self.ids], [self.panel], **QUIET)
        self.signal.change(None, self.signal, None, js=PICK_SIGNAL % "#compare-view .candor-scope")
        self.signal.change(
            lambda name: legend.render(SIGNALS[name]), [self.signal], [self.key], **QUIET
        )
        self.can_chat.change(
            lambda can: gr.Radio(MODES if can else MODES[1:], value="chat" if can else "raw"),
            [self.can_chat],
            [self.mode],
            **QUIET,
        )

    @property
    def outputs(self) -> list[Any]:
        """What a comparison fills."""
        each = [*self.columns, *self.names, *self.texts]
        return [self.ids, self.state, self.table, self.panel, *each]

    # What happens

    def start(self, given: Mapping[Any, Any], request: gr.Request) -> Iterator[Outputs]:
        session = request.session_hash or ""
        active = self.ctx.active
        try:
            if session in active and not active[session].over:
                raise BadInput("A run of yours is still going on: stop it first.")
            jobs = self._jobs(given, request)
            together = self.ctx.runner.submit_together(jobs)
        except CandorError as error:
            yield {self.state: status.problem(str(error))}
            return
        active[session] = together
        yield {self.go: gr.Button(interactive=False), self.halt: gr.Button(interactive=True)}
        yield from self._follow(together)
        active.pop(session, None)
        yield {self.go: gr.Button(interactive=True), self.halt: gr.Button(interactive=False)}

    def stop(self, request: gr.Request) -> None:
        self.ctx.stop(request.session_hash, "stopped by you")

    def show(self, run_ids: Sequence[str]) -> Outputs:
        """Runs that are already there. Raises: BadInput for fewer than two, or more than fit;
        RunNotFound."""
        if not 2 <= len(run_ids) <= LANES:
            raise BadInput(f"Tick two to {LANES} runs to compare them, not {len(run_ids)}.")
        found = [[s.event for s in self.ctx.runner.events(id)] for id in run_ids]
        return self._blank([_name(events) for events in found]) | self._whole(run_ids, found)

    def _jobs(self, given: Mapping[Any, Any], request: gr.Request) -> list[Job]:
        prompt, raw = given[self.prompt], given[self.mode] == "raw"
        task = Task(prompt if raw else chat(prompt))
        asked = [BASELINE] if given[self.baseline] else []
        for pick, forms in zip(self.picks, self.forms, strict=True):
            if given[pick] != NONE:
                form = next(form for form in forms if form.method.name == given[pick])
                asked.append((form.method.name, form.values(given)))
        seed = read_seed(given[self.seed])
        model = self.ctx.choice(request.session_hash)
        owner = request.username or ""
        return [
            Job(method, task, params, seed=seed, model=model, owner=owner)
            for method, params in asked
        ]

    def _follow(self, together: Together) -> Iterator[Outputs]:
        runs = together.runs
        views, seen = [tokens.TokenView() for _ in runs], [0] * len(runs)
        yield self._blank([_title(run.job) for run in runs]) | {self.state: status.waiting(0)}
        try:
            for update in together.updates():
                found: Outputs = {self.state: _live(runs, update)}
                for place, run in enumerate(runs):
                    new = [stamped.event for stamped in run.events[seen[place] :]]
                    seen[place] += len(new)
                    if new:
                        found[self.texts[place]] = views[place].add(new)
                yield found
        except CandorError as error:
            yield {self.state: status.problem(str(error))}
            return
        events = [[stamped.event for stamped in run.events] for run in runs]
        yield self._whole([run.id for run in runs], events)

    def _blank(self, names: Sequence[str]) -> Outputs:
        blank: Outputs = {self.ids: (), self.table: "", self.panel: panel.empty(), self.state: ""}
        for place in range(LANES):
            here = place < len(names)
            blank[self.columns[place]] = gr.Column(visible=here)
            blank[self.names[place]] = _heading(names[place]) if here else ""
            blank[self.texts[place]] = ""
        return blank

    def _whole(self, run_ids: Sequence[str], found: Sequence[Sequence[Event]]) -> Outputs:
        lanes = [Lane(_name(events), events) for events in found]
        whole: Outputs = {self.ids: tuple(run_ids), self.state: _ended(found)}
        whole[self.table] = (
            f'<section class="candor candor-inside"><h3>Signals and costs</h3>'
            f"{compare.table(lanes)}</section>"
        )
        for place, lane in enumerate(lanes):
            whole[self.names[place]] = _heading(lane.name)
            whole[self.texts[place]] = compare.text(lane, lanes[0] if place else None)
        return whole

    def _opener(self, place: int) -> Callable[[tuple[str, ...], gr.EventData], str]:
        def open_token(ids: tuple[str, ...], event: gr.EventData) -> str:
            if place >= len(ids):
                return panel.empty()
            at = chosen(event)
            return token_panel(
                self.ctx, ids[place], at.get("pos"), at.get("row"), why_not=WHY_NOT_HERE
            )

        return open_token


def _shown(forms: Sequence[Form]) -> Callable[[str], list[gr.Column]]:
    return lambda name: [gr.Column(visible=form.method.name == name) for form in forms]


def _heading(name: str) -> str:
    return f'<h4 class="candor-lane-name">{escape(name)}</h4>'


def _title(job: Job) -> str:
    return _called(registry.method(job.method), job.params)


def _name(events: Sequence[Event]) -> str:
    """The method of a run, and what is not at its default."""
    started = next(event for event in events if isinstance(event, RunStarted))
    known = registry.methods()
    if started.method not in known:
        return started.method
    return _called(known[started.method], started.params)


def _called(method: Method, params: Mapping[str, Any]) -> str:
    defaults = {row.name: (row.default, row.label.lower()) for row in knobs(method.params)}
    other = [
        f"{defaults[name][1]} {value:g}"
        if isinstance(value, float)
        else f"{defaults[name][1]} {value}"
        for name, value in params.items()
        if name in defaults and value != defaults[name][0]
    ]
    return " · ".join([method.card.title, *other[:3]])


def _live(runs: Sequence[Run], update: Update) -> str:
    if update.doing:
        return status.doing(update.doing, update.share)
    if not any(run.id for run in runs):
        return status.waiting(update.ahead)
    return status.comparing(sum(not run.over for run in runs), len(runs))


def _ended(found: Sequence[Sequence[Event]]) -> str:
    ends = [event for events in found for event in events if isinstance(event, RunEnded)]
    return status.compared([ended.status for ended in ends])
