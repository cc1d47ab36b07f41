"""How likely given texts are, and seeded samples: many continuations of one prefix."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from analyzers.engine.filters import Filters
from analyzers.engine.signals import draw
from analyzers.engine.trees import Tree
from analyzers.engine.values import PLAIN, PLAIN_FILTERS, Cursor, Options, Step
from analyzers.engine.writing import SOFTMAX_ROWS, Writing
from analyzers.errors import BadInput


@dataclass(frozen=True)
class Scored:
    """A continuation with the raw log-probability (nats) of each of its tokens."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Log-probability of all of it, nats; 0 for nothing."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Labels:
    """probabilities: of each label, among the labels only. mass: what the model gives to all of
    them together; below about 0.5 the probabilities are no evidence. raw: log-probability of each
    label, nats, summed over its variants."""

    probabilities: Mapping[str, float]
    mass: float
    raw: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """index: which of the n. logprobs: raw, nats. ended: with an end token."""

    index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


class Scoring(Writing):
    def score(
        self,
        prefix: Cursor | Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        options: Options = PLAIN,
    ) -> list[Scored]:
        """Raw log-probabilities of many continuations (token ids, any lengths) of one prefix.

        The prefix is computed once, or not at all where it is a cursor, which stays as it is (a
        verified tree behind it is forgotten); common beginnings of continuations are computed
        once, too. Equal to reading each of them behind the prefix.
        Raises: OutOfContext, BadInput, ModelBroken; a cursor is then as it was.
        """
        cursor = prefix if isinstance(prefix, Cursor) else self.prefill(prefix, options=options)
        if not self._masked:
            return [self._read_one(cursor, ids, options) for ids in continuations]
        tree, paths = Tree.merged(continuations)
        self._check_ids(tree.ids)
        self._check_room(cursor.pos + max(tree.depths, default=0))
        logprobs = self._logprobs(cursor, tree, options)
        return [
            Scored(tuple(ids), tuple(logprobs[node] for node in path))
            for ids, path in zip(continuations, paths, strict=True)
        ]

    def labels(
        self,
        prefix: Cursor | Sequence[int],
        variants: Mapping[str, Sequence[str]],
        *,
        after: str = "",
        options: Options = PLAIN,
    ) -> Labels:
        """Which label comes next: each has surface variants ("Yes", " yes"), added up.

        Variants may have several tokens; one that begins with another of the same label adds
        nothing to it. after: the text at the end of the prefix, for the seam (see `tokens`).
        Raises: BadInput when a variant of one label begins with one of another, when a variant is
        empty, or when a label has none; and as `score`.
        """
        ids = {
            label: {tuple(self.tokens(text, after)) for text in texts}
            for label, texts in variants.items()
        }
        for label, many in ids.items():
            if not many or () in many:
                raise BadInput(f"The label {label!r} needs variants, and none of them empty.")
        kept = [(label, own) for label, many in ids.items() for own in _shortest(many)]
        for label, own in kept:
            for other, theirs in kept:
                if label != other and own[: len(theirs)] == theirs:
                    raise BadInput(f"A variant of {label!r} begins with one of {other!r}.")
        scored = self.score(prefix, [own for _, own in kept], options=options)
        raw = {
            label: float(
                torch.tensor(
                    [s.total for (its, _), s in zip(kept, scored, strict=True) if its == label],
                    dtype=torch.float64,
                ).logsumexp(0)
            )
            for label in ids
        }
        values = torch.tensor(list(raw.values()), dtype=torch.float64)
        shares = values.softmax(0).tolist()
        return Labels(dict(zip(raw, shares, strict=True)), float(values.exp().sum()), raw)

    def sample(
        self,
        prefix: Cursor | Sequence[int],
        n: int,
        *,
        rng: Callable[..., random.Random],
        max_new: int,
        filters: Filters = PLAIN_FILTERS,
        options: Options = PLAIN,
    ) -> Iterator[Sample]:
        """n continuations of one prefix, written side by side; each is given when it is done.

        rng: `ctx.rng`; sample i draws from `rng("sample", i)`, so it is the same whatever n is.
        At temperature 0 all are greedy. An end token ends a sample and belongs to it; the model's
        window ends it, too. Stops between steps. Options may hold one policy a sample;
        prefix ids are then read with the model's own routing.
        Raises: OutOfContext when the prefix leaves no room; BadInput for a `max_new` below 1 or
        another number of policies than of samples; and as `step`. A cursor stays as it is.
        """
        if max_new < 1:
            raise BadInput(f"A sample needs room for a token: max_new is {max_new}.")
        policies = options.policy if isinstance(options.policy, tuple) else ()
        if policies and len(policies) != n:
            raise BadInput(f"There are {len(policies)} routing policies for {n} samples.")
        before = replace(options, policy=None) if policies else options
        cursor = prefix if isinstance(prefix, Cursor) else self.prefill(prefix, options=before)
        start = cursor.pos
        self._check_room(start + 1)
        going = {i: self.fork(cursor) for i in range(n)}
        draws = {i: rng("sample", i) for i in range(n)}
        logprobs: dict[int, list[float]] = {i: [] for i in range(n)}
        while going:
            if policies:  # of those that are not done
                options = replace(options, policy=tuple(policies[i] for i in going))
            steps = self.step(list(going.values()), filters=filters, options=options)
            done = []
            for (i, branch), step in zip(going.items(), steps, strict=True):
                id = _pick(step, draws[i], greedy=filters.temperature == 0)
                logprobs[i].append(float(step.raw[id] - step.raw.logsumexp(0)))
                self.push(branch, id)
                length = branch.pos - start
                if self.ends(id) or length == max_new or branch.pos == self.context:
                    done.append(i)
            for i in done:
                ids = tuple(going.pop(i).ids[start:])
                yield Sample(i, ids, tuple(logprobs[i]), self.ends(ids[-1]))

    # Inside

    @contextmanager
    def _aside(self, cursor: Cursor, options: Options) -> Iterator[None]:
        """Let a tree be computed behind the cursor, which is afterwards as it was."""
        cached = cursor.cached
        with self._restoring(cursor):
            self._compute(cursor, cursor.pos - 1, options)
            yield
            # The pending token, which is the root, may stay only if the model was not changed.
            stay = cursor.pos if options == PLAIN else min(cached, cursor.pos - 1)
            cursor.past.crop_to(stay)

    def _logprobs(self, cursor: Cursor, tree: Tree, options: Options) -> list[float]:
        """Of every node of the tree, given its parent; no logits outlive their pass."""
        found = torch.zeros(len(tree))
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(tree.parents):
            children.setdefault(parent, []).append(node)
        ids = torch.tensor(tree.ids, device=self._device)
        with self._aside(cursor, options):
            for chunk, rows, _ in self._through(cursor, tree, None, (), options):
                asked = [node for node in chunk if node in children]
                for some in _pieces(asked, SOFTMAX_ROWS):
                    logits = rows[[node - chunk.start for node in some]].float()
                    if not logits.isfinite().all():
                        raise self._where_broken(cursor.ids, self._pass(options))
                    totals = logits.logsumexp(-1)
                    for place, node in enumerate(some):
                        below = children[node]
                        found[below] = (logits[place, ids[below]] - totals[place]).cpu()
        return [round(value, 6) for value in found.tolist()]

    def _read_one(self, cursor: Cursor, ids: Sequence[int], options: Options) -> Scored:
        branch = self.fork(cursor)
        steps = [step for _, step in self.read(branch, ids, options=options)]
        return Scored(
            tuple(ids),
            tuple(
                float(step.raw[id] - step.raw.logsumexp(0))
                for id, step in zip(ids, steps, strict=True)
                if step is not None
            ),
        )


def _pick(step: Step, rng: random.Random, greedy: bool) -> int:
    return int(step.logits.argmax()) if greedy else draw(step, rng)[0]


def _shortest(many: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Without those that begin with another: their probability is part of its."""
    return sorted(
        own
        for own in many
        if not any(own != other and own[: len(other)] == other for other in many)
    )


def _pieces(items: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
