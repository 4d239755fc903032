"""Additive attention masks for a draft tree behind a cache.

    mask[b, 0, i, j] = 0      if j is a valid cached position of row b, or a node on the path from the root to i
                     = min    otherwise                                       (min: the dtype's lowest number)

An additive mask means the same to the ``sdpa`` and the ``eager`` attention of transformers; a boolean one would be
added as 1 and 0 by the latter.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TreeMask", "tree_mask"]


def tree_mask(ancestor: Tensor, cached: Tensor, start: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The mask from its definition, for rows that hold different numbers of tokens.

    Args:
        ancestor: ``(T, T)`` bool.
        cached: ``(B,)`` end of each row's valid cached positions.
        start: ``(B,)`` their beginning (positions before are left padding).
        length: Cached positions physically there, L.
        dtype: Floating dtype of the model.

    Returns:
        ``(B, 1, T, L + T)``.

    Example:
        >>> ancestor = torch.tensor([[True, False], [True, True]])
        >>> (tree_mask(ancestor, torch.tensor([2]), torch.tensor([1]), 3, torch.float32) == 0).int()[0, 0].tolist()
        [[0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]
    """
    size = ancestor.shape[0]
    at = torch.arange(length, device=ancestor.device)
    past = (at < cached[:, None]) & (at >= start[:, None])  # (B, L)
    may = torch.cat([past[:, None].expand(-1, size, -1), ancestor.expand(past.shape[0], -1, -1)], -1)  # (B, T, L+T)
    mask = torch.full(may.shape, torch.finfo(dtype).min, dtype=dtype, device=ancestor.device)
    return mask.masked_fill_(may, 0.0)[:, None]


class TreeMask:
    """The mask of one tree for a cache that grows without holes: a slice of a buffer that is made once.

    Args:
        ancestor: ``(T, T)`` bool.
        dtype: Floating dtype of the model.

    Example:
        >>> mask = TreeMask(torch.tensor([[True, False], [True, True]]), torch.float32)
        >>> (mask(1) == 0).int()[0, 0].tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, ancestor: Tensor, dtype: torch.dtype) -> None:
        size = ancestor.shape[0]
        self.size, self.room = size, 0
        tail = torch.full((size, size), torch.finfo(dtype).min, dtype=dtype, device=ancestor.device)
        self.tail = tail.masked_fill_(ancestor, 0.0)
        self.buffer = self.tail  # (T, room + T)

    def __call__(self, length: int) -> Tensor:
        """Mask ``(1, 1, T, length + T)`` for ``length`` cached positions, all valid."""
        if length > self.room:
            self.room = max(256, 2 * length)
            self.buffer = torch.cat([self.tail.new_zeros(self.size, self.room), self.tail], -1)
        mask = self.buffer[None, None, :, self.room - length :]
        # CUDA's memory-efficient kernel wants rows that begin at aligned addresses, which a slice does not promise.
        return mask.contiguous() if mask.is_cuda else mask
