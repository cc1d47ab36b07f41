"""Attribution: the text, every token tinted by how much it spoke for or against the target."""

from collections.abc import Sequence
from dataclasses import dataclass

from analyzers.trace import MAIN, Event, Metric, Scores, Token, surviving
from visualizations.text import escape, number, percent, quoted, spaced

TITLE = "What carried this token"
DRAWS: tuple[type[Event], ...] = (Scores, Metric, Token)

_MARK = "attribution: "
_LISTED = 12


@dataclass(frozen=True)
class _Found:
    """before: the tokens in front of the target; share: position -> nats, signed; largest: size of
    the largest share of a token that is no special one, which has the full tint (0: nothing)."""

    scores: Scores
    before: list[Token]
    target: list[Token]
    share: dict[int, float]
    metrics: dict[str, float]

    @property
    def method(self) -> str:
        return self.scores.name.removeprefix(_MARK)

    @property
    def largest(self) -> float:
        words = [abs(self.share.get(token.pos, 0.0)) for token in self.before if token.bytes]
        return max(words, default=0.0) or max(map(abs, self.share.values()), default=0.0)


def fits(events: Sequence[Event]) -> bool:
    return any(_is_ours(event) for event in events)


def render(events: Sequence[Event]) -> str:
    found = _find(events)
    if found is None:
        return ""
    text = "".join(_span(token, found) for token in found.before)
    target = "".join(
        f'<span class="x-target" data-go="{token.pos}" title="the token that is explained">'
        f"{_shown(token)}</span>"
        for token in found.target
    )
    return (
        f'<section class="candor x-attribution">{_legend(found)}'
        f'<div class="x-text" dir="auto">{text}{target}</div>'
        f"{_numbers(found)}{_strongest(found)}</section>"
    )


def detail(events: Sequence[Event], pos: int, row: int | None) -> str:
    """The share of the token at `pos`; "" for tokens without one. `row` is not used."""
    found = _find(events)
    token = next((token for token in found.before if token.pos == pos), None) if found else None
    if found is None or token is None or pos not in found.share:
        return ""
    share = found.share[pos]
    ranked = sorted(found.share, key=lambda place: -abs(found.share[place]))
    total = sum(map(abs, found.share.values()))
    way = "for" if share > 0 else "against" if share < 0 else "neither for nor against"
    size = f", {percent(abs(share) / total)} of all sizes together" if total else ""
    return (
        f'<section class="candor x-attribution-detail"><h3>Attribution of {quoted(token.text)}</h3>'
        f"<p><b>{_signed(share)} nats</b>: it spoke {way} {_target(found)}</p>"
        f'<p class="note">number {ranked.index(pos) + 1:,} of {len(ranked):,}{size}; '
        f"{escape(found.method)}</p></section>"
    )


def _is_ours(event: Event) -> bool:
    return isinstance(event, Scores) and event.name.startswith(_MARK) and event.lane == MAIN


def _find(events: Sequence[Event]) -> _Found | None:
    """The last attribution of the run, with what belongs to it."""
    scores = next((event for event in reversed(events) if _is_ours(event)), None)
    if not isinstance(scores, Scores):
        return None
    tokens = surviving(events)
    return _Found(
        scores,
        [token for token in tokens if token.pos < scores.pos],
        [token for token in tokens if token.pos >= scores.pos],
        {int(pos): value for pos, value in zip(scores.over, scores.values, strict=True)},
        {event.name: event.value for event in events if isinstance(event, Metric)},
    )


def _span(token: Token, found: _Found) -> str:
    """The spaces before a word stand outside of its tint."""
    share = found.share.get(token.pos)
    word = token.text.lstrip(" ") or token.text
    lead = token.text[: len(token.text) - len(word)]
    classes = "x-t" if token.bytes else "x-t x-special"
    style, hover = "", "no share"
    if share is not None:
        classes += " x-for" if share > 0 else " x-against" if share < 0 else ""
        strength = min(abs(share) / found.largest, 1.0) if found.largest else 0.0
        style = f' style="--s:{100 * strength:.0f}%"'
        hover = f"{_signed(share)} nats"
    return (
        f'{lead}<span class="{classes}"{style} data-go="{token.pos}" title="{hover}">'
        f"{escape(word)}</span>"
    )


def _legend(found: _Found) -> str:
    limit = number(found.largest)
    return (
        '<p class="x-legend"><span>against</span>'
        f'<span class="x-ramp" aria-hidden="true"></span><span>for</span> {_target(found)}'
        f'<span class="x-unit">−{limit} to +{limit} nats of log-probability · '
        f"{escape(found.method)}</span></p>"
    )


def _numbers(found: _Found) -> str:
    """F at both ends, the sum, and what is missing; "" where the run has no such numbers."""
    names = ("F(text)", "F(baseline)", "sum of attributions", "completeness error")
    if any(name not in found.metrics for name in names):
        return ""
    text, start, total, error = (found.metrics[name] for name in names)
    relative = found.metrics.get("relative completeness error", 0.0)
    promised = found.method == "integrated gradients"
    about = (
        "completeness error: what the sum misses the change by, 0 on a path followed exactly"
        if promised
        else "this method does not promise that its numbers add up to the change"
    )
    mark = ' class="x-off"' if promised and relative > 0.05 else ""
    return (
        '<dl class="x-numbers">'
        f'<div title="log-probability of the target after the text"><dt>F(text)</dt>'
        f"<dd>{number(text)}</dd></div>"
        f'<div title="log-probability of the target after a text that says nothing">'
        f"<dt>F(baseline)</dt><dd>{number(start)}</dd></div>"
        f"<div><dt>change</dt><dd>{_signed(text - start)}</dd></div>"
        f"<div><dt>sum of all tokens</dt><dd>{_signed(total)}</dd></div>"
        f'<div{mark} title="{about}"><dt>{"completeness error" if promised else "difference"}</dt>'
        f"<dd>{_signed(error)} <small>({100 * relative:,.1f} %)</small></dd></div>"
        f'</dl><p class="note">Log-probabilities in nats; {about}.</p>'
    )


def _strongest(found: _Found) -> str:
    """Bars from a middle line: to the right for the target, to the left against it."""
    known = [token for token in found.before if found.share.get(token.pos)]
    ranked = sorted(known, key=lambda token: -abs(found.share[token.pos]))[:_LISTED]
    if not ranked:
        return ""
    widest = abs(found.share[ranked[0].pos])
    rows = "".join(_bar(token, found.share[token.pos], widest) for token in ranked)
    more = len(found.share) - len(ranked)
    rest = f'<p class="note">and {more:,} more with smaller shares, or none</p>' if more else ""
    return f'<ol class="x-bars">{rows}</ol>{rest}'


def _bar(token: Token, share: float, widest: float) -> str:
    side = "x-for" if share > 0 else "x-against"
    return (
        f'<li data-go="{token.pos}" title="Show this token"><span class="w">{_shown(token)}</span>'
        f'<span class="x-bar {side}"><u style="width:{50 * abs(share) / widest:.1f}%"></u></span>'
        f'<span class="x-value">{_signed(share)}</span></li>'
    )


def _shown(token: Token) -> str:
    return spaced(token.text, 40) if token.text else "<em>byte piece</em>"


def _target(found: _Found) -> str:
    return quoted("".join(token.text for token in found.target), 60)


def _signed(value: float) -> str:
    written = number(value)
    return written if value <= 0 or not written.strip("0.,") else f"+{written}"
