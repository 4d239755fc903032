"""Measurements of semantic tokens: STViT-R on Swin, and the derived form for plain transformers."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import accuracy_chart, paired_difference, setting, train_networks

if TYPE_CHECKING:
    import torch
    from torch import nn

# Variant: the authors' parameters, and billions of multiply-accumulates that their code takes at 224 x 224.
COST = {"stvit_r_swin_small": (49_625_518, 5.799), "stvit_r_swin_base": (87_812_336, 10.23)}
# Per unit of the third stage, the authors' code makes keys and values of 436 tokens, this one of 232.
SHARED_TOKENS = 436 - 232
DETECTION_SIZE = (800, 1216)  # the short side of 800 of COCO's usual settings, the long one a multiple of 32
SWIN_S: dict[str, Any] = {"embed_dim": 96, "num_heads": (3, 6, 12, 24)}
SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 4, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
TRAINED: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 6, "full_depth": 2, "mlp_ratio": 2.0,
    "num_classes": 10,
}  # fmt: skip
KINDS = ("semantic", "full", "pooled", "random")
SEEDS = 3
EPOCHS = 4
MARGIN = 1.0  # points that semantic tokens may lose to all tokens


@measures("stvit-r", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of both Swin forms."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, tuple[int, float, float]] = {}
    for name in COST:
        model: Any = timm.create_model(name, device="meta").eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) / 1e9
        dim, units = model.stages[2].blocks[0].recover.norm1.weight.shape[0], len(model.stages[2].blocks)
        found[name] = sum(p.numel() for p in model.parameters()), macs, units * SHARED_TOKENS * 2 * dim**2 / 1e9
    text = "; ".join(
        f"{name} {found[name][0]:,} parameters (the authors' code {params:,}), {found[name][1]:.2f} G and {found[name][2]:.2f} G "
        f"saved by making keys and values once per token (the authors' code {macs} G)"
        for name, (params, macs) in COST.items()
    )
    return Measurement(
        shows=all(
            found[n][0] == params and abs((found[n][1] + found[n][2]) / macs - 1) < 0.01
            for n, (params, macs) in COST.items()
        ),
        value=round(found["stvit_r_swin_small"][1], 2),
        sentence=f"{text}; parameters must be equal, multiply-accumulates with the saved ones within 1 %",
        details={name: {"params": p, "macs_g": m, "saved_g": s} for name, (p, m, s) in found.items()},
    )


def _plain(kind: str, **settings: Any) -> nn.Module:
    """The plain form, or the same layers on all tokens, on pooled or on randomly kept ones: 16 of them."""
    import torch
    from torch import nn

    from tokenry.vision.stvit_deit import STViTDeiT, TokenStage

    class RandomTokens(nn.Module):
        """16 positions of the map, others at every training step."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            generator = None if self.training else torch.Generator().manual_seed(0)
            keep = torch.randperm(x.shape[2] * x.shape[3], generator=generator)[:16].to(x.device)
            return x.flatten(2)[:, :, keep].unflatten(2, (4, 4))

    net: Any = STViTDeiT(**settings)
    if kind == "semantic":
        return net
    # two ordinary layers, initialised as the others, where semantic tokens are made
    donor_settings: dict[str, Any] = {**settings, "full_depth": 2, "depth": 5}
    donor: Any = STViTDeiT(**donor_settings)
    reduce = {"full": nn.Identity, "pooled": lambda: nn.AdaptiveAvgPool2d(4), "random": RandomTokens}[kind]
    net.stages[1] = TokenStage(reduce(), donor.stages[0].blocks)
    return net


def _speed(context: Context, models: dict[str, nn.Module], batch: int, side: int) -> dict[str, dict[str, float]]:
    """Seconds per image and multiply-accumulates of two models, turn by turn."""
    import torch

    from tokenry.measure import count_macs, interleave

    x = torch.randn(batch, 3, side, side, device=context.device)
    moved = {name: model.to(context.device).eval() for name, model in models.items()}
    with torch.inference_mode():
        times = interleave(
            {name: partial(model, x) for name, model in moved.items()}, repeats=5, warmup=1, device=context.device
        )
    return {
        name: {"seconds": times[name].median / batch, "macs": count_macs(model, x[:1])} for name, model in moved.items()
    }


