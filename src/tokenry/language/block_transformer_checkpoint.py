"""Checkpoints of the authors' Block Transformer code: names and layouts turned into ours, sizes read off the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from tokenry.language.block_transformer import BlockTransformerForCausalLM
from tokenry.language.block_transformer_config import BlockTransformerConfig

__all__ = ["checkpoint_filter_fn", "load_reference_checkpoint"]

NAMES = {  # theirs, ours
    "embedder.embeddings.": "embedder.table.",
    "embedder.projection_layer.": "embedder.mix.",
    "block_decoder.gpt_neox.": "block_decoder.",
    "token_decoder.gpt_neox.": "token_decoder.",
    "token_decoder.embed_out.": "lm_head.",
    "token_decoder.expansion_layer.": "expansion.",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Turn a state dict of the authors' code into this module's; one of this module passes unchanged.

    The block decoder's token table, which nothing reads, is dropped.

    Args:
        state_dict: As their ``model.safetensors`` holds it.
        model: Not needed; for the signature that timm uses.

    Raises:
        ValueError: The tables of the embedder and of the token decoder have different numbers of tokens.

    Example:
        >>> import torch
        >>> list(checkpoint_filter_fn({"token_decoder.embed_out.weight": torch.zeros(2, 3)}))
        ['lm_head.weight']
    """
    found: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        new = next(
            (ours + name.removeprefix(theirs) for theirs, ours in NAMES.items() if name.startswith(theirs)), name
        )
        if new == "block_decoder.embed_in.weight" or new.endswith((".attention.bias", ".masked_bias", ".inv_freq")):
            continue
        if new == "expansion.weight" and value.ndim == 3:
            value = value.squeeze(-1)
        elif new == "embedder.mix.weight" and value.ndim == 3:
            value = value.transpose(1, 2).flatten(1)  # (D, E, B) of a convolution -> (D, B * E)
        found[new] = value
    sizes = [
        found[name].shape[0] for name in ("embedder.table.weight", "token_decoder.embed_in.weight") if name in found
    ]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the embedder has {sizes[0]} tokens and the token decoder {sizes[1]}: both need one vocabulary"
        )
    return found


def load_reference_checkpoint(path: str | Path, **settings: Any) -> BlockTransformerForCausalLM:
    """A model from a checkpoint of the authors' code.

    Sizes are read off the weights; the number of heads is not written there and follows the paper's rule.

    Args:
        path: ``model.safetensors``, or the folder that holds it.
        **settings: Of ``BlockTransformerConfig``, where they differ: ``num_attention_heads``, ``token_strategy``, ...

    Raises:
        ValueError: There is no such file, or it is not a Block Transformer.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}; give a model.safetensors of the authors' code or its folder")
    weights = checkpoint_filter_fn(load_file(file))
    needed = ("embedder.table.weight", "expansion.weight", "token_decoder.embed_in.weight", "lm_head.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{file} is not a Block Transformer: it lacks {', '.join(missing)}")
    width, token_width = weights["expansion.weight"].shape[1], weights["token_decoder.embed_in.weight"].shape[1]
    table, mix = weights["embedder.table.weight"], weights.get("embedder.mix.weight")

    def layers(decoder: str) -> int:
        return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(f"{decoder}.layers."))

    read: dict[str, Any] = {
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "token_hidden_size": token_width,
        "block_layers": layers("block_decoder"),
        "token_layers": layers("token_decoder"),
        "prefix_length": weights["expansion.weight"].shape[0] // token_width,
        "block_length": (width if mix is None else mix.shape[1]) // table.shape[1],
        "embedding_size": None if mix is None else table.shape[1],
    }
    wrong = [
        f"{name}={settings[name]} (the weights have {read[name]})"
        for name in read
        if settings.get(name, read[name]) != read[name]
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: sizes are fixed by the checkpoint; leave them out")
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**(read | settings)))
    model.load_state_dict(weights)
    return model.eval()
