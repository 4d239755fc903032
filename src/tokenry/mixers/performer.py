"""Performer: attention by positive random features, in time and memory linear in the number of tokens.

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv:2009.14794; as in T2T-ViT (Yuan et al.,
"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021, arXiv:2101.11986).

    k, q, v = x Wkqv + b                                                       x, k, q, v: (B, N, d) per head
    phi(u)  = exp(w u - |u|^2 / 2) / sqrt(m)                                   w: (m, d), fixed, orthogonal rows
    y_i     = sum_j phi(q_i) phi(k_j) v_j / (sum_j phi(q_i) phi(k_j) + eps)    y: (B, N, d)
    out     = y Wo + bo

What phi(q) phi(k) is on average depends on the rows' norm. With rows as long as a Gaussian vector, sqrt(d), it is
exp(q k), the weight of softmax attention; that is the default here, with q and k scaled by d^-1/4 each and eps = 0, so
that the mixer stands in for softmax(q k / sqrt(d)). T2T-ViT gives its m = d / 2 rows the norm sqrt(m) and does not scale q
and k: its features are on average exp(-|q - k|^2 / 4), a Gaussian kernel. Its checkpoints need that: ``released=True``.

Cost of a layer: 4 C^2 + 4 C trainable parameters and 4 N C^2 + 4 N m C multiply-accumulates.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["PerformerMixer", "orthogonal_rows", "performer_attention", "positive_features"]


def orthogonal_rows(
    count: int,
    dim: int,
    gain: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random matrix (count, dim) times ``gain``: orthonormal rows, or orthonormal columns where there are more rows.

    Args:
        count: Rows m.
        dim: Columns d.
        gain: Norm of the rows where m <= d; above, their root mean square norm is ``gain * sqrt(d / m)``.
        generator: For the same numbers every time. None: torch's own.
        device: Torch device.

    Example:
        >>> rows = orthogonal_rows(2, 3, 5.0)
        >>> (rows @ rows.T).round(decimals=3).abs().tolist()
        [[25.0, 0.0], [0.0, 25.0]]
    """
    return nn.init.orthogonal_(torch.empty(count, dim, device=device), gain, generator)


def positive_features(u: Tensor, w: Tensor) -> Tensor:
    """``exp(w u - |u|^2 / 2) / sqrt(m)``, whose products are positive estimates of a kernel.

    Args:
        u: Queries or keys ``(..., N, d)``.
        w: Random rows ``(m, d)``.

    Returns:
        ``(..., N, m)``.
    """
    return _exponents(u, w).exp() / math.sqrt(len(w))


def _exponents(u: Tensor, w: Tensor) -> Tensor:
    return u @ w.T - u.square().sum(-1, keepdim=True) / 2


