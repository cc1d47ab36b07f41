"""Sampling filters: transformers' own logits processors, in the order in which it applies them."""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass(frozen=True)
class Filters:
    """Neutral values switch a filter off: temperature 1, top_k 0, top_p 1, min_p 0, typical_p 1,
    repetition_penalty 1. At temperature 0 (greedy) only the repetition penalty applies, as in
    transformers' greedy decoding."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    def processors(self) -> LogitsProcessorList:
        """To be called with ids (1, length), prompt included, and float32 scores (1, vocab)."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0.0:
            return found
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0.0:
            found.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            found.append(TypicalLogitsWarper(self.typical_p))
        return found

    def apply(self, ids: list[int], raw: torch.Tensor) -> torch.Tensor:
        """Processed logits (vocab,) from raw ones (vocab,); `raw` is left as it is."""
        processors = self.processors()
        if not processors:
            return raw
        context = torch.tensor([ids], device=raw.device)
        return processors(context, raw[None])[0]
