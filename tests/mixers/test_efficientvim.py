"""The HSM-SSD mixer: golden case, the equations state by state, what cannot matter and what must, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.mixers import HSMSSD

pytestmark = pytest.mark.method("efficientvim")


def made(seed=0, dim=6, state_dim=3, **kwargs):
    """A mixer with every parameter drawn anew, in float64, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    return drawn(HSMSSD(dim, state_dim, **kwargs).double(), 1.0, generator), generator


def noise(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.golden
def test_golden():
    case = GoldenCase("efficientvim", "hsm_ssd_mixer")
    theirs = case.state_dict()
    mixer = HSMSSD(32, state_dim=9)
    mixer.load_state_dict(
        {
            "A": theirs["A"],
            "D": theirs["D"],
            "in_proj.weight": theirs["BCdt_proj.conv.weight"].unsqueeze(-1),
            "dwconv.weight": theirs["dw.conv.weight"],
            "hz_proj.weight": theirs["hz_proj.conv.weight"].squeeze(-1),
            "out_proj.weight": theirs["out_proj.conv.weight"].squeeze(-1),
        }
    )
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    y, h = mixer.mix(case.inputs["x"].unflatten(2, (7, 7)))
    for name, actual in (("y", y), ("h", h)):
        expected = case.outputs[name]
        case.compare(name, actual, tolerance=1e-4 * (expected.std() / expected.abs().max()).item())


def slow_mixer(mixer, x, a):
    """The equations for one image, one state and one position at a time; ``a`` stands where the authors have it."""
    (dim, height, width), states = x.shape, mixer.state_dim
    tokens = [x[:, i, j] for i in range(height) for j in range(width)]
    projected = torch.einsum("oc,chw->ohw", mixer.in_proj.weight[:, :, 0, 0], x)
    bcdt = torch.zeros_like(projected)
    for i in range(height):
        for j in range(width):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        bcdt[:, i, j] += mixer.dwconv.weight[:, 0, di + 1, dj + 1] * projected[:, i + di, j + dj]
    b, c, dt = bcdt.flatten(1).split(states)
    mixed = []
    for n in range(states):
        shares = torch.exp(dt[n] + a[n])
        shares = shares / shares.sum()
        h = sum(shares[k] * b[n, k] * token for k, token in enumerate(tokens))
        h, z = (mixer.hz_proj.weight @ h).chunk(2)
        mixed.append(mixer.out_proj.weight @ (h * z * torch.sigmoid(z) + h * mixer.D))
    y = [sum(c[n, k] * mixed[n] for n in range(states)) for k in range(len(tokens))]
    return torch.stack(y, 1).view(dim, height, width), torch.stack(mixed, 1)


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    dim=st.integers(1, 5),
    states=st.integers(1, 4),
    expand=st.sampled_from([1.0, 2.0]),
    shift=st.floats(-5, 5),
)
def test_matches_the_equations(h, w, dim, states, expand, shift):
    """Also that a, whatever it is, plays no part: the slow form has it, and has it shifted."""
    mixer, generator = made(h * 10 + w, dim, states, expand=expand)
    x = noise(generator, 2, dim, h, w)
    y, hidden = mixer.mix(x)
    for image in range(2):
        expected = slow_mixer(mixer, x[image], mixer.A + shift)
        torch.testing.assert_close(y[image], expected[0])
        torch.testing.assert_close(hidden[image], expected[1])


def test_tokens_in_another_order_come_out_in_that_order():
    mixer, generator = made()
    with torch.no_grad():
        mixer.dwconv.weight.zero_()[:, :, 1, 1] = 1.0  # no neighbourhood left
    x, order = noise(generator, 2, 6, 3, 5), torch.randperm(15, generator=generator)

    def moved(maps):
        return maps.flatten(2)[..., order].unflatten(2, (3, 5))

    (y, h), (moved_y, moved_h) = mixer.mix(x), mixer.mix(moved(x))
    torch.testing.assert_close(moved_y, moved(y))
    torch.testing.assert_close(moved_h, h)


def test_the_output_is_read_from_few_states():
    mixer, generator = made(dim=8, state_dim=3)
    y, h = mixer.mix(noise(generator, 1, 8, 5, 6))
    assert torch.linalg.matrix_rank(y.flatten(2))[0] == 3
    assert torch.linalg.matrix_rank(torch.cat([h, y.flatten(2)], dim=2))[0] == 3  # and lies in their span


def test_every_output_depends_on_every_position():
    mixer, generator = made()
    x = noise(generator, 1, 6, 7, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, :, 3, 4].sum(), x)
    assert (gradient.abs().amax(1) > 0).all()


def test_gradients():
    mixer, generator = made(dim=4)
    x = noise(generator, 2, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(mixer.mix, (x,))
    sum(out.square().sum() for out in mixer.mix(x)).backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.parameters() if p.requires_grad)
    assert [name for name, p in mixer.named_parameters() if not p.requires_grad] == ["A"]


def test_dropout_is_on_the_tokens_alone():
    mixer = HSMSSD(8, 4, proj_drop=1.0)
    y, h = mixer.mix(torch.randn(1, 8, 3, 3))
    assert not y.any() and h.any()


def test_half_precision_with_large_a_stays_near():
    """Added to dt in bfloat16, an ``a`` of 16 would cost four bits of it."""
    mixer, generator = made(dim=16, state_dim=9)
    with torch.no_grad():
        mixer.A.fill_(16.0)
        for p in (mixer.in_proj.weight, mixer.hz_proj.weight, mixer.out_proj.weight):
            p.mul_(0.25)
    x = noise(generator, 2, 16, 7, 5)
    exact, half = mixer(x), mixer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 8, "state_dim": 0}, "at least 1, got dim=8, state_dim=0"),
        ({"dim": 0}, "got dim=0"),
        ({"dim": 8, "expand": 0.0}, "expand=0.0"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HSMSSD(**kwargs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 49, 8), r"\(B, C, H, W\) with C=8, got \(2, 49, 8\)"),
        (torch.zeros(2, 6, 6, 8), "C=8"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.long), r"int64; convert with x.float\(\)"),
    ],
)
def test_rejects_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        HSMSSD(8)(x)
