"""FS-GEN: the authors' own runs, slow definitions without caches, identities, batches, traces, bad input."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, MistralConfig, MistralForCausalLM

from golden_case import GOLDEN, GoldenCase, fill
from tiny_causal import tiny_causal, tokens
from tokenry.assets import external, load_model
from tokenry.decoding import (
    CollaborationTrace,
    ContrastiveProcessor,
    OracleProcessor,
    ProxyProcessor,
    Router,
    RowReader,
    ScalingLaw,
    collaborate,
    fit_scaling,
    fuse_contrastive,
    fuse_proxy,
)
from tokenry.decoding.same_vocabulary import check_shared_ids
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("fs-gen")
VOCAB = 23


@cache
def tiny(seed, layers=1, vocabulary=VOCAB, dtype=torch.float64, kinship=0.0):
    """A random model; with ``kinship`` its weights are mixed with those of ``tiny(0)``, so that the two often agree."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, initializer_range=0.4)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = None, 0, None
    model = LlamaForCausalLM(config).eval().to(dtype)
    if kinship:
        for mine, theirs in zip(model.parameters(), tiny(0).parameters(), strict=False):
            mine.data.mul_(1 - kinship).add_(theirs.data, alpha=kinship)
    return model


def family():
    """Small, large and tuned model that agree now and then."""
    return tiny(1, kinship=0.75), tiny(0), tiny(2, kinship=0.8)


def prompt(rows=1, width=6, seed=0):
    return torch.randint(1, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded(widths=(6, 1, 4), seed=0):
    ids, mask = (torch.zeros(len(widths), max(widths), dtype=torch.long) for _ in range(2))
    for row, width in enumerate(widths):
        ids[row, -width:], mask[row, -width:] = prompt(1, width, seed + row), 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model, inputs, strategy=None, new=14, **options):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    chosen = {"custom_generate": strategy} if strategy is not None else {}
    return model.generate(**inputs, **chosen, max_new_tokens=new, **({"do_sample": False} | options))


@torch.no_grad()
def last_logits(model, ids):
    return model(input_ids=ids[None]).logits[0, -1]


# --- the authors' runs --------------------------------------------------------------------------------------------

METHODS = {
    "OracleDecoding": "oracle",
    "ContrastiveDecoding": "contrastive",
    "SpeculativeDecoding": "speculative",
    "ProxyFineTuning": "proxy",
}
CASES = ("independent", "related")
RUNS = list(json.loads((GOLDEN / "fs-gen" / "related.json").read_text("utf-8"))["runs"])


@cache
def golden_models(name):
    spec = json.loads((GOLDEN / "fs-gen" / f"{name}.json").read_text("utf-8"))

    def make(prefix, config):
        weights = {}
        for full, (shape, _) in spec["filled"].items():
            if full.startswith(prefix):
                value, plain = fill(full, shape), full.removeprefix(prefix)
                if spec["mix"] and prefix in spec["mix"]:
                    share, large = spec["mix"][prefix], fill("large." + plain, shape)
                    value = math.sqrt(1 - share**2) * large + share * value if value.ndim > 1 else large
                weights[plain] = value
        model = LlamaForCausalLM(LlamaConfig(**spec[config])).eval()
        model.load_state_dict(weights)
        return model

    return (
        make("small.", "config_small"),
        make("large.", "config_large"),
        make("small_ft.", "config_small"),
    )


