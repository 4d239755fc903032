"""Memory and speed of compressed caches at the size of a real model, with random weights.

    python benchmarks/kvcache.py --device cuda --layers 32 --context 32768 --budget 256 --out kvcache.json

Random weights are honest for bytes and seconds, not for quality. Prints one JSON object: per cache the bytes after the
prompt, the seconds to read it (compression included), the peak memory of reading, and the seconds per new token at a
batch of one and at the largest batch whose cache fits in ``--batch-memory`` bytes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from tokenry.kvcache import EMSCache, SlidingWindowCache, SnapKVCache, cache_bytes
from tokenry.layers.cache_argument import CACHE
from tokenry.measure import describe_machine, interleave, package_versions, peak_extra_memory


def build(layers: int, device: str, dtype: torch.dtype, small: bool) -> LlamaForCausalLM:
    """The shape of Llama-3-8B, or a hundredth of it for a try on a CPU."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    if not small:
        wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**wide, num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=2**20)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="default 32; 4 with --small")
    parser.add_argument("--context", type=int, help="default 32768; 2048 with --small")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32, help="new tokens per timed call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--batch-memory", type=float, help="bytes that the caches of a batch may take; default 40e9, 1e8 with --small"
    )
    parser.add_argument("--small", action="store_true", help="a narrow model, for a try without a GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.layers = args.layers or (4 if args.small else 32)
    args.context = args.context or (2048 if args.small else 32768)
    args.batch_memory = args.batch_memory or (1e8 if args.small else 40e9)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = build(args.layers, args.device, dtype, args.small)
    makers = {
        "full cache": lambda: DynamicCache(config=model.config),
        "EMS": lambda: EMSCache(model.config, args.budget),
        "SnapKV-like": lambda: SnapKVCache(model.config, args.budget),
        "sliding window": lambda: SlidingWindowCache(model.config, args.budget),
    }
    ids = torch.randint(32000, (1, args.context), device=args.device)

    @torch.inference_mode()
    def read(name: str) -> Cache:
        cache = makers[name]()
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def write(cache: Cache, rows: int) -> None:
        for _ in range(args.steps):
            model(ids[:, :1].expand(rows, 1), **{CACHE: cache})

    found: dict[str, dict] = {name: {} for name in makers}
    timing = interleave({n: partial(read, n) for n in makers}, repeats=args.repeats, device=args.device)
    for name in makers:
        peak = peak_extra_memory(partial(read, name), device=args.device)
        found[name] |= {"read_seconds": timing[name].as_dict(), "read_peak_bytes": peak}
        found[name]["bytes"] = cache_bytes(read(name))
    one = {name: read(name) for name in makers}
    timing = interleave({n: partial(write, c, 1) for n, c in one.items()}, repeats=args.repeats, device=args.device)
    for name in makers:
        found[name]["step_seconds"] = timing[name].median / args.steps
    del one
    for name in makers:  # one after the other: each batch fills the memory alone
        rows = max(1, min(256, int(args.batch_memory // (2 * found[name]["bytes"]))))
        cache = read(name)
        cache.batch_repeat_interleave(rows)
        timing = interleave({name: partial(write, cache, rows)}, repeats=args.repeats, device=args.device)
        found[name] |= {"batch": rows, "tokens_per_second": rows * args.steps / timing[name].median}
        del cache
    result = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "machine": describe_machine(args.device).model_dump(),
        "versions": package_versions(),
        "results": found,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
