"""The engine: what methods may ask of a model, and the check that the model fits.

`base` knows the model and its text, `writing` moves cursors, `scoring` compares continuations,
`looking` opens the layers. Options belong to the call; nothing of a run stays in the model.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analyzers.card import Need
from analyzers.engine.adapters import FAMILIES
from analyzers.engine.looking import Looking
from analyzers.engine.routing import routable
from analyzers.engine.scoring import Scoring
from analyzers.engine.trees import Tree
from analyzers.engine.values import PLAIN, PLAIN_FILTERS
from analyzers.errors import ModelUnfit

log = logging.getLogger(__name__)

ALWAYS: frozenset[Need] = frozenset(
    {"text", "logits", "top_logprobs", "layers", "fork", "gradients"}
)


class Engine(Scoring, Looking):
    """A loaded model; `can` says what methods may ask of it.

    Raises at making: ModelUnfit, with the reason, when the model does not pass the checks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, identity)
        self.can: frozenset[Need] = ALWAYS
        if not self._recurrent and model._can_set_attn_implementation():
            self.can |= {"attention"}
        if self._masked:
            self.can |= {"tree"}
        if self._parts.routers and routable(model.config):
            self.can |= {"routing"}
        self._check_sizes()
        with torch.inference_mode():
            self._check_readout()
            if "tree" in self.can and model.config.model_type not in FAMILIES:
                self._check_tree()
        self.forwards = 0

    def _check_sizes(self) -> None:
        """A table may be padded; and a tokenizer may have added tokens that a model of this size
        was never given (Gemma 3 has one for images), which then cannot be used."""
        table = self._parts.embeddings.weight.shape[0]
        beyond = set(range(table, self.vocabulary.size))
        if beyond - set(self.tokenizer.added_tokens_decoder):
            raise ModelUnfit(
                f"{self.identity['name']} does not fit its tokenizer: that has "
                f"{self.vocabulary.size:,} tokens, the model's embedding only {table:,}."
            )
        self.vocabulary.size = min(self.vocabulary.size, table)

    def _check_readout(self) -> None:
        """Unembedding the last hidden state must give the model's own logits, and so must the
        step that is written out, or it is not used."""
        cursor = self.prefill([1 % self.vocabulary.size, 2 % self.vocabulary.size])
        taps = range(self.layers + 1)
        step = self._module_step(cursor, (), PLAIN_FILTERS, taps, PLAIN)
        again = self.unembed(step.hidden[self.layers])
        if not self._equal(again, step.raw):
            raise self._unfit("its logits are not the readout of its last layer")
        if self._flat is not None and not self._equal(self.step(cursor).raw, step.raw):
            log.warning("%s is stepped through its modules", self.identity["name"])
            self._flat = None

    def _check_tree(self) -> None:
        """A drafted branch must say what the same text says by itself."""
        ids = [id % self.vocabulary.size for id in (1, 2, 3, 4, 5)]
        checked = self.verify(self.prefill(ids[:2]), Tree((ids[2], ids[3], ids[4]), (-1, -1, 1)))
        alone = self.step(self.prefill([*ids[:2], ids[3], ids[4]]))
        if not self._equal(checked.step(2).raw, alone.raw):
            raise self._unfit("it takes no mask for drafts")

    def _equal(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        off = float((found - expected).abs().max())
        # In half precisions the same product of another shape is rounded otherwise.
        close = max(1e-3, 8 * torch.finfo(self.model.dtype).eps)
        return off <= close * (1 + float(expected.abs().max()))

    def _unfit(self, what: str) -> ModelUnfit:
        return ModelUnfit(f"{self.identity['name']} does not fit the engine: {what}.")
