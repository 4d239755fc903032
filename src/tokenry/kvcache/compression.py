"""The machinery of every cache that evicts: observe attention, score the stored entries, keep a budget of them.

A method is a *scorer* and possibly a *merger* (``tokenry.kvcache.entries``). Everything else is here, once: positions,
left padding, running sums, repeated compression while decoding.

Two rules keep a shortened cache correct. ``get_seq_length`` counts the tokens *seen*, so the next token gets its true
position although fewer entries are stored; ``get_mask_sizes`` gives the stored length and the difference as offset.
And kept entries stay in the order of their positions: padding is on the left, so after compression it is still on the
left and the model's ordinary attention mask covers exactly it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from tokenry.kernels.attention_sums import attention_sums
from tokenry.kvcache.entries import Entries, Merger, Scorer, compress
from tokenry.kvcache.future_queries import FutureQueries, QueryMoments, read_queries
from tokenry.kvcache.observe import AttentionCall, check_observed, forget, observe_next_attention
from tokenry.kvcache.rotation import rotation_of

__all__ = ["CompressedCache", "CompressedLayer", "cache_bytes"]


class CompressedLayer(DynamicLayer):
    """One layer of a cache that is cut to ``budget`` entries per head.

    Made by ``CompressedCache``, whose arguments it takes.
    """

    is_croppable = False

    def __init__(
        self, scorer: Scorer, budget: int, window: int, every: int | None = None, merger: Merger | None = None
    ) -> None:
        super().__init__()
        self.scorer, self.merger = scorer, merger
        self.budget, self.window, self.every = budget, window, every
        self._forget()

    def _forget(self) -> None:
        self.cumulative_length = 0
        self.compressed = False
        self.positions: Tensor | None = None  # [B, H, S], only while it can still be needed
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None
        self.recent: Tensor | None = None
        self.moments: QueryMoments | None = None

    @property
    def stored(self) -> int:
        """Entries held per head."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.numel() else 0

    def _held(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            raise ValueError("the cache layer holds nothing yet: it is filled by update()")
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; the full keys and values take part in this call, compression follows it."""
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def wants_queries(self, new: int) -> bool:
        """Whether the attention call after an update by ``new`` tokens must be observed."""
        return self.every is not None or not self.compressed or new > 1

    def get_seq_length(self) -> int:
        """Tokens seen, not entries stored: the next token's position."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored length with the new tokens, and how many tokens are missing before it."""
        if query_length == 0:
            raise ValueError(
                f"no new token for a cache that has seen {self.cumulative_length}: the prompt is a prefix of its text. "
                "Give a prompt that continues it, or start with a new cache"
            )
        return self.stored + query_length, self.cumulative_length - self.stored

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: evicted entries cannot be brought back."""
        raise ValueError(
            "a cache that evicts cannot be rolled back: speculative and assisted decoding need a full cache "
            "(DynamicCache); generate without an assistant model, or without this cache"
        )

    def reset(self) -> None:
        """Forget everything; the object can be used for another prompt."""
        super().reset()
        self._forget()

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of what is kept beside keys and values."""
        for name in ("positions", "sums", "counts", "recent"):
            found = getattr(self, name)
            setattr(self, name, None if found is None else change(found))
        self.moments = None if self.moments is None else QueryMoments(*map(change, self.moments))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._each_row(lambda x: x[indices, ...])

    @torch.no_grad()
    def observe(self, call: AttentionCall) -> None:
        """Take in the attention of the call that just ran; compress when it is time."""
        new = call.query.shape[-2]
        if new > 1 and call.valid is not None:
            self._check(call.valid, new)
        if self.compressed and self.every is None:
            return
        valid = call.valid
        if valid is None:
            keys = self._held()[0]
            valid = keys.new_ones((keys.shape[0], self.stored), dtype=torch.bool)
        self._add(call, new, valid)
        if self.compressed or new == 1:
            due = self.every is not None and self.stored > self.budget + self.every
        else:
            due = self.stored > self.budget
        if due:
            self._compress(call, valid)

    def _check(self, valid: Tensor, new: int) -> None:
        """The mask must cover all that was seen, with padding on the left."""
        shown = valid.all(-1) | ((valid[:, 1:] >= valid[:, :-1]).all(-1) & valid[:, -1])
        if bool(shown.all()):
            return
        if self.cumulative_length > new:
            raise ValueError(
                f"the attention mask does not cover the {self.cumulative_length} tokens seen with the {new} new ones: "
                "this cache holds another text, or the new prompt is only a prefix of its text. Start with a new cache "
                "(or cache.reset()), or give a prompt that continues its text"
            )
        raise ValueError(
            "the attention mask hides a token behind a visible one; a compressed cache needs padding on the left "
            "(tokenizer.padding_side = 'left')"
        )

    def _add(self, call: AttentionCall, new: int, valid: Tensor) -> None:
        """Add one call's attention to the running sums."""
        keys = self._held()[0]
        batch, heads, stored, _ = keys.shape
        places = torch.arange(self.cumulative_length - new, self.cumulative_length, device=keys.device)
        positions = places.expand(batch, heads, -1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=-1)
        needs, query, mask, bias = self.scorer.needs, call.query, call.mask, call.bias
        if needs == "queries":
            first = self.cumulative_length - new
            self.moments = read_queries(self.moments, query, valid, rotation_of(call.module), first)
        if needs in ("queries", "nothing"):
            return
        if needs == "recent" and new > self.window:  # older queries cannot matter
            query = query[:, :, -self.window :]
            mask = None if mask is None else mask[:, :, -self.window :]
            bias = None if bias is None else bias[..., -self.window :, :]
        seen = attention_sums(
            query,
            keys,
            scaling=call.scaling,
            mask=mask,
            valid=None if call.valid is None else valid,
            recent=self.window,
            softcap=call.softcap,
            sinks=call.sinks,
            bias=bias,
        )
        counts = seen.counts[:, None].expand(batch, heads, stored)
        if self.sums is None or self.counts is None or self.recent is None:
            self.sums, self.counts, self.recent = seen.sums, counts.clone(), seen.rows
            return
        grow = (0, new)
        self.sums = torch.nn.functional.pad(self.sums, grow) + seen.sums
        self.counts = torch.nn.functional.pad(self.counts, grow) + counts
        recent = torch.cat([torch.nn.functional.pad(self.recent, grow), seen.rows], dim=2)
        self.recent = recent[:, :, -self.window :]

    def _compress(self, call: AttentionCall, valid: Tensor) -> None:
        """Cut to the budget; carry the running sums along if there is a next time."""
        keys, values = self._held()
        queries = None
        if self.moments is not None:
            queries = FutureQueries(self.moments, rotation_of(call.module), self.cumulative_length, call.scaling)
        none = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        entries = Entries(
            keys=keys,
            values=values,
            positions=none.long() if self.positions is None else self.positions,
            valid=valid,
            sums=none if self.sums is None else self.sums,
            counts=none.long() if self.counts is None else self.counts,
            recent=none[:, :, None][:, :, :0] if self.recent is None else self.recent,
            queries=queries,
        )
        left = compress(entries, self.scorer(entries), self.budget, self.window, self.merger)
        self.keys, self.values, self.compressed = left.keys, left.values, True
        if self.every is None:
            self.positions = self.sums = self.counts = self.recent = self.moments = None
            return
        self.positions = left.positions
        if self.sums is not None:
            self.sums, self.counts, self.recent = left.sums, left.counts, left.recent


class CompressedCache(Cache):
    """A key-value cache that keeps ``budget`` entries per head of every full-attention layer.

    The prompt is read with full attention; right after each layer's attention its cache is cut. Without ``every``
    that happens once, after the first pass of more than one token that leaves more than ``budget`` entries; from then
    on the cache grows by one per token. With ``every=n`` it is cut again whenever more than ``budget + n`` are stored.

    Layers that are not full attention (sliding window, linear) stay what they are in ``DynamicCache``. To score
    entries the cache must see queries: see ``tokenry.kvcache.observe`` for how, and for why ``config`` must be the
    model's own object.

    Args:
        config: ``model.config``.
        scorer: Ranks the entries.
        budget: Entries per head that stay, the window included.
        window: Newest tokens that always stay, and whose attention is the "recent" attention.
        every: Cut again while decoding, whenever the stored length exceeds ``budget + every``. None: never.
        merger: What becomes of the evicted. None: they are dropped.

    Raises:
        ValueError: A bad size, no config, an encoder-decoder, or no full-attention layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        scorer: Scorer,
        *,
        budget: int,
        window: int,
        every: int | None = None,
        merger: Merger | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config must be the model's config object (model.config), got {type(config).__name__}")
        if config.is_encoder_decoder:
            raise ValueError("encoder-decoder models are not supported; give the config of a decoder-only model")
        if budget < 2:
            raise ValueError(f"budget must be at least 2 entries per head, got {budget}")
        if not 1 <= window < budget:
            raise ValueError(
                f"window must be at least 1 and smaller than the budget of {budget} entries, got {window}; "
                "the window is part of the budget"
            )
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 token, or None to compress once; got {every}")
        self.config = config.get_text_config(decoder=True)
        layers = [
            CompressedLayer(scorer, budget, window, every, merger) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(
                f"no layer of this model has a full-attention cache to compress (its layers: {', '.join(kinds)}); "
                "use DynamicCache"
            )
        super().__init__(layers=layers)
        self._restore = weakref.finalize(self, forget, self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """A copy that still belongs to the same model: the config is shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.config)] = self.config
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_restore"})
        twin._restore = weakref.finalize(twin, forget, twin.config)
        return twin

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values, and ask to see the attention call that follows."""
        check_observed(self.config, self.layers)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, CompressedLayer) and layer.wants_queries(key_states.shape[-2]):
            observe_next_attention(self.config, layer, keys.shape[-2])
        return keys, values

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length will see."""
        check_observed(self.config, self.layers)
        return super().get_mask_sizes(query_length, layer_idx)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors that a cache holds: keys, values, and what it keeps beside them.

    Example:
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
        >>> cache_bytes(cache)
        192
    """
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for value in vars(layer).values()
        for tensor in (value if isinstance(value, tuple) else (value,))
        if isinstance(tensor, Tensor)
    }
    return sum(found.values())
