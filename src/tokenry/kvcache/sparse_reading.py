"""Read a part of the cache in each decoding step: what all methods that read less, but evict nothing, share.

A method is a *rule*: a function that is given one attention call of one layer, for one new token per row, and attends
to what it likes. Everything else is here, once: which calls are handed to the rule, who keeps what was selected, and
how the model is brought to call it.

    with read_sparsely(model, rule) as reading:
        model.generate(...)
    reading.selected        # {layer: positions [B, Hq, k]} of the latest forward pass

Inside the context the model's config names an attention function of ours, which is registered with the
``AttentionInterface`` of transformers, and under the same name the model's own mask function with the
``AttentionMaskInterface``: a name that is unknown there would get no mask at all, and padding would be read. Calls that
are no business of the rule go to the model's own attention, bit for bit: several tokens at once (prompts, chunks of a
prompt, draft trees), layers that are not full attention (sliding window, linear), and scores that are more than
scaled products (soft caps, sinks, position biases; with a warning).

The cache keeps everything, so nothing is lost for later tokens and it can be rolled back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenry.kernels.sparse_decode_attention import decode_scores, full_attention_and_top, sparse_decode_attention
from tokenry.kvcache.compression import CompressedLayer
from tokenry.kvcache.observe import own_attention
from tokenry.layers.cache_argument import CACHE

__all__ = ["DecodeCall", "ReadingRule", "SparseReading", "full_attention_layers", "read_sparsely"]

PREFIX = "tokenry_sparse_"
_READINGS: dict[int, SparseReading] = {}  # by the id of the config that the attention modules hold


@dataclass(frozen=True)
class DecodeCall:
    """One layer's attention for one new token per row.

    Attributes:
        layer: Index of the layer.
        query: ``[B, Hq, 1, D]``, with positions applied.
        key: ``[B, H, N, D]``, the new token's included.
        value: ``[B, H, N, Dv]``.
        mask: ``[B or 1, Hq or 1, 1, N]``: bool (True may look) or additive float; None: all may be looked at.
        scaling: Factor on the scores.
        selected: What layers selected in this forward pass; shared by its layers.
        full: Attends to everything, as the model does: ``[B, 1, Hq, Dv]``.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    selected: dict[int, Tensor]
    full: Callable[[], Tensor]

    def full_and_select(self, budget: int, *, always_keep_last: bool = False) -> Tensor:
        """Attend to everything, and note under this layer which positions each head looked at most."""
        if budget >= self.key.shape[2]:
            shape = (*self.query.shape[:2], -1)
            self.selected[self.layer] = torch.arange(self.key.shape[2], device=self.key.device).expand(shape)
            return self.full()
        output, positions = full_attention_and_top(
            self.query,
            self.key,
            self.value,
            budget,
            scaling=self.scaling,
            mask=self.mask,
            always_keep_last=always_keep_last,
        )
        self.selected[self.layer] = positions
        return output.transpose(1, 2)

    def scores(self) -> Tensor:
        """Scores before the softmax, ``[B, Hq, N]`` float32."""
        return decode_scores(self.query, self.key, scaling=self.scaling, mask=self.mask)

    def only(self, positions: Tensor) -> Tensor:
        """Attend to ``positions`` ``[B, Hq, k]`` alone."""
        if positions.shape[-1] >= self.key.shape[2]:
            return self.full()
        out = sparse_decode_attention(self.query, self.key, self.value, positions, scaling=self.scaling, mask=self.mask)
        return out.transpose(1, 2)


class ReadingRule(Protocol):
    """What a layer reads for a new token. What layers tell each other is in ``call.selected``, nowhere else."""

    def __call__(self, call: DecodeCall) -> Tensor:
        """Output ``[B, 1, Hq, Dv]``, from one of the methods of ``call``."""
        ...