def golden_strategy(spec, large, tuned):
    how, router = spec["collaboration"], spec["router"]
    method = METHODS[how["method"]]
    options = {ours: how[theirs] for ours, theirs in (("alpha", "alpha"), ("beta", "beta"), ("draft_tokens", "K")) if theirs in how}  # fmt: skip
    if method == "proxy":
        options["tuned_model"] = tuned
    limits = [router["threshold"]] if "threshold" in router else []
    return collaborate(large, method, getattr(Router, router["method"])(*limits), **options)


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", RUNS)
def test_golden(name, which):
    """Ids, counts and mismatch flags of every method with every router of the authors' code."""
    case = GoldenCase("fs-gen", name)
    small, large, tuned = golden_models(name)
    strategy = golden_strategy(case.spec["runs"][which], large, tuned)
    expected = case.outputs[f"{which}.tokens"]
    total, latent, mismatches = case.outputs[f"{which}.counts"].tolist()
    ids, ends = case.inputs["prompt"][None], {"eos_token_id": None, "pad_token_id": 0}
    drafting = strategy.method == "speculative"
    # Their last round drafts past the limit: give ours room for as many and compare the rounds that they ran.
    out = run(small, ids, strategy, new=len(expected) + 8 * drafting, **ends)
    assert torch.equal(out[0, ids.shape[1] :][: len(expected)], expected)
    trace = strategy.trace
    if drafting:
        rounds = trace.routed[0].long().cumsum(0)  # which round each token belongs to
        flags = [bool(trace.mismatch[0][rounds == number].any()) for number in range(1, latent + 1)]
        assert sum(flags) == mismatches
        assert int(trace.routed[0, :total].sum()) == latent
    else:
        assert [trace.total, trace.latent, trace.mismatches] == [total, latent, mismatches]
        flags = trace.mismatch[trace.routed].long().tolist() or [-1]
        assert flags == case.outputs[f"{which}.mismatch_flags"].tolist()
    assert torch.equal(trace.token[0], out[0, ids.shape[1] :])


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_golden_large_greedy(name):
    case = GoldenCase("fs-gen", name)
    small, large, _ = golden_models(name)
    expected = case.outputs["large_greedy"]
    for method in ("oracle", "speculative"):
        out = run(small, case.inputs["prompt"][None], collaborate(large, method), len(expected), eos_token_id=None)
        assert torch.equal(out[0, -len(expected) :], expected)


@pytest.mark.golden
def test_golden_scaling_law():
    """The authors' fits of their own 168 logged frequencies, where the log is at hand; their laws' predictions anyway."""
    case = GoldenCase("fs-gen", "scaling_law")
    folder = external("fsgen-collaboration")
    logged = json.loads((folder / "collaboration_frequency.json").read_text("utf-8")) if folder else {}
    for name, expected in case.spec["outputs"].items():
        theirs = ScalingLaw(expected["a"], expected["alpha"], expected["b"])
        ratios = np.geomspace(1.5, 144, 12)
        laws = [(theirs, 1e-9), (fit_scaling(ratios, theirs.predict(ratios)), 2e-3)]
        if logged:
            method, data = name.split("/")
            rows = logged[method][data]
            sizes = [float(row["large"][:-1]) / float(row["small"][:-1]) for row in rows]
            frequencies = [row["collaboration_frequency"] for row in rows]
            law = fit_scaling(sizes, frequencies)
            assert law.r2 == pytest.approx(expected["r2"], abs=1e-6)
            assert max(frequencies) == expected["max"]
            assert np.mean(np.array(frequencies) > 0.2) == expected["share_above_0.2"]
            laws.append((law, 1e-6))
        for ratio, value in expected["at_ratio"].items():
            for law, tolerance in laws:
                assert law.predict(float(ratio)) == pytest.approx(value, abs=tolerance)


# --- slow definitions -----------------------------------------------------------------------------------------------


def slow_router(kind, limit, probabilities):
    first, second = sorted(probabilities.tolist(), reverse=True)[:2]
    return {
        "normal": True,
        "none": False,
        "threshold": first < limit,
        "delta_threshold": (first - second) / 2 < limit,
    }[kind]


def slow(method, kind, limit, models, ids, new, drafts, alpha, beta):
    """The definition, one token after the other, every model on the whole prefix each time."""
    small, large, tuned = models
    ids, begin, routed, wrong = ids.clone(), len(ids), [], []
    while len(ids) < begin + new:
        base = last_logits(small, ids)
        own = last_logits(tuned, ids) if method == "proxy" else base
        asked = slow_router(kind, limit, own.float().softmax(-1))
        routed.append(asked)
        if not asked:
            chosen = [own.argmax()]
            wrong.append(False)
        elif method == "speculative":
            text, drafted = ids, []
            for _ in range(min(drafts, begin + new - len(ids) - 1)):
                drafted.append(last_logits(small, text).argmax())
                text = torch.cat([text, drafted[-1][None]])
            chosen = []
            for draft in [*drafted, None]:
                chosen.append(last_logits(large, torch.cat([ids, *(c[None] for c in chosen)])).argmax())
                if draft is None or chosen[-1] != draft:
                    break
            guess = [*drafted, *([] if drafted else [base.argmax()])]  # the last token of all is judged undrafted
            wrong += [i < len(guess) and bool(c != guess[i]) for i, c in enumerate(chosen)]
            routed += [False] * (len(chosen) - 1)
        else:
            top = last_logits(large, ids)
            if method == "contrastive":
                plausible = top >= top.max() + math.log(alpha)
                fused = torch.tensor([s + beta * (t - s) if ok else -math.inf for s, t, ok in zip(base, top, plausible, strict=True)])  # fmt: skip
            else:
                fused = top if method == "oracle" else torch.stack([t + alpha * (a - b) for t, a, b in zip(top, own, base, strict=True)])  # fmt: skip
            chosen = [fused.argmax()]
            wrong.append(bool(chosen[0] != base.argmax()))
        ids = torch.cat([ids, torch.stack(chosen)])
    return ids[: begin + new], routed[:new], wrong[:new]


