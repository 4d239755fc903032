"""Selective scan: a linear recurrence along a sequence whose decay and input weights depend on the sequence itself.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.

    d_t = softplus(delta_t + delta_bias)                    the step, one per channel and time
    h_t = exp(d_t A) * h_{t-1} + d_t B_t u_t                N states per channel; zero-order hold for A, Euler for B
    y_t = sum_n C_{n,t} h_{n,t} + D u_t                     times SiLU(z_t) where there is a gate

with u, delta, z, y: (B, K d, L), A: (K d, N), B, C: (B, K, N, L) shared by the d channels of each of K groups, and
D, delta_bias: (K d,).

Three ways to compute it. ``selective_scan_reference`` is the definition: a loop over L. On the CPU a scan of two levels does
about 2 sqrt(L) steps instead of L: the sequence is cut into chunks of about sqrt(L), every chunk is stepped through at
the same time, once from zero to learn what it hands on, and once from what the chunks before it hand on. On CUDA a Triton
kernel keeps the states in registers. Both hold a few blocks of states at a time, never all of them, and compute them
again in the backward pass from the states between chunks. Decays only ever multiply: no quotient and no logarithm of them
appears, so that none can overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step"]

# States of a block that are computed at once: a few buffers of 1 MiB stay in a core's second-level cache.
_BLOCK = 1 << 18


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    z: Tensor | None = None,
    *,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of ``selective_scan``: a loop over the sequence. Same arguments and results."""
    B, C, state = _check(u, delta, A, B, C, D, delta_bias, z, initial_state)
    steps = range(u.shape[-1])
    outputs: dict[int, Tensor] = {}
    for t in reversed(steps) if reverse else steps:
        gate = None if z is None else z[..., t]
        outputs[t], state = selective_scan_step(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, delta_bias, delta_softplus, gate
        )
    y = torch.stack([outputs[t] for t in steps], dim=-1) if outputs else torch.zeros_like(u)
    return (y, state) if return_last_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``selective_scan``, for sequences that arrive token by token.

    Args:
        state: (B, K d, N), float32 (float64 for float64 inputs); zeros before the first token.
        u: (B, K d), the token's input.
        delta: (B, K d).
        A: (K d, N), not positive.
        B: (B, K, N), or (B, N) for K = 1.
        C: As ``B``.
        D: (K d,) or None.
        delta_bias: (K d,) or None.
        delta_softplus: Whether softplus is taken of the step.
        z: (B, K d) or None, the gate.

    Returns:
        The token's output, (B, K d) in the type of ``u``, and the next state.

    Example:
        >>> u, A, B = torch.ones(1, 2), -torch.ones(2, 3), torch.ones(1, 3)
        >>> y, state = selective_scan_step(torch.zeros(1, 2, 3), u, u, A, B, B, delta_softplus=False)
        >>> y
        tensor([[3., 3.]])
    """
    kind = state.dtype
    B, C = (t if t.ndim == 3 else t.unsqueeze(1) for t in (B, C))
    step = delta.to(kind) if delta_bias is None else delta.to(kind) + delta_bias.to(kind)
    step = (F.softplus(step) if delta_softplus else step).unsqueeze(-1)  # (B, K d, 1)
    group = u.shape[1] // B.shape[1]
    drive = step * u.to(kind).unsqueeze(-1) * B.to(kind).repeat_interleave(group, dim=1)
    state = torch.exp(step * A.to(kind)) * state + drive  # (B, K d, N)
    y = (C.to(kind).repeat_interleave(group, dim=1) * state).sum(-1)  # (B, K d)
    if D is not None:
        y = y + D.to(kind) * u.to(kind)
    if z is not None:
        y = y * F.silu(z.to(kind))
    return y.to(u.dtype), state


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    z: Tensor | None = None,
    *,
    return_last_state: Literal[False] = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    z: Tensor | None = None,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    z: Tensor | None = None,
    *,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of a selective state space model along the last axis.

    Steps, decays and states are float32 (float64 for a float64 ``u``) whatever the inputs' types are.

    Args:
        u: (B, K d, L), the sequences. L may be 0.
        delta: (B, K d, L), the steps before bias and softplus.
        A: (K d, N), real and not positive: the rates of decay, in most models -exp(A_log).
        B: (B, K, N, L), or (B, N, L) for K = 1: how the input enters the states.
        C: As ``B``: how the states leave.
        D: (K d,), the weight of the input that passes by the states; None: nothing passes.
        delta_bias: (K d,) or None.
        delta_softplus: Take softplus of the steps, so that they are positive.
        z: (B, K d, L), a gate; None: no gate.
        return_last_state: Also return the state after the last step.
        initial_state: (B, K d, N), the state before the first step; None: zeros.
        reverse: Run from the last position to the first. Inputs and outputs keep their places; nothing is flipped.

    Returns:
        (B, K d, L) in the type of ``u``; with ``return_last_state`` also the state (B, K d, N), float32 (or float64).

    Raises:
        ValueError: Shapes that do not fit each other; a positive or undefined rate in ``A`` (looked at on the CPU alone, as on
            other devices it would have to be waited for); a state in half precision.

    Example:
        >>> u, delta, z = torch.randn(3, 2, 8, 100).unbind(0)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 100), torch.randn(2, 4, 100)
        >>> y = selective_scan(u, delta, A, B, C, z=z)
        >>> torch.allclose(y, selective_scan_reference(u, delta, A, B, C, z=z), atol=1e-5)
        True
    """
    B, C, state = _check(u, delta, A, B, C, D, delta_bias, z, initial_state)
    y, last, _ = _scan_op(u, delta, A, B, C, D, delta_bias, state, delta_softplus, reverse)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Refuse what does not fit; B and C with their group axis, and the state to start from."""
    if u.ndim != 3 or not u.is_floating_point():
        raise ValueError(f"u must be real numbers (batch, channels, length), got {tuple(u.shape)} of {u.dtype}")
    batch, channels, length = u.shape
    for name, t in (("delta", delta), ("z", z)):
        if t is not None and t.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {tuple(u.shape)}, got {tuple(t.shape)}")
    if A.ndim != 2 or A.shape[0] != channels or A.is_complex():
        raise ValueError(f"A must be real, (channels, states) with {channels} channels as u, got {tuple(A.shape)}")
    B, C = (t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    states = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or (t.shape[0], t.shape[2], t.shape[3]) != (batch, states, length):
            raise ValueError(
                f"{name} must be (batch, groups, states, length) = ({batch}, K, {states}, {length}), or without the "
                f"group axis for one group, got {tuple(t.shape)}"
            )
    if B.shape != C.shape or B.shape[1] == 0 or channels % B.shape[1]:
        raise ValueError(
            f"B and C must have the same number of groups, and it must divide the {channels} channels of u; got "
            f"{B.shape[1]} and {C.shape[1]} groups"
        )
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None and t.shape != (channels,):
            raise ValueError(f"{name} must have one entry per channel, ({channels},), got {tuple(t.shape)}")
    if not torch.compiler.is_compiling() and A.device.type == "cpu" and not bool((A <= 0).all()):
        raise ValueError(
            "A must not be positive (a positive rate grows without bound, exp(delta A) overflows), got a largest entry of "
            f"{A.max().item():.3g}; pass -exp(A_log)"
        )
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    if initial_state is None:
        return B, C, u.new_zeros(batch, channels, states, dtype=kind)
    if initial_state.shape != (batch, channels, states):
        raise ValueError(
            f"initial_state must be (batch, channels, states) = {(batch, channels, states)}, got "
            f"{tuple(initial_state.shape)}"
        )
    if initial_state.dtype != kind:
        raise ValueError(
            f"initial_state must be {kind} for inputs of {u.dtype}, got {initial_state.dtype}: states lose small steps in "
            "half precision; pass the state as selective_scan returned it"
        )
    return B, C, initial_state


def _kernels(device: torch.device) -> Any:
    """The Triton kernels where they run: on CUDA devices, if Triton is installed."""
    if device.type != "cuda":
        return None
    try:
        from tokenry.kernels._triton import selective_scan as kernels
    except ImportError:
        return None
    return None if kernels.INTERPRETED else kernels


# One operator for the compiler, which would otherwise unroll the steps. Carries, its third output, are the states that
# enter each chunk; the backward pass starts from them.
@torch.library.custom_op("tokenry::selective_scan", mutates_args=())
def _scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    state: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K d, L), (B, K d, N), (B, K d, N, chunks), all of the state's type."""
    kernels = _kernels(u.device)
    empty = u.numel() == 0 or A.numel() == 0
    run = _forward if kernels is None or empty else kernels.forward
    return run(u, delta, A, B, C, D, bias, state, softplus, reverse)


