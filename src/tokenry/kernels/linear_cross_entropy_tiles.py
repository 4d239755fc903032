"""Cross-entropy of a linear classifier, tile by tile with PyTorch's matrix products: a back end of ``LinearNLL``.

A tile is a few tokens times a few vocabulary entries. Each is computed twice, once for LSE and once for the gradients
(equations in ``tokenry.kernels.linear_cross_entropy``), always in the same buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenry.kernels.linear_cross_entropy import Operands, Plan, wide_dtype

__all__ = ["CHUNKED", "Chunked"]


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

    def log_sum_exp(self, x: Operands, plan: Plan, want_mean: bool) -> tuple[Tensor, Tensor | None]:
        """Running maximum and sum over vocabulary tiles."""
        e, c, bias = _picked(x.e, x.rows), x.c, x.bias  # e: (N, D)
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

    def target_logits(self, x: Operands, plan: Plan) -> Tensor:
        """One dot product a row."""
        e, c, bias, targets, rows = x
        wide = wide_dtype(e.dtype)
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
        x: Operands,
        plan: Plan,
        lse: Tensor,
        g: Tensor,
        h: Tensor | None,
        order: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Every tile once more: logits, S, the two products."""
        e, c, bias, targets = _picked(x.e, x.rows), x.c, x.bias, x.targets
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
        if de is not None and x.rows is not None:
            de = torch.zeros_like(x.e, dtype=wide).index_copy_(0, x.rows, de)
        return de, dc, db


CHUNKED = Chunked()


def _picked(e: Tensor, rows: Tensor | None) -> Tensor:
    return (e if rows is None else e[rows]).to(wide_dtype(e.dtype))


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
