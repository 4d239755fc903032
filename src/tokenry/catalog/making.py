"""Make a method by any of its names."""

from __future__ import annotations

import importlib
from typing import Any

from tokenry.catalog.entries import cards, near_names

__all__ = ["create", "load"]

# Names that are an argument of something else: the table that holds them, and the call that takes one.
ARGUMENTS = {
    "tokenry.series:MODELS": "tokenry.series.Forecaster({!r}, context_length=96, prediction_length=24)",
    "tokenry.language:VARIANTS": "tokenry.language.BlockTransformerForCausalLM(tokenry.language.VARIANTS[{!r}].config())",
    "tokenry.text.lastde:VARIANTS": "tokenry.text.LastdeDetector(model, tokenizer, {!r})",
    "tokenry.text:CRITERIA": "tokenry.text.BaselineDetector(model, tokenizer, {!r})",
}


def load(entry_point: str) -> Any:
    """The object behind ``module:attribute``."""
    module, attribute = entry_point.split(":")
    return getattr(importlib.import_module(module), attribute)


def create(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a timm model, a token mixer, or a method by name.

    Args:
        name: A timm model that Tokenry registers (``"affnet_t"``), a mixer (``"aff"``, with ``dim`` as the first argument),
            a slug (``"ems"``), whose entry point is then called, or a class or function that a card names
            (``"SinkCache"``, ``"uniformer_video_b"``).
        *args: Handed on.
        **kwargs: Handed on.

    Returns:
        What the name stands for.

    Raises:
        ValueError: The name is unknown, or an argument of something else; the message names the nearest ones, or the call.

    Example:
        >>> create("aff", 16).dim
        16
    """
    for found in cards().values():
        if name in found.models:
            import timm

            importlib.import_module("tokenry.vision")
            load(found.entry_point)  # a method of another package registers its models when it is imported
            return timm.create_model(name, *args, **kwargs)
        if name in found.mixers:
            load(found.entry_point)
            return load("tokenry.mixers:create_mixer")(name, *args, **kwargs)
    public = _public_names()
    made = load(public[name]) if name in public else None
    if not callable(made):
        raise ValueError(_refusal(name, list(public)))
    return made(*args, **kwargs)


def _public_names() -> dict[str, str]:
    """Slugs, and the names of what the cards list, each with what it stands for."""
    found = {entry.split(":")[1]: entry for card in cards().values() for entry in (*card.also, card.entry_point)}
    return found | {slug: card.entry_point for slug, card in cards().items()}


def _refusal(name: str, public: list[str]) -> str:
    for table, call in ARGUMENTS.items():
        if name in load(table):
            return f"{name!r} is an argument: {call.format(name)}"
    known = [*public, *(model for card in cards().values() for model in (*card.models, *card.mixers))]
    return f"no method, model or mixer is called {name!r}; {near_names(name, known)}"
