"""Time the language-model methods beside their authors' code, which stays where it is.

    pip install --target ~/old --no-deps transformers==4.39.3 tokenizers==0.15.2 huggingface_hub==0.23.4
    python benchmarks/decoding_reference.py --checkouts ~/src --old-transformers ~/old --out speed.jsonl

``--checkouts`` holds the repositories parallel-prompt-decoding, TidalDecode and block-transformer, named as on GitHub; those
that are not there are left out. Same weights and inputs in both, results compared, times taken turn by turn. A ratio
above 1 means that ours is faster.

The authors' Parallel Prompt Decoding and TidalDecode run in this process, on the installed transformers, behind stand-ins
for what they import and do not need. Their Block Transformer needs transformers 4.39 and answers as a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tokenry.assets import load_model, model_path, prompts
from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts, sparse_trees
from tokenry.kvcache import tidal
from tokenry.language import BlockTransformerConfig, BlockTransformerForCausalLM
from tokenry.language.block_transformer_checkpoint import checkpoint_filter_fn
from tokenry.layers.cache_argument import CACHE
from tokenry.measure import interleave

REPOSITORIES = {
    "ppd": "parallel-prompt-decoding",
    "tidaldecode": "TidalDecode",
    "block-transformer": "block-transformer",
}
BUDGET = 60  # nodes of a draft tree
READ = 256  # tokens that a sparse layer reads


@dataclass
class Pair:
    """The same work by both.

    Attributes:
        slug: The method.
        id: What is timed.
        sentence: The same in words.
        calls: ``"ours"`` and ``"authors"``.
        same: Whether the results agree.
        counts: Of what a call holds several, for the times of one: ``{"pass": {"ours": 53, "authors": 54}}``.
        details: Further figures.
    """

    slug: str
    id: str
    sentence: str
    calls: Mapping[str, Callable[[], object]]
    same: bool
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@contextmanager
def importable(folder: Path, stand_ins: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Import from a checkout; modules that are missing, and names that the installed ones have lost, are stand-ins."""
    made = {}
    for name, content in stand_ins.items():
        if name.startswith("transformers"):  # what is added to it hurts nobody
            vars(importlib.import_module(name)).update(content)
        else:
            made[name] = types.ModuleType(name)
            vars(made[name]).update(content)
    sys.modules.update(made)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in made:
            del sys.modules[name]


# --- Parallel Prompt Decoding -------------------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """What the authors' decoder uses of peft's model: the prompts."""

    prompts: torch.Tensor

    def get_prompt(self, batch_size: int) -> torch.Tensor:
        return self.prompts.expand(batch_size, -1, -1)


class AdapterConfig:
    """peft's, of which the authors' settings are a subclass."""

    def __post_init__(self) -> None:
        pass


def authors_ppd(folder: Path, model: Any, mine: ParallelPrompts, trees: Mapping[int, Any]) -> Any:
    """The authors' decoder with our weights, prompts and trees."""
    peft = dict.fromkeys(("PeftType", "PrefixTuningConfig", "PromptEncoderConfig"))
    peft |= {"PeftModel": Adapter, "PromptTuningConfig": AdapterConfig, "PromptTuningInit": SimpleNamespace(TEXT=None)}
    stand_ins = {
        "peft": peft,
        "fastchat": {},
        "fastchat.model": {},
        "fastchat.conversation": {"SeparatorStyle": None},
        "fastchat.model.model_adapter": {"get_conversation_template": None},
        "transformers.utils": {"is_flash_attn_available": lambda: False},
    }
    with importable(folder, stand_ins):
        llama = importlib.import_module("prompt.model.modeling_llama_custom").LlamaForCausalLM
        decoder = importlib.import_module("prompt.model.model").PromptDecoder
    config = LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": False}, attn_implementation="eager")
    config.rope_theta, config.rope_scaling = config.rope_parameters["rope_theta"], None  # as the config was in 2023
    llama._tied_weights_keys = None
    theirs = llama(config).eval()
    theirs.load_state_dict(model.state_dict())
    made = decoder.__new__(decoder)  # its __init__ asks the hub for a tokenizer
    torch.nn.Module.__init__(made)
    made.base_model, made.word_embeddings, made.prompts = theirs, theirs.model.embed_tokens, mine.embeddings.detach()
    made.device, made.tokenizer = torch.device("cpu"), SimpleNamespace(eos_token_id=-1)
    made.active_peft_config = SimpleNamespace(num_special_tokens=mine.m)
    made.generate_dynamic_buffers(
        {state: [(list(n.path), n.contribution, n.prompts) for n in nodes] for state, nodes in trees.items()}
    )
    return made


