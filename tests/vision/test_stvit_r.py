"""STViT-R and its plain form: golden case, counts, checkpoints, settings, drawing, bad input."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from golden_case import GoldenCase
from tokenry.layers import SwinBlock
from tokenry.measure import count_macs
from tokenry.mixers import SemanticTokenMixer, SemanticTokens
from tokenry.vision import draw_tokens, token_maps
from tokenry.vision.stvit_deit import STViTDeiT
from tokenry.vision.stvit_deit import checkpoint_filter_fn as deit_filter
from tokenry.vision.stvit_r import VARIANTS, STViTR, checkpoint_filter_fn

pytestmark = pytest.mark.method("stvit-r")

TINY = {"depths": (1, 2, 12, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "num_classes": 5}
PLAIN = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 24,
    "num_heads": 2,
    "depth": 5,
    "full_depth": 1,
    "num_classes": 5,
}
# Parameters, and billions of multiply-accumulates at 224 pixels that the authors' code takes.
COUNTS = {"stvit_r_swin_small": (49_625_518, 5.799), "stvit_r_swin_base": (87_812_336, 10.23)}
# Timm's DeiT without its class token (and that token's position), and M global centres more.
DEIT = {"stvit_deit_tiny": ("deit_tiny_patch16_224", 192), "stvit_deit_small": ("deit_small_patch16_224", 384)}


def tiny(**kwargs):
    torch.manual_seed(0)
    return STViTR(**{**TINY, **kwargs}).eval()


def plain(**kwargs):
    torch.manual_seed(0)
    return STViTDeiT(**{**PLAIN, **kwargs}).eval()


@pytest.mark.golden
@torch.inference_mode()
def test_golden(record_property):
    case = GoldenCase("stvit-r", "swin_small")
    model = timm.create_model("stvit_r_swin_small").eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    last, maps = model.forward_intermediates(x)
    stages = model.stages
    # the authors' stages end with the patch merging that begins ours, and hold tokens
    ends = [stages[i + 1].downsample(y.permute(0, 2, 3, 1)) for i, y in enumerate(maps[:-1])]
    found = {f"stage{i + 1}": y for i, y in enumerate([*ends, maps[-1].permute(0, 2, 3, 1)])}
    found["semantic4"] = stages[2].blocks[0].semantic_tokens(ends[1].permute(0, 3, 1, 2))[1]
    for name, y in found.items():
        flat = y.flatten()
        case.compare(f"{name}.slice", flat[:: max(1, flat.numel() // 256)][:256])
        case.compare(f"{name}.stat", torch.stack([flat.mean(), flat.std(), flat.abs().max()]))
    case.compare("logits", model.forward_head(last))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_and_multiply_accumulates(variant):
    params, macs = COUNTS[variant]
    model = timm.create_model(variant, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    # keys and values of 232 tokens a unit, where the authors' code computes 436
    dim = 4 * VARIANTS[variant]["embed_dim"]
    shared = 3 * (436 - 232) * 2 * dim**2 / 1e9
    found = count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) / 1e9
    assert found + shared == pytest.approx(macs, rel=0.001)


@pytest.mark.parametrize("variant", DEIT)
def test_plain_form_is_deit_with_fewer_multiply_accumulates(variant):
    name, dim = DEIT[variant]
    ours, deit = (timm.create_model(n, device="meta").eval() for n in (variant, name))
    params = [sum(p.numel() for p in model.parameters()) for model in (ours, deit)]
    assert params[0] == params[1] - 2 * dim + 16 * dim
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert 0.55 < 1 - count_macs(ours, x) / count_macs(deit, x) < 0.60


def test_stages_have_the_logged_parameters():
    blocks, merging = (0.225, 0.892, 31.958, 14.184), (None, 0.074496, 0.296, 1.183)  # millions, from the authors' logs
    for stage, own, before in zip(
        timm.create_model("stvit_r_swin_small", device="meta").stages, blocks, merging, strict=True
    ):
        assert round(sum(p.numel() for p in stage.blocks.parameters()) / 1e6, 3) == own
        if before is not None:
            assert sum(p.numel() for p in stage.downsample.parameters()) / 1e6 == pytest.approx(before, abs=5e-4)


def as_the_authors(model):
    """A state dict of ours under the authors' names, with the constants that their checkpoints hold."""
    parts, out = ("swin", "generate", "gather", "within", "among", "recover"), {}
    for name, value in model.state_dict().items():
        words = name.split(".")
        if words[0] == "stem":
            words = ["patch_embed", "proj", words[1], {"conv": "c", "norm": "bn"}[words[2]], *words[3:]]
        elif words[0] == "stages" and words[2] == "downsample":
            words = ["layers", str(int(words[1]) - 1), *words[2:]]
        elif words[0] == "stages" and words[1] == "2":
            words = ["layers", "2", "blocks", str(6 * int(words[3]) + parts.index(words[4])), *words[5:]]
        elif words[0] == "stages":
            words[0] = "layers"
        elif words[:2] == ["head", "fc"]:
            words = ["head", words[2]]
        theirs = ".".join(words).replace("ls1.gamma", "layer_scale_1").replace("ls2.gamma", "layer_scale_2")
        if ".attn.v." in theirs:
            continue
        if ".attn.k." in theirs:
            theirs, value = (
                theirs.replace(".k.", ".kv."),
                torch.cat([value, model.state_dict()[name.replace(".k.", ".v.")]]),
            )
        if theirs.endswith("bias_table"):
            out[theirs.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
        out[theirs] = value
    out["layers.1.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
    return out


@torch.no_grad()
def test_takes_the_authors_checkpoints():
    model = tiny()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = as_the_authors(model)
    golden = set(GoldenCase("stvit-r", "swin_small").state_dict())
    assert {name for name in theirs if not name.endswith(("index", "attn_mask", "num_batches_tracked"))} <= golden
    x = torch.randn(1, 3, 64, 64)
    for wrapped in (theirs, {"model": {f"module.{k}": v for k, v in theirs.items()}, "epoch": 3}):
        other = tiny()
        other.load_state_dict(checkpoint_filter_fn(wrapped, other))
        torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))  # our own names stay
    headless = tiny(num_classes=0)
    headless.load_state_dict(checkpoint_filter_fn(theirs, headless))


