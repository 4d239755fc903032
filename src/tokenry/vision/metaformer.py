"""MetaFormer: the skeleton around any token mixer.

Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv:2111.11418, and "MetaFormer Baselines
for Vision", TPAMI 2024, arXiv:2210.13452. One block, on x (B, H, W, C):

    x = r1 * x + l1 * drop_path( mixer( norm1(x) ) )
    x = r2 * x + l2 * drop_path( mlp( norm2(x) ) )

r: learned residual scale, l: learned layer scale, one number per channel, either may be absent. Stages are joined by
strided convolutions. Maps are kept channels-last in memory, so that the linear maps, the norms and the pooling run on
adjacent numbers; a mixer of any layout gets a view in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenry.layers.norms import GroupNorm1
from tokenry.layers.star_relu import SquaredReLU, StarReLU
from tokenry.mixers.registry import MixerFactory, accepted_keywords, mixer_factory, size_keywords
from tokenry.vision.backbone import Backbone, build_backbone, classification_config
from tokenry.vision.metaformer_blocks import ChannelsLastStage, Embedding, Head, MetaFormerBlock

__all__ = ["MetaFormer", "image_config", "metaformer"]

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "squared_relu": SquaredReLU,
    "star_relu": StarReLU,
}
Scales = float | None | Sequence[float | None]


def _norm(kind: str | Callable[..., nn.Module], dim: int, eps: float, bias: bool, **where: Any) -> nn.Module:
    """A norm of (B, H, W, C) maps."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps, bias=bias, **where)
    if kind == "group1":
        return GroupNorm1(dim, eps=eps, bias=bias, **where)
    if isinstance(kind, str):
        raise ValueError(f"norm must be 'layer', 'group1' or a callable (dim), got {kind!r}")
    return kind(dim)


def _activation(kind: str | Callable[[], nn.Module], **where: Any) -> Callable[[], nn.Module]:
    if not isinstance(kind, str):
        return kind
    if kind not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)} or a callable, got {kind!r}")
    return partial(StarReLU, **where) if kind == "star_relu" else ACTIVATIONS[kind]


def _per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """One value per stage; a list must have as many entries as there are stages."""
    if isinstance(value, (list, tuple)):
        if len(value) != stages:
            raise ValueError(f"{name} has {len(value)} entries for {stages} stages; give one for all or one per stage")
        return list(value)
    return [value] * stages


