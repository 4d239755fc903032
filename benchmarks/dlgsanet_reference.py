"""Time DLGSANet beside its authors' code, which stays where it is, and the dynamic convolution beside its unfolded form.

    python benchmarks/dlgsanet_reference.py ~/src/DLGSANet --out speed.jsonl

The authors' dynamic convolution is CUDA code that cupy compiles, so it does not run on a CPU. There an unfolded form of it takes its
place: a copy of all 49 neighbours of every pixel, multiplied and summed. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels import dynamic_dwconv
from tokenry.kernels.sliding_window import unfolded_sum
from tokenry.measure import interleave, peak_activations
from tokenry.vision.dlgsanet import DLGSANet, checkpoint_filter_fn

# The authors' defaults differ from what they trained; these are the options of Tiny at scale 4.
TINY = {
    "dim": 48, "groups": 3, "blocks": 3, "buildblock_type": "sparseedge", "tlc_flag": True, "tlc_kernel": 48,
    "activation": "relu", "upscale": 4, "upsampler": "pixelshuffledirect",
}  # fmt: skip


def unfolded(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """The dynamic depthwise convolution by a copy of every neighbour."""
    groups, side = weight.shape[1], weight.shape[2]
    values = x.unflatten(1, (groups, -1))
    return unfolded_sum(weight.flatten(2, 3), values, side, stride=stride, padding=padding).flatten(1, 2)


class IDynamicDWConv(nn.Module):
    """In the place of the authors' module, which imports cupy: the same parameters under the same names."""

    def __init__(self, channels: int, kernel_size: int, group_channels: int, bias: bool = True) -> None:
        super().__init__()
        hidden, groups = channels // 4, channels // group_channels
        self.kernel_size, self.groups = kernel_size, groups
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=bias)
        self.conv1 = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=bias), depthwise)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, kernel_size**2 * groups, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv2(self.conv1(x)).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return unfolded(x, weight, padding=self.kernel_size // 2)


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The four patterns of einops that the authors' file has."""
    if pattern == "b c h w -> b (h w) c":
        return x.flatten(2).transpose(1, 2)
    if pattern == "b (h w) c -> b c h w":
        return x.transpose(1, 2).unflatten(2, (sizes["h"], sizes["w"]))
    if pattern == "b (head c) h w -> b head c (h w)":
        return x.unflatten(1, (sizes["head"], -1)).flatten(3)
    assert pattern == "b head c (h w) -> b (head c) h w", pattern
    return x.flatten(1, 2).unflatten(2, (sizes["h"], sizes["w"]))


def authors(checkout: Path) -> nn.Module:
    """Their Tiny network for scale 4; their package is entered without its own ``__init__``."""

    def module(name: str, **contents: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        sys.modules[name] = made

    registry = types.SimpleNamespace(register=lambda: lambda cls: cls)
    module("basicsr", __path__=[str(checkout / "basicsr")])
    module("basicsr.utils", __path__=[])
    module("basicsr.utils.registry", ARCH_REGISTRY=registry)
    module("basicsr.archs", __path__=[str(checkout / "basicsr" / "archs")])
    module("basicsr.archs.arch_util", to_2tuple=None, trunc_normal_=nn.init.trunc_normal_)
    module("basicsr.archs.dlgsanet_idynamicdwconv_util", IDynamicDWConv=IDynamicDWConv, F=F)
    module("einops", rearrange=rearrange)
    return importlib.import_module("basicsr.archs.dlgsanet_arch").DLGSANet(**TINY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder with the authors' repository")
    parser.add_argument("--side", type=int, default=96, help="pixels of the small image")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append one JSON line per comparison")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    theirs = authors(given.checkout).eval()
    ours = DLGSANet(4).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    image = torch.rand(1, 3, given.side, given.side)
    with torch.inference_mode():
        expected = theirs(image)
        difference = ((ours(image) - expected).abs().max() / expected.abs().max()).item()
    patches = torch.rand(4, 3, 48, 48)
    x, weight = torch.randn(1, 48, 180, 320), torch.randn(1, 8, 7, 7, 180, 320)

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(image)

    def step(model: nn.Module) -> None:
        model.train()(patches).square().mean().backward()
        model.eval()

    def op(function: Any) -> None:
        with torch.inference_mode():
            function(x, weight, padding=3)

    runs = {
        "forward-dlgsanet-tiny-x4": (
            f"DLGSANet Tiny x4, forward, one image of {given.side}x{given.side}",
            lambda: forward(ours),
            lambda: forward(theirs),
            "the authors' code with its dynamic convolution unfolded",
        ),
        "training-dlgsanet-tiny-x4": (
            "DLGSANet Tiny x4, forward and backward, 4 patches of 48x48",
            lambda: step(ours),
            lambda: step(theirs),
            "the authors' code with its dynamic convolution unfolded",
        ),
        "dynamic-dwconv-320x180": (
            "dynamic 7x7 convolution of 48 channels at 320x180",
            lambda: op(dynamic_dwconv),
            lambda: op(unfolded),
            "the unfolded form",
        ),
    }
    for name, (what, our_run, their_run, beside) in runs.items():
        times = interleave({"ours": our_run, "theirs": their_run}, repeats=given.repeats, warmup=1)
        ratio = times["theirs"].median / times["ours"].median
        memory = [peak_activations(run) / 2**20 for run in (our_run, their_run)]
        record = {
            "slug": "dlgsanet",
            "check": "speed",
            "id": name,
            "passed": ratio >= 1.5,
            "value": round(ratio, 3),
            "unit": "x",
            "baseline": 1.5,
            "sentence": f"{what}, {given.threads} thread(s) on cpu: {ratio:.2f} times the speed of {beside} (must be at least "
            f"1.5), {memory[0]:.0f} MiB at the peak instead of {memory[1]:.0f}",
            "details": {
                "ours_seconds": times["ours"].median,
                "theirs_seconds": times["theirs"].median,
                "ours_mib": memory[0],
                "theirs_mib": memory[1],
                "relative_output_difference": difference,
            },
        }
        print(record["sentence"], f"(outputs differ by {difference:.1e})", flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
