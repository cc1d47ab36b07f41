"""What a search considered: its tree at every moment, with a slider, and what each node is worth.

The page gets the changes of every moment as compact JSON in one attribute; search_tree.js folds
them up to the moment that is chosen, draws what is in sight, and puts every text in with
textContent. Scrubbing, playing and opening a node ask nothing of the server.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analyzers.trace import (
    MAIN,
    Candidate,
    Event,
    Judgement,
    Metric,
    Note,
    RunEnded,
    RunStarted,
    SearchNode,
    Token,
)
from visualizations.text import escape, number, visible

TITLE = "What was considered"
DRAWS: tuple[type[Event], ...] = (SearchNode, Judgement, Candidate, Metric, Note, Token)
GROWS = True

MOST = 4_000
"""Nodes that travel to the page, about 150 bytes each; committed ones always do."""
CHANGES = 20_000
"""Changes of nodes that travel to the page, about 40 bytes each; else moments are merged."""
_LONGEST = 2_000  # characters of a node's text
_WORDS = 600  # characters of any other text
_HEARD = 5  # evaluations of a node that are written out
_DEEP, _WIDE = 4, 60  # levels and entries of a node's detail
PLAIN = "plain"
"""Group of the Candidate, and target of the Judgement, of plain decoding."""
_WHOLE = ("sample", "refinement")  # kinds of node whose text is a whole answer
_STATUS = {"open": "o", "committed": "c", "rewound": "r", "pruned": "p"}
_LETTER = {"value": "v", "visits": "n", "real_visits": "f", "prior": "p"}

_KEY = (
    '<ul class="key"><li class="c"><b>✓</b> committed</li><li class="o"><b></b> open</li>'
    '<li class="r"><b>↩</b> rewound, dashed</li><li class="p"><b>✕</b> pruned, faded</li>'
    "<li>width of a line: visits</li><li>click a node, or move with the arrow keys</li></ul>"
)


@dataclass
class Moment:
    """Nodes that changed together. iteration: of the search, None where it does not count them."""

    iteration: int | None
    changed: dict[int, SearchNode] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """What values run between. worse: higher is worse. measured: by the judge, else by the least
    and the greatest value of this run."""

    lo: float
    hi: float
    worse: bool
    measured: bool
    name: str


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, SearchNode) and event.lane == MAIN for event in events)


def render(events: Sequence[Event]) -> str:
    """The frame of the drawing with the data; "" where nothing was searched.

    Of a run that goes on it is the tree as it stands, without the moments before."""
    if not fits(events):
        return ""
    found = moments(events)
    nodes = latest(found)
    kept = _kept(nodes)
    left_out = len(nodes) - len(kept)
    going = not any(isinstance(event, RunEnded) for event in events)
    found = [Moment(found[-1].iteration, nodes)] if going else _merged(found)
    scale = scale_of(events)
    data = {
        "lo": _short(scale.lo),
        "hi": _short(scale.hi),
        "worse": scale.worse,
        "prompt": _prompt(events),
        "going": going,
        "places": _places(events, nodes),
        "steps": _steps(found, kept),
        "evals": _evaluations(events, found),
    }
    packed = escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    note = (
        f'<p class="note">{left_out:,} nodes that were left behind are not drawn: they would make '
        "the page slow.</p>"
        if left_out
        else ""
    )
    return (
        f'<div class="candor x-search" data-search="{packed}">'
        f"{_answers(events, nodes, going)}{_judges(events)}"
        f'<div class="tools">{_legend(scale)}<span class="zoom">'
        '<button type="button" data-fold=""></button>'
        '<button type="button" data-zoom="-1" aria-label="Smaller">−</button>'
        '<button type="button" data-zoom="0" title="All of it">fit</button>'
        '<button type="button" data-zoom="1" aria-label="Larger">+</button></span></div>'
        '<div class="body"><div class="canvas" role="group" aria-label="The tree of the search">'
        '</div><div class="node-panel" role="region" aria-label="The chosen node"></div>'
        '</div><div class="controls">'
        '<button type="button" data-move="-1" aria-label="Earlier">‹</button>'
        '<button type="button" data-play="">▶ Play</button>'
        '<button type="button" data-move="1" aria-label="Later">›</button>'
        f'<input type="range" min="0" max="{len(found) - 1}" value="{len(found) - 1}"'
        f' aria-label="Moment of the search"><output></output></div>{_spent(events)}'
        f"{_KEY}{note}</div>"
    )


def moments(events: Iterable[Event]) -> list[Moment]:
    """The tree at any moment is what the moments up to it say last of each node.

    A moment ends where something else happened (a text was judged or written), or where the same
    node comes again."""
    found: list[Moment] = []
    goes_on, iteration = False, None
    for event in events:
        if event.lane != MAIN:
            continue
        if isinstance(event, Judgement | Token | Candidate):
            goes_on = False
        if not isinstance(event, SearchNode):
            continue
        if not goes_on or event.node in found[-1].changed:
            found.append(Moment(iteration))
            goes_on = True
        now = event.detail.get("iteration")
        if isinstance(now, int):
            iteration = max(now, iteration or 0)
            found[-1].iteration = iteration
        found[-1].changed[event.node] = event
    return found


def latest(found: Iterable[Moment]) -> dict[int, SearchNode]:
    """The tree behind these moments, in the order in which its nodes came."""
    nodes: dict[int, SearchNode] = {}
    for moment in found:
        nodes.update(moment.changed)
    return nodes


def scale_of(events: Sequence[Event]) -> Scale:
    """The judge's scale where every value of a node is within it, else that of the values."""
    valued = [e for e in events if isinstance(e, SearchNode) and e.value is not None]
    values = [event.value for event in valued if event.value is not None]
    judged = next((event for event in events if isinstance(event, Judgement)), None)
    # A node may have another score beside its value; its name says nothing of the value then.
    names = {
        str(event.detail.get("score_name", "")) if event.detail.get("score") == event.value else ""
        for event in valued
    }
    name = names.pop() if len(names) == 1 else ""
    lo, hi = min(values, default=-1.0), max(values, default=1.0)
    if judged and judged.scale[0] <= lo and hi <= judged.scale[1]:
        least, most, higher_is, _ = judged.scale
        return Scale(least, most, higher_is == "worse", True, name or judged.judge)
    if lo == hi:
        lo, hi = lo - 1, hi + 1
    return Scale(lo, hi, False, False, name or "value")


