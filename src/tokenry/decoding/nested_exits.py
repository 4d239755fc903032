"""Run a causal language model part by part, with a cache in which every part keeps its own length.

    part (a, b]    layers a+1 ... b, then the model's own final norm and head
    h_b            hidden state after b layers, before the norm: what the next part goes on from
    slot p         where row r's token number p lives: its id, its h_b, its keys and values in each layer that has run it

    before part (a, b] answers for slot p it runs all slots <= p that it has not run yet, in one causal pass

So every layer's slots are filled without holes, a query at slot p may look at exactly the slots up to p, and what a part
answers is what full recomputation would give, whoever left early before. Rolling back is forgetting: a slot that is
filled again is overwritten. Rows of a batch have slots of their own and may differ in all of this.

A part is the library's own forward pass over a shallow copy of the model that shares every weight: in its list of
layers, those before a are passed by, number a hands in the stored h_a, number b+1 takes h_b out again. Masks, rotary
embeddings and the head stay the architecture's business, and the model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tokenry.decoding.engine.decoder_blocks import decoder_blocks
from tokenry.layers.cache_argument import CACHE

__all__ = ["ModelPart", "NestedRun", "with_layers"]


def with_layers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> PreTrainedModel:
    """A shallow copy of a model that shares all weights, with other decoder layers."""
    blocks = decoder_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)

    def copied(module: Any, path: str) -> Any:
        twin = copy.copy(module)
        twin._modules = dict(module._modules)
        name, _, rest = path.partition(".")
        twin._modules[name] = copied(module._modules[name], rest) if rest else nn.ModuleList(layers)
        return twin

    return copied(model, path)


class _PassBy(nn.Module):
    """Stands where a layer is not run."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


class _HandIn(_PassBy):
    """Stands before a part's first layer: whatever comes, the stored hidden states go on."""

    hidden: Tensor

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.hidden


class _TakeOut(_PassBy):
    """Stands behind a part's last layer: keeps what comes out of it."""

    hidden: Tensor

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.hidden = hidden_states
        return hidden_states


class ModelPart:
    """Layers ``first + 1`` to ``last`` of a model, with its own norm and head behind them.

    Args:
        model: Causal language model; unchanged.
        first: Layers that have been run already.
        last: Layers that have been run afterwards.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, _ = load_model("draft")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> _, hidden = ModelPart(model, 0, 2)(ids)
        >>> logits, _ = ModelPart(model, 2, 3)(ids, hidden)
        >>> torch.equal(logits, model(ids).logits)
        True
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        layers = list(decoder_blocks(model))
        depth = len(layers)
        self.layers = last - first
        self._in = _HandIn() if first else None
        self._out = _TakeOut() if last < depth else None
        chosen: list[nn.Module] = (
            [_PassBy() for _ in range(first)] + layers[first:last] + [_PassBy() for _ in range(last, depth)]
        )
        if self._in is not None:
            chosen[first - 1] = self._in
        if self._out is not None:
            chosen[last] = self._out
        self.model: Any = with_layers(model, chosen)

    def __call__(self, input_ids: Tensor, hidden: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Logits of this exit, and the hidden states for the next part (None behind the last layer).

        Args:
            input_ids: ``(B, N)``; only their shape counts where ``hidden`` is given.
            hidden: ``(B, N, D)`` after ``first`` layers; None for a part that begins at the bottom.
            **kwargs: Handed to the model.
        """
        if self._in is not None:
            if hidden is None:
                raise ValueError("a part that does not begin at the bottom needs the hidden states to go on from")
            self._in.hidden = hidden
        logits = self.model(input_ids=input_ids, **kwargs).logits
        return logits, None if self._out is None else self._out.hidden


