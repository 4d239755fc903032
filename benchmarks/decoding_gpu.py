"""Language-model inference on a CUDA device: every strategy, cache and scheduler at real model shapes.

Run from the source tree (``make bench-gpu``, or ``PYTHONPATH=src python benchmarks/decoding_gpu.py``); about eight minutes on an
H200, by estimate. Weights are random, in bfloat16: honest for time and memory, not for text. So the text is scripted: the
large model writes, token by token, what the embedded model wrote after a prompt of code or of a list, and drafts are right
as often as those of the embedded model's own trained drafts, prompts and tables. What a row then means is written in it
(``means``).

One JSON line per measurement is appended to the output file as soon as it is there. A later run with the same settings goes
on: what has been measured is left alone, what failed is tried again. A contender that fails is an ``error`` in its line.
``--shapes tiny --device cpu`` tries the script out anywhere.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept_lines import kept_lines

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256},
    "7b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 4096},
}
# What drafts for a shape: the next smaller one, which for the smallest is a model of four layers.
DRAFTS = {
    "1b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 128_256},
    "7b": SHAPES["1b"],
    "tiny": SHAPES["tiny"],
}
# Block Transformer beside the vanilla size that its paper gives as equally good; the pairing is taken over, not checked.
PAIRS = {
    "block_main_b4_85": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "block_main_b4_300": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


@functools.cache
def llama(shape: str, device: str, draft: bool = False) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = DRAFTS[shape] if draft else SHAPES[shape]
    heads = 4 if shape == "tiny" else 32
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=131_072,
        bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(int(draft))
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


@contextmanager
def counted(model: Any) -> Iterator[list[None]]:
    """A list that grows by one with each pass of the model."""
    passes: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def timed(
    calls: dict[str, Callable[[], Any]], args: argparse.Namespace, repeats: int, tokens: int, target: Any = None
) -> dict[str, Any]:
    """Seconds of each call, turn by turn, its speed over the first one's, its memory, and the passes of ``target``.

    The first call of each is not timed: it warms up, and its peak is the memory, so workspaces are in it.
    """
    from tokenry.measure import interleave, peak_extra_memory

    first, found, running = next(iter(calls)), {}, {}
    for name, call in calls.items():
        try:
            if target is None:
                facts = {"memory_mib": peak_extra_memory(call, device=args.device) / 2**20}
            else:
                with counted(target) as passes:
                    facts = {"memory_mib": peak_extra_memory(call, device=args.device) / 2**20}
                facts["tokens_per_pass"] = tokens / len(passes)
        except Exception as error:
            if name == first:
                raise
            found[name] = {"error": reason(error)}
        else:
            found[name], running[name] = facts, call
    timings = interleave(running, repeats=repeats, warmup=0, device=args.device)
    for name, timing in timings.items():
        ratios = [a / b for a, b in zip(timings[first].seconds, timing.seconds, strict=True)]
        found[name] |= {
            "seconds": timing.median,
            "tokens_per_second": tokens / timing.median,
            "speed": statistics.median(ratios),
            "all": ratios,
        }
    return found


# --- strategies ---------------------------------------------------------------------------------------------------


@functools.cache
def embedded(device: str, new_tokens: int, few: bool) -> tuple[list[int], int, dict[str, list[int]]]:
    """From the embedded model, over code and list-like prompts: a text, its prompt's length, and tokens of each pass.

    The text is the one on which prompt lookup takes the middle number of passes. Tokens of each pass are given for every
    way to draft that needs training; the table of token recycling has been filled by five other prompts.
    """
    from tokenry.assets import load_model, model_path, prompts
    from tokenry.decoding import (
        DraftModelDecoding,
        ParallelPromptDecoding,
        ParallelPrompts,
        SortedDraft,
        SortedSpeculative,
        TokenRecycling,
    )

    model, tokenizer = load_model(device=device)
    draft, _ = load_model("draft", device=device)
    trained = ParallelPrompts.from_pretrained(model_path() / "parallel_prompts")
    ways = {
        "token recycling": TokenRecycling(tree=None),
        "parallel prompts": ParallelPromptDecoding(trained, trees=60),
        "draft model": DraftModelDecoding(draft),
        "sorted draft": SortedSpeculative(SortedDraft.from_pretrained().to(device)),
    }
    lengths: dict[str, list[int]] = {name: [] for name in ways}
    texts = []
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    for number, prompt in enumerate(prompts()[-8 if few else 20 :]):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        for name, way in ways.items():
            model.generate(**inputs, custom_generate=way, **options)
            if number >= 5:
                lengths[name] += [n for (n,) in way.stats.accepted]
        with counted(model) as passes:
            out = model.generate(**inputs, prompt_lookup_num_tokens=10, min_new_tokens=new_tokens, **options)
        texts.append((len(passes), out[0].tolist(), inputs["input_ids"].shape[1]))
    _, text, prompt_length = sorted(texts)[len(texts) // 2]
    return text, prompt_length, lengths


class Bench:
    """Models of one shape, the text that they write, and how often drafts are right."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        import torch

        self.device, self.new = args.device, args.new_tokens
        self.model, self.draft = llama(shape, args.device), llama(shape, args.device, draft=True)
        text, self.prompt, self.lengths = embedded(args.device, args.new_tokens, shape == "tiny")
        self.text = torch.tensor(text, device=args.device)
        self.layers = self.model.config.num_hidden_layers

    def generate(self, model: Any = None, **chosen: Any) -> Callable[[], Any]:
        import torch

        ids = self.text[None, : self.prompt]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": self.new, "do_sample": False} | chosen
        return lambda: (model or self.model).generate(ids, **options)

    def passes(self, way: str) -> list[int]:
        """Tokens of each pass: as many as fill the text, spread evenly over all that were seen, in a random order."""
        seen = sorted(self.lengths[way])
        count = max(1, round(self.new / statistics.fmean(seen)))
        chosen = [seen[int((i + 0.5) * len(seen) / count)] for i in range(count)]
        random.Random(0).shuffle(chosen)
        return chosen

    def right(self, way: str) -> Any:
        """``(N - 1,)`` bool: whether the draft knows what follows each token, so that passes accept ``passes(way)``."""
        import torch

        known = itertools.chain.from_iterable([*[True] * (n - 1), False] for n in itertools.cycle(self.passes(way)))
        behind = [next(known) for _ in range(len(self.text) - self.prompt)]
        return torch.tensor([True] * (self.prompt - 1) + behind, device=self.device)

    def put_right(self, way: str, strategy: Any) -> Any:
        """A strategy whose trees, at their own cost, hold the right tokens on as much of their deepest path."""
        propose, lengths, text = strategy.propose, self.passes(way), self.text
        written = set(text.tolist())
        never = next(token for token in itertools.count() if token not in written)

        def put(state: Any) -> Any:
            proposal = propose(state)
            tree, at = proposal.tree, state.lengths[0]
            if tree.size == 1:
                return proposal
            # nodes of negative rank are prompt tokens, which are never accepted
            paths = [tree.path_lists[node][1:] for node in range(1, tree.size) if tree.rank_list[node] >= 0]
            path = max(paths, key=len, default=[])
            right = min(len(path), lengths[len(state.stats.nodes) % len(lengths)] - 1, len(text) - at)
            proposal.tokens[:, 1:] = never
            if right > 0:
                proposal.tokens[0, path[:right]] = text[at : at + right]
            return proposal

        strategy.propose = put
        return strategy


