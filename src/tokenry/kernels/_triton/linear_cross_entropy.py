"""Triton kernels of ``tokenry.kernels.linear_cross_entropy``: logits live in a tile's registers and nowhere else.

Three kernels over tiles of (tokens × vocabulary entries), numbered in groups of eight token blocks so that
neighbours share their part of C in the L2 cache:

1. ``_target_logits``: E_n · C_{x_n}, over (token blocks × D blocks), added up atomically in float32.
2. ``_log_sum_exp``: a tile's max + log Σ exp, merged into LSE under a lock per token block; on the way, if asked, the
   mean logit of every vocabulary entry.
3. ``_gradients``: the tile again, S, the filter, then the two products, added to dE and dC under locks.

They run on CUDA devices of compute capability 8.0 and up, and on a CPU in Triton's interpreter (set
``TRITON_INTERPRET=1`` before this module is imported). tanh and log1p are written out: the interpreter has no libdevice.
"""

# pyrefly: ignore-errors
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenry.kernels.linear_cross_entropy import Operands, Plan

__all__ = ["INTERPRETED", "TRITON", "Tiles", "TritonBackend"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _tile_place(pid, blocks_n, blocks_v, GROUP: tl.constexpr):
    """Token block and vocabulary block of a program."""
    in_group = GROUP * blocks_v
    first = (pid // in_group) * GROUP
    size = tl.minimum(blocks_n - first, GROUP)
    return first + (pid % in_group) % size, (pid % in_group) // size


@triton.jit
def _tile_logits(
    E, C, Bias, rows, cols, n_ok, v_ok, D, stride_en, stride_ed, stride_cv, stride_cd, softcap,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z of one tile (N_BLOCK, V_BLOCK), float32. Rows and columns outside the matrix hold no meaning."""
    z = tl.full((N_BLOCK, V_BLOCK), 0.0, tl.float32)
    d = tl.arange(0, D_BLOCK).to(tl.int64)
    for start in range(0, D, D_BLOCK):
        d_ok = (start + d) < D
        e = tl.load(
            E + rows[:, None] * stride_en + (start + d)[None, :] * stride_ed,
            mask=n_ok[:, None] & d_ok[None, :],
            other=0.0,
        )
        c = tl.load(
            C + cols[None, :] * stride_cv + (start + d)[:, None] * stride_cd,
            mask=v_ok[None, :] & d_ok[:, None],
            other=0.0,
        )
        z = tl.dot(e, c, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(Bias + cols, mask=v_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = _tanh(z / softcap) * softcap
    return z


@triton.jit
def _target_logits(
    E, C, Targets, Rows, Out, N, V, D, stride_en, stride_ed, stride_cv, stride_cd,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)
    d = tl.program_id(1).to(tl.int64) * D_BLOCK + tl.arange(0, D_BLOCK)
    n_ok = n < N
    rows = tl.load(Rows + n, mask=n_ok, other=0).to(tl.int64) if HAS_ROWS else n
    target = tl.load(Targets + n, mask=n_ok, other=-1).to(tl.int64)
    here = n_ok & (target >= 0) & (target < V)
    d_ok = d < D
    e = tl.load(E + rows[:, None] * stride_en + d[None, :] * stride_ed, mask=here[:, None] & d_ok[None, :], other=0.0)
    c = tl.load(C + target[:, None] * stride_cv + d[None, :] * stride_cd, mask=here[:, None] & d_ok[None, :], other=0.0)
    dot = tl.sum(e.to(tl.float32) * c.to(tl.float32), 1)
    tl.atomic_add(Out + n, dot, mask=n_ok)


@triton.jit
def _log_sum_exp(
    E, C, Bias, Rows, LSE, Mean, Locks, N, V, D, blocks_n, blocks_v,
    stride_en, stride_ed, stride_cv, stride_cd, softcap,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block_n, block_v = _tile_place(tl.program_id(0), blocks_n, blocks_v, GROUP)
    n = block_n.to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)
    v = block_v.to(tl.int64) * V_BLOCK + tl.arange(0, V_BLOCK)
    n_ok, v_ok = n < N, v < V
    rows = tl.load(Rows + n, mask=n_ok, other=0).to(tl.int64) if HAS_ROWS else n
    z = _tile_logits(
        E, C, Bias, rows, v, n_ok, v_ok, D, stride_en, stride_ed, stride_cv, stride_cd, softcap,
        N_BLOCK, V_BLOCK, D_BLOCK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    if HAS_MEAN:
        tl.atomic_add(Mean + v, tl.sum(tl.where(n_ok[:, None], z, 0.0), 0) / N, mask=v_ok)
    z = tl.where(v_ok[None, :], z, -float("inf"))  # after the softcap, which would lift -inf to -s
    top = tl.max(z, 1)
    top = tl.where(top == -float("inf"), 0.0, top)  # a tile of nothing but -inf
    part = top + tl.log(tl.sum(tl.exp(z - top[:, None]), 1))
    while tl.atomic_cas(Locks + block_n, 0, 1) == 1:
        pass
    before = tl.load(LSE + n, mask=n_ok, other=0.0)
    high, low = tl.maximum(before, part), tl.minimum(before, part)
    merged = tl.where(low == -float("inf"), high, high + tl.log(1.0 + tl.exp(low - high)))
    tl.store(LSE + n, merged, mask=n_ok)
    tl.debug_barrier()
    tl.atomic_xchg(Locks + block_n, 0)


@triton.jit
def _add_product(
    G, Other, other_at, other_ok, stride_od, Sum, sum_at, sum_ok, stride_sd, Locks, D,
    D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum[sum_at] += G @ Other[other_at], a block of D at a time, each under its own lock."""
    d = tl.arange(0, D_BLOCK).to(tl.int64)
    for start in range(0, D, D_BLOCK):
        d_ok = (start + d) < D
        other = tl.load(
            Other + other_at[:, None] + (start + d)[None, :] * stride_od,
            mask=other_ok[:, None] & d_ok[None, :],
            other=0.0,
        )
        product = tl.dot(G, other, input_precision=PRECISION)
        where = Sum + sum_at[:, None] + (start + d)[None, :] * stride_sd
        mask = sum_ok[:, None] & d_ok[None, :]
        lock = Locks + start // D_BLOCK
        while tl.atomic_cas(lock, 0, 1) == 1:
            pass
        total = tl.load(where, mask=mask, other=0.0)
        tl.store(where, total + product.to(total.dtype), mask=mask)
        tl.debug_barrier()
        tl.atomic_xchg(lock, 0)


@triton.jit
def _gradients(
    E, C, Bias, Targets, Rows, LSE, GradNLL, GradLSE, Order, DE, DC, DB, LocksE, LocksC, N, V, D,
    blocks_n, blocks_v, locks_d, stride_en, stride_ed, stride_cv, stride_cd,
    stride_den, stride_ded, stride_dcv, stride_dcd, softcap, eps,
    N_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, D_BACK: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    HAS_ORDER: tl.constexpr, WANT_E: tl.constexpr, WANT_C: tl.constexpr, WANT_B: tl.constexpr,
    FILTER_E: tl.constexpr, FILTER_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_n, block_v = _tile_place(tl.program_id(0), blocks_n, blocks_v, GROUP)
    n = block_n.to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)
    v = block_v.to(tl.int64) * V_BLOCK + tl.arange(0, V_BLOCK)
    n_ok, v_ok = n < N, v < V
    rows = tl.load(Rows + n, mask=n_ok, other=0).to(tl.int64) if HAS_ROWS else n
    cols = tl.load(Order + v, mask=v_ok, other=0).to(tl.int64) if HAS_ORDER else v
    z = _tile_logits(
        E, C, Bias, rows, cols, n_ok, v_ok, D, stride_en, stride_ed, stride_cv, stride_cd, softcap,
        N_BLOCK, V_BLOCK, D_BLOCK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    lse = tl.load(LSE + n, mask=n_ok, other=float("inf"))
    target = tl.load(Targets + n, mask=n_ok, other=-1).to(tl.int64)
    is_target = (target[:, None] == cols[None, :]) & v_ok[None, :]
    inside = n_ok[:, None] & v_ok[None, :]
    s = tl.where(inside, tl.exp(z - lse[:, None]), 0.0) - tl.where(is_target, 1.0, 0.0)
    keep_e, keep_c = True, True
    if FILTER_E or FILTER_C:
        large = tl.max(tl.max(tl.abs(s), 1), 0) >= eps
        if FILTER_E and FILTER_C:
            if not large:
                return
        elif FILTER_E:
            keep_e = large
        else:
            keep_c = large
    g = tl.load(GradNLL + n, mask=n_ok, other=0.0)[:, None]
    if HAS_GRAD_LSE:
        h = tl.load(GradLSE + n, mask=n_ok, other=0.0)[:, None]
        s = s * (g + h) + tl.where(is_target, h, 0.0)
    else:
        s = s * g
    if HAS_SOFTCAP:
        slope = z / softcap
        s = s * (1.0 - slope * slope)
    if WANT_B:
        tl.atomic_add(DB + cols, tl.sum(s, 0), mask=v_ok)
    s = s.to(E.dtype.element_ty)
    if WANT_E:  # noqa: SIM102 (one is known when compiling, the other is not)
        if keep_e:
            _add_product(
                s, C, cols * stride_cv, v_ok, stride_cd, DE, rows * stride_den, n_ok, stride_ded,
                LocksE + block_n * locks_d, D, D_BACK, PRECISION,
            )  # fmt: skip
    if WANT_C:  # noqa: SIM102
        if keep_c:
            _add_product(
                tl.trans(s), E, rows * stride_en, n_ok, stride_ed, DC, cols * stride_dcv, v_ok, stride_dcd,
                LocksC + block_v * locks_d, D, D_BACK, PRECISION,
            )  # fmt: skip


class Tiles:
    """Tile sizes of one kernel: ``(tokens, vocabulary entries, D)``, warps and pipeline stages."""

    def __init__(self, n: int, v: int, d: int, warps: int, stages: int) -> None:
        self.n, self.v, self.d, self.warps, self.stages = n, v, d, warps, stages


def _forward_tiles(e: Tensor) -> Tiles:
    if e.element_size() == 4:
        return Tiles(128, 128, 32, 8, 3)
    facts = torch.cuda.get_device_properties(e.device) if e.is_cuda else None
    if getattr(facts, "shared_memory_per_block_optin", 0) > 160 << 10:
        return Tiles(128, 256, 64, 8, 3)  # 3 stages of (128 + 256) x 64 halves: 144 KiB of shared memory
    return Tiles(128, 256, 32, 8, 3)


class TritonBackend:
    """The backend that ``LinearNLL`` runs on CUDA devices. Float16, bfloat16 and float32 inputs."""

    @staticmethod
    def _common(x: Operands, plan: Plan) -> dict:
        return {
            "softcap": 1.0 if plan.softcap is None else plan.softcap,
            "HAS_BIAS": x.bias is not None,
            "HAS_ROWS": x.rows is not None,
            "HAS_SOFTCAP": plan.softcap is not None,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "GROUP": 8,
        }

    def log_sum_exp(self, x: Operands, plan: Plan, want_mean: bool) -> tuple[Tensor, Tensor | None]:
        """One launch over all tiles."""
        e, c, bias, targets, rows = x
        n, (v, d) = len(targets), c.shape
        lse = torch.full((n,), -math.inf, device=e.device)
        mean = torch.zeros(v, device=e.device) if want_mean else None
        if n == 0:
            return lse, mean
        tiles = _forward_tiles(e)
        if plan.tile is not None:
            tiles.n, tiles.v = plan.tile
        blocks = triton.cdiv(n, tiles.n), triton.cdiv(v, tiles.v)
        locks = torch.zeros(blocks[0], dtype=torch.int32, device=e.device)
        _log_sum_exp[(blocks[0] * blocks[1],)](
            e, c, _or(bias, e), _or(rows, e), lse, _or(mean, lse), locks, n, v, d, *blocks, *e.stride(), *c.stride(),
            N_BLOCK=tiles.n, V_BLOCK=tiles.v, D_BLOCK=tiles.d, HAS_MEAN=mean is not None,
            num_warps=tiles.warps, num_stages=tiles.stages, **self._common(x, plan),
        )  # fmt: skip
        return lse, mean

    def target_logits(self, x: Operands, plan: Plan) -> Tensor:
        """Indexed dot products."""
        e, c, bias, targets, rows = x
        n, (v, d) = len(targets), c.shape
        out = torch.zeros(n, device=e.device)
        if n:
            _target_logits[(triton.cdiv(n, 32), triton.cdiv(d, 128))](
                e, c, targets, _or(rows, e), out, n, v, d, *e.stride(), *c.stride(),
                N_BLOCK=32, D_BLOCK=128, HAS_ROWS=rows is not None,
            )  # fmt: skip
        here = (targets >= 0) & (targets < v)
        if bias is not None:
            out += bias[torch.where(here, targets, 0)].float()
        if plan.softcap is not None:
            out = plan.softcap * torch.tanh(out / plan.softcap)
        return torch.where(here, out, 0.0)

    def gradients(
        self,
        x: Operands,
        plan: Plan,
        lse: Tensor,
        g: Tensor,
        h: Tensor | None,
        order: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One launch over all tiles; unneeded products are left out at compile time."""
        e, c, bias, targets, rows = x
        n, (v, d) = len(targets), c.shape
        want_e, want_c, want_b = needs
        plain = torch.contiguous_format
        de = torch.zeros_like(e, dtype=torch.float32 if plan.accum_e else None, memory_format=plain) if want_e else None
        dc = torch.zeros_like(c, dtype=torch.float32 if plan.accum_c else None, memory_format=plain) if want_c else None
        db = torch.zeros(v, device=e.device) if want_b else None
        if n == 0 or not any(needs):
            return de, dc, db
        tiles = Tiles(64, 64, 32, 4, 3) if e.element_size() == 4 else Tiles(128, 128, 32, 8, 3)
        if plan.tile is not None:
            tiles.n, tiles.v = plan.tile
        blocks = triton.cdiv(n, tiles.n), triton.cdiv(v, tiles.v)
        locks_d = triton.cdiv(d, 2 * tiles.d)
        locks = torch.zeros(sum(blocks) * locks_d, dtype=torch.int32, device=e.device)
        filtered = plan.filter_eps is not None
        _gradients[(blocks[0] * blocks[1],)](
            e, c, _or(bias, e), targets, _or(rows, e), lse, g.contiguous(), lse if h is None else h.contiguous(),
            _or(order, targets), _or(de, lse), _or(dc, lse), _or(db, lse), locks, locks[blocks[0] * locks_d :],
            n, v, d, *blocks, locks_d, *e.stride(), *c.stride(),
            *(e if de is None else de).stride(), *(c if dc is None else dc).stride(),
            eps=plan.filter_eps or 0.0,
            N_BLOCK=tiles.n, V_BLOCK=tiles.v, D_BLOCK=tiles.d, D_BACK=2 * tiles.d,
            HAS_GRAD_LSE=h is not None, HAS_ORDER=order is not None, WANT_E=want_e, WANT_C=want_c, WANT_B=want_b,
            FILTER_E=filtered and plan.filter_e and want_e, FILTER_C=filtered and plan.filter_c and want_c,
            num_warps=tiles.warps, num_stages=tiles.stages, **self._common(x, plan),
        )  # fmt: skip
        return de, dc, db


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that the kernel is told not to read, where there is no tensor."""
    return stand_in if tensor is None else tensor


TRITON = TritonBackend()
