"""Which experts a mixture of experts asks: the model's own choice, or another one, row by row.

Source: Shi et al., SCMoE, NeurIPS 2024 (arXiv 2405.14507), for top-k, rank-k and one given expert;
Huang et al. 2024 (arXiv 2403.07652), for the dynamic choice. Each row having a policy of its own
is ours, and so is that random experts depend on seed, layer and position alone: a text is routed
the same whether it is read at once, in chunks, in a batch or token by token. Every supported
router returns (router_logits (N, E), weights (N, k), experts (N, k)) for N = batch x tokens rows,
sequence after sequence, and the experts' code accepts any k. Shared experts lie outside of the
router and stay active under every policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from analyzers.errors import BadParameter, ModelLacks

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Kind = Literal["default", "top", "rank", "fixed", "dynamic", "random"]
# Family -> how its router scores experts. The weights of the chosen sum to 1 (before any factor)
# unless the family says `norm_topk_prob=False`; GraniteMoE and GPT-OSS take the softmax over the
# chosen logits, which is the same as dividing the softmax over all by the sum of the chosen.
SCORES: dict[str, Literal["softmax", "sigmoid"]] = {
    "mixtral": "softmax",
    "qwen2_moe": "softmax",
    "qwen3_moe": "softmax",
    "qwen3_next": "softmax",
    "olmoe": "softmax",
    "flex_olmo": "softmax",
    "granitemoe": "softmax",
    "gpt_oss": "softmax",
    "deepseek_v3": "sigmoid",
    "glm4_moe": "sigmoid",
}


@dataclass(frozen=True)
class Policy:
    """How a row chooses. Made by the functions below.

    default: as the model does. top: the `k` best. rank: only the `k`-th best, 1 = best. fixed:
    these `experts`. dynamic: from the best on, until their share of all scores exceeds `threshold`.
    random: `k` different ones, drawn anew by `seed` in every layer at every position.
    renormalise: whether the weights of the chosen sum to 1; None = as the family does.
    """

    kind: Kind = "default"
    k: int = 1
    experts: tuple[int, ...] = ()
    threshold: float = 0.0
    renormalise: bool | None = None
    seed: int = 0

    def check(self, experts: int) -> None:
        """Raises: BadParameter when a model with this many experts cannot follow the policy."""
        if self.kind in ("top", "rank", "random") and not 1 <= self.k <= experts:
            raise BadParameter(
                f"Routing {self.kind}-{self.k} is not possible: the model has {experts} experts."
            )
        if self.kind == "dynamic" and not 0 <= self.threshold < 1:
            raise BadParameter(
                f"The routing threshold {self.threshold:g} must be at least 0 and less than 1."
            )
        if self.kind == "fixed":
            given = set(self.experts)
            if not given or not given <= set(range(experts)) or len(given) < len(self.experts):
                raise BadParameter(
                    f"The experts {list(self.experts)} must be different numbers "
                    f"from 0 to {experts - 1}."
                )


DEFAULT = Policy()


def top(k: int, renormalise: bool | None = None) -> Policy:
    return Policy("top", k=k, renormalise=renormalise)


def rank(k: int, renormalise: bool | None = None) -> Policy:
    return Policy("rank", k=k, renormalise=renormalise)


def fixed(experts: Sequence[int], renormalise: bool | None = None) -> Policy:
    return Policy("fixed", experts=tuple(experts), renormalise=renormalise)


def dynamic(threshold: float, renormalise: bool | None = None) -> Policy:
    return Policy("dynamic", threshold=threshold, renormalise=renormalise)


def random(k: int, seed: int, renormalise: bool | None = None) -> Policy:
    return Policy("random", k=k, seed=seed, renormalise=renormalise)


def routable(config: PreTrainedConfig) -> bool:
    """Whether `reroute` knows how this family scores its experts."""
    return config.model_type in SCORES


def experts_in(config: PreTrainedConfig) -> int:
    """How many experts each router chooses from; 0 for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(count) for name in names if (count := getattr(config, name, None))), 0)


def experts_used_in(config: PreTrainedConfig) -> int:
    """How many experts each router takes by itself; 0 for a dense model."""
    return int(getattr(config, "num_experts_per_tok", None) or 0)