def _committed(nodes: Mapping[int, SearchNode]) -> list[SearchNode]:
    """Those whose texts make the answer, in its order."""
    kept = [node for node in nodes.values() if node.status == "committed" and node.text]
    whole = [node for node in kept if node.detail.get("kind") in _WHOLE]
    return whole[-1:] or kept


# Data for the page


def _kept(nodes: Mapping[int, SearchNode]) -> dict[int, int | None]:
    """Node -> its parent, for as many nodes as travel. Parents come before their children; what
    hangs on no earlier node is a root, so that nothing goes in circles."""
    parents: dict[int, int | None] = {}
    for id, node in nodes.items():
        parents[id] = node.parent if node.parent in parents else None
    kept = set(list(nodes)[:MOST])
    for id, node in nodes.items():
        up: int | None = id if node.status == "committed" else None
        while up is not None and up not in kept:
            kept.add(up)
            up = parents[up]
    return {id: parent for id, parent in parents.items() if id in kept}


def _merged(found: list[Moment]) -> list[Moment]:
    """Two by two until there are at most CHANGES changes, or one moment is left."""
    while len(found) > 1 and sum(len(moment.changed) for moment in found) > CHANGES:
        found = [
            Moment(found[i : i + 2][-1].iteration, latest(found[i : i + 2]))
            for i in range(0, len(found), 2)
        ]
    return found


def _steps(
    found: Iterable[Moment], kept: Mapping[int, int | None]
) -> list[tuple[int | None, list[dict[str, Any]]]]:
    """(iteration, what changed) of each moment; of each node only what is new.

    i: number, up: parent, t: text, v: value, n: visits, f: real visits, p: prior, s: status (o, c,
    r, p), e: keys of its last evaluations, m: how many there are if more, d: detail."""
    known: dict[int, dict[str, Any]] = {}
    steps = []
    for moment in found:
        changes = []
        for id, event in moment.changed.items():
            if id not in kept:
                continue
            before, now = known.get(id, {}), _of_node(event)
            if kept[id] is not None:
                now["up"] = kept[id]
            fresh = {name: value for name, value in now.items() if before.get(name) != value}
            gone = dict.fromkeys(before.keys() - now.keys())
            changes.append({"i": id} | fresh | gone)
            known[id] = now
        steps.append((moment.iteration, changes))
    return steps


