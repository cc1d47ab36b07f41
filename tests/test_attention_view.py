"""The attention view: what is drawn are the shares, and the warning is always there."""

import json
import re

from analyzers.trace import Event, Scores
from tests.test_views import HOSTILE, Seen, token
from visualizations import attention

TEXTS = ["The", " cat", " sat"]


def run(texts: list[str] = TEXTS) -> list[Event]:
    """The last token looked: two layers of two heads, one with a share left out."""
    pos = len(texts) - 1
    over = tuple(range(pos + 1))

    def row(name: str, *values: float) -> Scores:
        values += (0.0,) * (len(over) - len(values))
        return Scores(pos, name, "share", over, values)

    return [
        *(token(place, text) for place, text in enumerate(texts)),
        row("attention, all layers", 0.7, 0.2, 0.1),
        row("attention of layer 1", 0.6, 0.3, 0.1),
        row("attention of layer 1, head 1", 0.5, 0.4, 0.1),
        row("attention of layer 1, head 2", 0.7, 0.2, 0.1),
        row("attention of layer 2", 0.8, 0.1, 0.1),
        row("attention of layer 2, head 1", 0.75, 0.2, 0.05),
        Scores(pos, "attention of layer 2, head 2", "share", (0, 2), (0.85, 0.15)),
    ]


def test_nothing_is_nothing():
    for events in ([], [token(0), Scores(0, "attribution: occlusion", "nats", (0,), (1.0,))]):
        assert not attention.fits(events) and attention.render(events) == ""
        assert attention.figures(events) == [] and attention.detail(events, 0, None) == ""


def test_the_first_token_does_not_set_the_scale():
    html = attention.render(run())
    found = re.findall(r'class="(x-t[^"]*)" style="--s:(\d+)%" data-go="(\d)"', html)
    assert found == [("x-t", "100", "0"), ("x-t", "100", "1"), ("x-t x-here", "50", "2")]
    seen = Seen(html).text
    assert "not an explanation" in seen and "sink" in seen
    assert "20 % of the attention" in seen and "first token 70 %, beyond the scale" in seen


def test_tokens_behind_the_look_have_none():
    html = attention.render([*run()[:3], token(3, " down"), *run()[3:]])
    assert '<span class="x-t x-later" data-go="3" title="not seen from there">' in html


def test_the_charts_hold_the_shares_and_the_positions():
    by_layer, by_head = attention.figures(run())
    (heat,) = by_layer.data
    assert [list(row) for row in heat.z] == [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]
    assert [list(row) for row in heat.customdata] == [[0, 1, 2]] * 2
    assert list(heat.y) == ["1", "2"] and heat.zmax == 0.3
    (heat,) = by_head.data
    assert [list(row) for row in heat.z] == [[0.75, 0.2, 0.05], [0.85, 0.0, 0.15]]
    (menu,) = by_head.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["layer 1", "layer 2"] and menu.active == 1
    changes = menu.buttons[0].args[0]
    assert [list(row) for row in changes["z"][0]] == [[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]]
    assert changes["zmax"] == 0.4 and changes["hovertemplate"].startswith("layer 1, head")


def test_detail_lists_the_heads_that_looked_most():
    html = attention.detail(run(), 1, None)
    found = re.findall(r"layer (\d), head (\d)</span>.*?<span>([^<]+)</span>", html)
    assert found == [("1", "1", "40 %"), ("1", "2", "20 %"), ("2", "1", "20 %")]
    assert "20 %</b> of all attention" in html
    assert attention.detail(run(), 7, None) == ""


def test_hostile_texts_stay_texts():
    events = run(HOSTILE)
    for html in (attention.render(events), attention.detail(events, 1, None)):
        seen = Seen(html)
        assert not seen.open and not {name for name, _ in seen.tags} & {"script", "img"}
        assert not any(key.startswith("on") for _, attributes in seen.tags for key in attributes)
        assert "${" not in html and "{{" not in html
    for drawn in attention.figures(events):
        data = json.loads(drawn.to_json())
        words = [*data["data"][0]["text"][0], *data["layout"]["xaxis"]["ticktext"]]
        assert not any("<" in word or "$" in word for word in words)