@contextmanager
def scripted(model: Any, text: Any, right: Any = None) -> Iterator[None]:
    """A model of random weights that writes a text.

    Args:
        model: Its logits are changed at the token that follows, by the position of the token before.
        text: ``(N,)`` from position 0 on.
        right: ``(N - 1,)`` bool: where it knows the next token. Elsewhere its logits stay random, and unsure. None:
            everywhere.
    """
    import torch

    following = text[1:]
    sure = torch.full(following.shape, 1e4, dtype=model.dtype, device=text.device)
    if right is not None:
        sure = sure * right

    def write(module: Any, given: Any, options: dict[str, Any], output: Any) -> None:
        logits = output.logits  # (1, T, V)
        at = options["position_ids"][:, -logits.shape[1] :].clamp_max(len(following) - 1)
        logits.scatter_add_(-1, following[at][..., None], sure[at][..., None])

    hook = model.register_forward_hook(write, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        make: From the bench: the call, and the model that drafts for it and must be scripted, if there is one.
        means: What its figures mean.
        drafts: Whose tokens per pass on the embedded model its drafts are put right by.
        cuda: Whether it needs a CUDA device.
    """

    make: Callable[[Bench], tuple[Callable[[], Any], Any]]
    means: str
    drafts: str = ""
    cuda: bool = False


def _recycling(bench: Bench) -> tuple[Callable[[], Any], Any]:
    from tokenry.decoding import TokenRecycling

    strategy = bench.put_right("token recycling", TokenRecycling(tree=None))
    return bench.generate(custom_generate=strategy), None


def _plain_tree(bench: Bench) -> tuple[Callable[[], Any], Any]:
    from tokenry.decoding import TokenRecycling

    return bench.generate(custom_generate=TokenRecycling(tree=0)), None


def _parallel_prompts(bench: Bench) -> tuple[Callable[[], Any], Any]:
    import torch

    from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts

    prompts = ParallelPrompts(bench.model, m=3)
    prompts.accuracy = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.2, 0.1]])  # shapes the trees
    strategy = bench.put_right("parallel prompts", ParallelPromptDecoding(prompts, trees=60))
    return bench.generate(custom_generate=strategy), None


def _draft_model(bench: Bench) -> tuple[Callable[[], Any], Any]:
    from tokenry.decoding import DraftModelDecoding

    return bench.generate(custom_generate=DraftModelDecoding(bench.draft)), bench.draft


def _sorted_draft(bench: Bench) -> tuple[Callable[[], Any], Any]:
    from tokenry.decoding import SortedDraft, SortedSpeculative

    layers = max(2, bench.layers // 4)
    exits = sorted({max(1, layers // 4), layers // 2, layers})
    draft = SortedDraft.from_model(bench.model, layers=layers, exits=exits)
    return bench.generate(custom_generate=SortedSpeculative(draft)), draft.model


def _collaborating(method: Any) -> Callable[[Bench], tuple[Callable[[], Any], Any]]:
    def make(bench: Bench) -> tuple[Callable[[], Any], Any]:
        from tokenry.decoding import collaborate

        tuned = {"tuned_model": bench.draft} if method == "proxy" else {}
        strategy = collaborate(bench.model, method, **tuned)
        return bench.generate(bench.draft, custom_generate=strategy), bench.draft

    return make


def _skipping(speedup: float) -> Callable[[Bench], tuple[Callable[[], Any], Any]]:
    def make(bench: Bench) -> tuple[Callable[[], Any], Any]:
        from tokenry.decoding import SkipSchedule, skip_decode

        schedule, stock = SkipSchedule.for_speedup(bench.layers, speedup), bench.generate()

        def run() -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="this model was not fine-tuned")
                with skip_decode(bench.model, schedule):
                    return stock()

        return run, None

    return make


REPLAYED = "drafts cost what they cost at this shape, and are right as often as on the embedded model with its"
FUSED = "both models read every token, whatever the text; what the fused text is worth is not measured"
FEWER = "layers skipped, whatever the text; what the text is worth after fine-tuning is not measured"
WAYS = {
    # generate compiles its step by itself on a CUDA device
    "static cache, compiled": Way(
        lambda bench: (bench.generate(cache_implementation="static"), None), "stock generate, compiled step", cuda=True
    ),
    "zero-node tree": Way(_plain_tree, "the draft engine's own cost: nothing is drafted"),
    "token recycling": Way(_recycling, f"{REPLAYED} filled table", "token recycling"),
    "parallel prompts": Way(_parallel_prompts, f"{REPLAYED} trained prompts", "parallel prompts"),
    "prompt lookup": Way(
        lambda bench: (bench.generate(prompt_lookup_num_tokens=10), None),
        "the library's; look-ups hit as often as in the one text that is written",
    ),
    "assisted generation": Way(
        lambda bench: (bench.generate(assistant_model=bench.draft), bench.draft),
        f"the library's; {REPLAYED} draft model, and it stops where it is unsure",
        "draft model",
    ),
    "draft model": Way(_draft_model, f"{REPLAYED} draft model", "draft model"),
    "sorted draft": Way(
        _sorted_draft,
        f"{REPLAYED} sorted draft; the first exit answers what it knows, the last what it does not",
        "sorted draft",
    ),
    "FS-GEN, speculative": Way(_collaborating("speculative"), f"{REPLAYED} draft model", "draft model"),
    "FS-GEN, contrastive": Way(_collaborating("contrastive"), FUSED),
    "FS-GEN, proxy": Way(_collaborating("proxy"), f"{FUSED}; the small model is read twice, as itself and as tuned"),
    "SkipDecode, 4/3": Way(_skipping(4 / 3), f"a quarter of the {FEWER}"),
    "SkipDecode, 2": Way(_skipping(2.0), f"half of the {FEWER}"),
}


def strategies(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Tokens per second of each way to generate, turn by turn with stock ``generate``."""
    bench = functools.cache(lambda: Bench(shape, args))

    def measured(name: str) -> dict[str, Any]:
        way, on = WAYS[name], bench()
        call, draft = way.make(on)
        calls = {"generate": on.generate(), name: call}
        facts: dict[str, Any] = {"means": way.means}
        if way.drafts:
            facts["embedded_tokens_per_pass"] = statistics.fmean(on.lengths[way.drafts])
        if way.cuda:  # a hook would be compiled along
            return timed(calls, args, args.repeats, on.new) | facts
        with ExitStack() as stack:
            stack.enter_context(scripted(on.model, on.text))
            if draft is not None:
                right = on.right(way.drafts) if way.drafts else None
                stack.enter_context(scripted(draft, on.text, right))
            return timed(calls, args, args.repeats, on.new, target=on.model) | facts

    for name, way in WAYS.items():
        if not way.cuda or args.device.startswith("cuda"):
            yield f"strategies/{shape}/{name}", lambda name=name: measured(name)


# --- caches -------------------------------------------------------------------------------------------------------


def contexts(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Eight new tokens behind contexts of growing length: full attention, TidalDecode, EMS.

    The full cache is filled with random keys and values, which cost what others cost. EMS keeps as many entries of any
    longer prompt as of the short one that it reads here, and is then told the length.
    """
    import torch
    from transformers import DynamicCache

    from tokenry.kvcache import EMSCache, cache_bytes, tidal
    from tokenry.layers.cache_argument import CACHE

    tiny, new = shape == "tiny", 8
    lengths = (256, 512) if tiny else (4096, 16_384, 32_768, 65_536, 98_304)
    budget, start, correction = (32, 2, -1) if tiny else (1024, 2, 13)

    def measured(length: int) -> dict[str, Any]:
        model = llama(shape, args.device)
        config = model.config
        ids = torch.randint(2, config.vocab_size, (1, 2 * budget), device=args.device)
        full, small = DynamicCache(config=config), EMSCache(config, budget=budget, window=16)
        sizes = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            full.update(*(torch.randn(sizes, dtype=model.dtype, device=args.device) for _ in range(2)), layer)
        with torch.inference_mode():
            model(ids, **{CACHE: small}, logits_to_keep=1)
        for layer in small.layers:
            layer.cumulative_length = length

        def steps(cache: Any) -> Callable[[], None]:
            """The cache is afterwards as it was: an update makes new tensors and leaves the old ones alone."""
            before = [dict(vars(layer)) for layer in cache.layers]

            def run() -> None:
                with torch.inference_mode():
                    for _ in range(new):
                        model(ids[:, :1], **{CACHE: cache})
                for layer, state in zip(cache.layers, before, strict=True):
                    vars(layer).update(state)

            return run

        everything = steps(full)

        def sparse(tokens: int) -> None:
            with tidal(model, budget=tokens, start=start, correction=correction):
                everything()

        calls = {"full": everything, "ems": steps(small)}
        calls |= {f"tidal {n}": lambda n=n: sparse(n) for n in ((16,) if tiny else (128, 512, 2048, 4096))}
        found = timed(calls, args, args.repeats, new)
        after = [cache.get_seq_length() for cache in (full, small)]
        if after != [length, length]:
            raise RuntimeError(f"the caches hold {after} tokens after timing, {length} before")
        found["cache_mib"] = {"full": cache_bytes(full) / 2**20, "ems": cache_bytes(small) / 2**20}
        return found

    for length in lengths:
        yield f"contexts/{shape}/{length}", lambda length=length: measured(length)


# --- many requests ------------------------------------------------------------------------------------------------


def batches(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A load whose prompts share prefixes."""
    import torch

    from tokenry.decoding import batch_generate

    groups, members, shared, own, new = (3, 4, 48, 16, 8) if shape == "tiny" else (12, 8, 1024, 128, 64)

    def measured() -> dict[str, Any]:
        model = llama(shape, args.device)
        torch.manual_seed(0)
        load = []
        for _ in range(groups):
            prefix = torch.randint(2, model.config.vocab_size, (shared,)).tolist()
            load += [prefix + torch.randint(2, model.config.vocab_size, (own,)).tolist() for _ in range(members)]
        load = [load[i] for i in torch.randperm(len(load)).tolist()]

        def arrival() -> None:
            for i in range(0, len(load), 32):
                ids = torch.tensor(load[i : i + 32], device=args.device)
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

        calls = {
            "generate, batches of 32": arrival,
            "batch_generate": lambda: batch_generate(model, load, new, max_tokens_per_pass=4096),
            "batch_generate, no sharing": lambda: batch_generate(
                model, load, new, max_tokens_per_pass=4096, grouping="none", order="input"
            ),
        }
        return timed(calls, args, max(2, args.repeats // 2), len(load) * new) | {"requests": len(load)}

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
        prompt, new = (16, 16) if small else (128, 256)
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
        return timed(calls, args, max(2, args.repeats // 2), rows * new)

    for name in PAIRS:
        for rows in (2,) if small else (1, 64, 1024):
            yield f"blocks/{name}{'/tiny' if small else ''}/{rows}", lambda name=name, rows=rows: measured(name, rows)


def drafts(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """k superposed drafts against k nucleus samples, one after the other and in one batch."""
    import torch

    from tokenry.decoding import SuperposedDecoding

    new = 10
    sampling = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": new}

    def measured(k: int) -> dict[str, Any]:
        model = llama(shape, args.device)
        ids = torch.randint(2, model.config.vocab_size, (1, 15), device=args.device)
        given = {"attention_mask": torch.ones_like(ids)}
        superposed = SuperposedDecoding(k)
        calls = {
            "nucleus, one by one": lambda: [model.generate(ids, **given, **sampling) for _ in range(k)],
            "nucleus, one batch": lambda: model.generate(ids, num_return_sequences=k, **given, **sampling),
            "superposed": lambda: model.generate(
                ids, custom_generate=superposed, max_new_tokens=new, do_sample=False, **given
            ),
        }
        return timed(calls, args, args.repeats, k * new)

    for k in (1, 3) if shape == "tiny" else (1, 3, 10):
        yield f"drafts/{shape}/{k}", lambda k=k: measured(k)


PARTS = {part.__name__: part for part in (strategies, contexts, batches, blocks, drafts)}


def finished(path: Path, settings: dict[str, Any]) -> set[str]:
    """Keys that were measured with these settings, by their newest line, and in which nothing failed."""
    fine = {}
    for entry in kept_lines(path):
        if entry.get("settings") == settings:
            found = entry["found"]
            fine[entry["key"]] = not any("error" in part for part in (found, *found.values()) if isinstance(part, dict))
    return {key for key, good in fine.items() if good}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("decoding_gpu.jsonl"), help="JSONL file, continued if it exists"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "7b"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each call")
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

    settings = {"device": args.device, "new_tokens": args.new_tokens, "repeats": args.repeats}
    facts = {
        "settings": settings,
        "machine": describe_machine(args.device).model_dump(),
        "versions": package_versions(),
    }
    done = finished(args.out, settings)
    for part in args.parts:
        for shape in args.shapes:
            for key, measured in PARTS[part](shape, args):
                if key in done:
                    continue
                try:
                    found = measured()
                except Exception as error:  # one measurement's failure must not end the run
                    found = {"error": reason(error)}
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "found": found, **facts}) + "\n")
                shown = {
                    name: part["error"] if "error" in part else round(part["speed"], 2)
                    for name, part in found.items()
                    if isinstance(part, dict) and ("error" in part or "speed" in part)
                }
                print(key, found.get("error") or shown, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