@_scan_op.register_fake
def _(u, delta, A, B, C, D, bias, state, softplus, reverse):
    kernels = _kernels(u.device)
    empty = u.numel() == 0 or A.numel() == 0
    chunks = _cut(u.shape[-1])[1] if kernels is None or empty else kernels.tiles(u.shape[-1], A.shape[1])[1]
    y = torch.empty(u.shape, dtype=state.dtype, device=u.device)
    return y, torch.empty_like(state, memory_format=torch.contiguous_format), state.new_empty(*state.shape, chunks)


@torch.library.custom_op("tokenry::selective_scan_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    carries: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and the initial state."""
    kernels = _kernels(u.device)
    empty = u.numel() == 0 or A.numel() == 0
    run = _backward if kernels is None or empty else kernels.backward
    return run(dy, dlast, u, delta, A, B, C, D, bias, carries, softplus, reverse)


@_backward_op.register_fake
def _(dy, dlast, u, delta, A, B, C, D, bias, carries, softplus, reverse):
    empty = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta)]
    empty += [carries.new_empty(t.shape) for t in (A, B, C, A[:, 0], dlast)]
    return tuple(empty)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _state, ctx.softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor, _dcarries: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, carries = ctx.saved_tensors
    _u, _delta, A, B, C, D, bias = tensors
    du, ddelta, dA, dB, dC, dD, dstate = _backward_op(dy, dlast, *tensors, carries, ctx.softplus, ctx.reverse)
    dbias = None if bias is None else ddelta.sum(dim=(0, 2), dtype=carries.dtype).to(bias.dtype)
    dD = None if D is None else dD.to(D.dtype)
    return du, ddelta, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), dD, dbias, dstate, None, None


