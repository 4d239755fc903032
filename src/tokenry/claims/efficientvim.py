"""Measurements of HSM-SSD and EfficientViM."""

from __future__ import annotations

import math
import statistics
from functools import cache
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, passes, photographs, setting

SEEDS = 3
EPOCHS = 6
SIDES = (14, 20, 28, 40, 56, 64)
# Variant: the paper's millions of parameters (as the sizes of the released files, exactly where known), its millions of
# multiply-accumulates, and the side of the images.
PAPER_COST = {"m1": (6.68, 239, 224), "m2": (13.9, 355, 224), "m3": (16.6, 656, 224), "m4": (19.6, 1111, 256)}
# Channels, hidden states and side of the map of M1's stages at 224 pixels.
STAGES = ((128, 49, 14), (192, 25, 7), (320, 9, 4))


@measures("efficientvim", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the four variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, tuple[float, float]] = {}
    for name, (_, _, side) in PAPER_COST.items():
        model = timm.create_model(f"tokenry_efficientvim_{name}").eval()
        params = sum(p.numel() for p in model.parameters()) / 1e6
        found[name] = params, count_macs(model, torch.zeros(1, 3, side, side)) / 1e6
    near = all(abs(found[name][0] - params) <= 0.05 for name, (params, _, _) in PAPER_COST.items())
    near &= all(abs(found[name][1] / macs - 1) <= 0.02 for name, (_, macs, _) in PAPER_COST.items())
    text = ", ".join(
        f"{name.upper()} {found[name][0]:.2f} M and {found[name][1]:.1f} M (paper {params} M, {macs} M)"
        for name, (params, macs, _) in PAPER_COST.items()
    )
    return Measurement(
        shows=near,
        value=round(found["m2"][1], 1),
        sentence=f"{text}; parameters must be within 0.05 M, multiply-accumulates within 2 % (the paper's count has softmax, "
        "sums and means in it)",
        details={name: {"params_m": p, "macs_m": m} for name, (p, m) in found.items()},
    )


