"""Claims of FS-GEN: the authors' logged frequencies, and the embedded models working together."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from tokenry.assets import held_out_texts, load_model, prompts
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import english, rows_of, train

if TYPE_CHECKING:
    from torch import Tensor

    from tokenry.decoding import CollaborationTrace, Router

NEW_TOKENS = 64
WIDTH = 48  # tokens of a prompt
PROMPTS = 120
BINS = 10
BOUND = 0.2  # the paper's, on how often the large model is needed
FREE = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}  # nobody stops early


# --- the authors' log -------------------------------------------------------------------------------------------------


def _logged(context: Context) -> dict[str, tuple[list[float], list[float]]]:
    """Method/data set to size ratios and collaboration frequencies."""
    path = context.data("fsgen-collaboration") / "collaboration_frequency.json"
    tables = {}
    for method, sets in json.loads(path.read_text("utf-8")).items():
        for name, rows in sets.items():
            size = [(float(row["large"].rstrip("B")), float(row["small"].rstrip("B"))) for row in rows]
            ratios = [large / small for large, small in size]
            tables[f"{method}/{name}"] = (ratios, [float(row["collaboration_frequency"]) for row in rows])
    return tables


@measures("fs-gen", "under-20-percent")
def under_20_percent(context: Context) -> Measurement:
    """Count the logged frequencies above the bound, by method and data set."""
    tables = _logged(context)
    every = [f for _, frequencies in tables.values() for f in frequencies]
    above = sum(f > BOUND for f in every)
    largest = {name: max(frequencies) for name, (_, frequencies) in tables.items()}
    shares = {name: sum(f > BOUND for f in frequencies) / len(frequencies) for name, (_, frequencies) in tables.items()}
    fine = [name for name, share in shares.items() if share == 0]
    worst = max(largest, key=lambda name: largest[name])
    return Measurement(
        shows=above == 0,
        value=round(100 * max(every), 1),
        sentence=f"{above} of the {len(every)} collaboration frequencies that the authors logged are above 20 % (must be "
        f"none); the largest is {100 * largest[worst]:.1f} % ({worst}). Below 20 % throughout: {', '.join(fine)}",
        details={"largest": largest, "share_above": {name: round(share, 3) for name, share in shares.items()}},
    )


@measures("fs-gen", "scaling-law-logged")
def scaling_law_logged(context: Context) -> Measurement:
    """Does the law foresee a pair that was left out of the fit better than the mean of the other pairs does?"""
    from tokenry.decoding import fit_scaling

    def table(ratios: list[float], frequencies: list[float]) -> dict[str, Any]:
        law, errors, means = fit_scaling(ratios, frequencies), [], []
        for i, (ratio, frequency) in enumerate(zip(ratios, frequencies, strict=True)):
            others = frequencies[:i] + frequencies[i + 1 :]
            without = fit_scaling(ratios[:i] + ratios[i + 1 :], others)
            errors.append((float(without.predict(ratio)) - frequency) ** 2)
            means.append((statistics.fmean(others) - frequency) ** 2)
        return {
            "at_4": round(float(law.predict(4)), 4),
            "at_16": round(float(law.predict(16)), 4),
            "r2": round(law.r2, 3),
            "error": (sum(errors) / len(errors)) ** 0.5,
            "error_of_mean": (sum(means) / len(means)) ** 0.5,
        }

    found = {
        name: context.session.step(name, lambda t=columns: table(*t)) for name, columns in _logged(context).items()
    }
    better = [name for name, part in found.items() if part["error"] < part["error_of_mean"]]
    worse = sorted(set(found) - set(better))
    return Measurement(
        shows=not worse,
        value=float(len(better)),
        baseline=float(len(found)),
        sentence=f"the law foresees a left-out pair of models better than the mean of the others for {len(better)} of "
        f"{len(found)} methods and data sets (must be all){'; not for ' + ', '.join(worse) if worse else ''}. Frequency at a size ratio of 4 and 16: "
        + ", ".join(
            f"{name} {p['at_4']:.3f} / {p['at_16']:.3f}" for name, p in found.items() if name.startswith("oracle")
        )
        + f"; share of variance explained {min(p['r2'] for p in found.values()):.2f} to {max(p['r2'] for p in found.values()):.2f}",
        details={"tables": found},
    )


# --- models working together ------------------------------------------------------------------------------------------


def _together(small: Any, large: Any, ids: Tensor, method: str, router: Router | None = None) -> CollaborationTrace:
    """The trace of greedy collaboration on prompts ``(B, N)`` without padding."""
    import torch

    from tokenry.decoding import collaborate

    strategy = collaborate(large, method, router)  # type: ignore[arg-type]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    small.generate(**inputs, custom_generate=strategy, **FREE)
    return strategy.trace


def _prompt_ids(tokenizer: Any) -> Tensor:
    """The first tokens of held-out passages, English and code in turn: ``(PROMPTS, WIDTH)``."""
    import torch

    rows: list[list[int]] = []
    kinds = []
    for kind in ("english", "code"):
        encoded = tokenizer(held_out_texts(kind), add_special_tokens=False)["input_ids"]
        kinds.append([window for row in encoded for window in _cut(row)][:: max(1, len(encoded) // PROMPTS)])
    for pair in zip(*kinds, strict=False):
        rows += pair
    return torch.tensor(rows[:PROMPTS])


def _cut(ids: list[int]) -> list[list[int]]:
    """Windows of ``WIDTH`` tokens, far apart."""
    return [ids[at : at + WIDTH] for at in range(0, len(ids) - WIDTH + 1, 8 * WIDTH)]


def _embedded(context: Context) -> tuple[Any, Any, Tensor]:
    """Small model, large model, prompts."""
    small, tokenizer = load_model("draft", device=context.device)
    large, _ = load_model("small", device=context.device)
    return small, large, _prompt_ids(tokenizer).to(context.device)


def _uncertainty(trace: CollaborationTrace) -> dict[str, Any]:
    from scipy.stats import spearmanr

    binned = trace.by_uncertainty(BINS)
    filled = [(i, f) for i, (f, n) in enumerate(zip(binned.frequency, binned.tokens, strict=True)) if n]
    return {
        "frequency": round(trace.frequency(), 4),
        "bins": [None if n == 0 else round(f, 4) for f, n in zip(binned.frequency, binned.tokens, strict=True)],
        "tokens": list(binned.tokens),
        "spearman": round(float(spearmanr(*zip(*filled, strict=True)).statistic), 4),
        "auc_p1": round(trace.auc("p1"), 4),
        "auc_gap": round(trace.auc("gap"), 4),
        "auc_entropy": round(trace.auc("entropy"), 4),
        "positions": [round(f, 4) for f in trace.by_position(BINS).frequency],
    }


@measures("fs-gen", "where-uncertain")
def where_uncertain(context: Context) -> Measurement:
    """Mismatches over ten bins of the small model's largest probability."""
    small, large, ids = _embedded(context)
    parts = {
        method: context.session.step(method, lambda m=method: _uncertainty(_together(small, large, ids, m)))
        for method in ("oracle", "contrastive")
    }
    rho, auc = (
        max(p["spearman"] for p in parts.values()),
        min(p["auc_p1"] for p in parts.values()),
    )
    return Measurement(
        shows=rho < -0.8 and auc > 0.7,
        value=auc,
        baseline=0.5,
        sentence="the large model changes the small one's choice where that one is unsure: "
        + "; ".join(
            f"{method} {100 * p['frequency']:.0f} % of tokens changed, rank correlation with p1 {p['spearman']:.2f}, area "
            f"under the ROC curve {p['auc_p1']:.2f} for p1 and {p['auc_gap']:.2f} for the gap"
            for method, p in parts.items()
        )
        + " (must be below -0.8, and above 0.7 for p1, in both). Changed in fewer than 20 % of tokens: "
        + (", ".join(method for method, p in parts.items() if p["frequency"] < BOUND) or "neither"),
        details={"methods": parts, "prompts": len(ids), "new_tokens": NEW_TOKENS},
        charts=(
            {
                "type": "lines",
                "title": "How often the large model changes the token",
                "x_title": "largest probability of the small model",
                "y_title": "share of tokens changed",
                "log_x": False,
                "log_y": False,
                "series": {
                    method: [[(i + 0.5) / BINS, f] for i, f in enumerate(p["bins"]) if f is not None]
                    for method, p in parts.items()
                },
            },
        ),
    )


