"""Attention of one token that reads only chosen keys."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tokenry.kernels.sparse_decode_attention import (
    decode_scores,
    full_attention_and_top,
    gathered_attention,
    masked_attention,
    sparse_decode_attention,
    top_positions,
)
from tokenry.measure.counting import peak_activations

pytestmark = pytest.mark.method("tidaldecode")
module = importlib.import_module("tokenry.kernels.sparse_decode_attention")  # not the function of the same name
WAYS = [sparse_decode_attention, gathered_attention, masked_attention]
every_way = pytest.mark.parametrize("attention", WAYS, ids=lambda f: f.__name__)


def tensors(seed=0, batch=2, kv_heads=2, group=2, stored=20, dim=6, value_dim=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, kv_heads * group, 1, dim), (batch, kv_heads, stored, dim), (batch, kv_heads, stored, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def mask_of(kind: str, shown: Tensor, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "bool":
        return shown[:, None, None]
    return torch.zeros(shown[:, None, None].shape, dtype=dtype).masked_fill(
        ~shown[:, None, None], torch.finfo(dtype).min
    )


def slow(query, key, value, positions, shown, scaling):
    """The equation, one head at a time."""
    batch, q_heads = query.shape[:2]
    out = query.new_zeros(batch, q_heads, 1, value.shape[-1])
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // key.shape[1])
            read = [i for i in positions[b, h].tolist() if shown[b, i]]
            weights = torch.stack([scaling * query[b, h, 0] @ key[b, g, i] for i in read]).softmax(0)
            out[b, h, 0] = sum(w * value[b, g, i] for w, i in zip(weights, read, strict=True))
    return out


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    stored=st.integers(1, 23),
    budget=st.integers(1, 23),
    masked=st.sampled_from(["none", "bool", "float"]),
    contiguous=st.booleans(),
    block=st.sampled_from([1, 700, 2**20]),
)
def test_equals_the_loops(seed, batch, kv_heads, group, stored, budget, masked, contiguous, block):
    query, key, value = tensors(seed, batch, kv_heads, group, stored, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shown = torch.rand(batch, stored, generator=generator) > 0.4
    positions = torch.rand(batch, kv_heads * group, stored, generator=generator).argsort(-1)[..., : min(budget, stored)]
    shown[:, positions[:, :, 0].unique()] = True  # at least one of a head's positions can be seen
    mask = mask_of(masked, shown, torch.float64)
    if masked == "none":
        shown = torch.ones_like(shown)
    if not contiguous:
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    expected = slow(query, key, value, positions, shown, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        for attention in WAYS:
            found = attention(query, key, value, positions, scaling=0.4, mask=mask)
            torch.testing.assert_close(found, expected, msg=attention.__name__)


@given(
    seed=st.integers(0, 1000),
    group=st.integers(1, 3),
    stored=st.integers(1, 23),
    budget=st.integers(1, 23),
    masked=st.sampled_from(["none", "bool", "float"]),
)
def test_full_attention_and_its_top(seed, group, stored, budget, masked):
    query, key, value = tensors(seed, group=group, stored=stored)
    shown = torch.arange(stored) >= torch.tensor([0, min(4, stored - 1)])[:, None]
    mask, budget = mask_of(masked, shown, torch.float32), min(budget, stored)
    output, positions = full_attention_and_top(query, key, value, budget, scaling=0.4, mask=mask)
    repeated = [x.repeat_interleave(group, dim=1) for x in (key, value)]
    torch.testing.assert_close(output, sdpa(query, *repeated, attn_mask=mask, scale=0.4))
    scores = 0.4 * (query @ repeated[0].transpose(-1, -2))[:, :, 0]
    if masked != "none":
        scores = scores.masked_fill(~shown[:, None], -torch.inf)
    expected = scores.sort(descending=True, stable=True).values[..., :budget]
    torch.testing.assert_close(scores.gather(-1, positions).sort(descending=True).values, expected)
    assert (positions.sort().values.diff() > 0).all()


@every_way
def test_order_of_positions_and_of_the_cache_does_not_matter(attention):
    query, key, value = tensors()
    positions = torch.rand(2, 4, 20).argsort(-1)[..., :6]
    expected = attention(query, key, value, positions, scaling=0.4)
    torch.testing.assert_close(attention(query, key, value, positions.flip(-1), scaling=0.4), expected)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = attention(query, key[:, :, order], value[:, :, order], order.argsort()[positions], scaling=0.4)
    torch.testing.assert_close(moved, expected)


@every_way
def test_all_positions_are_full_attention(attention):
    query, key, value = tensors(group=3)
    positions = torch.arange(20).expand(2, 6, 20)
    repeated = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    torch.testing.assert_close(
        attention(query, key, value, positions, scaling=0.4), sdpa(query, *repeated, scale=0.4), rtol=1e-5, atol=1e-5
    )


@every_way
def test_a_hidden_position_stays_hidden(attention):
    """Fewer visible positions than the budget: the hidden ones among the chosen get nothing."""
    query, key, value = tensors(batch=1, stored=20)
    shown = torch.arange(20)[None] >= 17
    for masked in ("bool", "float"):
        mask = mask_of(masked, shown, torch.float32)
        scores = decode_scores(query, key, scaling=0.4, mask=mask)
        positions = top_positions(scores, 5)
        assert {17, 18, 19} <= set(positions[0, 0].tolist())
        spoilt = value.masked_fill(~shown[:, None, :, None], 1e4)
        found = attention(query, key, spoilt, positions, scaling=0.4, mask=mask)
        torch.testing.assert_close(found, slow(query, key, value, positions, shown, 0.4))


def test_the_current_token_can_be_kept():
    scores = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]]).repeat(3, 2, 1)
    scores[1, :, 4:] = module.LOWEST  # room of a static cache that is not filled yet
    scores[2, :, :5] = module.LOWEST  # a row with one token
    assert top_positions(scores, 2).sort().values[0].tolist() == [[0, 1]] * 2
    kept = top_positions(scores, 2, always_keep_last=True).sort().values
    assert kept[0].tolist() == [[0, 5]] * 2 and kept[1].tolist() == [[0, 3]] * 2
    assert (kept[2] == 5).any(-1).all()
    assert top_positions(scores, 1, always_keep_last=True)[:, 0, 0].tolist() == [5, 3, 5]


@every_way
def test_gradients(attention):
    query, key, value = (x.requires_grad_() for x in tensors(batch=1, stored=9, dim=3, dtype=torch.float64))
    positions = torch.rand(1, 4, 9).argsort(-1)[..., :3]
    mask = torch.randn(1, 1, 1, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, positions, scaling=0.4, mask=mask), (query, key, value)
    )


def test_gradients_of_full_attention():
    query, key, value = (x.requires_grad_() for x in tensors(batch=1, stored=9, dim=3, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda q, k, v: full_attention_and_top(q, k, v, 3, scaling=0.4)[0], (query, key, value)
    )


@every_way
def test_bfloat16(attention):
    query, key, value = tensors(stored=40)
    output, positions = full_attention_and_top(query, key, value, 4, scaling=0.4)
    half = [x.bfloat16() for x in (query, key, value)]
    found = attention(*half, positions, scaling=0.4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), attention(query, key, value, positions, scaling=0.4), rtol=0.03, atol=0.03
    )
    full, top = full_attention_and_top(*half, 4, scaling=0.4)
    assert full.dtype == torch.bfloat16 and top.shape == positions.shape
    torch.testing.assert_close(full.float(), output, rtol=0.03, atol=0.03)


@every_way
def test_rows_are_independent(attention):
    query, key, value = tensors(batch=3)
    positions = torch.rand(3, 4, 20).argsort(-1)[..., :5]
    together = attention(query, key, value, positions, scaling=0.4)
    alone = attention(query[1:2], key[1:2], value[1:2], positions[1:2], scaling=0.4)
    torch.testing.assert_close(together[1:2], alone)


def test_is_traced_without_a_break():
    query, key, value = tensors(batch=1, stored=64)
    positions = torch.arange(6).expand(1, 4, 6)
    traced = torch.compile(sparse_decode_attention, fullgraph=True, backend="eager")
    expected = sparse_decode_attention(query, key, value, positions, scaling=0.4)
    torch.testing.assert_close(traced(query, key, value, positions, scaling=0.4), expected)


def test_takes_the_way_that_reads_less(monkeypatch):
    taken = []
    for name in ("gathered_attention", "masked_attention"):
        way = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, way=way, **k: (taken.append(n), way(*a, **k))[1])
    query, key, value = tensors(group=4, stored=65)
    for budget in (8, 9):  # 2 · 4 · 8 = 64 <= 65 < 72
        sparse_decode_attention(query, key, value, torch.arange(budget).expand(2, 8, -1), scaling=0.4)
    assert taken == ["gathered_attention", "masked_attention"]


def test_neither_repeats_nor_copies_the_cache():
    query, key, value = tensors(batch=1, kv_heads=4, group=8, stored=2000, dim=64, value_dim=64)
    positions = torch.arange(16).expand(1, 32, 16)
    one_head = 2000 * 64 * 4
    assert peak_activations(lambda: sparse_decode_attention(query, key, value, positions, scaling=1.0)) < one_head
    sliced = [torch.cat([x, x], dim=2)[:, :, :2000] for x in (key, value)]  # not contiguous: a copy would show
    assert peak_activations(lambda: sparse_decode_attention(query, *sliced, positions, scaling=1.0)) < one_head


def test_rejects():
    query, key, value = tensors()
    positions = torch.zeros(2, 4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="one token per row"):
        sparse_decode_attention(query.repeat(1, 1, 2, 1), key, value, positions, scaling=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        sparse_decode_attention(query[:, :3], key, value, positions[:, :3], scaling=1.0)
    for bad in (positions[:, :2], positions[:1], positions[..., :0], positions[0]):
        with pytest.raises(ValueError, match=r"positions must be \[B, Hq, k\]"):
            sparse_decode_attention(query, key, value, bad, scaling=1.0)
