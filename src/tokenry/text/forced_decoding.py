"""Continue many rows of tokens at once after one shared prefix, which is run a single time.

Token forcing asks a model the same short question for every token of its vocabulary: rows (v) or (v, w) after a prefix
that all share, usually the one token that begins a sequence. The prefix's cache is repeated for each batch, every step
runs one token per row, and rows whose outcome is settled leave the batch. A token that ends a sequence ends nothing here:
all rows run to the full number of steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ForcedDecoder", "Rollout", "check_context", "check_model", "evaluating"]


class Rollout(NamedTuple):
    """What rows were continued with.

    Attributes:
        rows: Places of the surviving rows among those given, ascending, (n,).
        tokens: Continuations, (n, steps).
        probabilities: Probability of each token, float32, (n, steps).
        passes: Rows run through the model, counted at every step.
    """

    rows: Tensor
    tokens: Tensor
    probabilities: Tensor
    passes: int


def check_model(model: Any) -> None:
    """Refuse what is not a causal language model."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; token forcing needs a decoder alone "
            "(AutoModelForCausalLM)"
        )
    if config is None or not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate text; load it with AutoModelForCausalLM")


def check_context(model: Any, length: int, what: str) -> None:
    """Refuse sequences that the model has no positions for."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if context and length > context:
        raise ValueError(f"{what} takes {length} tokens, but the model's context is {context}; make it shorter")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside the block; afterwards every part is in the mode that it was in before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ForcedDecoder:
    """A model and the prefix that all rows share.

    Args:
        model: Causal language model; it is run in evaluation mode and left as it was.
        prefix: P token ids before each row; may be empty.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("draft")
        >>> decoder = ForcedDecoder(model, [tokenizer.bos_token_id])
        >>> decoder.roll_out(torch.tensor([[500], [501]]), steps=3).tokens.shape
        torch.Size([2, 3])
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int]) -> None:
        check_model(model)
        self.model: Any = model
        self.prefix = torch.tensor(list(prefix), dtype=torch.long, device=model.device)  # (P,)

    @cached_property
    def _prefix_cache(self) -> Any:
        """Cache of one row; None where there is nothing to share or the cache cannot be spread over rows."""
        if not len(self.prefix):
            return None
        cache = self.model(input_ids=self.prefix[None], use_cache=True).get(CACHE)
        return cache if self._follows_rows(cache) else None

    @staticmethod
    def _follows_rows(cache: Any) -> bool:
        layers = getattr(cache, "layers", [])
        return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)

    @torch.no_grad()
    def roll_out(
        self,
        rows: Tensor,
        steps: int,
        *,
        slack: float = math.inf,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Continue each row by ``steps`` tokens.

        Args:
            rows: Token ids after the prefix, (N, F), F at least 1.
            steps: Tokens to add.
            slack: A row leaves as soon as Σ (1 - p_i) over its steps so far reaches this: the sum only grows.
            top_k: Draw each token among the k most probable instead of taking the best one. Of equally probable best
                tokens the one with the smallest id is taken.
            generator: Random numbers for the draws, on the model's device.

        Raises:
            ValueError: The context is too short, or the logits hold NaN.
        """
        check_context(self.model, len(self.prefix) + rows.shape[1] + steps, "prefix, forced tokens and continuation")
        model, rows = self.model, rows.to(self.prefix.device)
        kept = torch.arange(len(rows), device=rows.device)
        tokens, probabilities = rows[:, :0], torch.zeros(len(rows), 0, device=rows.device)  # (n, 0)
        missing = probabilities.sum(-1)  # Σ (1 - p_i), (n,)
        passes = 0
        broken = torch.zeros((), dtype=torch.bool, device=rows.device)
        with evaluating(model):
            cache = copy.deepcopy(self._prefix_cache)
            if cache is not None:
                cache.batch_repeat_interleave(len(rows))
            for _ in range(steps):
                if not len(kept):
                    break
                passes += len(kept)
                if cache is None:  # nothing stored: the whole rows again
                    fed = torch.cat([self.prefix.expand(len(kept), -1), rows[kept], tokens], dim=1)
                    out = model(input_ids=fed, use_cache=True)
                else:
                    fed = tokens[:, -1:] if tokens.shape[1] else rows  # (n, 1) or (n, F)
                    out = model(input_ids=fed, use_cache=True, **{CACHE: cache})
                cache = out.get(CACHE) if self._follows_rows(out.get(CACHE)) else None
                token, probability = _choose(out.logits[:, -1], top_k, generator)
                tokens = torch.cat([tokens, token[:, None]], dim=1)
                probabilities = torch.cat([probabilities, probability[:, None]], dim=1)
                missing = missing + (1 - probability)
                broken |= torch.isnan(probability).any()
                if slack < math.inf:
                    stay = (missing < slack).nonzero().squeeze(-1)
                    if len(stay) < len(kept):
                        kept, tokens, probabilities, missing = (x[stay] for x in (kept, tokens, probabilities, missing))
                        if cache is not None:
                            cache.batch_select_indices(stay)
        if broken:
            raise ValueError(
                f"the model's logits hold NaN or infinity (dtype {model.dtype}): half precision overflowed or the weights "
                "are damaged; load the model in float32 or bfloat16"
            )
        if not len(kept):  # the loop ended early
            tokens, probabilities = rows.new_zeros(0, steps), probabilities.new_zeros(0, steps)
        return Rollout(kept, tokens, probabilities, passes)


def _choose(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Next token and its probability under the full softmax, taken in float32: (n, V) -> (n,), (n,)."""
    best, token = logits.max(-1, keepdim=True)  # (n, 1)
    relative = logits.float() - best.float()
    if top_k is not None:
        values, ids = relative.topk(min(top_k, logits.shape[-1]), dim=-1)
        token = ids.gather(-1, torch.multinomial(values.softmax(-1), 1, generator=generator))
    probability = relative.gather(-1, token).exp() / relative.exp().sum(-1, keepdim=True)
    return token.squeeze(-1), probability.squeeze(-1)
