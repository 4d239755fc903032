"""Dual tokens: golden parts, the equations by hand, identities, bad input."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.layers import BiDimAttention, BiDimMLP
from tokenry.mixers import DualTokenMixer, PositionAwareTokens

pytestmark = pytest.mark.method("dualtoken-vit")


@pytest.mark.golden
def test_golden_gated_mlp():
    case = GoldenCase("dualtoken-vit", "bidim_ffn")
    mlp = BiDimMLP(24, 96)
    mlp.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in mlp.parameters()) == case.spec["params"]
    case.compare("y", mlp(case.inputs["x"]))


def test_gates_are_the_equation():
    attention, x = BiDimAttention(8), torch.randn(2, 5, 8)
    normed = attention.norm(x)
    overall = F.gelu(attention.global_reduce(normed.mean(1)))
    for b in range(2):
        for n in range(5):
            own = F.gelu(attention.local_reduce(normed[b, n]))
            channels = attention.channel_select(overall[b]).sigmoid()
            position = attention.spatial_select(torch.cat([own, overall[b]])).sigmoid()
            torch.testing.assert_close(attention(x)[b, n], x[b, n] * channels * position)


def part(**kwargs):
    torch.manual_seed(0)
    return PositionAwareTokens(8, 2, **{"grid": 3, **kwargs}).eval()


@pytest.mark.parametrize("mlp", ["plain", "mix"])
def test_is_its_equations(mlp):
    module, x, g = part(mlp=mlp, steps=1), torch.randn(2, 8, 6, 6), torch.randn(2, 9, 8)
    down = F.avg_pool2d(module.encoders[0](x), 2).flatten(2).transpose(1, 2)
    kept = g
    if mlp == "mix":
        kept = kept + module.token_mlp.token_mlp(module.token_mlp.token_norm(kept).transpose(1, 2)).transpose(1, 2)
    kept = kept + module.token_mlp.mlp(module.token_mlp.norm(kept))
    with torch.no_grad():
        module.blend.fill_(0.7)
    share = torch.tensor(0.7).sigmoid()
    new = share * module.gather(module.norm(down)) + (1 - share) * kept
    received, found = module(x, g)
    torch.testing.assert_close(found, new)
    tokens = module.query_norm(x.flatten(2).transpose(1, 2))
    expected = module.broadcast(tokens, module.key_norm(new)).transpose(1, 2).view(x.shape)
    torch.testing.assert_close(received, expected)


def test_blend_at_its_ends():
    module, x = part(), torch.randn(2, 8, 6, 6)
    g, other = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    nn.init.constant_(module.blend, 100.0)  # the map alone
    torch.testing.assert_close(module(x, g)[0], module(x, other)[0])
    nn.init.constant_(module.blend, -200.0)  # the old tokens alone: what is gathered from the map does not count
    before = module(x, g)
    with torch.no_grad():
        for parameter in module.gather.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(module(x, g), before)


def test_order_of_tokens_with_their_cells_does_not_matter():
    """A permutation of the global tokens and of the cells that they belong to changes nothing that positions receive."""
    module, g, order = part(steps=0), torch.randn(1, 9, 8), torch.randperm(9)
    x = torch.randn(1, 8, 3, 3)
    shuffled = x.flatten(2)[:, :, order].view(x.shape)
    received, new = module(x, g)
    again, new_again = module(shuffled, g[:, order])
    torch.testing.assert_close(new_again, new[:, order])
    torch.testing.assert_close(again.flatten(2), received.flatten(2)[:, :, order])


@pytest.mark.parametrize("size", [(12, 12), (7, 5), (1, 1), (2, 9)])
def test_other_sizes_are_pooled_to_the_grid(size):
    module, x = part(steps=2), torch.randn(1, 8, *size)
    assert module.downsample(x).shape == (1, 9, 8)
    if size == (12, 12):  # nothing is left to pool
        y = x
        for encoder in module.encoders:
            y = F.avg_pool2d(encoder(y), 2)
        torch.testing.assert_close(module.downsample(x), y.flatten(2).transpose(1, 2))


def test_with_and_without_tokens_from_outside():
    torch.manual_seed(0)
    mixer, x = DualTokenMixer(8, grid=3), torch.randn(2, 8, 6, 5)
    map_, new = mixer(x, mixer.tokens.expand(2, -1, -1))
    torch.testing.assert_close(mixer(x), map_)
    assert new.shape == (2, 9, 8)
    assert sum(p.numel() for n, p in mixer.named_parameters() if n.endswith("blend")) == 1
    shown = mixer.token_maps(x)["attention"]
    assert shown.shape == (2, 3, 3)
    torch.testing.assert_close(shown.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DualTokenMixer(8, 3), "must divide dim=8"),
        (lambda: DualTokenMixer(8, grid=0), "grid must be at least 1"),
        (lambda: DualTokenMixer(8, mlp="mixed"), "'plain' or 'mix'"),
        (lambda: DualTokenMixer(8, grid=2)(torch.zeros(1, 9, 4, 4)), r"takes maps \(B, C, H, W\) with C=8"),
        (lambda: DualTokenMixer(8, grid=2, own_tokens=False)(torch.zeros(1, 8, 4, 4)), "own_tokens=False"),
        (lambda: part()(torch.zeros(2, 8, 6, 6), torch.zeros(1, 9, 8)), r"\(B, 9, 8\) with the B=2"),
        (lambda: part()(torch.zeros(1, 8, 6, 6), torch.zeros(1, 9, 16)), r"\(B, 9, 8\)"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
