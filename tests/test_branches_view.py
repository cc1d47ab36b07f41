"""What the contrast changed: counted right, tinted in order, and safe."""

import math
import re

import pytest
import torch

from analyzers.context import Context
from analyzers.contrast import dola
from analyzers.task import Task
from analyzers.trace import Event, Lens, Rewind, Scores, Token
from tests import tiny
from visualizations import branches
from visualizations.text import percent

HOSTILE = '"><img src=x onerror=alert(1)><b>${x}'


def token(pos: int, text: str = " a", id: int = 1) -> Token:
    return Token(pos, id, text, text.encode().hex(), -0.5, 1.0, 1, 0.5, 1.0, ())


def table(pos: int, first: int = 1, last: int = 1, text: str = " a") -> Lens:
    """Two branches and their contrast; the written token has id 1."""

    def top(id: int) -> tuple[tuple[int, str, float], ...]:
        other = 1 if id != 1 else 2
        return ((id, text if id == 1 else " other", -0.2), (other, " more", -2.0))

    rows = ("strong", "weak", "contrast")
    return Lens(pos, rows, (top(first), top(2), top(last)), (-0.2, -2.0, -0.1), name="branches")


def scores(pos: int, value: float, name: str = "KL(strong‖weak)") -> Scores:
    return Scores(pos, name, "nats", (pos,), (value,))


def run(values: list[float], flipped: tuple[int, ...] = ()) -> list[Event]:
    found: list[Event] = []
    for pos, value in enumerate(values, start=10):
        first = 2 if pos in flipped else 1
        found += [token(pos, f" w{pos}"), table(pos, first), scores(pos, value)]
    return found


def classes(markup: str) -> dict[int, set[str]]:
    """Of each token, by position."""
    spans = re.findall(r'<span class="([^"]*)" data-go="(\d+)"', markup)
    return {int(pos): set(names.split()) for names, pos in spans}


def test_it_fits_what_has_branches():
    assert branches.fits([token(1), table(1)])
    assert not branches.fits([]) and not branches.fits([token(1), scores(1, 0.5)])
    layers = Lens(1, ("1",), (((1, " a", -0.5),),), (0.1,))
    assert not branches.fits([layers])
    assert branches.render([]) == branches.render([token(1), layers]) == ""
    assert branches.detail([], 1, None) == branches.detail(run([0.1]), 99, None) == ""


def test_flips_are_counted_and_underlined():
    markup = branches.render(run([0.1] * 5, flipped=(11, 13)))
    assert "<b>2 of 5 tokens</b> changed" in markup and "strong alone prefers another" in markup
    assert "penalty" not in markup
    flipped = [pos for pos, names in classes(markup).items() if "flip" in names]
    assert flipped == [11, 13]
    assert re.findall(r'<li data-go="(\d+)"', markup) == ["11", "13"]
    assert "strong would write “ other”" in markup
    none = branches.render(run([0.1] * 5))
    assert "0 of 5 tokens" in none and "flip" not in none


def test_choices_of_the_penalty_are_told_apart():
    events = [token(1), table(1, first=2, last=2), token(2), table(2, first=2, last=1)]
    assert "2 of 2 tokens</b> changed" in branches.render(events)
    assert "1 of them by the repetition penalty or the draw" in branches.render(events)


def test_many_flips_are_cut():
    markup = branches.render(run([0.1] * 30, flipped=tuple(range(10, 40))))
    assert len(re.findall("<li data-go", markup)) == 16 and "and 14 more" in markup


def test_levels_are_fifths_in_order():
    values = [value / 10 for value in range(10)]
    found = classes(branches.render(run(values)))
    levels = [int(next(name[1:] for name in found[pos] if name[0] == "v")) for pos in range(10, 20)]
    assert levels == sorted(levels) and [levels.count(level) for level in range(1, 6)] == [2] * 5
    assert "≤ 0.180" in branches.render(run(values)) and "&gt; 0.720" in branches.render(
        run(values)
    )


