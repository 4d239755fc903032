"""Rules of eviction that EMS is compared with: each against its formula, written out slowly."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Cohere2Config, DynamicCache, GlmConfig, LlamaConfig

from tiny_causal import tiny_causal, tokens
from tokenry.kvcache import (
    CompressedCache,
    Entries,
    ExpectedAttention,
    ExpectedAttentionCache,
    KeyDiffCache,
    KeyNormCache,
    TOVACache,
    expected_attention_score,
    key_difference_score,
    rotation_of,
)
from tokenry.kvcache.future_queries import add_queries, query_moments
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("ems")
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Seen:
    """A scorer that keeps what it was given."""

    def __init__(self, scorer) -> None:
        self.scorer, self.needs = scorer, scorer.needs
        self.entries: list[Entries] = []
        self.scores: list[Tensor] = []

    def __call__(self, entries: Entries) -> Tensor:
        self.entries.append(entries)
        self.scores.append(self.scorer(entries))
        return self.scores[-1]


@torch.no_grad()
def read(cache: CompressedCache, model, ids: Tensor, mask: Tensor | None = None) -> Seen:
    """What the scorer of ``cache`` sees and says while the model reads, layer by layer."""
    seen = Seen(cache.layers[0].scorer)
    for layer in cache.layers:
        layer.scorer = seen
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    return seen


@given(seed=st.integers(0, 1000), shape=SHAPES, pad=st.integers(0, 3))
def test_key_difference_equals_the_definition(seed, shape, pad):
    batch, heads, stored, dim = shape
    pad = min(pad, stored - 1)
    keys = numbers(seed, batch, heads, stored, dim)
    valid = torch.arange(stored) >= pad
    actual = key_difference_score(keys, valid)
    for b in range(batch):
        for h in range(heads):
            real = [keys[b, h, i] for i in range(pad, stored)]
            anchor = sum(k / k.norm() for k in real) / len(real)
            assume(anchor.norm() > 1e-2)  # opposite keys have no mean direction
            for i, k in enumerate(real):
                expected = -(k @ anchor) / (k.norm() * anchor.norm())
                assert actual[b, h, pad + i].item() == pytest.approx(expected.item(), abs=1e-4)


@given(seed=st.integers(0, 1000), shape=SHAPES, group=st.integers(1, 3), pad=st.integers(0, 3))
def test_expected_attention_equals_the_definition(seed, shape, group, pad):
    batch, heads, stored, dim = shape
    pad, scaling = min(pad, stored - 1), 0.7
    keys, values = numbers(seed, batch, heads, stored, dim), numbers(seed + 1, batch, heads, stored, dim + 1)
    mean, root = numbers(seed + 2, batch, heads * group, dim), numbers(seed + 3, batch, heads * group, dim, dim)
    covariance = root @ root.transpose(-1, -2)
    counted = (torch.arange(stored) >= pad).expand(batch, stored)
    actual = expected_attention_score(keys, values, mean, covariance, scaling=scaling, counted=counted)
    for b in range(batch):
        for h in range(heads):
            total = torch.zeros(stored)
            for q in range(h * group, (h + 1) * group):
                exponents = [
                    scaling * mean[b, q] @ keys[b, h, i]
                    + scaling**2 / 2 * keys[b, h, i] @ covariance[b, q] @ keys[b, h, i]
                    for i in range(pad, stored)
                ]
                total[pad:] += torch.stack(exponents).softmax(0) / group
            torch.testing.assert_close(actual[b, h], total * values[b, h].norm(dim=-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 3])
def test_the_expectation_is_that_of_drawn_queries(dim):
    """The closed form equals the mean of exp(s q·k) over many queries: what the method's name promises."""
    mean, root, keys = numbers(0, dim), 0.4 * numbers(1, dim, dim), numbers(2, 5, dim)
    covariance = root @ root.T
    queries = mean + numbers(3, 400_000, dim) @ root.T
    drawn = (0.5 * queries @ keys.T).exp().mean(0)
    closed = expected_attention_score(
        keys[None, None], torch.ones(1, 1, 5, 1), mean[None, None], covariance[None, None],
        scaling=0.5, counted=torch.ones(1, 5, dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(closed[0, 0], drawn / drawn.sum(), rtol=1e-2, atol=1e-3)


@given(
    seed=st.integers(0, 1000), parts=st.lists(st.integers(1, 6), min_size=1, max_size=5), far=st.sampled_from([0, 300])
)
def test_moments_of_parts_equal_those_of_the_whole(seed, parts, far):
    length = sum(parts)
    queries = numbers(seed, 2, 3, length, 4) + far  # a large mean must not eat the variance
    counted = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    known, first = None, 0
    for part in parts:
        at = slice(first, first + part)
        known, first = add_queries(known, query_moments(queries[:, :, at], counted[:, at])), first + part
    for b in range(2):
        rows = queries[b][:, counted[b]].double()
        if rows.shape[1] == 0:
            assert not known.count[b] and not known.mean[b].any()
            continue
        torch.testing.assert_close(known.mean[b].double(), rows.mean(1), rtol=1e-4, atol=1e-4)
        centred = rows - rows.mean(1, keepdim=True)
        torch.testing.assert_close(
            known.scatter[b].double(), centred.mT @ centred, rtol=1e-3, atol=1e-2 if far else 1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_positions_are_taken_out(kind):
    """Turned back, queries equal those that the module projects before it rotates; a mean rotation is that of matrices."""
    model, ids = tiny_causal(kind), tokens(2, 20)
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    attention = next(m for m in modules if m.layer_idx == 1 and "Attention" in type(m).__name__)
    rotation, before, after = rotation_of(attention), {}, {}
    assert rotation is not None
    forward = inspect.unwrap(type(attention).forward).__globals__
    own = forward["apply_rotary_pos_emb"]

    def watch(q, k, cos, sin, *args, **kwargs):
        found = own(q, k, cos, sin, *args, **kwargs)
        before["q"], after["q"] = q, found[0]  # the last layer's remain
        return found

    forward["apply_rotary_pos_emb"] = watch
    try:
        with torch.no_grad():
            model(ids)
    finally:
        forward["apply_rotary_pos_emb"] = own
    torch.testing.assert_close(rotation.undo(after["q"], 0), before["q"], rtol=1e-3, atol=1e-3)
    q = before["q"][:, :, :1]
    turned = [q @ rotation.average(place, 1, q) for place in range(30, 37)]
    torch.testing.assert_close(q @ rotation.average(30, 7, q), sum(turned) / 7, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rotation.undo(turned[0], 30), q, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_expected_attention_inside_a_model():
    """Scores equal those from the model's own projections, position after position, with grouped heads."""
    model, ids, future = tiny_causal("llama"), tokens(1, 30), 6
    seen = read(ExpectedAttentionCache(model.config, 12, future=future), model, ids)
    inputs = []
    attention = [layer.self_attn for layer in model.model.layers]
    handles = [a.q_proj.register_forward_hook(lambda _, x, y: inputs.append(y)) for a in attention]
    full = DynamicCache(config=model.config)
    model(ids, **{CACHE: full})
    for handle in handles:
        handle.remove()
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.zeros(8, 8)
    for place in range(30, 30 + future):
        for i, frequency in enumerate(frequencies.tolist()):
            angle = torch.tensor(place * frequency)
            turn[i, i] += angle.cos() / future
            turn[i + 4, i + 4] += angle.cos() / future
            turn[i, i + 4] -= angle.sin() / future
            turn[i + 4, i] += angle.sin() / future
    for projected, whole, score in zip(inputs, full.layers, seen.scores, strict=True):
        queries = projected.view(30, 4, 8)[4:]  # [26, 4, 8], without the first four
        for head in range(2):
            total = torch.zeros(26)
            for q in (2 * head, 2 * head + 1):
                mu, sigma = turn @ queries[:, q].mean(0), turn @ queries[:, q].T.cov(correction=0) @ turn.T
                k = whole.keys[0, head, 4:]
                total += (k @ mu / 8**0.5 + ((k @ sigma) * k).sum(-1) / 16).softmax(0) / 2
            expected = total * whole.values[0, head, 4:].norm(dim=-1)
            torch.testing.assert_close(score[0, head, 4:], expected, rtol=1e-3, atol=1e-5)
            assert torch.isinf(score[0, head, :4]).all()


@torch.no_grad()
@pytest.mark.parametrize("every", [None, 1])
def test_tova_inside_a_model(every):
    """The attention of the last query, averaged over all heads; the token with least goes."""
    model, ids = tiny_causal("llama", "eager"), tokens(2, 30)
    cache = TOVACache(model.config, 12, every=every)
    seen = read(cache, model, ids)
    attentions = model(ids, output_attentions=True).attentions
    for layer, (a, score) in enumerate(zip(attentions, seen.scores, strict=True)):
        expected = a[:, :, -1].mean(1)  # [B, 30]
        torch.testing.assert_close(score, expected[:, None].expand(2, 2, 30), rtol=1e-3, atol=1e-6)
        if every is not None:  # positions are kept only for a next time
            kept = expected[:, :-1].topk(11).indices.sort(-1).values
            assert torch.equal(cache.layers[layer].positions[:, 0, :-1], kept)


@torch.no_grad()
def test_key_norm_keeps_the_shortest_keys():
    model, ids = tiny_causal("llama"), tokens(2, 30)
    cache, full = KeyNormCache(model.config, 12), DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    model(ids, **{CACHE: full})
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        for b in range(2):
            for h in range(2):
                lengths = [(k.norm().item(), i) for i, k in enumerate(whole.keys[b, h, :-1])]
                kept = [*sorted(i for _, i in sorted(lengths)[:11]), 29]
                assert torch.equal(layer.keys[b, h], whole.keys[b, h, kept])


@pytest.mark.parametrize("make", [TOVACache, KeyNormCache, KeyDiffCache, ExpectedAttentionCache])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_padding_changes_no_score(make, kind):
    """A padded row is scored as it is alone, padding left out; so the same of its entries stay."""
    model, ids = tiny_causal(kind), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    together = read(make(model.config, 12), model, ids * mask, mask)
    alone = read(make(model.config, 12), model, ids[1:, 9:])
    for both, single in zip(together.scores, alone.scores, strict=True):
        torch.testing.assert_close(both[1:, :, 9:], single, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_key_rules_observe_no_attention(monkeypatch):
    """Only what is needed is computed: keys for two of the rules, queries for one, the newest row for one."""
    asked = []
    monkeypatch.setattr(
        "tokenry.kvcache.compression.attention_sums", lambda query, *a, **k: asked.append(query) or 1 / 0
    )
    model, ids = tiny_causal("llama"), tokens(1, 30)
    for make in (KeyNormCache, KeyDiffCache, ExpectedAttentionCache):
        cache = make(model.config, 12, every=4)
        model(ids, **{CACHE: cache})
        assert cache.layers[0].sums is None and cache.layers[0].recent is None
    with pytest.raises(ZeroDivisionError):
        model(ids, **{CACHE: TOVACache(model.config, 12)})
    assert [query.shape[2] for query in asked] == [1]


@torch.no_grad()
def test_moments_follow_decoding():
    """Read at once or token by token, the forecast is the same; it costs D + D² numbers and a count."""
    model, ids = tiny_causal("llama"), tokens(2, 24)
    caches = [ExpectedAttentionCache(model.config, 40, every=4) for _ in range(2)]
    model(ids, **{CACHE: caches[0]})
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 24)):
        model(ids[:, first:last], **{CACHE: caches[1]})
    for one, other in zip(*(c.layers for c in caches), strict=True):
        for a, b in zip(one.moments, other.moments, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert sum(x.numel() for x in one.moments) == 2 * (1 + 4 * 8 + 4 * 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Cohere2Config(sliding_window_pattern=2, sliding_window=16), "does not rotate its queries in every layer"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "changes its frequencies",
        ),
    ],
)
def test_refuses_a_rotation_that_cannot_be_undone(config, message):
    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    for name, value in small.items():
        setattr(config, name, value)
    config.head_dim = 8
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(tokens(1, 30), **{CACHE: ExpectedAttentionCache(model.config, 12)})
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_interleaved_and_partial_rotation():
    """GLM turns pairs of neighbours in half of each head; the same code undoes it."""
    config = GlmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    attention, q = model.model.layers[0].self_attn, numbers(0, 1, 4, 6, 8)
    rotation = rotation_of(attention)
    cos, sin = model.model.rotary_emb(q, torch.arange(5, 11)[None])
    turned = inspect.unwrap(type(attention).forward).__globals__["apply_rotary_pos_emb"](q, q, cos, sin)[0]
    torch.testing.assert_close(rotation.undo(turned, 5), q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q[:, :, :1] @ rotation.average(5, 1, q), turned[:, :, :1], rtol=1e-4, atol=1e-5)


def test_rejects_no_future():
    with pytest.raises(ValueError, match="future must be at least 1"):
        ExpectedAttention(0)
