"""A fast tokenizer taken apart: which kind it is, what it puts before a text, and the bare model inside."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

__all__ = ["KINDS", "bare_tokenizer", "check_kind", "flat_steps", "has_dummy_prefix", "unknown_id"]

KINDS = (
    "byte-level BPE (GPT-2, Llama-3, Qwen), SentencePiece-style BPE with or without byte fallback (Llama-2, Mistral), and "
    "Unigram without a normalizer that changes the text"
)


def flat_steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for inner in part[key] for step in flat_steps(inner, key)] if part["type"] == "Sequence" else [part]


def check_kind(model: dict[str, Any]) -> None:
    """Refuse models that have no byte view.

    Raises:
        ValueError: Neither BPE nor Unigram, merges dropped at random, or word marks that are not text.
    """
    if model["type"] not in ("BPE", "Unigram"):
        raise ValueError(f"a {model['type']} tokenizer has no byte view here; supported are {KINDS}")
    if model.get("dropout"):
        raise ValueError(
            f"the tokenizer drops merges at random (dropout={model['dropout']}), so a text has no one encoding"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(
                f"the tokenizer marks words by {key}={model[key]!r}, which is not text; supported are {KINDS}"
            )


def has_dummy_prefix(normalizer: dict[str, Any] | None, steps: list[dict[str, Any]]) -> bool:
    """Whether the tokenizer puts a blank before every text."""
    return any(step["type"] == "Prepend" for step in flat_steps(normalizer, "normalizers")) or any(
        step.get("prepend_scheme", "never") != "never" or step.get("add_prefix_space", False) for step in steps
    )


def bare_tokenizer(spec: dict[str, Any]) -> Tokenizer:
    """The pre-tokenizer and the model alone, on texts that have their dummy prefix already."""

    def plain(step: Any) -> Any:
        if isinstance(step, list):
            return [plain(inner) for inner in step]
        if not isinstance(step, dict):
            return step
        changed = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: changed.get(key, plain(value)) for key, value in step.items()}

    nothing = dict.fromkeys(("normalizer", "post_processor", "decoder", "truncation", "padding"))
    changed = nothing | {"added_tokens": [], "pre_tokenizer": plain(spec["pre_tokenizer"])}
    return Tokenizer.from_str(json.dumps(spec | changed))


def unknown_id(model: dict[str, Any]) -> int | None:
    """The token for what a model cannot write, if it has one."""
    if model["type"] == "Unigram":
        return model["unk_id"]
    return model["vocab"].get(model["unk_token"])
