"""What the documentation says is so: its commands, its paths, its example, its list of methods."""

import ast
import math
import re
import shlex
import types
from pathlib import Path

import pytest

import launch
from analyzers import registry
from analyzers.context import Context
from analyzers.params import build, knobs
from analyzers.task import Task
from analyzers.trace import Token
from app import bench, cli, methods_doc

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Lines of shell blocks that call launch.py, without what is set before and said behind."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    found = [re.search(r"python3 launch\.py(.*)", line) for line in lines]
    return [match[1] for match in found if match]


def test_the_methods_document_is_the_generated_one():
    assert methods_doc.DOCUMENT.read_text("utf-8") == methods_doc.render(), (
        "call .venv/bin/python -m app.methods_doc"
    )


def test_the_methods_document_has_every_method_and_knob():
    text = methods_doc.render()
    for name, method in registry.methods().items():
        section = text.split(f"\n`{name}` · ", 1)[1].split("\n## ", 1)[0]
        assert f"## {method.card.title}\n" in text
        assert method.card.source in section
        for row in knobs(method.params):
            assert f"| `{row.name}` |" in section


@pytest.mark.parametrize("command", commands(README))
def test_readme_commands_are_understood(command):
    words, _, _ = launch.options(shlex.split(command, comments=True))
    if words[:1] == ["test"]:
        return
    if not words or words[0].startswith("--"):
        words.insert(0, "page")
    given = cli._parser().parse_args(words)
    if words[0] == "run":
        method = registry.method(given.method)
        build(method.params, cli._pairs("--set", given.set))
    if words[0] == "bench" and given.name:
        assert given.name in bench.names()


def test_readme_names_the_two_commands_and_every_benchmark():
    called = [" ".join(shlex.split(each, comments=True)) for each in commands(README)]
    assert called[:2] == ["", "test"]
    assert {f"bench {name}" for name in bench.names()} <= set(called)


@documents
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target.partition("#")[0]).exists(), target


@documents
def test_paths_in_the_text_exist(document):
    ours = {path.name for path in ROOT.iterdir()} - {".venv"}
    for quoted in re.findall(r"`([\w./-]+)`", prose(document)):
        if quoted.split("/")[0] in ours:
            assert (ROOT / quoted).exists(), quoted


def test_the_example_of_a_method_works(tiny_engine):
    """The method of the README, run: it stops at the first token it is not sure of."""
    (source,) = blocks(README, "python")
    module = types.ModuleType("hesitant")
    exec(compile(source, "README.md", "exec"), vars(module))
    assert ast.get_docstring(ast.parse(source)).startswith("Hesitant: ")
    task, floor = Task("a text"), 0.3
    params = build(module.Params, {"floor": floor, "max_new": 40})
    events = list(module.run(tiny_engine, task, params, Context(1)))
    assert all(isinstance(event, module.CARD.emits) for event in events)
    logprobs = [event.logprob for event in events if isinstance(event, Token)]
    sure = [math.exp(logprob) >= floor for logprob in logprobs]
    assert logprobs and all(sure[:-1])
    assert len(events) == 40 or not sure[-1] or tiny_engine.ends(events[-1].id)
