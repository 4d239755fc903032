"""Measurements of the MetaFormer baselines and StarReLU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import setting, train_networks

EPOCHS = 10
SKELETON: dict[str, Any] = {"depths": (2, 4), "dims": (32, 64), "num_classes": 10, "img_size": 32, "stem": (4, 4, 0)}
# Operations per number as the paper counts them: relu, square, scale, shift; and GELU's tanh form.
STAR_RELU_OPERATIONS = ("relu", "square", "multiply", "add")
PAPER_GELU_OPERATIONS = 14


@measures("metaformer-baselines", "star-relu-operations")
def star_relu_operations(context: Context) -> Measurement:
    """Elementwise operations of StarReLU as torch runs the plain expression, against the paper's count for GELU."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    from tokenry.layers import StarReLU

    act = StarReLU()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return act.scale * x.relu().square() + act.bias

    x = torch.randn(64)
    graph = make_fx(plain)(x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    counted = len([name for name in names if "detach" not in name])
    same = torch.allclose(plain(x), act(x))
    fewer = 100 * (1 - counted / PAPER_GELU_OPERATIONS)
    return Measurement(
        shows=same and round(fewer) == 71,
        value=round(fewer, 1),
        sentence=f"StarReLU is {counted} elementwise operations ({', '.join(STAR_RELU_OPERATIONS)}) against the paper's count of "
        f"{PAPER_GELU_OPERATIONS} for GELU: {fewer:.0f} % fewer (must round to 71)",
        details={"operations": names},
    )


@measures("metaformer-baselines", "star-relu-unit-variance")
def star_relu_unit_variance(context: Context) -> Measurement:
    """Mean and variance over a million normal numbers, StarReLU's and GELU's."""
    import torch

    from tokenry.layers import StarReLU
    from tokenry.layers.star_relu import UNIT_BIAS, UNIT_SCALE

    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(context.seed))
    y = StarReLU(UNIT_SCALE, UNIT_BIAS, learnable=False)(x)
    mean, variance = y.mean().item(), y.var().item()
    return Measurement(
        shows=abs(mean) <= 0.01 and abs(variance - 1) <= 0.02,
        value=round(variance, 4),
        baseline=round(torch.nn.functional.gelu(x).var().item(), 4),
        sentence=f"mean {mean:+.4f} and variance {variance:.4f} over a million standard normal numbers (must be 0 +- 0.01 and "
        "1 +- 0.02)",
        details={"mean": mean},
    )


@measures("metaformer-baselines", "star-relu-speed")
def star_relu_speed(context: Context) -> Measurement:
    """Forward alone, and forward with backward, of StarReLU, GELU and the plain expression."""
    import torch
    from torch import nn

    from tokenry.layers import StarReLU
    from tokenry.measure import interleave

    star, gelu = StarReLU().to(context.device), nn.GELU()
    x = torch.randn(8, 56, 56, 256, device=context.device, requires_grad=True)
    grad = torch.randn_like(x)
    acts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "star_relu": star,
        "gelu": gelu,
        "plain expression": lambda x: star.scale * x.relu() ** 2 + star.bias,
    }

    def both(act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x.grad = None
        act(x).backward(grad)

    def forward(act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode():
            act(x)

    def run(call: Callable[[Any], None]) -> dict[str, float]:
        found = interleave({n: lambda act=act: call(act) for n, act in acts.items()}, repeats=9, device=context.device)
        return {name: timing.median for name, timing in found.items()}

    training = context.session.step("forward and backward", lambda: run(both))
    inference = context.session.step("forward", lambda: run(forward))
    ratio = training["gelu"] / training["star_relu"]
    alone = inference["gelu"] / inference["star_relu"]
    return Measurement(
        shows=ratio > 1,
        value=round(ratio, 3),
        baseline=1.0,
        sentence=f"forward and backward of StarReLU is {ratio:.2f} times as fast as GELU's (must exceed 1), forward alone "
        f"{alone:.2f} times, the plain expression {training['gelu'] / training['plain expression']:.2f} times",
        details={"training_seconds": training, "forward_seconds": inference},
    )


@measures("metaformer-baselines", "star-relu-accuracy")
def star_relu_accuracy(context: Context) -> Measurement:
    """One small network with either activation, several seeds of each."""
    from tokenry.vision import metaformer

    makers = {act: (lambda act=act: metaformer("pool", act=act, **SKELETON)) for act in ("gelu", "star_relu")}
    accuracies = train_networks(context, makers, epochs=EPOCHS, seeds=3, batch=128)
    star, gelu = (statistics.mean(accuracies[name]) for name in ("star_relu", "gelu"))
    spread = max(statistics.stdev(found) for found in accuracies.values())
    return Measurement(
        shows=star - gelu >= -spread,
        value=round(star - gelu, 2),
        baseline=0.0,
        spread=round(spread, 2),
        sentence=f"{setting(context, EPOCHS, 3)}: StarReLU {star:.1f} %, GELU {gelu:.1f} %, {star - gelu:+.1f} points (must not be worse by more than "
        f"the larger spread over seeds, {spread:.1f})",
        details=dict(accuracies),
    )


@measures("metaformer-baselines", "mixers-order")
def mixers_order(context: Context) -> Measurement:
    """One small network with four choices of mixers, two seeds of each."""
    from tokenry.vision import metaformer

    choices = {
        "identity": "identity",
        "random": "random",
        "sep_conv": "sep_conv",
        "sep_conv, attention": ("sep_conv", "attention"),
    }
    makers = {name: (lambda mixers=mixers: metaformer(mixers, **SKELETON)) for name, mixers in choices.items()}
    accuracies = train_networks(context, makers, epochs=EPOCHS, seeds=2, batch=128)
    mean = {name: statistics.mean(found) for name, found in accuracies.items()}
    spread = max(statistics.stdev(found) for found in accuracies.values())
    shows = (
        mean["identity"] >= 20 and mean["random"] > mean["identity"] and mean["sep_conv"] >= max(mean.values()) - spread
    )
    text = ", ".join(f"{name} {value:.1f} %" for name, value in mean.items())
    return Measurement(
        shows=shows,
        value=round(mean["sep_conv"], 2),
        baseline=round(mean["identity"], 2),
        spread=round(spread, 2),
        sentence=f"{setting(context, EPOCHS, 2)}: {text} (identity must be at least twice chance, random above it, separable convolution the best up "
        f"to the spread, {spread:.1f})",
        details=dict(accuracies),
    )
