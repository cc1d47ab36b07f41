"""The server around the page, without a page."""

import asyncio
from queue import Queue

import uvicorn

from app.page import main

ADDRESS = "http://localhost:7860"


async def nothing(scope, receive, send) -> None:
    """An app that no request reaches."""


def test_the_address_is_told_when_something_answers_there(monkeypatch):
    config = uvicorn.Config(nothing, port=0, lifespan="off", log_level="critical")
    server = main.Server(config, ADDRESS, browser=True)
    told: list[tuple[str, bool]] = []
    opened: Queue[str] = Queue()

    def tell(text: str) -> None:
        told.append((text, server.started))
        server.should_exit = True

    monkeypatch.setattr(main, "_say", tell)
    monkeypatch.setattr(main.webbrowser, "open", opened.put)
    asyncio.run(server.serve())
    assert told == [(f"Candor is at {ADDRESS} (Ctrl+C ends it)", True)]
    assert opened.get(timeout=30) == ADDRESS
