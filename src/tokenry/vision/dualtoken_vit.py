"""DualToken-ViT: a light backbone of two streams, image tokens and position-aware global tokens.

Chu et al., "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", SDM 2024,
arXiv:2309.12424. Stem, patch merging and the gated MLP are those of LightViT (Huang et al., 2022, arXiv:2207.05557).
One block, on a map X and 7 x 7 global tokens G that are carried through all stages:

    X, G = dual_token(X, G)                            ``tokenry.mixers.DualTokenMixer``
    X    = X + BiDimMLP( LayerNorm(X) )                an MLP whose output is gated per channel and per position

Three stages at strides 8, 16 and 32. Between them 2x2 neighbours are merged, W_red LN(concat) + W_res maxpool, and the
global tokens are widened, W_p LN(G); their number stays.

The authors' code is not public and their widths and depths are not in the text at hand: those of ``VARIANTS`` are this
library's, set so that the multiply-accumulates are near the paper's 0.5 and 1.0 billion. Published names of LightViT's stem
load, see ``checkpoint_filter_fn``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.bidim_attention import BiDimMLP
from tokenry.mixers.dual_token import DualTokenMixer
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["ConvStem", "DualTokenBlock", "DualTokenViT", "PatchMerging", "checkpoint_filter_fn"]

SMALL: dict[str, Any] = {"depths": (2, 4, 5), "dims": (64, 128, 256), "num_heads": (2, 4, 8), "mlp_ratios": (8, 4, 4)}
TINY: dict[str, Any] = {"depths": (1, 2, 2), "dims": (64, 128, 256), "num_heads": (2, 4, 8), "mlp_ratios": (8, 4, 4)}
VARIANTS: dict[str, dict[str, Any]] = {
    "dualtoken_vit_tiny": TINY,
    "dualtoken_vit_tiny_mix": {**TINY, "token_mlp": "mix"},
    "dualtoken_vit_small": SMALL,
    "dualtoken_vit_small_mix": {**SMALL, "token_mlp": "mix"},
}
STRIDES = (8, 16, 32)


class ConvStem(nn.Module):
    """LightViT's stem, stride 8: (B, in_chans, H, W) -> (B, dim, H / 8, W / 8), layer-normed.

    A 3x3 convolution of stride 2, three depthwise ones of which the last has stride 2, one more of stride 2. ``stride=4`` or
    ``2`` leaves strides out, from the end, for small images.
    """

    def __init__(self, dim: int, in_chans: int = 3, stride: int = 8, **dd: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        strides = (2, 1, 1, 2 if stride >= 4 else 1)
        for i, step in enumerate(strides):
            chans = in_chans if i == 0 else half
            layers.append(nn.Conv2d(chans, half, 3, step, 1, groups=1 if i == 0 else half, bias=False, **dd))
            layers += [nn.BatchNorm2d(half, **dd), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(half, dim, 3, 2 if stride >= 8 else 1, 1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, h, w)."""
        return self.norm(self.proj(self.stem(x)))


class PatchMerging(nn.Module):
    """Four neighbours become one token, with a shortcut of their maximum; global tokens are widened.

    Args:
        dim: Channels C.
        out_dim: Channels C'.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.proj = nn.Linear(dim, out_dim, bias=False, **dd)
        self.res_proj = nn.Linear(dim, out_dim, bias=False, **dd)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B, T, C) -> (B, C', ceil(H / 2), ceil(W / 2)), (B, T, C'); odd sides get a row or column of zeros."""
        x, g = state
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)  # (B, H, W, C)
        corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        merged = self.reduction(self.norm(torch.cat(corners, -1)))
        largest = torch.stack(corners).amax(0)
        return (merged + self.res_proj(largest)).permute(0, 3, 1, 2), self.proj(self.norm2(g))


class DualTokenBlock(nn.Module):
    """Dual token mixing, then the gated MLP.

    Args:
        dim: Channels C.
        num_heads: Heads of the attentions.
        grid: Side of the grid of global tokens.
        down_steps: How often the map is halved before it is pooled to the grid.
        mlp_ratio: Hidden width of the image tokens' MLP over C.
        token_mlp: Of the global tokens, ``"plain"`` or ``"mix"``.
        proj_drop: Dropout rate in the fusion and the MLP.
        drop_path: Rate of stochastic depth of the MLP's branch.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int = 7,
        down_steps: int = 1,
        mlp_ratio: float = 4.0,
        token_mlp: Literal["plain", "mix"] = "plain",
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_mixer = DualTokenMixer(
            dim, num_heads, grid, down_steps, token_mlp, own_tokens=False, proj_drop=proj_drop, **dd
        )
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = BiDimMLP(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B, T, C) -> the same shapes."""
        x, g = self.token_mixer(*state)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        y = self.drop_path(self.mlp(self.norm(tokens)))
        return x + y.transpose(1, 2).reshape(x.shape), g


