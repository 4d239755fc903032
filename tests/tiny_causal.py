"""Tiny random language models of several architectures, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 97
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LONG = {"max_position_embeddings": 512}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, **_LONG, **_ENDS, intermediate_size=48, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(**_ENDS, vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, **_LONG, **_ENDS, intermediate_size=48),
    "opt": lambda: OPTConfig(**_SIZES, **_LONG, **_ENDS, ffn_dim=48, word_embed_proj_dim=32),
    "qwen3": lambda: Qwen3Config(
        **_SIZES, **_LONG, **_ENDS, intermediate_size=48, num_key_value_heads=1, head_dim=16
    ),
    "gemma2": lambda: Gemma2Config(
        **_SIZES, **_LONG, **_ENDS, intermediate_size=48, num_key_value_heads=2, head_dim=16, sliding_window=16
    ),
}  # fmt: skip


def tiny_causal(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of two layers; weights are scaled up so that attention is far from uniform."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    if attention == "sdpa" and not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        attention = "eager"  # Gemma 2 caps its attention scores, which newer releases do in eager attention alone
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data.mul_(6.0)
    model.generation_config.min_new_tokens = None
    return model.to(dtype)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
