"""Putting questions about a text to a model: the prompts, and how likely each label comes next."""

import random
from collections.abc import Callable, Mapping, Sequence
from math import exp, fsum, log

from analyzers.common.budget import Budget
from analyzers.common.prefixes import Prefixes, shared
from analyzers.common.rollouts import Rollout, rollouts
from analyzers.engine import Engine, Filters
from analyzers.engine.scoring import Labels
from analyzers.errors import BadInput
from analyzers.task import Task
from analyzers.trace import Turn

MARK = "[...] "
"""Before a text whose beginning is left out."""


def instruction(task: Task) -> str:
    """What is asked: the last message of a conversation, or the raw text.

    Raises: BadInput for a begun answer."""
    if task.prefix or task.written:
        raise BadInput("This method writes whole answers: it cannot go on from a begun one.")
    return task.prompt if isinstance(task.prompt, str) else task.prompt[-1]["content"]


def earlier(task: Task) -> tuple[Turn, ...]:
    """The turns before the instruction."""
    return () if isinstance(task.prompt, str) else task.prompt[:-1]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def encoded(engine: Engine, turns: Sequence[Turn], begun: str = "") -> list[int]:
    """Token ids of a conversation whose last answer begins with `begun`; plain paragraphs for a
    model without a chat template."""
    if engine.can_chat:
        return engine.encode(Task(tuple(turns), prefix=begun))
    paragraphs = [turn["content"] for turn in turns]
    return engine.encode(Task("\n\n".join([*paragraphs, begun])))


def fitted(build: Callable[[str], list[int]], text: str, most: int) -> tuple[list[int], bool]:
    """Ids of the prompt that `build` puts around the text, and whether the text was cut: of one
    that makes more than `most` tokens only the end is shown, behind a mark."""
    ids, left = build(text), text
    while len(ids) > most and left:
        left = left[len(left) // 4 + 1 :]
        ids = build(MARK + left)
    return ids, left != text


def write(
    engine: Engine,
    prefixes: Prefixes,
    ids: Sequence[int],
    rngs: Sequence[random.Random | None],
    budget: Budget,
    *,
    max_new: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Rollout]:
    """One continuation of `ids` a generator, side by side; greedy without one, or at temperature 0.

    Raises: OutOfContext, and as `rollouts`."""
    return rollouts(
        engine,
        prefixes.cursor(ids),
        rngs if temperature else [None] * len(rngs),
        budget,
        max_new=max_new,
        filters=Filters(temperature=temperature or 1.0, top_p=top_p),
    )


def spellings(*words: str) -> list[str]:
    """The words with and without a space before them."""
    return [space + word for word in words for space in ("", " ")]


NEXT_LABELS = 2
"""Passes of `next_labels` for a short question: one reads what is new, one asks."""


def next_labels(
    engine: Engine,
    prefixes: Prefixes,
    prompts: Sequence[Sequence[int]],
    labels: Mapping[str, Sequence[str]],
    after: str,
) -> list[Labels]:
    """Which label comes next behind each prompt (token ids): as `Engine.labels`, in one pass over
    the tree that the prompts make behind their common beginning.

    labels: the spellings of each, none of which begins with another. after: the text at the end of
    the prompts. Raises: OutOfContext, Stopped, ModelBroken.
    """
    forms = {
        label: sorted({tuple(engine.tokens(form, after)) for form in many})
        for label, many in labels.items()
    }
    common = min(shared(prompts[0], prompt) for prompt in prompts)
    cursor = prefixes.cursor(prompts[0][:common])
    asked = [
        (place, label, (*prompt[common:], *form))
        for place, prompt in enumerate(prompts)
        for label, many in forms.items()
        for form in many
    ]
    scored = engine.score(cursor, [ids for _, _, ids in asked])
    found: list[dict[str, list[float]]] = [{label: [] for label in forms} for _ in prompts]
    for (place, label, _), score in zip(asked, scored, strict=True):
        behind = len(prompts[place]) - common
        found[place][label].append(fsum(score.logprobs[behind:]))
    return [_shares({label: _logsumexp(many) for label, many in each.items()}) for each in found]


def _shares(raw: Mapping[str, float]) -> Labels:
    total = _logsumexp(list(raw.values()))
    return Labels({label: exp(value - total) for label, value in raw.items()}, exp(total), raw)


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + log(fsum(exp(value - top) for value in values))
