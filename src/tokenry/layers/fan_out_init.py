"""First weights as vision transformers with convolutions have them: small for linear maps, by fan-out for convolutions."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["fan_out_init"]


def fan_out_init(module: nn.Module) -> None:
    """Set the weights of all linear maps and 2-D convolutions in ``module``; their biases become zero.

    Linear maps get a truncated normal of deviation 0.02, convolutions a normal of variance 2 / (kernel's area * outputs per
    group), as in PVT (Wang et al., 2021, arXiv:2102.12122).

    Example:
        >>> layer = nn.Conv2d(64, 64, 3, groups=64)
        >>> fan_out_init(layer)
        >>> layer.bias.abs().max().item()
        0.0
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
        elif isinstance(part, nn.Conv2d):
            fan_out = math.prod(part.kernel_size) * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2.0 / fan_out))
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
