"""Drafts of one pass: texts that grew side by side, what each weighed, and how likely they are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import plotly.graph_objects as go

from analyzers.trace import Candidate, Event, Lens, Metric, Scores
from visualizations import charts
from visualizations.text import counted, escape, number, percent, quoted, spaced, visible

TITLE = "Drafts of one pass"
DRAWS: tuple[type[Event], ...] = (Candidate, Scores, Lens, Metric)

_WORDS, _BELIEVED, _COSINE = ": words", ": believed score", "cosine, last layer"
# A weight is at level n when it passed n of them; at level 0 a word weighs next to nothing.
_LEVELS = (0.01, 0.1, 0.25, 0.5, 0.8)
_ON = ' class="x-drafts-on"'
_MARKS = ("", "1 %", "10 %", "25 %", "50 %", "80 %")
# On both white and the dark card: the best draft strongest, the others lighter.
_AREAS = ("#188890", "#58a9ae", "#d0571c", "#d99a72", "#7a6fb0", "#a9a2cc", "#7f8a3c", "#b0b87e")


@dataclass
class _Folded:
    """words: of each draft as it stands, with the weight behind each. texts: the newest candidates.
    weights, taken: of the drafts, one a step. believed: final scores. cosines: (step, value)."""

    words: dict[str, Scores] = field(default_factory=dict)
    texts: dict[str, Candidate] = field(default_factory=dict)
    weights: list[Scores] = field(default_factory=list)
    taken: list[Lens] = field(default_factory=list)
    believed: dict[str, float] = field(default_factory=dict)
    cosines: list[tuple[int, float]] = field(default_factory=list)

    def logprob(self, name: str) -> float | None:
        """The true one, nats; None until the draft was read by itself."""
        return self.texts[name].logprob if name in self.texts else None


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Lens) and event.name == "drafts" for event in events)


def render(events: Sequence[Event]) -> str:
    """The drafts as columns, each word shaded by its weight; once they were read again, the table
    of what was believed and what is true. A word carries data-go and, with its draft, data-row."""
    folded = _fold(events)
    if not folded.words:
        return ""
    columns = "".join(_column(folded, row, name) for row, name in enumerate(folded.words))
    return (
        f'<div class="candor x-drafts">{_lead(folded)}<div class="x-drafts-columns">{columns}</div>'
        f"{_ended(folded)}{_table(folded)}{_linearity(folded)}</div>"
    )


def figures(events: Sequence[Event]) -> list[go.Figure]:
    """The weights step by step as stacked areas, the best draft of each step at the bottom."""
    folded = _fold(events)
    if len(folded.weights) < 2:
        return []
    steps = list(range(1, len(folded.weights) + 1))
    most = max(len(weights.over) for weights in folded.weights)
    drawn = go.Figure(layout=_layout(len(steps)))
    for row in range(most):
        shares = [[*weights.values, *[0.0] * most][row] for weights in folded.weights]
        drawn.add_trace(
            go.Scatter(
                x=steps,
                y=shares,
                customdata=[weights.pos for weights in folded.weights],
                hovertext=[_hover(folded, step, row) for step in steps],
                hoverinfo="text",
                mode="lines",
                stackgroup="weights",
                line={"width": 0.8, "color": _AREAS[row % len(_AREAS)]},
                name=f"draft {row + 1}",
            )
        )
    return [drawn]


def detail(events: Sequence[Event], pos: int, row: int | None) -> str:
    """What the one pass said at `pos`, with the drafts that took each token; and the drafts of that
    step by their rank then. The one from which the column `row` grew is marked."""
    # Of the same name the first: at the last place the final drafts follow those of the step.
    at = [event for event in events if isinstance(event, Lens | Scores) and event.pos == pos][::-1]
    lenses = {event.name: event for event in at if isinstance(event, Lens)}
    scores = {event.name: event for event in at if isinstance(event, Scores)}
    if "drafts" not in lenses:
        return ""
    drafts, origin = lenses["drafts"], _origin(events, scores, pos, row)
    ids = [top[0][0] for top in drafts.top]
    bars = ""
    if "one pass" in lenses:
        for place, (id, text, logprob) in enumerate(lenses["one pass"].top[0], start=1):
            takers = [i for i, own in enumerate(ids) if own == id]
            bars += _bar(place, text, logprob, takers, origin in takers)
    ngrams = scores.get("n-gram score")
    lines = "".join(
        f"<tr{_ON if i == origin else ''}><th>{i + 1}</th>"
        f'<td class="w">{spaced(top[0][1], 24)}</td>'
        f"<td>{_at(scores.get('weights'), i, percent)}</td>"
        f"{f'<td>{escape(_at(ngrams, i, _count))}</td>' if ngrams else ''}"
        f"<td>{number(drafts.scores[i], 1)}</td></tr>"
        for i, top in enumerate(drafts.top)
    )
    return (
        '<h3>What the one pass said here</h3><p class="note">All drafts chose from this '
        f'distribution (temperature 1).</p><ol class="bars x-drafts-bars">{bars}</ol>'
        '<div class="x-drafts-wide"><table class="x-drafts-table"><thead><tr><th>draft</th>'
        f"<th>took</th><th>weight</th>{'<th>n-grams</th>' if ngrams else ''}"
        "<th>believed</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _origin(
    events: Sequence[Event], scores: Mapping[str, Scores], pos: int, row: int | None
) -> int | None:
    """Which draft of the step at `pos` begins the column `row`; None for one that had ended."""
    columns = list(_fold(events).words.values())
    if row is None or row >= len(columns):
        return None
    final = columns[row]
    begun = final.over[: pos - final.pos + len(final.over)]
    there = (scores.get(f"draft {i}{_WORDS}") for i in range(1, len(columns) + 1))
    return next((i for i, words in enumerate(there) if words and words.over == begun), None)


def _fold(events: Iterable[Event]) -> _Folded:
    folded = _Folded()
    for event in events:
        if isinstance(event, Scores) and event.name.endswith(_WORDS):
            folded.words[event.name.removesuffix(_WORDS)] = event
        elif isinstance(event, Scores) and event.name == "weights":
            folded.weights.append(event)
        elif isinstance(event, Lens) and event.name == "drafts":
            folded.taken.append(event)
        elif isinstance(event, Candidate):
            folded.texts[event.key] = event
        elif isinstance(event, Metric) and event.name.endswith(_BELIEVED):
            folded.believed[event.name.removesuffix(_BELIEVED)] = event.value
        elif isinstance(event, Metric) and event.name == _COSINE:
            folded.cosines.append((event.step, event.value))
    return folded


def _lead(folded: _Folded) -> str:
    steps = len(folded.weights)
    drafts = counted(len(folded.words), "draft")
    passes = "1 pass" if steps == 1 else f"{steps:,} passes"
    scale = "".join(
        f'<span class="x-drafts-{level}">{mark}</span>' for level, mark in enumerate(_MARKS) if mark
    )
    return (
        f'<p class="x-drafts-lead"><b>{drafts}, {passes}.</b> Every pass read one mixture of '
        "the last words of all drafts; a word is shaded by its share of that mixture, from "
        f'<span class="x-drafts-scale">{scale}</span> on, and faint below.</p>'
    )


def _column(folded: _Folded, row: int, name: str) -> str:
    words, final = folded.words[name], folded.logprob(name) is not None
    first = words.pos - len(words.over) + 1
    body = "".join(
        _word(str(text), weight, first + i, row)
        for i, (text, weight) in enumerate(zip(words.over, words.values, strict=True))
    )
    shares = folded.weights[-1].values if folded.weights else ()
    share = shares[row] if row < len(shares) else 0.0
    if final:
        head = "<em>the answer</em>" if row == 0 else ""
    else:
        head = (
            f'<span class="x-drafts-share" title="share of the mixture now">'
            f'<u style="width:{100 * share:.0f}%"></u></span><em>{percent(share)}</em>'
        )
    return (
        f'<section><header><b>{escape(name)}</b>{head}</header><p dir="auto">{body}</p></section>'
    )


def _word(text: str, weight: float, pos: int, row: int) -> str:
    """Spaces before a word stand outside of it, so that no shading hangs over at the end of a line;
    a token inside an unfinished character is not there."""
    core = text.lstrip(" ")
    if not text:
        return ""
    level = sum(weight >= step for step in _LEVELS)
    return (
        f"{' ' * (len(text) - len(core))}"
        f'<span class="x-drafts-{level}" data-go="{pos}" data-row="{row}"'
        f' title="{percent(weight)} of the mixture">{escape(visible(core))}</span>'
    )


def _ended(folded: _Folded) -> str:
    done = [text for text in folded.texts.values() if text.group == "finished"]
    if not done:
        return ""
    lines = "".join(f"<li>{quoted(text.text, 300)}</li>" for text in done)
    said = "The model ended these on the way:"
    return f'<div class="x-drafts-ended"><p>{said}</p><ul>{lines}</ul></div>'


def _table(folded: _Folded) -> str:
    """Empty until the drafts were read again."""
    true = {name: total for name in folded.words if (total := folded.logprob(name)) is not None}
    if not true:
        return ""
    per_token = {name: total / len(folded.words[name].over) for name, total in true.items()}
    chosen, likeliest = next(iter(true)), max(per_token, key=lambda name: per_token[name])
    lines = "".join(
        f"<tr{_ON if name == likeliest else ''}><th>{escape(name)}</th>"
        f"<td>{number(folded.believed[name], 1) if name in folded.believed else ''}</td>"
        f"<td>{number(total, 1)}</td><td>{number(per_token[name])}</td></tr>"
        for name, total in true.items()
    )
    if len(true) == 1:
        said = ""
    elif likeliest == chosen:
        said = f"Read by itself, <b>{escape(chosen)}</b> is also the likeliest per token. "
    else:
        said = (
            f"Read by itself, <b>{escape(likeliest)}</b> is the likeliest per token: the mixture "
            f"misjudged {escape(chosen)}, which it chose. "
        )
    return (
        '<div class="x-drafts-wide"><table class="x-drafts-table"><thead><tr><th></th>'
        '<th title="sharpened and mixed with n-grams; for ranking only">believed score</th>'
        "<th>true log-probability, nats</th><th>per token, nats</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
        f"<p>{said}Believed scores only rank the drafts: they are no log-probabilities and cannot "
        "be compared with the true ones.</p>"
    )


def _linearity(folded: _Folded) -> str:
    if not folded.cosines:
        return ""
    values = ", ".join(f"{number(value)} at step {step}" for step, value in folded.cosines)
    return (
        '<p class="note">How well one pass stood for all drafts: cosine between its last layer and '
        f"the weighted sum of the drafts read one by one, 1 = perfectly: {values}.</p>"
    )


def _bar(place: int, text: str, logprob: float, takers: Sequence[int], marked: bool) -> str:
    p = exp(min(logprob, 0.0))
    label = ", ".join(str(taker + 1) for taker in takers)
    here = f'<span class="here" title="taken by draft {label}">{label}</span>' if takers else ""
    return (
        f'<li class="bar{" me" if marked else ""}"><span class="n">{place}</span>'
        f'<span class="w">{spaced(text, 24)}</span>'
        f'<span class="b"><u style="width:{100 * p:.1f}%"></u></span>'
        f'<span class="p">{percent(p)}</span>{here}</li>'
    )


def _at(scores: Scores | None, row: int, shown: Callable[[float], str]) -> str:
    """One of the numbers of a step; "" where there are none."""
    return shown(scores.values[row]) if scores and row < len(scores.values) else ""


def _count(value: float) -> str:
    """An n-gram score; what was seen is never rounded to what was not."""
    return "< 0.001" if 0 < value < 0.0005 else number(value, 3)


def _hover(folded: _Folded, step: int, row: int) -> str:
    weights = folded.weights[step - 1].values
    if row >= len(weights):
        return ""
    lens = folded.taken[step - 1] if step <= len(folded.taken) else None
    word = charts.plain(lens.top[row][0][1], 40) if lens else ""
    return f"draft {row + 1}: “{word}”<br>share {percent(weights[row])}<br>step {step}"


def _layout(steps: int) -> dict[str, Any]:
    return charts.layout(height=190) | {
        "margin": {"l": 56, "r": 14, "t": 8, "b": 38},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": charts.axis(
            "step; drafts by their rank there",
            showgrid=False,
            range=[1, steps],
            tick0=1,
            dtick=max(1, round(steps / 8)),
        ),
        "yaxis": charts.axis("share", range=[0, 1], tickformat=".0%", nticks=5),
    }
