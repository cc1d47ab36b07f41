"""Draft trees: what reaches the page, safely and small; and the drawing itself in a browser."""

import json
import math
import random

import pytest

from analyzers.trace import Event, RunEnded
from tests.test_speculation_view import STARTED, tree, wrote
from tests.test_views import HOSTILE, check, shown, token
from visualizations import tokens
from visualizations import tree as view

TAGS = {"div", "small", "button", "input", "output", "p", "ul", "li", "b"}
NAMES = {"class", "dir", "type", "min", "max", "value", "tabindex", "role", "aria-label",
         "data-drafts", "data-move", "data-play"}  # fmt: skip


def data(events: list[Event]) -> list[dict]:
    seen = check(view.render(events), TAGS, NAMES)
    return json.loads(
        next(names["data-drafts"] for _, names in seen.tags if "data-drafts" in names)
    )


def run(
    passes: int = 12, most: int = 80, seed: int = 1, start: int = 20, words: str = "river sea"
) -> list[Event]:
    """Trees of 1 to `most` nodes, up to ten deep, with the tokens that they wrote."""
    rng, pos = random.Random(seed), start
    said = [f" {word}" for word in words.split()] + [",", " the", "ing", "\n", "<|im_end|>"]
    events: list[Event] = [STARTED]
    for _ in range(passes):
        parents: list[int] = []
        depth: list[int] = []
        for _ in range(rng.randint(1, most)):
            near = [-1, *(i for i in range(len(parents)) if depth[i] < 10)]
            parent = rng.choice(near[-12:])
            parents.append(parent)
            depth.append(1 + (depth[parent] if parent >= 0 else 0))
        path, node = [], -1
        while (under := [i for i, up in enumerate(parents) if up == node]) and rng.random() < 0.75:
            node = rng.choice(under)
            path.append(node)
        origin = "corrected" if under else "bonus"
        n, logprobs = len(parents), [math.log(rng.uniform(0.001, 1)) for _ in parents]
        events.append(
            tree(
                pos, tuple(parents), tuple(path), origin=origin,
                texts=tuple(rng.choice(said) for _ in range(n)), extra_text=rng.choice(said),
                draft_logprobs=tuple(logprobs), target_logprobs=tuple(logprobs[::-1]),
                values=tuple(round(each, 4) for each in logprobs), measure="log-probability, nats",
                cost=1 + n / 40,
            )
        )  # fmt: skip
        events += wrote(pos, len(path), origin)
        pos += len(path) + 1
    return [*events, RunEnded("done", "max_new reached", pos - start, passes, 3.0)]


def test_nothing_is_drawn_of_other_runs():
    for events in ([], [STARTED, token(2)], [tree(2, (-1,), (), lane="other")]):
        assert not view.fits(events) and view.render(events) == ""
    assert view.fits(run(1))


def test_every_pass_is_there_with_its_nodes_and_the_text_before_it():
    events: list[Event] = [
        STARTED,
        tree(20, (-1, -1, 1), (1, 2), values=(-0.5, None, -1.5), measure="score"),
        *wrote(20, 2),
        token(23, " plain"),
        tree(24, (-1,), (), None, ended="the text is over", origin=""),
    ]
    first, plain, last = data(events)
    assert (first["at"], first["n"], first["root"], first["before"]) == (20, 3, "", "")
    assert (first["up"], first["s"], first["path"]) == ([-1, -1, 1], "raa", [1, 2])
    assert (first["p"], first["q"], first["c"]) == ([0.25] * 3, [0.5] * 3, [0.5] * 3)
    assert (first["v"], first["m"], first["o"], first["x"]) == (
        [-0.5, None, -1.5], "score", "corrected", " own",
    )  # fmt: skip
    assert first["ms"] == [2, 27, 1] and first["cost"] == 1.5
    assert plain == {
        "at": 23, "n": 1, "root": " own", "before": " d0 d1 own", "x": " plain", "o": "sampled",
    }  # fmt: skip
    assert last["before"] == " d0 d1 own plain" and "o" not in last and last["n"] == 0


def test_a_draft_that_was_never_asked_for_is_not_called_rejected():
    parents = (-1, -1, -1, 0, 1, 1)
    assert view.verdicts(tree(2, parents, (1,))) == "rarurr"
    # In order: the third sibling was not tested any more, the second was accepted.
    tested = (0.1, 0.9, None, None, 0.2, 0.3)
    assert view.verdicts(tree(2, parents, (1,), chances=tested)) == "rauurr"
    # The text ended with the accepted token: nothing was asked for behind it.
    assert view.verdicts(tree(2, parents, (1,), None)) == "raruuu"
    assert view.verdicts(tree(2, parents, (1,), chances=())) == "rarurr"


