"""Measurements of aggregated attention, the convolutional GLU and TransNeXt."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, setting, train_networks

SEEDS = 3
EPOCHS = 6
DIMS = (32, 64)
# Variant: the paper's millions of parameters, billions of multiply-accumulates, and the side they are counted at.
PAPER_COST = {
    "transnext_micro": (12.8, 2.7, 224),
    "transnext_tiny": (28.2, 5.7, 224),
    "transnext_small": (49.7, 10.3, 224),
    "transnext_base": (89.7, 18.4, 224),
    "transnext_micro_aaaa": (13.1, 3.3, 256),
}
SIDES = (224, 896, 1792)


def _macs(name: str, side: int, **kwargs: Any) -> float:
    """Billions of multiply-accumulates, the products with neighbours included; nothing is computed."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs
    from tokenry.mixers import AggregatedAttention

    model: Any = timm.create_model(name, device="meta", **kwargs).eval()
    counted = count_macs(model, torch.zeros(1, 3, side, side, device="meta"))
    for index, stage in enumerate(model.stages):
        for block in stage.blocks:
            if isinstance(block.attn, AggregatedAttention):
                counted += 2 * block.attn.window_size**2 * block.attn.dim * (side // (4 << index)) ** 2
    return counted / 1e9


@measures("transnext", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the published variants, and parameters beside ConvNeXt-B."""
    import timm

    import tokenry.vision  # noqa: F401  registers the models

    def params(name: str) -> float:
        return sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) / 1e6

    found = {name: (params(name), _macs(name, side)) for name, (_, _, side) in PAPER_COST.items()}
    near = all(
        abs(found[name][0] - paper) <= 0.1 and abs(found[name][1] - macs) <= 0.1
        for name, (paper, macs, _) in PAPER_COST.items()
    )
    text = ", ".join(
        f"{name} {found[name][0]:.2f} M and {found[name][1]:.2f} G (paper {paper} M, {macs} G)"
        for name, (paper, macs, _) in PAPER_COST.items()
    )
    fewer = 100 * (1 - found["transnext_tiny"][0] / params("convnext_base"))
    return Measurement(
        shows=near,
        value=round(found["transnext_tiny"][0], 3),
        sentence=f"{text}; parameters must be within 0.1 M and multiply-accumulates within 0.1 G of the paper. Tiny has "
        f"{fewer:.1f} % fewer parameters than timm's convnext_base (the paper says 69 %)",
        details={name: {"params_m": p, "macs_g": m} for name, (p, m) in found.items()} | {"fewer_percent": fewer},
    )


@measures("transnext", "whole-field")
def whole_field(context: Context) -> Measurement:
    """How much of the map the middle position sees after one mixer, beside attention in windows of 7x7."""
    import torch

    from tokenry.mixers import create_mixer

    def seen(name: str, seed: int, **kwargs: Any) -> float:
        torch.manual_seed(seed)
        mixer = create_mixer(name, 48, layout="NCHW", **kwargs).to(context.device)
        x = torch.randn(1, 48, 28, 28, device=context.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(mixer(x)[0, :, 14, 14].sum(), x)
        return 100 * (gradient.abs().amax(1) > 0).float().mean().item()

    seeds = [context.seed + i for i in range(SEEDS)]
    ours = [seen("aggregated_attention", s) for s in seeds]
    windows = [seen("window_attention", s) for s in seeds]
    return Measurement(
        shows=min(ours) == 100.0 and max(windows) < 10.0,
        value=min(ours),
        baseline=round(max(windows), 2),
        sentence=f"the middle of a 28x28 map depends on {min(ours):.0f} % of it after one aggregated attention (9 neighbours and "
        f"49 pooled positions), on {max(windows):.2f} % after attention in windows of 7x7 (must be all, and less than 10 %)",
        details={"aggregated": ours, "window": windows},
    )


@measures("transnext", "linear-inference")
def linear_inference(context: Context) -> Measurement:
    """Growth of the multiply-accumulates of TransNeXt-Micro with and without a fixed pool."""
    from tokenry.measure import fit_exponent

    pixels = [side**2 for side in SIDES]
    # A stage that attends to everything (the last one) would stay quadratic: the form that aggregates in all four.
    costs = {pool: [_macs("transnext_micro_aaaa", side, fixed_pool_size=pool) for side in SIDES] for pool in (None, 6)}
    free, fixed = (fit_exponent(pixels, costs[pool]) for pool in (None, 6))
    return Measurement(
        shows=abs(fixed - 1.0) <= 0.02 < free - 1.0,
        value=round(fixed, 3),
        baseline=round(free, 3),
        sentence=f"transnext_micro_aaaa, 224 to 1792 pixels: multiply-accumulates grow as pixels^{fixed:.3f} with pools fixed at "
        f"6x6, as pixels^{free:.3f} without (must be within 0.02 of 1, and more than that above 1)",
        details={"sides": list(SIDES), "fixed_g": costs[6], "free_g": costs[None]},
    )


@measures("transnext", "sliding-window")
def sliding_window(context: Context) -> Measurement:
    """The op beside its definition: results, gradients, time of both passes, memory kept between them."""
    import torch

    from tokenry.kernels import window_scores, window_sum
    from tokenry.kernels.sliding_window import unfolded_scores, unfolded_sum
    from tokenry.measure import interleave

    def compare(window: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        leaves = [torch.randn(2, 3, 24, 56, 56, device=context.device, requires_grad=True) for _ in range(3)]

        def run(scores: Callable[..., Any], weighted: Callable[..., Any]) -> list[Any]:
            q, k, v = leaves
            y = weighted(scores(q, k, window).softmax(2), v, window)
            return [y, *torch.autograd.grad(y.square().sum(), leaves)]

        def kept(scores: Callable[..., Any], weighted: Callable[..., Any]) -> int:
            seen: dict[int, int] = {}

            def note(x: Any) -> Any:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                run(scores, weighted)
            return sum(seen.values())

        ours, theirs = (window_scores, window_sum), (unfolded_scores, unfolded_sum)
        pairs = zip(run(*ours), run(*theirs), strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        times = interleave(
            {"ours": lambda: run(*ours), "unfolded": lambda: run(*theirs)}, repeats=5, device=context.device
        )
        return {
            "error": error,
            "speed": times["unfolded"].median / times["ours"].median,
            "memory": kept(*theirs) / kept(*ours),
        }

    rows = {window: context.session.step(f"window{window}", lambda w=window: compare(w)) for window in (3, 5)}
    text = ", ".join(
        f"window {w}: {row['speed']:.1f} times the speed, {row['memory']:.1f} times less kept"
        for w, row in rows.items()
    )
    worst = max(row["error"] for row in rows.values())
    return Measurement(
        shows=worst <= 1e-4 and all(row["speed"] > 1.0 and row["memory"] > 2.0 for row in rows.values()),
        value=round(rows[3]["speed"], 2),
        baseline=1.0,
        sentence=f"{text} than with unfolded neighbours, forward and backward; results and gradients differ by {worst:.1e} (must "
        "be faster, keep less than half, and differ by at most 1e-4)",
        details={str(w): row for w, row in rows.items()},
    )


@measures("transnext", "throughput")
def throughput(context: Context) -> Measurement:
    """Aggregated attention on a GPU: the fused op beside the form with unfolded neighbours."""
    import torch

    from tokenry.claims.registry import NotRunnable
    from tokenry.kernels import window_scores, window_sum
    from tokenry.kernels.sliding_window import unfolded_scores, unfolded_sum
    from tokenry.measure import interleave

    if not context.device.startswith("cuda"):
        raise NotRunnable("needs a CUDA device: run with --device cuda")

    def compare(side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        leaves = [
            torch.randn(16, 3, 24, side, side, device=context.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]

        def run(scores: Callable[..., Any], weighted: Callable[..., Any]) -> None:
            q, k, v = leaves
            y = weighted(scores(q, k, 3).softmax(2), v, 3)
            torch.autograd.grad(y.sum(), leaves)

        ways = {"ours": (window_scores, window_sum), "unfolded": (unfolded_scores, unfolded_sum)}
        peaks = {}
        for name, way in ways.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(*way)
            peaks[name] = torch.cuda.max_memory_allocated() - before
        times = interleave(
            {name: lambda way=way: run(*way) for name, way in ways.items()}, repeats=9, device=context.device
        )
        return {
            "speed": times["unfolded"].median / times["ours"].median,
            "memory": peaks["unfolded"] / peaks["ours"],
        }

    rows = {side: context.session.step(f"side{side}", lambda s=side: compare(s)) for side in (56, 112)}
    text = ", ".join(
        f"{s}x{s} tokens {r['speed']:.1f} times the speed, {r['memory']:.1f} times less memory" for s, r in rows.items()
    )
    return Measurement(
        shows=all(row["speed"] >= 2.0 and row["memory"] >= 2.0 for row in rows.values()),
        value=round(rows[56]["speed"], 2),
        baseline=1.0,
        sentence=f"{text} than with unfolded neighbours, forward and backward in bfloat16 (must be at least 2 times both)",
        details={str(s): row for s, row in rows.items()},
    )


def _network(mixer: Callable[..., Any], channels: Callable[..., Any]) -> Any:
    """The paper's blocks on 32 x 32 images: one at 8 x 8 with 4 x 4 pooled positions, one at 4 x 4 with 2 x 2."""
    from torch import nn

    from tokenry.vision.transnext import Block, PatchEmbed

    def block(dim: int) -> nn.Module:
        made = Block(dim, mixer(dim))
        made.mlp = channels(dim)
        return made

    return nn.Sequential(
        PatchEmbed(3, DIMS[0], 7, 4),
        block(DIMS[0]),
        PatchEmbed(DIMS[0], DIMS[1], 3, 2),
        block(DIMS[1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(DIMS[1], 10),
    )


def _aggregated(dim: int, keys: str = "both") -> Any:
    """Aggregated attention whose softmax gives no weight to pooled positions, or none to neighbours."""
    import torch

    from tokenry.mixers import AggregatedAttention

    mixer = AggregatedAttention(dim, dim // 16, sr_ratio=2)
    with torch.no_grad():
        if keys == "neighbours":
            mixer.cpb.fc2.weight.zero_()
            mixer.cpb.fc2.bias.fill_(-1e4)
            mixer.cpb.requires_grad_(False)
        elif keys == "pooled":
            mixer.relative_pos_bias_local.fill_(-1e4).requires_grad_(False)
            mixer.learnable_tokens.zero_().requires_grad_(False)
            mixer.learnable_bias.zero_().requires_grad_(False)
    return mixer


def _channel_mixer(dim: int, kind: str = "conv_glu") -> Any:
    """Channel mixers of (B, C, H, W) with equal parameters, within 1 %: an MLP of 4 C, a GLU, a ConvGLU."""
    from timm.layers import GluMlp
    from torch import Tensor, nn

    from tokenry.layers import ChannelMLP, ConvGLU

    class OnLastAxis(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    hidden = 4 * dim
    if kind == "mlp":
        return OnLastAxis(ChannelMLP(dim, hidden))
    if kind == "glu":
        return OnLastAxis(GluMlp(dim, 2 * (2 * hidden // 3), act_layer=nn.GELU, gate_last=False))
    width = (2 * dim * hidden + hidden) // (3 * dim + 12)  # channels of a branch for the MLP's parameters
    return ConvGLU(dim, (3 * width + 1) // 2)


@measures("transnext", "both-kinds-of-keys")
def both_kinds_of_keys(context: Context) -> Measurement:
    """Neighbours and pooled positions, against each alone, in the same network."""
    found = train_networks(
        context,
        {
            keys: lambda keys=keys: _network(lambda dim: _aggregated(dim, keys), _channel_mixer)
            for keys in ("both", "neighbours", "pooled")
        },
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    means = {name: statistics.mean(values) for name, values in found.items()}
    to_near, near_error = paired_difference(found["both"], found["neighbours"])
    to_far, far_error = paired_difference(found["both"], found["pooled"])
    return Measurement(
        shows=min(to_near, to_far) >= 0.0,
        value=round(means["both"], 2),
        baseline=round(max(means["neighbours"], means["pooled"]), 2),
        spread=round(statistics.stdev(found["both"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {means['both']:.1f} % with both kinds of keys, "
        f"{means['neighbours']:.1f} % with neighbours alone (difference {to_near:+.1f} +- {near_error:.1f}), {means['pooled']:.1f} % "
        f"with pooled positions alone ({to_far:+.1f} +- {far_error:.1f}); neither difference may be negative",
        details=dict(found),
    )


@measures("transnext", "conv-glu")
def conv_glu(context: Context) -> Measurement:
    """ConvGLU, GLU and MLP of equal parameters under the same mixer."""
    found = train_networks(
        context,
        {
            kind: lambda kind=kind: _network(_aggregated, lambda dim: _channel_mixer(dim, kind))
            for kind in ("conv_glu", "glu", "mlp")
        },
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    sizes = {kind: sum(p.numel() for dim in DIMS for p in _channel_mixer(dim, kind).parameters()) for kind in found}
    means = {name: statistics.mean(values) for name, values in found.items()}
    to_glu, glu_error = paired_difference(found["conv_glu"], found["glu"])
    to_mlp, mlp_error = paired_difference(found["glu"], found["mlp"])
    return Measurement(
        shows=min(to_glu, to_mlp) >= 0.0,
        value=round(means["conv_glu"], 2),
        baseline=round(means["mlp"], 2),
        spread=round(statistics.stdev(found["conv_glu"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: ConvGLU {means['conv_glu']:.1f} %, GLU {means['glu']:.1f} %, MLP "
        f"{means['mlp']:.1f} % with {sizes['conv_glu']:,}, {sizes['glu']:,} and {sizes['mlp']:,} parameters; ConvGLU over GLU "
        f"{to_glu:+.1f} +- {glu_error:.1f}, GLU over MLP {to_mlp:+.1f} +- {mlp_error:.1f} points; neither may be negative",
        details=dict(found) | {"parameters": sizes},
    )
