"""Measurements of UniFormer, its relation aggregators, windows and token pruning."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import count_against, paired_difference, setting, train_networks

if TYPE_CHECKING:
    from torch import nn

SEEDS = 3
EPOCHS = 6
# Variant: parameters, and billions of multiply-accumulates at 224 x 224 in the authors' code.
COST = {
    "uniformer_xxs": (10_215_280, 1.30),
    "uniformer_xs": (16_509_264, 1.93),
    "uniformer_small": (21_545_256, 3.63),
    "uniformer_small_plus": (24_032_552, 4.20),
    "uniformer_base": (49_776_552, 8.25),
    "uniformer_large_ls_tl": (100_103_888, 19.7),
}
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128), "head_dim": 16, "num_classes": 10}
# timm's networks that the paper compares its small one with.
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")


@measures("uniformer", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the published variants."""
    same, text, found = count_against(context, COST)
    return Measurement(
        shows=same,
        value=round(found["uniformer_small"]["params"] / 1e6, 3),
        sentence=f"{text}; parameters must be equal, multiply-accumulates within 1 % of the authors' code. For the large model the "
        "authors report 12.6 G, which its code does not bear out",
        details=found,
    )


def _network(blocks: str = "LLGG", positions: bool = True) -> nn.Module:
    """A small UniFormer on 32 x 32 images: 16x16, 8x8, 4x4 and 2x2 tokens."""
    from torch import nn

    from tokenry.vision.uniformer import UniFormer
    from tokenry.vision.uniformer_blocks import PatchEmbed

    net: Any = UniFormer(**TINY, blocks=blocks)
    net.stem = PatchEmbed(3, TINY["dims"][0], 2)
    if not positions:
        for stage in net.stages:
            for block in stage.blocks:
                block.pos_embed = nn.Identity()
    return net


