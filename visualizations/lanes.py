"""Side by side: the answers that one run wrote beside its own, each in a lane."""

from collections.abc import Sequence

from analyzers.trace import MAIN, Candidate, Event, RunStarted, Token
from visualizations import compare
from visualizations.compare import Lane
from visualizations.text import clipped, escape

TITLE = "Side by side"
DRAWS = (Token,)
PROMPTS = "prompts"
"""Group of the candidates that say what each lane was asked."""
MOST = 600
"""Characters of a prompt that are shown."""


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Token) and event.lane != MAIN for event in events)


def render(events: Sequence[Event]) -> str:
    """The other lanes in the order in which they appear, then the run's own answer."""
    names = dict.fromkeys(event.lane for event in events if isinstance(event, Token))
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    own = f"{started.method} (the answer)" if started else "the answer"
    lanes = [Lane(name, events, name) for name in names if name != MAIN]
    lanes.append(Lane(own, events, MAIN))
    return _prompts(events) + compare.columns(lanes) + compare.table(lanes)


def _prompts(events: Sequence[Event]) -> str:
    asked = [e for e in events if isinstance(e, Candidate) and e.group == PROMPTS]
    lines = "".join(
        f"<div><dt>{escape(each.key)}</dt>"
        f'<dd dir="auto">{escape(clipped(each.text, MOST))}</dd></div>'
        for each in asked
    )
    return f'<dl class="candor-asked">{lines}</dl>' if lines else ""
