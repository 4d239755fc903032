"""TidalDecode: position persistent sparse attention, and the machinery of reading a part of the cache."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from golden_case import GoldenCase, golden_cases
from tiny_causal import CONFIGS, VOCABULARY, tiny_causal, tokens
from tokenry.kvcache import (
    EMSCache,
    OwnTopReading,
    RandomReading,
    RecentReading,
    TidalReading,
    calibrate,
    full_attention_layers,
    read_sparsely,
    reading_fidelity,
    tidal,
)
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("tidaldecode")
LAYERS = 5
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "opt", "qwen3"]
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)
MODELS: dict[tuple[str, str], PreTrainedModel] = {}


def model_of(kind: str = "llama", attention: str = "sdpa") -> PreTrainedModel:
    """A random model of five layers; weights are scaled up so that attention is far from uniform."""
    if (kind, attention) not in MODELS:
        config = CONFIGS[kind]()
        config.num_hidden_layers = LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * LAYERS)[:LAYERS]
        MODELS[kind, attention] = build(config, attention)
    return MODELS[kind, attention]


def build(config, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data.mul_(6.0)
    return model


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, split: int, mask: Tensor | None = None, cache=None) -> Tensor:
    """Logits after the prompt and after each further token, which is fed alone: ``[B, T, V]``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = []
    for first, last in [(0, split), *((i, i + 1) for i in range(split, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last], CACHE: cache}
        out.append(model(ids[:, first:last], **given).logits[:, -1:])
    return torch.cat(out, dim=1)


def generate(model: PreTrainedModel, ids: Tensor, new: int = 8, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **{"do_sample": False, **kwargs})


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("tidaldecode"))
def test_golden(name, record_property):
    case = GoldenCase("tidaldecode", name)
    spec, prompt = case.spec, case.inputs["prompt"][None]
    model = LlamaForCausalLM(LlamaConfig(**spec["config"])).eval()
    model.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in model.parameters()) == spec["params"]
    settings = {"budget": spec["top_k"], "start": spec["sparse_layer_start"], "correction": spec["correction_layer"]}
    forced = torch.cat([prompt, case.inputs["forced_tokens"][None]], dim=1)
    selecting = {int(n.removeprefix("forced_selected_layer")) for n in case.outputs if "selected" in n}
    selected = {layer: torch.zeros_like(case.outputs[f"forced_selected_layer{layer}"]) for layer in selecting}
    with tidal(model, **settings) as reading, torch.no_grad():
        cache = DynamicCache(config=model.config)
        logits = [model(prompt, **{CACHE: cache}).logits[0, -1]]
        for step, token in enumerate(case.inputs["forced_tokens"]):
            logits.append(model(token.view(1, 1), **{CACHE: cache}).logits[0, -1])
            assert set(reading.selected) == selecting
            for layer, positions in reading.selected.items():
                selected[layer][step].scatter_(-1, positions[0], 1)
        out = generate(
            model, prompt, len(case.outputs["greedy_sequence"]) - prompt.shape[1], eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    case.compare("forced_logits", torch.stack(logits), tolerance=2e-6)
    case.compare("forced_dense_logits", decode(model, forced, prompt.shape[1])[0], tolerance=2e-6)
    for layer, found in selected.items():
        assert torch.equal(found, case.outputs[f"forced_selected_layer{layer}"])
    assert torch.equal(out.sequences[0], case.outputs["greedy_sequence"])
    with tidal(model, **settings):
        last = decode(model, out.sequences, prompt.shape[1])[0, -1]
    case.compare("greedy_logits_last", last, tolerance=2e-6)
    if spec["top_k"] >= forced.shape[1]:
        case.compare("forced_dense_logits", torch.stack(logits), tolerance=2e-6)
    record_property("error", case.worst)


class SlowTidal:
    """The equations with loops over rows and heads; one selection kept from layer to layer."""

    def __init__(self, budget, start, correction, keep):
        self.budget, self.start, self.correction, self.keep = budget, start, correction, keep
        self.chosen: list[list[list[int]]] = []

    def __call__(self, call):
        rows, heads, stored = call.query.shape[0], call.query.shape[1], call.key.shape[2]
        shown = torch.ones(rows, stored, dtype=torch.bool) if call.mask is None else call.mask[:, 0, 0].expand(rows, -1)
        out = torch.zeros(rows, 1, heads, call.value.shape[-1])
        selects = call.layer in (self.start, self.correction)
        if selects:
            self.chosen = [[[] for _ in range(heads)] for _ in range(rows)]
        for b in range(rows):
            for h in range(heads):
                g = h // (heads // call.key.shape[1])
                visible = [i for i in range(stored) if shown[b, i]]
                scores = {i: float(call.scaling * call.query[b, h, 0] @ call.key[b, g, i]) for i in visible}
                if selects:
                    rank = {i: torch.inf if self.keep and i == visible[-1] else s for i, s in scores.items()}
                    self.chosen[b][h] = sorted(rank, key=lambda i: -rank[i])[: self.budget]
                read = visible if selects or call.layer < self.start else self.chosen[b][h]
                weights = torch.tensor([scores[i] for i in read]).softmax(0)
                out[b, 0, h] = sum(w * call.value[b, g, i] for w, i in zip(weights, read, strict=True))
        return out


@given(
    seed=st.integers(0, 100),
    kind=st.sampled_from(["llama", "opt"]),
    rows=st.integers(1, 2),
    split=st.integers(1, 17),
    budget=st.integers(1, 20),
    start=st.integers(0, LAYERS - 1),
    correction=st.integers(-1, LAYERS - 1),
    keep=st.booleans(),
    padding=st.integers(0, 3),
)
def test_equals_the_loops(seed, kind, rows, split, budget, start, correction, keep, padding):
    model, ids = model_of(kind), tokens(rows, split + 2, seed)
    correction = correction if correction > start else -1
    mask = torch.ones_like(ids)
    mask[-1, : min(padding, split - 1)] = 0
    with tidal(model, budget, start, correction, always_keep_last=keep):
        found = decode(model, ids, split, mask)
    with read_sparsely(model, SlowTidal(budget, start, correction, keep)):
        expected = decode(model, ids, split, mask)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# Identities.


@every_architecture
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_budget_of_the_context_changes_no_bit(kind, attention):
    model, ids = model_of(kind, attention), tokens(2, 20)
    full = decode(model, ids, 14)
    with tidal(model, budget=20, start=1, correction=3):
        assert torch.equal(decode(model, ids, 14), full)
    with tidal(model, budget=4, start=1, correction=3):
        assert not torch.allclose(decode(model, ids, 14), full, atol=1e-3)


@every_architecture
def test_prompts_and_several_tokens_at_once_are_read_in_full(kind):
    model, ids = model_of(kind), tokens(2, 20)
    tree = torch.full((2, 1, 4, 20), torch.finfo(torch.float32).min)
    tree[..., :16] = 0
    for node, ancestors in enumerate(([0], [0, 1], [0, 2], [0, 2, 3])):
        tree[:, :, node, [16 + a for a in ancestors]] = 0
    logits = []
    for budget in (2, None):
        cache = DynamicCache(config=model.config)
        places = torch.tensor([[16, 17, 17, 18]]).expand(2, -1)
        with tidal(model, budget or 100, start=1) if budget else torch.no_grad(), torch.no_grad():
            parts = [model(part, **{CACHE: cache}).logits for part in ids[:, :16].split(8, dim=1)]
            parts.append(model(ids[:, 16:], attention_mask=tree, position_ids=places, **{CACHE: cache}).logits)
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)


