"""The kernels of Cut Cross-Entropy: both backends against the definition and against the authors' own gradients."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.kernels.linear_cross_entropy import Backend, LinearNLL, Operands, Plan, dense_nll
from tokenry.kernels.linear_cross_entropy_tiles import CHUNKED, Chunked

pytestmark = pytest.mark.method("cce")


@pytest.fixture(params=["chunked", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "chunked":
        return CHUNKED
    kernels = pytest.importorskip("tokenry.kernels._triton.linear_cross_entropy", exc_type=ImportError)
    if not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off; set TRITON_INTERPRET=1")
    return kernels.TRITON


def leaves(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def problem(n=13, v=50, d=8, bias=False, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    e, c = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(v, d, generator=g, dtype=dtype)
    b = torch.randn(v, generator=g, dtype=dtype) if bias else None
    return e, c, b, torch.randint(0, v, (n,), generator=g)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["filtered_sorted", "filtered_unsorted", "filtered_e_only_softcap_bias"])
def test_golden_filtered_gradients(name, backend):
    case = GoldenCase("cce", name)
    spec = case.spec
    e, c, bias = leaves(case.inputs["e"], case.inputs["c"], case.inputs.get("bias"))
    plan = Plan(
        softcap=spec["softcap"],
        filter_eps=spec["filter_eps"],
        filter_e=spec["filter_e_grad"],
        filter_c=spec["filter_c_grad"],
        sort=spec["vocab_sort"],
        tile=(spec["block_b"], spec["block_v"]),
    )
    with torch.no_grad():
        _, mean = backend.log_sum_exp(Operands(e, c, bias, case.inputs["y"], None), plan, True)
    case.compare("logit_avg", mean, tolerance=1e-5)
    nll, lse = LinearNLL.apply(e, c, bias, case.inputs["y"], None, plan, backend)
    nll.mean().backward()
    case.compare("lse", lse, tolerance=1e-5)
    case.compare("grad_e", e.grad, tolerance=1e-5)
    case.compare("grad_c", c.grad, tolerance=1e-5)
    if bias is not None:
        case.compare("grad_bias", bias.grad, tolerance=1e-5)


def test_golden_needs_the_filter():
    """Without the filter the gradients of the sorted case differ, so that the case tests what it should."""
    case = GoldenCase("cce", "filtered_sorted")
    e, c = leaves(case.inputs["e"], case.inputs["c"])
    LinearNLL.apply(e, c, None, case.inputs["y"], None, Plan(), CHUNKED)[0].mean().backward()
    error = (e.grad - case.outputs["grad_e"]).abs().max().item()
    assert 1e-6 < error < case.spec["filter_eps"] * case.inputs["c"].abs().sum(0).max().item()


@pytest.mark.parametrize(
    "bias, softcap, pick, grad_lse", list(itertools.product([False, True], [None, 5.0], [False, True], [False, True]))
)
def test_backends_equal_the_definition(backend, bias, softcap, pick, grad_lse):
    e, c, b, y = problem(n=21, v=70, d=19, bias=bias)
    rows = torch.tensor([0, 2, 3, 7, 11, 19, 20]) if pick else None
    y = y if rows is None else y[rows]
    weights = torch.linspace(-1, 2, len(y))
    plan = Plan(softcap=softcap, tile=(16, 32))
    grads = []
    for how in ("definition", "backend"):
        x = leaves(e, c, b)
        if how == "definition":
            nll, lse = dense_nll(x[0] if rows is None else x[0][rows], x[1], y, x[2], softcap)
        else:
            nll, lse = LinearNLL.apply(*x, y, rows, plan, backend)
        total = (nll * weights).sum() + ((lse**2 * weights.flip(0)).sum() if grad_lse else 0.0)
        total.backward()
        grads.append([nll.detach(), lse.detach(), *(t.grad for t in x if t is not None)])
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@given(
    n=st.integers(1, 30), v=st.integers(1, 60), d=st.integers(1, 9), bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]), tile=st.tuples(st.integers(1, 33), st.integers(1, 33)),
)  # fmt: skip
def test_chunks_of_any_size_equal_the_definition(n, v, d, bias, softcap, tile):
    e, c, b, y = problem(n, v, d, bias, seed=n * 1000 + v * 10 + d, dtype=torch.float64)
    x, z = leaves(e, c, b), leaves(e, c, b)
    dense_nll(x[0], x[1], y, x[2], softcap)[0].mean().backward()
    LinearNLL.apply(*z, y, None, Plan(softcap=softcap, tile=tile), CHUNKED)[0].mean().backward()
    for expected, actual in zip(x, z, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradcheck(softcap):
    e, c, b, y = problem(5, 11, 3, True, dtype=torch.float64)
    plan = Plan(softcap=softcap, tile=(2, 4))
    inputs = leaves(e, c, b)
    assert torch.autograd.gradcheck(lambda *x: LinearNLL.apply(*x, y, None, plan, CHUNKED), inputs)


@pytest.mark.parametrize("sort", [True, False])
def test_the_filter_keeps_its_bound(backend, sort):
    """|error of dE_n| <= eps Σ_v |C_v| g_n, entry by entry."""
    e, c, b, y = problem(64, 200, 16, True)
    c = c * 2
    eps = 2e-2
    exact, filtered = leaves(e, c, b), leaves(e, c, b)
    F.cross_entropy(torch.addmm(exact[2], exact[0], exact[1].T), y).backward()
    plan = Plan(filter_eps=eps, sort=sort, tile=(16, 16))
    LinearNLL.apply(*filtered, y, None, plan, backend)[0].mean().backward()
    error = (exact[0].grad - filtered[0].grad).abs()
    assert error.max() > 1e-5  # it did skip something
    assert (error <= eps * c.abs().sum(0) / len(y) + 1e-6).all()


def test_a_filter_on_one_gradient_leaves_the_other_exact(backend):
    e, c, b, y = problem(64, 200, 16, True)
    c = c * 2
    exact = leaves(e, c, b)
    F.cross_entropy(torch.addmm(exact[2], exact[0], exact[1].T), y).backward()
    for filter_e, filter_c, still_exact in [(True, False, (1, 2)), (False, True, (0, 2))]:
        x = leaves(e, c, b)
        plan = Plan(filter_eps=2e-2, filter_e=filter_e, filter_c=filter_c, tile=(16, 16))
        LinearNLL.apply(*x, y, None, plan, backend)[0].mean().backward()
        for index in range(3):
            error = (x[index].grad - exact[index].grad).abs().max()
            assert (error < 1e-6) == (index in still_exact)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(backend, needs):
    tensors = problem(9, 40, 8, True)
    x = [t.clone().requires_grad_(need) for t, need in zip(tensors[:3], needs, strict=True)]
    whole = leaves(*tensors[:3])
    dense_nll(whole[0], whole[1], tensors[3], whole[2])[0].sum().backward()
    LinearNLL.apply(*x, tensors[3], None, Plan(tile=(16, 16)), backend)[0].sum().backward()
    for tensor, full, need in zip(x, whole, needs, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, full.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_float32_sums(backend):
    half = torch.bfloat16 if backend is CHUNKED else torch.float16  # the interpreter multiplies no bfloat16
    e, c, b, y = (t if t.dtype == torch.long else t.to(half) for t in problem(32, 96, 32, True))
    x, truth = leaves(e, c, b), leaves(e.double(), c.double(), b.double())
    nll, lse = LinearNLL.apply(*x, y, None, Plan(tile=(16, 32), accum_e=True, accum_c=True), backend)
    nll.mean().backward()
    expected, expected_lse = dense_nll(truth[0], truth[1], y, truth[2])
    expected.mean().backward()
    assert nll.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    for actual, exact in zip(x, truth, strict=True):
        assert actual.grad.dtype == half
        cosine = F.cosine_similarity(actual.grad.double().flatten(), exact.grad.flatten(), dim=0)
        assert cosine > 0.9999


@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
def test_entries_of_minus_infinity_are_left_out(backend):
    """A bias of -inf (padding rows of a head) must not make NaN, not even where a whole tile has it."""
    e, c, b, y = problem(20, 64, 8, True)
    b[:32] = -float("inf")
    y = y % 32 + 32
    nll, lse = LinearNLL.apply(e, c, b, y, None, Plan(tile=(16, 16)), backend)
    torch.testing.assert_close(nll, F.cross_entropy(torch.addmm(b, e, c.T), y, reduction="none"), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(lse).all()


def test_padding_columns_stay_out_under_a_softcap(backend):
    """V not a multiple of the tile: the padding must not count as a logit of -s."""
    e, c, _, y = problem(5, 17, 8)
    nll, _ = LinearNLL.apply(e, c, None, y, None, Plan(softcap=0.5, tile=(16, 16)), backend)
    torch.testing.assert_close(nll, dense_nll(e, c, y, None, 0.5)[0], rtol=1e-4, atol=1e-5)


def test_a_tile_stays_below_its_size():
    chunked = Chunked(cpu_bytes=1 << 16)
    for n, v in [(1, 10), (100, 7), (5000, 128_000)]:
        tokens, entries = chunked.tile(n, v, torch.device("cpu"), Plan())
        assert 1 <= tokens <= n and 1 <= entries <= v and (tokens * entries * 4 <= 1 << 16 or entries == 1)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_device(capability, tmp_path):
    """Down to machine code for A100 and H100/H200, in a process where the interpreter is off."""
    pytest.importorskip("triton")
    code = f"""
