"""Uptraining: begin a Block Transformer with the weights of an ordinary GPT-NeoX model.

Ho et al., arXiv:2406.02657, section on uptraining. Of L layers, the lower ones become the block decoder, the upper ones the
token decoder:

    e_i    = mean_j E(x_ij)                    the vanilla table, and a block matrix that begins as the mean
    p_ik   = h_i,  k = 1 ... r                 the expansion begins as r copies
    E, final norm and head of the token decoder: the vanilla model's

The result predicts badly until it has been trained on; the paper gives it a tenth of the steps of a full training.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPTNeoXForCausalLM

from tokenry.language.block_transformer import BlockTransformerForCausalLM
from tokenry.language.block_transformer_config import BlockTransformerConfig

__all__ = ["block_transformer_from"]


def block_transformer_from(
    vanilla: GPTNeoXForCausalLM, *, block_length: int = 4, prefix_length: int = 2, block_layers: int | None = None
) -> BlockTransformerForCausalLM:
    """A Block Transformer that begins with a copy of a trained model's weights.

    Args:
        vanilla: GPT-NeoX (Pythia), whose layers are of the same kind.
        block_length: Tokens per block. Default 4 (paper).
        prefix_length: Copies of a block's state that the token decoder reads. Default 2 (paper).
        block_layers: How many of its layers, from below, become the block decoder. None: half (paper).

    Raises:
        ValueError: Another architecture, or layers that cannot be divided as asked.

    Example:
        >>> from transformers import GPTNeoXConfig
        >>> sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = block_transformer_from(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, **sizes)))
        >>> model.config.block_layers, model.config.token_layers
        (1, 1)
    """
    if not isinstance(vanilla, GPTNeoXForCausalLM):
        raise ValueError(
            f"uptraining splits the layers of a GPT-NeoX model (Pythia), got {type(vanilla).__name__}; a Block "
            "Transformer has no other layers"
        )
    given = vanilla.config
    layers = given.num_hidden_layers
    lower = layers // 2 if block_layers is None else block_layers
    if not 0 < lower < layers:
        raise ValueError(f"block_layers={lower}: of {layers} layers, 1 to {layers - 1} can be the block decoder's")
    if given.intermediate_size != 4 * given.hidden_size or not given.attention_bias:
        raise ValueError(
            f"intermediate_size={given.intermediate_size}, attention_bias={given.attention_bias}: a Block Transformer's "
            f"layers have 4 x hidden_size = {4 * given.hidden_size} and biases, as Pythia's have"
        )
    rope: Any = given.rope_parameters
    end = given.eos_token_id[0] if isinstance(given.eos_token_id, list) else given.eos_token_id
    config = BlockTransformerConfig(
        vocab_size=given.vocab_size,
        block_length=block_length,
        hidden_size=given.hidden_size,
        embedding_size=given.hidden_size,
        block_layers=lower,
        token_layers=layers - lower,
        prefix_length=prefix_length,
        num_attention_heads=given.num_attention_heads,
        token_attention_heads=given.num_attention_heads,
        rotary_pct=rope.get("partial_rotary_factor", 1.0),
        rope_theta=rope["rope_theta"],
        use_parallel_residual=given.use_parallel_residual,
        hidden_act=given.hidden_act,
        layer_norm_eps=given.layer_norm_eps,
        max_position_embeddings=given.max_position_embeddings,
        initializer_range=given.initializer_range,
        attention_dropout=given.attention_dropout,
        hidden_dropout=given.hidden_dropout,
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        pad_token_id=given.pad_token_id if given.pad_token_id is not None else end,
    )
    model: Any = BlockTransformerForCausalLM(config)
    model.to(vanilla.device, vanilla.dtype)
    source = vanilla.gpt_neox
    with torch.no_grad():
        model.embedder.table.load_state_dict(source.embed_in.state_dict())
        copies = torch.eye(given.hidden_size)
        model.embedder.mix.weight.copy_(copies.repeat(1, block_length) / block_length)
        model.expansion.weight.copy_(copies.repeat(prefix_length, 1))
        for layer, old in zip([*model.block_decoder.layers, *model.token_decoder.layers], source.layers, strict=True):
            layer.load_state_dict(old.state_dict())
        model.token_decoder.embed_in.load_state_dict(source.embed_in.state_dict())
        model.token_decoder.final_layer_norm.load_state_dict(source.final_layer_norm.state_dict())
        model.lm_head.load_state_dict(vanilla.get_output_embeddings().state_dict())
    return model.train(vanilla.training)
