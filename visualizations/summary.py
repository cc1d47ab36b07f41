"""What the numbers of a finished run add up to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from analyzers.trace import MAIN, Event, RunEnded, Token, surviving
from visualizations.signals import probability
from visualizations.status import reason
from visualizations.text import counted, escape, number, percent, quoted

Trust = Mapping[str, tuple[float, float]]
"""Name of a card's signal -> (AUROC for "the answer is right", half of its 95 % interval)."""

_UNMEASURED = "Whether these numbers tell right answers from wrong ones: not measured yet"


@dataclass(frozen=True)
class Summary:
    """Log-probabilities and entropies in nats. None where nothing could be counted.

    tokens: how many count. forced: how many of these were set by hand. uncounted: tokens without
    a log-probability. least: (position, text, probability) of the least sure token. truncated:
    the answer was cut off, why: for what reason.
    """

    tokens: int
    forced: int
    uncounted: int
    logprob: float | None
    mean_logprob: float | None
    perplexity: float | None
    mean_probability: float | None
    least: tuple[int, str, float] | None
    mean_entropy: float | None
    max_entropy: float | None
    truncated: bool
    why: str


def summarize(events: Iterable[Event], lane: str = MAIN) -> Summary:
    """Counts every token of the answer that has a log-probability, the end token included.

    Tokens set by hand belong to the answer and count. Where anything was written, what was only
    read (origin "read") does not; where everything was read, all of it does.
    """
    events = list(events)
    tokens = surviving(events, lane)
    answer = [token for token in tokens if token.origin != "read"] or tokens
    known = [(token, token.logprob) for token in answer if token.logprob is not None]
    entropies = [token.entropy for token in answer if token.entropy is not None]
    ended = next((event for event in events if isinstance(event, RunEnded)), None)
    total = math.fsum(logprob for _, logprob in known) if known else None
    mean = None if total is None else total / len(known)
    least = min(known, key=lambda pair: pair[1])[0] if known else None
    return Summary(
        tokens=len(known),
        forced=sum(token.origin == "forced" for token, _ in known),
        uncounted=len(answer) - len(known),
        logprob=total,
        mean_logprob=mean,
        # A mean so low that e^-mean has no float is shown as none rather than as infinity.
        perplexity=None if mean is None or mean < -700 else math.exp(-mean),
        mean_probability=None if mean is None else math.exp(mean),
        least=None if least is None else _point(least),
        mean_entropy=math.fsum(entropies) / len(entropies) if entropies else None,
        max_entropy=max(entropies, default=None),
        truncated=ended is not None and _cut(ended),
        why="" if ended is None else reason(ended),
    )


def render(summary: Summary, trust: Trust | None = None) -> str:
    """Cards with number, unit and direction; `trust` has the AUROC of those that were measured,
    and a line below says of which it was not.

    Names in `trust`: logprob, perplexity, least, mean_entropy.
    """
    if not summary.tokens:
        return (
            '<section class="candor candor-summary"><p class="empty">How sure the model was is '
            "summed up here when a run has ended.</p></section>"
        )
    flag = ""
    if summary.truncated:
        flag = (
            f'<p class="flag"><b>Cut off</b> ({escape(summary.why)}): the model had not ended its '
            "answer, so the numbers leave out how sure it was to stop there.</p>"
        )
    shown, trust = list(_cards(summary)), trust or {}
    cards = "".join(
        f'<div class="card"><dt>{label}</dt><dd><b>{value}</b> {unit}</dd>'
        f"<dd>{detail}</dd><dd>{direction}</dd>{_badge(trust, name)}</div>"
        for name, label, value, unit, detail, direction in shown
    )
    unmeasured = [label for name, label, *_ in shown if name not in trust]
    notes = [*_left_out(summary), *_not_measured(unmeasured, len(shown))]
    said = f'<p class="note">{" · ".join(notes)}</p>' if notes else ""
    return (
        f'<section class="candor candor-summary">{flag}<dl class="cards">{cards}</dl>'
        f"{said}</section>"
    )


def _cut(ended: RunEnded) -> bool:
    return ended.status != "done" or ended.reason == "max_new reached"


def _point(token: Token) -> tuple[int, str, float]:
    return token.pos, token.text, probability(token) or 0.0


def _cards(summary: Summary) -> Iterable[tuple[str, str, str, str, str, str]]:
    """(name, label, number, unit, detail, direction) of each card that has a number."""
    if summary.logprob is not None and summary.mean_logprob is not None:
        mean = f"{number(summary.mean_logprob)} nats a token"
        total = number(summary.logprob, 1)
        yield "logprob", "log-probability, sum", total, "nats", mean, "higher = surer"
    if summary.perplexity is not None and summary.mean_probability is not None:
        mean = f"mean probability {percent(summary.mean_probability)}"
        yield "perplexity", "perplexity", number(summary.perplexity), "", mean, "lower = surer"
    if summary.least is not None:
        pos, text, p = summary.least
        name = quoted(text, 16) if text else "part of a character"
        token = f'<button type="button" class="link" data-go="{pos}">{name}</button>'
        yield "least", "least sure token", percent(p), "", token, "higher = surer"
    if summary.mean_entropy is not None and summary.max_entropy is not None:
        mean, most = number(summary.mean_entropy), f"highest {number(summary.max_entropy)}"
        yield "mean_entropy", "mean entropy", mean, "nats", most, "lower = surer"


def _badge(trust: Trust, name: str) -> str:
    if name not in trust:
        return ""
    auroc, half = trust[name]
    # An interval that holds 0.5 cannot be told from tossing a coin.
    if auroc - half <= 0.5:
        return f'<dd><span class="badge no">at chance: {auroc:.2f} ± {half:.2f}</span></dd>'
    return f'<dd><span class="badge ok">AUROC {auroc:.2f} ± {half:.2f}</span></dd>'


def _left_out(summary: Summary) -> Iterable[str]:
    """How the tokens that count here differ from all of the answer."""
    if summary.forced:
        yield f"{summary.forced:,} of {counted(summary.tokens, 'token')} set by hand"
    if summary.uncounted:
        yield f"{counted(summary.uncounted, 'token')} without a number left out"


def _not_measured(labels: Sequence[str], all: int) -> Iterable[str]:
    if labels:
        of = "" if len(labels) == all else f" ({', '.join(labels)})"
        yield f"{_UNMEASURED}{of}"
