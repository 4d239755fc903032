"""The selective scan in about 2 sqrt(L) steps of PyTorch operations instead of L, forward and backward.

    h_t = a_t h_{t-1} + b_t         ``tokenry.kernels.selective_scan`` says what a, b and the output are

The sequence is cut into chunks of about sqrt(L). All chunks are stepped through at the same time, twice: once from zero, to
learn what each hands on; then, when that has been carried from chunk to chunk, from what each receives. The data lie as
(steps, batch, groups, channels, states, chunks), so that every step works on contiguous memory.

Blocks of channels (and of the batch) are computed one after the other, so that their states stay in the cache and never all
exist at once. The backward pass computes them again from the states between chunks and runs the gradient's recurrence,
which is a scan of the same kind the other way. Against the order of the sequence the same steps run backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["backward", "forward", "tiles"]

# States of a block that are computed at once: a few buffers of 1 MiB stay in a core's second-level cache.
_BLOCK = 1 << 18


def tiles(length: int, states: int) -> tuple[int, int]:
    """Steps of a chunk and number of chunks: both near sqrt(L), the last chunk perhaps shorter."""
    steps = math.isqrt(length - 1) + 1
    return steps, -(-length // steps)


def _blocks(batch: int, channels: int, per_channel: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of a group's channels with at most _BLOCK states each, as equal as can be."""

    def parts(total: int, most: int) -> list[slice]:
        count = -(-total // max(1, most))
        size = -(-total // max(1, count))
        return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]

    for rows in parts(batch, _BLOCK // max(1, channels * per_channel)):
        some = rows.stop - rows.start
        for columns in parts(channels, _BLOCK // max(1, some * per_channel)):
            yield rows, columns


def _fold(x: Tensor, steps: int, chunks: int, kind: torch.dtype) -> Tensor:
    """(..., L) -> (steps, ..., chunks), contiguous: position chunk * steps + step; zeros behind the end."""
    length = x.shape[-1]
    whole = length // steps
    out = torch.empty(steps, *x.shape[:-1], chunks, dtype=kind, device=x.device)
    out[..., :whole].copy_(x[..., : whole * steps].unflatten(-1, (whole, steps)).movedim(-1, 0))
    if whole < chunks:
        rest = length - whole * steps
        out[:rest, ..., whole].copy_(x[..., whole * steps :].movedim(-1, 0))
        out[rest:, ..., whole] = 0.0
    return out


def _unfold(x: Tensor, into: Tensor) -> None:
    """The inverse of ``_fold``, written to ``into`` (..., L)."""
    steps, length = x.shape[0], into.shape[-1]
    whole = length // steps
    into[..., : whole * steps].unflatten(-1, (whole, steps)).copy_(x[..., :whole].movedim(0, -1))
    if whole * steps < length:
        into[..., whole * steps :].copy_(x[: length - whole * steps, ..., whole].movedim(0, -1))


def _run(a: Tensor, x: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """x_t <- a_t x_{t-1} + x_t in place along the sequence: two levels of steps.

    Args:
        a: (steps, ..., chunks), the decays.
        x: Of the same shape; becomes the states.
        start: (...), the state before the first step.
        reverse: From the last position to the first.

    Returns:
        The states that enter each chunk, (..., chunks), and the state after the last step, (...).
    """
    decay, states = a.unbind(0), x.unbind(0)
    if reverse:
        decay, states = decay[::-1], states[::-1]
    chunks = x.shape[-1]
    enter = start.new_empty(chunks, *start.shape)
    arrivals = enter.unbind(0)[:: -1 if reverse else 1]
    arrivals[0].copy_(start)
    if chunks > 1:
        local = states[0].clone()  # what a chunk hands on if nothing enters it
        for a_t, b_t in zip(decay[1:], states[1:], strict=True):
            torch.addcmul(b_t, a_t, local, out=local)
        handed = local.movedim(-1, 0).contiguous().unbind(0)[:: -1 if reverse else 1]
        kept = a.prod(0).movedim(-1, 0).contiguous().unbind(0)[:: -1 if reverse else 1]
        for s in range(1, chunks):
            torch.addcmul(handed[s - 1], kept[s - 1], arrivals[s - 1], out=arrivals[s])
    entering = enter.movedim(0, -1).contiguous()
    before = entering
    for a_t, x_t in zip(decay, states, strict=True):
        x_t.addcmul_(a_t, before)
        before = x_t
    return entering, before[..., 0 if reverse else -1]


def _steps_of(delta: Tensor, bias: Tensor | None, softplus: bool, steps: int, chunks: int, kind: torch.dtype) -> Tensor:
    """The steps d of (b, K, d, L), folded to (steps, b, K, d, 1, chunks); zero behind the end, where it changes nothing."""
    step = _fold(delta, steps, chunks, kind)
    if bias is not None:
        step += bias.unsqueeze(-1)
    if softplus:
        step = F.softplus(step)
    step[steps - (steps * chunks - delta.shape[-1]) :, ..., -1] = 0.0
    return step.unsqueeze(-2)


def _grouped(groups: int, *tensors: Tensor | None) -> list[Any]:
    """The channel axis, the second (the first of vectors and of A), split into (groups, channels of a group)."""
    return [t if t is None else t.unflatten(1 if t.ndim >= 3 else 0, (groups, -1)) for t in tensors]


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, state: Tensor,
    softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, last state, and the state before each chunk. Sizes must not be zero."""
    kind, groups, (steps, chunks) = state.dtype, B.shape[1], tiles(u.shape[-1], A.shape[-1])
    y = torch.empty(u.shape, dtype=kind, device=u.device)
    last, carries = state.clone(memory_format=torch.contiguous_format), state.new_zeros(*state.shape, chunks)
    A, (D, bias) = A.to(kind), (t if t is None else t.to(kind) for t in (D, bias))
    u, delta, A, D, bias, state = _grouped(groups, u, delta, A, D, bias, state)
    y_out, last_out, carries_out = _grouped(groups, y, last, carries)
    for rows, some in _blocks(u.shape[0], u.shape[2], groups * A.shape[-1] * steps * chunks):
        enter = _fold(B[rows], steps, chunks, kind).unsqueeze(3)  # (steps, b, K, 1, N, chunks)
        leave = _fold(C[rows], steps, chunks, kind).unsqueeze(3)
        rates = A[:, some].unsqueeze(-1)  # (K, d, N, 1)
        step = _steps_of(delta[rows, :, some], bias if bias is None else bias[:, some], softplus, steps, chunks, kind)
        inputs = _fold(u[rows, :, some], steps, chunks, kind).unsqueeze(-2)  # (steps, b, K, d, 1, chunks)
        decay = torch.mul(step, rates).exp_()  # (steps, b, K, d, N, chunks)
        x = torch.mul(step.mul_(inputs), enter)
        carries_out[rows, :, some], last_out[rows, :, some] = _run(decay, x, state[rows, :, some], reverse)
        out = x.mul_(leave).sum(-2)
        if D is not None:
            out.addcmul_(inputs.squeeze(-2), D[:, some].unsqueeze(-1))
        _unfold(out, y_out[rows, :, some])
    return y, last, carries


def backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, carries: Tensor, softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and the initial state. Sizes must not be zero.

    With q_t = C_t dy_t and v_t = a_t (q_t + v_{t+1}), a scan the other way: dL/dh_t = q_t + v_{t+1}.
    """
    kind, groups, (steps, chunks) = carries.dtype, B.shape[1], tiles(u.shape[-1], A.shape[-1])
    du, ddelta = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta))
    dA, dB, dC, dD = (carries.new_zeros(t.shape) for t in (A, B, C, A[:, 0]))
    dstate = dlast.clone(memory_format=torch.contiguous_format)
    A, (D, bias) = A.to(kind), (t if t is None else t.to(kind) for t in (D, bias))
    dy, dlast, u, delta, A, D, bias, carries = _grouped(groups, dy, dlast, u, delta, A, D, bias, carries)
    du_out, ddelta_out, dA_out, dD_out, dstate_out = _grouped(groups, du, ddelta, dA, dD, dstate)
    dB_out, dC_out = (_fold(t, steps, chunks, kind) for t in (dB, dC))  # (steps, B, K, N, chunks)
    first, rest = (-1, slice(None, -1)) if reverse else (0, slice(1, None))  # along the scan
    final, front = (0, slice(1, None)) if reverse else (-1, slice(None, -1))
    for rows, some in _blocks(u.shape[0], u.shape[2], groups * A.shape[-1] * steps * chunks):
        enter = _fold(B[rows], steps, chunks, kind).unsqueeze(3)  # (steps, b, K, 1, N, chunks)
        leave = _fold(C[rows], steps, chunks, kind).unsqueeze(3)
        rates, carry = A[:, some].unsqueeze(-1), carries[rows, :, some]
        step = _steps_of(delta[rows, :, some], bias if bias is None else bias[:, some], softplus, steps, chunks, kind)
        inputs = _fold(u[rows, :, some], steps, chunks, kind).unsqueeze(-2)
        upper = _fold(dy[rows, :, some], steps, chunks, kind).unsqueeze(-2)  # all (steps, b, K, d, 1, chunks)
        driven = step * inputs

        decay = torch.mul(step, rates).exp_()  # (steps, b, K, d, N, chunks)
        h = torch.mul(driven, enter)
        before = carry
        order = range(steps - 1, -1, -1) if reverse else range(steps)
        h_t, a_t = h.unbind(0), decay.unbind(0)
        for t in order:
            h_t[t].addcmul_(a_t[t], before)
            before = h_t[t]
        dC_out[:, rows] += torch.mul(h, upper).sum(3)

        g = torch.mul(upper, leave)  # q
        v = torch.mul(decay, g)
        arriving, dstate_out[rows, :, some] = _run(decay, v, dlast[rows, :, some], not reverse)
        g[front] += v[rest]
        g[final] += arriving  # dL/dh

        v[rest] *= h[front]
        v[first] *= carry  # dL/da * a
        dA_out[:, some] += torch.mul(v, step).sum(dim=(0, 1, -1))
        dstep = v.mul_(rates).sum(-2)
        dB_out[:, rows] += torch.mul(g, driven).sum(3)
        ddriven = g.mul_(enter).sum(-2)  # (steps, b, K, d, chunks)
        step, inputs, upper = step.squeeze(-2), inputs.squeeze(-2), upper.squeeze(-2)
        dstep.addcmul_(ddriven, inputs)
        if softplus:
            dstep *= step.neg().expm1_().neg_()  # softplus'(x) = 1 - exp(-softplus(x))
        _unfold(dstep, ddelta_out[rows, :, some])
        ddriven *= step
        if D is not None:
            ddriven.addcmul_(upper, D[:, some].unsqueeze(-1))
            dD_out[:, some] += torch.mul(upper, inputs).sum(dim=(0, 1, -1))
        _unfold(ddriven, du_out[rows, :, some])
    _unfold(dB_out, dB)
    _unfold(dC_out, dC)
    return du, ddelta, dA, dB, dC, dD, dstate
