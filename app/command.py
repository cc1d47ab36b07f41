"""A run as the command line that would make it again."""

import json
import shlex
from collections.abc import Iterable

from analyzers.trace import Event, RunStarted


def as_command(events: Iterable[Event]) -> str:
    """`python3 launch.py run ...` with prompt, settings, seed and model; "" before a run started.

    A fork off another run is not repeated as a fork: the command writes from the prompt. It never
    allows a model to run its own code: the run may come from somebody else.
    """
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        return ""
    words = ["python3", "launch.py", "run", started.method, *_prompt(started)]
    if started.prefix:
        words += [f"--prefix={started.prefix}"]
    for name, value in started.params.items():
        words += ["--set", f"{name}={_plain(value)}"]
    for name, text in started.inputs.items():
        words += [f"--input={name}={'@' if text.startswith('@') else ''}{text}"]
    words += ["--seed", str(started.seed), f"--model={started.model['name']}"]
    for option in ("quantization", "dtype", "device"):
        words += [f"--{option}", str(started.model.get(option, "auto"))]
    if "compute" in started.model:
        words += ["--compute", str(started.model["compute"])]
    if not started.model.get("double", True):
        words += ["--no-double"]
    return shlex.join(words)


def _prompt(started: RunStarted) -> list[str]:
    """With "=", so that a text which begins with "-" is not taken for an option."""
    if isinstance(started.prompt, str):
        return ["--raw", f"--prompt={started.prompt}"]
    turns = list(started.prompt)
    words = ["--chat"]
    if turns[0]["role"] == "system":
        words += [f"--system={turns.pop(0)['content']}"]
    if earlier := turns[:-1]:
        words += ["--earlier", json.dumps([dict(turn) for turn in earlier], ensure_ascii=False)]
    return [*words, f"--prompt={turns[-1]['content']}"]


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