@measures("fs-gen", "early-in-the-answer")
def early_in_the_answer(context: Context) -> Measurement:
    """Mismatches of the first tenth of the answer against those of the rest."""
    small, large, ids = _embedded(context)

    def run(method: str) -> dict[str, Any]:
        trace = _together(small, large, ids, method)
        tenth = trace.by_position(BINS)
        rest = sum(tenth.mismatches[1:]) / sum(tenth.tokens[1:])
        return {"first": tenth.frequency[0], "rest": rest, "tenths": [round(f, 4) for f in tenth.frequency]}

    parts = {method: context.session.step(method, lambda m=method: run(m)) for method in ("oracle", "contrastive")}
    return Measurement(
        shows=all(p["first"] > p["rest"] for p in parts.values()),
        value=round(parts["oracle"]["first"] / parts["oracle"]["rest"], 3),
        baseline=1.0,
        sentence="share of tokens changed in the first tenth of the continuation and in the rest: "
        + ", ".join(f"{method} {p['first']:.3f} and {p['rest']:.3f}" for method, p in parts.items())
        + " (the first must be larger in both; these are continuations of a text, not answers to a question)",
        details={"methods": parts},
    )


def _llama(layers: int, width: int, vocabulary: int, heads: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=True))


def _ratios(models: dict[str, Any], ids: Tensor, context: Context) -> dict[str, Any]:
    """Every pair, the smaller one proposing: size ratio and frequencies. ``models`` are in order of size."""
    names, pairs = list(models), {}
    for i, small in enumerate(names):
        for large in names[i + 1 :]:

            def run(small: str = small, large: str = large) -> dict[str, Any]:
                ratio = models[large].num_parameters() / models[small].num_parameters()
                methods = ("oracle", "contrastive")
                return {"ratio": round(ratio, 2)} | {
                    m: {"frequency": round(_together(models[small], models[large], ids, m).frequency(), 4)}
                    for m in methods
                }

            pairs[f"{small} + {large}"] = context.session.step(f"{small}+{large}", run)
    return pairs


