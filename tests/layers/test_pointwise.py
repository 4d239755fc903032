"""1x1 convolutions as linear maps: equal to torch's, in both memory orders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenry.layers import ConvPosEnc, InPlaceGELU, Pointwise, PointwiseMLP


@given(
    batch=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(1, 5), bias=st.booleans(), last=st.booleans()
)
def test_is_a_convolution_in_values_and_gradients(batch, height, width, bias, last):
    layer = Pointwise(4, 6, bias, dtype=torch.float64)
    x = torch.randn(batch, 4, height, width, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    results = [layer(x), F.conv2d(x, layer.weight, layer.bias)]
    torch.testing.assert_close(*results)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in results))


@torch.no_grad()
def test_keeps_the_memory_order():
    layer = PointwiseMLP(4, 8)
    x = torch.randn(2, 4, 3, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous() and layer(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), layer(x))


@torch.no_grad()
def test_position_encoding_is_the_identity_plus_a_sum_over_neighbours():
    layer = ConvPosEnc(2)
    x = torch.randn(1, 2, 4, 3)
    expected = x.clone()
    for c in range(2):
        for i in range(4):
            for j in range(3):
                expected[0, c, i, j] += layer.proj.bias[c]
                for u in range(-1, 2):
                    for v in range(-1, 2):
                        if 0 <= i + u < 4 and 0 <= j + v < 3:
                            expected[0, c, i, j] += layer.proj.weight[c, 0, u + 1, v + 1] * x[0, c, i + u, j + v]
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="odd and positive, got 4; use 5"):
        ConvPosEnc(2, kernel_size=4)


def test_gelu_writes_in_place_without_gradients_alone():
    x = torch.randn(3, 5)
    kept = x.clone()
    assert torch.equal(InPlaceGELU()(x), F.gelu(kept)) and torch.equal(x, kept)
    with torch.no_grad():
        y = InPlaceGELU()(x)
    assert y.data_ptr() == x.data_ptr() and torch.equal(x, F.gelu(kept))
