"""CAT: the convolutional additive token mixer of CAS-ViT.

Zhang et al., "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile Applications",
2024, arXiv:2408.03703.

    q, k, v = conv1x1(x)                                               x, q, k, v: (B, C, H, W)
    spatial(t) = t * sigmoid(conv1x1(relu(bn(dwconv3x3(t)))))          a gate (B, 1, H, W): one per position
    channel(t) = t * sigmoid(conv1x1(mean_HW(t)))                      a gate (B, C, 1, 1): one per channel
    y = proj_dw3x3( dwc_dw3x3( channel(spatial(q)) + channel(spatial(k)) ) * v )

q and k have gates of their own, v has none. There is no softmax, head or scale, and despite the name of self-attention no
pair of positions is compared: the gated q and k are added, so time and memory are linear in H * W.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.conv_norm import ConvNorm
from tokenry.mixers.registry import Layout, check_input

__all__ = ["CATMixer", "ChannelGate", "SpatialGate"]


class SpatialGate(nn.Module):
    """``t * sigmoid(conv1x1(relu(bn(dwconv3x3(t)))))``: one gate in (0, 1) per position, for all channels.

    Args:
        dim: Channels C.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: In training, a single value per channel, of which batch norm has no variance.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.depthwise = ConvNorm(dim, dim, 3, groups=dim, device=device, dtype=dtype)
        self.gate = nn.Conv2d(dim, 1, 1, bias=False, device=device, dtype=dtype)

    def forward(self, t: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if isinstance(self.depthwise.norm, nn.BatchNorm2d) and self.depthwise.norm.training and t.shape[1] == t.numel():
            raise ValueError(
                f"batch norm cannot train on a map of one position in a batch of one, got {tuple(t.shape)}: give two "
                "images or more, larger ones, or keep the norms in evaluation mode"
            )
        return t * self.gate(self.depthwise(t).relu_()).sigmoid()  # the gate: (B, 1, H, W)


class ChannelGate(nn.Module):
    """``t * sigmoid(conv1x1(mean_HW(t)))``: one gate in (0, 1) per channel, for all positions.

    Args:
        dim: Channels C.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate = nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype)

    def forward(self, t: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return t * self.gate(t.mean((2, 3), keepdim=True)).sigmoid()  # the gate: (B, C, 1, 1)


class CATMixer(nn.Module):
    """Mix tokens by gated, added queries and keys and two depthwise convolutions.

    5 C^2 + 46 C parameters, and per position 3 C^2 + 38 C multiply-accumulates.

    Args:
        dim: Channels C.
        qkv_bias: Whether the map to q, k, v has a bias. Default False (authors' code).
        proj_drop: Dropout on the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``dim`` below 1; an input that is not a floating-point (B, C, H, W); in training, one position in a
            batch of one.

    Example:
        >>> mixer = CATMixer(16)
        >>> mixer(torch.randn(2, 16, 7, 5)).shape
        torch.Size([2, 16, 7, 5])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        *,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1 channel, got {dim}")
        self.dim = dim
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias, device=device, dtype=dtype)

        def gates() -> nn.Sequential:
            parts: OrderedDict[str, nn.Module] = OrderedDict(
                spatial=SpatialGate(dim, device=device, dtype=dtype),
                channel=ChannelGate(dim, device=device, dtype=dtype),
            )
            return nn.Sequential(parts)

        self.gate_q, self.gate_k = gates(), gates()
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k, v, each (B, C, H, W) and dense in memory, which slices of one product of 3 C channels would not be."""
        weight, bias = self.qkv.weight, self.qkv.bias
        rows = [slice(first, first + self.dim) for first in (0, self.dim, 2 * self.dim)]
        return [F.conv2d(x, weight[part], None if bias is None else bias[part]) for part in rows]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        q, k, v = self.project(x)
        context = self.dwc(self.gate_q(q) + self.gate_k(k))
        return self.proj_drop(self.proj(context * v))
