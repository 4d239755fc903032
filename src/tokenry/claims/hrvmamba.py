"""Measurements of the selective scan, DSS2D and HRVMamba."""

from __future__ import annotations

import math
import statistics
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.measure import standard_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SEEDS = 2
EPOCHS = 2
MARKS = ("ring", "cross", "corner")
# Variant: side of the images, the reported millions of parameters and billions of operations.
PAPER_COST = {
    "hrvmamba_nano": (256, 12, 1.9),
    "hrvmamba_tiny": (256, 14, 2.8),
    "hrvmamba_small": (256, 20, 5.8),
    "hrvmamba_base": (224, 61, 15.8),
}
# (channels, groups, states) and lengths of the scans that are timed.
SCANS = ((128, 4, 1), (32, 1, 16))
LENGTHS = (256, 1024, 4096, 16384)


@measures("hrvmamba", "size")
def size(context: Context) -> Measurement:
    """Parameters, and multiply-accumulates with nine per state of the scans, of the four variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs
    from tokenry.mixers import DSS2D

    found: dict[str, dict[str, float]] = {}
    for name, (side, _, _) in PAPER_COST.items():
        with torch.device("meta"):
            pointwise = timm.create_model(name, dcn_pointwise=True)
        model, scanned = timm.create_model(name).eval(), [0]

        def count(mixer: DSS2D, inputs: tuple[Tensor], _: Tensor, scanned: list[int] = scanned) -> None:
            scanned[0] += 9 * mixer.A_logs.numel() * math.prod(inputs[0].shape[-2:])

        for module in model.modules():
            if isinstance(module, DSS2D):
                module.register_forward_hook(count)
        macs = count_macs(model, torch.zeros(1, 3, side, side))
        found[name] = {
            "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
            "params_with_pointwise_m": sum(p.numel() for p in pointwise.parameters()) / 1e6,
            "macs_g": (macs + scanned[0]) / 1e9,
        }
    near = all(
        round(found[name]["params_m"]) == params and 0.9 <= found[name]["macs_g"] / macs <= 1.0
        for name, (_, params, macs) in PAPER_COST.items()
    )
    text = ", ".join(
        f"{name} {found[name]['params_m']:.2f} M and {found[name]['macs_g']:.2f} G (reported {params} M, {macs} G)"
        for name, (_, params, macs) in PAPER_COST.items()
    )
    return Measurement(
        shows=near,
        value=round(found["hrvmamba_base"]["params_m"], 3),
        sentence=f"{text}; parameters must round to the reported number, operations (convolutions, matrix products, scans; the "
        "report also counts norms and resizing) must not exceed it nor fall more than 10 % below",
        details=found,
    )


def scan_arguments(channels: int, groups: int, states: int, length: int, device: str = "cpu") -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias of a scan with random input."""
    import torch

    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    return [
        draw(1, channels, length),
        draw(1, channels, length) - 3,
        -draw(channels, states).abs(),
        draw(1, groups, states, length),
        draw(1, groups, states, length),
        draw(channels),
        draw(channels),
    ]


def scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The recurrence step by step: decays and inputs for all positions first, then one small update per position."""
    import torch
    from torch.nn import functional as F

    group = u.shape[1] // B.shape[1]
    step = F.softplus(delta + bias.unsqueeze(-1)).unsqueeze(2)  # (B, D, 1, L)
    decay = torch.exp(step * A.unsqueeze(-1)).unbind(-1)  # L of (B, D, N)
    drive = (step * u.unsqueeze(2) * B.repeat_interleave(group, dim=1)).unbind(-1)
    leave = C.repeat_interleave(group, dim=1).unbind(-1)
    state, outputs = torch.zeros_like(drive[0]), []
    for a, b, c in zip(decay, drive, leave, strict=True):
        state = a * state + b
        outputs.append((c * state).sum(-1))
    return torch.stack(outputs, dim=-1) + D.unsqueeze(-1) * u


@measures("hrvmamba", "scan-speed")
def scan_speed(context: Context) -> Measurement:
    """The scan of two levels beside the loop, on one thread."""
    import torch

    from tokenry.kernels.selective_scan import selective_scan
    from tokenry.measure import interleave

    def ratio(scan: tuple[int, int, int], length: int) -> dict[str, float]:
        arguments = scan_arguments(*scan, length)
        ours: Callable[..., Tensor] = selective_scan
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                error = (ours(*arguments) - scan_loop(*arguments)).abs().max()
                scale = scan_loop(*arguments).abs().max()
                times = interleave(
                    {"loop": lambda: scan_loop(*arguments), "ours": lambda: ours(*arguments)},
                    repeats=7,
                    min_seconds=0.1,
                )
        finally:
            torch.set_num_threads(threads)
        return {name: t.median for name, t in times.items()} | {"error": (error / scale).item()}

    rows: dict[str, dict[str, float]] = {}
    for scan in SCANS:
        for length in LENGTHS:
            key = f"d{scan[0]}n{scan[2]}l{length}"
            rows[key] = context.session.step(key, lambda scan=scan, length=length: ratio(scan, length))
    ratios = {key: row["loop"] / row["ours"] for key, row in rows.items()}
    at_4096 = min(value for key, value in ratios.items() if key.endswith("l4096"))
    error = max(row["error"] for row in rows.values())
    text = "; ".join(
        f"{states} states: "
        + ", ".join(f"{ratios[f'd{channels}n{states}l{length}']:.1f} at {length}" for length in LENGTHS)
        for channels, _, states in SCANS
    )
    return Measurement(
        shows=min(ratios.values()) > 1 and at_4096 >= 4 and error <= 1e-5,
        value=round(at_4096, 1),
        baseline=1.0,
        sentence=f"one thread, times faster than a loop over positions, by length: {text} (must be above 1 everywhere and at least "
        f"4 at 4096); largest relative difference {error:.0e} (at most 1e-5)",
        details={"ratios": ratios, "seconds": rows},
    )


def _marked(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Photographs (n, 3, 32, 32) with a ring and a cross drawn faintly on them; cells (n, 3, 2) of both and of their corner.

    The corner, the ring's row and the cross's column, looks like any other place: it must be told by both.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    x, n = images.clone(), len(images)
    ring, cross = torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    ring[1:4, 1:4] = False
    cross[2], cross[:, 2] = True, True
    places = torch.randint(2, 30, (n, 2, 2), generator=g)
    close = (places[:, 0] - places[:, 1]).abs().amax(-1) < 6
    places[close, 1] = (places[close, 1] - 2 + 12) % 28 + 2  # 12 further, around the edge: apart in both directions
    bright = torch.randint(0, 2, (n, 2), generator=g).float() * 3 - 1.5
    for i in range(n):
        for k, shape in enumerate((ring, cross)):
            row, column = places[i, k].tolist()
            patch = x[i, :, row - 2 : row + 3, column - 2 : column + 3]
            patch[:, shape] = 0.7 * patch[:, shape] + 0.3 * bright[i, k]
    corner = torch.stack([places[:, 0, 0], places[:, 1, 1]], dim=-1).unsqueeze(1)
    return x, torch.cat([places, corner], dim=1) // 2


def _network(mixer: str) -> Any:
    """Stride 2, then two blocks of a mixer and an MLP at 16 x 16; all mixers' networks have the same parameters, within 2 %."""
    from timm.layers import ConvMlp, LayerNorm2d
    from torch import nn

    from tokenry.layers import ConvPosEnc
    from tokenry.mixers import DSS2D, create_mixer

    dim = 16

    def make() -> nn.Module:
        return (
            create_mixer("attention", dim, layout="NCHW")
            if mixer == "attention"
            else DSS2D(dim, deformable=mixer == "dss2d")
        )

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    spare = (count(DSS2D(dim)) - count(make())) // (2 * dim + 1)  # hidden units that even the parameters out

    class Residual(nn.Module):
        def __init__(self, branch: nn.Module) -> None:
            super().__init__()
            self.norm, self.branch = LayerNorm2d(dim), branch

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(self.norm(x))

    blocks = [Residual(part) for _ in range(2) for part in (make(), ConvMlp(dim, 2 * dim + spare, act_layer=nn.GELU))]
    return nn.Sequential(
        nn.Conv2d(3, dim, 3, stride=2, padding=1),
        ConvPosEnc(dim),
        *blocks,
        LayerNorm2d(dim),
        nn.Conv2d(dim, len(MARKS), 1),
    )