def test_signed_numbers_diverge():
    markup = branches.render(run([-2.0, -0.9, 0.1, 0.9, 2.0, -0.1]))
    found = classes(markup)
    assert [found[pos] - {"x-t"} for pos in range(10, 16)] == [
        {"n5"}, {"n3"}, set(), {"v3"}, {"v5"}, set(),
    ]  # fmt: skip
    assert "about 0" in markup and "&lt; −1.60" in markup and "&gt; 1.60" in markup


def test_one_value_and_none_are_drawn():
    assert branches.render(run([0.3])) and branches.render([token(1), table(1)])
    assert "x-branches-legend" not in branches.render([token(1), table(1)])
    assert branches.render(run([0.0, 0.0, 0.0]))


def test_only_the_first_number_is_the_tint():
    events = [*run([0.1, 0.2]), scores(10, 5.0, "another")]
    markup = branches.render(events)
    assert "KL(strong‖weak)" in markup and "another" not in markup.replace("prefers another", "")


def test_what_was_undone_is_not_shown():
    events = [
        *run([0.1, 0.2, 0.3]),
        Rewind(11, "again"),
        token(11, " new"),
        table(11),
        scores(11, 9),
    ]
    markup = branches.render(events)
    assert set(classes(markup)) == {10, 11} and "new" in markup and "w12" not in markup
    assert "9.00" in branches.detail(events, 11, None)


def test_other_lanes_are_left_alone():
    aside = [Token(10, 5, " aside", "20", -1.0, 1.0, 1, 0.1, 1.0, (), lane="neutral")]
    aside += [Scores(10, "first", "nats", (10,), (7.0,), lane="neutral")]
    assert branches.render([*aside, *run([0.1])]) == branches.render(run([0.1]))


def test_the_panel_shows_every_branch():
    markup = branches.detail(run([0.25], flipped=(10,)), 10, None)
    heads = re.findall(r"<h4>(.*?)</h4>", markup)
    assert heads == ["strong", "contrast", "weak"]
    assert markup.count("<ol>") == 3 and markup.count('class="me"') == 3
    assert f"written: {percent(math.exp(-0.2))}<br>rank 2" in markup
    assert "KL(strong‖weak): 0.250 nats" in markup
    absent = Lens(10, ("a",), (((7, " x", -0.1),),), (-3.0,), name="branches")
    assert "rank &gt; 1" in branches.detail([token(10), absent], 10, 0)


def test_nothing_that_was_written_is_run():
    name = Scores(10, HOSTILE, HOSTILE, (10,), (0.5,))
    lens = Lens(
        10, (HOSTILE, "b"), (((3, HOSTILE, -0.1),), ((4, "", -9.0),)), (-1.0, -2.0), name="branches"
    )
    events = [token(10, HOSTILE), lens, name]
    for markup in (branches.render(events), branches.detail(events, 10, None)):
        assert "onerror" in markup
        assert "<img" not in markup and "${x}" not in markup and "<b>$" not in markup
        assert not re.search(r'<[^>]*"[^"]*>\s*<img', markup)


def test_special_tokens_and_byte_pieces_are_drawn():
    end = Token(11, 0, "<|end|>", "", -0.1, 0.1, 1, 0.9, 1.0, ())
    markup = branches.render([token(10, ""), table(10), end, table(11)])
    assert "&lt;|end|&gt;" in markup and "x-special" in classes(markup)[11]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_real_run(alpha):
    engine = tiny.engine()
    engine._ends = frozenset()
    params = dola.Params(alpha=alpha, repetition_penalty=1.0, max_new=8)
    with torch.inference_mode():
        events = list(dola.run(engine, Task("A fox and a dog."), params, Context(1)))
    tokens = [event for event in events if isinstance(event, Token)]
    markup = branches.render(events)
    changed = sum(token.rank > 1 for token in tokens)
    assert f"<b>{changed} of 8 tokens</b>" in markup and (changed == 0) == (alpha == 1.0)
    assert list(classes(markup)) == [token.pos for token in tokens]
    assert markup.count("<span") == markup.count("</span>")
    assert "premature" in branches.detail(events, tokens[3].pos, None)
