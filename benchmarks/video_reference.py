"""Time the video models beside their authors' code, which stays where it is.

    python benchmarks/video_reference.py --checkouts ~/src --out speed.jsonl

As ``vision_reference.py``, for models that take clips: ``--checkouts`` holds the authors' repositories, both models get the
same weights, and the times are taken turn by turn in one process. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tokenry.measure import interleave
from tokenry.vision import uniformer_video_b, uniformer_video_s, uniformer_video_xs, uniformer_video_xxs
from tokenry.vision.uniformer_video import checkpoint_filter_fn
from vision_reference import authors, old_timm_names

# ours -> what makes it
MODELS = {
    "uniformer_video_s": uniformer_video_s,
    "uniformer_video_b": uniformer_video_b,
    "uniformer_video_xxs": uniformer_video_xxs,
    "uniformer_video_xs": uniformer_video_xs,
}
LIGHT = {"uniformer_video_xxs": 28, "uniformer_video_xs": 32}  # and the width of their heads


def slowfast_names() -> None:
    """What the authors' files import from packages around them: a registry and a logger."""
    registry = types.ModuleType("fvcore.common.registry")
    registry.Registry = lambda name: types.SimpleNamespace(register=lambda: lambda made: made)
    log = types.ModuleType("slowfast.utils.logging")
    log.get_logger = logging.getLogger
    for module in (registry, log):
        parts = module.__name__.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            sys.modules[package] = types.ModuleType(package)
        sys.modules[module.__name__] = module


def settings(depths: tuple[int, ...], dims: tuple[int, ...], split: bool, head_dim: int | None) -> Any:
    """The part of PySlowFast's configuration that the authors' model reads; of a light model where ``head_dim`` is given.

    Their light configurations give one number as the width of the MLPs, their code reads one for every stage.
    """
    space = types.SimpleNamespace
    shares = [[], [], [1] + [0.5] * (depths[2] - 1), [0.5] * depths[3]]
    return space(
        UNIFORMER=space(
            DEPTH=depths, EMBED_DIM=dims, HEAD_DIM=head_dim or 64, MLP_RATIO=[3] * 4 if head_dim else 4, QKV_BIAS=True,
            QKV_SCALE=None, REPRESENTATION_SIZE=None, DROPOUT_RATE=0, ATTENTION_DROPOUT_RATE=0, DROP_DEPTH_RATE=0.0,
            SPLIT=split, STD=False, PRETRAIN_NAME="", PRUNE_RATIO=shares, TRADE_OFF=shares, INIT_VALUE=0.1,
        ),
        MODEL=space(NUM_CLASSES=400, USE_CHECKPOINT=False, CHECKPOINT_NUM=[0, 0, 0, 0]),
        DATA=space(TRAIN_CROP_SIZE=224, INPUT_CHANNEL_NUM=[3]),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, help="folder with the authors' repositories")
    parser.add_argument(
        "--models", nargs="*", default=["uniformer_video_s"], choices=list(MODELS), help="only these of ours"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--split", action="store_true", help="divided attention")
    parser.add_argument("--layer-scale", action="store_true", help="of light models, as in three configurations")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--out", type=Path, help="append one JSON line per model")
    given = parser.parse_args()
    if any(given.layer_scale if name not in LIGHT else given.split for name in given.models):
        parser.error("--layer-scale is for the light models, --split for the others")
    torch.set_num_threads(given.threads)
    old_timm_names()
    slowfast_names()
    folder = given.checkouts / "UniFormer" / "video_classification" / "slowfast"
    for name in given.models:
        torch.manual_seed(0)
        light = name in LIGHT
        options = {"split": True} if given.split else {"layer_scale": 0.1} if given.layer_scale else {}
        own = MODELS[name](**options).eval().to(given.device)
        dims = tuple(stage["num_chs"] for stage in own.feature_info)
        depths = tuple(len(stage.blocks) for stage in own.stages)
        arguments = {"cfg": settings(depths, dims, given.split, LIGHT.get(name))}
        kind = "uniformer" + ("_light" + ("_ls" if given.layer_scale else "") + "_fp32" if light else "")
        theirs = authors(folder, f"models.{kind}", kind.capitalize(), arguments).eval().to(given.device)
        own.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), own))
        x = torch.randn(given.batch, 3, given.frames, given.side, given.side, device=given.device)
        with torch.inference_mode():
            expected = theirs([x])
            difference = ((own(x) - expected).abs().max() / expected.abs().max()).item()

        for model in (own, theirs):
            model.train(given.train and light)  # the authors' pruning writes in place where it does not train

        def call(model: torch.nn.Module, x: torch.Tensor = x) -> None:
            if given.train:
                found = model([x])
                sum(logits.square().mean() for logits in ([found] if torch.is_tensor(found) else found)).backward()
            else:
                with torch.inference_mode():
                    model([x])

        times = interleave(
            {"ours": lambda m=own: call(m), "authors": lambda m=theirs: call(m)},
            repeats=given.repeats,
            warmup=1,
            device=given.device,
        )
        ratio = times["authors"].median / times["ours"].median
        what = "forward and backward" if given.train else "forward"
        form = name + (" with divided attention" if given.split else " with layer scale" if given.layer_scale else "")
        record = {
            "slug": "uniformer-video",
            "check": "speed",
            "id": f"{what.replace(' ', '-')}-{form.replace(' ', '-').replace('_', '-')}",
            "passed": ratio >= 1.0,
            "value": round(ratio, 3),
            "unit": "x",
            "baseline": 1.0,
            "sentence": f"{form}, {what}, batch {given.batch} of {given.frames} frames at {given.side} pixels, {given.threads} "
            f"thread(s) on {given.device}: {ratio:.2f} times the speed of the authors' code (must be at least 1)",
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
