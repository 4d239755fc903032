"""Where a causal language model keeps its decoder layers, how wide its output is, and where its positions end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["attention_is_exchanged", "check_positions", "decoder_blocks", "learned_positions", "output_size"]


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, bottom first.

    It is the one ``nn.ModuleList`` with ``num_hidden_layers`` entries, under whatever name (``model.layers``,
    ``transformer.h``, ``decoder.layers`` ...).

    Raises:
        ValueError: The model is an encoder-decoder, or holds no such stack.

    Example:
        >>> from tokenry.assets import load_model
        >>> len(decoder_blocks(load_model("draft")[0]))
        3
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; a decoder-only causal language model is needed"
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise ValueError(f"{type(model).__name__} holds no list of {layers} decoder layers")


def output_size(model: PreTrainedModel) -> int:
    """Width of the model's logits."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else model.config.get_text_config(decoder=True).vocab_size


def attention_is_exchanged(model: PreTrainedModel) -> bool:
    """Whether a context that is still open (sparse reading of the cache) has put its own attention in the model's place."""
    return (model.config._attn_implementation or "").startswith("tokenry_")


def learned_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has a learned embedding for; None where positions are computed, for any length.

    Example:
        >>> from transformers import GPT2Config, LlamaConfig
        >>> learned_positions(GPT2Config(n_positions=64)), learned_positions(LlamaConfig())
        (64, None)
    """
    config = config.get_text_config(decoder=True)
    computed = getattr(config, "rope_parameters", None) is not None
    return None if computed else getattr(config, "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, prompt: int, new_tokens: int) -> None:
    """Refuse a text that is longer than a model's learned table of positions.

    Args:
        model: Causal language model.
        prompt: Tokens of the longest prompt, padding apart.
        new_tokens: Tokens that may follow it; the last of them is never run.

    Raises:
        ValueError: Says how far the text may reach, and how far the table does.
    """
    positions, longest = learned_positions(model.config), prompt + new_tokens - 1
    if positions is not None and longest > positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones take {longest} positions, {type(model).__name__} has "
            f"{positions}; shorten the prompt or lower max_new_tokens"
        )
