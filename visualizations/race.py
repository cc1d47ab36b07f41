"""A race: one prompt decoded plainly and with drafts, each lane with a clock of its own.

A lane's clock counts the seconds that the model worked for it, so that both could share one model.
"""

import math
from collections.abc import Sequence

from analyzers.trace import Event, Metric, Note, RunEnded, RunStarted, Token
from visualizations import status
from visualizations.compare import Lane
from visualizations.text import counted, escape, number, percent, quoted

EVEN = 0.05
"""Speeds this close (as a share) are called equal: one race is one measurement."""
NEAR_TIE = 0.125
"""Nats between the two likeliest tokens. A pass over several tokens rounds otherwise than a pass
over one, and up to this either may come out on top in half precision: for logits of 16 to 32 it is
the step from one number of bfloat16 to the next."""


def head(name: str, events: Sequence[Event], seconds: float, badge: str = "") -> str:
    """What stands over a lane: its clock, and how far it is. seconds: of its own clock so far."""
    tokens = sum(isinstance(event, Token) for event in events)
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    ended = _ended(events)
    seconds = ended.seconds if ended else seconds
    most = started.params.get("max_new", 0) if started else 0
    whole = ended is not None and ended.status == "done"
    share = 1.0 if whole else tokens / most if most else 0.0
    rate = f"{tokens / seconds:.1f}" if tokens and seconds > 0 else "–"
    mark = f'<span class="mark">{escape(badge)}</span>' if badge else ""
    return (
        f'<header class="candor x-race{" won" if badge else ""}">'
        f"<h4>{escape(name)}{mark}</h4>"
        f'<p class="clock"><b>{seconds:.1f}</b> s</p>'
        f'<p class="far"><b>{tokens:,}</b> tokens <b>{rate}</b> tokens/s</p>'
        f'<div class="track"><u style="width:{100 * min(share, 1.0):.0f}%"></u></div></header>'
    )


def speedup(plain: Lane, drafted: Lane) -> float | None:
    """Tokens a second of the drafted lane over those of the plain one, the prompt's reading
    included; None unless both were written to their end."""
    ends = [_ended(lane.events) for lane in (plain, drafted)]
    rates = [
        end.tokens / end.seconds
        for end in ends
        if end and end.status == "done" and end.tokens and end.seconds > 0
    ]
    return rates[1] / rates[0] if len(rates) == 2 else None


def winner(plain: Lane, drafted: Lane) -> Lane | None:
    """None where there is no clear one."""
    ratio = speedup(plain, drafted)
    if ratio is None or abs(ratio - 1) < EVEN:
        return None
    return drafted if ratio > 1 else plain


def verdict(plain: Lane, drafted: Lane) -> str:
    """How much faster, and whether the texts are the same. Where there was no full race: what
    failed, "" if nothing did."""
    ratio = speedup(plain, drafted)
    if ratio is None:
        return "".join(map(_failure, (plain, drafted)))
    kind, said = "even", "the speed: no clear winner"
    if abs(ratio - 1) >= EVEN:
        kind, said = ("fast", "faster") if ratio > 1 else ("slow", "the speed: slower here")
    why = [_same(plain, drafted), *_efficiency(drafted.events)]
    notes = [escape(event.text) for event in drafted.events if isinstance(event, Note)]
    lines = "".join(f"<p>{line}</p>" for line in why)
    small = "".join(f'<p class="note">{line}</p>' for line in notes)
    return (
        f'<section class="candor x-race-verdict {kind}">'
        f'<p class="big"><b>{number(ratio)} ×</b> {said}</p><div>{lines}{small}</div></section>'
    )


def _failure(lane: Lane) -> str:
    end = _ended(lane.events)
    if end is None or end.status != "failed":
        return ""
    return status.problem(f"{lane.name}: {end.reason}")


def _same(plain: Lane, drafted: Lane) -> str:
    """Whether the tokens are the same, or where they part and how close it was there."""
    first, second = plain.tokens, drafted.tokens
    pairs = zip(first, second, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a.id != b.id), min(len(first), len(second)))
    longest = max(len(first), len(second))
    if same == longest:
        return f"<b>{same:,} of {longest:,} tokens identical</b>"
    if temperature := _temperature(plain.events):
        return (
            f"Sampled at temperature {temperature:g}: two draws from the same distribution, so the "
            "texts need not be equal. At temperature 0 they are."
        )
    said = f"<b>{same:,} of {longest:,} tokens identical, then the texts part</b>"
    if same == min(len(first), len(second)):
        return f"{said}: one of them ends there."
    wrote = f"{quoted(first[same].text)} without drafts, {quoted(second[same].text)} with them"
    return f"{said}: {wrote}{_close(first[same])}."


def _close(token: Token) -> str:
    """How close the two likeliest tokens were, and what that means."""
    if len(token.top) < 2:
        return ""
    best, second = (logprob for _, _, logprob in token.top[:2])
    gap = best - second
    means = "a near-tie, which rounding decides"
    if round(gap, 6) > NEAR_TIE:
        means = "which rounding alone does not explain"
    return (
        f". The two likeliest there had {percent(math.exp(best))} and "
        f"{percent(math.exp(second))} ({number(gap, 3)} nats apart), {means}"
    )


def _efficiency(events: Sequence[Event]) -> list[str]:
    """Tokens that a pass of the model wrote, and how many of them were drafts."""
    said = []
    drafts = sum(isinstance(event, Token) and event.origin == "drafted" for event in events)
    for event in events:
        if isinstance(event, Metric) and event.name == "mean acceptance length":
            each = f"{number(event.value)} tokens a pass instead of 1"
            said.append(f"{each}: {counted(drafts, 'drafted token')} accepted")
    return said


def _temperature(events: Sequence[Event]) -> float:
    started = next(event for event in events if isinstance(event, RunStarted))
    return float(started.params.get("temperature", 0.0))


def _ended(events: Sequence[Event]) -> RunEnded | None:
    return next((event for event in events if isinstance(event, RunEnded)), None)
