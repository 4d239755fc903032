"""Claims of EMS (arXiv:2412.08521), measured with the embedded model on text it never saw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenry.assets import held_out_texts, load_model
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.layers.cache_argument import CACHE
from tokenry.measure import mean_interval, paired_interval

if TYPE_CHECKING:
    from torch import Tensor

    from tokenry.kvcache import Fidelity

CONTEXT, FOLLOWING, WINDOW = 96, 32, 8
PASSAGES = {16: 80, 24: 40, 48: 40}  # per budget; the rule is about the smallest
NAMES = ("EMS", "local only", "sliding window", "4 sinks + recent", "H2O", "global only", "no merging")
NEEDLE_CONTEXT, NEEDLE_BUDGET, NEEDLE_WINDOW, NEEDLE_PASSAGES = 320, 40, 16, 20


def passages(tokenizer: Any, length: int, limit: int, seed: int = 0) -> Tensor:
    """``[P, length]``: the start of each English held-out text that is long enough, another piece per seed."""
    import torch

    rows = []
    for text in held_out_texts("english"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = (seed * 37) % max(1, len(ids) - length)
        if len(ids) >= length + first:
            rows.append(ids[first : first + length])
    return torch.tensor(rows[:limit])


def planted(tokenizer: Any, seed: int) -> Tensor:
    """``[20 * 5, 324]``: each passage with a passkey of 12 tokens at five depths, asked for at the end."""
    from tokenry.kvcache import passkey_tokens, plant_needles

    texts = passages(tokenizer, NEEDLE_CONTEXT, NEEDLE_PASSAGES, seed)
    return plant_needles(texts, passkey_tokens(tokenizer), seed=seed)


def needles_found(fidelities: Mapping[str, Fidelity]) -> dict[str, dict[str, list[float]]]:
    """Percentages of needle tokens named on ``planted``, by name: of each passage, and at each depth."""
    percent = {name: 100 * figures.correct.view(NEEDLE_PASSAGES, -1) for name, figures in fidelities.items()}
    return {name: {"passages": x.mean(1).tolist(), "depths": x.mean(0).tolist()} for name, x in percent.items()}


@measures("ems", "divergence")
def divergence(context: Context) -> Measurement:
    """KL from the full cache over 32 tokens after 96, paired per passage."""

    def at(budget: int) -> dict[str, dict[str, list[float]]]:
        from tokenry.kvcache import EMSCache, GlobalCache, H2OCache, SinkCache, SlidingWindowCache, SnapKVCache
        from tokenry.kvcache.fidelity import cache_fidelity

        model, tokenizer = load_model("small", device=context.device)
        config = model.config
        caches = {
            "EMS": lambda: EMSCache(config, budget, WINDOW),
            "local only": lambda: SnapKVCache(config, budget, WINDOW),
            "sliding window": lambda: SlidingWindowCache(config, budget),
            "4 sinks + recent": lambda: SinkCache(config, budget),
            "H2O": lambda: H2OCache(config, budget, WINDOW),
            "global only": lambda: GlobalCache(config, budget, WINDOW),
            "no merging": lambda: EMSCache(config, budget, WINDOW, merge_ratio=0.0),
        }
        tokens = passages(tokenizer, CONTEXT + FOLLOWING + 1, PASSAGES[budget], context.seed)
        found = cache_fidelity(model, tokens, CONTEXT, caches, batch_size=16)
        return {
            name: {"kl": f.divergence.tolist(), "agreement": f.agreement.tolist(), "nll": f.loss.tolist()}
            for name, f in found.items()
        }

    details: dict[str, Any] = {"context": CONTEXT, "following": FOLLOWING, "window": WINDOW, "budgets": {}}
    smallest: dict[str, tuple[float, float]] = {}
    value = spread = baseline = 0.0
    count = 0
    for budget in PASSAGES:
        found = context.session.step(f"budget{budget}", lambda budget=budget: at(budget))
        ems = found["EMS"]["kl"]
        worse = {n: paired_interval(found[n]["kl"], ems) for n in NAMES if n != "EMS"}
        details["budgets"][str(budget)] = {
            name: {
                "divergence": statistics.fmean(figures["kl"]),
                "top1 agreement": statistics.fmean(figures["agreement"]),
                "nll": statistics.fmean(figures["nll"]),
                **({"worse than EMS by": worse[name][0], "+-": worse[name][1]} if name in worse else {}),
            }
            for name, figures in found.items()
        }
        if not smallest:
            smallest, count = worse, len(ems)
            value, spread = mean_interval(ems)
            baseline = statistics.fmean(found["local only"]["kl"])
    needed = ("local only", "sliding window")
    shows = value - spread > 0 and all(smallest[n][0] - smallest[n][1] > 0 for n in needed)
    others = "; ".join(f"{n} {d:+.4f} +- {h:.4f}" for n, (d, h) in smallest.items())
    return Measurement(
        shows=shows,
        value=value,
        baseline=baseline,
        spread=spread,
        sentence=(
            f"KL from the full cache with {min(PASSAGES)} of {CONTEXT} entries over {count} passages: EMS {value:.4f} +- "
            f"{spread:.4f} nats; the others against EMS, paired: {others} (local only and sliding window must be worse "
            "with their 95 % intervals above 0; the rest, and the larger budgets in the details, are reported)"
        ),
        details=details,
        charts=tuple(
            {
                "type": "bars",
                "title": f"KL from the full cache, {budget} of {CONTEXT} entries (nats)",
                "values": {name: figures["divergence"] for name, figures in methods.items()},
                "baseline": "EMS",
                "caption": "Shorter is better.",
            }
            for budget, methods in details["budgets"].items()
        ),
    )


@measures("ems", "exact-when-it-fits")
def exact_when_it_fits(context: Context) -> Measurement:
    """Logits with a budget of the context's length equal those of the full cache, bit for bit."""

    def run() -> dict[str, int]:
        import torch

        from tokenry.kvcache import EMSCache
        from tokenry.kvcache.fidelity import next_logits

        model, tokenizer = load_model("small", device=context.device)
        tokens = passages(tokenizer, 129, 16, context.seed)
        full = next_logits(model, tokens, 96, None)
        fits = next_logits(model, tokens, 96, EMSCache(model.config, budget=96))
        cut = next_logits(model, tokens, 96, EMSCache(model.config, budget=95))
        same = [torch.equal(a, b) for a, b in zip(full, fits, strict=True)]
        changed = [not torch.equal(a, b) for a, b in zip(full, cut, strict=True)]
        return {"passages": len(same), "equal": sum(same), "changed with one entry less": sum(changed)}

    found = context.session.step("logits", run)
    return Measurement(
        shows=found["equal"] == found["passages"] and found["changed with one entry less"] > 0,
        value=found["equal"],
        baseline=found["passages"],
        sentence=(
            f"logits after 96 tokens with a budget of 96 are bit-equal to the full cache's for {found['equal']} of "
            f"{found['passages']} passages (must be all); with a budget of 95 "
            f"{found['changed with one entry less']} of them change (must be more than 0)"
        ),
        details=found,
    )