def _of_node(event: SearchNode) -> dict[str, Any]:
    numbers = {letter: _short(getattr(event, name)) for name, letter in _LETTER.items()}
    found = numbers | {
        "t": visible(_cut(event.text, _LONGEST)),
        "s": _STATUS.get(event.status, "o"),
        "e": [visible(key) for key in event.evals[-_HEARD:]],
        "m": len(event.evals) if len(event.evals) > _HEARD else None,
        "d": _plain(event.detail, _DEEP),
    }
    return {name: value for name, value in found.items() if value not in (None, [], {}, "")}


def _places(events: Iterable[Event], nodes: Mapping[int, SearchNode]) -> list[tuple[int, int, int]]:
    """(node, first and last position of its tokens), where a token belongs to the node whose text
    has its first character."""
    pieces = _committed(nodes)
    found: dict[int, tuple[int, int]] = {}
    place, ends, written = 0, len(pieces[0].text) if pieces else 0, 0
    for event in events:
        if not isinstance(event, Token) or event.lane != MAIN or not pieces:
            continue
        while written >= ends and place < len(pieces) - 1:
            place += 1
            ends += len(pieces[place].text)
        first, _ = found.get(pieces[place].node, (event.pos, event.pos))
        found[pieces[place].node] = first, event.pos
        written += len(event.text)
    return [(node, first, last) for node, (first, last) in found.items()]


def _evaluations(events: Iterable[Event], found: Iterable[Moment]) -> dict[str, dict[str, Any]]:
    """Of every key that a node names. judge, score, lo, hi, verdict, mass, why, detail, passes."""
    changed = [node for moment in found for node in moment.changed.values()]
    named = {key for node in changed for key in node.evals[-_HEARD:]}
    evaluations = {}
    for event in events:
        if not isinstance(event, Judgement) or event.key not in named:
            continue
        said = {
            "judge": visible(_cut(event.judge, _WORDS)),
            "score": _short(event.score),
            "lo": _short(event.scale[0]),
            "hi": _short(event.scale[1]),
            "verdict": visible(_cut(event.verdict, _WORDS)),
            "mass": _short(event.label_mass),
            "why": visible(_cut(event.rationale, _LONGEST)),
            "detail": _plain(event.detail, _DEEP),
            "passes": event.passes,
        }
        evaluations[visible(event.key)] = {
            name: value for name, value in said.items() if value not in (None, "", {})
        }
    return evaluations


