"""Identity: the mixer that mixes nothing, the lower bound of every comparison.

Yu et al., "MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452 (IdentityFormer).

    y = x

Tokens still meet in the convolutions between the stages and, with ``GroupNorm1``, in its statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.mixers.registry import Layout

__all__ = ["IdentityMixer"]


class IdentityMixer(nn.Module):
    """Return the tokens as they are.

    Args:
        dim: Channels C; not needed.
        proj_drop: Accepted as every mixer does.
        device: Accepted as every mixer does.
        dtype: Accepted as every mixer does.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 2, 3, 4)
        >>> IdentityMixer(3)(x) is x
        True
    """

    layout = Layout.NHWC  # any order is left as it is
    fixed_tokens = None

    def __init__(
        self,
        dim: int | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; ``x`` itself."""
        return x
