"""GELU without a second tensor of the hidden width, where nothing is trained.

An MLP's hidden map is its largest one. Writing the activation into it spares the memory and, on a CPU, the time to get that
memory from the system, which is about as long as the activation itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["InPlaceGELU"]


class InPlaceGELU(nn.Module):
    """Exact GELU. Overwrites its input when gradients are off, so that must be a tensor nobody else needs.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> with torch.no_grad():
        ...     y = InPlaceGELU()(x.clone())
        >>> torch.equal(y, torch.nn.functional.gelu(x))
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
