"""Which tokens of a map belong to a window, to its cells, and to its surroundings.

    along an axis      window [start, stop)  ->  cells, of which maxima are taken;  ->  [start - before, stop + after)
    on the map         a window sees the product of its spans along both axes, cut off where the map ends

Positions are worked out from sizes alone, as plain lists: the map is then read by ``index_select``, never padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cell_positions", "even_lists", "pool_cells", "widen", "window_bounds", "window_keys"]


def window_bounds(size: int, window: int) -> list[tuple[int, int]]:
    """First and past-the-last position of the windows along an axis: ceil(size / window) of them, as equal as may be.

    Example:
        >>> window_bounds(14, 7), window_bounds(9, 7)
        ([(0, 7), (7, 14)], [(0, 4), (4, 9)])
    """
    count = -(-size // window)
    return [(i * size // count, (i + 1) * size // count) for i in range(count)]


def even_lists(cells: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Positions from the first to the last of every cell, all lists of one length (the last one repeated).

    Example:
        >>> even_lists([(0, 2), (2, 3)])
        [[0, 1, 2], [2, 3, 3]]
    """
    length = max(last - first for first, last in cells) + 1
    return [[min(first + i, last) for i in range(length)] for first, last in cells]


def cell_positions(size: int, window: int, samples: int) -> list[list[int]]:
    """Positions along an axis that each sample is the maximum of, as ``even_lists``.

    Example:
        >>> cell_positions(7, 7, 3)
        [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    """
    cells = []
    for start, stop in window_bounds(size, window):
        for i in range(samples):
            first, last = i * (stop - start) // samples, -(-(i + 1) * (stop - start) // samples) - 1
            cells.append((start + first, start + last))
    return even_lists(cells)


def pool_cells(x: Tensor, rows: list[list[int]], columns: list[list[int]]) -> Tensor:
    """Maxima of cells that are given along both axes: (B, H, W, C) -> (B, rows, columns, C)."""
    for axis, cells in ((1, rows), (2, columns)):
        index = torch.tensor(cells, device=x.device)
        x = x.index_select(axis, index.flatten()).unflatten(axis, tuple(index.shape)).amax(axis + 1)
    return x


def widen(bounds: Sequence[tuple[int, int]], before: int, after: int) -> list[tuple[int, int]]:
    """Windows along an axis with their surroundings, which end where the map does.

    Example:
        >>> widen([(0, 7), (7, 14)], 3, 3)
        [(0, 10), (4, 14)]
    """
    return [(max(start - before, 0), min(stop + after, bounds[-1][1])) for start, stop in bounds]


def key_positions(spans: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[bool]]]:
    """Positions along an axis that every span holds, lists of one length, and which of them do belong to it.

    Example:
        >>> key_positions([(0, 3), (2, 4)])
        ([[0, 1, 2], [1, 2, 3]], [[True, True, True], [False, True, True]])
    """
    length = max(stop - start for start, stop in spans)
    firsts = [min(start, spans[-1][1] - length) for start, _ in spans]
    positions = [[first + i for i in range(length)] for first in firsts]
    belongs = [[start <= place < stop for place in row] for row, (start, stop) in zip(positions, spans, strict=True)]
    return positions, belongs


def window_keys(
    rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The tokens that windows see, from their spans along both axes.

    Returns:
        Per window, numbers in row-major order (windows, K) of the tokens, and which of them count (windows, K); None: all.
    """
    (down, real_rows), (right, real_columns) = key_positions(rows), key_positions(columns)
    lines, places = torch.tensor(down, device=device), torch.tensor(right, device=device)
    index = lines[:, None, :, None] * columns[-1][1] + places[None, :, None, :]  # (rows of windows, columns, kh, kw)
    if all(map(all, real_rows)) and all(map(all, real_columns)):
        return index.flatten(2).flatten(0, 1), None
    real = [torch.tensor(found, device=device) for found in (real_rows, real_columns)]
    mask = real[0][:, None, :, None] & real[1][None, :, None, :]
    return index.flatten(2).flatten(0, 1), mask.flatten(2).flatten(0, 1)
