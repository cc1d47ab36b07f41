"""A loaded model with its tokenizer: what it is, its text, and the passes through it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from analyzers.engine import lora
from analyzers.engine.adapters import parts
from analyzers.engine.cache import GrowingLayer, Past, Spare, StatePast
from analyzers.engine.flat import Flat
from analyzers.engine.masks import Mask
from analyzers.engine.passes import Pass, Passes
from analyzers.engine.routing import experts_in, experts_used_in
from analyzers.engine.text import Vocabulary, encodable
from analyzers.engine.values import PLAIN, Cursor, Options
from analyzers.errors import BadInput, ModelBroken, ModelLacks, OutOfContext
from analyzers.task import Task

if TYPE_CHECKING:
    from analyzers.engine.cost import Cost


class Base:
    """`identity` names the model, `context` is its window in tokens, `layers` counts its blocks,
    `experts` those that each router chooses from and `experts_used` those that it takes (0 for a
    dense model).

    `poll` is called before every pass and may raise Stopped; `progress(done, total)` hears of long
    prefills. Both belong to the caller that drives the run. `cost`: what passes cost on this
    machine, once that has been measured.
    """

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
        self.poll: Callable[[], None] = lambda: None
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.cost: Cost | None = None
        self._device = model.device
        self._ends = _end_ids(model, tokenizer)
        self._parts = parts(model)
        self.experts = experts_in(model.config) if self._parts.routers else 0
        self.experts_used = experts_used_in(model.config) if self._parts.routers else 0
        self._passes = Passes(model, self._parts)
        self._flat = Flat.of(model, self._parts)
        self._spare = Spare()
        self._adapters: dict[str, lora.Adapter] = {}
        self._recurrent = _has_state(self._library_cache())
        # Whether masks of ours serve: trees, batches of different lengths, parts of the layers.
        self._masked = self._parts.tree and not self._recurrent

    @property
    def forwards(self) -> int:
        """Passes so far."""
        return self._passes.count

    @forwards.setter
    def forwards(self, count: int) -> None:
        self._passes.count = count

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
            ids = self.tokens(self._templated(task))
        return [*ids, *(token.id for token in task.written)]

    def tokens(self, text: str, after: str = "") -> list[int]:
        """Token ids of `text` without special tokens around it.

        after: what stands before it. Where the two would merge into other tokens at the seam, the
        ids are those of `text` alone."""
        if after:
            both, first = self.tokens(after + text), self.tokens(after)
            if both[: len(first)] == first:
                return both[len(first) :]
        ids: list[int] = self.tokenizer(encodable(text), add_special_tokens=False)["input_ids"]
        return ids

    def _templated(self, task: Task) -> str:
        if not self.can_chat:
            raise BadInput(
                "This model has no chat template: choose raw text instead of a conversation."
            )
        try:
            turns = self.tokenizer.apply_chat_template(
                list(task.prompt), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise BadInput(
                f"This model's chat template does not take the conversation: {error}."
            ) from error
        return str(turns) + task.prefix

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

    def add_adapter(self, folder: str) -> str:
        """Read a LoRA adapter in PEFT's format; the name is for `Options.adapter`.

        Changes nothing by itself. Raises: ModelNotFound, ModelBroken, ModelUnfit."""
        adapter = lora.read_adapter(folder, self.model)
        self._adapters[folder] = adapter
        lora.wrap(self.model, adapter, lambda: self._passes.adapter)
        return folder

    # Passes

    def _pass(self, options: Options, taps: Collection[int] = (), **more: Any) -> Pass | None:
        """None when nothing is changed or tapped: then the model runs as it is."""
        self._check_taps(taps)
        if options == PLAIN and not taps and not more:
            return None
        if options.upto is not None and not 1 <= options.upto <= self.layers:
            raise BadInput(f"Cannot stop after layer {options.upto} of {self.layers}.")
        for layer, _ in options.skip:
            if not 1 <= layer <= self.layers:
                raise BadInput(f"Cannot skip layer {layer}: the model has 1 to {self.layers}.")
        if (options.policy or options.experts) and not self._parts.routers:
            raise ModelLacks(f"Routing needs experts, {self.identity['name']} has none.")
        if options.adapter is not None and options.adapter not in self._adapters:
            raise BadInput(f"There is no adapter {options.adapter!r}: add it first.")
        adapter = self._adapters[options.adapter] if options.adapter is not None else None
        return Pass(self.layers, options, taps, adapter=adapter, **more)

    def _run(
        self,
        this: Pass | None,
        cache: Cache | None,
        rows: Sequence[Sequence[int]],
        at: Sequence[Sequence[int]],
        keep: int | None,
        mask: Mask | None = None,
    ) -> torch.Tensor:
        """One pass over token ids at the given positions, both (rows, tokens)."""
        self.poll()
        ids = torch.tensor(rows, device=self._device)
        positions = torch.tensor(at, device=self._device)
        return self._passes.run(this, cache, positions, ids=ids, mask=mask, keep=keep)

    def _new_past(self) -> Past | StatePast:
        if self._recurrent:
            return StatePast(self._library_cache)
        return Past(GrowingLayer(self._spare) for _ in range(self.layers))

    def _library_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    @contextmanager
    def _restoring(self, *cursors: Cursor) -> Iterator[None]:
        """On an error or a stop the cursors are as they were."""
        before = [(c, c.pos, c.past.length(), c.checked) for c in cursors]
        try:
            yield
        except BaseException:
            for cursor, length, rows, checked in before:
                del cursor.ids[length:]
                # Going on from a tree may have dropped its rows.
                cursor.past.crop_to(rows, failed=True)
                cursor.checked = checked if cursor.past.length() == rows else None
            raise

    # Checks of what is asked

    def _check_taps(self, taps: Collection[int]) -> None:
        for layer in taps:
            if not 0 <= layer <= self.layers:
                raise BadInput(f"There is no layer {layer}: the model has {self.layers}.")

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

    def _where_broken(self, ids: Sequence[int], before: Pass | None) -> ModelBroken:
        """The error for logits that are not finite, with the layer where that began."""
        options = before.options.of_row(0) if before else PLAIN
        this = self._pass(options, range(self.layers + 1))
        assert this is not None  # it has taps
        self._run(this, None, [ids], [range(len(ids))], keep=1)
        bad = [layer for layer, states in this.hidden.items() if not states.isfinite().all()]
        place = f"layer {min(bad)} of {self.layers}" if bad else "the head"
        return ModelBroken(
            f"The model's numbers stop being finite in {place}, before position {len(ids)}; "
            "its weights may be damaged, or the precision too low."
        )


def _has_state(cache: Cache) -> bool:
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens of the generation settings, as `transformers.generate` uses them, and of the
    tokenizer."""
    found = {tokenizer.eos_token_id}
    settings = model.generation_config.eos_token_id if model.generation_config else None
    found.update(settings if isinstance(settings, list) else [settings])
    return frozenset(id for id in found if id is not None)
