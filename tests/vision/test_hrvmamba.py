"""HRVMamba: golden cases, counts, the exchange between resolutions, heads, checkpoints, bad input."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision import HeatmapHead, SegmentationHead
from tokenry.vision.hrvmamba import VARIANTS, DVSSBlock, HRVMamba, checkpoint_filter_fn, rename_block

pytestmark = pytest.mark.method("hrvmamba")

TINY = {"width": 8, "stem_width": 8, "modules": (1, 1, 1), "blocks": 1, "neck_width": 4, "num_classes": 10}
# classification; body alone; classification with the deformable convolutions' linear maps
PARAMETERS = {
    "hrvmamba_nano": (12_284_240, 687_336, 12_551_408),
    "hrvmamba_tiny": (14_066_728, 2_361_024, 15_131_496),
    "hrvmamba_small": (20_101_976, 8_178_672, 24_353_240),
    "hrvmamba_base": (60_548_520, 47_972_416, 87_089_640),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return HRVMamba(**{**TINY, **kwargs}).eval()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dvss_block", {"dim": 32, "dcn_pointwise": True}),
        ("dvss_block_nano", {"dim": 16, "dcn_pointwise": True, "light": True}),
        ("dvss_block_without_pointwise", {"dim": 32}),
    ],
)
@torch.no_grad()
def test_golden_block(name, arguments):
    case = GoldenCase("hrvmamba", name)
    block = DVSSBlock(**arguments).eval()
    own = block.state_dict()
    renamed = {rename_block(k): v for k, v in case.state_dict().items()}
    block.load_state_dict({k: v.view(own[k].shape) for k, v in renamed.items()})
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "variant", "pointwise"),
    [
        ("nano_64x64_without_pointwise", "hrvmamba_nano", False),
        ("nano_64x96", "hrvmamba_nano", True),
        ("small_64", "hrvmamba_small", True),
    ],
)
@torch.no_grad()
def test_golden_model(name, variant, pointwise):
    """Every branch after every stage, and the logits."""
    case = GoldenCase("hrvmamba", name)
    model = timm.create_model(variant, dcn_pointwise=pointwise).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    maps, compared = model.forward_stem(x), {"logits"}
    for i, stage in enumerate(model.stages):
        maps = stage(maps)
        for j, y in enumerate([maps] if i == 0 else maps):
            label = "layer1" if i == 0 else f"stage{i + 1}.{j}"
            case.compare_sample(label, y)
            compared |= {f"{label}.slice", f"{label}.stat"}
    case.compare("logits", model.forward_head(model.neck(maps)))
    assert compared == set(case.outputs)
    assert count_macs(model, x) == case.spec["macs_conv_matmul"]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters(name):
    whole, body, pointwise = PARAMETERS[name]
    with torch.device("meta"):
        model, other = timm.create_model(name), timm.create_model(name, dcn_pointwise=True)
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for p in other.parameters()) == pointwise
    inside = [p for k, p in model.named_parameters() if not k.startswith(("neck.", "head."))]
    assert sum(p.numel() for p in inside) == body


@torch.no_grad()
def test_four_maps_of_four_resolutions():
    net = timm.create_model("hrvmamba_nano", features_only=True).eval()
    assert net.feature_info.channels() == [8, 16, 32, 64] and net.feature_info.reduction() == [4, 8, 16, 32]
    maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]


def test_every_map_sees_every_branch():
    net = tiny()
    maps = [torch.randn(1, 8 << i, 16 >> i, 16 >> i, requires_grad=True) for i in range(4)]
    last = net.stages[3].blocks[-1]
    for i, y in enumerate(last(list(maps))):
        grads = torch.autograd.grad(y.sum(), maps, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in grads), i


@torch.no_grad()
def test_the_exchange_is_the_sum_of_resized_maps():
    net = tiny()
    block = net.stages[1].blocks[0]
    maps = [torch.randn(1, 8, 8, 12), torch.randn(1, 16, 4, 6)]
    a, b = (branch(x) for branch, x in zip(block.branches, maps, strict=True))
    up = F.interpolate(block.fuse[0][1](b), (8, 12), mode="bilinear", align_corners=False)
    high, low = block(maps)
    torch.testing.assert_close(high, F.relu(a + up))
    torch.testing.assert_close(low, F.relu(block.fuse[1][0](a) + b))


def test_positions_of_the_light_block_stay_out_of_the_first_skip():
    block = DVSSBlock(8, light=True).eval()
    with torch.no_grad():
        for branch in (block.local, block.token_mixer.out_proj, block.mlp.fc2):
            for parameter in branch.parameters():
                parameter.zero_()
        x = torch.randn(1, 8, 5, 5)
        torch.testing.assert_close(block(x), block.pos2(x))


def test_stochastic_depth_grows_along_the_body():
    net = HRVMamba(**{**TINY, "blocks": 2, "drop_path_rate": 0.3})
    rates = [
        [getattr(block.drop_path, "drop_prob", 0.0) for block in branch]
        for stage in net.stages[1:]
        for parallel in stage.blocks
        for branch in parallel.branches
    ]
    assert rates[0] == rates[1] == pytest.approx([0.0, 0.06])
    assert rates[-1] == pytest.approx([0.24, 0.3])
    assert "stages.3.blocks.0.branches.3.1.token_mixer.A_logs" in net.no_weight_decay()


def test_a_step_of_training_with_both_heads():
    net = timm.create_model("hrvmamba_nano", features_only=True, modules=(1, 1, 1), blocks=1)
    widths = net.feature_info.channels()
    heads = nn.ModuleList([HeatmapHead(widths, 17), SegmentationHead(widths, 5)])
    maps = net(torch.randn(2, 3, 64, 32))
    points, classes = (head(maps) for head in heads)
    assert points.shape == (2, 17, 16, 8) and classes.shape == (2, 5, 16, 8)
    (points.square().mean() + classes.square().mean()).backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
def test_segmentation_head_is_a_convolution_of_the_resized_maps():
    head = SegmentationHead([2, 3], 4).eval()
    maps = [torch.randn(1, 2, 6, 4), torch.randn(1, 3, 3, 2)]
    every = torch.cat([maps[0], F.interpolate(maps[1], (6, 4), mode="bilinear", align_corners=False)], 1)
    torch.testing.assert_close(head(maps), head.conv(F.relu(head.mix.norm(head.mix.conv(every)))))


def authors_state_dict():
    """That of the smallest model, under the authors' names."""
    return GoldenCase("hrvmamba", "nano_64x64_without_pointwise").state_dict()


