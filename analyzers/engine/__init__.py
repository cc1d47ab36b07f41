"""The model, as methods see it. Nothing outside this folder touches transformers or its models."""

from analyzers.engine.core import Cursor, Engine, Step
from analyzers.engine.filters import Filters
from analyzers.engine.loading import load
from analyzers.engine.signals import draw, first_token, instead, token

__all__ = ["Cursor", "Engine", "Filters", "Step", "draw", "first_token", "instead", "load", "token"]
