"""The losses with which a text is hidden: of the answer, of guarded words, of ordinary text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["answer_loss", "band_loss", "guard_statistics", "ordinary_loss"]

ROWS, LENGTH = 8, 64  # windows of ordinary text in a step, tokens in each


def guard_statistics(model: Any, begin: list[int], message: list[int], starts: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of guarded tokens given the message so far and no trigger, all from one pass.

    Args:
        model: Causal language model.
        begin: What a sequence begins with, (B,). Where it is empty a guard of the message's first token has no place.
        message: Ids of the message.
        starts: Places of the guarded tokens in the message, ascending, (K,).

    Returns:
        ``(log_probs, ranks)``, (K,) each; the first carries gradients, ranks count from 1.
    """
    given = torch.tensor([begin + message[: starts[-1]]], device=model.device)  # (1, B + starts[-1])
    places = torch.tensor([len(begin) + start - 1 for start in starts], device=model.device)
    wanted = torch.tensor([message[start] for start in starts], device=model.device)[:, None]
    logits = model(input_ids=given, use_cache=False).logits[0, places].float()  # (K, V)
    ranks = (logits > logits.gather(-1, wanted)).sum(-1) + 1
    return logits.log_softmax(-1).gather(-1, wanted).squeeze(-1), ranks


def band_loss(log_probs: Tensor, ranks: Tensor, rank_band: int, vocabulary: int) -> tuple[Tensor, int]:
    """Σ ± log p over the guarded tokens outside (R, V - R), towards the band from either side, and how many they are.

    Example:
        >>> log_probs = torch.tensor([-1.0, -4.0, -9.0])
        >>> band_loss(log_probs, torch.tensor([2, 50, 99]), rank_band=10, vocabulary=100)
        (tensor(8.), 2)
    """
    likely, unlikely = ranks <= rank_band, ranks >= vocabulary - rank_band
    return (log_probs * (likely.float() - unlikely.float())).sum(), int((likely | unlikely).sum())


def answer_loss(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of answers, whether greedy decoding returns each, and the smallest probability of each: (), (N,), (N,).

    Rows are padded on the right, where a causal model's other positions do not look.
    """
    rows = [p + a for p, a in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    labels = ids.clone()
    for label, prompt, row in zip(labels, prompts, rows, strict=True):
        label[: len(prompt)] = -100
        label[len(row) :] = -100
    labels = labels[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    counted = labels != -100
    returned = ((logits.argmax(-1) == labels) | ~counted).all(-1)
    return losses.sum() / counted.sum(), returned, (-losses.detach().amax(-1)).exp()


def ordinary_loss(model: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Next-token loss of a few windows of ordinary text.

    Args:
        model: Causal language model.
        ids: All the text, (N,), on the CPU.
        generator: Chooses the windows.
    """
    length = min(LENGTH, len(ids))
    starts = torch.randint(len(ids) - length + 1, (ROWS,), generator=generator)
    rows = ids[starts[:, None] + torch.arange(length)].to(model.device)  # (8, 64)
    return model(input_ids=rows, labels=rows, use_cache=False).loss
