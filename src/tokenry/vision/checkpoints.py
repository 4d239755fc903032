"""Checkpoints of the MetaFormer family: the authors' files and timm's into these models, 21k heads into 1k heads.

ours                                    PoolFormer (2111.11418)     Baselines (2210.13452)        timm
stem.conv                               patch_embed.proj            downsample_layers.0.conv      stem.conv
stem.post_norm                          -                           downsample_layers.0.post_norm stem.norm
stages.i.downsample.{pre_norm,conv}     network.k.proj              downsample_layers.i.*         stages.i.downsample.{norm,conv}
stages.i.pos_embed                      network.k.pos_embed         -                             -
stages.i.blocks.j.*                     network.k.j.*               stages.i.j.*                  stages.i.blocks.j.*
head.norm, head.fc                      norm, head                  norm, head                    head.norm, head.fc
feature_norms.i                         norm{k}                     -                             -
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.models.metaformer import MetaFormer as TimmMetaFormer
from timm.models.metaformer import checkpoint_filter_fn as timm_filter
from torch import Tensor, nn

from tokenry.vision.state_dicts import unwrap, without_head

__all__ = ["checkpoint_filter_fn", "convert_in21k_head", "load_checkpoint"]

CLASSES_21K = 21841


def _network_stages(state_dict: Mapping[str, Tensor]) -> dict[int, tuple[int, str]]:
    """What entry k of PoolFormer's list ``network`` is: (stage, ``"blocks"``, ``"downsample"`` or ``"pos_embed"``)."""
    found: dict[int, tuple[int, str]] = {}
    stage = 0
    for k in sorted({int(m[1]) for name in state_dict if (m := re.match(r"network\.(\d+)\.", name))}):
        if f"network.{k}.proj.weight" in state_dict:
            stage += 1
            found[k] = stage, "downsample"
        else:
            found[k] = stage, "pos_embed" if f"network.{k}.pos_embed" in state_dict else "blocks"
    return found


def _from_poolformer(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    where = _network_stages(state_dict)
    renamed = {}
    for name, value in state_dict.items():
        if entry := re.match(r"network\.(\d+)\.(.*)", name):
            stage, part = where[int(entry[1])]
            rest = entry[2].replace("proj.", "conv.") if part == "downsample" else entry[2]
            rest = re.sub(r"layer_scale_(\d)", r"layer_scale\1", rest)
            name = f"stages.{stage}.pos_embed" if part == "pos_embed" else f"stages.{stage}.{part}.{rest}"
        elif entry := re.match(r"norm(\d+)\.(.*)", name):
            name = f"feature_norms.{where[int(entry[1])][0]}.{entry[2]}"
        else:
            name = re.sub(r"^patch_embed\.proj", "stem.conv", name)
            name = (
                re.sub(r"^head\.", "head.fc.", name)
                if name.startswith("head.")
                else re.sub(r"^norm", "head.norm", name)
            )
        renamed[name] = value
    return renamed


def _from_baselines(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
        name = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", name)
        name = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
        name = re.sub(r"^head\.", "head.fc.", name) if name.startswith("head.") else re.sub(r"^norm", "head.norm", name)
        renamed[name] = value
    return renamed


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a state dict of the authors or of timm to ``MetaFormer``'s names, and reshape 1x1 convolutions.

    Args:
        state_dict: PoolFormer's, the Baselines', timm's, or one of these models.
        model: The ``MetaFormer`` that it is for.
    """
    if any(name.startswith("network.") for name in state_dict):
        renamed = _from_poolformer(state_dict)
    elif any(name.startswith("downsample_layers.") for name in state_dict):
        renamed = _from_baselines(state_dict)
    else:
        renamed = {
            re.sub(r"^stem\.norm\.", "stem.post_norm.", re.sub(r"\.downsample\.norm\.", ".downsample.pre_norm.", k)): v
            for k, v in state_dict.items()
        }
    renamed = {re.sub(r"((?:layer|res)_scale\d)\.scale$", r"\1", name): value for name, value in renamed.items()}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in renamed.items():
        if name in shapes and value.shape != shapes[name] and value.numel() == shapes[name].numel():
            renamed[name] = value.reshape(shapes[name])
    return without_head(renamed, model)


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    found: Any
    if isinstance(source, Mapping):
        found = source
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no checkpoint at {path}; give a .safetensors or .pth file, or a state dict")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    return unwrap(found)


def load_checkpoint(model: nn.Module, source: str | Path | Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint of the authors (or of timm) into a model of this family, strictly.

    Args:
        model: A ``tokenry.vision.metaformer`` model, its ``features_only`` form, or one of timm's ``poolformer*``,
            ``convformer*``, ``caformer*``.
        source: A ``.safetensors`` or ``.pth`` file (read without pickled code), or a state dict.

    Returns:
        The model.

    Raises:
        ValueError: No such file; the checkpoint belongs to another model or number of classes.
    """
    state_dict = _read(source)
    target: Any = getattr(model, "model", model) if not hasattr(model, "stem") else model
    if isinstance(target, TimmMetaFormer):
        try:
            state_dict = timm_filter(state_dict, target)
        except KeyError as error:
            raise ValueError(f"the checkpoint has a tensor {error} that timm's model lacks: another model's") from error
    else:
        state_dict = checkpoint_filter_fn(state_dict, target)
    own = target.state_dict()
    missing, unexpected = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
    wrong = [
        f"{name}: {tuple(value.shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
        for name, value in state_dict.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong and all(line.startswith("head.") for line in wrong):
        raise ValueError(
            f"the checkpoint has another number of classes ({'; '.join(wrong)}): make the model with that num_classes "
            "and call reset_classifier afterwards, or turn a 21k head into a 1k head with convert_in21k_head"
        )
    if missing or unexpected or wrong:
        raise ValueError(
            f"the checkpoint is of another model: {len(missing)} tensors missing ({', '.join(missing[:3])} ...), "
            f"{len(unexpected)} unknown ({', '.join(unexpected[:3])} ...), {len(wrong)} of another shape "
            f"({'; '.join(wrong[:3])})"
        )
    target.load_state_dict(state_dict)
    return model


@cache
def _rows_of_1k_classes() -> list[int | None]:
    """Row of the 21k head for each ImageNet-1k class; None for the one class (850) that 21k lacks."""
    return json.loads(Path(__file__).with_name("in21k_to_1k.json").read_text("utf-8"))["row_of_1k_class"]


def convert_in21k_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn an ImageNet-21k classifier (21,841 rows) into an ImageNet-1k one, as the authors do before fine-tuning.

    Row i of the new head is the 21k row of the same class; class 850, which 21k lacks, gets the mean of all rows.
    Weights and biases alike; everything else is handed on.

    Raises:
        ValueError: No tensor has 21,841 rows.

    Example:
        >>> import torch
        >>> convert_in21k_head({"head.fc2.bias": torch.arange(21841.0)})["head.fc2.bias"].shape
        torch.Size([1000])
    """
    rows = _rows_of_1k_classes()
    heads = [name for name, value in state_dict.items() if value.ndim > 0 and value.shape[0] == CLASSES_21K]
    if not heads:
        raise ValueError(f"no tensor of the state dict has {CLASSES_21K} rows: it is not an ImageNet-21k checkpoint")
    converted = dict(state_dict)
    for name in heads:
        value = state_dict[name]
        known = value[torch.tensor([0 if row is None else row for row in rows])]
        mean = value.mean(0, keepdim=True).expand_as(known)
        absent = torch.tensor([row is None for row in rows]).view(-1, *[1] * (value.ndim - 1))
        converted[name] = torch.where(absent, mean, known)
    return converted