@measures("ems", "memory")
def memory(context: Context) -> Measurement:
    """Bytes that the cache holds after prompts of several lengths, against the promise and the full cache."""

    def run() -> dict[str, dict[str, int]]:
        import torch
        from transformers import DynamicCache

        from tokenry.kvcache import EMSCache, cache_bytes

        model, tokenizer = load_model("small", device=context.device)
        config = model.config
        text = " ".join(held_out_texts("english")[:4])
        ids = tokenizer(text, truncation=True, max_length=1024, return_tensors="pt")["input_ids"].to(context.device)
        promised = 2 * config.num_hidden_layers * config.num_key_value_heads * 128 * config.head_dim * 4
        found = {}
        for length in (256, 512, 1024):
            caches = EMSCache(config, budget=128), DynamicCache(config=config)
            with torch.inference_mode():
                for cache in caches:
                    model(ids[:, :length], **{CACHE: cache}, logits_to_keep=1)
            found[str(length)] = {"EMS": cache_bytes(caches[0]), "full": cache_bytes(caches[1]), "promised": promised}
        return found

    found = context.session.step("bytes", run)
    largest = found["1024"]
    return Measurement(
        shows=all(f["EMS"] == f["promised"] for f in found.values()) and largest["full"] == 8 * largest["EMS"],
        value=largest["full"] / largest["EMS"],
        baseline=1.0,
        sentence=(
            f"128 entries per head hold {largest['EMS']:,} bytes after 256, 512 and 1,024 tokens (must be "
            f"{largest['promised']:,} each time); the full cache holds {largest['full']:,} after 1,024 (must be 8 times)"
        ),
        details=found,
    )


