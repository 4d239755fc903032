"""Make the pictures of docs/drawing.md and of the methods' pages: photographs, and below them what networks do with their tokens.

    TOKENRY_DATA=data python scripts/draw_token_pictures.py docs/images [NAME ...]

Super tokens and influence are drawn with untrained networks over a photograph that scikit-learn ships. The other maps mean
nothing before a network has learned something: they are drawn with small networks trained as those of the claims are, on
CIFAR-10 (the shipped sample of it without TOKENRY_DATA), over photographs of its test part. Their weights are kept in
build/token-pictures, so that only the first run trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_sample_image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.assets import cifar10_sample, external
from tokenry.vision import DualTokenViT, TokensToToken, UniFormerLight, ViM2, draw_tokens, metaformer
from tokenry.vision.image_training import Images, Training, train_classifier
from tokenry.vision.labelled_images import read_labelled_images
from tokenry.vision.uniformer_blocks import PatchEmbed

WEIGHTS = Path("build/token-pictures")
GAP = 4
SIDE, COLUMNS = 132, 5  # of the sheets over photographs of CIFAR-10
LARGE = 200  # of the sheets over one photograph
TRAINING = Training(epochs=6, batch=64)
PHOTOGRAPHS = (0, 1, 2, 3, 4)  # of the shipped test sample
SMALL: dict[str, Any] = {"num_classes": 10, "img_size": 32}
