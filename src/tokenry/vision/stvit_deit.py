"""STViT for plain transformers: after a few layers a handful of semantic tokens replaces all patches.

Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View", CVPR 2023, arXiv:2303.08685.

    x  = patches W + P                                     (B, N, D), no class token
    x  = layer(x)                                          4 layers of DeiT on all N patches
    s  = c + Attn( LN(c) ; LN([c, x]) ), MLP               c: the patches' maxima in sqrt(M) x sqrt(M) cells   (B, M, D)
    s  = s + G + Attn( LN(s + G) ; LN([s, x]) ), MLP       G: M learned global centres
    s  = layer(s)                                          6 layers on the M tokens
    logits = mean(LN(s)) W + b

The authors did not release this form. Where the layers split is derived: 4 + 2 + 6 is what takes the paper's "nearly 60 %" of
DeiT's multiply-accumulates away at M = 16 (DeiT-S: 1.9 of 4.6 billion). Pooling by maxima, the norm shared by queries and
keys, and skips around both attentions are those of the authors' networks on windows, with ``shortcut`` on; there are no layer
scales. So a checkpoint of the authors cannot be expected to fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokenry.layers.head_count import head_count
from tokenry.mixers.semantic_token import RecoverBlock, SemanticTokens
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["STViTDeiT", "TokenStage", "checkpoint_filter_fn"]

VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "stvit_deit_small": {"embed_dim": 384, "num_heads": 6},
    "stvit_deit_base": {"embed_dim": 768, "num_heads": 12},
}


class PatchStem(nn.Module):
    """Patches and their learned positions: (B, in_chans, H, W) -> (B, D, h, w)."""

    def __init__(
        self,
        dim: int,
        in_chans: int,
        patch_size: int,
        grid: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *grid, device=device, dtype=dtype))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, D, h, w)."""
        return self.proj(x) + self.pos_embed


class TokenStage(Stage):
    """Blocks on tokens (B, N, D) between maps: (B, D, h, w) -> (B, D, h', w'), of h x w tokens or what the downsampling leaves."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h', w')."""
        x = self.downsample(x)
        tokens = x.flatten(2).transpose(1, 2).contiguous()  # strided, every layer would be slower
        return self.run_blocks(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class GenerationStage(Stage):
    """The two layers that make semantic tokens: (B, D, h, w) -> (B, D, sqrt(M), sqrt(M)).

    Args:
        downsample: Makes tokens of the map.
        block: Lets them, moved by the global centres, look at themselves and the map.
        num_tokens: M.
        dim: Width D.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        downsample: SemanticTokens,
        block: RecoverBlock,
        num_tokens: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(downsample, [block])
        self.global_tokens = nn.Parameter(torch.zeros(1, num_tokens, dim, device=device, dtype=dtype))
        trunc_normal_(self.global_tokens, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, sqrt(M), sqrt(M))."""
        s = self.downsample(x)
        side = math.isqrt(s.shape[1])
        context = torch.cat([s, x.flatten(2).transpose(1, 2)], dim=1)
        return self.blocks[0](s + self.global_tokens, context).transpose(1, 2).unflatten(2, (side, side))


class STViTDeiT(Backbone):
    """Plain vision transformer with semantic tokens: image classifier and feature extractor.

    Args:
        img_size: Side or (H, W) of the images, multiples of ``patch_size``. Default 224.
        patch_size: Side of a patch. Default 16.
        embed_dim: Width D.
        num_heads: Heads; must divide D.
        depth: Layers, the two that make semantic tokens included. Default 12.
        full_depth: How many of them see all patches, before these two. Default 4.
        num_semantic_tokens: M, a square. Default 16.
        mlp_ratio: Hidden width of the MLPs over D. Default 4.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout after the attentions and in the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: M is no square, or has more tokens along a side than the patches; layers that do not add up; images of
            another size.

    Example:
        >>> net = STViTDeiT(64, 8, 24, 2, depth=5, full_depth=1, num_semantic_tokens=4, num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 64)).shape, net.forward_features(torch.zeros(1, 3, 64, 64)).shape
        (torch.Size([1, 10]), torch.Size([1, 24, 2, 2]))
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = VARIANTS["stvit_deit_small"]["embed_dim"],
        num_heads: int = VARIANTS["stvit_deit_small"]["num_heads"],
        depth: int = 12,
        full_depth: int = 4,
        num_semantic_tokens: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        super().__init__(num_classes, in_chans, sides)
        if patch_size < 1 or any(side < patch_size or side % patch_size for side in sides):
            raise ValueError(
                f"the images' sides must be multiples of patch_size={patch_size}, got img_size {sides[0]}x{sides[1]}"
            )
        self.min_size = min(sides)
        head_count(embed_dim, num_heads)
        if full_depth < 1 or depth < full_depth + 3:
            raise ValueError(
                "at least one layer sees all patches, two make semantic tokens and one works on these: depth must be at "
                f"least full_depth + 3, got depth={depth} and full_depth={full_depth}; DeiT takes 12 and 4"
            )
        grid = (sides[0] // patch_size, sides[1] // patch_size)
        root = math.isqrt(max(num_semantic_tokens, 0))
        if root < 1 or root**2 != num_semantic_tokens or root > min(grid):
            raise ValueError(
                "num_semantic_tokens must be a square of at most the shorter side of the patches, "
                f"{min(grid)}^2 = {min(grid) ** 2}, got {num_semantic_tokens}; take {min(max(root, 1), min(grid)) ** 2}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops: dict[str, Any] = {"mlp_ratio": mlp_ratio, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def layers(first: int, stop: int) -> list[nn.Module]:
            return [
                Block(embed_dim, num_heads, qkv_bias=True, drop_path=rate, **drops, **dd) for rate in rates[first:stop]
            ]

        self.stem = PatchStem(embed_dim, in_chans, patch_size, grid, **dd)
        generate = SemanticTokens(
            embed_dim, num_heads, window=max(grid), samples=root, margin=0, shortcut=True, layer_scale=None,
            drop_path=rates[full_depth], **drops, **dd,
        )  # fmt: skip
        block = RecoverBlock(embed_dim, num_heads, layer_scale=None, drop_path=rates[full_depth + 1], **drops, **dd)
        self.stages = nn.Sequential(
            TokenStage(nn.Identity(), layers(0, full_depth)),
            GenerationStage(generate, block, num_semantic_tokens, embed_dim, **dd),
            TokenStage(nn.Identity(), layers(full_depth + 2, depth)),
        )
        self.describe_stages([embed_dim] * 3, [patch_size, sides[0] // root, sides[0] // root])
        self.norm = LayerNorm2d(embed_dim, eps=1e-6, **dd)
        self.head = ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions and global centres."""
        return {"stem.pos_embed", "stages.1.global_tokens"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of this library, unwrapped and checked; the authors released none of this form.

    Raises:
        ValueError: The checkpoint is another variant's.
    """
    out = without_head(unwrap(state_dict), model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            pool_size=(4, 4), first_conv="stem.proj", fixed_input_size=True, paper_ids="arXiv:2303.08685"
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    return build_backbone(STViTDeiT, name, pretrained, checkpoint_filter_fn, stages=3, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
