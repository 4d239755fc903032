"""T2T-ViT: golden cases, the tokenizer, positions, counts, checkpoints, bad input."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from golden_case import GoldenCase, golden_cases
from tokenry.measure import count_macs
from tokenry.vision import T2TPerformer, T2TTransformer, T2TViT, TokensToToken, token_maps
from tokenry.vision.t2t_vit import VARIANTS, checkpoint_filter_fn, rename, sinusoid_table
from tokenry.vision.tokens_to_token import soft_split

pytestmark = pytest.mark.method("t2t-vit")

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "token_dim": 8, "num_classes": 5}
MODELS = {
    "t2t_vit_7_64": ("t2t_vit_7", {"img_size": 64}),
    "t2t_vit_12_224": ("t2t_vit_12", {}),
    "t2t_vit_14_64_released_scale": ("t2t_vit_14", {"img_size": 64, "qk_scale": 384**-0.5}),
    "t2t_vit_t_14_96": ("t2t_vit_t_14", {"img_size": 96}),
}
BLOCKS = {"token_performer": T2TPerformer, "token_transformer": T2TTransformer}
# params, trainable params
COUNTS = {
    "t2t_vit_7": (4_310_222, 4_255_694),
    "t2t_vit_10": (5_889_230, None),
    "t2t_vit_12": (6_941_902, None),
    "t2t_vit_14": (21_545_550, 21_465_806),
    "t2t_vit_19": (39_177_422, None),
    "t2t_vit_24": (64_105_934, None),
    "t2t_vit_t_14": (21_541_070, None),
    "t2t_vit_t_19": (39_172_942, None),
    "t2t_vit_t_24": (64_101_454, None),
    "t2t_vit_14_resnext": (21_545_550, None),
    "t2t_vit_14_wide": (25_156_302, None),
}


def load_part(part, state_dict, theirs, ours):
    """A part of the authors' network, through the renaming of whole checkpoints."""
    renamed = rename({theirs + name: value for name, value in state_dict.items()})
    part.load_state_dict({name.removeprefix(ours): value for name, value in renamed.items()})
    return part.eval()


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_golden_models(name):
    case = GoldenCase("t2t-vit", name)
    variant, arguments = MODELS[name]
    model = timm.create_model(variant, **arguments).eval()
    wrapped = {"state_dict_ema": {f"module.{k}": v for k, v in case.state_dict().items()}, "state_dict": {}}
    model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    case.compare("logits", model(case.inputs["x"]))
    if "macs" in case.spec:
        assert count_macs(model, case.inputs["x"]) == case.spec["macs"]


@pytest.mark.golden
@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_golden_blocks(name):
    case = GoldenCase("t2t-vit", name)
    block = BLOCKS[name](27, 16)
    load_part(block, case.state_dict(), "tokens_to_token.attention1.", "patch_embed.transformers.0.")
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["performer", "transformer"])
@torch.inference_mode()
def test_golden_tokenizers(kind):
    case = GoldenCase("t2t-vit", f"t2t_module_{kind}")
    tokens = TokensToToken(embed_dim=24, token_dim=8, kind=kind)
    load_part(tokens, case.state_dict(), "tokens_to_token.", "patch_embed.")
    assert sum(p.numel() for p in tokens.parameters()) == case.spec["params"]
    case.compare("y", tokens(case.inputs["x"]))


