"""Modules far from their initial values: what a fresh module hides (zeros, ones, flat attention) shows in these."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def drawn(module: M, std: float = 0.5, generator: torch.Generator | None = None) -> M:
    """The module in evaluation mode, every parameter drawn anew from a normal distribution, the same every time.

    Args:
        module: Changed in place.
        std: Deviation of every parameter.
        generator: To go on drawing from afterwards. Default: a new one with seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.eval()
