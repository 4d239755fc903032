"""SG-Former: golden case, counts, checkpoints, positions, settings, drawing, bad input."""

import math

import pytest
import timm
import torch
from PIL import Image

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import HybridScaleAttention, LocalTermAttention, SelfGuidedAttention
from tokenry.vision import draw_tokens, token_maps
from tokenry.vision.sg_former import VARIANTS, SGFormer, checkpoint_filter_fn

pytestmark = pytest.mark.method("sg-former")

TINY = {"depths": (2, 4, 2, 1), "dims": (8, 8, 16, 24), "num_heads": (2, 2, 4, 3), "pos_size": 16, "num_classes": 5}
COUNTS = {  # parameters, and billions of multiply-accumulates at 224 pixels
    "sgformer_s": (22_545_981, 4.78),
    "sgformer_m": (38_689_316, 7.43),
    "sgformer_b": (77_950_293, 15.54),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return SGFormer(**{**TINY, **kwargs}).eval()


@pytest.mark.golden
@torch.inference_mode()
def test_golden():
    case = GoldenCase("sg-former", "s_224_float64")
    model = timm.create_model("sgformer_s").eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    model = model.double()  # in float32 rounding decides which tokens change places
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"].double()
    found = {}

    def keep(name):
        return lambda block, given, state: found.update({name: state[1]})

    for i in range(3):
        model.stages[i].blocks[0].register_forward_hook(keep(f"significance{i + 1}"))
    last, maps = model.forward_intermediates(x, norm=True)
    found |= {f"stage{i + 1}": y.permute(0, 2, 3, 1) for i, y in enumerate(maps)}
    for name, value in found.items():
        case.compare_sample(name, value)
    case.compare("logits", model.forward_head(last))
    assert {name.split(".")[0] for name in case.outputs} == {"logits", *found}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_and_multiply_accumulates(variant):
    params, macs = COUNTS[variant]
    model = timm.create_model(variant, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) / 1e9 == pytest.approx(macs, abs=0.005)


def as_the_authors(model):
    """A state dict of ours under the authors' names."""
    out = {}
    last = len(model.stages)
    for name, value in model.state_dict().items():
        stage = int(name.split(".")[1]) + 1 if name.startswith("stages.") else last
        rest = name.split(".", 2)[2] if name.startswith("stages.") else name
        kind = name.rsplit(".", 1)[-1]
        if name.startswith("stem."):
            name = rest.removeprefix("stem.")
            if name == "pos_embed":
                value = value.flatten(1, 2)
            else:
                name = "patch_embed1." + name.replace("convs.", "conv.").replace(".conv.weight", ".c.weight")
                name = name.replace(".norm.", ".bn.") if ".conv." in name else name
        elif name.startswith("head."):
            name = f"head.{kind}"
        elif rest.startswith("norm."):
            name = f"norm{stage}.{kind}"
        elif rest.startswith("downsample."):
            name = rest.replace("downsample", f"patch_embed{stage}").replace(".conv.", ".c.").replace(".norm.", ".bn.")
        else:
            name = rest.replace("blocks", f"block{stage}").replace("token_mixer", "attn")
            name = name.replace(".reduce.", ".sr.").replace(".mlp.pos.proj.", ".mlp.dwconv.dwconv.")
            for i in range(3):
                name = name.replace(f".f.{i}.", f".f{i + 1}.")
        if name.endswith(f"q_global.{kind}"):
            out[name.replace("q_global", "q1")] = value
        elif name.endswith(f"kv_global.{kind}"):
            out[name.replace("kv_global", "kv1")] = value
        elif name.endswith(f"qkv_local.{kind}"):
            third = len(value) // 3
            out |= {name.replace("qkv_local", "q2"): value[:third], name.replace("qkv_local", "kv2"): value[third:]}
        elif ".attn.kv." in name and stage < last:  # self-guided
            k1, k2, v1, v2 = value.chunk(4)
            out |= {name.replace("kv", "kv1"): torch.cat([k1, v1]), name.replace("kv", "kv2"): torch.cat([k2, v2])}
        else:
            out[name] = value
    return out


@torch.no_grad()
def test_takes_the_authors_checkpoints():
    released = timm.create_model("sgformer_s", device="meta")
    theirs = as_the_authors(released)
    assert {k: list(v.shape) for k, v in theirs.items()} == {
        k: shape for k, (shape, _) in GoldenCase("sg-former", "s_224_float64").spec["filled"].items()
    }
    model = tiny()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs, x = as_the_authors(model), torch.randn(1, 3, 64, 64)
    for wrapped in (theirs, {"model": {f"module.{k}": v for k, v in theirs.items()}, "epoch": 3}):
        other = tiny()
        other.load_state_dict(checkpoint_filter_fn(wrapped, other))
        torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))  # our own names stay
    headless = tiny(num_classes=0)
    headless.load_state_dict(checkpoint_filter_fn(theirs, headless))
    larger = tiny(pos_size=24)
    larger.load_state_dict(checkpoint_filter_fn(theirs, larger))  # positions are resized
    assert larger.stem.pos_embed.shape == (1, 24, 24, 8)


