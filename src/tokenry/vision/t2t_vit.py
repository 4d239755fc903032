"""T2T-ViT: a deep and narrow vision transformer on tokens-to-token tokens.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021, arXiv:2101.11986.

    x = cat(class, tokens(image)) + P                        (B, 1 + HW/256, D), tokens: ``TokensToToken``
    x = x + attention(norm(x));  x = x + mlp(norm(x))        L times; no bias in q, k, v; hidden width 2 D or 3 D
    logits = norm(x)[:, 0] W + b

P is fixed: P[p, j] = sin or cos (j even or odd) of p / 10000^(2 (j // 2) / D), the class token being position 0. Its table
is a frozen parameter, saved in checkpoints. For images of another size the table is resized (the class row kept, the rest
bicubic), not computed anew, as in the authors' code.

After the tokenizer it is timm's ``VisionTransformer``, with all that this class offers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from tokenry.layers.head_count import head_count
from tokenry.vision.backbone import classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head
from tokenry.vision.tokens_to_token import SPLITS, TokensToToken

__all__ = ["T2TViT", "checkpoint_filter_fn", "sinusoid_table"]


def _variant(dim: int, depth: int, heads: int, mlp_ratio: float, kind: str = "performer") -> dict[str, Any]:
    return {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": mlp_ratio, "kind": kind}


VARIANTS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": _variant(256, 7, 4, 2.0),
    "t2t_vit_10": _variant(256, 10, 4, 2.0),
    "t2t_vit_12": _variant(256, 12, 4, 2.0),
    "t2t_vit_14": _variant(384, 14, 6, 3.0),
    "t2t_vit_19": _variant(448, 19, 7, 3.0),
    "t2t_vit_24": _variant(512, 24, 8, 3.0),
    "t2t_vit_t_14": _variant(384, 14, 6, 3.0, "transformer"),
    "t2t_vit_t_19": _variant(448, 19, 7, 3.0, "transformer"),
    "t2t_vit_t_24": _variant(512, 24, 8, 3.0, "transformer"),
    "t2t_vit_14_resnext": _variant(384, 14, 32, 3.0),
    "t2t_vit_14_wide": _variant(768, 4, 12, 3.0),
}


def sinusoid_table(positions: int, dim: int) -> Tensor:
    """The fixed position table (1, positions, dim).

    Example:
        >>> [round(x, 4) for x in sinusoid_table(2, 4)[0, 1].tolist()]
        [0.8415, 0.5403, 0.01, 0.9999]
    """
    columns = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / dim)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float()[None]


def _resized(table: Tensor, new: Sequence[int], old: Sequence[int] | None = None) -> Tensor:
    """A position table for another grid; ``old=None``: a square one."""
    return resample_abs_pos_embed(table, list(new), None if old is None else list(old), antialias=False)


class QueryScale(nn.Module):
    """Queries times a number: another scale in timm's fused attention."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, q: Tensor) -> Tensor:
        """Any shape."""
        return q * self.factor


