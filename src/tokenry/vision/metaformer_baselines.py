"""IdentityFormer and RandFormer, the baselines that timm lacks beside its PoolFormerV2, ConvFormer and CAFormer.

Yu et al., "MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452.

    IdentityFormer   mixer(x) = x in every stage
    RandFormer       mixer(x) = x in stages 1 and 2, softmax(U) x with a frozen random matrix in stages 3 and 4

Norms have no bias and take mean and variance over (H, W, C); StarReLU; residual scale in the last two stages; the head
averages first and normalises over channels after it. RandFormer's matrices fix the resolution: ``img_size`` chooses it.

timm has ``poolformerv2_*``, ``convformer_*`` and ``caformer_*``; ``load_checkpoint`` reads the authors' files into them.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs

from tokenry.vision.metaformer import MetaFormer, build_metaformer, image_config
from tokenry.vision.registration import register_table

__all__ = ["default_cfgs"]

S = (64, 128, 320, 512)
M = (96, 192, 384, 768)
SIZES: dict[str, dict[str, Any]] = {
    "s12": {"depths": (2, 2, 6, 2), "dims": S},
    "s24": {"depths": (4, 4, 12, 4), "dims": S},
    "s36": {"depths": (6, 6, 18, 6), "dims": S},
    "m36": {"depths": (6, 6, 18, 6), "dims": M},
    "m48": {"depths": (8, 8, 24, 8), "dims": M},
}
RANDOM_LATE = ("identity", "identity", "random", "random")
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"identityformer_{n}": {"token_mixers": "identity", "norm": "group1", **size} for n, size in SIZES.items()},
    **{f"randformer_{n}": {"token_mixers": RANDOM_LATE, "norm": "group1", **size} for n, size in SIZES.items()},
}

default_cfgs = generate_default_cfgs(
    {name: image_config(**({"fixed_input_size": True} if name.startswith("rand") else {})) for name in VARIANTS}
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return build_metaformer(name, pretrained, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