def test_names_the_variant_of_another_checkpoint():
    theirs = as_the_authors(timm.create_model("sgformer_b", device="meta"))
    with pytest.raises(ValueError, match=r"another model's.*timm.create_model\('sgformer_b'\)"):
        checkpoint_filter_fn(theirs, timm.create_model("sgformer_s", device="meta"))
    assert set(VARIANTS) == set(COUNTS)
    broken = {name: value for name, value in as_the_authors(tiny()).items() if not name.endswith("kv1.weight")}
    broken["pos_embed"] = torch.zeros(1, 197, 8)
    with pytest.raises(ValueError, match="another model's"):
        checkpoint_filter_fn(broken, tiny())


@torch.no_grad()
def test_positions_are_maes_table():
    model = tiny(dims=(16, 8, 16, 24))
    table = model.stem.pos_embed[0]
    for row, column in ((0, 0), (3, 11), (15, 2)):
        waves = [column / 10000 ** (k / 4) for k in range(4)], [row / 10000 ** (k / 4) for k in range(4)]
        expected = [f(angle) for angles in waves for f in (math.sin, math.cos) for angle in angles]
        torch.testing.assert_close(table[row, column], torch.tensor(expected))
    model.stem.pos_embed.zero_()
    without = model(torch.ones(1, 3, 96, 80))
    model.stem.pos_embed.fill_(0.5)  # a flat table stays flat when it is resized
    y = model.stem(torch.ones(1, 3, 96, 80))
    model.stem.pos_embed.zero_()
    torch.testing.assert_close(y, model.stem(torch.ones(1, 3, 96, 80)) + 0.5)
    assert without.isfinite().all() and model.no_weight_decay() == {"stem.pos_embed"}


def test_settings_reach_the_blocks():
    groups = ((8, 4, 2), (2, 1), (3,), None)
    model = tiny(
        window_size=4, group_sizes=groups, mlp_ratio=2.0, proj_drop_rate=0.2, drop_path_rate=0.4, drop_rate=0.3
    )
    blocks = [block for stage in model.stages for block in stage.blocks]
    kinds = [type(block.token_mixer) for block in blocks]
    assert kinds == [HybridScaleAttention, SelfGuidedAttention] * 4 + [LocalTermAttention]
    assert [m.sr_ratio for m in model.modules() if isinstance(m, HybridScaleAttention)] == [8, 4, 4, 2]
    assert {m.window_size for m in model.modules() if isinstance(m, HybridScaleAttention)} == {4}
    guided = [m.group_sizes for m in model.modules() if isinstance(m, SelfGuidedAttention)]
    assert guided == [groups[0], groups[1], groups[1], groups[2]]
    assert all(block.mlp.fc1.out_features == 2 * block.mlp.fc1.in_features for block in blocks)
    assert {block.token_mixer.proj_drop.p for block in blocks} == {0.2} and model.head.drop.p == 0.3
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.05 * n for n in range(9)])


def test_first_weights():
    model = SGFormer((2, 2, 2, 1), (64, 64, 64, 64), (2, 2, 2, 2))
    block = model.stages[0].blocks[1]
    assert block.token_mixer.q.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.token_mixer.lepe_conv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert block.mlp.pos.proj.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert model.stem.convs[2].conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)
    assert model.stages[1].downsample.conv2.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.2)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("lepe_linear.bias"))


@torch.no_grad()
def test_the_map_goes_from_block_to_block():
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    stage, maps = model.stages[1], []
    for block in stage.blocks:
        block.register_forward_hook(lambda block, given, state: maps.append((given[0][1], state[1])))
    model(x)
    assert [tuple(s is not None for s in pair) for pair in maps] == [(False, True), (True, False)] * 2
    assert maps[0][1] is maps[1][0] and not torch.equal(maps[0][1], maps[2][1])
    with pytest.raises(ValueError, match="significance of every token"):
        stage.blocks[1]((torch.zeros(1, 4, 4, 8), None))


@torch.no_grad()
def test_shows_its_tokens():
    model = tiny()
    found = token_maps(model, torch.randn(1, 3, 64, 64))
    assert [list(maps) for _, maps in found] == [["significance"], ["ranks"]] * 4
    assert found[0][1]["significance"].shape == (1, 16, 16) and found[1][1]["ranks"].unique().tolist() == [0, 1, 2]
    photograph = Image.effect_noise((90, 60), 50).convert("RGB")
    heat = draw_tokens(model, photograph, what="significance", layer=0, size=64)
    areas = draw_tokens(model, photograph, what="ranks", layer=0, size=(64, 96))
    assert heat.size == (64, 64) and areas.size == (96, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2, 3, 2, 1)}, "depth of stage 1 must be even, got 3; use 4"),
        ({"num_heads": (1, 2, 4, 3)}, "must be even and divide dim=8, got num_heads=1; use num_heads=2"),
        ({"dims": (8, 8, 16)}, "one entry per stage"),
        ({"group_sizes": ((4, 2),)}, "one entry per stage"),
        ({"dims": (6, 8, 16, 24)}, "a multiple of 4"),
        ({"sr_ratios": (8, 3, 2, 1)}, "give group_sizes"),
        ({"depths": (0, 2, 2, 1)}, "must be positive"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_rejects_images():
    with pytest.raises(ValueError, match="five dimensions"):
        tiny()(torch.zeros(1, 3, 4, 64, 64))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        tiny()(torch.zeros(1, 3, 64, 31))
