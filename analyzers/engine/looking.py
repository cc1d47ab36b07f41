"""Looking inside: readouts, parts of the layers, attention, sentence vectors, gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from analyzers.engine.cache import GrowingLayer, Past
from analyzers.engine.masks import masks
from analyzers.engine.passes import Pass
from analyzers.engine.values import PLAIN, Cursor, Options
from analyzers.engine.writing import SOFTMAX_ROWS, Writing
from analyzers.errors import BadInput, ModelBroken, ModelLacks


@dataclass(frozen=True, eq=False)
class Gradients:
    """value: of the objective. inputs: the token embeddings (tokens, d_model). gradient: of the
    objective with respect to them, same shape; both float32."""

    value: float
    inputs: torch.Tensor
    gradient: torch.Tensor


class Looking(Writing):
    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab) in float32 that hidden states (..., d_model) would have as the last
        ones: final norm, head, and the family's scale and soft-cap. Exactly the model's own logits
        for its last layer. Rows of several tokens and layers cost least in one call."""
        return self._parts.readout(hidden.to(self.model.dtype)).float()

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
        found = torch.empty(len(texts), self.model.config.hidden_size, device=self._device)
        for row, text in enumerate(texts):
            ids = self.tokens(text)
            if not ids:
                raise BadInput("An empty text has no sentence vector.")
            self._check_room(len(ids))
            states = self._run(None, None, [ids], [range(len(ids))], None)
            found[row] = self._finite(states[0].float().mean(0), ids)
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

    # Inside

    def _finite(self, found: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        if not found.isfinite().all():
            raise self._where_broken(ids, None)
        return found

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
