"""What is asked of a method: a frozen value that the page and the command line build."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from analyzers.errors import EmptyPrompt
from analyzers.trace import Token, Turn


@dataclass(frozen=True)
class Task:
    """prompt: chat turns (the last one is the user's) or raw text.

    prefix: a beginning of the answer that the model goes on from.
    written: tokens of an earlier run that stay, when this run forks off from it; they follow the
    prompt and the prefix. inputs: what `CARD.takes` names.
    """

    prompt: str | tuple[Turn, ...]
    prefix: str = ""
    written: tuple[Token, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


def chat(user: str, system: str = "", earlier: tuple[Turn, ...] = ()) -> tuple[Turn, ...]:
    """Chat turns: the system prompt (if any), the earlier turns, and the user's."""
    first = ({"role": "system", "content": system},) if system.strip() else ()
    return (*first, *earlier, {"role": "user", "content": user})


def check(task: Task) -> Task:
    """Raises: EmptyPrompt where the model would have nothing to start from."""
    turns = ({"content": task.prompt},) if isinstance(task.prompt, str) else task.prompt
    last = turns[-1]["content"] if turns else ""
    if not last.strip() and not task.prefix.strip():
        raise EmptyPrompt("The prompt is empty: type a question or some text first.")
    return task
