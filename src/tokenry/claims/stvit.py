"""Measurements of super token attention."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import TYPE_CHECKING

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, setting, train_networks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

SEEDS = 3
EPOCHS = 6
SIDES = (28, 56, 112, 224)
FULL_SIDES = (14, 28, 56)
GPU_SIDES = (56, 112, 224)
# Variant: the authors' parameters, and the paper's billions of multiply-accumulates at 224 x 224.
COST = {"stvit_small": (25_495_624, 4.4), "stvit_base": (51_691_288, 9.9), "stvit_large": (94_971_096, 15.6)}

PHOTOGRAPHS = 60
STEP = 16  # every 16th photograph
CELL = 16
ROUNDS = (1, 2, 3, 5)
# Radians per unit of Lab colour and per cell of distance. Chosen on 12 other photographs for short borders.
COLOUR, POSITION = 1 / 25, 1.0
# Largest logits of the association: as layer norm makes them of 64 channels, and sharper, as a trained weight of it can.
SOFT, SHARP = 8.0, 48.0


@measures("stvit", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the three variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, tuple[int, float]] = {}
    for name in COST:
        model = timm.create_model(name, device="meta").eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) / 1e9
        found[name] = sum(p.numel() for p in model.parameters()), macs
    text = ", ".join(
        f"{name} {found[name][0]:,} parameters (the authors' code {params:,}) and {found[name][1]:.2f} G (paper {macs})"
        for name, (params, macs) in COST.items()
    )
    return Measurement(
        shows=all(found[n][0] == params and abs(found[n][1] - macs) < 0.1 for n, (params, macs) in COST.items()),
        value=round(found["stvit_large"][0] / 1e6, 2),
        sentence=f"{text}; parameters must be equal, multiply-accumulates at 224x224 within 0.1 G of the paper's",
        details={name: {"params": p, "macs_g": m} for name, (p, m) in found.items()},
    )


@measures("stvit", "linear")
def linear(context: Context) -> Measurement:
    """Time and peak memory of the mixer at 7 x 7 super tokens, and time of full attention, over the number of pixels."""
    import torch

    from tokenry.measure import fit_exponent, interleave, peak_activations
    from tokenry.mixers import SuperTokenAttention

    dim = 64

    def costs(side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        mixer = SuperTokenAttention(dim, stoken_size=side // 7).to(context.device).eval()
        full = SuperTokenAttention(dim, stoken_size=1).to(context.device).eval()
        x = torch.randn(1, dim, side, side, device=context.device)
        calls = {"sta": lambda: mixer(x)}
        if side in FULL_SIDES:
            calls["full"] = lambda: full(x)
        with torch.inference_mode():
            memory = peak_activations(calls["sta"])
            times = interleave(calls, repeats=7, device=context.device, min_seconds=0.02)
        return {name: timing.median for name, timing in times.items()} | {"bytes": memory}

    sides = sorted({*SIDES, *FULL_SIDES})
    rows = {side: context.session.step(f"side{side}", lambda side=side: costs(side)) for side in sides}
    pixels = [side**2 for side in SIDES]
    time = fit_exponent(pixels, [rows[side]["sta"] for side in SIDES])
    memory = fit_exponent(pixels, [rows[side]["bytes"] for side in SIDES])
    full = fit_exponent([side**2 for side in FULL_SIDES], [rows[side]["full"] for side in FULL_SIDES])
    largest = rows[FULL_SIDES[-1]]
    return Measurement(
        shows=abs(time - 1) < abs(time - 2) and abs(memory - 1) < 0.1 and abs(full - 2) < abs(full - 1),
        value=round(time, 2),
        baseline=round(full, 2),
        sentence=f"at 49 super tokens of {dim} channels, {SIDES[0]}x{SIDES[0]} to {SIDES[-1]}x{SIDES[-1]} pixels, time grows "
        f"as N^{time:.2f} and memory as N^{memory:.2f}; time of full attention as N^{full:.2f} (must be nearer to 1 than to "
        f"2, within 0.1 of 1, and nearer to 2 than to 1). At {FULL_SIDES[-1]}x{FULL_SIDES[-1]} super token attention takes "
        f"{largest['full'] / largest['sta']:.1f} times less time",
        details={str(side): row for side, row in rows.items()},
    )


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (H, W, 3) of an sRGB image (H, W, 3) uint8, white point D65."""
    import numpy as np

    value = rgb / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = light @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _features(lab: np.ndarray, logits: float) -> torch.Tensor:
    """Colour and position (1, 10, H, W) as angles: all pixels equally long, as after a norm, and near ones alike.

    The product of a pixel with itself, over sqrt(10), is ``logits``.
    """
    import numpy as np
    import torch

    rows, columns = np.meshgrid(*(np.arange(side) for side in lab.shape[:2]), indexing="ij")
    angles = np.concatenate([lab * COLOUR, np.stack([rows, columns], -1) * (POSITION / CELL)], -1)
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1)  # of squared length 5
    return torch.from_numpy(features * (logits * 10**0.5 / 5) ** 0.5).permute(2, 0, 1)[None]


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose right or lower neighbour has another label."""
    import numpy as np

    border = np.zeros(labels.shape, bool)
    border[:-1] |= labels[1:] != labels[:-1]
    border[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    return border


def _edges(lab: np.ndarray) -> np.ndarray:
    """The 5 % of the pixels (H, W) where the colour changes most."""
    import numpy as np
    from scipy import ndimage

    size = np.sqrt(sum(ndimage.gaussian_gradient_magnitude(lab[..., c], 1.0) ** 2 for c in range(3)))
    return size > np.quantile(size, 0.95)


def _recall(edges: np.ndarray, borders: np.ndarray) -> float:
    """Share of the edges with a border at most one pixel away, in percent."""
    from scipy import ndimage

    return 100 * float(ndimage.binary_dilation(borders, iterations=1, structure=[[1] * 3] * 3)[edges].mean())


def _variance(lab: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the pixels' colours to the mean colour of their area."""
    import numpy as np

    flat, index = lab.reshape(-1, 3), labels.reshape(-1)
    counts = np.maximum(np.bincount(index), 1)
    means = np.stack([np.bincount(index, flat[:, c]) / counts for c in range(3)], -1)
    return float(((flat - means[index]) ** 2).sum(-1).mean())


