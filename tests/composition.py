"""Which ways of generating go together with which caches, batches and settings: tried out, cell by cell.

    python tests/composition.py        # writes docs/composition.md; a test holds the page to what really happens

A cell runs a way of generating on a tiny model under a condition and compares with stock ``generate`` under the same one.
Anything but the same text, another text that is meant, or a refusal with a reason is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedLayer

from tokenry.decoding import (
    ParallelPromptDecoding,
    ParallelPrompts,
    SkipSchedule,
    SortedDraft,
    SortedSpeculative,
    SuperposedDecoding,
    TokenRecycling,
    collaborate,
    skip_decode,
)
from tokenry.kvcache import EMSCache, SlidingWindowCache, tidal
from tokenry.layers.cache_argument import CACHE

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
VOCABULARY, NEW = 41, 12
SAME, OTHER, DRAWS = "same text", "own text", "draws"


def tiny(layers: int = 3, seed: int = 0) -> Any:
    """A random model with large weights, so that texts do not repeat at once."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.35, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


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


CONDITIONS = {
    "one prompt": Condition(),
    "batch, left padding": Condition(inputs=padded),
    "sampling": Condition(lambda model: {"do_sample": True, "temperature": 0.7}),
    "repetition penalty": Condition(lambda model: {"repetition_penalty": 1.3}),
    "beams": Condition(lambda model: {"num_beams": 3}),
    "EMS cache": Condition(lambda model: {CACHE: EMSCache(model.config, budget=8, window=3)}),
    "sliding-window cache": Condition(lambda model: {CACHE: SlidingWindowCache(model.config, budget=8)}),
    "quantized cache": Condition(lambda model: {CACHE: quantized(model)}),
    "static cache": Condition(lambda model: {"cache_implementation": "static"}),
    "inside tidal": Condition(around=lambda model: tidal(model, budget=4, start=1)),
    "inside skip_decode": Condition(around=lambda model: skip_decode(model, SkipSchedule(3, 2))),
}


@contextmanager
def _skipping(model: Any) -> Iterator[None]:
    with skip_decode(model, SkipSchedule(3, 2)):
        yield


@dataclass(frozen=True)
class Way:
    """A way of generating.

    Attributes:
        make: From the model: options of ``generate``.
        around: A context manager to generate in.
        writer: Whose text it writes, if not that of the model that ``generate`` is called on.
    """

    make: Callable[[Any], dict[str, Any]] = lambda model: {}
    around: Callable[[Any], AbstractContextManager] = lambda model: nullcontext()
    writer: Callable[[Any], Any] = lambda model: model


def strategy(make: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {"custom_generate": make(model)}


def parallel_prompts(model: Any) -> ParallelPromptDecoding:
    """Untrained prompts: hardly a guess is right, the text must be the same all the more."""
    prompts = ParallelPrompts(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    prompts.accuracy = torch.tensor([[0.4, 0.2], [0.3, 0.1], [0.2, 0.1]])
    return ParallelPromptDecoding(prompts, trees=12)


def sorted_draft(model: Any) -> SortedSpeculative:
    """The target's own first layers as the draft."""
    return SortedSpeculative(SortedDraft.from_model(model, layers=2, exits=(1, 2)), (0.5,), 3)


WAYS = {
    "`generate`": Way(),
    "`TokenRecycling`": Way(strategy(lambda model: TokenRecycling(tree=20, k=4))),
    "`ParallelPromptDecoding`": Way(strategy(parallel_prompts)),
    "`SortedSpeculative`": Way(strategy(sorted_draft)),
    '`collaborate(method="speculative")`': Way(
        strategy(lambda model: collaborate(tiny(seed=5), method="speculative")), writer=lambda model: tiny(seed=5)
    ),
    '`collaborate(method="contrastive")`': Way(strategy(lambda model: collaborate(tiny(seed=5), method="contrastive"))),
    "`SuperposedDecoding`": Way(strategy(lambda model: SuperposedDecoding(2))),
    "`with tidal(...)`": Way(around=lambda model: tidal(model, budget=4, start=1)),
    "`with skip_decode(...)`": Way(around=_skipping),
}


def outcome(way: Way, condition: Condition) -> str:
    """``same text``, ``own text``, ``draws``, or the message of a refusal."""
    model = tiny()
    inputs = condition.inputs()

    def run(chosen: Way, model: Any = model) -> Tensor:
        options = {"max_new_tokens": NEW, "do_sample": False} | condition.options(model)
        torch.manual_seed(7)
        with condition.around(model), chosen.around(model):
            return model.generate(**inputs, **chosen.make(model), **options)

    try:
        mine = run(way)
    except ValueError as refusal:
        return f"refused: {refusal}"
    rows, width = inputs["input_ids"].shape
    new = mine[..., width:]
    if mine.shape[0] != rows or not 0 < new.shape[-1] <= NEW or not ((new >= 0) & (new < VOCABULARY)).all():
        raise AssertionError(f"{tuple(mine.shape)} is no text for {rows} prompts of {width} tokens")
    if condition.options(model).get("do_sample"):
        if not torch.equal(mine, run(way)):
            raise AssertionError("the same seed draws another text")
        return DRAWS
    if mine.ndim == 2 and torch.equal(mine, run(Way(), way.writer(model))):
        return SAME
    return OTHER


def table() -> dict[str, dict[str, str]]:
    """All cells: way to condition to outcome."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model was not fine-tuned")
        return {
            name: {title: outcome(way, condition) for title, condition in CONDITIONS.items()}
            for name, way in WAYS.items()
        }


def page(cells: dict[str, dict[str, str]]) -> str:
    """The table as Markdown; refusals as numbered notes."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for name, row in cells.items():
        shown = []
        for value in row.values():
            if value.startswith("refused: "):
                reason = re.sub(r"\s+", " ", value.removeprefix("refused: "))
                if reason not in notes:
                    notes.append(reason)
                value = f"refused ({notes.index(reason) + 1})"
            shown.append(value)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)) + "\n"


HEAD = """# What goes with what

Every cell was run: a way of generating on a tiny model, in float64, under a condition, beside stock `generate` under the same
condition. A test runs them again and holds this page to the result; `python tests/composition.py` writes it anew.

- **same text**: exactly the text of `generate` under that condition (for speculative collaboration: of the large model).
- **own text**: it runs, and the text is another one, by design: `SuperposedDecoding`, `tidal`, `skip_decode` and contrastive
  collaboration do not promise the model's text.
- **draws**: it samples; the same seed gives the same text. That the distribution is the model's own is tested elsewhere.
- Where `skip_decode` skips the layer that `tidal` selects in, the layers above it read everything.
- **refused (n)**: a `ValueError` with the reason n below, before anything is generated.

"""


if __name__ == "__main__":
    PAGE.write_text(HEAD + page(table()), "utf-8")
