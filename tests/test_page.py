"""The page's frame, without a browser: what it refuses to serve, and its style sheet."""

import re
import socket

import pytest

from analyzers.errors import BadInput, ModelNotFound
from app.page import main, theme
from app.page.context import PageContext
from app.runner import ModelChoice
from visualizations import header


def test_a_public_address_needs_a_password():
    with pytest.raises(BadInput, match="CANDOR_PASSWORD"):
        main.serve(host="0.0.0.0", port=0, browser=False, model=ModelChoice())


@pytest.mark.parametrize("port", [None, 99_999])
def test_a_port_in_use_or_impossible_is_one_sentence(port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = port or taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {wanted}.*--port"):
            main.serve(host="127.0.0.1", port=wanted, browser=False, model=ModelChoice())


def test_the_page_starts_without_a_model_and_says_why(monkeypatch, capsys, tmp_path):
    """A first start without a network: history still works, and a local model can be named."""
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    served = []
    monkeypatch.setattr(main.uvicorn.Server, "run", lambda self, sockets: served.append(sockets))

    def offline(*args, **kwargs):
        raise ModelNotFound("It could not be fetched: point to a local model with --model FOLDER.")

    monkeypatch.setattr("app.runner.load", offline)
    main.serve(host="127.0.0.1", port=0, browser=False, model=ModelChoice())
    said = capsys.readouterr().err
    assert "--model FOLDER. The page starts without a model." in said
    assert "Traceback" not in said and len(served) == 1


def test_the_page_is_built_without_a_model(runner):
    ctx = PageContext(runner, runner.store, ModelChoice())
    assert main.build(ctx).blocks
    assert "no model loaded" in header.render(runner.model_facts())


def test_no_selector_has_a_comma_inside_brackets():
    """Gradio cuts selectors at every comma, and would change what such a rule matches."""
    css = re.sub(r"/\*.*?\*/", "", theme.css(), flags=re.S)
    selectors = re.findall(r"(?:^|[{}])([^{}@;]+)\{", css)
    assert len(selectors) > 100
    assert not [each.strip() for each in selectors if re.search(r"\([^)]*,", each)]
