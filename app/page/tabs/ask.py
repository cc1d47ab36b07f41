"""A tab that asks: a prompt, a method of some families, and the run it makes.

Generate and "Layers & experts" are this tab with other methods; what a run shows beside its text
follows from its events.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.card import Family
from analyzers.errors import BadInput, StoreError
from analyzers.task import Task, chat
from analyzers.trace import RunStarted, Turn, text_of
from app.estimate import estimate
from app.page import methods
from app.page.context import PageContext
from app.page.forms import Form, build_form
from app.page.run_view import Outputs, build_view
from app.page.widgets import ENGINE, QUIET, RESULT, chosen, enabled, segments, view, words
from app.runner import Job, Run
from visualizations import status, turns
from visualizations.signals import PROBABILITY

FIRST_PROMPT = "What is the capital of Kenya, and since when?"
CAPITAL_PROMPT = "What is the capital of Australia?"
OPEN_PROMPT = "Is it dangerous to swallow chewing gum?"
"""One that several answers fit, so that a method can change the answer."""
ADVICE_PROMPT = "How do I stay safe on a long hike alone?"
"""One whose answers may be more or less careful."""
FIRST_INPUTS = {
    "passage": "Mombasa was the first capital of the East Africa Protectorate. In 1905 the British "
    "moved their administration up the railway to Nairobi, a depot in a cool swamp, and Nairobi "
    "stayed the capital when Kenya became independent on 12 December 1963."
}
MODES = [("Chat", "chat"), ("Text", "raw")]


@dataclass(frozen=True)
class Asking:
    """What makes one of these tabs: its title, the name that makes the ids of its widgets, the
    families of its methods, and the method, the prompt and the tint that are offered first."""

    title: str
    name: str
    families: tuple[Family, ...]
    method: str
    prompt: str
    tint: str = PROBABILITY.name


def build(ctx: PageContext, can_chat: gr.State, model: gr.State, asking: Asking) -> None:
    """can_chat, model: see `ModelBar`."""
    with gr.Row(elem_classes="candor-page"):
        AskTab(ctx, can_chat, model, asking)


class AskTab:
    """The widgets of the tab, and what they do. `earlier` holds a visitor's earlier turns."""

    def __init__(
        self, ctx: PageContext, can_chat: gr.State, model: gr.State, asking: Asking
    ) -> None:
        self.ctx = ctx
        self.can_chat, self.model = can_chat, model
        self.asking = asking
        self.name, self.first = asking.name, asking.method
        self.methods = {
            each.name: each
            for each in registry.methods().values()
            if each.card.family in asking.families
        }
        with gr.Column(scale=2, min_width=280, elem_classes="candor-left"):
            with gr.Column(elem_classes="candor-card"):
                self._draw_prompt()
                self._draw_buttons()
                self._draw_method()
            self.more = gr.Button(
                "Continue this conversation",
                size="sm",
                interactive=False,
                elem_id=self._id("continue"),
            )
        with gr.Column(scale=7, min_width=340, elem_classes=RESULT):
            self.shown = build_view(ctx, self.name, asking.tint)
        self.earlier = gr.State(())
        self._listen()

    def _id(self, of: str) -> str:
        return f"{self.name}-{of}"

    # What is seen

    def _draw_prompt(self) -> None:
        self.mode = segments(MODES, "chat", "Kind of prompt", elem_id=self._id("mode"))
        self.text_only = words(
            '<p class="candor-hint">This model has no chat template: it goes on from a text.</p>',
            visible=False,
            elem_id=self._id("text-only"),
        )
        self.talk = view(elem_id=self._id("talk"))
        with gr.Accordion("System prompt", open=False) as self.system_box:
            self.system = gr.Textbox(
                "",
                show_label=False,
                label="System prompt",
                placeholder="How the model should behave (empty: the model's own default)",
                lines=2,
                container=False,
                elem_id=self._id("system"),
            )
        self.prompt = gr.Textbox(
            self.asking.prompt,
            label="Prompt (Ctrl + Enter runs)",
            lines=3,
            max_lines=12,
            elem_id=self._id("prompt"),
        )
        self._draw_inputs()
        with gr.Accordion("Begin the answer", open=False):
            self.prefix = gr.Textbox(
                "",
                show_label=False,
                label="Beginning of the answer",
                placeholder="The model goes on from here",
                container=False,
                elem_id=self._id("prefix"),
            )

    def _draw_inputs(self) -> None:
        """A box for everything that some method takes beside the prompt."""
        names = dict.fromkeys(name for each in self.methods.values() for name in each.card.takes)
        self.inputs = {
            name: gr.Textbox(
                FIRST_INPUTS.get(name, ""),
                label=name.capitalize(),
                lines=5,
                max_lines=16,
                visible=name in self.methods[self.first].card.takes,
                elem_id=self._id(name),
            )
            for name in names
        }

    def _draw_buttons(self) -> None:
        with gr.Row():
            self.go = gr.Button(
                "Run",
                variant="primary",
                elem_id=self._id("run"),
                elem_classes="candor-run",
                min_width=80,
            )
            self.halt = gr.Button("Stop", interactive=False, elem_id=self._id("stop"), min_width=80)
        self.foreseen = words("", elem_id=self._id("foreseen"))

    def _draw_method(self) -> None:
        self.method = gr.Dropdown(
            [(each.card.title, name) for name, each in self.methods.items()],
            value=self.first,
            label="Method",
            elem_id=self._id("method"),
        )
        self.about = words(methods.about(self.methods[self.first]))
        self.forms = [build_form(each, name == self.first) for name, each in self.methods.items()]
        with gr.Row(elem_classes="candor-seed"):
            self.seed = gr.Textbox(
                "",
                label="Seed",
                placeholder="new each run",
                elem_id=self._id("seed"),
                scale=2,
                min_width=120,
            )
            self.again = gr.Button(
                "Use last",
                size="sm",
                scale=1,
                min_width=80,
                interactive=False,
                elem_id=self._id("again"),
            )

    def _listen(self) -> None:
        shown = self.shown
        fields: set[Any] = {self.mode, self.system, self.prompt, self.prefix, self.method}
        fields |= {self.seed, self.earlier, shown.run_id, shown.signal, *self.inputs.values()}
        fields |= {widget for form in self.forms for widget in form.widgets.values()}
        outputs = [*shown.outputs, self.go, self.halt, self.more]
        started = self.go.click(self.start, fields, outputs, api_name=self.name, **ENGINE)
        shown.panel.select(
            self.fork, [shown.run_id, shown.signal], outputs, api_visibility="private", **ENGINE
        )
        self.halt.click(self.stop, None, None, **QUIET)
        self.more.click(
            self.carry_on,
            [shown.run_id],
            [self.earlier, self.talk, self.prompt, self.prefix, self.more, shown.state],
            **QUIET,
        )
        self.talk.select(
            self.edit, [self.earlier], [self.earlier, self.talk, self.prompt, self.prefix], **QUIET
        )
        groups = [form.group for form in self.forms]
        self.method.change(
            self.pick_method,
            [self.method, self.can_chat, self.prompt],
            [self.about, self.mode, self.prompt, *self.inputs.values(), *groups],
            **QUIET,
        )
        self.can_chat.change(
            self.fit_model, [self.can_chat, self.method], [self.mode, self.text_only], **QUIET
        )
        self.mode.change(self.pick_mode, [self.mode], [self.system_box, self.talk], **QUIET)
        shown.run_id.change(enabled, [shown.run_id], [self.again], **QUIET)
        self.again.click(self.last_seed, [shown.run_id], [self.seed], **QUIET)
        self._listen_to_knobs(started)

    def _listen_to_knobs(self, started: Any) -> None:
        """Tell anew what a search will take when a knob, the method or the model is another one,
        and when a run has shown how long it takes."""
        searches = [form for form in self.forms if form.method.expect]
        if not searches:
            return
        widgets: list[Any] = [widget for form in searches for widget in form.widgets.values()]
        listener: dict[str, Any] = {
            "fn": self.foresee,
            "inputs": {self.method, *widgets},
            "outputs": [self.foreseen],
            "preprocess": False,  # a number that is still being typed may be out of its range
            **QUIET,
        }
        changes = [each.change for each in (*widgets, self.method, self.model)]
        gr.on(changes, trigger_mode="always_last", **listener)
        started.then(**listener)

    # What happens

    def start(self, given: Mapping[Any, Any], request: gr.Request) -> Iterator[Outputs]:
        def ask() -> Run:
            form = self._form(given)
            return self.ctx.runner.submit(
                Job(
                    form.method.name,
                    self._task(given),
                    form.values(given),
                    seed=read_seed(given[self.seed]),
                    model=self.ctx.choice(request.session_hash),
                    owner=request.username or "",
                )
            )

        updates = self.shown.run(ask, request, given[self.shown.signal])
        yield from self._with_buttons(updates, given[self.shown.run_id])

    def fork(
        self, run_id: str, signal: str, event: gr.EventData, request: gr.Request
    ) -> Iterator[Outputs]:
        at = chosen(event)
        if "fork" in at or "ask" in at:
            updates = self.shown.fork(run_id, signal, event, request)
            yield from self._with_buttons(updates, run_id)

    def stop(self, request: gr.Request) -> None:
        self.ctx.stop(request.session_hash, "stopped by you")

    def carry_on(self, run_id: str) -> Outputs:
        """The run becomes the earlier turns; the prompt is free for the next question."""
        events = [stamped.event for stamped in self.ctx.runner.events(run_id)]
        started = next(event for event in events if isinstance(event, RunStarted))
        if isinstance(started.prompt, str):
            return {self.shown.state: status.problem("Only a chat can be continued, not raw text.")}
        said = {"role": "assistant", "content": started.prefix + text_of(events)}
        past = tuple(turn for turn in started.prompt if turn["role"] != "system")
        rest = {self.prompt: "", self.prefix: "", self.more: gr.Button(interactive=False)}
        return self._earlier((*past, said)) | rest

    def edit(self, past: tuple[Turn, ...], event: gr.EventData) -> Outputs:
        """A user turn returns to the prompt, an answer to its beginning; what followed goes."""
        at = chosen(event)["turn"]
        turn = past[at]
        if turn["role"] == "user":
            return self._earlier(past[:at]) | {self.prompt: turn["content"], self.prefix: ""}
        asked = past[at - 1]["content"]
        return self._earlier(past[: at - 1]) | {self.prompt: asked, self.prefix: turn["content"]}

    def pick_method(self, name: str, can_chat: bool, prompt: str) -> list[Any]:
        """An example that nobody has changed makes room for that of the method. Any other prompt
        is left alone: it may have been typed since."""
        picked = self.methods[name]
        examples = {self.asking.prompt, *(each.card.example for each in self.methods.values())}
        asked = (picked.card.example or self.asking.prompt) if prompt in examples else prompt
        boxes = [gr.Textbox(visible=each in picked.card.takes) for each in self.inputs]
        groups = [gr.Column(visible=form.method.name == name) for form in self.forms]
        kind = picked.card.starts_as if can_chat else "raw"
        box = gr.skip() if asked == prompt else asked
        return [methods.about(picked), kind, box, *boxes, *groups]

    def fit_model(self, can_chat: bool, method: str) -> list[Any]:
        """Offer what the model can: a text always, a chat where it has a template for one."""
        if can_chat:
            kind = self.methods[method].card.starts_as
            return [gr.Radio(MODES, value=kind), gr.HTML(visible=False)]
        return [gr.Radio(MODES[1:], value="raw"), gr.HTML(visible=True)]

    def pick_mode(self, kind: str) -> list[Any]:
        is_chat = kind == "chat"
        return [gr.Accordion(visible=is_chat), gr.HTML(visible=is_chat)]

    def foresee(self, given: Mapping[Any, Any], request: gr.Request) -> str:
        form = self._form(given)
        if form.method.expect is None:
            return ""
        model = self.ctx.model_of(request.session_hash)
        try:
            told = estimate(form.method, form.values(given), model, self.ctx.paces)
        except StoreError:  # the run says it
            return ""
        return f'<p class="candor-hint">{told}</p>' if told else ""

    def last_seed(self, run_id: str) -> str:
        events = self.ctx.runner.events(run_id) if run_id else []
        return next((str(s.event.seed) for s in events if isinstance(s.event, RunStarted)), "")

    def _form(self, given: Mapping[Any, Any]) -> Form:
        return next(form for form in self.forms if form.method.name == given[self.method])

    def _task(self, given: Mapping[Any, Any]) -> Task:
        prompt: str | tuple[Turn, ...] = given[self.prompt]
        if given[self.mode] != "raw":
            prompt = chat(given[self.prompt], given[self.system], given[self.earlier])
        takes = self.methods[given[self.method]].card.takes
        inputs = {name: given[box] for name, box in self.inputs.items() if name in takes}
        return Task(prompt, prefix=given[self.prefix], inputs=inputs)

    def _earlier(self, past: tuple[Turn, ...]) -> Outputs:
        return {self.earlier: past, self.talk: turns.render(past)}

    def _with_buttons(self, updates: Iterator[Outputs], run_id: str) -> Iterator[Outputs]:
        """The buttons that fit: while a run goes on, and afterwards. run_id: what was shown."""
        yield self._buttons(going=True)
        for update in updates:
            run_id = update.get(self.shown.run_id, run_id)
            yield update
        yield self._buttons(going=False, can_continue=bool(run_id))

    def _buttons(self, going: bool, can_continue: bool = False) -> Outputs:
        return {
            self.go: gr.Button(interactive=not going),
            self.halt: gr.Button(interactive=going),
            self.more: gr.Button(interactive=can_continue),
        }


def read_seed(given: str | None) -> int | None:
    """The seed as typed; None for an empty field. Raises: BadInput."""
    text = (given or "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise BadInput(f"The seed must be a whole number, not {text[:40]!r}.")
    return int(text)