import os
os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR={str(tmp_path)!r}, TRITON_DEFAULT_FP_FUSION="1")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import tokenry.kernels._triton.linear_cross_entropy as kernels
half = dict.fromkeys(["E", "C", "Bias", "DE", "DC"], "*bf16")
types = half | dict.fromkeys(["Targets", "Rows"], "*i64") | dict.fromkeys(["Locks", "LocksE", "LocksC", "Order"], "*i32")
types |= dict.fromkeys(["Out", "LSE", "Mean", "GradNLL", "GradLSE", "DB"], "*fp32") | dict.fromkeys(["softcap", "eps"], "fp32")
flags = ["HAS_BIAS", "HAS_ROWS", "HAS_SOFTCAP", "HAS_MEAN", "HAS_GRAD_LSE", "HAS_ORDER", "WANT_E", "WANT_C", "WANT_B"]
sizes = dict(N_BLOCK=128, V_BLOCK=128, D_BLOCK=32, D_BACK=64, GROUP=8, PRECISION="ieee", FILTER_E=True, FILTER_C=True)
for kernel in (kernels._target_logits, kernels._log_sum_exp, kernels._gradients):
    names = kernel.arg_names
    fixed = {{n: value for n, value in (sizes | dict.fromkeys(flags, True)).items() if n in names}}
    signature = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
    source = ASTSource(kernel, signature, {{(names.index(n),): value for n, value in fixed.items()}})
    built = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=8, num_stages=3))
    assert len(built.asm["cubin"]) > 1000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_device(dtype):
    """The compiled kernels against float64, with row numbers, bias, softcap, order and filter."""
    from tokenry.kernels._triton.linear_cross_entropy import TRITON

    e, c, b, y = (t.cuda() if t.dtype == torch.long else t.to("cuda", dtype) for t in problem(700, 5001, 160, True))
    c = c / 4
    rows = torch.arange(0, 700, 2, device="cuda")
    x, truth = leaves(e, c, b), leaves(e.double(), c.double(), b.double())
    plan = Plan(softcap=20.0, filter_eps=torch.finfo(dtype).eps / 32, accum_e=True, accum_c=True)
    nll, lse = LinearNLL.apply(*x, y[rows], rows, plan, TRITON)
    (nll.mean() + 1e-2 * lse.square().mean()).backward()
    expected, expected_lse = dense_nll(truth[0][rows], truth[1], y[rows], truth[2], 20.0)
    (expected.mean() + 1e-2 * expected_lse.square().mean()).backward()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    for actual, exact in zip(x, truth, strict=True):
        assert F.cosine_similarity(actual.grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.999
