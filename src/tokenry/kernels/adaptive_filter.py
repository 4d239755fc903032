"""Adaptive frequency filter: multiply a map's spectrum by a mask that is computed from the spectrum itself.

Huang et al., "Adaptive Frequency Filters As Efficient Global Token Mixers", ICCV 2023, arXiv:2307.14008.

    F = rfft2(x)                                    x: (B, C, H, W), F: (B, C, H, W//2 + 1), complex
    R1 = act(Fr W1r - Fi W1i + b1r)                 per frequency and per group of C / k channels: a complex
    I1 = act(Fi W1r + Fr W1i + b1i)                 linear map, then act on real and imaginary part apart
    R2 + i I2 = (R1 + i I1) (W2r + i W2i) + b2      a second complex linear map, no activation
    M = softshrink(R2) + i softshrink(I2)
    y = irfft2(M * F)                               the mask multiplies the ORIGINAL spectrum

Two ways to compute it, equal up to rounding. ``"fft"`` keeps complex numbers from end to end: a complex linear map is one
batched complex matrix product on the spectrum as the transform leaves it, nothing is split or copied. ``"matmul"``
has no complex tensor at all: the transforms are products with matrices of sines and cosines (O(N^1.5) per
channel instead of O(N log N)), for exporters and devices that know neither complex numbers nor transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adaptive_frequency_filter", "frequency_mask"]

Fourier = Literal["fft", "matmul"]
Act = Callable[[Tensor], Tensor]


def frequency_mask(
    spectrum: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, threshold: float, act: Act
) -> Tensor:
    """The mask M of a spectrum.

    Args:
        spectrum: ``(B, C, H, W//2 + 1)``, complex.
        w1: ``(2, k, C/k, h)``; index 0 of the first axis is the real part, 1 the imaginary part.
        b1: ``(2, k, h)``.
        w2: ``(2, k, h, C/k)``.
        b2: ``(2, k, C/k)``.
        threshold: Parts of the mask nearer to zero than this become zero.
        act: Activation, applied to real and imaginary parts as if they were separate channels.

    Returns:
        ``(B, C, H, W//2 + 1)``, complex.

    Example:
        >>> spectrum = torch.fft.rfft2(torch.ones(1, 4, 2, 2))
        >>> w, b = torch.zeros(2, 2, 2, 2), torch.tensor([1.5, 0.0]).view(2, 1, 1).expand(2, 2, 2)
        >>> bool((frequency_mask(spectrum, w, 0 * b, w, b, threshold=0.5, act=torch.relu) == 1).all())
        True
    """
    batch, groups = spectrum.shape[0], w1.shape[1]
    z = spectrum.reshape(batch * groups, w1.shape[2], -1)  # (B k, C/k, H W')
    z = torch.baddbmm(*_per_image(b1, w1, batch), z)  # (B k, h, H W')
    z = torch.view_as_complex(act(torch.view_as_real(z)))
    z = torch.baddbmm(*_per_image(b2, w2, batch), z)  # (B k, C/k, H W')
    return torch.view_as_complex(F.softshrink(torch.view_as_real(z), threshold)).reshape(spectrum.shape)


def _per_image(bias: Tensor, weight: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Complex bias (B k, out, 1) and weight (B k, out, in): the k groups' own, once per image."""
    b = torch.complex(bias[0], bias[1]).unsqueeze(-1)  # (k, out, 1)
    w = torch.complex(weight[0], weight[1]).transpose(1, 2)  # (k, out, in)
    return b.repeat(batch, 1, 1), w.repeat(batch, 1, 1)


def adaptive_frequency_filter(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    threshold: float = 0.01,
    act: Act = F.silu,
    fourier: Fourier = "fft",
) -> Tensor:
    """Filter a map in the Fourier domain by a mask computed from the map.

    It computes in float32 (float64 for a float64 map) whatever the map's type or autocast says: transforms in half
    precision exist only for sizes that are powers of two, and a spectrum's range does not fit them.

    Args:
        x: ``(B, C, H, W)``, any floating-point type, any H and W.
        w1: ``(2, k, C/k, h)``, real and imaginary part.
        b1: ``(2, k, h)``.
        w2: ``(2, k, h, C/k)``.
        b2: ``(2, k, C/k)``.
        threshold: Softshrink's lambda on the mask. Default 0.01 (authors' code).
        act: Activation between the two maps. Default SiLU.
        fourier: ``"fft"``, or ``"matmul"`` for a computation without complex tensors.

    Returns:
        ``(B, C, H, W)`` in the type of ``x``, without any skip connection.

    Example:
        >>> x = torch.randn(2, 8, 5, 7)
        >>> w, b = 0.02 * torch.randn(2, 4, 2, 2), torch.zeros(2, 4, 2)
        >>> y = adaptive_frequency_filter(x, w, b, w, b)
        >>> torch.allclose(y, adaptive_frequency_filter(x, w, b, w, b, fourier="matmul"), atol=1e-5)
        True
    """
    filtered = _with_matmul if fourier == "matmul" else _with_fft
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    arguments = (x.to(dtype), w1.to(dtype), b1.to(dtype), w2.to(dtype), b2.to(dtype), threshold, act)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return filtered(*arguments).to(x.dtype)
    return filtered(*arguments).to(x.dtype)


def _with_fft(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float, act: Act) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho")  # (B, C, H, W')
    mask = frequency_mask(spectrum, w1, b1, w2, b2, threshold=threshold, act=act)
    return torch.fft.irfft2(mask * spectrum, s=x.shape[-2:], norm="ortho")


def _waves(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2 pi u i / rows, (rows, columns), over sqrt(rows): the "ortho" transform of length rows."""
    steps = torch.arange(rows, device=like.device)[:, None] * torch.arange(columns, device=like.device)
    angle = (steps % rows).to(like.dtype) * (2 * math.pi / rows)  # the remainder keeps the angle small and exact
    return torch.cos(angle) / math.sqrt(rows), torch.sin(angle) / math.sqrt(rows)


def _real_form(weight: Tensor) -> Tensor:
    """A complex map (2, k, in, out) as a real one on [real parts, imaginary parts]: (k, 2 out, 2 in)."""
    real, imag = weight.transpose(2, 3)
    return torch.cat([torch.cat([real, -imag], dim=2), torch.cat([imag, real], dim=2)], dim=1)


def _with_matmul(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float, act: Act) -> Tensor:
    batch, _channels, height, width = x.shape
    groups, half = w1.shape[1], width // 2 + 1
    cos_w, sin_w = _waves(width, half, x)  # (W, W')
    cos_h, sin_h = _waves(height, height, x)  # (H, H)
    a, b = x @ cos_w, -(x @ sin_w)  # (B, C, H, W'): transformed along W
    real, imag = cos_h @ a + sin_h @ b, cos_h @ b - sin_h @ a  # along H, times exp(-i angle)

    z = torch.stack([t.reshape(batch, groups, -1, height * half) for t in (real, imag)], dim=2)
    z = z.flatten(2, 3)  # (B, k, 2 C/k, H W'), real parts first
    z = act(_real_form(w1) @ z + b1.transpose(0, 1).reshape(groups, -1, 1))  # (B, k, 2 h, H W')
    z = _real_form(w2) @ z + b2.transpose(0, 1).reshape(groups, -1, 1)
    mask_real, mask_imag = F.softshrink(z, threshold).reshape(batch, groups, 2, -1, height, half).unbind(2)
    mask_real, mask_imag = mask_real.reshape(real.shape), mask_imag.reshape(real.shape)

    real, imag = mask_real * real - mask_imag * imag, mask_real * imag + mask_imag * real
    a, b = cos_h @ real - sin_h @ imag, cos_h @ imag + sin_h @ real  # back along H, times exp(+i angle)
    # Back along W from half a plane: a column stands for itself and its mirror image, except the first and, for
    # even W, the last, which are their own; there the sine is zero, so their imaginary part plays no role.
    twice = torch.full((half,), 2.0, dtype=x.dtype, device=x.device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (a * twice) @ cos_w.T - (b * twice) @ sin_w.T
