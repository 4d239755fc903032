"""Our re-expressed cache baselines beside NVIDIA's kvpress: the same entries kept, and in what time?

    python -m venv /elsewhere && /elsewhere/bin/pip install kvpress
    python benchmarks/kvpress_reference.py --kvpress /elsewhere/bin/python

kvpress (Apache-2.0) needs an older transformers, so it runs as a process of its own: this file again, which then imports
nothing of Tokenry. Both read the same passages with the embedded model and cut them to the same number of entries; an entry
is the same if its key is. Times are those of reading a prompt and cutting, in turns, each side on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BUDGET, WINDOW = 32, 16
ROUNDS = 7


def their_presses(length: int) -> dict[str, Any]:
    """kvpress's methods by our names."""
    import kvpress

    ratio = 1 - BUDGET / length
    return {
        "SnapKV": kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
        "TOVA": kvpress.TOVAPress(ratio),
        "expected attention": kvpress.ExpectedAttentionPress(ratio),
        "KeyDiff": kvpress.KeyDiffPress(ratio),
        "key norm": kvpress.KnormPress(ratio),
        "sinks and recent": kvpress.StreamingLLMPress(ratio, n_sink=4),
    }


def our_caches(config: Any) -> dict[str, Callable[[], Any]]:
    """The same rules as caches of Tokenry."""
    from tokenry import kvcache

    return {
        "SnapKV": lambda: kvcache.SnapKVCache(config, BUDGET, WINDOW, pool=5),
        "TOVA": lambda: kvcache.TOVACache(config, BUDGET),
        "expected attention": lambda: kvcache.ExpectedAttentionCache(config, BUDGET),
        "KeyDiff": lambda: kvcache.KeyDiffCache(config, BUDGET),
        "key norm": lambda: kvcache.KeyNormCache(config, BUDGET),
        "sinks and recent": lambda: kvcache.SinkCache(config, BUDGET),
    }


def theirs(folder: Path) -> None:
    """Answer each line of standard input: ``keys`` or ``time``, the passages' file and the method."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for line in sys.stdin:
        call = json.loads(line)
        tokens = load_file(folder / call["tokens"])["tokens"]
        press = their_presses(tokens.shape[1])[call["method"]]
        cache = DynamicCache()
        with torch.inference_mode(), press(model):
            began = time.perf_counter()
            model(tokens, past_key_values=cache, logits_to_keep=1)
            seconds = time.perf_counter() - began
        save_file({str(i): layer.keys.contiguous() for i, layer in enumerate(cache.layers)}, folder / "kept")
        print(json.dumps({"seconds": seconds}), flush=True)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of our kept keys ``[B, H, S, D]`` that the other side keeps too."""
    # by differences: the quick way over products is off by more than keys that are alike differ
    nearest = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
    return (nearest < 1e-3).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvpress", type=Path, help="the python in which kvpress is installed")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.theirs:
        return theirs(args.theirs)
    if args.kvpress is None:
        parser.error("--kvpress: name the python in which kvpress is installed")
    from tokenry.assets import held_out_texts, load_model
    from tokenry.layers.cache_argument import CACHE

    model, tokenizer = load_model("small")
    stream = torch.tensor(tokenizer("\n".join(held_out_texts("english")), add_special_tokens=False)["input_ids"])
    texts = {"keys": stream[: 16 * 128].view(16, 128), "time": stream[:960].view(1, 960)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        for what, tokens in texts.items():
            save_file({"tokens": tokens}, folder / what)
        command = [str(args.kvpress), str(Path(__file__).resolve()), "--theirs", str(folder)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as other:
            assert other.stdin is not None and other.stdout is not None

            def ask(method: str, what: str) -> float:
                other.stdin.write(json.dumps({"method": method, "tokens": what}) + "\n")
                other.stdin.flush()
                return json.loads(other.stdout.readline())["seconds"]

            for method, make in our_caches(model.config).items():
                ask(method, "keys")
                cache = make()
                with torch.inference_mode():
                    model(texts["keys"], **{CACHE: cache}, logits_to_keep=1)
                kept = load_file(folder / "kept")
                share = statistics.fmean(same(layer.keys, kept[str(i)]) for i, layer in enumerate(cache.layers))
                ratios = []
                for turn in range(ROUNDS + 1):
                    their_time = ask(method, "time")
                    began = time.perf_counter()
                    with torch.inference_mode():
                        model(texts["time"], **{CACHE: make()}, logits_to_keep=1)
                    if turn:  # the first warms up
                        ratios.append(their_time / (time.perf_counter() - began))
                print(
                    json.dumps(
                        {
                            "method": method,
                            "same entries": round(share, 4),
                            "times as fast": round(statistics.median(ratios), 2),
                        }
                    ),
                    flush=True,
                )
            other.stdin.close()


if __name__ == "__main__":
    main()
