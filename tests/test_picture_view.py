"""The picture, pixel by pixel: every pixel in its place, whose it is, and nothing but pictures."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from analyzers.trace import DraftTree, Event, Note, Rewind, RunStarted, Token
from tests.test_views import HOSTILE, Seen, check, shown, token
from visualizations import assets, inside, picture

TAGS = {
    "div", "figure", "h4", "svg", "rect", "title", "text", "path", "figcaption", "b", "ul", "li",
    "i", "p",
}  # fmt: skip
NAMES = {
    "class", "style", "data-go", "x", "y", "width", "height", "d", "viewbox", "role",
}  # fmt: skip
FRAME = {"width": 4, "height": 2, "levels": 17, "about": "A toy."}


def started(frame: object = FRAME, prompt_ids: tuple[int, ...] | None = (27, 20)) -> RunStarted:
    """The picture begins at position 2."""
    return RunStarted("sjd", {"name": "digits", "picture": frame}, "3", prompt_ids, {}, 1)


def pixel(pos: int, level: int, origin: str = "sampled", p: float | None = 0.5) -> Token:
    return token(pos, "0123456789abcdefg"[level], p, id=level, origin=origin)


def step(pos: int, accepted: int, extra: int | None) -> DraftTree:
    """A chain of 3 drafts, of which so many were accepted."""
    return DraftTree(
        pos, (1, 2, 3), ("1", "2", "3"), (-1, 0, 1), (None,) * 3, (-1.0,) * 3,
        tuple(range(accepted)), extra, "",
    )  # fmt: skip


def run() -> list[Event]:
    """A plain pixel, three of a step with a correction, two of a step with a bonus, one to come."""
    return [
        started(),
        pixel(2, 0),
        step(3, 2, 4),
        pixel(3, 16, "drafted"),
        pixel(4, 2, "drafted", 0.01),
        pixel(5, 4, "corrected"),
        step(6, 2, 1),
        pixel(6, 8, "drafted"),
        pixel(7, 2, "drafted"),
        pixel(8, 1, "bonus", 0.9),
    ]


def grids(markup: str) -> list[list[dict[str, str | None]]]:
    """The attributes of the cells of each grid."""
    return [
        [attributes for tag, attributes in Seen(svg).tags if tag == "rect"]
        for svg in re.findall(r"<svg.*?</svg>", markup)
    ]


def lines(markup: str) -> set[str]:
    (path,) = re.findall(r'<path d="(.*?)"', markup)
    return set(re.findall(r"M[^M]+", path))


def test_only_models_that_write_pictures_fit():
    assert picture.fits([started()]) and picture.render([started()]) == ""
    assert not picture.fits([]) and picture.render([]) == ""
    assert picture.render([pixel(2, 3)]) == ""
    plain = RunStarted("sampling", {"name": "smollm2-135m"}, "3", (1,), {}, 1)
    assert not picture.fits([plain, pixel(2, 3)])
    assert picture in inside.fitting(run()) and picture.TITLE in inside.render(run())


@pytest.mark.parametrize(
    "frame",
    [
        None, 8, "8x8", [8, 8, 17], {}, FRAME | {"width": 0}, FRAME | {"height": -8},
        FRAME | {"levels": 1}, FRAME | {"width": 10**9}, FRAME | {"width": "8"},
        FRAME | {"height": 8.0}, FRAME | {"levels": True}, FRAME | {"levels": None},
    ],
)  # fmt: skip
def test_what_makes_no_sense_as_a_picture_is_none(frame):
    assert (
        not picture.fits([started(frame)]) and picture.render([started(frame), pixel(2, 1)]) == ""
    )


def test_every_pixel_stands_in_its_place():
    markup = picture.render(run())
    check(markup, TAGS, NAMES)
    found = grids(markup)
    assert len(found) == 3
    for cells in found:
        assert [cell.get("data-go") for cell in cells] == [*map(str, range(2, 9)), None]
        assert [(cell["x"], cell["y"]) for cell in cells] == [
            (str(x), str(y)) for y in range(2) for x in range(4)
        ]
        assert cells[-1]["class"] == "empty"
    drawn, writers, sure = found
    assert [cell.get("style") for cell in drawn] == [
        *(f"--shade:{percent}%" for percent in (0, 100, 12, 25, 50, 12, 6)),
        None,
    ]
    assert [cell["class"].split()[0] for cell in writers[:-1]] == [
        "w-sampled", "w-drafted", "w-drafted", "w-corrected", "w-drafted", "w-drafted", "w-bonus",
    ]  # fmt: skip
    assert [cell["class"] for cell in sure[:-1]] == ["p2", "p2", "p5", "p2", "p2", "p2", "p0"]
    text = Seen(markup).text
    assert "7 of 8 pixels, written" in text and "7 pixels in 3 steps, 2.3 a step" in text
    mean = sum(map(math.log, (0.5, 0.5, 0.01, 0.5, 0.5, 0.5, 0.9))) / 7
    assert f"mean log-probability −{-mean:.2f} nats" in text
    assert "row 1, column 3, shade 2 of 16, probability 1.0 %, drafted in step 2" in text
    assert "row 2, column 3, shade 1 of 16, probability 90 %, bonus in step 3" in text


def test_bursts_have_lines_around_them_and_tints_in_turn():
    markup = picture.render(run())
    writers = grids(markup)[1]
    # Row 1: step 1, then step 2 three times; row 2: step 3 three times, then nothing.
    assert ["odd" in cell["class"] for cell in writers[:-1]] == [True, *[False] * 3, *[True] * 3]
    upright = {"M0 0v1", "M1 0v1", "M4 0v1", "M0 1v1", "M3 1v1"}
    flat = {f"M{x} {y}h1" for x in range(4) for y in range(2)} | {f"M{x} 2h1" for x in range(3)}
    assert lines(markup) == upright | flat


def test_a_step_that_spans_two_rows_is_one():
    events = [started(), pixel(2, 1), pixel(3, 1), step(4, 3, 9)]
    events += [pixel(pos, 1, "drafted") for pos in (4, 5, 6)] + [pixel(7, 9, "corrected")]
    markup = picture.render(events)
    found = lines(markup)
    assert "M3 0v1" not in found and "M1 1v1" not in found  # within the step
    assert "M2 0v1" in found and "M2 1v1" in found  # where it begins and ends
    assert "6 pixels in 3 steps, 2.0 a step" in Seen(markup).text


def test_without_drafts_every_pixel_is_a_step():
    events = [started(), *(pixel(2 + i, i) for i in range(8)), token(10, "<end>", id=28)]
    seen = check(picture.render(events), TAGS, NAMES)
    assert "8 pixels in 8 steps, 1.0 a step" in seen.text and "8 pixels, written" in seen.text
    assert "drafted" not in seen.text and " of 8" not in seen.text


def test_pixels_of_the_prompt_are_given_and_cannot_be_chosen():
    events = [started(prompt_ids=(27, 20, 3, 5)), pixel(4, 7)]
    markup = picture.render(events)
    for cells in grids(markup):
        assert [cell.get("data-go") for cell in cells[:3]] == [None, None, "4"]
    assert [cell["class"] for cell in grids(markup)[1][:2]] == ["w-given"] * 2
    assert "row 1, column 2, shade 5 of 16, given" in Seen(markup).text
    assert "1 pixel in 1 step" in Seen(markup).text
    unknown = [started(prompt_ids=None), pixel(4, 7)]
    assert [cell.get("data-go") for cell in grids(picture.render(unknown))[0]][:2] == ["4", None]


def test_what_is_no_pixel_takes_no_place():
    """A digit that the model wrote itself, an end, and more pixels than there is room for."""
    events = [started(), token(2, "<3>", id=20), *(pixel(3 + i, i % 17) for i in range(20))]
    for cells in grids(picture.render(events)):
        assert [cell.get("data-go") for cell in cells] == [str(pos) for pos in range(3, 11)]


def test_undone_pixels_and_other_lanes_are_not_drawn():
    events = [*run(), Rewind(6, "again"), pixel(6, 3)]
    events += [replace(pixel(7, 9), lane="other"), Note("info", "x")]
    drawn, writers, _ = grids(picture.render(events))
    assert [cell.get("data-go") for cell in drawn] == ["2", "3", "4", "5", "6", None, None, None]
    assert drawn[4]["style"] == "--shade:19%"
    assert writers[4]["class"] == "w-sampled odd"


def test_an_undone_step_does_not_hold_later_pixels_together():
    events = [*run(), Rewind(6, "again"), pixel(6, 3), pixel(7, 3)]
    assert "M3 1v1" not in lines(picture.render(events))
    assert {"M1 1v1", "M2 1v1"} <= lines(picture.render(events))
    again = [*run(), Rewind(6, "again"), step(6, 1, 2), pixel(6, 1, "drafted")]
    again += [pixel(7, 2, "corrected")]
    writers = grids(picture.render(again))[1]
    assert [cell["class"] for cell in writers[4:6]] == ["w-drafted odd", "w-corrected odd"]
    assert "M1 1v1" not in lines(picture.render(again))


def test_tokens_without_numbers_are_drawn_too():
    markup = picture.render([started(), pixel(2, 5, "forced", None)])
    check(markup, TAGS, NAMES)
    assert "mean" not in Seen(markup).text
    assert grids(markup)[2][0]["class"] == "px" and grids(markup)[1][0]["class"] == "w-given odd"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_folder_says_of_itself_is_text(hostile: str):
    seen = check(picture.render([started(FRAME | {"about": hostile}), pixel(2, 1)]), TAGS, NAMES)
    assert seen.text.endswith(shown(hostile))


def test_every_moment_of_a_run_is_safe():
    events: Sequence[Event] = run()
    for length in range(len(events) + 1):
        check(picture.render(events[:length]), TAGS, NAMES)


def test_the_style_is_its_own_and_has_no_lists_in_is():
    sheet = (assets._HERE / "picture.css").read_text()
    assert sheet in assets.css()
    assert not re.search(r":(is|where)\([^)]*,", sheet)
    bare = re.sub(r"/\*.*?\*/", "", sheet, flags=re.S)
    for selectors in re.findall(r"([^{}]+)\{", bare):
        assert all(part.strip().startswith(".x-picture") for part in selectors.split(","))


def test_a_picture_grows_while_it_is_drawn():
    """It is drawn again with every update; the other views wait for the end of the run."""
    begun = run()[:4]
    assert inside.growing(begun).count("<svg") == 3
    assert inside.growing(run()) != inside.growing(begun)
    assert inside.growing(begun[1:]) == ""
