"""Multi-scale attention fusion: golden case, the equations by hand, resampling, bad input."""

import pytest
import torch
from torch import nn

from golden_case import GoldenCase
from tokenry.layers import CrossAttention
from tokenry.mixers.maf import GLD, MAFMixer

pytestmark = pytest.mark.method("maformer")


@pytest.mark.golden
def test_golden():
    case = GoldenCase("maformer", "gld_fusion_core")
    state = case.state_dict()
    overview, fusion = GLD(24, (6, 6)), CrossAttention(24, 4)
    overview.load_state_dict({k: v for k, v in state.items() if k == "pos" or k.startswith("fc.")})
    fusion.load_state_dict({k: v for k, v in state.items() if k != "pos" and not k.startswith("fc.")})
    assert sum(p.numel() for m in (overview, fusion) for p in m.parameters()) == case.spec["params"]
    found = overview(case.inputs["x"])
    case.compare("global", found)
    case.compare("y", fusion(case.inputs["local"], found))


def test_fusion_is_the_equation():
    fusion, local, overview = CrossAttention(12, 3), torch.randn(2, 10, 12), torch.randn(2, 5, 12)
    q, k, v = fusion.q(local), fusion.k(overview), fusion.v(overview)
    heads = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        heads.append((q[..., own] @ k[..., own].transpose(1, 2) / 2).softmax(-1) @ v[..., own])
    torch.testing.assert_close(fusion(local, overview), fusion.proj(torch.cat(heads, -1)))


def test_averages_are_pooled_pairs():
    """With a matrix of averages and no position, the overview is average pooling over neighbouring tokens."""
    overview, x = GLD(4, (4, 6)), torch.randn(2, 24, 4)
    assert torch.allclose(overview.fc.weight.sum(1), torch.ones(12), atol=0.2)  # begins near averages
    with torch.no_grad():
        overview.fc.weight.zero_()
        for row in range(12):
            overview.fc.weight[row, 2 * row : 2 * row + 2] = 0.5
        overview.pos.zero_()
        overview.fc.bias.zero_()
    torch.testing.assert_close(overview(x), x.view(2, 12, 2, 4).mean(2))
    constant = torch.full((1, 24, 4), 3.0)
    torch.testing.assert_close(overview(constant), torch.full((1, 12, 4), 3.0))


def test_order_of_the_overview_does_not_matter():
    mixer, x = MAFMixer(8, 2, input_size=(4, 4), window_size=2), torch.randn(2, 4, 4, 8)
    before, order = mixer(x), torch.randperm(8)
    with torch.no_grad():
        for tensor in (mixer.gld.fc.weight, mixer.gld.fc.bias, mixer.gld.pos):
            tensor.copy_(tensor[order])
    torch.testing.assert_close(mixer(x), before)


def test_without_values_only_the_local_stream_is_left():
    mixer, x = MAFMixer(8, input_size=(4, 4), window_size=2), torch.randn(2, 4, 4, 8)
    for part in (mixer.fusion.v, mixer.fusion.proj):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    torch.testing.assert_close(mixer(x), mixer.local(x))


def test_sees_the_whole_map_and_padding_does_not_leak():
    mixer = MAFMixer(8, input_size=(5, 7), window_size=3)
    x = torch.randn(1, 5, 7, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 0, 0].sum(), x)
    assert (gradient.abs().amax(-1) > 0).all()
    windows = MAFMixer(8, input_size=(5, 7), window_size=3).local
    with torch.no_grad():
        windows.qkv.bias.fill_(50.0)  # what a padded key would carry
        constant = windows(torch.zeros(1, 5, 7, 8))
    assert torch.allclose(constant, constant[:, :1, :1].expand_as(constant))


def test_resampling():
    overview = GLD(3, (4, 6))
    x = torch.randn(2, 3, 8, 12)
    small = nn.functional.interpolate(x, (4, 6), mode="bilinear", antialias=True)
    expected = overview(small.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (2, 6))
    expected = nn.functional.interpolate(expected, (4, 12), mode="bilinear", antialias=True)
    overview.set_input_size((8, 12))
    found = overview(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 12))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert overview.fc.weight.requires_grad and overview.pos.shape == (48, 3)
    kept = overview.fc
    overview.set_input_size((8, 12))
    assert overview.fc is kept  # nothing to do
    with pytest.raises(ValueError, match=r"ratio 0.5 of 5 is 2.5"):
        overview.set_input_size((5, 6))


def test_odd_numbers_of_tokens_are_floored():
    assert GLD(4, (5, 7)).fc.out_features == 17
    assert GLD(4, (1, 1)).fc.out_features == 1
    assert GLD(4, (6, 6), ratio=0.25).fc.out_features == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAFMixer(8), r"give input_size=\(H, W\)"),
        (lambda: MAFMixer(8, 3, input_size=(4, 4)), "must divide dim=8"),
        (lambda: MAFMixer(8, input_size=(4, 4), ratio=0.0), "ratio must be above 0"),
        (lambda: MAFMixer(8, input_size=(4, 4))(torch.zeros(1, 4, 5, 8)), "made for maps of 4x4 tokens, got 4x5; call"),
        (lambda: MAFMixer(8, input_size=(4, 4))(torch.zeros(1, 8, 4, 4)), r"takes maps \(B, H, W, C\)"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