def reroute(
    router: nn.Module,
    config: PreTrainedConfig,
    output: Output,
    policies: Sequence[Policy],
    *,
    layer: int = 0,
    positions: torch.Tensor | None = None,
) -> Output:
    """What `router` would have returned if its rows followed `policies`.

    One policy a row, or one a sequence (the N rows are then divided evenly). Rows under the
    default keep their numbers bit for bit. When rows choose different numbers of experts, the
    shorter ones are filled up with their first expert at weight 0. layer, positions (N values in
    any shape; default 0 to N - 1): what random experts are drawn by.
    Raises: ModelLacks for a family that is not `routable`; BadParameter as `Policy.check`.
    """
    if all(policy.kind == "default" for policy in policies):
        return output
    if not routable(config):
        raise ModelLacks(f"How {config.model_type!r} weighs its experts is not known here.")
    rule = _Rule.of(router, config)
    logits, weights, experts = output
    distinct = list(dict.fromkeys(policies))
    which = torch.tensor([distinct.index(policy) for policy in policies])
    which = which.repeat_interleave(len(logits) // len(policies))
    at = torch.arange(len(logits)) if positions is None else positions.flatten().cpu()
    found = []
    for index, policy in enumerate(distinct):
        rows = (which == index).nonzero()[:, 0].to(logits.device)
        if policy.kind == "default":
            found.append((rows, weights[rows], experts[rows]))
        else:
            policy.check(logits.shape[-1])
            places = [(layer, pos) for pos in at[rows.cpu()].tolist()]
            found.append((rows, *rule.choose(logits[rows].float(), policy, places)))
    widest = max(ids.shape[-1] for _, _, ids in found)
    new_weights = weights.new_zeros(len(logits), widest)
    new_experts = experts.new_zeros(len(logits), widest)
    for rows, row_weights, ids in found:
        new_experts[rows] = ids[:, :1].expand(-1, widest)
        new_experts[rows, : ids.shape[-1]] = ids
        new_weights[rows, : ids.shape[-1]] = row_weights.to(weights.dtype)
    return logits, new_weights, new_experts


def chosen(output: Output) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights, each (N, k), as the router said; `experts_of_row` reads one."""
    _, weights, experts = output
    return experts, weights


def entropy(config: PreTrainedConfig, output: Output) -> torch.Tensor:
    """How undecided the router was, (N,), nats: of its scores over all experts, made to sum to 1;
    0 = sure of one, ln E = all equal. The same under every policy."""
    logits = output[0].float()
    sigmoid = SCORES.get(config.model_type) == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    return torch.special.entr(scores / scores.sum(-1, keepdim=True)).sum(-1)


def experts_of_row(
    experts: torch.Tensor, weights: torch.Tensor
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """One row (k,) of `chosen`, largest weight first, without the filling of `reroute`."""
    found: dict[int, float] = {}
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        found.setdefault(expert, weight)
    best = sorted(found, key=found.__getitem__, reverse=True)
    return tuple(best), tuple(found[expert] for expert in best)


@dataclass(frozen=True)
class _Rule:
    """How one router scores, orders and weighs its experts.

    factor: of all weights. correction, groups, best_groups: DeepSeek-V3 and GLM-4 add the
    correction (E,) to choose, not to weigh, and take experts from the best groups only; a group
    counts as much as its two best experts.
    """

    sigmoid: bool
    renormalise: bool
    factor: float = 1.0
    correction: torch.Tensor | None = None
    groups: int = 1
    best_groups: int = 1

    @classmethod
    def of(cls, router: nn.Module, config: PreTrainedConfig) -> "_Rule":
        renormalise = getattr(config, "norm_topk_prob", True)
        if SCORES[config.model_type] == "softmax":
            return cls(sigmoid=False, renormalise=renormalise)
        return cls(
            sigmoid=True,
            renormalise=renormalise,
            factor=config.routed_scaling_factor,
            correction=router.get_buffer("e_score_correction_bias"),
            groups=config.n_group,
            best_groups=config.topk_group,
        )

    def choose(
        self, logits: torch.Tensor, policy: Policy, places: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts, each (rows, k), of rows with these logits (rows, E), float32.
        places: (layer, position) of each row."""
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        order = self._order(scores if self.sigmoid else logits)  # a softmax may vanish
        keep = torch.ones_like(order, dtype=torch.bool)
        if policy.kind == "rank":
            order = order[:, policy.k - 1 : policy.k]
        elif policy.kind == "top":
            order = order[:, : policy.k]
        elif policy.kind == "fixed":
            order = order.new_tensor(policy.experts).expand(len(logits), -1)
        elif policy.kind == "random":
            experts = range(logits.shape[-1])
            drawn = [
                Random(repr((policy.seed, *place))).sample(experts, policy.k) for place in places
            ]
            order = order.new_tensor(drawn)
        else:
            share = (scores / scores.sum(-1, keepdim=True)).gather(1, order)
            keep = share.cumsum(-1) - share <= policy.threshold
            order = order[:, : int(keep.sum(-1).max())]
        keep = keep[:, : order.shape[-1]]
        weights = self._weights(logits.gather(1, order), scores.gather(1, order), keep, policy)
        return weights, torch.where(keep, order, order[:, :1])

    def _order(self, scores: torch.Tensor) -> torch.Tensor:
        """Experts from best to worst, (rows, E). With groups, experts outside of the best groups
        come after all inside, so that every rank exists."""
        if self.correction is None:
            return scores.argsort(dim=-1, descending=True)
        corrected = scores + self.correction
        order = corrected.argsort(dim=-1, descending=True)
        groups = corrected.view(len(scores), self.groups, -1)
        best = groups.topk(2, dim=-1)[0].sum(-1).topk(self.best_groups, dim=-1)[1]
        outside = torch.ones_like(groups[..., 0]).scatter(1, best, 0.0)
        outside = outside[..., None].expand_as(groups).reshape_as(corrected).gather(1, order)
        return order.gather(1, outside.sort(dim=-1, stable=True)[1])

    def _weights(
        self, logits: torch.Tensor, scores: torch.Tensor, keep: torch.Tensor, policy: Policy
    ) -> torch.Tensor:
        """Weights (rows, k) of experts with these logits and scores, 0 where not `keep`."""
        renormalise = self.renormalise if policy.renormalise is None else policy.renormalise
        if not renormalise:
            weights = scores * keep
        elif self.sigmoid:
            weights = scores * keep / (scores * keep).sum(-1, keepdim=True)
        else:
            # From the logits: the probability of a late rank may vanish, the quotient be 0 / 0.
            weights = logits.masked_fill(~keep, -torch.inf).softmax(-1)
        return weights * self.factor
