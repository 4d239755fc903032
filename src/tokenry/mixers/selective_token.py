"""Selective token mixer: a gated selective scan of the tokens, in one, two or four orders.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888; in one order it is the Mamba block (Gu and Dao, 2023, arXiv:2312.00752).

    [u, z] = W_in x                                 x: (D, L); u, z: (E, L), E = 2 D
    u = SiLU( conv(u) + b )                         depthwise: causal along a sequence, 3x3 on a map
    y = sum_k, each back in its place: S6_k( u in order k )          every order k has an S6 of its own
    out = W_out ( y * SiLU(z) )

    orders   causal    the sequence, or a map row by row
             bi        the same, and from the end to the beginning
             cross2d   a map along its rows, along its columns, and both from the end

The equations of the paper take the steps, inputs and outputs of S6 from x; here they come from u, as in the Mamba block, which
the paper calls a special case. The 'bi' form shares its causal convolution between both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels.scan_orders import cross_merge, cross_scan
from tokenry.layers.s6 import S6
from tokenry.mixers.registry import Layout

__all__ = ["SelectiveTokenMixer"]

# Lines that a map is read along, and whether they are read in both directions.
ORDERS: dict[str, tuple[tuple[str, ...], int]] = {
    "causal": (("row",), 1),
    "bi": (("row",), 2),
    "cross2d": (("row", "column"), 2),
}


class SelectiveTokenMixer(S6):
    """Mix tokens by selective scans and gate the result.

    With ``orders="causal"`` the state dict is that of a Mamba block (transformers' ``MambaMixer``): it loads as it is.

    Args:
        dim: Channels D.
        d_state: States N per channel. Default 16 (paper).
        d_conv: Kernel of the depthwise convolution. None (default): 4 steps along a sequence, 3x3 on a map (paper).
        expand: E over D. Default 2 (paper).
        dt_rank: Width R of the steps. None: ceil(D / 16) (Mamba).
        orders: ``"cross2d"`` (default, maps only), ``"bi"`` or ``"causal"``.
        proj_drop: Dropout on the output.
        device: Torch device.
        dtype: Torch dtype. The scan computes in float32 (float64 for float64 input).

    Raises:
        ValueError: Unknown orders; a size below 1; an even kernel on a map; an input of another shape.

    Example:
        >>> SelectiveTokenMixer(16)(torch.randn(2, 16, 7, 5)).shape
        torch.Size([2, 16, 7, 5])
        >>> SelectiveTokenMixer(16, orders="causal")(torch.randn(2, 30, 16)).shape
        torch.Size([2, 30, 16])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int | None = None,
        expand: float = 2.0,
        dt_rank: int | None = None,
        orders: str = "cross2d",
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if orders not in ORDERS:
            raise ValueError(f"orders must be one of {', '.join(ORDERS)}, got {orders!r}")
        flat, inner = orders == "cross2d", int(expand * dim)
        if dim < 1 or inner < 1:
            raise ValueError(f"dim and expand * dim must be at least 1, got dim={dim}, expand={expand}")
        kernel = (3 if flat else 4) if d_conv is None else d_conv
        if kernel < 1 or (flat and kernel % 2 == 0):
            raise ValueError(f"d_conv must be at least 1, and odd on a map, got {kernel} for orders={orders!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        (lines, ways), rank = ORDERS[orders], -(-dim // 16) if dt_rank is None else dt_rank
        super().__init__(inner, d_state, rank, len(lines), ways, **dd)
        self.dim, self.orders, self.line_names, self.kernel = dim, orders, lines, kernel
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        if flat:
            self.conv2d = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, **dd)
        else:
            self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W), or (B, L, D) -> (B, L, D) where no map is needed."""
        u, z = self._inputs(x)
        size = x.shape[2:]
        if self.orders == "cross2d":
            lines = cross_scan(u.unflatten(2, size), self.line_names)
            y = cross_merge(self.scan(lines), size[0], size[1], self.line_names)
        else:
            y = self.scan(u.unsqueeze(1)).squeeze(1)
        y = self.proj_drop(self.out_proj.weight @ (y * F.silu(z)))  # (B, D, L)
        return y.unflatten(2, size) if x.ndim == 4 else y.mT

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is scanned and what gates, both (B, E, L), positions of a map counted row by row."""
        self._check(x)
        tokens = x.flatten(2) if x.ndim == 4 else x.mT  # (B, D, L)
        u, z = (self.in_proj.weight @ tokens).chunk(2, dim=1)
        if self.orders == "cross2d":
            u = self.conv2d(u.unflatten(2, x.shape[2:])).flatten(2)
        else:
            u = self.conv1d(F.pad(u, (self.kernel - 1, 0)))
        return F.silu(u), z

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``step`` (B, H, W) or (B, L): how far the scans' states go over to a token, mean of channels and orders."""
        step = self.mean_step(self._inputs(x)[0])
        return {"step": step.unflatten(1, x.shape[2:]) if x.ndim == 4 else step}

    def _check(self, x: Tensor) -> None:
        flat = self.orders == "cross2d"
        if x.ndim == 4 and x.shape[1] == self.dim:
            return
        if x.ndim == 3 and x.shape[2] == self.dim and not flat:
            return
        wanted = "(B, D, H, W)" if flat else "(B, D, H, W) or (B, L, D)"
        hint = "; for tokens (B, L, D) use orders='causal' or 'bi', or lay them out as a map" if flat else ""
        raise ValueError(
            f"orders={self.orders!r} takes {wanted} with D={self.dim} channels, got {tuple(x.shape)}{hint}"
        )

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One more token of a sequence that arrives token by token; what ``forward`` gives for the whole, without dropout.

        Args:
            x: (B, D), the token.
            state: What the call before returned: the last ``d_conv - 1`` inputs of the convolution (B, E, d_conv - 1) and
                the states of the scan (B, E, N), at least float32. None: before the first token.

        Returns:
            (B, D) and the next state.

        Raises:
            ValueError: Orders that look ahead; a token of another shape.
        """
        if self.orders != "causal":
            raise ValueError(
                f"orders={self.orders!r} looks ahead and has no steps; make the mixer with orders='causal'"
            )
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"a step takes one token (B, {self.dim}), got {tuple(x.shape)}")
        u, z = self.in_proj(x).chunk(2, dim=1)  # (B, E)
        if state is None:
            kind = torch.float64 if u.dtype == torch.float64 else torch.float32
            state = (
                u.new_zeros(*u.shape, self.kernel - 1),
                torch.zeros(*u.shape, self.d_state, dtype=kind, device=u.device),
            )
        window = torch.cat([state[0], u.unsqueeze(2)], dim=2)  # (B, E, d_conv)
        u = F.silu(self.conv1d(window).squeeze(2))
        y, h = self.scan_step(u, state[1])
        return self.out_proj(y * F.silu(z)), (window[:, :, 1:], h)

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, d_state={self.d_state}, orders={self.orders!r}"
