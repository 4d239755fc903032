"""Flow attention against its equations, one query at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.kernels import flow_attention

pytestmark = pytest.mark.method("itransformer")


def slow(q, k, v, eps=1e-6):
    q, k = q.sigmoid(), k.sigmoid()
    incoming = [1 / ((a + eps) @ (sum(k) + eps)) for a in q]
    outgoing = [1 / ((b + eps) @ (sum(q) + eps)) for b in k]
    kept_in = [(a + eps) @ (sum(b * o for b, o in zip(k, outgoing, strict=True)) + eps) for a in q]
    kept_out = [(b + eps) @ (sum(a * i for a, i in zip(q, incoming, strict=True)) + eps) for b in k]
    share = torch.stack(kept_out).softmax(0) * len(k)
    rows = []
    for a, i, kept in zip(q, incoming, kept_in, strict=True):
        mixed = sum((a @ b) * c * s for b, c, s in zip(k, v, share, strict=True))
        rows.append((kept * len(q) / len(k)).sigmoid() * i * mixed)
    return torch.stack(rows)


@given(sinks=st.integers(1, 6), sources=st.integers(1, 6), width=st.integers(1, 5), out=st.integers(1, 4))
def test_matches_the_equations(sinks, sources, width, out):
    generator = torch.Generator().manual_seed(sinks * 1000 + sources * 100 + width * 10 + out)
    shapes = ((2, sinks, width), (2, sources, width), (2, sources, out))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    expected = torch.stack([slow(*row) for row in zip(q, k, v, strict=True)])
    torch.testing.assert_close(flow_attention(q, k, v), expected)


def test_gradient():
    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(flow_attention, inputs)


def test_short_types_are_summed_in_float32():
    q, k, v = (torch.randn(1, 300, 8) for _ in range(3))
    short = flow_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), flow_attention(q, k, v), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), (2, 4)), ((2, 3), (2, 3), (5, 3)), ((0, 3), (2, 3), (2, 3))])
def test_rejects(shapes):
    with pytest.raises(ValueError, match="at least one token"):
        flow_attention(*(torch.zeros(shape) for shape in shapes))
