"""DLGSANet as a ``transformers`` model, with the interface of ``Swin2SRForImageSuperResolution``.

Importing this module makes ``AutoConfig`` and ``AutoModelForImageToImage`` know ``"dlgsanet"``. The image processor is
``Swin2SRImageProcessor(do_pad=False)``: it divides by 255, and any size of picture fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageToImage, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageSuperResolutionOutput

from tokenry.mixers.sparse_channel import SparseChannelAttention
from tokenry.vision.dlgsanet import DLGSANet, load_dlgsanet

__all__ = ["DLGSANetConfig", "DLGSANetForImageSuperResolution"]


class DLGSANetConfig(PreTrainedConfig):
    """Configuration of ``DLGSANetForImageSuperResolution``. Defaults are those of the paper's Tiny network.

    Args:
        upscale: 2, 3 or 4. Default 2.
        dim: Width D, a multiple of 6. Default 48.
        groups: Number of groups. Default 3.
        blocks: Pairs of blocks in a group. Default 3.
        tlc: Windows in the channel attention in evaluation mode, see ``DLGSANet``. Default True (authors' code).

    Example:
        >>> DLGSANetConfig(upscale=4).upscale
        4
    """

    model_type = "dlgsanet"

    upscale: int = 2
    dim: int = 48
    groups: int = 3
    blocks: int = 3
    tlc: bool = True


class DLGSANetForImageSuperResolution(PreTrainedModel):
    """Enlarge images two, three or four times: ``DLGSANet``, kept in ``model.dlgsanet``.

    Raises:
        ValueError: A configuration that ``DLGSANet`` does not take.

    Example:
        >>> import torch
        >>> model = DLGSANetForImageSuperResolution(DLGSANetConfig(upscale=2, dim=12, groups=1, blocks=1)).eval()
        >>> model(torch.rand(1, 3, 16, 9)).reconstruction.shape
        torch.Size([1, 3, 32, 18])
    """

    config_class = DLGSANetConfig
    base_model_prefix = "dlgsanet"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__(config)
        self.dlgsanet = DLGSANet(
            config.upscale, tlc=config.tlc, dim=config.dim, groups=config.groups, blocks=config.blocks
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, SparseChannelAttention):
            nn.init.ones_(module.temperature)

    @classmethod
    def from_checkpoint(
        cls, source: str | Path | Mapping[str, Any], *, tlc: bool = True
    ) -> DLGSANetForImageSuperResolution:
        """Take weights that are not in the format of transformers: the authors', or those of a ``DLGSANet``.

        Args:
            source: As for ``load_dlgsanet``.
            tlc: As in ``DLGSANet``.

        Raises:
            ValueError: As for ``load_dlgsanet``.
        """
        network = load_dlgsanet(source, tlc=tlc)
        model = cls(DLGSANetConfig(**network.settings, tlc=tlc))
        model.dlgsanet.load_state_dict(network.state_dict())
        return model.eval()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ImageSuperResolutionOutput | tuple:
        """Enlarge.

        Args:
            pixel_values: (B, 3, h, w) in [0, 1].
            labels: (B, 3, s h, s w) in [0, 1]: the loss is the mean absolute error to them, as in the paper.
            return_dict: False returns a tuple.
            **kwargs: What ``Trainer`` hands on; not used.

        Returns:
            ``ImageSuperResolutionOutput`` with ``reconstruction`` (B, 3, s h, s w), not clipped to [0, 1].

        Raises:
            ValueError: No batch of RGB images in [0, 1]; labels of another shape.
        """
        scale, loss = self.config.upscale, None
        wanted = (*pixel_values.shape[:-2], *(scale * side for side in pixel_values.shape[-2:]))
        if labels is not None and tuple(labels.shape) != wanted:
            raise ValueError(
                f"labels must be {scale} times as large as pixel_values, {wanted}, got {tuple(labels.shape)}"
            )
        reconstruction = self.dlgsanet(pixel_values)
        if labels is not None:
            loss = F.l1_loss(reconstruction, labels)
        output = ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register("dlgsanet", DLGSANetConfig, exist_ok=True)
AutoModelForImageToImage.register(DLGSANetConfig, DLGSANetForImageSuperResolution, exist_ok=True)