@measures("stvit-r", "plain-speed")
def plain_speed(context: Context) -> Measurement:
    """DeiT-Ti with 16 semantic tokens beside timm's, and a small transformer on 256 tokens beside the same on all of them."""

    def deit() -> dict[str, dict[str, float]]:
        import timm
        import torch

        torch.manual_seed(context.seed)
        names = {"semantic": "stvit_deit_tiny", "full": "deit_tiny_patch16_224"}
        return _speed(context, {kind: timm.create_model(name) for kind, name in names.items()}, 8, 224)

    def small() -> dict[str, dict[str, float]]:
        import torch

        torch.manual_seed(context.seed)
        return _speed(context, {kind: _plain(kind, **SMALL) for kind in ("semantic", "full")}, 16, 64)

    rows = {"DeiT-Ti at 224x224": context.session.step("deit", deit)}
    rows["12 layers of 96 channels on 256 tokens"] = context.session.step("small", small)
    ratios = {name: row["full"]["seconds"] / row["semantic"]["seconds"] for name, row in rows.items()}
    saved = {name: 100 * (1 - row["semantic"]["macs"] / row["full"]["macs"]) for name, row in rows.items()}
    text = ", ".join(
        f"{name} {ratio:.2f} times the images per second, {saved[name]:.0f} % fewer multiply-accumulates"
        for name, ratio in ratios.items()
    )
    return Measurement(
        shows=all(ratio >= 2 for ratio in ratios.values()) and all(share >= 55 for share in saved.values()),
        value=round(ratios["DeiT-Ti at 224x224"], 2),
        baseline=1.0,
        sentence=f"16 semantic tokens: {text} (must be at least 2 times and at least 55 %)",
        details=rows,
    )


