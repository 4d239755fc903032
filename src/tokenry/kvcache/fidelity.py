"""How far a compressed cache leads a model away from what it would have said with all of it.

Per passage, over the T tokens that follow a context of N tokens:

    KL = 1/T Σ_t Σ_v p_full(v | <=t) · log(p_full(v | <=t) / p_cache(v | <=t))

with ``p_full`` from the full cache and ``p_cache`` from the same model whose cache was cut after the context. The
true text is fed, so that both read the same words.

``reading_fidelity`` does the same for methods that keep the whole cache and read a part of it in each step. These
differ from the model only where one token is decoded at a time, so the T tokens are fed one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tokenry.layers.cache_argument import CACHE

__all__ = ["Fidelity", "cache_fidelity", "next_logits", "reading_fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """Figures per passage, each ``[P]`` float64 on the CPU.

    Attributes:
        divergence: Mean KL from the full cache's next-token distribution, in nats.
        agreement: Share of tokens where both find the same word most likely.
        loss: Mean negative log likelihood of the true text, in nats per token.
        correct: Share of tokens where the true one is found most likely.
    """

    divergence: Tensor
    agreement: Tensor
    loss: Tensor
    correct: Tensor


@torch.inference_mode()
def next_logits(model: PreTrainedModel, tokens: Tensor, context: int, cache: Cache | None) -> Tensor:
    """Logits after each token that follows the context, the true text being fed.

    Args:
        model: A causal language model.
        tokens: ``[P, N + T]`` int64 passages without padding.
        context: ``N``, tokens read before the cut.
        cache: A new cache; None: the full one.

    Returns:
        ``[P, T - 1, V]``: predictions of tokens ``N + 1 .. N + T - 1``.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    tokens = tokens.to(model.device)
    model(tokens[:, :context], **{CACHE: cache}, logits_to_keep=1)
    return model(tokens[:, context:-1], **{CACHE: cache}).logits


def cache_fidelity(
    model: PreTrainedModel,
    tokens: Tensor,
    context: int,
    caches: Mapping[str, Callable[[], Cache]],
    *,
    batch_size: int = 8,
) -> dict[str, Fidelity]:
    """Compare caches with the full cache on the same passages.

    Args:
        model: A causal language model.
        tokens: ``[P, N + T]`` int64 passages without padding.
        context: ``N``, tokens read before the cut; at least 2. At least 2 must follow.
        caches: Name to a function that makes a new cache.
        batch_size: Passages at a time.

    Returns:
        A ``Fidelity`` per name, and under ``"full"`` that of the full cache (divergence 0, agreement 1).

    Raises:
        ValueError: ``context`` leaves nothing to read or nothing to predict.
    """
    _check(tokens, context)
    makers: dict[str, Callable[[], Cache | None]] = {"full": lambda: None, **caches}
    parts: dict[str, list[Fidelity]] = {name: [] for name in makers}
    for rows in tokens.to(model.device).split(batch_size):
        expected = None
        for name, make in makers.items():
            found = next_logits(model, rows, context, make()).float().log_softmax(-1)  # [b, T - 1, V]
            expected = found if expected is None else expected
            parts[name].append(_fidelity(expected, found, rows[:, context + 1 :]))
    return {name: _join(found) for name, found in parts.items()}


@torch.inference_mode()
def reading_fidelity(
    model: PreTrainedModel,
    tokens: Tensor,
    context: int,
    readings: Mapping[str, Callable[[], AbstractContextManager[object]]],
    *,
    batch_size: int = 8,
) -> dict[str, Fidelity]:
    """Compare ways to read the cache while decoding with full attention, on the same passages.

    Args:
        model: A causal language model.
        tokens: ``[P, N + T]`` int64 passages without padding.
        context: ``N``, tokens read at once and with full attention; at least 2. At least 2 must follow.
        readings: Name to a function that makes the context in which tokens are decoded:
            ``lambda: tidal(model, budget=64)``.
        batch_size: Passages at a time.

    Returns:
        A ``Fidelity`` per name, and under ``"full"`` that of full attention (divergence 0, agreement 1).

    Raises:
        ValueError: ``context`` leaves nothing to read or nothing to predict.
    """
    _check(tokens, context)
    makers: dict[str, Callable[[], AbstractContextManager[object]]] = {"full": nullcontext, **readings}
    parts: dict[str, list[Fidelity]] = {name: [] for name in makers}
    for rows in tokens.to(model.device).split(batch_size):
        after_context = DynamicCache(config=model.config)
        model(rows[:, :context], **{CACHE: after_context}, logits_to_keep=1)
        expected = None
        for name, make in makers.items():
            cache = copy.deepcopy(after_context)
            with make():
                steps = [model(token, **{CACHE: cache}).logits for token in rows[:, context:-1].split(1, dim=1)]
            found = torch.cat(steps, dim=1).float().log_softmax(-1)  # [b, T - 1, V]
            expected = found if expected is None else expected
            parts[name].append(_fidelity(expected, found, rows[:, context + 1 :]))
    return {name: _join(found) for name, found in parts.items()}


def _check(tokens: Tensor, context: int) -> None:
    if tokens.ndim != 2 or not 2 <= context <= tokens.shape[1] - 2:
        raise ValueError(
            f"passages of shape {tuple(tokens.shape)} need a context of 2 to {tokens.shape[-1] - 2} tokens, got {context}"
        )


def _fidelity(expected: Tensor, found: Tensor, truth: Tensor) -> Fidelity:
    """Figures of some passages from log probabilities ``[b, T - 1, V]`` and the tokens that follow ``[b, T - 1]``."""
    kl = (expected.exp() * (expected - found)).sum(-1)
    first = found.argmax(-1)
    loss = -found.gather(-1, truth[..., None])[..., 0]
    figures = kl, expected.argmax(-1) == first, loss, first == truth
    return Fidelity(*(x.double().mean(1).cpu() for x in figures))


def _join(parts: list[Fidelity]) -> Fidelity:
    return Fidelity(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Fidelity)))
