"""What the engine gives and takes: places in texts, distributions, and the options of a call."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from analyzers.engine.cache import Past, StatePast
from analyzers.engine.filters import Filters
from analyzers.engine.routing import Policy
from analyzers.engine.text import UTF8_MOST
from analyzers.errors import ModelBroken

if TYPE_CHECKING:
    from analyzers.engine.trees import Checked

PLAIN_FILTERS = Filters()
SubLayer = tuple[int, Literal["attention", "feed_forward"]]
Experts = tuple[tuple[int, ...], tuple[float, ...]]  # which experts, and with which weights


@dataclass(frozen=True)
class Options:
    """What one call changes about the model. Keys and values stay in the cache as they were
    computed: use a cursor of its own for each set of options, or rewind before changing them.

    upto: run only the first so many blocks, then norm and head (early exit). skip: sub-layers
    (layer, "attention" or "feed_forward") whose output counts as zero; layers count from 1.
    policy: how routers choose experts, one for all rows or one a row of the batch. adapter: name of
    a LoRA adapter that `Engine.add_adapter` gave. experts: also return which experts were used.
    """

    upto: int | None = None
    skip: frozenset[SubLayer] = frozenset()
    policy: Policy | tuple[Policy, ...] | None = None
    adapter: str | None = None
    experts: bool = False

    def of_row(self, row: int) -> "Options":
        """Those of one row of a batch by itself."""
        if isinstance(self.policy, tuple):
            return replace(self, policy=self.policy[row])
        return self


PLAIN = Options()


class Cursor:
    """A place in a text. `ids` are committed; those before `cached` are computed.

    checked: the tree that `verify` computed behind the committed tokens, until something else is
    done with the cursor."""

    def __init__(self, ids: list[int], past: Past | StatePast) -> None:
        self.ids = ids
        self.past = past
        self.checked: Checked | None = None

    @property
    def pos(self) -> int:
        """Where the next token will stand; counts prompt tokens."""
        return len(self.ids)

    @property
    def cached(self) -> int:
        """Committed tokens that every layer has computed."""
        return min(self.past.length(), self.pos)


@dataclass(frozen=True, eq=False)
class Step:
    """The distribution of the token at `pos`.

    raw: the model's own logits, (vocab,), float32. logits: after ban and filters, (vocab,), -inf
    where excluded. hidden: layer -> (d_model,) for the tapped layers; 0 = embeddings, l = output
    of block l, before the final norm. before: the last few ids in front of `pos`, enough to know
    whether a character is unfinished there. experts: layer -> experts of that block's router and
    their weights, where asked for; router_entropy: layer -> how undecided that router was, nats,
    with them.
    """

    pos: int
    raw: torch.Tensor
    logits: torch.Tensor
    before: tuple[int, ...]
    hidden: Mapping[int, torch.Tensor]
    experts: Mapping[int, Experts] = field(default_factory=dict)
    exits: Mapping[int, torch.Tensor] = field(default_factory=dict)
    router_entropy: Mapping[int, float] = field(default_factory=dict)


def step_after(
    ids: list[int],
    row: torch.Tensor,
    vocabulary: int,
    hidden: Mapping[int, torch.Tensor],
    ban: Collection[int] = (),
    filters: Filters = PLAIN_FILTERS,
    experts: Mapping[int, Experts] | None = None,
    router_entropy: Mapping[int, float] | None = None,
) -> Step:
    """The Step behind `ids` from the model's logits (vocab or more,) in its own precision.

    Raises: ModelBroken when they are not finite."""
    raw = row.float()
    if not torch.isfinite(raw).all():
        raise ModelBroken(
            f"The model's logits at position {len(ids)} are not finite; "
            "its weights may be damaged, or the precision too low."
        )
    barred = raw
    if ban or vocabulary < len(raw):
        barred = raw.clone()
        barred[vocabulary:] = -torch.inf  # padding rows are no tokens
        barred[list(ban)] = -torch.inf
    return Step(
        pos=len(ids),
        raw=raw,
        logits=filters.apply(ids, barred),
        before=tuple(ids[-UTF8_MOST:]),
        hidden=hidden,
        experts=experts or {},
        router_entropy=router_entropy or {},
    )
