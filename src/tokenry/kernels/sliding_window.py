"""Sliding-window attention: dot products with the neighbours of a position, and weighted sums over them.

    scores_k(n) = q_n · k_{n + Δ_k} + bias_k          -inf where n + Δ_k is outside the map
    sum(n)      = Σ_k w_k(n) v_{n + Δ_k}              v = 0 outside the map

Δ_k are the K = kh·kw offsets of a window in row-major order. ``unfolded_scores`` and ``unfolded_sum`` are these
definitions: they copy the neighbours of every position, K times the map. ``window_scores`` and ``window_sum`` take one
offset after the other instead: the part of the map that has such a neighbour, times the map shifted by Δ_k.
Nothing of size K·D per position exists, neither forward nor backward.

Three steps are enough, since each one's gradients are the other two:

    dots:     s_k(n) = x_n · v_{n + Δ_k}        gather:  y_n = Σ_k w_k(n) v_{n + Δ_k}        scatter:  its transpose

On CUDA devices each step is one Triton kernel (``tokenry.kernels._triton.sliding_window``), elsewhere the shifted products
below. Where ``torch.compile`` or an exporter traces, the same sums are written over slices of the padded map, which a compiler
fuses into one loop and differentiates itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["unfolded_scores", "unfolded_sum", "window_scores", "window_sum"]

Pair = tuple[int, int]


class Window(NamedTuple):
    """Offsets of a window, as of a convolution. All pairs are (rows, columns)."""

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Pair = (0, 0)

    @property
    def offsets(self) -> int:
        """K."""
        return self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> Pair:
        """How many windows fit into a map of this size."""
        h, w = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation, padding in zip(
                (height, width), self.kernel, self.stride, self.dilation, self.padding, strict=True
            )
        )
        return h, w

    def _span(self, axis: int, index: int, size: int, out: int) -> tuple[slice, slice] | None:
        """Outputs whose ``index``-th neighbour along an axis is inside the map, and where these neighbours are."""
        step, shift = self.stride[axis], self.dilation[axis] * index - self.padding[axis]
        start, stop = max(0, -(shift // step)), min(out, (size - 1 - shift) // step + 1)
        if start >= stop:
            return None
        return slice(start, stop), slice(start * step + shift, (stop - 1) * step + shift + 1, step)

    def shifts(self, size: Pair, out: Pair) -> Iterator[tuple[int, tuple[Any, ...], tuple[Any, ...]]]:
        """Number, outputs and neighbours of every offset that has any."""
        columns = [self._span(1, j, size[1], out[1]) for j in range(self.kernel[1])]
        for i in range(self.kernel[0]):
            rows = self._span(0, i, size[0], out[0])
            for j, column in enumerate(columns):
                if rows is not None and column is not None:
                    number = i * self.kernel[1] + j
                    yield number, (..., rows[0], column[0]), (..., rows[1], column[1])


def _wide(*tensors: Tensor) -> list[Tensor]:
    """All in one dtype, at least float32: sums of bfloat16 numbers are taken in float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _zeros(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """Zeros that lie in memory as ``like`` does where the shape is the same."""
    return torch.zeros_like(like) if like.shape == size else like.new_zeros(size)


def _dots(x: Tensor, v: Tensor, window: Window, bias: Tensor | None, outside: float) -> Tensor:
    """(B, G, D, H', W'), (B, G, D, H, W) -> (B, G, K, H', W')."""
    x, v = _wide(x, v)
    b, g, _, *out = x.shape
    scores = x.new_full((b, g, window.offsets, *out), outside)
    for number, here, there in window.shifts((v.shape[-2], v.shape[-1]), (out[0], out[1])):
        dots = (x[here] * v[there]).sum(2)
        scores[:, :, number][here] = dots if bias is None else dots + bias[:, number, None, None]
    return scores


def _gather(weights: Tensor, v: Tensor, window: Window) -> Tensor:
    """(B, G, K, H', W'), (B, G, D, H, W) -> (B, G, D, H', W')."""
    weights, v = _wide(weights, v)
    out = weights.shape[-2:]
    total = _zeros(v, (*v.shape[:3], *out))
    for number, here, there in window.shifts((v.shape[-2], v.shape[-1]), (out[0], out[1])):
        total[here].addcmul_(weights[:, :, number, None][here], v[there])
    return total


def _scatter(weights: Tensor, x: Tensor, size: Pair, window: Window) -> Tensor:
    """(B, G, K, H', W'), (B, G, D, H', W') -> (B, G, D, H, W): the transpose of ``_gather`` in its values."""
    weights, x = _wide(weights, x)
    total = _zeros(x, (*x.shape[:3], *size))
    for number, here, there in window.shifts(size, (x.shape[-2], x.shape[-1])):
        total[there].addcmul_(weights[:, :, number, None][here], x[here])
    return total


class Steps(NamedTuple):
    """One way to compute the three steps; each returns float32, or float64 for float64 inputs."""

    dots: Callable[[Tensor, Tensor, Window, Tensor | None, float], Tensor]
    gather: Callable[[Tensor, Tensor, Window], Tensor]
    scatter: Callable[[Tensor, Tensor, Pair, Window], Tensor]


SHIFTED = Steps(_dots, _gather, _scatter)


def steps_for(x: Tensor) -> Steps:
    """Triton kernels where they run, else shifted products."""
    if not x.is_cuda or x.dtype == torch.float64 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return SHIFTED
    try:
        from tokenry.kernels._triton.sliding_window import FUSED
    except ImportError:
        return SHIFTED
    return FUSED


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.window, ctx.bias = window, None if bias is None else bias.dtype
        return steps_for(q).dots(q, k, window, bias, -math.inf).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (q, k) = grads, ctx.saved_tensors
        window, (want_q, want_k, want_bias, _) = ctx.window, ctx.needs_input_grad
        size, steps = (q.shape[-2], q.shape[-1]), steps_for(q)
        dq = steps.gather(grad, k, window).to(q.dtype) if want_q else None
        dk = steps.scatter(grad, q, size, window).to(k.dtype) if want_k else None
        dbias = None
        if want_bias:
            # Outside the map a score is -inf whatever the bias: what flows back there is not its gradient.
            sums = {n: grad[:, :, n][here].sum((0, 2, 3)) for n, here, _ in window.shifts(size, size)}
            none = grad.new_zeros(grad.shape[1])
            dbias = torch.stack([sums.get(n, none) for n in range(window.offsets)], 1).to(ctx.bias)
        return dq, dk, dbias, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(weights, values)
        ctx.window = window
        return steps_for(values).gather(weights, values, window).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weights, values) = grads, ctx.saved_tensors
        want_weights, want_values, _ = ctx.needs_input_grad
        steps = steps_for(values)
        dweights = steps.dots(grad, values, ctx.window, None, 0.0).to(weights.dtype) if want_weights else None
        dvalues = None
        if want_values:
            size = (values.shape[-2], values.shape[-1])
            dvalues = steps.scatter(weights, grad, size, ctx.window).to(values.dtype)
        return dweights, dvalues, None


