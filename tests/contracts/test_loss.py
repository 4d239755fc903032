"""What every loss on hidden states and a head must do, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tokenry.training import PRESETS, LinearCrossEntropy, linear_cross_entropy

LOSSES = {
    "cce": lambda **k: LinearCrossEntropy(impl="chunked", **k),
    "cce-exact": lambda **k: LinearCrossEntropy(impl="chunked", **PRESETS["exact"], **k),
    "cce-filtered": lambda **k: LinearCrossEntropy(impl="chunked", filter_eps=1e-9, **k),
    "cce-two-passes": lambda **k: lambda *x: linear_cross_entropy(*x, impl="chunked", return_lse=True, **k)[0],
    "cce-dense": lambda **k: LinearCrossEntropy(impl="dense", **k),
    "cce-auto": lambda **k: LinearCrossEntropy(**k),
    "cce-triton": lambda **k: LinearCrossEntropy(impl="triton", **k),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.method("cce")) for name in LOSSES])
def make(request):
    if request.param == "cce-triton":
        kernels = pytest.importorskip("tokenry.kernels._triton.linear_cross_entropy", exc_type=ImportError)
        if not kernels.INTERPRETED:
            pytest.skip("Triton's interpreter is off; set TRITON_INTERPRET=1")
    return LOSSES[request.param]


def problem(shape=(2, 6), v=33, d=12, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(*shape, d, generator=g).to(dtype).requires_grad_()
    c = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g).to(dtype).requires_grad_()
    return e, c, torch.randint(0, v, shape, generator=g), b


def dense(e, c, y, b, **k):
    return F.cross_entropy((e @ c.T + b).flatten(0, -2), y.flatten(), **k)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_value_and_gradients(make):
    e, c, y, b = problem()
    loss, truth = make()(e, c, y, b), dense(e, c, y, b)
    close(loss, truth)
    for a, z in zip(torch.autograd.grad(loss, (e, c, b)), torch.autograd.grad(truth, (e, c, b)), strict=True):
        close(a, z)


def test_a_sum_is_the_mean_times_the_kept(make):
    e, c, y, b = problem()
    y[0, 1:3] = -100
    close(make(reduction="sum")(e, c, y, b), make()(e, c, y, b) * 10)


def test_none_is_one_number_a_token_and_zero_where_ignored(make):
    e, c, y, b = problem()
    y[1, 4] = -100
    each = make(reduction="none")(e, c, y, b)
    assert each.shape == y.shape and each[1, 4] == 0
    close(each.flatten(), dense(e, c, y, b, reduction="none"))


def test_ignored_tokens_get_no_gradient(make):
    e, c, y, b = problem()
    y[0] = -100
    make()(e, c, y, b).backward()
    assert (e.grad[0] == 0).all() and (e.grad[1] != 0).any()


def test_a_shift_is_slicing(make):
    e, c, y, b = problem()
    close(make(shift=2)(e, c, y, b), dense(e[:, :-2], c, y[:, 2:], b))


def test_a_row_does_not_see_the_others(make):
    e, c, y, b = problem((4, 3))
    each = make(reduction="none")
    close(each(e, c, y, b)[2:3], each(e[2:3], c, y[2:3], b))


def test_the_order_of_tokens_does_not_matter(make):
    e, c, y, b = problem((7,))
    turned = torch.arange(6, -1, -1)
    close(make()(e[turned], c, y[turned], b), make()(e, c, y, b))


def test_an_upstream_factor_goes_into_the_gradient(make):
    e, c, y, b = problem()
    (once,) = torch.autograd.grad(make()(e, c, y, b), c)
    (thrice,) = torch.autograd.grad(make()(e, c, y, b) * 3, c)
    close(thrice, once * 3)


def test_the_same_twice(make):
    e, c, y, b = problem()
    first, second = (torch.autograd.grad(make()(e, c, y, b), (e, c, b)) for _ in range(2))
    assert all(torch.equal(x, z) for x, z in zip(first, second, strict=True))


def test_one_token_and_odd_sizes(make):
    e, c, y, b = problem((1, 1), v=17, d=5)
    close(make()(e, c, y, b), dense(e, c, y, b))


def test_without_a_bias_and_with_strided_inputs(make):
    e, c, y, _ = problem()
    wide = torch.cat([c, c], 1)[:, ::2].detach()
    far = e.detach().transpose(0, 1)
    close(make()(far, wide, y.T), F.cross_entropy((far @ wide.T).flatten(0, 1), y.T.flatten()))


def test_half_precision_is_finite_and_near(make):
    e, c, y, b = problem(dtype=torch.float16)  # Triton's interpreter multiplies no bfloat16
    loss = make()(e, c, y, b)
    loss.backward()
    truth = dense(e.float(), c.float(), y, b.float())
    torch.testing.assert_close(loss.float(), truth, rtol=1e-2, atol=1e-2)
    assert all(torch.isfinite(x.grad).all() and x.grad.dtype == torch.float16 for x in (e, c, b))


def test_inputs_are_left_alone(make):
    tensors = problem()
    before = [t.detach().clone() for t in tensors]
    make()(*tensors).backward()
    assert all(torch.equal(a, z) for a, z in zip(before, tensors, strict=True))


def test_compiled_around(make, request):
    """The loss inside torch.compile'd code gives what it gives outside (the cut ones break the graph there)."""
    if "cce-triton" in request.node.name:
        pytest.skip("Triton's interpreter cannot be traced")
    tensors = problem()
    loss = make()
    with torch.no_grad():
        close(torch.compile(lambda *x: loss(*x) * 2, backend="eager")(*tensors), loss(*tensors) * 2)


def test_bad_targets_are_named(make):
    e, c, y, b = problem()
    y[0, 0] = 33
    with pytest.raises(ValueError, match="got 33"):
        make()(e, c, y, b)
