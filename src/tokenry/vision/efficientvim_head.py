"""EfficientViM's head: classifiers on the hidden states of all stages and on the last map, and their learned mean.

    logits = sum_i w_i head_i( mean_N LN(h_i) ) + w_last head_last( mean_HW x ),  w = softmax(weights)

h_i: (B, C_i, N_i), the hidden states of stage i; x: (B, C, H, W), the last map after its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

__all__ = ["EPS", "Features", "FusionHead"]

EPS = 1e-5  # of all layer norms of the network


class Features(NamedTuple):
    """What the fusing head needs.

    Attributes:
        map: (B, C, H, W), the last stage's map after the closing norm.
        hidden: The hidden states (B, C_i, N_i) of every stage's last block.
    """

    map: Tensor
    hidden: tuple[Tensor, ...]


class FusionHead(nn.Module):
    """A classifier per stage on its hidden states, one on the last map, and their learned mean.

    Args:
        dims: Channels of the stages.
        num_classes: Classes; 0 leaves the classifiers out.
        pool_type: ``"avg"``, or ``""`` with ``num_classes=0``.
        distillation: Whether there is a second set of classifiers.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, pool_type: str = "avg", distillation: bool = False, **dd: Any
    ) -> None:
        super().__init__()
        self.dims, self.distillation = (*dims, dims[-1]), distillation
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS, **dd) for dim in dims)
        self.weights = nn.Parameter(torch.ones(len(self.dims), **dd))
        self.weights_dist = nn.Parameter(torch.ones(len(self.dims), **dd)) if distillation else None
        self.reset(num_classes, pool_type)

    def _classifiers(self, num_classes: int, wanted: bool) -> nn.Module:
        if num_classes == 0 or not wanted:
            return nn.Identity()
        dd: dict[str, Any] = {"device": self.weights.device, "dtype": self.weights.dtype}
        layers = [nn.Linear(dim, num_classes, **dd) for dim in self.dims]
        for layer in layers:
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        return nn.ModuleList(layers).train(self.training)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """New classifiers for ``num_classes`` (0: none); ``pool_type`` ``""`` then leaves the map unpooled."""
        pool_type = self.pool_type if pool_type is None else pool_type
        if pool_type not in ("avg", "") or (pool_type == "" and num_classes > 0):
            raise ValueError(
                f"the classifiers take means over positions: global_pool must be 'avg', or '' with num_classes=0; got "
                f"global_pool={pool_type!r} with num_classes={num_classes}"
            )
        self.pool_type = pool_type
        self.fc = self._classifiers(num_classes, True)
        self.fc_dist = self._classifiers(num_classes, self.distillation)
        for name, parameter in self.named_parameters():
            if name.startswith(("norms.", "weights")):
                # without classes nothing reads them, and parallel training refuses trained parameters that nothing reads
                parameter.requires_grad_(num_classes > 0)

    def forward(self, x: Features | Tensor, pre_logits: bool = False) -> Any:
        """Features -> (B, num_classes); in training with distillation the pair of (B, num_classes)."""
        features = Features(x, ()) if isinstance(x, Tensor) else x
        if self.pool_type == "":
            return features.map
        pooled = features.map.mean((2, 3))  # (B, C)
        if pre_logits or not isinstance(self.fc, nn.ModuleList):
            return pooled
        if len(features.hidden) != len(self.norms):
            raise ValueError(
                f"the head fuses the hidden states of {len(self.norms)} stages, got those of {len(features.hidden)}; give it "
                "what forward_features of the whole model returns, not the map alone"
            )
        terms = [norm(h.transpose(1, 2)).mean(1) for norm, h in zip(self.norms, features.hidden, strict=True)]
        terms.append(pooled)
        logits = _fuse(self.weights, self.fc, terms)
        if self.weights_dist is None or not isinstance(self.fc_dist, nn.ModuleList):
            return logits
        second = _fuse(self.weights_dist, self.fc_dist, terms)
        return (logits, second) if self.training else (logits + second) / 2


def _fuse(weights: Tensor, classifiers: nn.ModuleList, terms: Sequence[Tensor]) -> Tensor:
    """Sum of the classifiers' logits, each times its softmaxed weight."""
    shares = weights.softmax(0)
    return torch.stack([share * fc(x) for share, fc, x in zip(shares, classifiers, terms, strict=True)]).sum(0)
