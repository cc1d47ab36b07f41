"""The Gradio page: its frame, its tabs, and the server around it."""

import atexit
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse

from analyzers.engine import quantization
from analyzers.engine.loading import DEFAULT
from analyzers.errors import BadInput, CandorError
from analyzers.home import database_path
from app.page import theme
from app.page.context import PageContext
from app.page.middleware import LOOPBACK, Guard
from app.page.model_bar import ModelBar
from app.page.tabs import ask, history
from app.page.tabs.ask import Asking
from app.page.tabs.compare import CompareTab
from app.page.tabs.race import PROMPT as COPY_PROMPT
from app.page.tabs.race import RaceTab
from app.page.widgets import PLOTLY
from app.runner import ModelChoice, Runner
from sessions.store import Store
from visualizations import origin
from visualizations.text import human_size

ASKING = (
    Asking("Generate", "generate", ("decoding",), "sampling", ask.FIRST_PROMPT),
    Asking(
        "Layers & experts",
        "layers",
        ("inspection", "contrast"),
        "logit_lens",
        ask.OPEN_PROMPT,
    ),
    Asking("Drafting", "drafting", ("drafting",), "prompt_lookup", COPY_PROMPT, origin.NAME),
    Asking("Search", "search", ("search",), "rain", ask.ADVICE_PROMPT),
    Asking("Self-assessment", "assessment", ("judging",), "all_signals", ask.CAPITAL_PROMPT),
)
"""The tabs that ask, in their order."""


def build(ctx: PageContext) -> gr.Blocks:
    """The page, not yet served."""

    def closed(request: gr.Request) -> None:
        ctx.leave(request.session_hash, "the page was closed")

    with gr.Blocks(title="Candor", analytics_enabled=False, fill_width=True) as page:
        bar = ModelBar(ctx)
        with gr.Tabs(overflow_behavior="wrap") as tabs:  # the style sheet makes it scroll instead
            for asking in ASKING:
                with gr.Tab(asking.title, id=asking.name):
                    ask.build(ctx, bar.can_chat, bar.model, asking)
            with gr.Tab("Race", id="race"):
                race = RaceTab(ctx, bar.can_chat)
            with gr.Tab("Compare", id="compare"):
                beside = CompareTab(ctx, bar.can_chat)
            with gr.Tab("History", id="history") as tab:
                history.build(ctx, tab, tabs, beside, race)
        bar.greet(page)
        page.unload(closed)
    return page


def application(ctx: PageContext, hosts: frozenset[str], password: str = "") -> FastAPI:
    """The whole app: the page, plotly.js from the installed package, and the guard around both."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    app.add_api_route(PLOTLY, lambda: FileResponse(script, media_type="text/javascript"))
    app.add_middleware(Guard, hosts=hosts, password=password)
    return gr.mount_gradio_app(
        app,
        build(ctx),
        path="/",
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size="512mb",
        theme=theme.theme(),
        css=theme.css(),
        head=theme.head(),
    )


def serve(
    *,
    host: str,
    port: int,
    browser: bool,
    model: ModelChoice,
    password: str = "",
    remote_code: bool = False,
) -> None:
    """Load the model, serve the page until Ctrl+C, then write everything and leave.

    remote_code: models may run code that comes with them.
    Raises: BadInput for a public address without a password, or a port in use; StoreError.
    """
    if host not in LOOPBACK and not password:
        raise BadInput(
            f"Listening on {host} shows the page to others: set a password in CANDOR_PASSWORD."
        )
    listener = _listen(host, port)
    store = Store(database_path())
    runner = Runner(store, remote_code=remote_code)
    atexit.register(runner.close)
    try:
        runner.prepare(model, _say_progress)
        _say(_loaded(runner.model_facts() or {}))
    except CandorError as error:
        _say(f"{error} The page starts without a model.")
    ctx = PageContext(runner, store, model)
    hosts = frozenset(LOOPBACK) if host in LOOPBACK else frozenset()
    address = f"http://{'localhost' if host in LOOPBACK else host}:{port}"
    config = uvicorn.Config(application(ctx, hosts, password), log_level="warning")
    try:
        Server(config, address, browser and _has_desktop()).run(sockets=[listener])
    finally:
        runner.close()
        store.close()
        atexit.unregister(runner.close)


class Server(uvicorn.Server):
    """Says where the page is, and opens it if asked to, once it answers there."""

    def __init__(self, config: uvicorn.Config, address: str, browser: bool) -> None:
        super().__init__(config)
        self.address = address
        self.browser = browser

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _say(f"Candor is at {self.address} (Ctrl+C ends it)")
            if self.browser:  # in a thread: some browsers return only when they are closed
                threading.Thread(target=webbrowser.open, args=[self.address], daemon=True).start()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError):
        listener.close()
        raise BadInput(
            f"Cannot listen on {host}, port {port}: it is in use or not allowed. "
            "Choose another with --port."
        ) from None
    return listener


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def _loaded(facts: Mapping[str, Any]) -> str:
    """What was loaded, the memory it takes, and what its quantization costs in quality."""
    kind = facts["quantization"]
    how = facts["dtype"] if kind == "none" else kind
    said = f"{facts['name']}: {how} on {facts['device']}, {human_size(facts['memory'])}"
    if kind in quantization.COST and kind != "none":
        said += f"; measured on {DEFAULT}, {kind} changes the perplexity by "
        said += f"{100 * quantization.COST[kind]:+.1f} %"
    return said


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _say_progress(what: str, share: float) -> None:
    if share == 0.0:
        _say(f"{what} …")
