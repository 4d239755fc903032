"""Selective channel mixer: a selective scan across the channels, in both directions.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888.

    s = x^T                                                 x: (L, D) tokens; s: (D, L), a sequence of D channels
    u_f = SiLU( conv_f( W_f s ) )                           depthwise, causal; (D, E), E = 2 L
    u_b = SiLU( conv_b( W_b flip(s) ) )                     the channels from the last to the first
    g   = SiLU( W_g s )
    y^T = W_out ( S6_f(u_f) * g + flip(S6_b(u_b)) * g )

An MLP mixes channels by weights that are the same for every input; here the steps, inputs and outputs of the scan depend on the
channels themselves. The price: the maps W are as wide as there are tokens, so the mixer takes one number of tokens. With ``width``
the tokens first go through a linear map to so many numbers, and back at the end (not in the paper, which leaves open how large
maps are handled).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.s6 import S6
from tokenry.mixers.registry import Layout, check_input

__all__ = ["SelectiveChannelMixer"]


class SelectiveChannelMixer(nn.Module):
    """Mix channels, in both directions, by what the tokens say in each of them.

    Args:
        dim: Not needed, as any number of channels is taken.
        num_tokens: Tokens L. Default 196 (14x14: stage 3 at 224).
        width: Width of the scan, where it is not L. None (default): L, as the equations have it.
        d_state: States N per channel of the scan. Default 16 (paper).
        d_conv: Kernel of the convolutions along the channels. Default 4 (paper).
        expand: E over the width. Default 2 (paper).
        proj_drop: Dropout on the output.
        device: Torch device.
        dtype: Torch dtype. The scan computes in float32 (float64 for float64 input).

    Raises:
        ValueError: A size below 1; in forward, another number of tokens.

    Example:
        >>> mixer = SelectiveChannelMixer(num_tokens=35)
        >>> mixer(torch.randn(2, 35, 16)).shape, mixer(torch.randn(2, 35, 8)).shape
        (torch.Size([2, 35, 16]), torch.Size([2, 35, 8]))
    """

    layout = Layout.NLC

    def __init__(
        self,
        dim: int | None = None,
        num_tokens: int = 196,
        width: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = num_tokens if width is None else width
        inner = int(expand * size)
        for name, value in {"num_tokens": num_tokens, "width": size, "d_conv": d_conv, "expand * width": inner}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fixed_tokens, self.kernel = num_tokens, d_conv
        self.token_in = None if width is None else nn.Linear(num_tokens, width, bias=False, **dd)
        self.token_out = None if width is None else nn.Linear(width, num_tokens, bias=False, **dd)
        self.gate_proj = nn.Linear(size, inner, bias=False, **dd)
        self.in_proj_f = nn.Linear(size, inner, bias=False, **dd)
        self.in_proj_b = nn.Linear(size, inner, bias=False, **dd)
        self.conv1d_f = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.ssm_f = S6(inner, d_state, -(-size // 16), **dd)
        self.ssm_b = S6(inner, d_state, -(-size // 16), **dd)
        self.out_proj = nn.Linear(inner, size, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        check_input(self, x)
        if x.shape[1] != self.fixed_tokens:
            raise ValueError(
                f"this SelectiveChannelMixer was made for {self.fixed_tokens} tokens, got {x.shape[1]}: its width is the "
                f"number of tokens; make one with num_tokens={x.shape[1]}, or resize the input"
            )
        if self.token_in is None or self.token_out is None:
            return self.proj_drop(self.mix(x))
        return self.proj_drop(self.token_out.weight @ self.mix(self.token_in.weight @ x))

    def mix(self, x: Tensor) -> Tensor:
        """The scan along the last axis of (B, width, D), for sequences of D positions: (B, width, D) -> (B, width, D)."""
        gate = F.silu(self.gate_proj.weight @ x)  # (B, E, D)
        pad = self.kernel - 1
        u = F.silu(self.conv1d_f(F.pad(self.in_proj_f.weight @ x, (pad, 0))))
        y = self.ssm_f.scan(u.unsqueeze(1)).squeeze(1)
        # Nothing is flipped: the kernel turned round looks at later channels, and the scan runs backwards.
        u = F.pad(self.in_proj_b.weight @ x, (0, pad))
        u = F.silu(F.conv1d(u, self.conv1d_b.weight.flip(-1), self.conv1d_b.bias, groups=u.shape[1]))
        y = y + self.ssm_b.scan(u.unsqueeze(1), reverse=True).squeeze(1)
        return self.out_proj.weight @ (y * gate)

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"num_tokens={self.fixed_tokens}, width={self.gate_proj.in_features}"
