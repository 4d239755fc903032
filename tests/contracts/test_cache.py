"""What every cache that evicts must do, on every architecture."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tiny_causal import tiny_causal, tokens
from tokenry.kvcache import (
    CompressedCache,
    EMSCache,
    ExpectedAttentionCache,
    GlobalCache,
    H2OCache,
    KeyDiffCache,
    KeyNormCache,
    SinkCache,
    SlidingWindowCache,
    SnapKVCache,
    TOVACache,
    cache_bytes,
)
from tokenry.layers.cache_argument import CACHE

CACHES = {
    "ems": lambda config, budget, **k: EMSCache(config=config, budget=budget, window=4, **k),
    "ems-sum": lambda config, budget, **k: EMSCache(config=config, budget=budget, window=4, combine="sum", **k),
    "ems-evict-only": lambda config, budget, **k: EMSCache(config=config, budget=budget, window=4, merge_ratio=0, **k),
    "expected": lambda config, budget, **k: ExpectedAttentionCache(config, budget, window=3, future=20, **k),
    "global": lambda config, budget, **k: GlobalCache(config, budget, window=4, **k),
    "h2o": lambda config, budget, **k: H2OCache(config, budget, window=4, **k),
    "keydiff": lambda config, budget, **k: KeyDiffCache(config, budget, **k),
    "keynorm": lambda config, budget, **k: KeyNormCache(config, budget, window=4, **k),
    "sinks": lambda config, budget, **k: SinkCache(config, budget, sinks=2, **k),
    "snapkv": lambda config, budget, **k: SnapKVCache(config, budget, window=4, pool=3, **k),
    "tova": lambda config, budget, **k: TOVACache(config, budget, **k),
    "window": lambda config, budget, **k: SlidingWindowCache(config, budget, **k),
}
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "opt", "qwen3"]
every_cache = pytest.mark.parametrize(
    "make", [pytest.param(make, marks=pytest.mark.method("ems") if "ems" in name else (), id=name)
             for name, make in CACHES.items()]
)  # fmt: skip
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)
MODELS: dict[tuple[str, str], PreTrainedModel] = {}


def model_of(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    if (kind, attention) not in MODELS:
        MODELS[kind, attention] = tiny_causal(kind, attention)
    return MODELS[kind, attention]


def generate(model: PreTrainedModel, ids: Tensor, new: int = 6, **kwargs) -> Tensor:
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs)


@torch.no_grad()
def follow(model: PreTrainedModel, cache, ids: Tensor, mask: Tensor | None = None, split: int = 30) -> Tensor:
    """Logits of the tokens after ``split``, which is where the cache was compressed."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split], **{CACHE: cache})
    out = []
    for first, last in ((split, split + 1), (split + 1, ids.shape[1])):  # one token, then several at once
        step = model(
            ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            **{CACHE: cache},
        )
        out.append(step.logits)
    return torch.cat(out, dim=1)


@every_cache
@every_architecture
def test_a_budget_that_suffices_changes_no_bit(make, kind):
    attention = "eager" if kind == "gpt2" else "sdpa"
    model, ids = model_of(kind, attention), tokens(2, 40)
    full = follow(model, DynamicCache(config=model.config), ids)
    assert torch.equal(follow(model, make(model.config, 40), ids), full)
    assert torch.equal(follow(model, make(model.config, 30), ids), full)  # exactly the prompt's length
    assert model.config._attn_implementation == attention


@every_cache
@every_architecture
def test_generates_and_stores_the_budget(make, kind):
    model, ids = model_of(kind), tokens(1, 40)
    cache = make(model.config, 12)
    out = generate(model, ids, **{CACHE: cache})
    assert out.shape == (1, 46)
    assert [layer.stored for layer in cache.layers] == [12 + 5] * 2  # the last token is not in the cache
    assert cache.get_seq_length() == 45
    assert all(torch.isfinite(layer.keys).all() for layer in cache.layers)


@every_architecture
@pytest.mark.parametrize("name", ["window", "sinks"])
def test_positions_after_compression(kind, name):
    """Later tokens see what the full cache sees when the evicted tokens are masked away."""
    model, ids, split, budget = model_of(kind), tokens(2, 40), 30, 12
    actual = follow(model, CACHES[name](model.config, budget), ids)
    sinks = 2 if name == "sinks" else 0
    shown = torch.ones(40, 40).tril().bool()
    shown[split:, sinks : split - budget + sinks] = False  # hidden only from the tokens after the cut
    with torch.no_grad():
        places = torch.arange(40).expand(2, 40)
        expected = model(ids, attention_mask=shown.expand(2, 1, 40, 40), position_ids=places).logits[:, split:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_cache
def test_left_padding(make):
    """A padded row continues as it does alone, also when it has fewer real tokens than the budget."""
    model = model_of("llama")
    pads = [0, 5, 22, 29]  # of 30; budget 12: the last two rows are shorter than the budget
    ids = tokens(4, 40)
    mask = torch.stack([torch.arange(40) >= pad for pad in pads]).long()
    together = follow(model, make(model.config, 12), ids * mask, mask)
    for row, pad in enumerate(pads):
        alone = follow(model, make(model.config, 12), ids[row : row + 1, pad:], split=30 - pad)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=2e-4)


