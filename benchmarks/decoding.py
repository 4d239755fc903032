"""Decoding strategies at the sizes where a GPU matters: tree sizes, batches and data types against stock generate.

    python benchmarks/decoding.py --device cuda --dtype bfloat16 --model FOLDER --out results/decoding

One JSON file per (batch, tree size) sweep; a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from tokenry.assets import load_model, prompts
from tokenry.decoding import TokenRecycling, pass_latency
from tokenry.measure import Session, describe_machine, interleave, peak_extra_memory

TREES = (0, 5, 10, 20, 40, 80)


def measure(model, batch, new_tokens: int, repeats: int, device: str, warm) -> dict:
    strategies = {f"tree {n}": TokenRecycling(tree=n) for n in TREES} | {"auto": TokenRecycling()}
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    tables = {}
    for name, strategy in strategies.items():
        model.generate(**warm, custom_generate=strategy, **options)
        tables[name] = strategy.matrix.table.clone()

    def drafted(name):
        strategies[name].matrix.table.copy_(tables[name])
        return model.generate(**batch, custom_generate=strategies[name], **options)

    calls = {"generate": lambda: model.generate(**batch, **options)}
    calls |= {name: (lambda name=name: drafted(name)) for name in strategies}
    plain = calls["generate"]()
    same = {
        name: bool(plain.shape == (out := call()).shape and torch.equal(plain, out)) for name, call in calls.items()
    }
    timings = interleave(calls, repeats=repeats, warmup=1, device=device)
    rows = {}
    for name, call in calls.items():
        ratios = [a / b for a, b in zip(timings["generate"].seconds, timings[name].seconds, strict=True)]
        rows[name] = {
            "speed": statistics.median(ratios),
            "speed_low_high": [min(ratios), max(ratios)],
            "seconds": timings[name].median,
            "identical": same[name],
            "memory_mib": peak_extra_memory(call, device=device) / 2**20,
        }
        if name in strategies:
            rows[name] |= strategies[name].stats.summary()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/decoding"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    settings = vars(args) | {"out": None}

    def encode(texts):
        return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(args.device)

    with Session(args.out, settings) as session:
        result = {"machine": describe_machine(args.device).model_dump(), "settings": settings, "batches": {}}
        for size in args.batches:
            curve = pass_latency(model, size, refresh=True)
            result["batches"][size] = session.step(
                f"batch{size}",
                lambda size=size, curve=curve: {
                    "latency": dict(zip(curve.sizes, curve.seconds, strict=True)),
                    "rows": measure(
                        model,
                        encode(prompts()[1::2][:size]),
                        args.new_tokens,
                        args.repeats,
                        args.device,
                        encode(prompts()[::10]),
                    ),
                },
            )
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for size, found in result["batches"].items():
        for name, row in found["rows"].items():
            print(f"batch {size} {name:10s} {row['speed']:.2f} x  {row.get('mean_accepted_length', 1):.2f} tokens/pass")


if __name__ == "__main__":
    main()
