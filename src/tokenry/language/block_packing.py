"""Packing documents for a Block Transformer: every document meets every place of the block grid.

    [pad x u ; document ; end ; pad to the next multiple of B],  u uniform in 0 ... B - 1

Rows are cut from the stream of these, without attention borders between documents. Padding is masked: it is read, but
never a target.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["pack_documents"]


def pack_documents(
    documents: Iterable[Sequence[int]],
    *,
    block_length: int,
    row_length: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``row_length`` tokens and their masks; what does not fill the last row is left out.

    Args:
        documents: Token ids without an end token. Empty ones are skipped.
        block_length: B.
        row_length: Tokens per row, a multiple of B.
        eos_token_id: Put after each document; a target.
        pad_token_id: Put in front and behind; may be the end token, the mask tells them apart.
        seed: Of the padding in front.

    Yields:
        ``input_ids`` and ``attention_mask``, both ``(row_length,)``.

    Raises:
        ValueError: ``row_length`` is not a multiple of ``block_length``.

    Example:
        >>> sizes = {"block_length": 4, "row_length": 8, "eos_token_id": 0, "pad_token_id": 1}
        >>> for ids, mask in pack_documents([[5, 6, 7, 8, 9]], **sizes, seed=1):
        ...     print(ids.tolist(), mask.tolist())
        [1, 5, 6, 7, 8, 9, 0, 1] [0, 1, 1, 1, 1, 1, 1, 0]
    """
    if block_length < 1 or row_length < block_length or row_length % block_length:
        raise ValueError(
            f"row_length={row_length} must be a multiple of block_length={block_length}: rows are cut between blocks"
        )
    return _rows(documents, block_length, row_length, eos_token_id, pad_token_id, random.Random(seed))


def _rows(
    documents: Iterable[Sequence[int]], block: int, row: int, end: int, pad: int, chance: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    ids: list[int] = []
    mask: list[int] = []
    for document in documents:
        if not len(document):
            continue
        before = chance.randrange(block)
        behind = -(before + len(document) + 1) % block
        ids += [pad] * before + [*document, end] + [pad] * behind
        mask += [0] * before + [1] * (len(document) + 1) + [0] * behind
        whole = len(ids) // row * row
        for start in range(0, whole, row):
            yield torch.tensor(ids[start : start + row]), torch.tensor(mask[start : start + row])
        ids, mask = ids[whole:], mask[whole:]
