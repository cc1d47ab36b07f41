"""The most probable span: where it stands in the passage, what else there was, and greedy."""

import math
import re
from collections.abc import Sequence

from analyzers.trace import Candidate, Event, Metric, Scores, Token, surviving
from visualizations.text import counted, escape, number, percent, spaced

TITLE = "The most probable span"
SHOWS_LANES = True  # the greedy answer stands in this view
DRAWS: tuple[type[Event], ...] = (Candidate, Token, Scores, Metric)

_LEVELS = 5
_PLACES = re.compile(r"c:(\d+-\d+(?:,\d+-\d+)*)")


def fits(events: Sequence[Event]) -> bool:
    return _candidate(events, "passage") is not None


def render(events: Sequence[Event]) -> str:
    """The passage with the spans shaded, a list of them, the greedy answer, and the counts."""
    passage = _candidate(events, "passage")
    if passage is None:
        return ""
    spans = _spans(events)
    return (
        '<div class="x-spans">'
        f'<p class="passage">{_shaded(passage.text, spans)}</p>'
        f"{_list(events, spans)}{_greedy(events)}{_counts(events)}</div>"
    )


def _candidate(events: Sequence[Event], group: str) -> Candidate | None:
    of_group = (e for e in events if isinstance(e, Candidate) and e.group == group)
    return next(of_group, None)


def _spans(events: Sequence[Event]) -> list[Candidate]:
    """Best first, those whose key says where they stand."""
    return [
        event
        for event in events
        if isinstance(event, Candidate)
        and event.group == "spans"
        and event.logprob is not None
        and _PLACES.fullmatch(event.key)
    ]


def _places(span: Candidate) -> list[tuple[int, int]]:
    """(start, end) of every occurrence, in characters of the passage."""
    pairs = (place.split("-") for place in span.key.removeprefix("c:").split(","))
    return [(int(start), int(end)) for start, end in pairs]


def _p(span: Candidate) -> float:
    return math.exp(min(span.logprob or 0.0, 0.0))


def _level(p: float) -> int:
    """5 from 32 %, and one less for each factor of four below."""
    return max(1, min(_LEVELS, _LEVELS + math.floor(math.log(max(p, 1e-9) / 0.32, 4))))


def _shaded(passage: str, spans: Sequence[Candidate]) -> str:
    """The passage as HTML. Spans in the list overlap nowhere; of others the better one stays."""
    marked: list[tuple[int, int, int]] = []
    for place, span in enumerate(spans):
        for start, end in _places(span):
            inside = 0 <= start < end <= len(passage)
            if inside and not any(start < b and a < end for a, b, _ in marked):
                marked.append((start, end, place))
    parts, done = [], 0
    for start, end, place in sorted(marked):
        p = _p(spans[place])
        parts.append(escape(passage[done:start]))
        parts.append(
            f'<mark class="s{_level(p)}{" best" if place == 0 else ""}"'
            f' title="span {place + 1}: {percent(p)}">{escape(passage[start:end])}'
            f"<sup>{place + 1}</sup></mark>"
        )
        done = end
    return "".join([*parts, escape(passage[done:])])


def _list(events: Sequence[Event], spans: Sequence[Candidate]) -> str:
    if not spans:
        return '<p class="quiet">Looking for the most probable span …</p>'
    tokens = surviving(events)
    most = _p(spans[0])
    rows = []
    for place, span in enumerate(spans):
        p, times, text = _p(span), len(_places(span)), escape(span.text)
        width = 100 * p / max(most, 1e-12)
        where = f", {counted(times, 'place')}" if times > 1 else ""
        go = f' data-go="{tokens[0].pos}"' if place == 0 and tokens else ""
        tag = "button" if go else "span"
        kind = ' type="button"' if go else ""
        rows.append(
            f'<li{" class=best" if place == 0 else ""}><span class="n">{place + 1}</span>'
            f'<{tag}{kind} class="text"{go} title="{text}">{text}</{tag}>'
            f'<span class="b"><u style="width:{width:.1f}%"></u></span>'
            f'<span class="v">{percent(p)}</span>'
            f'<span class="q">{number(span.logprob or 0.0)} nats{where}</span></li>'
        )
    return f'<ol class="list">{"".join(rows)}</ol>{_strip(tokens, _ending(events), "best")}'


