"""Cross-entropy of a linear classifier whose gradients are made while the logits of a few tokens are at hand.

    loss = w Σ_n (LSE_n − z_{n, x_n})      S_nv = exp(z_nv − LSE_n) − [v = x_n]
    dE_n = w Σ_v S_nv C_v                  dC_v = w Σ_n S_nv E_n          db_v = w Σ_n S_nv

Cut Cross-Entropy computes logits twice, since LSE is known only after all tiles. Where the whole vocabulary of about a
hundred tokens fits into a tile, one visit is enough: three matrix products instead of four. The upstream gradient, a
number, is multiplied in afterwards, as Liger Kernel does (Hsu et al., 2024, arXiv:2410.10989). The price: the
gradients exist from the forward pass on, and a forward pass alone is dearer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenry.kernels.linear_cross_entropy import Operands

__all__ = ["OnePassLoss", "tokens_at_once"]

BYTES = 64 << 20  # of one tile: tokens × whole vocabulary
FEWEST = 96  # tokens in a tile below which the matrix products get slow, and two passes are as fast


def tokens_at_once(vocab: int, dtype: torch.dtype) -> int | None:
    """Tokens whose logits fit into a tile; None where they are too few for one pass to pay.

    Example:
        >>> tokens_at_once(128_000, torch.float32), tokens_at_once(256_000, torch.float32)
        (131, None)
    """
    tokens = BYTES // (vocab * dtype.itemsize)
    return tokens if tokens >= FEWEST else None


def _loss_and_gradients(x: Operands, weight: float, needs: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
    e, c, bias, targets, rows = x
    picked = e if rows is None else e[rows]  # (N, D)
    n, v = len(picked), len(c)
    tokens = min(n, tokens_at_once(v, e.dtype) or 1)
    buffer = e.new_empty(tokens * v)
    de = torch.zeros_like(picked) if needs[0] else None
    dc = torch.zeros_like(c, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.zeros_like(bias) if bias is not None and needs[2] else None
    loss = e.new_zeros(())
    for start in range(0, n, tokens):
        ns = slice(start, min(start + tokens, n))
        part = picked[ns]  # (t, D)
        z = buffer[: len(part) * v].view(len(part), v)
        if bias is None:
            torch.mm(part, c.T, out=z)
        else:
            torch.addmm(bias, part, c.T, out=z)
        at = targets[ns, None]
        chosen = z.gather(1, at)  # (t, 1)
        top = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        loss += (top + total.log() - chosen).sum()
        if de is None and dc is None and db is None:
            continue
        z.scatter_add_(1, at, -total)  # S times total
        scale = weight / total
        if de is not None:
            torch.mm(z, c, out=de[ns]).mul_(scale)
        if dc is not None:
            dc.addmm_(z.T, part * scale)
        if db is not None:
            db.addmv_(z.T, scale.squeeze(1))
    if de is not None and rows is not None:
        de = torch.zeros_like(e).index_copy_(0, rows, de)
    return loss * weight, [de, dc, db]


class OnePassLoss(torch.autograd.Function):
    """``(e, c, bias, targets, rows, weight, with_gradients) -> weight Σ nll``.

    Arguments as ``LinearNLL``'s; float32 or float64; ``weight`` is a number, ``1 / N`` for the mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        weight: float,
        with_gradients: bool,
    ) -> Tensor:
        """The loss, and the gradients for an upstream gradient of one."""
        needs = tuple(need and with_gradients for need in ctx.needs_input_grad[:3])
        x = Operands(e, c, bias, targets, rows)
        loss, ctx.gradients = _loss_and_gradients(x, weight, needs)
        ctx.save_for_backward(*x)
        ctx.weight = weight
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Times ``g``. A second call on a retained graph computes them again."""
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            _, found = _loss_and_gradients(Operands(*ctx.saved_tensors), ctx.weight, ctx.needs_input_grad[:3])
        return *(d if d is None else d.mul_(g) for d in found), None, None, None, None
