"""Cross-entropy of a linear classifier, without the matrix of logits.

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv:2411.09009.

    a_nv = E_n · C_v + b_v          z_nv = s tanh(a_nv / s), or a_nv without a softcap
    LSE_n = log Σ_v exp z_nv        nll_n = LSE_n − z_{n, x_n}

With upstream gradients g_n (of nll) and h_n (of LSE), and everything but LSE computed again:

    S_nv = exp(z_nv − LSE_n) − [v = x_n]
    G_nv = (S_nv (g_n + h_n) + [v = x_n] h_n) (1 − (z_nv / s)²)
    dE_n = Σ_v G_nv C_v     dC_v = Σ_n G_nv E_n     db_v = Σ_n G_nv

A tile of S whose entries are all below ``filter_eps`` adds nothing that the number format would keep; it may be
skipped. Visiting the vocabulary in the order of its mean logit puts improbable entries into the same tiles.

Three ways to compute it: ``dense_nll`` is the definition; ``CHUNKED`` walks over tiles with PyTorch's own matrix
products, on any device; ``tokenry.kernels._triton`` holds GPU kernels that never leave the chip. The last two share
``LinearNLL``, the autograd function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["CHUNKED", "Backend", "Chunked", "LinearNLL", "Plan", "VocabParallel", "dense_nll"]


@dataclass(frozen=True)
class VocabParallel:
    """One process's share of a classifier whose rows are spread over a process group.

    Args:
        start: First vocabulary entry held here.
        stop: One past the last.
        group: The process group. None: the default one.
        reduce_e_grad: Sum the gradient of the embeddings over the group (in float32). False where the
            surrounding tensor parallelism does that itself.

    Example:
        >>> [VocabParallel.span(10, rank, 4) for rank in range(4)]
        [(0, 3), (3, 6), (6, 8), (8, 10)]
    """

    start: int
    stop: int
    group: Any = None
    reduce_e_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a vocabulary share needs 0 <= start < stop, got start={self.start}, stop={self.stop}")

    @staticmethod
    def span(vocab: int, rank: int, world: int) -> tuple[int, int]:
        """Even split: the first ``vocab % world`` ranks hold one entry more."""
        share, over = divmod(vocab, world)
        start = rank * share + min(rank, over)
        return start, start + share + (rank < over)

    @classmethod
    def from_vocab(cls, vocab: int, group: Any = None, reduce_e_grad: bool = True) -> VocabParallel:
        """This process's share of ``vocab`` entries split evenly over the group."""
        start, stop = cls.span(vocab, dist.get_rank(group), dist.get_world_size(group))
        return cls(start, stop, group, reduce_e_grad)


@dataclass(frozen=True)
class Plan:
    """Everything but tensors.

    Attributes:
        softcap: s of the equation, or None.
        filter_eps: Tiles of S entirely below it are skipped. None: none is.
        filter_e: The filter holds for dE. If both hold, db is filtered as well.
        filter_c: The filter holds for dC.
        sort: Visit the vocabulary by ascending mean logit (only with a filter).
        accum_e: Add dE up in float32 whatever the inputs' dtype.
        accum_c: Add dC up in float32 whatever the inputs' dtype.
        tile: ``(tokens, vocabulary entries)`` of a tile. None: chosen for the device.
        parallel: Share of the vocabulary held by this process.
    """

    softcap: float | None = None
    filter_eps: float | None = None
    filter_e: bool = True
    filter_c: bool = True
    sort: bool = True
    accum_e: bool = False
    accum_c: bool = False
    tile: tuple[int, int] | None = None
    parallel: VocabParallel | None = None


