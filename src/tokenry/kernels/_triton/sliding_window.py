"""GPU kernels of sliding-window attention: one program per image, group and tile of positions.

A program walks over the K offsets of the window; what it adds up stays in registers, in float32, and is written once.
``_scatter``, the transpose of ``_gather`` in its values, asks from the other side which windows hold a position, so no two
programs write to one place.

They run on CUDA devices of compute capability 8.0 and up, and on a CPU in Triton's interpreter (set
``TRITON_INTERPRET=1`` before this module is imported). Tensors may have any strides.
"""

# pyrefly: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenry.kernels.sliding_window import Pair, Steps, Window

__all__ = ["FUSED", "INTERPRETED"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
POSITIONS = 64  # in a tile
CHANNELS = 64  # at most, at once


@triton.jit
def _dots(
    X, V, Bias, Out, G, D, H, W, OW, N, tiles, outside,
    xb, xg, xd, xh, xw, vb, vg, vd, vh, vw, bias_g, bias_k,
    down, right, dilate_h, dilate_w, pad_h, pad_w,
    K: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Out_k(n) = X(n) · V(n + Δ_k) + Bias_k; ``outside`` where n + Δ_k is outside the map. Out is contiguous."""
    pid = tl.program_id(0).to(tl.int64)
    image, group = pid // tiles // G, pid // tiles % G
    n = (pid % tiles) * N_BLOCK + tl.arange(0, N_BLOCK)
    row, column = n // OW, n % OW
    d = tl.arange(0, D_BLOCK)
    X += image * xb + group * xg + (row * xh + column * xw)[:, None]
    V += image * vb + group * vg
    for k in range(K):
        i, j = k // KW, k % KW
        y, x = row * down - pad_h + i * dilate_h, column * right - pad_w + j * dilate_w
        inside = (n < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        total = tl.full((N_BLOCK,), 0.0, tl.float32)
        for start in range(0, D, D_BLOCK):
            mask = inside[:, None] & ((start + d) < D)[None, :]
            a = tl.load(X + ((start + d) * xd)[None, :], mask=mask, other=0.0)
            b = tl.load(V + (y * vh + x * vw)[:, None] + ((start + d) * vd)[None, :], mask=mask, other=0.0)
            total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        if HAS_BIAS:
            total += tl.load(Bias + group * bias_g + k * bias_k).to(tl.float32)
        tl.store(Out + ((pid // tiles) * K + k) * N + n, tl.where(inside, total, outside), mask=n < N)


@triton.jit
def _gather(
    Weights, V, Out, G, D, H, W, OW, N, tiles,
    wb, wg, wk, wh, ww, vb, vg, vd, vh, vw, ob, og, od, oh, ow,
    down, right, dilate_h, dilate_w, pad_h, pad_w,
    K: tl.constexpr, KW: tl.constexpr, N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Out(n) = Σ_k Weights_k(n) V(n + Δ_k)."""
    pid = tl.program_id(0).to(tl.int64)
    image, group = pid // tiles // G, pid // tiles % G
    n = (pid % tiles) * N_BLOCK + tl.arange(0, N_BLOCK)
    d = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    row, column = n // OW, n % OW
    Weights += image * wb + group * wg + row * wh + column * ww
    V += image * vb + group * vg + (d * vd)[None, :]
    total = tl.full((N_BLOCK, D_BLOCK), 0.0, tl.float32)
    for k in range(K):
        i, j = k // KW, k % KW
        y, x = row * down - pad_h + i * dilate_h, column * right - pad_w + j * dilate_w
        inside = (n < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        weight = tl.load(Weights + k * wk, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(V + (y * vh + x * vw)[:, None], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    where = Out + image * ob + group * og + (row * oh + column * ow)[:, None] + (d * od)[None, :]
    tl.store(where, total, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _scatter(
    Weights, X, Out, G, D, OH, OW, W, N, tiles,
    wb, wg, wk, wh, ww, xb, xg, xd, xh, xw, ob, og, od, oh, ow,
    down, right, dilate_h, dilate_w, pad_h, pad_w,
    K: tl.constexpr, KW: tl.constexpr, N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Out(m) = Σ_k Weights_k(n) X(n) over the windows n whose k-th neighbour is m."""
    pid = tl.program_id(0).to(tl.int64)
    image, group = pid // tiles // G, pid // tiles % G
    m = (pid % tiles) * N_BLOCK + tl.arange(0, N_BLOCK)
    d = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    row, column = m // W, m % W
    Weights += image * wb + group * wg
    X += image * xb + group * xg + (d * xd)[None, :]
    total = tl.full((N_BLOCK, D_BLOCK), 0.0, tl.float32)
    for k in range(K):
        i, j = k // KW, k % KW
        y, x = row + pad_h - i * dilate_h, column + pad_w - j * dilate_w
        y_out, x_out = y // down, x // right
        inside = (m < N) & (y >= 0) & (x >= 0) & (y % down == 0) & (x % right == 0) & (y_out < OH) & (x_out < OW)
        weight = tl.load(Weights + y_out * wh + x_out * ww + k * wk, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(X + (y_out * xh + x_out * xw)[:, None], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    where = Out + image * ob + group * og + (row * oh + column * ow)[:, None] + (d * od)[None, :]
    tl.store(where, total, mask=(m < N)[:, None] & (d < D)[None, :])


def _blocks(positions: int, channels: int) -> dict[str, int]:
    return {
        "N_BLOCK": min(POSITIONS, triton.next_power_of_2(max(positions, 1))),
        "D_BLOCK": min(CHANNELS, triton.next_power_of_2(channels)),
    }


def _steps(window: Window) -> tuple[int, ...]:
    return (*window.stride, *window.dilation, *window.padding)


def dots(x: Tensor, v: Tensor, window: Window, bias: Tensor | None, outside: float) -> Tensor:
    """(B, G, D, H', W'), (B, G, D, H, W) -> (B, G, K, H', W')."""
    b, g, d, oh, ow = x.shape
    h, w = v.shape[-2:]
    out = torch.empty(b, g, window.offsets, oh, ow, device=x.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(oh * ow, d)
    tiles = triton.cdiv(oh * ow, blocks["N_BLOCK"])
    with torch.cuda.device_of(x):
        _dots[(b * g * tiles,)](
            x, v, x if bias is None else bias, out, g, d, h, w, ow, oh * ow, tiles, outside,
            *x.stride(), *v.stride(), *((0, 0) if bias is None else bias.stride()), *_steps(window),
            K=window.offsets, KW=window.kernel[1], HAS_BIAS=bias is not None, **blocks,
        )  # fmt: skip
    return out


def gather(weights: Tensor, v: Tensor, window: Window) -> Tensor:
    """(B, G, K, H', W'), (B, G, D, H, W) -> (B, G, D, H', W')."""
    b, g, d, h, w = v.shape
    oh, ow = weights.shape[-2:]
    same = (oh, ow) == (h, w)
    out = torch.empty_like(v, dtype=torch.float32) if same else torch.empty(b, g, d, oh, ow, device=v.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(oh * ow, d)
    tiles = triton.cdiv(oh * ow, blocks["N_BLOCK"])
    with torch.cuda.device_of(v):
        _gather[(b * g * tiles, triton.cdiv(d, blocks["D_BLOCK"]))](
            weights, v, out, g, d, h, w, ow, oh * ow, tiles,
            *weights.stride(), *v.stride(), *out.stride(), *_steps(window),
            K=window.offsets, KW=window.kernel[1], **blocks,
        )  # fmt: skip
    return out


def scatter(weights: Tensor, x: Tensor, size: Pair, window: Window) -> Tensor:
    """(B, G, K, H', W'), (B, G, D, H', W') -> (B, G, D, H, W)."""
    b, g, d, oh, ow = x.shape
    h, w = size
    same = (oh, ow) == (h, w)
    out = torch.empty_like(x, dtype=torch.float32) if same else torch.empty(b, g, d, h, w, device=x.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(h * w, d)
    tiles = triton.cdiv(h * w, blocks["N_BLOCK"])
    with torch.cuda.device_of(x):
        _scatter[(b * g * tiles, triton.cdiv(d, blocks["D_BLOCK"]))](
            weights, x, out, g, d, oh, ow, w, h * w, tiles,
            *weights.stride(), *x.stride(), *out.stride(), *_steps(window),
            K=window.offsets, KW=window.kernel[1], **blocks,
        )  # fmt: skip
    return out


FUSED = Steps(dots, gather, scatter)
