"""Selective scan: the two-level scan and the Triton kernels against the loop that defines it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.kernels import two_level_scan
from tokenry.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step

pytestmark = pytest.mark.method("hrvmamba")
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z", "initial_state")


def problem(batch=2, groups=2, channels=3, states=2, length=10, dtype=torch.float32, seed=0):
    """Every argument of the scan."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    width = groups * channels
    return {
        "u": draw(batch, width, length),
        "delta": draw(batch, width, length),
        "A": -draw(width, states).abs(),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
        "D": draw(width),
        "delta_bias": draw(width),
        "z": draw(batch, width, length),
        "initial_state": draw(batch, width, states),
    }


def results(function, arguments, **options):
    """Outputs and gradients of a weighted sum of them, everything by name."""
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
    y, last = function(**leaves, return_last_state=True, **options)
    weights = torch.linspace(-1, 2, y.numel(), dtype=last.dtype).view(y.shape)
    ((y * weights).sum() + last.square().sum()).backward()
    return {"y": y.detach(), "last": last.detach()} | {k: v.grad for k, v in leaves.items()}


def agree(actual, expected, rtol=1e-4, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.golden
def test_golden():
    case = GoldenCase("hrvmamba", "op_selective_scan")
    x = case.inputs
    for function in (selective_scan, selective_scan_reference):
        outputs = [
            function(*(x[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias"))),
            function(x["u"], x["delta"].abs(), x["A"], x["B"], x["C"], delta_softplus=False),
        ]
        for name, y in zip(case.outputs, outputs, strict=True):
            case.compare(name, y)


@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), channels=st.integers(1, 4), states=st.integers(1, 4),
    length=st.integers(1, 40), softplus=st.booleans(), reverse=st.booleans(),
)  # fmt: skip
def test_equals_the_definition(batch, groups, channels, states, length, softplus, reverse):
    arguments = problem(batch, groups, channels, states, length, torch.float64, seed=length)
    if not softplus:  # steps must be positive
        arguments["delta"], arguments["delta_bias"] = arguments["delta"].abs(), arguments["delta_bias"].abs()
    options = {"delta_softplus": softplus, "reverse": reverse}
    expected = results(selective_scan_reference, arguments, **options)
    agree(results(selective_scan, arguments, **options), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_of_any_size_give_the_same(reverse, monkeypatch):
    arguments = problem(3, 2, 5, 2, 30, torch.float64)
    expected = results(selective_scan_reference, arguments, reverse=reverse)
    for block in (1, 400, 1 << 12):
        monkeypatch.setattr(two_level_scan, "_BLOCK", block)
        agree(results(selective_scan, arguments, reverse=reverse), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    arguments = problem(1, 2, 2, 2, 7, torch.float64)
    leaves = [arguments[name].requires_grad_() for name in NAMES]

    def run(*tensors):
        *inputs, state = tensors
        return selective_scan(*inputs[:7], z=inputs[7], return_last_state=True, initial_state=state, reverse=reverse)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("options", [{}, {"reverse": True}])
def test_optional_arguments_may_be_missing(options):
    arguments = {k: v for k, v in problem(length=12).items() if k in ("u", "delta", "A", "B", "C")}
    agree(results(selective_scan, arguments, **options), results(selective_scan_reference, arguments, **options))


def test_one_group_needs_no_axis():
    x = problem(groups=1, length=9)
    flat = x | {"B": x["B"][:, 0], "C": x["C"][:, 0]}
    assert torch.equal(selective_scan(**x), selective_scan(**flat))
    torch.testing.assert_close(selective_scan_reference(**flat), selective_scan(**flat))


def test_an_empty_sequence_changes_nothing():
    x = problem(length=0)
    y, last = selective_scan(**x, return_last_state=True)
    assert y.shape == x["u"].shape and torch.equal(last, x["initial_state"])
    y, last = selective_scan_reference(**x, return_last_state=True)
    assert y.shape == x["u"].shape and torch.equal(last, x["initial_state"])
    x["u"].requires_grad_()
    selective_scan(**x).sum().backward()
    assert x["u"].grad.shape == x["u"].shape


@pytest.mark.parametrize("reverse", [False, True])
def test_reverse_is_the_scan_of_the_flipped_sequence(reverse):
    x = problem(length=23)
    flipped = {k: v.flip(-1) if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    y, last = selective_scan(**x, return_last_state=True, reverse=reverse)
    other, other_last = selective_scan(**flipped, return_last_state=True, reverse=not reverse)
    torch.testing.assert_close(y, other.flip(-1))
    torch.testing.assert_close(last, other_last)


@pytest.mark.parametrize("cut", [1, 10, 22])
def test_halves_with_the_state_handed_on_are_the_whole(cut):
    x = problem(length=23)
    y, last = selective_scan(**x, return_last_state=True)

    def part(where, state):
        some = {k: v[..., where] if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
        return selective_scan(**some | {"initial_state": state}, return_last_state=True)

    left, state = part(slice(None, cut), x["initial_state"])
    right, state = part(slice(cut, None), state)
    torch.testing.assert_close(torch.cat([left, right], -1), y)
    torch.testing.assert_close(state, last)


def test_token_by_token_is_the_whole():
    x = problem(length=11)
    y, last = selective_scan(**x, return_last_state=True)
    state, outputs = x["initial_state"], []
    for t in range(11):
        token = {k: v[..., t] if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
        del token["initial_state"]
        out, state = selective_scan_step(state, **token)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, -1), y)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("reverse", [False, True])
def test_causality(reverse):
    """A position's input reaches no output before it in the order of the scan, and every one after it."""
    x = problem(1, 1, 2, 2, 30)
    x["u"].requires_grad_()
    y = selective_scan(**x, reverse=reverse)
    (grad,) = torch.autograd.grad(y[..., 17].sum(), x["u"])
    reached = grad.abs().sum((0, 1)) > 0
    expected = torch.arange(30) >= 17 if reverse else torch.arange(30) <= 17
    assert torch.equal(reached, expected)


def test_without_memory_every_step_stands_alone():
    """A -> -inf: y = d (C . B) u + D u."""
    x = problem(length=20) | {"A": torch.full((6, 2), -1e6)}
    del x["z"], x["initial_state"]
    step = torch.nn.functional.softplus(x["delta"] + x["delta_bias"][:, None])
    inner = (x["B"] * x["C"]).sum(2).repeat_interleave(3, dim=1)
    expected = step * inner * x["u"] + x["D"][:, None] * x["u"]
    torch.testing.assert_close(selective_scan(**x), expected, rtol=1e-4, atol=1e-5)


def test_strong_decay_over_a_long_sequence_stays_finite():
    x = problem(1, 1, 4, 3, 5000) | {"A": torch.full((4, 3), -50.0)}
    x["delta"] += 20
    out = results(selective_scan, x)
    assert all(torch.isfinite(v).all() for v in out.values())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(half):
    x = problem(length=300)
    state = x.pop("initial_state")
    small = {k: v.to(half) if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    exact = {k: v.double() for k, v in small.items()}
    y, last = selective_scan(**small, initial_state=state, return_last_state=True)
    truth, truth_last = selective_scan_reference(**exact, initial_state=state.double(), return_last_state=True)
    assert y.dtype == half and last.dtype == torch.float32
    torch.testing.assert_close(last.double(), truth_last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), truth, rtol=2e-2, atol=2e-2)
    grads = results(selective_scan, small)
    assert grads["u"].dtype == half and grads["A"].dtype == torch.float32


def test_states_are_held_a_block_at_a_time():
    """Forward and backward never hold all (B, D, N, L) states."""
    from tokenry.measure import peak_activations

    x = problem(1, 1, 256, 16, 1024)
    inputs = [x[k] for k in NAMES[:7]]
    state = x["initial_state"]
    y, last, carries = two_level_scan.forward(*inputs, state, True, False)
    whole = 256 * 16 * 1024 * 4
    assert peak_activations(lambda: two_level_scan.forward(*inputs, state, True, False)) < whole / 2
    assert peak_activations(lambda: two_level_scan.backward(y, last, *inputs, carries, True, False)) < whole


def test_compiles_as_one_operator():
    x = problem(length=20)

    def run(**arguments):
        return selective_scan(**arguments).square().mean()

    leaves = {k: v.clone().requires_grad_() for k, v in x.items()}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(**leaves)
    compiled.backward()
    others = {k: v.clone().requires_grad_() for k, v in x.items()}
    plain = run(**others)
    plain.backward()
    torch.testing.assert_close(compiled, plain)
    for name in NAMES:
        torch.testing.assert_close(leaves[name].grad, others[name].grad, msg=name)
    torch.library.opcheck(
        torch.ops.tokenry.selective_scan, (*(x[k] for k in NAMES[:7]), x["initial_state"], True, False)
    )


def near(actual, expected, tolerance=1e-5):
    """Errors below a share of each tensor's largest entry: float32 sums in another order."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].cpu().double() - value).abs().max() / value.abs().max()
        assert error < tolerance, (name, error)


@pytest.fixture
def kernels():
    module = pytest.importorskip("tokenry.kernels._triton.selective_scan", exc_type=ImportError)
    if not module.INTERPRETED:
        pytest.skip("Triton's interpreter is off; set TRITON_INTERPRET=1")
    return module


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("states", "length", "softplus", "optional"),
    [(1, 1, True, True), (1, 5, True, False), (3, 37, True, True), (2, 16, False, True), (16, 20, True, True)],
)
def test_triton_kernels_equal_the_definition(kernels, monkeypatch, reverse, states, length, softplus, optional):
    """In the interpreter, through the operator; tiles of 16 so that there are several."""
    monkeypatch.setattr(kernels, "tiles", lambda length, states: (16, -(-length // 16)))
    monkeypatch.setattr(sys.modules["tokenry.kernels.selective_scan"], "_kernels", lambda device: kernels)
    x = problem(2, 2, 2, states, length)
    if not optional:
        del x["D"], x["delta_bias"], x["z"], x["initial_state"]
    if not softplus:
        x["delta"], x["delta_bias"] = x["delta"].abs(), x["delta_bias"].abs()
    options = {"delta_softplus": softplus, "reverse": reverse}
    near(results(selective_scan, x, **options), results(selective_scan_reference, x, **options))


def test_triton_kernels_in_half_precision_and_far_steps(kernels, monkeypatch):
    """Steps from softplus(-30) to softplus(30) keep their relative precision; halves are only read and written."""
    monkeypatch.setattr(sys.modules["tokenry.kernels.selective_scan"], "_kernels", lambda device: kernels)
    x = problem(1, 1, 2, 2, 31)
    x["delta"] = torch.linspace(-30, 30, 31).expand(1, 2, 31)
    agree(results(selective_scan, x), results(selective_scan_reference, x))
    state = x.pop("initial_state")
    half = {k: v.half() if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    y, last = selective_scan(**half, initial_state=state, return_last_state=True)
    exact, exact_last = selective_scan_reference(**half, initial_state=state, return_last_state=True)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(last, exact_last, rtol=1e-4, atol=1e-4)


def test_tiles_cover_the_sequence(kernels):
    for length in (1, 16, 17, 4096, 5000):
        for states in (1, 3, 16, 200):
            size, count = kernels.tiles(length, states)
            assert size & (size - 1) == 0 and (count - 1) * size < length <= count * size


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
import tokenry.kernels._triton.selective_scan as kernels
types = dict.fromkeys(["U", "Delta", "B", "C", "DU", "DDelta", "DY"], "*bf16") | dict.fromkeys(
    ["A", "D", "Bias", "State", "Y", "Last", "Carries", "DLast", "DA", "DB", "DC", "DD", "DState"], "*fp32"
)
for states, reverse in ((1, False), (16, True)):
    size = kernels.tiles(4096, states)[0]
    fixed = dict(TILE=size, STATES=states, SOFTPLUS=True, REVERSE=reverse, HAS_D=True, HAS_BIAS=True)
    for kernel in (kernels._forward, kernels._backward):
        names = kernel.arg_names
        signature = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
        source = ASTSource(kernel, signature, {{(names.index(n),): value for n, value in fixed.items()}})
        built = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=4))
        assert len(built.asm["cubin"]) > 1000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("states", "dtype", "tolerance"), [(1, torch.float32, 1e-4), (16, torch.float32, 1e-4), (4, torch.bfloat16, 2e-2)]
)
def test_on_a_device(states, dtype, tolerance, reverse):
    """The compiled kernels against the loop in float64."""
    x = problem(2, 2, 20, states, 5000, dtype=torch.float64)
    low = {k: v.cuda().to(dtype if k in ("u", "delta", "B", "C", "z") else torch.float32) for k, v in x.items()}
    exact = results(selective_scan_reference, {k: v.double().cpu() for k, v in low.items()}, reverse=reverse)
    near(results(selective_scan, low, reverse=reverse), exact, tolerance)


def changed(**arguments):
    return problem() | arguments


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (changed(u=torch.zeros(2, 6)), "u must be"),
        (changed(delta=torch.zeros(2, 6, 9)), "delta must have the shape of u"),
        (changed(z=torch.zeros(2, 5, 10)), "z must have the shape of u"),
        (changed(A=torch.zeros(5, 2)), "6 channels"),
        (changed(A=torch.zeros(6, 0)), "at least one state"),
        (changed(A=torch.ones(6, 2)), "A must not be positive"),
        (changed(A=torch.full((6, 2), torch.nan)), "A must not be positive"),
        (changed(B=torch.zeros(2, 2, 3, 10)), "B must be"),
        (changed(C=torch.zeros(2, 1, 2, 10)), "same number of groups"),
        (changed(B=torch.zeros(2, 4, 2, 10), C=torch.zeros(2, 4, 2, 10)), "must divide the 6 channels"),
        (changed(D=torch.zeros(7)), "D must have one entry per channel"),
        (changed(delta_bias=torch.zeros(2, 6)), "delta_bias must have one entry"),
        (changed(initial_state=torch.zeros(2, 6, 3)), "initial_state must be"),
        (changed(initial_state=torch.zeros(2, 6, 2, dtype=torch.float16)), "half precision"),
    ],
)
def test_bad_input(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)