def test_a_long_run_stays_small():
    events = run(120, 80)
    nodes = sum(len(each["t"]) for each in data(events))
    assert nodes > 4000 and len(view.render(events).encode()) < 100 * nodes
    assert "Drawn are the first" not in view.render(events)


def test_more_than_the_page_bears_is_said(monkeypatch):
    monkeypatch.setattr(view, "MOST", 100)
    events = run(12, 80)
    found = data(events)
    assert 1 <= len(found) < 12
    assert f"Drawn are the first {len(found)} passes; {12 - len(found)} more" in view.render(events)
    monkeypatch.setattr(view, "MOST", 1)
    assert len(data(events)) == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    events = [
        token(1, text),
        tree(2, (-1, -1), (0,), texts=(text, text), extra_text=text, ended=text, measure=text),
    ]
    safe = shown(text).replace("\n", "⏎").replace("\t", "⇥")
    drawn = data([STARTED, *events])[1]
    assert drawn["why"] == drawn["m"] == safe and drawn["before"] == safe[-56:]
    assert drawn["x"][:20] == safe[:20] and drawn["t"][0] == drawn["t"][1] == drawn["x"]


def test_special_tokens_are_marked():
    texts = ("<|im_end|>", "</s>", "<div>", " <|", "<end_of_turn>")
    (drawn,) = data([tree(2, (-1, 0, 1, 2, 3), (), texts=texts)])
    assert drawn["chip"] == [0, 1, 4]


# ---- the drawing, in a browser -------------------------------------------------------------------


def test_the_slider_the_strip_and_the_text_choose_the_pass(browse):
    hostile = "<img src=x onerror=hacked=1>"
    events = [
        *run(5, 12),
        tree(300, (-1, 0, -1), (0,), origin="corrected", texts=(hostile, "<|im_end|>", " b")),
        *wrote(300, 1),
    ]
    page = browse(
        f'<div id="a" class="candor-text">{tokens.render(events)}</div>'
        f'<div id="b">{view.render(events)}</div>'
    )
    at, nodes = page.locator("output"), page.locator(".x-tree .node")
    passes = data(events)
    assert page.locator("[data-step]").count() == 6 and at.text_content() == "pass 1 of 6"
    assert nodes.count() == len(passes[0]["t"]) + 2  # the root, and the model's own token
    page.locator('[data-move="1"]').click()
    assert at.text_content() == "pass 2 of 6" and nodes.count() == len(passes[1]["t"]) + 2
    page.locator("input").fill("3")
    assert at.text_content() == "pass 4 of 6"
    page.locator('[data-step="4"]').click()
    assert at.text_content() == "pass 5 of 6"
    page.locator('[data-i="300"]').click()  # a token of the answer
    assert at.text_content() == "pass 6 of 6" and seen(page) == [{"pos": 300}]
    kinds = [node.get_attribute("class") for node in nodes.all()]
    assert kinds == ["node root", "node a", "node r", "node r", "node x"]
    assert nodes.nth(1).locator(".w").text_content() == hostile[:23] + "…"
    assert page.evaluate("window.hacked") is None
    title = nodes.nth(1).get_attribute("title")
    assert "p = 25 %" in title and "coin fell on 0.25" in title and "accepted 50 %" in title
    assert "accepted 1 of 3 drafts · wrote 2 tokens" in page.locator(".figures").text_content()
    nodes.nth(4).click()  # the token that was written there opens
    assert seen(page)[-1] == {"pos": 301}
    # Rendering anew brings the same drawing back.
    page.evaluate(
        "html => { b.innerHTML = html; again.forEach((done) => done()); }", view.render(events)
    )
    assert at.text_content() == "pass 6 of 6" and nodes.count() == 5
    page.locator("[data-play]").click()  # from the beginning, up to the end
    assert at.text_content() == "pass 1 of 6"
    page.wait_for_function("document.querySelector('output').textContent === 'pass 2 of 6'")
    page.locator("[data-play]").click()
    assert "Play" in page.locator("[data-play]").text_content()


def seen(page) -> list[dict]:
    return page.evaluate("seen")
