"""Attention in parts, merged: equal to attention over everything, however the keys are split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tokenry.kernels import merge_partial_attention, partial_attention

pytestmark = pytest.mark.method("batchllm")


def draw(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    parts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_merged_parts_are_the_whole(sizes, parts, seed):
    b, h, n, d = sizes
    q, k, v = draw((b, h, n, d), seed), draw((b, h, sum(parts), d), seed + 1), draw((b, h, sum(parts), d), seed + 2)
    pieces = [
        partial_attention(q, ki, vi, scale=0.7) for ki, vi in zip(k.split(parts, 2), v.split(parts, 2), strict=True)
    ]
    expected = scaled_dot_product_attention(q, k, v, scale=0.7)
    assert (merge_partial_attention(pieces) - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max())


@given(seed=st.integers(0, 99), keys=st.integers(1, 9), softcap=st.sampled_from([None, 2.0]))
def test_equals_the_equation(seed, keys, softcap):
    q, k, v = draw((1, 2, 4, 3), seed), draw((1, 2, keys, 3), seed + 1), draw((1, 2, keys, 3), seed + 2)
    may = torch.rand(1, 2, 4, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    bias = torch.zeros(may.shape).masked_fill(~may, float("-inf"))
    out, lse = partial_attention(q, k, v, scale=0.5, bias=bias, softcap=softcap)
    for h in range(2):
        for i in range(4):
            scores = [float(q[0, h, i] @ k[0, h, j]) * 0.5 for j in range(keys)]
            if softcap:
                scores = [softcap * float(torch.tensor(s / softcap).tanh()) for s in scores]
            weights = torch.tensor(
                [s if ok else float("-inf") for s, ok in zip(scores, may[0, h, i], strict=True)]
            ).exp()
            assert lse[0, h, i].exp().item() == pytest.approx(weights.sum().item(), rel=1e-4, abs=1e-12)
            expected = (weights[:, None] * v[0, h]).sum(0) / weights.sum() if may[0, h, i].any() else torch.zeros(3)
            torch.testing.assert_close(out[0, h, i], expected, rtol=1e-4, atol=1e-5)


def test_a_part_that_a_query_may_not_see_does_not_count():
    q, k, v = draw((1, 1, 2, 4), 0), draw((1, 1, 5, 4), 1), draw((1, 1, 5, 4), 2)
    nothing = torch.full((1, 1, 2, 5), float("-inf"))
    seen = partial_attention(q, k, v, scale=1.0)
    merged = merge_partial_attention([seen, partial_attention(q, v, k, scale=1.0, bias=nothing)])
    torch.testing.assert_close(merged, seen[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = draw((1, 2, 3, 8), 0), draw((1, 2, 40, 8), 1), draw((1, 2, 40, 8), 2)
    whole = scaled_dot_product_attention(q, k, v)
    parts = [
        partial_attention(q.to(dtype), k[:, :, part].to(dtype), v[:, :, part].to(dtype), scale=8**-0.5)
        for part in (slice(0, 33), slice(33, 40))
    ]
    merged = merge_partial_attention(parts)
    assert merged.dtype == dtype and parts[0][1].dtype == torch.float32
    torch.testing.assert_close(merged.float(), whole, rtol=0.02, atol=0.02)
