"""Self-guided attention: golden cases, the equations by hand, what the map keeps, padding, bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.mixers import HybridScaleAttention, LocalTermAttention, SelfGuidedAttention, SelfGuidedMixer, create_mixer
from tokenry.mixers import self_guided as module

pytestmark = pytest.mark.method("sg-former")

SIDES = {2: 14, 4: 28, 8: 56}
DIMS = {2: (32, 4), 4: (32, 4), 8: (16, 2)}


def made(kind, *args, **kwargs):
    """A mixer with weights of a size at which its attention is not flat."""
    return drawn(kind(*args, **kwargs), 0.3)


def load(mixer, case):
    """The authors' attention, whose linear maps ours holds joined."""
    theirs, own = case.state_dict(), {}
    for kind in ("weight", "bias"):
        part = {
            name: theirs[f"{name}.{kind}"] for name in ("q", "q1", "kv1", "q2", "kv2") if f"{name}.{kind}" in theirs
        }
        if "q1" in part:
            own |= {f"q_global.{kind}": part["q1"], f"kv_global.{kind}": part["kv1"]}
            own[f"qkv_local.{kind}"] = torch.cat([part["q2"], part["kv2"]])
        else:
            (k1, v1), (k2, v2) = part["kv1"].chunk(2), part["kv2"].chunk(2)
            own |= {f"q.{kind}": part["q"], f"kv.{kind}": torch.cat([k1, k2, v1, v2])}
        for name, new in {"sr": "reduce", "f1": "f.0", "f2": "f.1", "f3": "f.2"}.items():
            if f"{name}.{kind}" in theirs:
                own[f"{new}.{kind}"] = theirs[f"{name}.{kind}"]
        for name in ("norm", "lepe_linear", "lepe_conv", "proj"):
            if f"{name}.{kind}" in theirs:
                own[f"{name}.{kind}"] = theirs[f"{name}.{kind}"]
    mixer.load_state_dict(own)
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    return mixer.eval()


def given_input(case, side):
    x = case.inputs["x"]
    return x.unflatten(1, (side, side))


@pytest.mark.golden
@pytest.mark.parametrize(("name", "ratio"), [("hybrid_sr2", 2), ("hybrid_sr4", 4), ("hybrid_sr8", 8)])
@torch.inference_mode()
def test_golden_hybrid(name, ratio):
    case = GoldenCase("sg-former", name)
    mixer = load(HybridScaleAttention(*DIMS[ratio], ratio), case)
    y, significance = mixer(given_input(case, SIDES[ratio]))
    case.compare("significance", significance.flatten(1))
    case.compare("significance_t", significance.transpose(1, 2).flatten(1))
    if "y" in case.outputs:
        case.compare("y", y.flatten(1, 2))
    else:
        case.compare_sample("y", y, places=4096)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "ratio"), [("guided_sr2", 2), ("guided_sr4", 4), ("guided_sr8", 8)])
@torch.inference_mode()
def test_golden_guided(name, ratio):
    case, side = GoldenCase("sg-former", name), SIDES[ratio]
    mixer, x = load(SelfGuidedAttention(*DIMS[ratio], ratio), case), given_input(case, side)
    torch.testing.assert_close(x.flatten(1, 2), case.inputs["x"])
    case.compare("y", mixer(x, case.inputs["significance"].unflatten(1, (side, side))).flatten(1, 2))


def attention_by_hand(q, k, v, heads):
    """Tokens (N, C), (M, C), (M, C) -> outcome (N, C) and what each key receives (M,)."""
    outcome, received = [], torch.zeros(len(k))
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        weights = (a @ b.T / a.shape[1] ** 0.5).softmax(1)
        outcome.append(weights @ c)
        received += weights.mean(0) / heads
    return torch.cat(outcome, 1), received


