"""What a Block Transformer remembers between calls: keys and values of whole blocks, and the block being written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["BlockTransformerCache"]


class BlockTransformerCache(Cache):
    """Cache of ``BlockTransformerForCausalLM``: a position is one block.

    The token decoder's keys and values cover the block that is being written and no more; they are thrown away when it is full.

    Args:
        block_length: Tokens per block.
        fill: Pad tokens in front of the sequence that its owner does not count (``generate`` puts them there).

    Attributes:
        blocks: Keys and values of the block decoder, one position per full block.
        local: Those of the token decoder within the current block.
        tokens: ``(N, p)``, p < B: the current block so far. None before the first call.
        prefixes: ``(N, r, D_t)``: the last full block's state, expanded; None before there is a full block.
        block_mask: ``(N, n)``: false for blocks of padding alone. None: there are none.

    Example:
        >>> BlockTransformerCache(block_length=4).get_seq_length()
        0
    """

    def __init__(self, block_length: int, fill: int = 0) -> None:
        super().__init__(layers=[])
        self.block_length = block_length
        self.reset()
        self.fill = fill

    def reset(self) -> None:
        """Forget everything."""
        self.fill = 0
        self.blocks = DynamicCache()
        self.layers = self.blocks.layers
        self.local = DynamicCache()
        self.tokens: Tensor | None = None
        self.prefixes: Tensor | None = None
        self.block_mask: Tensor | None = None

    @property
    def pending(self) -> int:
        """Tokens of the current block."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    @property
    def length(self) -> int:
        """Tokens, ``fill`` included."""
        return self.blocks.get_seq_length() * self.block_length + self.pending

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the sequence that are cached (not blocks)."""
        return max(self.length - self.fill, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those of the current block included."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._filled(self.blocks, self.local))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens off the current block.

        Raises:
            ValueError: They are not all in the current block; the blocks before cannot be opened again.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self.pending:
            raise ValueError(
                f"crop({tokens_to_remove}): only the {self.pending} tokens of the current block can be taken off (give "
                f"{-self.pending} to 0); full blocks are kept as one position each"
            )
        if count and self.tokens is not None:
            self.tokens = self.tokens[:, :-count]
            for layer in self._filled(self.local):
                layer.keys, layer.values = layer.keys[..., :-count, :], layer.values[..., :-count, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order."""
        self.batch_select_indices(beam_idx)

    @staticmethod
    def _filled(*caches: DynamicCache) -> list[Any]:
        layers: list[Any] = [layer for cache in caches for layer in cache.layers]
        return [layer for layer in layers if layer.is_initialized]

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self._filled(self.blocks, self.local):
            layer.keys, layer.values = change(layer.keys), change(layer.values)
        for name in ("tokens", "prefixes", "block_mask"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))