def _photographs(context: Context) -> list[np.ndarray]:
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    column = parquet.read_table(context.data("imagenet-sample") / "images.parquet", columns=["image"])["image"]
    chosen = [column[i].as_py() for i in range(0, STEP * PHOTOGRAPHS, STEP)]
    return [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in chosen]


def _cut(photographs: list[np.ndarray], rounds: int, logits: float = SOFT) -> list[dict[str, float]]:
    """Per photograph: colour variance, recall of its own edges and of the next photograph's. No rounds: the grid."""
    from tokenry.mixers import SuperTokenAttention, super_token_map

    labs = [_lab(one) for one in photographs]
    edges = [_edges(lab) for lab in labs]
    mixer = SuperTokenAttention(10, stoken_size=CELL, n_iter=max(rounds, 1))
    found = []
    for i, lab in enumerate(labs):
        shares, _ = mixer.associate(_features(lab, logits))
        if rounds == 0:  # every pixel with its own cell
            shares = shares.new_tensor([0.0] * 4 + [1.0] + [0.0] * 4).expand_as(shares)
        labels = super_token_map(shares, (lab.shape[0], lab.shape[1]), (CELL, CELL))[0].numpy()
        borders = _borders(labels)
        own, other = (_recall(edges[j % len(edges)], borders) for j in (i, i + 1))
        found.append({"variance": _variance(lab, labels), "recall": own, "elsewhere": other})
    return found


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


