"""The History tab: find, open, replay, export, import and delete what was recorded."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr

from analyzers.errors import CandorError
from app.page.context import PageContext
from app.page.run_view import Outputs, build_view
from app.page.widgets import ENGINE, QUIET, chosen, view, words
from sessions.export import export_jsonl, import_jsonl
from visualizations import history, status
from visualizations.text import counted, human_size

SHOWN_RUNS = 100
SPEEDS = [("1 ×", 1.0), ("4 ×", 4.0), ("16 ×", 16.0)]


def build(ctx: PageContext, tab: gr.Tab) -> None:
    with gr.Row(elem_classes="candor-page"):
        with gr.Column(scale=4, min_width=340, elem_classes="candor-left"):
            with gr.Column(elem_classes="candor-card"):
                search = gr.Textbox(
                    "",
                    show_label=False,
                    label="Search",
                    placeholder="Search prompts and answers",
                    container=False,
                    elem_id="search",
                )
                disk = words("", elem_id="disk")
                rows = view("", elem_id="runs")
                with gr.Row(elem_classes="candor-actions"):
                    export = gr.Button("Export ticked", size="sm", elem_id="export")
                    load = gr.UploadButton(
                        "Import", size="sm", file_types=[".jsonl"], elem_id="import"
                    )
                    delete = gr.Button("Delete ticked", size="sm", elem_id="delete")
                file = gr.File(label="Exported runs", visible=False, elem_id="exported")
                said = words("", elem_id="history-said")
                with gr.Row(visible=False, elem_classes="candor-actions") as sure:
                    yes = gr.Button("Yes, delete them", variant="stop", size="sm", elem_id="yes")
                    no = gr.Button("Keep them", size="sm")
        with gr.Column(scale=8, min_width=340):
            with gr.Row(elem_classes="candor-bar candor-replay"):
                replay = gr.Button("Replay", size="sm", elem_id="replay", scale=0, min_width=90)
                speed = gr.Radio(
                    SPEEDS,
                    value=4.0,
                    label="Speed",
                    show_label=False,
                    container=False,
                    elem_classes="candor-seg",
                )
                halt = gr.Button("Stop", size="sm", scale=0, min_width=70, elem_id="replay-stop")
            shown = build_view(ctx, "history")
    picked: gr.State = gr.State(())
    replaying: dict[str, float] = {}

    def listed(query: str, ticked: tuple[str, ...]) -> list[Any]:
        found = ctx.store.runs(query, limit=SHOWN_RUNS)
        total = ctx.store.count(query)
        rest = f" · the newest {len(found)} shown" if total > len(found) else ""
        about = f"{counted(total, 'run')}{rest} · {human_size(ctx.store.size())} on disk"
        return [
            f'<p class="candor-hint">{about}</p>',
            history.render([_row(run) for run in found], ticked, query),
        ]

    def act(run_id: str, signal: str, event: gr.EventData, request: gr.Request) -> Outputs:
        at = chosen(event)
        if "picked" in at:
            return {picked: tuple(at["picked"])}
        replaying.pop(request.session_hash or "", None)
        try:
            return shown.show(at["run"], signal)
        except CandorError as error:
            return {shown.state: status.problem(str(error))}

    def play(run_id: str, speed: float, signal: str, request: gr.Request) -> Iterator[Outputs]:
        if not run_id:
            yield {shown.state: status.problem("Open a run first, then replay it.")}
            return
        session, mine = request.session_hash or "", time.monotonic()
        replaying[session] = mine
        yield from shown.replay(run_id, speed, lambda: replaying.get(session) == mine, signal)

    def halt_all(request: gr.Request) -> None:
        replaying.pop(request.session_hash or "", None)
        ctx.stop(request.session_hash, "stopped by you")

    def write(ticked: tuple[str, ...]) -> list[Any]:
        if not ticked:
            return [gr.File(visible=False), status.problem("Tick the runs to export first.")]
        out = ctx.files / f"candor-{len(ticked)}-{uuid4().hex[:8]}.jsonl"
        export_jsonl(ctx.store, ticked, out)
        return [
            gr.File(str(out), visible=True),
            _said(f"{counted(len(ticked), 'run')} in the file."),
        ]

    def read(path: str) -> str:
        try:
            ids = import_jsonl(ctx.store, Path(path))
        except CandorError as error:
            return status.problem(str(error))
        return _said(f"{counted(len(ids), 'run')} imported.")

    def ask(ticked: tuple[str, ...]) -> list[Any]:
        if not ticked:
            return [gr.Row(visible=False), status.problem("Tick the runs to delete first.")]
        size = human_size(sum(run.size for run in ctx.store.runs(ids=ticked, limit=len(ticked))))
        return [
            gr.Row(visible=True),
            _said(f"Delete {counted(len(ticked), 'run')}, about {size}? This cannot be undone."),
        ]

    def remove(ticked: tuple[str, ...]) -> list[Any]:
        try:
            freed = ctx.store.delete(ticked)
        except CandorError as error:
            return [gr.Row(visible=False), status.problem(str(error)), ticked]
        said = f"{counted(len(ticked), 'run')} deleted, {human_size(freed)} given back to the disk."
        return [gr.Row(visible=False), _said(said), ()]

    list_in, list_out = [search, picked], [disk, rows]
    tab.select(listed, list_in, list_out, **QUIET)
    search.change(listed, list_in, list_out, trigger_mode="always_last", **QUIET)
    rows.select(act, [shown.run_id, shown.signal], [picked, *shown.outputs], **QUIET)
    replay.click(play, [shown.run_id, speed, shown.signal], shown.outputs, **QUIET)
    halt.click(halt_all, None, None, **QUIET)
    shown.panel.select(
        shown.fork, [shown.run_id], shown.outputs, api_visibility="private", **ENGINE
    )
    export.click(write, [picked], [file, said], **QUIET)
    load.upload(read, [load], [said], **QUIET).then(listed, list_in, list_out, **QUIET)
    delete.click(ask, [picked], [sure, said], **QUIET)
    yes.click(remove, [picked], [sure, said, picked], **QUIET).then(
        listed, list_in, list_out, **QUIET
    )
    no.click(lambda: [gr.Row(visible=False), ""], None, [sure, said], **QUIET)


def _row(run: Any) -> dict[str, Any]:
    return vars(run) | {"when": run.created, "prompt": run.prompt_text}


def _said(text: str) -> str:
    return f'<p class="candor-hint">{text}</p>'
