"""PoolFormer and the hybrid MetaFormers.

Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv:2111.11418.

    x = x + l1 * drop_path( AvgPool_3(n) - n ),   n = norm1(x)
    x = x + l2 * drop_path( mlp( norm2(x) ) )

Group norm of one group, layer scale, GELU, biases; the head normalises the last map and averages after it.

timm has ``poolformer_{s12,s24,s36,m36,m48}``: the same stages, but its head averages first and normalises after it
over channels, so that its logits differ from the authors' in the third decimal. ``poolformer(...)`` and the timm names
``poolformer_*_exact`` give the authors' head. timm lacks the hybrids ``metaformer_*_s12*``, registered here: i(d)entity,
(p)ooling, (a)ttention, spatial (f)ully connected, a letter per stage.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs

from tokenry.vision.metaformer import MetaFormer, build_metaformer, image_config
from tokenry.vision.registration import register_table

__all__ = ["default_cfgs", "poolformer"]

# The block, stem and head of the paper.
POOLFORMER: dict[str, Any] = {
    "norm_eps": 1e-5, "norm_bias": True, "act": "gelu", "mlp_bias": True, "layer_scale": 1e-5, "res_scale": None,
    "embed_norm": False, "embed_init": False, "head_norm": "before_pool",
}  # fmt: skip
S = (64, 128, 320, 512)
M = (96, 192, 384, 768)
SIZES: dict[str, dict[str, Any]] = {
    "s12": {"depths": (2, 2, 6, 2), "dims": S},
    "s24": {"depths": (4, 4, 12, 4), "dims": S},
    "s36": {"depths": (6, 6, 18, 6), "dims": S, "layer_scale": 1e-6},
    "m36": {"depths": (6, 6, 18, 6), "dims": M, "layer_scale": 1e-6},
    "m48": {"depths": (8, 8, 24, 8), "dims": M, "layer_scale": 1e-6},
}
BIASED = {"proj_bias": True}  # of the attention's output map
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"poolformer_{n}_exact": {"token_mixers": "pool", "norm": "group1", **size} for n, size in SIZES.items()},
    "metaformer_id_s12": {"token_mixers": "identity", "norm": "group1", **SIZES["s12"]},
    "metaformer_pppa_s12_224": {
        "token_mixers": ("pool", "pool", "pool", "attention"), "mixer_kwargs": ({}, {}, {}, BIASED), "norm": "layer",
        "pos_embed": (3,), **SIZES["s12"],
    },
    "metaformer_ppaa_s12_224": {
        "token_mixers": ("pool", "pool", "attention", "attention"), "mixer_kwargs": ({}, {}, BIASED, BIASED),
        "norm": "layer", "pos_embed": (2,), **SIZES["s12"],
    },
    "metaformer_pppf_s12_224": {
        "token_mixers": ("pool", "pool", "pool", "spatial_fc"), "norm": "group1", **SIZES["s12"],
    },
    "metaformer_ppff_s12_224": {
        "token_mixers": ("pool", "pool", "spatial_fc", "spatial_fc"), "norm": "group1", **SIZES["s12"],
    },
}  # fmt: skip
CROPS = {"poolformer_m36_exact": 0.95, "poolformer_m48_exact": 0.95, "metaformer_pppa_s12_224": 0.95}
CROPS |= {"metaformer_ppaa_s12_224": 0.95, "metaformer_ppff_s12_224": 0.95}

default_cfgs = generate_default_cfgs({name: image_config(crop_pct=CROPS.get(name, 0.9)) for name in VARIANTS})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    return build_metaformer(name, pretrained, **{**POOLFORMER, **VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)


def poolformer(size: str = "s12", *, pool_size: int = 3, **kwargs: Any) -> MetaFormer:
    """PoolFormer as its authors wrote it, head included.

    Args:
        size: ``"s12"``, ``"s24"``, ``"s36"``, ``"m36"`` or ``"m48"``.
        pool_size: Side of the pooling window, odd. Default 3 (paper).
        **kwargs: Arguments of ``metaformer``: ``num_classes``, ``in_chans``, ``drop_path_rate`` (the paper trains with
            0.1, 0.1, 0.2, 0.3, 0.4 by size), ``features_only``, ``feature_norms`` (the detection form) ...

    Raises:
        ValueError: Unknown size, even ``pool_size``.

    Example:
        >>> sum(p.numel() for p in poolformer("s12").parameters())
        11915176
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return _create(f"poolformer_{size}_exact", mixer_kwargs={"pool_size": pool_size}, **kwargs)