@measures("stvit", "follows-content")
def follows_content(context: Context) -> Measurement:
    """One round of association of colour and position, without weights, against the grid it starts from."""
    photographs = _photographs(context)
    grid, ours = (
        context.session.step(f"rounds{rounds}", lambda rounds=rounds: _cut(photographs, rounds)) for rounds in (0, 1)
    )
    less, less_error = paired_difference(*([math.log(row["variance"]) for row in rows] for rows in (ours, grid)))
    more, more_error = paired_difference([row["recall"] for row in ours], [row["recall"] for row in grid])
    true, true_error = paired_difference([row["recall"] for row in ours], [row["elsewhere"] for row in ours])
    return Measurement(
        shows=less < -2 * less_error and more > 2 * more_error and true > 2 * true_error,
        value=round(_mean(ours, "recall"), 1),
        baseline=round(_mean(grid, "recall"), 1),
        sentence=f"{PHOTOGRAPHS} photographs, cells of {CELL}x{CELL}, one round: super tokens leave {100 * math.exp(less):.0f} % "
        f"of the colour variance inside the grid's cells, and their borders find {_mean(ours, 'recall'):.1f} % of the "
        f"photographs' edges within a pixel, the grid {_mean(grid, 'recall'):.1f} %, and the super tokens' borders on "
        f"another photograph {_mean(ours, 'elsewhere'):.1f} % (each difference must exceed twice its standard error)",
        details={"grid": grid, "super_tokens": ours},
    )


@measures("stvit", "rounds")
def rounds(context: Context) -> Measurement:
    """More rounds of association, with soft and with sharp shares."""
    photographs = _photographs(context)
    found = {
        name: [
            context.session.step(f"{name}{n}", lambda n=n, logits=logits: _cut(photographs, n, logits)) for n in ROUNDS
        ]
        for name, logits in (("soft", SOFT), ("sharp", SHARP))
    }
    worse: list[str] = []
    for name, cuts in found.items():
        for before, after, n in zip(cuts, cuts[1:], ROUNDS[1:], strict=False):
            for key, sign in (("variance", 1), ("recall", -1)):
                change, error = paired_difference([row[key] for row in after], [row[key] for row in before])
                if sign * change > 2 * error:
                    worse.append(f"{key} with {name} shares at {n} rounds")

    def listed(key: str, cuts: list[list[dict[str, float]]], digits: int) -> str:
        return ", ".join(f"{_mean(cut, key):.{digits}f}" for cut in cuts)

    text = "; ".join(
        f"{name} shares {listed('variance', cuts, 0)} and {listed('recall', cuts, 1)} %" for name, cuts in found.items()
    )
    return Measurement(
        shows=not worse,
        value=round(_mean(found["soft"][-1], "recall"), 1),
        baseline=round(_mean(found["soft"][0], "recall"), 1),
        sentence=f"colour variance inside super tokens and recall of edges after {', '.join(map(str, ROUNDS))} rounds: {text} "
        "(no step may be worse by more than twice its standard error, with soft shares as layer norm makes them and with "
        f"sharp ones); worse: {', '.join(worse) or 'none'}",
        details={name: dict(zip(map(str, ROUNDS), cuts, strict=True)) for name, cuts in found.items()},
    )


def _pooled_keys(dim: int, cell: int) -> nn.Module:
    """Attention of all positions to the means of the cells, as many keys as there are super tokens."""
    from torch import Tensor, nn
    from torch.nn import functional as F

    class PooledKeys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x.flatten(2).transpose(1, 2))
            k, v = self.kv(F.avg_pool2d(x, cell).flatten(2).transpose(1, 2)).chunk(2, -1)
            y = self.proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
            return y.transpose(1, 2).unflatten(2, x.shape[-2:])

    return PooledKeys()


