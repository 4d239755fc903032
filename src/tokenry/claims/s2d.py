"""Claims of S2D, measured on the embedded models and on small ones trained here, beside drafts of one depth."""

from __future__ import annotations

import copy
import math
import statistics
from typing import TYPE_CHECKING, Any

from tokenry.assets import load_model, prompts
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import English, english, train

if TYPE_CHECKING:
    from torch import Tensor

    from tokenry.decoding import DecodingStats, SortedDraft, SortedSpeculative

NEW_TOKENS = 48
DRAFT_TOKENS = 5
STEPS = 100  # of every draft that is trained here
TARGET_STEPS = 60  # of the second target
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def _encoded(texts: list[str], device: str) -> list[Any]:
    _, tokenizer = load_model("draft")
    return [tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(device) for text in texts]


def _generate(model: Any, inputs: Any, strategy: SortedSpeculative | None = None, new: int = NEW_TOKENS) -> Tensor:
    chosen = {"custom_generate": strategy} if strategy is not None else {}
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **chosen)


def _run(model: Any, inputs: list[Any], strategy: SortedSpeculative, new: int = NEW_TOKENS) -> dict[str, Any]:
    """Counts over prompts: the target's passes, accepted length, layers of the draft."""
    from tokenry.decoding import DecodingStats

    runs: list[DecodingStats] = []
    layers, used = 0, []
    for x in inputs:
        _generate(model, x, strategy, new)
        runs.append(strategy.stats)
        layers += strategy.draft_layers
        used += [exit_ for rows in strategy.exits_used for row in rows for exit_ in row]
    total = DecodingStats.total(runs)
    return {
        "passes": total.forward_passes,
        "tokens": total.tokens,
        "mean_accepted_length": total.mean_accepted_length,
        "mean_draft_layers": statistics.fmean(used) if used else 0.0,
        "draft_layers": layers,
    }


@measures("s2d", "lossless")
def lossless(context: Context) -> Measurement:
    """Identical ids for two targets, any thresholds, chains and trees, alone and in left-padded batches."""
    import torch

    from tokenry.decoding import SortedDraft, SortedSpeculative, explain_difference

    draft = SortedDraft.from_pretrained().to(context.device)
    texts = prompts()[::4]
    inputs = _encoded(texts, context.device)
    _, tokenizer = load_model("draft")
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(context.device)
    settings: dict[str, dict[str, Any]] = {
        "shallowest": {"thresholds": (0.0, 0.0)},
        "adaptive": {"thresholds": (0.6, 0.4)},
        "deepest": {"thresholds": (1.01, 1.01)},
        "tree": {"thresholds": (0.6, 0.4), "top_k": 3},
    }

    def measured(name: str) -> dict[str, Any]:
        target, _ = load_model(name, device=context.device)
        plain = [_generate(target, x)[0] for x in inputs]
        same: dict[str, int] = {}
        different = []
        for setting, options in settings.items():
            strategy = SortedSpeculative(draft, draft_tokens=DRAFT_TOKENS, **options)
            rows = _generate(target, batch, strategy)[:, batch["input_ids"].shape[1] :]
            for i, (x, text, row) in enumerate(zip(inputs, plain, rows, strict=True)):
                new = text[x["input_ids"].shape[1] :]
                for kind, other in (
                    ("alone", _generate(target, x, strategy)[0]),
                    ("batch", torch.cat([x["input_ids"][0], row[: len(new)]])),
                ):
                    found = explain_difference(target, text.cpu(), other.cpu())
                    same[setting] = same.get(setting, 0) + (found is None)
                    if found is not None:
                        at = {"prompt": i, "setting": setting, "kind": kind, "at": found.position, "ulps": found.ulps}
                        different.append(at)
        return {"same": same, "different": different}

    found = {name: context.session.step(name, lambda n=name: measured(n)) for name in ("small", "draft")}
    same = sum(n for part in found.values() for n in part["same"].values())
    expected = len(found) * len(settings) * 2 * len(inputs)
    return Measurement(
        shows=same == expected,
        value=float(same),
        baseline=float(expected),
        sentence=f"text identical to plain greedy in {same} of {expected} cases ({len(inputs)} prompts alone and in one batch, "
        f"shallowest, adaptive and deepest exits and a tree, two targets), {NEW_TOKENS} new tokens each, float32 (must be all)",
        details={"targets": found},
    )


