"""Programs that judge texts: worked values, and what people type that makes no sense."""

import time

import pytest

from analyzers.common.rewards import Planted, reward
from analyzers.errors import BadParameter


@pytest.mark.parametrize(
    ("kind", "spec", "text", "share"),
    [
        ("keywords", "car", "A scary movie about cars", 0),
        ("keywords", "car", "My CAR.", 1),
        ("keywords", "sun, moon ,sun, red  star,", "The red\nstar and the sun", 2 / 3),
        ("keywords", "C++, (x", "C++ and (x", 1),
        ("keywords", "sun", "", 0),
        ("length", "2-4 words", "one two three four", 1),
        ("length", "2-4", "don't well-known", 1),
        ("length", "2-4 words", "one", 0.5),
        ("length", "2-4 words", "", 0),
        ("length", "0-4 words", "", 1),
        ("length", "2 - 4 words", "a a a a a", 0.75),
        ("length", "2-4 words", "a " * 20, 0),
        ("length", "10 characters", " 1234567890 ", 1),
        ("length", "10 characters", "12345", 0.5),
        ("pattern", r"\d{4}", "in 1984", 1),
        ("pattern", r"^\d{4}$", "in 1984", 0),
        ("json", "", 'Here: {"a": [1, 2.5, null]} and {', 1),
        ("json", "", '{"a": [1, 2], oops}', 0),
        ("json", "", '{"a": 1', 0),
        ("json", "", "[NaN]", 0),
        ("json", "", "[" + "9" * 5000 + "]", 1),
        ("json", "", "no braces", 0),
        ("json", "", " true ", 1),
        ("json", "", "[" * 100_000, 0),
    ],
)
def test_rewards_are_what_they_say(kind, spec, text, share):
    made = reward(kind, spec)
    assert made(text) == pytest.approx(share)
    assert Planted(made)([text, text])[1].score == pytest.approx(2 * share - 1)


def test_parts_say_where_the_value_comes_from():
    assert reward("keywords", "sun, moon").parts("Sun!") == {"sun": True, "moon": False}
    assert reward("length", "2-4 words").parts("one") == {"words": 1}
    assert reward("pattern", "a+").parts("baab") == {"matches": True}
    assert reward("json", "").parts("{}") == {"valid": True}


def test_names_say_what_was_asked_for():
    names = [reward(*asked).name for asked in (("keywords", "sun,moon"), ("length", "20 – 40"))]
    assert names == ["keywords: sun, moon", "length: 20-40 words"]


@pytest.mark.parametrize(
    ("kind", "spec", "says"),
    [
        ("keywords", " , ", "Name the words"),
        ("length", "", "must be a range"),
        ("length", "40-20 words", "must be a range"),
        ("length", "0 words", "must be a range"),
        ("length", "20 lines", "'20 lines'"),
        ("pattern", " ", "Give a regular expression"),
        ("pattern", "(", "is no regular expression: missing"),
        ("pattern", "((a{1000}){1000}){1000}", "multiply to too many"),
        ("pattern", "((a{1000,}){1000,}){0,1000}", "multiply to too many"),
        ("pattern", "a{" + "9" * 5000 + "}", "multiply to too many"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(kind, spec, says):
    with pytest.raises(BadParameter, match=says):
        reward(kind, spec)


def test_a_pattern_that_hangs_ends_with_a_sentence():
    hanging = reward("pattern", "(a|aa)+$")
    began = time.monotonic()
    with pytest.raises(BadParameter, match=r"takes more than 0\.5 s"):
        hanging("a" * 60 + "b")
    assert time.monotonic() - began < 20
