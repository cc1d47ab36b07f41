"""Whether an answer is right, in five ways that can be named beside a result.

exact        equal, but for space around it.
normalised   equal without case, accents, punctuation and a leading article.
numeric      the same number: 1,234 = 1234 = 1.234e3, "twenty-one" = 21, within a tolerance.
containment  names an accepted answer on word borders, and none of the listed wrong ones.
choice       picks an accepted option: by its letter, or by its words.

Source: normalisation after SQuAD's script (Rajpurkar et al. 2016, arXiv:1606.05250).
Differs from the source: accents go too; punctuation becomes a space so that Porto-Novo is Porto
        Novo, apostrophes and full stops vanish; only a leading article goes, because "vitamin A"
        ends with one; signs, decimal points and % stay because they change what is said.
Not covered: negation ("it is not Paris" names Paris), and a comma as the decimal point.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import get_args

from analyzers.errors import BadInput
from analyzers.evaluation.questions import LETTERS, How, Question

_ACCENTS = re.compile(r"[\u0300-\u036f]")  # only these: other scripts' marks change the word
_VANISH = re.compile(r"['’‘ʻʼ`]|\.(?!\d)|(?<=[^\W\d])\.")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MARK = re.compile(r"(?!(?<!\S)-[\d.])[^\w\s.%#]|_")  # all but signs, decimal points, % and #
_ARTICLE = re.compile(r"^(?:the|an|a) (?=.)")
_LETTER = re.compile(r"^\(([A-Za-z])\)|^([A-Za-z])(?:[).:]|$)|\banswer(?: is|:) *\(?([A-Z])\b")
_NUMBER = re.compile(
    r"(?<![\w.])(-?)(\d{1,300}(?:\.\d{1,300})?|\.\d{1,300})"
    r"(?:e([+-]?\d{1,3})| ?/ ?(\d{1,300})|[- ](hundred|thousand|million|billion)\b)?"
)
_TIMES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}  # powers of ten
_RESULT = re.compile(r"=|\b(?:is|equals|are)\b")
# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    word: 20 + 10 * place for place, word in enumerate(_TENS)
}
_NUMBER_WORD = re.compile(
    rf"\b(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(_SMALL[1:10])}))?|({'|'.join(_SMALL)}))\b"
)


@dataclass(frozen=True)
class Scored:
    """how: the way that was taken. why: one short clause for the page, such as "is 'paris'"."""

    right: bool
    how: How
    why: str


def score(
    answer: str, question: Question, how: How | None = None, tolerance: float = 0.0
) -> Scored:
    """Whether `answer` is right, in the question's own way unless `how` names another.

    Only the first line that has text counts, except in containment, which reads on up to a further
    "Question:". tolerance: of a number, relative to the accepted one; 0 = the very same number.
    Raises: BadInput for a way that does not exist, a tolerance outside 0 to 1, or a way that the
    question does not allow: numeric without a number among the accepted answers, choice without
    options.
    """
    way = how or question.how
    line = first_line(answer)
    match way:
        case "exact":
            right = line in (accepted.strip() for accepted in question.accepted)
            return Scored(right, way, _said(line))
        case "normalised":
            found = normalise(line)
            right = bool(found) and found in map(normalise, question.accepted)
            return Scored(right, way, _said(found))
        case "numeric":
            return Scored(*_numeric(line, question, tolerance))
        case "containment":
            return Scored(*_containment(answer.split("\nQuestion:")[0], question))
        case "choice":
            return Scored(*_choice(line, question))
    raise BadInput(f"There is no scoring {way!r}: choose one of {', '.join(get_args(How))}.")


def first_line(answer: str) -> str:
    """The first line that has text; "" where none has."""
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")


def normalise(text: str) -> str:
    """In plain lower case: "The Café, (St. John's)." is "cafe st johns", "-1,234.5" "-1234.5"."""
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    plain = unicodedata.normalize("NFKC", bare).replace("−", "-").casefold()
    plain = _THOUSANDS.sub("", plain)
    words = _MARK.sub(_space, _VANISH.sub("", plain)).split()
    return _ARTICLE.sub("", " ".join(words))


def numbers(text: str) -> list[Fraction]:
    """Every number in it, exactly; in words up to ninety-nine, and those times hundred to billion.
    "%" and units do not count: "50 %" is 50. 1/2 is one number, and 1/0 none."""
    plain = unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/").casefold()
    plain = re.sub(r"(?<![a-z])(?:minus|negative) (?=\w)", "-", plain)
    plain = _THOUSANDS.sub("", _NUMBER_WORD.sub(_digits, plain))
    found = []
    for sign, digits, exponent, below, times in _NUMBER.findall(plain):
        if below and not int(below):
            continue
        power = int(exponent or _TIMES.get(times, 0))
        value = Fraction(digits) * Fraction(10) ** power / int(below or 1)
        found.append(-value if sign else value)
    return found


def _numeric(line: str, question: Question, tolerance: float) -> tuple[bool, How, str]:
    """The number behind the last "=" or "is" that has one behind it, else the only one."""
    if not 0 <= tolerance < 1:
        raise BadInput(f"A tolerance of {tolerance} makes no sense: give 0 or more, below 1.")
    accepted = [number for text in question.accepted for number in numbers(text)[:1]]
    if not accepted:
        raise BadInput(f"Question {question.id!r} has no number to compare with.")
    results = [found for part in _RESULT.split(line)[1:] if (found := numbers(part))]
    found = results[-1] if results else numbers(line)
    if len(set(found)) != 1:
        return False, "numeric", "gives several numbers" if found else "gives no number"
    right = any(abs(found[0] - value) <= Fraction(tolerance) * abs(value) for value in accepted)
    return right, "numeric", f"gives {_shown(found[0])}"


def _containment(answer: str, question: Question) -> tuple[bool, How, str]:
    accepted, wrong = _mentions(answer, question)
    if wrong:
        return False, "containment", f"names the wrong {wrong[0]!r}"
    return bool(accepted), "containment", f"names {accepted[0]!r}" if accepted else "names none"


def _choice(line: str, question: Question) -> tuple[bool, How, str]:
    """A letter counts only where the prompt shows letters. Words count at the beginning of the
    line, or anywhere if they name one side only."""
    if not question.options:
        raise BadInput(f"Question {question.id!r} has no options to choose from.")
    marker = _LETTER.search(line) if "(A) " in question.prompt else None
    if marker:
        letter = next(filter(None, marker.groups())).upper()
        place = LETTERS.index(letter)
        if place < len(question.options):
            right = question.options[place] in question.accepted
            return right, "choice", f"picks ({letter})"
    accepted, wrong = _mentions(line, question)
    begins = normalise(line)
    for right, named in ((True, accepted), (False, wrong)):
        if named and (_begins(begins, named[0]) or not (accepted and wrong)):
            return right, "choice", f"picks {named[0]!r}"
    return False, "choice", "picks several" if accepted else "picks none"


def _mentions(text: str, question: Question) -> tuple[list[str], list[str]]:
    """The (accepted, wrong) answers that the text names, normalised, in its order. The longest wins
    where one is part of another: "Equatorial Guinea" does not name "Guinea"."""
    accepted = [normalise(answer) for answer in question.accepted]
    wrong = [normalise(answer) for answer in question.wrong]
    phrases = sorted(filter(None, {*accepted, *wrong}), key=lambda phrase: (-len(phrase), phrase))
    if not phrases:
        return [], []
    any_of = "|".join(map(re.escape, phrases))
    found: Sequence[str] = re.findall(rf"(?<!\S)(?:{any_of})(?!\S)", normalise(text))
    return [name for name in found if name in accepted], [
        name for name in found if name not in accepted
    ]


def _begins(text: str, phrase: str) -> bool:
    """With the phrase, and not with "phrase or ..."."""
    return f"{text} ".startswith(f"{phrase} ") and not text.startswith(f"{phrase} or ")


def _space(match: re.Match[str]) -> str:
    """For punctuation; symbols and the vowel signs of other scripts stay."""
    mark = match.group()
    return " " if unicodedata.category(mark).startswith("P") else mark


def _digits(match: re.Match[str]) -> str:
    return str(sum(_WORDS[word] for word in match.groups() if word))


def _shown(value: Fraction) -> str:
    if value.denominator == 1 and abs(value) < 10**15:
        return f"{value.numerator:,}"
    return f"{Decimal(value.numerator) / value.denominator:.6g}"  # floats end at 1e308


def _said(text: str) -> str:
    return f"is {text!r}" if text else "is empty"
