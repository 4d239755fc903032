"""Sliding-window attention: one offset after the other against copies of all neighbours."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.kernels import sliding_window
from tokenry.kernels.sliding_window import SHIFTED, steps_for, unfolded_scores, unfolded_sum, window_scores, window_sum

SIZES = st.integers(1, 7)
WINDOWS = st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5, 7]))


def draw(*shape: int, dtype=torch.float64, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels in its interpreter, in place of the shifted products."""
    kernels = pytest.importorskip("tokenry.kernels._triton.sliding_window", exc_type=ImportError)
    if not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off; set TRITON_INTERPRET=1")
    monkeypatch.setattr(sliding_window, "steps_for", lambda x: kernels.FUSED)


def gradients(function, inputs, weights):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.masked_fill(out.isinf(), 0.0), leaves, weights)]


@given(b=st.integers(1, 2), g=st.integers(1, 3), d=st.integers(1, 5), h=SIZES, w=SIZES, window=WINDOWS)
def test_scores_equal_the_definition(b, g, d, h, w, window):
    inputs = [draw(b, g, d, h, w, seed=1), draw(b, g, d, h, w, seed=2), draw(g, math.prod(window), seed=3)]
    weights = draw(b, g, math.prod(window), h, w, seed=4)
    expected = gradients(lambda q, k, r: unfolded_scores(q, k, window, r), inputs, weights)
    actual = gradients(lambda q, k, r: window_scores(q, k, window, r), inputs, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@given(
    b=st.integers(1, 2), g=st.integers(1, 3), d=st.integers(1, 5), h=SIZES, w=SIZES, window=WINDOWS,
    stride=st.integers(1, 3), dilation=st.integers(1, 2),
)  # fmt: skip
def test_sums_equal_the_definition(b, g, d, h, w, window, stride, dilation):
    inputs = [draw(b, g, math.prod(window), -(-h // stride), -(-w // stride), seed=1), draw(b, g, d, h, w, seed=2)]
    weights = draw(b, g, d, -(-h // stride), -(-w // stride), seed=4)
    options = {"stride": stride, "dilation": dilation}
    expected = gradients(lambda a, v: unfolded_sum(a, v, window, **options), inputs, weights)
    actual = gradients(lambda a, v: window_sum(a, v, window, **options), inputs, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel, padding", [(2, 0), (2, 1), ((3, 2), (0, 1)), (3, 0), (3, 3)])
def test_sums_with_padding_of_their_own(kernel, padding):
    values = draw(2, 2, 3, 5, 6)
    pad, size = (padding, padding) if isinstance(padding, int) else padding, (kernel, kernel)
    size = size if isinstance(kernel, int) else kernel
    h, w = 5 + 2 * pad[0] - size[0] + 1, 6 + 2 * pad[1] - size[1] + 1
    inputs = [draw(2, 2, math.prod(size), h, w, seed=1), values]
    weights = draw(2, 2, 3, h, w, seed=2)
    expected = gradients(lambda a, v: unfolded_sum(a, v, kernel, padding=padding), inputs, weights)
    actual = gradients(lambda a, v: window_sum(a, v, kernel, padding=padding), inputs, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (2, 5)])
def test_gradcheck(size, window):
    q, k, r = draw(1, 2, 2, *size), draw(1, 2, 2, *size, seed=1), draw(2, window**2, seed=2)
    leaves = [x.requires_grad_() for x in (q, k, r)]
    assert torch.autograd.gradcheck(lambda *x: window_scores(x[0], x[1], window, x[2]).softmax(2), leaves)
    a, v = draw(1, 2, window**2, *size, seed=3).requires_grad_(), draw(1, 2, 2, *size, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: window_sum(a, v, window), (a, v))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("window", [1, 3, (5, 3)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (1, 2, 70, 9, 8)])
def test_fused_scores_equal_the_definition(shape, window):
    offsets = window[0] * window[1] if isinstance(window, tuple) else window**2
    inputs = [draw(*shape, dtype=torch.float32, seed=s) for s in (1, 2)]
    inputs.append(draw(shape[1], offsets, dtype=torch.float32, seed=3))
    weights = draw(shape[0], shape[1], offsets, *shape[3:], dtype=torch.float32, seed=4)
    expected = gradients(lambda q, k, r: unfolded_scores(q, k, window, r), inputs, weights)
    actual = gradients(lambda q, k, r: window_scores(q, k, window, r), inputs, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("window", "options"),
    [(3, {}), (5, {"dilation": 2}), (3, {"stride": 2}), ((2, 3), {"stride": (2, 3), "padding": (1, 0)})],
)
@pytest.mark.parametrize("channels", [3, 70])
def test_fused_sums_equal_the_definition(window, options, channels):
    values = draw(2, 2, 7, 9, channels, dtype=torch.float32).permute(0, 1, 4, 2, 3)
    offsets = window[0] * window[1] if isinstance(window, tuple) else window**2
    out = sliding_window._window(window, **options).output_size(7, 9)
    inputs = [draw(2, 2, offsets, *out, dtype=torch.float32, seed=1), values]
    weights = draw(2, 2, channels, *out, dtype=torch.float32, seed=2)
    expected = gradients(lambda a, v: unfolded_sum(a, v, window, **options), inputs, weights)
    actual = gradients(lambda a, v: window_sum(a, v, window, **options), inputs, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused")
def test_fused_in_bfloat16_adds_up_in_float32():
    q, k = draw(1, 2, 24, 5, 6).bfloat16(), draw(1, 2, 24, 5, 6, seed=1).bfloat16()
    scores = window_scores(q, k, 3)
    assert torch.equal(scores, unfolded_scores(q.double(), k.double(), 3).float().bfloat16())
    weights = scores.softmax(2)
    assert torch.equal(window_sum(weights, k, 3), unfolded_sum(weights.double(), k.double(), 3).float().bfloat16())


@pytest.mark.usefixtures("fused")
def test_fused_takes_empty_batches():
    q = torch.zeros(0, 2, 4, 3, 3)
    assert window_scores(q, q, 3).shape == (0, 2, 9, 3, 3)
    assert window_sum(torch.zeros(0, 2, 9, 3, 3), q, 3).shape == q.shape


def test_shifted_products_run_on_the_cpu():
    assert steps_for(draw(1, 1, 1, 1, 1)) is SHIFTED


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_device(capability, tmp_path):
    """Down to machine code for A100 and H100/H200, in a process where the interpreter is off."""
    pytest.importorskip("triton")
    code = f"""
import os
os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR={str(tmp_path)!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import tokenry.kernels._triton.sliding_window as kernels
types = dict.fromkeys(["X", "V", "Bias", "Weights"], "*bf16") | {{"Out": "*fp32", "outside": "fp32"}}
sizes = dict(K=9, KW=3, HAS_BIAS=True, N_BLOCK=64, D_BLOCK=32)
for kernel in (kernels._dots, kernels._gather, kernels._scatter):
    names = kernel.arg_names
    fixed = {{n: value for n, value in sizes.items() if n in names}}
    signature = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
    source = ASTSource(kernel, signature, {{(names.index(n),): value for n, value in fixed.items()}})
    built = triton.compile(source, target=GPUTarget("cuda", {capability}, 32))
    assert len(built.asm["cubin"]) > 1000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_on_a_gpu(dtype):
    leaves = [draw(2, 3, 24, 14, 15, seed=s).to("cuda", dtype).requires_grad_() for s in range(3)]
    outputs = []
    for scores, total in ((window_scores, window_sum), (unfolded_scores, unfolded_sum)):
        y = total(scores(leaves[0], leaves[1], 3).softmax(2), leaves[2], 3)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)


def test_the_middle_offset_is_the_position_itself():
    q, k = draw(2, 3, 4, 5, 6), draw(2, 3, 4, 5, 6, seed=1)
    torch.testing.assert_close(window_scores(q, k, 5)[:, :, 12], (q * k).sum(2))
    only = torch.zeros(2, 3, 25, 5, 6, dtype=q.dtype)
    only[:, :, 12] = 1.0
    torch.testing.assert_close(window_sum(only, k, 5), k)


def test_offsets_are_in_row_major_order():
    values = torch.arange(9.0).view(1, 1, 1, 3, 3)
    for number in range(9):
        only = torch.zeros(1, 1, 9, 3, 3)
        only[:, :, number] = 1.0
        assert window_sum(only, values, 3)[0, 0, 0, 1, 1] == number


@pytest.mark.parametrize("layout", ["positions first", "cut from one tensor", "transposed map"])
def test_views_of_any_strides(layout):
    if layout == "positions first":  # (B, H, W, G, D), as a linear layer on tokens leaves it
        q, k = (draw(2, 4, 5, 2, 3, seed=s).permute(0, 3, 4, 1, 2) for s in (0, 1))
    elif layout == "cut from one tensor":
        q, k = draw(2, 4, 5, 2, 2, 3).permute(3, 0, 4, 5, 1, 2).unbind(0)
    else:
        q, k = (draw(2, 2, 3, 5, 4, seed=s).mT for s in (0, 1))
    assert not q.is_contiguous()
    torch.testing.assert_close(window_scores(q, k, 3), unfolded_scores(q, k, 3))
    a = window_scores(q, k, 3).softmax(2)
    torch.testing.assert_close(window_sum(a.transpose(0, 1).contiguous().transpose(0, 1), k, 3), unfolded_sum(a, k, 3))


def test_bfloat16_adds_up_in_float32():
    q, k = draw(1, 2, 64, 6, 6).bfloat16(), draw(1, 2, 64, 6, 6, seed=1).bfloat16()
    scores = window_scores(q, k, 3)
    assert scores.dtype == torch.bfloat16
    assert torch.equal(scores, unfolded_scores(q.double(), k.double(), 3).float().bfloat16())
    weights = scores.softmax(2)
    assert torch.equal(window_sum(weights, k, 3), unfolded_sum(weights.double(), k.double(), 3).float().bfloat16())


def test_mixed_dtypes_keep_the_dtype_of_the_first_and_of_the_values():
    q = draw(1, 1, 4, 3, 3).bfloat16().requires_grad_()
    bias = draw(1, 9).float().requires_grad_()
    weights = window_scores(q, q, 3, bias).float().softmax(2)
    out = window_sum(weights, q, 3)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32


def test_only_wanted_gradients_are_computed():
    q, k = draw(1, 1, 2, 3, 3), draw(1, 1, 2, 3, 3, seed=1).requires_grad_()
    window_scores(q, k, 3).softmax(2)[..., 0, 0].square().sum().backward()
    assert q.grad is None and k.grad.abs().sum() > 0


def test_nothing_of_size_k_times_d_is_kept():
    """Saved for the backward pass: the inputs and nothing else."""
    q, k = draw(1, 2, 16, 8, 8).requires_grad_(), draw(1, 2, 16, 8, 8, seed=1).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scores = window_scores(q, k, 5)
        window_sum(scores, k, 5)
    assert max(x.numel() for x in kept) == scores.numel() == 25 * 2 * 64
    assert sum(x.numel() for x in kept) == 3 * q.numel() + scores.numel()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break(dtype, backend):
    def attention(q, k, v, r):
        return window_sum(window_scores(q, k, 3, r).softmax(2)[..., ::2], v, 3, stride=(1, 2))

    leaves = [draw(1, 2, 3, 4, 5, seed=s, dtype=dtype).requires_grad_() for s in range(3)]
    leaves.append(draw(2, 9, dtype=dtype).requires_grad_())
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    expected = attention(*leaves)
    out = torch.compile(attention, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(out, expected, **close)
    ours = torch.autograd.grad(out.square().sum(), leaves)
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, **close)


def test_bad_input():
    x = draw(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"kernel_size=4 has no middle; take an odd kernel_size"):
        window_scores(x, x, 4)
    with pytest.raises(ValueError, match=r"kernel_size must be at least 1 in both directions, got 0"):
        window_scores(x, x, 0)
    with pytest.raises(
        ValueError, match=r"q and k must share one shape .* got \(1, 2, 3, 4, 4\) and \(1, 2, 3, 4, 3\)"
    ):
        window_scores(x, x[..., :3], 3)
    with pytest.raises(ValueError, match=r"bias must be \(G, K\) = \(2, 9\).* got \(2, 3\)"):
        window_scores(x, x, 3, draw(2, 3))
    with pytest.raises(ValueError, match=r"need weights \(1, 2, 9, 2, 2\), got \(1, 2, 9, 4, 4\)"):
        window_sum(draw(1, 2, 9, 4, 4), x, 3, stride=2)
    with pytest.raises(ValueError, match=r"weights must be \(B, G, K, H', W'\)"):
        window_sum(draw(1, 9, 4, 4), x, 3)
    with pytest.raises(ValueError, match=r"stride must be at least 1"):
        window_sum(draw(1, 2, 9, 4, 4), x, 3, stride=0)
