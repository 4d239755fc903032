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

Three ways to compute it: ``dense_nll`` is the definition; ``linear_cross_entropy_tiles`` walks over tiles with PyTorch's
own matrix products, on any device; ``tokenry.kernels._triton`` holds GPU kernels that never leave the chip. The last two
are back ends of ``LinearNLL``, the autograd function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Backend", "LinearNLL", "Operands", "Plan", "VocabParallel", "dense_nll", "wide_dtype"]


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


class Operands(NamedTuple):
    """The tensors of one loss.

    Attributes:
        e: Embeddings (M, D).
        c: Classifier (V, D).
        bias: (V,) or None.
        targets: (N,) of the rows that count, int64; outside ``[0, V)`` where another process holds them.
        rows: (N,) numbers of these rows in ``e``; None: all, N = M.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None


class Backend(Protocol):
    """How tiles are computed."""

    def log_sum_exp(self, x: Operands, plan: Plan, want_mean: bool) -> tuple[Tensor, Tensor | None]:
        """LSE (N,) and, if wanted, the mean logit of every vocabulary entry (V,)."""
        ...

    def target_logits(self, x: Operands, plan: Plan) -> Tensor:
        """z_{n, x_n} (N,); entries whose target is outside ``[0, V)`` are 0."""
        ...

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
        """The gradients that are needed.

        Args:
            x: What the forward pass had.
            plan: Likewise.
            lse: Its LSE (N,).
            g: Gradient of nll (N,).
            h: Gradient of LSE (N,); None: 0.
            order: The vocabulary in the order to visit it (V,), int32; None: as it is.
            needs: Whether dE, dC and db are.

        Returns:
            DE like ``e``, dC like ``c``, db like ``bias``.
        """
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
    logits = logits.to(wide_dtype(e.dtype))
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, targets[:, None]).squeeze(-1), lse


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over inputs of this dtype are kept in: float32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
            share = plan.parallel
            if share is not None:
                targets = targets - share.start  # outside [0, V) on the ranks that do not hold it
            x = Operands(e, c, bias, targets, rows)
            lse, mean = backend.log_sum_exp(x, plan, sort)
            if share is not None:
                lse = _reduce_lse(lse, share.group)
            z = backend.target_logits(x, plan)
            if share is not None:
                dist.all_reduce(z, group=share.group)
        order = None if mean is None else mean.argsort().to(torch.int32)
        ctx.save_for_backward(*x, lse, order)
        ctx.plan, ctx.backend = plan, backend
        ctx.set_materialize_grads(False)
        return lse - z, lse.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Recompute and multiply."""
        *operands, lse, order = ctx.saved_tensors
        x = Operands(*operands)
        if g is None and h is None:
            return (None,) * 7
        if g is None:
            g = torch.zeros_like(lse)
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], x.bias is not None and ctx.needs_input_grad[2]
        with torch.autocast(lse.device.type, enabled=False):
            de, dc, db = ctx.backend.gradients(x, ctx.plan, lse, g, h, order, needs)
        share = ctx.plan.parallel
        if share is not None and share.reduce_e_grad and de is not None:
            de = de.float() if de.dtype != torch.float64 else de
            dist.all_reduce(de, group=share.group)
        de, dc, db = (d if d is None else d.to(t) for d, t in zip((de, dc, db), ctx.dtypes, strict=True))
        return de, dc, db, None, None, None, None


def _reduce_lse(lse: Tensor, group: Any) -> Tensor:
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = (lse - top).exp_()
    dist.all_reduce(total, group=group)
    return top + total.log_()
