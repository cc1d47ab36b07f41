"""One run on the page: text, legend, curve, summary and token panel; live, stored or replayed."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from analyzers.errors import BadInput, CandorError
from analyzers.trace import Event, RunStarted, Token, surviving, text_of
from app.command import as_command
from app.page.context import PageContext
from app.page.widgets import QUIET, chart, chosen, enabled, figures, growing, segments, view, words
from app.runner import UPDATE_SECONDS, Fork, Job, ModelChoice, Run, Update
from sessions.numbers import export_csv
from visualizations import (
    curve,
    inside,
    legend,
    lens,
    origin,
    panel,
    status,
    summary,
    tokens,
    turns,
)
from visualizations.signals import PROBABILITY, SIGNALS

TINTS = [(each.label, each.name) for each in SIGNALS.values()]
ORIGIN = (origin.LABEL, origin.NAME)
COPY = "(text) => window.candorCopy(text)"
PICK_SIGNAL = """(name) => {
  for (const box of document.querySelectorAll('%s')) {
    box.className = box.className.replace(/\\bby-\\w+/, 'by-' + name);
  }
}"""
SHOW_SPACE = """(on) => {
  for (const box of document.querySelectorAll('%s')) box.classList.toggle('show-ws', on);
}"""

Outputs = dict[gr.blocks.Block, Any]
"""New values of widgets."""


@dataclass(frozen=True)
class RunView:
    """The widgets of one view, and what fills them. `run_id` is the run it shows, per visitor;
    `asked` tells the prompt of a stored run (a live one has it in the form beside)."""

    ctx: PageContext
    run_id: gr.State
    asked: gr.HTML
    answer: gr.HTML
    state: gr.HTML
    curve: gr.HTML
    lens: gr.HTML
    inside: gr.HTML
    summary: gr.HTML
    panel: gr.HTML
    signal: gr.Radio

    @property
    def outputs(self) -> list[gr.components.Component]:
        beside = [self.state, self.curve, self.lens, self.inside, self.summary, self.panel]
        return [self.run_id, self.asked, self.answer, *beside]

    def run(self, ask: Callable[[], Run], request: gr.Request, signal: str) -> Iterator[Outputs]:
        """Ask for a run and show it while it goes on; one run a visitor at a time. What cannot be
        done becomes a sentence in the state line, and nothing else changes."""
        session = request.session_hash or ""
        active = self.ctx.active
        try:
            if session in active and not active[session].over:
                raise BadInput("A run of yours is still going on: stop it first.")
            run = ask()
        except CandorError as error:
            yield {self.state: status.problem(str(error))}
            return
        active[session] = run
        yield from self._follow(run, signal)
        active.pop(session, None)

    def fork(
        self, run_id: str, signal: str, event: gr.EventData, request: gr.Request
    ) -> Iterator[Outputs]:
        """What a button of the panel asks for, as a new run: to go on from here with another token,
        or a method that looks at the token that stands there."""
        at, model = chosen(event), self.ctx.choice(request.session_hash)
        if "fork" in at or "ask" in at:

            def ask() -> Run:
                if "fork" in at:
                    job = fork_job(self.ctx, run_id, at["pos"], at["fork"], model)
                else:
                    job = look_job(self.ctx, run_id, at["pos"], at["ask"], model)
                return self.ctx.runner.submit(job)

            yield from self.run(ask, request, signal)

    def _follow(self, run: Run, signal: str) -> Iterator[Outputs]:
        growth = Growth(self)
        yield self._blank() | {self.state: status.waiting(0), self.answer: _text("", live=True)}
        try:
            for update in run.updates():
                new = [stamped.event for stamped in update.new]
                beside = {self.run_id: run.id, self.state: _live(run, update)}
                yield growth.add(new) | beside
        except CandorError as error:
            yield {self.state: status.problem(str(error)), self.answer: _text(live=False)}
            return
        yield {self.answer: _text(live=False)}
        yield self._whole([stamped.event for stamped in run.events], run.id, signal)

    def show(self, run_id: str, signal: str) -> Outputs:
        """A finished run, at once. Raises: RunNotFound."""
        events = [stamped.event for stamped in self.ctx.runner.events(run_id)]
        drawn = {self.asked: turns.asked(events), self.answer: tokens.render(events)}
        return self._blank() | drawn | self._whole(events, run_id, signal)

    def replay(
        self, run_id: str, speed: float, going_on: Callable[[], bool], signal: str
    ) -> Iterator[Outputs]:
        """The recorded run token by token, `speed` times as fast as it was; needs no model."""
        stamped = self.ctx.runner.events(run_id)
        growth = Growth(self)
        began, shown = time.monotonic(), 0
        asked = turns.asked([each.event for each in stamped])
        yield self._blank() | {self.run_id: run_id, self.asked: asked}
        while shown < len(stamped) and going_on():
            now = (time.monotonic() - began) * speed
            due = [each for each in stamped[shown:] if each.t <= now]
            shown += len(due)
            state = {self.state: status.replaying(shown, len(stamped), speed)}
            yield growth.add([each.event for each in due]) | state
            time.sleep(UPDATE_SECONDS)
        yield self.show(run_id, signal)

    def _whole(self, events: Sequence[Event], run_id: str, signal: str) -> Outputs:
        """What stands beside the text when a run has ended."""
        return {
            self.run_id: run_id,
            self.curve: _curve(events, signal),
            self.lens: _titled(lens.render(events)) if lens.fits(events) else "",
            self.inside: inside.render(events),
            self.summary: summary.render(summary.summarize(events)),
            self.state: status.ended(events, run_id, self.ctx.runner.recorder.problem),
        }

    def _blank(self) -> Outputs:
        return {
            self.asked: "",
            self.answer: "",
            self.curve: "",
            self.lens: "",
            self.inside: "",
            self.summary: summary.render(summary.summarize([])),
            self.panel: panel.empty(),
        }


class Growth:
    """What grows in a view while the events of a run come in."""

    def __init__(self, shown: RunView) -> None:
        self._shown = shown
        self._text, self._layers = tokens.TokenView(), lens.LensView()
        self._events: list[Event] = []

    def add(self, new: Sequence[Event]) -> Outputs:
        self._events += new
        grown: Outputs = {
            self._shown.answer: self._text.add(new),
            self._shown.lens: _titled(self._layers.add(new)),
        }
        if drawn := inside.growing(self._events):
            grown[self._shown.inside] = drawn
        return grown


def build_view(ctx: PageContext, name: str, tint: str = PROBABILITY.name) -> RunView:
    """Draw an empty view; `name` makes its ids. tint: the signal that is shown first."""
    scope = f"#{name}-view"
    with gr.Row(elem_id=f"{name}-view", elem_classes=f"candor-scope by-{tint}"):
        with gr.Column(scale=5, min_width=340, elem_classes="candor-middle"):
            with gr.Column(elem_classes="candor-card"):
                with gr.Row(elem_classes="candor-bar"):
                    signal = segments([*TINTS, ORIGIN], tint, "Tint by")
                    spaces = gr.Checkbox(
                        False, label="Show white space", container=False, min_width=150, scale=0
                    )
                key = words(_legend(tint))
                asked = words("", elem_id=f"{name}-asked")
                answer = growing(elem_id=f"{name}-answer", elem_classes="candor-text")
                state = words("", elem_id=f"{name}-state", elem_classes="candor-state")
                plot = chart(elem_id=f"{name}-curve")
                with gr.Row(elem_classes="candor-actions"):
                    copy = gr.Button("Copy answer", size="sm", interactive=False)
                    command = gr.Button("Copy as command", size="sm", interactive=False)
                    save = gr.Button(
                        "Numbers as CSV", size="sm", interactive=False, elem_id=f"{name}-save"
                    )
                saved = gr.File(label="Numbers", visible=False, elem_id=f"{name}-saved")
            layers = growing(elem_id=f"{name}-lens", elem_classes="candor-growing")
            within = figures(elem_id=f"{name}-inside", elem_classes="candor-views")
            numbers = view(summary.render(summary.summarize([])), elem_id=f"{name}-summary")
        with gr.Column(scale=2, min_width=290, elem_classes="candor-card candor-right"):
            opened = view(panel.empty(), elem_id=f"{name}-panel")
    run_id = gr.State("")
    clip = gr.Textbox(visible=False)
    made = RunView(ctx, run_id, asked, answer, state, plot, layers, within, numbers, opened, signal)

    def recolour(run_id: str, chosen_signal: str) -> tuple[str, str]:
        events = _events(ctx, run_id)
        return _legend(chosen_signal), _curve(events, chosen_signal)

    def open_token(run_id: str, event: gr.EventData) -> str:
        at = chosen(event)
        return token_panel(ctx, run_id, at.get("pos"), at.get("row"))

    def write(run_id: str) -> gr.File:
        if not run_id:
            return gr.File(visible=False)
        out = ctx.files / f"candor-{run_id}.csv"
        export_csv(ctx.store, [run_id], out)
        return gr.File(str(out), visible=True)

    save.click(write, [run_id], [saved], **QUIET)
    run_id.change(
        lambda id: [gr.File(visible=False), *[enabled(id)] * 3],
        [run_id],
        [saved, copy, command, save],
        **QUIET,
    )
    signal.change(None, signal, None, js=PICK_SIGNAL % scope)
    signal.change(recolour, [run_id, signal], [key, plot], **QUIET)
    spaces.change(None, spaces, None, js=SHOW_SPACE % scope)
    for clickable in (answer, plot, layers, within, numbers):
        clickable.select(open_token, [run_id], [opened], **QUIET)
    copy.click(lambda id: text_of(_events(ctx, id)), [run_id], [clip], **QUIET).then(
        None, [clip], None, js=COPY
    )
    command.click(lambda id: as_command(_events(ctx, id)), [run_id], [clip], **QUIET).then(
        None, [clip], None, js=COPY
    )
    return made


def fork_job(ctx: PageContext, run_id: str, pos: int, id: int, model: ModelChoice) -> Job:
    """Continue a run with another token, by its own method and settings; a text that was only
    read is continued by sampling."""
    started = next(event for event in _events(ctx, run_id) if isinstance(event, RunStarted))
    same = started.method != "read"
    return Job(
        started.method if same else "sampling",
        params=started.params if same else {},
        seed=started.seed,
        model=model,
        fork=Fork(run_id, pos, id),
    )


def look_job(ctx: PageContext, run_id: str, pos: int, method: str, model: ModelChoice) -> Job:
    """Look at the token at `pos` of a run with a method that explains one token.

    Raises: BadInput when no token stands there."""
    token = next((each for each in surviving(_events(ctx, run_id)) if each.pos == pos), None)
    if token is None:
        raise BadInput(f"No token stands at position {pos}.")
    return Job(method, model=model, fork=Fork(run_id, pos, token.id))


def _events(ctx: PageContext, run_id: str) -> list[Event]:
    return [stamped.event for stamped in ctx.runner.events(run_id)] if run_id else []


def _legend(name: str) -> str:
    return origin.legend() if name == origin.NAME else legend.render(SIGNALS[name])


def _curve(events: Sequence[Event], name: str) -> str:
    """The chart below the text; "" where there is nothing to draw."""
    if not surviving(events):
        return ""
    by_origin = name == origin.NAME
    drawn = origin.figure(events) if by_origin else curve.figure(events, SIGNALS[name])
    return curve.to_json(drawn) if drawn else ""


def token_panel(
    ctx: PageContext, run_id: str, pos: int | None, row: int | None = None, elsewhere: bool = False
) -> str:
    """The token at `pos`, what else was likely there, and what the views inside know of it (and of
    one row of it). elsewhere: the run can be continued in History only."""
    events = _events(ctx, run_id)
    found = [token for token in surviving(events) if token.pos == pos]
    if not found or pos is None:
        return panel.empty()
    live = ctx.runner.live(run_id)
    token = panel.render(
        found[0],
        f"Token {pos}",
        can_fork=not live,
        why_not="the run still goes on",
        elsewhere=run_id if elsewhere and not live else "",
    )
    more = inside.detail(events, pos, row)
    return more + token if row is not None else token + more


def _titled(layers: str) -> str:
    """The growing view with its heading in front, so that it still grows at its end."""
    return f"<h3>{lens.TITLE}</h3>{layers}" if layers else ""


def _text(*value: str, live: bool) -> gr.HTML:
    """An update of the answer with a blinking caret behind it, or without."""
    return gr.HTML(*value, elem_classes=["candor-text", "live"] if live else ["candor-text"])


def _live(run: Run, update: Update) -> str:
    if not run.id and not update.doing:
        return status.waiting(update.ahead)
    if update.doing:
        return status.doing(update.doing, update.share)
    written = sum(isinstance(stamped.event, Token) for stamped in run.events)
    started = next(s.event for s in run.events if isinstance(s.event, RunStarted))
    line = status.writing(written, run.events[-1].t, started.seed)
    return line + (status.problem(update.unsaved) if update.unsaved else "")
