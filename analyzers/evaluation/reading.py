"""Questions from a file.

Columns are guessed from the names that public sets use and can be named instead. A cell of a CSV
may hold several answers, divided by "|" or else ";", or a JSON list. Of an answer that shows its
work before "####" (GSM8K) the part behind counts. Where there are options, the answer may be one of
them, its letter, or its place counted from 0; the choices then become a part of the prompt.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from analyzers.errors import BadInput
from analyzers.evaluation.questions import LETTERS, How, Question, QuestionSet, lettered
from analyzers.evaluation.rows import Cell, Row, rows_of

MOST = 20_000
"""Questions of one set: they are kept in memory, and a run over more would take days."""
GUESSES = {
    "question": "question prompt input query problem text instruction",
    "answer": "answers accepted correct_answers answer best_answer correct_answer target targets "
    "output label gold solution answerkey",
    "wrong": "wrong incorrect_answers wrong_answers distractors best_incorrect_answer",
    "options": "options choices",
    "id": "id question_id qid uid",
    "category": "category topic subject subset type",
    "difficulty": "difficulty level",
}
"""What a column can be for, and the names it is known by, the most telling first."""
_LEVELS = {"easy": 1, "medium": 2, "hard": 3}
_PLAIN_NUMBER = re.compile(r"[-−+$]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Look:
    """What a page shows before it reads: the columns, what they were guessed to be for, and the
    first rows as they are."""

    columns: tuple[str, ...]
    guessed: dict[str, str]
    rows: tuple[Row, ...]


def look(path: Path, rows: int = 5, encoding: str | None = None) -> Look:
    """The beginning of a file. Raises: BadInput where it cannot be read or is empty."""
    beginning = tuple(row for _, row in islice(rows_of(path, encoding), rows))
    if not beginning:
        raise BadInput(f"{path.name} has no rows.")
    columns = tuple(beginning[0])
    return Look(columns, _guess(columns), beginning)


def read(
    path: Path,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    shots: int = 0,
    encoding: str | None = None,
    how: How | None = None,
) -> QuestionSet:
    """The questions of a file, in its order; it is read no further than the limit needs.

    columns: {what for: column}, over the guesses; an empty name means there is none. shots: so many
    questions from the beginning become worked examples and are not evaluated. encoding: UTF-8
    unless the file says UTF-16. how: the scoring; without it choice where there are options,
    numeric where the accepted answers are bare numbers, else normalised. Empty rows are left out;
    without an id column the id is the number of the line.
    Raises: BadInput, naming the line, for whatever cannot be understood, for an id that comes
    twice, and for more than `MOST` questions without a limit.
    """
    if limit is not None and not 1 <= limit <= MOST:
        raise BadInput(f"The limit is {limit:,}, and must be from 1 to {MOST:,} questions.")
    if not 0 <= shots <= 100:
        raise BadInput(f"{shots:,} worked examples were asked for: take from 0 to 100.")
    wanted = shots + (MOST + 1 if limit is None else limit)
    questions: list[Question] = []
    lines: dict[str, int] = {}  # id -> where it stands
    mapping: dict[str, str] | None = None
    for line, row in rows_of(path, encoding):
        if mapping is None:
            mapping = _mapping(path, tuple(row), columns or {})
        if not any(_texts(value) for value in row.values()):
            continue
        question = _question(row, mapping, f"{path.name}, line {line:,}", str(line))
        if question.id in lines:
            raise BadInput(
                f"{path.name} has the id {question.id!r} twice, in lines {lines[question.id]:,} and"
                f" {line:,}: make the ids differ, or choose no id column."
            )
        lines[question.id] = line
        questions.append(replace(question, how=how or question.how))
        if len(questions) == wanted:
            break
    if len(questions) <= shots:
        raise BadInput(
            f"{path.name} has {len(questions):,} questions, and {shots:,} of them become worked"
            " examples: none is left."
        )
    if len(questions) - shots > MOST:
        raise BadInput(
            f"{path.name} has more than {MOST:,} questions: give a limit, such as 1,000."
        )
    examples = tuple((question.prompt, question.accepted[0]) for question in questions[:shots])
    return QuestionSet(path.name, tuple(questions[shots:]), examples)


def _guess(columns: tuple[str, ...]) -> dict[str, str]:
    """{what for: column}, for what could be told."""
    known = {re.sub(r"\W+", "_", name.casefold()).strip("_"): name for name in columns}
    guessed = {}
    for use, names in GUESSES.items():
        if found := next((known[name] for name in names.split() if name in known), None):
            guessed[use] = found
    return guessed


def _mapping(path: Path, columns: tuple[str, ...], named: Mapping[str, str]) -> dict[str, str]:
    shown = ", ".join(map(repr, columns[:20]))
    for use, column in named.items():
        if use not in GUESSES:
            raise BadInput(f"There is no use {use!r} for a column: name {', '.join(GUESSES)}.")
        if column and column not in columns:
            raise BadInput(f"{path.name} has no column {column!r}: its columns are {shown}.")
    mapping = {use: column for use, column in {**_guess(columns), **named}.items() if column}
    for use in ("question", "answer"):
        if use not in mapping:
            raise BadInput(
                f"{path.name} has no column known to hold the {use}: name one of {shown}."
            )
    return mapping


def _question(row: Row, mapping: dict[str, str], where: str, number: str) -> Question:
    cell = {use: row.get(column) for use, column in mapping.items()}
    single = {
        use: " ".join(_texts(cell.get(use), divide=False))
        for use in ("question", "id", "category", "difficulty")
    }
    results = (text.rpartition("####")[2].strip() for text in _texts(cell.get("answer")))
    accepted = tuple(result for result in results if result)
    options, wrong = _texts(cell.get("options")), _texts(cell.get("wrong"))
    if not single["question"]:
        raise BadInput(f"{where}: the question is missing.")
    if not accepted:
        raise BadInput(f"{where}: the answer is missing.")
    prompt, how = single["question"], _fitting(accepted)
    if options:
        if not 2 <= len(options) <= len(LETTERS):
            raise BadInput(f"{where}: {len(options)} options; 2 to {len(LETTERS)} can be lettered.")
        accepted = _chosen(accepted, options, _labels(cell["options"]), where)
        wrong = tuple(option for option in options if option not in accepted)
        prompt, how = lettered(prompt, options), "choice"
    return Question(
        id=single["id"] or number,
        prompt=prompt,
        accepted=accepted,
        wrong=wrong,
        options=options,
        difficulty=_level(single["difficulty"]),
        category=single["category"],
        how=how,
    )


def _chosen(
    answers: tuple[str, ...], options: tuple[str, ...], labels: tuple[str, ...], where: str
) -> tuple[str, ...]:
    """The options that the answers mean."""
    chosen = []
    for answer in answers:
        if answer in options:
            place = options.index(answer)
        elif answer in labels:
            place = labels.index(answer)
        elif answer.isdecimal() and len(answer) < 3:
            place = int(answer)
        else:
            place = len(options)
        if place >= len(options):
            raise BadInput(f"{where}: the answer {answer!r} is none of the options.")
        chosen.append(options[place])
    return tuple(dict.fromkeys(chosen))


def _labels(options: object) -> tuple[str, ...]:
    """What the options are called where the file says so (ARC), else letters."""
    named = options.get("label") if isinstance(options, dict) else None
    return _texts(named) or tuple(LETTERS)


def _fitting(accepted: tuple[str, ...]) -> How:
    bare = all(_PLAIN_NUMBER.fullmatch(answer) for answer in accepted)
    return "numeric" if bare else "normalised"


def _level(text: str) -> int | None:
    known = _LEVELS.get(text.casefold())
    return int(text) if text.isdecimal() and len(text) < 10 else known


def _texts(value: object, divide: bool = True) -> tuple[str, ...]:
    """The texts in a cell, each once, without space around them and without empty ones. Of an
    object its "text" (SQuAD, ARC), or its "value" and "aliases" (TriviaQA).

    divide: whether a CSV's cell may hold several."""
    parts: list[object] = []
    match value:
        case Cell() if divide:
            parts = _divided(value)
        case str():
            parts = [value]
        case bool():
            parts = ["Yes" if value else "No"]
        case int():
            parts = [str(value)]
        case float() if math.isfinite(value):
            parts = [f"{value:.15g}"]
        case list():
            parts = [text for part in value for text in _texts(part, divide)]
        case dict():
            found = [value.get(key) for key in ("text", "value", "aliases")]
            parts = [text for part in found for text in _texts(part, divide)]
    texts = (str(part).strip() for part in parts)
    return tuple(dict.fromkeys(text for text in texts if text))


def _divided(cell: str) -> list[object]:
    if cell.lstrip().startswith("["):
        try:
            return list(_texts(json.loads(cell)))
        except (ValueError, RecursionError):
            pass  # a text that only begins so
    return list(cell.split("|" if "|" in cell else ";"))
