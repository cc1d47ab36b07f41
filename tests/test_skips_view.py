"""Sub-layers left out: what is drawn is the set that was found, and how."""

import pytest

from analyzers.trace import Event, Metric, Scores
from tests.test_views import HOSTILE, check
from visualizations import inside, skips

TAGS = {"div", "p", "b", "i", "span", "small", "h4", "ol", "li", "button"}
NAMES = {"class", "style", "title", "type", "data-go"}
LABELS = ("a2", "a3", "a4", "f2", "f3", "f4")


def off(pos: int, *labels: str, over: tuple[str, ...] = LABELS) -> Scores:
    values = tuple(float(label in labels) for label in over)
    return Scores(pos, "skipped", "1 = left out", over, values)


def tried(number: int, kind: str, value: float) -> Metric:
    return Metric(f"matchness, {kind}", number, value, "share")


def run() -> list[Event]:
    return [
        off(9, "a2", "f3"),
        Scores(30, "matchness alone", "share", LABELS, (1.0, 0.95, 0.5, 0.0, 1.0, 0.7)),
        tried(1, "start", 0.25),
        tried(2, "random", 0.5),
        off(33, "a3", "a4"),
        tried(3, "bayes", 0.125),
        Metric("mean acceptance length", 9, 1.5, "tokens a pass"),
    ]


def strips(html: str) -> list[list[str | None]]:
    """The classes of the cells of each strip, attention first."""
    seen, found = check(html, TAGS, NAMES), []
    for tag, attributes in seen.tags:
        if tag == "div" and (attributes.get("class") or "").startswith("strip"):
            found.append([])
        elif tag == "p" and found:
            found.append([])  # a key follows
        elif tag == "i" and found:
            found[-1].append(attributes.get("class"))
    return [cells for cells in found if len(cells) == 10]


def test_nothing_is_drawn_without_a_set():
    events = [event for event in run() if not (isinstance(event, Scores) and "skip" in event.name)]
    assert not skips.fits(events) and skips.render(events) == "" and skips.fits(run())
    assert skips in inside.fitting(run()) and skips not in inside.fitting(events)


def test_the_strip_is_the_set_of_now():
    now, alone, newest, first = strips(skips.render(run()))
    assert now == ["never", None, "off", "off", "never", "never", None, None, None, "never"]
    assert newest == now
    assert first == ["never", "off", None, None, "never", "never", None, "off", None, "never"]
    assert alone == ["never", "h0", "h1", "h3", "never", "never", "h5", "h0", "h2", "never"]


def test_it_grows_with_the_run():
    events = run()
    for length in range(1, len(events) + 1):
        check(skips.render(events[:length]), TAGS, NAMES)
    first = check(skips.render(events[:1]), TAGS, NAMES).text
    assert "2 of 6 sub-layers left out: 1 attention, 1 feed-forward · not tried yet" in first
    assert "How the set changed" not in first


def test_the_numbers():
    seen = check(skips.render(run()), TAGS, NAMES)
    assert "2 attention, 0 feed-forward · matchness 50 % · 3 sets tried" in seen.text
    assert "Needed most: feed-forward of layer 2 (0 %), attention of layer 4 (50 %)" in seen.text
    assert "from token 3350 %drawn at random" in seen.text
    assert "from token 925 %the set it began with" in seen.text
    assert [a["data-go"] for _, a in seen.tags if "data-go" in a] == ["33", "9"]


@pytest.mark.parametrize(
    ("value", "level"), [(1.0, 0), (0.99, 1), (0.8, 1), (0.7, 2), (0.25, 4), (0.1, 5), (0.0, 5)]
)
def test_levels(value, level):
    assert skips._level(value) == level


def test_only_the_newest_sets_are_listed():
    many = [off(pos, LABELS[pos % 6]) for pos in range(20)]
    html = skips.render(many)
    assert html.count("<li>") == 8 and "And 12 earlier sets" in html


def test_the_curve_is_the_best_so_far():
    (drawn,) = skips.figures(run())
    best, random, bayes = drawn.data
    assert list(best.y) == [0.25, 0.5, 0.5] and list(best.x) == [1, 2, 3]
    assert list(random.x) == [1, 2] and list(bayes.y) == [0.125]
    assert "12 %" in bayes.hovertext[0]
    assert skips.figures(run()[:3]) == []


def test_a_large_model_has_fewer_numbers():
    over = tuple(f"{kind}{layer}" for kind in "af" for layer in range(2, 80))
    seen = check(skips.render([off(1, "a5", over=over)]), TAGS, NAMES)
    assert "layer11020304050607080" in seen.text


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_that_are_none_are_left_out(text):
    odd = Scores(1, "skipped", text, (text, "a2", "f2"), (1.0, 1.0, 0.0))
    events = [odd, tried(1, text, 0.5), tried(2, "random", 0.5)]
    assert "1 of 2 sub-layers" in check(skips.render(events), TAGS, NAMES).text
    assert skips.figures(events)
    assert not skips.fits([Scores(1, "skipped", "", (text,), (1.0,))])
