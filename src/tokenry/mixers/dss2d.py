"""DSS2D: a selective scan of a map in four directions, after a deformable convolution that looks around each position.

Zhang et al., "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", 2024, arXiv:2410.03174; the scan
is VMamba's SS2D (Liu et al., 2024, arXiv:2401.10166), the convolution DCNv4 (Xiong et al., 2024, arXiv:2401.06197).

    v = W_in x                                              x: (B, C, H, W), v: (B, E, H, W), E = 2 C
    u = SiLU( dcnv4(v, offsets and weights = linear map of v) )         R = ceil(C / 16) groups
    s_k = u along order k: rows, columns, both reversed                 (B, E, L), L = H W
    [t_k, B_k, C_k] = W_k s_k;  delta_k = P_k t_k                       (R + 2 N, L); (E, L)
    y = sum_k, each back in its place: selective_scan(s_k, delta_k, A_k, B_k, C_k, D_k)
    out = W_out( LayerNorm(y) )                             with a squeeze-and-excitation between the two if asked for

A state space model forgets what lies far back in its sequence, and the position below lies a whole row back. The
convolution brings in the neighbourhood in two dimensions, and further off where its offsets say so.

A scan against its order needs no reversed copy: the two reversed directions run over the same two sequences backwards,
and their weights act on the tokens before these are put in order.
"""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNorm2d, SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels.dcnv4 import dcnv4, offset_mask_width
from tokenry.kernels.scan_orders import cross_merge, cross_scan
from tokenry.kernels.selective_scan import selective_scan
from tokenry.mixers.registry import Layout, check_input

__all__ = ["DSS2D", "DCNv4"]

LINES = ("row", "column")  # each is scanned in both directions


