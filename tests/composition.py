"""Which ways of generating go together with which caches, batches and settings: tried out, cell by cell.

    python tests/composition.py        # writes docs/composition.md; a test holds the page to what really happens

A cell runs a way of generating on a tiny model under a condition and compares with stock ``generate`` under the same one.
Anything but the same text, another text that is meant, or a refusal with a reason is an error.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedLayer

from tokenry.decoding import (
    DraftModelDecoding,
    ParallelPromptDecoding,
    ParallelPrompts,
    SkipSchedule,
    SortedDraft,
    SortedSpeculative,
    SuperposedDecoding,
    TokenRecycling,
    batch_generate,
    collaborate,
    skip_decode,
)
from tokenry.kvcache import EMSCache, SlidingWindowCache, tidal
from tokenry.language import BlockTransformerConfig, BlockTransformerForCausalLM
from tokenry.layers.cache_argument import CACHE

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
VOCABULARY, NEW = 41, 12
SAME, OTHER, DRAWS = "same text", "own text", "draws"
PADDED = "own text, by padding"


@functools.cache
def tiny(layers: int = 3, seed: int = 0) -> Any:
    """A random model with large weights, so that texts do not repeat at once. All cells share it: nothing may stick."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.35, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@functools.cache
def blocks() -> Any:
    """A random Block Transformer."""
    torch.manual_seed(0)
    config = BlockTransformerConfig(
        vocab_size=VOCABULARY, hidden_size=32, block_layers=3, token_layers=2, num_attention_heads=4,
        token_attention_heads=4, initializer_range=0.35, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return BlockTransformerForCausalLM(config).double().eval()


class RoundedLayer(QuantizedLayer):
    """The library's quantized layer with the plainest quantizer there is: eight bits, one scale per tensor."""

    def __init__(self) -> None:
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().max() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0].to(q_tensor[1].dtype) * q_tensor[1]


def quantized(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [RoundedLayer() for _ in cache.layers]
    return cache


def alone() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))}


def padded() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@dataclass(frozen=True)
class Condition:
    """What a way of generating is combined with."""

    options: Callable[[Any], dict[str, Any]] = lambda model: {}
    inputs: Callable[[], dict[str, Tensor]] = alone
    around: Callable[[Any], AbstractContextManager] = lambda model: nullcontext()
    model: Callable[[], Any] | None = None

    def __and__(self, other: Condition) -> Condition:
        """Both at once."""

        @contextmanager
        def around(model: Any) -> Iterator[None]:
            with self.around(model), other.around(model):
                yield

        return Condition(
            lambda model: self.options(model) | other.options(model),
            padded if padded in (self.inputs, other.inputs) else alone,
            around,
            self.model or other.model,
        )


BATCH = Condition(inputs=padded)
SAMPLING = Condition(lambda model: {"do_sample": True, "temperature": 0.7})
PENALTY = Condition(lambda model: {"repetition_penalty": 1.3})
BEAMS = Condition(lambda model: {"num_beams": 3})
CACHES = {
    "EMS cache": Condition(lambda model: {CACHE: EMSCache(model.config, budget=8, window=3)}),
    "sliding-window cache": Condition(lambda model: {CACHE: SlidingWindowCache(model.config, budget=8)}),
    "quantized cache": Condition(lambda model: {CACHE: quantized(model)}),
    "static cache": Condition(lambda model: {"cache_implementation": "static"}),
    "inside tidal": Condition(around=lambda model: tidal(model, budget=4, start=1)),
    "inside skip_decode": Condition(around=lambda model: skip_decode(model, SkipSchedule(3, 2))),
}
ONE = "One thing at a time"
# Section to condition by name: first what comes alone, then each cache together with what else there is.
SECTIONS = {
    ONE: {
        "one prompt": Condition(),
        "batch, left padding": BATCH,
        "sampling": SAMPLING,
        "repetition penalty": PENALTY,
        "beams": BEAMS,
        **CACHES,
        "Block Transformer": Condition(model=blocks),
    },
    "Several settings at a time, default cache": {
        "batch, sampling": BATCH & SAMPLING,
        "batch, repetition penalty": BATCH & PENALTY,
        "batch, beams": BATCH & BEAMS,
        "sampling, repetition penalty": SAMPLING & PENALTY,
    },
} | {
    f"{name[0].upper()}{name[1:]}, and": {
        "batch": cache & BATCH,
        "sampling": cache & SAMPLING,
        "repetition penalty": cache & PENALTY,
        "beams": cache & BEAMS,
        "batch, sampling": cache & BATCH & SAMPLING,
        "batch, beams": cache & BATCH & BEAMS,
    }
    for name, cache in CACHES.items()
}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, **options)


