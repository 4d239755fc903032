"""Time of the selective scan over the length of the sequence, beside a loop over positions and mamba_ssm's kernel.

Run from the source tree: ``PYTHONPATH=src python benchmarks/selective_scan.py [--device cuda]``. One JSON line per scan, length and
pass is printed, and appended to ``--out`` where given. ``mamba_ssm`` is timed where it is installed and the device is CUDA;
where not, that is said. On the CPU one thread is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SCANS = {"N=1": (640, 4, 1), "N=16": (128, 1, 16)}  # channels, groups, states
LENGTHS = (256, 1024, 4096, 16384)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each form")
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()

    import torch

    from tokenry.claims.hrvmamba import scan_arguments, scan_loop
    from tokenry.kernels.selective_scan import selective_scan
    from tokenry.measure import describe_machine, interleave, package_versions

    if options.device == "cpu":
        torch.set_num_threads(1)
    forms: dict[str, Callable[..., Any]] = {"loop": scan_loop, "ours": selective_scan}
    if options.device.startswith("cuda") and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        forms["mamba_ssm"] = lambda *arguments: selective_scan_fn(*arguments[:6], None, arguments[6], True)
    else:
        print("left out: mamba_ssm (needs a CUDA device and the package)", file=sys.stderr)
    facts = {"machine": describe_machine(options.device).model_dump(), "versions": package_versions()}

    def run(form: Callable[..., Any], arguments: list[torch.Tensor], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            y = form(*arguments)
            if backward:
                torch.autograd.grad(y.sum(), arguments)

    for name, scan in SCANS.items():
        for length in options.lengths:
            arguments = [t.requires_grad_() for t in scan_arguments(*scan, length, options.device)]
            for backward in (False, True):
                calls = {k: partial(run, form, arguments, backward) for k, form in forms.items()}
                times = interleave(calls, repeats=options.repeats, device=options.device, min_seconds=0.05)
                seconds = {k: timing.median for k, timing in times.items()}
                line = {
                    "scan": name, "channels": scan[0], "length": length, "backward": backward, "seconds": seconds,
                    "times_faster": {k: seconds[k] / seconds["ours"] for k in seconds if k != "ours"},
                }  # fmt: skip
                print(json.dumps(line), flush=True)
                if options.out:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line | facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