@every_cache
@every_architecture
def test_rows_are_independent(make, kind):
    model, ids = model_of(kind), tokens(3, 40)
    together = follow(model, make(model.config, 12), ids)
    alone = follow(model, make(model.config, 12), ids[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


@every_cache
def test_eager_equals_sdpa(make):
    ids = tokens(2, 40)
    results = [follow(m, make(m.config, 12), ids) for m in (model_of("llama"), model_of("llama", "eager"))]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@every_cache
def test_bfloat16(make):
    model = tiny_causal("llama", dtype=torch.bfloat16)
    cache = make(model.config, 12)
    logits = follow(model, cache, tokens(2, 40))
    assert logits.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


@every_cache
def test_deterministic(make):
    model, ids = model_of("llama"), tokens(2, 40)
    assert torch.equal(follow(model, make(model.config, 12), ids), follow(model, make(model.config, 12), ids))


@every_cache
def test_memory_is_what_was_promised(make):
    """2 · rows · key heads · budget · head size · bytes, in every layer; nothing larger stays alive behind it."""
    model, ids = model_of("llama"), tokens(3, 60)
    cache, full = make(model.config, 12), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        model(ids, **{CACHE: full})
    assert cache_bytes(cache) == 2 * 2 * 3 * 2 * 12 * 8 * 4
    assert cache_bytes(full) == 2 * 2 * 3 * 2 * 60 * 8 * 4


@every_cache
def test_compresses_again_while_decoding(make):
    model, ids = model_of("llama"), tokens(2, 40)
    cache = make(model.config, 12, every=4)
    lengths = []
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: cache})
        for place in range(20, 40):
            model(ids[:, place : place + 1], **{CACHE: cache})
            lengths.append(cache.layers[1].stored)
    assert max(lengths) == 16 and min(lengths) == 12
    assert cache.get_seq_length() == 40
    assert (cache.layers[0].positions.diff(dim=-1) > 0).all()
    assert (cache.layers[0].positions[..., -1] == 39).all()


@every_cache
def test_beams_and_several_answers(make):
    model, ids = model_of("llama"), tokens(2, 40)
    for every in (None, 3):
        cache = make(model.config, 12, every=every)
        out = generate(model, ids, **{CACHE: cache}, num_beams=3, num_return_sequences=2)
        assert out.shape == (4, 46)


@every_cache
def test_goes_on_with_a_longer_prompt(make):
    """A second turn: only the new tokens are read; the cache is not cut a second time unless asked."""
    model, ids = model_of("llama"), tokens(1, 60)
    cache = make(model.config, 12)
    first = generate(model, ids[:, :40], **{CACHE: cache})
    longer = torch.cat([first, ids[:, 40:45]], dim=1)
    out = generate(model, longer, **{CACHE: cache})
    assert out.shape[1] == 57 and cache.get_seq_length() == 56
    assert cache.layers[0].stored == 12 + 16


@every_cache
def test_copies_and_resets(make):
    model, ids = model_of("llama"), tokens(1, 40)
    cache = make(model.config, 12)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    twin = copy.deepcopy(cache)
    assert twin.config is cache.config
    with torch.no_grad():
        step = [model(ids[:, :1], **{CACHE: one}).logits for one in (cache, twin)]
    assert torch.equal(*step)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(follow(model, cache, ids), follow(model, make(model.config, 12), ids))


@every_cache
def test_leaves_the_model_as_it_was(make):
    model, ids = model_of("llama"), tokens(1, 40)
    before = (model.config.to_dict(), [type(m).forward for m in model.modules()], model.config._attn_implementation)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    generate(model, ids, **{CACHE: make(model.config, 12, every=2)})
    after = (model.config.to_dict(), [type(m).forward for m in model.modules()], model.config._attn_implementation)
    assert before == after
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@every_cache
def test_only_full_attention_layers_are_cut(make):
    model, ids = model_of("gemma2", "eager"), tokens(2, 40)
    cache = make(model.config, 12)
    generate(model, ids, **{CACHE: cache})
    kinds = [isinstance(layer, type(cache.layers[1])) for layer in cache.layers]
    assert kinds == [False, True] and cache.layers[1].stored == 17


# The likeliest mistakes.


@every_cache
def test_refuses_to_be_rolled_back(make):
    model, ids = model_of("llama"), tokens(1, 40)
    cache = make(model.config, 12)
    assert not cache.is_croppable
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="cannot be rolled back.*DynamicCache"):
        cache.crop(-1)


@every_cache
def test_refuses_a_used_cache_for_a_prefix_of_its_text(make):
    model, ids = model_of("llama"), tokens(2, 40)
    cache = make(model.config, 12)
    full = generate(model, ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="prefix of its text.*new cache"):
        generate(model, full[:, :20], **{CACHE: cache})
    mask = torch.ones(2, 40).long()
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="prefix of its text.*new cache"):
        generate(model, full[:, :40], attention_mask=mask, **{CACHE: cache})


@every_cache
def test_refuses_a_budget_that_is_too_small(make):
    with pytest.raises(ValueError, match="budget|sinks|window"):
        make(model_of("llama").config, 1)


@every_cache
def test_refuses_right_padding(make):
    model, ids = model_of("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 35:] = 0
    with pytest.raises(ValueError, match="padding on the left"), torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: make(model.config, 12)})
    assert model.config._attn_implementation == "sdpa"


@every_cache
def test_refuses_a_foreign_config(make):
    model = model_of("llama")
    with pytest.raises(ValueError, match="model.config, the model's own"):
        generate(model, tokens(1, 40), **{CACHE: make(copy.deepcopy(model.config), 12)})


@every_cache
def test_refuses_a_bad_interval_and_no_config(make):
    with pytest.raises(ValueError, match="every must be at least 1"):
        make(model_of("llama").config, 12, every=0)
    with pytest.raises(ValueError, match="config must be the model's config"):
        make(model_of("llama"), 12)


def test_a_cache_that_dies_half_way_leaves_nothing():
    model = model_of("llama")
    cache: CompressedCache | None = EMSCache(config=model.config, budget=12, window=4)
    cache.update(torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8), 0)
    assert model.config._attn_implementation != "sdpa"  # the call that should follow never does
    del cache
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
