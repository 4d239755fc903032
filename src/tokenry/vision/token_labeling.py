"""Token labelling: logits at every position beside those of the whole image, and MixToken, which mixes images as tokens.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021, arXiv:2104.10858.

    inference     fc(mean over positions of x) + 0.5 max over positions of aux(x)          x: (B, C, H, W)
    training      a box of the first map is taken from the batch in flipped order; aux(x) is put back by the same box, so
                  that each position has labels of the image that it shows
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from timm.layers import ClassifierHead
from torch import Tensor, nn

__all__ = ["TokenLabelingHead", "TokenLabels", "swap_box"]


class TokenLabels(NamedTuple):
    """What a token-labelling model returns in training.

    Attributes:
        logits: (B, num_classes) of the mean over positions.
        dense: (B, H / 32 * W / 32, num_classes) of every position, put back into the image that it shows.
        box: (top, left, bottom, right) in positions of ``dense``: what each entry of ``logits`` has from the batch in flipped
            order. An image's own share is one minus the box's share of the positions.
    """

    logits: Tensor
    dense: Tensor
    box: tuple[int, int, int, int]


class TokenLabelingHead(ClassifierHead):
    """``fc(mean of x) + 0.5 max over positions of aux(x)`` for x: (B, C, H, W)."""

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, **dd: Any
    ) -> None:
        super().__init__(in_features, num_classes, pool_type, drop_rate, **dd)
        self.aux: nn.Module = nn.Linear(in_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """New linear maps for ``num_classes``; 0 takes them out."""
        super().reset(num_classes, pool_type, reset_other, in_features, device, dtype)
        self.aux = copy.deepcopy(self.fc)
        if isinstance(self.aux, nn.Linear):
            self.aux.reset_parameters()

    def dense(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H * W, num_classes)."""
        return self.aux(x.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or the pooled features."""
        y = super().forward(x, pre_logits)
        return y if pre_logits or isinstance(self.aux, nn.Identity) else y + 0.5 * self.dense(x).amax(1)


def swap_box(x: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """(B, C, H, W) with the box (top, left, bottom, right) of each entry taken from the batch in flipped order.

    Twice with the same box gives the first map again.

    Example:
        >>> import torch
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> swap_box(x, (0, 1, 1, 2))[0, 0]
        tensor([[0., 5.],
                [2., 3.]])
    """
    top, left, bottom, right = box
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
    return mixed
