"""Tiny seeded models and a byte tokenizer: no download, made in milliseconds, never modified."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from analyzers.engine import Engine
from analyzers.engine.adapters import attention_implementation
from analyzers.engine.cost import Cost
from analyzers.engine.quantization import quantize
from analyzers.engine.text import _BYTES

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for turn in messages %}<|user|>{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 512
COST = Cost(10.0, ((1, 1.0), (16, 1.5), (64, 3.0)), 1000.0, 1)
"""What passes could cost: drafts pay."""
SIZES = {
    "vocab_size": 256 + len(SPECIAL) + 2,  # two padding rows that are no tokens
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 64}
WINDOW = 8
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ROUTED = {**GROUPED, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16}
# Family -> what its configuration has besides SIZES. Multipliers, scales and caps are away from
# 1, so that code that forgets one of them fails.
_DENSE: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, **SLIDING, **TYPES, "head_dim": 8},
    "gemma2": {
        **GROUPED,
        **TYPES,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 10.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3": {
        **GROUPED,
        **TYPES,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 1,
        "final_logit_softcapping": 20.0,
    },
    "phi3": {**GROUPED, "sliding_window": WINDOW},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64},
    "olmo2": GROUPED,
    "falcon": {"ffn_hidden_size": 64, "alibi": False},
    "stablelm": {**GROUPED, "use_parallel_residual": True, "use_qkv_bias": True},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "cohere2": {**GROUPED, **TYPES, "sliding_window": WINDOW, "logit_scale": 0.25},
}
_MOE: dict[str, dict[str, Any]] = {
    "mixtral": {**ROUTED, "num_local_experts": 4},
    "qwen2_moe": {**ROUTED, **SMALL, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**ROUTED, **SMALL, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {**ROUTED, "num_experts": 8},
    "granitemoe": {
        **ROUTED,
        "num_local_experts": 4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "gpt_oss": {
        **ROUTED,
        **TYPES,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "deepseek_v3": {
        **ROUTED,
        **SMALL,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    },
}
# Not in the table of adapters: these are found by their structure.
_UNLISTED: dict[str, dict[str, Any]] = {
    "starcoder2": {**GROUPED, "sliding_window": WINDOW},
    "olmo3": {**GROUPED, **TYPES, "sliding_window": WINDOW},
    "bloom": {},
    "lfm2": {**GROUPED, "block_ff_dim": 64, "layer_types": ["conv", "full_attention", "conv"]},
    "flex_olmo": {**ROUTED, "num_experts": 8},
    "glm4_moe": {
        **ROUTED,
        **SMALL,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "head_dim": 8,
    },
    "qwen3_next": {
        **ROUTED,
        **SMALL,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
# Of those, the ones with keys and values for every token, and no distances of their own.
ATTENTIVE = ("starcoder2", "olmo3", "flex_olmo", "glm4_moe")
DENSE, MOE, UNLISTED = tuple(_DENSE), tuple(_MOE), tuple(_UNLISTED)
FAMILIES = DENSE + MOE
# One for each way in which int8 weights get into a model: a tied head, a head with a cap, Conv1D,
# a Linear of the family's own, biases, a shared expert with a gate, transposed experts, and
# compressed attention. That all of FAMILIES compute with them is tested in test_quantization.py.
INT8 = ("qwen2", "gemma2", "gpt2", "falcon", "opt", "qwen2_moe", "gpt_oss", "deepseek_v3")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    fast = Tokenizer(BPE(vocab=dict(_BYTES), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = TEMPLATE
    return made


# Gemma multiplies its embeddings by sqrt(d_model): larger ones would drown the blocks, and every
# token would predict itself.
_EMBEDDINGS = {"gemma2": 2.0, "gemma3": 2.0}
# Makes up for small embeddings or for logits that the family divides.
_LAST_NORM = {"gemma2": 8.0, "gemma3": 8.0, "cohere2": 4.0, "granitemoe": 4.0}


def model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Random weights, large enough that the distributions are far from flat and greedy text does
    not repeat one token. `changes` are laid over the family's configuration."""
    torch.manual_seed(seed)
    made = _build(family, changes).eval()
    embedding = made.get_input_embeddings().weight
    with torch.no_grad():
        for weight in made.parameters():
            if weight is embedding:  # in most families the head as well
                weight.mul_(_EMBEDDINGS.get(family, 16.0))
            elif weight.dim() > 1:
                weight.mul_(20.0)
        if gain := _LAST_NORM.get(family):
            made.model.norm.weight.add_(gain - 1)  # Gemma stores a gain of 1 as 0
        for name, bias in made.named_buffers():
            if name.endswith("e_score_correction_bias"):  # zero would hide that it only chooses
                bias.normal_(std=0.3)
    made.generation_config.pad_token_id = 256
    return made


def _build(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    name = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(name, **SIZES | (_DENSE | _MOE | _UNLISTED)[family] | changes)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_implementation(config)
    )


def engine(family: str = "llama", seed: int = 0, int8: bool = False) -> Engine:
    made = model(family, seed)
    if int8:
        quantize(made)
    identity = {"name": f"tiny-{family}", "hash": str(seed), "dtype": "float32", "device": "cpu"}
    quantization = "int8" if int8 else "none"
    return Engine(made, tokenizer(), {**identity, "quantization": quantization})
