"""Who takes part in ``tokenry compare decoding``: one entry per way of generating.

An entry makes a method ready on the bench's model and gives back a call. A method that needs what is not there (a draft
model, trained prompts) says so, and is left out with that reason instead of failing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenry.assets import load_model, model_path
from tokenry.compare.kind import Options

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONTENDERS", "GREEDY", "Bench", "Contender", "Ready"]

GREEDY = "greedy generate"
Batch = dict[str, Any]


@dataclass
class Bench:
    """The model under test and what contenders may use to get ready.

    Attributes:
        model: The user's model or the embedded one.
        tokenizer: Its tokenizer, padding on the left.
        batches: The measured prompts.
        warm: Other prompts, for methods that learn from what they generate; never the measured ones.
        new_tokens: Tokens per text.
        options: The comparison's options.
        limit: Tokens of the model's context that may be used; None where it has no end.
        cut: How many measured prompts were cut to fit into it.
    """

    model: Any
    tokenizer: Any
    batches: list[Batch]
    warm: list[Batch]
    new_tokens: int
    options: Options
    limit: int | None = None
    cut: int = 0

    @cached_property
    def draft(self) -> Any:
        """The embedded draft model, beside the embedded model only."""
        return load_model("draft", dtype=self.options.dtype, device=self.options.device)[0]

    def generate(self, batch: Batch, count: int, **chosen: Any) -> Tensor:
        """``count`` greedy tokens after the batch, ``(B, N + count)``."""
        return self.model.generate(**batch, max_new_tokens=count, do_sample=False, **chosen)


@dataclass(frozen=True)
class Ready:
    """A method made ready.

    Attributes:
        run: ``run(batch, count)`` gives ids ``(B, N + count)``, the prompt first.
        strategy: The object whose ``stats`` count passes, if it counts them itself.
    """

    run: Callable[[Batch, int], Tensor]
    strategy: Any = None


def _always(options: Options) -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    """One way of generating.

    Attributes:
        name: As shown.
        prepare: Makes it ready.
        slug: The method's card; None for what the library brings.
        single: Takes a batch of one only.
        lossless: The text is the model's own greedy text, by construction.
        missing: Why it cannot take part with these options; empty if it can.
    """

    name: str
    prepare: Callable[[Bench], Ready]
    slug: str | None = None
    single: bool = False
    lossless: bool = True
    missing: Callable[[Options], str] = field(default=_always)


def _stock(**chosen: Any) -> Callable[[Bench], Ready]:
    return lambda bench: Ready(lambda batch, count: bench.generate(batch, count, **chosen))


def _assisted(bench: Bench) -> Ready:
    assistant = bench.draft
    return Ready(lambda batch, count: bench.generate(batch, count, assistant_model=assistant))


def _needs_embedded(what: str) -> Callable[[Options], str]:
    """A part that ships for the embedded model alone."""
    return lambda options: f"needs {what} for your model" if options.model is not None else ""


def _strategy(make: Callable[[Bench], Any]) -> Callable[[Bench], Ready]:
    """A strategy that keeps nothing from prompt to prompt."""

    def prepare(bench: Bench) -> Ready:
        strategy = make(bench)
        return Ready(lambda batch, count: bench.generate(batch, count, custom_generate=strategy), strategy)

    return prepare


def _recycling(*, hot: bool, tree: Any) -> Callable[[Bench], Ready]:
    """Token recycling; a hot table was filled by other prompts and starts every measured prompt alike."""

    def prepare(bench: Bench) -> Ready:
        from tokenry.decoding import TokenRecycling

        strategy = TokenRecycling(tree=tree)
        for batch in bench.warm if hot else []:
            bench.generate(batch, bench.new_tokens, custom_generate=strategy)
        filled = strategy.matrix.table.clone() if hot and strategy.matrix is not None else None

        def run(batch: Batch, count: int) -> Tensor:
            if strategy.matrix is not None and filled is not None:
                strategy.matrix.table.copy_(filled)
            elif strategy.matrix is not None:
                strategy.matrix.reset()
            return bench.generate(batch, count, custom_generate=strategy)

        return Ready(run, strategy)

    return prepare


def _tuned_sorted(bench: Bench) -> Ready:
    """The embedded sorted draft, with thresholds and draft length tuned on the other prompts."""
    from tokenry.decoding import SortedDraft, tune

    draft = SortedDraft.from_pretrained()
    draft.to(device=bench.model.device, dtype=bench.model.dtype)
    lengths = (2, 4) if bench.options.effort == "demo" else (1, 2, 3, 4, 6, 8)
    best = tune(draft, bench.model, bench.warm, new_tokens=min(bench.new_tokens, 32), draft_tokens=lengths, repeats=2)
    strategy = best.strategy()
    return Ready(lambda batch, count: bench.generate(batch, count, custom_generate=strategy), strategy)


def _prompts(bench: Bench) -> Any:
    from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts

    return ParallelPromptDecoding(ParallelPrompts.from_pretrained(model_path() / "parallel_prompts"))


def _collaborating(bench: Bench) -> Ready:
    """The draft model writes, the model under test checks every round."""
    from tokenry.decoding import collaborate

    strategy = collaborate(bench.model, "speculative")

    def run(batch: Batch, count: int) -> Tensor:
        return bench.draft.generate(**batch, max_new_tokens=count, do_sample=False, custom_generate=strategy)

    return Ready(run, strategy)


def _together(bench: Bench) -> Ready:
    """All prompts of a batch at once, without padding; what they have in common is computed once."""
    import torch

    from tokenry.decoding import batch_generate

    def run(batch: Batch, count: int) -> Tensor:
        given = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        rows = [ids[real].tolist() for ids, real in given]
        outs, _ = batch_generate(bench.model, rows, count, do_sample=False)
        new = [out[len(row) :] for out, row in zip(outs, rows, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=bench.tokenizer.pad_token_id)
        return torch.cat([batch["input_ids"], padded], 1)

    return Ready(run)


def _superposed(bench: Bench) -> Ready:
    """Three drafts, of which the best one counts here."""
    from tokenry.decoding import SuperposedDecoding

    strategy = SuperposedDecoding(num_drafts=3)
    return Ready(lambda batch, count: bench.generate(batch, count, custom_generate=strategy)[:, 0], strategy)


def _skipping(bench: Bench) -> Ready:
    """Three quarters of the layers on average; the model was not fine-tuned for it."""
    from tokenry.decoding import SkipSchedule, decoder_blocks, skip_decode

    schedule = SkipSchedule.for_speedup(len(decoder_blocks(bench.model)), 4 / 3)

    def run(batch: Batch, count: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this model was not fine-tuned")
            with skip_decode(bench.model, schedule):
                return bench.generate(batch, count)

    return Ready(run)


def _zero(bench: Bench) -> Any:
    from tokenry.decoding import TokenRecycling

    return TokenRecycling(tree=0)


CONTENDERS: tuple[Contender, ...] = (
    Contender(GREEDY, _stock()),
    Contender("prompt lookup", _stock(prompt_lookup_num_tokens=10), single=True),
    Contender("assisted generation", _assisted, single=True, missing=_needs_embedded("a draft model with the same tokenizer")),
    Contender("zero-node tree", _strategy(_zero)),
    Contender("token recycling, cold", _recycling(hot=False, tree=None), "token-recycling"),
    Contender("token recycling, hot", _recycling(hot=True, tree=None), "token-recycling"),
    Contender("token recycling, auto", _recycling(hot=True, tree="auto"), "token-recycling"),
    Contender("parallel prompts", _strategy(_prompts), "ppd", missing=_needs_embedded("prompts trained (scripts/train_parallel_prompts.py)")),
    Contender("sorted draft, tuned", _tuned_sorted, "s2d", missing=_needs_embedded("a sorted draft trained")),
    Contender("small and large model, speculative", _collaborating, "fs-gen", missing=_needs_embedded("a small model with the same tokenizer")),
    Contender("batch_generate", _together, "batchllm"),
    Contender("superposed, best of 3 drafts", _superposed, "superposed-decoding", lossless=False),
    Contender("3/4 of the layers, not fine-tuned", _skipping, "skipdecode", lossless=False),
)  # fmt: skip
