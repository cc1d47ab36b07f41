"""What the model's own signals say of an answer: one table, and the sentences one by one.

Every number stands with its unit, the direction in which it means surer, and what it cost. None of
them says by itself whether the answer is right.
"""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from analyzers.trace import Event, Judgement, Token, surviving
from visualizations.text import counted, escape, number, percent, spaced, visible

TITLE = "How sure is the model of this answer?"
DRAWS: tuple[type[Event], ...] = (Judgement,)

SURER, LESS_SURE = "surer", "less sure"
_ARROWS = {SURER: "higher = surer", LESS_SURE: "lower = surer"}
_NAMES = {"p_true": "P(True)", "p_ik": "P(IK)", "verbalized": "verbalized confidence"}
_ANSWER, _SENTENCE = "answer", "sentence "
_BY_SENTENCE = ("sequence_logprob", "mean_logprob", "min_logprob", "mean_entropy")
"""Of a sentence the others say the same again."""
_LEVELS = (-0.1, -0.35, -0.8, -1.6)
"""Mean log-probability (nats a token) below which a sentence gets the next tint."""


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Judgement) and _of_answer(event) for event in events)


def render(events: Sequence[Event]) -> str:
    """The table of signals, and of each sentence where there are several."""
    signals = [event for event in events if isinstance(event, Judgement) and _of_answer(event)]
    rows = "".join(_row(event) for event in signals)
    return (
        '<div class="x-assessment"><table><thead><tr><th>signal</th><th>value</th>'
        "<th>tells right from wrong?</th><th>cost</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{_sentences(events)}"
        '<p class="quiet">A signal is worth what it tells apart on questions with known answers: '
        "<code>python3 launch.py evaluate --data capitals</code> measures that for this model."
        "</p></div>"
    )


def _of_answer(event: Judgement) -> bool:
    return event.target == _ANSWER and event.scale[2] in _ARROWS


def _row(event: Judgement) -> str:
    lo, hi, direction, probability = event.scale
    unit = escape(str(event.detail.get("unit", "")))
    if event.score is None:
        shown, bar = "could not be read", ""
    elif probability:
        shown = percent(event.score)
        width = 100 * (event.score - lo) / (hi - lo)
        bar = f'<span class="b half"><u style="width:{width:.1f}%"></u></span>'
    else:
        shown, bar = f"{number(event.score)} {unit}".rstrip(), ""
    cost = {0: "free", 1: "1 pass"}.get(event.passes, f"{event.passes:,} passes")
    if event.ms:
        cost += f", {number(event.ms, 0)} ms"
    return (
        f"<tr><th>{escape(visible(_named(event.judge)))}{_beside(event)}</th>"
        f"<td><b>{shown}</b>{bar}<small>{_ARROWS[direction]}</small></td>"
        f"<td>{_badge(event)}</td><td>{cost}</td></tr>"
    )


def _named(signal: str) -> str:
    return _NAMES.get(signal, signal.replace("_", " ").replace("logprob", "log-probability"))


def _badge(event: Judgement) -> str:
    """What was known of this signal of this model when the answer was given."""
    known = event.detail.get("trust")
    if not isinstance(known, Mapping):
        return '<span class="quiet">not measured yet</span>'
    auroc, lo, hi, ece = (known.get(name) for name in ("auroc", "lo", "hi", "ece"))
    if not (_real(auroc) and _real(lo) and _real(hi)):
        return '<span class="quiet">not measured yet</span>'
    kind, said = ("ok", "AUROC") if lo > 0.5 else ("no", "misleads: AUROC")
    if lo <= 0.5 <= hi:
        said = "at chance: AUROC"
    spread = f"{said} {number(auroc)} [{number(lo)}, {number(hi)}]"
    if _real(ece):
        spread += f" · ECE {number(ece)}"
    on = f"on {escape(visible(str(known.get('data', ''))))}, n = {known.get('n', 0):,}"
    return f'<span class="badge {kind}">{spread}</span><small>{on}</small>'


def _real(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beside(event: Judgement) -> str:
    """What a reader has to know of where the number comes from."""
    said = []
    first, swapped = event.detail.get("first"), event.detail.get("swapped")
    if event.scale[3] and isinstance(first, float) and isinstance(swapped, float):
        said.append(f"true as (A) {percent(first)}, as (B) {percent(swapped)}")
    if event.label_mass is not None:
        warned = ' class="warn"' if event.label_mass < 0.5 else ""
        said.append(f"<span{warned}>label mass {percent(event.label_mass)}</span>")
    votes = event.detail.get("votes")
    if isinstance(votes, tuple) and event.scale[3]:
        said.append(f"{counted(len(votes), 'different answer')} in {sum(votes)} draws")
    return f"<small>{' · '.join(said)}</small>" if said else ""


def _sentences(events: Sequence[Event]) -> str:
    """Each sentence with its numbers, tinted by its mean log-probability; "" for fewer than two."""
    found: dict[str, dict[str, Judgement]] = {}
    for event in events:
        if isinstance(event, Judgement) and event.target.startswith(_SENTENCE):
            found.setdefault(event.target, {})[event.judge] = event
    if len(found) < 2:
        return ""
    tokens = surviving(events)
    heads = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in _BY_SENTENCE)
    rows = "".join(_sentence(tokens, its) for its in found.values())
    return (
        f"<h4>Sentence by sentence</h4><table><thead><tr><th>sentence</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _sentence(tokens: Sequence[Token], its: dict[str, Judgement]) -> str:
    detail = next(iter(its.values())).detail
    first, last = int(detail["first"]), int(detail["last"])
    text = "".join(token.text for token in tokens if first <= token.pos <= last).strip()
    mean = its["mean_logprob"].score if "mean_logprob" in its else None
    level = 1 + sum(mean < edge for edge in _LEVELS) if mean is not None else 0
    cells = "".join(
        f"<td>{number(score)}</td>"
        if (score := its[name].score if name in its else None) is not None
        else "<td></td>"
        for name in _BY_SENTENCE
    )
    return (
        f'<tr><th><button type="button" class="d{level}" data-go="{first}">'
        f"{spaced(text, 200)}</button></th>{cells}</tr>"
    )
