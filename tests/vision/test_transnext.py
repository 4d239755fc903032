"""TransNeXt: golden models, counts, sizes, the authors' checkpoints, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import AggregatedAttention, CosineAttention
from tokenry.vision.transnext import VARIANTS, TransNeXt, checkpoint_filter_fn

pytestmark = pytest.mark.method("transnext")

TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "num_classes": 5}
PARAMS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_small_384": 49_741_564,
    "transnext_base_384": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}
CASES = {"micro_224": ("transnext_micro", 0, 224), "micro_AAAA_128": ("transnext_micro_aaaa", 1, 128)}


def tiny(**kwargs) -> TransNeXt:
    torch.manual_seed(0)
    return TransNeXt(**{**TINY, **kwargs}).eval()


def golden_image(seed: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((1, 3, side, side)).astype(np.float32))


@pytest.mark.golden
@pytest.mark.parametrize("name", list(CASES))
@torch.inference_mode()
def test_golden_models(name):
    variant, seed, side = CASES[name]
    case = GoldenCase("transnext", name)
    model = timm.create_model(variant).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    last, maps = model.forward_intermediates(golden_image(seed, side), norm=True)
    case.compare("logits", model.forward_head(last))
    for number, features in enumerate(maps, 1):
        case.compare_sample(f"stage{number}", features.permute(0, 2, 3, 1))  # (B, N, C), row by row


@pytest.mark.golden
@pytest.mark.parametrize("name", list(CASES))
def test_golden_multiply_accumulates(name):
    """Equal to the authors' count to the last one: ours has no products for neighbours, theirs 2 K of N C each."""
    variant, _, side = CASES[name]
    model = timm.create_model(variant).eval()
    local = sum(
        2 * 9 * (side // (4 << i)) ** 2 * stage.blocks[0].attn.dim * len(stage.blocks)
        for i, stage in enumerate(model.stages)
        if isinstance(stage.blocks[0].attn, AggregatedAttention)
    )
    macs = count_macs(model, torch.zeros(1, 3, side, side)) + local
    assert macs == GoldenCase("transnext", name).spec["macs"]
    if name == "micro_224":
        assert round(macs / 1e9, 2) == 2.65


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_parameter_counts(variant):
    model = timm.create_model(variant, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[variant]


def test_kinds_of_attention():
    kinds = [type(stage.blocks[0].attn) for stage in timm.create_model("transnext_micro", device="meta").stages]
    assert kinds == [AggregatedAttention] * 3 + [CosineAttention]
    model = timm.create_model("transnext_micro_aaaa", device="meta")
    assert [type(stage.blocks[0].attn) for stage in model.stages] == [AggregatedAttention] * 4
    assert [stage.blocks[0].attn.pretrain_size[0] for stage in model.stages] == [64, 32, 16, 8]
    assert [stage.blocks[0].attn.sr_ratio for stage in model.stages] == [16, 8, 4, 2]


@torch.no_grad()
def test_pretrain_size_decides_at_other_sizes():
    x = torch.randn(1, 3, 96, 64)
    one, other = tiny(pretrain_size=224), tiny(pretrain_size=96)
    for model in (one, other):  # the position biases start small
        for stage in model.stages:
            stage.blocks[0].attn.cpb.fc2.weight.mul_(50.0)
    assert not torch.allclose(one(x), other(x))
    assert one(x).shape == (1, 5)


@torch.no_grad()
def test_fixed_pool_keeps_the_pooled_map():
    model = tiny(fixed_pool_size=3)
    for stage in model.stages[:3]:
        assert stage.blocks[0].attn.pool_grid((40, 56)) == (3, 3)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


@torch.no_grad()
def test_features_are_normed_as_the_authors_are():
    model = timm.create_model("transnext_micro", features_only=True, **TINY).eval()
    maps = model(torch.randn(1, 3, 75, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 19, 24), (1, 8, 10, 12), (1, 16, 5, 6), (1, 16, 3, 3)]
    for features in maps:  # layer norm with weight 1 and bias 0
        torch.testing.assert_close(features.mean(1), torch.zeros_like(features[:, 0]), atol=1e-5, rtol=0)


def test_weight_decay_spares_what_the_authors_spare():
    model = tiny()
    spared = model.no_weight_decay()
    attention = "stages.0.blocks.0.attn."
    for name in ("temperature", "query_embedding", "relative_pos_bias_local", "cpb.fc1.weight", "cpb.fc2.bias"):
        assert attention + name in spared
    assert attention + "learnable_tokens" not in spared and attention + "q.weight" not in spared
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    free = {id(p) for p in groups[0]["params"]}
    assert id(model.stages[0].blocks[0].attn.query_embedding) in free


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = TransNeXt(**{**TINY, "dims": (64, 64, 64, 64)})
    block = model.stages[0].blocks[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.attn.sr.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert block.attn.q.bias.abs().max() == 0 and model.stem.conv.bias.abs().max() == 0


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict as the authors' training code saves it, with the tables of an image size."""
    out = {"module.relative_pos_index1": torch.zeros(4), "module.block1.0.attn.seq_length_scale": torch.zeros(4, 1)}
    for name, value in state.items():
        name = name.replace("stem.conv", "patch_embed1.proj").replace("stem.", "patch_embed1.")
        for i in range(4):
            name = name.replace(f"stages.{i}.downsample.conv", f"patch_embed{i + 1}.proj")
            name = name.replace(f"stages.{i}.downsample", f"patch_embed{i + 1}")
            name = name.replace(f"stages.{i}.blocks", f"block{i + 1}").replace(f"stages.{i}.norm", f"norm{i + 1}")
        name = "norm4" + name.removeprefix("norm") if name.startswith("norm.") else name
        name = name.replace("cpb.fc", "cpb_fc").replace("mlp.dwconv", "mlp.dwconv.dwconv").replace("head.fc", "head")
        out[f"module.{name}"] = value[..., None, None] if name.endswith("sr.weight") else value
    return out


@torch.no_grad()
def test_checkpoints_of_the_authors_training_code():
    model, other = tiny(), tiny()
    for parameter in other.parameters():
        parameter.add_(0.1)
    other.load_state_dict(checkpoint_filter_fn({"model": authors_names(model.state_dict())}, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), other(x))
    again = checkpoint_filter_fn(model.state_dict(), other)  # our own names pass through
    assert list(again) == list(model.state_dict())


def test_a_checkpoint_of_another_variant_is_refused():
    state = authors_names(timm.create_model("transnext_tiny", device="meta").state_dict())
    model = timm.create_model("transnext_micro", device="meta")
    with pytest.raises(ValueError, match="looks like transnext_tiny: make the model with timm"):
        checkpoint_filter_fn(state, model)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)])
@torch.no_grad()
def test_odd_sizes(size):
    assert tiny()(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(window_size=4), r"window_size must be odd.* got 4"),
        (lambda: tiny(num_heads=(3, 1, 2, 2)), r"num_heads must divide dim=8, got num_heads=3; use num_heads=2"),
        (lambda: tiny(img_size=100), r"img_size must be made of multiples of 32, got 100x100; take such a size"),
        (
            lambda: tiny(img_size=64)(torch.zeros(1, 3, 64, 96)),
            r"made for images of 64x64 pixels, got 64x96; resize them",
        ),
        (lambda: tiny(pretrain_size=16), r"pretrain_size .* at least 32, got 16; the paper's is 224"),
        (
            lambda: tiny(depths=(1, 1, 1)),
            r"depths needs one positive entry for each of the four stages, got \(1, 1, 1\)",
        ),
        (
            lambda: tiny(fixed_pool_size=7)(torch.zeros(1, 3, 96, 112)),
            r"fixed_pool_size=7 must be smaller than .* which is 6 for images of 96x112; take images of more than 112",
        ),
        (lambda: tiny(fixed_pool_size=7, img_size=96), r"fixed_pool_size=7 must be smaller"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
