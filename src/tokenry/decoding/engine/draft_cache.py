"""A transformers ``DynamicCache`` whose layers live in one preallocated slab while a draft engine runs.

The library's layer grows by concatenation: a copy of everything in every pass, twice with a compaction. Here a pass
writes its keys and values behind the committed ones, and what was accepted is moved to the front for all layers at
once (``tokenry.kernels.kv_compaction``). The user's cache object stays the same object: it gets plain layers back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenry.kernels.kv_compaction import compact_path, compact_rows

__all__ = ["DraftCache"]


class _SlabLayer(DynamicLayer):
    """One layer's view of the slabs. ``room`` holds where this pass writes, ``all`` what it may look at."""

    def __init__(self, owner: DraftCache) -> None:
        super().__init__()
        self.is_initialized = True
        self.owner = owner
        self.room: tuple[Tensor, Tensor]
        self.all: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.room[0].copy_(key_states)
        self.room[1].copy_(value_states)
        return self.all

    def get_seq_length(self) -> int:
        return self.owner.length


class DraftCache:
    """Keep a model's cache so that drafts can be verified, compacted and thrown away without copying it.

    Args:
        cache: The cache that ``generate`` made or the user gave.

    Attributes:
        length: Positions physically committed, L. Rows may hold fewer (the engine masks the rest).

    Raises:
        ValueError: A layer is not a plain ``DynamicLayer``: its state cannot be rolled back to a branch.
    """

    def __init__(self, cache: DynamicCache) -> None:
        for index, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"cache layer {index} is a {type(layer).__name__}: its state cannot be rolled back to a branch of a "
                    "draft tree. Use a model whose layers all attend to the whole context (no sliding window, no "
                    "chunked or linear attention) and the default cache (cache_implementation unset)"
                )
        if cache.offloading:
            raise ValueError("an offloaded cache cannot be used for draft trees; leave cache_implementation unset")
        self.cache = cache
        self.length = cache.get_seq_length()
        self._slabs: list[Tensor] = []
        self._members: list[list[tuple[_SlabLayer, int]]] = []  # per slab: (layer, 0 keys / 1 values) of each slice
        self._plain: list[Any] = []  # the library's layers
        self._owned: list[_SlabLayer | None] = []

    @property
    def adopted(self) -> bool:
        """Whether the layers live in slabs already; they do after the first pass, when shapes are known."""
        return bool(self._slabs)

    def prepare(self, tokens: int) -> None:
        """Make room for a pass over ``tokens`` tokens. Before the first pass has shown the shapes: nothing to do."""
        if not self._slabs:
            return
        end = self.length + tokens
        if end > self._slabs[0].shape[-2]:
            self._grow(end)
        for slab, members in zip(self._slabs, self._members, strict=True):
            rooms, everything = slab.narrow(-2, self.length, tokens).unbind(0), slab.narrow(-2, 0, end).unbind(0)
            for i in range(0, len(members), 2):
                layer = members[i][0]
                layer.room, layer.all = (rooms[i], rooms[i + 1]), (everything[i], everything[i + 1])

    def _grow(self, end: int) -> None:
        for i, slab in enumerate(self._slabs):
            bigger = slab.new_zeros(*slab.shape[:3], max(2 * slab.shape[3], end + 64), slab.shape[4])
            bigger[..., : self.length, :] = slab[..., : self.length, :]
            self._slabs[i] = bigger

    def adopt(self, capacity: int) -> None:
        """Move the plain layers, filled by the first pass, into slabs with room for ``capacity`` positions."""
        self._plain = list(self.cache.layers)
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(self._plain):
            if not layer.is_initialized:  # a layer that shares another's keys and values
                continue
            if layer.keys.shape != layer.values.shape:
                raise ValueError(
                    f"cache layer {index} has keys {tuple(layer.keys.shape)} and values {tuple(layer.values.shape)} of "
                    "different shapes; this attention is not supported by the draft engine"
                )
            shape = layer.keys.shape
            groups.setdefault((shape[0], shape[1], shape[3], layer.keys.dtype, layer.keys.device), []).append(index)
        self._owned = [None] * len(self._plain)
        for (rows, heads, width, dtype, device), indices in groups.items():
            filled = self._plain[indices[0]].keys.shape[-2]
            slab = torch.zeros(2 * len(indices), rows, heads, max(capacity, filled), width, dtype=dtype, device=device)
            members = []
            for i, index in enumerate(indices):
                slab[2 * i, :, :, :filled], slab[2 * i + 1, :, :, :filled] = (
                    self._plain[index].keys,
                    self._plain[index].values,
                )
                self._owned[index] = layer = _SlabLayer(self)
                members += [(layer, 0), (layer, 1)]
            self._slabs.append(slab)
            self._members.append(members)
        self.cache.layers = [own or plain for own, plain in zip(self._owned, self._plain, strict=True)]

    def keep_path(self, path: list[int], path_tensor: Tensor) -> None:
        """Commit the nodes ``path`` of the pass just run, in every row; ``path_tensor`` is the same on the device."""
        if path != list(range(len(path))):  # a prefix stands where it must already
            for slab in self._slabs:
                compact_path(slab, self.length, path_tensor.to(slab.device))
        self.length += len(path)

    def keep_rows(self, paths: Tensor, cached: Tensor, length: int) -> None:
        """Commit each row's own nodes.

        Args:
            paths: ``(B, A)`` nodes, padded with any node: what is written behind a row's end is masked.
            cached: ``(B,)`` positions of each row before.
            length: Longest row after.
        """
        source = paths + self.length
        target = cached[:, None] + torch.arange(paths.shape[1], device=paths.device)
        for slab in self._slabs:
            compact_rows(slab, source.to(slab.device), target.to(slab.device))
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget everything behind position ``length``."""
        if not self._slabs:
            self.cache.crop(length - self.cache.get_seq_length())
        self.length = length

    def release(self, columns: int | None = None) -> None:
        """Give the cache its plain layers back, holding the first ``columns`` positions (default: all committed)."""
        if not self._slabs:
            return
        keep = self.length if columns is None else columns
        for slab, members in zip(self._slabs, self._members, strict=True):
            for i, (layer, which) in enumerate(members):
                plain = self._plain[self._owned.index(layer)]
                setattr(plain, ("keys", "values")[which], slab[i, :, :, :keep].clone())
        self.cache.layers = list(self._plain)
        self._slabs, self._members, self._owned = [], [], []