def _network(mixer: str) -> nn.Module:
    """The paper's blocks: one at 16 x 16 with 4 x 4 cells or another mixer, one at 8 x 8 with full attention."""
    from torch import nn

    from tokenry.layers import ConvNorm
    from tokenry.mixers import InLayout, WindowAttentionMixer
    from tokenry.vision.stvit import Block

    first = Block(32, num_heads=1, stoken_size=4)
    if mixer == "pooled keys":
        first.token_mixer = _pooled_keys(32, 4)
    elif mixer == "windows":
        first.token_mixer = InLayout(WindowAttentionMixer(32, window_size=4), "NCHW")
    return nn.Sequential(
        ConvNorm(3, 32, 3, stride=2),
        nn.GELU(),
        first,
        ConvNorm(32, 64, 3, stride=2),
        Block(64, num_heads=2, stoken_size=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@measures("stvit", "classifies")
def classifies(context: Context) -> Measurement:
    """The same small network with super tokens, with as many pooled keys, and with windows of as many tokens."""
    import torch

    from tokenry.measure import count_macs

    mixers = ("super tokens", "pooled keys", "windows")
    found = train_networks(
        context, {name: lambda name=name: _network(name) for name in mixers}, epochs=EPOCHS, seeds=SEEDS
    )
    macs = {name: count_macs(_network(name).eval(), torch.zeros(1, 3, 32, 32)) / 1e6 for name in mixers}
    against = {name: paired_difference(found["super tokens"], found[name]) for name in mixers[1:]}
    text = ", ".join(f"{name} {statistics.mean(found[name]):.1f} % ({macs[name]:.1f} M)" for name in mixers)
    differences = ", ".join(f"{change:+.1f} +- {error:.1f} to {name}" for name, (change, error) in against.items())
    return Measurement(
        shows=all(change >= -error for change, error in against.values()),
        value=round(statistics.mean(found["super tokens"]), 2),
        baseline=round(max(statistics.mean(found[name]) for name in mixers[1:]), 2),
        spread=round(statistics.stdev(found["super tokens"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}, accuracy (multiply-accumulates): {text}; difference "
        f"{differences} points (must not be below zero by more than its standard error)",
        details={"accuracy": found, "macs_m": macs},
    )


@measures("stvit", "training-speed")
def training_speed(context: Context) -> Measurement:
    """Forward and backward of the mixer, of full attention and of windows, at three sizes of map."""
    import torch

    from tokenry.measure import interleave, peak_extra_memory
    from tokenry.mixers import InLayout, SuperTokenAttention, WindowAttentionMixer

    dim = 64

    def costs(side: int) -> dict[str, dict[str, float]]:
        torch.manual_seed(context.seed)
        mixers = {
            "super tokens": SuperTokenAttention(dim, stoken_size=8),
            "full": SuperTokenAttention(dim, stoken_size=1),
            "windows": InLayout(WindowAttentionMixer(dim, window_size=8), "NCHW"),
        }
        x = torch.randn(1, dim, side, side, device=context.device, requires_grad=True)

        def step(mixer: nn.Module) -> None:
            mixer(x).square().mean().backward()

        calls = {name: partial(step, mixer.to(context.device)) for name, mixer in mixers.items()}
        times = interleave(calls, repeats=7, warmup=2, device=context.device)
        return {
            name: {"seconds": times[name].median, "bytes": peak_extra_memory(call, device=context.device)}
            for name, call in calls.items()
        }

    rows = {side: context.session.step(f"side{side}", lambda side=side: costs(side)) for side in GPU_SIDES}
    ratios = {side: row["full"]["seconds"] / row["super tokens"]["seconds"] for side, row in rows.items()}
    text = "; ".join(
        f"{side}x{side}: "
        + ", ".join(f"{name} {1e3 * c['seconds']:.2f} ms and {c['bytes'] / 2**20:.0f} MiB" for name, c in row.items())
        for side, row in rows.items()
    )
    return Measurement(
        shows=ratios[GPU_SIDES[-1]] > 1 and ratios[GPU_SIDES[-1]] > ratios[GPU_SIDES[0]],
        value=round(ratios[GPU_SIDES[-1]], 2),
        baseline=1.0,
        sentence=f"forward and backward, one map of {dim} channels, {text} (super tokens must be faster than full attention "
        f"at {GPU_SIDES[-1]}x{GPU_SIDES[-1]}, by a larger factor than at {GPU_SIDES[0]}x{GPU_SIDES[0]})",
        details={str(side): row for side, row in rows.items()},
    )
