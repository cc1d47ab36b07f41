"""Cursors behind texts that begin alike: what was computed for one serves the next."""

from collections.abc import Sequence

from analyzers.engine import Cursor, Engine

KEPT = 6


class Prefixes:
    """Hands out cursors; keeps the last few to fork from.

    reuse: False computes every text from its beginning, which gives the same to the accuracy of
    the arithmetic and is there to be compared with."""

    def __init__(self, engine: Engine, *, reuse: bool = True) -> None:
        self._engine = engine
        self._reuse = reuse
        self._kept: list[Cursor] = []

    def cursor(self, ids: Sequence[int]) -> Cursor:
        """Behind `ids`, which is kept: fork it before writing on it. Raises: OutOfContext."""
        if not self._reuse:
            return self._engine.prefill(ids)
        best = max(self._kept, key=lambda cursor: shared(cursor.ids, ids), default=None)
        common = shared(best.ids, ids) if best else 0
        if best is None or not common:
            found = self._engine.prefill(ids)
        elif common == len(ids) == best.pos:
            self._kept.remove(best)
            found = best
        else:
            found = self._engine.fork(best, common)
            if common < len(ids):
                self._engine.extend(found, ids[common:])
        self._kept = [*self._kept[1 - KEPT :], found]
        return found


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
