"""The attribution view: safe, in proportion, and silent where there is nothing."""

import re

from analyzers.trace import Event, Metric, Scores
from tests.test_views import HOSTILE, Seen, token
from visualizations import attribution

METRICS = {
    "F(text)": -0.5,
    "F(baseline)": -4.5,
    "sum of attributions": 3.9,
    "completeness error": -0.1,
    "relative completeness error": 0.025,
}


def run(texts: list[str], values: list[float], method: str = "integrated gradients") -> list[Event]:
    """Every text but the last is the context, with these shares; the last is the target."""
    pos = len(values)
    over = tuple(range(pos))
    return [
        *(token(place, text) for place, text in enumerate(texts)),
        Scores(pos, f"attribution: {method}", "nats", over, tuple(values)),
        *(Metric(name, 0, value, "nats") for name, value in METRICS.items()),
    ]


def spans(html: str) -> list[tuple[str, str, str]]:
    """(position, classes, strength) of every tinted token."""
    found = re.findall(r'<span class="(x-t[^"]*)" style="--s:(\d+)%" data-go="(\d+)"', html)
    return [(pos, classes, strength) for classes, strength, pos in found]


def test_nothing_is_nothing():
    assert not attribution.fits([]) and attribution.render([]) == ""
    assert attribution.detail([], 0, None) == ""
    other = [token(0), Scores(0, "KL(strong‖weak)", "nats", (0,), (1.0,))]
    assert not attribution.fits(other) and attribution.render(other) == ""


def test_tint_is_the_share_of_the_largest_and_its_sign():
    events = run(["The", " cat", " sat", "!", " x"], [2.0, -1.0, 0.0, 0.5])
    assert attribution.fits(events)
    html = attribution.render(events)
    assert spans(html) == [
        ("0", "x-t x-for", "100"),
        ("1", "x-t x-against", "50"),
        ("2", "x-t", "0"),
        ("3", "x-t x-for", "25"),
    ]
    assert '<span class="x-target" data-go="4"' in html
    assert "−2.00 to +2.00 nats" in html


def test_special_tokens_do_not_set_the_scale():
    first = token(0, "<|end|>", bytes="")
    events = [first, *run(["", " cat", " x"], [8.0, -2.0])[1:]]
    assert spans(attribution.render(events)) == [
        ("0", "x-t x-special x-for", "100"),
        ("1", "x-t x-against", "100"),
    ]


def test_bars_are_sorted_by_size():
    html = attribution.render(run(["a", "b", "c", "d", "x"], [1.0, -4.0, 0.0, 2.0]))
    bars = re.findall(r'<li data-go="(\d)".*?x-(for|against)"><u style="width:([\d.]+)%', html)
    assert bars == [("1", "against", "50.0"), ("3", "for", "25.0"), ("0", "for", "12.5")]
    assert "and 1 more" in html


def test_the_numbers_are_there_and_an_error_stands_out():
    seen = Seen(attribution.render(run(["a", "x"], [3.9]))).text
    for shown in ("−0.50", "−4.50", "+4.00", "+3.90", "−0.10", "(2.5 %)"):
        assert shown in seen
    assert "x-off" not in attribution.render(run(["a", "x"], [3.9]))
    worse = [*run(["a", "x"], [3.9]), Metric("relative completeness error", 0, 0.4, "share")]
    assert "x-off" in attribution.render(worse)
    occluded = attribution.render([*run(["a", "x"], [3.9], "occlusion"), worse[-1]])
    assert "x-off" not in occluded and "does not promise" in occluded


def test_detail_of_one_token():
    events = run(["The", " cat", " x"], [3.0, -1.0])
    seen = Seen(attribution.detail(events, 1, None)).text
    assert "−1.00 nats" in seen and "against" in seen and "number 2 of 2" in seen
    assert "25 %" in seen
    assert attribution.detail(events, 2, None) == "" == attribution.detail(events, 9, None)


def test_hostile_texts_stay_texts():
    events = run([*HOSTILE, *HOSTILE[:1]], [1.0] * len(HOSTILE))
    for html in (
        attribution.render(events),
        attribution.render(run(["a", HOSTILE[1]], [1.0])),
        *(attribution.detail(events, pos, None) for pos in range(len(HOSTILE))),
    ):
        seen = Seen(html)
        assert not seen.open
        names = {name for name, _ in seen.tags}
        assert not names & {"script", "img"}
        assert not any(key.startswith("on") for _, attributes in seen.tags for key in attributes)
        assert "${" not in html and "{{" not in html