class DualTokenViT(Backbone):
    """DualToken-ViT image classifier and feature extractor.

    Args:
        depths: Blocks of the three stages.
        dims: Channels of the stages.
        num_heads: Heads of the stages' attentions.
        mlp_ratios: Hidden width of the stages' MLPs over C.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        grid: Side of the grid of global tokens. Default 7 (paper's best). Images must have at least 32 * grid pixels a side.
        down_steps: How often each stage's map is halved before it is pooled to the grid. Default 2, 1, 0: 28, 14 and 7 at
            224 pixels become 7 with nothing left to pool.
        token_mlp: MLP of the global tokens: ``"plain"`` or ``"mix"`` (the paper's "mix" variants).
        stem_stride: 8 (default), 4 or 2, for small images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the fusions and MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Lists that do not fit three stages; images smaller than the grid of tokens.

    Example:
        >>> net = DualTokenViT((1, 1, 1), (8, 16, 16), (1, 2, 2), (2, 2, 2), num_classes=10, grid=2).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = SMALL["depths"],
        dims: Sequence[int] = SMALL["dims"],
        num_heads: Sequence[int] = SMALL["num_heads"],
        mlp_ratios: Sequence[float] = SMALL["mlp_ratios"],
        num_classes: int = 1000,
        in_chans: int = 3,
        grid: int = 7,
        down_steps: Sequence[int] = (2, 1, 0),
        token_mlp: Literal["plain", "mix"] = "plain",
        stem_stride: int = 8,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        lists = (depths, dims, num_heads, mlp_ratios, down_steps)
        if any(len(values) != 3 for values in lists):
            raise ValueError(
                "DualToken-ViT has three stages: depths, dims, num_heads, mlp_ratios and down_steps need three entries each, "
                f"got {', '.join(str(len(values)) for values in lists)}"
            )
        if stem_stride not in (2, 4, 8):
            raise ValueError(f"stem_stride must be 2, 4 or 8, got {stem_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid = grid
        self.min_size = 4 * stem_stride * grid
        self.stem = ConvStem(dims[0], in_chans, stem_stride, **dd)
        self.global_tokens = nn.Parameter(torch.zeros(1, grid * grid, dims[0], **dd))
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = [
                DualTokenBlock(
                    dim, num_heads[i], grid, down_steps[i], mlp_ratios[i], token_mlp, proj_drop_rate, rates.pop(0), **dd
                )
                for _ in range(depth)
            ]
            stages.append(Stage(PatchMerging(dims[i - 1], dim, **dd) if i > 0 else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, [stem_stride * 2**i for i in range(3)])
        self.norm = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.global_tokens, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The global tokens."""
        return {"global_tokens"}

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images, and images with fewer cells in the last stage than the grid has tokens."""
        if x.ndim == 4 and x.shape[1] == self.in_chans and min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"the last stage of images of {x.shape[2]}x{x.shape[3]} pixels has fewer cells than the {self.grid}x{self.grid} "
                f"global tokens: give at least {self.min_size} pixels a side, or make the model with a smaller grid"
            )
        super().check_images(x)

    def forward_stem(self, x: Tensor) -> Any:
        """Images to the pair of the first map and the global tokens."""
        x = super().forward_stem(x)
        return x, self.global_tokens.expand(len(x), -1, -1)

    def stage_map(self, x: Any) -> Tensor:
        """The map in the pair."""
        return x[0]

    def forward_close(self, x: Any) -> Tensor:
        """The last map, normed; the global tokens have done their work."""
        return self.norm(x[0])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint of this library, unwrapped and checked; LightViT's names of the stem are renamed.

    Raises:
        ValueError: The checkpoint is another variant's.
    """
    stem = re.compile(r"^patch_embed\.(stem|proj|norm)\.")
    out = without_head({stem.sub(r"stem.\1.", name): value for name, value in unwrap(state_dict).items()}, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(
            first_conv="stem.stem.0", paper_ids="arXiv:2309.12424", min_input_size=(3, 224, 224)
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> DualTokenViT:
    return build_backbone(
        DualTokenViT, name, pretrained, checkpoint_filter_fn, stages=3, **{**VARIANTS[name], **kwargs}
    )


register_table(__name__, VARIANTS, _create)
