"""Multi-layer perceptrons of channels-last maps: the channel mixer of a block and a classifier head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenry.layers.star_relu import SquaredReLU

__all__ = ["ChannelMLP", "MLPHead"]


class ChannelMLP(nn.Module):
    """``fc2(act(fc1(x)))`` over the last axis: every token on its own.

    Args:
        dim: Channels C.
        hidden: Width between. Default 4 C.
        act: Makes the activation.
        bias: Whether both linear maps have one.
        drop: Dropout rate after each linear map's activation or output.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * dim
        self.fc1 = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class MLPHead(nn.Module):
    """Classifier with one hidden layer: ``fc2(drop(norm(relu(fc1(x))^2)))``.

    Args:
        dim: Features C.
        num_classes: Classes.
        mlp_ratio: Hidden width over C. Default 4 (ConvFormer, CAFormer).
        drop: Dropout rate before the last map.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(hidden, eps=1e-5, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, num_classes)."""
        return self.fc2(self.drop(self.norm(self.act(self.fc1(x)))))
