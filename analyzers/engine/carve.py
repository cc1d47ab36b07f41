"""A mixture of experts carved from a dense model, without training.

Source: Pei et al. 2025, CMoE (arXiv 2502.04416), for shared neurons, balanced clusters of the rest
and a router from statistics; Zhang et al. 2022, MoEfication (arXiv 2110.01786), for clusters of
neurons that fire together.
Idea: a feed-forward block is a sum over its neurons, so it splits without a remainder into a part
that is always used and experts: with all of them on, the mixture is the dense model. The neurons
that contribute most on calibration text are shared, the rest is clustered by what makes them fire,
and the router is a ridge regression that foresees how much each expert will contribute.
Differs from the source: CMoE shares the neurons that are active most often, here it is those that
write most; its router comes from statistics of the activations and can be trained further, ours is
the regression alone. The weights of the chosen experts are nearly equal, because a dense block adds
its neurons unweighted.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from analyzers.engine.builtin import tell
from analyzers.errors import ModelUnfit

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")
CALIBRATION = Path(__file__).with_name("calibration.txt")
HELDOUT = Path(__file__).with_name("heldout.txt")
LENGTH = 128
"""Tokens of a passage that are read."""
SPREAD = 1e-4
"""Factor of the router's weights. The softmax is then 1 / experts to four digits, which makes the
sum exact, and still orders experts in float32 by differences of a thousandth."""
RIDGE = 0.1
"""Of the mean square of an input of the router. From 0.01 to 1 it hardly matters."""
TOGETHER = 8
"""Texts whose perplexity is computed in one pass."""
ROUNDS = 12
"""Of the clustering; the clusters change little after that."""


@dataclass(frozen=True)
class Recipe:
    """experts: how many; shared: neurons that every token uses; active: experts a token uses."""

    experts: int
    shared: int
    active: int


def make(base: Path, made: Path, told: Path, recipe: Recipe) -> None:
    """Carve the model in the folder `base`, and save it with its tokenizer as the folder `made`.

    told: a JSON file that is whole at any time: the `share` of 1 that is done and, at the end, what
    was `found`: the perplexities on `HELDOUT` of the dense model, of the mixture with the active
    experts and with all of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    dense = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    calibration, heldout = passages(CALIBRATION, tokenizer), passages(HELDOUT, tokenizer)
    mixture = carve(dense, calibration, recipe, lambda share: tell(told, 0.6 * share))
    tell(told, 0.6)
    mixture.save_pretrained(made)
    for pattern in TOKENIZER:
        for path in base.glob(pattern):
            shutil.copy(path, made)
    tell(told, 0.65)
    mixture.set_experts_implementation("eager")  # the default one takes half as long again here
    found = {"perplexity_dense": perplexity(dense, heldout)}
    tell(told, 0.75)
    found["perplexity"] = perplexity(mixture, heldout)
    tell(told, 0.85)
    use(mixture, recipe.experts)
    found["perplexity_all"] = perplexity(mixture, heldout)
    tell(told, 1.0, {name: round(value, 4) for name, value in found.items()})


def passages(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Token ids, at most LENGTH of each passage; lines of only "%%" part them."""
    texts = path.read_text(encoding="utf-8").strip().split("\n%%\n")
    return [tokenizer(text, return_tensors="pt")["input_ids"][0, :LENGTH] for text in texts]


@torch.no_grad()
def carve(
    dense: LlamaForCausalLM,
    texts: Sequence[torch.Tensor],
    recipe: Recipe,
    tell: Callable[[float], None] = lambda share: None,
) -> Qwen2MoeForCausalLM:
    """The mixture; `dense` stays as it is and shares its other weights with it.

    texts: token ids (tokens,) to calibrate on. tell(share of 1) comes before every block; what it
    raises ends the work. The same thread count gives the same weights.
    Raises: ModelUnfit where the feed-forward blocks have biases or do not split evenly.
    """
    config = _config(dense, recipe)
    weights = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    states = [dense.model.embed_tokens(ids[None]) for ids in texts]
    turns = [dense.model.rotary_emb(each, torch.arange(each.shape[1])[None]) for each in states]
    for index, block in enumerate(dense.model.layers):
        tell(index / len(dense.model.layers))
        states, inputs, fired = _read(block, states, turns)
        parts = _split(block.mlp, inputs, fired, recipe)
        weights |= {f"model.layers.{index}.mlp.{name}": part for name, part in parts.items()}
    made = Qwen2MoeForCausalLM(config)
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.generation_config = dense.generation_config
    return made.eval()


def _config(dense: LlamaForCausalLM, recipe: Recipe) -> Qwen2MoeConfig:
    given = dense.config
    routed = given.intermediate_size - recipe.shared
    if given.attention_bias or given.mlp_bias or routed < 1 or routed % recipe.experts:
        raise ModelUnfit(
            f"The {given.intermediate_size} neurons of a block cannot be carved into "
            f"{recipe.shared} shared ones and {recipe.experts} equal experts without biases."
        )
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return Qwen2MoeConfig(
        **{name: getattr(given, name) for name in kept},
        qkv_bias=False,
        intermediate_size=given.intermediate_size,
        moe_intermediate_size=routed // recipe.experts,
        shared_expert_intermediate_size=recipe.shared,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.active,
        norm_topk_prob=False,
    )


def _read(
    block: Any, states: Sequence[torch.Tensor], turns: Sequence[Any]
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The states after a block, and what its feed-forward part reads (tokens, d_model) and how
    its neurons fire (tokens, neurons), of all texts one after the other."""
    inputs: list[torch.Tensor] = []
    fired: list[torch.Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0])),
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given: fired.append(given[0][0])),
    ]
    try:
        pairs = zip(states, turns, strict=True)
        after = [block(state, position_embeddings=turn) for state, turn in pairs]
    finally:
        for hook in hooks:
            hook.remove()
    return after, torch.cat(inputs), torch.cat(fired)


