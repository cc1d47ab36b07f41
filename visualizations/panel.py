"""One token opened up: its numbers, and what the model would have written instead."""

import math

from analyzers.trace import Token
from visualizations.signals import probability
from visualizations.text import escape, number, percent, quoted, spaced

_ORIGINS = {
    "sampled": "written by the model",
    "drafted": "drafted ahead, and accepted",
    "corrected": "put in place of a rejected draft",
    "bonus": "written for free after an accepted draft",
    "forced": "set by hand, not drawn",
    "read": "read, not written",
}

# Methods that look at one token of a run: name, what the button says, and its hover text.
_LOOKS = (
    ("attribution", "What carried it?", "Attribution: which earlier tokens carried this one"),
    ("attention", "Where did it look?", "Attention: where each head looked from here"),
)


def render(token: Token, pos_label: str, can_fork: bool, why_not: str, elsewhere: str = "") -> str:
    """pos_label: what the page calls the place ("Token 12"). why_not: said when the run cannot
    be continued from here with another token. elsewhere: the id of the run where it can be
    continued in History only; a button offers to open it there."""
    parts = [
        '<section class="candor candor-panel">',
        f"<h3>{escape(pos_label)} <span>{_name(token)}</span></h3>",
        f'<dl class="facts">{_facts(token)}</dl>',
    ]
    if token.top:
        parts.append(f'<ol class="bars">{_bars(token, can_fork, bool(elsewhere))}</ol>')
        if elsewhere:
            parts.append(_opener(token, elsewhere))
        else:
            parts.append(f'<p class="note">{_note(can_fork, why_not)}</p>')
            parts.append(f'<p class="asks">{_asks(token, can_fork)}</p>')
    else:
        parts.append('<p class="note">Nothing precedes this token, so it has no alternatives.</p>')
    return "".join([*parts, "</section>"])


def empty() -> str:
    return (
        '<section class="candor candor-panel"><p class="empty">Choose a token in the answer, by '
        "click or with the arrow keys and Enter, to see what the model would have written "
        "instead.</p></section>"
    )


def _name(token: Token) -> str:
    if token.text or not token.bytes:
        return quoted(token.text)
    pairs = " ".join(token.bytes[i : i + 2] for i in range(0, len(token.bytes), 2))
    return f"part of a character, bytes {escape(pairs)}"


def _facts(token: Token) -> str:
    rows: list[tuple[str, str, str]] = []
    p = probability(token)
    if p is not None and token.logprob is not None:
        rows.append(("probability", percent(p), ""))
        rows.append(("log-probability", number(token.logprob), "nats"))
    if token.rank is not None:
        rows.append(("rank", f"{token.rank:,}", "likeliest" if token.rank == 1 else ""))
    if token.entropy is not None:
        rows.append(("entropy", number(token.entropy), "nats"))
    if token.margin is not None:
        rows.append(("margin", number(token.margin), "first − second"))
    if token.p_sampled is not None:
        how = "no choice left" if token.p_sampled >= 1 else "after temperature and filters"
        rows.append(("drawn with", percent(token.p_sampled), how))
    rows.append(("origin", "", _ORIGINS.get(token.origin, escape(token.origin))))
    return "".join(
        f"<div><dt>{name}</dt><dd>{f'<b>{value}</b> ' if value else ''}{unit}</dd></div>"
        for name, value, unit in rows
    )


def _bars(token: Token, can_fork: bool, plain: bool) -> str:
    """plain: without buttons."""
    bars = []
    for place, (token_id, text, logprob) in enumerate(token.top, start=1):
        written = token_id == token.id
        button = "" if written or plain else _button(token, token_id, text, can_fork)
        bars.append(_bar(place, text, logprob, button, written))
    if all(token_id != token.id for token_id, _, _ in token.top) and token.logprob is not None:
        bars.append(_bar(token.rank, token.text, token.logprob, "", written=True, apart=True))
    return "".join(bars)


def _bar(
    place: int | None, text: str, logprob: float, button: str, written: bool, apart: bool = False
) -> str:
    p = math.exp(min(logprob, 0.0))
    classes = " ".join(
        name for name, on in (("bar", True), ("me", written), ("apart", apart)) if on
    )
    end = '<span class="here" title="written here">written</span>' if written else button
    return (
        f'<li class="{classes}"><span class="n">{"" if place is None else f"{place:,}"}</span>'
        f'<span class="w">{_word(text)}</span>'
        f'<span class="b"><u style="width:{100 * p:.1f}%"></u></span>'
        f'<span class="p">{percent(p)}</span>{end}</li>'
    )


def _word(text: str) -> str:
    return spaced(text, 24) if text else "<em>byte piece</em>"


def _button(token: Token, token_id: int, text: str, can_fork: bool) -> str:
    label = f"Continue from here with “{escape(text[:40])}”"
    disabled = "" if can_fork else " disabled"
    return (
        f'<button type="button" data-fork="{token_id}" data-at="{token.pos}" aria-label="{label}"'
        f' title="{label}"{disabled}>↪</button>'
    )


def _asks(token: Token, can_ask: bool) -> str:
    disabled = "" if can_ask else " disabled"
    return "".join(
        f'<button type="button" data-ask="{method}" data-at="{token.pos}"{disabled}'
        f' title="{title}">{label}</button>'
        for method, label, title in _LOOKS
    )


def _opener(token: Token, run: str) -> str:
    return (
        f'<p class="asks"><button type="button" data-run="{escape(run)}" data-at="{token.pos}">'
        "Open in History</button></p>"
        '<p class="note">There this run can be continued from here with another token.</p>'
    )


def _note(can_fork: bool, why_not: str) -> str:
    if can_fork:
        return "<b>↪</b> continue from here with that token, as a new run"
    return f"<b>↪</b> cannot continue from here: {escape(why_not)}"
