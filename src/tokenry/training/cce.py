"""Cut Cross-Entropy: the loss of a large vocabulary in almost no memory.

Wijmans, Huval, Hertzberg, Koltun, Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025,
arXiv:2411.09009.

    loss_n = LSE_n − z_{n, x_n},   LSE_n = log Σ_v exp z_nv,   z = softcap(E Cᵀ + b)

E (N, D) are the hidden states before the head, C (V, D) is the head's weight. The (N, V) logits, gigabytes for a modern
vocabulary, are never stored: each tile is computed, used and dropped, in the forward and again in the backward pass.
The equations stand in ``tokenry.kernels.linear_cross_entropy``; this module is the loss as people call it;
``tokenry.training.cce_patch`` puts it into a transformers model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenry.kernels.linear_cross_entropy import Backend, LinearNLL, Plan, VocabParallel, dense_nll
from tokenry.kernels.linear_cross_entropy_one_pass import OnePassLoss, tokens_at_once
from tokenry.kernels.linear_cross_entropy_tiles import CHUNKED

__all__ = ["PRESETS", "LinearCrossEntropy", "VocabParallel", "linear_cross_entropy", "z_loss"]

Impl = Literal["auto", "triton", "chunked", "dense"]
Reduction = Literal["mean", "sum", "none"]
IMPLS = ("auto", "triton", "chunked", "dense")
REDUCTIONS = ("mean", "sum", "none")
SMALL = 1 << 22  # logits up to this many numbers (16 MiB) are computed at once by impl="auto"

PRESETS: dict[str, dict[str, Any]] = {
    "cce": {},
    "exact": {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True},
    "full_c": {"accum_e_fp32": True, "accum_c_fp32": True, "filter_c_grad": False},
    "full_e": {"accum_e_fp32": True, "accum_c_fp32": True, "filter_e_grad": False},
}
"""Keyword sets of the paper: its default; no approximation; every gradient for the head (for pretraining, since the
filter starves rare tokens); every gradient for the hidden states."""


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | Literal["auto"] | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Impl = "auto",
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``e @ c.T + bias`` against ``targets``, without the logits.

    The order of arguments is that of the authors' package, so that a call can be switched over.

    Args:
        e: Hidden states before the head (..., D).
        c: Weight of the head (V, D); this process's rows under ``vocab_parallel``.
        targets: Integer classes (...), or ``ignore_index``.
        bias: Bias of the head (V,).
        ignore_index: Targets of this value cost nothing and count nowhere. Default -100 (PyTorch).
        softcap: s of ``s tanh(logits / s)``, as in Gemma 2 (30). None: none.
        reduction: ``"mean"`` over the kept tokens, ``"sum"``, or ``"none"`` (0 at ignored places).
        shift: Predict the target at t + shift from position t, along the last dimension of ``targets``, without
            copying. ``True`` is 1, what ``labels`` of a language model need. ``"none"`` then gives (..., T - shift).
        return_lse: Also return LSE of every token (0 where ignored), differentiable, for ``z_loss``.
        filter_eps: Tiles whose entries of |softmax − onehot| all lie below it are skipped in the backward pass.
            ``"auto"``: eps/32 of the dtype (bfloat16: 2⁻¹², the paper's). None: nothing is skipped. The chunked
            path takes ``"auto"`` to mean no filter: it works in float32, where 3.7e-9 skips nothing. Without a
            filter, softcap or ``return_lse`` it makes gradients in the forward pass where that is faster.
        accum_e_fp32: Add the gradient of ``e`` up in float32 (the chunked path always does).
        accum_c_fp32: Add the gradient of ``c`` up in float32 (the chunked path always does).
        filter_e_grad: Whether the filter holds for the gradient of ``e``.
        filter_c_grad: Whether the filter holds for the gradient of ``c``.
        impl: ``"triton"`` (CUDA 8.0 and up), ``"chunked"`` (any device), ``"dense"`` (the definition), or
            ``"auto"``: Triton where it runs, the definition where the logits are below 16 MiB, else chunks.
        vocab_parallel: The classifier's rows are spread over processes, and these are ours.

    Returns:
        The loss, or ``(loss, lse)``. The mean over no kept token is NaN, as in PyTorch.

    Raises:
        ValueError: Shapes disagree, a target is out of range, or a setting is impossible here.

    Example:
        >>> from torch.nn import functional as F
        >>> e, c = torch.randn(2, 5, 8), torch.randn(1000, 8)
        >>> y = torch.randint(0, 1000, (2, 5))
        >>> loss = linear_cross_entropy(e, c, y, shift=1, impl="chunked")
        >>> logits = e @ c.T
        >>> torch.allclose(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()))
        True
    """
    shift = int(shift)
    _check(e, c, targets, bias, softcap, reduction, shift, filter_eps, impl, vocab_parallel)
    length = targets.shape[-1]
    wanted = targets[..., shift:]  # (..., T - shift)
    shape = wanted.shape
    flat = wanted.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(1)
    everything = len(kept) == len(flat)
    y = flat if everything else flat[kept]  # (N,)
    _check_targets(y, len(c) if vocab_parallel is None else None, ignore_index)
    rows = None
    if shift or not everything:  # row of e that predicts each kept target
        rows = kept if shift == 0 else kept // (length - shift) * length + kept % (length - shift)
    e = e.reshape(-1, e.shape[-1])  # (M, D)

    backend = _backend(impl, e, y, c, filter_eps, vocab_parallel)
    eps = filter_eps
    if eps == "auto":
        eps = None if backend in (None, CHUNKED) else torch.finfo(_compute_dtype(e)).eps / 32
    plan = Plan(softcap, eps, filter_e_grad, filter_c_grad, True, accum_e_fp32, accum_c_fp32, None, vocab_parallel)
    if backend is CHUNKED and reduction != "none" and not return_lse and _one_pass(plan, e, c, bias, len(y)):
        return _apply_one_pass(e, c, bias, y, rows, 1 / len(y) if reduction == "mean" else 1.0)
    if backend is None:
        nll, lse = dense_nll(e if rows is None else e[rows], c, y, bias, softcap)
    else:
        nll, lse = _apply(e, c, bias, y, rows, plan, backend)

    def spread(values: Tensor) -> Tensor:
        return values.view(shape) if everything else values.new_zeros(len(flat)).index_copy(0, kept, values).view(shape)

    loss = nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else spread(nll)
    return (loss, spread(lse)) if return_lse else loss


