"""Spatial fully connected mixing: one learned matrix over positions, shared by all channels.

Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv:2111.11418 (hybrid stages); the token
mixer of MLP-like models.

    y = W x                                 W: (N, N), x, y: (B, N, C), N = H * W

Cost: N^2 parameters and N^2 C multiply-accumulates; it works at the one resolution that it was made for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.mixers.registry import Layout

__all__ = ["SpatialFCMixer", "check_tokens", "mix_by_matrix"]


def mix_by_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """``y[b, m, c] = sum_n matrix[m, n] x[b, n, c]``.

    Args:
        x: (B, N, C).
        matrix: (N, N).
    """
    return torch.matmul(matrix, x)


def check_tokens(mixer: str, x: Tensor, num_tokens: int) -> None:
    """Refuse maps of another size than the mixer was made for.

    Raises:
        ValueError: ``x`` (B, N, C) has another number of tokens.
    """
    if x.ndim != 3 or x.shape[1] != num_tokens:
        raise ValueError(
            f"{mixer} was made for {num_tokens} tokens and got an input of shape {tuple(x.shape)} (B, N, C): it "
            f"works at one resolution only; make the model again with num_tokens={x.shape[1] if x.ndim == 3 else 'H * W'} "
            "(metaformer: img_size=...) or resize the images"
        )


class SpatialFCMixer(nn.Module):
    """Mix tokens by a learned N x N matrix without bias.

    Args:
        dim: Channels C; not needed, as channels share the matrix.
        num_tokens: Number of tokens N = H * W, for example 196 for 14x14.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_tokens`` is below 1; in forward, another number of tokens.

    Example:
        >>> import torch
        >>> SpatialFCMixer(8, num_tokens=15)(torch.randn(2, 15, 8)).shape
        torch.Size([2, 15, 8])
    """

    layout = Layout.NLC

    def __init__(
        self,
        dim: int | None = None,
        num_tokens: int = 196,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1 (H * W of the map), got {num_tokens}")
        self.fixed_tokens = num_tokens
        self.fc = nn.Linear(num_tokens, num_tokens, bias=False, device=device, dtype=dtype)
        self.drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        check_tokens("spatial_fc", x, self.fixed_tokens)
        return self.drop(mix_by_matrix(x, self.fc.weight))
