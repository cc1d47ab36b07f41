"""What the numbers of a finished run add up to."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from analyzers.trace import MAIN, Event, RunEnded, Token, surviving
from visualizations.signals import probability
from visualizations.text import duration, escape, number, percent, quoted

Trust = Mapping[str, tuple[float, float]]
"""Name of a card's signal -> (AUROC for "the answer is right", half of its 95 % interval)."""

_UNMEASURED = "Whether a high number means a right answer has not been measured for this model"


@dataclass(frozen=True)
class Summary:
    """Log-probabilities and entropies in nats. None where nothing could be counted.

    tokens: how many count. forced: how many of these were set by hand. uncounted: tokens without
    a log-probability. least: (position, text, probability) of the least sure token. truncated:
    the answer was cut off, why: for what reason. per_second counts every token made, undone ones
    included.
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
    seconds: float | None
    per_second: float | None


def summarize(events: Iterable[Event], lane: str = MAIN) -> Summary:
    """Counts every token of the answer that has a log-probability, the end token included.

    Tokens set by hand belong to the answer and count. Where anything was written, what was only
    read (origin "read") does not; where everything was read, all of it does.
    """
    events = list(events)
    tokens = surviving(events, lane)
    answer = [token for token in tokens if token.origin != "read"] or tokens
    counted = [(token, token.logprob) for token in answer if token.logprob is not None]
    entropies = [token.entropy for token in answer if token.entropy is not None]
    ended = next((event for event in events if isinstance(event, RunEnded)), None)
    seconds = ended.seconds if ended and ended.seconds > 0 else None
    total = math.fsum(logprob for _, logprob in counted) if counted else None
    mean = None if total is None else total / len(counted)
    least = min(counted, key=lambda pair: pair[1])[0] if counted else None
    return Summary(
        tokens=len(counted),
        forced=sum(token.origin == "forced" for token, _ in counted),
        uncounted=len(answer) - len(counted),
        logprob=total,
        mean_logprob=mean,
        # A mean so low that e^-mean has no float is shown as none rather than as infinity.
        perplexity=None if mean is None or mean < -700 else math.exp(-mean),
        mean_probability=None if mean is None else math.exp(mean),
        least=None if least is None else _point(least),
        mean_entropy=math.fsum(entropies) / len(entropies) if entropies else None,
        max_entropy=max(entropies, default=None),
        truncated=ended is not None and _cut(ended),
        why="" if ended is None else ended.reason or ended.status,
        seconds=seconds,
        per_second=ended.tokens / seconds if ended and seconds and ended.tokens else None,
    )


def render(summary: Summary, trust: Trust | None = None) -> str:
    """Cards with number, unit and direction; `trust` has the AUROC of those that were measured.

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
    cards = "".join(
        f'<div class="card"><dt>{label}</dt><dd><b>{value}</b> {unit}</dd>'
        f"<dd>{detail}</dd><dd>{direction}</dd><dd>{_badge(trust or {}, name)}</dd></div>"
        for name, label, value, unit, detail, direction in _cards(summary)
    )
    return (
        f'<section class="candor candor-summary">{flag}<dl class="cards">{cards}</dl>'
        f'<p class="note">{_counts(summary)}</p></section>'
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
        return f'<span class="badge" title="{_UNMEASURED}">not measured yet</span>'
    auroc, half = trust[name]
    # An interval that holds 0.5 cannot be told from tossing a coin.
    if auroc - half <= 0.5:
        return f'<span class="badge no">at chance: {auroc:.2f} ± {half:.2f}</span>'
    return f'<span class="badge ok">AUROC {auroc:.2f} ± {half:.2f}</span>'


def _counts(summary: Summary) -> str:
    parts = [f"{summary.tokens:,} token{'s' * (summary.tokens != 1)}"]
    if summary.forced:
        parts.append(f"{summary.forced:,} of them set by hand")
    if summary.uncounted:
        parts.append(f"{summary.uncounted:,} without a number left out")
    if summary.seconds is not None:
        parts.append(duration(summary.seconds))
    if summary.per_second is not None:
        parts.append(f"{summary.per_second:.1f} tokens/s")
    return " · ".join(parts)
