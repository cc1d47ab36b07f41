"""Read: how surprised the model is at every token of a text that is already there.

Source: teacher forcing; surprisal as in Shannon 1948 and Hale 2001.
Idea:   the text is given, not written: each token gets the probability the model had for it, so
        somebody else's answer or a document can be looked at with the model's eyes.
Differs from the source: nothing. The first token has no numbers where no start token precedes it.
"""

from collections.abc import Generator
from dataclasses import dataclass

from analyzers.card import Card
from analyzers.context import Context
from analyzers.engine import Engine, first_token, token
from analyzers.task import Task
from analyzers.trace import Event, Note, Token

CARD = Card(
    "Read a text",
    family="decoding",
    source="Hale 2001, A Probabilistic Earley Parser as a Psycholinguistic Model",
    emits=(Token, Note),
    needs=("logits",),
    starts_as="raw",
    example="The capital of Kenya is Nairobi, and the capital of France is Nairobi, too.",
)


@dataclass(frozen=True)
class Params:
    """Nothing to set."""


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token for every token of prompt and begun answer, from position 0 on.

    Raises: OutOfContext with both lengths.
    """
    ids = engine.encode(task)
    if isinstance(task.prompt, str) and engine.vocabulary.decode(ids) != task.prompt + task.prefix:
        yield Note(
            "warning",
            "The text is not read as it stands: the tokenizer changed or dropped some characters, "
            "or took them for special tokens.",
        )
    cursor = engine.start()
    ctx.cursors.append(cursor)
    for id, step in engine.read(cursor, ids):
        if step is None:
            yield first_token(engine, id)
        else:
            yield token(engine, step, id, origin="read", p_sampled=None)
    return "end of the text"
