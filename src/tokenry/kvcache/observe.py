"""Let a cache see the queries of an attention call.

A cache layer is given keys and values, never queries. In ``transformers`` an attention module updates the cache and
then, as its next step, looks up the attention function under the name in its config:

    keys, values = cache.update(keys, values, layer_idx)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)

So ``update`` can ask for the queries of exactly this call: it puts the name of an observing function into the config,
the function takes the name out again as the first thing it does, calls the model's own attention, and hands queries
and mask to the cache layer. Between two calls nothing is attached to the model, and no module, function or class is
replaced. It works for every architecture that uses the attention interface, with eager, sdpa and flash attention.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["AttentionCall", "Observer", "check_observed", "forget", "observe_next_attention", "own_attention"]

PREFIX = "tokenry_observed_"
_waiting = threading.local()


@dataclass(frozen=True)
class AttentionCall:
    """One attention call as the module made it.

    Attributes:
        module: The attention module.
        query: ``[B, Hq, Q, D]``, with positions already applied.
        scaling: Factor on the scores.
        mask: ``[B or 1, Hq or 1, Q, S]`` bool (True may look) or additive float; None is causal.
        valid: ``[B, S]`` bool: False for padding; None when there is no mask.
        softcap: Cap of the scores, or None.
        sinks: ``[Hq]`` learned sink scores, or None.
        bias: Position bias added to the scores, or None.
    """

    module: nn.Module
    query: Tensor
    scaling: float
    mask: Tensor | None = None
    valid: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None


class Observer(Protocol):
    """Something that wants to see attention calls: a cache layer."""

    def observe(self, call: AttentionCall) -> None:
        """Take in one call."""


@dataclass(frozen=True)
class _Request:
    config: PreTrainedConfig
    observer: weakref.ref[Any]
    name: str  # the model's own implementation
    stored: int  # keys the attention will see


def observe_next_attention(config: PreTrainedConfig, observer: Observer, stored: int) -> None:
    """Ask that the attention call that follows this cache update is shown to ``observer``.

    Args:
        config: The very config object that the attention modules hold.
        observer: Gets ``observe(call)`` after the module's attention was computed. Held weakly.
        stored: Number of keys that the call will attend to.
    """
    current = config._attn_implementation or "eager"
    own = current.removeprefix(PREFIX)
    if PREFIX + own not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PREFIX + own, _observing(own))
    _waiting.request = _Request(config, weakref.ref(observer), own, stored)
    config._attn_implementation_internal = PREFIX + own


def forget(config: PreTrainedConfig) -> bool:
    """Give the config its own attention back. Returns whether a request was still open."""
    request: _Request | None = getattr(_waiting, "request", None)
    _waiting.request = None
    current = config._attn_implementation or ""
    if current.startswith(PREFIX):
        config._attn_implementation_internal = current.removeprefix(PREFIX)
    return request is not None and request.config is config


def check_observed(config: PreTrainedConfig, observers: list[Any]) -> None:
    """Refuse to go on when the last request of one of ``observers`` was never served.

    Raises:
        ValueError: The model's attention did not call the attention interface with this config.
    """
    request: _Request | None = getattr(_waiting, "request", None)
    if request is None or request.config is not config:
        return
    observer = request.observer()
    forget(config)
    if any(observer is one for one in observers):
        raise ValueError(
            "the cache could not see the model's queries: no attention call followed its update. Either the cache was "
            "made with another config object (pass config=model.config, the model's own) or the model's attention does "
            "not use the attention interface of transformers (then take an architecture that does, such as Llama)"
        )


def _observing(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that is registered beside the implementation ``name``."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        request: _Request | None = getattr(_waiting, "request", None)
        config = module.config if request is None else request.config
        if isinstance(config, PreTrainedConfig):
            forget(config)
        own = own_attention(module, name)
        output = own(module, query, key, value, attention_mask, *args, **kwargs)
        observer = None if request is None else request.observer()
        if request is not None and observer is not None and request.stored == key.shape[-2]:
            observer.observe(_call(module, query, key, attention_mask, kwargs))
        return output

    return attention


def own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the module would have called; ``eager`` lives beside the module's own code."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    for kind in type(module).__mro__:
        forward = kind.__dict__.get("forward")
        found = getattr(inspect.unwrap(forward), "__globals__", {}).get("eager_attention_forward") if forward else None
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'")


def _call(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> AttentionCall:
    length, stored = query.shape[-2], key.shape[-2]
    valid = None
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the attention mask is a {type(mask).__name__}, which hides who sees whom; load the model with "
                "attn_implementation='sdpa' (or 'eager', or flash attention) to compress its cache"
            )
        if mask.ndim == 2:  # flash attention: [B, S], 0 is padding
            valid = mask[:, -stored:].bool()
            mask = None
        else:
            mask = mask[..., -length:, :stored]
            last = mask[:, 0, -1]  # the last query sees all that is not padding
            valid = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
        valid = valid.expand(query.shape[0], -1)
    scaling: Any = kwargs.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", query.shape[-1] ** -0.5)
    return AttentionCall(
        module=module,
        query=query.detach(),
        scaling=scaling,
        mask=mask,
        valid=valid,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        bias=kwargs.get("position_bias"),
    )
