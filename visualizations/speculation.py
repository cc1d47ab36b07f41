"""How much drafting gained: tokens a pass, which drafts survived, where the time went, speed-up.

Source: the definitions of Spec-Bench (#MAT), SpecTr (block efficiency) and vLLM's metrics of
        speculative decoding, counted from the trace alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyzers.trace import MAIN, DraftTree, Event, RunEnded, RunStarted, Token
from visualizations.charts import INK, LEAST, LINE, axis, layout, plain
from visualizations.text import counted, escape, number, percent

TITLE = "How much drafting gained"
DRAWS: tuple[type[Event], ...] = (DraftTree,)

_DEEPEST = 16  # depths and ranks of a chart; few drafts go beyond
# Readable on white and on the dark card: drafting, verifying, everything else.
_DRAFT, _VERIFY, _REST = "#7a6fb0", LINE["both"], "#8d9299"


@dataclass(frozen=True)
class Step:
    """One pass of the target that wrote `tokens` tokens from `pos` on; tree: None where nothing was
    drafted, and the pass was a plain one."""

    pos: int
    tokens: int
    tree: DraftTree | None


@dataclass(frozen=True)
class Level:
    """Of drafts at one depth (1 = behind the root) or at one rank among siblings (1 = drawn first).

    reached: passes, or for a rank places, where such a draft stood right behind what had been
    accepted. accepted: how often it was accepted there."""

    at: int
    reached: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / self.reached


@dataclass(frozen=True)
class Numbers:
    """What the drafts of a run came to. Higher is better but in `wasted` and the times.

    steps: every pass of the target behind the prompt, plain ones included; each has its Step in
    `passes`. tokens: written by them. drafts: passes that checked a draft (vLLM: num drafts).
    draft_tokens, accepted: nodes of all drafts, and those written (num draft tokens, num accepted
    tokens). chains: no draft ever branched. draft_ms, verify_ms, rest_ms: sums over the drafted
    passes. predicted_steps: what the drafted passes take by the cost table, in plain steps; None
    without a table. step_ms: a plain step by the table that the run recorded. per_second: tokens a
    second of the whole run, the prompt included.
    """

    steps: int
    tokens: int
    drafts: int
    draft_tokens: int
    accepted: int
    chains: bool
    by_depth: tuple[Level, ...]
    by_rank: tuple[Level, ...]
    draft_ms: float
    verify_ms: float
    rest_ms: float
    predicted_steps: float | None
    step_ms: float | None
    per_second: float | None
    passes: tuple[Step, ...]

    @property
    def plain(self) -> int:
        """Passes that checked no draft."""
        return self.steps - self.drafts

    @property
    def mean_acceptance_length(self) -> float | None:
        """M, or block efficiency: tokens a pass; plain decoding has 1. vLLM's leaves out the plain
        passes, and counts the last draft as if its text had not ended."""
        return self.tokens / self.steps if self.steps else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted of all drafted tokens: of chains the draft acceptance rate, of trees the tree
        yield."""
        return self.accepted / self.draft_tokens if self.draft_tokens else None

    @property
    def rate_per_position(self) -> tuple[float, ...]:
        """vLLM's acceptance rate per position: accepted at each depth, of all drafts."""
        return tuple(level.accepted / self.drafts for level in self.by_depth)

    @property
    def wasted(self) -> int:
        """Drafted tokens that were not written."""
        return self.draft_tokens - self.accepted

    @property
    def ms(self) -> float:
        """Of all drafted passes."""
        return self.draft_ms + self.verify_ms + self.rest_ms

    @property
    def predicted_speedup(self) -> float | None:
        """M over the mean predicted cost of a pass in plain steps; a plain pass costs 1."""
        if self.predicted_steps is None or not self.steps:
            return None
        return self.tokens / (self.predicted_steps + self.plain)

    @property
    def measured_speedup(self) -> float | None:
        """M times a plain step over the mean time of a pass. Against the stored cost table: plain
        passes are taken to last as long as it says."""
        if not self.step_ms or not self.ms:
            return None
        return self.tokens * self.step_ms / (self.ms + self.plain * self.step_ms)


