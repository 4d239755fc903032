"""Language-model inference on a CUDA device: every strategy, cache and scheduler at real model shapes.

Run from the source tree (``make bench-gpu``, or ``PYTHONPATH=src python benchmarks/decoding_gpu.py``). Weights are random, in
bfloat16: honest for time and memory, not for text. How many drafted tokens a *real* text accepts is measured on the embedded
model and replayed on the large shape: the tree, its passes, the look-ups and the table are those of token recycling, and the
right tokens are put where the embedded model's drafts were right.

One JSON line per measurement is appended to the output file as soon as it is there; lines that are already there are not
measured again. ``--shapes tiny --device cpu`` tries the script out anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256},
    "7b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 4096},
}
# Block Transformer beside the vanilla size that its paper gives as equally good; the pairing is taken over, not checked.
PAIRS = {
    "block_main_b4_85": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "block_main_b4_300": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def llama(shape: str, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = 4 if shape == "tiny" else 32
    config = LlamaConfig(
        **SHAPES[shape], num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=131_072,
        bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def timed(calls: dict[str, Callable[[], Any]], device: str, repeats: int, memory: bool = True) -> dict[str, Any]:
    """Seconds of each call, turn by turn, its speed over the first one's, and the memory it takes."""
    from tokenry.measure import interleave, peak_extra_memory

    timings = interleave(calls, repeats=repeats, device=device)
    first = next(iter(calls))
    found = {}
    for name, call in calls.items():
        ratios = [a / b for a, b in zip(timings[first].seconds, timings[name].seconds, strict=True)]
        found[name] = {"seconds": timings[name].median, "speed": statistics.median(ratios), "all": ratios}
        if memory:
            found[name]["memory_mib"] = peak_extra_memory(call, device=device) / 2**20
    return found


def accepted_lengths(device: str, new_tokens: int) -> list[int]:
    """Tokens per pass of token recycling on the embedded model, over code and list-like prompts, with a filled table."""
    from tokenry.assets import load_model, prompts
    from tokenry.decoding import TokenRecycling

    model, tokenizer = load_model(device=device)
    strategy, lengths = TokenRecycling(tree=None), []
    for i, prompt in enumerate(prompts()[20:]):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        model.generate(**inputs, custom_generate=strategy, max_new_tokens=new_tokens, do_sample=False)
        if i >= 5:
            lengths += [n for (n,) in strategy.stats.accepted]
    return lengths


def strategies(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    import torch

    from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts, TokenRecycling

    class Replay(TokenRecycling):
        """Token recycling whose drafts are right as often as on the embedded model."""

        def __init__(self, truth: Any, prompt: int, lengths: list[int]) -> None:
            super().__init__(tree=None)
            self.truth, self.prompt, self.lengths_given = truth, prompt, lengths

        def propose(self, state: Any) -> Any:
            proposal = super().propose(state)
            tree, done = proposal.tree, state.lengths[0] - self.prompt
            if tree.size == 1:
                return proposal
            right = min(self.lengths_given[len(state.stats.nodes) % len(self.lengths_given)] - 1, tree.max_depth)
            deepest = max(range(tree.size), key=lambda node: len(tree.path_lists[node]))
            path = tree.path_lists[deepest]
            wrong = (self.truth[done] + 1) % state.model.config.vocab_size
            proposal.tokens[:, 1:] = wrong  # nothing but the path may be accepted
            known = self.truth[done : done + right]
            proposal.tokens[0, torch.tensor(path[1 : len(known) + 1], dtype=torch.long, device=known.device)] = known
            return proposal

    model = llama(shape, args.device)
    lengths = accepted_lengths(args.device, 32 if shape == "tiny" else 128)
    ids = torch.randint(2, model.config.vocab_size, (1, 128), device=args.device)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False}
    truth = model.generate(ids, max_new_tokens=args.new_tokens + 16, do_sample=False)[0, ids.shape[1] :]
    replay = Replay(truth, ids.shape[1], lengths)
    prompts = ParallelPrompts(model, m=3)
    prompts.accuracy = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.2, 0.1]])  # only the passes' cost is measured

    def measured() -> dict[str, Any]:
        calls = {
            "generate": lambda: model.generate(ids, **options),
            "token recycling, replayed": lambda: model.generate(ids, custom_generate=replay, **options),
            "zero-node tree": lambda: model.generate(ids, custom_generate=TokenRecycling(tree=0), **options),
            "parallel prompts, untrained": lambda: model.generate(
                ids, custom_generate=ParallelPromptDecoding(prompts, trees=60), **options
            ),
        }
        if args.device.startswith("cuda"):  # generate compiles its step by itself there
            calls["static cache, compiled"] = lambda: model.generate(ids, cache_implementation="static", **options)
        found = timed(calls, args.device, args.repeats)
        return found | {
            "accepted_length": {"asked": statistics.fmean(lengths), "came": replay.stats.mean_accepted_length}
        }

    yield f"strategies/{shape}", measured


