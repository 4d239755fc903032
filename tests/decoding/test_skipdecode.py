"""SkipDecode: the stored cases, schedules, the cache's own bookkeeping, training mode, what generate refuses."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, StaticCache

from golden_case import GoldenCase, golden_cases
from tiny_causal import CONFIGS, tiny_causal, tokens
from tokenry.decoding import SkipSchedule, TokenRecycling, decoder_blocks, skip_decode, skip_training
from tokenry.layers.cache_argument import CACHE

pytestmark = [pytest.mark.method("skipdecode"), pytest.mark.filterwarnings("ignore:this model was not fine-tuned")]
FULL_ATTENTION = [name for name in CONFIGS if name != "gemma2"]


def deep(name="llama", layers=6, dtype=torch.float32):
    """A tiny model with enough layers to skip some; large weights, so that a layer matters."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    setattr(config, "n_layer" if name == "gpt2" else "num_hidden_layers", layers)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    model = type(tiny_causal(name))(config).eval()
    for key, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in key:
            weight.data.mul_(3.0)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def step_by_step(model, ids, prompt_length, schedule, mask=None):
    """Logits of every position, the prompt in one pass and then one token at a time, on a cache."""
    cache, logits = DynamicCache(config=model.config), []
    edges = [0, *range(prompt_length, ids.shape[1] + 1)]
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    with skip_decode(model, schedule, new_tokens=ids.shape[1] - prompt_length) as run, torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            more = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            logits.append(model(input_ids=ids[:, begin:end], **{CACHE: cache}, use_cache=True, **more).logits)
    return torch.cat(logits, 1), cache, run


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("skipdecode"))
def test_golden(name):
    case = GoldenCase("skipdecode", name)
    config, cls = (LlamaConfig, LlamaForCausalLM) if "llama" in name else (OPTConfig, OPTForCausalLM)
    model = cls(config(**case.spec["config"])).eval()
    missing, unexpected = model.load_state_dict(case.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    ids, prompt, layers = case.inputs["input_ids"], case.spec["prompt_length"], len(decoder_blocks(model))
    counts = case.spec["layers_per_generated_position"]
    schedule = SkipSchedule(counts[0], counts[-1], case.spec["warmup_layers"])
    assert schedule.counts(len(counts)) == counts
    assert [sorted(schedule.active(n, layers)) for n in counts] == case.spec["active_layers_generated"]
    logits, _, _ = step_by_step(model, ids, prompt, schedule)
    case.compare("logits", logits)
    with skip_training(model, schedule, new_tokens=len(counts)), torch.no_grad():
        at_once = model(input_ids=ids, prompt_lengths=torch.full((len(ids),), prompt)).logits
    case.compare("logits", at_once)
    case.compare("dense_logits", model(input_ids=ids).logits)


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_all_layers_is_the_model_bit_for_bit(name):
    model, ids = deep(name), tokens(2, 7)
    with skip_decode(model, SkipSchedule(6, 6)):
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_training_mode_equals_the_cached_steps(name):
    model, ids, schedule = deep(name, dtype=torch.float64), tokens(2, 17), SkipSchedule(5, 2, warmup=1)
    cached, cache, run = step_by_step(model, ids, 6, schedule)
    with skip_training(model, schedule, new_tokens=11), torch.no_grad():
        at_once = model(input_ids=ids, prompt_lengths=torch.tensor([6, 6])).logits
    torch.testing.assert_close(cached, at_once, rtol=0, atol=1e-9)
    counts = schedule.counts(11)
    assert run.block_calls == 5 + sum(counts)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    ran = [
        6 * (index in schedule.active(5, 6)) + sum(index in schedule.active(n, 6) for n in counts) for index in range(6)
    ]
    assert lengths == ran + [0] * (len(lengths) - 6)
    assert lengths[0] == 17


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_a_left_padded_row_is_the_row_alone(name):
    model, ids = deep(name, dtype=torch.float64), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    schedule = SkipSchedule(6, 2)
    together, _, _ = step_by_step(model, ids, 8, schedule, mask)
    alone, _, _ = step_by_step(model, ids[:1], 8, schedule)
    short, _, _ = step_by_step(model, ids[1:, 3:], 5, schedule)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(together[1:, 3:], short, rtol=0, atol=1e-9)
    with skip_training(model, schedule, new_tokens=6), torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        trained = model(ids, attention_mask=mask, position_ids=positions, prompt_lengths=torch.tensor([8, 8])).logits
    torch.testing.assert_close(trained[1:, 3:], short, rtol=0, atol=1e-9)


def test_generate_starts_anew_and_leaves_nothing_behind():
    model, ids, schedule = deep(), tokens(1, 6), SkipSchedule(5, 2)
    before = model.generate(ids, max_new_tokens=9, do_sample=False)
    with skip_decode(model, schedule) as run:
        first = model.generate(ids, max_new_tokens=9, do_sample=False)
        calls = run.block_calls
        again = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(first, again) and run.block_calls == calls == 5 + sum(schedule.counts(9)[:8])
    assert not torch.equal(first, before)
    assert "generate" not in model.__dict__ and not any("forward" in layer.__dict__ for layer in decoder_blocks(model))
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), before)
    with pytest.raises(RuntimeError), skip_decode(model, schedule):
        raise RuntimeError("inside")
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), before)