class T2TViT(VisionTransformer):
    """T2T-ViT image classifier and feature extractor.

    Args:
        img_size: Side or (H, W) of the images, multiples of 16. Default 224.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        embed_dim: Width D.
        depth: Blocks L.
        num_heads: Heads; must divide D.
        mlp_ratio: Hidden width of the blocks' MLPs over D.
        kind: Attention of the tokenizer: ``"performer"`` or ``"transformer"``.
        token_dim: Width inside the tokenizer. Default 64.
        splits: Kernels and strides of the tokenizer.
        token_drop_rate: Dropout inside the tokenizer. None: the authors', 0.1 for performers whatever the other rates.
        qk_scale: Scale of the blocks' attention. None (default): head width^-1/2, with which the released checkpoints were
            evaluated; the authors' functions set D^-1/2 when called with ``pretrained=True``, a leftover of older weights.
        **kwargs: Further arguments of timm's ``VisionTransformer``: ``global_pool``, ``drop_rate``, ``pos_drop_rate``,
            ``proj_drop_rate``, ``attn_drop_rate``, ``drop_path_rate``, ``dynamic_img_size``, ``device``, ``dtype`` ...

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``; sizes that are no multiples of 16; images of another size.

    Example:
        >>> net = T2TViT(64, num_classes=10, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, token_dim=8).eval()
        >>> net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    patch_embed: TokensToToken
    pos_embed: nn.Parameter  # type: ignore[bad-override-mutable-attribute]
    cls_token: nn.Parameter  # type: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        kind: str = "performer",
        token_dim: int = 64,
        splits: Sequence[tuple[int, int]] = SPLITS,
        token_drop_rate: float | None = None,
        qk_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        head_count(embed_dim, num_heads)
        if depth < 1 or num_classes < 0:
            raise ValueError(f"depth must be at least 1 and num_classes at least 0, got {depth} and {num_classes}")
        super().__init__(
            img_size=img_size,
            patch_size=math.prod(stride for _, stride in splits),
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            embed_layer=partial(TokensToToken, kind=kind, token_dim=token_dim, splits=splits, drop=token_drop_rate),
            **kwargs,
        )
        self.pos_embed.requires_grad_(False)
        if qk_scale is not None:
            for attention in (module for module in self.modules() if isinstance(module, Attention)):
                attention.q_norm = QueryScale(qk_scale / attention.scale)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Linear maps and the class token normal with deviation 0.02, and the fixed positions."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid_table(*self.pos_embed.shape[1:]))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token and what is fixed: positions and random features."""
        fixed = {name for name, _ in self.named_parameters() if name.endswith("mixer.w")}
        return super().no_weight_decay() | fixed

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Another size of the images: the position table is resized as when loading."""
        table, before = self.pos_embed.detach(), self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        after = self.patch_embed.grid_size
        if after is not None and after != before:
            self.pos_embed.data.copy_(_resized(table, after, before))

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.training and self.pos_embed.requires_grad:
            warnings.warn(
                "the position table of T2T-ViT is being trained, probably after requires_grad_(True) on the whole model; it "
                "is meant to stay fixed: model.pos_embed.requires_grad_(False)",
                stacklevel=2,
            )
        table: Tensor = self.pos_embed
        if self.dynamic_img_size:
            table = _resized(table, x.shape[1:3], self.patch_embed.grid_size)
            x = x.flatten(1, 2)
        return self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + table)


# The authors' names of the tokenizer's parts and ours.
RENAMES = (
    (r"^tokens_to_token\.project\.", "patch_embed.proj."),
    (r"^tokens_to_token\.attention1\.", "patch_embed.transformers.0."),
    (r"^tokens_to_token\.attention2\.", "patch_embed.transformers.1."),
    (r"^(patch_embed\.transformers\.\d+)\.attn\.", r"\1."),
    (r"^(patch_embed\.transformers\.\d+)\.(kqv\.|w$)", r"\1.mixer.\2"),
    (r"^(patch_embed\.transformers\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(patch_embed\.transformers\.\d+)\.mlp\.2\.", r"\1.mlp.fc2."),
)
PERFORMER_RENAMES = ((r"^(patch_embed\.transformers\.\d+)\.proj\.", r"\1.mixer.proj."),)


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names in a state dict changed to ours; ours stay."""
    performer = any(name.startswith(("tokens_to_token", "patch_embed")) and name.endswith(".w") for name in state_dict)
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in (*RENAMES, *(PERFORMER_RENAMES if performer else ())):
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: T2TViT) -> dict[str, Tensor]:
    """The authors' checkpoint under our names, its positions resized to the model's images.

    Args:
        state_dict: The authors' or one of ours, with or without what a training script saved around it.
        model: The model that is to take it.

    Raises:
        ValueError: It is another model's, or its positions lie on no square grid and the model has another.
    """
    renamed = without_head(rename(unwrap(state_dict)), model)
    tokens = model.patch_embed
    table = renamed.get("pos_embed", model.pos_embed)
    if tokens.grid_size is not None and table.shape[1] != model.pos_embed.shape[1]:
        if math.isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
            raise ValueError(
                f"the checkpoint has positions for {table.shape[1] - 1} tokens, which lie on no square grid, and the model "
                f"has {tokens.num_patches}; make the model with the checkpoint's img_size, load it, then call set_input_size"
            )
        renamed["pos_embed"] = _resized(table, tokens.grid_size)
    check_shapes(renamed, model, {name: {**own, "img_size": tokens.img_size} for name, own in VARIANTS.items()})
    return renamed


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(
            pool_size=None,
            first_conv=None,  # the first map is inside a transformer: weights for other channels cannot be made of it
            classifier="head",
            fixed_input_size=True,
            license="bsd-3-clause-clear",
            origin_url="https://github.com/yitu-opensource/T2T-ViT",
        )
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        T2TViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**VARIANTS[variant], **kwargs},
    )


register_table(__name__, VARIANTS, _create)
