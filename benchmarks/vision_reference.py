"""Time the image models beside their authors' code, which stays where it is.

    python benchmarks/vision_reference.py --poolformer ~/src/poolformer --metaformer ~/src/metaformer --out speed.jsonl

Both directories are checkouts (github.com/sail-sg/poolformer, github.com/sail-sg/metaformer). Per model: the same weights
in both, the largest difference of the logits, and the ratio of the authors' time to ours, taken turn by turn in one
process. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import timm
import torch
from timm.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn

from tokenry.measure import interleave
from tokenry.vision import load_checkpoint, metaformer

# our name, where the authors' model is made, slug of the card
MODELS = [
    ("poolformer_s12_exact", "poolformer", "models.poolformer", "poolformer_s12", "poolformer"),
    ("poolformer_s12", "poolformer", "models.poolformer", "poolformer_s12", "poolformer"),
    ("metaformer_ppaa_s12_224", "poolformer", "models.metaformer", "metaformer_ppaa_s12_224", "poolformer"),
    ("metaformer_ppff_s12_224", "poolformer", "models.metaformer", "metaformer_ppff_s12_224", "poolformer"),
    ("identityformer_s12", "metaformer", "metaformer_baselines", "identityformer_s12", "metaformer-baselines"),
    ("randformer_s12", "metaformer", "metaformer_baselines", "randformer_s12", "metaformer-baselines"),
    ("convformer_s18", "metaformer", "metaformer_baselines", "convformer_s18", "metaformer-baselines"),
    ("caformer_s18", "metaformer", "metaformer_baselines", "caformer_s18", "metaformer-baselines"),
    ("built_convformer_s18", "metaformer", "metaformer_baselines", "convformer_s18", "metaformer-baselines"),
    ("built_caformer_s18", "metaformer", "metaformer_baselines", "caformer_s18", "metaformer-baselines"),
]
BUILT = {  # timm has models of these names; the same ones from our builder
    "built_convformer_s18": "sep_conv",
    "built_caformer_s18": ("sep_conv", "sep_conv", "attention", "attention"),
}


def old_timm_names() -> None:
    """The authors' files import from places where timm kept these things in 2022."""
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath, layers.trunc_normal_, layers.to_2tuple = DropPath, trunc_normal_, to_2tuple
    helpers = types.ModuleType("timm.models.layers.helpers")
    helpers.to_2tuple = to_2tuple
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function  # keep timm's own models under these names
    sys.modules |= {
        "timm.models.layers": layers,
        "timm.models.layers.helpers": helpers,
        "timm.models.registry": registry,
    }


def authors(folder: Path, module: str, name: str) -> nn.Module:
    """The authors' model, from their checkout."""
    for loaded in [m for m in sys.modules if m == "models" or m.startswith("models.")]:
        del sys.modules[loaded]
    package = types.ModuleType("models")  # without the checkout's own __init__, which needs detection frameworks
    package.__path__ = [str(folder / "models")]
    sys.modules["models"] = package
    sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(module), name)()
    finally:
        sys.path.remove(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poolformer", type=Path, help="checkout of sail-sg/poolformer")
    parser.add_argument("--metaformer", type=Path, help="checkout of sail-sg/metaformer")
    parser.add_argument("--models", nargs="*", help="only these of ours")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--out", type=Path, help="append one JSON line per model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    old_timm_names()
    for ours_name, repository, module, their_name, slug in MODELS:
        folder = getattr(given, repository)
        if folder is None or (given.models and ours_name not in given.models):
            continue
        torch.manual_seed(0)
        theirs = authors(folder, module, their_name).eval().to(given.device)
        ours = (
            metaformer(BUILT[ours_name], (3, 3, 9, 3), head="mlp")
            if ours_name in BUILT
            else timm.create_model(ours_name)
        )
        ours = load_checkpoint(ours.eval(), theirs.state_dict()).to(given.device)
        x = torch.randn(given.batch, 3, 224, 224, device=given.device)
        with torch.inference_mode():
            difference = (ours(x) - theirs(x)).abs().max().item()

        def call(model: nn.Module, x: torch.Tensor = x) -> None:
            if given.train:
                model(x).square().mean().backward()
            else:
                with torch.inference_mode():
                    model(x)

        times = interleave(
            {"ours": lambda m=ours: call(m), "authors": lambda m=theirs: call(m)},
            repeats=given.repeats,
            warmup=2,
            device=given.device,
        )
        ratio = times["authors"].median / times["ours"].median
        what = "forward and backward" if given.train else "forward"
        record = {
            "slug": slug,
            "check": "speed",
            "id": f"{what.replace(' ', '-')}-{ours_name.replace('_', '-')}",
            "passed": ratio >= 1.0,
            "value": round(ratio, 3),
            "unit": "x",
            "baseline": 1.0,
            "sentence": f"{ours_name}, {what}, batch {given.batch} at 224 pixels, {given.threads} thread(s) on "
            f"{given.device}: {ratio:.2f} times the speed of the authors' code (must be at least 1)",
            "details": {
                "ours_seconds": times["ours"].median,
                "authors_seconds": times["authors"].median,
                "logit_difference": difference,
            },
        }
        print(record["sentence"], f"(logits differ by {difference:.1e})", flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
