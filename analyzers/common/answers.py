r"""What an answer comes down to, so that answers in other words can be counted together.

Idea:   the last "\boxed{...}" of a text; without one, what follows the last "The answer is" or
        "Answer:" on its line; without that, its last number; without that, a short text is its own
        answer. Numbers are compared as numbers, everything else without case, punctuation and
        articles. The rules are ours and know English marks only.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LONGEST = 60
"""Characters of an answer that has no mark and no number."""
_BOXED = re.compile(r"\\boxed\s*\{")
_MARKED = re.compile(r"\banswer\s*(?:is|:|=)[\s:*]*([^\n]*)", re.IGNORECASE)
# "St. Louis" goes on behind its full stop.
_SENTENCE = re.compile(r"(?:(?<=[^\W\d_]{3})|(?<=\d)|(?<=\W))[.!?](?=\s|$)")
# A sign belongs to a number unless something stands right before it, as in 10-5.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*%?")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+")


@dataclass(frozen=True)
class Vote:
    """counts: of each answer, most frequent first. leaders: those with the most votes, in the order
    in which they first came. share: of one of them among all who voted, silent ones included."""

    counts: dict[str, int]
    leaders: tuple[str, ...]
    share: float


def final_answer(text: str) -> str | None:
    """In its plainest form; None where the text gives none."""
    if (boxed := _last_boxed(text)) is not None:
        return plain(boxed)
    for marked in reversed(_MARKED.findall(text)):
        if found := plain(_SENTENCE.split(marked, maxsplit=1)[0]):
            return found
    if numbers := _NUMBER.findall(text):
        return plain(numbers[-1])
    return plain(text) if len(text.strip()) <= LONGEST else None


def plain(answer: str) -> str | None:
    """1,234.50 is 1234.5, 6/4 is 1.5, "42 apples" is 42, "the Louvre." is "louvre"; None where
    nothing is left. Of several numbers none is the answer: then it is the words."""
    if len(numbers := _NUMBER.findall(answer)) == 1:
        return _number(numbers[0])
    words = re.sub(r"[^\w\s./%+-]", " ", answer.casefold())
    return _ARTICLE.sub("", " ".join(words.split())).strip(" .-") or None


def vote(answers: Sequence[str | None]) -> Vote:
    """None does not vote, and counts for nobody."""
    counts = dict(Counter(answer for answer in answers if answer is not None).most_common())
    most = max(counts.values(), default=0)
    leaders = tuple(answer for answer, count in counts.items() if count == most)
    return Vote(counts, leaders, most / len(answers) if answers else 0.0)


def _number(text: str) -> str:
    """As a decimal where it is one, else as a fraction in its lowest terms."""
    bare = re.sub(r"[,\s]", "", text).replace("−", "-")
    try:
        value = Fraction(bare.removesuffix("%"))
    except (ValueError, ZeroDivisionError):  # thousands of digits, or divided by zero
        return bare
    decimal = Decimal(value.numerator) / value.denominator
    shown = f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)
    return shown + "%" * bare.endswith("%")


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last \\boxed, which may hold braces; up to the end
    where they are never closed."""
    begins = [match.end() for match in _BOXED.finditer(text)]
    if not begins:
        return None
    depth = 1
    for place in range(begins[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begins[-1] : place]
    return text[begins[-1] :]
