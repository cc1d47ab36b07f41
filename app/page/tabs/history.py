"""The History tab: find, open, replay, export, import and delete what was recorded."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import gradio as gr

from analyzers.errors import CandorError
from app.page import methods
from app.page.context import PageContext
from app.page.run_view import Outputs, build_view, token_panel
from app.page.tabs.compare import CompareTab
from app.page.tabs.lanes import LanesTab
from app.page.widgets import (
    ENGINE,
    LOCAL_TIMES,
    QUIET,
    RESULT,
    chosen,
    enabled,
    segments,
    view,
    words,
)
from sessions.export import export_jsonl, import_jsonl
from visualizations import history, status
from visualizations.text import counted, human_size

SHOWN_RUNS = 100
SPEEDS = [("1 ×", 1.0), ("4 ×", 4.0), ("16 ×", 16.0)]
Picked = tuple[str, ...]
"""Ids of the ticked runs."""


def build(ctx: PageContext, tab: gr.Tab, tabs: gr.Tabs, beside: CompareTab, race: LanesTab) -> None:
    """tab: this one, of all `tabs`. beside: where ticked runs are compared. Runs of it, and of the
    `race`, are opened here."""
    with gr.Row(elem_classes="candor-page"):
        HistoryTab(ctx, tab, tabs, beside, race)


class HistoryTab:
    """The widgets of the tab, and what they do. `replaying`: session -> the replay it watches."""

    def __init__(
        self, ctx: PageContext, tab: gr.Tab, tabs: gr.Tabs, beside: CompareTab, race: LanesTab
    ) -> None:
        self.ctx = ctx
        self.tabs, self.beside = tabs, beside
        self.replaying: dict[str, float] = {}
        with (
            gr.Column(scale=3, min_width=340, elem_classes="candor-left"),
            gr.Column(elem_classes="candor-card"),
        ):
            self._draw_list()
        with gr.Column(scale=9, min_width=340, elem_classes=RESULT):
            self._draw_replay()
            self.shown = build_view(ctx, "history")
        self.picked = gr.State(())
        self._listen(tab, [beside, race])

    # What is seen

    def _draw_list(self) -> None:
        self.search = gr.Textbox(
            "",
            show_label=False,
            label="Search",
            placeholder="Search prompts and answers",
            container=False,
            elem_id="search",
        )
        self.disk = words("", elem_id="disk")
        self.rows = view("", script=LOCAL_TIMES, elem_id="runs")
        with gr.Row(elem_classes="candor-actions"):
            self.compare = _ticked("Compare ticked", "compare-ticked")
            self.export = _ticked("Export", "export")
            self.load = gr.UploadButton(
                "Import", size="sm", file_types=[".jsonl"], elem_id="import"
            )
            self.delete = _ticked("Delete", "delete")
        self.file = gr.File(label="Exported runs", visible=False, elem_id="exported")
        self.said = words("", elem_id="history-said")
        with gr.Row(visible=False, elem_classes="candor-actions") as self.sure:
            self.yes = gr.Button("Yes, delete", variant="stop", size="sm", elem_id="yes")
            self.no = gr.Button("Keep", size="sm")

    def _draw_replay(self) -> None:
        with gr.Row(elem_classes="candor-bar candor-replay"):
            self.replay = gr.Button(
                "Replay", size="sm", elem_id="replay", scale=0, min_width=90, interactive=False
            )
            self.speed = segments(SPEEDS, 4.0, "Speed")
            self.halt = gr.Button("Stop", size="sm", scale=0, min_width=70, elem_id="replay-stop")

    def _listen(self, tab: gr.Tab, lanes: Sequence[LanesTab]) -> None:
        shown, asked = self.shown, [self.search, self.picked]
        listed = [self.disk, self.rows]
        tab.select(self.find, asked, listed, **QUIET)
        self.search.change(self.find, asked, listed, trigger_mode="always_last", **QUIET)
        self.rows.select(self.choose, [shown.signal], [self.picked, *shown.outputs], **QUIET)
        ticked = [self.compare, self.export, self.delete]
        self.picked.change(
            lambda picked: [enabled(picked)] * len(ticked), [self.picked], ticked, **QUIET
        )
        shown.run_id.change(enabled, [shown.run_id], [self.replay], **QUIET)
        for lane in lanes:
            lane.panel.select(
                self.bring, [shown.signal], [self.tabs, *shown.outputs], **QUIET
            ).then(self.find, asked, listed, **QUIET)
        self.replay.click(
            self.play, [shown.run_id, self.speed, shown.signal], shown.outputs, **QUIET
        )
        self.halt.click(self.stop, None, None, **QUIET)
        shown.panel.select(
            shown.fork,
            [shown.run_id, shown.signal],
            shown.outputs,
            api_visibility="private",
            **ENGINE,
        )
        outputs = [self.said, self.tabs, *self.beside.outputs]
        self.compare.click(self.put_beside, [self.picked], outputs, **QUIET)
        self.export.click(self.write, [self.picked], [self.file, self.said], **QUIET)
        self.load.upload(self.read, [self.load], [self.said], **QUIET).then(
            self.find, asked, listed, **QUIET
        )
        self.delete.click(self.ask, [self.picked], [self.sure, self.said], **QUIET)
        self.yes.click(
            self.remove, [self.picked], [self.sure, self.said, self.picked], **QUIET
        ).then(self.find, asked, listed, **QUIET)
        self.no.click(lambda: [gr.Row(visible=False), ""], None, [self.sure, self.said], **QUIET)

    # What happens

    def find(self, query: str, picked: Picked) -> list[str]:
        found = self.ctx.store.runs(query, limit=SHOWN_RUNS)
        total = self.ctx.store.count(query)
        rest = f" · the newest {len(found)} shown" if total > len(found) else ""
        disk = human_size(self.ctx.store.size())
        rows = [
            vars(run)
            | {"when": run.created, "prompt": run.prompt_text, "method": methods.title(run.method)}
            for run in found
        ]
        return [
            _said(f"{counted(total, 'run')}{rest} · {disk} on disk"),
            history.render(rows, picked, query),
        ]

    def choose(self, signal: str, event: gr.EventData, request: gr.Request) -> Outputs:
        """A box was ticked, or a run is to be opened."""
        at = chosen(event)
        if "picked" in at:
            return {self.picked: tuple(at["picked"])}
        self.replaying.pop(request.session_hash or "", None)
        try:
            return self.shown.show(at["run"], signal)
        except CandorError as error:
            return {self.shown.state: status.problem(str(error))}

    def bring(self, signal: str, event: gr.EventData, request: gr.Request) -> Iterator[Outputs]:
        """A run of another tab is opened here, at the token that was chosen there."""
        at = chosen(event)
        if "run" in at:
            self.replaying.pop(request.session_hash or "", None)
            opened = token_panel(self.ctx, at["run"], at["pos"])
            here = {self.tabs: gr.Tabs(selected="history")}
            yield here | self.shown.show(at["run"], signal) | {self.shown.panel: opened}

    def play(
        self, run_id: str, speed: float, signal: str, request: gr.Request
    ) -> Iterator[Outputs]:
        if not run_id:
            yield {self.shown.state: status.problem("Open a run first, then replay it.")}
            return
        session, mine = request.session_hash or "", time.monotonic()
        self.replaying[session] = mine
        yield from self.shown.replay(
            run_id, speed, lambda: self.replaying.get(session) == mine, signal
        )

    def stop(self, request: gr.Request) -> None:
        self.replaying.pop(request.session_hash or "", None)
        self.ctx.stop(request.session_hash, "stopped by you")

    def put_beside(self, picked: Picked) -> Outputs:
        try:
            shown = self.beside.show(picked)
        except CandorError as error:
            return {self.said: status.problem(str(error))}
        return {self.said: "", self.tabs: gr.Tabs(selected="compare"), **shown}

    def write(self, picked: Picked) -> tuple[gr.File, str]:
        if not picked:
            return gr.File(visible=False), status.problem("Tick the runs to export first.")
        out = self.ctx.files / f"candor-{uuid4().hex[:8]}.jsonl"
        export_jsonl(self.ctx.store, picked, out)
        return gr.File(str(out), visible=True), _said(f"{counted(len(picked), 'run')} in the file.")

    def read(self, path: str) -> str:
        try:
            ids = import_jsonl(self.ctx.store, Path(path))
        except CandorError as error:
            return status.problem(str(error))
        return _said(f"{counted(len(ids), 'run')} imported.")

    def ask(self, picked: Picked) -> tuple[gr.Row, str]:
        if not picked:
            return gr.Row(visible=False), status.problem("Tick the runs to delete first.")
        runs = self.ctx.store.runs(ids=picked, limit=len(picked))
        size = human_size(sum(run.size for run in runs))
        question = f"Delete {counted(len(picked), 'run')}, about {size}? This cannot be undone."
        return gr.Row(visible=True), _said(question)

    def remove(self, picked: Picked) -> tuple[gr.Row, str, Picked]:
        try:
            freed = self.ctx.store.delete(picked)
        except CandorError as error:
            return gr.Row(visible=False), status.problem(str(error)), picked
        said = f"{counted(len(picked), 'run')} deleted, {human_size(freed)} given back to the disk."
        return gr.Row(visible=False), _said(said), ()


def _ticked(label: str, name: str) -> gr.Button:
    """A button for the ticked runs, so none at first."""
    return gr.Button(label, size="sm", interactive=False, elem_id=name)


def _said(text: str) -> str:
    return f'<p class="candor-hint">{text}</p>'