@measures("ems", "planted-needles")
def planted_needles(context: Context) -> Measurement:
    """Needle tokens named after the cut, by cache and by depth, paired per passage."""

    def run() -> dict[str, dict[str, list[float]]]:
        from tokenry import kvcache

        model, tokenizer = load_model("retriever", device=context.device)
        config, budget, window = model.config, NEEDLE_BUDGET, NEEDLE_WINDOW
        caches = {
            "EMS": lambda: kvcache.EMSCache(config, budget, window),
            "SnapKV": lambda: kvcache.SnapKVCache(config, budget, window, pool=7),
            "local only": lambda: kvcache.SnapKVCache(config, budget, window),
            "global only": lambda: kvcache.GlobalCache(config, budget, window),
            "H2O": lambda: kvcache.H2OCache(config, budget, window),
            "expected attention": lambda: kvcache.ExpectedAttentionCache(config, budget, window),
            "TOVA": lambda: kvcache.TOVACache(config, budget, window),
            "KeyDiff": lambda: kvcache.KeyDiffCache(config, budget, window),
            "key norm": lambda: kvcache.KeyNormCache(config, budget, window),
            "4 sinks + recent": lambda: kvcache.SinkCache(config, budget),
            "sliding window": lambda: kvcache.SlidingWindowCache(config, budget),
        }
        tokens = planted(tokenizer, context.seed)
        return needles_found(kvcache.cache_fidelity(model, tokens, NEEDLE_CONTEXT, caches, batch_size=20))

    found = context.session.step("needles", run)
    means = {name: mean_interval(figures["passages"]) for name, figures in found.items()}
    needed = ("sliding window", "4 sinks + recent")
    gaps = {name: paired_interval(found["EMS"]["passages"], found[name]["passages"]) for name in needed}
    value, spread = means["EMS"]
    return Measurement(
        shows=all(gap - half > 0 for gap, half in gaps.values()),
        value=value,
        baseline=means["sliding window"][0],
        spread=spread,
        sentence=(
            f"needle tokens named with {NEEDLE_BUDGET} of {NEEDLE_CONTEXT} entries, {NEEDLE_PASSAGES} passages at five depths: "
            + ", ".join(f"{name} {mean:.1f} %" for name, (mean, _) in means.items())
            + "; EMS over "
            + " and ".join(f"{name} {gap:+.1f} +- {half:.1f}" for name, (gap, half) in gaps.items())
            + " points, paired (both must be above 0 with their 95 % intervals)"
        ),
        details={name: figures["depths"] for name, figures in found.items()},
        charts=(
            {
                "type": "bars",
                "title": f"Needle tokens named, {NEEDLE_BUDGET} of {NEEDLE_CONTEXT} entries (%)",
                "values": {name: mean for name, (mean, _) in means.items()},
                "baseline": "EMS",
                "caption": "Longer is better. Full: all of the cache.",
            },
        ),
    )