class Spy(TidalReading):
    """TidalDecode that notes what each sparse layer reads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read: dict[int, Tensor] = {}

    def __call__(self, call):
        before = call.selected.copy()
        out = super().__call__(call)
        if call.layer >= self.start and call.selected.keys() == before.keys():
            self.read[call.layer] = max(before.items())[1]
        return out


def test_layers_between_the_selecting_ones_read_the_same_positions():
    model, ids, spy = model_of(), tokens(2, 30), Spy(6, 0, 3)
    with read_sparsely(model, spy) as reading:
        decode(model, ids, 29)
    assert spy.read[1] is spy.read[2] is reading.selected[0]
    assert spy.read[4] is reading.selected[3]
    assert list(spy.read) == [1, 2, 4]
    assert reading.selected[0].shape == (2, 4, 6)
    assert not torch.equal(*(reading.selected[layer].sort().values for layer in (0, 3)))
    assert reading.selected[0].sort().values.unique(dim=1).shape[1] > 1  # every query head has its own


@every_architecture
def test_left_padding(kind):
    """A padded row goes on as it does alone, also when it has fewer real tokens than the budget."""
    model, ids = model_of(kind), tokens(4, 24)
    pads = [0, 5, 12, 17]  # of 18; budget 9
    mask = torch.stack([torch.arange(24) >= pad for pad in pads]).long()
    with tidal(model, budget=9, start=1, correction=3, always_keep_last=True):
        together = decode(model, ids * mask, 18, mask)
        for row, pad in enumerate(pads):
            alone = decode(model, ids[row : row + 1, pad:], 18 - pad)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


@every_architecture
def test_rows_are_independent(kind):
    model, ids = model_of(kind), tokens(3, 20)
    with tidal(model, budget=5, start=1, correction=2):
        torch.testing.assert_close(decode(model, ids, 14)[1:2], decode(model, ids[1:2], 14), rtol=1e-3, atol=1e-3)


def test_eager_equals_sdpa():
    ids, found = tokens(2, 20), []
    for attention in ("sdpa", "eager"):
        model = model_of("llama", attention)
        with tidal(model, budget=5, start=1, correction=3):
            found.append(decode(model, ids, 14))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_bfloat16():
    model, ids = copy.deepcopy(model_of()).bfloat16(), tokens(2, 20)
    with tidal(model, budget=5, start=1, correction=3):
        found = decode(model, ids, 14)
    with tidal(model_of(), budget=5, start=1, correction=3):
        expected = decode(model_of(), ids, 14).log_softmax(-1)
    assert found.dtype == torch.bfloat16
    kl = (expected.exp() * (expected - found.float().log_softmax(-1))).sum(-1)
    assert kl.median() < 0.05  # a position that changes places with the next best moves a step farther


def test_gradients():
    """A loss on a token that was decoded sparsely reaches the parameters of every layer."""
    model, ids = copy.deepcopy(model_of()), tokens(2, 20)
    cache = DynamicCache(config=model.config)
    with tidal(model, budget=5, start=1, correction=3):
        model(ids[:, :-1], **{CACHE: cache})
        model(ids[:, -1:], **{CACHE: cache}).logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_same_twice():
    model, ids = model_of(), tokens(2, 20)
    with tidal(model, budget=5, start=1):
        assert torch.equal(decode(model, ids, 14), decode(model, ids, 14))


@pytest.mark.parametrize("keep", [False, True])
def test_a_static_cache_equals_a_growing_one(keep):
    model, ids = model_of(), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with tidal(model, budget=5, start=1, correction=3, always_keep_last=keep):
        static = decode(model, ids, 14, mask, StaticCache(config=model.config, max_cache_len=40))
        torch.testing.assert_close(static, decode(model, ids, 14, mask), rtol=1e-3, atol=1e-3)


# Neighbours.


def test_interleaved_texts_do_not_meet():
    """Two texts of one model and one of another, decoded turn by turn, as each alone."""
    models, ids = [model_of(), model_of(), model_of("gpt2")], [tokens(1, 20, seed) for seed in range(3)]
    with tidal(models[0], budget=4, start=1, correction=3), tidal(models[2], budget=6, start=2), torch.no_grad():
        alone = [decode(m, x, 12) for m, x in zip(models, ids, strict=True)]
        caches = [DynamicCache(config=m.config) for m in models]
        found = [[m(x[:, :12], **{CACHE: c}).logits[:, -1:]] for m, x, c in zip(models, ids, caches, strict=True)]
        for place in range(12, 20):
            for model, x, cache, logits in zip(models, ids, caches, found, strict=True):
                logits.append(model(x[:, place : place + 1], **{CACHE: cache}).logits)
    for expected, logits in zip(alone, found, strict=True):
        assert torch.equal(torch.cat(logits, dim=1), expected)


def test_threads_do_not_meet():
    model, ids, found = model_of(), [tokens(1, 60, seed) for seed in range(2)], {}
    with tidal(model, budget=4, start=0, correction=2) as reading:
        alone = [decode(model, x, 10 + which) for which, x in enumerate(ids)]  # one is always a step behind the other
        both = threading.Barrier(2)

        def run(which: int) -> None:
            both.wait()
            found[which] = decode(model, ids[which], 10 + which), reading.selected[0]

        threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for which in range(2):
        torch.testing.assert_close(found[which][0], alone[which], rtol=1e-4, atol=1e-4)
    assert found[0][1] is not found[1][1]


def test_generate_in_all_its_ways():
    model, ids = model_of(), tokens(2, 16)
    with tidal(model, budget=5, start=1, correction=3):
        greedy = generate(model, ids)
        steps = decode(model, greedy, 16)
        assert torch.equal(steps[:, :-1].argmax(-1), greedy[:, 16:])
        beams = generate(model, ids, num_beams=3, num_return_sequences=2)
        sampled = generate(model, ids, do_sample=True, return_dict_in_generate=True, output_scores=True)
        chunks = generate(model, ids, prefill_chunk_size=6)
    assert beams.shape == (4, 24) and sampled.sequences.shape == (2, 24) and len(sampled.scores) == 8
    assert torch.equal(chunks, greedy)
    assert not torch.equal(greedy, generate(model, ids))


def test_assisted_generation():
    """Passes that check several candidates are read in full; a budget of the context writes what full attention does."""
    model, ids = model_of(), tokens(1, 6).repeat(1, 4)
    plain = generate(model, ids)
    with tidal(model, budget=40, start=1):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), plain)
    with tidal(model, budget=3, start=1):
        assert generate(model, ids, prompt_lookup_num_tokens=3).shape == plain.shape


def snapshot(model: PreTrainedModel) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return model.config.to_dict(), model.config._attn_implementation, [type(m).forward for m in model.modules()], hooks


def test_leaves_the_model_as_it_was():
    model, ids = model_of(), tokens(1, 12)
    before, full = snapshot(model), generate(model, ids)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with tidal(model, budget=3, start=1):
        generate(model, ids)
        assert model.config._attn_implementation != "sdpa"
    assert snapshot(model) == before and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    with pytest.raises(RuntimeError, match="stop here"), tidal(model, budget=3, start=1):
        raise RuntimeError("stop here")
    assert snapshot(model) == before
    assert torch.equal(generate(model, ids), full)


def test_sliding_layers_stay_what_they_are():
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, use_sliding_window=True, sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model, ids = build(config), tokens(2, 20)
    assert full_attention_layers(model) == [1, 3, 4]
    full = decode(model, ids, 14)
    with tidal(model, budget=20, start=1):
        assert torch.equal(decode(model, ids, 14), full)
    with tidal(model, budget=4, start=1, correction=3) as reading:
        assert not torch.allclose(decode(model, ids, 14), full, atol=1e-4)
        assert set(reading.selected) == {1, 3} and reading.selected[1].max() > 6
    with pytest.raises(ValueError, match=r"layer 2 is not full attention.*\[1, 3, 4\]"), tidal(model, start=2):
        pass
    with pytest.raises(ValueError, match="correction layer 2 is not full"), tidal(model, start=1, correction=2):
        pass
    assert calibrate(model, ids, budget=4, start=1).layers == (1, 3, 4)


def gpt_oss() -> PreTrainedModel:
    return build(
        GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
        ),
        "eager",
    )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: tiny_causal("gemma2"), gpt_oss], ids=["softcap", "sinks"])
def test_scores_that_are_more_than_products_stay_dense(make):
    model, ids = make(), tokens(2, 20)
    full = decode(model, ids, 14)
    with pytest.warns(UserWarning, match="more than scaled products") as caught, tidal(model, budget=2, start=1):
        assert torch.equal(decode(model, ids, 14), full)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="more than"), pytest.raises(ValueError, match=r"only layers \[\] can select"):
        calibrate(model, ids, budget=4, start=1)


def test_a_selecting_layer_that_cannot_select_leaves_the_others_dense():
    model, ids = model_of(), tokens(1, 20)
    full, rule = decode(model, ids, 14), TidalReading(4, 1, 3)
    with read_sparsely(model, rule) as reading:
        reading.layers -= {1}
        found = decode(model, ids, 14)
        assert set(reading.selected) == {3}
    with read_sparsely(model, lambda call: rule(call) if call.layer >= 3 else call.full()):
        torch.testing.assert_close(found, decode(model, ids, 14))
    assert not torch.allclose(found, full, atol=1e-3)


# Rules to compare with.


def test_recent_positions_are_a_window():
    model, ids, pads = model_of(), tokens(2, 20), (0, 14)
    mask = torch.stack([torch.arange(20) >= pad for pad in pads]).long()
    with read_sparsely(model, RecentReading(6)):
        found = decode(model, ids, 19, mask)[:, -1]
    shown = torch.ones(20, 20).tril().bool() & mask.bool()[:, None, None]
    shown[:, :, -1, :14] = False
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=shown, position_ids=places).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with read_sparsely(model, RecentReading(6)):  # room after the current token is not recent
        static = decode(model, ids, 19, mask, StaticCache(config=model.config, max_cache_len=40))[:, -1]
    torch.testing.assert_close(static, expected, rtol=1e-3, atol=1e-3)


def test_the_rules_select_what_they_say():
    model, ids = model_of(), tokens(2, 30)
    with read_sparsely(model, OwnTopReading(4, frozenset({0, 1}))) as own:
        decode(model, ids, 29)
    with tidal(model, budget=4, start=2) as found:
        decode(model, ids, 29)
    assert set(own.selected) == {2, 3, 4}
    assert torch.equal(own.selected[2].sort().values, found.selected[2].sort().values)
    draws = []
    for seed in (0, 0, 1):
        with read_sparsely(model, RandomReading(4, seed=seed)) as drawn:
            decode(model, ids, 28)
        draws.append(torch.stack([drawn.selected[layer] for layer in range(LAYERS)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws[0].sort().values.diff() > 0).all() and draws[0].unique().numel() > 20
    with pytest.raises(ValueError, match="budget must be at least 1"):
        RecentReading(0)


def test_reading_fidelity():
    model, ids = model_of(), tokens(5, 24)
    readings = {
        "all": lambda: tidal(model, budget=24, start=1),
        "own": lambda: read_sparsely(model, OwnTopReading(8, frozenset({0, 1}))),
        "tidal": lambda: tidal(model, budget=8, start=1),
    }
    found = reading_fidelity(model, ids, 16, readings, batch_size=2)
    assert list(found) == ["full", *readings]
    for name in ("full", "all"):
        assert found[name].divergence.abs().max() == 0 and (found[name].agreement == 1).all()
    full = decode(model, ids[:, :-1], 16)[:, 1:].log_softmax(-1)
    with tidal(model, budget=8, start=1):
        logits = decode(model, ids[:, :-1], 16)[:, 1:].log_softmax(-1)
    same = (logits.argmax(-1) == full.argmax(-1)).double().mean(1)
    kl = (full.exp() * (full - logits)).sum(-1).mean(1)
    loss = -logits.gather(-1, ids[:, 17:, None])[..., 0].mean(1)
    torch.testing.assert_close(found["tidal"].divergence.float(), kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["tidal"].loss.float(), loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["tidal"].agreement, same)
    assert (found["own"].divergence > 0).all() and not torch.equal(found["own"].loss, found["tidal"].loss)
    with pytest.raises(ValueError, match="need a context of 2 to 22 tokens, got 23"):
        reading_fidelity(model, ids, 23, readings)


def test_calibrate_equals_the_loops():
    model, ids, budget, steps = model_of(), tokens(3, 22), 5, 4
    found = calibrate(model, ids, budget, start=1, steps=steps, batch_size=2)
    same, recent, count = torch.zeros(LAYERS, LAYERS), torch.zeros(LAYERS), 0
    for row in range(3):
        with read_sparsely(model, lambda call: call.full_and_select(budget)) as reading, torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[row : row + 1, : 22 - steps], **{CACHE: cache})
            for place in range(22 - steps, 22):
                model(ids[row : row + 1, place : place + 1], **{CACHE: cache})
                for head in range(4):
                    sets = [set(reading.selected[layer][0, head].tolist()) for layer in range(LAYERS)]
                    count += 1
                    for a in range(LAYERS):
                        recent[a] += len(sets[a] & set(range(place + 1 - budget, place + 1))) / budget
                        for b in range(LAYERS):
                            same[a, b] += len(sets[a] & sets[b]) / budget
    torch.testing.assert_close(found.overlap.float(), same / count)
    torch.testing.assert_close(found.recent.float(), recent / count)
    overlap = (same / count).tolist()
    share = {
        c: sum(overlap[1][l] if c == -1 or l < c else overlap[c][l] for l in (2, 3, 4)) / 3 for c in (-1, 2, 3)
    }  # an overlap with itself is 1
    assert found.recall == pytest.approx(share)
    assert found.correction == max(share, key=share.__getitem__)
    assert found.window[3] == pytest.approx((found.recent[2].item() + 1 + found.recent[4].item()) / 3)
    assert calibrate(model, ids, budget, start=LAYERS - 1).recall == {-1: 1.0}


# The likeliest mistakes.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 0}, "budget must be at least 1 token per head, got 0"),
        ({"start": LAYERS}, "start must be one of the model's layers 0 to 4, got 5"),
        ({"start": -1}, "start must be one of the model's layers 0 to 4, got -1"),
    ],
)
def test_rejects_bad_settings(settings, says):
    model = model_of()
    with pytest.raises(ValueError, match=says), tidal(model, **settings):
        pass
    with pytest.raises(ValueError, match=says):
        calibrate(model, tokens(1, 20), **{"budget": 5, **settings})
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("correction", [0, 1, 2, LAYERS, -2])
def test_a_correction_that_corrects_nothing_warns(correction):
    model, ids = model_of(), tokens(1, 20)
    with pytest.warns(UserWarning, match="is not above the first selection layer 2"), tidal(model, 5, 2, correction):
        found = decode(model, ids, 14)
    with tidal(model, 5, 2, -1):
        assert torch.equal(decode(model, ids, 14), found)


def test_the_default_correction_is_the_papers_where_there_are_layers_for_it():
    deep = build(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=11, num_attention_heads=1, intermediate_size=8
        )
    )
    for model, expected in ((deep, {2, 9}), (model_of(), {2})):
        with tidal(model, budget=3) as reading:
            decode(model, tokens(1, 12), 10)
        assert set(reading.selected) == expected


def test_rejects_models_that_it_cannot_work_with():
    tiny = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {"intermediate_size": 48, "num_key_value_heads": 2}
    cases = [
        (build(MistralConfig(**tiny, **small, sliding_window=8)), "no layer of MistralForCausalLM is full attention"),
        (build(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "eager"), "does not use the attention interface"),
        (T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)), "is an encoder-decoder"),
    ]  # fmt: skip
    for model, says in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=says), tidal(model, start=1):
            pass
        assert snapshot(model) == before


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_rejects_other_attention(attention, monkeypatch):
    model = copy.deepcopy(model_of())
    monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
    with pytest.raises(ValueError, match=f"runs {attention} attention.*attn_implementation='sdpa'"), tidal(model):
        pass


def test_rejects_attention_weights():
    model, ids = copy.deepcopy(model_of("llama", "eager")), tokens(1, 12)
    with tidal(model, budget=3), pytest.raises(ValueError, match="output_attentions cannot be had"):
        generate(model, ids, output_attentions=True, return_dict_in_generate=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is set"), tidal(model, budget=3):
        pass


def test_rejects_a_cache_that_evicts():
    model, ids = model_of(), tokens(1, 30)
    with tidal(model, budget=3), pytest.raises(ValueError, match="EMSCache keeps different tokens.*DynamicCache"):
        generate(model, ids, **{CACHE: EMSCache(config=model.config, budget=8, window=2)})


def test_rejects_two_at_once_and_copies():
    model, ids = model_of(), tokens(1, 12)
    with tidal(model, budget=3) as reading:
        with pytest.raises(ValueError, match="already reads sparsely"), tidal(model, budget=3):
            pass
        twin = copy.deepcopy(model)
        assert generate(model, ids).shape == (1, 20) and reading.selected
    with pytest.raises(ValueError, match="not inside read_sparsely"):
        generate(twin, ids)


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        (tokens(1, 20)[0], {}, "data must be passages"),
        (tokens(1, 9), {}, "more than steps [+] 1 = 9 tokens"),
        (tokens(1, 20), {"budget": 12}, "a budget of 12 covers the 12 tokens"),
        (tokens(1, 20), {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_calibrate_rejects(data, settings, says):
    with pytest.raises(ValueError, match=says):
        calibrate(model_of(), data, **{"budget": 4, **settings})