def ppd(folder: Path) -> Iterator[Pair]:
    """Greedy decoding of the same texts with the same trees, by a small trained model and a wider random one."""
    embedded, tokenizer = load_model()
    mine = ParallelPrompts.from_pretrained(model_path() / "parallel_prompts")
    table: Any = mine.accuracy
    trees = sparse_trees(table, BUDGET)
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts()[::10]]
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).eval()
    models = {
        "embedded": ("the embedded model with its shipped prompts", embedded, mine, texts, 64),
        "llama-512": (
            "a random Llama of 8 layers of 512",
            wide,
            ParallelPrompts(torch.randn(3, 512) * 0.02),
            [torch.randint(1, 4096, (1, 64))],
            32,
        ),
    }
    for name, (words, model, own, inputs, new) in models.items():
        decoder = authors_ppd(folder, model, own, trees)
        strategy = ParallelPromptDecoding(own, trees)

        def authors(ids: torch.Tensor, decoder=decoder, new=new) -> tuple[torch.Tensor, int]:
            for passes, out in enumerate(decoder.ppd_generate(ids), 2):  # the prompt's pass is the first
                if out.shape[1] >= ids.shape[1] + new:
                    return out[0, : ids.shape[1] + new], passes
            raise ValueError("the authors' loop ended early")

        def ours(ids: torch.Tensor, model=model, strategy=strategy, new=new) -> tuple[torch.Tensor, int]:
            out = model.generate(
                ids, custom_generate=strategy, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            return out[0], strategy.stats.forward_passes + strategy.stats.prefill_passes

        both = {"ours": ours, "authors": authors}
        results = {key: [call(ids) for ids in inputs] for key, call in both.items()}
        yield Pair(
            "ppd",
            f"decode-{name}",
            f"greedy decoding of {len(inputs)} text(s) of {new} tokens, trees of budget {BUDGET}, {words}",
            {key: lambda call=call, inputs=inputs: [call(ids) for ids in inputs] for key, call in both.items()},
            all(torch.equal(a, b) for (a, _), (b, _) in zip(*results.values(), strict=True)),
            {
                "token": dict.fromkeys(both, new * len(inputs)),
                "pass": {key: sum(passes for _, passes in found) for key, found in results.items()},
            },
        )


# --- TidalDecode --------------------------------------------------------------------------------------------------


@contextmanager
def authors_tidal(attend: Callable[..., Any], model: Any, budget: int, start: int, correction: int) -> Iterator[None]:
    """Their attention in the installed library's Llama, which calls it by other names; the mask is handed up as there."""
    handed: dict[str, Any] = {}

    def forward(module: Any, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        module.pos_dict = handed.get("mask")
        out = attend(
            module,
            hidden_states,
            given["attention_mask"],
            past_key_value=given[CACHE],
            position_embeddings=given["position_embeddings"],
            top_k=budget,
            sparse_layer_start=start,
            correction_layer=correction,
        )
        handed["mask"] = module.pos_dict
        return out[0], None

    layers = [layer.self_attn for layer in model.model.layers]
    for module in layers:
        module.num_heads, module.num_key_value_heads = (
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
        )
        module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in layers:
            del module.forward


def tidaldecode(folder: Path) -> Iterator[Pair]:
    """One decoding step behind long contexts of random keys and values."""
    stand_ins = {"transformers.models.llama.modeling_llama": {"LlamaSdpaAttention": None}}
    with importable(folder, stand_ins):
        attend = importlib.import_module("src.tidal_build.modify_llama").llama_tidal_attention_forward
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16385,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    token = torch.tensor([[7]])
    for context in (4096, 16384):
        stored = [torch.randn(2, 1, 4, context, 64) for _ in range(16)]
        cache = DynamicCache(config=config)
        for i, (keys, values) in enumerate(stored):
            cache.update(keys[:, :, :1], values[:, :, :1], i)

        def step(cache=cache, stored=stored) -> torch.Tensor:
            for layer, (keys, values) in zip(cache.layers, stored, strict=True):
                layer.keys, layer.values = keys, values
            with torch.inference_mode():
                return model(token, **{CACHE: cache}).logits

        def ours(step=step) -> torch.Tensor:
            with tidal(model, READ, start=2, correction=9):
                return step()

        def authors(step=step) -> torch.Tensor:
            with authors_tidal(attend, model, READ, 2, 9):
                return step()

        expected, found = authors(), ours()
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        yield Pair(
            "tidaldecode",
            f"decode-step-{context}",
            f"one decoding step of a random Llama of 16 layers of 512 behind {context:,} tokens, {READ} read, the authors' "
            "PyTorch code, which masks the rest",
            {"ours": ours, "authors": authors},
            difference < 1e-4,
            details={"relative_logit_difference": difference},
        )


# --- Block Transformer --------------------------------------------------------------------------------------------


def block_transformer(folder: Path, old_transformers: Path) -> Iterator[Pair]:
    """Loss of a training sequence, and greedy generation, of the authors' smallest published size."""
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("block_transformer_authors.py")), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(old_transformers)},
    )  # fmt: skip
    with worker, tempfile.TemporaryDirectory() as work:
        files = {name: str(Path(work) / f"{name}.pt") for name in ("weights", "inputs", "result")}

        def ask(**call: Any) -> None:
            print(json.dumps(call), file=worker.stdin, flush=True)
            if not worker.stdout.readline():
                raise RuntimeError("the authors' process ended; its message is above")

        def result(**call: Any) -> torch.Tensor:
            ask(**call, result=files["result"])
            return torch.load(files["result"], weights_only=True)

        sizes = {"vocab_size": 50304, "block_length": 4, "hidden_size": 256, "layers": 3, "heads": 8, "positions": 512}
        ask(call="build", sizes=sizes, weights=files["weights"])
        config = BlockTransformerConfig(
            hidden_size=256, block_layers=3, token_layers=3, eos_token_id=None, prefixes_share_position=True
        )
        model = BlockTransformerForCausalLM(config).eval()
        model.load_state_dict(checkpoint_filter_fn(torch.load(files["weights"], weights_only=True)))
        side = "in a process of its own with transformers 4.39.3, turn by turn"
        for batch in (1, 8):
            ids = torch.randint(1, 50304, (batch, 64))
            torch.save({"ids": ids}, files["inputs"])
            ask(call="input", file=files["inputs"])
            call = {"call": "generate", "length": 128}
            yield Pair(
                "block-transformer",
                f"generate-batch-{batch}",
                f"block_main_b4_5, 64 tokens behind 64, batch {batch}, the authors' code {side}",
                {
                    "ours": lambda ids=ids: model.generate(ids, max_length=128, do_sample=False),
                    "authors": lambda call=call: ask(**call),
                },
                torch.equal(model.generate(ids, max_length=128, do_sample=False), result(**call)),
            )
        ids = torch.randint(1, 50304, (1, 2048))
        torch.save({"ids": ids}, files["inputs"])
        ask(call="input", file=files["inputs"])

        @torch.no_grad()
        def loss() -> Any:
            return model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss

        expected = result(call="forward")
        yield Pair(
            "block-transformer",
            "loss-2048",
            f"block_main_b4_5, loss of one training sequence of 2,048 tokens without gradients, the authors' code {side}",
            {"ours": loss, "authors": lambda: ask(call="forward")},
            torch.allclose(loss(), expected, rtol=1e-5),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, help="folder with the authors' repositories")
    parser.add_argument("--old-transformers", type=Path, help="folder with transformers 4.39.3, for block-transformer")
    parser.add_argument("--methods", nargs="*", choices=REPOSITORIES, default=list(REPOSITORIES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="append one JSON line per timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    timed = {
        "ppd": ppd,
        "tidaldecode": tidaldecode,
        "block-transformer": partial(block_transformer, old_transformers=options.old_transformers),
    }
    for slug in options.methods:
        folder = options.checkouts / REPOSITORIES[slug]
        if not folder.is_dir() or (slug == "block-transformer" and options.old_transformers is None):
            print(f"{slug}: left out, {folder} or --old-transformers is missing")
            continue
        for pair in timed[slug](folder):
            times = interleave(pair.calls, repeats=options.repeats, warmup=1)
            ratio = times["authors"].median / times["ours"].median
            seconds = {key: times[key].median for key in pair.calls}
            each = {
                f"{key}_seconds_per_{what}": seconds[key] / count
                for what, counts in pair.counts.items()
                for key, count in counts.items()
            }
            record = {
                "slug": pair.slug,
                "check": "speed",
                "id": pair.id,
                "passed": pair.same and ratio >= 1.0,
                "value": round(ratio, 3),
                "unit": "x",
                "baseline": 1.0,
                "sentence": f"{pair.sentence}, one thread: {ratio:.2f} times the speed of the authors' code (must be at "
                f"least 1), results {'the same' if pair.same else 'DIFFERENT'}",
                "details": {f"{key}_seconds": value for key, value in seconds.items()} | each | pair.details,
            }
            print(record["sentence"], flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
