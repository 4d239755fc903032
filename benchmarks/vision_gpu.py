"""Image backbones and their kernels on a CUDA device: images per second, memory, and the Triton kernels beside plain forms.

Run from the source tree (``make bench-gpu``, or ``PYTHONPATH=src python benchmarks/vision_gpu.py``). Every backbone is timed turn by
turn with ``resnet50``; window operations and the selective scan with their plain forms. One JSON line per thing is appended
to the output file as soon as it is measured; lines that are already there are not measured again. ``--device cpu --small``
tries the script on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kept_lines import kept_lines

BASELINE = "resnet50"
MODELS = [
    "poolformer_s12", "affnet", "cas_vit_s", "uniformer_small", "davit_tiny", "gcvit_xxtiny", "t2t_vit_14", "ms_mlp_tiny",
    "tokenry_efficientvim_m2", "stvit_small", "stvit_r_swin_small", "transnext_tiny", "sgformer_s", "hrvmamba_small", "vim2_tiny",
    "dualtoken_vit_small", "maformer_small", "swin_tiny_patch4_window7_224", "convnext_tiny",
]  # fmt: skip


def backbone(name: str, batch: int, side: int, device: str) -> dict[str, Any]:
    """Forward passes in bfloat16, channels last, of a model and of the baseline."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import interleave, peak_extra_memory

    x = torch.randn(batch, 3, side, side, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)

    def ready(model: str) -> Callable[[], object]:
        net = timm.create_model(model).eval().to(device, torch.bfloat16, memory_format=torch.channels_last)

        def run() -> object:
            with torch.inference_mode():
                return net(x)

        return run

    calls = {name: ready(name), BASELINE: ready(BASELINE)}
    times = interleave(calls, repeats=7, device=device, warmup=2)
    return {
        "images_per_second": batch / times[name].median,
        "ratio": times[BASELINE].median / times[name].median,
        "memory_mib": peak_extra_memory(calls[name], device=device) / 2**20,
    }


def kernels(device: str, small: bool) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Name of an operation, and its forms to be timed in turn, forward and backward."""
    import torch

    from tokenry.claims.hrvmamba import scan_arguments, scan_loop
    from tokenry.kernels.selective_scan import selective_scan
    from tokenry.kernels.sliding_window import unfolded_sum, window_sum

    def step(form: Callable[..., torch.Tensor], tensors: list[torch.Tensor], *rest: int) -> None:
        torch.autograd.grad(form(*tensors, *rest).float().sum(), tensors)

    for side in (14,) if small else (56, 112):
        where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
        tensors = [torch.randn(8, 3, 9, side, side, **where), torch.randn(8, 3, 24, side, side, **where)]
        yield (
            f"window_sum 3x3, {side}x{side}, batch 8, 3 heads of 24",
            {"ours": partial(step, window_sum, tensors, 3), "unfold": partial(step, unfolded_sum, tensors, 3)},
        )
    forms: dict[str, Callable[..., torch.Tensor]] = {"ours": selective_scan, "loop": scan_loop}  # type: ignore[dict-item]
    if device.startswith("cuda") and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        forms["mamba_ssm"] = lambda *given: selective_scan_fn(*given[:6], None, given[6], True)
    for channels, groups, states in ((640, 4, 1), (128, 1, 16)):
        length = 256 if small else 4096
        arguments = [t.requires_grad_() for t in scan_arguments(channels, groups, states, length, device)]
        calls = {name: partial(step, form, arguments) for name, form in forms.items()}
        yield f"selective_scan, {channels} channels, {states} states, length {length}", calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vision_gpu.jsonl"), help="JSONL file, continued if it exists")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    options = parser.parse_args()

    for name in ("torch", "timm", "tokenry"):
        if importlib.util.find_spec(name) is None:
            hint = "set PYTHONPATH=src" if name == "tokenry" else f"pip install {name}"
            print(f"vision_gpu needs the package {name}, which is not installed ({hint})", file=sys.stderr)
            return 2
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "vision_gpu needs a CUDA device; there is none here (--device cpu --small tries the script)",
            file=sys.stderr,
        )
        return 2
    if not importlib.util.find_spec("mamba_ssm"):
        print("left out: mamba_ssm (the package is not installed)", file=sys.stderr)

    from tokenry.measure import describe_machine, interleave, package_versions

    facts = {"machine": describe_machine(options.device).model_dump(), "versions": package_versions()}
    done = {line["what"] for line in kept_lines(options.out)}

    def write(what: str, found: dict[str, Any]) -> None:
        print(what, json.dumps(found), flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, **found, **facts}) + "\n")

    batch = 2 if options.small else options.batch
    for name in options.models:
        what = f"{name}, batch {batch}, {options.side}x{options.side}, bfloat16"
        if what not in done:
            try:
                write(what, backbone(name, batch, options.side, options.device))
            except Exception as error:  # one model's failure must not end the table
                write(what, {"error": f"{type(error).__name__}: {error}"[:300]})
    for what, calls in kernels(options.device, options.small):
        if what not in done:
            times = interleave(calls, repeats=5, device=options.device)
            seconds = {form: timing.median for form, timing in times.items()}
            write(what, {"seconds": seconds, "times_faster": {k: v / seconds["ours"] for k, v in seconds.items()}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
