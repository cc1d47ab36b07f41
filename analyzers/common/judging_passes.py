"""How many passes of the model a judge takes, told before a search begins."""

from typing import get_args

from analyzers.common import rewards
from analyzers.common.self_judges import Kind

ONE_TEXT = 2
"""One pass reads what is new of a text, one asks about it."""


def passes_a_text(kind: Kind) -> int:
    """Of the model that judges, for a short text; 0 for programs."""
    return 0 if kind in get_args(rewards.Kind) else ONE_TEXT