def _grows(models: dict[str, Any], pairs: dict[str, Any], method: str) -> bool:
    """For each proposer with more than one partner: the larger the partner, the more changes."""
    names = list(models)
    for i, small in enumerate(names[:-2]):
        frequencies = [pairs[f"{small} + {large}"][method]["frequency"] for large in names[i + 1 :]]
        if frequencies != sorted(set(frequencies)):
            return False
    return True


def _pair_figures(pairs: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} (ratio {p['ratio']:.1f}) {100 * p['oracle']['frequency']:.1f} % oracle, "
        f"{100 * p['contrastive']['frequency']:.1f} % contrastive"
        for name, p in pairs.items()
    )


@measures("fs-gen", "grows-with-the-ratio")
def grows_with_the_ratio(context: Context) -> Measurement:
    """A model of a third of a million parameters proposes to partners of 1 and 7 million."""
    text = english(context)
    tiny = _llama(2, 64, len(text.tokenizer), heads=4).to(context.device)
    log = train(context, "tiny", tiny, text.train, steps=500, rows=8, length=128, lr=5e-3)
    models = {"tiny": tiny}
    for name in ("draft", "small"):
        models[name] = load_model(name, device=context.device)[0]
    ids = rows_of(text.held_out, PROMPTS, WIDTH, 0).to(context.device)
    pairs = _ratios(models, ids, context)
    both = {method: _grows(models, pairs, method) for method in ("oracle", "contrastive")}
    first, second = pairs["tiny + draft"], pairs["tiny + small"]
    return Measurement(
        shows=all(both.values()),
        value=round(100 * second["oracle"]["frequency"], 2),
        baseline=round(100 * first["oracle"]["frequency"], 2),
        sentence=f"tokens that the large model changes: {_pair_figures(pairs)} (for the tiny proposer the larger partner "
        f"must change more under both rules: oracle {'yes' if both['oracle'] else 'no'}, contrastive "
        f"{'yes' if both['contrastive'] else 'no'})",
        details={
            "pairs": pairs,
            "parameters": {name: model.num_parameters() for name, model in models.items()},
            "training": log,
        },
    )


