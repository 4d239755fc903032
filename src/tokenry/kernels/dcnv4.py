"""Deformable convolution whose nine weights are computed from the input and may be anything: DCNv4.

Xiong et al., "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications", CVPR 2024,
arXiv:2401.06197.

    y_g(h, w) = sum_p m_gp(h, w) v_g(h + (j_p - 1 + dy_gp(h, w)) s, w + (i_p - 1 + dx_gp(h, w)) s)

for each of G groups of C/G channels, with points p = 3 i_p + j_p of a 3x3 grid, i counting columns in the OUTER loop, j
rows; v between positions by bilinear interpolation, 0 outside the map; s the offset scale. The weights m are linear
outputs, without softmax or sigmoid, which is what sets DCNv4 apart from DCNv3.

It is computed with PyTorch's ``grid_sample``, which needs no compiled extension and has gradients on every device. A
3x3 ``torchvision.ops.deform_conv2d`` with weights of one computes the same once points and offsets are put in its
order (j outer, dy before dx), but loops over the channels on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["POINTS", "dcnv4", "offset_mask_width"]

POINTS = 9
_PER_GROUP = 3 * POINTS  # two offsets and a weight per point


def offset_mask_width(groups: int) -> int:
    """Channels of the offsets and weights of ``groups`` groups: 27 each, together rounded up to a multiple of 8.

    Example:
        >>> offset_mask_width(2)
        56
    """
    return -(-_PER_GROUP * groups // 8) * 8


def dcnv4(value: Tensor, offset_mask: Tensor, groups: int, offset_scale: float = 1.0) -> Tensor:
    """Sample nine points around every position and add them up with weights.

    Positions are float32 (float64 for a float64 ``value``) whatever the inputs' types are.

    Args:
        value: (N, H, W, C), what is sampled.
        offset_mask: (N, H, W, offset_mask_width(G)): for group g, entries 27 g to 27 g + 17 are offsets dx_0, dy_0, dx_1, ...
            in pixels, the next nine the weights m; the padding behind the last group is not read.
        groups: Groups G of channels.
        offset_scale: Scale s of the whole pattern, offsets and the grid itself.

    Returns:
        (N, H, W, C) in the type of ``value``.

    Raises:
        ValueError: Groups that do not divide C, or shapes that do not fit.

    Example:
        >>> value, offset_mask = torch.ones(1, 4, 5, 8), torch.zeros(1, 4, 5, 56)
        >>> offset_mask[..., 22], offset_mask[..., 49] = 1.0, 2.0  # the weights of the middle points
        >>> dcnv4(value, offset_mask, groups=2)[0, 0, 0]
        tensor([1., 1., 1., 1., 2., 2., 2., 2.])
    """
    if value.ndim != 4 or groups < 1 or value.shape[-1] % groups:
        raise ValueError(f"value must be (N, H, W, C) with C a multiple of groups={groups}, got {tuple(value.shape)}")
    expected = (*value.shape[:3], offset_mask_width(groups))
    if offset_mask.shape != expected:
        raise ValueError(f"offset_mask must be {tuple(expected)} for groups={groups}, got {tuple(offset_mask.shape)}")
    kind = torch.float64 if value.dtype == torch.float64 else torch.float32
    height, width = value.shape[1:3]
    parts = offset_mask[..., : _PER_GROUP * groups].to(kind).unflatten(-1, (groups, _PER_GROUP))  # (N, H, W, G, 27)
    parts = parts.permute(0, 3, 1, 2, 4).flatten(0, 1)  # (N G, H, W, 27)
    offsets = parts[..., : 2 * POINTS].unflatten(-1, (POINTS, 2))  # (N G, H, W, 9, 2)
    weights = parts[..., 2 * POINTS :].movedim(-1, 1).unsqueeze(2)  # (N G, 9, 1, H, W)

    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last
    size = torch.tensor([width, height], device=value.device, dtype=kind)
    near = torch.arange(-1, 2, device=value.device, dtype=kind)
    grid = torch.cartesian_prod(near, near) * offset_scale  # (9, 2): x outer
    columns, rows = (torch.arange(n, device=value.device, dtype=kind) for n in (width, height))
    centre = torch.stack([columns.expand(height, -1), rows.unsqueeze(1).expand(-1, width)], dim=-1)  # (H, W, 2)
    base = (2 * (centre.unsqueeze(2) + grid) + 1) / size - 1  # (H, W, 9, 2)
    places = torch.addcmul(base, offsets, 2 * offset_scale / size).movedim(3, 1)  # (N G, 9, H, W, 2)

    image = value.to(kind).permute(0, 3, 1, 2).unflatten(1, (groups, -1)).flatten(0, 1)  # (N G, C/G, H, W)
    total = torch.zeros_like(image)
    # a point at a time: all nine samples at once are slower and nine times as large
    for place, weight in zip(places.unbind(1), weights.unbind(1), strict=True):
        sample = F.grid_sample(image, place, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = torch.addcmul(total, sample, weight)
    return total.unflatten(0, (-1, groups)).flatten(1, 2).permute(0, 2, 3, 1).to(value.dtype)
