"""TidalDecode: two layers look at everything and say what the layers above them read.

Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", ICLR 2025,
arXiv:2410.05076. For one new token, in a model of L layers with a first selection layer s, a correction layer c and a
budget of k, per query head h (its keys K are those of its key head, the new token's included):

    l < s            full attention
    l = s, l = c     full attention, and  P_h = top-k of  q_h · K / sqrt(D)
    other l > s      softmax over P_h alone:  o_h = Σ_{i in P_h} softmax(q_h · K_i / sqrt(D)) V_i

P is chosen anew for every token and holds for the layers above, until c chooses again: tokens that matter to one layer
are taken to matter to the next ("position persistence"). Prompts are read with full attention. Nothing is evicted:
memory stays what it was, a step reads less of it. Of a full step's attention about

    (s + 2) / L  +  (L - s - 2) / L · G·k / N

remains, with N cached tokens and G query heads per key head (each of which reads its own k).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenry.kvcache.sparse_reading import DecodeCall, SparseReading, full_attention_layers, read_sparsely
from tokenry.layers.cache_argument import CACHE

__all__ = ["Calibration", "TidalReading", "calibrate", "tidal"]

# The paper's correction layer for models of 32 layers (it takes 13 for Llama-3-8B).
CORRECTION = 9


class TidalReading:
    """The rule: what each layer reads for a new token.

    Args:
        budget: ``k``, positions per query head.
        start: ``s``, the first selection layer.
        correction: ``c``, the second one; -1: none.
        always_keep_last: The current token takes one of the places, as in the authors' GPU kernels.
    """

    def __init__(self, budget: int, start: int, correction: int = -1, *, always_keep_last: bool = False) -> None:
        self.budget, self.start, self.correction = budget, start, correction
        self.always_keep_last = always_keep_last

    def __call__(self, call: DecodeCall) -> Tensor:
        """Output ``[B, 1, Hq, Dv]``."""
        if call.layer < self.start:
            return call.full()
        if call.layer in (self.start, self.correction):
            return call.full_and_select(self.budget, always_keep_last=self.always_keep_last)
        corrected = self.correction >= 0 and call.layer > self.correction
        positions = call.selected.get(self.correction if corrected else self.start)
        return call.full() if positions is None else call.only(positions)  # None: that layer alone has sinks or a cap


@contextmanager
def tidal(
    model: PreTrainedModel,
    budget: int = 256,
    start: int = 2,
    correction: int | None = None,
    *,
    always_keep_last: bool = False,
) -> Iterator[SparseReading]:
    """Inside this context, decoding steps of ``model`` read ``budget`` tokens per head in most layers.

    Passes of one token per row are sparse; prompts, chunks of prompts and draft trees are read with full attention.
    Works with ``DynamicCache`` and ``StaticCache``, in batches (padding on the left), with grouped heads and beams, for
    decoders that use the attention interface of transformers with sdpa or eager attention. Sliding-window and linear
    layers stay what they are; models with soft-capped scores, sinks or position biases stay dense, with a warning.

    Args:
        model: A causal language model.
        budget: Tokens that a query head reads in a sparse layer. With a budget of at least the context every layer
            reads everything. Default 256 (the authors' example; the paper tries 32 to 4,096).
        start: First selection layer; the layers before it read everything. Default 2 (paper).
        correction: Second selection layer; -1: none. Default: 9, the paper's for 32 layers (13 for Llama-3-8B), if the
            model has more layers than that, else none. ``calibrate`` finds it for a model.
        always_keep_last: The current token takes one of the places, as in the authors' GPU kernels; else it competes,
            as in their PyTorch code.

    Yields:
        The reading; ``reading.selected`` holds the positions ``[B, Hq, k]`` by layer of the latest pass.

    Raises:
        ValueError: A bad budget or layer, or a model that this cannot work with.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("small")
        >>> inputs = tokenizer("It was the best of times, it was the worst of times", return_tensors="pt")
        >>> with tidal(model, budget=8, start=1, correction=3) as reading:
        ...     out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        >>> {layer: tuple(positions.shape) for layer, positions in reading.selected.items()}
        {1: (1, 6, 8), 3: (1, 6, 8)}
    """
    layers = full_attention_layers(model)
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    if correction is None:
        correction = CORRECTION if CORRECTION in layers and start < CORRECTION else -1
    _check(budget, start, layers, depth)
    if correction != -1 and not start < correction < depth:
        warnings.warn(
            f"correction layer {correction} is not above the first selection layer {start} and below {depth}, the number "
            "of layers: there is no correction; give -1 to say so, or a layer between",
            stacklevel=3,
        )
        correction = -1
    if correction != -1 and correction not in layers:
        raise ValueError(f"correction layer {correction} is not full attention; those that are: {layers}")
    rule = TidalReading(budget, start, correction, always_keep_last=always_keep_last)
    with read_sparsely(model, rule) as reading:
        yield reading


def _check(budget: int, start: int, layers: list[int], depth: int) -> None:
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token per head, got {budget}")
    if not 0 <= start < depth:
        raise ValueError(f"start must be one of the model's layers 0 to {depth - 1}, got {start}")
    if layers and start not in layers:
        raise ValueError(f"layer {start} is not full attention, so it cannot select; start at one of {layers}")


@dataclass(frozen=True)
class Calibration:
    """How well the selection of one layer serves the others, from the model's own full attention.

    Attributes:
        correction: The correction layer with the highest recall; -1 if there is no layer for it.
        recall: By correction layer (-1: none), the share of their own top-k that the layers above ``start`` are
            given, on average. The correction layer itself reads everything and counts as 1; a layer that none lies
            above cannot correct.
        window: The same if these layers are given the newest k tokens instead.
        layers: The full-attention layers.
        overlap: ``[F, F]`` float64 between these layers: share of the top-k positions of two layers that are the same.
        recent: ``[F]`` float64: share of each layer's top-k that is among the newest k tokens.
    """

    correction: int
    recall: dict[int, float]
    window: dict[int, float]
    layers: tuple[int, ...]
    overlap: Tensor
    recent: Tensor


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel, data: Tensor, budget: int = 256, start: int = 2, *, steps: int = 8, batch_size: int = 4
) -> Calibration:
    """Find the correction layer with which the layers are given most of the tokens that they look at.

    Each passage but its last ``steps`` tokens is read at once; those are then decoded one by one with full attention,
    while every layer notes its own top-k.

    Args:
        model: A causal language model.
        data: ``[P, N]`` int64 passages without padding, as long as the contexts that matter.
        budget: ``k``; smaller than ``N - steps``.
        start: The first selection layer.
        steps: Tokens per passage at which layers are compared.
        batch_size: Passages at a time.

    Raises:
        ValueError: A bad size, or a model that this cannot work with.

    Example:
        >>> from tokenry.assets import held_out_texts, load_model
        >>> model, tokenizer = load_model("small")
        >>> ids = tokenizer(held_out_texts()[0], return_tensors="pt")["input_ids"][:, :80]
        >>> found = calibrate(model, ids, budget=8, start=1)
        >>> sorted(found.recall), found.recall[found.correction] == max(found.recall.values())
        ([-1, 2, 3, 4], True)
    """
    layers = full_attention_layers(model)
    _check(budget, start, layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    if steps < 1:
        raise ValueError(f"steps must be at least 1 token per passage, got {steps}")
    if data.ndim != 2 or steps > data.shape[1] - 2:
        raise ValueError(
            f"data must be passages [P, N] of more than steps + 1 = {steps + 1} tokens, got {tuple(data.shape)}"
        )
    if budget >= data.shape[1] - steps:
        raise ValueError(
            f"a budget of {budget} covers the {data.shape[1] - steps} tokens that come before the last {steps}: any layer "
            "serves; give longer passages or a smaller budget"
        )
    same = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    recent = torch.zeros(len(layers), dtype=torch.float64)
    with read_sparsely(model, lambda call: call.full_and_select(budget)) as reading:
        for rows in data.to(model.device).split(batch_size):
            cache = DynamicCache(config=model.config)
            model(rows[:, :-steps], **{CACHE: cache}, logits_to_keep=1)
            for place in range(data.shape[1] - steps, data.shape[1]):
                model(rows[:, place : place + 1], **{CACHE: cache})
                if len(reading.selected) < len(layers):
                    raise ValueError(
                        f"only layers {list(reading.selected)} can select in {type(model).__name__}: the scores of others "
                        "are more than scaled products"
                    )
                top = torch.stack([reading.selected[layer] for layer in layers])  # [F, B, Hq, k]
                chosen = torch.zeros(*top.shape[:-1], place + 1, device=top.device).scatter_(-1, top, 1.0)
                each = chosen.flatten(1)  # [F, B·Hq·N]
                same += (each @ each.T).double().cpu() / top[0].numel() * len(rows)
                recent += chosen[..., -budget:].sum((1, 2, 3)).double().cpu() / top[0].numel() * len(rows)
    overlap, recent = same / (steps * len(data)), recent / (steps * len(data))
    first = layers.index(start) + 1
    recall, window = {-1: _mean(overlap[first - 1, first:])}, {-1: _mean(recent[first:])}
    for c in range(first, len(layers) - 1):
        recall[layers[c]] = _mean(torch.cat([overlap[first - 1, first:c], overlap[c, c:]]))
        window[layers[c]] = _mean(torch.cat([recent[first:c], recent.new_ones(1), recent[c + 1 :]]))
    best = max(recall, key=lambda layer: recall[layer])
    return Calibration(best, recall, window, tuple(layers), overlap, recent)


def _mean(shares: Tensor) -> float:
    """Mean over layers; without any, nothing is missed."""
    return shares.mean().item() if len(shares) else 1.0
