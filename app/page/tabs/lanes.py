"""What Compare and Race share: runs that take turns, each written in a lane of its own."""

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
from app.page.forms import Form
from app.page.run_view import Outputs, token_panel
from app.page.tabs.ask import MODES, read_seed
from app.page.widgets import ENGINE, QUIET, chosen, growing, segments, view, words
from app.runner import Job, Run, Together, Update
from visualizations import panel, status, tokens
from visualizations.text import escape


class LanesTab:
    """The widgets of such a tab, and what they do.

    A tab derives from it: it draws the parts where it wants them, and says what to run (`_jobs`),
    what stands over a lane (`_head`), and what is seen when all runs are over (`_whole`). `name`
    makes the ids of the widgets; `fair`: whether turns go by the time used.
    """

    name = ""
    fair = False

    def __init__(self, ctx: PageContext, can_chat: gr.State) -> None:
        self.ctx = ctx
        self.can_chat = can_chat
        self.ids = gr.State(())

    def _id(self, of: str | int) -> str:
        return f"{self.name}-{of}"

    # What is seen

    def _draw_prompt(self, first: str, go: str) -> None:
        """go: what the button says that starts it."""
        self.mode = segments(MODES, "chat", "Kind of prompt", elem_id=self._id("mode"))
        self.prompt = gr.Textbox(
            first,
            label="Prompt (Ctrl + Enter runs)",
            lines=3,
            max_lines=12,
            elem_id=self._id("prompt"),
        )
        with gr.Row():
            self.go = gr.Button(
                go,
                variant="primary",
                min_width=80,
                elem_id=self._id("run"),
                elem_classes="candor-run",
            )
            self.halt = gr.Button("Stop", interactive=False, min_width=80, elem_id=self._id("stop"))

    def _draw_seed(self) -> None:
        self.seed = gr.Textbox(
            "", label="Seed of all", placeholder="new each time", elem_id=self._id("seed")
        )

    def _draw_state(self) -> None:
        self.state = words("", elem_id=self._id("state"), elem_classes="candor-state")

    def _draw_lanes(self, heads: Sequence[str], tint: str) -> None:
        """As many lanes as heads; two of them are seen at first. tint: the class that picks what
        the text shows."""
        self.columns: list[gr.Column] = []
        self.heads: list[gr.HTML] = []
        self.texts: list[gr.HTML] = []
        with gr.Row(elem_classes="candor-lanes"):
            for place, head in enumerate(heads):
                with gr.Column(
                    visible=place < 2,
                    min_width=230,
                    elem_classes=f"candor-scope candor-card {tint} candor-lane",
                ) as column:
                    self.heads.append(words(head, elem_id=self._id(f"name-{place}")))
                    text = growing(elem_id=self._id(f"text-{place}"), elem_classes="candor-text")
                    self.texts.append(text)
                self.columns.append(column)

    def _draw_panel(self) -> None:
        with gr.Column(elem_classes="candor-card"):
            self.panel = view(panel.empty(), elem_id=self._id("panel"))

    def _listen(self, fields: set[Any]) -> None:
        """fields: what else `_jobs` reads."""
        self.go.click(
            self.start,
            {self.mode, self.prompt, self.seed, *fields},
            [*self.outputs, self.go, self.halt],
            api_name=self.name,
            **ENGINE,
        )
        self.halt.click(self.stop, None, None, **QUIET)
        for place, text in enumerate(self.texts):
            text.select(self._opener(place), [self.ids], [self.panel], **QUIET)
        self.can_chat.change(
            lambda can: gr.Radio(MODES if can else MODES[1:], value="chat" if can else "raw"),
            [self.can_chat],
            [self.mode],
            **QUIET,
        )

    @property
    def outputs(self) -> list[Any]:
        """What the runs fill."""
        each = [*self.columns, *self.heads, *self.texts]
        return [self.ids, self.state, self.panel, *each]

    # What happens

    def start(self, given: Mapping[Any, Any], request: gr.Request) -> Iterator[Outputs]:
        session = request.session_hash or ""
        active = self.ctx.active
        try:
            if session in active and not active[session].over:
                raise BadInput("A run of yours is still going on: stop it first.")
            jobs = self._jobs(given, request)
            together = self.ctx.runner.submit_together(jobs, fair=self.fair)
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

    def _follow(self, together: Together) -> Iterator[Outputs]:
        runs = together.runs
        views, seen = [tokens.TokenView() for _ in runs], [0] * len(runs)
        yield self._blank([self._head(run) for run in runs]) | {self.state: status.waiting(0)}
        try:
            for update in together.updates():
                found: Outputs = {self.state: _live(runs, update)}
                for place, run in enumerate(runs):
                    new = [stamped.event for stamped in run.events[seen[place] :]]
                    seen[place] += len(new)
                    found[self.heads[place]] = self._head(run)
                    if new:
                        found[self.texts[place]] = views[place].add(new)
                yield found
        except CandorError as error:
            yield {self.state: status.problem(str(error))}
            return
        events = [[stamped.event for stamped in run.events] for run in runs]
        yield self._whole([run.id for run in runs], events)

    def _task(self, given: Mapping[Any, Any]) -> Task:
        prompt = given[self.prompt]
        return Task(prompt if given[self.mode] == "raw" else chat(prompt))

    def _job(
        self,
        given: Mapping[Any, Any],
        request: gr.Request,
        method: str,
        params: Mapping[str, Any],
    ) -> Job:
        """Raises: BadInput for a seed that is no number."""
        return Job(
            method,
            self._task(given),
            params,
            seed=read_seed(given[self.seed]),
            model=self.ctx.choice(request.session_hash),
            owner=request.username or "",
        )

    def _blank(self, heads: Sequence[str]) -> Outputs:
        """As many lanes as there are heads, and nothing in them."""
        blank: Outputs = {self.ids: (), self.panel: panel.empty(), self.state: ""}
        for place, column in enumerate(self.columns):
            here = place < len(heads)
            blank[column] = gr.Column(visible=here)
            blank[self.heads[place]] = heads[place] if here else ""
            blank[self.texts[place]] = ""
        return blank

    def _opener(self, place: int) -> Callable[[tuple[str, ...], gr.EventData], str]:
        def open_token(ids: tuple[str, ...], event: gr.EventData) -> str:
            if place >= len(ids):
                return panel.empty()
            at = chosen(event)
            return token_panel(self.ctx, ids[place], at.get("pos"), at.get("row"), elsewhere=True)

        return open_token

    # What each tab says

    def _jobs(self, given: Mapping[Any, Any], request: gr.Request) -> list[Job]:
        """Raises: BadInput."""
        raise NotImplementedError

    def _head(self, run: Run) -> str:
        """While it goes on, and before."""
        raise NotImplementedError

    def _whole(self, run_ids: Sequence[str], found: Sequence[Sequence[Event]]) -> Outputs:
        """found: the events of each run."""
        raise NotImplementedError


def shown(forms: Sequence[Form]) -> Callable[[str], list[gr.Column]]:
    """Shows the form of a method by its name, and hides the others."""
    return lambda name: [gr.Column(visible=form.method.name == name) for form in forms]


def heading(name: str) -> str:
    return f'<h4 class="candor-lane-name">{escape(name)}</h4>'


def title(job: Job) -> str:
    return _called(registry.method(job.method), job.params)


def name_of(events: Sequence[Event]) -> str:
    """The method of a run, and what is not at its default."""
    started = next(event for event in events if isinstance(event, RunStarted))
    known = registry.methods()
    if started.method not in known:
        return started.method
    return _called(known[started.method], started.params)


def ended(found: Sequence[Sequence[Event]]) -> str:
    """How several runs ended."""
    ends = [event for events in found for event in events if isinstance(event, RunEnded)]
    return status.compared([each.status for each in ends])


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
