"""The Generate tab: ask, watch the answer with its confidence, and go on from any token."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from analyzers import registry
from analyzers.errors import BadInput, CandorError
from analyzers.task import Task, chat
from analyzers.trace import RunStarted, Turn, text_of
from app.page.context import PageContext
from app.page.forms import build_form
from app.page.run_view import Outputs, RunView, build_view
from app.page.widgets import ENGINE, QUIET, chosen, view, words
from app.runner import Fork, Job, Run
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
                    label="Prompt",
                    lines=3,
                    max_lines=12,
                    elem_id="prompt",
                    info="Ctrl + Enter runs",
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
                    '<p class="candor-hint">Stop acts within one token; it is grey while nothing '
                    "runs.</p>"
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

    fields: set[Any] = {mode, system, prompt, prefix, method, seed, earlier}
    inputs = fields | {widget for form in forms for widget in form.widgets.values()}
    controls = [go, stop, more]

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

        yield from _follow(ctx, shown, controls, ask, request)

    def fork(run_id: str, event: gr.EventData, request: gr.Request) -> Iterator[Outputs]:
        at = chosen(event)
        if "fork" not in at:
            return

        def ask() -> Run:
            return ctx.runner.submit(fork_job(ctx, run_id, at["pos"], at["fork"]))

        yield from _follow(ctx, shown, controls, ask, request)

    def halt(request: gr.Request) -> None:
        ctx.stop(request.session_hash, "stopped by you")

    def carry_on(run_id: str) -> Outputs:
        """The run becomes the earlier turns; the prompt is free for the next question."""
        events = [stamped.event for stamped in ctx.runner.events(run_id)]
        started = next(event for event in events if isinstance(event, RunStarted))
        if isinstance(started.prompt, str):
            raise gr.Error(
                "Only a chat can be continued; this run was raw text.", print_exception=False
            )
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

    outputs = [*shown.outputs, *controls]
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


def fork_job(ctx: PageContext, run_id: str, pos: int, id: int) -> Job:
    """Continue a run with another token, by its own method and settings; a text that was only
    read is continued by sampling."""
    events = [stamped.event for stamped in ctx.runner.events(run_id)]
    started = next(event for event in events if isinstance(event, RunStarted))
    same = started.method != "read"
    return Job(
        started.method if same else "sampling",
        params=started.params if same else {},
        seed=started.seed,
        model=ctx.model,
        fork=Fork(run_id, pos, id),
    )


def _follow(
    ctx: PageContext,
    shown: RunView,
    controls: list[gr.Button],
    ask: Callable[[], Run],
    request: gr.Request,
) -> Iterator[Outputs]:
    """Show a run while it goes on, with the buttons that fit; one run a visitor at a time."""
    go, stop, more = controls
    session = request.session_hash or ""
    try:
        if session in ctx.active and not ctx.active[session].over:
            raise BadInput("A run of yours is still going on: stop it first.")
        run = ask()
    except CandorError as error:
        yield {shown.state: status.problem(str(error))}
        return
    ctx.active[session] = run
    yield {
        go: gr.Button(interactive=False),
        stop: gr.Button(interactive=True),
        more: gr.Button(interactive=False),
    }
    yield from shown.follow(run)
    ctx.active.pop(session, None)
    is_chat = bool(run.id) and not isinstance(run.job.task.prompt, str)
    yield {
        go: gr.Button(interactive=True),
        stop: gr.Button(interactive=False),
        more: gr.Button(interactive=is_chat),
    }


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
        f'<p class="candor-about">{escape(head[:1].upper() + head[1:])}'
        f"<span> {escape(method.card.source)}</span></p>"
    )
