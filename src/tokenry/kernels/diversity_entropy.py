"""Diversity entropy of many sequences at once, at one scale or at several.

How evenly the angles between neighbouring pieces of a sequence are spread. With orbits of s values,

    o_i = (y_i, ..., y_{i+s-1})                  i = 1 ... n-s+1
    c_i = cos(o_i, o_{i+1})                      i = 1 ... n-s
    P_k = share of the c_i in the k-th of ε equal bins of [-1, 1]
    DE  = -(1 / ln ε) Σ_k P_k ln P_k             in [0, 1]

(Wang, Si and Li 2020, IEEE Transactions on Cybernetics). Scale τ takes the sliding mean of τ neighbours first.
Only n-s bins can be filled however large ε is, so the histogram is never built: the bin numbers of each row are
sorted, and a run of c equal numbers among N contributes c (ln N - ln c). All rows of all scales go through one sort.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["diversity_entropy", "multiscale_diversity_entropy"]

SMALLEST_NORM = 1e-8
OUTSIDE = -1
NO_PAIR = 2.0  # in place of a cosine where no pair of orbits is


def _neighbour_cosines(y: Tensor, embed_size: int, out: Tensor) -> None:
    """Cosines of neighbouring orbits: (..., n) -> ``out`` (..., n - embed_size)."""
    pairs = y.shape[-1] - embed_size
    square, product = y * y, y[..., :-1] * y[..., 1:]
    # Sums of embed_size neighbours as shifted slices: for an orbit of three or four values no unfold is needed.
    norm = square[..., : pairs + 1].clone()  # (..., n - embed_size + 1)
    out.copy_(product[..., :pairs])
    for shift in range(1, embed_size):
        out += product[..., shift : shift + pairs]
        norm += square[..., shift : shift + pairs + 1]
    norm.sqrt_().clamp_(min=SMALLEST_NORM)
    out /= norm[..., :-1] * norm[..., 1:]


def _bin_numbers(cosine: Tensor, bins: Tensor) -> Tensor:
    """Bin of every cosine, int32; ``OUTSIDE`` where there is none (``NO_PAIR``).

    A cosine that rounding lifted above 1 counts as 1. Whether that happens depends on the processor (some square roots
    are off by one unit in the last place), so dropping it, as a histogram over [-1, 1] does, would make scores depend on
    the machine.
    """
    bins = bins.unsqueeze(-1)
    number = ((cosine.clamp(min=-1) + 1) / 2 * bins).minimum(bins - 0.5).to(torch.int32)  # right edge: the last bin
    return number.masked_fill_(cosine == NO_PAIR, OUTSIDE)


def _sorted(numbers: Tensor) -> Tensor:
    # On the CPU NumPy's vectorised sort takes about a thirtieth of the time of torch's for short integer rows.
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.sort(numbers.numpy(), axis=-1))
    return numbers.sort(dim=-1).values


def _entropy_of_numbers(numbers: Tensor, bins: Tensor) -> Tensor:
    """Normalised entropy of each row of bin numbers: (..., m) -> (...); negative numbers are not counted."""
    width = numbers.shape[-1]
    ordered = _sorted(numbers)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    begin = starts.flatten().nonzero().squeeze(-1)  # every run of equal numbers; the first of a row starts one
    end = torch.full((1,), starts.numel(), device=begin.device)
    run = torch.diff(begin, append=end)  # counts c
    row = begin // max(width, 1)
    counted = (numbers >= 0).sum(dim=-1)  # N
    logarithm = torch.arange(width + 1, device=begin.device, dtype=torch.float32).clamp_(min=1).log()
    # c (ln N - ln c): no cancellation, and exactly 0 where one bin holds everything
    gain = run * (logarithm[counted.flatten()[row]] - logarithm[run])
    gain.masked_fill_(ordered.flatten()[begin] < 0, 0.0)
    total = torch.zeros(counted.numel(), device=begin.device).index_add_(0, row, gain).view(counted.shape)
    return total / counted.clamp(min=1) / bins.to(torch.float32).log()


def multiscale_diversity_entropy(
    y: Tensor, embed_size: int, bins: int | Tensor, scales: int, lengths: Tensor | None = None
) -> Tensor:
    """Diversity entropy at the scales 1 ... ``scales`` (sliding means of so many neighbours, stride 1).

    Args:
        y: Sequences, (..., n), floating point; reckoned in float32 or float64.
        embed_size: Values s in an orbit, at least 1.
        bins: Number ε of equal bins of [-1, 1], at least 2: one number, or one per sequence, shape (...). It is the
            same at all scales.
        scales: Largest scale τ'; the paper's default for open models' text is 5.
        lengths: Real length of each sequence, shape (...), where rows are padded on the right. None: n.

    Returns:
        (..., scales), each value in [0, 1].

    Raises:
        ValueError: Too few values: at every scale at least one pair of orbits must exist.

    Example:
        >>> y = torch.tensor([1.0, 2, 13, 7, 9, 5, 4])
        >>> multiscale_diversity_entropy(y, embed_size=3, bins=10, scales=3).round(decimals=5)
        tensor([0.3010, 0.0000, 0.0000])
    """
    if not y.is_floating_point():
        raise ValueError(f"y must be floating point, got {y.dtype}; convert it with .float()")
    if embed_size < 1 or scales < 1:
        raise ValueError(f"embed_size and scales must be at least 1, got {embed_size} and {scales}")
    shape, n = y.shape[:-1], y.shape[-1]
    bins = torch.as_tensor(bins, device=y.device).expand(shape)
    lengths = torch.as_tensor(n if lengths is None else lengths, device=y.device).expand(shape)
    if bins.numel() and int(bins.min()) < 2:
        raise ValueError(f"bins must be at least 2, got {int(bins.min())}: one bin has no entropy")
    shortest, needed = (int(lengths.min()) if lengths.numel() else n), embed_size + scales
    if shortest < needed:
        raise ValueError(
            f"a sequence has {shortest} values, but embed_size={embed_size} with scales={scales} needs at least {needed}"
        )
    if y.dtype not in (torch.float32, torch.float64):
        y = y.float()
    cosine = y.new_full((scales, *shape, n - embed_size), NO_PAIR)
    total = y
    for scale in range(1, scales + 1):
        if scale > 1:
            total = total[..., :-1] + y[..., scale - 1 :]  # sum of `scale` neighbours, (..., n - scale + 1)
        _neighbour_cosines(total / scale, embed_size, cosine[scale - 1, ..., : n - scale + 1 - embed_size])
    if shortest < n:
        place = torch.arange(n - embed_size, device=y.device)
        scale = torch.arange(1, scales + 1, device=y.device).view(-1, *[1] * len(shape))
        cosine.masked_fill_(place >= (lengths - scale + 1 - embed_size).unsqueeze(-1), NO_PAIR)
    bins = bins.unsqueeze(0).expand(scales, *shape)
    return _entropy_of_numbers(_bin_numbers(cosine, bins), bins).movedim(0, -1)


def diversity_entropy(y: Tensor, embed_size: int, bins: int | Tensor, lengths: Tensor | None = None) -> Tensor:
    """Diversity entropy of each sequence: (..., n) -> (...). Arguments as in ``multiscale_diversity_entropy``.

    Example:
        >>> diversity_entropy(torch.tensor([-1.0, -1, -1, -1, -1]), embed_size=3, bins=20)  # one direction only
        tensor(0.)
    """
    return multiscale_diversity_entropy(y, embed_size, bins, 1, lengths).squeeze(-1)
