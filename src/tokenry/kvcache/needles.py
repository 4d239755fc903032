"""Needles: short pieces planted in a text, asked for at its end, to see whether a cut cache still holds them.

A needle is a passkey of random letters and digits, one a token, so that nothing but the place where it was planted can
foretell it. Its first tokens, the *cue*, are said again at the end of the context; a model that looks back goes on:

    text ... needle ... text ... cue | rest of the needle
                                     ^ here the cache is cut

``cache_fidelity`` and ``reading_fidelity`` on these tokens give ``correct``: the share of the rest that the model names.
Needles and passkeys are mostly asked for in words; said this way, a model need not follow instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["DEPTHS", "passkey_tokens", "plant_needles"]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def passkey_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``[C]`` ids of the tokens that are one ASCII letter or digit: what needles are made of.

    Where a vocabulary has fewer than ten of them: all of it but the special tokens.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    found = [i for i, name in enumerate(names) if len(name) == 1 and name.isascii() and name.isalnum()]
    return torch.tensor(found if len(found) >= 10 else [i for i in range(len(tokenizer)) if i not in special])


def plant_needles(
    passages: Tensor,
    candidates: Tensor,
    depths: Sequence[float] = DEPTHS,
    *,
    length: int = 12,
    cue: int = 9,
    seed: int = 0,
) -> Tensor:
    """Plant one needle per passage and depth, and ask for it at the end.

    Args:
        passages: ``[P, N]`` int64 token ids of the text around the needles; the last of a passage make room.
        candidates: ``[C]`` token ids that needles are drawn from: ``passkey_tokens(tokenizer)``.
        depths: D places, from 0 (the passage begins with the needle) to 1 (it stands right before the cue).
        length: Tokens of a needle.
        cue: Of these, the tokens that are said again; the last of them follows the context, as the first token fed
            after the cut.
        seed: Which needles are drawn.

    Returns:
        ``[P * D, N + length - cue + 1]`` int64, the depths of a passage one after the other: a context of ``N`` tokens,
        then the cue's last token and the ``length - cue`` tokens to be named.

    Raises:
        ValueError: A needle with its cue does not fit into a passage, or a depth or a size is out of range.

    Example:
        >>> passages = torch.arange(12)[None]
        >>> plant_needles(passages, torch.arange(90, 99), [0.0, 1.0], length=4, cue=2).shape
        torch.Size([2, 15])
    """
    if not 1 <= cue < length:
        raise ValueError(f"a cue must be at least 1 token and shorter than the needle's {length}, got {cue}")
    if passages.ndim != 2 or passages.shape[1] < length + cue:
        raise ValueError(
            f"passages of shape {tuple(passages.shape)} must be (P, N) with room for a needle of {length} tokens and "
            f"{cue - 1} of its cue"
        )
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be numbers from 0 to 1, got {list(depths)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(candidates), (len(passages), len(depths), length), generator=generator)
    hay = passages.shape[1] - length - cue + 1
    planted = []
    for depth, needle in zip(depths, candidates[drawn].unbind(1), strict=True):  # [P, length]
        at = round(depth * hay)
        planted.append(torch.cat([passages[:, :at], needle, passages[:, at:hay], needle], 1))
    return torch.stack(planted, 1).flatten(0, 1)
