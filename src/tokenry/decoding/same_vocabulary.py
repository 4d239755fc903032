"""Whether two tokenizers mean the same by an id, asked before one model's tokens are given to another.

Two questions, of two strictnesses:

- A draft trained from a model serves targets of **the same vocabulary**: every token of one must have the same id in the
  other, or guesses are silently wrong. ``check_same_vocabulary`` compares all entries, of tokenizers or plain tables.
- Two models that decide together may have vocabularies of **unequal length** whose common ids agree, as models of one
  family have; their logits are cut to those. ``check_shared_ids`` looks at the special tokens and a sample of the ids
  that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_same_vocabulary", "check_shared_ids"]

PROBES = 256  # ids of the common part that are compared


def check_same_vocabulary(draft_tokenizer: Any, target_tokenizer: Any) -> None:
    """Compare two tokenizers entry by entry: vocabularies of one size can still differ.

    Args:
        draft_tokenizer: Tokenizer of the model that the draft was made from, or its ``{token: id}``.
        target_tokenizer: Tokenizer of the target, or its ``{token: id}``.

    Raises:
        ValueError: A token has another id, or none; the message names one.

    Example:
        >>> check_same_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 1})
    """
    one, other = (v if isinstance(v, Mapping) else v.get_vocab() for v in (draft_tokenizer, target_tokenizer))
    different = sorted(token for token in {*one, *other} if one.get(token) != other.get(token))
    if different:
        token = different[0]
        raise ValueError(
            f"{len(different)} tokens differ between the two vocabularies, {token!r} for one: id {one.get(token)} for the "
            f"draft, {other.get(token)} for the target. A draft serves targets of its own vocabulary only"
        )


def check_shared_ids(small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers whose common ids mean different things; the vocabularies may differ in length.

    Args:
        small: Tokenizer of the small model.
        large: Tokenizer of the large one.

    Raises:
        ValueError: Names the first id that differs.
    """
    shared = min(len(small), len(large))
    special = [*small.all_special_ids, *large.all_special_ids]
    probes = sorted({*range(0, shared, max(1, shared // PROBES)), *(i for i in special if i < shared), shared - 1})
    theirs = large.convert_ids_to_tokens(probes)
    for token, mine, other in zip(probes, small.convert_ids_to_tokens(probes), theirs, strict=True):
        if mine != other:
            raise ValueError(
                f"token {token} is {mine!r} to the small model and {other!r} to the large one; both must use one "
                "tokenizer: take two models of one family"
            )
