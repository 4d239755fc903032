"""Measurements of CAS-ViT and its additive mixer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, NotRunnable, measures
from tokenry.claims.small_images import paired_difference, setting, time_over_sides, train_networks

if TYPE_CHECKING:
    from torch import nn

SEEDS = 3
EPOCHS = 6
SKELETON: dict[str, Any] = {"depths": (1, 2), "dims": (32, 64), "num_classes": 10, "img_size": 32, "stem": (4, 4, 0)}
MIXERS = ("identity", "pool", "cat", "attention")
SIDES = (8, 16, 32, 64)
# Variant: millions of parameters, and billions of multiply-accumulates at 224 x 224.
COST = {
    "cas_vit_xs": (3.20, 0.547),
    "cas_vit_s": (5.76, 0.912),
    "cas_vit_m": (12.42, 1.859),
    "cas_vit_t": (21.76, 3.557),
}
# timm's mobile networks of about the size of the smallest variant.
PEERS = ("swiftformer_xs", "mobilevitv2_075", "efficientformerv2_s0")


@measures("cas-vit", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the four variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, tuple[float, float]] = {}
    for name in COST:
        model = timm.create_model(name).eval()
        params = sum(p.numel() for p in model.parameters()) / 1e6
        found[name] = params, count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9
    same = all(
        round(found[name][0], 2) == params and round(found[name][1], 3) == macs for name, (params, macs) in COST.items()
    )
    text = ", ".join(f"{name} {params:.2f} M and {macs:.3f} G" for name, (params, macs) in found.items())
    return Measurement(
        shows=same,
        value=round(found["cas_vit_t"][0], 2),
        sentence=f"{text} at 224x224, both heads included (parameters must round to the released 3.20, 5.76, 12.42 and 21.76 M, "
        "multiply-accumulates to those of the authors' code, 0.547, 0.912, 1.859 and 3.557 G)",
        details={name: {"params_m": p, "macs_g": m} for name, (p, m) in found.items()},
    )


@measures("cas-vit", "mixers-order")
def mixers_order(context: Context) -> Measurement:
    """One small network with each of four mixers, same data, same seeds."""
    from tokenry.vision import metaformer

    accuracies = train_networks(
        context, {name: (lambda name=name: metaformer(name, **SKELETON)) for name in MIXERS}, epochs=EPOCHS, seeds=SEEDS
    )
    mean = {name: statistics.mean(found) for name, found in accuracies.items()}
    spread = {name: statistics.stdev(found) for name, found in accuracies.items()}
    text = ", ".join(f"{name} {mean[name]:.1f} +- {spread[name]:.1f} %" for name in MIXERS)
    return Measurement(
        shows=mean["cat"] > mean["pool"] > mean["identity"],
        value=round(mean["cat"], 2),
        baseline=round(mean["pool"], 2),
        spread=round(spread["cat"], 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {text} (the means must rise from identity over pool to cat)",
        details=dict(accuracies),
        charts=({"type": "bars", "title": "Accuracy of one network by its mixer (%)", "values": mean},),
    )


def _without(spatial: bool = False, channel: bool = False) -> Callable[..., nn.Module]:
    """The mixer with one or both gates of q and k taken out."""
    from torch import nn

    from tokenry.mixers import CATMixer

    def make(dim: int, proj_drop: float = 0.0) -> nn.Module:
        mixer = CATMixer(dim, proj_drop=proj_drop)
        for gates in (mixer.gate_q, mixer.gate_k):
            if spatial:
                gates[0] = nn.Identity()
            if channel:
                gates[1] = nn.Identity()
        return mixer

    return make


@measures("cas-vit", "gates-help")
def gates_help(context: Context) -> Measurement:
    """The mixer without its spatial gates, without its channel gates, without both."""
    from tokenry.vision import metaformer

    choices = {
        "both gates": _without(),
        "no spatial gate": _without(spatial=True),
        "no channel gate": _without(channel=True),
        "no gate": _without(spatial=True, channel=True),
    }
    accuracies = train_networks(
        context,
        {name: (lambda m=mixer: metaformer(m, **SKELETON)) for name, mixer in choices.items()},
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    mean = {name: statistics.mean(found) for name, found in accuracies.items()}
    gain, error = paired_difference(accuracies["both gates"], accuracies["no gate"])
    text = ", ".join(f"{name} {value:.1f} %" for name, value in mean.items())
    return Measurement(
        shows=gain > error,
        value=round(mean["both gates"], 2),
        baseline=round(mean["no gate"], 2),
        spread=round(statistics.stdev(accuracies["both gates"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {text}; both gates over none {gain:+.1f} +- {error:.1f} points (must exceed its standard error)",
        details=dict(accuracies),
    )


@measures("cas-vit", "scaling")
def scaling(context: Context) -> Measurement:
    """Forward time of the mixer and of self-attention over the number of tokens."""
    from tokenry.measure import fit_exponent
    from tokenry.mixers import create_mixer

    dim = 64
    mixers = {name: lambda side, name=name: create_mixer(name, dim, layout="NCHW") for name in ("cat", "attention")}
    seconds = time_over_sides(context, mixers, SIDES, dim, batch=4)
    tokens = [side**2 for side in SIDES]
    ours, theirs = seconds["cat"], seconds["attention"]
    exponent, other = fit_exponent(tokens, ours), fit_exponent(tokens, theirs)
    return Measurement(
        shows=exponent < 1.5 < other,
        value=round(exponent, 2),
        baseline=round(other, 2),
        sentence=f"time grows as N^{exponent:.2f} for the additive mixer and N^{other:.2f} for self-attention from 8x8 to 64x64 "
        f"tokens ({dim} channels; the first must be nearer to 1 than to 2, the second nearer to 2); at 64x64 the mixer is "
        f"{theirs[-1] / ours[-1]:.1f} times as fast, at 8x8 {theirs[0] / ours[0]:.2f} times",
        details={"tokens": tokens, "cat_seconds": ours, "attention_seconds": theirs},
    )


@measures("cas-vit", "onnx-latency")
def onnx_latency(context: Context) -> Measurement:
    """Time of one image in ONNX Runtime on one thread, beside timm's mobile networks of like size."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter's
    except ImportError as error:
        raise NotRunnable(f"needs {error.name}: install onnx, onnxruntime and onnxscript") from None

    def run() -> dict[str, float]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(context.seed))
        calls: dict[str, Callable[[], object]] = {}
        with TemporaryDirectory() as folder:
            for name in ("cas_vit_xs", *PEERS):
                path = Path(folder) / f"{name}.onnx"
                torch.onnx.export(timm.create_model(name).eval(), (x,), path, dynamo=True, verbose=False)
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                feed = {session.get_inputs()[0].name: x.numpy()}
                calls[name] = lambda session=session, feed=feed: session.run(None, feed)
        return {name: timing.median for name, timing in interleave(calls, repeats=15, warmup=3).items()}

    seconds = context.session.step("times", run)
    ours = seconds["cas_vit_xs"]
    slower = [name for name in PEERS if seconds[name] > ours]
    middle = statistics.median(seconds[name] for name in PEERS)
    text = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    return Measurement(
        shows=len(slower) >= 2,
        value=round(1000 * ours, 2),
        baseline=round(1000 * middle, 2),
        sentence=f"one image of 224x224 in ONNX Runtime, one thread of a CPU: {text}; faster than {len(slower)} of {len(PEERS)} "
        "peers (must be at least 2)",
        details={"seconds": seconds},
    )


@measures("cas-vit", "gpu-throughput")
def gpu_throughput(context: Context) -> Measurement:
    """Images per second in bfloat16 beside timm's mobile networks of like size."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave

    batch = 256
    x = torch.randn(batch, 3, 224, 224, device=context.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> dict[str, float]:
        calls: dict[str, Callable[[], object]] = {}
        for name in ("cas_vit_xs", *PEERS):
            model = timm.create_model(name).eval().to(context.device, torch.bfloat16)
            calls[name] = lambda model=model: model(x)
        with torch.inference_mode():
            measured = interleave(calls, repeats=9, warmup=3, device=context.device)
        return {name: batch / timing.median for name, timing in measured.items()}

    rates = context.session.step("rates", run)
    slower = [name for name in PEERS if rates[name] < rates["cas_vit_xs"]]
    text = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
    return Measurement(
        shows=len(slower) >= 2,
        value=round(rates["cas_vit_xs"]),
        baseline=round(statistics.median(rates[name] for name in PEERS)),
        sentence=f"images per second, 224x224, batch {batch}, bfloat16: {text}; faster than {len(slower)} of {len(PEERS)} peers "
        "(must be at least 2)",
        details={"images_per_second": rates},
    )
