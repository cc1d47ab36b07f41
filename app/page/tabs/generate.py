"""The Generate tab: ask, watch the answer with its confidence, and go on from any token."""

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.errors import BadInput
from analyzers.task import Task, chat
from analyzers.trace import RunStarted, Turn, text_of
from app.page.context import PageContext
from app.page.forms import build_form
from app.page.run_view import Outputs, build_view
from app.page.widgets import ENGINE, QUIET, chosen, view, words
from app.runner import Job, Run
from visualizations import status, turns
from visualizations.text import escape

FIRST_PROMPT = "What is the capital of Kenya, and since when?"


def build(ctx: PageContext) -> None:
    methods = {
        name: method
        for name, method in registry.methods().items()
        if method.card.family == "decoding"
    }
    first = "sampling"
    with gr.Row(elem_classes="candor-page"):
        with gr.Column(scale=2, min_width=280, elem_classes="candor-left"):
            with gr.Column(elem_classes="candor-card"):
                mode = gr.Radio(
                    [("Chat", "chat"), ("Text", "raw")],
                    value="chat",
                    label="Kind of prompt",
                    show_label=False,
                    container=False,
                    elem_classes="candor-seg",
                    elem_id="mode",
                )
                talk = view(elem_id="talk")
                with gr.Accordion("System prompt", open=False) as system_box:
                    system = gr.Textbox(
                        value="",
                        show_label=False,
                        label="System prompt",
                        placeholder="How the model should behave (empty: the model's own default)",
                        lines=2,
                        container=False,
                        elem_id="system",
                    )
                prompt = gr.Textbox(
                    FIRST_PROMPT,
                    label="Prompt (Ctrl + Enter runs)",
                    lines=3,
                    max_lines=12,
                    elem_id="prompt",
                )
                with gr.Accordion("Begin the answer", open=False):
                    prefix = gr.Textbox(
                        value="",
                        show_label=False,
                        label="Beginning of the answer",
                        placeholder="The model goes on from here",
                        container=False,
                        elem_id="prefix",
                    )
                with gr.Row():
                    go = gr.Button("Run", variant="primary", elem_id="run", min_width=80)
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=80)
                words(
                    '<p class="candor-hint">Grey: Stop while nothing runs, Continue before an '
                    "answer.</p>"
                )
                method = gr.Dropdown(
                    [(each.card.title, name) for name, each in methods.items()],
                    value=first,
                    label="Method",
                    elem_id="method",
                )
                about = words(_about(methods[first]))
                forms = [build_form(each, name == first) for name, each in methods.items()]
                with gr.Row(elem_classes="candor-seed"):
                    seed = gr.Textbox(
                        value="",
                        label="Seed",
                        placeholder="new each run",
                        elem_id="seed",
                        scale=2,
                        min_width=120,
                    )
                    again = gr.Button("Use last", size="sm", scale=1, min_width=80)
            more = gr.Button(
                "Continue this conversation", size="sm", interactive=False, elem_id="continue"
            )
        with gr.Column(scale=7, min_width=340):
            shown = build_view(ctx, "generate")
    earlier: gr.State = gr.State(())

    fields: set[Any] = {mode, system, prompt, prefix, method, seed, earlier, shown.run_id}
    inputs = fields | {widget for form in forms for widget in form.widgets.values()}

    def start(given: Mapping[Any, Any], request: gr.Request) -> Iterator[Outputs]:
        def ask() -> Run:
            form = next(form for form in forms if form.method.name == given[method])
            task = _task(given[mode], given[prompt], given[system], given[prefix], given[earlier])
            return ctx.runner.submit(
                Job(
                    form.method.name,
                    task,
                    form.values(given),
                    seed=_seed(given[seed]),
                    model=ctx.model,
                    owner=request.username or "",
                )
            )

        yield from with_buttons(shown.run(ask, request), given[shown.run_id])

    def fork(run_id: str, event: gr.EventData, request: gr.Request) -> Iterator[Outputs]:
        if "fork" in chosen(event):
            yield from with_buttons(shown.fork(run_id, event, request), run_id)

    def with_buttons(updates: Iterator[Outputs], run_id: str) -> Iterator[Outputs]:
        """The buttons that fit: while a run goes on, and afterwards. run_id: what was shown."""
        yield buttons(going=True)
        for update in updates:
            run_id = update.get(shown.run_id, run_id)
            yield update
        yield buttons(going=False, can_continue=bool(run_id))

    def buttons(going: bool, can_continue: bool = False) -> Outputs:
        return {
            go: gr.Button(interactive=not going),
            stop: gr.Button(interactive=going),
            more: gr.Button(interactive=can_continue),
        }

    def halt(request: gr.Request) -> None:
        ctx.stop(request.session_hash, "stopped by you")

    def carry_on(run_id: str) -> Outputs:
        """The run becomes the earlier turns; the prompt is free for the next question."""
        events = [stamped.event for stamped in ctx.runner.events(run_id)]
        started = next(event for event in events if isinstance(event, RunStarted))
        if isinstance(started.prompt, str):
            return {shown.state: status.problem("Only a chat can be continued, not raw text.")}
        said = {"role": "assistant", "content": started.prefix + text_of(events)}
        past = tuple(turn for turn in started.prompt if turn["role"] != "system")
        return _talk((*past, said)) | {prompt: "", prefix: "", more: gr.Button(interactive=False)}

    def edit(past: tuple[Turn, ...], event: gr.EventData) -> Outputs:
        """A user turn returns to the prompt, an answer to its beginning; what followed goes."""
        at = chosen(event)["turn"]
        turn = past[at]
        if turn["role"] == "user":
            return _talk(past[:at]) | {prompt: turn["content"], prefix: ""}
        return _talk(past[: at - 1]) | {prompt: past[at - 1]["content"], prefix: turn["content"]}

    def _talk(past: tuple[Turn, ...]) -> Outputs:
        return {earlier: past, talk: turns.render(past)}

    def pick_method(name: str) -> list[Any]:
        picked = methods[name]
        groups = [gr.Column(visible=form.method.name == name) for form in forms]
        return [_about(picked), picked.card.starts_as, *groups]

    def pick_mode(kind: str) -> list[Any]:
        is_chat = kind == "chat"
        return [gr.Accordion(visible=is_chat), gr.HTML(visible=is_chat)]

    def last_seed(run_id: str) -> str:
        events = ctx.runner.events(run_id) if run_id else []
        return next((str(s.event.seed) for s in events if isinstance(s.event, RunStarted)), "")

    outputs = [*shown.outputs, go, stop, more]
    go.click(start, inputs, outputs, api_name="generate", **ENGINE)
    shown.panel.select(fork, [shown.run_id], outputs, api_visibility="private", **ENGINE)
    stop.click(halt, None, None, **QUIET)
    more.click(
        carry_on, [shown.run_id], [earlier, talk, prompt, prefix, more, shown.state], **QUIET
    )
    talk.select(edit, [earlier], [earlier, talk, prompt, prefix], **QUIET)
    method.change(pick_method, [method], [about, mode, *(form.group for form in forms)], **QUIET)
    mode.change(pick_mode, [mode], [system_box, talk], **QUIET)
    again.click(last_seed, [shown.run_id], [seed], **QUIET)


def _task(mode: str, prompt: str, system: str, prefix: str, earlier: tuple[Turn, ...]) -> Task:
    if mode == "raw":
        return Task(prompt, prefix=prefix)
    return Task(chat(prompt, system, earlier), prefix=prefix)


def _seed(given: str | None) -> int | None:
    text = (given or "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise BadInput(f"The seed must be a whole number, not {text[:40]!r}.")
    return int(text)


def _about(method: registry.Method) -> str:
    head = method.about.splitlines()[0].partition(": ")[2]
    return (
        f'<p class="candor-about" title="Source: {escape(method.card.source)}">'
        f"{escape(head[:1].upper() + head[1:])}</p>"
    )
