"""Measurements of DLGSANet."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import time_over_sides
from tokenry.measure import standard_error

if TYPE_CHECKING:
    from torch import Tensor, nn

SCALE = 2
NETWORK = {"dim": 24, "groups": 2, "blocks": 1}
HELD_OUT = 100
STEPS, ABLATION_STEPS, ABLATION_SEEDS = 1800, 250, 2
GPU_STEPS = 5000
GAIN = 0.5
SIDES = (16, 32, 64, 96)
# Parameters at scales 2, 3 and 4; billions of multiply-accumulates for 1280x720 pixels at scale 4.
COUNTS: dict[str, tuple[tuple[int, int, int], float]] = {
    "tiny": ((565_710, 572_205, 581_298), 33.4),
    "light": ((745_188, 751_683, 760_776), 43.8),
}


@measures("dlgsanet", "size")
def size(context: Context) -> Measurement:
    """Parameters at all scales, multiply-accumulates of scale 4, of the two light variants."""
    import torch

    from tokenry.measure import count_macs
    from tokenry.vision import DLGSANet

    found: dict[str, Any] = {}
    for variant in COUNTS:
        params = [sum(p.numel() for p in DLGSANet(s, variant, device="meta").parameters()) for s in (2, 3, 4)]

        def macs(variant: str = variant) -> float:
            return count_macs(DLGSANet(4, variant, tlc=False).eval(), torch.zeros(1, 3, 180, 320)) / 1e9

        found[variant] = {"params": params, "macs_g": context.session.step(variant, macs)}
    right = all(
        tuple(found[variant]["params"]) == params and abs(found[variant]["macs_g"] - giga) <= 0.05
        for variant, (params, giga) in COUNTS.items()
    )
    text = "; ".join(
        f"{variant} {', '.join(f'{n:,}' for n in counts['params'])} parameters at scales 2, 3, 4 and {counts['macs_g']:.1f} G "
        f"multiply-accumulates to 1280x720 at scale 4"
        for variant, counts in found.items()
    )
    return Measurement(
        shows=right,
        value=found["tiny"]["params"][2] / 1e3,
        sentence=f"{text} (parameters must be those of the authors' code to the last one, multiply-accumulates without the "
        "dynamic convolution itself within 0.05 G)",
        details=found,
    )


def _photographs(context: Context) -> list[Tensor]:
    """1,000 photographs, (3, 224, 224) uint8, one of each ImageNet class."""
    import numpy as np
    import pyarrow.parquet as parquet
    import torch
    from PIL import Image

    table = parquet.read_table(context.data("imagenet-sample") / "images.parquet", columns=["image"])
    pictures = (np.array(Image.open(io.BytesIO(blob.as_py())).convert("RGB")) for blob in table["image"])
    return [torch.from_numpy(pixels).permute(2, 0, 1).contiguous() for pixels in pictures]


def _scores(
    enlarge: Callable[[Tensor], Tensor], photographs: list[Tensor], device: str, scale: int = SCALE
) -> list[float]:
    """PSNR of the luma of every photograph after it was reduced and enlarged again: 8 bits, border cut off."""
    from tokenry.vision.super_resolution import bicubic_downscale, psnr, quantize

    found = []
    for photograph in photographs:
        full = photograph[None].to(device).float() / 255
        found.append(psnr(quantize(enlarge(bicubic_downscale(full, scale))), full, scale).item())
    return found


def _by(model: nn.Module) -> Callable[[Tensor], Tensor]:
    from tokenry.vision.super_resolution import upscale_tensor

    return lambda small: upscale_tensor(model, small)


def _trained(
    make: Callable[[], nn.Module], context: Context, photographs: list[Tensor], seed: int, **training: Any
) -> nn.Module:
    import torch

    from tokenry.vision.super_resolution_training import SuperResolutionTraining, train_super_resolution

    torch.manual_seed(seed)
    model = make().to(context.device)
    train_super_resolution(model, photographs, SuperResolutionTraining(**training), seed=seed)
    return model


def _network() -> nn.Module:
    from tokenry.vision import DLGSANet

    return DLGSANet(SCALE, **NETWORK)


def _softmax_network() -> nn.Module:
    """Softmax in the place of the ReLU of the channel attention."""
    from torch import nn

    from tokenry.mixers import SparseChannelAttention

    model = _network()
    for module in model.modules():
        if isinstance(module, SparseChannelAttention):
            module.act = nn.Softmax(-1)
    return model


def _static_network() -> nn.Module:
    """An ordinary depthwise 7x7 convolution in the place of the dynamic one, between the same projections."""
    from torch import nn

    from tokenry.mixers import DynamicLocalAttention
    from tokenry.vision.dlgsanet import Block

    model = _network()
    for module in model.modules():
        if isinstance(module, Block) and isinstance(mixer := module.mixer, DynamicLocalAttention):
            conv = nn.Conv2d(mixer.dim, mixer.dim, 7, padding=3, groups=mixer.dim)
            module.mixer = nn.Sequential(mixer.proj_in, conv, mixer.proj_out)
    return model


@measures("dlgsanet", "better-than-bicubic")
def better_than_bicubic(context: Context) -> Measurement:
    """A small network trained for some minutes on photographs, scored on held-out ones."""
    from torch.nn import functional as F

    from tokenry.vision.super_resolution import bicubic_upscale

    photographs = _photographs(context)
    train, held_out = photographs[:-HELD_OUT], photographs[-HELD_OUT:]

    def run() -> dict[str, Any]:
        import time

        from tokenry.mixers import SparseChannelAttention

        began = time.perf_counter()
        model = _trained(_network, context, train, context.seed, steps=STEPS)
        seconds = time.perf_counter() - began
        scores = {"seconds": seconds, "windows": _scores(_by(model), held_out, context.device)}
        for module in model.modules():
            if isinstance(module, SparseChannelAttention):
                module.tlc_kernel = None
        return scores | {"whole": _scores(_by(model), held_out, context.device)}

    # Two bicubic kernels are in use: the tables' (a = -1/2) and torch's own (a = -3/4), which is sharper and better here.
    bicubic = context.session.step(
        "bicubic",
        lambda: _scores(lambda x: F.interpolate(x, scale_factor=SCALE, mode="bicubic"), held_out, context.device),
    )
    tables = context.session.step(
        "bicubic-of-tables", lambda: _scores(lambda x: bicubic_upscale(x, SCALE), held_out, context.device)
    )
    found = context.session.step("train", run)
    ours, whole, theirs, softer = (statistics.fmean(x) for x in (found["windows"], found["whole"], bicubic, tables))
    better = sum(a > b for a, b in zip(found["windows"], bicubic, strict=True))
    return Measurement(
        shows=ours - theirs >= GAIN,
        value=round(ours, 2),
        baseline=round(theirs, 2),
        sentence=f"48,404 parameters, scale 2, {len(train)} photographs, {STEPS} steps of 8 patches ({found['seconds']:.0f} s): "
        f"{ours:.2f} dB on {HELD_OUT} held-out photographs, bicubic {theirs:.2f} dB, {ours - theirs:+.2f} dB (must be at least "
        f"+{GAIN}); better on {better} of {HELD_OUT}; the softer bicubic of the field's tables {softer:.2f} dB; attention over the "
        f"whole picture instead of windows {whole:.2f} dB",
        details=found | {"bicubic": bicubic, "bicubic_of_tables": tables},
    )


def _ablation(context: Context, name: str, other: Callable[[], nn.Module], texts: tuple[str, str]) -> Measurement:
    photographs = _photographs(context)
    train, held_out = photographs[:-HELD_OUT], photographs[-HELD_OUT:]
    scores: dict[str, list[float]] = {"ours": [], name: []}
    for seed in range(context.seed, context.seed + ABLATION_SEEDS):
        for key, make in (("ours", _network), (name, other)):

            def run(seed: int = seed, make: Callable[[], nn.Module] = make) -> float:
                model = _trained(make, context, train, seed, steps=ABLATION_STEPS)
                return statistics.fmean(_scores(_by(model), held_out, context.device))

            scores[key].append(context.session.step(f"{key}/seed{seed}", run))
    differences = [a - b for a, b in zip(scores["ours"], scores[name], strict=True)]
    difference, error = statistics.fmean(differences), standard_error(differences)
    ours, theirs = statistics.fmean(scores["ours"]), statistics.fmean(scores[name])
    return Measurement(
        shows=difference > error,
        value=round(ours, 2),
        baseline=round(theirs, 2),
        spread=round(statistics.stdev(scores["ours"]), 3),
        sentence=f"{ABLATION_STEPS} steps, {ABLATION_SEEDS} seeds, scale 2: {ours:.2f} dB with {texts[0]}, {theirs:.2f} dB with "
        f"{texts[1]}, difference {difference:+.3f} +- {error:.3f} dB (must exceed its standard error)",
        details=scores | {"differences": differences},
    )


@measures("dlgsanet", "relu-over-softmax")
def relu_over_softmax(context: Context) -> Measurement:
    """ReLU against softmax in the channel attention, same data, steps and seeds."""
    return _ablation(context, "softmax", _softmax_network, ("ReLU", "softmax"))


@measures("dlgsanet", "dynamic-over-static")
def dynamic_over_static(context: Context) -> Measurement:
    """Kernels made for every position against one learned depthwise kernel, same data, steps and seeds."""
    return _ablation(context, "static", _static_network, ("dynamic kernels", "one learned kernel per channel"))


def _plain_network() -> nn.Module:
    """Scale 4 by 3x3 convolutions alone, as EDSR: seven residual blocks of 64 channels, about Tiny's parameters."""
    from torch import nn

    class Residual(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return input + super().forward(input)

    def conv(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    blocks = [Residual(conv(64, 64), nn.ReLU(), conv(64, 64)) for _ in range(7)]
    model = nn.Sequential(conv(3, 64), Residual(*blocks, conv(64, 64)), conv(64, 48), nn.PixelShuffle(4))
    model.upscale = 4  # type: ignore[assignment]
    return model


@measures("dlgsanet", "better-than-convolutions")
def better_than_convolutions(context: Context) -> Measurement:
    """Tiny at scale 4 against convolutions with as many parameters and bicubic interpolation, some minutes on a GPU."""
    from tokenry.vision import DLGSANet
    from tokenry.vision.super_resolution import bicubic_upscale

    photographs = _photographs(context)
    train, held_out = photographs[:-HELD_OUT], photographs[-HELD_OUT:]

    def run(make: Callable[[], nn.Module]) -> dict[str, Any]:
        model = _trained(make, context, train, context.seed, steps=GPU_STEPS, batch=16, patch=48, lr=5e-4)
        params = sum(p.numel() for p in model.parameters())
        return {"params": params, "scores": _scores(_by(model), held_out, context.device, 4)}

    ours = context.session.step("dlgsanet", lambda: run(lambda: DLGSANet(4)))
    plain = context.session.step("convolutions", lambda: run(_plain_network))
    bicubic = context.session.step(
        "bicubic", lambda: _scores(lambda x: bicubic_upscale(x, 4), held_out, context.device, 4)
    )
    best, other, least = (statistics.fmean(x) for x in (ours["scores"], plain["scores"], bicubic))
    return Measurement(
        shows=best - least >= GAIN and best > other,
        value=round(best, 2),
        baseline=round(other, 2),
        sentence=f"scale 4, {GPU_STEPS} steps of 16 patches, {HELD_OUT} held-out photographs: {best:.2f} dB with "
        f"{ours['params']:,} parameters, {other:.2f} dB by convolutions with {plain['params']:,} (must be less), bicubic "
        f"{least:.2f} dB (must be at least {GAIN} less)",
        details={"ours": ours, "convolutions": plain, "bicubic": bicubic},
    )


@measures("dlgsanet", "linear-cost")
def linear_cost(context: Context) -> Measurement:
    """Forward time of both mixers and of self-attention over the number of positions."""
    from tokenry.measure import fit_exponent
    from tokenry.mixers import create_mixer

    names = ("dynamic_local", "sparse_channel", "attention")
    mixers = {name: lambda side, name=name: create_mixer(name, 48, layout="NCHW") for name in names}
    seconds = time_over_sides(context, mixers, SIDES, 48, repeats=3)
    exponents = {name: fit_exponent([side**2 for side in SIDES], seconds[name]) for name in names}
    local, channels, attention = (exponents[name] for name in names)
    return Measurement(
        shows=max(local, channels) < 1.25 and attention > 1.5,
        value=round(max(local, channels), 2),
        baseline=round(attention, 2),
        sentence=f"48 channels, {SIDES[0]}x{SIDES[0]} to {SIDES[-1]}x{SIDES[-1]} positions: time grows as N^{local:.2f} for the "
        f"dynamic local attention, N^{channels:.2f} for the sparse channel attention (must both be below 1.25) and N^{attention:.2f} "
        "for attention between positions (must be above 1.5)",
        details={"sides": SIDES, "seconds": seconds, "exponents": exponents},
    )
