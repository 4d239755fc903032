"""MetaFormer baselines: mixers, StarReLU, head, IdentityFormer and RandFormer, against the authors' outputs."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from golden_case import GoldenCase
from tokenry.layers import MLPHead, SquaredReLU, StarReLU
from tokenry.layers.star_relu import UNIT_BIAS, UNIT_SCALE
from tokenry.mixers import (
    AttentionMixer,
    IdentityMixer,
    InLayout,
    PoolingMixer,
    RandomMixer,
    SepConvMixer,
    convert_layout,
    create_mixer,
)
from tokenry.vision import MetaFormerBlock, convert_in21k_head, load_checkpoint

pytestmark = pytest.mark.method("metaformer-baselines")


@pytest.mark.golden
def test_golden_activations():
    case = GoldenCase("metaformer-baselines", "starrelu")
    act = StarReLU()
    act.load_state_dict({k.removeprefix("act."): v for k, v in case.state_dict().items()})
    case.compare("star", act(case.inputs["x"]))
    case.compare("squared", SquaredReLU()(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("mixer_sepconv", SepConvMixer(12)),
        ("mixer_attention", AttentionMixer(48)),
        ("mixer_attention_96", AttentionMixer(96)),
        ("mixer_random", RandomMixer(8, num_tokens=15)),
        ("mixer_pooling", PoolingMixer(6)),
    ],
)
def test_golden_mixer(name, mixer):
    case = GoldenCase("metaformer-baselines", name)
    mixer.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    x = case.inputs["x"]  # (B, H, W, C)
    case.compare("y", InLayout(mixer, "NHWC")(x))
    nchw = InLayout(mixer, "NCHW")(x.permute(0, 3, 1, 2))
    case.compare("y", nchw.permute(0, 2, 3, 1))
    nlc = InLayout(mixer, "NLC", grid=tuple(x.shape[1:3]))(x.flatten(1, 2))
    case.compare("y", nlc.unflatten(1, x.shape[1:3]))


@pytest.mark.golden
def test_golden_head():
    case = GoldenCase("metaformer-baselines", "mlp_head")
    head = MLPHead(24, 10)
    head.load_state_dict(case.state_dict())
    case.compare("y", head(case.inputs["x"]))


@pytest.mark.golden
def test_golden_block():
    case = GoldenCase("metaformer-baselines", "block_scales")

    def norm(dim):
        return nn.LayerNorm(dim, eps=1e-6, bias=False)

    block = MetaFormerBlock(16, SepConvMixer(16), norm, StarReLU, False, layer_scale=1e-5, res_scale=1.0)
    block.load_state_dict({re.sub(r"(_scale\d)\.scale", r"\1", k): v for k, v in case.state_dict().items()})
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize(
    "name",
    ["identityformer_s12_64", "randformer_s12_224", "poolformerv2_s12_64", "convformer_s18_64", "caformer_s18_96x64"],
)
@torch.no_grad()
def test_golden_model(name):
    case = GoldenCase("metaformer-baselines", name)
    net = load_checkpoint(timm.create_model(name.rsplit("_", 1)[0]).eval(), case.state_dict())
    assert sum(p.numel() for p in net.parameters()) == case.spec["params"]
    case.compare("logits", net(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "mixers"),
    [("convformer_s18_64", "sep_conv"), ("caformer_s18_96x64", ("sep_conv", "sep_conv", "attention", "attention"))],
)
@torch.no_grad()
def test_golden_model_from_the_builder(name, mixers):
    from tokenry.vision import metaformer

    case = GoldenCase("metaformer-baselines", name)
    net = metaformer(mixers, (3, 3, 9, 3), head="mlp").eval()
    case.compare("logits", load_checkpoint(net, case.state_dict())(case.inputs["x"]))


S12, M = (11_891_712, 21_341_464, 30_791_216), (56_077_168, 73_346_056)
PARAMETERS = dict(zip(["s12", "s24", "s36", "m36", "m48"], S12 + M, strict=True))
FROZEN = dict(zip(["s12", "s24", "s36", "m36", "m48"], (235_298, 470_596, 705_894, 705_894, 941_192), strict=True))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    identity = timm.create_model(f"identityformer_{size}", device="meta")
    assert sum(p.numel() for p in identity.parameters()) == PARAMETERS[size]
    rand = timm.create_model(f"randformer_{size}", device="meta")
    assert sum(p.numel() for p in rand.parameters()) == PARAMETERS[size] + FROZEN[size]
    assert sum(p.numel() for p in rand.parameters() if not p.requires_grad) == FROZEN[size]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(-2, 2), st.floats(-2, 2))
def test_star_relu_is_its_equation(numbers, scale, bias):
    x = torch.tensor(numbers, dtype=torch.float64)
    expected = [scale * max(v, 0.0) ** 2 + bias for v in numbers]
    act = StarReLU(scale, bias, dtype=torch.float64)
    torch.testing.assert_close(act(x), torch.tensor(expected, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(act(x), torch.tensor(expected, dtype=torch.float64))


def test_star_relu_gradients():
    act = StarReLU(0.7, -0.2, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def call(x, scale, bias):
        return torch.func.functional_call(act, {"scale": scale, "bias": bias}, (x,))

    inputs = (x, act.scale.detach().requires_grad_(), act.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_star_relu_has_unit_variance_on_normal_numbers():
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    y = StarReLU(UNIT_SCALE, UNIT_BIAS, learnable=False)(x)
    assert abs(y.mean().item()) < 0.01
    assert abs(y.var().item() - 1) < 0.02


@given(h=st.integers(1, 5), w=st.integers(1, 5), c=st.integers(1, 6))
def test_random_mixing_is_linear_and_keeps_constants(h, w, c):
    generator = torch.Generator().manual_seed(h * 10 + w)
    mixer = RandomMixer(c, num_tokens=h * w, generator=generator)
    x, y = torch.randn(2, 1, h * w, c, generator=generator)
    slow = torch.stack([sum(mixer.random_matrix[m, n] * x[:, n] for n in range(h * w)) for m in range(h * w)], 1)
    torch.testing.assert_close(mixer(x), slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(x + 2 * y), mixer(x) + 2 * mixer(y), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixer(torch.ones(1, h * w, c)), torch.ones(1, h * w, c))


def test_random_matrices_are_saved_but_never_trained():
    net = timm.create_model("randformer_s12", img_size=64, num_classes=3)
    name = "stages.2.blocks.0.token_mixer.random_matrix"
    assert net.state_dict()[name].shape == (16, 16)
    net(torch.randn(1, 3, 64, 64)).sum().backward()
    assert net.get_parameter(name).grad is None
    assert {name, "stages.0.blocks.0.mlp.act.scale", "stages.2.blocks.0.res_scale1"} <= net.no_weight_decay()


@torch.no_grad()
def test_attention_is_its_equation():
    mixer, x = AttentionMixer(48, head_dim=16), torch.randn(2, 7, 48)
    q, k, v = mixer.qkv(x).view(2, 7, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT) / 4).softmax(-1) @ v
    torch.testing.assert_close(mixer(x), mixer.proj(expected.transpose(1, 2).reshape(2, 7, 48)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sep_conv_is_its_equation():
    mixer, x = SepConvMixer(4, kernel_size=3), torch.randn(1, 4, 5, 4)
    hidden = mixer.act1(x @ mixer.pwconv1.weight.T)
    padded = nn.functional.pad(hidden, (0, 0, 1, 1, 1, 1))
    mixed = sum(padded[:, i : i + 4, j : j + 5] * mixer.dwconv.weight[:, 0, i, j] for i in range(3) for j in range(3))
    torch.testing.assert_close(mixer(x), mixed @ mixer.pwconv2.weight.T, rtol=1e-4, atol=1e-5)


def test_identity_returns_what_it_gets():
    x = torch.randn(1, 2, 3, 4)
    assert IdentityMixer(4)(x) is x


def test_21k_head_becomes_1k():
    bias = torch.arange(21841.0)
    converted = convert_in21k_head(
        {"head.fc2.bias": bias, "head.fc2.weight": bias[:, None].expand(-1, 2), "norm.weight": bias[:5]}
    )
    assert converted["norm.weight"].shape == (5,)
    assert converted["head.fc2.weight"].shape == (1000, 2)
    assert converted["head.fc2.bias"][850] == bias.mean()
    assert converted["head.fc2.bias"].unique().numel() >= 998  # two pairs of 1k classes share a 21k class
    with pytest.raises(ValueError, match="not an ImageNet-21k checkpoint"):
        convert_in21k_head({"head.fc2.bias": bias[:1000]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("randformer_s12", img_size=64)(torch.zeros(1, 3, 96, 96)), "made for 16 tokens"),
        (lambda: SepConvMixer(8, kernel_size=4), "odd and positive"),
        (lambda: AttentionMixer(8, head_dim=0), "at least 1"),
        (lambda: RandomMixer(8, num_tokens=0), "at least 1"),
        (lambda: load_checkpoint(timm.create_model("identityformer_s12", num_classes=10, device="meta"), GoldenCase("metaformer-baselines", "identityformer_s12_64").state_dict()), "another number of classes"),
        (lambda: load_checkpoint(timm.create_model("identityformer_s12", device="meta"), GoldenCase("metaformer-baselines", "mlp_head").state_dict()), "of another model"),
        (lambda: load_checkpoint(nn.Linear(1, 1), "nowhere.pth"), "no checkpoint at"),
        (lambda: convert_layout(torch.zeros(1, 6, 2), "NLC", "NCHW"), "no square"),
        (lambda: convert_layout(torch.zeros(1, 6, 2), "NLC", "NHWC", (2, 2)), "the grid is 2x2"),
        (lambda: create_mixer("pool", 8, layout="CHW"), "CHW"),
    ],
)  # fmt: skip
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
