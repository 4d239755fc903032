"""Time AFFNet beside its authors' code, in one process, turn by turn.

    git clone https://github.com/microsoft/TokenMixers
    python benchmarks/affnet_reference.py "TokenMixers/Adaptive Frequency Filters" --out speed.jsonl

The checkout stays where it is; it needs the package einops. Both networks get the same weights, their outputs are
compared first, then the times. One JSON line per thing timed; ``value`` is the authors' time over ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

import tokenry.vision.affnet
from tokenry.measure import interleave

MODES = {"affnet_et": "xx_small", "affnet_t": "x_small", "affnet": "small"}


def reference(mode: str) -> nn.Module:
    """The authors' network, SiLU and layer_norm_2d."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from affnet.models.classification.affnet import AffNet

        return AffNet(
            argparse.Namespace(
                **{
                    "model.classification.name": "affnet",
                    "model.classification.affnet.mode": mode,
                    "model.classification.affnet.attn_norm_layer": "layer_norm_2d",
                    "model.activation.name": "swish",
                    "model.normalization.name": "batch_norm",
                }
            )
        )


def pair(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the authors', with equal weights."""
    torch.manual_seed(0)
    theirs = reference(MODES[name]).to(device)
    ours = timm.create_model(name).to(device)
    ours.load_state_dict(tokenry.vision.affnet.checkpoint_filter_fn(theirs.state_dict(), ours))
    return ours, theirs


def training_step(model: nn.Module, x: torch.Tensor):
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()

    return step


def line(name: str, what: str, batch: int, size: int, device: str, repeats: int) -> dict:
    """Time one thing."""
    ours, theirs = pair(name, device)
    x = torch.randn(batch, 3, size, size, device=device)
    if what == "forward":
        ours.eval(), theirs.eval()
        with torch.inference_mode():
            error = (ours(x) - theirs(x)).abs().max().item()
            times = interleave(
                {"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, repeats=repeats, warmup=2, device=device,
                min_seconds=0.1,
            )  # fmt: skip
    else:
        ours.train(), theirs.train()
        error = (ours(x) - theirs(x)).abs().max().item()
        times = interleave(
            {"ours": training_step(ours, x), "theirs": training_step(theirs, x)},
            repeats=repeats,
            warmup=1,
            device=device,
        )
    ratio = times["theirs"].median / times["ours"].median
    low, high = (getattr(times["theirs"], end) / getattr(times["ours"], end) for end in ("low", "high"))
    sentence = (
        f"{name} {what}, batch {batch} at {size}x{size} on {device}: ours {times['ours'].median * 1e3:.1f} ms, the authors' code "
        f"{times['theirs'].median * 1e3:.1f} ms, ratio {ratio:.2f} (must be at least 1); largest difference of outputs {error:.1e}"
    )
    return {
        "slug": "affnet",
        "check": "speed",
        "id": f"{what}-{name}-b{batch}".replace("_", "-"),
        "passed": ratio >= 1.0,
        "value": round(ratio, 3),
        "unit": "x",
        "baseline": 1.0,
        "sentence": sentence,
        "details": {
            "ours_ms": round(times["ours"].median * 1e3, 3),
            "theirs_ms": round(times["theirs"].median * 1e3, 3),
            "ratio_of_lower_quartiles": round(low, 3),
            "ratio_of_upper_quartiles": round(high, 3),
            "batch": batch,
            "size": size,
            "threads": torch.get_num_threads(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help='the folder "Adaptive Frequency Filters" of a checkout')
    parser.add_argument("--models", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--what", nargs="+", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    options = parser.parse_args()
    if not (options.checkout / "affnet").is_dir():
        parser.error(f"{options.checkout} holds no folder affnet: give the folder 'Adaptive Frequency Filters'")
    sys.path.insert(0, str(options.checkout))
    if options.threads:
        torch.set_num_threads(options.threads)
    ratios = []
    for name in options.models:
        for what in options.what:
            for batch in options.batches:
                found = line(name, what, batch, options.size, options.device, options.repeats)
                ratios.append(found["value"])
                print(found["sentence"], flush=True)
                if options.out:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
    print(f"geometric mean of the ratios: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")


if __name__ == "__main__":
    main()
