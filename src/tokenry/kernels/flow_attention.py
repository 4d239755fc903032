"""Flow attention: attention whose cost grows linearly with the number of tokens.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022, arXiv:2202.06258.

Queries are sinks and keys are sources of a flow network; each sink's incoming and each source's outgoing
flow is fixed to one, which makes tokens compete without a softmax over pairs:

    q, k    = sigmoid(q), sigmoid(k)
    I_i     = 1 / <q_i, sum_j k_j>              O_j     = 1 / <k_j, sum_i q_i>
    I'_i    = <q_i, sum_j k_j O_j>              O'_j    = <k_j, sum_i q_i I_i>
    out_i   = sigmoid(I'_i Nq / Nk) I_i q_i sum_j k_j^T (v_j Nk softmax_j(O'_j))

In every inner product ``eps`` is added to both factors (to the sum, not to its terms). There is no scale by the
head's width and no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flow_attention"]


def flow_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """Mix values along flows, in time and memory linear in the number of tokens.

    The sums of the flow are taken in float32 when the inputs are of a shorter type.

    Args:
        query: ``(..., Nq, d)``.
        key: ``(..., Nk, d)``.
        value: ``(..., Nk, e)``.
        eps: Added to both factors of each inner product. Default 1e-6 (the authors' code).

    Returns:
        ``(..., Nq, e)`` in the type of ``value``.

    Raises:
        ValueError: Shapes that do not fit together, or no tokens.

    Example:
        >>> import torch
        >>> flow_attention(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.ones(1, 3, 4)).shape
        torch.Size([1, 3, 4])
    """
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or 0 in (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"flow_attention needs query (..., Nq, d), key (..., Nk, d), value (..., Nk, e) with at least one token; "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    kind = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(kind).sigmoid(), key.to(kind).sigmoid(), value.to(kind)
    sinks, sources = q.shape[-2], k.shape[-2]

    def flow(tokens: Tensor, total: Tensor) -> Tensor:  # (..., N, d), (..., 1, d) -> (..., N, 1)
        return (tokens + eps) @ (total + eps).transpose(-2, -1)

    incoming = flow(q, k.sum(-2, keepdim=True)).reciprocal()  # I (..., Nq, 1)
    outgoing = flow(k, q.sum(-2, keepdim=True)).reciprocal()  # O (..., Nk, 1)
    conserved_in = flow(q, outgoing.transpose(-2, -1) @ k)  # I' (..., Nq, 1)
    conserved_out = flow(k, incoming.transpose(-2, -1) @ q)  # O' (..., Nk, 1)
    competition = conserved_out.softmax(-2) * sources  # (..., Nk, 1)
    allocation = (conserved_in * (sinks / sources)).sigmoid()  # (..., Nq, 1)
    context = k.transpose(-2, -1) @ (v * competition)  # (..., d, e)
    return ((q @ context) * (incoming * allocation)).to(value.dtype)
