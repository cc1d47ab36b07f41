"""Imports point only upward: each part of the code knows what stands above it, and no more."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from analyzers.card import Family

ROOT = Path(__file__).parent.parent
OURS = ("analyzers", "visualizations", "sessions", "app")
VALUES = tuple(
    f"analyzers.{name}" for name in ("trace", "params", "errors", "card", "task", "context")
)
HOME = ("analyzers.home",)
LEARNING = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "gguf", "numpy",
    "huggingface_hub", "tqdm", "psutil", "jinja2",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A folder or file, and what it may import: modules of ours, packages ("*": any but gradio)."""

    path: str
    ours: tuple[str, ...]
    packages: tuple[str, ...] = ()


# The first that fits a file counts; a folder that is not here has no rule and fails.
LAYERS = (
    Layer("analyzers/home.py", VALUES, ("platformdirs",)),
    Layer("analyzers/engine/digits.py", (*VALUES, "analyzers.engine"), (*LEARNING, "sklearn")),
    Layer("analyzers/engine/", (*VALUES, *HOME, "analyzers.engine"), LEARNING),
    Layer("analyzers/common/rewards.py", (*VALUES, "analyzers.common"), ("regex",)),
    Layer("analyzers/common/", (*VALUES, "analyzers.engine", "analyzers.common"), LEARNING),
    Layer(
        "analyzers/evaluation/",
        (*VALUES, "analyzers.engine", "analyzers.common", "analyzers.evaluation"),
        (*LEARNING, "sklearn"),
    ),
    Layer(
        "analyzers/workbench.py",
        (*VALUES, "analyzers.registry", "analyzers.engine", "analyzers.common",
         "analyzers.evaluation"),
    ),
    *(
        Layer(f"analyzers/{family}/", (*VALUES, "analyzers.engine", "analyzers.common"),
              ("torch", "numpy", *({"inspection": ("captum",)}.get(family, ()))))
        for family in get_args(Family)
    ),
    Layer("analyzers/", VALUES),
    Layer("visualizations/", (*VALUES, "visualizations"), ("plotly",)),
    Layer("sessions/", (*VALUES, "sessions"), ("sqlite_utils", "ulid", "psutil")),
    Layer("app/page/", OURS, ("*", "gradio")),
    Layer("app/", OURS, ("*",)),
)  # fmt: skip


def imports(source: str) -> list[str]:
    """Every module that is imported anywhere in it, also inside functions; names with their
    module. What only a type checker sees does not count."""
    tree = ast.parse(source)
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names]
    return found


def begins(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def wrong(path: str, source: str) -> list[str]:
    """What `source`, if it stood at `path`, would import against the order."""
    layer = next(layer for layer in LAYERS if path.startswith(layer.path))
    return [name for name in imports(source) if not _allowed(layer, name)]


def _allowed(layer: Layer, name: str) -> bool:
    top = name.split(".")[0]
    if top in OURS:
        return name == "analyzers" or begins(name, layer.ours)  # the package itself is empty
    if top in sys.stdlib_module_names:
        return True
    return top in layer.packages or ("*" in layer.packages and top not in ("gradio", ""))


def modules() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for part in OURS for path in (ROOT / part).rglob("*.py")
    )


def test_imports_point_only_upward():
    assert len(modules()) > 30
    against = {path: found for path in modules() if (found := wrong(path, _read(path)))}
    assert against == {}


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("analyzers/trace.py", "import torch"),
        ("analyzers/trace.py", "import numpy.linalg as la"),
        ("analyzers/trace.py", "from analyzers.engine import Engine"),
        ("analyzers/task.py", "from analyzers import registry"),
        ("analyzers/card.py", "import platformdirs"),
        ("analyzers/context.py", "if True:\n    from analyzers.engine.core import Engine"),
        ("analyzers/registry.py", "from analyzers.decoding import sampling"),
        ("analyzers/engine/core.py", "from analyzers.decoding.sampling import run"),
        ("analyzers/engine/core.py", "from analyzers import registry"),
        ("analyzers/engine/core.py", "def f():\n    from sessions.store import Store"),
        ("analyzers/engine/core.py", "import visualizations"),
        ("analyzers/common/judge.py", "from analyzers.judging import p_true"),
        ("analyzers/decoding/sampling.py", "from analyzers.decoding import read"),
        ("analyzers/decoding/sampling.py", "from analyzers.search.tree import run"),
        ("analyzers/decoding/sampling.py", "import transformers"),
        ("analyzers/decoding/sampling.py", "from app.runner import Job"),
        ("analyzers/decoding/sampling.py", "from . import read"),
        ("visualizations/tokens.py", "import torch"),
        ("visualizations/tokens.py", "import gradio as gr"),
        ("visualizations/tokens.py", "from sessions.store import Store"),
        ("visualizations/tokens.py", "from analyzers.engine import token"),
        ("visualizations/tokens.py", "from analyzers import registry"),
        ("sessions/store.py", "from visualizations import tokens"),
        ("sessions/store.py", "from app import runner"),
        ("sessions/store.py", "def f():\n    import torch"),
        ("app/runner.py", "import gradio"),
        ("app/cli.py", "def f():\n    from gradio import Blocks"),
        ("app/bench/decode.py", "from gradio.blocks import Blocks"),
    ],
)
def test_a_wrong_import_is_seen(path, source):
    assert wrong(path, source)


def test_only_types_may_point_downward():
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from analyzers.engine import E"
    )
    assert wrong("analyzers/context.py", source) == []
    assert wrong("app/page/main.py", "import gradio\nfrom app.runner import Runner") == []


def test_the_command_line_loads_the_page_only_when_it_is_asked_for():
    for path in ("app/cli.py", "app/command.py", "app/runner.py", "app/doctor.py", "launch.py"):
        top = [
            name
            for node in ast.parse(_read(path)).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imports(ast.unparse(node))
        ]
        assert not [name for name in top if begins(name, ("app.page", "gradio"))]


def test_drawing_and_replaying_never_load_torch():
    names = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in modules()
        if path.startswith(("visualizations/", "sessions/"))
    ]
    code = (
        f"import sys, importlib\nfor name in {['analyzers.trace', *names]!r}:\n"
        "    importlib.import_module(name)\n"
        "print([n for n in ('torch', 'transformers', 'gradio') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
