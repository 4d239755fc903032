"""A model that reads some rows of a batch when it is asked to, each from where it last stopped.

    row b's tokens       ids[b, start_b : n_b]           start_b: left padding, n_b: tokens so far
    the cache holds      columns start_b .. cached_b     column = index into ids; what lies behind is never looked at
    a read to end_b      runs the tokens cached_b .. end_b of the rows asked for, in one pass, and no others

A row that has not been asked for a while catches up on several tokens at once. Rows of one pass may lack different
numbers of tokens: their queries are aligned at the end, and what is too much in front writes into a column that nobody
reads.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenry.decoding.engine.decoder_blocks import learned_positions
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RowReader", "check_reader"]


def check_reader(model: PreTrainedModel) -> None:
    """Refuse a model whose rows cannot be read one without the other.

    Raises:
        ValueError: Encoder-decoder, an attention without free masks, no ``position_ids``, or layers that forget.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; give a decoder-only causal language model")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} has attn_implementation={config._attn_implementation!r}, which cannot take a mask of its own for "
            'each row; load the model with attn_implementation="sdpa" (or "eager")'
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, so rows of different lengths cannot share a pass")
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"cache layer {index} of {name} is a {type(layer).__name__}: it cannot be rolled back or read row by "
                "row. Use a model whose layers all attend to the whole context (no sliding window, no linear attention)"
            )


class _RowLayer(DynamicLayer):
    """One layer's keys and values ``(B, heads, capacity, width)``; the reader says which rows and columns are meant."""

    def __init__(self, reader: RowReader, plain: DynamicLayer) -> None:
        super().__init__()
        self.reader, self.plain = reader, plain

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Any, Any]:
        keys: Any = self.keys if self.is_initialized else None
        values: Any = self.values if self.is_initialized else None
        self.keys, new_keys = self.reader.store(keys, key_states)
        self.values, new_values = self.reader.store(values, value_states)
        self.is_initialized = True
        return new_keys, new_values

    def get_seq_length(self) -> int:
        return self.reader.begin


