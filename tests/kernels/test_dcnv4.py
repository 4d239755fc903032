"""DCNv4: the sampled sum against its definition point by point, and against a plain convolution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.kernels.dcnv4 import dcnv4, offset_mask_width

pytestmark = pytest.mark.method("hrvmamba")


def problem(batch=2, height=5, width=4, channels=6, groups=2, spread=1.5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, height, width, channels, generator=g, dtype=dtype)
    places = spread * torch.randn(batch, height, width, offset_mask_width(groups), generator=g, dtype=dtype)
    return value, places


def definition(value, offset_mask, groups, scale):
    """Loops over everything, four corners per point."""
    n, height, width, channels = value.shape
    part = channels // groups
    out = torch.zeros_like(value)
    for b in range(n):
        for h in range(height):
            for w in range(width):
                for g in range(groups):
                    numbers = offset_mask[b, h, w, 27 * g : 27 * g + 27].tolist()
                    own = slice(g * part, (g + 1) * part)
                    for p in range(9):
                        x = w + (p // 3 - 1 + numbers[2 * p]) * scale
                        y = h + (p % 3 - 1 + numbers[2 * p + 1]) * scale
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                                    out[b, h, w, own] += numbers[18 + p] * share * value[b, row, column, own]
    return out


@pytest.mark.golden
def test_golden():
    case = GoldenCase("hrvmamba", "op_dcnv4")
    case.compare("y", dcnv4(case.inputs["value"], case.inputs["offset_mask"], groups=2))


@given(
    height=st.integers(1, 4), width=st.integers(1, 4), groups=st.integers(1, 3),
    scale=st.sampled_from([1.0, 0.5, 2.0]), spread=st.sampled_from([0.3, 3.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_equals_the_definition(height, width, groups, scale, spread, seed):
    value, places = problem(1, height, width, 2 * groups, groups, spread, seed)
    torch.testing.assert_close(dcnv4(value, places, groups, scale), definition(value, places, groups, scale))


def test_without_offsets_it_is_a_depthwise_convolution():
    value, _ = problem(channels=6)
    kernel = torch.randn(2, 3, 3, dtype=torch.float64)  # one per group: [row, column]
    places = torch.zeros(2, 5, 4, offset_mask_width(2), dtype=torch.float64)
    for g in range(2):
        places[..., 27 * g + 18 : 27 * g + 27] = kernel[g].T.flatten()  # points count columns in the outer loop
    weight = kernel.repeat_interleave(3, dim=0).unsqueeze(1)
    expected = F.conv2d(value.permute(0, 3, 1, 2), weight, padding=1, groups=6).permute(0, 2, 3, 1)
    torch.testing.assert_close(dcnv4(value, places, 2), expected)


def test_whole_offsets_shift_the_map():
    """The middle point alone, two columns to the right: what leaves the map is zero."""
    value, _ = problem(1, 3, 6, 4, 1)
    places = torch.zeros(1, 3, 6, offset_mask_width(1), dtype=torch.float64)
    places[..., 8], places[..., 18 + 4] = 2.0, 1.0
    expected = torch.cat([value[:, :, 2:], torch.zeros_like(value[:, :, :2])], dim=2)
    torch.testing.assert_close(dcnv4(value, places, 1), expected)


def test_the_padding_is_not_read():
    value, places = problem(groups=2)
    other = places.clone()
    other[..., 54:] = torch.nan
    assert torch.equal(dcnv4(value, places, 2), dcnv4(value, other, 2))


def test_gradcheck():
    value, places = problem(1, 3, 3, 4, 2, spread=0.3)
    assert torch.autograd.gradcheck(lambda v, p: dcnv4(v, p, 2), (value.requires_grad_(), places.requires_grad_()))


def test_half_precision_keeps_float32_positions():
    value, places = problem(1, 40, 300, 4, 1, dtype=torch.float32)
    exact = dcnv4(value, places.bfloat16().float(), 1)
    half = dcnv4(value.bfloat16(), places.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    assert (
        half.float() - exact
    ).abs().max() < 0.03 * exact.abs().max()  # positions near 300 have a step of 2 in bfloat16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, p: dcnv4(v, p, 4), "multiple of groups=4"),
        (lambda v, p: dcnv4(v, p, 0), "multiple of groups=0"),
        (lambda v, p: dcnv4(v[0], p, 2), "value must be"),
        (lambda v, p: dcnv4(v, p[..., :54], 2), r"offset_mask must be \(2, 5, 4, 56\)"),
        (lambda v, p: dcnv4(v, p[:, :4], 2), "offset_mask must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem())