def test_beams_early_finishers_and_a_prompt_read_in_pieces():
    model, schedule = deep(), SkipSchedule(5, 2)
    with skip_decode(model, schedule):
        beams = model.generate(tokens(2, 6), max_new_tokens=8, num_beams=3, do_sample=False)
        whole = model.generate(tokens(1, 9), max_new_tokens=8, do_sample=False)
        pieces = model.generate(tokens(1, 9), max_new_tokens=8, do_sample=False, prefill_chunk_size=4)
        stop = int(whole[0, 11])
        end = 9 + whole[0, 9:].tolist().index(stop) + 1
        ended = model.generate(tokens(2, 9), max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=0)
        limited = model.generate(tokens(1, 9), max_length=17, do_sample=False)
    assert beams.shape == (2, 14)
    assert torch.equal(whole, pieces) and torch.equal(limited, whole)
    assert end < 17 and (ended[0, end:] == 0).all() and torch.equal(ended[0, :end], whole[0, :end])


@given(
    most=st.integers(2, 40), fewest=st.integers(2, 40), warmup=st.integers(1, 6), tokens_=st.integers(1, 300)
)  # fmt: skip
def test_schedules(most, fewest, warmup, tokens_):
    fewest, most = sorted((fewest, most))
    if fewest <= warmup:
        with pytest.raises(ValueError, match="larger than warmup"):
            SkipSchedule(most, fewest, warmup)
        return
    schedule = SkipSchedule(most, fewest, warmup)
    counts = schedule.counts(tokens_)
    assert len(counts) == tokens_ and counts[0] == most and (tokens_ == 1 or counts[-1] == fewest)
    assert all(a >= b for a, b in itertools.pairwise(counts))
    for j, n in enumerate(counts):
        exact = most - (most - fewest) * j / max(tokens_ - 1, 1)
        assert abs(n - exact) <= 0.5 + 1e-9
    sets = [schedule.active(n, 40) for n in counts]
    assert all(len(s) == n for s, n in zip(sets, counts, strict=True))
    assert all(later <= earlier for earlier, later in itertools.pairwise(sets))
    assert all(set(range(warmup)) <= s and 39 in s for s in sets)


@pytest.mark.parametrize(
    ("layers", "speedup", "numbers"), [(24, 2.0, (18, 6)), (24, 4.0, (9, 3)), (32, 2.0, (24, 8)), (32, 5.0, (9, 4))]
)
def test_speedups(layers, speedup, numbers):
    schedule = SkipSchedule.for_speedup(layers, speedup)
    assert (schedule.max_layers, schedule.min_layers, schedule.warmup) == (*numbers, 1)
    assert schedule.speedup(layers, 512) == pytest.approx(speedup, rel=0.02)


def test_gradients_reach_every_parameter_and_bf16_is_finite():
    model, ids = deep(), tokens(2, 12)
    with skip_training(model, SkipSchedule(6, 2), new_tokens=8):
        loss = model(input_ids=ids, labels=ids, prompt_lengths=torch.tensor([4, 7])).loss
        loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.config.skip_schedule == {"max_layers": 6, "min_layers": 2, "warmup": 1}
    half = deep(dtype=torch.bfloat16)
    with skip_decode(half, SkipSchedule(6, 2)):
        out = half.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(torch.isfinite(step).all() for step in out.logits)


