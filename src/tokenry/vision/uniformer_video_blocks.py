"""The parts of a UniFormer that clips alone need: what comes in, divided attention, the head; see ``uniformer_video``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from timm.layers import ClassifierHead, DropPath, Mlp
from torch import Tensor, nn

from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.in_place_gelu import InPlaceGELU
from tokenry.mixers.mhra_3d import DividedMHRA3d
from tokenry.vision.backbone import Backbone
from tokenry.vision.uniformer_blocks import to_map, to_tokens
from tokenry.vision.uniformer_video_weights import inflate_checkpoint

__all__ = ["ClipBackbone", "ClipHead", "DividedBlock"]


class ClipBackbone(Backbone):
    """A backbone whose images are clips (B, in_chans, T, H, W).

    Args:
        num_frames: Frames of the clips that the model is meant for, noted for those who sample them.
        *args: Of the next class.
        **kwargs: Of the next class.

    Class attributes:
        split: Whether global blocks attend over time and space in turn. Default False; a network that can sets its own.
    """

    size_multiple = 32
    split: bool = False
    pos_drop: nn.Dropout

    def __init__(self, num_frames: int = 16, *args: Any, **kwargs: Any) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}; the authors' are 4, 8, 16 and 32")
        super().__init__(*args, **kwargs)
        self.num_frames = num_frames

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of clips of a size that the network takes.

        Raises:
            ValueError: It says what was given, what is allowed, and what to do.
        """
        wanted = f"clips (B, {self.in_chans}, T, H, W)"
        if x.ndim != 5:
            raise ValueError(
                f"expected {wanted}, got {x.ndim} dimensions {tuple(x.shape)}; x.unsqueeze(0) makes a batch of one clip "
                "(C, T, H, W), x.unsqueeze(2) clips of one frame of images (B, C, H, W)"
            )
        if x.shape[1] != self.in_chans:
            hint = "make the model with in_chans=... for other channel counts"
            if x.shape[2] == self.in_chans:
                hint = "the channels seem to be behind the frames: give x.transpose(1, 2)"
            elif x.shape[4] == self.in_chans:
                hint = "the channels seem to be last: give x.permute(0, 4, 1, 2, 3)"
            raise ValueError(f"expected {wanted}, got {tuple(x.shape)}; {hint}")
        if x.shape[2] < 1:
            raise ValueError(f"a clip needs at least one frame, got {tuple(x.shape)}")
        super().check_images(x[:, :, 0])

    def forward_stem(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Check the clips, embed them, and drop positions in training.

        Args:
            x: (B, in_chans, T, H, W), or a list with that one tensor, as PySlowFast hands it on.
        """
        if not isinstance(x, Tensor):
            if len(x) != 1:
                raise ValueError(
                    f"expected one tensor of clips, or a list of one, got a list of {len(x)}: this model has one pathway"
                )
            x = x[0]
        self.check_images(x)
        if x.device.type != "cpu":
            return self.pos_drop(self.stem(x))
        x = self.stem(x.contiguous(memory_format=torch.channels_last_3d))
        # again: torch's convolution for one small clip returns the other order
        return self.pos_drop(x.contiguous(memory_format=torch.channels_last_3d))

    def from_image_checkpoint(self, state_dict: dict[str, Any], mode: str = "mean") -> Self:
        """Take over the weights of an image UniFormer of the same depths and widths, and return the model.

        What images do not have keeps its first weights: temporal attention (``split``), layer scale where the image model
        has none, and the classifiers where the classes differ in number.

        Args:
            state_dict: Checkpoint of the authors' image models, or state dict of ``tokenry.vision.UniFormer`` or
                ``UniFormerLight``.
            mode: How kernels get a time dimension; see ``inflate``.

        Raises:
            ValueError: The checkpoint is of another network; the message lists the tensors that do not fit.
        """
        self.load_state_dict(inflate_checkpoint(state_dict, self, mode))
        return self


class DividedBlock(nn.Module):
    """Position encoding, attention over time and space in turn, and MLP on (B, C, T, H, W).

    The aggregator brings norms and stochastic depth of its own.

    Args:
        dim: Channels C.
        head_dim: Channels of an attention head; must divide ``dim``.
        mlp_ratio: Hidden width of the MLP over C.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of attention's output and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = ConvPosEnc(dim, frames=True, **dd)
        self.mixer = DividedMHRA3d(dim, head_dim, attn_drop=attn_drop, drop_path=drop_path, proj_drop=proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=InPlaceGELU, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        x = self.pos_embed(x)
        x, size = to_tokens(x + self.mixer(x))
        return to_map(x + self.drop_path(self.mlp(self.norm2(x))), size)


class ClipHead(ClassifierHead):
    """``fc(mean of x over T, H, W)`` for x: (B, C, T, H, W)."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, T, H, W) -> (B, num_classes), or the pooled features; the map itself with neither pooling nor classes."""
        y = super().forward(x.flatten(3), pre_logits)
        return y.unflatten(3, x.shape[3:]) if y.ndim == 4 else y
