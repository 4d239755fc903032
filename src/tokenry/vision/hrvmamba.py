"""HRVMamba: a network that keeps a quarter of the image's resolution to the end, mixing tokens by selective scans.

Zhang et al., "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", 2024, arXiv:2410.03174.

A body after HRNet (``high_resolution``). Stage s has s branches, of strides 4, 8, 16, 32 and widths c, 2c, 4c, 8c; each branch
runs its blocks, then every branch receives the sum of all, resized to it.

The block (DVSS), on a map x (B, C, H, W), LN over channels:

    x = x + GELU( shuffle( DW_{3,5,7,9}( LN(x [+ DW3(x)]) ) ) )     four kernels, a quarter of the channels each
    x = x + DSS2D( LN(x) )                                          deformable convolution, scans in four directions
    [x = x + DW3(x)]                                                in brackets: the two smallest models only
    x = x + MLP( LN(x) )                                            1x1 convolutions, ratio 2, GELU

The first convolution of the smallest models reaches the branch alone, not the skip beside it (as the authors' code computes).

A classifier brings the four maps to 128, 256, 512 and 1024 channels by bottlenecks, adds them up downwards, and averages.

The reported numbers of parameters (12, 14, 20 and 61 million) are met exactly without the two linear maps inside the
deformable convolution that the package released by DCNv4's authors has, so that is the default; ``dcn_pointwise=True`` has them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, ConvMlp, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokenry.layers import ConvPosEnc, MultiScaleDWConv
from tokenry.mixers.dss2d import DSS2D
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.high_resolution import Neck, ParallelBlock, Transition, bottleneck, conv_act
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["DVSSBlock", "HRVMamba", "checkpoint_filter_fn", "default_cfgs"]

# Width c of the widest map, width of the first bottlenecks, whether the bracketed parts of the block are there, and the
# stochastic depth that the authors train with.
VARIANTS: dict[str, dict[str, Any]] = {
    "hrvmamba_nano": {"width": 8, "stem_width": 16, "light": True, "drop_path_rate": 0.1},
    "hrvmamba_tiny": {"width": 16, "stem_width": 32, "light": True, "drop_path_rate": 0.1},
    "hrvmamba_small": {"width": 32, "stem_width": 64, "light": False, "drop_path_rate": 0.2},
    "hrvmamba_base": {"width": 80, "stem_width": 64, "light": False, "drop_path_rate": 0.2},
}
MODULES = (1, 4, 2)  # of stages with two, three and four branches
BRANCHES = 4


class DVSSBlock(nn.Module):
    """Multi-kernel convolution, DSS2D and MLP, each with norm and skip: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Channels C, a multiple of 4.
        mlp_ratio: Hidden width of the MLP over C. Default 2.
        light: The form of the smallest models: two convolutions for positions, squeeze-and-excitation in the mixer.
        drop_path: Stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
        **mixer: Keywords of ``DSS2D``.

    Example:
        >>> DVSSBlock(16)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 2.0,
        light: bool = False,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos1 = ConvPosEnc(dim, **dd) if light else nn.Identity()
        self.norm1 = LayerNorm2d(dim, eps=1e-5, **dd)
        self.local = MultiScaleDWConv(dim, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-5, **dd)
        self.token_mixer = DSS2D(dim, squeeze_excite=light, **mixer, **dd)
        self.pos2 = ConvPosEnc(dim, **dd) if light else nn.Identity()
        self.norm3 = LayerNorm2d(dim, eps=1e-5, **dd)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), act_layer=nn.GELU, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.local(self.norm1(self.pos1(x))))
        x = x + self.drop_path(self.token_mixer(self.norm2(x)))
        x = self.pos2(x)
        return x + self.drop_path(self.mlp(self.norm3(x)))