_scan_op.register_autograd(_gradients, setup_context=_setup)


def _cut(length: int) -> tuple[int, int]:
    """Steps of a chunk and number of chunks: both near sqrt(L), the last chunk perhaps shorter."""
    steps = max(1, math.isqrt(max(length - 1, 0)) + 1)
    return steps, max(1, -(-length // steps))


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


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, state: Tensor,
    softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind, groups, (steps, chunks) = state.dtype, B.shape[1], _cut(u.shape[-1])
    y = torch.empty(u.shape, dtype=kind, device=u.device)
    last, carries = state.clone(memory_format=torch.contiguous_format), state.new_zeros(*state.shape, chunks)
    if u.numel() == 0 or A.numel() == 0:
        return y.zero_(), last, carries
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


def _backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, carries: Tensor, softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With q_t = C_t dy_t and v_t = a_t (q_t + v_{t+1}), a scan the other way: dL/dh_t = q_t + v_{t+1}."""
    kind, groups, (steps, chunks) = carries.dtype, B.shape[1], _cut(u.shape[-1])
    du, ddelta = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta))
    dA, dB, dC, dD = (carries.new_zeros(t.shape) for t in (A, B, C, A[:, 0]))
    dstate = dlast.clone(memory_format=torch.contiguous_format)
    if u.numel() == 0 or A.numel() == 0:
        return du, ddelta, dA, dB, dC, dD, dstate
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
