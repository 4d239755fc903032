"""AFF: a token mixer with a receptive field as large as the map, at O(N log N).

Huang et al., "Adaptive Frequency Filters As Efficient Global Token Mixers", ICCV 2023, arXiv:2307.14008.

    F = rfft2(x)                                       x: (B, C, H, W)
    M = softshrink(MLP(F)),                            a small complex MLP per frequency, in k groups of channels
    y = irfft2(M * F) + x                              y: (B, C, H, W)

By the convolution theorem y - x is x convolved, circularly and channel by channel, with the kernel K = irfft2(M)
(``aff_kernel``): as large as the map and made anew for every image. Because a shift of x turns the phase of F and so
changes M, the mixer is not shift-equivariant. The mixer has its own skip (+ x) besides that of the block around it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.kernels.adaptive_filter import Fourier, adaptive_frequency_filter, frequency_mask
from tokenry.mixers.registry import Layout, check_input

__all__ = ["AFFMixer", "aff_kernel"]


class AFFMixer(nn.Module):
    """Mix tokens by an adaptive filter in the Fourier domain.

    Parameters: ``w1 (2, k, C/k, h)``, ``b1 (2, k, h)``, ``w2 (2, k, h, C/k)``, ``b2 (2, k, C/k)`` with h = C/k times
    ``hidden_factor``; index 0 is the real, 1 the imaginary part. All start as 0.02 N(0, 1), so the mask starts near
    zero and the mixer near the identity.

    Args:
        dim: Channels C.
        num_blocks: Groups k of the complex MLP; must divide ``dim``. Default 8 (authors' code).
        sparsity_threshold: Lambda of the softshrink on the mask, at least 0. Default 0.01 (authors' code).
        act_layer: Activation between the two complex maps, on real and imaginary parts apart. Default SiLU.
        hidden_factor: Width of the MLP over C/k. Default 1; the authors' checkpoints have 1.
        skip: Add ``x``, as the authors do.
        proj_drop: Dropout on the filtered map, before the skip. Default 0.
        fourier: ``"fft"``, or ``"matmul"`` for the same computation without complex tensors, for exporters and
            devices that do not know them.
        device: Device of the parameters.
        dtype: Type of the parameters. The filter itself always computes in float32 (float64 for float64 input).

    Raises:
        ValueError: Arguments outside these ranges; an input that is not a floating-point ``(B, C, H, W)``.

    Example:
        >>> mixer = AFFMixer(16)
        >>> mixer(torch.randn(2, 16, 7, 5)).shape
        torch.Size([2, 16, 7, 5])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: int = 8,
        sparsity_threshold: float = 0.01,
        act_layer: type[nn.Module] = nn.SiLU,
        hidden_factor: int = 1,
        skip: bool = True,
        proj_drop: float = 0.0,
        fourier: Fourier = "fft",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_blocks < 1 or dim % num_blocks:
            fitting = [k for k in range(min(max(num_blocks, 1), max(dim, 1)), 0, -1) if dim % k == 0]
            advice = f"use num_blocks={fitting[0]} or make dim a multiple of {num_blocks}" if fitting else "dim >= 1"
            raise ValueError(
                f"dim must be a positive multiple of num_blocks, got dim={dim}, num_blocks={num_blocks}; {advice}"
            )
        if hidden_factor < 1 or hidden_factor != int(hidden_factor):
            raise ValueError(
                f"hidden_factor must be a whole number of at least 1, got {hidden_factor}; the paper's is 1"
            )
        if sparsity_threshold < 0:
            raise ValueError(f"sparsity_threshold must be at least 0, got {sparsity_threshold}; the paper's is 0.01")
        if fourier not in ("fft", "matmul"):
            raise ValueError(f"fourier must be 'fft' or 'matmul' (no complex tensors), got {fourier!r}")
        self.dim = dim
        self.num_blocks = num_blocks
        self.sparsity_threshold = sparsity_threshold
        self.skip = skip
        self.fourier: Fourier = fourier
        block = dim // num_blocks
        hidden = block * int(hidden_factor)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(2, num_blocks, *shape, device=device, dtype=dtype))

        self.w1, self.b1 = parameter(block, hidden), parameter(hidden)
        self.w2, self.b2 = parameter(hidden, block), parameter(block)
        self.act = act_layer()
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from 0.02 N(0, 1)."""
        for parameter in (self.w1, self.b1, self.w2, self.b2):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        y = adaptive_frequency_filter(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            threshold=self.sparsity_threshold,
            act=self.act,
            fourier=self.fourier,
        )
        y = self.proj_drop(y)
        return x + y if self.skip else y

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_blocks={self.num_blocks}, sparsity_threshold={self.sparsity_threshold}, skip={self.skip}"


def aff_kernel(mixer: AFFMixer, x: Tensor) -> Tensor:
    """The convolution kernel that the mixer applies to ``x``.

    ``mixer(x) - x`` is the circular convolution of ``x`` with this kernel, per image and per channel.

    Args:
        mixer: The mixer (its dropout plays no role).
        x: ``(B, C, H, W)``.

    Returns:
        ``(B, C, H, W)`` float32 (float64 for a float64 input); offset (0, 0) stands at index (0, 0): shift it to the
        middle with ``torch.fft.fftshift(kernel, (2, 3))`` for looking at.

    Raises:
        ValueError: ``x`` does not fit the mixer.

    Example:
        >>> mixer, x = AFFMixer(8), torch.randn(1, 8, 6, 6)
        >>> kernel = aff_kernel(mixer, x)
        >>> y = torch.fft.irfft2(torch.fft.rfft2(kernel) * torch.fft.rfft2(x), s=(6, 6))
        >>> torch.allclose(mixer(x) - x, y, atol=1e-6)
        True
    """
    check_input(mixer, x, mixer.dim)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spectrum = torch.fft.rfft2(x.to(dtype), norm="ortho")
    parameters = [p.to(dtype) for p in (mixer.w1, mixer.b1, mixer.w2, mixer.b2)]
    mask = frequency_mask(spectrum, *parameters, threshold=mixer.sparsity_threshold, act=mixer.act)
    return torch.fft.irfft2(mask, s=x.shape[-2:])
