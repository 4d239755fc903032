"""The AFF mixer: golden cases, the equation term by term, the convolution it equals, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.mixers import AFFMixer, aff_kernel

pytestmark = pytest.mark.method("affnet")


def made(seed, dim=8, scale=1.0, **kwargs):
    """A mixer whose mask is far from zero, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    return drawn(AFFMixer(dim, **{"num_blocks": 4, **kwargs}), scale, generator), generator


@pytest.mark.golden
@pytest.mark.parametrize("fourier", ["fft", "matmul"])
@pytest.mark.parametrize(
    ("name", "act", "threshold"),
    [("mixer_relu", nn.ReLU, 0.01), ("mixer_odd", nn.SiLU, 0.01), ("mixer_threshold", nn.ReLU, 0.5)],
)
def test_golden(name, act, threshold, fourier):
    case = GoldenCase("affnet", name)
    state = case.state_dict()
    groups, width = state["w1"].shape[1:3]
    mixer = AFFMixer(groups * width, num_blocks=groups, act_layer=act, sparsity_threshold=threshold, fourier=fourier)
    mixer.load_state_dict(state)
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    for key, x in case.inputs.items():
        case.compare("y" if "y" in case.outputs else key, mixer(x))


def slow_filter(mixer, x):
    """The equations, one frequency, one group and one channel at a time, in float64."""
    batch, _channels, height, width = x.shape
    groups, block, hidden = mixer.w1.shape[1:]
    w1, b1, w2, b2 = (p.detach().double() for p in (mixer.w1, mixer.b1, mixer.w2, mixer.b2))
    spectrum = torch.fft.rfft2(x.double(), norm="ortho")
    masked = torch.zeros_like(spectrum)

    def shrunk(value):
        lam = mixer.sparsity_threshold
        return value - lam if value > lam else value + lam if value < -lam else 0.0

    for n in range(batch):
        for u in range(height):
            for v in range(width // 2 + 1):
                for g in range(groups):
                    f = [spectrum[n, g * block + i, u, v].item() for i in range(block)]
                    real, imag = [], []
                    for o in range(hidden):
                        real.append(
                            b1[0, g, o]
                            + sum(f[i].real * w1[0, g, i, o] - f[i].imag * w1[1, g, i, o] for i in range(block))
                        )
                        imag.append(
                            b1[1, g, o]
                            + sum(f[i].imag * w1[0, g, i, o] + f[i].real * w1[1, g, i, o] for i in range(block))
                        )
                    real, imag = mixer.act(torch.stack(real)), mixer.act(torch.stack(imag))
                    for o in range(block):
                        r = b2[0, g, o] + sum(
                            real[i] * w2[0, g, i, o] - imag[i] * w2[1, g, i, o] for i in range(hidden)
                        )
                        m = b2[1, g, o] + sum(
                            imag[i] * w2[0, g, i, o] + real[i] * w2[1, g, i, o] for i in range(hidden)
                        )
                        masked[n, g * block + o, u, v] = complex(shrunk(float(r)), shrunk(float(m))) * f[o]
    return torch.fft.irfft2(masked, s=(height, width), norm="ortho").to(x.dtype) + x


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    factor=st.integers(1, 2),
    threshold=st.sampled_from([0.0, 0.01, 0.7]),
    fourier=st.sampled_from(["fft", "matmul"]),
)
def test_matches_the_equation(h, w, factor, threshold, fourier):
    mixer, generator = made(
        h * 10 + w, dim=4, num_blocks=2, hidden_factor=factor, sparsity_threshold=threshold, fourier=fourier
    )
    x = torch.randn(1, 4, h, w, generator=generator)
    torch.testing.assert_close(mixer(x), slow_filter(mixer, x), rtol=1e-4, atol=1e-4)


@given(h=st.integers(1, 9), w=st.integers(1, 9), batch=st.integers(1, 3))
def test_is_a_circular_convolution_with_its_kernel(h, w, batch):
    mixer, generator = made(h * 10 + w, scale=0.3)
    x = torch.randn(batch, 8, h, w, generator=generator)
    kernel = aff_kernel(mixer, x)
    expected = torch.zeros_like(x)
    for i in range(h):  # the direct sum over all offsets
        for j in range(w):
            expected += kernel[:, :, i, j, None, None] * x.roll((i, j), (2, 3))
    torch.testing.assert_close(mixer(x) - x, expected, rtol=1e-4, atol=1e-4)