def together(model: Any, inputs: dict[str, Tensor], max_new_tokens: int, **options: Any) -> Tensor:
    """``batch_generate`` with the rows for requests; no token ends them here, so all are equally long."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    rows = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    outs, _ = batch_generate(model, rows, max_new_tokens, memory_limit="100MB", **options)
    return torch.cat([ids, torch.stack([out[-max_new_tokens:] for out in outs])], 1)


def recomputing(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **prepared: Any
) -> Tensor:
    """Greedy search of a Block Transformer that computes everything anew for each token."""
    fill = -input_ids.shape[1] % model.config.block_length  # a block ends where the prompt ends
    mask = prepared.get("attention_mask")
    mask = F.pad(torch.ones_like(input_ids) if mask is None else mask, (fill, 0))
    while not bool(stopping_criteria(input_ids, None).all()):
        logits = model(F.pad(input_ids, (fill, 0)), attention_mask=mask).logits[:, -1]
        chosen = logits_processor(input_ids, logits).argmax(-1, keepdim=True)
        input_ids, mask = torch.cat([input_ids, chosen], 1), F.pad(mask, (0, 1), value=1)
    return input_ids


@dataclass(frozen=True)
class Way:
    """A way of generating.

    Attributes:
        make: From the model: options of ``call``.
        around: A context manager to generate in.
        writer: Whose text it writes, if not that of the model that it is called on.
        call: What is called; ``generate`` unless it is something else.
        model: The model that it is called on.
    """

    make: Callable[[Any], dict[str, Any]] = lambda model: {}
    around: Callable[[Any], AbstractContextManager] = lambda model: nullcontext()
    writer: Callable[[Any], Any] = lambda model: model
    call: Callable[..., Tensor] = generate
    model: Callable[[], Any] = tiny


def strategy(make: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {"custom_generate": make(model)}


def large(model: Any) -> Any:
    return tiny(seed=5)


def parallel_prompts(model: Any) -> ParallelPromptDecoding:
    """Untrained prompts: hardly a guess is right, the text must be the same all the more."""
    prompts = ParallelPrompts(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    prompts.accuracy = torch.tensor([[0.4, 0.2], [0.3, 0.1], [0.2, 0.1]])
    return ParallelPromptDecoding(prompts, trees=12)


def sorted_draft(model: Any) -> SortedSpeculative:
    """The target's own first layers as the draft."""
    return SortedSpeculative(SortedDraft.from_model(model, layers=2, exits=(1, 2)), (0.5,), 3)


STOCK, RECOMPUTED = Way(), Way(lambda model: {"custom_generate": recomputing})
WAYS = {
    "`generate`": STOCK,
    "`TokenRecycling`": Way(strategy(lambda model: TokenRecycling(tree=20, k=4))),
    "`ParallelPromptDecoding`": Way(strategy(parallel_prompts)),
    "`SortedSpeculative`": Way(strategy(sorted_draft)),
    "`DraftModelDecoding`": Way(strategy(lambda model: DraftModelDecoding(tiny(layers=2, seed=5), draft_tokens=3))),
    '`collaborate(method="speculative")`': Way(
        strategy(lambda model: collaborate(large(model), method="speculative")), writer=large
    ),
    '`collaborate(method="oracle")`': Way(
        strategy(lambda model: collaborate(large(model), method="oracle")), writer=large
    ),
    '`collaborate(method="contrastive")`': Way(strategy(lambda model: collaborate(large(model), method="contrastive"))),
    '`collaborate(method="proxy")`': Way(
        strategy(lambda model: collaborate(large(model), method="proxy", tuned_model=tiny(seed=6)))
    ),
    "`batch_generate`": Way(call=together),
    "`SuperposedDecoding`": Way(strategy(lambda model: SuperposedDecoding(2))),
    "`with tidal(...)`": Way(around=lambda model: tidal(model, budget=4, start=1)),
    "`with skip_decode(...)`": Way(around=lambda model: skip_decode(model, SkipSchedule(3, 2))),
    "`BlockTransformerForCausalLM`": Way(model=blocks),
}
# What promises the text of its writer.
LOSSLESS = (
    "`TokenRecycling`",
    "`ParallelPromptDecoding`",
    "`SortedSpeculative`",
    "`DraftModelDecoding`",
    '`collaborate(method="speculative")`',
    '`collaborate(method="oracle")`',
    "`batch_generate`",
)