def hybrid_by_hand(mixer, x):
    """One image (H, W, C), cell by cell and window by window, nothing padded."""
    height, width, dim = x.shape
    r, w, heads = mixer.sr_ratio, mixer.window_size, mixer.num_heads // 2
    corners = [(i, j) for i in range(0, height, r) for j in range(0, width, r)]
    cells = []
    for i, j in corners:
        patch = x[i : i + r, j : j + r].permute(2, 0, 1)
        weight = mixer.reduce.weight[..., : patch.shape[1], : patch.shape[2]]
        cells.append((weight * patch).sum((1, 2, 3)) + mixer.reduce.bias)
    z = F.gelu(mixer.norm(torch.stack(cells)))
    far, received = attention_by_hand(mixer.q_global(x).flatten(0, 1), *mixer.kv_global(z).chunk(2, 1), heads)
    significance = torch.zeros(height, width)
    for (i, j), value in zip(corners, received, strict=True):
        significance[i : i + r, j : j + r] += value
    near = torch.zeros(height, width, dim // 2)
    for i in range(0, height, w):
        for j in range(0, width, w):
            place = (slice(i, i + w), slice(j, j + w))
            q, k, v = mixer.qkv_local(x[place]).flatten(0, 1).chunk(3, 1)
            y, received = attention_by_hand(q, k, v, heads)
            near[place] = y.view_as(near[place])
            significance[place] += received.view_as(significance[place])
    local = mixer.lepe_conv(mixer.lepe_linear(x).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return mixer.proj(torch.cat([far.view(height, width, -1), near], -1) + local), significance


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 11), width=st.integers(1, 11), ratio=st.integers(1, 5), window=st.integers(1, 7),
    heads=st.sampled_from([2, 4]), batch=st.integers(1, 3),
)  # fmt: skip
@torch.no_grad()
def test_hybrid_is_the_equation(height, width, ratio, window, heads, batch):
    mixer = made(HybridScaleAttention, 8, heads, ratio, window)
    x = torch.randn(batch, height, width, 8)
    y, significance = mixer(x)
    for image, found, found_map in zip(x, y, significance, strict=True):
        expected, expected_map = hybrid_by_hand(mixer, image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_map, expected_map, rtol=1e-4, atol=1e-6)


