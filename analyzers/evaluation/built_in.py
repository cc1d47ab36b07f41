"""The question sets that come with the app, written for it.

capitals        capital cities of countries; left out are city states and those whose capital is
                disputed between states. Where there are several seats, each is accepted.
elements        symbol, atomic number and name of the first hundred chemical elements.
arithmetic      sums, differences and products of whole numbers, made by `_arithmetic`.
misconceptions  widespread false beliefs, as yes-or-no questions and either-or questions. As many
                "yes" as "no" are right, and as many first as second: always saying one is chance.

Each question has a difficulty, by a rule said at its function; the files are in `sets/`. The order
is mixed and always the same, so that every beginning of a set is a fair part of it.
"""

import csv
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from operator import add, mul, sub
from pathlib import Path

from analyzers.errors import BadInput
from analyzers.evaluation.questions import Question, QuestionSet

_FOLDER = Path(__file__).with_name("sets")
_EXAMPLES = {
    "capitals": (
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Japan?", "Tokyo"),
        ("What is the capital of Egypt?", "Cairo"),
        ("What is the capital of Peru?", "Lima"),
    ),
    "elements": (
        ("What is the chemical symbol of gold?", "Au"),
        ("What is the atomic number of carbon?", "6"),
        ("Which chemical element has the symbol Fe?", "iron"),
        ("What is the chemical symbol of hydrogen?", "H"),
    ),
    "arithmetic": (
        ("What is 5 plus 4?", "9"),
        ("What is 36 minus 15?", "21"),
        ("What is 6 times 3?", "18"),
        ("What is 214 plus 130?", "344"),
    ),
    "misconceptions": (
        ("Does bread go stale only because it dries out?", "No"),
        ("Which is the larger ocean, the Atlantic or the Pacific?", "the Pacific"),
        ("Can people who are colour-blind see some colours?", "Yes"),
        ("Which is faster over a short run, a cheetah or a horse?", "a cheetah"),
    ),
}
_OPERATIONS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    ("plus", add),
    ("minus", sub),
    ("times", mul),
)
_EACH = 16
"""Questions of each operation and number of digits: 4 x 3 x 16 are 192."""


def names() -> tuple[str, ...]:
    return tuple(_EXAMPLES)


@cache
def built_in(name: str) -> QuestionSet:
    """The set of that name. Raises: BadInput where there is none."""
    if name not in _MAKERS:
        raise BadInput(f"There is no built-in set {name!r}: choose one of {', '.join(names())}.")
    mixed = sorted(_MAKERS[name](), key=lambda question: sha256(question.id.encode()).digest())
    return QuestionSet(name, tuple(mixed), _EXAMPLES[name])


def _capitals() -> Iterator[Question]:
    """Difficulty by inhabitants (about 2023): 1 above 50 million, 2 above 20, 3 above 5, 4 above 1,
    5 below."""
    for row in _rows("capitals"):
        yield Question(
            id=f"capital of {row['country']}",
            prompt=f"What is the capital of {row['country']}?",
            accepted=tuple(row["capital"].split("|")),
            difficulty=5 - bisect_left((1, 5, 20, 50), float(row["millions"])),
            category="capital",
        )


def _elements() -> Iterator[Question]:
    """Difficulty: the element's period in the periodic table, 1 to 7."""
    for row in _rows("elements"):
        number, symbol = row["number"], row["symbol"]
        accepted = tuple(row["name"].split("|"))
        name = accepted[0]
        period = 1 + bisect_left((2, 10, 18, 36, 54, 86), int(number))
        yield Question(
            id=f"symbol of {name}",
            prompt=f"What is the chemical symbol of {name}?",
            accepted=(symbol,),
            difficulty=period,
            category="symbol",
        )
        yield Question(
            id=f"number of {name}",
            prompt=f"What is the atomic number of {name}?",
            accepted=(number,),
            difficulty=period,
            category="number",
            how="numeric",
        )
        yield Question(
            id=f"name of {symbol}",
            prompt=f"Which chemical element has the symbol {symbol}?",
            accepted=accepted,
            difficulty=period,
            category="name",
        )


def _arithmetic() -> Iterator[Question]:
    """Difficulty: steps on paper, which are the digits d of each number for plus and minus and
    d x d for times. No result is negative, no question comes twice, none is an example."""
    for operation, compute in _OPERATIONS:
        for digits in range(1, 5):
            # Seeded by its own name: more questions of one kind would not change the others.
            generator = random.Random(f"{operation} {digits}")
            low, high = max(2, 10 ** (digits - 1)), 10**digits
            taken = {prompt for prompt, _ in _EXAMPLES["arithmetic"]}
            made = 0
            while made < _EACH:
                a, b = (low + int(generator.random() * (high - low)) for _ in range(2))
                if operation == "minus":
                    a, b = max(a, b), min(a, b)
                prompt = f"What is {a} {operation} {b}?"
                if prompt in taken:
                    continue
                taken.add(prompt)
                made += 1
                yield Question(
                    id=f"{a} {operation} {b}",
                    prompt=prompt,
                    accepted=(str(compute(a, b)),),
                    difficulty=digits * digits if operation == "times" else digits,
                    category=operation,
                    how="numeric",
                )


def _misconceptions() -> Iterator[Question]:
    """Difficulty, by our own estimate: how often the mistake is heard corrected; 1 often,
    3 seldom."""
    for row in _rows("misconceptions"):
        prompt = row["question"]
        accepted, wrong = (tuple(row[column].split("|")) for column in ("answer", "other"))
        # In the order in which they are named; "Yes" and "No" are not, and stay in this one.
        options = ("Yes", "No")
        if accepted[0] not in options:
            earlier, later = sorted((accepted[0], wrong[0]), key=prompt.index)
            options = (earlier, later)
        yield Question(
            id=prompt,
            prompt=prompt,
            accepted=accepted,
            wrong=wrong,
            options=options,
            difficulty=int(row["difficulty"]),
            category=row["category"],
            how="choice",
        )


_MAKERS: dict[str, Callable[[], Iterator[Question]]] = {
    "capitals": _capitals,
    "elements": _elements,
    "arithmetic": _arithmetic,
    "misconceptions": _misconceptions,
}


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
