"""The lens view: columns that only grow, four colourings without Python, a side panel."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analyzers.trace import Event, Lens, Rewind, Scores, Token
from visualizations import lens
from visualizations.lens import COLOURINGS, DIVERGENCE, ENTROPY, PROBABILITY, RANK, LensView

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</b></div><script>alert(1)</script>",
    "\" onclick='x' data-go=7 &lt;",
    "${x} {{x}}",
]
WRITTEN = "log-probability of the written token, nats"
ROWS = ("0", "1", "2", "3")


def written(pos: int, text: str = " fox") -> Token:
    return Token(
        pos=pos, id=7, text=text, bytes=text.encode().hex(), logprob=-0.5, entropy=1.0, rank=1,
        margin=0.2, p_sampled=1.0, top=((7, text, -0.5),),
    )  # fmt: skip


def column(
    pos: int, words: tuple[str, ...] = (".", " dog", " fox", " fox"), picked: int | None = 2
) -> list[Event]:
    """What the logit lens says of one token: Scores over the layers, then its Lens."""
    ids = [7 if word == " fox" else 9 for word in words]
    return [
        Scores(pos, RANK.source, "", ROWS, (4000.0, 30.0, 1.0, 1.0)),
        Scores(pos, ENTROPY.source, "nats", ROWS, (6.0, 3.0, 0.7, 0.05)),
        Scores(pos, DIVERGENCE.source, "nats", ROWS, (12.0, 3.0, 0.2, 0.0)),
        Lens(
            pos,
            rows=ROWS,
            top=tuple(
                ((id, word, -0.7), (1, "x", -1.5)) for id, word in zip(ids, words, strict=True)
            ),
            scores=(-8.0, -2.0, -0.5, -0.1),
            picked=picked,
            measure=WRITTEN,
        ),
    ]


def run(n: int) -> list[Event]:
    """As the method says it: the text first, what the layers say behind it."""
    tokens: list[Event] = [written(pos) for pos in range(5, 5 + n)]
    return tokens + [event for pos in range(5, 5 + n) for event in column(pos)]


class Nodes(HTMLParser):
    """Every element with its depth, attributes and text; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[int, str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((len(self.open), tag, dict(attrs), []))
        if tag != "input":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found[-1][3].append(data)

    def cells(self) -> list[tuple[int, int, set[str], str]]:
        """(data-go, data-row, classes, text)"""
        return [
            (int(a["data-go"]), int(a["data-row"]), set(a["class"].split()), "".join(text))
            for _, tag, a, text in self.found
            if tag == "b" and "data-row" in a
        ]


def columns(html: str) -> int:
    return html.count('class="x-lens-col"')


# What is drawn


def test_a_column_a_token_with_the_last_layer_on_top():
    nodes = Nodes(lens.render(run(2)))
    cells = nodes.cells()
    assert [(pos, row) for pos, row, _, _ in cells] == [
        (pos, row) for pos in (5, 6) for row in (3, 2, 1, 0)
    ]
    assert [text for *_, text in cells[:4]] == [" fox", " fox", " dog", "."]
    labels = [text for _, tag, _, text in nodes.found if tag == "li"][-5:]
    assert labels == [["layer"], ["3"], ["2"], ["1"], ["0"]]
    heads = [(a["data-go"], text) for _, tag, a, text in nodes.found if tag == "button"]
    assert heads == [("5", [" fox"]), ("6", [" fox"])]
    top = [(tag, a.get("class")) for depth, tag, a, _ in nodes.found if depth == 0]
    assert top == [
        ("form", "x-lens-head"),
        ("ol", "x-lens-rows"),
        *[("div", "x-lens-col"), ("p", "x-lens-sum")] * 2,
    ]


def test_each_cell_carries_its_level_in_every_colouring():
    """p: e^-8, e^-2 = .14, e^-.5 = .61, e^-.1 = .90; level 0 has no class. k: settled."""
    levels = {row: classes for _, row, classes, _ in Nodes(lens.render(run(1))).cells()}
    assert levels == {
        0: set(),
        1: {"p2", "r2", "h1", "d2"},
        2: {"p4", "r5", "h3", "d4", "k"},
        3: {"p5", "r5", "h5", "d5"},
    }


@pytest.mark.parametrize("colouring", COLOURINGS, ids=lambda c: c.name)
def test_a_value_on_a_threshold_has_passed_it(colouring):
    sign = 1 if colouring.rising else -1
    assert len(colouring.limits()) == lens.LEVELS
    for level, step in enumerate(colouring.steps):
        assert colouring.level(step) == level + 1
        assert colouring.level(step - sign * 1e-9) == level
        assert f"{step:g}" in colouring.limits()[level + 1]


def test_the_colourings_are_switched_by_the_style_sheet_alone():
    html = lens.render(run(1))
    radios = [a for _, tag, a, _ in Nodes(html).found if tag == "input"]
    assert [a["class"] for a in radios] == [f"by-{c.name}" for c in COLOURINGS]
    assert ["checked" in a for a in radios] == [True, False, False, False]
    css = Path(lens.__file__).with_suffix(".css").read_text(encoding="utf-8")
    for colouring in COLOURINGS:
        assert f".x-lens-head:has(.by-{colouring.name}:checked) .of-{colouring.name}" in css
        for level in range(1, lens.LEVELS):
            chosen = f".x-lens-head:has(.by-{colouring.name}:checked) ~ .x-lens-col"
            assert f"{chosen} .{colouring.letter}{level}" in css
    assert not re.search(r":(is|where)\([^)]*,", css)  # Gradio cuts there
    names = set(re.findall(r"\.(x-[a-z-]+)", css))
    assert names and all(name.startswith("x-lens") for name in names)


def test_the_mean_of_where_it_settled():
    """Behind each column, over the columns so far: (2 + 3) / 2."""
    events = [written(5), *column(5), written(6), *column(6, picked=3)]
    first, second = re.findall(r'<p class="x-lens-sum">(.*?)</p>', lens.render(events))
    assert first == "Settled at layer <b>2.0</b> of 3 on average, over 1 token"
    assert second == "Settled at layer <b>2.5</b> of 3 on average, over 2 tokens"
    assert "x-lens-sum" not in lens.render(column(5, picked=None))


def test_layers_chosen_by_a_divergence_are_drawn_as_shares():
    """As DoLa says them: candidate layers only, no ranks or entropies; 0.1 and 0.4 of 0.4."""
    top = ((7, " fox", -0.5),)
    dola = Lens(5, ("16", "18"), (top, top), (0.1, 0.4), picked=1, measure="JSD<, nats")
    html = lens.render([written(5), dola])
    assert [(row, c) for _, row, c, _ in Nodes(html).cells()] == [(1, {"p5", "k"}), (0, {"p1"})]
    assert 'class="by-share" checked' in html and "by-rank" not in html
    assert "JSD&lt;, nats, divided by the largest" in html
    assert "Chosen: layer <b>18.0</b> of 18 on average" in html
    assert "the layer that was chosen" in html
    flat = Lens(5, ("16", "18"), (top, top), (0.0, 0.0), picked=None, measure="JSD, nats")
    assert {frozenset(c) for *_, c, _ in Nodes(lens.render([flat])).cells()} == {frozenset()}
    assert "JSD&lt;, nats" in lens.detail([written(5), dola], 5, 1)


def test_only_what_there_is_can_be_chosen():
    html = lens.render([event for event in run(1) if getattr(event, "name", "") != RANK.source])
    assert "by-entropy" in html and "by-rank" not in html


def test_other_rows_than_the_first_stand_where_they_belong():
    odd = Lens(6, ("3", "9"), (((1, "a", -1.0),), ()), (-1.0, -1.0), measure=WRITTEN)
    cells = Nodes(lens.render([*run(1), odd])).cells()
    assert [(pos, row, text) for pos, row, _, text in cells if pos == 6] == [(6, 0, "a")]


def test_white_space_and_parts_of_characters_are_visible():
    words = ("\n", " \xa0 ", "⟨E2⟩", "a very long one")
    part = Token(
        pos=5, id=1, text="", bytes="e2", logprob=-1.0, entropy=1.0, rank=1, margin=0.0,
        p_sampled=1.0, top=(),
    )  # fmt: skip
    html = lens.render([part, *column(5, words)])
    assert [text for *_, text in Nodes(html).cells()] == ["a very lon", "⟨E2⟩", "···", "⏎"]
    assert "⟨E2⟩</button>" in html


# It only grows


def test_the_html_starts_with_what_it_was():
    """However the events are cut; and it is what all of them at once give."""
    events = run(12)
    for size in (1, 3, 7):
        view, before = LensView(), ""
        for at in range(0, len(events), size):
            after = view.add(events[at : at + size])
            assert after.startswith(before)
            before = after
        assert before == lens.render(events)
    assert columns(before) == 12


def test_what_was_rewound_vanishes():
    view = LensView()
    long = view.add(run(6))
    assert columns(long) == 6
    short = view.add([Rewind(8, "test")])
    assert long.startswith(short) and short == lens.render(run(3))
    again = view.add([written(8, " cat"), *column(8)])
    assert again == lens.render([*run(3), written(8, " cat"), *column(8)])
    assert columns(view.add([Rewind(0, "test")])) == 0
    assert columns(lens.render([*run(2), Rewind(6, "test"), written(6), *column(6)])) == 2


def test_nothing_to_draw():
    assert lens.render([]) == "" and not lens.fits([])
    assert lens.render([written(5)]) == "" and not lens.fits([written(5)])
    branches = Lens(5, ("strong",), ((),), (-1.0,), name="branches")
    assert lens.render([branches]) == "" and not lens.fits([branches])
    other = Lens(5, ROWS, ((),) * 4, (-1.0,) * 4, measure=WRITTEN, lane="right")
    assert lens.render([other]) == "" and lens.render([other], lane="right")
    assert lens.fits(run(1)) and set(map(type, run(1))) <= set(lens.DRAWS)


def test_a_long_answer_stays_light():
    """128 tokens of 31 layers: below 60 bytes a cell, everything counted."""
    rows = tuple(map(str, range(31)))
    numbers = tuple(float(i) for i in range(31))
    events: list[Event] = []
    for pos in range(100, 228):
        events += [written(pos, " words")]
        events += [Scores(pos, c.source, c.unit, rows, numbers) for c in COLOURINGS[1:]]
        top = tuple(((9, " words", -1.0),) for _ in rows)
        scores = tuple(-value for value in numbers)
        events.append(Lens(pos, rows, top, scores, picked=20, measure=WRITTEN))
    html = lens.render(events)
    assert columns(html) == 128
    assert len(html.encode()) / (128 * 31) < 60


# Safety


@pytest.mark.parametrize("text", HOSTILE)
def test_model_text_is_only_text(text):
    events = [written(5, text), *column(5, (text, " a", text, " b"))]
    for html in (lens.render(events), lens.detail(events, 5), lens.detail(events, 5, 0)):
        tags = {tag for _, tag, _, _ in Nodes(html).found}
        assert not tags & {"script", "img"}
        assert "${" not in html and "{{" not in html
        for _, _, attributes, _ in Nodes(html).found:
            assert not [name for name in attributes if name.startswith("on")]


# The side panel


def test_all_layers_at_a_token():
    html = lens.detail(run(2), 6)
    assert "Layers at" in html and "Settled at layer 2." in html
    rows = re.findall(r'<li( class="k")?><button type="button" data-go="6" data-row="(\d)">', html)
    assert rows == [("", "3"), (' class="k"', "2"), ("", "1"), ("", "0")]
    assert html.count("50 %") == 4  # e^-0.7
    Nodes(html)


def test_one_layer_at_a_token():
    html = lens.detail(run(2), 6, 2)
    assert "Layer 2 at" in html
    for fact in ("<b>61 %</b>", "<b>1</b>", "<b>0.70</b> nats", "<b>0.20</b> nats, from the last"):
        assert fact in html
    assert html.count('class="bar me"') == 1 and html.count('class="bar') == 2 + 1  # and the list
    assert 'class="bar me"' not in lens.detail(run(2), 6, 0)
    assert '<button type="button" data-go="6">' in html
    Nodes(html)


def test_a_token_without_a_lens_has_no_detail():
    events = run(2)
    assert lens.detail(events, 9) == "" and lens.detail([], 5) == ""
    assert lens.detail(events, 5, 4) == "" and lens.detail(events, 5, -1) == ""
    assert lens.detail([*events, Rewind(6, "test")], 6) == ""
    assert lens.detail([*events, Rewind(6, "test")], 5) != ""
    assert PROBABILITY.level(1.0) == 5
