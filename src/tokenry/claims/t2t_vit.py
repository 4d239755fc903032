"""Measurements of T2T-ViT, its tokenizer and the performer."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import accuracy_chart, count_against, paired_difference, setting, train_networks

SEEDS = 3
EPOCHS = 4
DRAWS = 3000
WIDTH = 64
SIDES = (64, 96, 224, 384)
TOKENS = (1024, 2304, 4096, 9216)  # (H/4)^2 for images of 128, 192, 256 and 384 pixels
COUNTS = {
    "t2t_vit_7": (4_310_222, 1.15),
    "t2t_vit_10": (5_889_230, 1.52),
    "t2t_vit_12": (6_941_902, 1.76),
    "t2t_vit_14": (21_545_550, 4.78),
    "t2t_vit_19": (39_177_422, 8.48),
    "t2t_vit_24": (64_105_934, 13.66),
    "t2t_vit_t_14": (21_541_070, 6.09),
    "t2t_vit_t_19": (39_172_942, 9.78),
    "t2t_vit_t_24": (64_101_454, 14.97),
    "t2t_vit_14_resnext": (21_545_550, 4.78),
    "t2t_vit_14_wide": (25_156_302, 5.23),
}


@measures("t2t-vit", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of all variants."""
    equal, text, found = count_against(context, COUNTS)
    return Measurement(
        shows=equal,
        value=found["t2t_vit_14"]["params"] / 1e6,
        sentence=f"{text}; parameters must be equal, multiply-accumulates within 1 % of the authors' code",
        details=found,
    )


@measures("t2t-vit", "half-of-vit")
def half_of_vit(context: Context) -> Measurement:
    """T2T-ViT-14 beside the plain ViT that the paper compares it with: 768 channels, 8 blocks, hidden width 3 x 768."""
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    def count(name: str) -> dict[str, float]:
        vit = partial(VisionTransformer, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False)
        model = (vit() if name == "ViT-S/16" else timm.create_model(name)).eval()
        params = sum(p.numel() for p in model.parameters())
        return {"params": params, "macs": count_macs(model, torch.zeros(1, 3, 224, 224))}

    ours, vit = (context.session.step(f"count/{name}", partial(count, name)) for name in ("t2t_vit_14", "ViT-S/16"))
    params, macs = ours["params"] / vit["params"], ours["macs"] / vit["macs"]
    return Measurement(
        shows=params <= 0.5 and macs <= 0.5,
        value=round(params, 3),
        baseline=1.0,
        sentence=f"t2t_vit_14 has {ours['params'] / 1e6:.1f} M parameters and {ours['macs'] / 1e9:.2f} G multiply-accumulates, "
        f"the paper's ViT-S/16 {vit['params'] / 1e6:.1f} M and {vit['macs'] / 1e9:.2f} G: {params:.2f} and {macs:.2f} of it "
        "(both must be at most 0.5)",
        details={"t2t_vit_14": ours, "vit": vit},
    )


@measures("t2t-vit", "estimator")
def estimator(context: Context) -> Measurement:
    """Mean product of the performer's features over many draws of the random rows, beside the two kernels."""
    import torch

    from tokenry.mixers.performer import orthogonal_rows, positive_features

    generator = torch.Generator().manual_seed(context.seed)
    q, k = (0.08 * torch.randn(WIDTH, generator=generator) for _ in range(2))
    kernels = {
        "gaussian": torch.exp(-(q - k).square().sum() / 4).item(),  # exp(-|q - k|^2 / 4)
        "softmax": torch.exp(q @ k).item(),
    }
    half = WIDTH // 2
    # random rows, gain, kernel that the mean must be
    cases = {
        "released rows, ratio 0.5": (half, math.sqrt(half), "gaussian"),
        "released rows, ratio 1": (WIDTH, math.sqrt(WIDTH), "softmax"),
        "released rows, ratio 2": (2 * WIDTH, math.sqrt(2 * WIDTH), "softmax"),
        "default rows, ratio 0.5": (half, math.sqrt(WIDTH), "softmax"),
    }

    def mean(features: int, gain: float) -> float:
        rows = (orthogonal_rows(features, WIDTH, gain, generator) for _ in range(DRAWS))
        return statistics.mean(float(positive_features(q, w) @ positive_features(k, w)) for w in rows)

    found = {name: context.session.step(name, partial(mean, *case[:2])) for name, case in cases.items()}
    errors = {name: abs(found[name] / kernels[case[2]] - 1) for name, case in cases.items()}
    text = ", ".join(f"{name}: {found[name]:.4f} ({case[2]})" for name, case in cases.items())
    first = "released rows, ratio 0.5"
    return Measurement(
        shows=max(errors.values()) < 0.01 and abs(kernels["softmax"] / kernels["gaussian"] - 1) > 0.05,
        value=round(found[first], 4),
        baseline=round(kernels["softmax"], 4),
        sentence=f"mean over {DRAWS} draws, d = {WIDTH}; exp(-|q-k|^2/4) is {kernels['gaussian']:.4f}, exp(q k) "
        f"{kernels['softmax']:.4f}; {text} (each must be within 1 % of the kernel named, and the two kernels 5 % apart)",
        details={"means": found, "kernels": kernels, "errors": errors},
    )