def _trained_drafts(context: Context, text: English) -> dict[str, SortedDraft]:
    """From one start, on the same batches: sorted, plain with three layers, plain with one."""
    from tokenry.decoding import SortedDraft

    start, _ = load_model("draft", device=context.device)
    drafts = {
        "sorted": SortedDraft.from_model(start, layers=3, exits=(1, 2, 3)),
        "plain": SortedDraft.from_model(start, layers=3, exits=(3,)),
        "one layer": SortedDraft.from_model(start, layers=1, exits=(1,)),
    }
    for name, draft in drafts.items():
        train(
            context, f"train/{name}", draft, text.train, steps=STEPS, lr=2e-3, seed=context.seed,
            loss=lambda model, batch: model.sorted_loss(batch),
        )  # fmt: skip
    return drafts


@measures("s2d", "nested-training")
def nested_training(context: Context) -> Measurement:
    """Held-out cross-entropy of every exit, sorted against plain fine-tuning with the same steps."""
    import torch
    from torch.nn.functional import cross_entropy

    from tokenry.decoding import SortedDraft

    text = english(context)
    drafts = _trained_drafts(context, text)
    windows = text.held_out[: 64 * 128].view(64, 128).to(context.device)

    def losses(draft: SortedDraft) -> list[float]:
        found = []
        with torch.no_grad():
            for rows in windows.split(16):
                every = draft.exit_logits(rows)
                found.append([cross_entropy(z[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item() for z in every])
        return [round(statistics.fmean(column), 4) for column in zip(*found, strict=True)]

    mine = context.session.step("held-out/sorted", lambda: losses(drafts["sorted"]))
    # The plain draft's own layers 1 and 2, read out as if they were exits.
    plain = context.session.step("held-out/plain", lambda: losses(SortedDraft(drafts["plain"].model, (1, 2, 3))))
    (one,) = context.session.step("held-out/one layer", lambda: losses(drafts["one layer"]))
    return Measurement(
        shows=mine[0] < plain[0] and mine[1] < plain[1],
        value=statistics.fmean(mine[:2]),
        baseline=statistics.fmean(plain[:2]),
        sentence=f"held-out nats per token after {STEPS} steps, one, two and three layers: sorted {mine[0]:.2f}, {mine[1]:.2f}, "
        f"{mine[2]:.2f}; plain {plain[0]:.2f}, {plain[1]:.2f}, {plain[2]:.2f} (sorted must be lower after one and after two); "
        f"a plain draft of one layer {one:.2f}",
        details={"sorted": mine, "plain": plain, "one_layer": one, "steps": STEPS},
    )


@measures("s2d", "adaptive-exits")
def adaptive_exits(context: Context) -> Measurement:
    """Draft layers and accepted length, adaptive against always deepest; the threshold is chosen on other prompts."""
    from tokenry.decoding import SortedDraft, SortedSpeculative

    draft = SortedDraft.from_pretrained().to(context.device)
    target, _ = load_model("small", device=context.device)
    calibration, measured = (_encoded(prompts()[i::stride], context.device) for i, stride in ((0, 8), (1, 4)))

    def run(inputs: list[Any], level: float) -> dict[str, Any]:
        return _run(target, inputs, SortedSpeculative(draft, (level, level), DRAFT_TOKENS))

    step = context.session.step
    curve = {level: step(f"calibrate/{level}", lambda x=level: run(calibration, x)) for level in (*LEVELS, 1.01)}
    # A little more than the 90 % that must hold on the other prompts.
    enough = 0.92 * curve[1.01]["mean_accepted_length"]
    good = [level for level in LEVELS if curve[level]["mean_accepted_length"] >= enough] or [max(LEVELS)]
    chosen = min(good, key=lambda level: curve[level]["mean_draft_layers"])
    mine, deepest = (step(f"measure/{x}", lambda x=x: run(measured, x)) for x in (chosen, 1.01))
    kept = mine["mean_accepted_length"] / deepest["mean_accepted_length"]
    layers = mine["mean_draft_layers"], deepest["mean_draft_layers"]
    return Measurement(
        shows=layers[0] < layers[1] and kept >= 0.9,
        value=round(layers[0], 3),
        baseline=round(layers[1], 3),
        sentence=f"{layers[0]:.2f} layers per drafted token at threshold {chosen}, {layers[1]:.2f} always deepest (must be fewer), "
        f"with {mine['mean_accepted_length']:.2f} against {deepest['mean_accepted_length']:.2f} tokens per pass, {kept:.0%} of "
        "it (must be at least 90 %); the threshold was chosen on other prompts",
        details={"adaptive": mine, "deepest": deepest, "calibration": {str(k): v for k, v in curve.items()}},
        charts=(
            {
                "type": "lines",
                "title": "Layers per drafted token and tokens per pass",
                "series": {
                    "one threshold for both exits": [
                        [v["mean_draft_layers"], v["mean_accepted_length"]] for v in curve.values()
                    ]
                },
                "x_title": "layers per drafted token",
                "y_title": "tokens per pass of the target",
                "log_x": False,
                "log_y": False,
            },
        ),
    )


def _speeds(
    target: Any, inputs: list[Any], strategies: dict[str, SortedSpeculative], new: int, repeats: int, device: str
) -> dict[str, list[float]]:
    """Speed of each strategy in multiples of stock greedy generate, per turn."""
    from tokenry.measure import interleave

    calls = {"stock": lambda: [_generate(target, x, None, new) for x in inputs]}
    for name, strategy in strategies.items():
        calls[name] = lambda s=strategy: [_generate(target, x, s, new) for x in inputs]
    timings = interleave(calls, repeats=repeats, device=device)
    stock = timings["stock"].seconds
    return {n: [round(p / s, 4) for p, s in zip(stock, timings[n].seconds, strict=True)] for n in strategies}


@measures("s2d", "never-slower")
def never_slower(context: Context) -> Measurement:
    """Wall-clock ratio of the tuned setting to stock greedy generate, for two targets, batch 1 and 8."""
    from tokenry.decoding import SortedDraft, tune

    draft = SortedDraft.from_pretrained().to(context.device)
    _, tokenizer = load_model("draft")

    def measured(name: str, rows: int) -> dict[str, Any]:
        target, _ = load_model(name, device=context.device)
        texts, others = prompts()[::5], prompts()[2::5]  # eight each
        if rows == 1:
            inputs, calibration = (_encoded(some[::2], context.device) for some in (texts, others))
        else:
            options = {"return_tensors": "pt", "padding": True, "return_token_type_ids": False}
            inputs, calibration = ([tokenizer(t, **options).to(context.device)] for t in (texts, others))
        best = tune(draft, target, calibration, new_tokens=32, shortlist=3, repeats=3)
        ratios = _speeds(target, inputs, {"tuned": best.strategy()}, NEW_TOKENS, 5, context.device)["tuned"]
        return {
            "ratio": statistics.median(ratios),
            "all": ratios,
            "thresholds": best.thresholds,
            "draft_tokens": best.draft_tokens,
            "table": best.table,
        }

    parts = {
        f"{name}, {'alone' if rows == 1 else f'batch of {rows}'}": context.session.step(
            f"{name}/{rows}", lambda n=name, r=rows: measured(n, r)
        )
        for name in ("small", "draft")
        for rows in (1, 8)
    }
    worst = min(part["ratio"] for part in parts.values())
    return Measurement(
        shows=worst >= 0.95,
        value=round(worst, 3),
        baseline=1.0,
        spread=round(statistics.stdev(parts["small, alone"]["all"]), 3),
        sentence="speed of the tuned setting in multiples of stock greedy generate: "
        + ", ".join(
            f"{name} {part['ratio']:.2f} ({part['draft_tokens'] or 'nothing'} drafted)" for name, part in parts.items()
        )
        + " (none may be below 0.95)",
        details={"parts": parts},
    )


@measures("s2d", "several-targets")
def several_targets(context: Context) -> Measurement:
    """One sorted draft against one draft of a single depth, for two targets, each tuned for each target.

    Every draft must draft, also where no drafting would be faster: drafts are compared here, ``never-slower`` the rest.
    """
    import torch

    from tokenry.decoding import SortedDraft, tune

    text = english(context)
    drafts = _trained_drafts(context, text)
    large, _ = load_model("small", device=context.device)
    smaller = copy.deepcopy(SortedDraft.from_model(large, layers=4, exits=(4,)).model)
    train(context, "train/target", smaller, text.train, steps=TARGET_STEPS, lr=1e-3, seed=context.seed)
    targets = {"six layers": large, "four layers": smaller}
    english_prompts = _encoded(prompts()[:20], context.device)
    calibration, inputs = english_prompts[:4], english_prompts[4::4]
    before = {name: [w.sum().item() for w in target.parameters()] for name, target in targets.items()}

    def measured(name: str) -> dict[str, Any]:
        target = targets[name]
        best = {
            kind: tune(draft, target, calibration, new_tokens=40, shortlist=3, repeats=3, always_draft=True)
            for kind, draft in drafts.items()
        }
        strategies = {kind: found.strategy() for kind, found in best.items()}
        identical = all(
            torch.equal(_generate(target, x), _generate(target, x, s)) for x in inputs for s in strategies.values()
        )
        speeds = _speeds(target, inputs, strategies, NEW_TOKENS, 5, context.device)
        return {
            "identical": identical,
            "speed": {kind: statistics.median(found) for kind, found in speeds.items()},
            "all": speeds,
            "setting": {kind: [list(found.thresholds), found.draft_tokens] for kind, found in best.items()},
            "counts": {kind: _run(target, inputs, s) for kind, s in strategies.items()},
            "tables": {kind: found.table for kind, found in best.items()},
        }

    parts = {name: context.session.step(f"target/{name}", lambda n=name: measured(n)) for name in targets}
    unchanged = all([w.sum().item() for w in target.parameters()] == before[name] for name, target in targets.items())
    mean = {
        kind: math.exp(statistics.fmean(math.log(part["speed"][kind]) for part in parts.values())) for kind in drafts
    }
    single = max(("plain", "one layer"), key=mean.__getitem__)
    value = mean["sorted"] / mean[single]
    settings = {name: part["setting"]["sorted"] for name, part in parts.items()}
    differ = len({str(setting) for setting in settings.values()}) > 1
    return Measurement(
        shows=value > 1 and unchanged and all(part["identical"] for part in parts.values()),
        value=round(value, 3),
        baseline=1.0,
        spread=round(
            statistics.stdev(
                a / b
                for part in parts.values()
                for a, b in zip(part["all"]["sorted"], part["all"][single], strict=True)
            ),
            3,
        ),
        sentence=f"one sorted draft for both targets is {value:.2f} times as fast as the better single-exit draft ({single}; must "
        "be above 1), text identical and targets unchanged; speed in multiples of stock greedy generate, all made to draft: "
        + "; ".join(
            f"target of {name}: "
            + ", ".join(f"{kind} {speed:.2f}" for kind, speed in part["speed"].items())
            + f" (sorted: thresholds {tuple(part['setting']['sorted'][0])}, {part['setting']['sorted'][1]} tokens)"
            for name, part in parts.items()
        )
        + f". The best settings {'differ' if differ else 'do not differ'} between the targets",
        details={"targets": parts, "geometric_means": mean, "settings_differ": differ, "targets_unchanged": unchanged},
    )