class Backend(Protocol):
    """How tiles are computed. ``rows`` (N,) picks rows of ``e``; None takes all."""

    def log_sum_exp(
        self, e: Tensor, c: Tensor, bias: Tensor | None, rows: Tensor | None, plan: Plan, want_mean: bool
    ) -> tuple[Tensor, Tensor | None]:
        """LSE (N,) and, if wanted, the mean logit of every vocabulary entry (V,)."""
        ...

    def target_logits(
        self, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, plan: Plan
    ) -> Tensor:
        """z_{n, x_n} (N,); entries whose target is outside ``[0, V)`` are 0."""
        ...

    def gradients(
        self,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        lse: Tensor,
        g: Tensor,
        h: Tensor | None,
        order: Tensor | None,
        needs: tuple[bool, bool, bool],
        plan: Plan,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """DE like ``e``, dC like ``c``, db like ``bias``, each where needed."""
        ...


def dense_nll(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once.

    Args:
        e: Embeddings (N, D).
        c: Classifier (V, D).
        targets: (N,), in ``[0, V)``.
        bias: (V,) or None.
        softcap: s of the equation, or None.

    Returns:
        ``(nll, lse)``, both (N,), float32 or wider.

    Example:
        >>> nll, lse = dense_nll(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))
        >>> round(lse[0].exp().item(), 3)
        4.0
    """
    logits = e @ c.T if bias is None else torch.addmm(bias.to(e.dtype), e, c.T)  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(_wide(e.dtype))
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, targets[:, None]).squeeze(-1), lse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Chunked:
    """Tiles by PyTorch's matrix products, on any device, in float32 (float64 for float64 inputs).

    Beyond inputs and gradients it holds one tile (two with a softcap) and, where rows are picked or inputs are in
    half precision, the picked rows in float32. dE and dC are always added up in float32.

    Args:
        cpu_bytes: Size of a tile on a CPU: small enough to stay in its last-level cache.
        gpu_bytes: Size of a tile elsewhere.
    """

    def __init__(self, cpu_bytes: int = 16 << 20, gpu_bytes: int = 256 << 20) -> None:
        self.cpu_bytes, self.gpu_bytes = cpu_bytes, gpu_bytes

    def tile(self, n: int, v: int, device: torch.device, plan: Plan) -> tuple[int, int]:
        """``(tokens, vocabulary entries)`` of a tile."""
        if plan.tile is not None:
            return plan.tile
        room = (self.cpu_bytes if device.type == "cpu" else self.gpu_bytes) // 4
        tokens = max(1, min(n, 2048 if device.type == "cpu" else 8192))
        return tokens, max(1, min(v, room // tokens))

    def log_sum_exp(
        self, e: Tensor, c: Tensor, bias: Tensor | None, rows: Tensor | None, plan: Plan, want_mean: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Running maximum and sum over vocabulary tiles."""
        e = _picked(e, rows)  # (N, D)
        n, v, wide = len(e), len(c), e.dtype
        top = e.new_full((n, 1), torch.finfo(wide).min)  # finite, so that logits of -inf do no harm
        total = e.new_zeros(n, 1)
        mean = e.new_zeros(v) if want_mean else None
        tokens, entries = self.tile(n, v, e.device, plan)
        buffer = e.new_empty(tokens * entries)
        for vs in _slices(v, entries):
            cv = c[vs].to(wide)  # (w, D)
            bv = None if bias is None else bias[vs].to(wide)
            for ns in _slices(n, tokens):
                z = _logits(buffer, e[ns], cv, bv, plan.softcap)  # (t, w)
                if mean is not None:
                    mean[vs] += z.sum(0) / n
                higher = torch.maximum(top[ns], z.amax(1, keepdim=True))
                z.sub_(higher).exp_()
                total[ns] = total[ns] * (top[ns] - higher).exp_() + z.sum(1, keepdim=True)
                top[ns] = higher
        return (top + total.log()).squeeze(1), mean

    def target_logits(
        self, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, plan: Plan
    ) -> Tensor:
        """One dot product a row."""
        wide = _wide(e.dtype)
        here = (targets >= 0) & (targets < len(c))
        inside = torch.where(here, targets, 0)
        out = torch.zeros(len(targets), dtype=wide, device=e.device)
        for ns in _slices(len(targets), 4096):
            picked = e[ns] if rows is None else e[rows[ns]]
            out[ns] = (picked.to(wide) * c[inside[ns]].to(wide)).sum(1)
        if bias is not None:
            out += bias[inside].to(wide)
        if plan.softcap is not None:
            out = plan.softcap * torch.tanh(out / plan.softcap)
        return torch.where(here, out, 0.0)

    def gradients(
        self,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        lse: Tensor,
        g: Tensor,
        h: Tensor | None,
        order: Tensor | None,
        needs: tuple[bool, bool, bool],
        plan: Plan,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Every tile once more: logits, S, the two products."""
        full, e = e, _picked(e, rows)
        n, v, wide = len(e), len(c), e.dtype
        want_e, want_c, want_b = needs
        de = torch.zeros_like(e) if want_e else None  # (N, D)
        dc = torch.zeros_like(c, memory_format=torch.contiguous_format) if want_c else None
        db = e.new_zeros(v) if want_b else None
        filter_e = plan.filter_eps is not None and plan.filter_e and want_e
        filter_c = plan.filter_eps is not None and plan.filter_c and want_c
        place = targets if order is None else _inverse(order, targets)  # where each target stands in the order
        weight = (g if h is None else g + h)[:, None]
        tokens, entries = self.tile(n, v, e.device, plan)
        buffer = e.new_empty(tokens * entries)
        spare = e.new_empty(tokens * entries) if plan.softcap is not None else None
        for vs in _slices(v, entries):
            pick = vs if order is None else order[vs]
            cv = c[pick].to(wide)  # (w, D)
            bv = None if bias is None else bias[pick].to(wide)
            direct = order is None and c.dtype == wide
            dcv = None if dc is None else dc[vs] if direct else torch.zeros_like(cv)  # (w, D)
            for ns in _slices(n, tokens):
                s, slope = _probabilities(buffer, spare, e[ns], cv, bv, lse[ns], plan.softcap)  # (t, w) each
                at = (place[ns] - vs.start)[:, None]
                hit = ((at >= 0) & (at < len(cv))).to(wide)
                at = at.clamp(0, len(cv) - 1)
                s.scatter_add_(1, at, -hit)
                skip = (filter_e or filter_c) and bool(s.abs().amax() < (plan.filter_eps or 0.0))
                if skip and filter_e and filter_c:
                    continue
                s.mul_(weight[ns])
                if h is not None:
                    s.scatter_add_(1, at, hit * h[ns, None])
                if slope is not None:
                    s.addcmul_(s, slope.square_(), value=-1)
                if db is not None:
                    db[pick] += s.sum(0)
                if de is not None and not (skip and filter_e):
                    de[ns].addmm_(s, cv)
                if dcv is not None and not (skip and filter_c):
                    dcv.addmm_(s.T, e[ns])
            if dc is not None and dcv is not None and not direct:
                dc[pick] = dcv.to(dc.dtype)
        if de is not None and rows is not None:
            de = torch.zeros_like(full, dtype=wide).index_copy_(0, rows, de)
        return de, dc, db


CHUNKED = Chunked()


def _picked(e: Tensor, rows: Tensor | None) -> Tensor:
    return (e if rows is None else e[rows]).to(_wide(e.dtype))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _inverse(order: Tensor, targets: Tensor) -> Tensor:
    """Position in ``order`` of each target; -1 for targets outside it."""
    rank = torch.empty_like(order, dtype=torch.int64)
    rank[order.long()] = torch.arange(len(order), device=order.device)
    here = (targets >= 0) & (targets < len(order))
    return torch.where(here, rank[torch.where(here, targets, 0)], -1)


def _logits(buffer: Tensor, e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = buffer[: len(e) * len(c)].view(len(e), len(c))
    if bias is None:
        torch.mm(e, c.T, out=z)
    else:
        torch.addmm(bias, e, c.T, out=z)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _probabilities(
    buffer: Tensor, spare: Tensor | None, e: Tensor, c: Tensor, bias: Tensor | None, lse: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """exp(z - LSE) and, with a softcap, z / s."""
    if softcap is None or spare is None:
        p = buffer[: len(e) * len(c)].view(len(e), len(c))
        if bias is None:
            torch.addmm(lse[:, None], e, c.T, beta=-1, out=p)
        else:
            torch.sub(bias, lse[:, None], out=p)
            p.addmm_(e, c.T)
        return p.exp_(), None
    slope = _logits(spare, e, c, bias, None).div_(softcap).tanh_()
    p = buffer[: slope.numel()].view(slope.shape)
    torch.mul(slope, softcap, out=p)
    return p.sub_(lse[:, None]).exp_(), slope


class LinearNLL(torch.autograd.Function):
    """``(e, c, bias, targets, rows, plan, backend) -> (nll, lse)``, both (N,), both differentiable.

    ``e`` (M, D), ``c`` (V, D), ``bias`` (V,) or None, ``targets`` (N,) of the kept rows, ``rows`` (N,) their row
    numbers in ``e`` or None for all. Under autocast the inputs are cast here; gradients come back in the inputs'
    own dtypes. Only the inputs, LSE and the vocabulary order are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        plan: Plan,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """LSE and target logits."""
        ctx.dtypes = e.dtype, c.dtype, None if bias is None else bias.dtype
        kind = e.device.type
        if torch.is_autocast_enabled(kind):
            half = torch.get_autocast_dtype(kind)
            e, c, bias = e.to(half), c.to(half), None if bias is None else bias.to(half)
        with torch.autocast(kind, enabled=False):
            sort = plan.filter_eps is not None and plan.sort and any(ctx.needs_input_grad[:3])
            lse, mean = backend.log_sum_exp(e, c, bias, rows, plan, sort)
            share = plan.parallel
            if share is not None:
                targets = targets - share.start  # outside [0, V) on the ranks that do not hold it
                lse = _reduce_lse(lse, share.group)
            z = backend.target_logits(e, c, bias, targets, rows, plan)
            if share is not None:
                dist.all_reduce(z, group=share.group)
        order = None if mean is None else mean.argsort().to(torch.int32)
        ctx.save_for_backward(e, c, bias, targets, rows, lse, order)
        ctx.plan, ctx.backend = plan, backend
        ctx.set_materialize_grads(False)
        return lse - z, lse.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Recompute and multiply."""
        e, c, bias, targets, rows, lse, order = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 7
        if g is None:
            g = torch.zeros_like(lse)
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        with torch.autocast(e.device.type, enabled=False):
            grads = ctx.backend.gradients(e, c, bias, targets, rows, lse, g, h, order, needs, ctx.plan)
        de, dc, db = grads
        share = ctx.plan.parallel
        if share is not None and share.reduce_e_grad and de is not None:
            de = de.float() if de.dtype != torch.float64 else de
            dist.all_reduce(de, group=share.group)
        de, dc, db = (x if x is None else x.to(t) for x, t in zip((de, dc, db), ctx.dtypes, strict=True))
        return de, dc, db, None, None, None, None


def _reduce_lse(lse: Tensor, group: Any) -> Tensor:
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (lse - top).exp_()
    dist.all_reduce(total, group=group)
    return top + total.log_()
