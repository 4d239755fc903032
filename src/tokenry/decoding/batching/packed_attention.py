"""Run pieces of many sequences in one pass, their keys and values in one pool, a shared prefix held once.

    pass        T tokens of all pieces in a row: input (1, T), positions counted within each sequence
    own part    each piece looks at its own sequence's stored tokens and causally at itself
    prefix      all tokens of a group's members look at its prefix together, one matrix product
    output      the two merged by their log-sum-exp (``tokenry.kernels.partial_attention``), which is exact

Everything of a transformer but its attention treats tokens one by one, so nothing is padded there. The attention is an
``AttentionInterface`` function that is attached to the model while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenry.decoding.batching.token_batching import Piece
from tokenry.kernels.partial_attention import merge_partial_attention, partial_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackedAttention", "PackedPass", "SlotPool"]

Key = tuple[int, int | None]  # (group, request), or (group, None) for the group's prefix


class SlotPool:
    """Slots for the keys and values of tokens. A prefix gets consecutive ones where there are such.

    Args:
        capacity: Number of slots.

    Example:
        >>> pool = SlotPool(6)
        >>> pool.take_together((0, None), 3).tolist()
        [0, 1, 2]
        >>> [slots.tolist() for slots in pool.take([((0, 5), 1), ((0, 7), 1)])]
        [[4], [5]]
        >>> pool.give_back((0, None))
        >>> pool.used
        2
    """

    def __init__(self, capacity: int) -> None:
        self.free = np.ones(capacity, dtype=bool)
        self.slots: dict[Key, np.ndarray] = {}

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return len(self.free) - int(self.free.sum())

    def take(self, wanted: Sequence[tuple[Key, int]]) -> list[np.ndarray]:
        """The next slots of several sequences, so many for each."""
        total = sum(count for _, count in wanted)
        free = self._enough(total)
        at, taken = len(free) - total, []
        for sequence, count in wanted:
            taken.append(free[at : at + count])
            self._hold(sequence, taken[-1])
            at += count
        return taken

    def take_together(self, sequence: Key, count: int) -> np.ndarray:
        """The slots of a prefix: the first gap that is large enough, else any."""
        free = self._enough(count)
        gaps = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        slots = free[gaps[0] : gaps[0] + count] if len(gaps) else free[:count]
        self._hold(sequence, slots)
        return slots

    def _enough(self, count: int) -> np.ndarray:
        free = np.flatnonzero(self.free)
        if len(free) < count:
            raise RuntimeError(f"{count} slots wanted, {len(free)} of {len(self.free)} are free")
        return free

    def _hold(self, sequence: Key, slots: np.ndarray) -> None:
        self.free[slots] = False
        before = self.slots.get(sequence)
        self.slots[sequence] = slots if before is None else np.concatenate([before, slots])

    def give_back(self, sequence: Key) -> None:
        """Free all slots of a sequence."""
        slots = self.slots.pop(sequence, None)
        if slots is not None:
            self.free[slots] = True


@dataclass
class _Own:
    """Pieces of similar size, padded to one rectangle of queries and one of keys."""

    read: Tensor  # (n * Q,) place in the pass; padding reads place 0
    write: Tensor  # (n * Q,) place in the output; padding writes place T, which nobody reads
    slots: Tensor  # (n * S,) of keys; padding reads the row's first one, and is masked
    index: Tensor  # (n, Q) which token of its own sequence each query is
    keys: int  # S


@dataclass
class _Shared:
    """Tokens of one group's members and the prefix that they look at."""

    begin: int
    end: int
    slots: slice | Tensor
    length: int
    last: int  # largest position of a query


