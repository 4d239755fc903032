"""HSM-SSD: a state space layer that gates and projects its few hidden states instead of the many tokens.

Lee et al., "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality", CVPR 2025,
arXiv:2411.15241.

    B, C, dt = dwconv3x3( W_in x )                  tokens x: (D, L), L = H W; B, C, dt: (N, L)
    h        = x ( softmax_L(dt + a) * B )^T        hidden states h: (D, N); the softmax runs over the L positions
    h, z     = W_hz h
    h        = W_out ( h * SiLU(z) + d h )          the channel mixing, on N states: O(N D^2) instead of O(L D^2)
    y        = h C                                  (D, L)

There is no order of the tokens and no recurrence: each position of the map is written to N states at once, and read back
from them. ``a`` is the same for all positions of a state, so the softmax takes it out again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.registry import Layout, check_input

__all__ = ["HSMSSD"]


class HSMSSD(nn.Module):
    """Mix tokens through N hidden states, which also do the channel mixing.

    The parameter ``A`` (the ``a`` of the equations) cannot change the output and its gradient is zero by the maths. It is
    kept, without a gradient, so that checkpoints of the authors load and save whole; the forward pass does not read it,
    which in half precision is also the more exact way.

    Args:
        dim: Channels D.
        state_dim: Hidden states N, at least 1. Default 49 (the first stage of the authors' M1 to M3).
        expand: Width of the gated states over D. Default 1.
        proj_drop: Dropout on the output.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an input that is not a floating-point ``(B, D, H, W)``.

    Example:
        >>> mixer, x = HSMSSD(16, state_dim=9), torch.randn(2, 16, 7, 5)
        >>> mixer(x).shape
        torch.Size([2, 16, 7, 5])
        >>> y, h = mixer.mix(x)
        >>> h.shape
        torch.Size([2, 16, 9])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        state_dim: int = 49,
        expand: float = 1.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or state_dim < 1:
            raise ValueError(f"dim and state_dim must be at least 1, got dim={dim}, state_dim={state_dim}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(
                f"expand * dim must be at least 1, got expand={expand}, dim={dim}; the authors' expand is 1"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.state_dim = dim, state_dim
        self.in_proj = nn.Conv2d(dim, 3 * state_dim, 1, bias=False, **dd)
        self.dwconv = nn.Conv2d(3 * state_dim, 3 * state_dim, 3, padding=1, groups=3 * state_dim, bias=False, **dd)
        self.hz_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.A = nn.Parameter(torch.empty(state_dim, **dd).uniform_(1, 16), requires_grad=False)
        self.D = nn.Parameter(torch.ones(1, **dd))
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed tokens and the hidden states that they were read from: (B, D, H, W) -> (B, D, H, W), (B, D, N)."""
        check_input(self, x, self.dim)
        write, read, step = self.dwconv(self.in_proj(x)).flatten(2).chunk(3, dim=1)  # B, C, dt: (B, N, L) each
        # Tokens and states stand in rows: with channels last in memory nothing below is copied.
        h = (step.softmax(-1) * write) @ x.flatten(2).transpose(1, 2)  # (B, N, D)
        h, z = self.hz_proj(h).chunk(2, dim=-1)
        h = self.out_proj(h * (F.silu(z) + self.D))  # (B, N, D)
        y = read.transpose(1, 2) @ h  # (B, L, D)
        y = y.transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.proj_drop(y), h.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        return self.mix(x)[0]

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, state_dim={self.state_dim}"
