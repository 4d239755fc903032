"""Multi-head relation aggregators: a convolution near the image, attention deep in the network, under one formula.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", 2022, arXiv:2201.09450.

    R_n(x) = A_n V_n(x),    MHRA(x) = Concat(R_1(x); ...; R_N(x)) U          x: tokens, V_n and U linear

    local     A_n is a learned kernel a over the offset of two tokens in a k x k window; one channel per head:
              y = U dwconv_k( V x )
    global    A_n compares contents: A_n = softmax(Q_n(x) K_n(x)^T / sqrt(d)), d = C / heads
    window    the same inside windows of w x w tokens; where w does not divide the map, zero tokens are added right and
              below, and they take part in the softmax as in the authors' code

Cost at C channels and N tokens: local 2C^2 + (k^2 + 3)C parameters and N(2C^2 + k^2 C) multiply-accumulates; global
4C^2 + 4C and 4NC^2 + 2N^2 C; window as global with 2N w^2 C in place of 2N^2 C.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.pointwise import Pointwise, Pointwise3d
from tokenry.layers.window_partition import window_merge, window_partition
from tokenry.mixers.attention import AttentionMixer
from tokenry.mixers.registry import Layout, check_input

__all__ = ["GlobalMHRA", "LocalMHRA", "WindowMHRA"]


class LocalMHRA(nn.Module):
    """Mix neighbouring tokens: a pointwise map, a depthwise convolution and a pointwise map, all linear, with biases.

    Args:
        dim: Channels C.
        kernel_size: Side k of the window in tokens, odd. Default 5 (authors' code).
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``kernel_size`` is even or below 1; an input that is not ``(B, C, H, W)``.

    Example:
        >>> mixer = LocalMHRA(16)
        >>> sum(p.numel() for p in mixer.parameters()), mixer(torch.randn(2, 16, 6, 9)).shape
        (960, torch.Size([2, 16, 6, 9]))
    """

    layout = Layout.NCHW
    fixed_tokens = None
    pointwise: ClassVar[type[Pointwise | Pointwise3d]] = Pointwise
    depthwise: ClassVar[type[nn.Conv2d | nn.Conv3d]] = nn.Conv2d

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}; use {max(kernel_size, 0) | 1}")
        self.dim = dim
        self.value = self.pointwise(dim, dim, device=device, dtype=dtype)
        self.affinity = self.depthwise(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype
        )
        self.proj = self.pointwise(dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(proj_drop)

    def aggregate(self, x: Tensor) -> Tensor:
        """The shape of a map stays."""
        return self.drop(self.proj(self.affinity(self.value(x))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        return self.aggregate(x)


class GlobalMHRA(AttentionMixer):
    """Mix all tokens by multi-head self-attention whose heads fill the channels exactly.

    Args:
        dim: Channels C.
        head_dim: Channels d of a head; must divide ``dim``. None (default): the greatest common divisor of ``dim`` and 64,
            which is 64 for all widths of the paper's deep stages.
        qkv_bias: Whether queries, keys and values have a bias. Default True (authors' code).
        attn_drop: Dropout rate of the attention weights. Default 0.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``; an input that is not ``(B, N, C)``.

    Example:
        >>> mixer = GlobalMHRA(320)
        >>> mixer.num_heads, mixer(torch.randn(2, 15, 320)).shape
        (5, torch.Size([2, 15, 320]))
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = math.gcd(dim, 64) if head_dim is None else head_dim
        if head_dim < 1 or dim % head_dim:
            raise ValueError(
                f"head_dim must divide the channels, got head_dim={head_dim} for dim={dim}; for example "
                f"head_dim={math.gcd(dim, head_dim)}"
            )
        super().__init__(
            dim,
            head_dim,
            qkv_bias=qkv_bias,
            proj_bias=True,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )

    def guided(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``attend``, and how much the first token (a class token) attends to each token, as a mean over heads.

        Args:
            x: (B, N, C).

        Returns:
            (B, N, C) and (B, N).
        """
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        first = (q[:, :, :1] @ k.mT * self.head_dim**-0.5).softmax(-1)  # (B, heads, 1, N): one row, not the matrix
        return self.drop(self.proj(y.transpose(1, 2).flatten(2))), first.mean(1).squeeze(1)


class WindowMHRA(GlobalMHRA):
    """Mix tokens by self-attention inside windows, at a cost that is linear in the size of the map.

    Args:
        dim: Channels C.
        window: Side w of a window in tokens. Default 14 (the detection models).
        head_dim: As in ``GlobalMHRA``.
        qkv_bias: As in ``GlobalMHRA``.
        attn_drop: As in ``GlobalMHRA``.
        proj_drop: As in ``GlobalMHRA``.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``window`` is below 1, or ``head_dim`` does not divide ``dim``; an input that is not ``(B, H, W, C)``.

    Example:
        >>> WindowMHRA(16, window=4)(torch.randn(2, 6, 9, 16)).shape
        torch.Size([2, 6, 9, 16])
    """

    layout = Layout.NHWC

    def __init__(
        self,
        dim: int,
        window: int = 14,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 token wide, got {window}; the authors' is 14")
        super().__init__(dim, head_dim, qkv_bias, attn_drop, proj_drop=proj_drop, device=device, dtype=dtype)
        self.window = window

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, H, W): what every token receives inside its window, averaged over heads and queries."""
        received = self.received(window_partition(x, self.window))  # (B * windows, w^2)
        return {"attention": window_merge(received[..., None], self.window, (x.shape[1], x.shape[2]))[..., 0]}

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.dim)
        windows = self.attend(window_partition(x, self.window))
        return window_merge(windows, self.window, (x.shape[1], x.shape[2]))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"window={self.window}"