class MetaFormer(Backbone):
    """A timm-style image model of MetaFormer stages; ``metaformer`` documents the arguments and makes one."""

    def __init__(
        self,
        token_mixers: str | MixerFactory | Sequence[str | MixerFactory] = "pool",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        *,
        mixer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        norm: str | Callable[[int], nn.Module] = "layer",
        norm_eps: float = 1e-6,
        norm_bias: bool = False,
        act: str | Callable[[], nn.Module] = "star_relu",
        mlp_ratio: float = 4.0,
        mlp_bias: bool = False,
        layer_scale: Scales = None,
        res_scale: Scales | Literal["baseline"] = "baseline",
        embed_norm: bool = True,
        embed_init: bool = True,
        stem: tuple[int, int, int] = (7, 4, 2),
        pos_embed: Sequence[int] = (),
        head: Literal["linear", "mlp"] = "linear",
        head_norm: Literal["before_pool", "after_pool"] = "after_pool",
        feature_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        stages = len(depths)
        if stages < 1 or len(dims) != stages or min(depths) < 1 or min(dims) < 1:
            raise ValueError(f"depths and dims need one positive entry per stage, got {list(depths)} and {list(dims)}")
        if head not in ("linear", "mlp") or head_norm not in ("before_pool", "after_pool"):
            raise ValueError(
                f"head must be 'linear' or 'mlp' and head_norm 'before_pool' or 'after_pool', got {head!r}, {head_norm!r}"
            )
        mixers = [mixer_factory(m) for m in _per_stage("token_mixers", token_mixers, stages)]
        own = _per_stage("mixer_kwargs", mixer_kwargs, stages)
        layer_scales = _per_stage("layer_scale", layer_scale, stages)
        if res_scale == "baseline":  # the last two stages, as published
            res_scale = [None] * max(0, stages - 2) + [1.0] * min(2, stages)
        res_scales = _per_stage("res_scale", res_scale, stages)
        make_norm = partial(_norm, norm, eps=norm_eps, bias=norm_bias, **where)

        def embedding_norm(dim: int) -> nn.Module | None:
            return nn.LayerNorm(dim, eps=norm_eps, bias=norm_bias, **where) if embed_norm else None

        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()

        self.stem = Embedding(in_chans, dims[0], stem, after=embedding_norm(dims[0]), init=embed_init, **where)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        height, width = self.stem.size(sides[0]), self.stem.size(sides[1])
        made = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                before = embedding_norm(dims[i - 1])
                downsample = Embedding(dims[i - 1], dim, (3, 2, 1), before=before, init=embed_init, **where)
                height, width = downsample.size(height), downsample.size(width)
            if min(height, width) < 1:
                raise ValueError(
                    f"img_size {sides} leaves nothing for stage {i}: the images must have at least "
                    f"{stem[1] * 2 ** (stages - 1)} pixels a side, or give fewer stages or a smaller stem"
                )
            blocks = []
            for j in range(depth):
                mixer = _make_mixer(mixers[i], dim, (height, width), proj_drop_rate, own[i] or {}, where)
                drop_path = rates[sum(depths[:i]) + j]
                blocks.append(
                    MetaFormerBlock(
                        dim, mixer, make_norm, _activation(act, **where), mlp_bias, mlp_ratio, proj_drop_rate,
                        drop_path, layer_scales[i], res_scales[i], **where,
                    )
                )  # fmt: skip
            position = nn.Parameter(torch.zeros(1, dim, height, width, **where)) if i in pos_embed else None
            made.append(ChannelsLastStage(downsample, blocks, position))
        self.describe_stages(dims, [stem[1] * 2**i for i in range(stages)])
        self.stages = nn.Sequential(*made)
        self.min_size = min(32, self.feature_info[-1]["reduction"])
        self.feature_norms = nn.ModuleList(make_norm(dim) for dim in dims) if feature_norms else None
        last = make_norm(dims[-1]) if head_norm == "before_pool" else nn.LayerNorm(dims[-1], eps=norm_eps, **where)
        self.head = Head(last, head_norm == "before_pool", dims[-1], num_classes, head, drop_rate, global_pool, **where)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: scales, position maps, StarReLU's numbers, frozen matrices."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or not parameter.requires_grad or name.endswith("pos_embed")
        }

    def feature_norm(self, x: Tensor, stage: int) -> Tensor:
        """The norms of ``feature_norms=True`` (PoolFormer's detection form)."""
        if self.feature_norms is None:
            raise ValueError("norm=True needs a model made with feature_norms=True")
        return self.feature_norms[stage](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norms and head that the wanted maps do not need, as in timm."""
        stages = len(self.stages)
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:
            self.feature_norms = None
        elif self.feature_norms is not None:
            self.feature_norms = self.feature_norms[: len(self.stages)]
        if prune_head or len(self.stages) < stages:
            self.head.norm = nn.Identity()
        return wanted


def _make_mixer(
    factory: MixerFactory,
    dim: int,
    grid: tuple[int, int],
    proj_drop: float,
    own: Mapping[str, Any],
    where: Mapping[str, Any],
) -> nn.Module:
    """Make a mixer, giving it of the common keywords those that it takes."""
    accepted = accepted_keywords(factory)
    given: dict[str, Any] = {"proj_drop": proj_drop, **where}
    if accepted is not None:
        given = {k: v for k, v in given.items() if k in accepted}
        unknown = sorted(set(own) - accepted)
        if unknown:
            name = getattr(factory, "__name__", repr(factory))
            raise ValueError(
                f"mixer_kwargs: {name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}"
            )
    return factory(dim, **{**given, **size_keywords(factory, grid), **own})


def image_config(**changes: Any) -> dict[str, Any]:
    """Timm's data configuration of these models: 224 pixels, bicubic, no crop, ImageNet's mean and deviation."""
    return classification_config(**{"crop_pct": 1.0, "license": "apache-2.0", **changes})


def metaformer(
    token_mixers: str | MixerFactory | Sequence[str | MixerFactory] = "pool",
    depths: Sequence[int] = (2, 2, 6, 2),
    dims: Sequence[int] = (64, 128, 320, 512),
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> MetaFormer:
    """A timm-style image model with token mixers of your choice.

    Args:
        token_mixers: For all stages or one per stage: a registered name (``tokenry.mixers.list_mixers()``), a class,
            or a callable ``(dim, **kw) -> nn.Module``. Mixers of any layout; those that declare none get (B, C, H, W).
        depths: Blocks per stage. Default: the S12 of the paper.
        dims: Channels per stage.
        num_classes: Classes; 0 leaves the classifier out.
        img_size: Side of the images, or (H, W): matters to mixers with a fixed number of tokens and to position maps.
        features_only: Return the maps of the stages instead of logits, as in timm.
        out_indices: Which of them. None: all.
        **options: Further arguments of ``MetaFormer``, keyword alone. ``in_chans`` (3); ``mixer_kwargs``: the mixers' own
            keywords, for all or one per stage; ``norm`` (``"layer"`` over C, ``"group1"`` over H, W, C, or a callable),
            ``norm_eps`` (1e-6), ``norm_bias`` (False); ``act`` (``"star_relu"``), ``mlp_ratio`` (4), ``mlp_bias`` (False);
            ``layer_scale`` and ``res_scale``: first value or None, for all or one per stage (``"baseline"``: residual
            scale 1 in the last two); ``embed_norm``: norms at the downsamplings; ``embed_init``: truncated normal of
            0.02 for them too; ``stem``: (kernel, stride, padding), default (7, 4, 2); ``pos_embed``: stages that begin
            with a learned position map; ``head`` (``"linear"``, ``"mlp"``), ``head_norm`` (``"after_pool"``,
            ``"before_pool"``); ``feature_norms``: a norm per stage for ``features_only``; ``drop_rate``,
            ``proj_drop_rate``, ``drop_path_rate``; ``global_pool``; ``device``, ``dtype``. Defaults are those of the
            "MetaFormer Baselines" paper.

    Raises:
        ValueError: An unknown mixer, a list that does not fit the stages, too small an image size.

    Example:
        >>> import torch
        >>> net = metaformer(["sep_conv", "attention"], depths=(1, 2), dims=(32, 64), num_classes=10, img_size=32,
        ...                  stem=(2, 2, 0))
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return build_metaformer(
        "metaformer",
        False,
        pretrained_cfg=image_config(),
        token_mixers=token_mixers,
        depths=depths,
        dims=dims,
        num_classes=num_classes,
        img_size=img_size,
        features_only=features_only,
        **({"out_indices": tuple(out_indices)} if out_indices is not None else {}),
        **options,
    )


def build_metaformer(variant: str, pretrained: bool, **kwargs: Any) -> MetaFormer:
    """Make a model through timm's builder, which adds data configuration, ``features_only`` and weights from a file."""
    from tokenry.vision.checkpoints import checkpoint_filter_fn

    return build_backbone(
        MetaFormer,
        variant,
        pretrained,
        checkpoint_filter_fn,
        stages=len(kwargs.get("depths", (0, 1, 2, 3))),
        normed_features=kwargs.get("feature_norms", False),
        **kwargs,
    )