@measures("t2t-vit", "token-counts")
def token_counts(context: Context) -> Measurement:
    """Tokens of every step of the tokenizer, and what neighbouring windows share."""
    import torch

    from tokenry.vision.tokens_to_token import TokensToToken, soft_split

    tokens = TokensToToken(embed_dim=8, token_dim=8).eval()
    seen: list[int] = []
    for transformer in tokens.transformers:
        transformer.register_forward_hook(lambda module, given, y: seen.append(y.shape[1]))
    rows: dict[int, list[int]] = {}
    for side in SIDES:
        seen.clear()
        with torch.inference_mode():
            last = tokens(torch.zeros(1, 3, side, side)).shape[1]
        rows[side] = [*seen, last]
    windows = soft_split(torch.arange(24.0 * 24).view(1, 1, 24, 24) + 1, 7, 4)[0]
    inner, right = windows[2 * 6 + 2], windows[2 * 6 + 3]  # 6 x 6 windows: two neighbours off the edge
    shared = len(set(inner.tolist()) & set(right.tolist()))
    equal = all(row == [side**2 // part**2 for part in (4, 8, 16)] for side, row in rows.items())
    return Measurement(
        shows=equal and shared == 3 * 7,
        value=float(rows[224][-1]),
        sentence="; ".join(f"{side} pixels: {', '.join(map(str, row))} tokens" for side, row in rows.items())
        + f" (must be (H/4)^2, (H/8)^2, (H/16)^2); neighbouring windows of the first split share {shared} pixels (must be 3 "
        "columns of 7)",
        details={str(side): row for side, row in rows.items()},
    )


@measures("t2t-vit", "linear")
def linear(context: Context) -> Measurement:
    """Time of the two kinds of transformer in the tokenizer over the number of tokens."""
    import torch

    from tokenry.measure import fit_exponent, interleave
    from tokenry.vision.tokens_to_token import KINDS

    def times(count: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        blocks = {kind: make(147, 64).to(context.device).eval() for kind, make in KINDS.items()}
        x = torch.randn(1, count, 147, device=context.device)
        with torch.inference_mode():
            measured = interleave(
                {kind: partial(block, x) for kind, block in blocks.items()},
                repeats=5,
                device=context.device,
                min_seconds=0.02,
            )
        return {kind: timing.median for kind, timing in measured.items()}

    rows = [context.session.step(f"tokens{count}", partial(times, count)) for count in TOKENS]
    exponents = {kind: fit_exponent(TOKENS, [row[kind] for row in rows]) for kind in rows[0]}
    ratio = rows[-1]["transformer"] / rows[-1]["performer"]
    return Measurement(
        shows=exponents["performer"] < 1.25 and exponents["transformer"] > 1.5,
        value=round(exponents["performer"], 2),
        baseline=round(exponents["transformer"], 2),
        sentence=f"time of the first transformer grows as N^{exponents['performer']:.2f} for performers (must be below 1.25) "
        f"and N^{exponents['transformer']:.2f} for softmax attention (must be above 1.5); with the {TOKENS[-1]:,} tokens of "
        f"384 pixels the performer takes {ratio:.1f} times less",
        details={"tokens": list(TOKENS), "seconds": rows},
    )


@measures("t2t-vit", "patches-or-tokens")
def patches_or_tokens(context: Context) -> Measurement:
    """One small ViT on plain patches of 4x4 pixels and on tokens of two overlapping splits, 64 tokens each."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    from tokenry.vision.tokens_to_token import TokensToToken

    overlapping = partial(TokensToToken, kind="transformer", token_dim=16, splits=((3, 2), (3, 2)))
    vit = partial(
        VisionTransformer, 32, 4, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0, qkv_bias=False, num_classes=10
    )
    networks: dict[str, Any] = {
        "plain patches": partial(vit, embed_layer=PatchEmbed),
        "T2T tokens": partial(vit, embed_layer=overlapping),
    }
    sizes = {name: sum(p.numel() for p in make(device="meta").parameters()) for name, make in networks.items()}
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    means = {name: statistics.mean(values) for name, values in found.items()}
    difference, error = paired_difference(found["T2T tokens"], found["plain patches"])
    return Measurement(
        shows=min(means.values()) > 20,
        value=round(means["T2T tokens"], 2),
        baseline=round(means["plain patches"], 2),
        spread=round(statistics.stdev(found["T2T tokens"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: "
        + ", ".join(f"{name} {mean:.1f} % ({sizes[name]:,} parameters)" for name, mean in means.items())
        + f" (both must exceed 20 %, twice chance); T2T tokens over plain patches {difference:+.1f} +- {error:.1f} points, "
        "reported and not judged: the paper's gain is that of ImageNet at 224 pixels",
        details=found,
        charts=(accuracy_chart(found, "plain patches"),),
    )


@measures("t2t-vit", "gpu-384")
def gpu_384(context: Context) -> Measurement:
    """A training step of T2T-ViT-14 with performers and with softmax attention in the tokenizer, at 384 pixels."""
    import timm
    import torch
    from torch import nn

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave, peak_extra_memory

    def costs() -> dict[str, dict[str, float]]:
        x = torch.randn(16, 3, 384, 384, device=context.device)

        def step(model: nn.Module) -> None:
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()

        models = {
            name: timm.create_model(name, img_size=384).to(context.device) for name in ("t2t_vit_14", "t2t_vit_t_14")
        }
        calls = {name: partial(step, model.train()) for name, model in models.items()}
        times = interleave(calls, repeats=7, warmup=2, device=context.device)
        return {
            name: {"seconds": times[name].median, "bytes": peak_extra_memory(call, device=context.device)}
            for name, call in calls.items()
        }

    found = context.session.step("costs", costs)
    ratio = found["t2t_vit_t_14"]["seconds"] / found["t2t_vit_14"]["seconds"]
    text = ", ".join(
        f"{name} {1e3 * c['seconds']:.0f} ms and {c['bytes'] / 2**30:.1f} GiB" for name, c in found.items()
    )
    return Measurement(
        shows=ratio > 1,
        value=round(ratio, 2),
        baseline=1.0,
        sentence=f"training step of 16 images of 384 pixels in bfloat16: {text} (the performer kind must take less time)",
        details=found,
    )