class SparseReading:
    """A rule at work on one model; what ``read_sparsely`` gives.

    Args:
        rule: See ``ReadingRule``.
        layers: The layers that are handed to the rule; the others do what they always do.
        name: The model's own attention implementation.
    """

    def __init__(self, rule: ReadingRule, layers: frozenset[int], name: str) -> None:
        self.rule, self.layers, self.name = rule, layers, name
        self._pass = threading.local()  # threads that share a model are in different passes
        self._warned = False

    @property
    def selected(self) -> dict[int, Tensor]:
        """Positions ``[B, Hq, k]`` by the layer that selected them, of this thread's latest forward pass."""
        if not hasattr(self._pass, "selected"):
            self._pass.selected = {}
        return self._pass.selected

    def begin(self, kwargs: dict[str, Any]) -> None:
        """A forward pass with these arguments begins: forget the last one's selection, refuse what cannot work."""
        self._pass.selected = {}
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions cannot be had from attention that reads a part of the cache; "
                "leave the context (or output_attentions) out"
            )
        cache = kwargs.get(CACHE)
        if any(isinstance(layer, CompressedLayer) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                f"{type(cache).__name__} keeps different tokens in different layers, so positions that one layer selects "
                "mean others elsewhere; use DynamicCache or StaticCache"
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call of the model."""
        own = own_attention(module, self.name)
        plain = self._is_plain(kwargs)
        layer: Any = module.layer_idx
        if query.shape[2] > 1 or layer not in self.layers or not plain or kwargs.get("dropout"):
            return own(module, query, key, value, mask, *args, **kwargs)
        scaling = kwargs.get("scaling")
        call = DecodeCall(
            layer=layer,
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            selected=self.selected,
            full=lambda: own(module, query, key, value, mask, *args, **kwargs)[0],
        )
        return self.rule(call), None

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if more and not self._warned:
            self._warned = True
            warnings.warn(
                f"this model's scores are more than scaled products ({', '.join(more)}), which sparse reading does not "
                "know: its layers go on reading the whole cache",
                stacklevel=2,
            )
        return not more


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose cache keeps every token.

    Example:
        >>> from tokenry.assets import load_model
        >>> full_attention_layers(load_model("draft")[0])
        [0, 1, 2]
    """
    layers = DynamicCache(config=model.config).layers
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


@contextmanager
def read_sparsely(model: PreTrainedModel, rule: ReadingRule) -> Iterator[SparseReading]:
    """Let ``rule`` do the attention of single new tokens in the full-attention layers of ``model``.

    Args:
        model: A decoder of transformers that uses the attention interface, with sdpa or eager attention.
        rule: See ``ReadingRule``.

    Yields:
        The reading, whose ``selected`` can be looked at.

    Raises:
        ValueError: A model that this cannot work with; the message says which would.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation or "eager"
    _check(model, own)
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    reading = SparseReading(rule, frozenset(full_attention_layers(model)), own)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reading.begin(kwargs)

    hook = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    _READINGS[id(config)] = reading
    config._attn_implementation_internal = name
    try:
        yield reading
    finally:
        config._attn_implementation_internal = own
        del _READINGS[id(config)]
        hook.remove()


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls by name."""
    reading = _READINGS.get(id(module.config))
    if reading is None:
        raise ValueError(
            f"{type(module).__name__} is not inside read_sparsely(model, ...); its config was copied from one"
        )
    return reading.attend(module, *args, **kwargs)


def _check(model: PreTrainedModel, own: str) -> None:
    kind = type(model).__name__
    if own.startswith(PREFIX):
        raise ValueError(f"this {kind} already reads sparsely: leave the other context first")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder; give a decoder-only model")
    if not model.is_backend_compatible():
        raise ValueError(
            f"{kind} does not use the attention interface of transformers; take an architecture that does, such as Llama"
        )
    config = model.config.get_text_config(decoder=True)
    if not any(
        hasattr(module, "layer_idx") and getattr(module, "config", None) is config for module in model.modules()
    ):
        raise ValueError(
            f"the attention layers of {kind} have configurations of their own, through which they cannot be reached; take "
            "an architecture whose layers share the model's, such as Llama"
        )
    if own not in ("sdpa", "eager"):
        raise ValueError(
            f"the model runs {own} attention, whose masks cannot be read here; load it with attn_implementation='sdpa'"
        )
    if model.config.output_attentions:
        raise ValueError("output_attentions is set in the config; attention that is read in part has none to give")
    if not full_attention_layers(model):
        layers = sorted({type(layer).__name__ for layer in DynamicCache(config=model.config).layers})
        raise ValueError(
            f"no layer of {kind} is full attention (its caches: {', '.join(layers)}): nothing to read less of"
        )
