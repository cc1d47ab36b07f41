"""Drafts of one pass: the columns, their shading, the table of truths, and hostile words."""

import json
import re

import pytest

from analyzers.context import Context
from analyzers.decoding import superposed
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Lens, Metric, Note, Scores
from tests.test_views import HOSTILE, Seen, check, shown
from visualizations import assets, drafts

TAGS = {"div", "section", "header", "p", "b", "em", "span", "u", "ul", "li", "q", "i", "a", "h3",
        "ol", "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
NAMES = {"class", "dir", "style", "title", "data-go", "data-row"}


def step(pos: int, words: list[tuple], weights: list[tuple], scores: list[float]) -> list[Event]:
    """What one step of the method says of its drafts."""
    names = tuple(f"draft {i}" for i in range(1, len(words) + 1))
    said: list[Event] = [
        Lens(pos, ("one pass",), (((5, words[0][-1], -0.5), (6, " no", -2.0)),), (1.0,),
             name="one pass"),
        Lens(pos, names, tuple(((5 + i, own[-1], -0.5),) for i, own in enumerate(words)),
             tuple(scores), name="drafts"),
        Scores(pos, "weights", "share", names, tuple(own[-1] for own in weights)),
    ]  # fmt: skip
    for name, own, shares in zip(names, words, weights, strict=True):
        said += [
            Candidate(name, "drafts", "".join(own)),
            Scores(pos, f"{name}: words", "share", own, shares),
        ]
    return said


def truths(values: list[float], n: int, pos: int, words: list[tuple], weights: list[tuple]):
    said: list[Event] = []
    for i, value in enumerate(values, start=1):
        said += [
            Candidate(f"draft {i}", "drafts", "".join(words[i - 1]), value),
            Scores(pos, f"draft {i}: words", "share", words[i - 1], weights[i - 1]),
            Metric(f"draft {i}: believed score", n, -1.5 * i, ""),
        ]
    return said


FIRST = step(7, [(" the",), (" a",)], [(0.9,), (0.1,)], [-0.1, -2.3])
SECOND_WORDS = [(" the", " cat"), (" a", " cat")]
SECOND_WEIGHTS = [(0.9, 0.6), (0.1, 0.4)]
SECOND = step(8, SECOND_WORDS, SECOND_WEIGHTS, [-0.5, -0.9])


@pytest.fixture(scope="module")
def real(request) -> list[Event]:
    """A run of a tiny model."""
    engine = request.getfixturevalue("tiny_engine")
    params = superposed.Params(k=3, max_new=12, temperature=1.0, linearity=True)
    return list(superposed.run(engine, Task("The quick brown fox"), params, Context(1)))


def columns(markup: str) -> list[str]:
    return re.findall(r'<p dir="auto">(.*?)</p>', markup, re.S)


def test_nothing_to_draw():
    other: list[Event] = [Note("info", "x"), Candidate("draft 1", "samples", "text")]
    assert not drafts.fits([]) and not drafts.fits(other)
    assert drafts.render([]) == drafts.render(other) == drafts.detail([], 3, None) == ""
    assert drafts.figures([]) == [] == drafts.figures(FIRST)  # one step makes no area
    assert drafts.fits(FIRST)
    assert drafts.detail(FIRST, 99, 0) == ""


def test_columns_grow_with_their_places_and_weights():
    markup = drafts.render(FIRST + SECOND)
    seen = check(markup, TAGS, NAMES)
    words = [attributes for _, attributes in seen.tags if "data-go" in attributes]
    assert [(word["data-go"], word["data-row"], word["class"]) for word in words] == [
        ("7", "0", "x-drafts-5"),
        ("8", "0", "x-drafts-4"),
        ("7", "1", "x-drafts-2"),
        ("8", "1", "x-drafts-3"),
    ]
    assert words[1]["title"] == "60 % of the mixture"
    assert [Seen(column).text for column in columns(markup)] == [" the cat", " a cat"]
    assert "2 drafts, 2 passes." in seen.text and "60 %" in seen.text
    assert "true log-probability" not in seen.text  # not known yet


def test_the_table_says_what_is_true():
    final = FIRST + SECOND + truths([-9.0, -4.0], 2, 8, SECOND_WORDS, SECOND_WEIGHTS)
    seen = check(drafts.render(final), TAGS, NAMES)
    assert "draft 1−1.5−9.0−4.50" in seen.text and "draft 2−3.0−4.0−2.00" in seen.text
    assert "true log-probability, nats" in seen.text and "the answer" in seen.text
    assert "draft 2 is the likeliest per token: the mixture misjudged draft 1" in seen.text
    assert "no log-probabilities" in seen.text
    right = FIRST + SECOND + truths([-3.0, -4.0], 2, 8, SECOND_WORDS, SECOND_WEIGHTS)
    assert "draft 1 is also the likeliest per token" in Seen(drafts.render(right)).text
    alone = step(7, [(" the",)], [(1.0,)], [0.0]) + truths([-3.0], 1, 7, [(" the",)], [(1.0,)])
    text = Seen(drafts.render(alone)).text
    assert "1 draft, 1 pass." in text and "likeliest" not in text


def test_what_the_model_ended_and_how_linear_it_was():
    more = [
        Candidate("finished 1", "finished", " a dog"),
        Metric("cosine, last layer", 5, 0.914, ""),
    ]
    text = Seen(drafts.render(FIRST + more)).text
    assert "ended these on the way" in text and "dog" in text
    assert "0.91 at step 5" in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_words_stay_words(hostile):
    words = [(hostile, hostile), (" a", " b")]
    said = step(3, words, SECOND_WEIGHTS, [-1.0, -2.0])
    said += [Candidate("finished 1", "finished", hostile)]
    said += truths([-1.0, -2.0], 2, 3, words, SECOND_WEIGHTS)
    markup = drafts.render(said)
    seen = check(markup, TAGS, NAMES)
    first = Seen(columns(markup)[0]).text
    assert first == 2 * shown(hostile).replace("\n", "⏎").replace("\t", "⇥")
    assert len([tag for tag, names in seen.tags if "data-go" in names]) == 4
    check(drafts.detail(said, 3, 0), TAGS, NAMES)
    (drawn,) = drafts.figures(said + SECOND)
    for trace in drawn.data:
        for text in trace.hovertext:
            assert not re.search(r"<(?!br>)|[\x00-\x1f\u202a-\u202e$]", text)


def test_hostile_names_are_escaped_too():
    said = [*FIRST, Scores(7, "<b onclick=x>: words", "share", ("x",), (1.0,))]
    seen = check(drafts.render(said), TAGS, NAMES)
    assert "<b onclick=x>" in seen.text
    check(drafts.detail(said, 7, 2), TAGS, NAMES)


def test_detail_shows_the_one_pass_and_who_took_what():
    said = [*FIRST, *SECOND, Scores(8, "n-gram score", "", ("draft 1", "draft 2"), (0.25, 0.0))]
    seen = check(drafts.detail(said, 8, 1), TAGS, NAMES)
    assert [names["class"] for tag, names in seen.tags if tag == "li"] == ["bar", "bar me"]
    assert "taken by draft 1" in str(seen.tags)
    assert "1cat60 %0.250−0.5" in seen.text.replace(" cat", "cat")
    assert "2cat40 %0.000−0.9" in seen.text.replace(" cat", "cat")
    rows = [names.get("class") for tag, names in seen.tags if tag == "tr"]
    assert rows == [None, None, "x-drafts-on"]
    assert "n-grams" not in drafts.detail(FIRST, 7, None)
    little = [*SECOND, Scores(8, "n-gram score", "", ("draft 1", "draft 2"), (0.0001, 0.0))]
    assert "60 %< 0.001−0.5" in Seen(drafts.detail(little, 8, 0)).text


def test_detail_marks_where_a_column_comes_from():
    """The second column grew from what was the first draft before."""
    words = [(" a", " cat"), (" the", " cat")]
    second = step(8, words, [(0.1, 0.6), (0.9, 0.4)], [-0.5, -0.9])
    rows = [
        [names.get("class") for tag, names in Seen(drafts.detail(FIRST + second, 7, row)).tags
         if tag == "tr"][1:]
        for row in (0, 1, 2, None)
    ]  # fmt: skip
    assert rows == [[None, "x-drafts-on"], ["x-drafts-on", None], [None, None], [None, None]]


def test_areas_are_the_weights_of_every_step(real):
    (drawn,) = drafts.figures(real)
    weights = [e for e in real if isinstance(e, Scores) and e.name == "weights"]
    assert len(drawn.data) == 3
    for row, trace in enumerate(drawn.data):
        assert list(trace.x) == list(range(1, 13)) and trace.stackgroup == "weights"
        assert list(trace.y) == [scores.values[row] for scores in weights]
        assert list(trace.customdata) == [scores.pos for scores in weights]
    data = json.loads(drawn.to_json())
    assert data["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_fewer_drafts_at_first():
    two = FIRST + step(8, [(" the", " x"), (" a", " y"), (" the", " z")],
                       [(0.9, 0.5), (0.1, 0.3), (0.9, 0.2)], [-1.0, -2.0, -3.0])  # fmt: skip
    (drawn,) = drafts.figures(two)
    assert list(drawn.data[2].y) == [0, 0.2] and drawn.data[2].hovertext[0] == ""


def test_a_real_run_at_every_moment(real):
    for end in range(0, len(real) + 1, 5):
        markup = drafts.render(real[:end])
        check(markup, TAGS, NAMES)
        assert bool(markup) == any(
            isinstance(e, Scores) and e.name.endswith(": words") for e in real[:end]
        )
    seen = check(drafts.render(real), TAGS, NAMES)
    assert "3 drafts, 12 passes." in seen.text and "at step 10" in seen.text
    positions = {e.pos for e in real if isinstance(e, Lens)}
    for pos in positions:
        for row in (None, 0, 1, 2):
            markup = drafts.detail(real, pos, row)
            check(markup, TAGS, NAMES)
            assert markup.count("x-drafts-on") == (row is not None)


def test_the_style_is_its_own_and_has_no_lists_in_is():
    sheet = (assets._HERE / "drafts.css").read_text()
    assert sheet in assets.css()
    assert not re.search(r":(is|where)\([^)]*,", sheet)
    bare = re.sub(r"/\*.*?\*/", "", sheet, flags=re.S)
    for selectors in re.findall(r"([^{}]+)\{", bare):
        assert all(part.strip().startswith(".x-drafts") for part in selectors.split(","))
