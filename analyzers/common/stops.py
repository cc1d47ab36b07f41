"""When a text is over: at an end token, or where a stop text is complete."""

from collections.abc import Sequence
from itertools import islice

from analyzers.engine import Engine
from analyzers.trace import Token, text_of

HELP = "Stop after any of these texts, one a line (\\n = line break)"


def stop_texts(lines: str) -> list[str]:
    r"""Those of a knob, one a line; \n stands for a line break."""
    return [line.replace("\\n", "\n") for line in lines.splitlines() if line]


def over(engine: Engine, stops: Sequence[str], answer: Sequence[Token]) -> str:
    """Why the last token ends the text; "" if it goes on, or there is none."""
    if not answer:
        return ""
    if engine.ends(answer[-1].id):
        return "end token"
    return next((f"stop text {stop!r}" for stop in stops if _completes(stop, answer)), "")


def _completes(stop: str, answer: Sequence[Token]) -> bool:
    """Whether the last token completed the stop text; what came to stand there before it does not
    count. Only as many tokens are looked at as the text has bytes: each adds at least one."""
    most = len(stop.encode("utf-8", "surrogatepass"))
    spelling = list(islice((token for token in reversed(answer) if token.bytes), most))[::-1]
    before = len(text_of(spelling[:-1]))
    return stop in text_of(spelling)[max(0, before - len(stop) + 1) :]
