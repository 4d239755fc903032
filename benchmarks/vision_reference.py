"""Time the image models beside their authors' code, which stays where it is.

    python benchmarks/vision_reference.py --checkouts ~/src --out speed.jsonl

``--checkouts`` holds one folder per repository, named as on GitHub (poolformer, metaformer, CAS-ViT ...); models whose
repository is not there are left out. Per model: the same weights in both, the largest difference of the logits relative to
their scale, and the ratio of the authors' time to ours, taken turn by turn in one process. A ratio above 1 means that ours
is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn

from tokenry.measure import interleave
from tokenry.vision import load_checkpoint, metaformer
from tokenry.vision.ms_mlp import KERNEL_SIZES

# card, our model, the authors' repository, the module in it, and what makes their model there
MODELS = [
    ("poolformer", "poolformer_s12_exact", "poolformer", "models.poolformer", "poolformer_s12"),
    ("poolformer", "poolformer_s12", "poolformer", "models.poolformer", "poolformer_s12"),
    ("poolformer", "metaformer_ppaa_s12_224", "poolformer", "models.metaformer", "metaformer_ppaa_s12_224"),
    ("poolformer", "metaformer_ppff_s12_224", "poolformer", "models.metaformer", "metaformer_ppff_s12_224"),
    ("metaformer-baselines", "identityformer_s12", "metaformer", "metaformer_baselines", "identityformer_s12"),
    ("metaformer-baselines", "randformer_s12", "metaformer", "metaformer_baselines", "randformer_s12"),
    ("metaformer-baselines", "convformer_s18", "metaformer", "metaformer_baselines", "convformer_s18"),
    ("metaformer-baselines", "caformer_s18", "metaformer", "metaformer_baselines", "caformer_s18"),
    ("metaformer-baselines", "built_convformer_s18", "metaformer", "metaformer_baselines", "convformer_s18"),
    ("metaformer-baselines", "built_caformer_s18", "metaformer", "metaformer_baselines", "caformer_s18"),
    *(
        ("cas-vit", f"cas_vit_{size}", "CAS-ViT", "classification.model.rcvit", f"rcvit_{size}")
        for size in ("xs", "s", "m", "t")
    ),
    *(
        (
            "efficientvim",
            f"tokenry_efficientvim_m{i}",
            "EfficientViM",
            "classification.models.EfficientViM",
            f"EfficientViM_M{i}",
        )
        for i in (1, 2, 3, 4)
    ),
    *(
        ("transnext", f"transnext_{size}", "TransNeXt/classification", "transnext", f"transnext_{size}")
        for size in ("micro", "tiny", "small", "base")
    ),
    ("transnext", "transnext_micro_aaaa", "TransNeXt/classification", "transnext", "transnext_micro_AAAA"),
    *(
        ("uniformer", f"uniformer_{size}", "UniFormer/image_classification", "models.uniformer", f"uniformer_{size}")
        for size in ("small", "small_plus", "small_plus_dim64", "base", "base_ls")
    ),
    *(
        (
            "uniformer",
            f"uniformer_{size}",
            "UniFormer/image_classification",
            "models.uniformer_light",
            f"uniformer_{size}",
        )
        for size in ("xxs", "xs")
    ),
    *(("stvit", f"stvit_{size}", "STViT", "models.stvit", f"stvit_{size}") for size in ("small", "base", "large")),
    *(
        ("stvit-r", f"stvit_r_swin_{size}", "STViT-R", "models.swin_transformer", "SwinTransformer")
        for size in ("small", "base")
    ),
    *(("ms-mlp", f"ms_mlp_{size}", "MS-MLP", "models.ms_mlp", "MS_MLP") for size in ("tiny", "small", "base")),
    *(
        ("t2t-vit", f"t2t_vit_{size}", "T2T-ViT", "models.t2t_vit", f"t2t_vit_{size}")
        for size in ("7", "10", "12", "14", "19", "24", "t_14", "t_19", "t_24", "14_resnext", "14_wide")
    ),
    # ours is timm's of today
    *(("davit", f"davit_{size}", "davit/timm", "models.davit", f"DaViT_{size}") for size in ("tiny", "small", "base")),
]
# Keywords of the authors' constructor, and of ours, where the defaults differ: our model's name -> (theirs, ours).
ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ms_mlp_tiny": ({"depths": (3, 3, 9, 3), "mix_size": KERNEL_SIZES}, {}),
    "ms_mlp_small": ({"depths": (3, 3, 27, 3), "mix_size": KERNEL_SIZES}, {}),
    "ms_mlp_base": ({"embed_dim": 128, "depths": (3, 3, 27, 3), "mix_size": KERNEL_SIZES}, {}),
    "stvit_r_swin_small": (
        {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "use_global": False},
        {},
    ),
    "stvit_r_swin_base": (
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "use_global": False},
        {},
    ),
} | {
    f"stvit_{size}": ({"args": types.SimpleNamespace(drop=0.0, drop_path=0.0)}, {})
    for size in ("small", "base", "large")
}
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
    einops = types.ModuleType("einops")  # imported by some, called by none
    einops.rearrange = einops.repeat = None
    sys.modules.setdefault("einops", einops)
    packages = types.ModuleType("pkg_resources")  # asked whether a compiled extension is installed: it is not
    packages.DistributionNotFound = LookupError
    packages.get_distribution = {}.__getitem__
    sys.modules.setdefault("pkg_resources", packages)
    sys.modules |= {
        "timm.models.layers": layers,
        "timm.models.layers.helpers": helpers,
        "timm.models.registry": registry,
    }


def authors(folder: Path, module: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    """The authors' model, from their checkout; their packages are entered without their own ``__init__``."""
    packages = [".".join(module.split(".")[: i + 1]) for i in range(module.count("."))]
    first = module.split(".")[0]
    for loaded in [m for m in sys.modules if m == first or m.startswith(f"{first}.")]:
        del sys.modules[loaded]
    for package in packages:  # an __init__ often wants frameworks for detection or training
        made = types.ModuleType(package)
        made.__path__ = [str(folder / package.replace(".", "/"))]
        sys.modules[package] = made
    sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    finally:
        sys.path.remove(str(folder))