@dataclass
class PackedPass:
    """The index tensors of one pass."""

    ids: Tensor  # (1, T)
    positions: Tensor  # (1, T)
    slots: Tensor  # (T,) where the new keys and values go
    emitting: Tensor  # (E,) places whose logits are wanted
    requests: list[int]  # (E,) whose they are
    own: list[_Own]
    shared: list[_Shared]
    biases: dict[tuple[str, int, int | None], Tensor] = field(default_factory=dict)  # the same in every layer

    @classmethod
    def build(
        cls,
        pieces: Sequence[Piece],
        tokens: Sequence[Sequence[int]],
        prefixes: Sequence[int],
        pool: SlotPool,
        device: Any,
    ) -> PackedPass:
        """Lay out the pieces and take their slots.

        Args:
            pieces: By group, a prefix before its members.
            tokens: Of each piece.
            prefixes: Length of each piece's group's prefix.
            pool: Where slots are taken.
            device: Of the index tensors.
        """
        begins = np.cumsum([0, *(piece.count for piece in pieces)])
        for piece, prefix in zip(pieces, prefixes, strict=True):
            if piece.request is None and piece.start == 0:
                pool.take_together((piece.group, None), prefix)
        pool.take([((piece.group, piece.request), piece.count) for piece in pieces if piece.request is not None])
        positions, slots, emitting = [], [], []
        spans: dict[int, tuple[int, int, int]] = {}  # group to begin, end and prefix length of its members' tokens
        for piece, prefix, begin in zip(pieces, prefixes, begins.tolist(), strict=False):
            offset, end = piece.start, piece.start + piece.count
            if piece.request is not None:
                spans[piece.group] = spans.get(piece.group, (begin,))[0], begin + piece.count, prefix
                offset += prefix
            if piece.emits:
                emitting.append((begin + piece.count - 1, piece.request))
            positions.append(np.arange(offset, offset + piece.count))
            slots.append(pool.slots[piece.group, piece.request][piece.start : end])
        place = np.concatenate(positions)
        shared = []
        for group, (begin, end, length) in spans.items():
            if length:
                held = pool.slots[group, None]
                first, together = int(held[0]), held[-1] - held[0] == length - 1
                where = slice(first, first + length) if together else _tensor(held, device)
                shared.append(_Shared(begin, end, where, length, last=int(place[begin:end].max())))
        return cls(
            ids=_tensor([token for found in tokens for token in found], device)[None],
            positions=_tensor(place, device)[None],
            slots=_tensor(np.concatenate(slots), device),
            emitting=_tensor([at for at, _ in emitting], device),
            requests=[request for _, request in emitting],
            own=_rectangles(pieces, begins, pool, device),
            shared=shared,
        )

    def own_bias(self, number: int, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
        """``(1, n, repeats * Q, S)``: minus infinity before the window and after the query's own token."""
        key = ("own", number, window)
        if key not in self.biases:
            own = self.own[number]
            at = torch.arange(own.keys, device=own.index.device)
            hidden = at > own.index[..., None]  # (n, Q, S)
            if window is not None:
                hidden |= at <= own.index[..., None] - window
            self.biases[key] = _additive(hidden, dtype).repeat(1, repeats, 1)[None]
        return self.biases[key]

    def prefix_bias(self, number: int, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor | None:
        """``(1, 1, repeats * t, P)``, or None where every token of the prefix is within the window."""
        part, key = self.shared[number], ("prefix", number, window)
        if window is None or part.last < window:
            return None
        if key not in self.biases:
            query = self.positions[0, part.begin : part.end, None]
            hidden = torch.arange(part.length, device=query.device) <= query - window  # (t, P)
            self.biases[key] = _additive(hidden, dtype).repeat(repeats, 1)[None, None]
        return self.biases[key]


def _rectangles(pieces: Sequence[Piece], begins: np.ndarray, pool: SlotPool, device: Any) -> list[_Own]:
    """Pieces of about as many queries and keys together, so that little is padding."""
    classes: dict[tuple[int, int], list[int]] = {}
    for number, piece in enumerate(pieces):
        size = (piece.count - 1).bit_length(), (piece.start + piece.count).bit_length() // 2
        classes.setdefault(size, []).append(number)
    rectangles = []
    for numbers in classes.values():
        some = [pieces[i] for i in numbers]
        counts, starts = (np.array([[getattr(p, name)] for p in some]) for name in ("count", "start"))  # (n, 1)
        step = np.arange(counts.max())
        place, real = begins[numbers][:, None] + step, step < counts  # (n, Q)
        keys = np.empty((len(some), (starts + counts).max()), dtype=np.int64)  # (n, S)
        for row, piece in zip(keys, some, strict=True):
            held, end = pool.slots[piece.group, piece.request], piece.start + piece.count
            row[:end], row[end:] = held[:end], held[0]
        rectangles.append(
            _Own(
                read=_tensor(np.where(real, place, 0).ravel(), device),
                write=_tensor(np.where(real, place, begins[-1]).ravel(), device),
                slots=_tensor(keys.ravel(), device),
                index=_tensor(starts + np.minimum(step, counts - 1), device),
                keys=keys.shape[1],
            )
        )
    return rectangles


def _tensor(values: Any, device: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


class PackedAttention:
    """The attention function of a pass, with the pool that it writes and reads.

    Use it inside ``attached``. Before the first pass, ``probe`` runs one token to learn the shapes of keys and values.

    Args:
        model: Causal language model of the ``AttentionInterface`` kind.

    Raises:
        ValueError: Some layer of the model does not attend through that interface, or in a way that is not known here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.shapes: dict[int, tuple[Tensor, Tensor]] = {}  # layer to one token's key and value
        self.pools: dict[int, tuple[Tensor, Tensor]] = {}  # layer to (Hkv, slots, D), (Hkv, slots, Dv)
        self.current: PackedPass | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the model attend through this object; its own attention is back afterwards, also after an error."""
        configs = {
            id(module.config): module.config for module in self.model.modules() if hasattr(module, "config")
        }.values()
        before = [(config, config._attn_implementation_internal) for config in configs]
        name = f"tokenry_packed_{id(self)}"
        ALL_ATTENTION_FUNCTIONS[name] = self
        try:
            for config, _ in before:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            del ALL_ATTENTION_FUNCTIONS[name]

    @torch.no_grad()
    def probe(self) -> int:
        """Run one token; returns the bytes of keys and values per token."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        layers, reason = self.model.config.get_text_config(decoder=True).num_hidden_layers, None
        try:
            self.model(input_ids=one, position_ids=one, use_cache=False)
        except (TypeError, AttributeError) as error:  # an attention of its own that misses what it is used to be given
            reason = error
        if reason is not None or sorted(self.shapes) != list(range(layers)):
            raise ValueError(
                f"{type(self.model).__name__}: {len(self.shapes)} of {layers} layers attend through the attention "
                "interface of transformers; only models whose layers all do can share prefixes here (no linear, "
                "recurrent or chunked layers)"
            ) from reason
        return sum(k.nbytes + v.nbytes for k, v in self.shapes.values())

    def allocate(self, slots: int) -> None:
        """Make room for ``slots`` tokens."""
        self.pools = {
            layer: (k.new_empty(k.shape[0], slots, k.shape[2]), v.new_empty(v.shape[0], slots, v.shape[2]))
            for layer, (k, v) in self.shapes.items()
        }

    @torch.no_grad()
    def run(self, packed: PackedPass) -> Tensor:
        """Logits ``(E, V)`` after the emitting places."""
        self.current = packed
        keeps = self.model._supports_logits_to_keep()
        keep = packed.emitting if len(packed.emitting) else packed.emitting.new_zeros(1)
        logits = self.model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            use_cache=False,
            **({"logits_to_keep": keep} if keeps else {}),
        ).logits[0]
        return logits[: len(packed.emitting)] if keeps else logits[packed.emitting]

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """What a layer calls: query ``(1, H, T, D)``, key and value ``(1, Hkv, T, D)`` of the pass's tokens."""
        if others.get("position_bias") is not None:
            raise ValueError(f"{type(self.model).__name__} adds a position bias to its scores, which is not supported")
        layer = module.layer_idx
        if self.current is None:
            self.shapes[layer] = key[0], value[0]
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
        packed, (keys, values) = self.current, self.pools[layer]
        keys.index_copy_(1, packed.slots, key[0])
        values.index_copy_(1, packed.slots, value[0])
        heads, _, width = keys.shape  # Hkv, slots, D
        total, out_width = query.shape[2], values.shape[2]
        queries = query[0].unflatten(0, (heads, -1))  # (Hkv, R, T, D)
        repeats = queries.shape[1]
        options: dict[str, Any] = {"scale": width**-0.5 if scaling is None else scaling, "softcap": softcap}
        out = query.new_empty(heads, repeats, total + 1, out_width)
        lse = torch.empty(heads, repeats, total + 1, dtype=torch.float32, device=query.device)
        for number, own in enumerate(packed.own):
            n, q = own.index.shape
            mine = queries.index_select(2, own.read).view(heads, repeats, n, q, width)
            o, l = partial_attention(
                mine.transpose(1, 2).reshape(heads, n, repeats * q, width),
                keys.index_select(1, own.slots).view(heads, n, own.keys, width),
                values.index_select(1, own.slots).view(heads, n, own.keys, out_width),
                bias=packed.own_bias(number, sliding_window, repeats, query.dtype),
                **options,
            )
            o = o.reshape(heads, n, repeats, q, out_width).transpose(1, 2).flatten(2, 3)  # (Hkv, R, n * Q, Dv)
            l = l.reshape(heads, n, repeats, q).transpose(1, 2).flatten(2, 3)  # (Hkv, R, n * Q)
            if s_aux is not None:  # a learned score per head that takes part in the softmax and holds no value
                without, l = l, torch.logaddexp(l, s_aux.float().view(heads, repeats, 1))
                o = o * (without - l).exp()[..., None].to(o.dtype)
            out.index_copy_(2, own.write, o)
            lse.index_copy_(2, own.write, l.to(lse.dtype))  # a bias in float64 makes it float64
        for number, part in enumerate(packed.shared):
            here = slice(part.begin, part.end)
            o, l = partial_attention(
                queries[:, :, here].flatten(1, 2)[None],  # (1, Hkv, R * t, D)
                keys[:, part.slots][None],
                values[:, part.slots][None],
                bias=packed.prefix_bias(number, sliding_window, repeats, query.dtype),
                **options,
            )
            whole = o[0].unflatten(1, (repeats, -1)), l[0].unflatten(1, (repeats, -1))
            out[:, :, here] = merge_partial_attention([(out[:, :, here], lse[:, :, here]), whole])
        return out[:, :, :total].flatten(0, 1).transpose(0, 1)[None].contiguous(), None