def steps(events: Iterable[Event], lane: str = MAIN) -> list[Step]:
    """The passes of a run in order. Tokens up to one set by hand are an earlier run's."""
    found: list[Step] = []
    for event in events:
        if event.lane != lane:
            continue
        if isinstance(event, DraftTree):
            found.append(Step(event.pos, len(event.accepted) + (event.extra is not None), event))
        elif isinstance(event, Token) and event.origin == "sampled":
            found.append(Step(event.pos, 1, None))
        elif isinstance(event, Token) and event.origin == "forced":
            found.clear()
    return found


def numbers(events: Iterable[Event], lane: str = MAIN) -> Numbers:
    """A fold over RunStarted, DraftTree, Token and RunEnded; also of a run that still goes on."""
    events = list(events)
    passes = steps(events, lane)
    trees = [step.tree for step in passes if step.tree]
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    ended = next((event for event in events if isinstance(event, RunEnded)), None)
    costs = [tree.cost for tree in trees if tree.cost is not None]
    return Numbers(
        steps=len(passes),
        tokens=sum(step.tokens for step in passes),
        drafts=len(trees),
        draft_tokens=sum(len(tree.ids) for tree in trees),
        accepted=sum(len(tree.accepted) for tree in trees),
        chains=all(tree.parents == tuple(range(-1, len(tree.ids) - 1)) for tree in trees),
        by_depth=_levels(trees, _depths),
        by_rank=_levels(trees, _ranks),
        draft_ms=sum(tree.draft_ms for tree in trees),
        verify_ms=sum(tree.verify_ms for tree in trees),
        rest_ms=sum(tree.rest_ms for tree in trees),
        predicted_steps=sum(costs) if trees and len(costs) == len(trees) else None,
        step_ms=started.cost["step_ms"] if started and started.cost else None,
        per_second=ended.tokens / ended.seconds if ended and ended.seconds > 0 else None,
        passes=tuple(passes),
    )


def reached(tree: DraftTree) -> dict[int, list[int]]:
    """Node (-1 = the root) on the accepted path -> its children, in the order of drawing; without
    the last node where the text ended there, since nothing behind it was asked for."""
    path = [-1, *tree.accepted]
    if tree.extra is None:
        path.pop()
    children: dict[int, list[int]] = {node: [] for node in path}
    for node, parent in enumerate(tree.parents):
        if parent in children:
            children[parent].append(node)
    return children


def fits(events: Sequence[Event]) -> bool:
    return any(isinstance(event, DraftTree) and event.lane == MAIN for event in events)


def render(events: Sequence[Event]) -> str:
    """Tiles: plain words, the exact term in the title."""
    found = numbers(events)
    if not found.drafts:
        return ""
    tiles = "".join(
        f'<div title="{escape(term)}"><dt>{label}</dt><dd><b>{value}</b> {unit}</dd>'
        f"<dd>{detail}</dd></div>"
        for label, value, unit, detail, term in _tiles(found)
    )
    return f'<div class="x-speculation"><dl>{tiles}</dl></div>'


def figures(events: Sequence[Event]) -> list[go.Figure]:
    """Tokens of every pass; acceptance by depth and by rank; the time of a drafted pass."""
    found = numbers(events)
    if not found.drafts:
        return []
    drawn = [_per_pass(found)]
    if found.by_depth:
        drawn.append(_acceptance(found))
    if found.ms:
        drawn.append(_times(found))
    return drawn


# Counting


_Place = Callable[[list[int], int, set[int]], list[tuple[int, bool]]]
"""(children of a node on the path, their depth, accepted nodes) -> (where it counts, accepted)."""


def _levels(trees: Iterable[DraftTree], place: _Place) -> tuple[Level, ...]:
    counts: dict[int, list[int]] = {}
    for tree in trees:
        kept = set(tree.accepted)
        for depth, children in enumerate(reached(tree).values(), start=1):
            for at, accepted in place(children, depth, kept):
                count = counts.setdefault(at, [0, 0])
                count[0] += 1
                count[1] += accepted
    return tuple(Level(at, *counts[at]) for at in sorted(counts))


