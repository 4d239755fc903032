"""Mix-shift: golden cases, the equation by hand, shifts, groups, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.mixers.mix_shift import MixShift, shift_map
from tokenry.vision.ms_mlp import MixShiftBlock

pytestmark = pytest.mark.method("ms-mlp")


def slow(mixer: MixShift, x: torch.Tensor) -> torch.Tensor:
    """The equation, group by group and direction by direction."""
    start, found = 0, []
    for g, width in enumerate(mixer.widths):
        group = x[:, start : start + width]
        start += width
        shift = mixer.shifts[g]
        moved = []
        for dim in (3, 2):
            index = (torch.arange(x.shape[dim]) - shift) % x.shape[dim]
            moved.append(group.index_select(dim, index))
        found.append(mixer.dwconv_lr[g](moved[0]) + mixer.dwconv_td[g](moved[1]))
    return torch.cat(found, 1)


@pytest.mark.golden
def test_golden_mixer():
    case = GoldenCase("ms-mlp", "mixer")
    mixer = MixShift(14, kernel_sizes=(1, 5, 5, 5, 7)).eval()
    own = {k.removeprefix("b."): v for k, v in case.state_dict().items() if "dwconv" in k}
    mixer.load_state_dict(own)
    assert mixer.widths == [3, 3, 3, 3, 2]
    case.compare("y", mixer(case.inputs["x"]))


@pytest.mark.golden
def test_golden_block():
    case = GoldenCase("ms-mlp", "block")
    block = MixShiftBlock(24).eval()
    renamed = {
        k.replace("dwconv", "token_mixer.dwconv").replace("pwconv", "mlp.fc"): v for k, v in case.state_dict().items()
    }
    block.load_state_dict(renamed)
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))


@settings(max_examples=20, deadline=None)
@given(
    dim=st.integers(5, 24), height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5]),
)  # fmt: skip
def test_is_the_equation(dim, height, width, batch, kernel):
    torch.manual_seed(0)
    mixer = MixShift(dim, kernel_sizes=(1, kernel, kernel, 3, 5))
    assert sum(mixer.widths) == dim and len(mixer.widths) == 5
    x = torch.randn(batch, dim, height, width)
    torch.testing.assert_close(mixer(x), slow(mixer, x), rtol=1e-4, atol=1e-5)


def test_unit_kernels_only_shift():
    mixer = MixShift(20, kernel_sizes=(1,) * 5)
    for convolution in [*mixer.dwconv_lr, *mixer.dwconv_td]:
        nn.init.ones_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    x = torch.randn(2, 20, 6, 7)
    groups = zip(mixer(x).split(4, 1), x.split(4, 1), mixer.shifts, strict=True)
    for mixed, group, shift in groups:
        torch.testing.assert_close(mixed, group.roll(shift, 3) + group.roll(shift, 2))
    torch.testing.assert_close(mixer(x)[:, 8:12], 2 * x[:, 8:12])  # the group that is not shifted


def test_commutes_with_circular_shifts_where_no_border_is_padded():
    mixer, x = MixShift(10, kernel_sizes=(1, 1, 1, 3, 5)), torch.randn(1, 10, 8, 8)
    moved, expected = mixer(x.roll((2, 3), (2, 3))), mixer(x).roll((2, 3), (2, 3))
    torch.testing.assert_close(moved[:, :6], expected[:, :6])
    assert not torch.allclose(moved[:, 6:], expected[:, 6:])  # zero padding shows
    torch.testing.assert_close(moved[:, 6:, 6:-2, 7:-2], expected[:, 6:, 6:-2, 7:-2])


def test_shifts():
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert shift_map(x, 5, 3).flatten().tolist() == [3, 0, 1, 2]  # more than once around
    assert shift_map(x, 1, 3, wrap=False).flatten().tolist() == [0, 0, 1, 2]
    assert shift_map(x, -3, 3, wrap=False).flatten().tolist() == [3, 0, 0, 0]
    assert shift_map(x, -9, 3, wrap=False).flatten().tolist() == [0, 0, 0, 0]
    y = x.transpose(2, 3)
    assert shift_map(y, 2, 2, wrap=False).shape == y.shape
    assert shift_map(x, 0, 3) is x
    zeros, circle = MixShift(10, wrap=False), MixShift(10)
    zeros.load_state_dict(circle.state_dict())
    z = torch.randn(1, 10, 9, 9)
    same = torch.isclose(zeros(z), circle(z), atol=1e-6).all(1)[0]
    assert same[5, 5] and not same[0, 0]


def test_cost_and_groups():
    mixer = MixShift(96)
    assert mixer.widths == [20, 20, 20, 20, 16]
    counted = sum(2 * c * (k * k + 1) for c, k in zip(mixer.widths, mixer.kernel_sizes, strict=True))
    assert sum(p.numel() for p in mixer.parameters()) == counted
    assert MixShift(16).widths == [4, 3, 3, 3, 3]
    assert len(F.pad(torch.zeros(1, 16), (0, 0)).chunk(5, 1)) == 4  # why the groups are not torch's


def test_gamma_zero_makes_the_block_the_identity():
    block, x = MixShiftBlock(10, layer_scale=0.0), torch.randn(2, 10, 5, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixShift(4), "dim of at least 5"),
        (lambda: MixShift(20, kernel_sizes=(1, 3, 4, 5, 7)), "odd and positive"),
        (lambda: MixShift(20, shifts=(0, 1)), "every shift needs a kernel size"),
        (lambda: MixShift(20, shifts=(), kernel_sizes=()), "every shift needs"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