@given(
    st.sampled_from(["oracle", "contrastive", "speculative", "proxy"]),
    st.sampled_from(["normal", "none", "threshold", "delta_threshold"]),
    st.floats(0.05, 0.9),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(0, 999),
    st.integers(1, 4),
    st.floats(0.01, 1.0),
    st.floats(0.0, 2.0),
)
def test_equals_the_slow_definition(method, kind, limit, widths, seed, drafts, alpha, beta):
    """Ids, routing and mismatches of every row of a left-padded batch are those of the row alone."""
    models, inputs, new = family(), padded(widths, seed), 9
    router = getattr(Router, kind)(*([limit] if "threshold" in kind else []))
    tuned = models[2] if method == "proxy" else None
    strategy = collaborate(models[1], method, router, tuned_model=tuned, alpha=alpha, beta=beta, draft_tokens=drafts)
    out = run(models[0], inputs, strategy, new)
    for row, width in enumerate(widths):
        alone = inputs["input_ids"][row, -width:]
        ids, routed, wrong = slow(method, kind, limit, models, alone, new, drafts, alpha, beta)
        assert torch.equal(out[row, -new:], ids[-new:])
        trace = strategy.trace
        if method == "speculative" and len(widths) > 1:
            continue  # how many tokens the last round drafts depends on the slowest row
        assert trace.routed[row].tolist() == routed
        assert trace.mismatch[row].tolist() == wrong


@given(st.integers(0, 999), st.integers(1, 3), st.integers(2, 9), st.floats(0.01, 1), st.floats(0, 2))
def test_fusion_equals_the_equations(seed, rows, width, alpha, beta):
    large, small, tuned = torch.randn(3, rows, width, generator=torch.Generator().manual_seed(seed))
    fused = fuse_contrastive(large, small, alpha, beta)
    for b in range(rows):
        for v in range(width):
            if large[b, v] < large[b].max() + math.log(alpha):
                assert fused[b, v] == -math.inf
            else:
                torch.testing.assert_close(fused[b, v], small[b, v] + beta * (large[b, v] - small[b, v]))
    torch.testing.assert_close(fuse_proxy(large, small, tuned, alpha), large + alpha * tuned - alpha * small)


def test_gradients_reach_what_is_fused():
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    large, small, tuned = logits.unbind(0)
    (
        fuse_proxy(large, small, tuned, 0.5).square().sum() + fuse_contrastive(large, small, 1e-9).square().sum()
    ).backward()
    assert logits.grad.isfinite().all() and (logits.grad.abs().sum((1, 2)) > 0).all()


@given(st.data())
def test_reader_equals_reading_everything(data):
    """Rows read in any order, any number at once, with parts forgotten in between."""
    rows = data.draw(st.integers(1, 3))
    start = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    ids = prompt(rows, 20, data.draw(st.integers(0, 99)))
    model = tiny(0, layers=2)
    reader, read, have = RowReader(model, rows, start), 0, list(start)
    for _ in range(4):
        which = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
        room = [row for row in which if have[row] + 2 < 20]
        if not room:
            break
        keep = data.draw(st.integers(1, 2))
        ends = [data.draw(st.integers(have[row] + keep, 20)) for row in room]
        logits = reader.read(ids, room, ends, keep)
        read += sum(end - have[row] for row, end in zip(room, ends, strict=True))
        for found, row, end in zip(logits, room, ends, strict=True):
            have[row] = end
            with torch.no_grad():
                expected = model(input_ids=ids[row : row + 1, start[row] : end]).logits[0, -keep:]
            torch.testing.assert_close(found, expected)
        have = [max(min(n, data.draw(st.integers(0, 20))), first) for n, first in zip(have, start, strict=True)]
        reader.forget(have)
        assert reader.cached == have and reader.tokens == read


