"""Models that propose: a second one, or the target itself with a part of its layers.

Each gives the draft's distribution behind every node of a growing tree; `shapes` make trees of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from analyzers.common.drafts import NOTHING, Draft, Drawn, Outcome
from analyzers.common.shapes import Proposer
from analyzers.common.speculation import Drafted, Target
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Options, Tree
from analyzers.engine.values import PLAIN, SubLayer
from analyzers.errors import BadParameter
from analyzers.params import ModelRef, knob

Shape = Callable[[Proposer, Sequence[int], int], Draft]
"""(proposer, text, depth) -> a draft of at most `depth` levels."""


class Reader:
    """The processed rows behind a growing tree: of a longer one only what is new is computed."""

    def __init__(self, engine: Engine, filters: Filters, options: Options = PLAIN) -> None:
        self._engine = engine
        self._filters = filters
        self._options = options
        self._text = -1
        self._tree = NOTHING
        self._rows: list[torch.Tensor] = []

    def read(self, cursor: Cursor, tree: Tree) -> list[torch.Tensor]:
        """(vocab,) each, float64: behind the root, then behind every node."""
        if cursor.pos != self._text or not tree.begins_with(self._tree):
            self._rows = []
        self._text, self._tree = cursor.pos, tree
        checked = self._engine.verify(cursor, tree, options=self._options)
        target = Target(checked, self._filters)
        self._rows += [target(node) for node in range(len(self._rows) - 1, len(tree))]
        return self._rows


class Itself:
    """The target with some sub-layers skipped, or its first layers alone, on the target's own
    cache: what is committed was computed by all layers, and what is drafted is forgotten."""

    def __init__(self, engine: Engine, cursor: Cursor, options: Options, filters: Filters) -> None:
        self._cursor = cursor
        self._reader = Reader(engine, filters, options)
        run = options.upto or engine.layers
        skipped = sum(layer <= run for layer, _ in options.skip) / 2
        self.cost = (run - skipped) / engine.layers

    def rows(self, text: Sequence[int], tree: Tree) -> list[torch.Tensor]:
        """(vocab,) each, float64: behind the root, then behind every node."""
        return self._reader.read(self._cursor, tree)


class Second:
    """A draft model with the target's tokenizer, on a cache of its own.

    Raises: BadParameter when the two read text differently."""

    def __init__(self, target: Engine, draft: Engine, filters: Filters, cost: float) -> None:
        if target.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
            raise BadParameter(
                f"{draft.identity['name']} cannot draft for {target.identity['name']}: their "
                f"tokenizers differ ({draft.vocabulary.size:,} and {target.vocabulary.size:,} "
                "tokens)."
            )
        self._engine = draft
        self._cursor = draft.start()
        self._reader = Reader(draft, filters)
        self.cost = cost

    def rows(self, text: Sequence[int], tree: Tree) -> list[torch.Tensor]:
        """(vocab,) each, float64: behind the root, then behind every node.

        Raises: OutOfContext when the draft model's window is too small."""
        self._follow(text)
        return self._reader.read(self._cursor, tree)

    def _follow(self, text: Sequence[int]) -> None:
        """Bring the cursor behind `text`, keeping what was computed of drafts that it now has. The
        text only grows."""
        new = list(text[self._cursor.pos :])
        if new and self._cursor.checked is not None:
            path = self._cursor.checked.tree.along(new)
            self._engine.commit(self._cursor, path)
            new = new[len(path) :]
        if new:
            self._engine.extend(self._cursor, new)


@dataclass(frozen=True)
class ModelDrafted(Drafted):
    """The knobs of methods that draft with a model; which layers to leave out is ours."""

    draft: ModelRef = knob(
        ModelRef(""), "A second model with the same tokenizer; @int8 = this one, quantized so"
    )
    skip: int = knob(2, "Layers left out while the model drafts for itself", lo=0, hi=96)
    upto: int = knob(0, "Or draft with so many layers alone (early exit); 0 = off", lo=0, hi=96)


def proposing(
    engine: Engine,
    cursor: Cursor,
    params: ModelDrafted,
    ctx: Context,
    filters: Filters | None = None,
) -> "Itself | Second":
    """The second model that the knobs name, or the model itself in part. filters: of what it
    draws from; those of the target if not given. At temperature 0 the rows are those of temperature
    1: drafts are then taken from their top, and their numbers can be seen.

    Raises: BadParameter for another tokenizer; BadInput for an exit behind the last layer."""
    filters = filters or (params.filters if params.temperature > 0 else Filters())
    if not params.draft:
        upto = params.upto or engine.layers
        options = Options(upto=params.upto or None, skip=spread(params.skip, upto))
        return Itself(engine, cursor, options, filters)
    second = ctx.engine(params.draft)
    cost = second.memory / engine.memory
    if engine.cost and second.cost:
        cost = second.cost.step_ms / engine.cost.step_ms
    return Second(engine, second, filters, cost)


def spread(count: int, layers: int) -> frozenset[SubLayer]:
    """The sub-layers of so many layers, evenly over all but the first and the last."""
    inner = range(2, layers)
    count = min(count, len(inner))
    chosen = [inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)]
    return frozenset((layer, part) for layer in chosen for part in ("attention", "feed_forward"))


@dataclass(frozen=True)
class Grown:
    """A drafter whose trees a shape makes of a proposer's rows; it learns nothing."""

    proposer: Proposer
    shape: Shape
    drawn: Drawn

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        return self.shape(self.proposer, text, depth)

    def learn(self, outcome: Outcome) -> None:
        pass