@measures("fs-gen", "router-beats-chance")
def router_beats_chance(context: Context) -> Measurement:
    """Agreement with the large model at several thresholds, beside random routing of as many tokens."""
    import torch

    from tokenry.decoding import Router

    small, large, ids = _embedded(context)

    def agreement(router: Router) -> dict[str, float]:
        trace = _together(small, large, ids, "oracle", router)
        text = torch.cat([ids, trace.token.to(ids.device)], 1)
        with torch.no_grad():
            own = large(input_ids=text).logits[:, WIDTH - 1 : -1].argmax(-1).cpu()
        return {"share": trace.share_asked(), "agreement": (own == trace.token).float().mean().item()}

    def against_chance(router: Router) -> dict[str, Any]:
        mine = agreement(router)
        generator = torch.Generator().manual_seed(context.seed)

        def rule(probabilities: Tensor) -> Tensor:
            drawn = torch.rand(len(probabilities), generator=generator) < mine["share"]
            return drawn.to(probabilities.device)

        return {"router": mine, "chance": agreement(Router("chance", rule))}

    routers = [Router.threshold(t) for t in (0.3, 0.5, 0.7)] + [Router.delta_threshold(t) for t in (0.05, 0.1, 0.2)]
    parts = {r.name: context.session.step(r.name, lambda r=r: against_chance(r)) for r in routers}
    shows = all(p["router"]["agreement"] > p["chance"]["agreement"] for p in parts.values())
    middle = parts["threshold 0.5"]
    return Measurement(
        shows=shows,
        value=round(middle["router"]["agreement"], 4),
        baseline=round(middle["chance"]["agreement"], 4),
        sentence="share of tokens that are the large model's own choice, routed against as many tokens drawn at random: "
        + ", ".join(
            f"{name} asks for {100 * p['router']['share']:.0f} %: {p['router']['agreement']:.3f} against "
            f"{p['chance']['agreement']:.3f}"
            for name, p in parts.items()
        )
        + " (the router must be better each time)",
        details={"routers": parts},
        charts=(
            {
                "type": "lines",
                "title": "Agreement with the large model",
                "x_title": "share of tokens for which it is asked",
                "y_title": "agreement",
                "log_x": False,
                "log_y": False,
                "series": {
                    "threshold": [
                        list(p["router"].values()) for name, p in parts.items() if name.startswith("threshold")
                    ],
                    "delta threshold": [
                        list(p["router"].values()) for name, p in parts.items() if name.startswith("delta")
                    ],
                    "chance": sorted(list(p["chance"].values()) for p in parts.values()),
                },
            },
        ),
    )


