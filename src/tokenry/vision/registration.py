"""Register a table of variants with timm."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from timm.models import is_model, model_entrypoint, register_model
from torch import nn

__all__ = ["register_table"]


def register_table(module: str, names: Iterable[str], create: Callable[..., nn.Module]) -> None:
    """Make and register one timm entry function per name: ``name(pretrained=False, **kwargs)``.

    Args:
        module: ``__name__`` of the module that the functions belong to; its ``default_cfgs`` are registered too.
        names: timm model names.
        create: Called as ``create(name, pretrained, **kwargs)``.
    """
    for name in names:

        def entry(pretrained: bool = False, *, _name: str = name, **kwargs: Any) -> nn.Module:
            return create(_name, pretrained, **kwargs)

        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = module
        entry.__doc__ = f"timm model ``{name}``."
        with warnings.catch_warnings():
            if is_model(name) and model_entrypoint(name).__module__ == module:  # the module is loaded a second time
                warnings.simplefilter("ignore", UserWarning)
            setattr(sys.modules[module], name, register_model(entry))