@cache
def _keypoints(mixer: str, seed: int) -> dict[str, Any]:
    """Train on marked photographs; hit rates on others, and how far the first mixer's gradient reaches."""
    import torch
    from torch.nn import functional as F

    from tokenry.assets import cifar10_sample

    photographs = [
        torch.from_numpy(cifar10_sample(split)[0]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        for split in ("train", "test")
    ]
    torch.manual_seed(seed)
    model = _network(mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    train, test = photographs
    batch = 16
    steps = EPOCHS * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        x, cells = _marked(train, 1000 * seed + epoch)
        target = cells[..., 0] * 16 + cells[..., 1]
        for index in torch.randperm(len(x), generator=order)[: steps // EPOCHS * batch].split(batch):
            loss = F.cross_entropy(model(x[index]).flatten(2).flatten(0, 1), target[index].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    x, cells = _marked(test, 7)
    with torch.no_grad():
        best = torch.cat([model(part).flatten(2).argmax(-1) for part in x.split(100)])
    found = torch.stack([best // 16, best % 16], dim=-1)
    hits = ((found - cells).abs().amax(-1) <= 1).float().mean(0)
    first = model[2]
    inputs = first.norm(model[:2](x[:32])).detach().requires_grad_()
    (grad,) = torch.autograd.grad((first.branch(inputs)[:, :, 8, 8] * torch.linspace(-1, 1, 16)).sum(), inputs)
    norm = grad.norm(dim=1).mean(0)  # (16, 16)
    distance = (torch.arange(16) - 8).abs()
    far = torch.maximum(distance.unsqueeze(1), distance) >= 5
    return {
        "hits": 100 * hits.mean().item(),
        **{mark: 100 * hit.item() for mark, hit in zip(MARKS, hits, strict=True)},
        "far": 100 * (norm[far].sum() / norm.sum()).item(),
        "params": sum(p.numel() for p in model.parameters()),
    }


def _trained(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Every network, every seed; trained once for both claims of a run."""
    return {
        mixer: [
            context.session.step(f"{mixer}/seed{seed}", lambda mixer=mixer, seed=seed: _keypoints(mixer, seed))
            for seed in range(context.seed, context.seed + SEEDS)
        ]
        for mixer in ("dss2d", "ss2d", "attention")
    }


@measures("hrvmamba", "keypoints")
def keypoints(context: Context) -> Measurement:
    """DSS2D, the plain scan and attention find landmarks, at equal parameters; how far the two scans' gradients reach."""
    results = _trained(context)
    hits = {mixer: [r["hits"] for r in runs] for mixer, runs in results.items()}
    differences = [a - b for a, b in zip(hits["dss2d"], hits["ss2d"], strict=True)]
    error = standard_error(differences)
    mean = {mixer: statistics.mean(values) for mixer, values in hits.items()}
    return Measurement(
        shows=statistics.mean(differences) > error,
        value=round(mean["dss2d"], 1),
        baseline=round(mean["ss2d"], 1),
        spread=round(statistics.stdev(hits["dss2d"]), 1),
        sentence=f"two faintly drawn landmarks and their corner (one's row, the other's column) in photographs, found within one cell of 16x16: {mean['dss2d']:.1f} % with "
        f"DSS2D, {mean['ss2d']:.1f} % with a depthwise convolution in place of the deformable one, {mean['attention']:.1f} % with "
        f"attention, at equal parameters, {SEEDS} seeds; difference of the first two {statistics.mean(differences):+.1f} +- "
        f"{error:.1f} points (must exceed its standard error)",
        details={"runs": results, "differences": differences},
    )


@measures("hrvmamba", "reach")
def reach(context: Context) -> Measurement:
    """The share of a position's gradient that comes from far away, with and without the deformable convolution."""
    results = _trained(context)
    far = {mixer: [r["far"] for r in results[mixer]] for mixer in ("dss2d", "ss2d")}
    ours, theirs = (statistics.mean(far[mixer]) for mixer in ("dss2d", "ss2d"))
    return Measurement(
        shows=all(a > b for a, b in zip(far["dss2d"], far["ss2d"], strict=True)),
        value=round(ours, 1),
        baseline=round(theirs, 1),
        sentence=f"after training on landmarks {ours:.1f} % of the gradient norm of the first mixer's output comes from inputs five or "
        f"more cells away with the deformable convolution, {theirs:.1f} % with a depthwise one (must be more for every seed)",
        details=far,
    )


@measures("hrvmamba", "gpu-scan")
def gpu_scan(context: Context) -> Measurement:
    """Forward and backward of the Triton kernel beside the loop, on a CUDA device."""
    import torch

    from tokenry.kernels.selective_scan import selective_scan
    from tokenry.measure import interleave

    ratios: dict[str, float] = {}
    for states in (1, 16):
        arguments = scan_arguments(640, 4, states, 4096, context.device)
        for argument in arguments:
            argument.requires_grad_()

        def train(scan: Any, arguments: list[Tensor] = arguments) -> None:
            torch.autograd.grad(scan(*arguments).sum(), arguments)

        times = interleave(
            {"loop": lambda: train(scan_loop), "ours": lambda: train(selective_scan)}, repeats=3, device=context.device
        )
        ratios[f"{states} states"] = times["loop"].median / times["ours"].median
    worst = min(ratios.values())
    return Measurement(
        shows=worst > 1,
        value=round(worst, 1),
        baseline=1.0,
        sentence="forward and backward at 4096 positions of 640 channels, times faster than the loop: "
        + ", ".join(f"{ratio:.1f} with {name}" for name, ratio in ratios.items())
        + " (must be above 1)",
        details=ratios,
    )
