"""SkipDecode: later tokens run fewer layers, the same for a whole batch, without holes in the cache.

Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
2023, arXiv:2307.02628.

    n_j = max - (max - min) j / (T - 1), rounded    layers of generated position j of at most T; never grows with j
    S_j = {0 ... w-1} and {L - (n_j - w) ... L-1}   the first w layers ("warm-up"), then a jump to the top
    h   = layer_l(h) if l in S_j else h             a skipped layer hands the hidden state on

Because n_j never grows, S_{j+1} lies inside S_j: whoever runs a layer finds there the keys and values of every earlier
position. Nothing is recomputed, copied or masked, and all rows of a batch share j, the position in the *answer*. Prompts
run ``max`` layers. Exactly where a rounding tie falls, the smaller number is taken.

A checkpoint must be fine-tuned with the policy it will run under (``skip_training``); otherwise its text falls apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenry.decoding.engine.decoder_blocks import decoder_blocks
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SkipRun", "SkipSchedule", "skip_decode", "skip_training"]


@dataclass(frozen=True)
class SkipSchedule:
    """How many layers each generated position runs.

    Args:
        max_layers: Layers of the prompt and of the first generated position.
        min_layers: Layers of the last one.
        warmup: Layers at the bottom that always run, ``w >= 1``: the cache counts its tokens in layer 0.
        counts_given: Own counts, one per generated position, never growing, from max to min, instead of the line
            between them (``from_counts``).

    Raises:
        ValueError: The numbers do not make a schedule; the message names the offending one.

    Example:
        >>> SkipSchedule(6, 2).counts(8)
        [6, 5, 5, 4, 4, 3, 3, 2]
    """

    max_layers: int
    min_layers: int
    warmup: int = 1
    counts_given: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: at least layer 0 must always run, the cache counts tokens in it")
        if self.min_layers <= self.warmup:
            raise ValueError(
                f"min_layers={self.min_layers} must be larger than warmup={self.warmup}: at least one layer at the top runs"
            )
        if self.min_layers > self.max_layers:
            raise ValueError(f"min_layers={self.min_layers} is larger than max_layers={self.max_layers}")
        given = self.counts_given
        if given is None:
            return
        for j, (before, count) in enumerate(pairwise(given), 1):
            if count > before:
                raise ValueError(
                    f"counts[{j}]={count} is larger than counts[{j - 1}]={before}: later positions may not run more layers, "
                    "they would find no keys there"
                )
        if given[:1] + given[-1:] != (self.max_layers, self.min_layers):
            raise ValueError(
                f"the counts must fall from max_layers={self.max_layers} to min_layers={self.min_layers}, got {given}; "
                "SkipSchedule.from_counts takes both from the counts"
            )

    @classmethod
    def from_counts(cls, counts: Sequence[int], warmup: int = 1) -> SkipSchedule:
        """A schedule given position by position.

        Raises:
            ValueError: There is none, or one is larger than the one before it; its index is named.
        """
        given = tuple(int(n) for n in counts)
        if not given:
            raise ValueError("a schedule needs the count of at least one position, got none")
        return cls(given[0], given[-1], warmup, given)

    @classmethod
    def for_speedup(cls, layers: int, speedup: float, minimum: int | None = None, warmup: int = 1) -> SkipSchedule:
        """The schedule whose mean is ``layers / speedup``, by default from one and a half times the mean to half of it.

        Example:
            >>> SkipSchedule.for_speedup(layers=32, speedup=2.0)
            SkipSchedule(max_layers=24, min_layers=8, warmup=1, counts_given=None)
        """
        if speedup < 1:
            raise ValueError(f"speedup={speedup} must be at least 1")
        mean = layers / speedup
        if minimum is None:
            most = min(layers, math.floor(1.5 * mean))
            minimum = max(math.floor(2 * mean - most + 0.5), warmup + 1)
        else:
            most = min(layers, math.floor(2 * mean - minimum + 0.5))
        if most < minimum:
            raise ValueError(
                f"{layers} layers cannot be made {speedup} times as fast with at least {minimum} layers and {warmup} of "
                "warm-up; ask for less"
            )
        return cls(most, minimum, warmup)

    def counts(self, new_tokens: int) -> list[int]:
        """Layers of the positions ``0 ... new_tokens - 1``."""
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens} must be at least 1")
        if self.counts_given is not None:
            if new_tokens > len(self.counts_given):
                raise ValueError(
                    f"the schedule gives counts for {len(self.counts_given)} generated positions, {new_tokens} are asked for"
                )
            return list(self.counts_given[:new_tokens])
        fall = self.max_layers - self.min_layers
        steps = max(new_tokens - 1, 1)
        # ceil(n - 1/2) in whole numbers: a tie takes the smaller count.
        return [-((2 * fall * j + steps - 2 * self.max_layers * steps) // (2 * steps)) for j in range(new_tokens)]

    def active(self, count: int, layers: int) -> frozenset[int]:
        """Layers that a position with ``count`` layers runs.

        Example:
            >>> sorted(SkipSchedule(6, 2).active(3, layers=6))
            [0, 4, 5]
        """
        return frozenset(range(self.warmup)) | frozenset(range(layers - (count - self.warmup), layers))

    def speedup(self, layers: int, new_tokens: int) -> float:
        """Layers of the model over the mean number that runs; embeddings, head and sampling are not reduced."""
        return layers * new_tokens / sum(self.counts(new_tokens))

    def check(self, layers: int) -> None:
        """Refuse a model with fewer layers than the schedule asks for."""
        if self.max_layers > layers:
            raise ValueError(f"max_layers={self.max_layers}, but the model has {layers} layers")


@dataclass
class SkipRun:
    """What ``skip_decode`` is doing; a new ``generate`` starts it anew.

    Attributes:
        counts: Layers of each generated position.
        position: The next generated position to run, j.
        block_calls: Layers run in the current generation, the prompt's included.
        prompt_length: Tokens of the prompt, if ``generate`` was given it.
        active: Layers that run in the current pass.
    """

    counts: list[int] = field(default_factory=list)
    position: int = 0
    block_calls: int = 0
    prompt_length: int = 0
    active: frozenset[int] = frozenset()


@contextmanager
def skip_decode(model: PreTrainedModel, schedule: SkipSchedule, new_tokens: int | None = None) -> Iterator[SkipRun]:
    """Let ``model.generate`` skip layers inside the ``with``; outside it the model is as before.

    Args:
        model: Causal language model whose layers all attend to the whole context.
        schedule: Layers per position.
        new_tokens: Positions that the schedule is laid over. Default: ``generate``'s ``max_new_tokens``. Give it for a
            loop of your own that calls the model; a pass over an empty cache then starts a new text.

    Yields:
        The running state, with what has been saved.

    Raises:
        ValueError: The schedule does not fit the model, the number of new tokens is unknown, or the call cannot work with
            skipped layers (speculative decoding, static caches, going on from an old cache).

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("draft")
        >>> inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
        >>> with skip_decode(model, SkipSchedule(3, 3)) as run:  # all three layers: nothing is skipped
        ...     out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> torch.equal(out, model.generate(**inputs, max_new_tokens=8, do_sample=False))
        True
    """
    blocks = decoder_blocks(model)
    schedule.check(len(blocks))
    _check_layers(model)
    _check_free(blocks)
    if schedule.min_layers < len(blocks) and not getattr(model.config, "skip_schedule", None):
        warnings.warn(
            "this model was not fine-tuned with a skip schedule (tokenry.decoding.skip_training): expect its text to fall "
            "apart when layers are skipped",
            stacklevel=3,
        )
    run = SkipRun()
    prompt = schedule.active(schedule.max_layers, len(blocks))
    tuples = [False]

    def begin(tokens: int, prompt_length: int = 0) -> None:
        run.counts, run.position, run.block_calls = schedule.counts(tokens), 0, 0
        run.prompt_length = prompt_length

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        width = (given if given is not None else kwargs["inputs_embeds"]).shape[1]
        cache = kwargs.get(CACHE)
        cached = 0 if cache is None else cache.get_seq_length()
        if cached == 0:
            if new_tokens is not None:
                begin(new_tokens)
            if not run.counts:
                raise ValueError(
                    "how many tokens will follow is unknown: call generate, or give new_tokens to skip_decode"
                )
            run.active = prompt
        elif cached < run.prompt_length or (width > 1 and run.position == 0):
            run.active = prompt  # a long prompt is read in pieces
        elif width > 1:
            raise ValueError(
                f"a pass over {width} tokens behind generated ones: skipped layers hold no keys for going back or for a "
                "longer prompt; start a new text with an empty cache"
            )
        else:
            last = min(run.position, len(run.counts) - 1)  # what is run ahead of the last position is thrown away
            run.active = schedule.active(run.counts[last], len(blocks))
            run.position += 1

    def block(index: int, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not run.active:
            raise ValueError(
                f"{type(model).__name__} runs its layers outside of its forward pass, which says what position they are at; "
                "layers can be skipped only where generate calls the model for every token"
            )
        if index not in run.active:
            return (hidden_states,) if tuples[0] else hidden_states
        run.block_calls += 1
        out = forward(hidden_states, *args, **kwargs)
        tuples[0] = isinstance(out, tuple)  # layer 0 always runs and says what this release's layers return
        return out

    stock: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        _check_call(kwargs)
        begin(*_lengths(model, new_tokens, args, kwargs))
        return stock(*args, **kwargs)

    with _attached(model, before, block), _replaced(model, "generate", generate):
        yield run


@contextmanager
def skip_training(model: PreTrainedModel, schedule: SkipSchedule, new_tokens: int) -> Iterator[None]:
    """Teacher forcing under the policy: every target position runs its own layers, in one pass.

    Inside the ``with`` the model takes one more argument, ``prompt_lengths``: per row, the number of tokens before the
    first target token (left padding included). The loss is the ordinary one.

    Args:
        model: Causal language model.
        schedule: The schedule that ``skip_decode`` will use; it is noted in ``model.config.skip_schedule``.
        new_tokens: Positions that the schedule is laid over, as ``max_new_tokens`` later.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("draft")
        >>> ids = torch.arange(2, 18)[None]
        >>> with skip_training(model, SkipSchedule(3, 2), new_tokens=8):
        ...     loss = model(input_ids=ids, labels=ids, prompt_lengths=torch.tensor([8])).loss
        >>> loss.requires_grad
        True
    """
    blocks = decoder_blocks(model)
    schedule.check(len(blocks))
    _check_layers(model)
    _check_free(blocks)
    counts = torch.tensor(schedule.counts(new_tokens))
    runs = torch.zeros(len(blocks) + 1, len(blocks), dtype=torch.bool)  # [count, layer]
    for count in range(schedule.min_layers, schedule.max_layers + 1):
        runs[count, list(schedule.active(count, len(blocks)))] = True
    active: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        lengths = kwargs.pop("prompt_lengths", None)
        if lengths is None:
            raise ValueError("skip_training: give the model prompt_lengths, one number per row")
        given = kwargs.get("input_ids", args[0] if args else None)
        rows, width = (given if given is not None else kwargs["inputs_embeds"]).shape[:2]
        if tuple(lengths.shape) != (rows,):
            raise ValueError(f"prompt_lengths must have one number per row ({rows}), got shape {tuple(lengths.shape)}")
        if width - int(lengths.min()) > new_tokens:
            raise ValueError(
                f"a row has {width - int(lengths.min())} target tokens, the schedule is laid over {new_tokens}; raise new_tokens"
            )
        place = torch.arange(width) - lengths.cpu()[:, None]  # (B, N): j, negative inside the prompt
        count = torch.where(place < 0, schedule.max_layers, counts[place.clamp_min(0)])
        active[:] = runs[count].movedim(-1, 0).to(model.device)[..., None]  # per layer (B, N, 1)
        return args, kwargs | {"use_cache": False}

    def block(index: int, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A position that skips this layer still offers keys here, but only positions after it could look at them, and
        # they skip the layer too.
        out = forward(hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            return (torch.where(active[index], out[0], hidden_states), *out[1:])
        return torch.where(active[index], out, hidden_states)

    with _attached(model, before, block):
        yield
    model.config.skip_schedule = {
        "max_layers": schedule.max_layers, "min_layers": schedule.min_layers, "warmup": schedule.warmup,
    }  # fmt: skip


@contextmanager
def _attached(model: PreTrainedModel, before: Callable[..., Any], block: Callable[..., Any]) -> Iterator[None]:
    """Call ``before`` ahead of every pass and ``block(index, forward, ...)`` in place of every layer."""
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for index, layer in enumerate(decoder_blocks(model)):
            stack.enter_context(_replaced(layer, "forward", partial(block, index, layer.forward)))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Give one object a method of its own, and take it off again."""
    own = module.__dict__.get(name)
    setattr(module, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _check_free(blocks: nn.ModuleList) -> None:
    call = blocks[0].__dict__.get("forward")
    if isinstance(call, partial) and call.func.__module__ == __name__:
        raise ValueError("this model already skips layers: leave the other skip_decode or skip_training first")


def _check_layers(model: PreTrainedModel) -> None:
    types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise ValueError(
            f"{type(model).__name__} has layers of the kinds {', '.join(sorted(types))}; layers can be skipped only where "
            "all attend to the whole context"
        )


def _lengths(model: PreTrainedModel, given: int | None, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Over how many positions the schedule is laid in this call of ``generate``, and the length of its prompt."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else kwargs.get("inputs_embeds")))
    prompt = ids.shape[1] if ids is not None else 1
    own = kwargs.get("generation_config")
    asked = kwargs.get("max_new_tokens") or getattr(own or model.generation_config, "max_new_tokens", None)
    length = kwargs.get("max_length") or getattr(own, "max_length", None)
    new = given or asked or (length and length - prompt)
    if not new:
        raise ValueError("skip_decode needs to know how many tokens may follow: give generate max_new_tokens")
    return new, prompt


def _check_call(kwargs: dict[str, Any]) -> None:
    """What ``generate`` must not be asked for."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} cannot be used with skipped layers: a rejected draft cannot be taken back, its positions have run "
                "fewer layers"
            )
    if kwargs.get("custom_generate") is not None:
        raise ValueError(
            "layers are skipped by the position in generate's own loop; leave custom_generate unset inside it"
        )
    if str(kwargs.get("cache_implementation")) not in ("None", "dynamic"):
        raise ValueError("skipped layers need the default cache: leave cache_implementation unset")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"the cache already holds {cache.get_seq_length()} tokens: a new prompt would need layers that generated "
            "positions skipped; give the whole text with an empty cache"
        )
    if cache is not None and any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        raise ValueError("a static cache counts its tokens once for all layers; use a DynamicCache with skipped layers")
