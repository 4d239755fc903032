"""Checkpoints of any network: taken out of what training scripts put around them, and checked before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

__all__ = ["check_shapes", "unwrap", "without_head"]

# Under what training scripts save weights; averaged ones are taken before the last ones, as in timm.
WRAPPERS = (
    "model_ema", "state_dict_ema", "params_ema", "model", "state_dict", "model_state_dict", "model_state", "params",
)  # fmt: skip


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, averaged ones where it holds both.

    ``module.`` and ``_orig_mod.``, which parallel training and compilation put before names, are taken off.

    Example:
        >>> unwrap({"epoch": 3, "model": {"module.head.weight": torch.zeros(2, 3)}}).keys()
        dict_keys(['head.weight'])
    """
    while True:
        inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            return clean_state_dict(dict(checkpoint))
        checkpoint = inner


def without_head(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict, for a model without classes less the classifiers that it has not."""
    if model.num_classes:
        return dict(state_dict)
    own = model.state_dict()
    return {name: value for name, value in state_dict.items() if name in own or not name.startswith("head")}


def check_shapes(
    state_dict: Mapping[str, Tensor], model: nn.Module, variants: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Say, before anything is loaded, that a checkpoint is another model's, and whose it looks like.

    Args:
        state_dict: Under the model's own names, as a checkpoint filter leaves it.
        model: The model that is to take it.
        variants: Name to arguments of the network's class: each is made without memory to find the one that fits.

    Raises:
        ValueError: Names are missing or unknown, or shapes differ. Only another number of classes is let through to
            timm, which knows what to do.
    """
    own = model.state_dict()

    def faults(shapes: Mapping[str, torch.Size]) -> tuple[list[str], list[str], list[str]]:
        missing, unknown = sorted(set(shapes) - set(state_dict)), sorted(set(state_dict) - set(shapes))
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # torch fills these in
        wrong = [name for name in shapes if name in state_dict and state_dict[name].shape != shapes[name]]
        return missing, unknown, wrong

    missing, unknown, wrong = faults({name: value.shape for name, value in own.items()})
    wrong, unknown = (
        [name for name in names if not name.startswith(("head", "dist_head"))] for names in (wrong, unknown)
    )
    if not (missing or unknown or wrong):
        return
    likely = ""
    for name, arguments in (variants or {}).items():
        classes = {} if model.num_classes else {"num_classes": 0}
        other = type(model)(**{**arguments, **classes, "device": "meta"}).state_dict()
        if not any(faults({key: value.shape for key, value in other.items()})):
            likely = f" It looks like {name}: make the model with timm.create_model({name!r})."
            break
    details = "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for what, names in (
            ("tensors missing", missing),
            ("unknown", unknown),
            (
                "of another shape",
                [f"{n} {tuple(state_dict[n].shape)}, the model's is {tuple(own[n].shape)}" for n in wrong],
            ),
        )
        if names
    )
    raise ValueError(f"the checkpoint is another model's: {details}.{likely}")
