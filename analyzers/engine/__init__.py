"""The model, as methods see it. Nothing outside this folder touches transformers or its models."""

from analyzers.engine.core import Engine
from analyzers.engine.filters import Filters
from analyzers.engine.loading import load
from analyzers.engine.routing import Policy
from analyzers.engine.signals import chosen, draw, first_token, instead, token
from analyzers.engine.trees import Checked, Tree
from analyzers.engine.values import Cursor, Options, Step

__all__ = [
    "Checked",
    "Cursor",
    "Engine",
    "Filters",
    "Options",
    "Policy",
    "Step",
    "Tree",
    "chosen",
    "draw",
    "first_token",
    "instead",
    "load",
    "token",
]
