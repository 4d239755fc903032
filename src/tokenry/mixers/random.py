"""Random mixing: a frozen random matrix over positions.

Yu et al., "MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452 (RandFormer).

    M = softmax(U, rows),  U ~ uniform[0, 1)        M: (N, N), drawn once, never trained
    y = M x                                         x, y: (B, N, C), N = H * W

Rows sum to one, so a constant map is left as it is. Cost: N^2 frozen numbers and N^2 C multiply-accumulates; it works at
the one resolution that it was made for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.mixers.registry import Layout
from tokenry.mixers.spatial_fc import check_tokens, mix_by_matrix

__all__ = ["RandomMixer"]


class RandomMixer(nn.Module):
    """Mix tokens by a frozen random N x N matrix.

    The matrix is a parameter without gradient: it is saved with the model, as in the authors' checkpoints, and
    optimisers that look at ``requires_grad`` leave it alone, weight decay included.

    Args:
        dim: Channels C; not needed, as channels share the matrix.
        num_tokens: Number of tokens N = H * W. Default 196 (14x14: stage 3 at 224).
        generator: Source of the random numbers. None: torch's global one.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_tokens`` is below 1; in forward, another number of tokens.

    Example:
        >>> import torch
        >>> mixer = RandomMixer(8, num_tokens=15)
        >>> torch.allclose(mixer(torch.ones(2, 15, 8)), torch.ones(2, 15, 8))
        True
    """

    layout = Layout.NLC

    def __init__(
        self,
        dim: int | None = None,
        num_tokens: int = 196,
        *,
        generator: torch.Generator | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1 (H * W of the map), got {num_tokens}")
        self.fixed_tokens = num_tokens
        drawn = torch.rand(num_tokens, num_tokens, generator=generator, device=device, dtype=dtype)
        self.random_matrix = nn.Parameter(drawn.softmax(dim=-1), requires_grad=False)
        self.drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        check_tokens("random", x, self.fixed_tokens)
        return self.drop(mix_by_matrix(x, self.random_matrix))