def test_checkpoints_load_wrapped_and_unwrapped():
    model = timm.create_model("hrvmamba_nano")
    plain = authors_state_dict()
    expected = checkpoint_filter_fn(plain, model)
    for wrapped in ({"model": plain}, {"state_dict": {f"module.{k}": v for k, v in plain.items()}}, expected):
        found = checkpoint_filter_fn(wrapped, model)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_a_checkpoint_of_another_variant_is_refused():
    plain = authors_state_dict()
    with pytest.raises(ValueError, match="looks like hrvmamba_nano"):
        checkpoint_filter_fn(plain, timm.create_model("hrvmamba_tiny"))
    with pytest.raises(ValueError, match="make the model with dcn_pointwise=False"):
        checkpoint_filter_fn(plain, timm.create_model("hrvmamba_nano", dcn_pointwise=True))
    with pytest.raises(ValueError, match="make the model with dcn_pointwise=True"):
        model = timm.create_model("hrvmamba_nano", dcn_pointwise=True)
        checkpoint_filter_fn(model.state_dict(), timm.create_model("hrvmamba_nano"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(width=6), "width must be a multiple of 4"),
        (lambda: tiny(modules=(1, 1)), "modules takes one entry"),
        (lambda: tiny(blocks=0), "at least 1"),
        (lambda: tiny(drop_path_rate=1.0), "drop_path_rate must be in"),
        (lambda: tiny(num_classes=-1), "num_classes"),
        (lambda: tiny()(torch.zeros(1, 3, 64, 80)), "multiples of 32, got 64x80"),
        (lambda: tiny()(torch.zeros(1, 4, 64, 64)), "in_chans"),
        (lambda: tiny().forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC"), "output_fmt"),
        (lambda: HeatmapHead([], 3), "widths takes a positive entry"),
        (lambda: SegmentationHead([8], 0), "num_classes is at least 1"),
        (lambda: HeatmapHead([8, 16], 3)([torch.zeros(1, 8, 4, 4)]), r"maps with \(8, 16\) channels, got \(8,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
