"""The table of Cut Cross-Entropy on a CUDA device: memory and time of the loss of large heads, beside its peers.

Run from the source tree (``make bench-gpu``, or ``PYTHONPATH=src python benchmarks/losses_gpu.py``). One JSON line per head,
inputs and method is appended to the output file as soon as it is measured. A method that fails, or whose package is not
installed (``liger-kernel``, ``cut-cross-entropy``, ``triton``), is a line with the ``error``. A later run with the same
settings goes on: what has been measured is left alone, what failed is tried again.

``--heads tiny --device cpu`` tries the script out anywhere: the methods that need no GPU run, the others say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from kept_lines import kept_lines

HEADS = {  # tokens, vocabulary, dimension, softcap
    "gemma2-2b": (8192, 256_000, 2304, 30.0),
    "llama3-8b": (8192, 128_256, 4096, None),
    "phi3.5-mini": (8192, 32_064, 3072, None),
    "qwen2.5-1.5b": (8192, 151_936, 1536, None),
    "tiny": (64, 4096, 32, None),
}
METHODS = ["cut", "cut_unsorted", "cut_unfiltered", "cut_exact", "dense", "compiled", "liger", "authors"]


def costs(device: str, method: str, n: int, v: int, d: int, **settings: Any) -> dict[str, Any]:
    """Memory and time of one method, or why it could not be measured."""
    from tokenry.claims.cce import gemma_costs

    try:
        if device.startswith("cuda"):
            return gemma_costs(device, [method], n=n, v=v, d=d, **settings)[method]
        return cpu_costs(device, method, n, v, d, **settings)
    except Exception as error:  # one method's failure must not end the table
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def cpu_costs(
    device: str, method: str, n: int, v: int, d: int, softcap: float | None, peaked: bool, repeats: int
) -> dict[str, Any]:
    """The same without a GPU, in float32: cut cross-entropy takes its chunked path there, peers need CUDA."""
    import torch

    from tokenry.measure import interleave, peak_extra_memory
    from tokenry.training import linear_cross_entropy

    impl = {"cut": "chunked", "dense": "dense"}.get(method)
    if impl is None:
        return {"error": "runs on CUDA devices only"}
    torch.manual_seed(0)
    e, c, y = torch.randn(n, d, device=device), torch.randn(v, d, device=device) / d**0.5, torch.randint(v, (n,))
    if peaked:
        e[:, 0], c[:, 0] = 8.0, (8.0 - 1.5 * (torch.randperm(v) + 1).log()) / 8.0
    y = y.to(device)

    def gradient(impl: Any) -> Any:
        hidden = e.detach().requires_grad_()
        return torch.autograd.grad(linear_cross_entropy(hidden, c, y, softcap=softcap, impl=impl), hidden)[0].flatten()

    def forward() -> Any:
        return linear_cross_entropy(e.requires_grad_(), c.requires_grad_(), y, softcap=softcap, impl=impl)

    def both() -> None:
        torch.autograd.grad(forward(), (e, c))

    cosine = torch.nn.functional.cosine_similarity(gradient(impl), gradient("dense"), dim=0).item()
    times = interleave({"loss": forward, "both": both}, repeats=repeats, device=device)
    found = {f"{name}_ms": timing.median * 1e3 for name, timing in times.items()}
    memory = {"loss": forward, "both": both}
    found |= {f"{name}_mib": peak_extra_memory(call, device=device) / 2**20 for name, call in memory.items()}
    return found | {"cosine": cosine}


def finished(path: Path, settings: dict[str, Any]) -> set[tuple[str, bool, str]]:
    """Head, inputs and method of what was measured with these settings and, by its newest line, did not fail."""
    fine = {}
    for entry in kept_lines(path):
        if entry.get("settings") == settings:
            fine[entry["head"], entry["peaked"], entry["method"]] = "error" not in entry
    return {key for key, good in fine.items() if good}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("losses_gpu.jsonl"), help="JSONL file, continued if it exists")
    parser.add_argument(
        "--heads", "--shapes", nargs="+", choices=list(HEADS), default=[head for head in HEADS if head != "tiny"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=50, help="timed turns of each method")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    for name in ("torch", "tokenry"):
        if importlib.util.find_spec(name) is None:
            hint = "set PYTHONPATH=src" if name == "tokenry" else f"pip install {name}"
            print(f"losses_gpu needs the package {name}, which is not installed ({hint})", file=sys.stderr)
            return 2
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "losses_gpu needs a CUDA device (compute capability 8.0 or higher); there is none here "
            "(--heads tiny --device cpu tries it out)",
            file=sys.stderr,
        )
        return 2

    from tokenry.measure import describe_machine, package_versions

    settings = {"device": options.device, "repeats": options.repeats}
    facts = {
        "settings": settings,
        "machine": describe_machine(options.device).model_dump(),
        "versions": package_versions(),
    }
    done = finished(options.out, settings)
    for head in options.heads:
        n, v, d, softcap = HEADS[head]
        bound = (n + v) * d * 2 / 2**20
        for peaked in (True, False):
            for method in options.methods:
                if (head, peaked, method) in done:
                    continue
                found = costs(options.device, method, n, v, d, softcap=softcap, peaked=peaked, repeats=options.repeats)
                line = {"head": head, "peaked": peaked, "method": method, "gradients_mib": bound, **found, **facts}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                shown = found.get("error") or (
                    f"loss {found['loss_mib']:8.1f} MiB {found['loss_ms']:7.1f} ms, "
                    f"both {found['both_mib']:8.1f} MiB {found['both_ms']:7.1f} ms, cosine {found['cosine']:.5f}"
                )
                print(f"{head:13} {'peaked' if peaked else 'random':7} {method:15} {shown}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