def _depths(children: list[int], depth: int, kept: set[int]) -> list[tuple[int, bool]]:
    return [(depth, not kept.isdisjoint(children))] if children else []


def _ranks(children: list[int], depth: int, kept: set[int]) -> list[tuple[int, bool]]:
    return [(rank, child in kept) for rank, child in enumerate(children, start=1)]


# HTML


def _tiles(found: Numbers) -> Iterable[tuple[str, str, str, str, str]]:
    """(label, number, unit, detail, exact term)."""
    if found.mean_acceptance_length is not None:
        yield (
            "tokens a pass",
            number(found.mean_acceptance_length),
            "",
            f"{counted(found.tokens, 'token')} in {_passes(found.steps)}",
            "mean acceptance length M, or block efficiency (#MAT): tokens written over passes of "
            "the model; plain decoding = 1, higher is better",
        )
    if found.acceptance_rate is not None:
        term = "draft acceptance rate" if found.chains else "tree yield"
        yield (
            "drafts that survived",
            percent(found.acceptance_rate),
            "",
            f"{found.accepted:,} of {counted(found.draft_tokens, 'drafted token')}",
            f"{term}: num accepted tokens over num draft tokens; higher is better",
        )
    yield (
        "drafts thrown away",
        number(found.wasted / found.drafts, 1),
        "a pass",
        f"of {number(found.draft_tokens / found.drafts, 1)} drafted tokens",
        "drafted tokens that were checked and not written, a drafted pass",
    )
    if found.predicted_speedup is not None:
        yield (
            "speed, as predicted",
            f"{number(found.predicted_speedup)} ×",
            "plain decoding",
            "by the cost table of this machine",
            "predicted speed-up: M over the mean cost of a pass in plain steps (drafting + verify "
            "inflation v(n), from the stored cost table)",
        )
    if found.measured_speedup is not None:
        yield (
            "speed, as measured",
            f"{number(found.measured_speedup)} ×",
            "plain decoding",
            f"against a plain step of {number(found.step_ms or 0, 1)} ms in the table",
            "measured speed-up: M × plain step of the stored cost table over the mean time of a "
            "pass, reading signals for every token included; not a race against plain decoding",
        )
    if found.per_second is not None:
        plain_passes = f"{_passes(found.plain)} without a draft" if found.plain else "whole run"
        yield (
            "tokens a second",
            number(found.per_second, 1),
            "",
            plain_passes,
            "tokens over seconds of the whole run, reading the prompt included",
        )


def _passes(n: int) -> str:
    return f"{n:,} pass" if n == 1 else f"{n:,} passes"


# Charts


def _per_pass(found: Numbers) -> go.Figure:
    """customdata: the first position that the pass wrote, for a click to select it."""
    places = list(range(1, found.steps + 1))
    written = [step.tokens for step in found.passes]
    means = [total / n for n, total in enumerate(accumulate(written), start=1)]
    hover = [
        f"pass {place:,}<br>{counted(step.tokens, 'token')} of "
        f"{counted(len(step.tree.ids) if step.tree else 0, 'draft')} and the model's own"
        f"<br>mean until here {number(mean)}"
        for place, step, mean in zip(places, found.passes, means, strict=True)
    ]
    positions = [step.pos for step in found.passes]
    bars = go.Bar(
        x=places,
        y=written,
        customdata=positions,
        hovertext=hover,
        hoverinfo="text",
        marker={"color": LINE["both"], "opacity": 0.75, "line": {"width": 0}},
        name="tokens of a pass",
    )
    mean = go.Scatter(
        x=places,
        y=means,
        customdata=positions,
        hoverinfo="skip",
        mode="lines",
        line={"color": LEAST["both"], "width": 2},
        name="running mean",
    )
    top = max(written)
    few = {"dtick": 1} if found.steps < 12 else {}
    return go.Figure(
        [bars, mean],
        _frame(200)
        | {
            "bargap": 0.15,
            "xaxis": axis("pass of the model", showgrid=False, **few),
            "yaxis": axis("tokens", range=[0, 1.1 * top], **({"dtick": 1} if top < 6 else {})),
        },
    )


