"""Global queries: golden cases, agreement with timm's attention, what the query must and must not do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.gcvit import FeatureBlock, WindowAttentionGlobal

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.layers import window_merge, window_partition
from tokenry.measure import count_macs
from tokenry.mixers import GlobalQueryAttention, GlobalQueryGenerator, LocalWindowAttention
from tokenry.mixers.global_query import fused_mbconv

pytestmark = pytest.mark.method("gc-vit")


def made(mixer, seed=0):
    """The mixer, far from its initial values."""
    return drawn(mixer, generator=torch.Generator().manual_seed(seed))


def fused_state(state, old, new):
    """A fused inverted residual of the reference under timm's names."""
    names = {"0": "conv_dw", "2.fc.0": "se.fc1", "2.fc.2": "se.fc2", "3": "conv_pw"}
    found = {f"{new}{own}.weight": state[f"{old}{theirs}.weight"] for theirs, own in names.items()}
    return {name: value[:, :, None, None] if ".fc" in name else value for name, value in found.items()}


def attention_state(state):
    """An attention of the reference under this package's names."""
    return {
        name.replace("relative_position_bias_table", "rel_pos.relative_position_bias_table"): value
        for name, value in state.items()
    }


@pytest.mark.golden
def test_golden_local_attention():
    case = GoldenCase("gc-vit", "attn_local")
    mixer = LocalWindowAttention(16, 2, window_size=3).eval()
    mixer.load_state_dict(attention_state(case.state_dict()))
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    case.compare("y", mixer(case.inputs["x"].view(4, 3, 3, 16)).flatten(1, 2))


@pytest.mark.golden
def test_golden_global_attention():
    case = GoldenCase("gc-vit", "attn_global")
    mixer = GlobalQueryAttention(16, 2, window_size=3, own_query=False).eval()
    mixer.load_state_dict(attention_state(case.state_dict()))
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    maps = window_merge(case.inputs["x"], 3, (6, 6))  # 2 images of 4 windows
    query = case.inputs["q"][:, 0].transpose(1, 2).reshape(2, 3, 3, 16)
    case.compare("y", window_partition(mixer(maps, query), 3))


@pytest.mark.golden
def test_golden_query():
    case = GoldenCase("gc-vit", "global_query")
    generator = GlobalQueryGenerator(16, 7, num_halvings=3).eval()
    state = case.state_dict()
    generator.load_state_dict(
        {
            name: value
            for i in range(3)
            for name, value in fused_state(state, f"to_q_global.{i}.conv.", f"blocks.{i}.").items()
        }
    )
    assert sum(p.numel() for p in generator.parameters()) == case.spec["params"]
    query = generator(case.inputs["x"].permute(0, 2, 3, 1))
    case.compare("y", query.reshape(1, 1, 49, 2, 8).transpose(2, 3))


@pytest.mark.golden
def test_golden_feature_extraction():
    case = GoldenCase("gc-vit", "feat_extract")
    generator = GlobalQueryGenerator(16, (4, 3), num_halvings=1).eval()
    generator.load_state_dict(fused_state(case.state_dict(), "conv.", "blocks.0."))
    assert sum(p.numel() for p in generator.parameters()) == case.spec["params"]
    case.compare("y", generator(case.inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 3]), st.booleans(), st.integers(0, 99))
@torch.no_grad()
def test_equals_timms_attention(batch, windows, side, use_global, seed):
    theirs = made(WindowAttentionGlobal(8, 2, (side, side), use_global=use_global), seed)
    if use_global:
        ours = GlobalQueryAttention(8, 2, window_size=side, own_query=False)
    else:
        ours = LocalWindowAttention(8, 2, window_size=side)
    ours.load_state_dict(theirs.state_dict())
    x, query = torch.randn(batch, side, side * windows, 8), torch.randn(batch, side, side, 8)
    expected = theirs(window_partition(x, side), query if use_global else None)
    own = ours(x, query) if use_global else ours(x)
    torch.testing.assert_close(window_partition(own, side), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 3), st.sampled_from([2, 3]))
