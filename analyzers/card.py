"""What a method says of itself: title, family, source, inputs, needs, and the events it emits."""

from dataclasses import dataclass
from typing import Literal

from analyzers.trace import Event

Family = Literal[
    "decoding", "inspection", "contrast", "drafting", "search", "judging", "training"
]  # fmt: skip
Need = Literal[
    "text", "logits", "top_logprobs", "layers", "routing", "tree", "gradients", "attention", "fork"
]


@dataclass(frozen=True)
class Card:
    """title: for the page. source: paper and reference. takes: named inputs beside the prompt.
    needs: what the method asks of an engine, in the words of `Engine.can`. starts_as: the kind of
    prompt it is usually given; both always work. example: a prompt that shows what it does, where
    the tab's own first prompt does not."""

    title: str
    family: Family
    source: str
    emits: tuple[type[Event], ...]
    needs: tuple[Need, ...] = ("logits",)
    takes: tuple[str, ...] = ()
    starts_as: Literal["chat", "raw"] = "chat"
    example: str = ""
