"""EMS: evict, then merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from golden_case import GoldenCase, golden_cases
from tiny_causal import tiny_causal, tokens
from tokenry.kvcache import (
    EMSCache,
    Entries,
    ZeroClassMerge,
    compress,
    evict,
    global_local_score,
    merge_classes,
)
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("ems")


def entries_of(a: Tensor, keys: Tensor, values: Tensor, window: int) -> Entries:
    """What a layer knows after reading N tokens. a: ``[H, N, N]``, keys and values: ``[H, N, D]``."""
    heads, n, _ = a.shape
    counts = (n - torch.arange(n)).expand(1, heads, n)
    return Entries(
        keys=keys[None],
        values=values[None],
        positions=torch.arange(n).expand(1, heads, n),
        valid=torch.ones(1, n, dtype=torch.bool),
        sums=a.sum(1)[None],
        counts=counts,
        recent=a[None, :, -window:],
    )


def score_of(entries: Entries, combine: str = "max") -> Tensor:
    return global_local_score(entries.sums, entries.counts, entries.recent, combine=combine)


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("ems"))
def test_golden(name, record_property):
    case = GoldenCase("ems", name)
    spec = case.spec
    budget, window, threshold = spec["budget"], spec["window"], spec["threshold"]
    attention, keys, values = (case.inputs[k] for k in ("attention", "keys", "values"))
    heads, n, _ = keys.shape
    entries = entries_of(attention.view(heads, -1, n, n).mean(1), keys, values, window)
    score = score_of(entries, spec["combine"])
    case.compare("score", score[0], tolerance=1e-5)
    merger = ZeroClassMerge(spec["merge_ratio"], threshold)
    heavy, rest = evict(score[0], budget, window, merger.candidates(budget))
    newest = torch.arange(n - window, n).expand(heads, window)
    assert torch.equal(torch.cat([heavy, newest], -1), case.outputs["kept_positions"])
    assert torch.equal(rest, case.outputs["merge_candidates"])
    at = [keys.gather(1, i[..., None].expand(-1, -1, keys.shape[-1])) for i in (heavy, rest)]
    assert torch.equal(merge_classes(*at, threshold), case.outputs["class"])
    left = compress(entries, score, budget, window, merger)
    case.compare("keys", left.keys[0], tolerance=1e-5)
    case.compare("values", left.values[0], tolerance=1e-5)
    record_property("error", case.worst)


def slow_ems(a, keys, values, budget, window, ratio, threshold):
    """The definition for one head, with loops. Returns kept positions, keys and values."""
    n = a.shape[0]
    g = [sum(float(a[q, i]) for q in range(i, n)) / (n - i) for i in range(n)]
    l = []
    for i in range(n):
        queries = [q for q in range(n - window, n) if q >= i]
        l.append(sum(float(a[q, i]) for q in queries) / len(queries))
    s = [max(x * sum(l) / sum(g), y) for x, y in zip(g, l, strict=True)]
    order = sorted(range(n - window), key=lambda i: (-s[i], i))
    heavy = sorted(order[: budget - window])
    candidates = order[budget - window :][: int(ratio * budget)]
    members = {j: [] for j in heavy}
    for t in candidates:
        similarity = [float(torch.cosine_similarity(keys[t], keys[j], dim=0)) for j in heavy]
        best = max(range(len(heavy)), key=lambda x: similarity[x])
        if similarity[best] >= threshold:
            members[heavy[best]].append(t)
    out_k, out_v = [], []
    for j in heavy:
        group = [j, *members[j]]
        weight = sum(s[t] for t in group)
        out_k.append(sum(s[t] * keys[t] for t in group) / weight)
        out_v.append(sum(s[t] * values[t] for t in group) / weight)
    newest = list(range(n - window, n))
    return (
        heavy + newest,
        torch.stack(out_k + [keys[i] for i in newest]),
        torch.stack(out_v + [values[i] for i in newest]),
    )


def random_case(seed: int, n: int, dim: int, heads: int = 1, sharp: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    scores = sharp * torch.randn(heads, n, n, generator=generator)
    a = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    directions = torch.randn(4, dim, generator=generator)  # few directions, so that some keys are alike
    keys = directions[torch.randint(4, (heads, n), generator=generator)] + 0.4 * torch.randn(
        heads, n, dim, generator=generator
    )
    return a, keys, torch.randn(heads, n, dim, generator=generator)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(4, 24),
    window=st.integers(1, 4),
    extra=st.integers(1, 6),
    ratio=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    threshold=st.sampled_from([-1.0, 0.3, 0.8, 1.0]),
)
def test_equals_the_double_loop(seed, n, window, extra, ratio, threshold):
    budget = min(window + extra, n)
    if window >= budget:
        return
    a, keys, values = random_case(seed, n, 6)
    entries = entries_of(a, keys, values, window)
    left = compress(entries, score_of(entries), budget, window, ZeroClassMerge(ratio, threshold))
    kept, expected_keys, expected_values = slow_ems(a[0], keys[0], values[0], budget, window, ratio, threshold)
    assert left.positions[0, 0].tolist() == kept
    torch.testing.assert_close(left.keys[0, 0], expected_keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.values[0, 0], expected_values, rtol=1e-4, atol=1e-5)


def compressed(case, budget=8, window=3, **merge):
    entries = entries_of(*case, window)
    return compress(entries, score_of(entries), budget, window, ZeroClassMerge(**merge) if merge else None)


def test_no_candidates_or_no_similar_keys_is_pure_eviction():
    case = random_case(0, 20, 6, heads=2)
    evicted = compressed(case)
    for merge in ({"merge_ratio": 0.0}, {"merge_ratio": 0.1}, {"threshold": 1.0}):
        assert torch.equal(compressed(case, **merge).keys, evicted.keys)


def test_heads_are_independent():
    a, keys, values = random_case(1, 20, 6, heads=3)
    order = torch.tensor([2, 0, 1])
    left = compressed((a, keys, values), merge_ratio=1.0)
    turned = compressed((a[order], keys[order], values[order]), merge_ratio=1.0)
    assert torch.equal(left.keys[:, order], turned.keys)
    assert torch.equal(left.values[:, order], turned.values)


def test_norms_do_not_grow_and_the_window_is_untouched():
    case = random_case(2, 30, 6, heads=2)
    left = compressed(case, threshold=-1.0)
    assert left.keys.norm(dim=-1).max() <= case[1].norm(dim=-1).max() + 1e-5
    assert torch.equal(left.keys[0, :, -3:], case[1][:, -3:])


def test_a_duplicate_merges_into_itself():
    """A token repeated exactly changes nothing but the weight of one entry."""
    a, keys, values = random_case(3, 12, 6)
    keys[:, 5] = keys[:, 2]
    values[:, 5] = values[:, 2]
    a[:, 6:, 5] = 1e-4
    a[:, -1, 2] = 5.0  # entry 2 is heavy, entry 5 the candidate
    left = compressed((a, keys, values), budget=10, window=2, threshold=0.999)
    place = left.positions[0, 0].tolist().index(2)
    torch.testing.assert_close(left.keys[0, 0, place], keys[0, 2])
    torch.testing.assert_close(left.values[0, 0, place], values[0, 2])


def test_uniform_attention_does_not_favour_old_tokens():
    """a[q, i] = 1 / (q + 1): a plain sum ranks the oldest 150 times above the newest, the mean only by a logarithm."""
    n = 64
    a = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    mean = a.sum(0) / (n - torch.arange(n))
    assert a.sum(0)[0] / a.sum(0)[-2] > 100
    assert mean[0] / mean[-2] < 5
    assert (mean.diff() < 0).all()


def test_merging_follows_redundancy():
    """A head whose keys are alike merges its candidates, a head whose keys are not drops them: same shapes."""
    a, keys, values = random_case(4, 24, 16, heads=2)
    a[1] = a[0]
    keys[0] = keys[0, :1] + 0.01 * keys[0]
    keys[1] = torch.eye(24, 16) * torch.where(torch.arange(24) < 16, 1.0, -1.0)[:, None] + 1e-3
    entries = entries_of(a, keys, values, 3)
    heavy, rest = evict(score_of(entries), 8, 3, 8)
    at = [entries.keys.gather(2, i[..., None].expand(-1, -1, -1, 16)) for i in (heavy, rest)]
    merged = (merge_classes(*at, 0.6) > 0).sum(-1)[0]
    assert merged[0] == 8 and merged[1] <= 1


@given(seed=st.integers(0, 100), pad=st.integers(0, 20))
def test_padding_is_kept_first_or_not_at_all(seed, pad):
    a, keys, values = random_case(seed, 20, 6)
    entries = entries_of(a, keys, values, 3)
    entries.valid[:, :pad] = False
    left = compress(entries, score_of(entries), 8, 3, ZeroClassMerge(1.0, -1.0))
    assert left.valid[0].long().diff().min() >= 0
    assert (~left.valid).sum() == max(0, 8 - (20 - pad))


def test_running_sums_equal_reading_all_at_once():
    """Reading in pieces gives the same sums, rows and result as one pass."""
    model, ids = tiny_causal("llama"), tokens(2, 30)
    pieces, whole = (EMSCache(config=model.config, budget=40, window=5, every=9) for _ in range(2))
    with torch.no_grad():
        model(ids, **{CACHE: whole})
        for first, last in ((0, 11), (11, 12), (12, 26), (26, 30)):
            model(ids[:, first:last], **{CACHE: pieces})
    for one, other in zip(pieces.layers, whole.layers, strict=True):
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.recent, other.recent, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.counts, other.counts) and torch.equal(one.positions, other.positions)
        assert one.recent.shape[2] == 5


def test_attention_mass_is_conserved_while_compressing_again():
    """With everything merged (threshold -1, enough candidates) no attention sum is lost."""
    a, keys, values = random_case(5, 20, 6, heads=2)
    entries = entries_of(a, keys, values, 3)
    left = compress(entries, score_of(entries), 8, 3, ZeroClassMerge(5.0, -1.0))
    torch.testing.assert_close(left.sums.sum(-1), entries.sums.sum(-1))
    torch.testing.assert_close(left.recent.sum(-1), entries.recent.sum(-1))


def test_compression_equals_the_definition_inside_a_model():
    """Keys and values after the prompt equal the functions applied to eager attention probabilities."""
    model, ids = tiny_causal("llama", "eager"), tokens(1, 30)
    cache = EMSCache(config=model.config, budget=12, window=4)
    from transformers import DynamicCache

    full = DynamicCache(config=model.config)
    with torch.no_grad():
        attentions = model(ids, **{CACHE: full}, output_attentions=True).attentions
        model(ids, **{CACHE: cache})
    for layer, whole, a in zip(cache.layers, full.layers, attentions, strict=True):
        entries = entries_of(a[0].view(2, 2, 30, 30).mean(1), whole.keys[0], whole.values[0], 4)
        expected = compress(entries, score_of(entries), 12, 4, ZeroClassMerge())
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1}, "budget must be at least 2"),
        ({"budget": 32}, "smaller than the budget of 32"),
        ({"window": 0}, "window must be at least 1"),
        ({"threshold": 1.1}, "in \\[-1, 1\\]; got 1.1"),
        ({"merge_ratio": -0.5}, "merge_ratio must be at least 0"),
        ({"combine": "mean"}, "'max' or 'sum', got 'mean'"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_rejects(arguments, message):
    config = tiny_causal("llama").config
    with pytest.raises(ValueError, match=message):
        EMSCache(config=config, **{"budget": 256, **arguments})


def test_rejects_models_it_cannot_serve():
    from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, T5Config

    with pytest.raises(ValueError, match="encoder-decoder"):
        EMSCache(config=T5Config())
    with pytest.raises(ValueError, match="no layer of this model has a full-attention cache"):
        EMSCache(config=MistralConfig(num_hidden_layers=2, sliding_window=16))
    blind = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4), attn_implementation="eager"
    ).eval()
    cache = EMSCache(config=blind.config, budget=12, window=4)
    with pytest.raises(ValueError, match="could not see the model's queries"), torch.no_grad():
        blind(tokens(1, 30), **{CACHE: cache})
        blind(tokens(1, 1), **{CACHE: cache})
    assert blind.config._attn_implementation == "eager"