def _acceptance(found: Numbers) -> go.Figure:
    """How often the path went on at each depth; and which of the siblings it took."""
    several = any(level.at > 1 for level in found.by_rank)
    parts = [("depth of the draft", found.by_depth)]
    if several:
        parts.append(("rank among siblings", found.by_rank))
    titles = ["<b>went on at this depth</b>", "<b>was the one taken</b>"][: len(parts)]
    drawn = make_subplots(1, len(parts), subplot_titles=titles, horizontal_spacing=0.09)
    for column, (name, levels) in enumerate(parts, start=1):
        shown = levels[:_DEEPEST]
        word = name.split()[0]
        drawn.add_trace(
            go.Bar(
                x=[level.at for level in shown],
                y=[level.rate for level in shown],
                text=[f"{level.accepted:,}/{level.reached:,}" for level in shown],
                textposition="outside",
                textfont={"size": 11},
                textangle=0,
                constraintext="none",
                cliponaxis=False,
                hovertext=[
                    f"{word} {level.at}<br>accepted {level.accepted:,} of {level.reached:,} times "
                    f"that one stood there: {plain(percent(level.rate), 9)}"
                    for level in shown
                ],
                hoverinfo="text",
                marker={"color": LINE["both"], "opacity": 0.75},
                name=name,
            ),
            row=1,
            col=column,
        )
        few = {"dtick": 1 if len(shown) < 12 else 2, "range": [0.4, max(len(shown), 4) + 0.6]}
        drawn.update_xaxes(axis(name, showgrid=False, **few), col=column)
    drawn.update_annotations(font={"size": 12.5, "color": INK["both"]})
    drawn.update_layout(_frame(220), showlegend=False, bargap=0.25)
    drawn.update_layout(margin={"l": 52, "r": 6, "t": 30, "b": 38})
    drawn.update_yaxes(axis(range=[0, 1.18], tickvals=[0, 0.5, 1], tickformat=".0%"))
    drawn.update_yaxes(title={"text": "accepted"}, col=1)
    return drawn


def _times(found: Numbers) -> go.Figure:
    """A drafted pass in milliseconds: as it was, as predicted, and what its tokens take plainly."""
    measured, predicted, plainly = "this pass", "predicted", "plain decoding"
    parts = [
        ("drafting", measured, found.draft_ms / found.drafts, _DRAFT),
        ("verifying", measured, found.verify_ms / found.drafts, _VERIFY),
        ("rest: choosing, signals", measured, found.rest_ms / found.drafts, _REST),
    ]
    rows = [measured]
    if found.step_ms and found.predicted_steps is not None:
        took = found.predicted_steps * found.step_ms / found.drafts
        parts.append(("by the cost table", predicted, took, "#94751f"))
        rows.append(predicted)
    if found.step_ms:
        took = (found.tokens - found.plain) * found.step_ms / found.drafts
        parts.append(("the same tokens one by one", plainly, took, LEAST["both"]))
        rows.append(plainly)
    bars = [
        go.Bar(
            x=[ms],
            y=[row],
            orientation="h",
            text=[f"{number(ms, 1)} ms"],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#ffffff", "size": 11.5},
            hovertext=[f"{name}<br>{number(ms, 2)} ms a drafted pass"],
            hoverinfo="text",
            marker={"color": colour},
            name=name,
            showlegend=row == measured,  # the others are named by their row
        )
        for name, row, ms, colour in parts
    ]
    drawn = go.Figure(bars, _frame(92 + 34 * len(rows)))
    drawn.update_layout(
        barmode="stack",
        bargap=0.28,
        uniformtext={"minsize": 10, "mode": "hide"},
        margin={"l": 98, "r": 10, "t": 34, "b": 38},
        xaxis=axis("ms a drafted pass, mean", rangemode="tozero"),
        yaxis=axis(showgrid=False, categoryorder="array", categoryarray=rows[::-1]),
    )
    return drawn


def _frame(height: int) -> dict[str, Any]:
    return layout(height=height) | {
        "margin": {"l": 46, "r": 6, "t": 30, "b": 38},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
