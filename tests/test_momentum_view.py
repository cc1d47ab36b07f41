"""Paths taken: every token with its path, its label and its candidates, safely."""

import pytest

from analyzers.trace import Event, Metric, Rewind, Scores
from tests.test_views import HOSTILE, check, shown, token
from visualizations import momentum

TAGS = {"div", "dl", "dt", "dd", "b", "p", "span", "i", "button", "small", "em"}
DETAIL = {"section", "h4", "q", "p", "b", "ol", "li", "span", "i", "u"}
NAMES = {"class", "title", "type", "data-go", "style"}


def said(pos: int, text: str, label: int, length: int, others: tuple[str, ...] = ()) -> list[Event]:
    """The events of one token; the candidates: the token at .5, and `others` at .3."""
    over = (text, *others)
    p = (0.5, *(0.3 for _ in others))
    return [
        token(pos, text),
        Scores(pos, "repetition length", "tokens", (pos,), (length,)),
        Scores(pos, "resistance", "probability", (pos,), (0.2 * length,)),
        Scores(pos, "path", "0 new, 1 greedy, 2 jump", (pos,), (label,)),
        Scores(pos, "probability", "probability", over, p),
        Scores(pos, "candidate length", "tokens", over, (length, *(1 for _ in others))),
        Scores(pos, "score", "probability - resistance", over, (0.5, *(0.1 for _ in others))),
    ]


def run() -> list[Event]:
    return [
        *said(7, " a", 0, 0, (" b", " c")),
        *said(8, " b", 1, 2),
        *said(9, " c", 2, 0),
        Metric("greedy ratio", 2, 0.1, "share"),
        Metric("greedy ratio", 3, 2 / 3, "share"),
        Metric("diversity", 3, 42.3, "%"),
        Metric("rep-2", 3, 20.0, "%"),
    ]


def test_nothing_is_drawn_of_other_runs():
    assert not momentum.fits([]) and momentum.render([]) == ""
    assert not momentum.fits([token(1)]) and momentum.render([token(1)]) == ""
    assert momentum.detail([], 1, None) == "" and momentum.detail([token(1)], 1, None) == ""
    assert momentum.fits(run())


def test_every_token_has_its_path_and_label():
    seen = check(momentum.render(run()), TAGS, NAMES)
    words = [attrs for tag, attrs in seen.tags if tag == "button"]
    assert [word["data-go"] for word in words] == ["7", "8", "9"]
    assert [word["class"] for word in words] == ["l0 d0", "l1 d2", "l2 d0"]
    assert words[1]["title"].endswith("path walked before: 2 tokens")
    assert "new1 token" in seen.text and "greedy1 token" in seen.text
    # The last of several summaries counts.
    assert "greedy ratio67 %" in seen.text and "diversity42 %" in seen.text


def test_what_was_undone_is_not_drawn():
    seen = check(momentum.render([*run(), Rewind(8, "tried")]), TAGS, NAMES)
    assert [attrs["data-go"] for tag, attrs in seen.tags if tag == "button"] == ["7"]


def test_the_candidates_of_a_token():
    seen = check(momentum.detail(run(), 7, None), DETAIL, NAMES)
    rows = [attrs.get("class") for tag, attrs in seen.tags if tag == "li"]
    assert rows == ["me", None, None]
    widths = [attrs["style"] for tag, attrs in seen.tags if tag in "iu" and "style" in attrs]
    assert widths == [f"width:{w}%" for w in ("50.0", "50.0", "30.0", "10.0", "30.0", "10.0")]
    assert "the likeliest token was new" in seen.text


def test_barred_candidates_say_so():
    events = said(7, " a", 2, 4, (" b",))[:-1]
    events.append(Scores(7, "score", "probability - resistance", (" b",), (0.1,)))
    markup = momentum.detail(events, 7, None)
    seen = check(markup, DETAIL, NAMES)
    assert [attrs.get("class") for tag, attrs in seen.tags if tag == "li"] == [None, "me"]
    assert seen.text.count("barred") == 1
    nothing = [*events[:-1], Scores(7, "score", "probability - resistance", (), ())]
    again = check(momentum.detail(nothing, 7, None), DETAIL, NAMES)
    assert [attrs.get("class") for tag, attrs in again.tags if tag == "li"] == ["me", None]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    events = [*said(7, text, 2, 1, (text,))]
    seen = check(momentum.render(events), TAGS, NAMES)
    part = shown(text[:6]).replace("\n", "⏎").replace("\t", "⇥").strip()
    assert part[:3] in seen.text
    opened = check(momentum.detail(events, 7, None), DETAIL, NAMES)
    assert part[:3] in opened.text