def keys_by_hand(mixer, x, significance):
    """One image: ranks one after the other."""
    tokens = x.flatten(0, 1)
    order = sorted(range(len(tokens)), key=significance.flatten().tolist().__getitem__)  # Python's sort is stable
    found, start = [], 0
    for size, count, f in zip(mixer.group_sizes, mixer.part_sizes(len(tokens)), mixer.f, strict=True):
        part = order[start : start + count]
        start += count
        for first in range(0, count, size):
            weights = zip(part[first : first + size], f.weight[0], strict=False)
            found.append(sum((w * tokens[n] for n, w in weights), torch.zeros(x.shape[-1])) + f.bias)
    return torch.stack(found)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 3), levels=st.sampled_from([2, 5, 10**6]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
)  # fmt: skip
@torch.no_grad()
def test_guided_is_the_equation(height, width, batch, levels, sizes):
    mixer = made(SelfGuidedAttention, 8, 2, group_sizes=sizes)
    x, significance = torch.randn(batch, height, width, 8), torch.randint(levels, (batch, height, width)).float()
    y, keys = mixer(x, significance), mixer.aggregate(x, significance)
    for n in range(batch):
        expected = keys_by_hand(mixer, x[n], significance[n])
        torch.testing.assert_close(keys[n], expected, rtol=1e-4, atol=1e-5)
        k, v = mixer.kv(expected).chunk(2, 1)
        attended = attention_by_hand(mixer.q(x[n]).flatten(0, 1), k, v, 2)[0].view_as(x[n])
        local = mixer.lepe_conv(mixer.lepe_linear(x[n]).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        torch.testing.assert_close(y[n], mixer.proj(attended + local), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_significance_sums_to_what_the_cells_and_windows_say():
    for ratio, side in SIDES.items():
        _, significance = made(HybridScaleAttention, 16, 2, ratio)(torch.randn(2, side, side, 16))
        assert significance.sum((1, 2)).tolist() == pytest.approx([ratio**2 + side**2 / 49] * 2, rel=1e-5)
        assert significance.min() > 0
    _, padded = made(HybridScaleAttention, 16, 2, 4)(torch.randn(1, 12, 16, 16))
    assert padded.sum().item() == pytest.approx(16 + 2 * 3, rel=1e-5)  # cells divide, six windows all sum to one


@torch.no_grad()
def test_keys_at_the_released_sizes():
    for ratio, keys in {8: [4, 28, 28], 4: [4, 28, 28], 2: [49, 98]}.items():
        mixer, side = SelfGuidedAttention(16, 2, ratio), SIDES[ratio]
        parts = mixer.part_sizes(side**2)
        assert [n // size for n, size in zip(parts, mixer.group_sizes, strict=True)] == keys
        assert not any(n % size for n, size in zip(parts, mixer.group_sizes, strict=True))
        assert mixer.aggregate(torch.zeros(1, side, side, 16), torch.rand(1, side, side)).shape[1] == sum(keys)
    assert SelfGuidedAttention(16).part_sizes(1) == [0, 1, 0]
    assert SelfGuidedAttention(16, sr_ratio=2).part_sizes(5) == [2, 3]
    assert SelfGuidedAttention(16, group_sizes=(3,)).part_sizes(5) == [5]


@torch.no_grad()
def test_only_the_order_of_the_significance_counts():
    mixer, x, s = made(SelfGuidedAttention, 16, 2), torch.randn(2, 8, 9, 16), torch.randn(2, 8, 9).double()
    assert torch.equal(mixer(x, s), mixer(x, s.exp() * 3 - 7))
    assert not torch.allclose(mixer(x, s), mixer(x, -s))


@torch.no_grad()
def test_places_do_not_count():
    mixer, x, s = made(SelfGuidedAttention, 16, 2), torch.randn(2, 8, 9, 16), torch.randn(2, 8, 9)
    order = torch.randperm(72)
    moved, moved_s = (t.flatten(1, 2)[:, order].unflatten(1, (8, 9)) for t in (x, s[..., None]))
    assert torch.equal(mixer.aggregate(moved, moved_s[..., 0]), mixer.aggregate(x, s))
    # listed by columns, as for half of the heads of the authors' code: the same keys
    assert torch.equal(mixer.aggregate(x.transpose(1, 2), s.transpose(1, 2)), mixer.aggregate(x, s))


@torch.no_grad()
def test_ranks():
    mixer, s = SelfGuidedAttention(16, group_sizes=(4, 2, 1)), torch.randn(2, 4, 6)
    ranks = mixer.ranks(s)
    assert ranks.shape == s.shape and ranks.dtype == torch.int64
    for image, found in zip(s, ranks, strict=True):
        assert found.flatten().bincount().tolist() == [6, 12, 6]
        assert image[found == 0].max() < image[found == 1].min() and image[found == 1].max() < image[found == 2].min()
    ties = mixer.ranks(torch.zeros(1, 4, 6))
    assert ties.flatten().tolist() == [0] * 6 + [1] * 12 + [2] * 6  # equal values keep their order


@torch.no_grad()
def test_large_maps_are_attended_in_blocks(monkeypatch):
    mixer, x = made(HybridScaleAttention, 16, 4, 2), torch.randn(2, 9, 13, 16)
    y, significance = mixer(x)
    monkeypatch.setattr(module, "BLOCK_VALUES", 100)
    seen = []
    whole = module._weights
    monkeypatch.setattr(module, "_weights", lambda q, k, mask=None: seen.append(q.shape[2]) or whole(q, k, mask))
    in_blocks, same = mixer(x)
    assert seen == [2] * 58 + [1, 49]  # 117 queries of 35 keys, and the windows
    torch.testing.assert_close(in_blocks, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, significance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [2**22, 8])
def test_significance_carries_no_gradient(limit, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_VALUES", limit)
    mixer, x = made(HybridScaleAttention, 16, 4, 2).train(), torch.randn(1, 6, 9, 16, requires_grad=True)
    y, significance = mixer(x)
    assert y.requires_grad and not significance.requires_grad
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("limit", [2**22, 8])
@torch.no_grad()
def test_significance_is_float32_in_half_precision(limit, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_VALUES", limit)
    mixer, x = HybridScaleAttention(16, 4, 2).eval(), torch.randn(1, 6, 9, 16)
    y, significance = copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert (y.dtype, significance.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x)[1].dtype == torch.float32
    assert mixer.double()(x.double())[1].dtype == torch.float64
    torch.testing.assert_close(significance, mixer.float()(x)[1], rtol=0.05, atol=1e-3)


@torch.no_grad()
def test_the_mixer_is_its_two_halves():
    mixer, x = made(SelfGuidedMixer, 16), torch.randn(2, 9, 11, 16)
    h, significance = mixer.hybrid(x)
    torch.testing.assert_close(mixer(x), h + mixer.guided(x + h, significance))
    maps = mixer.token_maps(x)
    assert torch.equal(maps["significance"], significance) and maps["ranks"].unique().tolist() == [0, 1, 2]
    assert mixer.hybrid.num_heads == mixer.guided.num_heads == 2 and SelfGuidedMixer(192).guided.num_heads == 6
    other = create_mixer("self_guided", 16, sr_ratio=3, window_size=4, group_sizes=(5, 1))
    assert (other.hybrid.sr_ratio, other.hybrid.window_size, other.guided.group_sizes) == (3, 4, (5, 1))


@torch.no_grad()
def test_plain_attention_has_the_local_term():
    mixer, x = made(LocalTermAttention, 16, 2), torch.randn(1, 4, 5, 16)
    tokens = x[0].flatten(0, 1)
    attended = attention_by_hand(mixer.q(tokens), *mixer.kv(tokens).chunk(2, 1), 2)[0].view(4, 5, 16)
    local = mixer.lepe_conv(mixer.lepe_linear(x).permute(0, 3, 1, 2))[0].permute(1, 2, 0)
    torch.testing.assert_close(mixer(x)[0], mixer.proj(attended + local), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HybridScaleAttention(12, 3), "even and divide dim=12, got num_heads=3; use num_heads=4$"),
        (lambda: HybridScaleAttention(16, 6), "even and divide dim=16, got num_heads=6; use num_heads=4$"),
        (lambda: HybridScaleAttention(18, 4), "got num_heads=4; use num_heads=2$"),
        (lambda: HybridScaleAttention(16, 0), "got num_heads=0; use num_heads=2$"),
        (lambda: HybridScaleAttention(15), "dim must be even, got 15; use 16"),
        (lambda: HybridScaleAttention(16, sr_ratio=0), "at least 1, got 0 and 7"),
        (lambda: HybridScaleAttention(16, window_size=0), "at least 1, got 4 and 0"),
        (lambda: HybridScaleAttention(16)(torch.zeros(1, 16, 4, 4)), r"\(B, H, W, C\) with C=16, got \(1, 16, 4, 4\)"),
        (lambda: SelfGuidedAttention(16, sr_ratio=3), "group sizes for sr_ratio 8, 4 and 2, got 3; give group_sizes"),
        (lambda: SelfGuidedAttention(16, group_sizes=(4, 3, 2, 1)), "one to three sizes"),
        (lambda: SelfGuidedAttention(16, group_sizes=(4, 0)), "of at least 1"),
        (lambda: SelfGuidedAttention(16, group_sizes=()), "one to three sizes"),
        (lambda: SelfGuidedAttention(16)(torch.zeros(1, 4, 4, 16), None), "significance of every token.*got None"),
        (lambda: SelfGuidedAttention(16)(torch.zeros(1, 4, 4, 16), torch.zeros(1, 2, 2)), r"\(1, 4, 4\), got \(1, 2, 2\)"),
        (lambda: LocalTermAttention(16)(torch.zeros(1, 5, 16)), r"x.unflatten\(1, \(H, W\)\)"),
    ],
)  # fmt: skip
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
