"""Triton kernels of ``tokenry.kernels.selective_scan``: states live in registers, and between tiles nowhere else.

One program per batch entry and channel walks along the sequence, a tile of positions and all N states at a time. A
tile's recurrence is a parallel scan of pairs (decay, input); what it hands on is the state at its end, which the forward
pass keeps. The backward pass walks the other way, computes a tile's states again from that, and scans the gradient

    g_t = C_t dy_t + a_{t+1} g_{t+1},    dL/da_t = g_t h_{t-1}

where a_{t+1} and h_{t-1} come from loading one position further on and one back, so that no tile needs its neighbour. Gradients of B and C,
which the channels of a group share, and of A and D, which the batch shares, are added up atomically in float32. Against
the order of the sequence the same programs walk the tiles from the other end; nothing is flipped in memory.

They run on CUDA devices, and on a CPU in Triton's interpreter (set ``TRITON_INTERPRET=1`` before this module is imported).
log1p is written out: the interpreter has no libdevice.
"""

# pyrefly: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "backward", "forward", "tiles"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def tiles(length: int, states: int) -> tuple[int, int]:
    """Positions of a tile, a power of 2, and number of tiles: about 2048 states of a tile in registers."""
    size = max(16, 2048 // triton.next_power_of_2(states))
    size = min(size, max(16, triton.next_power_of_2(length)))
    return size, triton.cdiv(length, size)


@triton.jit
def _compose(a_first, b_first, a_then, b_then):
    return a_first * a_then, a_then * b_first + b_then


@triton.jit
def _softplus(x):
    # log1p(e) = log(w) e / (w - 1), w = 1 + e: exact where 1 + e has lost most of e
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _steps(Delta, at, t, L, bias, kind: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Raw steps and steps at positions t, (TILE,); zero steps outside the sequence, which change nothing."""
    inside = (t >= 0) & (t < L)
    raw = tl.load(Delta + at + t, mask=inside, other=0.0).to(kind) + bias
    step = _softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(inside, step, 0.0)


@triton.jit
def _forward(
    U, Delta, A, B, C, D, Bias, State, Y, Last, Carries, L, N, channels, group, tile_count,
    TILE: tl.constexpr, STATES: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = State.dtype.element_ty
    channel = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * channels + channel
    shared = (tl.program_id(1).to(tl.int64) * (channels // group) + channel // group) * N * L
    n = tl.arange(0, STATES)
    n_ok = n < N
    rates = tl.load(A + channel * N + n, mask=n_ok, other=0.0).to(kind)
    passing = tl.load(D + channel).to(kind) if HAS_D else 0.0
    bias = tl.load(Bias + channel).to(kind) if HAS_BIAS else 0.0
    h = tl.load(State + row * N + n, mask=n_ok, other=0.0)
    offsets = tl.arange(0, TILE)
    edge = 0 if REVERSE else TILE - 1
    for i in range(tile_count):
        tile = tile_count - 1 - i if REVERSE else i
        tl.store(Carries + (row * N + n) * tile_count + tile, h, mask=n_ok)
        t = tile * TILE + offsets
        both = n_ok[:, None] & (t < L)[None, :]
        where = shared + n[:, None] * L + t[None, :]
        _, step = _steps(Delta, row * L, t, L, bias, kind, SOFTPLUS)
        u = tl.load(U + row * L + t, mask=t < L, other=0.0).to(kind)
        enter = tl.load(B + where, mask=both, other=0.0).to(kind)
        leave = tl.load(C + where, mask=both, other=0.0).to(kind)
        decay = tl.exp(step[None, :] * rates[:, None])  # (STATES, TILE)
        drive = (step * u)[None, :] * enter
        kept, x = tl.associative_scan((decay, drive), 1, _compose, reverse=REVERSE)
        x += kept * h[:, None]
        y = tl.sum(x * leave, 0) + passing * u
        tl.store(Y + row * L + t, y, mask=t < L)
        h = tl.sum(tl.where((offsets == edge)[None, :], x, 0.0), 1)
    tl.store(Last + row * N + n, h, mask=n_ok)


@triton.jit
def _backward(
    DY, DLast, U, Delta, A, B, C, D, Bias, Carries, DU, DDelta, DA, DB, DC, DD, DState,
    L, N, channels, group, tile_count,
    TILE: tl.constexpr, STATES: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = DLast.dtype.element_ty
    channel = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * channels + channel
    shared = (tl.program_id(1).to(tl.int64) * (channels // group) + channel // group) * N * L
    n = tl.arange(0, STATES)
    n_ok = n < N
    rates = tl.load(A + channel * N + n, mask=n_ok, other=0.0).to(kind)
    passing = tl.load(D + channel).to(kind) if HAS_D else 0.0
    bias = tl.load(Bias + channel).to(kind) if HAS_BIAS else 0.0
    arriving = tl.load(DLast + row * N + n, mask=n_ok, other=0.0)
    offsets = tl.arange(0, TILE)
    edge = TILE - 1 if REVERSE else 0
    onward = -1 if REVERSE else 1
    first = L - 1 if REVERSE else 0
    d_rates = tl.zeros((STATES,), kind)
    d_passing = tl.zeros((TILE,), kind)
    d_state = tl.zeros((STATES,), kind)
    for i in range(tile_count):
        tile = i if REVERSE else tile_count - 1 - i
        t = tile * TILE + offsets
        inside = t < L
        both = n_ok[:, None] & inside[None, :]
        where = shared + n[:, None] * L + t[None, :]
        raw, step = _steps(Delta, row * L, t, L, bias, kind, SOFTPLUS)
        _, next_step = _steps(Delta, row * L, t + onward, L, bias, kind, SOFTPLUS)
        u = tl.load(U + row * L + t, mask=inside, other=0.0).to(kind)
        dy = tl.load(DY + row * L + t, mask=inside, other=0.0).to(kind)
        enter = tl.load(B + where, mask=both, other=0.0).to(kind)
        leave = tl.load(C + where, mask=both, other=0.0).to(kind)
        h = tl.load(Carries + (row * N + n) * tile_count + tile, mask=n_ok, other=0.0)
        decay = tl.exp(step[None, :] * rates[:, None])
        drive = (step * u)[None, :] * enter

        # the states one step earlier: a scan of what stands one position back, nothing at the tile's start
        back = tl.where(offsets == edge, -1, t - onward)
        _, last_step = _steps(Delta, row * L, back, L, bias, kind, SOFTPLUS)
        known = (back >= 0) & (back < L)
        last_u = tl.load(U + row * L + back, mask=known, other=0.0).to(kind)
        last_enter = tl.load(
            B + shared + n[:, None] * L + back[None, :], mask=n_ok[:, None] & known[None, :], other=0.0
        ).to(kind)
        last_decay = tl.exp(last_step[None, :] * rates[:, None])
        kept, before = tl.associative_scan(
            (last_decay, (last_step * last_u)[None, :] * last_enter), 1, _compose, reverse=REVERSE
        )
        faded = decay * (before + kept * h[:, None])  # a_t h_{t-1}
        tl.atomic_add(DC + where, dy[None, :] * (faded + drive), mask=both)

        onward_decay = tl.exp(next_step[None, :] * rates[:, None])
        kept, g = tl.associative_scan((onward_decay, dy[None, :] * leave), 1, _compose, reverse=not REVERSE)
        g += kept * arriving[:, None]  # dL/dh
        arriving = tl.sum(tl.where((offsets == edge)[None, :], g, 0.0), 1)
        d_state += tl.sum(tl.where((t == first)[None, :], decay * g, 0.0), 1)
        tl.atomic_add(DB + where, g * (step * u)[None, :], mask=both)

        of_decay = tl.where(both, g * faded, 0.0)
        d_rates += tl.sum(of_decay * step[None, :], 1)
        d_passing += dy * u
        driven = tl.sum(g * enter, 0)
        d_step = driven * u + tl.sum(of_decay * rates[:, None], 0)
        if SOFTPLUS:
            d_step = tl.where(raw > 20.0, d_step, d_step / (1.0 + tl.exp(-raw)))
        tl.store(DDelta + row * L + t, d_step, mask=inside)
        tl.store(DU + row * L + t, driven * step + passing * dy, mask=inside)
    tl.atomic_add(DA + channel * N + n, d_rates, mask=n_ok)
    tl.atomic_add(DD + channel, tl.sum(d_passing, 0))
    tl.store(DState + row * N + n, d_state, mask=n_ok)


def _settings(u: Tensor, A: Tensor, B: Tensor, D: Tensor | None, bias: Tensor | None) -> tuple[tuple, dict]:
    """Sizes and compile-time constants that both kernels take."""
    channels, length = u.shape[1:]
    states, size_and_count = A.shape[1], tiles(u.shape[2], A.shape[1])
    sizes = length, states, channels, channels // B.shape[1], size_and_count[1]
    constants = {
        "TILE": size_and_count[0], "STATES": triton.next_power_of_2(states),
        "HAS_D": D is not None, "HAS_BIAS": bias is not None, "num_warps": 4,
    }  # fmt: skip
    return sizes, constants


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, state: Tensor,
    softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, last state, and the state before each tile: one launch. Sizes must not be zero."""
    u, delta, A, B, C, state = (x.contiguous() for x in (u, delta, A, B, C, state))
    sizes, constants = _settings(u, A, B, D, bias)
    y, last = torch.empty(u.shape, dtype=state.dtype, device=u.device), torch.empty_like(state)
    carries = state.new_empty(*state.shape, sizes[-1])
    _forward[(u.shape[1], u.shape[0])](
        u, delta, A, B, C, _or(D, u), _or(bias, u), state, y, last, carries, *sizes,
        SOFTPLUS=softplus, REVERSE=reverse, **constants,
    )  # fmt: skip
    return y, last, carries


def backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, carries: Tensor, softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and the initial state: one launch. Sizes must not be zero."""
    dy, dlast, u, delta, A, B, C = (x.contiguous() for x in (dy, dlast, u, delta, A, B, C))
    sizes, constants = _settings(u, A, B, D, bias)
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(dlast)
    dA, dB, dC, dD = (carries.new_zeros(x.shape) for x in (A, B, C, A[:, 0]))
    _backward[(u.shape[1], u.shape[0])](
        dy, dlast, u, delta, A, B, C, _or(D, u), _or(bias, u), carries, du, ddelta, dA, dB, dC, dD, dstate, *sizes,
        SOFTPLUS=softplus, REVERSE=reverse, **constants,
    )  # fmt: skip
    return du, ddelta, dA, dB, dC, dD, dstate


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that the kernel is told not to read, where there is no tensor."""
    return stand_in if tensor is None else tensor.contiguous()
