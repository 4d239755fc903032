"""Make a method by any of its names."""

from __future__ import annotations

import importlib
from typing import Any

from tokenry.catalog.entries import card, cards, near_names

__all__ = ["create", "load"]


def load(entry_point: str) -> Any:
    """The object behind ``module:attribute``."""
    module, attribute = entry_point.split(":")
    return getattr(importlib.import_module(module), attribute)


def create(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a timm model, a token mixer, or a method by name.

    Args:
        name: A timm model that Tokenry registers (``"affnet_t"``), a mixer (``"aff"``, with ``dim`` as the
            first argument), or a slug (``"ems"``), whose entry point is then called.
        *args: Handed on.
        **kwargs: Handed on.

    Returns:
        What the name stands for.

    Raises:
        ValueError: The name is unknown; the message names the nearest ones.
    """
    for found in cards().values():
        if name in found.models:
            import timm

            importlib.import_module("tokenry.vision")
            return timm.create_model(name, *args, **kwargs)
        if name in found.mixers:
            return load("tokenry.mixers:create_mixer")(name, *args, **kwargs)
    if name not in cards():
        known = [*cards(), *(known for found in cards().values() for known in (*found.models, *found.mixers))]
        raise ValueError(f"no method, model or mixer is called {name!r}; {near_names(name, known)}")
    return load(card(name).entry_point)(*args, **kwargs)
