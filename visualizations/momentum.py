"""Momentum decoding: which tokens walked a path that the text had walked before, and the price."""

from collections.abc import Sequence

from analyzers.trace import Event, Metric, Rewind, Scores, Token, surviving
from visualizations.text import counted, escape, number, percent, quoted, spaced

TITLE = "Paths taken"
DRAWS: tuple[type[Event], ...] = (Token, Rewind, Scores, Metric)

_LABELS = ("new", "greedy", "jump")
_MEANT = (
    "the likeliest token was new to the text",
    "the likeliest token had been there, and was written all the same",
    "the likeliest token had been there, and another was written",
)


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Scores) and event.name == "path" for event in events)


def render(events: Sequence[Event]) -> str:
    """The answer once more, tinted by the length of the path; counts, diversity, greedy ratio."""
    paths, lengths = _of_tokens(events, "path"), _of_tokens(events, "repetition length")
    tokens = [token for token in surviving(events) if token.pos in paths]
    if not tokens:
        return ""
    words = "".join(_word(t, int(paths[t.pos]), int(lengths[t.pos])) for t in tokens)
    return (
        f'<div class="x-momentum">{_facts(events, tokens, paths)}{_LEGEND}'
        f'<div class="strip">{words}</div></div>'
    )


def detail(events: Sequence[Event], pos: int, row: int | None) -> str:
    """The candidates at `pos`: how likely each is, what is left of that, and its path."""
    found = {
        event.name: event for event in events if isinstance(event, Scores) and event.pos == pos
    }
    if "path" not in found or "probability" not in found or "candidate length" not in found:
        return ""
    p, lengths = found["probability"], found["candidate length"]
    scores = _scores(p.over, found.get("score"))
    written = next((token for token in surviving(events) if token.pos == pos), None)
    label = int(found["path"].values[0])
    best = max((score for score in scores if score is not None), default=None)
    chosen = 0 if best is None else scores.index(best)
    rows = "".join(
        _candidate(str(text), value, int(length), score, chosen == place)
        for place, (text, value, length, score) in enumerate(
            zip(p.over, p.values, lengths.values, scores, strict=True)
        )
    )
    name = f" {quoted(written.text)}" if written else ""
    return (
        f'<section class="x-momentum"><h4>Candidates for{name}</h4>'
        f'<p class="said"><b class="tag l{label}">{_LABELS[label]}</b> {_MEANT[label]}.</p>'
        f'<ol class="choices">{rows}</ol>'
        '<p class="quiet">Bars: the probability, and in full colour the score, which is what the '
        "resistance leaves of it. Path: tokens that the text has walked before.</p></section>"
    )


def _of_tokens(events: Sequence[Event], name: str) -> dict[int, float]:
    """The number of that name that each token has, by position."""
    return {
        event.pos: event.values[0]
        for event in events
        if isinstance(event, Scores) and event.name == name and event.over == (event.pos,)
    }


def _facts(events: Sequence[Event], tokens: Sequence[Token], paths: dict[int, float]) -> str:
    labels = [int(paths[token.pos]) for token in tokens]
    last = {event.name: event for event in events if isinstance(event, Metric)}
    rows = [
        (f'<b class="tag l{n}">{_LABELS[n]}</b>', counted(labels.count(n), "token"), meant)
        for n, meant in enumerate(_MEANT)
    ]
    if "greedy ratio" in last:
        share = percent(last["greedy ratio"].value)
        rows.append(("greedy ratio", share, "tokens that were the model's likeliest"))
    if "diversity" in last:
        repeated = ", ".join(
            f"rep-{n} {number(last[f'rep-{n}'].value, 0)} %"
            for n in (2, 3, 4)
            if f"rep-{n}" in last
        )
        hint = f"higher = less repeated; {repeated}"
        rows.append(("diversity", f"{number(last['diversity'].value, 0)} %", hint))
    cards = "".join(
        f'<div title="{escape(hint)}"><dt>{name}</dt><dd>{value}</dd></div>'
        for name, value, hint in rows
    )
    return f'<dl class="facts">{cards}</dl>'


def _word(token: Token, label: int, length: int) -> str:
    said = counted(length, "token") if length else "none"
    title = f"{_LABELS[label]}: {_MEANT[label]}; path walked before: {said}"
    # A line end would break the strip into lines of one word.
    text = spaced(token.text, 24) or "<em>…</em>"
    return (
        f'<button type="button" class="l{label} d{min(length, 5)}" data-go="{token.pos}"'
        f' title="{escape(title)}"><span>{text}</span><small>{length or "·"}</small></button>'
    )


def _scores(over: Sequence[str | int], scores: Scores | None) -> list[float | None]:
    """In the order of the candidates; None for those that are barred, which are left out."""
    left = list(zip(scores.over, scores.values, strict=True)) if scores else []
    return [left.pop(0)[1] if left and left[0][0] == text else None for text in over]


def _candidate(text: str, p: float, length: int, score: float | None, chosen: bool) -> str:
    left = f"{100 * max(score or 0.0, 0.0):.1f}"
    kept = "barred" if score is None else number(score)
    path = "new" if length == 0 else counted(length, "token")
    return (
        f'<li{" class=me" if chosen else ""}><span class="w">{spaced(text, 20)}</span>'
        f'<span class="b"><i style="width:{100 * p:.1f}%"></i><u style="width:{left}%"></u></span>'
        f'<span class="v" title="probability">{percent(p)}</span>'
        f'<span class="v" title="score: probability − resistance">{kept}</span>'
        f'<span class="n d{min(length, 5)}" title="path walked before">{path}</span></li>'
    )


_LEGEND = (
    '<p class="key"><span>path walked before:</span>'
    + "".join(f'<i class="d{n}">{n or "none"}</i>' for n in range(6))
    + "<span>tokens</span></p>"
)