def _split(
    mlp: nn.Module, inputs: torch.Tensor, fired: torch.Tensor, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The weights of a sparse block that does what `mlp` does. inputs: (tokens, d_model); fired:
    (tokens, neurons), what the down projection gets."""
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    shared, experts = partition(fired, down, recipe)
    return {
        "gate.weight": SPREAD * router(inputs, contributions(fired, down, experts)),
        "experts.gate_up_proj": torch.cat([gate[experts], up[experts]], dim=1),
        # A weight is 1 / experts, and the shared part's gate with weights of zero is one half.
        "experts.down_proj": recipe.experts * down.T[experts].mT.contiguous(),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        "shared_expert.down_proj.weight": 2 * down[:, shared],
        "shared_expert_gate.weight": torch.zeros_like(gate[:1]),
    }


def partition(
    fired: torch.Tensor, down: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every neuron once: the shared ones (shared,) and those of the experts (experts, size).

    fired: (tokens, neurons); down: (d_model, neurons). Shared are those that write most on the
    mean: mean |activation| x norm of the column."""
    writes = fired.abs().mean(0) * down.norm(dim=0)
    order = writes.argsort(descending=True, stable=True)
    shared, rest = order[: recipe.shared].sort()[0], order[recipe.shared :].sort()[0]
    # By size: of the contributions that are skipped, signed profiles leave a seventh more.
    profiles = F.normalize(fired[:, rest].abs().T, dim=-1)
    return shared, rest[clusters(profiles, recipe.experts)]


def clusters(points: torch.Tensor, groups: int) -> torch.Tensor:
    """Indices (groups, n / groups), ascending in a group: k-means of `points` (n, d) of length 1
    by their cosine, with groups of equal size."""
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:groups]]
    for _ in range(ROUNDS):
        members = _members(points @ centres.T)
        # A product with ones: to gather the members of every centre takes ten times as long.
        owned = torch.zeros(groups, len(points)).scatter_(1, members, 1.0)
        centres = F.normalize(owned @ points, dim=-1)
    return members


def _members(alike: torch.Tensor) -> torch.Tensor:
    """(groups, n / groups) of alike (n, groups): the most alike pair first; who finds a group full
    goes to the next best."""
    groups = alike.shape[1]
    members: list[list[int]] = [[] for _ in range(groups)]
    placed = [False] * len(alike)
    for pair in alike.flatten().argsort(descending=True, stable=True).tolist():
        point, group = divmod(pair, groups)
        if not placed[point] and len(members[group]) < len(alike) // groups:
            placed[point] = True
            members[group].append(point)
    return torch.tensor(members).sort(dim=-1)[0]


def contributions(fired: torch.Tensor, down: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Norm of what each expert (experts, size) adds to the stream, (tokens, experts)."""
    columns = down.T[experts]  # (experts, size, d_model)
    parts = fired[:, experts].transpose(0, 1)  # (experts, tokens, size)
    # |h D|² = h (D Dᵀ) hᵀ: a ninth of the work of the products themselves.
    squares = ((parts @ (columns @ columns.mT)) * parts).sum(-1)
    return squares.clamp(min=0).sqrt().T


def router(inputs: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Weights (experts, d_model) that foresee log(1 + written), (tokens, experts), from inputs
    (tokens, d_model), up to what is common to all experts of a token: only their order counts."""
    worth = written.log1p()
    worth = worth - worth.mean(-1, keepdim=True)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram.double(), (inputs.T @ worth).double()).T.to(inputs.dtype)


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: Sequence[torch.Tensor]) -> float:
    """Of all tokens but the first of each text (tokens,)."""
    losses = []
    for first in range(0, len(texts), TOGETHER):
        # Filled up behind their ends, which no token before them sees.
        ids = pad_sequence(
            list(texts[first : first + TOGETHER]), batch_first=True, padding_value=-1
        )
        logits = model(ids.clamp_min(0)).logits[:, :-1].float()
        expected = ids[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), expected, ignore_index=-1, reduction="none")
        losses.append(each[expected >= 0])
    return math.exp(torch.cat(losses).mean())


def use(mixture: Qwen2MoeForCausalLM, experts: int) -> None:
    """Let every token use so many experts."""
    for block in mixture.model.layers:
        block.mlp.gate.top_k = experts
