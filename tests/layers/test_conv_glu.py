"""The convolutional gated linear unit: golden case, the equation, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.layers import ConvGLU

pytestmark = pytest.mark.method("transnext")


@pytest.mark.golden
def test_golden():
    case = GoldenCase("transnext", "conv_glu")
    layer = ConvGLU(24, 96)
    layer.load_state_dict({name.replace("dwconv.dwconv", "dwconv"): value for name, value in case.state_dict().items()})
    assert sum(p.numel() for p in layer.parameters()) == case.spec["params"]
    case.compare("y", layer(case.inputs["x"].mT.unflatten(2, (7, 5))).flatten(2).mT)


@given(h=st.integers(1, 4), w=st.integers(1, 4), hidden=st.integers(2, 9), batch=st.integers(1, 2))
@torch.no_grad()
def test_equals_the_equation(h, w, hidden, batch):
    torch.manual_seed(0)
    layer = ConvGLU(4, hidden, dtype=torch.float64)
    x = torch.randn(batch, 4, h, w, dtype=torch.float64)
    width = 2 * hidden // 3
    expected = torch.zeros_like(x)
    for n in range(batch):
        both = torch.einsum("oc,chw->ohw", layer.fc1.weight, x[n]) + layer.fc1.bias[:, None, None]
        for i in range(h):
            for j in range(w):
                gate = layer.dwconv.bias.clone()
                for a in range(-1, 2):
                    for b in range(-1, 2):
                        if 0 <= i + a < h and 0 <= j + b < w:
                            gate += layer.dwconv.weight[:, 0, a + 1, b + 1] * both[:width, i + a, j + b]
                product = F.gelu(gate) * both[width:, i, j]
                expected[n, :, i, j] = layer.fc2.weight @ product + layer.fc2.bias
    torch.testing.assert_close(layer(x), expected)


def test_gradients_and_dropout():
    torch.manual_seed(0)
    layer, x = ConvGLU(4, 6, drop=0.5), torch.randn(2, 4, 3, 5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())
    layer(x.double()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match=r"hidden must be at least 2, got 1; an MLP's usual 4 \* dim is 32"):
        ConvGLU(8, 1)