class HRVMamba(Backbone):
    """HRVMamba classifier and source of four maps, of strides 4 to 32.

    Unlike other backbones its four maps (``features_only``, ``forward_intermediates``) are all made by the last stage, which mixes
    four resolutions side by side.

    Args:
        width: Channels c of the map of stride 4; the others have 2c, 4c, 8c. A multiple of 4.
        stem_width: Inner width of the two bottlenecks behind the stem.
        light: The block's form in the smallest models, see ``DVSSBlock``.
        modules: Modules (blocks in every branch, then an exchange) of the stages with two, three and four branches.
        blocks: Blocks per branch and module. Default 2.
        mlp_ratio: Hidden width of the MLPs over the channels. Default 2.
        d_state: States per channel of the scans. Default 1.
        dcn_pointwise: The deformable convolutions' linear maps. Default False, which gives the reported parameters.
        deformable: The deformable convolutions; without them depthwise 3x3 ones.
        neck_width: Inner width of the classifier's first bottleneck. Default 32, which gives 2048 features.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout on the mixers' output.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0; the registered models have the
            authors' 0.1 (nano, tiny) and 0.2.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; images whose sides are no multiples of 32.

    Example:
        >>> net = HRVMamba(width=8, stem_width=8, modules=(1, 1, 1), blocks=1, neck_width=4, num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
        >>> [tuple(x.shape[1:]) for x in net.forward_intermediates(torch.zeros(1, 3, 64, 96), intermediates_only=True)]
        [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    """

    size_multiple = 32

    def __init__(
        self,
        width: int = 32,
        stem_width: int = 64,
        light: bool = False,
        modules: Sequence[int] = MODULES,
        blocks: int = 2,
        mlp_ratio: float = 2.0,
        d_state: int = 1,
        dcn_pointwise: bool = False,
        deformable: bool = True,
        neck_width: int = 32,
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
        if width < 4 or width % 4:
            raise ValueError(f"width must be a multiple of 4 (four kernels share the channels), got {width}")
        if len(modules) != BRANCHES - 1 or min(*modules, blocks, stem_width, neck_width) < 1:
            raise ValueError(
                f"modules takes one entry of at least 1 for the stages of two, three and four branches, blocks, stem_width and "
                f"neck_width at least 1; got {tuple(modules)}, {blocks}, {stem_width}, {neck_width}"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def make(dim: int, drop_path: float) -> DVSSBlock:
            return DVSSBlock(
                dim, mlp_ratio, light, drop_path, d_state=d_state, dcn_pointwise=dcn_pointwise, deformable=deformable,
                proj_drop=proj_drop_rate, **dd,
            )  # fmt: skip

        self.stem = nn.Sequential(*conv_act(in_chans, 64, 3, 2, **dd), *conv_act(64, 64, 3, 2, **dd))
        first = 4 * stem_width
        stages = [Stage(nn.Identity(), [bottleneck(64, stem_width, **dd), bottleneck(first, stem_width, **dd)])]
        total = blocks * sum(modules)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        widths = [width << i for i in range(BRANCHES)]
        before = [first]
        for branches, count in enumerate(modules, start=2):
            after = widths[:branches]
            parallel = [ParallelBlock(after, [next(rates) for _ in range(blocks)], make, **dd) for _ in range(count)]
            stages.append(Stage(Transition(before, after, **dd), parallel))
            before = after
        self.stages = nn.Sequential(*stages)
        self.neck: nn.Module = Neck(widths, neck_width, **dd)
        features = 64 * neck_width
        self.head = ClassifierHead(features, num_classes, global_pool, drop_rate, **dd)
        self.describe_stages(widths, [4, 8, 16, 32])
        self.num_features = self.head_hidden_size = features
        linear = [layer for m in self.modules() if isinstance(m, ConvMlp) for layer in (m.fc1, m.fc2)]
        for layer in (*linear, self.head.fc):
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scans' rates and direct weights, which decay would pull towards one rate for all."""
        return {name for name, _ in self.named_parameters() if name.endswith((".A_logs", ".Ds"))}

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the four maps, (B, c, H/4, W/4) to (B, 8c, H/32, W/32)."""
        x = self.forward_stem(x)
        return self.stages(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 2048, H/32, W/32), what the classifier averages."""
        return self.neck(self.forward_maps(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of chosen branches of the last stage, as in timm.

        Args:
            x: (B, in_chans, H, W).
            indices: Branches, 0 the one of stride 4: the last n if an int, all if None.
            norm: Without effect; there is no closing norm.
            stop_early: Without effect; every map needs the whole body.
            output_fmt: ``"NCHW"`` alone.
            intermediates_only: Return the list alone, else ``(what the classifier averages, list)``.

        Raises:
            ValueError: Another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}; use .permute(0, 2, 3, 1) on the maps")
        wanted, _ = feature_take_indices(BRANCHES, indices)
        maps = self.forward_maps(x)
        found = [maps[i] for i in wanted]
        return found if intermediates_only else (self.neck(maps), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier and what leads to it, as in timm; the body stays whole, as every map needs it."""
        wanted, _ = feature_take_indices(BRANCHES, indices)
        if prune_head:
            self.neck = nn.Identity()
            self.reset_classifier(0, "")
        return wanted


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    return build_backbone(
        HRVMamba, variant, pretrained, checkpoint_filter_fn, stages=BRANCHES, **{**VARIANTS[variant], **kwargs}
    )


# The authors' names to these: every pattern is replaced in turn.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^conv1\.", "stem.0.conv."),
    (r"^bn1\.", "stem.0.norm."),
    (r"^conv2\.", "stem.2.conv."),
    (r"^bn2\.", "stem.2.norm."),
    (r"^layer1\.", "stages.0.blocks."),
    (r"^transition(\d)\.(\d)\.(?:0\.)?0\.(?=weight)", r"stages.\1.downsample.convs.\2.0.conv."),
    (r"^transition(\d)\.(\d)\.(?:0\.)?1\.", r"stages.\1.downsample.convs.\2.0.norm."),
    (r"^stage2\.", "stages.1.blocks."),
    (r"^stage3\.", "stages.2.blocks."),
    (r"^stage4\.", "stages.3.blocks."),
    (r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.0\.", r".fuse.\1.\2.\3.0.conv."),
    (r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.1\.", r".fuse.\1.\2.\3.0.norm."),
    (r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.2\.", r".fuse.\1.\2.\3.1.conv."),
    (r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.3\.", r".fuse.\1.\2.\3.1.norm."),
    (r"\.fuse_layers\.(\d)\.(\d)\.0\.", r".fuse.\1.\2.conv."),
    (r"\.fuse_layers\.(\d)\.(\d)\.1\.", r".fuse.\1.\2.norm."),
    (r"^neck\.increase_layers\.(\d)\.0\.", r"neck.increase.\1."),
    (r"^neck\.downsample_layers\.(\d)\.conv\.", r"neck.down.\1.0.conv."),
    (r"^neck\.downsample_layers\.(\d)\.bn\.", r"neck.down.\1.0.norm."),
    (r"^neck\.final_layer\.conv\.", "neck.final.0.conv."),
    (r"^neck\.final_layer\.bn\.", "neck.final.0.norm."),
    (r"\.downsample\.0\.", ".downsample.conv."),
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"^head\.(?!fc\.)", "head.fc."),
)
# Inside a block: the first that fits.
BLOCK_RENAMES: dict[str, str] = {
    "cpe1.": "pos1.proj.",
    "cpe2.": "pos2.proj.",
    "conv2d.": "local.convs.",
    "norm0.": "norm1.",
    "norm2.": "norm3.",
    "norm.": "norm2.",
    "op.conv2d.": "token_mixer.conv.",
    "op.se.fc.0.": "token_mixer.se.fc1.",
    "op.se.fc.2.": "token_mixer.se.fc2.",
    "op.": "token_mixer.",
}


def rename_block(name: str) -> str:
    """The name of a block's tensor here, from the authors'."""
    old = next((old for old in BLOCK_RENAMES if name.startswith(old)), "")
    return BLOCK_RENAMES.get(old, "") + name.removeprefix(old)


def rename(name: str) -> str:
    """The name of a model's tensor here, from the authors'."""
    inside = re.match(r"^(stage\d\.\d+\.branches\.\d\.\d+\.)(.*)$", name)
    if inside:
        name = inside[1] + rename_block(inside[2])
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn the authors' state dict, or one of this class, into one of this class.

    Raises:
        ValueError: It belongs to another variant, or to the form with (without) the deformable convolutions' linear maps while
            the model is without (with) them.
    """
    state_dict = {name.removeprefix("backbone."): value for name, value in unwrap(state_dict).items()}
    own = model.state_dict()
    if "stem.0.conv.weight" not in state_dict:
        state_dict = {rename(name): value for name, value in state_dict.items()}
        for name, value in state_dict.items():  # linear maps that are 1x1 convolutions here
            if name in own and value.ndim == 2 and own[name].ndim == 4:
                state_dict[name] = value[:, :, None, None]
    theirs, ours = (any(".conv.value_proj." in name for name in names) for names in (state_dict, own))
    if theirs != ours:
        raise ValueError(
            f"the checkpoint's deformable convolutions have {'two' if theirs else 'no'} linear maps of their own, the model's "
            f"{'two' if ours else 'none'}; make the model with dcn_pointwise={theirs}"
        )
    state_dict = without_head(state_dict, model)
    pointwise = {"dcn_pointwise": ours}
    check_shapes(state_dict, model, {name: {**variant, **pointwise} for name, variant in VARIANTS.items()})
    return state_dict


def _config(**changes: Any) -> dict[str, Any]:
    return classification_config(
        first_conv="stem.0.conv", origin_url="https://github.com/zhanghao5201/HRVMamba", **changes
    )


_LARGE = {"input_size": (3, 256, 256), "pool_size": (8, 8)}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _config(**({} if name == "hrvmamba_base" else _LARGE)) for name in VARIANTS}
)
register_table(__name__, VARIANTS, _create)