def ours(name: str, arguments: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """Our model with the authors' weights."""
    if name in BUILT:
        return load_checkpoint(metaformer(BUILT[name], (3, 3, 9, 3), head="mlp").eval(), weights)
    model = timm.create_model(name, **arguments).eval()
    own_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if own_filter is None or "metaformer" in type(model).__module__:
        return load_checkpoint(model, weights)
    model.load_state_dict(own_filter(weights, model))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, help="folder with the authors' repositories")
    parser.add_argument("--models", nargs="*", help="only these of ours")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--out", type=Path, help="append one JSON line per model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    old_timm_names()
    for slug, name, repository, module, their_name in MODELS:
        folder = given.checkouts / repository
        if not folder.is_dir() or (given.models and name not in given.models):
            continue
        torch.manual_seed(0)
        their_arguments, our_arguments = ARGUMENTS.get(name, ({}, {}))
        theirs = authors(folder, module, their_name, their_arguments).eval().to(given.device)
        own = ours(name, our_arguments, theirs.state_dict()).to(given.device)
        x = torch.randn(given.batch, 3, given.side, given.side, device=given.device)
        with torch.inference_mode():
            expected = theirs(x)
            difference = ((own(x) - expected).abs().max() / expected.abs().max()).item()

        def call(model: nn.Module, x: torch.Tensor = x) -> None:
            if given.train:
                model(x).square().mean().backward()
            else:
                with torch.inference_mode():
                    model(x)

        times = interleave(
            {"ours": lambda m=own: call(m), "authors": lambda m=theirs: call(m)},
            repeats=given.repeats,
            warmup=2,
            device=given.device,
        )
        ratio = times["authors"].median / times["ours"].median
        what = "forward and backward" if given.train else "forward"
        record = {
            "slug": slug,
            "check": "speed",
            "id": f"{what.replace(' ', '-')}-{name.replace('_', '-')}",
            "passed": ratio >= 1.0,
            "value": round(ratio, 3),
            "unit": "x",
            "baseline": 1.0,
            "sentence": f"{name}, {what}, batch {given.batch} at {given.side} pixels, {given.threads} thread(s) on "
            f"{given.device}: {ratio:.2f} times the speed of the authors' code (must be at least 1)",
            "details": {
                "ours_seconds": times["ours"].median,
                "authors_seconds": times["authors"].median,
                "relative_logit_difference": difference,
            },
        }
        print(record["sentence"], f"(logits differ by {difference:.1e})", flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