@measures("uniformer", "local-then-global")
def local_then_global(context: Context) -> Measurement:
    """Local aggregators first and global ones later, against all of one kind."""
    names = ("LLGG", "GGGG", "LLLL")
    found = train_networks(
        context, {name: (lambda name=name: _network(name)) for name in names}, epochs=EPOCHS, seeds=SEEDS
    )
    mean = {name: statistics.mean(values) for name, values in found.items()}
    spread = max(statistics.stdev(values) for values in found.values())
    best = max(mean["GGGG"], mean["LLLL"])
    return Measurement(
        shows=mean["LLGG"] >= best - spread,
        value=round(mean["LLGG"], 2),
        baseline=round(best, 2),
        spread=round(spread, 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {mean['LLGG']:.1f} % with local aggregators "
        f"in stages 1 and 2 and global ones in 3 and 4, {mean['GGGG']:.1f} % all global, {mean['LLLL']:.1f} % all local (the "
        f"first must not be below the better of the others by more than the largest spread over seeds, {spread:.1f})",
        details=found,
    )


@measures("uniformer", "positions-help")
def positions_help(context: Context) -> Measurement:
    """The network with and without its position encodings."""
    found = train_networks(
        context,
        {"LLGG": _network, "without positions": lambda: _network(positions=False)},
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    ours, theirs = found["LLGG"], found["without positions"]
    difference, error = paired_difference(ours, theirs)
    return Measurement(
        shows=difference > error,
        value=round(statistics.mean(ours), 2),
        baseline=round(statistics.mean(theirs), 2),
        spread=round(statistics.stdev(ours), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {statistics.mean(ours):.1f} % with position encodings, "
        f"{statistics.mean(theirs):.1f} % without, {difference:+.1f} +- {error:.1f} points (must exceed its standard error)",
        details=found,
    )


def _times_and_macs(context: Context, modules: dict[str, nn.Module], *shape: int) -> dict[str, dict[str, float]]:
    """Seconds, taken turn by turn, and billions of multiply-accumulates of each module on a map of this shape."""
    import torch

    from tokenry.measure import count_macs, interleave

    x = torch.randn(*shape, device=context.device).contiguous(memory_format=torch.channels_last)
    modules = {name: module.eval().to(context.device) for name, module in modules.items()}
    with torch.inference_mode():
        timings = interleave(
            {name: (lambda module=module: module(x)) for name, module in modules.items()},
            repeats=7,
            device=context.device,
        )
    return {
        name: {"seconds": timings[name].median, "macs_g": count_macs(module, x) / 1e9}
        for name, module in modules.items()
    }


@measures("uniformer", "global-is-dear-early")
def global_is_dear_early(context: Context) -> Measurement:
    """A block of stage 1 of the small model at 224 pixels, local and global."""
    from tokenry.vision.uniformer_blocks import GlobalBlock, LocalBlock

    found = context.session.step(
        "blocks", lambda: _times_and_macs(context, {"local": LocalBlock(64), "global": GlobalBlock(64)}, 1, 64, 56, 56)
    )
    macs, seconds = (found["global"][key] / found["local"][key] for key in ("macs_g", "seconds"))
    return Measurement(
        shows=macs >= 5 and seconds >= 2,
        value=round(macs, 2),
        baseline=1.0,
        sentence=f"on 56x56 tokens of 64 channels a global block takes {macs:.1f} times the multiply-accumulates and "
        f"{seconds:.1f} times the time of a local one (must be at least 5 and 2 times)",
        details=found,
    )


@measures("uniformer", "windows-are-cheaper")
def windows_are_cheaper(context: Context) -> Measurement:
    """A block of stage 3 of the small model at 1024 pixels, in windows and global."""
    from tokenry.vision.uniformer_blocks import GlobalBlock

    modules = {"window": GlobalBlock(320, window=14), "global": GlobalBlock(320)}
    found = context.session.step("blocks", lambda: _times_and_macs(context, dict(modules), 1, 320, 64, 64))
    macs, seconds = (found["global"][key] / found["window"][key] for key in ("macs_g", "seconds"))
    return Measurement(
        shows=macs >= 3 and seconds >= 3,
        value=round(seconds, 2),
        baseline=1.0,
        sentence=f"on 64x64 tokens of 320 channels (1024 pixels) a block with windows of 14x14 takes {seconds:.1f} times less time "
        f"and {macs:.1f} times fewer multiply-accumulates than a global one, its MLP included (must both be at least 3)",
        details=found,
    )


@measures("uniformer", "pruning-saves")
def pruning_saves(context: Context) -> Measurement:
    """The XXS model at 224 pixels with half of its tokens and with all."""
    import timm

    import tokenry.vision  # noqa: F401  registers the models

    def run() -> dict[str, dict[str, float]]:
        models = {name: timm.create_model("uniformer_xxs", keep_ratio=r) for name, r in (("half", 0.5), ("all", 1.0))}
        return _times_and_macs(context, models, 1, 3, 224, 224)

    found = context.session.step("models", run)
    macs, seconds = (100 * (1 - found["half"][key] / found["all"][key]) for key in ("macs_g", "seconds"))
    return Measurement(
        shows=macs > 0 and seconds > 0,
        value=round(macs, 1),
        baseline=0.0,
        sentence=f"uniformer_xxs at 224x224 with half of the tokens in attention takes {found['half']['macs_g']:.2f} G "
        f"multiply-accumulates, {macs:.0f} % fewer than with all of them, and {seconds:.0f} % less time (both must be above 0)",
        details=found,
    )


@measures("uniformer", "gpu-throughput")
def gpu_throughput(context: Context) -> Measurement:
    """Images per second in bfloat16 beside timm's networks of like size."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave

    batch = 128
    x = torch.randn(batch, 3, 224, 224, device=context.device, dtype=torch.bfloat16)

    def run() -> dict[str, float]:
        calls: dict[str, Callable[[], object]] = {}
        for name in ("uniformer_small", *PEERS):
            model = timm.create_model(name).eval().to(context.device, torch.bfloat16)
            calls[name] = lambda model=model: model(x)
        with torch.inference_mode():
            measured = interleave(calls, repeats=9, warmup=3, device=context.device)
        return {name: batch / timing.median for name, timing in measured.items()}

    rates = context.session.step("rates", run)
    return Measurement(
        shows=rates["uniformer_small"] >= rates[PEERS[0]],
        value=round(rates["uniformer_small"]),
        baseline=round(rates[PEERS[0]]),
        sentence=f"images per second, 224x224, batch {batch}, bfloat16: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
        + " (the first must not be below swin_tiny)",
        details={"images_per_second": rates},
    )


@measures("uniformer", "gpu-hybrid-windows")
def gpu_hybrid_windows(context: Context) -> Measurement:
    """Training step of the detection form at 1024 pixels, hybrid windows against global attention, attention written out."""
    import timm
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave, peak_extra_memory

    x = torch.randn(1, 3, 1024, 1024, device=context.device)

    def step(model: nn.Module) -> None:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(context.device, torch.bfloat16):
            maps = model(x)
        torch.stack([y.float().square().mean() for y in maps]).sum().backward()

    def run() -> dict[str, dict[str, float]]:
        models = {
            name: timm.create_model("uniformer_small_h14", features_only=True, hybrid_window=window).to(context.device)
            for name, window in (("hybrid", 14), ("global", None))
        }
        times = interleave({n: (lambda m=m: step(m)) for n, m in models.items()}, repeats=5, device=context.device)
        return {
            name: {
                "seconds": times[name].median,
                "bytes": float(peak_extra_memory(lambda m=m: step(m), device=context.device)),
            }
            for name, m in models.items()
        }

    found = context.session.step("steps", run)
    seconds, memory = (found["global"][key] / found["hybrid"][key] for key in ("seconds", "bytes"))
    return Measurement(
        shows=seconds >= 2 and memory >= 2,
        value=round(memory, 2),
        baseline=1.0,
        sentence=f"training step of uniformer_small's detection form at 1024x1024: global attention takes {memory:.1f} times the "
        f"memory and {seconds:.1f} times the time of hybrid windows (must both be at least 2)",
        details=found,
    )
