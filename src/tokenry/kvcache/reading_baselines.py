"""Simpler rules of what a decoding step reads, on the machinery that TidalDecode uses: what to compare a method with.

    OwnTopReading     the positions that the layer itself looks at most    the best that a selection can hope for
    RecentReading     the newest positions                                  a plain window
    RandomReading     random positions                                      the least that a selection must beat

Each reads ``budget`` positions per query head and layer, except in layers that are told to read everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenry.kernels.sparse_decode_attention import top_positions
from tokenry.kvcache.sparse_reading import DecodeCall

__all__ = ["OwnTopReading", "RandomReading", "RecentReading"]


class _Ranked:
    """Some layers read everything, the others the positions that rank highest.

    Args:
        budget: Positions per query head.
        full_layers: Layers that read everything.
    """

    def __init__(self, budget: int, full_layers: frozenset[int] = frozenset()) -> None:
        if budget < 1:
            raise ValueError(f"budget must be at least 1 position per head, got {budget}")
        self.budget, self.full_layers = budget, full_layers

    def rank(self, call: DecodeCall) -> Tensor:
        """Scores ``[B, Hq, N]``; the highest are read."""
        raise NotImplementedError(f"{type(self).__name__} must override rank")

    def __call__(self, call: DecodeCall) -> Tensor:
        """Attend to the best ``budget`` positions."""
        if call.layer in self.full_layers or self.budget >= call.key.shape[2]:
            return call.full()
        call.selected[call.layer] = top_positions(self.rank(call), self.budget)
        return call.only(call.selected[call.layer])


class OwnTopReading(_Ranked):
    """Rule: every layer reads the positions that it would look at most. No saving: finding them reads all keys."""

    def rank(self, call: DecodeCall) -> Tensor:
        """The layer's own scores."""
        return call.scores()


class RecentReading(_Ranked):
    """Rule: the newest positions, a plain window."""

    def rank(self, call: DecodeCall) -> Tensor:
        """The later the higher; hidden positions are newer than the current token only in a static cache."""
        places = torch.arange(call.key.shape[2], device=call.key.device).float()
        return _visible(places.expand(*call.query.shape[:2], -1), call.mask)


class RandomReading(_Ranked):
    """Rule: random positions, others in each layer, head and step.

    Args:
        budget: Positions per query head.
        full_layers: Layers that read everything.
        seed: Seed of the draws.
    """

    def __init__(self, budget: int, full_layers: frozenset[int] = frozenset(), seed: int = 0) -> None:
        super().__init__(budget, full_layers)
        self.seed = seed
        self.generator: torch.Generator | None = None

    def rank(self, call: DecodeCall) -> Tensor:
        """Uniform numbers."""
        if self.generator is None:
            self.generator = torch.Generator(call.key.device).manual_seed(self.seed)
        shape = (*call.query.shape[:2], call.key.shape[2])
        return _visible(torch.rand(shape, generator=self.generator, device=call.key.device), call.mask)


def _visible(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores, and -1 where the mask hides."""
    if mask is None:
        return scores
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return scores.masked_fill(~shown[:, :, -1, : scores.shape[-1]], -1.0)
