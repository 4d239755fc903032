"""DualToken-ViT: golden stem and merging, sizes, the second stream, bad input."""

import pytest
import timm
import torch
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision.dualtoken_vit import ConvStem, DualTokenViT, PatchMerging, checkpoint_filter_fn

pytestmark = pytest.mark.method("dualtoken-vit")

TINY = {
    "depths": (1, 1, 1), "dims": (8, 16, 16), "num_heads": (1, 2, 2), "mlp_ratios": (2, 2, 2), "grid": 2,
    "num_classes": 5,
}  # fmt: skip


@pytest.mark.golden
def test_golden_stem():
    case = GoldenCase("dualtoken-vit", "stem")
    stem = ConvStem(32).eval()
    assert sum(p.numel() for p in stem.parameters()) == case.spec["params"]
    missing, unexpected = stem.load_state_dict(case.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    case.compare("y", stem(case.inputs["x"]).flatten(2).transpose(1, 2))


@pytest.mark.golden
def test_golden_merging():
    case = GoldenCase("dualtoken-vit", "merge_patch")
    merge = PatchMerging(16, 32)
    merge.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in merge.parameters()) == case.spec["params"]
    tokens = case.inputs["x"]  # 4 global tokens, then 6 x 8 image tokens
    x, g = merge((tokens[:, 4:].transpose(1, 2).unflatten(2, (6, 8)), tokens[:, :4]))
    case.compare("y", torch.cat([g, x.flatten(2).transpose(1, 2)], 1))


def test_odd_sides_get_zeros():
    merge, x, g = PatchMerging(4, 8), torch.randn(1, 4, 5, 3), torch.randn(1, 4, 4)
    y, _ = merge((x, g))
    torch.testing.assert_close(y, merge((F.pad(x, (0, 1, 0, 1)), g))[0])
    assert y.shape == (1, 8, 3, 2)


@pytest.mark.parametrize(
    ("variant", "params", "billions"),
    [
        ("dualtoken_vit_tiny", 5_632_114, 0.518), ("dualtoken_vit_tiny_mix", 5_682_533, 0.526),
        ("dualtoken_vit_small", 12_641_726, 1.078), ("dualtoken_vit_small_mix", 12_752_827, 1.097),
    ],
)  # fmt: skip
def test_sizes(variant, params, billions):
    model = timm.create_model(variant).eval()
    assert sum(p.numel() for p in model.parameters()) == params
    if variant == "dualtoken_vit_tiny":
        assert count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(billions, abs=1e-3)


@torch.no_grad()
def test_global_tokens_are_carried_through_all_stages():
    torch.manual_seed(0)
    model, x = DualTokenViT(**TINY).eval(), torch.randn(1, 3, 64, 64)
    before = model(x)
    state = model.forward_stem(x)
    for stage in model.stages:
        state = stage(state)
    assert state[1].shape == (1, 4, 16)
    model.global_tokens.normal_()
    assert not torch.allclose(model(x), before)


def test_any_size_from_the_grid_on():
    model = DualTokenViT(**TINY).eval()
    assert model(torch.zeros(1, 3, 64, 101)).shape == (1, 5)
    with pytest.raises(ValueError, match="fewer cells than the 2x2 global tokens: give at least 64 pixels"):
        model(torch.zeros(1, 3, 63, 64))
    small = DualTokenViT(**TINY, stem_stride=2).eval()
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert [m.shape[-1] for m in small.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)] == [
        16,
        8,
        4,
    ]


def test_checkpoints():
    model = DualTokenViT(**TINY)
    own = model.state_dict()
    light = {k.replace("stem.", "patch_embed.", 1) if k.startswith("stem.") else k: v for k, v in own.items()}
    model.load_state_dict(checkpoint_filter_fn({"model": light}, model))
    with pytest.raises(ValueError, match="dualtoken_vit_small_mix"):
        tiny = timm.create_model("dualtoken_vit_tiny", device="meta")
        checkpoint_filter_fn(timm.create_model("dualtoken_vit_small_mix", device="meta").state_dict(), tiny)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, "three stages"),
        ({"stem_stride": 16}, "stem_stride must be 2, 4 or 8"),
        ({"num_heads": (3, 2, 2)}, "must divide dim=8"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        DualTokenViT(**{**TINY, **arguments})
