"""BatchLLM: the optimal grouping, the scheduler under its limits, and texts equal to those of each request alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from golden_case import GoldenCase, golden_cases
from tiny_causal import CONFIGS, tiny_causal, tokens
from tokenry.decoding import (
    PassCost,
    TokenBatcher,
    batch_generate,
    explain_difference,
    kv_bytes_per_token,
    plan_batch,
    planned_scheduler,
    simulate,
    simulate_lru,
)
from tokenry.decoding.batching.packed_attention import PackedAttention, SlotPool
from tokenry.decoding.batchllm import parse_memory

pytestmark = pytest.mark.method("batchllm")

# Prompts over three tokens, so that they share a lot; one-token prompts and duplicates among them.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


# --- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("batchllm"))
def test_golden(name):
    """The five request sets: prompt tokens, optimum, bound of all levels, grouping by first token."""
    case = GoldenCase("batchllm", name)
    assert len(case.spec["inputs"]) == 5
    for requests, expected in zip(case.spec["inputs"], case.spec["outputs"], strict=True):
        plan = plan_batch(requests, 16)
        assert plan.total == expected["total_tokens"]
        assert plan.saved == expected["saved_one_level_best"]
        assert plan.saved_bound == expected["saved_multi_level_bound"]
        assert plan.saved_first_level == expected["saved_common_prefix_per_first_token"]
        assert plan_batch(requests, 16, grouping="first-level").saved == plan.saved_first_level
        check(plan, requests)


def check(plan, requests):
    """Every request in one group, which its tokens start with and which leaves it a token to run."""
    assert sorted(i for group in plan.groups for i in group.members) == list(range(len(requests)))
    for number, group in enumerate(plan.groups):
        assert len(group.members) > 1 or not group.prefix
        for i in group.members:
            assert plan.group_of[i] == number
            assert tuple(requests[i][: len(group.prefix)]) == group.prefix
            assert len(group.prefix) <= len(requests[i]) - 1
            assert plan.remainder(i) == len(requests[i]) - len(group.prefix)
    assert plan.computed == plan.total - plan.saved
    assert plan.computed == sum(len(g.prefix) + sum(map(plan.remainder, g.members)) for g in plan.groups)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_optimum_is_that_of_all_choices(requests):
    best = (0, 0)
    for lengths in itertools.product(*(range(len(r)) for r in requests)):
        chosen = [tuple(r[:n]) for r, n in zip(requests, lengths, strict=True)]
        groups = {c for c in chosen if c}
        best = max(best, (sum((chosen.count(g) - 1) * len(g) for g in groups), -len(groups)))
    plan = plan_batch(requests, 1)
    assert (plan.saved, -sum(bool(g.prefix) for g in plan.groups)) == best


@given(PROMPTS)
def test_bounds(requests):
    plan = plan_batch(requests, 4)
    check(plan, requests)
    keys = [tuple(r[:-1]) for r in requests]
    distinct = {key[:n] for key in keys for n in range(1, len(key) + 1)}
    assert plan.saved_bound == sum(map(len, keys)) - len(distinct)
    naive = 0
    for first in {key[0] for key in keys if key}:
        same = [key for key in keys if key[:1] == (first,)]
        shared = 0
        while len({key[: shared + 1] for key in same}) == 1 and min(map(len, same)) > shared:
            shared += 1
        naive += (len(same) - 1) * shared
    assert plan.saved_first_level == naive
    assert naive <= plan.saved <= plan.saved_bound
    first = plan_batch(requests, 4, grouping="first-level")
    check(first, requests)
    assert first.saved == naive
    alone = plan_batch(requests, 4, grouping="none")
    check(alone, requests)
    assert alone.saved == 0 and len(alone.groups) == len(requests)


@given(PROMPTS, st.randoms())
def test_the_order_of_the_requests_does_not_matter(requests, random):
    order = list(range(len(requests)))
    random.shuffle(order)
    plan, shuffled = plan_batch(requests, 3), plan_batch([requests[i] for i in order], 3)

    def groups(plan, names):
        return sorted((g.prefix, sorted(names[i] for i in g.members)) for g in plan.groups)

    assert groups(plan, list(range(len(requests)))) == groups(shuffled, order)


@given(PROMPTS, st.data())
def test_decode_heavy_groups_and_members_come_first(requests, data):
    new = data.draw(st.lists(st.integers(1, 20), min_size=len(requests), max_size=len(requests)))
    plan = plan_batch(requests, new)
    ratios = []
    for group in plan.groups:
        rest = [plan.remainder(i) for i in group.members]
        ratios.append(sum(new[i] for i in group.members) / (len(group.prefix) + sum(rest)))
        own = [new[i] / n for i, n in zip(group.members, rest, strict=True)]
        assert own == sorted(own, reverse=True)
    assert ratios == sorted(ratios, reverse=True)
    kept = plan_batch(requests, new, order="input")
    assert [g.members[0] for g in kept.groups] == sorted(min(g.members) for g in kept.groups)


def test_deep_levels_are_flattened():
    system, chapter, page = [1] * 10, [2] * 30, [3] * 5
    requests = [[*system, 8, i] for i in range(4)] + [system + chapter + page + [i] for i in range(3)]
    plan = plan_batch(requests, 1)
    assert sorted((len(g.prefix), len(g.members)) for g in plan.groups) == [(11, 4), (45, 3)]
    assert (plan.saved, plan.saved_bound) == (3 * 11 + 2 * 45, 3 * 11 + 2 * 45 + 10)


def test_the_table():
    plan = plan_batch(
        [[1, 2, 3], [1, 2, 4], [5]] + [[9, i] for i in range(30)] + [[i] for i in range(40)], 4, kv_bytes=8
    )
    text = str(plan)
    assert "bytes of keys and values per token" in text and "..." in text
    assert f"{plan.computed:,} computed, {plan.saved:,} saved" in text
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize("kind", CONFIGS)
def test_bytes_per_token(kind):
    model = tiny_causal(kind, dtype=torch.bfloat16)
    attention = PackedAttention(model)
    with attention.attached():
        assert attention.probe() == kv_bytes_per_token(model.config, model.dtype)


# --- the scheduler ------------------------------------------------------------------------------------------------


@given(PROMPTS, st.data())
def test_memory_is_never_exceeded_and_every_token_runs_once(requests, data):
    count = len(requests)
    numbers = st.lists(st.integers(1, 9), min_size=count, max_size=count)
    most, real, guess = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    real = list(map(min, real, most))
    careful = data.draw(st.booleans())
    plan = plan_batch(requests, most if careful else list(map(min, guess, most)))
    least = max(len(r) + n - 1 for r, n in zip(requests, most, strict=True))
    limit = least + data.draw(st.integers(0, 40))
    chunk = data.draw(st.integers(1, 12))
    batcher = TokenBatcher(plan, limit, most, chunk)
    stored: dict = {}
    run, generated = {}, [0] * count
    for _ in range(2000):
        if batcher.done:
            break
        pieces = batcher.next_pass()
        assert pieces
        while batcher.freed:
            stored.pop(batcher.freed.pop(), None)
        decoding = sum(p.request is not None and generated[p.request] > 0 and p.count == 1 for p in pieces)
        assert sum(p.count for p in pieces) <= max(chunk, decoding)
        for p in pieces:
            key = (p.group, p.request)
            assert p.start == stored.get(key, 0)
            if p.request is not None:
                assert stored.get((p.group, None), 0) == len(plan.groups[p.group].prefix)
            stored[key] = p.start + p.count
            for token in range(p.start, p.start + p.count):
                run[key, token] = run.get((key, token), 0) + 1
        assert batcher.stats.kv_tokens[-1] == sum(stored.values()) <= limit
        for p in pieces:
            if p.emits:
                generated[p.request] += 1
                assert stored[p.group, p.request] == plan.remainder(p.request) + generated[p.request] - 1
                done = batcher.emitted(p.request, stop=generated[p.request] == real[p.request])
                assert done == (generated[p.request] == real[p.request])
        while batcher.freed:
            stored.pop(batcher.freed.pop(), None)
    assert batcher.done and not stored
    assert generated == real and batcher.stats.requests == count
    assert batcher.stats.prefill_tokens == plan.computed
    again = sum(run.values()) - len(run)
    assert again == batcher.stats.recomputed_tokens
    assert len(run) == plan.computed + sum(real) - count
    if careful:
        assert not again and not batcher.stats.preemptions


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=30))
def test_slots_are_never_shared(steps):
    pool = SlotPool(20)
    held: dict = {}
    for name, count, together in steps:
        key = (name, None)
        free = set(range(20)) - {s for slots in held.values() for s in slots}
        if count > len(free):
            with pytest.raises(RuntimeError, match="are free"):
                pool.take([(key, count)])
            pool.give_back(key)
            held.pop(key, None)
            continue
        if together:
            taken = pool.take_together(key, count).tolist()
            if any(set(range(s, s + count)) <= free for s in range(20)):
                assert taken == list(range(taken[0], taken[0] + count))
        else:
            wanted = [(key, count - count // 2), ((name, 1), count // 2)]
            first, second = (slots.tolist() for slots in pool.take(wanted))
            assert (len(first), len(second)) == (wanted[0][1], wanted[1][1])
            held[name, 1] = held.get((name, 1), []) + second
            taken = first
            free -= set(second)
        assert len(set(taken)) == len(taken) and set(taken) <= free
        held[key] = held.get(key, []) + taken
        assert {k: v.tolist() for k, v in pool.slots.items()} == held
    assert pool.used == sum(map(len, held.values()))
    assert pool.take([]) == []


# --- texts --------------------------------------------------------------------------------------------------------


def requests_of(seed=0):
    """Two shared documents, a prompt inside another, duplicates, one-token prompts, and one that shares nothing."""
    first, second = tokens(1, 24, seed)[0].tolist(), tokens(1, 9, seed + 1)[0].tolist()
    tails = [tokens(1, n, seed + 10 + n)[0].tolist() for n in (1, 2, 5, 8)]
    shared = [first + tail for tail in tails] + [first[:12], first] + [first + second + tail for tail in tails[:2]]
    return [
        *shared,
        second + tails[2],
        second + tails[2],
        second + tails[3],
        [7],
        [7],
        [11],
        tokens(1, 17, 77)[0].tolist(),
    ]


def alone(model, requests, new, **options):
    new = [new] * len(requests) if isinstance(new, int) else new
    outs = []
    for request, n in zip(requests, new, strict=True):
        ids = torch.tensor([request])
        outs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options)[0])
    return outs


def equal(mine, theirs):
    return [torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)] == [True] * len(theirs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_are_those_of_each_request_alone(kind):
    model, requests = tiny_causal(kind), requests_of()
    new = [1 + (5 * i) % 14 for i in range(len(requests))]
    expected = alone(model, requests, new, do_sample=False)
    bytes_per_token = kv_bytes_per_token(model.config, model.dtype)
    for memory, chunk in ((10_000, 512), (80, 7), (120, 1)):
        outs, stats = batch_generate(
            model, requests, new, memory_limit=memory * bytes_per_token, max_tokens_per_pass=chunk, do_sample=False
        )
        assert equal(outs, expected)
        assert stats.peak_kv_tokens <= stats.kv_limit <= memory
        assert stats.prefill_tokens == plan_batch(requests, new).computed


def test_early_ends_and_several_stop_tokens():
    model, requests = tiny_causal("llama"), requests_of(3)
    free = alone(model, requests, 20, do_sample=False, eos_token_id=None)
    stops = [int(free[0][len(requests[0]) + 3]), int(free[8][len(requests[8]) + 6])]
    expected = alone(model, requests, 20, do_sample=False, eos_token_id=stops)
    assert len({len(e) - len(r) for e, r in zip(expected, requests, strict=True)}) > 1
    outs, stats = batch_generate(model, requests, 20, memory_limit="60KB", do_sample=False, eos_token_id=stops)
    assert equal(outs, expected)
    assert stats.new_tokens == sum(map(len, expected)) - sum(map(len, requests))


def test_prefill_tokens_are_those_of_the_plan():
    model, requests = tiny_causal("qwen3"), requests_of(5)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        _, stats = batch_generate(model, requests, 6, memory_limit="1MB", eos_token_id=None, do_sample=False)
    finally:
        hook.remove()
    plan = plan_batch(requests, 6)
    assert seen[0] == 1  # one token to learn the shapes
    assert seen[1:] == stats.tokens
    assert sum(stats.tokens) == plan.computed + 5 * len(requests)
    assert stats.prefill_tokens == plan.computed < plan.total == stats.prompt_tokens


@pytest.mark.parametrize("grouping", ["none", "first-level"])
def test_grouping_and_order_do_not_change_the_texts(grouping):
    model, requests = tiny_causal("gpt2"), requests_of(2)
    expected = alone(model, requests, 9, do_sample=False)
    outs, stats = batch_generate(model, requests, 9, grouping=grouping, order="input", do_sample=False)
    assert equal(outs, expected)
    assert stats.prefill_tokens == plan_batch(requests, 9, grouping=grouping).computed


def test_estimates_that_are_too_low_cost_time_only():
    model, requests = tiny_causal("llama"), requests_of(4)
    options = {"eos_token_id": None, "do_sample": False}
    expected = alone(model, requests, 24, **options)
    limit = 90 * kv_bytes_per_token(model.config, model.dtype)
    outs, stats = batch_generate(model, requests, 24, expected_new_tokens=2, memory_limit=limit, **options)
    assert equal(outs, expected)
    assert stats.preemptions > 0 and stats.recomputed_tokens > 0
    assert stats.peak_kv_tokens <= 90


class Bans(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % 90 :] -= 1.0
        return scores


class SumReaches(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -3:].sum(-1) > 200


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7, "min_new_tokens": 4},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": [Bans()], "stopping_criteria": [SumReaches()]},
        {"generation_config": GenerationConfig(eos_token_id=5, suppress_tokens=[9, 10])},
    ],
    ids=["penalty", "ngrams", "own", "config"],
)
def test_processors_and_criteria_see_each_request_alone(options):
    model, requests = tiny_causal("llama"), requests_of(6)
    expected = alone(model, requests, 10, do_sample=False, **options)
    outs, _ = batch_generate(model, requests, 10, do_sample=False, **options)
    assert equal(outs, expected)


def test_draws_do_not_depend_on_order_or_memory():
    model, requests = tiny_causal("gpt_neox"), requests_of(1)

    def drawn(seed, chosen, **options):
        torch.manual_seed(seed)
        return batch_generate(model, chosen, 8, do_sample=True, temperature=0.7, top_k=20, **options)[0]

    first = drawn(0, requests, memory_limit="1MB")
    assert equal(drawn(0, requests, memory_limit="25KB", order="input", max_tokens_per_pass=5), first)
    assert equal(drawn(0, requests[:4]), first[:4])
    assert not equal(drawn(1, requests), first)
    assert not torch.equal(first[-4], first[-3])  # the same one-token prompt twice, each with draws of its own


def test_results_are_handed_out_as_they_end():
    model, requests = tiny_causal("llama"), requests_of()
    new = [2 + 3 * (i % 4) for i in range(len(requests))]
    came = {}
    outs, _ = batch_generate(
        model, requests, new, on_result=lambda i, ids: came.setdefault(i, ids), eos_token_id=None, do_sample=False
    )
    assert sorted(came) == list(range(len(requests))) and list(came) != sorted(came)
    assert all(torch.equal(came[i], out) for i, out in enumerate(outs))
    short = [i for i, n in enumerate(new) if n == 2]
    assert {new[i] for i in list(came)[: len(short) // 2]} == {2}


def test_goes_on_after_an_interruption_with_what_is_missing():
    model, requests = tiny_causal("llama"), requests_of()
    came = {}

    def stop_after_five(index, ids):
        came[index] = ids
        if len(came) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_generate(model, requests, 6, on_result=stop_after_five, do_sample=False)
    rest = [i for i in range(len(requests)) if i not in came]
    for i, out in zip(rest, batch_generate(model, [requests[i] for i in rest], 6, do_sample=False)[0], strict=True):
        came[i] = out
    assert equal([came[i] for i in range(len(requests))], alone(model, requests, 6, do_sample=False))


def test_the_models_own_attention_is_back_also_after_an_error():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = tiny_causal("llama"), set(ALL_ATTENTION_FUNCTIONS)

    def fail(index, ids):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        batch_generate(model, [[5, 6, 7]], 3, on_result=fail)
    assert model.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == before
    assert model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=2).shape[1] <= 5


def test_tensors_and_one_request():
    model = tiny_causal("llama")
    outs, stats = batch_generate(model, [torch.tensor([4, 5, 6])], 4, do_sample=False)
    assert equal(outs, alone(model, [[4, 5, 6]], 4, do_sample=False))
    assert stats.summary()["requests"] == 1
    rows, _ = batch_generate(model, tokens(3, 7), [1, 2, 3], do_sample=False)
    assert equal(rows, alone(model, tokens(3, 7).tolist(), [1, 2, 3], do_sample=False))


def test_bfloat16_differs_in_near_ties_only():
    model, requests = tiny_causal("llama", dtype=torch.bfloat16), requests_of()
    outs, _ = batch_generate(model, requests, 12, do_sample=False)
    for mine, theirs in zip(outs, alone(model, requests, 12, do_sample=False), strict=True):
        different = explain_difference(model, theirs, mine)
        assert different is None or different.ulps < 16


SPECIAL = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 16, "head_dim": 8},
    "deepseek_v3": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECIAL)
def test_attention_sinks_and_latent_attention(kind):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = AutoConfig.for_model(kind, **sizes, **SPECIAL[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed" not in name:
            weight.data.mul_(6.0)
        if "sinks" in name:
            weight.data.normal_()
    requests = requests_of(9)[:9]
    assert equal(batch_generate(model, requests, 6, do_sample=False)[0], alone(model, requests, 6, do_sample=False))


def test_twice_is_the_same():
    model, requests = tiny_causal("opt"), requests_of(8)
    assert equal(batch_generate(model, requests, 6)[0], batch_generate(model, requests, 6)[0])


# --- the simulator ------------------------------------------------------------------------------------------------


def test_simulates_what_runs():
    model, requests = tiny_causal("llama"), requests_of()
    new = [1 + (3 * i) % 11 for i in range(len(requests))]
    plan = plan_batch(requests, new)
    limit = 100
    _, ran = batch_generate(
        model, requests, new, memory_limit=limit * kv_bytes_per_token(model.config, model.dtype), max_tokens_per_pass=16,
        eos_token_id=None, do_sample=False,
    )  # fmt: skip
    said = simulate(plan, limit, PassCost(fixed=2.0, per_token=0.5), max_tokens_per_pass=16)
    for name in ("tokens", "kv_tokens", "prefix_tokens", "prefill_tokens", "new_tokens", "requests"):
        assert getattr(ran, name) == getattr(said, name)
    assert said.seconds == pytest.approx(2.0 * said.passes + 0.5 * sum(said.tokens))
    early = simulate(plan, limit, new_tokens=1)
    assert early.new_tokens == len(requests) and early.passes <= said.passes


@given(PROMPTS, st.integers(0, 40))
@settings(max_examples=40)
def test_the_lru_cache_against_its_definition(requests, cached):
    """One request at a time, blocks of one token: the cache is a list of prefixes, oldest first."""
    kept, computed = [], 0
    for request in requests:
        blocks = [tuple(request[:n]) for n in range(1, len(request))]
        hits = next((i for i, b in enumerate(blocks) if b not in kept), len(blocks))
        computed += len(request) - hits
        kept = [b for b in kept if b not in blocks] + blocks
        kept = kept[max(0, len(kept) - cached) :]
    longest = max(map(len, requests))
    stats = simulate_lru(requests, 1, cached + longest, cached, block=1, max_tokens_per_pass=longest)
    assert stats.prefill_tokens == computed
    assert stats.peak_kv_tokens <= stats.kv_limit
    everything = simulate_lru(requests, 1, 1000, 500, block=1)
    plan = plan_batch(requests, 1)
    assert everything.prefill_tokens == plan.total - plan.saved_bound


# --- the paged back end -------------------------------------------------------------------------------------------


def test_paged_batching_runs_by_the_plan():
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

    model = tiny_causal("llama")
    requests = [r for r in requests_of() if len(r) > 1]
    expected = alone(model, requests, 6, do_sample=False)
    config = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=32)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    before = dict(SCHEDULER_MAPPING)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    computed = {}
    try:
        for name in ("plan", "stock"):
            seen.clear()
            if name == "plan":
                with planned_scheduler(requests, plan_batch(requests, 6), config) as named:
                    outs = model.generate_batch(
                        requests, generation_config=generation, continuous_batching_config=named, warmup=False
                    )
            else:
                outs = model.generate_batch(
                    requests, generation_config=generation, continuous_batching_config=config, warmup=False
                )
            assert [r + o.generated_tokens for r, o in zip(requests, outs.values(), strict=True)] == [
                e.tolist() for e in expected
            ]
            computed[name] = sum(seen)
    finally:
        hook.remove()
    assert before == SCHEDULER_MAPPING and config.scheduler_type == "fifo"
    assert computed["plan"] < computed["stock"]
    with (
        pytest.raises(ValueError, match=f"the plan is of {len(requests)} requests, got 1"),
        planned_scheduler(requests[:1], plan_batch(requests, 6), config),
    ):
        pass


# --- bad input ----------------------------------------------------------------------------------------------------

BAD_PLANS = {
    "nothing": (([], 4), "no requests"),
    "a string": (("text", 4), "no requests"),
    "strings": ((["text"], 4), "request 0 is text"),
    "words": (([[1], ["a", "b"]], 4), "request 1 is text"),
    "empty": (([[1], []], 4), "request 1 is empty"),
    "floats": (([[1.5]], 4), "flat list of token ids"),
    "nested": (([[[1, 2]]], 4), "flat list of token ids"),
    "negative": (([[1, -2]], 4), "token ids are at least 0"),
    "lengths": (([[1], [2]], [4]), "max_new_tokens has 1 numbers for 2 requests"),
    "zero": (([[1], [2]], [4, 0]), "at least 1, got 0 for request 1"),
}


@pytest.mark.parametrize(("given_", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_refuses_what_cannot_be_planned(given_, message):
    with pytest.raises(ValueError, match=message):
        plan_batch(*given_)
    with pytest.raises(ValueError, match=message):
        batch_generate(tiny_causal("llama"), *given_)


BAD_CALLS = {
    "too long": ({"memory_limit": "4KB"}, r"request 1 does not fit even alone: 30 prompt tokens .* \(8,448 bytes\)"),
    "memory": ({"memory_limit": "much"}, "a positive number of bytes or a text such as '8GiB'"),
    "no memory": ({"memory_limit": 0}, "a positive number of bytes"),
    "estimates": ({"expected_new_tokens": [1]}, "expected_new_tokens has 1 numbers for 2"),
    "beams": ({"num_beams": 2}, "num_beams=2"),
    "several": (
        {"num_return_sequences": 2, "do_sample": True},
        "num_return_sequences=2: give the request several times",
    ),
    "streamer": ({"streamer": object()}, "streamer cannot be used in batch_generate: results are handed out"),
    "embeds": ({"inputs_embeds": torch.zeros(1, 1, 32)}, "inputs_embeds cannot be used"),
    "chunk": ({"max_tokens_per_pass": 0}, "max_tokens is the number of tokens per pass"),
    "grouping": ({"grouping": "best"}, "grouping must be one of optimal, first-level, none, got 'best'"),
    "order": ({"order": "random"}, "order must be 'decode-heavy' or 'input'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses_what_cannot_be_run(options, message):
    model = tiny_causal("llama")
    ran = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with pytest.raises(ValueError, match=message):
        batch_generate(model, [[3, 4], list(range(3, 33))], 4, **options)
    hook.remove()
    assert sum(ran) <= 1  # at most the one token that tells the size of keys and values
    assert model.config._attn_implementation == "sdpa"


def test_refuses_models_that_cannot_share():
    with pytest.raises(ValueError, match="request 0 holds token 97, the model's vocabulary ends at 96"):
        batch_generate(tiny_causal("llama"), [[97]], 2)
    with pytest.raises(ValueError, match="request 0 reaches 513 tokens, the model has 512 positions"):
        batch_generate(tiny_causal("gpt2"), [[5] * 500], 14)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=scaled)
    ).eval()
    with pytest.raises(ValueError, match="rope_type='dynamic' turns all positions"):
        batch_generate(model, [[5] * 12], 8)
    assert len(batch_generate(model, [[5] * 12], 4)[0][0]) == 16


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, "is an encoder-decoder"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "has layers of type linear_attention"),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, "0 of 1 layers attend through the attention interface"),
    ],
)  # fmt: skip
def test_refuses_other_architectures(kind, sizes, message):
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, vocab_size=50, **sizes)
    made = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    with pytest.raises(ValueError, match=message):
        batch_generate(made.from_config(config).eval(), [[5, 6]], 2)


def test_refuses_simulations():
    with pytest.raises(ValueError, match="leave room within kv_limit"):
        simulate_lru([[1, 2]], 1, 10, 10)
    with pytest.raises(ValueError, match="block is the number of tokens"):
        simulate_lru([[1, 2]], 1, 10, 0, block=0)
    with pytest.raises(ValueError, match=r"request 0 does not fit even alone: 2 prompt tokens and 9 new"):
        simulate(plan_batch([[1, 2]], 9), 9)


@pytest.mark.parametrize(
    ("given_", "expected"), [("8GiB", 2**33), ("2 kb", 2000), ("7", 7), (12, 12), ("0.5MB", 500_000), ("1TiB", 2**40)]
)
def test_memory(given_, expected):
    assert parse_memory(given_) == expected


@pytest.mark.parametrize("given_", ["0.5M", "much", "-1GB", "0", "0.1B", ""])
def test_refuses_memory(given_):
    with pytest.raises(ValueError, match="a memory limit is a positive number of bytes"):
        parse_memory(given_)