@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_both_ways_to_compute_agree_in_values_and_gradients(h, w):
    mixer, generator = made(h * 10 + w)
    other, _ = made(h * 10 + w, fourier="matmul")
    mixer, other = mixer.double(), other.double()
    x = torch.randn(2, 8, h, w, generator=generator, dtype=torch.float64)
    results = []
    for module in (mixer, other):
        given_x = x.clone().requires_grad_()
        y = module(given_x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [given_x, *module.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fourier", ["fft", "matmul"])
def test_gradient(fourier):
    mixer, _ = made(0, dim=4, num_blocks=2, fourier=fourier)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer.double(), (x,))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_a_zero_mask_is_the_identity_and_a_mask_of_one_doubles(size):
    x = torch.randn(2, 8, *size)
    assert torch.equal(made(0, sparsity_threshold=1e6)[0](x), x)
    mixer, _ = made(0, scale=0.0, sparsity_threshold=0.01)
    with torch.no_grad():
        mixer.b2[0] = 1.01
    torch.testing.assert_close(mixer(x), 2 * x, rtol=1e-5, atol=1e-5)


def test_is_not_shift_equivariant():
    mixer, _ = made(0)
    x = torch.randn(1, 8, 6, 6)
    assert (mixer(x.roll(1, 2)) - mixer(x).roll(1, 2)).abs().max() > 0.1


def test_every_output_depends_on_every_position():
    mixer, _ = made(0)
    x = torch.randn(1, 8, 7, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, :, 3, 4].sum(), x)
    assert (gradient.abs().amax(1) > 0).all()


@pytest.mark.parametrize("fourier", ["fft", "matmul"])
def test_batch_is_independent(fourier):
    mixer, _ = made(0, fourier=fourier)
    x = torch.randn(4, 8, 7, 5)
    torch.testing.assert_close(mixer(x)[2:3], mixer(x[2:3]))


def test_skip_dropout_and_memory_format():
    mixer, _ = made(0)
    x = torch.randn(2, 8, 6, 5)
    y = mixer(x)
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), y)
    mixer.skip = False
    torch.testing.assert_close(mixer(x) + x, y)
    dropped = AFFMixer(8, proj_drop=1.0)
    assert torch.equal(dropped(x), x)
    assert not torch.equal(dropped.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32_at_any_size(dtype):
    mixer, _ = made(0)
    x = torch.randn(2, 8, 7, 5).to(dtype)
    expected = mixer(x.float())
    y = mixer.to(dtype)(x)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_autocast_does_not_reach_the_filter():
    mixer, _ = made(0)
    x = torch.randn(2, 8, 7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert torch.equal(y, mixer(x))


def test_matmul_has_no_complex_tensor():
    mixer, _ = made(0, fourier="matmul")
    program = torch.export.export(mixer, (torch.randn(1, 8, 6, 5),))
    values = [node.meta.get("val") for node in program.graph.nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    assert torch.float32 in dtypes
    assert not any(dtype.is_complex for dtype in dtypes)


def test_state_dict_is_the_authors():
    assert {name: tuple(p.shape) for name, p in AFFMixer(32).state_dict().items()} == {
        "w1": (2, 8, 4, 4),
        "b1": (2, 8, 4),
        "w2": (2, 8, 4, 4),
        "b2": (2, 8, 4),
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 30}, r"multiple of num_blocks, got dim=30, num_blocks=8; use num_blocks=6"),
        ({"dim": 0}, "got dim=0"),
        ({"dim": 8, "num_blocks": 0}, "num_blocks=0"),
        ({"dim": 8, "hidden_factor": 0}, "hidden_factor must be a whole number"),
        ({"dim": 8, "hidden_factor": 1.5}, "hidden_factor must be a whole number"),
        ({"dim": 8, "sparsity_threshold": -0.1}, "at least 0, got -0.1"),
        ({"dim": 8, "fourier": "dct"}, "'fft' or 'matmul'"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AFFMixer(**kwargs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 49, 8), r"\(B, C, H, W\) with C=8, got \(2, 49, 8\)"),
        (torch.zeros(2, 6, 6, 8), "C=8"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.long), r"int64; convert with x.float\(\)"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.complex64), "complex64"),
    ],
)
def test_rejects_inputs(x, message):
    mixer = AFFMixer(8)
    with pytest.raises(ValueError, match=message):
        mixer(x)
    with pytest.raises(ValueError, match=message):
        aff_kernel(mixer, x)
