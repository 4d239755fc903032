"""STViT: golden case, counts, checkpoints, settings, drawing, bad input."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import SuperTokenAttention
from tokenry.vision import draw_tokens, token_maps
from tokenry.vision.stvit import VARIANTS, STViT, checkpoint_filter_fn

pytestmark = pytest.mark.method("stvit")

TINY = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3), "head_width": 32, "num_classes": 5}
COUNTS = {  # parameters, and billions of multiply-accumulates at 224 pixels
    "stvit_small": (25_495_624, 4.350),
    "stvit_base": (51_691_288, 9.842),
    "stvit_large": (94_971_096, 15.561),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return STViT(**{**TINY, **kwargs}).eval()


@pytest.mark.golden
@torch.inference_mode()
def test_golden():
    case = GoldenCase("stvit", "small_224")
    model = timm.create_model("stvit_small").eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    last, maps = model.forward_intermediates(x)
    # the authors' stages end with the downsampling that begins ours
    ends = [model.stages[i + 1].downsample(y) for i, y in enumerate(maps[:-1])] + maps[-1:]
    for i, y in enumerate(ends):
        case.compare_sample(f"layer{i}", y)
    case.compare("logits", model.forward_head(last))


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_and_multiply_accumulates(variant):
    params, macs = COUNTS[variant]
    model = timm.create_model(variant, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) / 1e9 == pytest.approx(macs, rel=0.01)
    assert timm.get_pretrained_cfg(f"{variant}_384").input_size == (3, 384, 384)


def as_the_authors(model):
    """A state dict of ours under the authors' names, with the constants that their checkpoints hold."""
    out = {}
    for name, value in model.state_dict().items():
        block = ".blocks." in name
        for ours, theirs in {
            "stem.": "patch_embed.proj.",
            "final_conv.0.": "proj.",
            "final_conv.1.": "norm.",
            "head.fc.": "head.",
            ".pos_embed.proj.": ".pos_embed.conv.",
            ".norm1.": ".norm1.norm.",
            ".token_mixer.": ".attn.stoken_refine.",
            ".mlp.dw.proj.": ".mlp2.conv.conv.",
            ".mlp.": ".mlp2.",
            ".ls1.gamma": ".gamma_1",
            ".ls2.gamma": ".gamma_2",
        }.items():
            name = name.replace(ours, theirs)
        if ".downsample." in name:
            _, stage, _, part, end = name.split(".")
            name = f"layers.{int(stage) - 1}.downsample.proj.{('conv', 'norm').index(part)}.{end}"
        elif block:
            name = name.replace("stages.", "layers.", 1)
        if name.endswith((".qkv.weight", "stoken_refine.proj.weight")):
            value = value[:, :, None, None]
        if "gamma_" in name:
            value = value.view(1, -1, 1, 1)
        if name.endswith(".qkv.bias"):
            for constant in ("fold", "unfold"):
                weights = torch.eye(9).view(9, 1, 3, 3)
                out[name.replace("stoken_refine.qkv.bias", f"{constant}.weights")] = weights
        out[name] = value
    return out


@torch.no_grad()
def test_takes_the_authors_checkpoints():
    model = tiny(layer_scale=(None, None, 0.5, 0.5))
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = as_the_authors(model)
    assert set(theirs) >= set(GoldenCase("stvit", "small_224").state_dict()) - {
        name for name in GoldenCase("stvit", "small_224").state_dict() if ".blocks." in name
    }
    x = torch.randn(1, 3, 64, 64)
    for wrapped in (theirs, {"model": {f"module.{k}": v for k, v in theirs.items()}, "epoch": 3}):
        other = tiny(layer_scale=(None, None, 1e-6, 1e-6))
        other.load_state_dict(checkpoint_filter_fn(wrapped, other))
        torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))  # our own names stay
    headless = tiny(layer_scale=(None, None, 1e-6, 1e-6), num_classes=0)
    headless.load_state_dict(checkpoint_filter_fn(theirs, headless))


