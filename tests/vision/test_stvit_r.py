"""STViT-R and its plain form: golden case, counts, checkpoints, settings, drawing, bad input."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from golden_case import GoldenCase
from tokenry.layers import SwinBlock
from tokenry.measure import count_macs
from tokenry.mixers import DenseSemanticTokenMixer, SemanticTokenMixer, SemanticTokens
from tokenry.vision import draw_tokens, token_maps
from tokenry.vision.stvit_deit import STViTDeiT
from tokenry.vision.stvit_deit import checkpoint_filter_fn as deit_filter
from tokenry.vision.stvit_r import VARIANTS, STViTR, SwinStage, checkpoint_filter_fn

pytestmark = pytest.mark.method("stvit-r")

TINY = {"depths": (1, 2, 12, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "num_classes": 5}
DENSE = {**TINY, "depths": (1, 2, 6, 1), "surroundings": (14, 21, 27), "feature_norms": True, "num_classes": 0}
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


def dense(**kwargs):
    torch.manual_seed(0)
    return STViTR(**{**DENSE, **kwargs}).eval()


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
        compare_some(case, name, y)
    case.compare("logits", model.forward_head(last))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


def compare_some(case, name, y):
    flat = y.flatten()
    case.compare(f"{name}.slice", flat[:: max(1, flat.numel() // 256)][:256])
    case.compare(f"{name}.stat", torch.stack([flat.mean(), flat.std(), flat.abs().max()]))


@pytest.mark.golden
@torch.inference_mode()
def test_golden_dense(record_property):
    case = GoldenCase("stvit-r", "dense_backbone")
    arguments = {**DENSE, "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
    net = timm.create_model("stvit_r_swin_small_dense", features_only=True, **arguments).eval()
    net.model.load_state_dict(checkpoint_filter_fn(case.state_dict(), net.model))
    assert sum(p.numel() for p in net.parameters()) == case.spec["params"]
    for i, y in enumerate(net(case.inputs["x"])):
        compare_some(case, f"map{i}", y)
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


@pytest.mark.parametrize("variant", COUNTS)
def test_dense_form_has_the_classifiers_weights_and_four_norms(variant):
    model = timm.create_model(f"{variant}_dense", device="meta").eval()
    dim = VARIANTS[variant]["embed_dim"]
    head, closing, norms = 8 * dim * 1000 + 1000, 2 * 8 * dim, 2 * dim * (1 + 2 + 4 + 8)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[variant][0] - head - closing + norms


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
    assert all(type(unit) is SemanticTokenMixer for unit in units)
    found = dense(window=5, samples=2, surroundings=(6, 7, 8), layer_scale=0.5, drop_path_rate=0.3).stages[2].blocks
    assert all(type(unit) is DenseSemanticTokenMixer and unit.window == 5 and unit.samples == 2 for unit in found)
    blocks = (found[0].generate, found[0].gather, found[0].recover)
    assert [(b.window, b.key_window, b.surroundings) for b in blocks] == [(2, 5, 6), (2, 5, 7), (5, 2, 8)]
    assert found[0].within.ls1.gamma.eq(0.5).all() and blocks[2].drop_path.drop_prob == pytest.approx(0.3 * 8 / 9)
    assert all(name.endswith("bias_table") for name in model.no_weight_decay()) and len(model.no_weight_decay()) == 6
    assert plain().no_weight_decay() <= {name for name, _ in plain().named_parameters()}


@torch.no_grad()
def test_dense_form_takes_checkpoints_of_classifiers_and_of_detectors():
    classifier = tiny(depths=(1, 2, 6, 1))
    for parameter in classifier.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs, model = as_the_authors(classifier), dense()
    model.load_state_dict(checkpoint_filter_fn(theirs, model))
    for name, value in classifier.state_dict().items():
        if not name.startswith(("head.", "norm.")):
            assert torch.equal(model.state_dict()[name], value), name
    assert all((norm.weight == 1).all() for norm in model.feature_norms)  # new, as the authors have it
    # a detector's: norms of its own, the backbone beside other parts
    detector = {f"backbone.{k}": v for k, v in theirs.items() if not k.startswith(("head.", "norm."))}
    detector |= {f"backbone.norm{i}.{k}": torch.full((8 << i,), 2.0) for i in range(4) for k in ("weight", "bias")}
    other = dense()
    other.load_state_dict(
        checkpoint_filter_fn({"state_dict": detector | {"neck.lateral_convs.0.conv.bias": torch.zeros(3)}}, other)
    )
    assert (other.feature_norms[3].bias == 2).all() and torch.equal(
        other.stem[0].conv.weight, classifier.stem[0].conv.weight
    )
    again = dense()
    again.load_state_dict(checkpoint_filter_fn(other.state_dict(), again))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"unknown \(feature_norms"):
        checkpoint_filter_fn(detector, tiny(depths=(1, 2, 6, 1)))


def test_a_file_loads_into_the_dense_form_through_timm(tmp_path):
    classifier = tiny(depths=(1, 2, 6, 1))
    torch.save({"model": as_the_authors(classifier)}, tmp_path / "classifier.pth")
    net = timm.create_model(
        "stvit_r_swin_base_dense", pretrained=True, features_only=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "classifier.pth")}, **DENSE,
    )  # fmt: skip
    assert torch.equal(
        net.model.stages[2].blocks[0].gather.attn.v.weight, classifier.stages[2].blocks[0].gather.attn.v.weight
    )


@pytest.mark.parametrize("size", [(32, 32), (100, 135), (224, 224), (64, 480)])
@torch.no_grad()
def test_dense_form_gives_four_normed_maps_of_any_size(size):
    net = timm.create_model("stvit_r_swin_small_dense", features_only=True, **DENSE).eval()
    assert net.feature_info.channels() == [8, 16, 32, 64] and net.feature_info.reduction() == [4, 8, 16, 32]
    x = torch.randn(2, 3, *size)
    maps = net(x)
    assert [m.shape[2:] for m in maps] == [tuple(-(-side // r) for side in size) for r in (4, 8, 16, 32)]
    plain_maps = net.model.forward_intermediates(x, intermediates_only=True)
    for norm, normed, found in zip(net.model.feature_norms, maps, plain_maps, strict=True):
        torch.testing.assert_close(normed, norm(found))
    for one, both in zip(net(x[1:]), maps, strict=True):
        torch.testing.assert_close(one, both[1:], rtol=1e-4, atol=1e-5)
    some = timm.create_model("stvit_r_swin_small_dense", features_only=True, out_indices=(0, 2), **DENSE)
    assert len(some.model.feature_norms) == len(some.model.stages) == 3


@pytest.mark.parametrize("size", [(224, 224), (100, 160)])
@torch.no_grad()
def test_both_forms_agree_where_semantic_tokens_have_no_say(size):
    classifier, model = tiny(depths=(1, 2, 6, 1)), dense()
    model.load_state_dict(checkpoint_filter_fn(classifier.state_dict(), model))
    x = torch.randn(1, 3, *size)
    for silent in (False, True):
        for name, parameter in [*classifier.named_parameters(), *model.named_parameters()]:
            if name.endswith("gamma"):
                parameter.fill_(0.0 if silent else 0.5)
        pairs = zip(
            *(net.forward_intermediates(x, intermediates_only=True) for net in (classifier, model)), strict=True
        )
        same = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs]
        assert same == [True, True, silent, silent]


@torch.no_grad()
def test_dense_form_is_cheaper_than_swin_where_detectors_work():
    x = torch.zeros(1, 3, 800, 1216, device="meta")
    semantic, swin = (timm.create_model("stvit_r_swin_small_dense", device="meta").eval() for _ in range(2))
    blocks = [SwinBlock(384, 12, shift=3 * (i % 2), device="meta") for i in range(18)]
    swin.stages[2] = SwinStage(swin.stages[2].downsample, blocks)
    assert count_macs(semantic, x) < count_macs(swin, x)


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
        (lambda: dense(margin=2), "settings of the classifier's third stage"),
        (lambda: dense(conv_pos=True), "leave them out with surroundings"),
        (lambda: dense(surroundings=(14, 21)), "sides of three windows"),
        (lambda: dense(num_classes=5), "give num_classes=0 with it, or feature_norms=False to classify"),
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