def _slices(v: Tensor, window: Window, out: Pair) -> list[Tensor]:
    """The padded map seen from every offset: K views (..., H', W')."""
    (down, right), (p, q) = window.stride, window.padding
    padded = F.pad(v, (q, q, p, p))
    starts = (
        (i * window.dilation[0], j * window.dilation[1])
        for i in range(window.kernel[0])
        for j in range(window.kernel[1])
    )
    return [
        padded[..., i : i + (out[0] - 1) * down + 1 : down, j : j + (out[1] - 1) * right + 1 : right] for i, j in starts
    ]


def _traced_scores(q: Tensor, k: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    wide, k = _wide(q, k)
    size = (k.shape[-2], k.shape[-1])
    scores = torch.stack([(wide * near).sum(2) for near in _slices(k, window, size)], 2)
    if bias is not None:
        scores = scores + bias[:, :, None, None]
    inside = torch.stack(_slices(torch.ones(size, dtype=torch.bool, device=k.device), window, size))  # (K, H, W)
    return scores.masked_fill(~inside, -math.inf).to(q.dtype)


def _traced_sum(weights: Tensor, values: Tensor, window: Window) -> Tensor:
    weights, wide = _wide(weights, values)
    near = _slices(wide, window, (weights.shape[-2], weights.shape[-1]))
    terms = [weight[:, :, None] * value for weight, value in zip(weights.unbind(2), near, strict=True)]
    return sum(terms[1:], terms[0]).to(values.dtype)


def _pair(value: int | Pair, name: str, smallest: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else (value[0], value[1])
    if min(pair) < smallest:
        raise ValueError(f"{name} must be at least {smallest} in both directions, got {value}")
    return pair


def _window(
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    padding: int | Pair | None = None,
) -> Window:
    kernel = _pair(kernel_size, "kernel_size", 1)
    step, wide = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    reach = wide[0] * (kernel[0] - 1), wide[1] * (kernel[1] - 1)
    if padding is not None:
        return Window(kernel, step, wide, _pair(padding, "padding", 0))
    if reach[0] % 2 or reach[1] % 2:
        raise ValueError(
            f"a window of kernel_size={kernel_size} has no middle; take an odd kernel_size (3, 5, 7), or give padding"
        )
    return Window(kernel, step, wide, (reach[0] // 2, reach[1] // 2))


def _check_scores(q: Tensor, k: Tensor, kernel_size: int | Pair, bias: Tensor | None) -> Window:
    window = _window(kernel_size)
    if q.ndim != 5 or q.shape != k.shape:
        raise ValueError(f"q and k must share one shape (B, G, D, H, W), got {tuple(q.shape)} and {tuple(k.shape)}")
    if bias is not None and bias.shape != (q.shape[1], window.offsets):
        raise ValueError(
            f"bias must be (G, K) = {(q.shape[1], window.offsets)}: one number per group and offset, "
            f"got {tuple(bias.shape)}"
        )
    return window


def _check_sum(weights: Tensor, values: Tensor, window: Window) -> None:
    if weights.ndim != 5 or values.ndim != 5:
        raise ValueError(
            f"weights must be (B, G, K, H', W') and values (B, G, D, H, W), "
            f"got {tuple(weights.shape)} and {tuple(values.shape)}"
        )
    b, g, _, h, w = values.shape
    expected = (b, g, window.offsets, *window.output_size(h, w))
    if weights.shape != expected:
        raise ValueError(
            f"values {tuple(values.shape)} and this window need weights {expected}, got {tuple(weights.shape)}"
        )


def window_scores(q: Tensor, k: Tensor, kernel_size: int | Pair, bias: Tensor | None = None) -> Tensor:
    """Dot product of every position with each of its neighbours.

    Inputs of any strides, so that permuted views need no copy. Sums are taken in float32 or wider.

    Args:
        q: ``(B, G, D, H, W)``.
        k: ``(B, G, D, H, W)``.
        kernel_size: Side of the window, odd, or (rows, columns).
        bias: ``(G, K)``, added to the scores.

    Returns:
        ``(B, G, K, H, W)`` in the dtype of ``q``; K offsets in row-major order, minus infinity outside the map.

    Raises:
        ValueError: An even window, or shapes that do not fit together.

    Example:
        >>> x = torch.ones(1, 1, 4, 2, 2)
        >>> window_scores(x, x, 3)[0, 0, :, 0, 0].tolist()  # the upper left corner
        [-inf, -inf, -inf, -inf, 4.0, 4.0, -inf, 4.0, 4.0]
    """
    window = _check_scores(q, k, kernel_size, bias)
    if torch.compiler.is_compiling():
        return _traced_scores(q, k, bias, window)
    return _Scores.apply(q, k, bias, window)


def window_sum(
    weights: Tensor,
    values: Tensor,
    kernel_size: int | Pair,
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    padding: int | Pair | None = None,
) -> Tensor:
    """Sum of the values in a window around every position, with weights of that position.

    A convolution whose kernel differs from position to position, or attention over a window. Inputs of any strides;
    sums are taken in float32 or wider.

    Args:
        weights: ``(B, G, K, H', W')``, K offsets in row-major order.
        values: ``(B, G, D, H, W)``. Outside the map they are zero.
        kernel_size: Side of the window, or (rows, columns).
        stride: Step between windows. Default 1.
        dilation: Step within a window. Default 1.
        padding: Where windows begin, as in a convolution. Default None: windows are centred (odd sizes only).

    Returns:
        ``(B, G, D, H', W')`` in the dtype of ``values``.

    Raises:
        ValueError: An even window without padding, or shapes that do not fit together.

    Example:
        >>> window_sum(torch.ones(1, 1, 9, 2, 3), torch.ones(1, 1, 1, 2, 3), 3).tolist()
        [[[[[4.0, 6.0, 4.0], [4.0, 6.0, 4.0]]]]]
    """
    window = _window(kernel_size, stride, dilation, padding)
    _check_sum(weights, values, window)
    if torch.compiler.is_compiling():
        return _traced_sum(weights, values, window)
    return _Sum.apply(weights, values, window)


def _unfolded(v: Tensor, window: Window) -> Tensor:
    """(B, G, D, H, W) -> (B, G, D, K, H', W')."""
    b, g, d, h, w = v.shape
    columns = F.unfold(v.reshape(b, g * d, h, w), *(window.kernel, window.dilation, window.padding, window.stride))
    return columns.view(b, g, d, window.offsets, *window.output_size(h, w))


def unfolded_scores(q: Tensor, k: Tensor, kernel_size: int | Pair, bias: Tensor | None = None) -> Tensor:
    """The definition of ``window_scores``, with a copy of every neighbour."""
    window = _check_scores(q, k, kernel_size, bias)
    scores = (q[:, :, :, None] * _unfolded(k, window)).sum(2)
    if bias is not None:
        scores = scores + bias[:, :, None, None]
    inside = _unfolded(torch.ones_like(k[:1, :1, :1]), window)[:, :, 0] > 0
    return scores.masked_fill(~inside, -math.inf)


def unfolded_sum(
    weights: Tensor,
    values: Tensor,
    kernel_size: int | Pair,
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    padding: int | Pair | None = None,
) -> Tensor:
    """The definition of ``window_sum``, with a copy of every neighbour."""
    window = _window(kernel_size, stride, dilation, padding)
    _check_sum(weights, values, window)
    return (weights[:, :, None] * _unfolded(values, window)).sum(3)
