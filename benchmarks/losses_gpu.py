"""The table of Cut Cross-Entropy on a CUDA device: memory and time of the loss of large heads, beside its peers.

Run from the source tree (``make bench-gpu``, or ``PYTHONPATH=src python benchmarks/losses_gpu.py``). Peers that are not
installed (``liger-kernel``, ``cut-cross-entropy``) are named and left out. One JSON line per head, inputs and method
is appended to the output file as soon as it is measured; lines that are already there are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

HEADS = {  # tokens, vocabulary, dimension, softcap
    "gemma2-2b": (8192, 256_000, 2304, 30.0),
    "llama3-8b": (8192, 128_256, 4096, None),
    "phi3.5-mini": (8192, 32_064, 3072, None),
    "qwen2.5-1.5b": (8192, 151_936, 1536, None),
}
METHODS = ["cut", "cut_unsorted", "cut_unfiltered", "cut_exact", "dense", "compiled", "liger", "authors"]
PACKAGES = {"triton": "triton", "liger": "liger_kernel", "authors": "cut_cross_entropy"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("losses_gpu.jsonl"), help="JSONL file, continued if it exists")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=50, help="timed turns of each method")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    for name in ("torch", "tokenry", "triton"):
        if importlib.util.find_spec(name) is None:
            hint = "set PYTHONPATH=src" if name == "tokenry" else f"pip install {name}"
            print(f"losses_gpu needs the package {name}, which is not installed ({hint})", file=sys.stderr)
            return 2
    import torch

    if not torch.cuda.is_available():
        print("losses_gpu needs a CUDA device (compute capability 8.0 or higher); there is none here", file=sys.stderr)
        return 2
    for name, module in PACKAGES.items():
        if name in options.methods and importlib.util.find_spec(module) is None:
            print(f"left out: {name} (the package {module} is not installed)", file=sys.stderr)
            options.methods.remove(name)

    from tokenry.claims.cce import gemma_costs
    from tokenry.measure import describe_machine, package_versions

    facts = {"machine": describe_machine(options.device).model_dump(), "versions": package_versions()}
    done = set()
    if options.out.exists():
        entries = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
        done = {(x["head"], x["peaked"], x["method"]) for x in entries}
    for head in options.heads:
        n, v, d, softcap = HEADS[head]
        bound = (n + v) * d * 2 / 2**20
        for peaked in (True, False):
            for method in options.methods:
                if (head, peaked, method) in done:
                    continue
                costs = gemma_costs(
                    options.device, [method], n=n, v=v, d=d, softcap=softcap, peaked=peaked, repeats=options.repeats
                )[method]
                line = {"head": head, "peaked": peaked, "method": method, "gradients_mib": bound, **costs, **facts}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                shown = costs.get("error") or (
                    f"loss {costs['loss_mib']:8.1f} MiB {costs['loss_ms']:7.1f} ms, "
                    f"both {costs['both_mib']:8.1f} MiB {costs['both_ms']:7.1f} ms, cosine {costs['cosine']:.5f}"
                )
                print(f"{head:13} {'peaked' if peaked else 'random':7} {method:15} {shown}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
