"""Backbones (timm models), restoration and dense prediction. Importing this registers the models with timm."""

from tokenry.vision import metaformer_baselines as _metaformer_baselines  # noqa: F401  registers its models
from tokenry.vision.affnet import AFFNet
from tokenry.vision.cas_vit import CASViT
from tokenry.vision.checkpoints import checkpoint_filter_fn, convert_in21k_head, load_checkpoint
from tokenry.vision.dlgsanet import DLGSANet, load_dlgsanet
from tokenry.vision.draw_tokens import draw_tokens, token_maps
from tokenry.vision.dualtoken_vit import DualTokenViT
from tokenry.vision.efficientvim import EfficientViM
from tokenry.vision.gc_vit import FusedMBDown, GCViT, convert_gcvit
from tokenry.vision.hrvmamba import HRVMamba
from tokenry.vision.maformer import MAFormer
from tokenry.vision.metaformer import MetaFormer, metaformer
from tokenry.vision.metaformer_blocks import MetaFormerBlock
from tokenry.vision.ms_mlp import MSMLP
from tokenry.vision.multi_resolution_heads import HeatmapHead, SegmentationHead
from tokenry.vision.poolformer import poolformer
from tokenry.vision.sg_former import SGFormer
from tokenry.vision.stvit import STViT
from tokenry.vision.stvit_deit import STViTDeiT
from tokenry.vision.stvit_r import STViTR
from tokenry.vision.super_resolution import upscale_image
from tokenry.vision.t2t_vit import T2TViT
from tokenry.vision.tokens_to_token import T2TPerformer, T2TTransformer, TokensToToken
from tokenry.vision.transnext import TransNeXt
from tokenry.vision.uniformer import UniFormer
from tokenry.vision.uniformer_light import UniFormerLight
from tokenry.vision.uniformer_video import UniFormerVideo, uniformer_video_b, uniformer_video_s
from tokenry.vision.uniformer_video_light import UniFormerVideoLight, uniformer_video_xs, uniformer_video_xxs
from tokenry.vision.video_sampling import dense_sample, multi_view, segment_sample
from tokenry.vision.vim2 import ViM2

__all__ = [
    "MSMLP",
    "AFFNet",
    "CASViT",
    "DLGSANet",
    "DualTokenViT",
    "EfficientViM",
    "FusedMBDown",
    "GCViT",
    "HRVMamba",
    "HeatmapHead",
    "MAFormer",
    "MetaFormer",
    "MetaFormerBlock",
    "SGFormer",
    "STViT",
    "STViTDeiT",
    "STViTR",
    "SegmentationHead",
    "T2TPerformer",
    "T2TTransformer",
    "T2TViT",
    "TokensToToken",
    "TransNeXt",
    "UniFormer",
    "UniFormerLight",
    "UniFormerVideo",
    "UniFormerVideoLight",
    "ViM2",
    "checkpoint_filter_fn",
    "convert_gcvit",
    "convert_in21k_head",
    "dense_sample",
    "draw_tokens",
    "load_checkpoint",
    "load_dlgsanet",
    "metaformer",
    "multi_view",
    "poolformer",
    "segment_sample",
    "token_maps",
    "uniformer_video_b",
    "uniformer_video_s",
    "uniformer_video_xs",
    "uniformer_video_xxs",
    "upscale_image",
]