def _scaled_features(q: Tensor, k: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features of q and k for normalised weights, and the sum of every query's weights (..., Nq, 1) with eps.

    As in a softmax, constants are taken out of the exponents so that none overflows and every sum is at least 1: of the
    keys' exponents the largest per feature, which the queries get, and of these then the largest per query.
    """
    a, b = _exponents(q, w), _exponents(k, w)  # (..., N, m)
    most_b = b.detach().amax(-2, keepdim=True)  # (..., 1, m)
    a = a + most_b
    most_a = a.detach().amax(-1, keepdim=True)  # (..., Nq, 1)
    phi_q, phi_k = (a - most_a).exp(), (b - most_b).exp()
    total = phi_q @ phi_k.sum(-2).unsqueeze(-1)
    return phi_q, phi_k, total + eps * len(w) * (-most_a).exp() if eps else total


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor, eps: float = 0.0) -> Tensor:
    """Average of the values weighted by products of positive random features.

    Computed in float32 outside autocast, and without overflow whatever the norms of q and k.

    Args:
        q: Queries ``(..., Nq, d)``.
        k: Keys ``(..., Nk, d)``.
        v: Values ``(..., Nk, e)``.
        w: Random rows ``(m, d)``.
        eps: Added to the sum of the weights phi(q) phi(k). Default 0: they sum to 1. T2T-ViT adds 1e-8, beside which the
            weights of tokens with large norms vanish.

    Returns:
        ``(..., Nq, e)`` in the type of ``v``.

    Example:
        >>> import torch
        >>> y = performer_attention(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 5), torch.ones(2, 4))
        >>> y.shape, round(y.max().item(), 4)
        (torch.Size([1, 2, 5]), 1.0)
    """
    with torch.autocast(v.device.type, enabled=False):
        values = v.float()
        phi_q, phi_k, total = _scaled_features(q.float(), k.float(), w.float(), eps)
        return (phi_q @ (phi_k.transpose(-2, -1) @ values) / total).to(v.dtype)  # (..., Nq, e)


class PerformerMixer(nn.Module):
    """Mix tokens by attention of positive random features.

    Args:
        dim: Channels C of the output, and of the input unless ``in_dim`` is given.
        ratio: Random features per channel of a head, m = ratio * d. Default 0.5 (T2T-ViT). More of them estimate better.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where that divides ``dim``, else one.
        in_dim: Channels of the input where they differ from C: the mixer is then a layer of T2T-ViT's tokenizer and keeps
            no shape.
        released: As in T2T-ViT's checkpoints: rows of norm sqrt(m) and no scale on q and k, which makes the features
            estimate exp(-|q - k|^2 / 4) at ratio 0.5, and eps 1e-8.
        generator: For the random rows. None: torch's own.
        proj_drop: Dropout on the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Attributes:
        w: (m, d), a parameter that is saved in checkpoints and not trained.

    Raises:
        ValueError: ``ratio`` leaves no feature, ``num_heads`` does not divide ``dim``, or tokens of another width.

    Example:
        >>> mixer = PerformerMixer(16)
        >>> mixer.w.shape, mixer(torch.randn(2, 35, 16)).shape
        (torch.Size([8, 16]), torch.Size([2, 35, 16]))
    """

    layout = Layout.NLC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        ratio: float = 0.5,
        num_heads: int | None = None,
        in_dim: int | None = None,
        released: bool = False,
        generator: torch.Generator | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = dim if in_dim is None else in_dim
        self.num_heads = head_count(dim, num_heads)
        self.head_dim = dim // self.num_heads
        features = int(ratio * self.head_dim)
        if features < 1:
            raise ValueError(
                f"ratio={ratio} leaves no random feature for heads of {self.head_dim} channels; use at least "
                f"ratio={1 / self.head_dim:g}"
            )
        self.kqv = nn.Linear(self.in_dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.qk_scale, self.eps = (1.0, 1e-8) if released else (self.head_dim**-0.25, 0.0)
        gain = math.sqrt(features if released else max(features, self.head_dim))
        rows = orthogonal_rows(features, self.head_dim, gain, generator, device)
        self.w = nn.Parameter(rows.to(dtype or torch.get_default_dtype()), requires_grad=False)
        for linear in (self.kqv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The random rows."""
        return {"w"}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, queries and values, each (B, heads, N, d)."""
        check_input(self, x, self.in_dim)
        kqv = self.kqv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        k, q, v = kqv.unbind(0)
        return (k, q, v) if self.qk_scale == 1 else (k * self.qk_scale, q * self.qk_scale, v)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, in_dim) -> the output and the values, both (B, N, C)."""
        if self.training and self.w.requires_grad:
            warnings.warn(
                "the random features w of a performer are being trained, probably after requires_grad_(True) on the whole "
                "model; they are meant to stay as drawn: mixer.w.requires_grad_(False)",
                stacklevel=2,
            )
        k, q, v = self.project(x)
        y = performer_attention(q, k, v, self.w, self.eps)
        y, v = (t.transpose(1, 2).flatten(2) for t in (y, v))  # (B, N, C)
        return self.proj_drop(self.proj(y)), v

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.attend(x)[0]

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, N): the weight that every token receives, averaged over heads and queries."""
        k, q, _ = self.project(x)
        phi_q, phi_k, total = _scaled_features(q.float(), k.float(), self.w.float(), self.eps)
        received = (phi_k @ (phi_q / total).mean(-2).unsqueeze(-1)).squeeze(-1)  # (B, heads, N)
        return {"attention": received.mean(1)}

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"num_heads={self.num_heads}, features={len(self.w)}"
