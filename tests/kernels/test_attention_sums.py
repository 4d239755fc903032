from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.kernels.attention_sums import attention_sums


def slow(query, key, valid, softcap, sinks):
    """Attention probabilities one query at a time. Returns sums, counts and the list of rows."""
    batch, q_heads, length, dim = query.shape
    kv_heads, stored = key.shape[1:3]
    counts = torch.zeros(batch, stored, dtype=torch.long)
    rows = torch.zeros(batch, kv_heads, length, stored)
    for b in range(batch):
        for q in range(length):
            place = stored - length + q
            seen = [i for i in range(place + 1) if valid[b, i]]
            if not valid[b, place]:
                continue
            counts[b, seen] += 1
            for head in range(q_heads):
                kv = head // (q_heads // kv_heads)
                score = key[b, kv, seen] @ query[b, head, q] / dim**0.5
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                if sinks is not None:
                    score = torch.cat([score, sinks[head : head + 1]])
                rows[b, kv, q, seen] += score.softmax(0)[: len(seen)] / (q_heads // kv_heads)
    return rows.sum(2), counts, rows


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 9),
    past=st.integers(0, 5),
    recent=st.integers(0, 10),
    block=st.integers(1, 10),
    masked=st.sampled_from(["none", "bool", "float"]),
    extras=st.booleans(),
)
def test_equals_the_loops(seed, batch, group, length, past, recent, block, masked, extras):
    generator = torch.Generator().manual_seed(seed)
    stored = length + past
    query = torch.randn(batch, 2 * group, length, 5, generator=generator)
    key = torch.randn(batch, 2, stored, 5, generator=generator)
    pads = torch.randint(0, stored, (batch,), generator=generator)
    valid = torch.arange(stored) >= pads[:, None]
    softcap, sinks = (2.0, torch.randn(2 * group, generator=generator)) if extras else (None, None)
    shown = torch.ones(length, stored).tril(past).bool() & valid[:, None, None]
    mask = None
    if masked == "none":
        valid = torch.ones_like(valid)
    elif masked == "bool":
        mask = shown
    else:
        mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    out = attention_sums(
        query, key, mask=mask, valid=valid, recent=recent, block_size=block, softcap=softcap, sinks=sinks
    )
    sums, counts, rows = slow(query, key, valid, softcap, sinks)
    torch.testing.assert_close(out.sums, sums, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.counts, counts)
    torch.testing.assert_close(out.rows, rows[:, :, max(0, length - recent) :], rtol=1e-4, atol=1e-5)


def test_bias_is_added():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    bias = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    out = attention_sums(query, key, bias=bias, recent=1)
    torch.testing.assert_close(out.rows[0, 0, 0], torch.tensor([1.0, 0.0]).softmax(0))


def test_rejects():
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention_sums(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4))
    with pytest.raises(ValueError, match="3 queries on 2 keys"):
        attention_sums(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 4))
