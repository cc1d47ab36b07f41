"""What was drafted, and what survived: the tree of every pass, one at a time, with a slider.

The page gets all passes as compact JSON in one attribute; tree.js draws the one that is chosen, and
puts every text in with textContent. Scrubbing and playing ask nothing of the server.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from analyzers.trace import DraftTree, Event, Token, surviving
from visualizations.speculation import Step, fits, reached, steps
from visualizations.text import escape, visible

TITLE = "What was drafted, and what survived"
DRAWS: tuple[type[Event], ...] = (DraftTree, Token)

MOST = 20_000
"""Nodes that travel to the page, about 50 bytes each."""
_BEFORE = 56  # characters of the text before a pass
_LONGEST = 24  # characters of a token
_SPECIAL = re.compile(r"<\|.+\|>|</?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>")

_KEY = (
    '<ul class="key"><li class="a"><b>✓</b> accepted</li><li class="r"><b>✕</b> tested, rejected'
    '</li><li class="u"><b></b> never reached</li><li class="x"><b>+</b> the model’s own token</li>'
    "<li>p = the model, q = the drafter, in %; so are the bars</li></ul>"
)


def render(events: Sequence[Event]) -> str:
    """The frame of the drawing with the data of every pass; "" where nothing was drafted."""
    if not fits(events):
        return ""
    found = steps(events)
    shown = _first(found)
    left_out = len(found) - len(shown)
    note = (
        f'<p class="note">Drawn are the first {len(shown):,} passes; {left_out:,} more would make '
        "the page slow.</p>"
        if left_out
        else ""
    )
    data = escape(json.dumps(_data(shown, events), ensure_ascii=False, separators=(",", ":")))
    return (
        f'<div class="candor x-tree" data-drafts="{data}">'
        '<div class="strip"><small class="up"></small><div class="passes"></div>'
        '<small class="down"></small></div><div class="controls">'
        '<button type="button" data-move="-1" aria-label="Previous pass">‹</button>'
        '<button type="button" data-play="">▶ Play</button>'
        '<button type="button" data-move="1" aria-label="Next pass">›</button>'
        f'<input type="range" min="0" max="{len(shown) - 1}" value="0" aria-label="Pass">'
        '<output></output></div><p class="context" dir="auto"></p>'
        f'<div class="canvas" tabindex="0" role="group" aria-label="The draft of this pass"></div>'
        f'<p class="why"></p><p class="figures"></p>{_KEY}{note}</div>'
    )


def verdicts(tree: DraftTree) -> str:
    """A letter a node: a = accepted, r = tested and rejected, u = never reached."""
    kept, near = set(tree.accepted), {node for under in reached(tree).values() for node in under}

    def of(node: int) -> str:
        if node in kept:
            return "a"
        # Without chances (an older or foreign run) all children of the path count as tested.
        tested = not tree.chances or tree.chances[node] is not None
        return "r" if node in near and tested else "u"

    return "".join(of(node) for node in range(len(tree.ids)))


def _first(found: Sequence[Step]) -> list[Step]:
    """As many passes as MOST nodes are enough for, and one at least."""
    nodes, shown = 0, list[Step]()
    for step in found:
        nodes += 1 + (len(step.tree.ids) if step.tree else 0)
        if shown and nodes > MOST:
            break
        shown.append(step)
    return shown


def _data(shown: Iterable[Step], events: Sequence[Event]) -> list[dict[str, Any]]:
    tokens = {token.pos: token for token in surviving(events)}
    written, upto = "", min(tokens, default=0)
    data = []
    for step in shown:
        while upto < step.pos:
            if upto in tokens:
                written = (written + tokens[upto].text)[-_BEFORE:]
            upto += 1
        root = tokens[step.pos - 1].text if step.pos - 1 in tokens else ""
        own = tokens[step.pos].text if step.pos in tokens else ""
        data.append(
            {"at": step.pos, "n": step.tokens, "root": _text(root), "before": visible(written)}
            | (_of_tree(step.tree) if step.tree else {"x": _text(own), "o": "sampled"})
        )
    return data


def _of_tree(tree: DraftTree) -> dict[str, Any]:
    """Lists run over the nodes; the ones without any number are left out, as is all that is empty.

    t: texts, up: parents, s: verdicts, path, p, q: probabilities, c: chances, k: coins, v: the
    drafter's values with their measure m, x: extra token, o: its origin, why, cost, ms: drafting,
    verifying, rest. chip: nodes that look like special tokens.
    """
    found = {
        "t": [_text(text) for text in tree.texts],
        "up": list(tree.parents),
        "s": verdicts(tree),
        "path": list(tree.accepted),
        "p": _probabilities(tree.target_logprobs),
        "q": _probabilities(tree.draft_logprobs),
        "c": _short(tree.chances),
        "k": _short(tree.coins),
        "v": _short(tree.values),
        "m": visible(tree.measure),
        "x": _text(tree.extra_text),
        "o": tree.origin,
        "why": visible(tree.ended),
        "cost": tree.cost,
        "ms": [tree.draft_ms, tree.verify_ms, tree.rest_ms],
        "chip": [i for i, text in enumerate(tree.texts) if _SPECIAL.fullmatch(text)],
    }
    return {name: value for name, value in found.items() if value not in ([], "", None)}


def _text(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _probabilities(logprobs: Sequence[float | None]) -> list[float | None]:
    return _short([None if each is None else math.exp(min(each, 0.0)) for each in logprobs])


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Three digits each; empty where no value is known."""
    if all(value is None for value in values):
        return []
    return [None if value is None else float(f"{value:.3g}") for value in values]
