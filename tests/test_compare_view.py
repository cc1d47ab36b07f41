"""Answers side by side: differences are marked, costs are told, nothing written is run."""

import re

from analyzers.trace import Candidate, RunEnded, RunStarted, Token
from visualizations import compare, lanes
from visualizations.compare import Lane, differing

HOSTILE = '<img src=x onerror="alert(1)">'


def token(pos: int, text: str, p: float = -0.5, lane: str = "main") -> Token:
    return Token(pos, ord(text[0]), text, text.encode().hex(), p, 1.0, 1, 0.5, 1.0, (), lane=lane)


def answer(*words: str, lane: str = "main") -> list[Token]:
    return [token(pos, word, lane=lane) for pos, word in enumerate(words)]


def test_only_what_is_not_in_the_reference_differs():
    reference = answer("The", " capital", " is", " Nairobi", ".")
    assert differing(reference, reference) == frozenset()
    assert differing(answer("The", " city", " is", " Nairobi", "."), reference) == {1}
    assert differing(answer("So", "The", " capital", " is", " Nairobi"), reference) == {0}
    assert differing([], reference) == frozenset()
    assert differing(reference, []) == {0, 1, 2, 3, 4}


def test_differences_are_marked_and_the_first_answer_is_not():
    first, second = Lane("a", answer("x", " y")), Lane("b", answer("x", " z"))
    assert "x-compare-new" not in compare.text(first)
    assert compare.text(second, first).count("x-compare-new") == 1
    assert 'data-i="1"' in compare.text(second, first)
    assert "data-i" not in compare.columns([first, second])


def test_the_table_tells_signals_and_costs():
    ended = RunEnded("done", "end token", tokens=2, forwards=7, seconds=1.5)
    lanes_ = [Lane("greedy", [*answer("x", " y"), ended]), Lane("other", answer("x", " z"))]
    rows = re.findall(r"<tr>(.*?)</tr>", compare.table(lanes_))[1:]
    greedy, other = (re.findall(r"<td>(.*?)</td>", row) for row in rows)
    assert greedy[:4] == ["2", "–", "−0.50", "1.65"]
    assert greedy[6:] == ["7", "1.50 s", "end token"]
    assert other[1] == "50 %" and other[6:] == ["–", "–", "–"]


def test_lanes_of_one_run_stand_beside_its_answer():
    started = RunStarted("lqcd", {"name": "m"}, HOSTILE, (1,), {}, 3)
    prompts = [Candidate("neutral prompt", "prompts", HOSTILE)]
    events = [started, *prompts, *answer("a", " b"), *answer("a", " c", lane=HOSTILE)]
    assert lanes.fits(events) and not lanes.fits(answer("a"))
    drawn = lanes.render(events)
    assert "<img" not in drawn and drawn.count('class="x-compare-lane"') == 2
    assert drawn.index("&lt;img") < drawn.index("lqcd (the answer)")


def test_hostile_words_stay_words():
    drawn = compare.columns([Lane(HOSTILE, answer(HOSTILE)), Lane("b", answer(HOSTILE))])
    assert "<img" not in drawn + compare.table([Lane(HOSTILE, answer(HOSTILE))])
    assert compare.columns([]) == compare.table([]) == ""
