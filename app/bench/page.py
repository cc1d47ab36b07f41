"""How far the page is behind, and how busy it keeps the browser, while tokens stream into it.

The real runner, recorder and page, with a real headless browser; only the model is replaced, by one
that says a fixed text at a fixed pace. So every delay seen here is the app's own, and none is the
model's. Both clocks are the machine's: Python's `time.time` and the browser's `timeOrigin + now`.
"""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import uvicorn

from analyzers import registry
from analyzers.context import Context
from analyzers.errors import BadInput, CandorError
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import Event, Token
from app.bench import Progress, Row, row
from app.page.context import PageContext
from app.page.main import application
from app.page.middleware import LOOPBACK
from app.runner import ModelChoice, Runner
from sessions.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Page

ABOUT = "lag and browser load of the page at 100 tokens a second"
LAG_TARGET = 0.5
BUSY_TARGET = 30.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
PATIENCE = 60.0
"""Seconds to wait for what should have happened."""
SETTLE = 2.0
"""Seconds after the page has loaded, for what it does at the start."""
WORDS = ("The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", ",", "again", ".")

# Notes when how many tokens stood in the answer, and resolves when all of them do.
WATCH = """(all) => {
  const answer = document.getElementById('generate-answer');
  const spans = answer.getElementsByClassName('t');
  const seen = [];
  window.candorShown = new Promise((resolve) => {
    const look = () => {
      if (seen.length && seen[seen.length - 1][1] === spans.length) return;
      seen.push([performance.timeOrigin + performance.now(), spans.length]);
      if (spans.length >= all) { watcher.disconnect(); resolve(seen); }
    };
    const watcher = new MutationObserver(look);
    watcher.observe(answer, {childList: true, subtree: true});
  });
}"""
SHOWN = """(patience) => Promise.race([
  window.candorShown,
  new Promise((resolve) => setTimeout(() => resolve(null), patience)),
])"""


def measure(
    progress: Progress, *, tokens: int = 2048, rate: float = 100.0, rounds: int = 3
) -> list[Row]:
    """`rate`: tokens a second. Each of `rounds` is a new page.

    Raises: BadInput if browser or Playwright are missing; CandorError if tokens never appear.
    """
    pacer = _Pacer(tokens, rate)
    found = []
    with _browser() as new_page, _served(pacer) as address:
        for turn in range(rounds):
            progress(f"Round {turn + 1} of {rounds}: {tokens:,} tokens at {rate:g} a second")
            with new_page() as page:
                found.append(_watch(page, address, pacer))
    last = median(lags[-1] for lags, _, _ in found)
    typical = median(lag for lags, _, _ in found for lag in lags)
    worst = max(lag for lags, _, _ in found for lag in lags)
    return [
        row("last token shown after", last, "s", target=LAG_TARGET, n=rounds),
        row("any token, typically", typical, "s", n=rounds * tokens),
        row("any token, at worst", worst, "s", n=rounds * tokens),
        row(
            "main thread busy",
            median(busy for _, busy, _ in found),
            "%",
            target=BUSY_TARGET,
            n=rounds,
        ),
        row("sent to the page", median(sent for _, _, sent in found) / 1e6, "MB", n=rounds),
    ]


def _watch(page: "Page", address: str, pacer: "_Pacer") -> tuple[list[float], float, int]:
    """One run: seconds of lag of every token, share of the main thread (%), bytes received."""
    tools = page.context.new_cdp_session(page)
    sent = []
    tools.on("Network.dataReceived", lambda event: sent.append(event["dataLength"]))
    page.goto(address)
    go = page.locator("#generate-run")
    go.wait_for(timeout=1e3 * PATIENCE)
    page.wait_for_timeout(1e3 * SETTLE)
    page.evaluate(WATCH, pacer.tokens)
    tools.send("Network.enable")
    tools.send("Performance.enable")
    before = _metrics(tools)
    go.click()
    seen = page.evaluate(SHOWN, 1e3 * (PATIENCE + 2 * pacer.tokens / pacer.rate))
    after = _metrics(tools)
    if seen is None:
        raise CandorError("The page did not show all tokens.")
    busy = (after["TaskDuration"] - before["TaskDuration"]) / (
        after["Timestamp"] - before["Timestamp"]
    )
    return _lags(seen, pacer.made), 100 * busy, sum(sent)


