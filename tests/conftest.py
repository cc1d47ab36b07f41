"""Shared engines and a runner on one of them. Tests never change the engines of a session."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analyzers.engine import Engine, load
from app.runner import Runner
from sessions.store import Store
from tests import tiny
from visualizations import assets


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core for the whole suite, each with the default model of its own, hence no more
    than four; none for single files, where starting them costs more than it gives."""
    single = any(".py" in arg for arg in config.args)
    return 0 if single else min(os.cpu_count() or 1, 4)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more, and lose much where other programs have the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_engine() -> Engine:
    return tiny.engine()


@pytest.fixture(
    scope="session",
    params=[(family, False) for family in tiny.FAMILIES + tiny.ATTENTIVE]
    + [(family, True) for family in tiny.INT8],
    ids=lambda param: f"{param[0]}-int8" if param[1] else param[0],
)
def any_engine(request) -> Engine:
    """One tiny engine of every family, and of some that are in no table; of some also with int8
    weights (computing in float32, so that equality can be asked for)."""
    family, int8 = request.param
    return tiny.engine(family, int8=int8)


@pytest.fixture(scope="session")
def smollm() -> Engine:
    """The default model in float32, really loaded."""
    return load(quantization="none")


@pytest.fixture
def own_engine() -> Engine:
    """A tiny engine that a test may change; no token ends its text."""
    engine = tiny.engine()
    engine._ends = frozenset()
    return engine


STARTED = """js => { window.seen = []; window.again = [];
    for (const id of ['a', 'b']) Function('element', 'trigger', 'watch', js)(
        document.getElementById(id), (name, data) => seen.push(data),
        (name, done) => again.push(done)); }"""


@pytest.fixture
def browse() -> Iterator[Callable[[str], Any]]:
    """Opens HTML with the elements #a and #b in headless Chromium, with the style sheet and the
    script of the views on either. On the page `seen` lists what was selected, and each of `again`
    is to be called when an element was rendered anew."""
    chromium, playwright = shutil.which("chromium"), pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as tool:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = tool.chromium.launch(executable_path=chromium, args=flags)

        def opened(html: str) -> Any:
            page = browser.new_page()
            page.set_content(f"<style>{assets.css()}</style>{html}")
            page.evaluate(STARTED, assets.js())
            return page

        yield opened
        browser.close()


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_engine: Engine) -> Iterator[Runner]:
    """The real runner and recorder on a database of its own; every model is `own_engine`."""
    monkeypatch.setattr("app.runner.load", lambda ref, **options: own_engine)
    store = Store(tmp_path / "runs.db")
    made = Runner(store, measure=False)
    yield made
    made.close()
    store.close()
