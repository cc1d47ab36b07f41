"""The view of the routing: its numbers, its charts, and hostile text in all of them."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from analyzers.trace import Metric, Rewind, Routing, Scores, Token
from visualizations import routing

HOSTILE = "<img src=x onerror=alert(1)>"


def token(pos: int, text: str = " a") -> Token:
    return Token(
        pos=pos, id=7, text=text, bytes=text.encode().hex(), logprob=-1.0, entropy=1.0, rank=1,
        margin=0.5, p_sampled=1.0, top=(),
    )  # fmt: skip


def used(pos: int, layer: int, experts: tuple[int, ...], label: str = "strong") -> Routing:
    return Routing(pos, layer, experts, (1 / len(experts),) * len(experts), label)


def run(text: str = " a") -> list:
    """Two tokens, two layers, four experts. The strong reading takes two experts, the weak one.

    Unchosen: at 5, layer 1 (expert 2) and layer 2 (expert 3); at 6 none: 2 of 4."""
    return [
        token(5, text),
        Scores(5, "KL(strong‖weak)", "nats", (5,), (0.25,)),
        used(5, 1, (0, 1)), used(5, 2, (0, 1)),
        used(5, 1, (2,), "weak"), used(5, 2, (3,), "weak"),
        Scores(5, "router entropy (strong)", "nats", ("1", "2"), (1.0, 0.5)),
        token(6, text),
        Scores(6, "KL(strong‖weak)", "nats", (6,), (3.0,)),
        used(6, 1, (0, 2)), used(6, 2, (0, 1)),
        used(6, 1, (2,), "weak"), used(6, 2, (1,), "weak"),
        Scores(6, "router entropy (strong)", "nats", ("1", "2"), (0.5, 0.2)),
        Scores(5, "KL by rank", "nats", ("1", "2", "3"), (0.1, 0.2, 0.3)),
        Scores(6, "KL by rank", "nats", ("1", "2", "3"), (0.4, 0.5, 0.6)),
    ]  # fmt: skip


class Seen(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.open = "", []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def seen(markup: str) -> Seen:
    found = Seen(markup)
    assert not found.open
    return found


def test_it_fits_where_routing_was_said():
    assert routing.fits(run()) and not routing.fits([token(1), Metric("x", 0, 1.0, "")])
    assert routing.TITLE and Routing in routing.DRAWS


@pytest.mark.parametrize("events", [[], [token(5)]])
def test_without_routing_there_is_nothing(events):
    assert routing.render(events) == "" and routing.figures(events) == []
    assert routing.detail(events, 5) == ""


def test_the_cards_have_the_numbers_of_the_run():
    shown = seen(routing.render(run())).text
    assert "2 strong · 1 weakof 4, for a token in each of 2 layers" in shown
    assert "unchosen use50 %" in shown
    assert "router entropy0.55 nats1.39 = all experts alike" in shown  # (.75 + .35) / 2; ln 4
    # Layer 1: expert 0 twice of 4 choices, layer 2: 0 and 1 twice; the mean of an expert is 1.
    assert "busiest expert2.00 × the mean" in shown


def test_the_tokens_where_the_readings_differ_most_can_be_chosen():
    page = seen(routing.render(run()))
    assert [button["data-go"] for button in page.all("button")] == ["6", "5"]
    assert re.search(r"·? ?a.{0,3} ?3\.00", page.text)


def test_one_reading_alone_is_enough():
    events = [e for e in run() if isinstance(e, Token) or getattr(e, "label", "") == "strong"]
    shown = seen(routing.render(events)).text
    assert "2 strongof 3" in shown and "unchosen" not in shown and "entropy" not in shown
    usage, layers = routing.figures(events)
    assert [trace.type for trace in usage.data] == ["heatmap"]
    assert [list(trace.y) for trace in layers.data] == [[1.5, 1.5]]
    assert "weak" not in routing.detail(events, 5)


def test_undone_tokens_do_not_count():
    undone = [*run()[:7], Rewind(5, "tried again"), *run()[7:14]]
    shown = seen(routing.render(undone)).text
    assert "unchosen use0 %" in shown
    strong, _ = routing.figures(undone)[0].data
    assert list(map(list, strong.z)) == [[1, 0, 1], [1, 1, 0]]
    assert routing.detail(undone, 5) == ""
    assert routing.render([*run(), Rewind(0, "all of it")]) == ""


def test_other_lanes_are_left_out():
    beside = [Routing(9, 1, (7,), (1.0,), lane="beside")]
    assert routing.render([*run(), *beside]) == routing.render(run())
    assert routing.render(beside) == ""


def test_the_usage_map_is_the_share_of_the_tokens():
    usage = routing.figures(run())[0]
    strong, weak = usage.data
    assert list(map(list, strong.z)) == [[1, 0.5, 0.5, 0], [1, 1, 0, 0]]  # layers x experts
    assert list(map(list, weak.z)) == [[0, 0, 1, 0], [0, 0.5, 0, 0.5]]
    assert list(strong.y) == ["1", "2"] and list(strong.x) == [0, 1, 2, 3]
    assert strong.hovertext[0][1] == "layer 1, expert 1<br>used at 50 % of 2 tokens"
    assert [note.text for note in usage.layout.annotations] == [
        "<b>strong</b>, up to 100 %",
        "<b>weak</b>, up to 100 %",
    ]


def test_entropy_and_load_by_layer():
    entropy, strong, weak = routing.figures(run())[1].data
    assert list(entropy.y) == [0.75, 0.35] and list(entropy.x) == [1, 2]
    assert list(strong.y) == [2.0, 2.0]
    assert list(weak.y) == [4.0, 2.0]  # always expert 2; then 3 and 1 in turn
    lines = [shape.y0 for shape in routing.figures(run())[1].layout.shapes]
    assert lines == [pytest.approx(math.log(4)), 1.0]


def test_the_rank_map_selects_tokens():
    (ranks,) = routing.figures(run())[2].data
    assert list(ranks.y) == ["1", "2", "3"] and list(ranks.x) == [1, 2]
    assert list(map(list, ranks.z)) == [[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]]
    assert [list(row) for row in ranks.customdata] == [[5, 6]] * 3
    assert "0.50 nats with rank 2 alone<br>token 2" in ranks.hovertext[1][1]


def test_a_token_opened_up_shows_the_experts_of_every_layer():
    page = seen(routing.detail(run(), 5))
    dots = page.all("circle")
    assert [dot["class"] for dot in dots] == ["r0", "r0", "r1"] * 2
    strong, other, weak = (float(dot["cx"]) for dot in dots[:3])  # layer 2 is on top
    assert other - strong == 15 and weak - strong == 3 * 15  # experts 0, 1 and 3
    assert int(dots[0]["cy"]) < int(dots[3]["cy"])
    assert "layer 2 · strong: 0 (0.50), 1 (0.50) · weak: 3 (1.00)" in page.text
    assert "strong, 2 a layerweak, 1 a layer" in page.text
    assert "2 of 2 weak choices are experts that the strong reading left out" in page.text
    assert routing.detail(run(), 99) == ""


def test_larger_dots_carry_more_weight():
    events = [Routing(0, 1, (4, 2), (0.9, 0.1))]
    first, second = seen(routing.detail(events, 0)).all("circle")
    assert float(first["r"]) > float(second["r"]) > 2


def test_weights_of_zero_and_many_experts_are_drawn():
    events = [Routing(0, layer, (63, 0), (0.0, 0.0)) for layer in (1, 2)]
    page = seen(routing.detail(events, 0))
    assert len(page.all("circle")) == 4 and len(routing.figures(events)) == 2
    assert seen(routing.render(events)).text


@pytest.mark.parametrize("text", [HOSTILE, "${x} {{x}}", "</b></svg><script>", "$x$ `y`", ""])
def test_hostile_text_stays_text(text):
    events = run(text)
    events += [
        used(5, 1, (0,), text or "-"),
        Scores(5, f"router entropy ({text})", "", ("1",), (1.0,)),
    ]
    markup = routing.render(events) + routing.detail(events, 5)
    page = seen(markup)
    assert {tag for tag, _ in page.tags} <= {
        "div", "dl", "dt", "dd", "b", "p", "span", "button", "q", "small", "em", "i", "h3", "ul",
        "li", "svg", "g", "title", "path", "text", "circle",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "${" not in markup and "{{" not in markup
    for figure in routing.figures(events):
        drawn = json.loads(figure.to_json())
        texts = re.findall(r"<[^>]*>", json.dumps([drawn["data"], drawn["layout"]]))
        assert set(texts) <= {"<br>", "<b>", "</b>"}
