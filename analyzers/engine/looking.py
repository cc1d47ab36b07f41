"""Looking inside: readouts, parts of the layers, attention, sentence vectors, gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from analyzers.engine.cache import GrowingLayer, Past
from analyzers.engine.masks import masks
from analyzers.engine.passes import Pass
from analyzers.engine.values import PLAIN, Cursor, Options
from analyzers.engine.writing import SOFTMAX_ROWS, Writing
from analyzers.errors import BadInput, ModelBroken, ModelLacks

TEXTS_AT_ONCE = 16
"""Texts whose sentence vectors are made in one pass."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """value: of the objective. inputs: the token embeddings (tokens, d_model). gradient: of the
    objective with respect to them, same shape; both float32."""

    value: float
    inputs: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True, eq=False)
class Readings:
    """What layers would have written, in nats; all (tokens, layers), float32 but ids and ranks.

    top_ids, top_logprobs: the likeliest tokens, likeliest first, (tokens, layers, k). logprobs,
    ranks (1 = likeliest): of the token that was written. entropies: higher = less sure.
    divergences: KL(last layer || layer), 0 = the layer says what the last one says."""

    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    entropies: torch.Tensor
    divergences: torch.Tensor


class Looking(Writing):
    def unembed(self, hidden: torch.Tensor, *, norm: bool = True) -> torch.Tensor:
        """Logits (..., vocab) in float32 that hidden states (..., d_model) would have as the last
        ones: final norm, head, and the family's scale and soft-cap. Exactly the model's own logits
        for its last layer. norm: whether the final norm comes before the head. Rows of several
        tokens and layers cost least in one call."""
        parts = self._parts if norm else replace(self._parts, norm=nn.Identity())
        return parts.readout(hidden.to(self.model.dtype)).float()

    def top_tokens(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens of many hidden states (rows, d_model) and their log-probabilities
        (nats, over the whole vocabulary), each (rows, k), likeliest first.

        The states of several tokens and layers go through the head in one product; the softmax
        runs over a few rows at a time, because large temporaries are what costs."""
        size = self.vocabulary.size
        logits = self._parts.readout(hidden.to(self.model.dtype))
        found = []
        for some in logits.split(SOFTMAX_ROWS):
            logprobs = torch.log_softmax(some.float(), dim=-1)
            best, ids = logprobs[:, :size].topk(k)
            found.append((ids, best))
        return torch.cat([ids for ids, _ in found]), torch.cat([best for _, best in found])

    def read_layers(self, hidden: torch.Tensor, ids: Sequence[int], k: int) -> Readings:
        """Read hidden states (tokens, layers, d_model) as if each were the last one; `ids` are the
        tokens that were written there, one a token of `hidden`.

        The last row of each token must be the model's last layer: its reading is the model's own
        distribution, and the others are measured against it. Costs as `top_tokens` does.
        Raises: BadInput for ids outside the vocabulary; ModelBroken when a reading is not finite.
        """
        self._check_ids(ids)
        size = self.vocabulary.size
        logits = self._parts.readout(hidden.to(self.model.dtype))
        # Two buffers for all rows: new temporaries of this size are what takes the time.
        shape = min(SOFTMAX_ROWS, hidden.shape[1]), logits.shape[-1]
        values, logs = (torch.empty(shape, device=logits.device) for _ in range(2))
        top, numbers = [], []
        for id, rows in zip(ids, logits, strict=True):
            last = rows[-1].float().log_softmax(-1)
            p = last.exp()
            for some in rows.split(SOFTMAX_ROWS):
                value, logprobs = values[: len(some)], logs[: len(some)]
                torch.log_softmax(value.copy_(some), -1, out=logprobs)
                written = logprobs[:, id].clone()
                entropies = -torch.linalg.vecdot(torch.exp(logprobs, out=value), logprobs)
                ranks = torch.gt(logprobs, written[:, None], out=value).sum(-1) + 1
                divergences = p.dot(last) - logprobs @ p
                top.append(logprobs[:, :size].topk(min(k, size)))
                numbers.append(torch.stack([written, ranks, entropies, divergences]))
        found = torch.cat(numbers, dim=1).unflatten(1, hidden.shape[:2])
        if not found.isfinite().all():
            raise ModelBroken(
                "What a layer would have written is not finite; "
                "its weights may be damaged, or the precision too low."
            )
        return Readings(
            top_ids=torch.cat([best.indices for best in top]).unflatten(0, hidden.shape[:2]),
            top_logprobs=torch.cat([best.values for best in top]).unflatten(0, hidden.shape[:2]),
            logprobs=found[0],
            ranks=found[1].long(),
            entropies=found[2].clamp_min(0),
            divergences=found[3].clamp_min(0),
        )

    def embeddings(self, ids: Sequence[int]) -> torch.Tensor:
        """Word embeddings (tokens, d_model) as the embedding module gives them: what `forward`
        takes for layer 0. Positions and multipliers that the model adds later are not in them."""
        self._check_ids(ids)
        found: torch.Tensor = self._parts.embeddings(torch.tensor(list(ids), device=self._device))
        return found

    def forward(
        self,
        hidden: torch.Tensor,
        layers: tuple[int, int],
        *,
        cursor: Cursor | None = None,
        positions: Sequence[int] | None = None,
        mask: torch.Tensor | None = None,
        options: Options = PLAIN,
    ) -> torch.Tensor:
        """Run given states (tokens, d_model) from the output of block layers[0] to that of block
        layers[1]; returns (tokens, d_model), before the final norm. (0, 2) runs blocks 1 and 2 on
        word embeddings, (2, L) the rest.

        cursor: these layers see its cached rows and append theirs; layers may run ahead of others
        (an early exit), and a rewind cuts each to its length. A verified tree behind the cursor is
        forgotten. positions: default: after what the layers have cached. mask: (tokens, cached +
        tokens) bool, default causal; sliding windows narrow it, and take a cached row's position
        to be its number.
        Raises: BadInput for layers the model does not have; OutOfContext; ModelLacks for recurrent
        models and ALiBi. On an error or a stop the cursor is as it was.
        """
        self._need_masks("ranges of layers")
        first, last = layers
        if not 0 <= first < last <= self.layers:
            raise BadInput(f"There are no layers {first} to {last}: the model has {self.layers}.")
        new, done, cache = len(hidden), 0, None
        cached: list[GrowingLayer] = []
        if cursor is not None and isinstance(cursor.past, Past):
            self._settle(cursor)
            cache = cursor.past
            attending = [i for i in range(first, last) if (i + 1, "attention") not in options.skip]
            done = cache.length(attending)
            cached = [cache.layers[index] for index in attending]
        at = list(range(done, done + new)) if positions is None else list(positions)
        self._check_room(max(at, default=0) + 1)
        columns = torch.arange(done + new, device=self._device)
        rows = columns[done:]
        allow = columns[None] <= rows[:, None] if mask is None else mask.to(self._device)
        where = torch.tensor([at], device=self._device)
        keys_at = torch.cat([columns[None, :done], where], dim=1)
        additive = masks(self._parts, allow[None], where, keys_at, self.model.dtype)
        states = hidden[None].to(self.model.dtype)
        given = states if first else None
        this = self._pass(options, (last,), first=first, last=last, given=given)
        assert this is not None  # it has a tap
        self.poll()
        try:
            for layer in cached:  # one that ran ahead of the others in this range starts over
                layer.length = done
            self._passes.run(this, cache, where, embeddings=states, mask=additive)
        except BaseException:
            for layer in cached:
                layer.length = done
            raise
        return this.hidden[last][0]

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Sentence vectors (texts, d_model), float32, of length 1: the mean over the tokens of the
        model's last normed states. Their dot products are cosines.

        Raises: BadInput for an empty text; OutOfContext; ModelBroken."""
        rows = [self.tokens(text) for text in texts]
        if not all(rows):
            raise BadInput("An empty text has no sentence vector.")
        found = torch.empty(len(texts), self.model.config.hidden_size, device=self._device)
        for first in range(0, len(rows), TEXTS_AT_ONCE):
            some = rows[first : first + TEXTS_AT_ONCE]
            longest = max(map(len, some))
            self._check_room(longest)
            # What stands behind a text is not seen by it, so anything fills the shorter ones up.
            filled = [ids + ids[-1:] * (longest - len(ids)) for ids in some]
            states = self._run(None, None, filled, [range(longest)] * len(some), None)
            for row, ids in enumerate(some):
                mean = states[row, : len(ids)].float().mean(0)
                found[first + row] = self._finite(mean, ids)
        return torch.nn.functional.normalize(found, dim=-1)

    def attention(self, cursor: Cursor, pos: int) -> torch.Tensor:
        """How the committed token at `pos` attends: (layers, heads, pos + 1), float32, each row
        sums to 1 (less where the family has attention sinks). Recomputed; the cursor stays.

        Raises: ModelLacks for models without such weights, as recurrent ones; BadInput when nothing
        stands at `pos`; ModelBroken."""
        self._need_rows("attention over the text")
        if not 0 <= pos < cursor.pos:
            raise BadInput(f"No token stands at position {pos}: the text has {cursor.pos}.")
        aside = self.fork(cursor, pos + 1)
        self._compute(aside, pos, PLAIN)
        this = Pass(self.layers, weights=True)
        with self._eager():
            self._run(this, aside.past.cache, [cursor.ids[pos : pos + 1]], [[pos]], 1)
        found = [weights for weights in this.attention.values() if weights is not None]
        if len(found) < self.layers:
            raise ModelLacks(f"{self.identity['name']} does not give its attention weights.")
        rows = torch.stack([weights[0, :, -1].float() for weights in found])
        return self._finite(rows, cursor.ids[: pos + 1])

    def gradients(
        self,
        ids: Sequence[int],
        objective: Callable[[torch.Tensor], torch.Tensor],
        *,
        inputs: torch.Tensor | None = None,
    ) -> Gradients:
        """How a number that depends on the logits moves with the token embeddings.

        objective: from logits (tokens, vocab), float32, to a scalar. inputs: embeddings to use
        instead of those of `ids` (a point on the path of integrated gradients). Does its own
        prefill, without a cache, also in inference mode. Nothing is left in the parameters.
        Raises: ModelLacks where the weights cannot be differentiated; ModelBroken; OutOfContext;
        BadInput for no ids, or one outside the vocabulary.
        """
        if not ids:
            raise BadInput("There is nothing to differentiate: not one token.")
        self._check_ids(ids)
        self._check_room(len(ids))
        self._check_differentiable()
        self.poll()
        with torch.inference_mode(False), torch.enable_grad():
            start = self.embeddings(ids) if inputs is None else inputs
            given = start.detach().clone().to(self.model.dtype).requires_grad_(True)
            where = torch.arange(len(ids), device=self._device)[None]
            try:
                logits = self._passes.run(None, None, where, embeddings=given[None], keep=0)
            except (NotImplementedError, RuntimeError) as error:
                raise self._no_gradients(error) from error
            value = objective(self._finite(logits[0].float(), ids))  # its errors are its own
            try:
                (gradient,) = torch.autograd.grad(value, given)
            except (NotImplementedError, RuntimeError) as error:
                raise self._no_gradients(error) from error
        if not gradient.isfinite().all():
            raise ModelBroken("The gradients are not finite; the precision may be too low.")
        return Gradients(float(value.detach()), given.detach().float(), gradient.float())

    def logits_of(self, inputs: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Logits (rows, keep, vocab), float32, of the last `keep` tokens of texts that are given as
        word embeddings (rows, tokens, d_model), without a cache. Under `differentiable` they can be
        differentiated with respect to the embeddings.

        Raises: OutOfContext; ModelBroken."""
        rows, tokens, _ = inputs.shape
        self._check_room(tokens)
        self.poll()
        where = torch.arange(tokens, device=self._device).expand(rows, -1)
        given = inputs.to(self.model.dtype)
        logits = self._passes.run(None, None, where, embeddings=given, keep=keep).float()
        if not logits.isfinite().all():
            raise ModelBroken("The logits are not finite; the precision may be too low.")
        return logits

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """What is computed inside can be differentiated, also by a run in inference mode; never
        around a yield of a method.

        Raises: ModelLacks where the weights cannot be differentiated."""
        self._check_differentiable()
        with torch.inference_mode(False), torch.enable_grad():
            try:
                yield
            except (NotImplementedError, RuntimeError) as error:
                raise self._no_gradients(error) from error

    # Inside

    def _finite(self, found: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        if not found.isfinite().all():
            raise self._where_broken(ids, None)
        return found

    def _check_differentiable(self) -> None:
        kind = self.identity.get("quantization")
        if kind in ("nf4", "fp4") and self._device.type == "cpu":
            # bitsandbytes 0.50 loses them in its product there, with no more than a warning.
            raise self._no_gradients(NotImplementedError(f"{kind} on a CPU"))

    def _no_gradients(self, error: Exception) -> ModelLacks:
        return ModelLacks(f"{self.identity['name']} has no gradients in this precision ({error}).")

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """The plain implementation of attention for one pass: the only one that gives weights."""
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")
            yield
        finally:
            self.model.set_attn_implementation(before)
