"""Orders in which the tokens of a map become sequences, and the way back.

Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv:2401.10166 (cross scan, cross merge).

    scan:  x (B, C, H, W) -> s (B, K, C, H W),   s[:, k, :, t] = x[:, :, perm_k[t]]
    merge: s (B, K, C, H W) -> y (B, C, H W),    y[:, :, perm_k[t]] = sum_k s[:, k, :, t]

Merge is the adjoint of scan: <scan(x), s> = <x, merge(s)>. Every order is a permutation perm_k of the H W positions,
counted row by row. The named ones are

    row, column                     line by line, along the rows or along the columns
    row_reversed, column_reversed   the same from the last position to the first
    serpentine                      along the rows, every second row backwards, so that neighbours stay neighbours
    serpentine_reversed
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BIDIRECTIONAL", "CAUSAL", "CROSS", "cross_merge", "cross_scan", "scan_order"]

CAUSAL: tuple[str, ...] = ("row",)
BIDIRECTIONAL: tuple[str, ...] = ("row", "row_reversed")
CROSS: tuple[str, ...] = ("row", "column", "row_reversed", "column_reversed")

_BACKWARDS = "_reversed"
_LINES = ("row", "column", "serpentine")


def scan_order(name: str, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The permutation of a named order: entry t is the position, counted row by row, that is visited at step t.

    Args:
        name: ``"row"``, ``"column"`` or ``"serpentine"``, perhaps followed by ``"_reversed"``.
        height: Rows of the map.
        width: Columns of the map.
        device: Where the result lies.

    Returns:
        (height * width,), integers.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> scan_order("serpentine", 2, 3).tolist()
        [0, 1, 2, 5, 4, 3]
    """
    line = name.removesuffix(_BACKWARDS)
    if line not in _LINES:
        raise ValueError(
            f"an order must be one of {', '.join(_LINES)}, perhaps with {_BACKWARDS!r} behind; got {name!r}"
        )
    places = torch.arange(height * width, device=device).view(height, width)
    if line == "column":
        places = places.T
    elif line == "serpentine":
        odd = torch.arange(height, device=device).unsqueeze(1) % 2 == 1
        places = torch.where(odd, places.flip(1), places)
    order = places.flatten()
    return order.flip(0) if name != line else order


def _permutations(orders: Sequence[str] | Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """(K, H W) of names or of a tensor."""
    if not isinstance(orders, Tensor):
        return torch.stack([scan_order(name, height, width, device) for name in orders])
    if orders.ndim != 2 or orders.shape[1] != height * width:
        raise ValueError(
            f"orders must be (K, {height * width}) for a map of {height}x{width}, got {tuple(orders.shape)}; make them for "
            "this size"
        )
    return orders.to(device)


def cross_scan(x: Tensor, orders: Sequence[str] | Tensor = CROSS) -> Tensor:
    """Lay a map out as sequences, one per order.

    Args:
        x: (B, C, H, W).
        orders: Names of orders (see ``scan_order``), or permutations (K, H W). Default: rows, columns and both reversed.

    Returns:
        (B, K, C, H W).

    Raises:
        ValueError: An unknown name, or permutations for another size.

    Example:
        >>> cross_scan(torch.tensor([[[[1, 2], [3, 4]]]])).tolist()
        [[[[1, 2, 3, 4]], [[1, 3, 2, 4]], [[4, 3, 2, 1]], [[4, 2, 3, 1]]]]
    """
    if x.ndim != 4:
        raise ValueError(f"expected a map (B, C, H, W), got {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if isinstance(orders, Tensor):
        order = _permutations(orders, height, width, x.device)
        return x.flatten(2)[:, :, order].transpose(1, 2)  # (B, C, K, L) -> (B, K, C, L)
    return torch.stack([_visit(x, name) for name in orders], dim=1)


def _visit(x: Tensor, name: str) -> Tensor:
    """(B, C, H, W) -> (B, C, H W)."""
    line = name.removesuffix(_BACKWARDS)
    if line == "row":
        sequence = x.flatten(2)
    elif line == "column":
        sequence = x.transpose(2, 3).flatten(2)
    else:
        return x.flatten(2)[:, :, scan_order(name, x.shape[2], x.shape[3], x.device)]
    return sequence.flip(-1) if name != line else sequence


def cross_merge(sequences: Tensor, height: int, width: int, orders: Sequence[str] | Tensor = CROSS) -> Tensor:
    """Put every sequence's tokens back in their places and add the sequences up.

    Args:
        sequences: (B, K, C, H W), one sequence per order.
        height: Rows of the map.
        width: Columns of the map.
        orders: What ``cross_scan`` was given.

    Returns:
        (B, C, H W), positions counted row by row.

    Raises:
        ValueError: Sequences of another number or length than the orders and the map have.

    Example:
        >>> x = torch.randn(1, 2, 3, 5)
        >>> torch.allclose(cross_merge(cross_scan(x), 3, 5), 4 * x.flatten(2))
        True
    """
    if sequences.ndim != 4 or sequences.shape[1] != len(orders) or sequences.shape[-1] != height * width:
        raise ValueError(
            f"expected sequences (B, {len(orders)}, C, {height * width}) for {len(orders)} orders of a map of "
            f"{height}x{width}, got {tuple(sequences.shape)}"
        )
    if isinstance(orders, Tensor):
        back = _permutations(orders, height, width, sequences.device).argsort(dim=-1)  # (K, L)
        index = back[None, :, None, :].expand_as(sequences)
        return sequences.gather(-1, index).sum(1)
    total = _back(sequences[:, 0], height, width, orders[0])
    for k, name in enumerate(orders[1:], start=1):
        total = total + _back(sequences[:, k], height, width, name)
    return total


def _back(sequence: Tensor, height: int, width: int, name: str) -> Tensor:
    """(B, C, H W) in an order -> (B, C, H W) row by row."""
    line = name.removesuffix(_BACKWARDS)
    if line not in ("row", "column"):
        return sequence[:, :, scan_order(name, height, width, sequence.device).argsort()]
    if name != line:
        sequence = sequence.flip(-1)
    return sequence.unflatten(-1, (width, height)).transpose(2, 3).flatten(2) if line == "column" else sequence