def test_warns_about_a_stock_checkpoint_only():
    model = deep()
    with pytest.warns(UserWarning, match="not fine-tuned with a skip schedule"), skip_decode(model, SkipSchedule(5, 2)):
        pass
    with skip_training(model, SkipSchedule(5, 2), new_tokens=4):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with skip_decode(model, SkipSchedule(5, 2)):
            pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipSchedule(6, 2, warmup=0), "at least layer 0"),
        (lambda: SkipSchedule(6, 1), "larger than warmup"),
        (lambda: SkipSchedule(3, 4), "larger than max_layers"),
        (lambda: SkipSchedule.from_counts([5, 4, 4, 5]), r"counts\[3\]=5 is larger than counts\[2\]=4"),
        (lambda: SkipSchedule.from_counts([]), "at least one position"),
        (lambda: SkipSchedule(5, 4, 1, (4, 5, 4)), r"counts\[1\]=5 is larger than counts\[0\]=4"),
        (lambda: SkipSchedule(6, 2, 1, (5, 2)), r"must fall from max_layers=6 to min_layers=2, got \(5, 2\)"),
        (lambda: SkipSchedule(6, 2, 1, ()), r"must fall from max_layers=6 to min_layers=2, got \(\)"),
        (lambda: SkipSchedule(6, 2).counts(0), "at least 1"),
        (lambda: SkipSchedule.from_counts([3, 2]).counts(3), "for 2 generated positions, 3"),
        (lambda: SkipSchedule.for_speedup(12, 0.5), "at least 1"),
        (lambda: SkipSchedule.for_speedup(12, 12.0), "cannot be made"),
    ],
)
def test_refuses_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_calls():
    model, ids, schedule = deep(), tokens(1, 6), SkipSchedule(5, 2)
    for what, options in {
        "taken back": {"assistant_model": model},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
        "custom_generate": {"custom_generate": TokenRecycling(tree=0)},
        "cache_implementation": {"cache_implementation": "static"},
        "static cache": {CACHE: StaticCache(config=model.config, max_cache_len=32)},
    }.items():
        with skip_decode(model, schedule), pytest.raises(ValueError, match=what):
            model.generate(ids, max_new_tokens=4, do_sample=False, **options)
    cache = DynamicCache(config=model.config)
    with skip_decode(model, schedule):
        longer = model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        with pytest.raises(ValueError, match="already holds 9 tokens"):
            model.generate(longer, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        with pytest.raises(ValueError, match="give generate max_new_tokens"):
            model.generate(ids, generation_config=type(model.generation_config)(eos_token_id=None))
        with pytest.raises(ValueError, match="behind generated ones"):
            model(ids, **{CACHE: cache})
    with skip_decode(model, schedule), pytest.raises(ValueError, match="how many tokens will follow"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="the model has 6 layers"), skip_decode(model, SkipSchedule(7, 2)):
        pass
    with pytest.raises(ValueError, match="sliding_attention"), skip_decode(tiny_causal("gemma2"), SkipSchedule(2, 2)):
        pass


def test_refuses_a_second_schedule_inside_the_first():
    model = deep()
    for inner in (lambda: skip_decode(model, SkipSchedule(4, 2)), lambda: skip_training(model, SkipSchedule(4, 2), 4)):
        with skip_decode(model, SkipSchedule(5, 2)), pytest.raises(ValueError, match="already skips layers"), inner():
            pass


def test_refuses_training_without_prompt_lengths():
    model, ids = deep(), tokens(2, 8)
    with skip_training(model, SkipSchedule(5, 2), new_tokens=3):
        with pytest.raises(ValueError, match="one number per row"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match=r"one number per row \(2\)"):
            model(input_ids=ids, prompt_lengths=torch.tensor([3]))
        with pytest.raises(ValueError, match="laid over 3; raise new_tokens"):
            model(input_ids=ids, prompt_lengths=torch.tensor([3, 6]))