@measures("fs-gen", "lossless")
def lossless(context: Context) -> Measurement:
    """Speculative text against the large model's own, alone and in left-padded batches of eight."""
    import torch

    from tokenry.decoding import CollaborationTrace, collaborate, explain_difference

    loaded: Any = load_model("draft", device=context.device)
    small, tokenizer = loaded
    large: Any = load_model("small", device=context.device)[0]
    encode = {"return_tensors": "pt", "return_token_type_ids": False, "padding": True}

    def chunk(first: int) -> dict[str, Any]:
        texts, traces, different, same = prompts()[first : first + 8], [], [], {"alone": 0, "batch": 0}
        groups = {"alone": [[t] for t in texts], "batch": [texts]}
        for kind, sets in groups.items():
            for group in sets:
                inputs = tokenizer(group, **encode).to(context.device)
                strategy = collaborate(large, "speculative")
                mine = small.generate(**inputs, custom_generate=strategy, **FREE)
                theirs = large.generate(**inputs, **FREE)
                traces += [strategy.trace] if kind == "alone" else []
                for a, b, mask in zip(mine, theirs, inputs["attention_mask"], strict=True):
                    same[kind] += torch.equal(a, b)
                    found = explain_difference(
                        large, b[len(mask) - mask.sum() :].cpu(), a[len(mask) - mask.sum() :].cpu()
                    )
                    if found is not None:
                        different.append({"kind": kind, "first": first, "at": found.position, "gap": found.gap, "ulps": found.ulps})  # fmt: skip
        return {"same": same, "different": different} | CollaborationTrace.join(traces).summary()

    parts = [context.session.step(f"prompts{first}", lambda f=first: chunk(f)) for first in range(0, len(prompts()), 8)]
    alone, batch = (sum(p["same"][kind] for p in parts) for kind in ("alone", "batch"))
    passes = sum(p["large_passes"] for p in parts)
    per_pass = sum(p["tokens"] for p in parts) / passes
    return Measurement(
        shows=alone == batch == len(prompts()) and per_pass > 1,
        value=float(min(alone, batch)),
        baseline=float(len(prompts())),
        sentence=f"with the router that always asks, speculative text is the large model's own for {alone} of {len(prompts())} prompts alone "
        f"and {batch} of {len(prompts())} in batches of eight (must be all), {per_pass:.2f} tokens per pass of the large "
        f"model with five drafted ones (must be above 1), {NEW_TOKENS} new tokens each, float32",
        details={"differences": [d for p in parts for d in p["different"]], "parts": parts},
    )


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SIZES = {"10M": (6, 320, 5), "40M": (8, 640, 10), "160M": (12, 1024, 16)}  # layers, width, heads
GPU_STEPS = 600


@measures("fs-gen", "larger-models-on-a-gpu")
def larger_models(context: Context) -> Measurement:
    """Three sizes trained alike; all pairs, and the time of speculative decoding with the smallest one."""
    from tokenry.decoding import collaborate
    from tokenry.measure import interleave

    text = english(context)
    models, logs = {}, {}
    for name, (layers, width, heads) in GPU_SIZES.items():
        models[name] = _llama(layers, width, len(text.tokenizer), heads).to(context.device)
        logs[name] = train(context, name, models[name], text.train, steps=GPU_STEPS, rows=32, length=256, lr=2e-3)
    ids = rows_of(text.held_out, PROMPTS, WIDTH, 0).to(context.device)
    pairs = _ratios(models, ids, context)
    both = all(_grows(models, pairs, method) for method in ("oracle", "contrastive"))
    smallest, *_, largest = models
    small, large = models[smallest], models[largest]

    def timed() -> dict[str, Any]:
        strategies = {k: collaborate(large, "speculative", draft_tokens=k) for k in (2, 3, 4, 5, 6, 8)}
        functions = {"large": lambda: large.generate(ids[:1], **FREE)}
        for k, strategy in strategies.items():
            functions[f"K={k}"] = lambda s=strategy: small.generate(ids[:1], custom_generate=s, **FREE)
        timings = interleave(functions, repeats=5, device=context.device)
        alone = statistics.median(timings["large"].seconds)
        return {
            f"K={k}": {
                "speed": round(alone / statistics.median(timings[f"K={k}"].seconds), 3),
                "tokens_per_pass": round(strategy.trace.total / strategy.trace.large_passes, 3),
            }
            for k, strategy in strategies.items()
        }

    speeds = context.session.step("speculative", timed)
    best = max(speeds, key=lambda k: speeds[k]["speed"])
    return Measurement(
        shows=both,
        value=round(100 * pairs[f"{smallest} + {largest}"]["oracle"]["frequency"], 2),
        sentence=f"tokens that the large model changes: {_pair_figures(pairs)} (for the smallest proposer the larger partner "
        f"must change more under both rules); speculative decoding, smallest with largest, is at best {speeds[best]['speed']:.2f} "
        f"times as fast as the large model alone ({best}, {speeds[best]['tokens_per_pass']:.2f} tokens per pass)",
        details={"pairs": pairs, "speculative": speeds, "training": logs},
    )
