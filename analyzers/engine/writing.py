"""Cursors: reading, stepping, drafting, going back.

All semantics are exact: a rewind is as if the tail had never been, a fork equals recomputation, and
a call that fails or is stopped leaves its cursors as they were.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import overload

import torch

from analyzers.engine.base import Base
from analyzers.engine.cache import Past, batch_of
from analyzers.engine.filters import Filters
from analyzers.engine.flat import Flat
from analyzers.engine.masks import Mask, masks
from analyzers.engine.passes import Pass, used
from analyzers.engine.trees import Checked, Tree
from analyzers.engine.values import PLAIN, PLAIN_FILTERS, Cursor, Options, Step, step_after
from analyzers.errors import BadInput, ModelBroken, ModelLacks

CHUNK = 256
# Rows of logits that are alive at once while a text is read: 64 of 262k float32 are 64 MB.
READ_CHUNK = 64
# Rows of logits in one float32 softmax; larger temporaries are what costs.
SOFTMAX_ROWS = 16
# Logits of one pass over a tree: 256 rows of the default model, 64 of a vocabulary of 262k.
TREE_LOGITS = 2**24


class Writing(Base):
    def start(self) -> Cursor:
        """An empty text."""
        return Cursor([], self._new_past())

    def prefill(self, ids: Sequence[int], *, options: Options = PLAIN) -> Cursor:
        """A cursor after `ids`, computed in chunks of at most 256 tokens.

        The last id stays pending: the first `step` computes it and gives its distribution.
        Raises: OutOfContext with both lengths; BadInput for no ids or one outside the vocabulary.
        """
        cursor = self.start()
        self.extend(cursor, ids, options=options)
        return cursor

    def extend(self, cursor: Cursor, ids: Sequence[int], *, options: Options = PLAIN) -> None:
        """Commit `ids` and cache all but the last, in chunks that poll stop and report progress.

        On an error or a stop the cursor is as it was."""
        if not ids and not cursor.ids:
            raise BadInput("There is nothing to start from: not one token.")
        self._check_ids(ids)
        self._check_room(cursor.pos + len(ids))
        with self._restoring(cursor):
            self._settle(cursor)
            cursor.ids.extend(ids)
            self._compute(cursor, cursor.pos - 1, options)

    @overload
    def step(
        self,
        cursors: Cursor,
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN_FILTERS,
        taps: Collection[int] = (),
        exits: Collection[int] = (),
        options: Options = PLAIN,
    ) -> Step: ...
    @overload
    def step(
        self,
        cursors: Sequence[Cursor],
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN_FILTERS,
        taps: Collection[int] = (),
        exits: Collection[int] = (),
        options: Options = PLAIN,
    ) -> list[Step]: ...
    def step(
        self,
        cursors: Cursor | Sequence[Cursor],
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN_FILTERS,
        taps: Collection[int] = (),
        exits: Collection[int] = (),
        options: Options = PLAIN,
    ) -> Step | list[Step]:
        """The next token's distribution at one cursor, or at many in one batch (ragged lengths).

        Commits nothing. `ban`: ids that may not be chosen. `taps`: layers whose hidden state to
        return. `exits`: layers whose logits to return, as `unembed` gives them; where that can be
        done in the same product as the model's own it costs little. The first time cursors step
        together their caches are copied side by side; as long as the same ones step together,
        nothing is copied again.
        Raises: OutOfContext when a cursor has reached the model's window; ModelBroken, with the
        layer where it began, when the model's numbers are not finite.
        """
        many = [cursors] if isinstance(cursors, Cursor) else list(cursors)
        if len({id(cursor) for cursor in many}) < len(many):
            raise BadInput("A cursor can be in a batch only once: fork it.")
        if isinstance(options.policy, tuple) and len(options.policy) != len(many):
            raise BadInput(
                f"There are {len(options.policy)} routing policies for {len(many)} texts."
            )
        for cursor in many:
            self._check_room(cursor.pos)
        taps = {*taps, *exits}
        with self._restoring(*many):
            each = [options.of_row(row) for row in range(len(many))]
            for cursor, its in zip(many, each, strict=True):
                self._compute(cursor, cursor.pos - 1, its)
            if len(many) == 1 or not self._masked:
                steps = [
                    self._one(cursor, ban, filters, taps, exits, its)
                    for cursor, its in zip(many, each, strict=True)
                ]
            else:
                steps = self._batch(many, ban, filters, taps, options)
        if exits:
            steps = [step if step.exits else self._with_exits(step, exits) for step in steps]
        return steps[0] if isinstance(cursors, Cursor) else steps

    def push(self, cursor: Cursor, id: int) -> None:
        """Commit one token; it is computed by the next step."""
        self._check_ids((id,))
        self._settle(cursor)
        cursor.ids.append(id)

    def read(
        self,
        cursor: Cursor,
        ids: Sequence[int],
        *,
        taps: Collection[int] = (),
        options: Options = PLAIN,
    ) -> Iterator[tuple[int, Step | None]]:
        """Commit `ids` one after the other, each with the Step before it (teacher forcing).

        The first token of an empty text has no Step: nothing precedes it. Computed in chunks.
        Raises as `extend` does; the chunks read before an error or a stop stay committed.
        """
        self._check_ids(ids)
        self._check_room(cursor.pos + len(ids))
        done = 0
        if ids and not cursor.ids:
            self.push(cursor, ids[0])
            done = 1
            yield ids[0], None
        while done < len(ids):
            chunk = list(ids[done : done + (1 if self._recurrent else READ_CHUNK)])
            steps = self._read_chunk(cursor, chunk, taps, options)
            done += len(chunk)
            self.progress(done, len(ids))
            yield from zip(chunk, steps, strict=True)

    def fork(self, cursor: Cursor, to: int | None = None) -> Cursor:
        """A second cursor with the same past (its first `to` tokens), free to write its own tail.

        Copies that much of the cache; equal to computing it again."""
        length = cursor.pos if to is None else to
        return Cursor(cursor.ids[:length], cursor.past.copy(length))

    def rewind(self, cursor: Cursor, to: int) -> None:
        """Undo every token at position >= `to`, as if it had never been written.

        Moves a length; a recurrent model goes back to a snapshot and computes the rest again."""
        del cursor.ids[to:]
        cursor.checked = None
        cursor.past.crop_to(max(to - 1, 0))

    # Drafts

    def verify(
        self,
        cursor: Cursor,
        tree: Tree,
        *,
        taps: Collection[int] = (),
        options: Options = PLAIN,
    ) -> Checked:
        """One forward over the last committed token (the root) and a tree of drafts behind it.

        Commits nothing; follow with `commit`, or forget it by doing anything else. A second call
        with a longer tree that begins with the first one, and the same taps and options, computes
        only what is new, so a draft model can grow a tree level by level. More than 256 nodes take
        several passes.
        Raises: ModelLacks for recurrent models and ALiBi; OutOfContext when the tree is deeper than
        the window; BadInput for ids outside the vocabulary.
        """
        self._need_masks("trees")
        self._check_ids(tree.ids)
        self._check_room(cursor.pos + max(tree.depths, default=0))
        before = cursor.checked
        if before is None or not before.goes_on_to(tree, taps, options):
            before = None
            self._compute(cursor, cursor.pos - 1, options)
        raw = [before.raw] if before else []
        hidden = [before.hidden] if before else []
        with self._restoring(cursor):
            for _, rows, states in self._through(cursor, tree, before, taps, options):
                raw.append(rows)
                hidden.append(states)
            cursor.checked = Checked(
                tree,
                _joined(raw),
                {layer: _joined([states[layer] for states in hidden]) for layer in taps},
                tuple(cursor.ids),
                self.vocabulary.size,
                options,
            )
        return cursor.checked

    def commit(self, cursor: Cursor, path: Sequence[int]) -> None:
        """Commit these nodes of the verified tree, root side first; the others are forgotten.

        Nothing is computed again: a chain keeps its rows where they are, a branch moves its own.
        Raises: BadInput when nothing was verified at this place, or it is no path of that tree.
        """
        checked = cursor.checked
        if checked is None or not isinstance(cursor.past, Past):
            raise BadInput("There is no verified tree behind this text: call verify first.")
        for node, parent in zip(path, (-1, *path), strict=False):
            if not 0 <= node < len(checked.tree) or checked.tree.parents[node] != parent:
                raise BadInput(f"{tuple(path)} is no path of the tree from its root.")
        cursor.past.keep(cursor.pos, [cursor.pos + node for node in path])
        cursor.ids.extend(checked.tree.ids[node] for node in path)
        cursor.checked = None

    # Inside

    def _need_rows(self, what: str) -> None:
        if self._recurrent:
            raise ModelLacks(
                f"{self.identity['name']} keeps a recurrent state instead of keys and values: "
                f"it has no {what}."
            )

    def _need_masks(self, what: str) -> None:
        """Raises: ModelLacks where a mask does not decide what a token sees and where it is."""
        self._need_rows(what)
        if not self._masked:
            raise ModelLacks(
                f"{self.identity['name']} adds distances of its own to its attention (ALiBi): "
                f"it has no {what}."
            )

    def _settle(self, cursor: Cursor) -> None:
        """Forget a verified tree that was not committed."""
        if cursor.checked is not None:
            cursor.checked = None
            cursor.past.crop_to(cursor.pos)

    def _compute(self, cursor: Cursor, to: int, options: Options) -> None:
        """Cache exactly the first `to` tokens, where the options run; report long work."""
        if not cursor.ids:
            raise BadInput("There is nothing to start from: not one token.")
        self._settle(cursor)
        layers = used(self.layers, options)
        if layers == []:  # where no attention runs, the past is not looked at
            return
        cursor.past.crop_to(min(to, cursor.past.length(layers)))
        this = self._pass(options)
        long = to - cursor.past.length(layers) > 1
        while (done := cursor.past.length(layers)) < to:
            if long:
                self.progress(done, to)
            # A recurrent layer takes many tokens only from its beginning.
            size = 1 if self._recurrent and done else CHUNK
            self._forward(cursor, cursor.ids[done : min(done + size, to)], None, this, options)
        if long:
            self.progress(to, to)

    def _forward(
        self,
        cursor: Cursor,
        ids: Sequence[int],
        keep: int | None,
        this: Pass | None,
        options: Options,
    ) -> torch.Tensor:
        """Compute `ids` after what is cached."""
        layers = used(self.layers, options)
        done = cursor.pos - 1 if layers == [] else cursor.past.length(layers)
        positions = range(done, done + len(ids))
        mask = None
        if layers is not None:  # the model would take the length of its first layer
            self._need_masks("skipped layers")
            mask = self._causal(done, len(ids))
        found = self._run(this, cursor.past.cache, [ids], [positions], keep, mask)
        cursor.past.passed(done + len(ids))
        return found

    def _one(
        self,
        cursor: Cursor,
        ban: Collection[int],
        filters: Filters,
        taps: Collection[int],
        exits: Collection[int],
        options: Options,
    ) -> Step:
        if self._flat is not None and options == PLAIN:
            return self._flat_step(self._flat, cursor, ban, filters, taps, exits)
        return self._module_step(cursor, ban, filters, taps, options)

    def _module_step(
        self,
        cursor: Cursor,
        ban: Collection[int],
        filters: Filters,
        taps: Collection[int],
        options: Options,
    ) -> Step:
        this = self._pass(options, taps)
        rows = self._forward(cursor, cursor.ids[-1:], 1, this, options)
        return self._said(cursor, rows[0, -1], this, (0, 0), ban, filters)

    def _flat_step(
        self,
        flat: Flat,
        cursor: Cursor,
        ban: Collection[int],
        filters: Filters,
        taps: Collection[int],
        exits: Collection[int],
    ) -> Step:
        at = [cursor.pos - 1]
        states, hidden = self._flat_run(flat, cursor, cursor.ids[-1:], at, None, taps)
        if exits:  # one product for all: the head's weights are read from memory once
            states = torch.cat([*(hidden[layer] for layer in exits), states])
        rows = self._parts.readout(states)
        hidden = {layer: states[0] for layer, states in hidden.items()}
        try:
            step = step_after(cursor.ids, rows[-1], self.vocabulary.size, hidden, ban, filters)
        except ModelBroken:
            raise self._where_broken(cursor.ids, None) from None
        return replace(step, exits=dict(zip(exits, rows.float(), strict=False))) if exits else step

    def _flat_run(
        self,
        flat: Flat,
        cursor: Cursor,
        ids: Sequence[int],
        at: Sequence[int],
        mask: Mask | None,
        taps: Collection[int],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """A pass of its own, as `_run` is one: see `Flat.run`."""
        self._check_taps(taps)
        self.poll()
        self.forwards += 1
        assert isinstance(cursor.past, Past)  # a flat model has no recurrent state
        return flat.run(ids, at, cursor.past, mask, taps)

    def _with_exits(self, step: Step, exits: Collection[int]) -> Step:
        rows = torch.stack([step.hidden[layer] for layer in exits])
        logits = self._parts.readout(rows.to(self.model.dtype)).float()
        return replace(step, exits=dict(zip(exits, logits, strict=True)))

    def _batch(
        self,
        cursors: list[Cursor],
        ban: Collection[int],
        filters: Filters,
        taps: Collection[int],
        options: Options,
    ) -> list[Step]:
        """One pass for the last token of every cursor."""
        this = self._pass(options, taps)
        pasts = [cursor.past for cursor in cursors if isinstance(cursor.past, Past)]
        lengths = torch.tensor([cursor.pos for cursor in cursors], device=self._device)[:, None]
        columns = torch.arange(int(lengths.max()), device=self._device)[None]
        allow = (columns < lengths)[:, None]
        keys_at = columns.expand(len(cursors), -1)
        mask = masks(self._parts, allow, lengths - 1, keys_at, self.model.dtype)
        last = [cursor.ids[-1:] for cursor in cursors]
        at = [[cursor.pos - 1] for cursor in cursors]
        rows = self._run(this, batch_of(pasts), last, at, 1, mask)
        return [
            self._said(cursor, rows[row, -1], this, (row, 0), ban, filters)
            for row, cursor in enumerate(cursors)
        ]

    def _said(
        self,
        cursor: Cursor,
        row: torch.Tensor,
        this: Pass | None,
        place: tuple[int, int],
        ban: Collection[int] = (),
        filters: Filters = PLAIN_FILTERS,
    ) -> Step:
        """The Step behind the cursor's text from its logits; place: (row, token) in the pass."""
        hidden = this.hidden_at(*place) if this else {}
        experts = this.experts_at(*place) if this else {}
        entropy = this.router_entropy_at(*place) if this else {}
        size = self.vocabulary.size
        try:
            return step_after(cursor.ids, row, size, hidden, ban, filters, experts, entropy)
        except ModelBroken:
            raise self._where_broken(cursor.ids, this) from None

    def _through(
        self,
        cursor: Cursor,
        tree: Tree,
        before: Checked | None,
        taps: Collection[int],
        options: Options,
    ) -> Iterator[tuple[range, torch.Tensor, dict[int, torch.Tensor]]]:
        """The new nodes in chunks: (nodes, logits (nodes, vocab), layer -> (nodes, d_model)). The
        first chunk of a new tree begins with the root, as node -1."""
        flat = self._flat if options == PLAIN else None
        root = cursor.pos - 1
        size = max(1, min(CHUNK, TREE_LOGITS // self.vocabulary.size))
        first = len(before.tree) if before else -1
        depths = (0, *tree.depths)  # of the root, then of the nodes
        while first < len(tree):
            chunk = range(first, min(first + size, len(tree)))
            ids = [cursor.ids[-1] if node < 0 else tree.ids[node] for node in chunk]
            at = [root + depths[node + 1] for node in chunk]
            if flat is not None:
                mask = self._tree_mask(root, tree, chunk) if chunk.stop else None
                states, hidden = self._flat_run(flat, cursor, ids, at, mask, taps)
                yield chunk, self._parts.readout(states), hidden
            else:
                this = self._pass(options, taps)
                mask = self._tree_mask(root, tree, chunk)
                rows = self._run(this, cursor.past.cache, [ids], [at], 0, mask)
                tapped = this.hidden if this else {}
                yield chunk, rows[0], {layer: states[0] for layer, states in tapped.items()}
            first = chunk.stop

    def _tree_mask(self, root: int, tree: Tree, chunk: range) -> Mask:
        """For these nodes (-1 = the root, at position `root`), behind everything before them."""
        depths = torch.tensor((0, *tree.depths[: chunk.stop]))  # of the root, then of the nodes
        drafts = tree.ancestors[max(chunk.start, 0) : chunk.stop, : chunk.stop]
        seen = torch.ones(len(chunk), root + 1 + chunk.stop, dtype=torch.bool)
        seen[:, root + 1 :] = False  # the root sees no draft
        seen[len(chunk) - len(drafts) :, root + 1 :] = drafts
        keys_at = torch.cat([torch.arange(root), root + depths]).to(self._device)
        at = keys_at[root + 1 + chunk.start :]
        allow = seen.to(self._device)
        return masks(self._parts, allow[None], at[None], keys_at[None], self.model.dtype)

    def _read_chunk(
        self, cursor: Cursor, ids: list[int], taps: Collection[int], options: Options
    ) -> list[Step]:
        with self._restoring(cursor):
            self._compute(cursor, cursor.pos - 1, options)
            this = self._pass(options, taps)
            given = [cursor.ids[-1], *ids[:-1]]
            rows = self._forward(cursor, given, 0, this, options)
            steps = []
            for place, (id, row) in enumerate(zip(ids, rows[0], strict=True)):
                steps.append(self._said(cursor, row, this, (0, place)))
                cursor.ids.append(id)
        return steps

    def _causal(self, done: int, new: int) -> Mask:
        at = torch.arange(done, done + new, device=self._device)[None]
        keys_at = torch.arange(done + new, device=self._device)[None]
        allow = keys_at[:, None] <= at[:, :, None]
        return masks(self._parts, allow, at, keys_at, self.model.dtype)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one as it is: logits are large to copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