@measures("efficientvim", "throughput")
def throughput(context: Context) -> Measurement:
    """Images per second of M1 to M4 and of timm's SHViT-S1 to S4, whose accuracies are within 0.2 points of theirs."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave

    batch = 256

    def images_per_second(index: int) -> dict[str, float]:
        side = 256 if index == 4 else 224
        nets: dict[str, Any] = {}
        for name in (f"tokenry_efficientvim_m{index}", f"shvit_s{index}"):
            net: Any = timm.create_model(name).eval().to(context.device, torch.bfloat16)
            nets[name] = net.to(memory_format=torch.channels_last)
        x = torch.randn(batch, 3, side, side, device=context.device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            times = interleave(
                {name: (lambda net=net: net(x)) for name, net in nets.items()},
                repeats=11,
                warmup=5,
                device=context.device,
                min_seconds=0.2,
            )
        ours, theirs = (batch / timing.median for timing in times.values())
        return {"efficientvim": ours, "shvit": theirs}

    rows = [context.session.step(f"m{i}", lambda i=i: images_per_second(i)) for i in (1, 2, 3, 4)]
    ratios = [row["efficientvim"] / row["shvit"] for row in rows]
    text = ", ".join(
        f"M{i} {row['efficientvim']:,.0f} and S{i} {row['shvit']:,.0f}" for i, row in enumerate(rows, start=1)
    )
    return Measurement(
        shows=min(ratios) > 1,
        value=round(min(ratios), 2),
        baseline=1.0,
        sentence=f"images per second at batch {batch}, bfloat16, channels last, run eagerly: {text}; the smallest ratio is "
        f"{min(ratios):.2f} (all must be above 1)",
        details={"rows": rows, "ratios": ratios},
    )


def _token_side(dim: int, state_dim: int, expand: float = 1.0, **kwargs: Any) -> Any:
    """The same state space layer with the same parameters, gated and projected where others do it: on the tokens."""
    import torch
    from torch.nn import functional as F

    from tokenry.mixers import HSMSSD

    class TokenSideSSD(HSMSSD):
        def mix(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            write, read, step = self.dwconv(self.in_proj(x)).flatten(2).chunk(3, dim=1)  # (B, N, L) each
            u, z = self.hz_proj(x.flatten(2).transpose(1, 2)).chunk(2, dim=-1)  # (B, L, D) each
            h = (step.softmax(-1) * write) @ u  # (B, N, D)
            y = read.transpose(1, 2) @ h
            y = self.out_proj(y * (F.silu(z) + self.D))
            return self.proj_drop(y.transpose(1, 2).unflatten(2, x.shape[-2:])), h.transpose(1, 2)

    return TokenSideSSD(dim, state_dim, expand, **kwargs)


def _identity(dim: int, state_dim: int, expand: float = 1.0, **kwargs: Any) -> Any:
    """No mixing; the tokens themselves stand for the hidden states."""
    from torch import Tensor, nn

    class Identity(nn.Module):
        def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.flatten(2)

    return Identity()


@measures("efficientvim", "hidden-mixing")
def hidden_mixing(context: Context) -> Measurement:
    """Multiply-accumulates and time of mixing channels in the states and on the tokens, at M1's own sizes."""
    import torch

    from tokenry.measure import count_macs, interleave
    from tokenry.mixers import HSMSSD

    def compare(dim: int, states: int, side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        ours = HSMSSD(dim, states).to(context.device).eval()
        theirs = _token_side(dim, states).to(context.device).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(16, dim, side, side, device=context.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            times = interleave(
                {"hidden": lambda: ours(x), "tokens": lambda: theirs(x)},
                repeats=11,
                warmup=2,
                device=context.device,
                min_seconds=0.03,
            )
        return {
            "hidden_macs": count_macs(ours, x[:1]),
            "token_macs": count_macs(theirs, x[:1]),
            "hidden_seconds": times["hidden"].median,
            "token_seconds": times["tokens"].median,
        }

    rows = [
        context.session.step(f"{dim}x{states}x{side}", lambda s=(dim, states, side): compare(*s))
        for dim, states, side in STAGES
    ]
    macs = [row["token_macs"] / row["hidden_macs"] for row in rows]
    speed = [row["token_seconds"] / row["hidden_seconds"] for row in rows]
    text = ", ".join(
        f"{dim} channels, {states} states, {side}x{side} tokens: {m:.2f} times fewer multiply-accumulates, {s:.2f} times the speed"
        for (dim, states, side), m, s in zip(STAGES, macs, speed, strict=True)
    )
    return Measurement(
        shows=min(macs) > 1 and min(speed) > 1,
        value=round(speed[0], 2),
        baseline=1.0,
        sentence=f"channel mixing in the hidden states against the same on the tokens, M1's three stages: {text} (both must be "
        "above 1 in every stage)",
        details={"stages": [list(stage) for stage in STAGES], "rows": rows},
    )


@measures("efficientvim", "linear")
def linear(context: Context) -> Measurement:
    """Forward time of the mixer and of self-attention over the number of tokens."""
    import torch

    from tokenry.measure import fit_exponent, interleave
    from tokenry.mixers import create_mixer

    dim = 64

    def times(side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        hsm = create_mixer("hsm_ssd", dim).to(context.device).eval()
        attention = create_mixer("attention", dim, layout="NCHW").to(context.device).eval()
        x = torch.randn(1, dim, side, side, device=context.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            measured = interleave(
                {"hsm": lambda: hsm(x), "attention": lambda: attention(x)},
                repeats=7,
                device=context.device,
                min_seconds=0.02,
            )
        return {name: timing.median for name, timing in measured.items()}

    rows = [context.session.step(f"side{side}", lambda side=side: times(side)) for side in SIDES]
    tokens = [side**2 for side in SIDES]
    ours, theirs = ([row[name] for row in rows] for name in ("hsm", "attention"))
    exponent, other = fit_exponent(tokens, ours), fit_exponent(tokens, theirs)
    return Measurement(
        shows=exponent <= 1.25 and other >= 1.5,
        value=round(exponent, 2),
        baseline=round(other, 2),
        sentence=f"time grows as L^{exponent:.2f} for HSM-SSD with 49 states and L^{other:.2f} for self-attention ({dim} channels, "
        f"14x14 to 64x64 tokens; must be at most 1.25, and at least 1.5 for attention). At 64x64 HSM-SSD is "
        f"{theirs[-1] / ours[-1]:.1f} times as fast, at 14x14 {theirs[0] / ours[0]:.2f} times",
        details={"tokens": tokens, "hsm_seconds": ours, "attention_seconds": theirs},
    )


def _network(kind: str) -> Any:
    """A small net of the paper's shape for 32 x 32 images: 8 x 8, 4 x 4 and 2 x 2 tokens."""
    import torch

    from tokenry.mixers import HSMSSD
    from tokenry.vision import EfficientViM

    net: Any = EfficientViM(
        dims=(32, 48, 64),
        depths=(1, 1, 1),
        state_dims=(25, 9, 4),
        num_classes=10,
        stem_stride=4,
        token_mixer={"identity": _identity, "tokens": _token_side}.get(kind, HSMSSD),
    )
    if kind == "no fusion":
        with torch.no_grad():
            net.head.weights.copy_(torch.tensor([-math.inf, -math.inf, -math.inf, 0.0]))
        net.head.weights.requires_grad_(False)
    return net


@cache
def _accuracy(kind: str, seed: int, device: str) -> float:
    """Test accuracy in percent; claims of one run share what they have in common."""
    from tokenry.vision.image_training import Training, train_classifier

    training = Training(epochs=passes(EPOCHS), batch=64)
    return train_classifier(lambda: _network(kind), photographs(device), training, seed).accuracy


def _compared(context: Context, other: str) -> tuple[list[float], list[float], float, float]:
    """Accuracies of the network and of another form of it, their mean difference and its standard error."""
    found: dict[str, list[float]] = {"hsm": [], other: []}
    for seed in range(context.seed, context.seed + SEEDS):
        for kind, accuracies in found.items():
            accuracies.append(
                context.session.step(
                    f"{kind}/{len(photographs(context.device).train)}images/seed{seed}",
                    lambda kind=kind, seed=seed: _accuracy(kind, seed, context.device),
                )
            )
    return found["hsm"], found[other], *paired_difference(found["hsm"], found[other])


def _accuracy_measurement(
    context: Context,
    ours: list[float],
    theirs: list[float],
    shows: bool,
    sentence: str,
    details: dict[str, Any] | None = None,
) -> Measurement:
    return Measurement(
        shows=shows,
        value=round(statistics.mean(ours), 2),
        baseline=round(statistics.mean(theirs), 2),
        spread=round(statistics.stdev(ours), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {sentence}",
        details={"hsm": ours, "other": theirs, **(details or {})},
    )


@measures("efficientvim", "mixing-helps")
def mixing_helps(context: Context) -> Measurement:
    """The network against itself without token mixer."""
    ours, theirs, difference, error = _compared(context, "identity")
    return _accuracy_measurement(
        context,
        ours,
        theirs,
        difference > error,
        f"{statistics.mean(ours):.1f} % with HSM-SSD, {statistics.mean(theirs):.1f} % with nothing in its place, difference "
        f"{difference:+.1f} +- {error:.1f} points (must exceed its standard error)",
    )


@measures("efficientvim", "token-side-parity")
def token_side_parity(context: Context) -> Measurement:
    """The network against itself with the channel mixing on the tokens: accuracy, multiply-accumulates, speed."""
    import torch

    from tokenry.measure import count_macs, interleave

    ours, theirs, difference, error = _compared(context, "tokens")

    def cost() -> dict[str, float]:
        torch.manual_seed(context.seed)
        nets = {kind: _network(kind).to(context.device).eval() for kind in ("hsm", "tokens")}
        x = torch.randn(100, 3, 32, 32, device=context.device)
        with torch.inference_mode():
            times = interleave(
                {kind: (lambda net=net: net(x)) for kind, net in nets.items()},
                repeats=15,
                warmup=2,
                device=context.device,
            )
        macs = {f"{kind}_macs": count_macs(net, x[:1]) for kind, net in nets.items()}
        return macs | {f"{kind}_images_per_second": len(x) / times[kind].median for kind in nets}

    found = context.session.step("cost", cost)
    macs = found["tokens_macs"] / found["hsm_macs"]
    speed = found["hsm_images_per_second"] / found["tokens_images_per_second"]
    return _accuracy_measurement(
        context,
        ours,
        theirs,
        difference >= -1 and macs > 1 and speed > 1,
        f"{statistics.mean(ours):.1f} % with the channels mixed in the states, {statistics.mean(theirs):.1f} % on the tokens, "
        f"difference {difference:+.1f} +- {error:.1f} points (must be at least -1), with {macs:.2f} times fewer "
        f"multiply-accumulates and {speed:.2f} times the images per second (both must be above 1)",
        found,
    )


@measures("efficientvim", "fusion-helps")
def fusion_helps(context: Context) -> Measurement:
    """The network against itself with the last map's classifier alone."""
    ours, theirs, difference, error = _compared(context, "no fusion")
    return _accuracy_measurement(
        context,
        ours,
        theirs,
        difference >= 0,
        f"{statistics.mean(ours):.1f} % with the hidden states of all stages in the head, {statistics.mean(theirs):.1f} % with the "
        f"last map alone, difference {difference:+.1f} +- {error:.1f} points (must be at least 0)",
    )
