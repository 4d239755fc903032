"""Where a causal language model keeps its decoder layers, and how wide its output is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["decoder_blocks", "output_size"]


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
