"""Performer mixer: the definition, what its features estimate, numbers that overflow, likely mistakes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.mixers import PerformerMixer, performer_attention, positive_features
from tokenry.mixers.performer import orthogonal_rows

pytestmark = pytest.mark.method("t2t-vit")


def plain(q, k, v, w, eps):
    """One number at a time, in double precision."""

    def feature(u, row):
        return math.exp(sum(a * b for a, b in zip(row, u, strict=True)) - sum(a * a for a in u) / 2) / math.sqrt(len(w))

    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i, query in enumerate(q.tolist()):
        weights = []
        for key in k.tolist():
            weights.append(sum(feature(query, row) * feature(key, row) for row in w.tolist()))
        for e in range(v.shape[1]):
            out[i, e] = sum(a * b for a, b in zip(weights, v[:, e].tolist(), strict=True)) / (sum(weights) + eps)
    return out


@settings(max_examples=20, deadline=None)
@given(
    queries=st.integers(1, 4), keys=st.integers(1, 5), dim=st.integers(1, 5), features=st.integers(1, 4),
    size=st.sampled_from([0.1, 1.0, 3.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_attention_is_the_definition(queries, keys, dim, features, size, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, w = (
        torch.randn(*shape, generator=generator) for shape in ((queries, dim), (keys, dim), (keys, 3), (features, dim))
    )
    q, k = q * size, k * size
    for eps in (0.0, 1e-8, 1e-2):
        found = performer_attention(q, k, v, w, eps)
        torch.testing.assert_close(found.double(), plain(q, k, v, w, eps), rtol=1e-3, atol=1e-5)


def dense(mixer, x):
    """Output and weights (heads, N, N) of a mixer for one image, all pairs written out."""
    k, q, v = mixer.kqv(x).unflatten(-1, (3, mixer.num_heads, -1)).unbind(-3)  # (N, heads, d)
    k, q = (positive_features(u.transpose(0, 1) * mixer.head_dim**-0.25, mixer.w) for u in (k, q))
    weights = q @ k.transpose(1, 2)
    weights = weights / weights.sum(-1, keepdim=True)
    return mixer.proj((weights @ v.transpose(0, 1)).transpose(0, 1).flatten(1)), weights


@pytest.mark.parametrize(("dim", "heads", "tokens"), [(16, None, 1), (64, None, 7), (24, 4, 12)])
def test_mixer_writes_no_matrix_of_pairs_but_means_one(dim, heads, tokens):
    torch.manual_seed(0)
    mixer, x = PerformerMixer(dim, num_heads=heads), 3 * torch.randn(2, tokens, dim)
    torch.nn.init.normal_(mixer.kqv.weight, std=0.1)
    y, shown = mixer(x), mixer.token_maps(x)["attention"]
    for i in range(2):
        expected, weights = dense(mixer, x[i])
        torch.testing.assert_close(y[i], expected, rtol=1e-4, atol=1e-5)
        assert (weights > 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]), rtol=0, atol=1e-5)
        torch.testing.assert_close(shown[i], weights.mean((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_gradients_are_those_of_the_definition(eps):
    torch.manual_seed(0)
    leaves = [torch.randn(2, n, 6, requires_grad=True) for n in (4, 5, 5)]
    q, k, v = leaves
    w = torch.randn(3, 6)
    weights = positive_features(q, w) @ positive_features(k, w).transpose(1, 2)
    expected = weights @ v / (weights.sum(-1, keepdim=True) + eps)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    found = torch.autograd.grad(performer_attention(q, k, v, w, eps).square().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "gain", "what"),
    [
        (8, math.sqrt(8), "gaussian"),  # T2T-ViT's rows at ratio 0.5
        (16, math.sqrt(16), "softmax"),
        (32, math.sqrt(32), "softmax"),
        (8, math.sqrt(16), "softmax"),  # the mixer's default at ratio 0.5
    ],
)
def test_mean_of_the_features(features, gain, what):
    generator = torch.Generator().manual_seed(0)
    q, k = (0.12 * torch.randn(16, generator=generator) for _ in range(2))
    products = []
    for _ in range(3000):
        w = orthogonal_rows(features, 16, gain, generator)
        products.append(positive_features(q, w) @ positive_features(k, w))
    expected = torch.exp(-(q - k).square().sum() / 4) if what == "gaussian" else torch.exp(q @ k)
    assert torch.stack(products).mean() == pytest.approx(expected.item(), rel=0.01)
    other = torch.exp(q @ k) if what == "gaussian" else torch.exp(-(q - k).square().sum() / 4)
    assert abs(other / expected - 1) > 0.03  # the two can be told apart


def test_default_rows_and_released_rows():
    norms = {released: PerformerMixer(64, num_heads=1, released=released).w.norm(dim=1) for released in (False, True)}
    torch.testing.assert_close(norms[False], torch.full((32,), 8.0))
    torch.testing.assert_close(norms[True], torch.full((32,), math.sqrt(32)))
    assert PerformerMixer(64, 2.0, 1).w.square().sum(1).mean().item() == pytest.approx(64)


def test_more_features_come_closer_to_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 16) * size for size in (0.3, 0.3, 1))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    errors = []
    for features in (8, 64, 2048):
        w = orthogonal_rows(features, 16, math.sqrt(features))
        if features < 16:
            w = w * math.sqrt(2)
        errors.append((performer_attention(q, k, v, w) - exact).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * exact.square().mean()


@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_no_exponential_overflows(size, eps):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 512) for _ in range(3))
    w = orthogonal_rows(512, 512, math.sqrt(512))
    q = (size * q).requires_grad_()
    y = performer_attention(q, size * k, v, w, eps)
    (gradient,) = torch.autograd.grad(y.sum(), q)
    assert y.isfinite().all() and gradient.isfinite().all()
    assert y.abs().max() <= v.abs().max() + 1e-4  # an average
    aligned = performer_attention(w[None, :1], w[None, :1], v[:, :1], w, eps)  # an exponent of |w|^2 / 2 = 256 each
    torch.testing.assert_close(aligned, v[:, :1])


def test_small_constant_of_the_released_form_hides_tokens_of_large_norm():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 64) for _ in range(3))
    w = orthogonal_rows(32, 64, math.sqrt(32))
    assert performer_attention(q, k, v, w, 1e-8).abs().median() < 1e-6  # as in the authors' code
    assert performer_attention(q, k, v, w).abs().median() > 0.1


def test_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    mixer, x = PerformerMixer(32).eval(), 4 * torch.randn(1, 8, 32)
    k, q, v = mixer.project(x)
    with torch.autocast("cpu", torch.float16):
        inside = performer_attention(q, k, v, mixer.w)
    torch.testing.assert_close(inside, performer_attention(q, k, v, mixer.w), rtol=0, atol=0)


def test_random_rows_are_saved_and_fixed():
    first, second = (PerformerMixer(16, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.w, second.w) and not torch.equal(first.w, PerformerMixer(16).w)
    assert not first.w.requires_grad and "w" in first.state_dict() and first.no_weight_decay() == {"w"}
    first.requires_grad_(True)
    with pytest.warns(UserWarning, match="random features w of a performer are being trained"):
        first(torch.zeros(1, 2, 16))
    first.eval()(torch.zeros(1, 2, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PerformerMixer(16, ratio=0.01),
            "leaves no random feature for heads of 16 channels; use at least ratio=0.06",
        ),
        (lambda: PerformerMixer(16, num_heads=3), "num_heads must divide dim=16"),
        (lambda: PerformerMixer(16)(torch.zeros(1, 4, 8)), r"C=16, got \(1, 4, 8\)"),
        (lambda: PerformerMixer(16)(torch.zeros(1, 16, 4, 4)), r"for a map \(B, C, H, W\) use"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