class DCNv4(nn.Module):
    """Deformable 3x3 convolution whose offsets and weights are a linear map of its input.

    Args:
        dim: Channels C.
        groups: Groups that share offsets and weights; must divide ``dim``.
        offset_conv: Take offsets and weights from a depthwise 3x3 convolution of the input.
        pointwise: A linear map before sampling and one after, as DCNv4's own package has.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``groups`` does not divide ``dim``.

    Example:
        >>> DCNv4(16, groups=2)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        offset_conv: bool = False,
        pointwise: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide the {dim} channels, got {groups}")
        self.groups = groups
        self.offset_mask_dw = (
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype) if offset_conv else None
        )
        self.offset_mask = nn.Linear(dim, offset_mask_width(groups), device=device, dtype=dtype)
        self.value_proj = nn.Linear(dim, dim, device=device, dtype=dtype) if pointwise else None
        self.output_proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) if pointwise else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        around = x if self.offset_mask_dw is None else self.offset_mask_dw(x)
        offset_mask = self.offset_mask(around.permute(0, 2, 3, 1))
        value = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.value_proj is not None:
            value = self.value_proj(value)
        y = dcnv4(value, offset_mask, self.groups)
        if self.output_proj is not None:
            y = self.output_proj(y)
        return y.permute(0, 3, 1, 2)


class DSS2D(nn.Module):
    """Mix tokens by a deformable convolution and a selective scan in four directions.

    Parameters of the scan, under VMamba's names, for directions row, column, row reversed, column reversed:
    ``x_proj_weight (4, R + 2 N, E)``, ``dt_projs_weight (4, E, R)``, ``dt_projs_bias (4, E)``, ``A_logs (4 E, N)``,
    ``Ds (4 E)``.

    Args:
        dim: Channels C. R = ceil(C / 16) must divide E.
        ssm_ratio: E over C. Default 2.
        d_state: States N per channel. Default 1.
        deformable: The deformable convolution. Without it a depthwise 3x3 convolution with a bias, which is VMamba's SS2D.
        offset_conv: Take the offsets from a depthwise 3x3 convolution. None (default): where C is a multiple of 80 (authors).
        dcn_pointwise: The deformable convolution's two linear maps. Default False: without them the models have the
            parameters that the authors report.
        squeeze_excite: Squeeze-and-excitation before the last map, as in the two smallest models. Default False.
        proj_drop: Dropout on the output. Default 0.
        device: Torch device.
        dtype: Torch dtype. The scan always computes in float32 (float64 for float64 input).

    Raises:
        ValueError: Channels that the groups do not divide; an input that is no (B, C, H, W).

    Example:
        >>> DSS2D(32)(torch.randn(2, 32, 6, 5)).shape
        torch.Size([2, 32, 6, 5])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        *,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        deformable: bool = True,
        offset_conv: bool | None = None,
        dcn_pointwise: bool = False,
        squeeze_excite: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, rank = int(ssm_ratio * dim), -(-dim // 16)
        if d_state < 1 or inner < 1:
            raise ValueError(f"d_state and ssm_ratio * dim must be at least 1, got {d_state} and {ssm_ratio} * {dim}")
        if deformable and inner % rank:
            near = [c for c in range(max(1, dim - 8), dim + 9) if int(ssm_ratio * c) % -(-c // 16) == 0]
            raise ValueError(
                f"the {inner} inner channels of dim={dim} do not divide into ceil(dim / 16) = {rank} groups; use a dim such as "
                f"{min(near, key=lambda c: abs(c - dim))}, or deformable=False"
            )
        dd = {"device": device, "dtype": dtype}
        self.dim, self.rank, self.d_state = dim, rank, d_state
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False, **dd)
        if offset_conv is None:
            offset_conv = dim % 80 == 0
        self.conv = (
            DCNv4(inner, rank, offset_conv, dcn_pointwise, **dd)
            if deformable
            else nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        )
        directions = 2 * len(LINES)
        self.x_proj_weight = nn.Parameter(torch.empty(directions, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(directions * inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(directions * inner, **dd))
        self.out_norm = LayerNorm2d(inner, eps=1e-5, **dd)
        self.se = (
            SqueezeExcite(inner, rd_channels=max(1, inner // 8), bias=False, **dd) if squeeze_excite else nn.Identity()
        )
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Steps from 0.001 to 0.1, log-uniformly; rates -1 to -N; everything passes by (D = 1); linear maps N(0, 0.02)."""
        inner = self.x_proj_weight.shape[-1]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # as a linear layer starts
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        nn.init.uniform_(self.dt_projs_bias, math.log(0.001), math.log(0.1)).exp_()  # the steps
        self.dt_projs_bias.add_(torch.log(-torch.expm1(-self.dt_projs_bias)))  # softplus turns this into the steps
        self.A_logs.copy_(torch.arange(1.0, self.d_state + 1, device=self.A_logs.device).log())
        nn.init.ones_(self.Ds)
        linear = [self.in_proj, self.out_proj]
        linear += [m for m in self.conv.modules() if isinstance(m, nn.Linear)]
        linear += [m for m in self.se.modules() if isinstance(m, nn.Conv2d)]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        u = F.silu(self.conv(self.in_proj(x)))  # (B, E, H, W)
        y = self.scan(u)
        return self.proj_drop(self.out_proj(self.se(self.out_norm(y))))

    def scan(self, u: Tensor) -> Tensor:
        """The sum of the four directions' scans, (B, E, H, W) -> (B, E, H, W)."""
        height, width = u.shape[-2:]
        sequences = cross_scan(u, LINES)  # (B, 2, E, L)
        # (2 lines, 2 ways * (R + 2N), E): both ways of a line read it together
        weight = self.x_proj_weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)
        projected = (weight @ sequences).unflatten(2, (2, -1)).transpose(1, 2)  # (B, 2 ways, 2 lines, R + 2 N, L)
        steps, enter, leave = projected.split([self.rank, self.d_state, self.d_state], dim=3)
        delta = self.dt_projs_weight.unflatten(0, (2, -1)) @ steps  # (B, 2, 2, E, L)
        A = -self.A_logs.to(torch.promote_types(self.A_logs.dtype, torch.float32)).exp()
        u = sequences.flatten(1, 2)  # (B, 2 E, L)
        ways = zip(
            delta.flatten(2, 3).unbind(1), A.chunk(2), enter.unbind(1), leave.unbind(1), self.Ds.chunk(2),
            self.dt_projs_bias.flatten().chunk(2), strict=True,
        )  # fmt: skip
        there, back = (
            selective_scan(u, delta, rates, enter, leave, passing, bias, reverse=way == 1)
            for way, (delta, rates, enter, leave, passing, bias) in enumerate(ways)
        )
        total = (there + back).unflatten(1, (2, -1))
        return cross_merge(total, height, width, LINES).unflatten(-1, (height, width))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, d_state={self.d_state}, groups={self.rank}"
