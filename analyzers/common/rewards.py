"""Programs that say how good a text is: exact, and known to whoever looks at a search.

A search that is given one of them shows what it can do when its judge is right.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, assert_never

import regex

from analyzers.common.judges import Scale, Verdict
from analyzers.errors import BadParameter

Kind = Literal["keywords", "length", "pattern", "json"]
Parts = Mapping[str, bool | int]
SECONDS = 0.5
"""For one text; an ordinary pattern takes a thousandth of that."""
REPEATS = 100_000
"""All counts of a pattern multiplied: nested ones beyond that take minutes to compile."""
_BRACES = re.compile(r"\{[^{}]*\}")
_UNITS: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(re.findall(r"\w+(?:['’-]\w+)*", text)),
    "characters": lambda text: len(text.strip()),
}


@dataclass(frozen=True)
class Reward:
    """name: as people read it. look: what a text is worth, 0..1 (higher = better), and the parts
    that this comes from, for display."""

    name: str
    look: Callable[[str], tuple[float, Parts]]

    def __call__(self, text: str) -> float:
        """0..1, higher = better. Raises: BadParameter for a pattern that takes too long."""
        return self.look(text)[0]

    def parts(self, text: str) -> Parts:
        """Which words are there, how many there are, ... Raises: as calling it."""
        return self.look(text)[1]


def reward(kind: Kind, spec: str) -> Reward:
    """From what people type. Raises: BadParameter with what would be accepted."""
    match kind:
        case "keywords":
            return keywords(spec)
        case "length":
            return length(spec)
        case "pattern":
            return pattern(spec)
        case "json":
            return json_valid()
        case _:
            assert_never(kind)


def keywords(spec: str) -> Reward:
    """The share of the words, separated by commas, that the text has. Whole words, in any case:
    "car" is not in "scary", nor in "cars". Not for scripts that write no spaces.

    Raises: BadParameter when there are none."""
    words = list(dict.fromkeys(" ".join(word.split()) for word in spec.split(",") if word.strip()))
    if not words:
        raise BadParameter("Name the words that the text should have, separated by commas.")
    found = {word: _whole_word(word) for word in words}

    def look(text: str) -> tuple[float, Parts]:
        parts = {word: bool(its.search(text)) for word, its in found.items()}
        return sum(parts.values()) / len(parts), parts

    return Reward(f"keywords: {', '.join(words)}", look)


def length(spec: str) -> Reward:
    """1 within a range such as "20-40 words" or "100 characters"; below it falls to 0 for an empty
    text, above it to 0 at twice the upper end.

    Raises: BadParameter for anything else."""
    asked = re.fullmatch(r"\s*(\d{1,6})(?:\s*[-–]\s*(\d{1,6}))?\s*(words|characters)?\s*", spec)
    lowest, highest = (int(asked[1]), int(asked[2] or asked[1])) if asked else (0, 0)
    if not asked or not 0 <= lowest <= highest or highest == 0:
        raise BadParameter(
            f'The length must be a range such as "20-40 words" or "100 characters", not {spec!r}.'
        )
    unit = asked[3] or "words"

    def look(text: str) -> tuple[float, Parts]:
        count = _UNITS[unit](text)
        below = count / lowest if lowest else 1.0
        above = 2 - count / highest
        return max(0.0, min(1.0, below, above)), {unit: count}

    shown = f"{lowest}" if lowest == highest else f"{lowest}-{highest}"
    return Reward(f"length: {shown} {unit}", look)


def pattern(spec: str) -> Reward:
    """1 when the regular expression (of the library regex) matches somewhere, else 0.

    Raises: BadParameter for one that is empty, wrong or too large; from the reward itself for one
    that takes longer than half a second on a text."""
    if not spec.strip():
        raise BadParameter("Give a regular expression that the text should match.")
    counts = (
        max(map(int, re.findall(r"\d{1,9}", its)), default=1) for its in _BRACES.findall(spec)
    )
    if math.prod(max(count, 1) for count in counts) > REPEATS:
        raise BadParameter(f"The repetitions of the pattern {spec!r} multiply to too many.")
    try:
        compiled = regex.compile(spec)
    except (regex.error, RecursionError, OverflowError) as error:
        raise BadParameter(f"The pattern {spec!r} is no regular expression: {error}.") from error

    def look(text: str) -> tuple[float, Parts]:
        try:
            found = compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            raise BadParameter(
                f"The pattern {spec!r} takes more than {SECONDS} s on one text: make it simpler."
            ) from None
        return float(found), {"matches": found}

    return Reward(f"pattern: {spec}", look)


def json_valid() -> Reward:
    """1 when the JSON that begins at the first { or [ is complete and valid, whatever follows it;
    a text without them must be one JSON value."""

    def look(text: str) -> tuple[float, Parts]:
        opening = re.search(r"[{[]", text)
        try:
            if opening:
                _JSON.raw_decode(text, opening.start())
            else:
                _JSON.decode(text)
            valid = True
        except (ValueError, RecursionError):
            valid = False
        return float(valid), {"valid": valid}

    return Reward("valid JSON", look)


class Planted:
    """A reward as a judge whose taste is known: what a search makes of a judge that is right."""

    scale: Scale = (-1.0, 1.0, "better", False)

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name = reward.name

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Raises: as the reward."""
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        share, parts = self.reward.look(text)
        return Verdict(2 * share - 1, detail=dict(parts))


def _whole_word(word: str) -> re.Pattern[str]:
    spelled = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<!\w){spelled}(?!\w)", re.IGNORECASE)


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# Python alone reads NaN and Infinity. Digits stay text: only whether they are there is asked.
_JSON: Any = json.JSONDecoder(parse_constant=_refused, parse_int=str)
