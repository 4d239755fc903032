"""CAS-ViT: light backbones of convolutional additive token mixers.

Zhang et al., "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile Applications",
2024, arXiv:2408.03703.

    x = x + local(x)                          local: conv 1x1, BN, dwconv 3x3, GELU, conv 1x1    x: (B, C, H, W)
    x = x + drop_path( CAT( BN(x) ) )         the mixer: ``tokenry.mixers.CATMixer``
    x = x + drop_path( mlp( BN(x) ) )         conv 1x1 to 4C, GELU, conv 1x1
    net   two conv 3x3 s2 with BN and ReLU | four stages, conv 3x3 s2 and BN between them | BN, mean, two linear heads

The second head is for distillation. As in timm's DeiT, the logits are the mean of both heads; only after
``set_distilled_training(True)``, and only in training mode, is the result the tuple (head, distillation head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, ConvMlp, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.conv_norm import ConvNorm, fuse_norm_conv
from tokenry.mixers.cat import CATMixer
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["CASViT", "checkpoint_filter_fn"]

VARIANTS: dict[str, dict[str, Any]] = {
    "cas_vit_xs": {"depths": (2, 2, 4, 2), "dims": (48, 56, 112, 220)},
    "cas_vit_s": {"depths": (3, 3, 6, 3), "dims": (48, 64, 128, 256)},
    "cas_vit_m": {"depths": (3, 3, 6, 3), "dims": (64, 96, 192, 384)},
    "cas_vit_t": {"depths": (3, 3, 6, 3), "dims": (96, 128, 256, 512)},
}
AUTHORS_NAMES = {name.replace("cas_vit", "rcvit"): name for name in VARIANTS}


class Block(nn.Module):
    """Local features, the mixer and the MLP, each added to its input.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width of the MLP over C.
        qkv_bias: Whether the mixer's map to q, k, v has a bias.
        proj_drop: Dropout on the mixer's output and inside the MLP.
        drop_path: Stochastic depth of the mixer and the MLP.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.local = nn.Sequential(
            ConvNorm(dim, dim, **dd),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.norm1: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.token_mixer = CATMixer(dim, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.norm2: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), act_layer=nn.GELU, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.local(x)
        x = x + self.drop_path(self.token_mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fuse(self) -> Block:
        """Merge the norms before the mixer and the MLP into their first convolutions, in place."""
        if isinstance(self.norm1, nn.BatchNorm2d) and isinstance(self.norm2, nn.BatchNorm2d):
            self.token_mixer.qkv = fuse_norm_conv(self.norm1, self.token_mixer.qkv)
            self.mlp.fc1 = fuse_norm_conv(self.norm2, self.mlp.fc1)
            self.norm1, self.norm2 = nn.Identity(), nn.Identity()
        return self


class DistilledHead(ClassifierHead):
    """Mean over positions and two classifiers, of which one learns from a teacher; their mean is the result.

    Args:
        in_features: Channels C.
        num_classes: Classes; 0 leaves both classifiers out.
        pool_type: As in timm.
        drop_rate: Dropout before the classifiers.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, pool_type, drop_rate, device=device, dtype=dtype)
        self.fc_dist = self._second(num_classes)
        self.distilled_training = False

    def _second(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        like = self.fc.weight
        return nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype).train(self.training)

    def reset(self, num_classes: int, pool_type: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Two new classifiers."""
        super().reset(num_classes, pool_type, *args, **kwargs)
        self.fc_dist = self._second(num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:
        """(B, C, H, W) -> (B, num_classes), or two of them in distilled training."""
        x = super().forward(x, pre_logits=True)
        if pre_logits or isinstance(self.fc, nn.Identity):
            return x
        logits = self.fc(x), self.fc_dist(x)
        return logits if self.distilled_training and self.training else (logits[0] + logits[1]) / 2


class CASViT(Backbone):
    """CAS-ViT image classifier and feature extractor.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        mlp_ratio: Hidden width of the MLPs over the channels. Default 4.
        qkv_bias: Whether the mixers' maps to q, k, v have a bias. Default False.
        distilled: Whether there is a second head for distillation. Default True (authors).
        feature_norms: A batch norm on the map of each stage, as the authors' detection form has it; for
            ``features_only``.
        num_classes: Classes; 0 leaves the classifiers out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifiers, as in timm.
        drop_rate: Dropout before the classifiers.
        proj_drop_rate: Dropout on the mixers' output and inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0; the authors train with 0.1.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; images of another shape; in training, a single image so small that
            the last map has one position (batch norm has nothing to train on).

    Example:
        >>> net = CASViT(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
        >>> [tuple(f.shape[1:]) for f in net.forward_intermediates(torch.zeros(1, 3, 64, 64))[1]][-2:]
        [(16, 4, 4), (16, 2, 2)]
    """

    channels_last = True

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["cas_vit_xs"]["depths"],
        dims: Sequence[int] = VARIANTS["cas_vit_xs"]["dims"],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        distilled: bool = True,
        feature_norms: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if not depths or len(depths) != len(dims) or min(depths) < 1 or min(dims) < 1:
            raise ValueError(
                f"depths and dims take one positive entry per stage, got {tuple(depths)} and {tuple(dims)}; for example "
                "depths=(2, 2, 4, 2), dims=(48, 56, 112, 220)"
            )
        if dims[0] < 2:
            raise ValueError(f"the first stage needs at least 2 channels (the stem halves them), got {dims[0]}")
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}; the authors' is 4")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Sequential(
            ConvNorm(in_chans, dims[0] // 2, 3, stride=2, **dd),
            nn.ReLU(),
            ConvNorm(dims[0] // 2, dims[0], 3, stride=2, **dd),
            nn.ReLU(),
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            downsample = nn.Identity() if i == 0 else ConvNorm(dims[i - 1], dim, 3, stride=2, **dd)
            blocks = [Block(dim, mlp_ratio, qkv_bias, proj_drop_rate, rate, **dd) for rate in rates[i]]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, [4 * 2**i for i in range(len(dims))])
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.feature_norms = nn.ModuleList(nn.BatchNorm2d(dim, **dd) for dim in dims) if feature_norms else None
        head = DistilledHead if distilled else ClassifierHead
        self.head = head(dims[-1], num_classes, global_pool, drop_rate, **dd)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def check_images(self, x: Tensor) -> None:
        """Refuse images that do not fit, and a single training image whose last map is one position."""
        super().check_images(x)
        stride = self.feature_info[len(self.stages) - 1]["reduction"]
        if x.shape[0] == 1 and max(x.shape[-2:]) <= stride:
            closing = [*self.stages[-1].modules(), self.norm]
            if any(isinstance(module, nn.BatchNorm2d) and module.training for module in closing):
                raise ValueError(
                    f"a single training image of {x.shape[-2]}x{x.shape[-1]} pixels leaves one value per channel in the last "
                    f"stage, of which batch norm has no variance: train with two images or more, with more than {stride} "
                    "pixels a side, or with the norms in evaluation mode"
                )

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return (head, distillation head) in training mode instead of the mean of both, as in timm's DeiT.

        Raises:
            ValueError: The model was made without the second head.
        """
        if not isinstance(self.head, DistilledHead):
            raise ValueError("the model has one head; make it with distilled=True to train with a teacher")
        self.head.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer, or with two heads a list of both."""
        head = self.head
        return nn.ModuleList([head.fc, head.fc_dist]) if isinstance(head, DistilledHead) else super().get_classifier()

    def feature_norm(self, x: Tensor, stage: int) -> Tensor:
        """The norms of ``feature_norms=True``, or the closing norm on the last map."""
        return super().feature_norm(x, stage) if self.feature_norms is None else self.feature_norms[stage](x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norms and head that the wanted maps do not need, as in timm."""
        norms = None if prune_norm else self.feature_norms
        wanted = super().prune_intermediate_layers(
            indices, prune_norm or (norms is not None and prune_head), prune_head
        )
        self.feature_norms = None if norms is None else norms[: len(self.stages)]
        return wanted

    def fuse(self) -> CASViT:
        """Merge every batch norm next to a convolution into it, in place, for inference.

        The result computes the same with fewer passes over the maps; it cannot be trained further and its state dict
        has other names. Call it in evaluation mode, after loading weights.

        Raises:
            ValueError: The model is in training mode.
        """
        for module in self.modules():
            if isinstance(module, ConvNorm | Block):
                module.fuse()
        return self


# Parts of the authors' names, and ours.
RENAMES = {
    r"^patch_embed\.0\.": "stem.0.conv.",
    r"^patch_embed\.1\.": "stem.0.norm.",
    r"^patch_embed\.3\.": "stem.2.conv.",
    r"^patch_embed\.4\.": "stem.2.norm.",
    r"^head\.(?=weight|bias)": "head.fc.",
    r"^dist_head\.": "head.fc_dist.",
    r"local_perception\.network\.0\.": "local.0.conv.",
    r"local_perception\.network\.1\.": "local.0.norm.",
    r"local_perception\.network\.2\.": "local.1.",
    r"local_perception\.network\.4\.": "local.3.",
    r"\battn\.": "token_mixer.",
    r"\boper_([qk])\.0\.block\.0\.": r"gate_\1.spatial.depthwise.conv.",
    r"\boper_([qk])\.0\.block\.1\.": r"gate_\1.spatial.depthwise.norm.",
    r"\boper_([qk])\.0\.block\.3\.": r"gate_\1.spatial.gate.",
    r"\boper_([qk])\.1\.block\.1\.": r"gate_\1.channel.gate.",
}


def rename(name: str) -> str:
    """Our name of a tensor of the authors' state dict; our own names stay as they are."""
    for theirs, ours in RENAMES.items():
        name = re.sub(theirs, ours, name)
    name = re.sub(r"^network\.(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}.", name)
    name = re.sub(r"^network\.(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.conv.", name)
    name = re.sub(r"^network\.(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.norm.", name)
    return re.sub(r"^norm(\d+)\.", lambda m: f"feature_norms.{int(m[1]) // 2}.", name)


def _check_heads(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    given, wanted = ({name for name in names if name.startswith("head.fc_dist.")} for names in (state, own))
    if given - wanted:
        raise ValueError(
            "the checkpoint has a second head for distillation and the model has none: make the model with "
            f"distilled=True, or leave out {', '.join(sorted(given))} (in the authors' files dist_head.*)"
        )
    if wanted - given:
        raise ValueError("the checkpoint has one head and the model two: make the model with distilled=False")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or a plain state dict of ours) into a state dict of ``model``.

    A file that holds averaged weights beside the last ones gives the averaged ones, as in timm. A model with
    ``feature_norms`` takes a classifier's checkpoint too and keeps its own, new stage norms.

    Raises:
        ValueError: The checkpoint has another number of heads, or is another variant's.
    """
    state = without_head({rename(name): value for name, value in unwrap(state_dict).items()}, model)
    own = model.state_dict()
    if model.num_classes:
        _check_heads(state, own)
    if model.feature_norms is not None:
        new = {name: value for name, value in own.items() if name.startswith("feature_norms.")}
        state = new | {name: value for name, value in state.items() if name in own or not name.startswith("norm.")}
    heads = {"distilled": isinstance(model.head, DistilledHead)}
    check_shapes(state, model, {name: variant | heads for name, variant in VARIANTS.items()})
    return state


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(
            first_conv="stem.0.conv",
            classifier=("head.fc", "head.fc_dist"),
            license="mit",
            origin_url="https://github.com/Tianfang-Zhang/CAS-ViT",
        )
        for name in (*VARIANTS, *AUTHORS_NAMES)
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> CASViT:
    arguments = {**VARIANTS[AUTHORS_NAMES.get(name, name)], **kwargs}
    return build_backbone(
        CASViT,
        name,
        pretrained,
        checkpoint_filter_fn,
        stages=len(arguments["depths"]),
        normed_features=arguments.get("feature_norms", False),
        **arguments,
    )


register_table(__name__, (*VARIANTS, *AUTHORS_NAMES), _create)