def test_names_the_variant_of_another_checkpoint():
    with torch.device("meta"):
        theirs = as_the_authors(STViTR(**VARIANTS["stvit_r_swin_base"]))
    with pytest.raises(ValueError, match=r"another model's.*timm.create_model\('stvit_r_swin_base'\)"):
        checkpoint_filter_fn(theirs, timm.create_model("stvit_r_swin_small", device="meta"))
    with pytest.raises(ValueError, match=r"unknown \(stages.2.semantic_token2"):  # no released model has them
        checkpoint_filter_fn({**as_the_authors(tiny()), "layers.2.semantic_token2": torch.zeros(1, 36, 32)}, tiny())
    small = timm.create_model("stvit_deit_small", device="meta")
    with pytest.raises(ValueError, match=r"another model's.*timm.create_model\('stvit_deit_tiny'\)"):
        deit_filter(timm.create_model("stvit_deit_tiny", device="meta").state_dict(), small)


@torch.no_grad()
def test_plain_form_loads_its_own_files():
    model, other, x = plain(), plain(), torch.randn(1, 3, 64, 64)
    for parameter in model.parameters():
        parameter.add_(0.1)
    other.load_state_dict(deit_filter({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, other))
    torch.testing.assert_close(other(x), model(x))


def test_settings_reach_the_blocks():
    model = tiny(
        drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.1, drop_rate=0.4, window=5, samples=2, margin=1,
        shortcut=True, conv_pos=True, mlp_ratio=2.0, layer_scale=0.5,
    )  # fmt: skip
    swin = [m for m in model.modules() if isinstance(m, SwinBlock)]
    assert [(m.window, m.shift) for m in swin] == [(5, 0), (5, 0), (5, 2), (5, 0), (5, 0), (5, 0)]
    made = [m for m in model.modules() if isinstance(m, SemanticTokens)]
    assert {(m.window, m.samples, m.margin, m.shortcut, m.conv_pos is not None) for m in made} == {
        (5, 2, 1, True, True)
    }
    assert made[0].ls1.gamma.eq(0.5).all() and made[0].mlp.fc1.out_features == 64
    units = [m for m in model.modules() if isinstance(m, SemanticTokenMixer)]
    assert units[-1].recover.drop_path.drop_prob == pytest.approx(0.3 * 14 / 15)
    assert model.head.drop.p == 0.4 and swin[0].attn.attn_drop.p == 0.1 and swin[0].mlp.drop2.p == 0.2
    assert all(name.endswith("bias_table") for name in model.no_weight_decay()) and len(model.no_weight_decay()) == 6
    assert plain().no_weight_decay() <= {name for name, _ in plain().named_parameters()}


@torch.no_grad()
def test_few_tokens_are_left():
    model, x = plain(num_semantic_tokens=9), torch.randn(2, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 8, 8), (24, 3, 3), (24, 3, 3)]
    # what the last stage hands on does not depend on the order of the tokens it gets
    order = torch.randperm(9)
    moved = model.stages[2](maps[1].flatten(2)[:, :, order].unflatten(2, (3, 3)))
    torch.testing.assert_close(moved.flatten(2), maps[2].flatten(2)[:, :, order])


@torch.no_grad()
def test_tokens_can_be_drawn():
    model, x = tiny(), torch.randn(1, 3, 64, 96)
    found = token_maps(model, x)
    assert [name for name, _ in found] == ["stages.2.blocks.0.generate", "stages.2.blocks.1.generate"]
    assert found[0][1]["semantic"].shape == (1, 4, 6)
    assert token_maps(plain(), torch.randn(1, 3, 64, 64))[0][1]["semantic"].shape == (1, 8, 8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    assert draw_tokens(model, image, what="semantic", layer=0, size=(96, 64)).size == (64, 96)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(depths=(1, 1, 8, 1)), "must be a multiple of 6, got 8; take 6"),
        (lambda: tiny(depths=(1, 1, 6)), r"four positive entries, got \(1, 1, 6\)"),
        (lambda: tiny(num_heads=(1, 2, 3, 4)), "num_heads must divide dim=32, got num_heads=3"),
        (lambda: tiny(embed_dim=9), "embed_dim must be even"),
        (lambda: tiny(samples=8), "samples must be from 1 to the window's side of 7"),
        (lambda: tiny()(torch.zeros(1, 3, 16, 64)), "at least 32 pixels"),
        (lambda: plain(num_semantic_tokens=15), r"must be a square of at most .* 8\^2 = 64, got 15; take 9"),
        (lambda: plain(num_semantic_tokens=81), r"8\^2 = 64, got 81; take 64"),
        (lambda: plain(num_semantic_tokens=0), "got 0; take 1"),
        (lambda: plain(img_size=60), "multiples of patch_size=8, got img_size 60x60"),
        (lambda: plain(depth=3), "at least full_depth \\+ 3, got depth=3 and full_depth=1"),
        (lambda: plain(num_heads=5), "num_heads must divide dim=24"),
        (lambda: plain()(torch.zeros(1, 3, 32, 32)), "made for images of 64x64 pixels, got 32x32"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