class RowReader:
    """Keep a model's cache row by row.

    Args:
        model: Decoder-only causal language model.
        rows: Rows of the batch, B.
        start: Left padding of each row. None: no row has any.
        cache: Cache to go on from, filled alike in all rows, and to leave filled after ``release``. None: a new one.

    Attributes:
        cached: Tokens of each row that the cache holds, left padding included.
        passes: Calls of the model so far.
        tokens: Tokens that it has read, all rows together.

    Example:
        >>> from tokenry.assets import load_model
        >>> reader = RowReader(load_model("draft")[0], rows=2)
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9]])
        >>> reader.read(ids, [0], [4])[0, -1].argmax() == reader.model(input_ids=ids[:1]).logits[0, -1].argmax()
        tensor(True)
        >>> reader.cached, reader.passes, reader.tokens
        ([4, 0], 1, 4)
    """

    def __init__(self, model: Any, rows: int, start: list[int] | None = None, cache: Any = None) -> None:
        check_reader(model)
        self.model = model
        self.rows = rows
        self.start = start or [0] * rows
        self.passes = self.tokens = 0
        new: Any = DynamicCache(config=model.config)
        self.cache = new if cache is None else cache
        if not self.cache.layers:
            self.cache.layers = new.layers
        filled = self.cache.get_seq_length()
        self.cached = [max(filled, first) for first in self.start]
        self._capacity = 0
        self._keeps_logits = self.model._supports_logits_to_keep()
        self._positions = learned_positions(model.config)
        self._reserve(filled)
        layers = []
        for plain in self.cache.layers:
            layers.append(layer := _RowLayer(self, plain))
            if plain.is_initialized:
                layer.keys, layer.values = self._grown(plain.keys), self._grown(plain.values)
                layer.is_initialized = True
        self.cache.layers = layers
        # Of the pass that is running:
        self.begin = 0  # the first column written where all rows agree
        self._end = 0
        self._which: Tensor | None = None  # (R,) rows; None: all
        self._columns: Tensor | None = None  # (R, Q) where each token goes; None: begin to end, in all rows

    @torch.no_grad()
    def read(self, ids: Tensor, rows: list[int], ends: list[int], keep: int = 1) -> Tensor:
        """Read the tokens that the cache lacks; returns the logits of the last ``keep`` of them, ``(R, keep, V)``.

        Args:
            ids: ``(B, N)`` tokens of all rows, left-padded; row b's last one to read is ``ids[b, end - 1]``.
            rows: The R rows to read, ascending. No other row costs anything.
            ends: Where each of them ends. At least ``keep`` tokens of each must be new.
            keep: Positions whose logits are wanted.
        """
        lags = [end - self.cached[row] for row, end in zip(rows, ends, strict=True)]
        if min(lags) < keep:
            raise ValueError(f"rows {rows} have {lags} unread tokens; at least {keep} are needed")
        device, width = self.model.device, max(lags)
        self._end, self.begin = max(ends), max(ends) - width
        self._reserve(self._end)
        self._which = None if len(rows) == self.rows else torch.tensor(rows, device=device)
        mine = ids if self._which is None else ids[self._which.to(ids.device)]  # (R, N)
        aligned = min(ends) == self._end and min(lags) == width and not any(self.start[row] for row in rows)
        if aligned:
            self._columns, mask = None, None
            tokens = mine[:, self.begin : self._end].to(device)
            positions = torch.arange(self.begin, self._end, device=device)[None]
        else:
            end, first, cached = (
                torch.tensor(x, device=device)[:, None]
                for x in (ends, [self.start[row] for row in rows], [self.cached[row] for row in rows])
            )
            index = end - width + torch.arange(width, device=device)  # (R, Q)
            self._columns = torch.where(index >= cached, index, self._capacity - 1)
            tokens = mine.to(device).gather(1, index.clamp_min(0)).masked_fill(index < cached, 0)
            positions = (index - first).clamp_min(0)
            column = torch.arange(self._end, device=device)
            seen = (column >= first[:, :, None]) & (column <= index[:, :, None])  # (R, Q, N)
            dtype = self.model.dtype
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
            mask = mask[:, None]
        if self._positions is not None:  # drafts may reach behind a learned table; they are never emitted
            positions = positions.clamp_max(self._positions - 1)
        logits = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions.expand(len(rows), -1),
            **{CACHE: self.cache},
            use_cache=True,
            **({"logits_to_keep": keep} if self._keeps_logits else {}),
        ).logits
        self.passes += 1
        self.tokens += sum(lags)
        for row, end in zip(rows, ends, strict=True):
            self.cached[row] = end
        return logits[:, -keep:].to(ids.device)

    def forget(self, lengths: list[int]) -> None:
        """Forget what stands behind each row's first ``lengths[b]`` tokens."""
        self.cached = [
            max(min(have, n), first) for have, n, first in zip(self.cached, lengths, self.start, strict=True)
        ]

    def release(self, columns: int) -> None:
        """Give the cache its plain layers back, holding the first ``columns`` positions of every row."""
        plain = []
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.plain.is_initialized = False  # its own first update makes it afresh
                layer.plain.update(layer.keys[:, :, :columns], layer.values[:, :, :columns])
            plain.append(layer.plain)
        self.cache.layers = plain

    def store(self, slab: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write a pass's keys or values ``(R, heads, Q, width)``; returns the slab and what the pass may look at."""
        if slab is None:
            slab = new.new_zeros(self.rows, new.shape[1], self._capacity, new.shape[3])
        rows = self._which
        if self._columns is not None:
            every = torch.arange(self.rows, device=new.device) if rows is None else rows.to(new.device)
            slab[every[:, None], :, self._columns.to(new.device)] = new.transpose(1, 2)
        elif rows is None:
            slab[:, :, self.begin : self._end] = new
        else:
            slab[rows.to(new.device), :, self.begin : self._end] = new
        return slab, slab[:, :, : self._end] if rows is None else slab[rows.to(new.device), :, : self._end]

    def _reserve(self, end: int) -> None:
        """Make room for ``end`` columns and the one that nobody reads."""
        if end < self._capacity:
            return
        first, self._capacity = self._capacity == 0, max(2 * self._capacity, end + 128)
        if not first:
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = self._grown(layer.keys), self._grown(layer.values)

    def _grown(self, old: Tensor) -> Tensor:
        bigger = old.new_zeros(*old.shape[:2], self._capacity, old.shape[3])
        bigger[:, :, : old.shape[2]] = old
        return bigger