@measures("stvit-r", "plain-accuracy")
def plain_accuracy(context: Context) -> Measurement:
    """One small transformer with 16 semantic tokens, all 64, 16 pooled, and 16 random ones."""
    import torch

    from tokenry.measure import count_macs

    networks = {kind: partial(_plain, kind, **TRAINED) for kind in KINDS}
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    macs = {kind: count_macs(make().eval(), torch.zeros(1, 3, 32, 32)) / 1e6 for kind, make in networks.items()}
    against = {kind: paired_difference(found["semantic"], found[kind]) for kind in KINDS[1:]}
    means = {kind: statistics.mean(values) for kind, values in found.items()}
    loss, error = against["full"]
    return Measurement(
        shows=loss >= -MARGIN - error and all(against[kind][0] > against[kind][1] for kind in ("pooled", "random")),
        value=round(means["semantic"], 2),
        baseline=round(means["full"], 2),
        spread=round(statistics.stdev(found["semantic"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}, 6 layers, accuracy (multiply-accumulates): "
        + ", ".join(f"{kind} {mean:.1f} % ({macs[kind]:.1f} M)" for kind, mean in means.items())
        + "; semantic tokens "
        + ", ".join(f"{change:+.1f} +- {error:.1f} to {kind}" for kind, (change, error) in against.items())
        + " points (may lose 1 point and a standard error to all tokens, must gain more than that error on the others)",
        details={"accuracy": found, "macs_m": macs},
        charts=(accuracy_chart(found, "full"),),
    )


def _swin_pair() -> dict[str, nn.Module]:
    """STViT-R of Swin-S's size, and the same network with 18 Swin blocks as its third stage."""
    from tokenry.layers import SwinBlock
    from tokenry.vision.stvit_r import STViTR, SwinStage

    semantic: Any = STViTR(**SWIN_S)
    swin: Any = STViTR(**SWIN_S)
    blocks = [SwinBlock(384, 12, shift=3 * (i % 2)) for i in range(18)]
    swin.stages[2] = SwinStage(swin.stages[2].downsample, blocks)
    return {"semantic": semantic, "swin": swin}


@measures("stvit-r", "swin-cost")
def swin_cost(context: Context) -> Measurement:
    """Multiply-accumulates and time of STViT-R beside Swin-S, of the whole network and of the third stage."""
    import torch

    def run() -> dict[str, dict[str, float]]:
        from tokenry.measure import count_macs, interleave

        torch.manual_seed(context.seed)
        models: dict[str, Any] = {name: model.to(context.device).eval() for name, model in _swin_pair().items()}
        x = torch.randn(2, 3, 224, 224, device=context.device)
        with torch.inference_mode():
            maps = {name: model.stages[1](model.stages[0](model.stem(x))) for name, model in models.items()}
            calls: dict[str, Any] = {name: partial(model, x) for name, model in models.items()}
            calls |= {f"{name} stage 3": partial(model.stages[2], maps[name]) for name, model in models.items()}
            times = interleave(calls, repeats=7, warmup=1, device=context.device)
        macs = {name: count_macs(model, x[:1]) for name, model in models.items()}
        macs |= {f"{name} stage 3": count_macs(model.stages[2], maps[name][:1]) for name, model in models.items()}
        return {name: {"seconds": times[name].median, "macs": macs[name]} for name in calls}

    rows = context.session.step("swin", run)

    def compared(part: str) -> tuple[float, float]:
        ours, theirs = rows[f"semantic{part}"], rows[f"swin{part}"]
        return theirs["seconds"] / ours["seconds"], 100 * (1 - ours["macs"] / theirs["macs"])

    (ratio, saved), (stage_ratio, stage_saved) = compared(""), compared(" stage 3")
    return Measurement(
        shows=saved > 30 and ratio >= 1.2,
        value=round(saved, 1),
        baseline=0.0,
        sentence=f"STViT-R beside Swin-S, batch 2 at 224x224: {saved:.1f} % fewer multiply-accumulates and {ratio:.2f} times the "
        f"speed (must be more than 30 % and at least 1.2 times); the third stage alone {stage_saved:.1f} % fewer and "
        f"{stage_ratio:.2f} times",
        details=rows,
    )


@measures("stvit-r", "detection-cost")
def detection_cost(context: Context) -> Measurement:
    """Multiply-accumulates of the dense form beside the same network with Swin's third stage, at a detector's size."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.layers import SwinBlock
    from tokenry.measure import count_macs
    from tokenry.vision.stvit_r import SwinStage

    height, width = DETECTION_SIZE
    x = torch.zeros(1, 3, height, width, device="meta")
    rows: dict[str, dict[str, float]] = {}
    for name in COST:
        semantic: Any = timm.create_model(f"{name}_dense", device="meta").eval()
        swin: Any = timm.create_model(f"{name}_dense", device="meta").eval()
        attention = swin.stages[2].blocks[0].among.attn
        dim, heads = attention.q.in_features, attention.num_heads
        blocks = [SwinBlock(dim, heads, shift=3 * (i % 2), device="meta") for i in range(18)]
        swin.stages[2] = SwinStage(swin.stages[2].downsample, blocks)
        rows[name] = {"semantic_g": count_macs(semantic, x) / 1e9, "swin_g": count_macs(swin, x) / 1e9}
    saved = {name: 100 * (1 - row["semantic_g"] / row["swin_g"]) for name, row in rows.items()}
    return Measurement(
        shows=all(share > 30 for share in saved.values()),
        value=round(saved["stvit_r_swin_small"], 1),
        baseline=0.0,
        sentence=f"One image of {height}x{width}: "
        + "; ".join(
            f"{name}_dense {row['semantic_g']:.1f} G multiply-accumulates, with Swin blocks in the third stage "
            f"{row['swin_g']:.1f} G, {saved[name]:.1f} % fewer"
            for name, row in rows.items()
        )
        + " (both must be more than 30 %)",
        details=rows,
    )


@measures("stvit-r", "gpu-throughput")
def gpu_throughput(context: Context) -> Measurement:
    """Images per second in bfloat16 at batch 256, of DeiT-S and Swin-S with and without semantic tokens."""
    import timm
    import torch

    from tokenry.measure import interleave

    def run() -> dict[str, float]:
        torch.manual_seed(context.seed)
        deit = {"deit semantic": "stvit_deit_small", "deit full": "deit_small_patch16_224"}
        models = {name: timm.create_model(model) for name, model in deit.items()}
        models |= {
            f"swin {name}": model for name, model in zip(("semantic", "full"), _swin_pair().values(), strict=True)
        }
        moved = {name: model.to(context.device, torch.bfloat16).eval() for name, model in models.items()}
        x = torch.randn(256, 3, 224, 224, device=context.device, dtype=torch.bfloat16)
        with torch.inference_mode():
            times = interleave(
                {name: partial(model, x) for name, model in moved.items()}, repeats=9, warmup=3, device=context.device
            )
        return {name: 256 / timing.median for name, timing in times.items()}

    import tokenry.vision  # noqa: F401  registers the models

    rates = context.session.step("rates", run)
    deit, swin = (rates[f"{name} semantic"] / rates[f"{name} full"] for name in ("deit", "swin"))
    return Measurement(
        shows=deit >= 2 and swin >= 1.2,
        value=round(deit, 2),
        baseline=1.0,
        sentence=f"bfloat16, batch 256 at 224x224: DeiT-S {deit:.2f} times and Swin-S {swin:.2f} times the images per second with "
        "semantic tokens (must be at least 2 and at least 1.2 times)",
        details=rates,
    )
