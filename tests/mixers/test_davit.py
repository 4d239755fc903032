"""DaViT: golden cases of its mixers, blocks and networks, the equations term by term, what must and must not matter."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp
from timm.models.davit import ChannelAttentionV2, checkpoint_filter_fn
from torch import nn

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.layers import ConvPosEnc
from tokenry.measure import count_macs
from tokenry.mixers import (
    ChannelGroupAttention,
    DualAttention,
    InLayout,
    WindowAttentionMixer,
    channel_attention_maps,
    convert_layout,
)
from tokenry.mixers.channel_attention import channel_attention, channel_weights

pytestmark = pytest.mark.method("davit")


def made(cls, dim, seed=0, **kwargs):
    """A mixer far from its initial values."""
    return drawn(cls(dim, **kwargs), generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """The paper's block around a mixer, on (B, N, C) with the map's size."""

    def __init__(self, dim, mixer, size):
        super().__init__()
        self.size = size
        self.cpe = nn.ModuleList(ConvPosEnc(dim) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = mixer
        self.mlp = Mlp(dim, 4 * dim)

    def positions(self, x, i):
        return convert_layout(self.cpe[i](convert_layout(x, "NLC", "NCHW", self.size)), "NCHW", "NLC")

    def forward(self, x):
        x = self.positions(x, 0)
        x = x + InLayout(self.attn, "NLC", self.size)(self.norm1(x))
        x = self.positions(x, 1)
        return x + self.mlp(self.norm2(x))


def check_case(name, model, state, *, shape=None):
    case = GoldenCase("davit", name)
    model.load_state_dict(state(case.state_dict()) if state else case.state_dict())
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    case.compare("y", model.eval()(x if shape is None else x.view(shape)).reshape(case.outputs["y"].shape))


@pytest.mark.golden
@pytest.mark.parametrize("fused", [False, True])
def test_golden_channel_attention(fused):
    check_case("channel_attention", ChannelGroupAttention(24, 3, fused=fused), None)


@pytest.mark.golden
def test_golden_window_attention():
    check_case("window_attention", WindowAttentionMixer(24, 3), None, shape=(2, 7, 7, 24))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "mixer", "size"),
    [
        ("spatial_block", WindowAttentionMixer(16, 2), (9, 11)),  # padded, and the padding takes part
        ("channel_block", ChannelGroupAttention(16, 2), (5, 6)),
    ],
)
def test_golden_blocks(name, mixer, size):
    check_case(name, Block(16, mixer, size), None)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "variant"),
    [("davit_tiny_64", "davit_tiny"), ("davit_tiny_70x90", "davit_tiny"), ("davit_small_224", "davit_small")],
)
@torch.inference_mode()
def test_golden_networks_are_timms(name, variant):
    case = GoldenCase("davit", name)
    model = timm.create_model(variant).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    case.compare("logits", model(case.inputs["x"]))


@pytest.mark.parametrize(
    ("variant", "params"),
    [
        ("davit_tiny", 28_360_168),
        ("davit_small", 49_745_896),
        ("davit_base", 87_954_408),
        ("davit_large", 196_811_752),
        ("davit_huge", 348_922_856),
        ("davit_giant", 1_406_470_120),
    ],
)
def test_parameter_counts(variant, params):
    assert sum(p.numel() for p in timm.create_model(variant, device="meta").parameters()) == params


def test_multiply_accumulates():
    model = timm.create_model("davit_tiny").eval()
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) == GoldenCase("davit", "davit_tiny_64").spec["macs"]


@pytest.mark.parametrize("dim", [32, 64])
def test_cost_of_the_mixers(dim):
    channel, window = ChannelGroupAttention(dim, 4), WindowAttentionMixer(dim, 4, window_size=4)
    for mixer in (channel, window):
        assert sum(p.numel() for p in mixer.parameters()) == 4 * dim**2 + 4 * dim
    tokens = 64
    assert count_macs(channel, torch.zeros(1, tokens, dim)) == 4 * tokens * dim**2 + 2 * tokens * dim**2 // 4
    assert count_macs(window, torch.zeros(1, 8, 8, dim)) == 4 * tokens * dim**2 + 2 * tokens * 16 * dim
    dual = DualAttention(dim, 4, window_size=4)
    small, large = (count_macs(dual, torch.zeros(1, side, side, dim)) for side in (8, 32))
    assert large == 16 * small  # linear in the number of tokens


def slow_channel_attention(mixer, x):
    """The equation, one pair of channels at a time, in float64."""
    batch, tokens, dim = x.shape
    d = dim // mixer.num_groups
    qkv = x.double() @ mixer.qkv.weight.double().T + mixer.qkv.bias.double()
    y = torch.zeros(batch, tokens, dim, dtype=torch.double)
    for b in range(batch):
        for start in range(0, dim, d):
            q, k, v = (qkv[b, :, part * dim + start : part * dim + start + d] for part in range(3))
            for i in range(d):
                scores = torch.stack([sum(k[n, i] * v[n, j] for n in range(tokens)) / d**0.5 for j in range(d)])
                weights = scores.softmax(0)
                y[b, :, start + i] = sum(weights[j] * q[:, j] for j in range(d))
    return y @ mixer.proj.weight.double().T + mixer.proj.bias.double()


@given(st.integers(1, 2), st.integers(1, 6), st.sampled_from([(4, 1), (4, 2), (6, 3), (3, 3)]), st.integers(0, 99))
@torch.no_grad()
def test_channel_attention_equals_slow_definition(batch, tokens, widths, seed):
    mixer = made(ChannelGroupAttention, widths[0], seed, num_groups=widths[1])
    x = torch.randn(batch, tokens, widths[0])
    torch.testing.assert_close(mixer(x).double(), slow_channel_attention(mixer, x), rtol=1e-4, atol=1e-5)


def slow_window_attention(mixer, x):
    """The equation, one query at a time, in float64; positions beyond the map are zero vectors, or left out."""
    batch, height, width, dim = x.shape
    wh, ww = mixer.window_size
    d = dim // mixer.num_heads
    weight, bias = mixer.qkv.weight.double(), mixer.qkv.bias.double()
    y = torch.zeros(batch, height, width, dim, dtype=torch.double)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                top, left = i // wh * wh, j // ww * ww
                seen = [(r, c) for r in range(top, top + wh) for c in range(left, left + ww)]
                if mixer.mask_padding:
                    seen = [(r, c) for r, c in seen if r < height and c < width]
                tokens = [
                    x[b, r, c].double() if r < height and c < width else torch.zeros(dim).double() for r, c in seen
                ]
                q = weight[:dim] @ x[b, i, j].double() + bias[:dim]
                k, v = (
                    torch.stack([weight[n * dim : (n + 1) * dim] @ t + bias[n * dim : (n + 1) * dim] for t in tokens])
                    for n in (1, 2)
                )
                for head in range(mixer.num_heads):
                    part = slice(head * d, (head + 1) * d)
                    logits = k[:, part] @ q[part] / d**0.5
                    if mixer.rel_pos is not None:
                        table = mixer.rel_pos.relative_position_bias_table.double()
                        rows = [(i - r + wh - 1) * (2 * ww - 1) + j - c + ww - 1 for r, c in seen]
                        logits = logits + table[rows, head]
                    y[b, i, j, part] = logits.softmax(0) @ v[:, part]
    return y @ mixer.proj.weight.double().T + mixer.proj.bias.double()


@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([2, 3, (2, 3), 6]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@torch.no_grad()
def test_window_attention_equals_slow_definition(batch, height, width, window, rel_bias, mask_padding, seed):
    mixer = made(
        WindowAttentionMixer, 4, seed, num_heads=2, window_size=window, rel_bias=rel_bias, mask_padding=mask_padding
    )
    x = torch.randn(batch, height, width, 4)
    torch.testing.assert_close(mixer(x).double(), slow_window_attention(mixer, x), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 9))
def test_fused_attention_is_the_same_function(batch, tokens, groups, d):
    q, k, v = torch.randn(3, batch, groups, tokens, d)
    torch.testing.assert_close(channel_attention(q, k, v, fused=True), channel_attention(q, k, v), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channel_attention_does_not_see_the_order_of_tokens():
    mixer, x, order = made(ChannelGroupAttention, 24, num_groups=3), torch.randn(2, 15, 24), torch.randperm(15)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=1e-4, atol=1e-5)


def test_weights_sum_to_one_and_doubling_the_tokens_sharpens_them():
    k, v = torch.randn(2, 2, 3, 20, 8)
    weights, doubled = channel_weights(k, v), channel_weights(k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 8))
    torch.testing.assert_close(doubled, (2 * weights.log()).softmax(-1), rtol=1e-4, atol=1e-6)  # the scores double
    assert (doubled - weights).abs().max() > 0.05


@torch.no_grad()
def test_one_window_over_the_map_is_full_attention():
    mixer, x = made(WindowAttentionMixer, 16, num_heads=2, window_size=(5, 6)), torch.randn(2, 5, 6, 16)
    full = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    full.load_state_dict(
        {
            "in_proj_weight": mixer.qkv.weight,
            "in_proj_bias": mixer.qkv.bias,
            "out_proj.weight": mixer.proj.weight,
            "out_proj.bias": mixer.proj.bias,
        }
    )
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(mixer(x).flatten(1, 2), full(tokens, tokens, tokens)[0], rtol=1e-4, atol=1e-5)


def test_fields():
    """A window sees itself alone; channels see the whole map."""
    x = torch.randn(1, 8, 8, 16, requires_grad=True)

    def seen(mixer):
        (gradient,) = torch.autograd.grad(mixer(x)[0, 1, 1].sum(), x)
        return gradient[0].abs().amax(-1) > 0

    window = seen(made(WindowAttentionMixer, 16, num_heads=2, window_size=4))
    assert window[:4, :4].all() and window.sum() == 16
    assert seen(made(DualAttention, 16, num_heads=2, window_size=4)).all()


@torch.no_grad()
def test_dual_attention_is_one_after_the_other():
    mixer, x = made(DualAttention, 16, num_heads=2, window_size=3), torch.randn(2, 5, 4, 16)
    after = x + mixer.window(x)
    after = after + mixer.channel(mixer.norm(after).flatten(1, 2)).view(x.shape)
    torch.testing.assert_close(x + mixer(x), after, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps_of_timms_networks_and_of_ours():
    model = timm.create_model(
        "davit_tiny", depths=(1, 2), embed_dims=(16, 32), num_heads=(2, 4), num_classes=3, window_size=4
    ).eval()
    x = torch.randn(2, 3, 40, 24)
    before = model(x)
    maps = channel_attention_maps(model, x)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "stages.0.blocks.0.1.attn": (2, 2, 8, 8),
        "stages.1.blocks.0.1.attn": (2, 4, 8, 8),
        "stages.1.blocks.1.1.attn": (2, 4, 8, 8),
    }
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert torch.equal(model(x), before)  # the hooks are off again

    mixer, tokens = made(ChannelGroupAttention, 16, num_groups=2), torch.randn(2, 9, 16)
    q, k, v = mixer.qkv(tokens).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    (weights,) = channel_attention_maps(mixer, tokens).values()
    torch.testing.assert_close(weights, channel_weights(k, v))
    y = mixer.proj((q @ weights.transpose(-2, -1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(tokens), y)


def test_maps_leave_no_hook_behind_when_the_model_fails():
    mixer = ChannelGroupAttention(16)
    with pytest.raises(ValueError, match="tokens"):
        channel_attention_maps(mixer, torch.randn(2, 4, 4, 16))
    assert not mixer.qkv._forward_hooks


def test_timms_second_form_is_another_function():
    """Florence-2's attention, with the same weights, gives something else: the two must not be mixed."""
    ours = made(ChannelGroupAttention, 16, num_groups=2)
    other = ChannelAttentionV2(16, num_heads=2)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 9, 16)
    assert (ours(x) - other(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelGroupAttention(20, 3), "num_groups must divide dim=20, got num_groups=3; use num_groups=2"),
        (lambda: WindowAttentionMixer(20, 3), "num_heads must divide dim=20"),
        (lambda: WindowAttentionMixer(16, window_size=0), "window_size must be at least 1x1"),
        (lambda: DualAttention(16, 5), "use num_heads=4"),
        (
            lambda: ChannelGroupAttention(16)(torch.zeros(1, 16, 9)),
            r"tokens \(B, N, C\) with C=16",
        ),  # channels as tokens
        (lambda: ChannelGroupAttention(16)(torch.zeros(1, 16, 4, 4)), r"flatten\(2\)"),
        (lambda: WindowAttentionMixer(16)(torch.zeros(1, 36, 16)), r"unflatten\(1, \(H, W\)\)"),
        (lambda: WindowAttentionMixer(16)(torch.zeros(1, 16, 6, 6)), r"maps \(B, H, W, C\) with C=16"),
        (lambda: DualAttention(16)(torch.zeros(1, 36, 16)), r"maps \(B, H, W, C\)"),
        (lambda: ChannelGroupAttention(16, fused=True)(torch.zeros(1, 257, 16)), "up to 256 tokens .* got 257"),
        (lambda: InLayout(WindowAttentionMixer(16), "NLC", (3, 5))(torch.zeros(1, 16, 16)), "cannot lay 16 tokens out"),
        (lambda: channel_attention_maps(nn.Linear(3, 3), torch.zeros(1, 3)), "has no channel attention"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