@pytest.mark.golden
def test_golden_positions():
    case = GoldenCase("t2t-vit", "sinusoid")
    case.compare("n5_d16", sinusoid_table(5, 16))
    case.compare("n10_d6", sinusoid_table(10, 6))
    assert set(golden_cases("t2t-vit")) == {
        "sinusoid", "t2t_module_performer", "t2t_module_transformer", *BLOCKS, *MODELS,
    }  # fmt: skip


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    params, trainable = COUNTS[variant]
    model = timm.create_model(variant, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    performer = VARIANTS[variant]["kind"] == "performer"
    assert frozen.keys() == {"pos_embed"} | {f"patch_embed.transformers.{i}.mixer.w" for i in (0, 1) if performer}
    assert trainable in (None, params - sum(frozen.values()))
    assert set(COUNTS) == set(VARIANTS)


def test_parameters_at_384():
    assert (
        sum(p.numel() for p in timm.create_model("t2t_vit_14", img_size=384, device="meta").parameters()) == 21_691_470
    )


def test_multiply_accumulates():
    assert count_macs(timm.create_model("t2t_vit_7").eval(), torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(
        1.15, abs=0.005
    )


# the tokenizer


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 3), channels=st.integers(1, 3),
    split=st.sampled_from([(7, 4), (3, 2), (1, 1), (3, 1), (4, 2)]), last=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_soft_split_is_the_definition(rows, columns, channels, split, last, seed):
    kernel, stride = split
    x = torch.randn(2, channels, rows * stride, columns * stride, generator=torch.Generator().manual_seed(seed))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    tokens = soft_split(x, kernel, stride)
    assert tokens.shape == (2, rows * columns, channels * kernel**2)
    padding = (kernel - stride + 1) // 2
    for i in range(rows):
        for j in range(columns):
            expected = []
            for c in range(channels):
                for dy in range(kernel):
                    for dx in range(kernel):
                        y, z = i * stride + dy - padding, j * stride + dx - padding
                        inside = 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
                        expected.append(x[0, c, y, z].item() if inside else 0.0)
            assert tokens[0, i * columns + j].tolist() == expected


def test_splits_of_one_pixel_keep_the_map():
    x = torch.randn(2, 5, 4, 6)
    tokens = soft_split(x, 1, 1)
    assert torch.equal(F.fold(tokens.transpose(1, 2), (4, 6), 1), x)


def test_neighbouring_tokens_share_three_columns():
    x = torch.arange(24.0 * 24).view(1, 1, 24, 24) + 1
    windows = soft_split(x, 7, 4).view(6, 6, 7, 7)
    shared = set(windows[2, 2].flatten().tolist()) & set(windows[2, 3].flatten().tolist())
    assert len(shared) == 7 * 3
    assert torch.equal(windows[2, 2][:, 4:], windows[2, 3][:, :3])


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 32)])
@torch.no_grad()
def test_token_counts(kind, size):
    tokens = TokensToToken(kind=kind, embed_dim=24, token_dim=8).eval()
    seen = []
    for transformer in tokens.transformers:
        transformer.register_forward_hook(lambda module, given, y: seen.append((given[0].shape[1:], y.shape[1:])))
    height, width = size
    assert tokens(torch.zeros(1, 3, *size)).shape == (1, height * width // 256, 24)
    assert seen == [
        ((height * width // 16, 147), (height * width // 16, 8)),
        ((height * width // 64, 72), (height * width // 64, 8)),
    ]


def test_other_splits():
    tokens = TokensToToken(32, 4, embed_dim=24, token_dim=8, splits=((3, 2), (3, 2)), kind="transformer")
    assert (
        tokens(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 24) and tokens.num_patches == 64 and tokens.feat_ratio() == 4
    )


def test_transformer_is_the_definition():
    torch.manual_seed(0)
    block, x = T2TTransformer(27, 16).eval(), torch.randn(2, 12, 27)
    torch.nn.init.normal_(block.qkv.weight, std=0.5)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    weights = (q @ k.transpose(1, 2) / math.sqrt(27)).softmax(-1)  # the scale is the input's width
    z = v + block.proj(weights @ v)
    torch.testing.assert_close(block(x), z + block.mlp(block.norm2(z)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.token_maps(x)["attention"], weights.mean(1))


def test_performers_drop_tokens_in_training_whatever_the_other_rates():
    rates = [m.p for m in T2TViT(32, **TINY).patch_embed.modules() if isinstance(m, torch.nn.Dropout)]
    assert sorted(rates) == [0.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    assert {m.p for m in T2TViT(32, token_drop_rate=0.0, **TINY).modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in T2TViT(32, kind="transformer", **TINY).modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@torch.no_grad()
def test_in_the_place_of_timms_patch_embedding():
    def net(**kwargs):
        torch.manual_seed(0)
        return VisionTransformer(
            32, 16, embed_dim=24, depth=1, num_heads=2, num_classes=3, embed_layer=TokensToToken, **kwargs
        ).eval()

    fixed, free = net(), net(dynamic_img_size=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fixed(x), free(x))
    assert free(torch.randn(2, 3, 48, 64)).shape == (2, 3)
    fixed.set_input_size((48, 64))
    assert fixed(torch.randn(2, 3, 48, 64)).shape == (2, 3) and fixed.patch_embed.grid_size == (3, 4)
    assert fixed.feature_info[0]["reduction"] == 16


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_shows_the_attention_of_its_transformers(kind):
    net = T2TViT(32, kind=kind, **TINY)
    shown = token_maps(net, torch.randn(2, 3, 32, 32))
    assert [name for name, _ in shown] == ["patch_embed.transformers.0", "patch_embed.transformers.1"]
    maps = dict(shown)
    for i, tokens in enumerate((64, 16)):
        received = maps[f"patch_embed.transformers.{i}"]["attention"]
        assert received.shape == (2, tokens)
        torch.testing.assert_close(received.sum(1), torch.ones(2), rtol=0, atol=1e-4)


# positions and scale


def test_positions_are_the_formula_and_fixed():
    net = T2TViT(32, **TINY)
    for position in range(5):
        for j in range(24):
            angle = position / 10000 ** (2 * (j // 2) / 24)
            expected = math.sin(angle) if j % 2 == 0 else math.cos(angle)
            assert net.pos_embed[0, position, j].item() == pytest.approx(expected, abs=1e-6)
    assert net.no_weight_decay() >= {"pos_embed", "cls_token", "patch_embed.transformers.0.mixer.w"}
    net.train().pos_embed.requires_grad_(True)
    with pytest.warns(UserWarning, match="position table of T2T-ViT is being trained"):
        net(torch.zeros(1, 3, 32, 32))


def test_positions_are_resized_without_antialiasing_everywhere():
    torch.manual_seed(0)
    net = T2TViT(64, **TINY).eval()
    table = net.pos_embed.detach().clone()
    grid = table[:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (2, 3), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    expected = torch.cat([table[:, :1], grid], 1)
    loaded = checkpoint_filter_fn(net.state_dict(), T2TViT((32, 48), **TINY))["pos_embed"]
    torch.testing.assert_close(loaded, expected)
    x = torch.randn(1, 3, 32, 48)
    free = T2TViT(64, dynamic_img_size=True, **TINY).eval()
    free.load_state_dict(net.state_dict())
    net.set_input_size((32, 48))
    torch.testing.assert_close(net.pos_embed.detach(), expected)
    assert not net.pos_embed.requires_grad
    torch.testing.assert_close(free(x), net(x))


@torch.no_grad()
def test_scale_of_the_attention():
    torch.manual_seed(0)
    usual = T2TViT(32, **TINY).eval()
    for block in usual.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
    other = T2TViT(32, qk_scale=24**-0.5, **TINY).eval()
    other.load_state_dict(usual.state_dict())
    x = torch.randn(1, 3, 32, 32)
    fused = other(x)
    assert not torch.allclose(fused, usual(x), atol=1e-6)
    for block in other.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(other(x), fused, rtol=1e-4, atol=1e-5)
    for block in usual.blocks:
        block.attn.qkv.weight[:24] *= 24**-0.5 / 12**-0.5
    torch.testing.assert_close(usual(x), fused, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_grows_linearly():
    net = T2TViT(32, **{**TINY, "depth": 3}, drop_path_rate=0.2)
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in net.blocks] == pytest.approx([0.0, 0.1, 0.2])


# checkpoints


def test_loads_across_sizes_through_timm(tmp_path):
    torch.manual_seed(0)
    made = timm.create_model("t2t_vit_7", img_size=32)
    torch.save({"state_dict": made.state_dict()}, tmp_path / "weights.pth")
    loaded = timm.create_model(
        "t2t_vit_7",
        pretrained=True,
        img_size=48,
        num_classes=4,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
    )
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, made.blocks[0].attn.qkv.weight)
    assert loaded.pos_embed.shape == (1, 10, 256) and loaded.head.weight.shape == (4, 256)


def test_another_variants_checkpoint_is_named():
    state = timm.create_model("t2t_vit_t_14", device="meta").state_dict()
    with pytest.raises(ValueError, match=r"timm.create_model\('t2t_vit_t_14'\)"):
        checkpoint_filter_fn(state, timm.create_model("t2t_vit_7", img_size=64, device="meta"))


def test_positions_on_no_square_grid():
    state = T2TViT((32, 48), **TINY).state_dict()
    assert checkpoint_filter_fn(state, T2TViT((32, 48), **TINY))["pos_embed"] is state["pos_embed"]
    with pytest.raises(ValueError, match=r"positions for 6 tokens.*the model has 4; make the model with"):
        checkpoint_filter_fn(state, T2TViT(32, **TINY))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T2TViT(100, **TINY), "multiples of 16 .they need not be equal.*got 100x100; .* for example to 96x96"),
        (lambda: TokensToToken(embed_dim=8)(torch.zeros(1, 3, 33, 32)), "multiples of 16 .*got 33x32"),
        (lambda: T2TViT(32, **TINY)(torch.zeros(1, 3, 32, 64)), "made for images of 32x32 pixels, got 32x64.*img_size"),
        (lambda: T2TViT(32, **TINY)(torch.zeros(1, 1, 32, 32)), r"\(B, 3, H, W\), got .*in_chans"),
        (lambda: T2TViT(32, **{**TINY, "num_heads": 5}), "num_heads must divide dim=24"),
        (lambda: T2TViT(32, **{**TINY, "depth": 0}), "depth must be at least 1"),
        (lambda: TokensToToken(kind="linformer"), "'performer' or 'transformer', got 'linformer'"),
        (lambda: TokensToToken(splits=((7, 4),)), "two or more"),
        (lambda: TokensToToken(splits=((3, 4), (3, 2))), "kernel >= stride"),
        (lambda: TokensToToken(embed_dim=0), "embed_dim must be at least 1"),
        (lambda: TokensToToken(patch_size=8), "product of the strides, 16, got 8"),
        (lambda: TokensToToken(dynamic_img_pad=True), "pad the images before"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