class _Window:
    """The slots that one pass fills: row r's ``filled[r]`` to ``ends[r] - 1``, short rows repeating their last one."""

    def __init__(self, filled: Sequence[int], ends: Sequence[int], device: torch.device) -> None:
        self.size = max(end - begin for begin, end in zip(filled, ends, strict=True))
        self.end = max(ends)
        self.even = len(set(filled)) == len(set(ends)) == 1
        self.begin = self.end - self.size
        columns = torch.arange(self.size, device=device)
        if self.even:
            self.slots = (columns + self.begin)[None]  # (1, q)
        else:
            first, last = torch.tensor([list(filled), [end - 1 for end in ends]], device=device)[..., None]
            self.slots = torch.minimum(first + columns, last)  # (B, q)

    def read(self, buffer: Tensor, dim: int) -> Tensor:
        """The window of a buffer whose slots lie along ``dim``."""
        if self.even:
            return buffer.narrow(dim, self.begin, self.size)
        shape = list(buffer.shape)
        shape[dim] = self.size
        return buffer.gather(dim, self._index(shape, dim))

    def write(self, buffer: Tensor, values: Tensor, dim: int) -> None:
        """Fill the window of a buffer."""
        if self.even:
            buffer.narrow(dim, self.begin, self.size).copy_(values)
        else:
            buffer.scatter_(dim, self._index(values.shape, dim), values)

    def _index(self, shape: Sequence[int], dim: int) -> Tensor:
        view = [1] * len(shape)
        view[0], view[dim] = self.slots.shape
        return self.slots.view(view).expand(*shape)

    def mask(self, start: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What the queries may look at, as the model takes it: every slot up to their own, left padding apart."""
        device = self.slots.device
        if self.even and self.begin == 0:  # a whole prompt: the library's own causal mask
            return None if start is None else (torch.arange(self.end, device=device) >= start[:, None]).long()
        if self.even and self.size == 1 and start is None:
            return None
        at = torch.arange(self.end, device=device)
        may = at <= self.slots[..., None]  # (B or 1, q, end)
        if start is not None:
            may = may & (at >= start[:, None, None])
        mask = torch.full(may.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        return mask.masked_fill_(may, 0.0)[:, None]


class _SlotLayer(DynamicLayer):
    """Keys and values by slot. ``run`` knows which slots this pass fills."""

    def __init__(self, run: NestedRun) -> None:
        super().__init__()
        self.run = run
        self.stored: tuple[Tensor, Tensor]  # (B, H, capacity, d) each

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        window = self.run.window
        if not self.is_initialized:
            self.is_initialized = True
            self.stored = _slab(key_states, 2, self.run.capacity), _slab(value_states, 2, self.run.capacity)
        keys, values = self.stored
        window.write(keys, key_states, 2)
        window.write(values, value_states, 2)
        return keys[:, :, : window.end], values[:, :, : window.end]

    def get_seq_length(self) -> int:
        return self.run.window.begin


class NestedRun:
    """The parts of a model over a batch of texts that grow, branch and are cut back.

    Args:
        model: Causal language model.
        exits: Number of layers after which each part ends, ascending.
        rows: Texts.
        start: ``(B,)`` left padding of each row, or None.

    Attributes:
        text: ``(B, capacity)`` token in each slot.
        filled: Per part and row: slots that have been run, from the first on without holes.
        passes: Passes so far.
        layer_passes: Layers that these passes have run.
        layer_tokens: The same, times the slots that a pass filled: work, where a pass costs by its tokens.
    """

    def __init__(self, model: Any, exits: Sequence[int], rows: int, start: Tensor | None = None) -> None:
        self.model, self.rows = model, rows
        self.device = model.device
        self.start = start if start is None else start.to(self.device)
        self.parts = [ModelPart(model, a, b) for a, b in zip([0, *exits], exits, strict=False)]
        self.filled = [[0] * rows for _ in exits]
        self.passes = self.layer_passes = self.layer_tokens = 0
        self.capacity = 0
        self.text = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.hidden: list[Tensor | None] = [None] * len(exits)  # (B, capacity, D) behind each part but the last
        self.cache = DynamicCache()
        self.layers = [_SlotLayer(self) for _ in range(exits[-1])]
        self.cache.layers = [*self.layers]
        self.window: _Window
        self._last_logits = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def reserve(self, slots: int) -> None:
        """Make room for texts of ``slots`` tokens."""
        if slots <= self.capacity:
            return
        self.capacity = max(2 * self.capacity, slots + 64)
        self.text = _longer(self.text, 1, self.capacity)
        self.hidden = [None if h is None else _longer(h, 1, self.capacity) for h in self.hidden]
        for layer in self.layers:
            if layer.is_initialized:
                keys, values = layer.stored
                layer.stored = _longer(keys, 2, self.capacity), _longer(values, 2, self.capacity)

    def load(self, ids: Tensor, lengths: Sequence[int]) -> None:
        """Take over the text ``ids`` ``(B, N)``: row r's first ``lengths[r]`` tokens; what has been run stays as it is."""
        begin, end = min(self.filled[0]), max(lengths)
        self.text[:, begin:end] = ids[:, begin:end]

    def append(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Put ``tokens`` ``(B,)`` behind texts of these lengths."""
        window = _Window(lengths, [n + 1 for n in lengths], self.device)
        window.write(self.text, tokens[:, None], 1)

    def keep(self, row: int, slots: int) -> None:
        """Forget what was run of a row beyond its first ``slots`` slots."""
        for filled in self.filled:
            filled[row] = min(filled[row], slots)

    def run(self, part: int, lengths: Sequence[int]) -> Tensor:
        """Logits ``(B, V)`` of a part behind texts of these lengths; the parts before it must have run them."""
        self.window = window = _Window(self.filled[part], lengths, self.device)
        positions = window.slots.expand(self.rows, -1)
        if self.start is not None:
            positions = (positions - self.start[:, None]).clamp_min(0)
        below = self.hidden[part - 1] if part else None
        logits, hidden = self.parts[part](
            window.read(self.text, 1),
            None if below is None else window.read(below, 1),
            attention_mask=window.mask(self.start, self.model.dtype),
            position_ids=positions,
            use_cache=True,
            **{CACHE: self.cache},
            **self._last_logits,
        )
        if hidden is not None and part < len(self.parts) - 1:
            kept = self.hidden[part]
            if kept is None:
                kept = self.hidden[part] = _slab(hidden, 1, self.capacity)
            window.write(kept, hidden, 1)
        self.filled[part] = list(lengths)
        self.passes += 1
        self.layer_passes += self.parts[part].layers
        self.layer_tokens += self.parts[part].layers * window.size
        return logits[:, -1]


def _slab(like: Tensor, dim: int, slots: int) -> Tensor:
    """Zeros for ``slots`` slots along ``dim``, otherwise shaped like a pass's values."""
    return like.new_zeros([slots if i == dim else size for i, size in enumerate(like.shape)])


def _longer(buffer: Tensor, dim: int, slots: int) -> Tensor:
    longer = _slab(buffer, dim, slots)
    longer.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return longer