def _plain(value: Any, deep: int) -> Any:
    """A detail as small JSON with visible text; what is too deep becomes text."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return _short(value)
    if deep and isinstance(value, Mapping):
        pairs = list(value.items())[:_WIDE]
        return {visible(_cut(str(name), 60)): _plain(each, deep - 1) for name, each in pairs}
    if deep and isinstance(value, list | tuple):
        return [_plain(each, deep - 1) for each in value[:_WIDE]]
    return visible(_cut(str(value), _WORDS))


def _short(value: float | None) -> float | None:
    """Four digits; whole numbers stay whole."""
    if value is None or isinstance(value, int) or value == int(value):
        return None if value is None else int(value)
    return float(f"{value:.4g}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _prompt(events: Iterable[Event]) -> str:
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        return ""
    asked = started.prompt if isinstance(started.prompt, str) else started.prompt[-1]["content"]
    return visible(_cut(asked, _WORDS))


# HTML around the drawing


def _legend(scale: Scale) -> str:
    digits = 0 if scale.lo == int(scale.lo) and scale.hi == int(scale.hi) else 2
    lo, hi = number(scale.lo, digits), number(scale.hi, digits)
    words = "higher is worse" if scale.worse else "higher is better"
    kind = words if scale.measured else f"{words}; from least to most in this run"
    classes = "scale worse" if scale.worse else "scale"
    return (
        f'<span class="{classes}">{escape(visible(_cut(scale.name, 60)))} '
        f"<small>{lo}</small><i></i><small>{hi} · {kind}</small></span>"
    )


def _answers(events: Sequence[Event], nodes: Mapping[int, SearchNode], going: bool) -> str:
    """The answer of the search, which search_tree.js fills in, and the plain one beside it; both
    with what they are worth, the first when it is done."""
    plain = worth = None
    for event in events:
        if event.lane != MAIN:
            continue
        if isinstance(event, Candidate) and event.group == PLAIN:
            plain = event.text
        elif isinstance(event, Judgement) and event.target == PLAIN:
            worth = event.score
    pieces = [node for node in _committed(nodes) if node.value is not None]
    last = pieces[-1].value if pieces and not going else None
    answer = '<p class="answer" dir="auto"></p><div class="instead"></div>'
    if plain is None:
        return answer
    text = _cut(plain.strip(), _LONGEST)
    return (
        f'<div class="both"><section><h4>The search{_worth(last)}</h4>{answer}</section>'
        f'<section class="plain"><h4>Plain decoding, always the likeliest token{_worth(worth)}</h4>'
        f'<p dir="auto">{escape(text) or "It says nothing."}</p></section></div>'
    )


def _worth(value: float | None) -> str:
    return "" if value is None else f" <small>worth <b>{number(value, 2)}</b></small>"


def _spent(events: Iterable[Event]) -> str:
    """What the search spent so far, with a bar towards the limit of a knob, else towards what it
    was expected to spend at most; in the end the seconds that it took."""
    spent: dict[str, float] = {}
    expected: dict[str, float] = {}
    params: Mapping[str, Any] = {}
    seconds = ""
    for event in events:
        if isinstance(event, RunStarted):
            params = event.params
        elif isinstance(event, RunEnded):
            seconds = f"<div><dt>seconds</dt><dd><b>{event.seconds:,.1f}</b></dd></div>"
        elif isinstance(event, Metric) and event.name.startswith("spent "):
            spent[event.name.removeprefix("spent ")] = event.value
        elif isinstance(event, Metric) and event.name.startswith("expected "):
            expected[event.name.removeprefix("expected ")] = event.value
    tiles = "".join(
        _gauge(what, value, _limit(params, what), expected.get(what))
        for what, value in spent.items()
    )
    return f'<dl class="spent">{tiles}{seconds}</dl>' if tiles else ""


def _gauge(what: str, value: float, limit: float | None, expected: float | None) -> str:
    of = f" of {limit:,}" if limit else f" of at most {expected:,.0f}" if expected else ""
    limit = limit or expected
    share = min(value / limit, 1.0) if limit else 0.0
    bar = f'<dd class="b"><u style="width:{100 * share:.0f}%"></u></dd>' if limit else ""
    return f"<div><dt>{escape(visible(what))}</dt><dd><b>{value:,.0f}</b>{of}</dd>{bar}</div>"


def _limit(params: Mapping[str, Any], what: str) -> int | None:
    """The knob of that name, 0 = no limit; a single budget is one of tokens."""
    limit = params.get(what, params.get("budget") if what == "tokens" else None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _judges(events: Iterable[Event]) -> str:
    """How good the judge is by its own check, and what was said aloud of it."""
    said, shares, judged = [], {}, []
    for event in events:
        if isinstance(event, Note) and "judge" in event.text.lower():
            kind = "no" if event.level == "warning" else "ok"
            said.append(f'<li class="{kind}">{escape(event.text)}</li>')
        elif isinstance(event, Metric) and event.name.startswith("judge"):
            if event.unit == "share":
                shares[event.name.removeprefix("judge ")] = event.value
            else:
                value = number(event.value, 0 if event.value == int(event.value) else 2)
                said.append(f"<li>{escape(event.name)} <b>{value}</b> {escape(event.unit)}</li>")
        elif isinstance(event, Judgement) and event.lane == MAIN:
            judged.append(event)
    if judged and not any(event.passes or event.label_mass is not None for event in judged):
        said.append(
            f'<li class="ok">{escape(judged[0].judge)}: a program, right by definition</li>'
        )
    bars = "".join(_share(name, share) for name, share in shares.items())
    if not said and not bars:
        return ""
    return (
        '<section class="judge"><h4>Can this judge be trusted?</h4>'
        f'<div class="shares">{bars}</div><ul>{"".join(dict.fromkeys(said))}</ul></section>'
    )


def _share(name: str, share: float) -> str:
    """A share, with a line at one half where that means chance, or no liking for one label."""
    width = 100 * min(max(share, 0.0), 1.0)
    half = "" if name == "undecided" else ' class="half"'
    return (
        f"<div{half}><span>{escape(visible(name))}</span>"
        f'<span class="b"><u style="width:{width:.0f}%"></u></span><b>{share:.0%}</b></div>'
    )
