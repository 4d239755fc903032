"""A convolution and its batch norm, which inference merges into one convolution."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["ConvNorm", "conv_then_norm", "fuse_norm_conv", "norm_affine"]


class ConvNorm(nn.Module):
    """``norm(conv(x))`` with padding that keeps the size at stride 1: (B, C, H, W) -> (B, C', H / stride, W / stride).

    Args:
        in_chans: Channels C.
        out_chans: Channels C'.
        kernel_size: Odd side of the kernel.
        stride: Step of the convolution.
        groups: Groups of channels; ``in_chans`` for a depthwise convolution.
        bias: Whether the convolution has a bias beside the norm's.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> layer, x = ConvNorm(3, 8, 3, stride=2).eval(), torch.randn(1, 3, 7, 9)
        >>> before = layer(x)
        >>> torch.allclose(layer.fuse()(x), before, atol=1e-5)
        True
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias, **dd
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return conv_then_norm(x, self.conv, self.norm)

    def fuse(self) -> ConvNorm:
        """Merge the norm into the convolution, in place. Only in evaluation mode; a second call changes nothing."""
        if isinstance(self.norm, nn.BatchNorm2d):
            _check_mode(self.norm)
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()
        return self


def conv_then_norm(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``: as one convolution where the norm's statistics are fixed, which spares a pass over the map.

    Args:
        x: What ``conv`` takes.
        conv: In half precision, or where it is no plain ``nn.Conv2d``, it runs apart from the norm.
        norm: The same holds where it is no plain ``nn.BatchNorm2d``, or trains.
    """
    plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
    if not plain or norm.training or conv.weight.dtype not in (torch.float32, torch.float64):
        return norm(conv(x))
    scale, shift = norm_affine(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def fuse_norm_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """One convolution that equals ``conv(norm(x))``, for a convolution of 1x1 that pads nothing.

    Args:
        norm: In evaluation mode.
        conv: Kernel 1x1, one group.

    Raises:
        ValueError: The norm is in training mode, or the convolution is another one.
    """
    _check_mode(norm)
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        raise ValueError(f"a norm merges into a following 1x1 convolution without padding or groups, got {conv}")
    scale, shift = norm_affine(norm)
    weight = conv.weight.detach()
    fused = copy.deepcopy(conv)
    with torch.no_grad():
        bias = weight.flatten(1) @ shift
        fused.weight = nn.Parameter(weight * scale[:, None, None])
        fused.bias = nn.Parameter(bias if conv.bias is None else bias + conv.bias)
    return fused


def norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and summand per channel that the norm amounts to in evaluation mode."""
    scale = norm.weight * torch.rsqrt(norm.get_buffer("running_var") + norm.eps)
    return scale, norm.bias - norm.get_buffer("running_mean") * scale


def _check_mode(norm: nn.BatchNorm2d) -> None:
    if norm.training:
        raise ValueError("norms merge into convolutions for inference only: call .eval() before .fuse()")