def contexts(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One new token behind contexts of growing length: full attention, TidalDecode, EMS."""
    import torch
    from transformers import DynamicCache

    from tokenry.kvcache import EMSCache, tidal
    from tokenry.layers.cache_argument import CACHE

    model = llama(shape, args.device)
    lengths = (256, 512) if shape == "tiny" else (4096, 16_384, 32_768, 65_536, 98_304)

    def measured(length: int) -> dict[str, Any]:
        ids = torch.randint(2, model.config.vocab_size, (1, length), device=args.device)

        def read(cache: Any) -> Any:
            with torch.inference_mode():
                for piece in ids.split(2048, 1):
                    model(piece, **{CACHE: cache}, logits_to_keep=1)
            return cache

        budget = 32 if shape == "tiny" else 1024
        full = read(DynamicCache(config=model.config))
        small = read(EMSCache(model.config, budget=budget, window=16))

        def step(cache: Any) -> None:
            with torch.inference_mode():
                for _ in range(8):
                    model(ids[:, :1], **{CACHE: cache})

        def sparse(tokens: int) -> None:
            with tidal(model, budget=tokens, start=2, correction=-1 if shape == "tiny" else 13):
                step(full)

        calls = {"full": lambda: step(full), "ems": lambda: step(small)}
        calls |= {f"tidal {n}": lambda n=n: sparse(n) for n in ((16,) if shape == "tiny" else (128, 512, 2048, 4096))}
        return timed(calls, args.device, args.repeats, memory=False)

    for length in lengths:
        yield f"contexts/{shape}/{length}", lambda length=length: measured(length)


def batches(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Requests per second on a load whose prompts share prefixes."""
    import torch

    from tokenry.decoding import batch_generate

    model = llama(shape, args.device)
    groups, members, shared, own, new = (3, 4, 48, 16, 8) if shape == "tiny" else (32, 8, 1024, 128, 64)
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size
    load = []
    for _ in range(groups):
        prefix = torch.randint(2, vocabulary, (shared,)).tolist()
        load += [prefix + torch.randint(2, vocabulary, (own,)).tolist() for _ in range(members)]
    order = torch.randperm(len(load)).tolist()
    load = [load[i] for i in order]

    def measured() -> dict[str, Any]:
        def arrival() -> None:
            for i in range(0, len(load), 32):
                ids = torch.tensor(load[i : i + 32], device=args.device)
                model.generate(ids, max_new_tokens=new, do_sample=False)

        calls = {
            "generate, batches of 32": arrival,
            "batch_generate": lambda: batch_generate(model, load, new, max_tokens_per_pass=4096),
            "batch_generate, no sharing": lambda: batch_generate(
                model, load, new, max_tokens_per_pass=4096, grouping="none", order="input"
            ),
        }
        return timed(calls, args.device, max(2, args.repeats // 2)) | {"requests": len(load)}

    yield f"batches/{shape}", measured


def blocks(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Throughput of a Block Transformer and of its vanilla partner, by batch size."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tokenry.language import VARIANTS, BlockTransformerForCausalLM

    if shape == "7b":
        return
    small = shape == "tiny"

    def measured(name: str, rows: int) -> dict[str, Any]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} if small else PAIRS[name]
        ours = VARIANTS[name].config(**({"hidden_size": 64, "block_layers": 1, "token_layers": 1} if small else {}))
        vanilla = GPTNeoXConfig(**sizes, intermediate_size=4 * sizes["hidden_size"], vocab_size=ours.vocab_size)
        with torch.device(args.device):
            models = {
                "vanilla": GPTNeoXForCausalLM._from_config(vanilla, dtype=torch.bfloat16).eval(),
                "block": BlockTransformerForCausalLM._from_config(ours, dtype=torch.bfloat16).eval(),
            }
        prompt, new = (16, 16) if small else (128, 512)
        ids = torch.randint(2, 50_000, (rows, prompt), device=args.device)
        calls = {
            kind: lambda model=model: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=0,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
            for kind, model in models.items()
        }
        return timed(calls, args.device, max(2, args.repeats // 2)) | {"tokens": rows * new}

    for name in PAIRS:
        for rows in (2,) if small else (1, 16, 64, 256, 1024):
            yield f"blocks/{name}{'/tiny' if small else ''}/{rows}", lambda name=name, rows=rows: measured(name, rows)


def drafts(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """k superposed drafts against k nucleus samples, one after the other and in one batch."""
    import torch

    from tokenry.decoding import SuperposedDecoding

    model = llama(shape, args.device)
    ids = torch.randint(2, model.config.vocab_size, (1, 15), device=args.device)
    sampling = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": 10}

    def measured(k: int) -> dict[str, Any]:
        superposed = SuperposedDecoding(k)
        calls = {
            "nucleus, one by one": lambda: [model.generate(ids, **sampling) for _ in range(k)],
            "nucleus, one batch": lambda: model.generate(ids, num_return_sequences=k, **sampling),
            "superposed": lambda: model.generate(ids, custom_generate=superposed, max_new_tokens=10, do_sample=False),
        }
        return timed(calls, args.device, args.repeats)

    for k in (1, 3) if shape == "tiny" else (1, 2, 3, 5, 10):
        yield f"drafts/{shape}/{k}", lambda k=k: measured(k)


PARTS = {part.__name__: part for part in (strategies, contexts, batches, blocks, drafts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("decoding_gpu.jsonl"), help="JSONL file, continued if it exists"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "7b"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each call")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for name in ("torch", "transformers", "tokenry"):
        if importlib.util.find_spec(name) is None:
            hint = "set PYTHONPATH=src" if name == "tokenry" else f"pip install {name}"
            print(f"decoding_gpu needs the package {name}, which is not installed ({hint})", file=sys.stderr)
            return 2
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "decoding_gpu needs a CUDA device; there is none here (--shapes tiny --device cpu tries it out)",
            file=sys.stderr,
        )
        return 2
    from tokenry.measure import describe_machine, package_versions

    facts = {"machine": describe_machine(args.device).model_dump(), "versions": package_versions()}
    done = set()
    if args.out.exists():
        done = {json.loads(line)["key"] for line in args.out.read_text("utf-8").splitlines()}
    for part in args.parts:
        for shape in args.shapes:
            for key, measured in PARTS[part](shape, args):
                if key in done:
                    continue
                try:
                    found = measured()
                except torch.OutOfMemoryError as error:
                    found = {"error": str(error).splitlines()[0]}
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "found": found, **facts}) + "\n")
                speeds = {n: round(v["speed"], 2) for n, v in found.items() if isinstance(v, dict) and "speed" in v}
                print(key, found.get("error") or speeds, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
