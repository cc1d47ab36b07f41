"""Text that was decided elsewhere, written into the answer token by token."""

from collections.abc import Generator, Sequence

from analyzers.engine import Cursor, Engine, token
from analyzers.engine.signals import first_token
from analyzers.trace import Origin, Token


def forced(
    engine: Engine, cursor: Cursor, ids: Sequence[int], origin: Origin = "sampled"
) -> Generator[Token, None, None]:
    """Commit each of `ids` and yield its Token, with the signals that the model has there."""
    for id, step in engine.read(cursor, ids):
        if step is None:
            yield first_token(engine, id)
        else:
            yield token(engine, step, id, origin=origin, p_sampled=None)
