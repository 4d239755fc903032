"""Aggregated and cosine attention: golden cases, the equations position by position, identities, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import AggregatedAttention, CosineAttention
from tokenry.mixers.aggregated_attention import ContinuousPositionBias

pytestmark = pytest.mark.method("transnext")
NEVER = -1e9  # a logit that no softmax gives any weight


def renamed(case: GoldenCase) -> dict[str, torch.Tensor]:
    """The authors' parameters under our names."""
    state = {name.replace("cpb_fc", "cpb.fc"): value for name, value in case.state_dict().items()}
    if "sr.weight" in state:
        state["sr.weight"] = state["sr.weight"].flatten(1)
    return state


def made(kind: type = AggregatedAttention, dim: int = 8, heads: int = 2, seed: int = 0, **kwargs) -> nn.Module:
    """A mixer in float64 whose parameters are all far from their start."""
    return drawn(kind(dim, heads, dtype=torch.float64, **kwargs), generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "size", "heads", "pretrain"),
    [
        ("aggregated_attention_mixer", (12, 8), 4, (12, 8)),
        ("aggregated_attention_extrapolated", (16, 16), 2, (8, 8)),
    ],
)
def test_golden_aggregated_attention(name, size, heads, pretrain):
    case = GoldenCase("transnext", name)
    mixer = AggregatedAttention(32, heads, sr_ratio=4, pretrain_size=pretrain).eval()
    mixer.load_state_dict(renamed(case))
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    x = case.inputs["x"].mT.unflatten(2, size)
    case.compare("y", mixer(x).flatten(2).mT)
    case.compare("pool_bias", mixer.cpb(size, (size[0] // 4, size[1] // 4), pretrain))


@pytest.mark.golden
def test_golden_cosine_attention():
    case = GoldenCase("transnext", "cosine_attention_mixer")
    mixer = CosineAttention(32, 4).eval()
    mixer.load_state_dict(renamed(case))
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    x = case.inputs["x"].mT.unflatten(2, (7, 5))
    case.compare("y", mixer(x).flatten(2).mT)
    with torch.inference_mode():
        case.compare("y", mixer(x).flatten(2).mT)


def cell_middles(length: int, cells: int) -> list[float]:
    """Mean index of each adaptive-pooling cell, from the pooling itself."""
    return F.adaptive_avg_pool1d(torch.arange(length, dtype=torch.float64)[None], cells)[0].tolist()


def slow_bias(cpb: ContinuousPositionBias, size, grid, pretrain) -> torch.Tensor:
    """The MLP on every pair, one at a time: (heads, H, W, h, w)."""
    bias = torch.zeros(cpb.fc2.out_features, *size, *grid, dtype=torch.float64)

    def spaced(difference: float, trained: int) -> float:
        scaled = difference / max(trained - 1, 1) * 8
        return math.copysign(math.log2(abs(scaled) + 1) / 3, scaled)

    rows, columns = cell_middles(size[0], grid[0]), cell_middles(size[1], grid[1])
    for i in range(size[0]):
        for j in range(size[1]):
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    offset = torch.tensor(
                        [spaced(i - row, pretrain[0]), spaced(j - column, pretrain[1])], dtype=bias.dtype
                    )
                    hidden = (cpb.fc1.weight @ offset + cpb.fc1.bias).clamp(min=0)
                    bias[:, i, j, a, b] = cpb.fc2.weight @ hidden + cpb.fc2.bias
    return bias


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def slow_aggregated(mixer: AggregatedAttention, x: torch.Tensor, grid) -> torch.Tensor:
    """The equations of the module's docstring, one image, head and position at a time."""
    batch, dim, height, width = x.shape
    heads, d, reach = mixer.num_heads, dim // mixer.num_heads, mixer.window_size // 2
    bias = slow_bias(mixer.cpb, (height, width), grid, mixer.pretrain_size or (height, width))
    out = torch.zeros_like(x)
    for n in range(batch):
        coarse = F.adaptive_avg_pool2d(
            F.gelu(torch.einsum("oc,chw->ohw", mixer.sr.weight, x[n]) + mixer.sr.bias[:, None, None]), grid
        )
        coarse = F.layer_norm(coarse.flatten(1).T, (dim,), mixer.norm.weight, mixer.norm.bias, 1e-5)  # (p, C)
        far_kv = coarse @ mixer.kv.weight.T + mixer.kv.bias
        kv = torch.einsum("oc,chw->hwo", mixer.kv.weight, x[n]) + mixer.kv.bias
        queries = torch.einsum("oc,chw->hwo", mixer.q.weight, x[n]) + mixer.q.bias
        for i in range(height):
            for j in range(width):
                y = []
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    near = [
                        (o, i + a - reach, j + b - reach)
                        for o, (a, b) in enumerate((a, b) for a in range(2 * reach + 1) for b in range(2 * reach + 1))
                        if 0 <= i + a - reach < height and 0 <= j + b - reach < width
                    ]
                    q = unit(queries[i, j, part])
                    scale = F.softplus(mixer.temperature[h, 0, 0]) * math.log(len(near) + len(coarse))
                    scaled = (q + mixer.query_embedding[h, 0]) * scale
                    logits = [scaled @ unit(kv[r, c, part]) + mixer.relative_pos_bias_local[h, o] for o, r, c in near]
                    logits += [
                        scaled @ unit(row[part]) + b for row, b in zip(far_kv, bias[h, i, j].flatten(), strict=True)
                    ]
                    weights = torch.stack(logits).softmax(0)
                    values = slice(dim + h * d, dim + (h + 1) * d)
                    total = sum(w * row[values] for w, row in zip(weights[len(near) :], far_kv, strict=True))
                    for (o, r, c), w in zip(near, weights, strict=False):
                        position = q @ mixer.learnable_tokens[h, :, o] + mixer.learnable_bias[h, 0, o]
                        total = total + (w + position) * kv[r, c, values]
                    y.append(total)
                out[n, :, i, j] = mixer.proj.weight @ torch.cat(y) + mixer.proj.bias
    return out


@given(
    h=st.integers(1, 5), w=st.integers(1, 5), window=st.sampled_from([1, 3, 5]), ratio=st.integers(1, 3),
    heads=st.sampled_from([1, 2]), batch=st.integers(1, 2),
)  # fmt: skip
@torch.no_grad()
def test_aggregated_equals_the_equations(h, w, window, ratio, heads, batch):
    mixer = made(heads=heads, window_size=window, sr_ratio=ratio, pretrain_size=(3, 4))
    x = draw(batch, 8, h, w)
    expected = slow_aggregated(mixer, x, (max(h // ratio, 1), max(w // ratio, 1)))
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_pool_size_equals_the_equations():
    mixer, x = made(pool_size=2), draw(1, 8, 5, 3)
    torch.testing.assert_close(mixer(x), slow_aggregated(mixer, x, (2, 2)))


@given(
    h=st.integers(1, 5), w=st.integers(1, 5), heads=st.sampled_from([1, 2]), pretrain=st.sampled_from([None, (2, 6)])
)
@torch.no_grad()
def test_cosine_equals_the_equations(h, w, heads, pretrain):
    mixer, x = made(CosineAttention, heads=heads, pretrain_size=pretrain), draw(2, 8, h, w)
    bias = slow_bias(mixer.cpb, (h, w), (h, w), pretrain or (h, w)).flatten(3).flatten(1, 2)
    parts = x.flatten(2).mT @ mixer.qkv.weight.T + mixer.qkv.bias
    d, outputs = 8 // heads, []
    for head in range(heads):
        q, k, v = (parts[..., at * 8 + head * d : at * 8 + (head + 1) * d] for at in range(3))
        q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
        scaled = (q + mixer.query_embedding[head]) * F.softplus(mixer.temperature[head]) * math.log(h * w)
        outputs.append((scaled @ k.mT + bias[head]).softmax(-1) @ v)
    expected = torch.cat(outputs, -1) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x).flatten(2).mT, expected)


@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), cells=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@torch.no_grad()
def test_the_bias_table_equals_the_mlp_on_all_pairs(size, cells):
    grid = min(size[0], cells[0]), min(size[1], cells[1])
    cpb = ContinuousPositionBias(2, hidden=5, dtype=torch.float64)
    expected = slow_bias(cpb, size, grid, (7, 7)).flatten(3).flatten(1, 2)
    torch.testing.assert_close(cpb(size, grid, (7, 7)), expected)


@torch.no_grad()
def test_weights_sum_to_one():
    """With all values alike and no positional attention the output is that value, whatever the logits."""
    mixer, x = made(sr_ratio=2), draw(2, 8, 6, 7)
    mixer.kv.weight[8:] = 0.0  # v = its bias
    mixer.learnable_tokens.zero_()
    mixer.learnable_bias.zero_()
    # A corner's four neighbours and the pooled keys share a weight of one too: positions outside the map got none.
    expected = (mixer.proj.weight @ mixer.kv.bias[8:] + mixer.proj.bias)[:, None, None].expand(2, 8, 6, 7)
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_without_pooled_keys_it_is_windowed_cosine_attention():
    mixer, x = made(sr_ratio=2, window_size=3), draw(1, 8, 5, 6)
    mixer.cpb.fc2.bias.fill_(NEVER)
    mixer.learnable_tokens.zero_()
    mixer.learnable_bias.zero_()
    inputs = x.permute(0, 2, 3, 1)
    q = F.normalize(mixer.q(inputs).unflatten(-1, (2, 4)), dim=-1)[0]  # (H, W, heads, d)
    k, v = mixer.kv(inputs).unflatten(-1, (2, 2, 4)).unbind(3)
    k, v = F.normalize(k[0], dim=-1), v[0]
    expected = torch.zeros(5, 6, 2, 4, dtype=x.dtype)
    for i in range(5):
        for j in range(6):
            at = [(a, b) for a in range(i - 1, i + 2) for b in range(j - 1, j + 2) if 0 <= a < 5 and 0 <= b < 6]
            offsets = [(a - i + 1) * 3 + b - j + 1 for a, b in at]
            keys, values = torch.stack([k[a, b] for a, b in at]), torch.stack([v[a, b] for a, b in at])
            scaled = (q[i, j] + mixer.query_embedding[:, 0]) * F.softplus(mixer.temperature[:, 0])
            logits = torch.einsum("hd,nhd->hn", scaled * math.log(len(at) + 2 * 3), keys)
            weights = (logits + mixer.relative_pos_bias_local[:, offsets]).softmax(-1)
            expected[i, j] = torch.einsum("hn,nhd->hd", weights, values)
    torch.testing.assert_close(mixer(x)[0].permute(1, 2, 0), mixer.proj(expected.flatten(2)))


@torch.no_grad()
def test_positional_attention_has_no_effect_outside_the_map():
    """A corner without pooled keys: changing T and t of the offsets that lead outside changes nothing there."""
    mixer, x = made(sr_ratio=2), draw(1, 8, 4, 4)
    before = mixer(x)
    outside = [0, 1, 2, 3, 6]
    mixer.learnable_tokens[..., outside] += 7.0
    mixer.learnable_bias[..., outside] -= 3.0
    after = mixer(x)
    torch.testing.assert_close(after[..., 0, 0], before[..., 0, 0])
    assert not torch.allclose(after[..., 1, 1], before[..., 1, 1])


def test_a_position_depends_on_the_whole_map():
    mixer = made(sr_ratio=4)
    x = draw(1, 8, 16, 12).requires_grad_()
    mixer(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


@torch.no_grad()
def test_temperature_starts_at_the_papers():
    for mixer in (AggregatedAttention(48), CosineAttention(48)):
        torch.testing.assert_close(F.softplus(mixer.temperature), torch.full((2, 1, 1), 1 / 0.24))


@pytest.mark.parametrize("kind", [AggregatedAttention, CosineAttention])
def test_gradcheck(kind):
    mixer = made(kind, dim=4, **({"sr_ratio": 2} if kind is AggregatedAttention else {}))
    assert torch.autograd.gradcheck(mixer, draw(1, 4, 2, 3).requires_grad_())


@pytest.mark.parametrize("kind", [AggregatedAttention, CosineAttention])
def test_dropout_acts_in_training_alone(kind):
    torch.manual_seed(0)
    mixer, x = kind(16, attn_drop=0.5), torch.randn(1, 16, 5, 5)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))


def test_a_fixed_pool_makes_the_cost_linear():
    costs = {}
    for pool_size in (None, 7):
        mixer = AggregatedAttention(24, sr_ratio=2, pool_size=pool_size)
        costs[pool_size] = [count_macs(mixer, torch.zeros(1, 24, side, side)) / side**2 for side in (35, 70)]
    assert costs[7][1] < 1.05 * costs[7][0]
    assert costs[None][1] > 1.5 * costs[None][0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AggregatedAttention(32, 5), r"num_heads must divide dim=32, got num_heads=5; use num_heads=4"),
        (lambda: AggregatedAttention(32, window_size=4), r"window_size must be odd.* got 4; the paper's is 3"),
        (lambda: AggregatedAttention(32, sr_ratio=0), r"sr_ratio must be at least 1, got 0"),
        (lambda: AggregatedAttention(32, pool_size=0), r"pool_size must be at least 1, got 0"),
        (lambda: CosineAttention(32, pretrain_size=0), r"pretrain_size must be .* at least 1, got 0"),
        (lambda: CosineAttention(32, 3), r"num_heads must divide dim=32"),
        (
            lambda: AggregatedAttention(32, pool_size=4)(torch.zeros(1, 32, 4, 9)),
            r"pool_size=4 must be smaller than the shorter side of the map, got a map of 4x9; take a smaller",
        ),
        (lambda: AggregatedAttention(32)(torch.zeros(1, 16, 4, 9)), r"with C=32, got \(1, 16, 4, 9\)"),
        (lambda: CosineAttention(32)(torch.zeros(1, 36, 32)), r"takes maps \(B, C, H, W\).*InLayout"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