def test_names_the_variant_of_another_checkpoint():
    with torch.device("meta"):
        theirs = as_the_authors(STViT(**VARIANTS["stvit_base"]))
    with pytest.raises(ValueError, match=r"another model's.*timm.create_model\('stvit_base'\)"):
        checkpoint_filter_fn(theirs, timm.create_model("stvit_small", device="meta"))
    with pytest.raises(ValueError, match=r"unknown \(stages.2.blocks.0.ls1.gamma"):  # layer scales are part of a model
        checkpoint_filter_fn(tiny(layer_scale=(None, None, 1.0, None)).state_dict(), tiny())


def test_settings_reach_the_blocks():
    model = tiny(
        stoken_size=(4, (2, 4), 1, 1), n_iter=2, layer_scale=(None, None, 1e-6, 1e-6), drop_path_rate=0.4,
        attn_drop_rate=0.1, proj_drop_rate=0.2, drop_rate=0.3, mlp_ratio=2.0,
    )  # fmt: skip
    mixers = [m for m in model.modules() if isinstance(m, SuperTokenAttention)]
    assert [m.stoken_size for m in mixers] == [(4, 4), (2, 4), (2, 4), (1, 1), (1, 1)]
    assert [m.num_heads for m in mixers] == [1, 2, 2, 2, 3]
    assert {(m.n_iter, m.attn_drop, m.proj_drop.p) for m in mixers} == {(2, 0.1, 0.2)}
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [hasattr(block.ls1, "gamma") for block in blocks] == [False] * 3 + [True] * 2
    assert all(block.mlp.fc1.out_channels == 2 * block.mlp.fc1.in_channels for block in blocks)
    assert model.head.drop.p == 0.3


@torch.no_grad()
def test_without_its_branches_a_block_adds_a_position():
    model = tiny(layer_scale=(0.0, None, None, None))
    block, x = model.stages[0].blocks[0], torch.randn(1, 8, 16, 16)
    depthwise = torch.nn.functional.conv2d(
        x, block.pos_embed.proj.weight, block.pos_embed.proj.bias, padding=1, groups=8
    )
    torch.testing.assert_close(block(x), x + depthwise)


@torch.no_grad()
def test_pruning_drops_the_closing_convolution():
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2 and model.num_features == 12
    torch.testing.assert_close(model(x), maps[1])


@torch.no_grad()
def test_tokens_can_be_drawn():
    model, x = tiny(), torch.randn(1, 3, 64, 96)
    found = token_maps(model, x)
    assert [sorted(maps) for _, maps in found] == [["super_tokens"]] * 3 + [["attention"]] * 2
    assert found[0][1]["super_tokens"].shape == (1, 16, 24) and found[-1][1]["attention"].shape == (1, 2, 3)
    assert set(found[0][1]["super_tokens"].unique().tolist()) <= set(range(6))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    drawn = np.asarray(draw_tokens(model, image, what="super_tokens", layer=0, size=(96, 64)))
    assert drawn.shape == (96, 64, 3) and (drawn == 255).all(-1).any()


def test_small_images_warn():
    with pytest.warns(UserWarning, match="8x8 is a single cell"):
        tiny(stoken_size=(8, 1, 1, 1))(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dims": (8, 16)}, r"one entry per stage, got depths=\(1, 2, 1, 1\), dims=\(8, 16\)"),
        ({"stoken_size": (8, 4)}, r"one entry per stage.*stoken_size=\(8, 4\)"),
        ({"depths": ()}, "one entry per stage"),
        ({"num_heads": (3, 2, 2, 3)}, "num_heads must divide dim=8, got num_heads=3; use num_heads=2"),
        ({"stoken_size": (8, 0, 1, 1)}, "at least 1, got 0"),
        ({"n_iter": 0}, "n_iter must be at least 1"),
        ({"depths": (1, 0, 1, 1)}, "must be positive"),
        ({"dims": (1, 12, 16, 24)}, "first stage have 2 channels or more"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 24, 64)])
def test_rejects_images(shape):
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)|at least 32 pixels"):
        tiny()(torch.zeros(shape))
