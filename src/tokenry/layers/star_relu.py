"""Squared ReLU and StarReLU: activations without a transcendental function.

So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021, arXiv:2109.08668 (squared ReLU);
Yu et al., "MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452 (StarReLU).

    SquaredReLU(x) = relu(x)^2
    StarReLU(x)    = s * relu(x)^2 + b            s, b: one learned number each

For x ~ N(0, 1), E relu^2 = 1/2 and E relu^4 = 3/2, so s = 1 / sqrt(5/4) = 0.8944 and b = -s / 2 = -0.4472 give mean 0
and variance 1. Four operations per number, against fourteen for GELU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNIT_BIAS", "UNIT_SCALE", "SquaredReLU", "StarReLU", "squared_relu", "star_relu"]

# StarReLU(x) with these has mean 0 and variance 1 for standard normal x.
UNIT_SCALE = 2 / 5**0.5
UNIT_BIAS = -1 / 5**0.5


def _in_place(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Three passes over one new tensor, none of them recorded."""
    y = x.relu()
    return torch.addcmul(bias, y.mul_(y), scale, out=y)


class _StarReLU(torch.autograd.Function):
    """Keeps x alone for the backward pass, where the plain expression keeps three tensors of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return _in_place(x, scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        positive = x.relu()
        slope = positive * grad  # half of d(relu^2) * grad
        grad_scale = None
        if ctx.needs_input_grad[1]:
            exact = slope.dtype in (torch.float32, torch.float64)  # shorter numbers want a longer sum
            summed = torch.dot(slope.flatten(), positive.flatten()) if exact else (slope * positive).sum()
            grad_scale = summed.reshape(1)
        grad_bias = grad.sum().reshape(1) if ctx.needs_input_grad[2] else None
        grad_x = slope * (2 * scale) if torch.is_grad_enabled() else slope.mul_(2 * scale)
        return grad_x, grad_scale, grad_bias


def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``scale * relu(x)^2 + bias``.

    Args:
        x: Any shape.
        scale: One number, shape (1,).
        bias: One number, shape (1,).
    """
    if torch.compiler.is_compiling():
        return scale * x.relu().square() + bias
    scale, bias = scale.to(x.dtype), bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or bias.requires_grad):
        return _StarReLU.apply(x, scale, bias)
    return _in_place(x, scale, bias)


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x)^2``, any shape."""
    return x.relu().square()


class StarReLU(nn.Module):
    """``s * relu(x)^2 + b``.

    Args:
        scale: First value of s. Default 1.0, as in the released models.
        bias: First value of b. Default 0.0.
        learnable: Train both. False gives the fixed variant; ``UNIT_SCALE`` and ``UNIT_BIAS`` are its values.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> import torch
        >>> act = StarReLU(UNIT_SCALE, UNIT_BIAS, learnable=False)
        >>> y = act(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
        >>> abs(y.mean().item()) < 0.02, abs(y.var().item() - 1) < 0.05
        (True, True)
    """

    def __init__(
        self,
        scale: float = 1.0,
        bias: float = 0.0,
        learnable: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=dtype), requires_grad=learnable)
        self.bias = nn.Parameter(torch.full((1,), bias, device=device, dtype=dtype), requires_grad=learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the shape of ``x``."""
        return star_relu(x, self.scale, self.bias)


class SquaredReLU(nn.Module):
    """``relu(x)^2``.

    Example:
        >>> import torch
        >>> SquaredReLU()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the shape of ``x``."""
        return squared_relu(x)