def test_reader_grows_and_gives_the_cache_back():
    model, ids = tiny(0, layers=2), prompt(2, 400)
    reader = RowReader(model, 2)
    reader.read(ids, [0], [300])
    out = reader.read(ids, [0, 1], [400, 399])
    with torch.no_grad():
        torch.testing.assert_close(out[1, 0], model(input_ids=ids[1:, :399]).logits[0, -1])
    cache = reader.cache
    reader.release(399)
    assert cache.get_seq_length() == 399
    with torch.no_grad():
        again = model(input_ids=ids[:, 399:], **{CACHE: cache}).logits[:, -1]
        torch.testing.assert_close(again, model(input_ids=ids).logits[:, -1])


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["oracle", "speculative"])
def test_always_asking_gives_the_large_models_text(method):
    small, large, _ = family()
    for inputs in (prompt(3), padded()):
        assert torch.equal(run(small, inputs, collaborate(large, method)), run(large, inputs))


@pytest.mark.parametrize("method", ["oracle", "contrastive", "speculative", "proxy"])
def test_never_asking_gives_the_proposers_text(method):
    small, large, tuned = family()
    proxy = method == "proxy"
    strategy = collaborate(large, method, Router.none(), tuned_model=tuned if proxy else None)
    assert torch.equal(run(small, padded(), strategy), run(tuned if proxy else small, padded()))
    trace = strategy.trace
    assert (trace.latent, trace.mismatches, trace.large_passes, trace.large_tokens) == (0, 0, 0, 0)
    assert strategy.stats.forward_passes == 0


def test_limits_of_the_rules():
    small, large, _ = family()
    theirs, own, inputs = run(large, padded()), run(small, padded()), padded()
    assert torch.equal(run(small, inputs, collaborate(large, "proxy", tuned_model=small)), theirs)
    assert torch.equal(run(small, inputs, collaborate(large, "contrastive", alpha=1e-300, beta=1.0)), theirs)
    assert torch.equal(run(small, inputs, collaborate(large, "contrastive", alpha=1e-300, beta=0.0)), own)
    assert torch.equal(run(small, inputs, collaborate(large, "contrastive", alpha=1.0)), theirs)  # one plausible token
    for make in (Router.threshold, Router.delta_threshold):
        assert torch.equal(run(small, inputs, collaborate(large, "oracle", make(0.0))), own)
        assert torch.equal(run(small, inputs, collaborate(large, "oracle", make(1.0))), theirs)


@pytest.mark.parametrize("method", ["oracle", "contrastive", "speculative"])
def test_equal_models_never_disagree(method):
    large = family()[1]
    strategy = collaborate(large, method, draft_tokens=3)
    run(large, padded(), strategy, 12)
    trace = strategy.trace
    assert trace.mismatches == 0 and trace.latent <= trace.total == 36
    if method == "speculative":
        assert trace.large_passes == 3  # four tokens a round


# --- batches, architectures, precision ------------------------------------------------------------------------------


def test_only_routed_rows_go_to_the_large_model():
    small, large, _ = family()
    seen = []
    hook = large.register_forward_pre_hook(lambda _, args, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True)  # fmt: skip
    strategy = collaborate(large, "oracle", Router.threshold(0.35))
    run(small, prompt(4), strategy)
    hook.remove()
    trace = strategy.trace
    assert len(seen) == trace.large_passes == strategy.stats.forward_passes
    per_step = trace.routed.sum(0)
    assert [rows for rows, _ in seen] == per_step[per_step > 0].tolist()
    assert max(rows for rows, _ in seen) < 4 or min(rows for rows, _ in seen) < 4
    last = [int(row.nonzero().max()) for row in trace.routed]  # each row's last question reads all before it
    assert trace.large_tokens == sum(6 + n for n in last)


