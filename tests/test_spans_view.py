"""The most probable span: the passage with what was found in it, safely."""

import math

import pytest

from analyzers.trace import Candidate, Event, Metric, Scores
from tests.test_views import HOSTILE, check, shown, token
from visualizations import spans

PASSAGE = "Ada met Bob in Rome. Bob met Eve."
TAGS = {
    "div", "p", "mark", "sup", "ol", "li", "span", "u", "i", "b", "button", "small",
    "section", "h4", "em",
}  # fmt: skip
NAMES = {"class", "title", "style", "type", "data-go"}


def span(key: str, text: str, p: float) -> Candidate:
    return Candidate(key, "spans", text, math.log(p))


def run(extractive: int = 1, optimal: int = 0, gap: float = 0.7) -> list[Event]:
    return [
        Candidate("passage", "passage", PASSAGE),
        token(40, " Eve", 0.2, lane="greedy"),
        Candidate("greedy", "greedy", "Eve", math.log(0.1)),
        Metric("best so far", 1, -3.0, "nats"),
        span("c:8-11,21-24", "Bob", 0.4),
        span("c:15-19", "Rome", 0.04),
        token(40, " Bob", 0.5),
        Scores(40, "ending here", "nats", (40,), (math.log(0.8),)),
        Metric("starts", 0, 7, "words"),
        Metric("starts read", 0, 3, "words"),
        Metric("tokens", 0, 1200, "tokens"),
        Metric("tokens read", 0, 12, "tokens"),
        Metric("extractive", 0, extractive, "1 = yes"),
        Metric("optimal", 0, optimal, "1 = yes"),
        Metric("gap", 0, gap, "nats"),
        Metric("margin", 0, 2.3, "nats"),
    ]


def test_nothing_is_drawn_without_a_passage():
    assert not spans.fits([]) and spans.render([]) == ""
    assert not spans.fits([token(1)]) and spans.render(run()[1:]) == ""


def test_it_grows_with_the_run():
    events = run()
    for length in range(1, len(events) + 1):
        check(spans.render(events[:length]), TAGS, NAMES)
    assert spans.fits(events[:1])
    assert "Looking for" in check(spans.render(events[:3]), TAGS, NAMES).text


def test_every_occurrence_is_marked_with_its_number():
    seen = check(spans.render(run()), TAGS, NAMES)
    marks = [attrs for tag, attrs in seen.tags if tag == "mark"]
    assert [mark["class"] for mark in marks] == ["s5 best", "s3", "s5 best"]
    assert marks[1]["title"] == "span 2: 4.0 %"
    assert seen.text.startswith("Ada met Bob1 in Rome2. Bob1 met Eve.")


def test_the_list_has_probabilities_and_the_best_can_be_chosen():
    seen = check(spans.render(run()), TAGS, NAMES)
    bars = [attrs["style"] for tag, attrs in seen.tags if tag == "u"]
    assert bars == ["width:100.0%", "width:10.0%"]
    assert "40 %−0.92 nats, 2 places" in seen.text
    assert [attrs["data-go"] for _, attrs in seen.tags if "data-go" in attrs] == ["40", "40"]
    assert "ends here80 %" in seen.text


def test_greedy_is_judged():
    def text(**numbers) -> str:
        return check(spans.render(run(**numbers)), TAGS, NAMES).text

    worse = text()
    assert "a span of the passage" in worse and "not the most probable one" in worse
    assert "worth 0.70 nats more than this (2.0 times as probable)" in worse
    assert "the most probable one" in text(optimal=1) and "times as" not in text(optimal=1)
    outside = text(extractive=0, gap=-3.0)
    assert "no span of the passage" in outside
    assert "worth 3.00 nats less than this (20 times as improbable)" in outside


def test_counts():
    text = check(spans.render(run()), TAGS, NAMES).text
    assert "3 of 7 starts read, 4 pruned" in text
    assert "12 tokens read instead of 1,200" in text and "2.30 nats behind" in text


def test_places_that_make_no_sense_are_not_marked():
    odd = [span("c:5-99", "x", 0.5), span("c:9-2", "x", 0.4), span("odd", "x", 0.3)]
    seen = check(spans.render([run()[0], *odd, span("c:0-3", "Ada", 1e-9)]), TAGS, NAMES)
    assert [tag for tag, _ in seen.tags].count("mark") == 1
    assert [tag for tag, _ in seen.tags].count("li") == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    events = [
        Candidate("passage", "passage", text),
        token(3, text, lane="greedy"),
        Candidate("greedy", "greedy", text, -1.0),
        span(f"c:0-{len(text)}", text, 0.5),
        token(3, text),
    ]
    seen = check(spans.render(events), TAGS, NAMES)
    assert seen.text.startswith(shown(text))