def _greedy(events: Sequence[Event]) -> str:
    greedy = _candidate(events, "greedy")
    if greedy is None:
        return ""
    last = _metrics(events)
    badges = []
    if "extractive" in last:
        good = last["extractive"] == 1
        badges.append(_badge(good, "a span of the passage" if good else "no span of the passage"))
        if last.get("optimal") == 1:
            badges.append(_badge(True, "the most probable one"))
        elif good:
            badges.append(_badge(False, "not the most probable one"))
    p = f"{percent(_p(greedy))}, {number(greedy.logprob or 0.0)} nats"
    gap = last.get("gap")
    more = ""
    if gap is not None and last.get("optimal") != 1:
        than = "more" if gap >= 0 else "less"
        more = (
            f"The best span is worth {number(abs(gap))} nats {than} than this "
            f"({_factor(abs(gap))} times as {'' if gap >= 0 else 'im'}probable)."
        )
    text = escape(greedy.text) if greedy.text else "<em>nothing: the answer ended at once</em>"
    return (
        f'<section class="greedy"><h4>Greedy, token by token</h4>'
        f'<p class="said"><b>{text}</b> <span class="quiet">{p}</span> {"".join(badges)}</p>'
        f"{_strip(surviving(events, 'greedy'), None, 'greedy')}"
        f'<p class="quiet">{more}</p></section>'
    )


def _strip(tokens: Sequence[Token], ending: float | None, of: str) -> str:
    """The tokens with their probabilities; those of the best span can be chosen."""
    if not tokens:
        return ""
    words = []
    for token in tokens:
        p = math.exp(min(token.logprob or 0.0, 0.0))
        go = f' data-go="{token.pos}"' if of == "best" else ""
        words.append(
            f'<span class="tok"{go} title="log-probability {number(token.logprob or 0.0)} nats">'
            f"<span>{spaced(token.text, 24)}</span><small>{percent(p)}</small></span>"
        )
    if ending is not None:
        words.append(
            f'<span class="tok end" title="log-probability {number(ending)} nats">'
            f"<span>ends here</span><small>{percent(math.exp(min(ending, 0.0)))}</small></span>"
        )
    return f'<div class="strip">{"".join(words)}</div>'


def _counts(events: Sequence[Event]) -> str:
    last = _metrics(events)
    rows = []
    if "starts" in last and "starts read" in last:
        skipped = last["starts"] - last["starts read"]
        rows.append(
            f"<b>{last['starts read']:,.0f}</b> of {last['starts']:,.0f} starts read, "
            f"{skipped:,.0f} pruned"
        )
    if "tokens" in last and "tokens read" in last:
        rows.append(
            f"<b>{last['tokens read']:,.0f}</b> tokens read instead of {last['tokens']:,.0f}"
        )
    if "margin" in last:
        rows.append(f"second span <b>{number(last['margin'])} nats</b> behind")
    return f'<p class="counts">{" · ".join(rows)}</p>' if rows else ""


def _metrics(events: Sequence[Event]) -> dict[str, float]:
    return {event.name: event.value for event in events if isinstance(event, Metric)}


def _ending(events: Sequence[Event]) -> float | None:
    found = (e for e in events if isinstance(e, Scores) and e.name == "ending here")
    return next((event.values[0] for event in found), None)


def _badge(good: bool, text: str) -> str:
    return f'<span class="badge {"ok" if good else "no"}">{text}</span>'


def _factor(nats: float) -> str:
    factor = math.exp(min(nats, 30.0))
    return number(factor, 1 if factor < 10 else 0)
