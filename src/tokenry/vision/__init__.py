"""Backbones (timm models), restoration and dense prediction. Importing this registers the models with timm."""

from tokenry.vision import metaformer_baselines as _metaformer_baselines  # noqa: F401  registers its models
from tokenry.vision.affnet import AFFNet
from tokenry.vision.checkpoints import checkpoint_filter_fn, convert_in21k_head, load_checkpoint
from tokenry.vision.metaformer import MetaFormer, metaformer
from tokenry.vision.metaformer_blocks import MetaFormerBlock
from tokenry.vision.poolformer import poolformer

__all__ = [
    "AFFNet",
    "MetaFormer",
    "MetaFormerBlock",
    "checkpoint_filter_fn",
    "convert_in21k_head",
    "load_checkpoint",
    "metaformer",
    "poolformer",
]