def _lags(seen: list[tuple[float, int]], made: list[float]) -> list[float]:
    """Seconds from each token's making to the first time that so many tokens were shown."""
    lags: list[float] = []
    for now, shown in seen:
        lags.extend(now / 1e3 - at for at in made[len(lags) : shown])
    return lags


def _metrics(tools: Any) -> dict[str, float]:
    return {each["name"]: each["value"] for each in tools.send("Performance.getMetrics")["metrics"]}


# The model that is none


class _Pacer:
    """Stands in for an engine, and for the method that runs on it."""

    identity = {"name": "paced", "hash": "0", "quantization": "none", "dtype": "", "device": "cpu"}  # noqa: RUF012
    can = frozenset({"text", "logits"})
    context = 1 << 20
    can_chat = True
    cost = None
    memory = 0
    forwards = 0

    def __init__(self, tokens: int, rate: float) -> None:
        self.tokens = tokens
        self.rate = rate
        self.made: list[float] = []
        """When each token of the latest run was made: seconds since 1970."""
        self.poll: Callable[[], None] = lambda: None
        self.progress: Callable[[int, int], None] = lambda done, total: None

    def encode(self, task: Task) -> list[int]:
        return [0]

    def run(
        self, engine: "_Pacer", task: Task, params: Any, ctx: Context
    ) -> Generator[Event, None, str]:
        self.made = []
        began = time.monotonic()
        for n in range(self.tokens):
            time.sleep(max(0.0, began + n / self.rate - time.monotonic()))
            self.poll()
            written = _token(n)
            self.made.append(time.time())
            yield written
        return "said everything"


def _token(n: int) -> Token:
    """Different words, numbers and levels, with ten alternatives, as a model would give them."""
    word = " " + WORDS[n % len(WORDS)]
    surprisal = (n * 7 % 50) / 10
    top = tuple((k, " " + WORDS[(n + k) % len(WORDS)], -surprisal - k / 3) for k in range(10))
    return Token(
        pos=n + 1,
        id=n % len(WORDS),
        text=word,
        bytes=word.encode().hex(),
        logprob=-surprisal,
        entropy=surprisal / 2 + 0.123456,
        rank=1 + n % 4,
        margin=0.654321 / (1 + surprisal),
        p_sampled=0.512345,
        top=top,
    )


# Server and browser


@contextmanager
def _served(pacer: _Pacer) -> Iterator[str]:
    """The page's address, where Run drives the pacer and everything else is as always."""
    usual = registry.method("sampling")
    paced = Method(usual.name, usual.card, usual.params, pacer.run, usual.about)
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(registry.methods(), {usual.name: paced}),
        patch("app.runner.load", lambda ref, **options: pacer),
    ):
        store = Store(Path(folder) / "runs.db")
        runner = Runner(store, measure=False)
        listener = socket.create_server(("127.0.0.1", 0))
        app = application(PageContext(runner, store, ModelChoice()), frozenset(LOOPBACK))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://localhost:{listener.getsockname()[1]}"
        finally:
            runner.close()
            server.should_exit = True
            thread.join(timeout=10)
            listener.close()
            store.close()


@contextmanager
def _browser() -> Iterator[Callable[[], Any]]:
    """A way to open one fresh page after the other. Raises: BadInput saying what to install."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise BadInput(
            "Playwright is missing, which drives the browser: `python3 launch.py test` "
            "installs it with the test tools."
        ) from None
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise BadInput(
            "Chromium is missing: install it, on Debian with `sudo apt install chromium`."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))

        @contextmanager
        def new_page() -> "Iterator[Page]":
            context = browser.new_context()
            yield context.new_page()
            context.close()

        yield new_page
        browser.close()