@torch.compiler.disable
def _apply(*arguments: Any) -> tuple[Tensor, Tensor]:
    return LinearNLL.apply(*arguments)


@torch.compiler.disable
def _apply_one_pass(*arguments: Any) -> Tensor:
    return OnePassLoss.apply(*arguments, torch.is_grad_enabled())


def _one_pass(plan: Plan, e: Tensor, c: Tensor, bias: Tensor | None, kept: int) -> bool:
    """Whether nothing asks for LSE of all tokens before the first gradient, and a tile holds enough tokens."""
    same = e.dtype == c.dtype == (e if bias is None else bias).dtype and e.dtype in (torch.float32, torch.float64)
    plain = plan.softcap is None and plan.filter_eps is None and plan.parallel is None
    return (
        kept > 0
        and same
        and plain
        and not torch.is_autocast_enabled(e.device.type)
        and bool(tokens_at_once(len(c), e.dtype))
    )


def _compute_dtype(e: Tensor) -> torch.dtype:
    kind = e.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else e.dtype


def _triton_reason(e: Tensor) -> str | None:
    """Why the Triton kernels cannot run here; None where they can."""
    if e.dtype == torch.float64:
        return "takes float16, bfloat16 or float32, not float64"
    if e.is_cuda and torch.cuda.get_device_capability(e.device) < (8, 0):
        return "needs CUDA >= 8.0"
    try:
        from tokenry.kernels._triton.linear_cross_entropy import INTERPRETED
    except ImportError:
        return "needs the package triton (pip install 'tokenry[triton]')"
    return None if e.is_cuda or INTERPRETED else "needs CUDA >= 8.0"


def _backend(
    impl: str, e: Tensor, y: Tensor, c: Tensor, filter_eps: float | str | None, share: VocabParallel | None
) -> Backend | None:
    """The backend; None is the dense definition."""
    if impl == "triton" or (impl == "auto" and e.is_cuda):
        reason = _triton_reason(e)
        if reason is None:
            from tokenry.kernels._triton.linear_cross_entropy import TRITON

            return TRITON
        if impl == "triton":
            raise ValueError(f"impl='triton' {reason}; these tensors are on {e.device}. Use impl='chunked'")
    full = e.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(e.device.type)
    small = len(y) * len(c) <= SMALL and full and share is None and not isinstance(filter_eps, float)
    return None if impl == "dense" or (impl == "auto" and small) else CHUNKED


