"""The engine: what methods may ask of a model.

All semantics are exact: a rewind is as if the tail had never been, a fork equals recomputation, and
a call that fails or is stopped leaves its cursors as they were. Options belong to the call; hooks
are installed once, at loading, and read the active call, so interleaved runs do not meet.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analyzers.card import Need
from analyzers.engine.adapters import parts
from analyzers.engine.cache import Cache, copy_cache, crop_cache, new_cache, padded_batch
from analyzers.engine.filters import Filters
from analyzers.engine.text import UTF8_MOST, Vocabulary, encodable
from analyzers.errors import BadInput, ModelBroken, ModelUnfit, OutOfContext
from analyzers.task import Task

CHUNK = 256
# Rows of logits that are alive at once while a text is read: 64 of 262k float32 are 64 MB.
READ_CHUNK = 64
PLAIN = Filters()


class Cursor:
    """A place in a text. `ids` are committed; the first `cached` of them are in the cache."""

    def __init__(self, ids: list[int], cache: Cache) -> None:
        self.ids = ids
        self.cache = cache

    @property
    def pos(self) -> int:
        """Where the next token will stand; counts prompt tokens."""
        return len(self.ids)

    @property
    def cached(self) -> int:
        return int(self.cache.get_seq_length())


@dataclass(frozen=True, eq=False)
class Step:
    """The distribution of the token at `pos`.

    raw: the model's own logits, (vocab,), float32. logits: after ban and filters, (vocab,), -inf
    where excluded. hidden: layer -> (d_model,) for the tapped layers; 0 = embeddings, l = output
    of block l, before the final norm. before: the last few ids in front of `pos`, enough to know
    whether a character is unfinished there.
    """

    pos: int
    raw: torch.Tensor
    logits: torch.Tensor
    before: tuple[int, ...]
    hidden: Mapping[int, torch.Tensor]


class Engine:
    """A loaded model. `identity` names it, `can` says what methods may ask, `context` is its
    window in tokens, `forwards` counts the passes so far.

    `poll` is called before every pass and may raise Stopped; `progress(done, total)` hears of long
    prefills. Both belong to the caller that drives the run.
    """

    can: frozenset[Need] = frozenset({"text", "logits", "top_logprobs", "layers", "fork"})

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: Mapping[str, Any],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity
        self.vocabulary = Vocabulary(tokenizer)
        self.context = int(model.config.max_position_embeddings)
        self.layers = int(model.config.num_hidden_layers)
        self.forwards = 0
        self.poll: Callable[[], None] = lambda: None
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._device = model.device
        self._ends = _end_ids(model, tokenizer)
        self._parts = parts(model)
        self._tapped: dict[int, torch.Tensor] = {}
        self._taps: frozenset[int] = frozenset()
        self._install_taps()
        self._check()

    # Text

    def encode(self, task: Task) -> list[int]:
        """Token ids of the prompt, the begun answer, and the tokens that stay of an earlier run.

        Raises: BadInput for chat turns when the tokenizer has no chat template.
        """
        if task.written and task.written[0].pos == 0:
            return [token.id for token in task.written]
        if isinstance(task.prompt, str):
            ids = self.tokenizer(encodable(task.prompt + task.prefix))["input_ids"]
        else:
            text = encodable(self._templated(task))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, *(token.id for token in task.written)]

    def _templated(self, task: Task) -> str:
        if not self.can_chat:
            raise BadInput(
                "This model has no chat template: choose raw text instead of a conversation."
            )
        turns = self.tokenizer.apply_chat_template(
            list(task.prompt), add_generation_prompt=True, tokenize=False
        )
        return turns + task.prefix

    @property
    def can_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def ends(self, id: int) -> bool:
        """Whether the model says with this token that it is done."""
        return id in self._ends

    @property
    def memory(self) -> int:
        """Bytes of the weights."""
        return int(self.model.get_memory_footprint())

    # Writing

    def start(self) -> Cursor:
        """An empty text."""
        return Cursor([], new_cache(self.layers))

    def prefill(self, ids: Sequence[int]) -> Cursor:
        """A cursor after `ids`, computed in chunks of at most 256 tokens.

        The last id stays pending: the first `step` computes it and gives its distribution.
        Raises: OutOfContext with both lengths; BadInput for no ids or one outside the vocabulary.
        """
        cursor = self.start()
        self.extend(cursor, ids)
        return cursor

    def extend(self, cursor: Cursor, ids: Sequence[int]) -> None:
        """Commit `ids` and cache all but the last, in chunks that poll stop and report progress.

        On an error or a stop the cursor is as it was."""
        if not ids and not cursor.ids:
            raise BadInput("There is nothing to start from: not one token.")
        self._check_ids(ids)
        self._check_room(cursor.pos + len(ids))
        with self._restoring(cursor):
            cursor.ids.extend(ids)
            total = cursor.pos - 1
            while (done := cursor.cached) < total:
                self.progress(done, total)
                self._forward(cursor, cursor.ids[done : min(done + CHUNK, total)], keep=1)
            self.progress(total, total)

    @overload
    def step(
        self,
        cursors: Cursor,
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN,
        taps: Collection[int] = (),
    ) -> Step: ...
    @overload
    def step(
        self,
        cursors: Sequence[Cursor],
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN,
        taps: Collection[int] = (),
    ) -> list[Step]: ...
    def step(
        self,
        cursors: Cursor | Sequence[Cursor],
        *,
        ban: Collection[int] = (),
        filters: Filters = PLAIN,
        taps: Collection[int] = (),
    ) -> Step | list[Step]:
        """The next token's distribution at one cursor, or at many in one batch (ragged lengths).

        Commits nothing. `ban`: ids that may not be chosen. `taps`: layers whose hidden state to
        return. Raises: OutOfContext when a cursor has reached the model's window; ModelBroken when
        the model's numbers are not finite.
        """
        many = [cursors] if isinstance(cursors, Cursor) else list(cursors)
        for cursor in many:
            self._check_room(cursor.pos)
            self._make_pending(cursor)
        if len(many) == 1:
            with self._restoring(many[0]):
                rows, hidden = self._forward(many[0], many[0].ids[many[0].cached :], 1, taps)
        else:
            rows, hidden = self._forward_batch(many, taps)
        steps = [
            self._step(cursor, row, {layer: h[i, -1] for layer, h in hidden.items()}, ban, filters)
            for i, (cursor, row) in enumerate(zip(many, rows[:, -1], strict=True))
        ]
        return steps[0] if isinstance(cursors, Cursor) else steps

    def push(self, cursor: Cursor, id: int) -> None:
        """Commit one token; it is computed by the next step."""
        self._check_ids((id,))
        cursor.ids.append(id)

    def read(
        self, cursor: Cursor, ids: Sequence[int], *, taps: Collection[int] = ()
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
            chunk = list(ids[done : done + READ_CHUNK])
            steps = self._read_chunk(cursor, chunk, taps)
            done += len(chunk)
            self.progress(done, len(ids))
            yield from zip(chunk, steps, strict=True)

    def fork(self, cursor: Cursor, to: int | None = None) -> Cursor:
        """A second cursor with the same past (its first `to` tokens), free to write its own tail.

        Copies that much of the cache; equal to computing it again."""
        length = cursor.pos if to is None else to
        ids = cursor.ids[:length]
        return Cursor(ids, copy_cache(cursor.cache, min(cursor.cached, max(length - 1, 0))))

    def rewind(self, cursor: Cursor, to: int) -> None:
        """Undo every token at position >= `to`, as if it had never been written."""
        del cursor.ids[to:]
        crop_cache(cursor.cache, max(to - 1, 0))

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab) in float32 that a hidden state (..., d_model) would have as the last
        one: final norm, head, and soft-cap. Exactly the model's own logits for its last layer."""
        return self._parts.readout(hidden.to(self.model.dtype)).float()

    # Inside

    def _step(
        self,
        cursor: Cursor,
        row: torch.Tensor,
        hidden: Mapping[int, torch.Tensor],
        ban: Collection[int],
        filters: Filters,
    ) -> Step:
        raw = row.float()
        if not torch.isfinite(raw).all():
            raise ModelBroken(
                f"The model's logits at position {cursor.pos} are not finite; "
                "its weights may be damaged, or the precision too low."
            )
        barred = raw
        if ban or self.vocabulary.size < len(raw):
            barred = raw.clone()
            barred[self.vocabulary.size :] = -torch.inf  # padding rows are no tokens
            barred[list(ban)] = -torch.inf
        return Step(
            pos=cursor.pos,
            raw=raw,
            logits=filters.apply(cursor.ids, barred),
            before=tuple(cursor.ids[-UTF8_MOST:]),
            hidden=hidden,
        )

    def _forward(
        self, cursor: Cursor, ids: Sequence[int], keep: int, taps: Collection[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute `ids` after what is cached; logits (1, keep, vocab), tapped (1, len(ids), d)."""
        first = cursor.cached
        positions = torch.arange(first, first + len(ids), device=self._device)[None]
        inputs = torch.tensor([list(ids)], device=self._device)
        return self._call(cursor.cache, taps, inputs, positions, keep)

    def _forward_batch(
        self, cursors: list[Cursor], taps: Collection[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """One pass for the last token of every cursor; logits (rows, 1, vocab)."""
        for cursor in cursors:
            if cursor.pos - cursor.cached > 1:
                with self._restoring(cursor):
                    self._forward(cursor, cursor.ids[cursor.cached : -1], keep=1)
        cache, mask = padded_batch([cursor.cache for cursor in cursors])
        inputs = torch.tensor([[cursor.ids[-1]] for cursor in cursors], device=self._device)
        positions = torch.tensor([[cursor.pos - 1] for cursor in cursors], device=self._device)
        found = self._call(cache, taps, inputs, positions, 1, mask.to(self._device))
        for index, batch in enumerate(cache.layers):
            for row, cursor in enumerate(cursors):
                cursor.cache.layers[index].update(
                    batch.keys[row : row + 1, :, -1:], batch.values[row : row + 1, :, -1:]
                )
        return found

    def _call(
        self,
        cache: Cache,
        taps: Collection[int],
        inputs: torch.Tensor,
        positions: torch.Tensor,
        keep: int,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        self.poll()
        self.forwards += 1
        self._taps = frozenset(taps)
        try:
            logits = self.model(
                input_ids=inputs,
                position_ids=positions,
                past_key_values=cache,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
            return logits, self._tapped
        finally:
            self._taps, self._tapped = frozenset(), {}

    def _read_chunk(self, cursor: Cursor, ids: list[int], taps: Collection[int]) -> list[Step]:
        self._make_pending(cursor)
        with self._restoring(cursor):
            pending = cursor.ids[cursor.cached :] + ids[:-1]
            rows, hidden = self._forward(cursor, pending, len(ids), taps)
            steps = []
            for back, (id, row) in enumerate(zip(ids, rows[0], strict=True), start=-len(ids)):
                tapped = {layer: h[0, back] for layer, h in hidden.items()}
                steps.append(self._step(cursor, row, tapped, (), PLAIN))
                cursor.ids.append(id)
        return steps

    def _make_pending(self, cursor: Cursor) -> None:
        """A step needs at least one token to compute: the last one again if all are cached."""
        if not cursor.ids:
            raise BadInput("There is nothing to start from: not one token.")
        crop_cache(cursor.cache, cursor.pos - 1)

    @contextmanager
    def _restoring(self, cursor: Cursor) -> Iterator[None]:
        length, cached = cursor.pos, cursor.cached
        try:
            yield
        except BaseException:
            del cursor.ids[length:]
            crop_cache(cursor.cache, cached)
            raise

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise OutOfContext(
                f"The text is too long: it has {tokens:,} tokens, "
                f"and the model's context holds {self.context:,}."
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        for id in ids:
            if not 0 <= id < self.vocabulary.size:
                raise BadInput(
                    f"There is no token {id}: the vocabulary has {self.vocabulary.size}."
                )

    def _install_taps(self) -> None:
        def before_first(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if 0 in self._taps:
                self._tapped[0] = args[0] if args else kwargs["hidden_states"]

        def after(layer: int) -> Callable[..., None]:
            def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
                if layer in self._taps:
                    self._tapped[layer] = output[0] if isinstance(output, tuple) else output

            return keep

        blocks = self._parts.blocks
        blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
        for layer, block in enumerate(blocks, start=1):
            block.register_forward_hook(after(layer))

    def _check(self) -> None:
        """Unembedding the last hidden state must give the model's own logits."""
        probe = [1 % self.vocabulary.size, 2 % self.vocabulary.size]
        step = self.step(self.prefill(probe), taps=(self.layers,))
        again = self.unembed(step.hidden[self.layers])
        off = float((again - step.raw).abs().max())
        # In half precisions the same product of another shape is rounded otherwise.
        close = max(1e-3, 8 * torch.finfo(self.model.dtype).eps)
        if off > close * (1 + float(step.raw.abs().max())):
            raise ModelUnfit(
                f"{self.identity['name']} does not fit: its logits are not the readout of its "
                f"last layer (they differ by {off:.3g})."
            )
        self.forwards = 0


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens of the generation settings, as `transformers.generate` uses them, and of the
    tokenizer."""
    found = {tokenizer.eos_token_id}
    settings = model.generation_config.eos_token_id if model.generation_config else None
    found.update(settings if isinstance(settings, list) else [settings])
    return frozenset(id for id in found if id is not None)
