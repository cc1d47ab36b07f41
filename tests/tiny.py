"""Tiny seeded models and a byte tokenizer: no download, made in milliseconds, never modified."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from analyzers.engine import Engine
from analyzers.engine.text import _BYTES

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for turn in messages %}<|user|>{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 512
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
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "gpt_neox")


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


def model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Random weights, large enough that the distributions are far from flat and greedy text does
    not repeat one token."""
    torch.manual_seed(seed)
    made = _build(family).eval()
    embedding = made.get_input_embeddings().weight
    with torch.no_grad():
        for weight in made.parameters():
            if weight is embedding:  # in most families the head as well
                weight.mul_(4.0 if family == "gemma3" else 16.0)
            elif weight.dim() > 1:
                weight.mul_(20.0)
    made.generation_config.pad_token_id = 256
    return made


def _build(family: str) -> PreTrainedModel:
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True))
    if family == "gemma3":
        sliding = {"sliding_window": 8, "head_dim": 8, "final_logit_softcapping": 20.0}
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GROUPED, **sliding))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64))


def engine(family: str = "llama", seed: int = 0) -> Engine:
    identity = {"name": f"tiny-{family}", "hash": str(seed), "quantization": "none"}
    return Engine(
        model(family, seed), tokenizer(), {**identity, "dtype": "float32", "device": "cpu"}
    )