def test_one_row_catches_up_in_one_pass():
    small, large, _ = family()
    always, seldom = collaborate(large, "oracle"), collaborate(large, "oracle", Router("every fifth", _EveryFifth()))
    for strategy in (always, seldom):
        run(small, prompt(), strategy, 16)
    assert (always.trace.large_passes, always.trace.large_tokens) == (16, 6 + 15)
    assert (seldom.trace.large_passes, seldom.trace.large_tokens) == (4, 6 + 15)
    assert seldom.trace.routed[0].nonzero().flatten().tolist() == [0, 5, 10, 15]


class _EveryFifth:
    def __init__(self):
        self.step = -1

    def __call__(self, probabilities):
        self.step += 1
        return torch.full_like(probabilities[:, 0], self.step % 5 == 0, dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:the model that generate is called on proposes")
@pytest.mark.parametrize("kinds", [("gpt2", "llama"), ("llama", "opt"), ("gpt_neox", "qwen3"), ("qwen3", "gpt2")])
def test_any_two_architectures(kinds):
    small, large = (tiny_causal(kind) for kind in kinds)
    ids = tokens(2, 9)
    ids[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for method in ("oracle", "speculative"):
        strategy = collaborate(large, method)
        assert torch.equal(run(small, inputs, strategy, eos_token_id=None), run(large, inputs, eos_token_id=None))
    routed = collaborate(large, "contrastive", Router.threshold(0.5))
    out = run(small, inputs, routed, eos_token_id=None)
    alone = run(small, ids[1:, 4:], collaborate(large, "contrastive", Router.threshold(0.5)), eos_token_id=None)
    assert torch.equal(out[1, 9:], alone[0, 5:])


@pytest.mark.parametrize("method", ["oracle", "speculative"])
def test_rows_end_one_by_one(method):
    small, large, _ = family()
    free = run(large, padded())[:, 6:]
    options = {"eos_token_id": [int(free[0, 3]), int(free[2, 6])], "pad_token_id": 0}
    strategy = collaborate(large, method, draft_tokens=3)
    out = run(small, padded(), strategy, **options)
    assert torch.equal(out, run(large, padded(), **options))
    emitted = (strategy.trace.token >= 0).sum(-1)
    assert strategy.trace.total == int(emitted.sum()) == strategy.stats.tokens
    assert emitted.min() < emitted.max()
    assert not strategy.trace.routed[strategy.trace.token < 0].any()
    assert strategy.trace.p1[strategy.trace.token < 0].isnan().all()


@pytest.mark.parametrize("method", ["oracle", "speculative"])
def test_sampling_and_processors_act_on_the_fused_scores(method):
    small, large, _ = family()
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    strategy = collaborate(large, method)
    assert torch.equal(run(small, padded(), strategy, **options), run(large, padded(), **options))
    torch.manual_seed(0)
    drawn = run(small, prompt().expand(4000, -1), collaborate(large, method, draft_tokens=2), 2, do_sample=True)[:, 6:]
    with torch.no_grad():
        expected = large(input_ids=prompt()).logits[0, -1].softmax(-1).float()
    observed = torch.bincount(drawn[:, 0], minlength=VOCAB) / 4000
    assert (observed - expected).abs().sum() / 2 < 1.5 * math.sqrt(VOCAB / (2 * math.pi * 4000))


def test_speculative_with_a_router_leaves_tokens_unchecked():
    small, large, _ = family()
    strategy = collaborate(large, "speculative", Router.threshold(0.3), draft_tokens=3)
    out = run(small, padded(), strategy, 20)
    assert 0 < strategy.trace.latent < 60
    assert not torch.equal(out, run(large, padded(), new=20))


def test_output_and_cache():
    small, large, tuned = family()
    for strategy in (
        collaborate(large, "oracle", Router.threshold(0.3), top_k=4),
        collaborate(large, "speculative"),
        collaborate(large, "proxy", Router.threshold(0.3), tuned_model=tuned),
    ):
        out = run(small, prompt(), strategy, return_dict_in_generate=True, output_scores=True)
        assert out.collaboration is strategy.trace and out.decoding_stats is strategy.stats
        assert len(out.scores) == 14 and out[CACHE].get_seq_length() == 6 + 14 - 1
        ids = torch.cat([out.sequences, prompt(seed=5)[:, :3]], 1)
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # a token like the padding's is none
        expected = run(small, longer)
        assert torch.equal(run(small, longer, **{CACHE: out[CACHE]}), expected)


def test_an_error_leaves_the_models_as_they_were():
    small, large, _ = family()

    class Broken(Exception):
        pass

    def break_(probabilities):
        raise Broken

    with pytest.raises(Broken):
        run(small, prompt(), collaborate(large, "oracle", Router("broken", break_)))
    assert torch.equal(run(small, prompt(), collaborate(large)), run(large, prompt()))


def test_vocabularies_of_different_width_are_cut():
    small, large, wide = tiny(3, vocabulary=VOCAB + 8), tiny(0, layers=2), tiny(3, layers=2, vocabulary=VOCAB + 8)
    ids = prompt(2)
    assert torch.equal(run(small, ids, collaborate(large)), run(large, ids))
    assert torch.equal(run(large, ids, collaborate(wide, "contrastive", beta=0.0, alpha=1e-300)), run(large, ids))
    with pytest.raises(ValueError, match=f"holds token {VOCAB + 1}, but one of the models has only {VOCAB} tokens"):
        run(small, torch.tensor([[1, VOCAB + 1]]), collaborate(large))


def test_bfloat16_and_determinism():
    small, large = tiny(1, dtype=torch.bfloat16), tiny(0, dtype=torch.bfloat16)
    strategy = collaborate(large, "contrastive", Router.threshold(0.5))
    first, again = run(small, padded(), strategy), run(small, padded(), strategy)
    assert torch.equal(first, again)
    assert strategy.trace.p1.isfinite().all() and strategy.trace.entropy.isfinite().all()


# --- the trace ------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_small_model():
    small, large, _ = family()
    strategy = collaborate(large, "oracle", top_k=5)
    out = run(small, padded(), strategy)
    alone = out[2, 2:]
    with torch.no_grad():
        probabilities = small(input_ids=alone[None]).logits[0, 3:-1].float().softmax(-1)  # (14, V)
    best = probabilities.sort(-1, descending=True).values
    trace = strategy.trace
    torch.testing.assert_close(trace.p1[2], best[:, 0])
    torch.testing.assert_close(trace.gap[2], best[:, 0] - best[:, 1])
    torch.testing.assert_close(trace.entropy[2], -(probabilities * probabilities.log()).sum(-1))
    torch.testing.assert_close(trace.top[2], best[:, :5])
    assert trace.frequency() == trace.mismatches / 42
    assert trace.summary()["tokens"] == 42 and trace.share_asked() == 1.0


def trace_of(p1, wrong, routed=None):
    p1 = torch.tensor([p1], dtype=torch.float32)
    routed = torch.ones_like(p1, dtype=torch.bool) if routed is None else torch.tensor([routed])
    return CollaborationTrace(
        p1.long().clamp_min(0), routed, torch.tensor([wrong]) & routed, p1, p1, 1 - p1, p1[..., None]
    )


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_bins_equal_counting_one_by_one(entries):
    trace = trace_of(*(list(column) for column in zip(*entries, strict=True)))
    for binned, values in (
        (trace.by_uncertainty(4), [p for p, _, _ in entries]),
        (trace.by_position(4), [i / len(entries) for i in range(len(entries))]),
    ):
        all_, wrong = [0] * 4, [0] * 4
        for value, (_, mismatch, routed) in zip(values, entries, strict=True):
            if routed:
                all_[min(int(np.float32(value) * 4), 3)] += 1
                wrong[min(int(np.float32(value) * 4), 3)] += mismatch
        assert (list(binned.tokens), list(binned.mismatches)) == (all_, wrong)
        assert all(
            math.isnan(f) if n == 0 else f == w / n for f, n, w in zip(binned.frequency, all_, wrong, strict=True)
        )


def test_auc_and_join():
    good = trace_of([0.1, 0.2, 0.8, 0.9], [True, True, False, False])
    assert good.auc() == good.auc("gap") == good.auc("entropy") == 1.0
    short = trace_of([0.9], [True])
    both = CollaborationTrace.join([good, short])
    assert (both.total, both.mismatches, both.latent) == (5, 3, 5)
    assert both.auc() == pytest.approx(0.75)  # of three mismatches and two matches: 1, 1 and (0 + 0.5) / 2
    assert both.by_uncertainty([0, 0.5, 1]).tokens == (2, 3)
    for wrong, message in (
        (lambda: short.auc(), "1 mismatches: both kinds"),
        (lambda: good.auc("p2"), "'p2'"),
        (lambda: good.by_uncertainty(0), "at least 1"),
        (lambda: good.by_position([0.5, 0.2]), "must rise"),
        (lambda: CollaborationTrace.join([]), "no traces"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


# --- the law --------------------------------------------------------------------------------------------------------


@given(st.floats(0.06, 0.5), st.floats(0.1, 1.0), st.floats(0.0, 0.4))
def test_the_law_is_found_again(a, alpha, rest):
    ratios = np.geomspace(1.5, 150, 15)
    law = ScalingLaw(a, alpha, a + rest)
    found = fit_scaling(ratios, law.predict(ratios))
    np.testing.assert_allclose(found.predict(ratios), law.predict(ratios), atol=2e-3)
    assert found.r2 > 0.99 and (np.diff(found.predict(ratios)) > 0).all()


@pytest.mark.parametrize(
    ("ratios", "frequencies", "message"),
    [
        ([2, 4], [0.1, 0.2], "at least three pairs"),
        ([2, 4, 8], [0.1, 0.2], "3 ratios and 2 frequencies"),
        ([2, 0, 8], [0.1, 0.2, 0.3], "ratios must be above 0"),
        ([2, 4, 8], [10, 20, 30], "not per cent"),
        ([2, 4, math.nan], [0.1, 0.2, 0.3], "ratios must be above 0"),
    ],
)
def test_the_law_refuses(ratios, frequencies, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling(ratios, frequencies)


# --- routers --------------------------------------------------------------------------------------------------------


def test_svm_router_learns_where_the_small_model_errs():
    generator = torch.Generator().manual_seed(0)
    top = (torch.rand(1, 400, 5, generator=generator) * 4).softmax(-1).sort(-1, descending=True).values[..., :3]
    p1, everywhere = top[..., 0], torch.ones(1, 400, dtype=torch.bool)
    trace = CollaborationTrace(torch.zeros(1, 400).long(), everywhere, p1 < 0.4, p1, p1, p1, top)
    router = Router.fit_svm(trace)
    assert router.top_k == 3 and f"{2 * int(min((p1 < 0.4).sum(), (p1 >= 0.4).sum()))} tokens" in router.name
    probabilities = (torch.rand(200, 5, generator=generator) * 4).softmax(-1)  # in any order
    assert (router(probabilities) == (probabilities.amax(-1) < 0.4)).float().mean() > 0.95
    with pytest.raises(ValueError, match="holds no probabilities"):
        Router.fit_svm(CollaborationTrace(trace.token, trace.routed, trace.mismatch, p1, p1, p1, top[..., :0]))
    with pytest.raises(ValueError, match="0 mismatches: both"):
        Router.fit_svm(CollaborationTrace(trace.token, trace.routed, trace.routed & False, p1, p1, p1, top))
    small, large, _ = family()
    strategy = collaborate(large, "oracle", router)
    run(small, prompt(4), strategy)
    agree = strategy.trace.routed == (strategy.trace.p1 < 0.4)
    assert 0 < strategy.trace.latent < strategy.trace.total and agree.float().mean() > 0.8


# --- logits processors ----------------------------------------------------------------------------------------------


def test_processors_equal_the_strategy():
    small, large, tuned = family()
    inputs = padded()
    for strategy, model, processor in (
        (collaborate(large), small, OracleProcessor(large, pad_token_id=0)),
        (collaborate(large, "contrastive"), small, ContrastiveProcessor(large, pad_token_id=0)),
        (collaborate(large, "contrastive", beta=1.5), large, ContrastiveProcessor(small, "small", beta=1.5, pad_token_id=0)),
        (collaborate(large, "proxy", tuned_model=tuned), large, ProxyProcessor(small, tuned, pad_token_id=0)),
    ):  # fmt: skip
        for again in (inputs, {"input_ids": prompt(2, seed=4)}, inputs):  # another batch in between
            out = run(model, again, logits_processor=LogitsProcessorList([processor]))
            assert torch.equal(out, run(small, again, strategy))


def test_processors_follow_beams():
    small, large, _ = family()
    processors = LogitsProcessorList([OracleProcessor(large)])
    options = {"num_beams": 3, "length_penalty": 0.0}
    assert torch.equal(run(small, prompt(2), logits_processor=processors, **options), run(large, prompt(2), **options))


def test_processors_keep_what_others_rule_out():
    small, large, _ = family()
    scores = last_logits(small, prompt()[0])[None].clone()
    scores[0, 5] = -torch.inf
    fused = ContrastiveProcessor(large, alpha=1e-9)(prompt(), scores)
    assert fused[0, 5] == -torch.inf and not fused.isnan().any()
    wide = torch.cat([scores, torch.zeros(1, 4)], 1)
    assert OracleProcessor(large)(prompt(), wide)[0, VOCAB:].tolist() == [-math.inf] * 4


# --- bad input ------------------------------------------------------------------------------------------------------


def large_():
    return family()[1]


BAD = {
    "method": (lambda: collaborate(large_(), "beam"), "oracle, contrastive, speculative, proxy, got 'beam'"),
    "proxy alone": (lambda: collaborate(large_(), "proxy"), "got no tuned_model: 'proxy' needs"),
    "tuned for nothing": (lambda: collaborate(large_(), tuned_model=large_()), "a tuned_model for 'oracle'"),
    "alpha 0": (lambda: collaborate(large_(), "contrastive", alpha=0), "alpha=0: it must be above 0"),
    "alpha above 1": (lambda: collaborate(large_(), "contrastive", alpha=1.5), "at most 1 for 'contrastive'"),
    "alpha below 0": (lambda: collaborate(large_(), "proxy", tuned_model=large_(), alpha=-1.0), "alpha=-1.0"),
    "beta": (lambda: collaborate(large_(), "contrastive", beta=-0.1), "beta=-0.1"),
    "drafts": (lambda: collaborate(large_(), "speculative", draft_tokens=0), "draft_tokens=0: a round drafts at least 1"),
    "top_k": (lambda: collaborate(large_(), top_k=-1), "top_k=-1"),
    "threshold": (lambda: Router.threshold(1.2), "between 0 and 1, got 1.2"),
    "delta": (lambda: Router.delta_threshold(-0.1), "between 0 and 1, got -0.1"),
    "svm": (lambda: Router.svm(None, 0), "at least 1, got 0"),
    "wide router": (lambda: run(family()[0], prompt(), collaborate(large_(), router=Router.svm(None, 99))), "99 largest of 23"),
    "wide trace": (lambda: run(family()[0], prompt(), collaborate(large_(), top_k=50)), "the trace wants the 50 largest"),
    "empty": (lambda: run(family()[0], torch.zeros(1, 0, dtype=torch.long), collaborate(large_())), "at least one token"),
    "empty row": (lambda: run(family()[0], {"input_ids": prompt(2), "attention_mask": torch.tensor([[1] * 6, [0] * 6])}, collaborate(large_())), "row 1 of the prompt is all padding"),
    "short table": (lambda: run(family()[0], prompt(1, 505), collaborate(tiny_causal("gpt2")), 9), "513 positions, GPT2LMHeadModel has 512"),
    "role": (lambda: ContrastiveProcessor(large_(), "tuned"), "'large' or 'small', got 'tuned'"),
    "processor alpha": (lambda: ContrastiveProcessor(large_(), alpha=2), "alpha=2"),
    "proxy alpha": (lambda: ProxyProcessor(large_(), large_(), alpha=0), "alpha=0"),
    "reader": (lambda: RowReader(tiny(0), 1).read(prompt(), [0], [1], keep=2), "at least 2 are needed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_tokenizers_that_differ():
    _, mine = load_model("draft")
    check_shared_ids(mine, load_model("small")[1])

    class Shifted:
        all_special_ids = ()

        def __len__(self):
            return len(mine) - 5

        def convert_ids_to_tokens(self, ids):
            return [t if i < 300 else t + "x" for i, t in zip(ids, mine.convert_ids_to_tokens(ids), strict=True)]

    with pytest.raises(ValueError, match=r"to the small model and '.*x' to the large one"):
        collaborate(large_(), tokenizers=(mine, Shifted()))


def test_refuses_models_that_cannot_be_read_row_by_row():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    sliding = MistralForCausalLM(MistralConfig(**sizes, vocab_size=VOCAB, sliding_window=8))
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        collaborate(sliding)
    flash = tiny(9)
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        collaborate(flash)


def test_warns_when_the_proposer_is_the_larger_one():
    with pytest.warns(UserWarning, match="meant to be the small one"):
        run(tiny(4, layers=2), prompt(), collaborate(tiny(0)))