def _check(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reduction: str,
    shift: int,
    filter_eps: float | str | None,
    impl: str,
    share: VocabParallel | None,
) -> None:
    named = {"e": e, "c": c, "targets": targets, "bias": bias}
    for name, tensor in named.items():
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor; pass a local tensor (.to_local() or .full_tensor()), and vocab_parallel=... "
                "where the rows of c are spread over processes"
            )
    for name, tensor in {"e": e, "c": c, "bias": bias}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor, got {tensor.dtype}; hidden states, not token ids"
            )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer classes, got {targets.dtype}; use targets.long()")
    if e.ndim < 2 or e.shape[:-1] != targets.shape:
        raise ValueError(
            f"e must be targets' shape plus one dimension: e is {tuple(e.shape)}, targets {tuple(targets.shape)}"
        )
    if targets.numel() == 0:
        raise ValueError(f"the batch is empty: targets has shape {tuple(targets.shape)}")
    if c.ndim != 2 or c.shape[1] != e.shape[-1]:
        raise ValueError(f"c must be (vocabulary, {e.shape[-1]}) to fit e {tuple(e.shape)}, got {tuple(c.shape)}")
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias must have one number per row of c, ({len(c)},), got {tuple(bias.shape)}")
    if len({t.device for t in named.values() if t is not None}) > 1:
        where = ", ".join(f"{name} on {t.device}" for name, t in named.items() if t is not None)
        raise ValueError(f"all tensors must be on one device, got {where}")
    if e.dtype != c.dtype and not torch.is_autocast_enabled(e.device.type):
        raise ValueError(f"e is {e.dtype} and c is {c.dtype}: cast one of them, or run under autocast")
    if not 0 <= shift < targets.shape[-1]:
        raise ValueError(f"shift must be in [0, {targets.shape[-1]}), the length of the sequences; got {shift}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r} (presets are keyword sets: PRESETS)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None switches it off")
    if isinstance(filter_eps, str) and filter_eps != "auto":
        raise ValueError(f"filter_eps must be a number, 'auto' or None, got {filter_eps!r}")
    if isinstance(filter_eps, (int, float)) and not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps must be in [0, 1), a bound on a probability; got {filter_eps}")
    if share is not None and len(c) != share.stop - share.start:
        raise ValueError(f"c has {len(c)} rows, but vocab_parallel holds [{share.start}, {share.stop})")
    if share is not None and impl == "dense":
        raise ValueError("impl='dense' knows no vocab_parallel; use 'auto', 'chunked' or 'triton'")


def _check_targets(y: Tensor, vocab: int | None, ignore_index: int) -> None:
    bad = y < 0 if vocab is None else (y < 0) | (y >= vocab)
    if y.device.type == "cpu":
        if bad.any():
            worst = y[bad][0].item()
            limit = "non-negative" if vocab is None else f"in [0, {vocab})"
            raise ValueError(f"targets must be {limit} or ignore_index={ignore_index}, got {worst}")
    elif y.is_cuda:
        torch._assert_async(~bad.any(), "linear_cross_entropy: a target is outside the vocabulary")  # no waiting


class LinearCrossEntropy(nn.Module):
    """``linear_cross_entropy`` as a module: settings once, tensors at each call.

    Args:
        **settings: Keywords of ``linear_cross_entropy``.

    Example:
        >>> loss = LinearCrossEntropy(shift=1, softcap=30.0)
        >>> loss(torch.zeros(1, 4, 8), torch.zeros(16, 8), torch.zeros(1, 4, dtype=torch.long)).item()  # log 16
        2.77258...
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = set(linear_cross_entropy.__kwdefaults__ or {})
        if set(settings) - known:
            wrong = ", ".join(sorted(set(settings) - known))
            raise ValueError(f"no such setting: {wrong}; settings: {', '.join(sorted(known))}")
        self.settings = settings

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Any:
        """E (..., D), c (V, D), targets (...), bias (V,) -> the loss, as ``linear_cross_entropy``."""
        return linear_cross_entropy(e, c, targets, bias, **self.settings)

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings.items())


def z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = 0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Square of LSE: a small multiple of it (about 1e-4) added to the loss keeps logits from drifting.

    Args:
        lse: From ``linear_cross_entropy(..., return_lse=True)``, (..., T - shift).
        targets: The same targets (..., T), to leave ignored tokens out of the mean. None: all count.
        shift: As given to the loss.
        ignore_index: As given to the loss.
        reduction: ``"mean"`` over kept tokens, ``"sum"`` or ``"none"``.

    Example:
        >>> z_loss(torch.tensor([1.0, 3.0]), torch.tensor([5, -100])).item()
        1.0
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    square = lse.square()
    count: Tensor | int = square.numel()
    if targets is not None:
        kept = targets[..., int(shift) :] != ignore_index
        if kept.shape != lse.shape:
            raise ValueError(
                f"targets without the first {int(shift)} are {tuple(kept.shape)}, lse is {tuple(lse.shape)}"
            )
        square, count = torch.where(kept, square, 0.0), kept.sum()
    if reduction == "none":
        return square
    return square.sum() / count if reduction == "mean" else square.sum()
