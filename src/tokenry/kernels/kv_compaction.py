"""Move the accepted tokens of a draft to the front of the key/value cache.

    slab[..., to[b, j], :] = slab[..., from[b, j], :]      for every layer, for keys and values, in one go

A slab holds the keys and values of all layers of equal shape: ``(S, B, H, capacity, D)``.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["compact_path", "compact_rows"]


def compact_path(slab: Tensor, start: int, path: Tensor) -> None:
    """Every row keeps the same nodes: position ``start + path[j]`` moves to ``start + j``, in place.

    Args:
        slab: ``(S, B, H, capacity, D)``.
        start: First position of the draft.
        path: ``(A,)`` increasing node indices.

    Example:
        >>> import torch
        >>> slab = torch.arange(6.0).view(1, 1, 1, 6, 1)
        >>> compact_path(slab, 2, torch.tensor([0, 2]))
        >>> slab.flatten().tolist()
        [0.0, 1.0, 2.0, 4.0, 4.0, 5.0]
    """
    slab.narrow(-2, start, path.shape[0]).copy_(slab.index_select(-2, path + start))  # index_select copies first


def compact_rows(slab: Tensor, source: Tensor, target: Tensor) -> None:
    """Each row moves its own positions, in place.

    Args:
        slab: ``(S, B, H, capacity, D)``.
        source: ``(B, A)`` positions to read.
        target: ``(B, A)`` positions to write, distinct within a row.

    Example:
        >>> import torch
        >>> slab = torch.arange(8.0).view(1, 2, 1, 4, 1)
        >>> compact_rows(slab, torch.tensor([[3], [2]]), torch.tensor([[0], [1]]))
        >>> slab.flatten().tolist()
        [3.0, 1.0, 2.0, 3.0, 4.0, 6.0, 6.0, 7.0]
    """
    shape = (slab.shape[0], -1, slab.shape[2], -1, slab.shape[4])
    taken = slab.gather(-2, source[None, :, None, :, None].expand(shape))  # a copy: source and target may overlap
    slab.scatter_(-2, target[None, :, None, :, None].expand(shape), taken)
