"""Selective scan: a linear recurrence along a sequence whose decay and input weights depend on the sequence itself.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.

    d_t = softplus(delta_t + delta_bias)                    the step, one per channel and time
    h_t = exp(d_t A) * h_{t-1} + d_t B_t u_t                N states per channel; zero-order hold for A, Euler for B
    y_t = sum_n C_{n,t} h_{n,t} + D u_t                     times SiLU(z_t) where there is a gate

with u, delta, z, y: (B, K d, L), A: (K d, N), B, C: (B, K, N, L) shared by the d channels of each of K groups, and
D, delta_bias: (K d,).

Three ways to compute it. ``selective_scan_reference`` is the definition: a loop over L. ``kernels.two_level_scan`` does about
2 sqrt(L) small steps instead of L, on any device. On CUDA devices a Triton kernel keeps the states in registers. The last two
hold a part of the states at a time, never all of them, and compute them again in the backward pass from those between
chunks. Decays only ever multiply: no quotient and no logarithm of them appears, so that none can overflow.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenry.kernels import two_level_scan

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step"]


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
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] < 1 or A.is_complex():
        raise ValueError(
            f"A must be real, (channels, states) with {channels} channels as u and at least one state, got {tuple(A.shape)}"
        )
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
    """The Triton kernels where they run, on CUDA devices if Triton is installed; else those for any device."""
    if device.type == "cuda":
        try:
            from tokenry.kernels._triton import selective_scan as kernels
        except ImportError:
            return two_level_scan
        if not kernels.INTERPRETED:
            return kernels
    return two_level_scan


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
    if u.numel() == 0:
        return torch.zeros_like(u, dtype=state.dtype), state.clone(), state.new_zeros(*state.shape, 0)
    return _kernels(u.device).forward(u, delta, A, B, C, D, bias, state, softplus, reverse)


@_scan_op.register_fake
def _(u, delta, A, B, C, D, bias, state, softplus, reverse):
    chunks = 0 if u.numel() == 0 else _kernels(u.device).tiles(u.shape[-1], A.shape[1])[1]
    y = torch.empty(u.shape, dtype=state.dtype, device=u.device)
    return y, state.new_empty(state.shape), state.new_empty(*state.shape, chunks)


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
    if u.numel() == 0:
        return torch.zeros_like(u), torch.zeros_like(delta), *_summed(carries, A, B, C), dlast.clone()
    return _kernels(u.device).backward(dy, dlast, u, delta, A, B, C, D, bias, carries, softplus, reverse)


@_backward_op.register_fake
def _(dy, dlast, u, delta, A, B, C, D, bias, carries, softplus, reverse):
    return u.new_empty(u.shape), delta.new_empty(delta.shape), *_summed(carries, A, B, C), dlast.new_empty(dlast.shape)


def _summed(like: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros for the gradients of A, B, C and D, in the type of the states."""
    return like.new_zeros(A.shape), like.new_zeros(B.shape), like.new_zeros(C.shape), like.new_zeros(A.shape[:1])


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
