"""Dynamic local attention, sparse channel attention and the op below them: golden cases, equations, identities, bad input."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.kernels import dynamic_dwconv
from tokenry.mixers import DynamicLocalAttention, SparseChannelAttention
from tokenry.mixers.sparse_channel import window_starts

pytestmark = pytest.mark.method("dlgsanet")

LOCAL = {
    "conv0": "proj_in",
    "conv.conv1.0": "reduce",
    "conv.conv1.1": "dwconv",
    "conv.conv2.0": "expand",
    "conv1": "proj_out",
}


def local(seed=0, dim=12, **kwargs):
    torch.manual_seed(seed)
    return DynamicLocalAttention(dim, **kwargs).eval()


def sparse(seed=0, dim=12, **kwargs):
    torch.manual_seed(seed)
    return SparseChannelAttention(dim, **kwargs).eval()


@pytest.mark.golden
def test_golden_dynamic_local(record_property):
    case = GoldenCase("dlgsanet", "mhdlsa_mixer")
    mixer = DynamicLocalAttention(24)
    renamed = {}
    for name, value in case.state_dict().items():
        prefix, _, suffix = name.rpartition(".")
        renamed[f"{LOCAL[prefix]}.{suffix}"] = value
    mixer.load_state_dict(renamed)
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    case.compare("y", mixer(case.inputs["x"]))
    record_property("worst_error", case.worst)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "kernel"), [("sparse_gsa_global", None), ("sparse_gsa_global", 6), ("sparse_gsa_windows", 6)]
)
def test_golden_sparse_channel(name, kernel, record_property):
    case = GoldenCase("dlgsanet", name)
    mixer = SparseChannelAttention(24, 6, kernel).train(name == "sparse_gsa_global")
    mixer.load_state_dict({k.replace("project_out", "proj_out"): v for k, v in case.state_dict().items()})
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    case.compare("y", mixer(case.inputs["x"]))
    record_property("worst_error", case.worst)


def slow_dwconv(x, weight, padding, stride, dilation):
    """The equation, one number at a time."""
    batch, channels, height, width = x.shape
    groups, kh, kw, out_h, out_w = weight.shape[1:]
    y = torch.zeros(batch, channels, out_h, out_w, dtype=x.dtype)
    for b in range(batch):
        for c in range(channels):
            for row in range(out_h):
                for column in range(out_w):
                    for i in range(kh):
                        for j in range(kw):
                            r = stride[0] * row + dilation[0] * i - padding[0]
                            s = stride[1] * column + dilation[1] * j - padding[1]
                            if 0 <= r < height and 0 <= s < width:
                                y[b, c, row, column] += (
                                    weight[b, c // (channels // groups), i, j, row, column] * x[b, c, r, s]
                                )
    return y


@given(
    size=st.tuples(st.integers(3, 5), st.integers(3, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_dwconv_is_the_equation(size, kernel, padding, stride, dilation, groups):
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    if min(out) < 1:
        return
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, groups, *kernel, *out, generator=generator, dtype=torch.float64)
    y = dynamic_dwconv(x, weight, padding, stride, dilation)
    torch.testing.assert_close(y, slow_dwconv(x, weight, padding, stride, dilation))


@pytest.mark.parametrize(
    ("padding", "stride", "dilation", "out"), [(1, 1, 1, (5, 7)), ((2, 0), (2, 1), (1, 2), (4, 4))]
)
def test_dwconv_gradients(padding, stride, dilation, out):
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 3, 2, *out, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: dynamic_dwconv(x, weight, padding, stride, dilation), (x, weight), check_batched_grad=False
    )


@given(h=st.integers(1, 9), w=st.integers(1, 9), memory=st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_one_kernel_everywhere_is_an_ordinary_depthwise_convolution(h, w, memory):
    generator = torch.Generator().manual_seed(10 * h + w)
    x = torch.randn(2, 6, h, w, generator=generator).contiguous(memory_format=memory)
    kernel = torch.randn(3, 7, 7, generator=generator)
    weight = kernel[None, ..., None, None].expand(2, 3, 7, 7, h, w)
    expected = F.conv2d(x, kernel.repeat_interleave(2, 0)[:, None], padding=3, groups=6)
    torch.testing.assert_close(dynamic_dwconv(x, weight, padding=3), expected, rtol=1e-4, atol=1e-4)


@given(h=st.integers(1, 5), w=st.integers(1, 5), per_group=st.sampled_from([None, 1, 3, 12]))
def test_dynamic_local_is_the_equation(h, w, per_group):
    mixer = local(h * 10 + w, kernel_size=3, channels_per_group=per_group).double()
    x = torch.randn(2, 12, h, w, generator=torch.Generator().manual_seed(w), dtype=torch.float64)
    u = torch.einsum("oi,bihw->bohw", mixer.proj_in.weight[..., 0, 0], x)
    kernels = mixer.expand(mixer.dwconv(mixer.reduce(u)))  # (B, G 9, H, W)
    groups = 12 // (per_group or 6)
    out = torch.zeros_like(u)
    for c in range(12):
        for i in range(3):
            for j in range(3):
                neighbour = F.pad(u[:, c], (1, 1, 1, 1))[:, i : i + h, j : j + w]
                out[:, c] += kernels[:, c // (12 // groups) * 9 + 3 * i + j] * neighbour
    expected = torch.einsum("oi,bihw->bohw", mixer.proj_out.weight[..., 0, 0], out)
    torch.testing.assert_close(mixer(x), expected)


def test_dynamic_local_moves_with_the_picture():
    mixer = local()
    x = torch.zeros(1, 12, 40, 40)
    x[..., 14:22, 15:23] = torch.randn(1, 12, 8, 8)
    moved = mixer(x.roll((3, -2), (2, 3)))[..., 8:32, 8:32]
    torch.testing.assert_close(moved, mixer(x).roll((3, -2), (2, 3))[..., 8:32, 8:32])


def test_dynamic_local_sees_seven_pixels():
    """The kernel of a position is made from the same 7x7 surroundings that it is applied to."""
    mixer = local(kernel_size=7)
    x = torch.randn(1, 12, 21, 21, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, :, 10, 10].sum(), x)
    seen = gradient.abs().amax(1)[0] > 0
    assert seen[7:14, 7:14].all() and not seen[:7].any() and not seen[14:].any() and not seen[:, :7].any()


@given(h=st.integers(1, 5), w=st.integers(1, 5), heads=st.sampled_from([None, 1, 4]))
def test_sparse_channel_is_the_equation(h, w, heads):
    mixer = sparse(h * 10 + w, num_heads=heads).double()
    with torch.no_grad():
        mixer.temperature.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(h))
    x = torch.randn(2, 12, h, w, generator=torch.Generator().manual_seed(w), dtype=torch.float64)
    qkv = mixer.qkv_dwconv(mixer.qkv(x)).flatten(2)
    count = heads or 6
    width = 12 // count
    out = torch.zeros(2, 12, h * w, dtype=torch.float64)
    for b in range(2):
        for head in range(count):
            for i in range(width):
                q = qkv[b, head * width + i]
                for j in range(width):
                    k, v = qkv[b, 12 + head * width + j], qkv[b, 24 + head * width + j]
                    score = mixer.temperature[head, 0, 0] * (q @ k) / (q.norm() * k.norm())
                    out[b, head * width + i] += score.clamp(min=0) * v
    expected = mixer.proj_out(out.unflatten(-1, (h, w)))
    torch.testing.assert_close(mixer(x), expected)


def test_scores_are_not_negative_and_some_are_zero():
    mixer = sparse(dim=48)
    q, k = torch.randn(2, 1, 6, 8, 30).unbind(0)
    scores = mixer.scores(q, k)
    assert (scores >= 0).all() and 0.2 < (scores == 0).float().mean() < 0.8
    assert scores.max() <= 1 + 1e-6  # cosines at temperature 1


def test_the_length_of_q_and_k_does_not_matter():
    mixer = sparse()
    q, k = torch.randn(2, 1, 6, 2, 30).unbind(0)
    torch.testing.assert_close(mixer.scores(7.0 * q, 0.3 * k), mixer.scores(q, k))
    scaled = sparse()
    with torch.no_grad():
        scaled.qkv.weight[:24] *= 5.0
    x = torch.randn(1, 12, 6, 5)
    torch.testing.assert_close(scaled(x), mixer(x))


@given(size=st.integers(1, 40), kernel=st.integers(1, 20))
def test_windows_cover_the_axis(size, kernel):
    starts = window_starts(size, kernel)
    width = min(kernel, size)
    assert starts[0] == 0 and starts[-1] == size - width and starts == sorted(set(starts))
    assert all(after - before <= width for before, after in pairwise(starts))
    assert len(starts) <= -(-size // width)


@given(h=st.integers(1, 12), w=st.integers(1, 12), kernel=st.integers(2, 13), batch=st.integers(1, 3))
def test_windows_are_averaged(h, w, kernel, batch):
    mixer = sparse(h + 13 * w, tlc_kernel=kernel)
    x = torch.randn(batch, 12, h, w, generator=torch.Generator().manual_seed(kernel))
    qkv = mixer.qkv_dwconv(mixer.qkv(x))
    total, count = torch.zeros(batch, 12, h, w), torch.zeros(h, w)
    for i in window_starts(h, kernel):
        for j in window_starts(w, kernel):
            where = (..., slice(i, i + kernel), slice(j, j + kernel))
            total[where] += mixer.attend(qkv[where])
            count[where] += 1
    torch.testing.assert_close(mixer(x), mixer.proj_out(total / count), rtol=1e-4, atol=1e-5)


def test_modes_differ_only_beyond_the_window():
    mixer, whole = sparse(tlc_kernel=8), sparse()
    small, large = torch.randn(2, 12, 8, 7), torch.randn(2, 12, 9, 7)
    assert torch.equal(mixer(small), whole(small))
    assert not torch.allclose(mixer(large), whole(large))
    assert torch.equal(mixer.train()(large), whole(large))
    assert "train: whole map, eval: windows of 8x8" in repr(mixer)
    assert "train: whole map, eval: whole map" in repr(whole)


def test_windows_have_gradients():
    mixer = sparse(dim=4, num_heads=2, tlc_kernel=3).double()
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,))


@pytest.mark.parametrize("make", [local, sparse, lambda: sparse(tlc_kernel=4)])
def test_bfloat16_and_one_image(make):
    mixer = make()
    x = torch.randn(3, 12, 9, 7)
    y = mixer(x)
    torch.testing.assert_close(mixer(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)
    half = mixer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).abs().max() < 0.05 * y.abs().max()


@pytest.mark.parametrize("make", [local, sparse])
def test_dropout_of_the_output(make):
    x = torch.randn(1, 12, 5, 4)
    mixer = make(proj_drop=1.0)
    assert not mixer.train()(x).any() and mixer.eval()(x).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DynamicLocalAttention(2), "at least 4 .* got 2"),
        (lambda: DynamicLocalAttention(16, channels_per_group=6), "channels_per_group=6; use channels_per_group=4"),
        (lambda: DynamicLocalAttention(12, kernel_size=4), "odd and positive, got 4; use 5"),
        (lambda: SparseChannelAttention(16, 6), "num_heads=6; use num_heads=4"),
        (lambda: SparseChannelAttention(12, tlc_kernel=0), "at least 1, or None for the whole map, got 0"),
        (lambda: local()(torch.zeros(2, 20, 12)), r"C=12, got \(2, 20, 12\)"),
        (lambda: sparse()(torch.zeros(2, 6, 6, 12)), r"C=12, got \(2, 6, 6, 12\)"),
        (lambda: dynamic_dwconv(torch.zeros(1, 4, 5, 5), torch.zeros(1, 2, 9, 5, 5)), r"\(B, G, kh, kw, H', W'\), got"),
        (lambda: dynamic_dwconv(torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 3, 3, 3, 3)), "3 groups of kernels for 4"),
        (
            lambda: dynamic_dwconv(torch.zeros(1, 4, 5, 5), torch.zeros(1, 2, 3, 3, 5, 5)),
            r"\(1, 2, 9, 3, 3\), got .*5, 5",
        ),
        (lambda: dynamic_dwconv(torch.zeros(2, 4, 5, 5), torch.zeros(1, 2, 3, 3, 3, 3)), r"\(2, 2, 9, 3, 3\), got \(1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
