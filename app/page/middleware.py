"""Who may talk to the page: a check around the whole app, streams and uploads included.

Loopback needs no password, but a foreign website must not reach it: the Host header has to be an
address we listen on (else a name that resolves to 127.0.0.1 would pass), and an Origin has to be
that same address. Any other bind needs a password, asked for with HTTP Basic authentication.
"""

import base64
import secrets
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """ASGI middleware. `hosts`: names the page answers to; empty = any (with a password)."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], password: str = "") -> None:
        self.app = app
        self.hosts = hosts
        self.password = password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            return PlainTextResponse("This page does not answer to that host name.", 403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return PlainTextResponse("Another website may not use this page.", 403)
        if self.password and not self._knows(headers.get("authorization", "")):
            return PlainTextResponse(
                "A password is needed.",
                401,
                {"WWW-Authenticate": 'Basic realm="Candor", charset="UTF-8"'},
            )
        return None

    def _knows(self, authorization: str) -> bool:
        kind, _, coded = authorization.partition(" ")
        try:
            given = base64.b64decode(coded, validate=True).partition(b":")[2]
        except ValueError:
            return False
        return kind.lower() == "basic" and secrets.compare_digest(given, self.password.encode())


def _name(host: str) -> str:
    """The host without its port; "" where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