def run(way: Way, condition: Condition, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False} | condition.options(model)
    torch.manual_seed(7)
    with condition.around(model), way.around(model):
        return way.call(model, inputs, **way.make(model), **options)


@functools.cache
def reference(condition: Condition, model: Any) -> Tensor:
    """The text that stock ``generate`` writes; of a Block Transformer, the text that recomputation gives."""
    way = RECOMPUTED if isinstance(model, BlockTransformerForCausalLM) else STOCK
    return run(way, condition, model, condition.inputs())


def outcome(way: Way, condition: Condition) -> str:
    """``same text``, ``own text`` (which padding may change), ``draws``, or the message of a refusal."""
    model, inputs = (condition.model or way.model)(), condition.inputs()
    try:
        mine = run(way, condition, model, inputs)
    except ValueError as refusal:
        return f"refused: {refusal}"
    rows, width = inputs["input_ids"].shape
    new = mine[..., width:]
    if mine.shape[0] != rows or not 0 < new.shape[-1] <= NEW or not ((new >= 0) & (new < VOCABULARY)).all():
        raise AssertionError(f"{tuple(mine.shape)} is no text for {rows} prompts of {width} tokens")
    if condition.options(model).get("do_sample"):
        if not torch.equal(mine, run(way, condition, model, inputs)):
            raise AssertionError("the same seed draws another text")
        return DRAWS
    same = mine.ndim == 2 and torch.equal(mine, reference(condition, way.writer(model)))
    if rows > 1 and (way is STOCK or not same):
        real = inputs["attention_mask"].bool()
        for ids, keep, text in zip(inputs["input_ids"], real, new, strict=True):
            prompt = ids[keep][None]
            if not torch.equal(run(way, condition, model, {"input_ids": prompt})[0, ..., prompt.shape[1] :], text):
                return PADDED
    return SAME if same else OTHER


Cells = dict[str, dict[str, dict[str, str]]]


def table() -> Cells:
    """All cells: section to way to condition to outcome."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model was not fine-tuned")
        return {
            section: {
                name: {title: outcome(way, condition) for title, condition in conditions.items()}
                for name, way in WAYS.items()
            }
            for section, conditions in SECTIONS.items()
        }


def page(cells: Cells) -> str:
    """The tables as Markdown; refusals as numbered notes, ways that are refused throughout below their table."""
    notes: list[str] = []

    def shown(value: str) -> str:
        if not value.startswith("refused: "):
            return value
        reason = re.sub(r"\s+", " ", value.removeprefix("refused: "))
        if reason not in notes:
            notes.append(reason)
        return f"refused ({notes.index(reason) + 1})"

    lines = []
    for section, ways in cells.items():
        titles = SECTIONS[section]
        lines += [f"## {section}", "", "| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        refused = []
        for name, row in ways.items():
            values = [shown(value) for value in row.values()]
            if section != ONE and all(value.startswith("refused") for value in values):
                numbers = sorted({int(value[9:-1]) for value in values})
                refused.append(f"{name} ({', '.join(map(str, numbers))})")
            else:
                lines.append(f"| {name} | " + " | ".join(values) + " |")
        lines += ["", f"Refused throughout: {', '.join(refused)}.", ""] if refused else [""]
    return "\n".join([*lines, "## Why", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""])


HEAD = """# What goes with what

Every cell was run: a way of generating on a tiny model, in float64, under a condition, beside stock `generate` under the same
condition. A test runs them again and holds this page to the result; `python tests/composition.py` writes it anew.

- **same text**: exactly the text of `generate` under that condition (for collaboration that is speculative or always asks,
  "oracle": of the large model; for a Block Transformer: of computing everything anew for each token).
- **own text**: it runs, and the text is another one, by design: `SuperposedDecoding`, `tidal`, `skip_decode`, contrastive and
  proxy collaboration do not promise the model's text. In a batch each row gets the text that it gets alone.
- **own text, by padding**: the same, but not row by row: the quantizer of this test rounds a whole batch, padding included, by
  one scale.
- **draws**: it samples; the same seed gives the same text. That the distribution is the model's own is tested elsewhere.
- Where `skip_decode` skips the layer that `tidal` selects in, the layers above it read everything.
- **refused (n)**: a `ValueError` with the reason n below, before anything is generated.

"""


if __name__ == "__main__":
    PAGE.write_text(HEAD + page(table()), "utf-8")