@torch.no_grad()
def test_equals_timms_generator(halvings, window):
    """From 32 channels on the squeeze is the same as timm's, which rounds it."""
    theirs = made(FeatureBlock(32, halvings))
    ours = GlobalQueryGenerator(32, window, num_halvings=halvings).eval()
    ours.load_state_dict(
        {name.replace("blocks.conv1", "blocks.0").replace("blocks.conv2", "blocks.1").replace("blocks.conv3", "blocks.2"): v
         for name, v in theirs.state_dict().items()}
    )  # fmt: skip
    x = torch.randn(2, 32, window * 2**halvings, window * 2**halvings)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)), theirs(x).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_own_query_of_a_window_gives_local_attention():
    local, x = made(LocalWindowAttention(16, 2, window_size=3)), torch.randn(4, 3, 3, 16)
    given_query = GlobalQueryAttention(16, 2, window_size=3, own_query=False).eval()
    state = local.state_dict()
    state |= {"qkv.weight": state["qkv.weight"][16:], "qkv.bias": state["qkv.bias"][16:]}
    given_query.load_state_dict(state)
    query = torch.nn.functional.linear(x, local.qkv.weight[:16], local.qkv.bias[:16])
    torch.testing.assert_close(given_query(x, query), local(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_does_not_depend_on_the_batch():
    mixer, x = made(GlobalQueryAttention(16, 2, window_size=4)), torch.randn(3, 8, 8, 16)
    together = mixer(x)
    for i in range(3):
        torch.testing.assert_close(mixer(x[i : i + 1]), together[i : i + 1], rtol=1e-5, atol=1e-5)
    shared = GlobalQueryAttention(16, 2, window_size=4, own_query=False).eval()
    shared.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("query.")})
    torch.testing.assert_close(shared(x, mixer.query(x)), together)


def test_fields():
    """Without a convolution around it, local attention stays in its window; a global query brings the whole map in."""
    x = torch.randn(1, 8, 8, 16, requires_grad=True)

    def seen(mixer):
        (gradient,) = torch.autograd.grad(mixer(x)[0, 1, 1].sum(), x)
        return (gradient[0].abs().amax(-1) > 0).sum().item()

    assert seen(made(LocalWindowAttention(16, 2, window_size=4))) == 16
    assert seen(made(GlobalQueryAttention(16, 2, window_size=4))) > 16


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (13, 2)])
def test_other_sizes_pool_the_query_and_mask_the_padding(size):
    mixer = made(GlobalQueryAttention(16, 2, window_size=4))
    x = torch.randn(2, *size, 16)
    y = mixer(x)
    assert y.shape == x.shape and y.isfinite().all()
    # Where nothing but padding is added, nothing changes: keys outside the map take no part.
    query, wide = mixer.query(x), torch.zeros(2, *(-(-side // 4) * 4 for side in size), 16)
    wide[:, : size[0], : size[1]] = x
    unmasked = mixer(wide, query)[:, : size[0], : size[1]]
    if size[0] % 4 or size[1] % 4:
        assert (unmasked - y).abs().max() > 1e-4
    else:
        torch.testing.assert_close(unmasked, y)


@pytest.mark.parametrize("dim", [32, 64])
def test_cost(dim):
    heads, window = dim // 32, 7
    mixer = GlobalQueryAttention(dim, window_size=window, own_query=False)
    assert sum(p.numel() for p in mixer.parameters()) == 3 * dim**2 + 3 * dim + (2 * window - 1) ** 2 * heads
    assert sum(p.numel() for p in fused_mbconv(dim).parameters()) == 9 * dim + dim**2 // 2 + dim**2
    macs = count_macs(mixer, torch.zeros(1, 14, 14, dim), torch.zeros(1, 7, 7, dim))
    assert macs == 3 * 196 * dim**2 + 2 * 196 * window**2 * dim


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GlobalQueryAttention(20, 3), "num_heads must divide dim=20"),
        (lambda: GlobalQueryAttention(16, window_size=(4, 0)), "window_size must be at least 1x1"),
        (lambda: GlobalQueryAttention(16)(torch.zeros(1, 36, 16)), r"GlobalQueryAttention takes maps \(B, H, W, C\)"),
        (lambda: GlobalQueryAttention(16, own_query=False)(torch.zeros(1, 7, 7, 16)), "no query of its own"),
        (
            lambda: GlobalQueryAttention(16, window_size=4)(torch.zeros(2, 8, 8, 16), torch.zeros(2, 7, 7, 16)),
            r"query must be .* = \(2, 4, 4, 16\) .* got \(2, 7, 7, 16\)",
        ),
        (
            lambda: GlobalQueryAttention(16, window_size=4)(torch.zeros(2, 8, 8, 16), torch.zeros(1, 4, 4, 16)),
            r"got \(1, 4, 4, 16\)",
        ),
        (lambda: GlobalQueryGenerator(16, num_halvings=-1), "num_halvings must be at least 0"),
        (lambda: LocalWindowAttention(16)(torch.zeros(1, 16, 7, 7)), "LocalWindowAttention takes maps"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
