"""The guard around the page: who is let in, on every road into it."""

import base64
import secrets

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.page.context import PageContext
from app.page.main import application
from app.page.middleware import LOOPBACK, Guard
from app.runner import ModelChoice

PASSWORD = "pass:wörd"
ROADS = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("OPTIONS", "/"),
    ("POST", "/upload"),
    ("GET", "/stream"),
    ("DELETE", "/nowhere"),
]


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def upload(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(iter(["one ", "two"]))


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def client(hosts=LOOPBACK, password: str = "", base: str = "http://localhost:7860") -> TestClient:
    app = Starlette(
        routes=[
            Route("/", hello),
            Route("/upload", upload, methods=["POST"]),
            Route("/stream", stream),
            WebSocketRoute("/socket", talk),
        ]
    )
    return TestClient(Guard(app, frozenset(hosts), password), base_url=base)


def basic(word: str, user: str = "anyone") -> dict[str, str]:
    coded = base64.b64encode(f"{user}:{word}".encode()).decode()
    return {"Authorization": f"Basic {coded}"}


# Host and Origin


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7860", "LOCALHOST:7860", "127.0.0.1:7860", "[::1]:7860", "[::1]"],
)
def test_our_own_addresses_are_answered(host):
    assert client().get("/", headers={"Host": host}).text == "hello"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example",
     "evil.example@", "evil.example#localhost", "", ":7860", "localhost@evil.example", "[::2]:7860",
     "[::1", "[", "]", "[x]:1", "127.0.0.1\\@evil.example", "0.0.0.0", "\xff"],
)  # fmt: skip
def test_foreign_missing_and_garbled_hosts_are_not(host):
    """A name that was made to resolve to 127.0.0.1 comes with itself as host."""
    found = client().get("/", headers={"Host": host.encode()})
    assert found.status_code == 403 and "hello" not in found.text


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://evil.example:7860", "http://localhost:9999", "null", "",
     "http://localhost:7860.evil.example", "http://[", "localhost:7860", "http://127.0.0.1:7860"],
)  # fmt: skip
def test_another_website_is_refused_on_every_road(origin):
    for method, road in ROADS:
        assert client().request(method, road, headers={"Origin": origin}).status_code == 403


def test_our_own_page_may_call_itself():
    headers = {"Origin": "http://localhost:7860"}
    assert client().post("/upload", content=b"12345", headers=headers).text == "5"
    assert client().get("/stream", headers=headers).text == "one two"
    headers = {"Host": "[::1]:7860", "Origin": "http://[::1]:7860"}
    assert client().get("/", headers=headers).text == "hello"


def test_with_a_password_any_name_is_answered_but_the_origin_counts():
    far = client((), PASSWORD, "http://lab.example:80")
    assert far.get("/", headers=basic(PASSWORD)).text == "hello"
    headers = basic(PASSWORD) | {"Origin": "http://evil.example"}
    assert far.get("/", headers=headers).status_code == 403


# Password


def test_the_password_is_asked_on_every_road():
    guarded = client((), PASSWORD)
    for method, road in ROADS:
        found = guarded.request(method, road)
        assert found.status_code == 401
        assert found.headers["www-authenticate"].startswith("Basic ")
        assert guarded.request(method, road, headers=basic(PASSWORD)).status_code != 401
        assert guarded.request(method, road, headers=basic("pass")).status_code == 401


def test_the_right_password_opens_with_any_user_name():
    guarded = client((), PASSWORD)
    for headers in (basic(PASSWORD), basic(PASSWORD, ""), basic(PASSWORD, "ü")):
        assert guarded.get("/", headers=headers).text == "hello"
    lower = {"Authorization": basic(PASSWORD)["Authorization"].replace("Basic", "basic")}
    assert guarded.get("/", headers=lower).text == "hello"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Basic",
        "Basic ",
        "Basic ====",
        "Basic not base64!",
        "Basic é",
        "Bearer " + base64.b64encode(b"x:pass").decode(),
        basic("")["Authorization"],
        basic(PASSWORD + "x")["Authorization"],
        basic(PASSWORD.upper())["Authorization"],
        "Basic " + base64.b64encode(PASSWORD.encode()).decode(),  # no user before it
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Basic " + "A" * 100_000,
    ],
)
def test_wrong_and_garbled_passwords_do_not(given):
    found = client((), PASSWORD).get("/", headers={"Authorization": given.encode("latin-1")})
    assert (found.status_code, found.text) == (401, "A password is needed.")


def test_passwords_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = secrets.compare_digest

    def watched(given, wanted):
        compared.append((given, wanted))
        return real(given, wanted)

    monkeypatch.setattr(secrets, "compare_digest", watched)
    client((), PASSWORD).get("/", headers=basic("guess"))
    assert compared == [(b"guess", PASSWORD.encode())]


# Web sockets


def test_a_web_socket_passes_the_same_guard():
    ours = {"Host": "localhost:7860"}
    for guarded, headers in ((client(), ours), (client((), PASSWORD), basic(PASSWORD))):
        with guarded.websocket_connect("/socket", headers=headers) as socket:
            assert socket.receive_text() == "hello"
    for guarded, headers in (
        (client(), {"Host": "evil.example"}),
        (client(), ours | {"Origin": "http://evil.example"}),
        (client((), PASSWORD), {}),
        (client((), PASSWORD), basic("guess")),
    ):
        with (
            pytest.raises(WebSocketDisconnect) as closed,
            guarded.websocket_connect("/socket", headers=headers),
        ):
            pass
        assert closed.value.code == 1008


# The real page


def test_the_real_page_is_guarded_on_all_its_roads(runner):
    ctx = PageContext(runner, runner.store, ModelChoice())
    page = TestClient(application(ctx, frozenset(), PASSWORD), base_url="http://lab.example")
    roads = ["/", "/config", "/theme.css", "/plotly.js", "/manifest.json", "/robots.txt"]
    roads += ["/assets/index.js", "/static/img/logo.svg", "/login", "/docs", "/openapi.json"]
    api = ["upload", "queue/join", "queue/data", "info", "file=/etc/passwd", "heartbeat/x"]
    api += ["run/predict", "cancel", "reset", "upload_progress", "startup-events", "proxy=http://x"]
    for road in [*roads, *(f"{start}/{name}" for start in ("", "/gradio_api") for name in api)]:
        for method in ("GET", "POST"):
            assert page.request(method, road).status_code == 401, road
    assert page.get("/config", headers=basic(PASSWORD)).status_code == 200
