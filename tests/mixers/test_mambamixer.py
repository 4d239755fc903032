"""Selective token and channel mixers: the references, the equations step by step, orders, streaming, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.layers import S6
from tokenry.mixers import SelectiveChannelMixer, SelectiveTokenMixer

pytestmark = pytest.mark.method("mambamixer")


def drawn(module, seed=0):
    """The module in float64 with weights away from their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        width = parameter.numel() / len(parameter)
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5
    return module.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ the references


@pytest.mark.golden
@torch.no_grad()
def test_golden_token_mixer(record_property):
    case = GoldenCase("mambamixer", "token_mixer_mamba")
    mixer = SelectiveTokenMixer(16, d_state=8, orders="causal")
    mixer.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    assert set(case.outputs) == {"y"}
    case.compare("y", mixer(case.inputs["x"]))
    record_property("worst_error", case.worst)


@pytest.mark.golden
@torch.no_grad()
def test_golden_channel_mixer(record_property):
    case = GoldenCase("mambamixer", "channel_mixer")
    mixer = SelectiveChannelMixer(num_tokens=12, d_state=8)
    mixer.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    assert set(case.outputs) == {"y"}
    case.compare("y", mixer(case.inputs["x"].mT).mT)  # stored with the channels first
    record_property("worst_error", case.worst)


@torch.no_grad()
def test_state_dict_is_that_of_a_mamba_block():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=24, state_size=4, expand=2, conv_kernel=3, time_step_rank="auto")
    torch.manual_seed(0)
    theirs, ours = MambaMixer(config, 0).eval(), SelectiveTokenMixer(24, 4, 3, orders="causal").eval()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 11, 24).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the equations, one step at a time


def slow_s6(u, ssm, order=0):
    """(B, E, L) -> (B, E, L): the recurrence of one order of an ``S6``, state by state."""
    batch, inner, length = u.shape
    states, rank = ssm.d_state, ssm.rank
    x_proj = ssm.x_proj.weight.unflatten(0, (-1, rank + 2 * states))[order]
    dt, bias, A_log, D = (
        t.unflatten(0, (-1, inner))[order] for t in (ssm.dt_proj.weight, ssm.dt_proj.bias, ssm.A_log, ssm.D)
    )
    out = torch.zeros_like(u)
    for b in range(batch):
        h = torch.zeros(inner, states, dtype=u.dtype)
        for t in range(length):
            made = x_proj @ u[b, :, t]
            enter, leave = made[rank : rank + states], made[rank + states :]
            step = torch.log1p(torch.exp(dt @ made[:rank] + bias))
            for e in range(inner):
                for n in range(states):
                    h[e, n] = math.exp(-step[e] * math.exp(A_log[e, n])) * h[e, n] + step[e] * enter[n] * u[b, e, t]
                out[b, e, t] = leave @ h[e] + D[e] * u[b, e, t]
    return out


def slow_conv(x, conv):
    """Causal depthwise convolution, tap by tap: (B, E, L)."""
    taps, out = conv.kernel_size[0], torch.zeros_like(x)
    for t in range(x.shape[2]):
        for k in range(taps):
            if t - (taps - 1) + k >= 0:
                out[:, :, t] += conv.weight[:, 0, k] * x[:, :, t - (taps - 1) + k]
    return out + conv.bias[:, None]


@given(dim=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3), states=st.integers(1, 3))
@torch.no_grad()
def test_cross2d_is_the_sum_of_four_scans(dim, height, width, states):
    mixer, x = drawn(SelectiveTokenMixer(dim, states)), tokens(2, dim, height, width)
    u, z = torch.einsum("ed,bdhw->behw", mixer.in_proj.weight, x).chunk(2, dim=1)
    u = F.silu(mixer.conv2d(u))
    places = torch.arange(height * width).view(height, width)
    orders = [places.flatten(), places.T.flatten()]
    orders += [order.flip(0) for order in orders]  # row, column, row reversed, column reversed
    total = torch.zeros_like(u.flatten(2))
    for k, order in enumerate(orders):
        total[:, :, order] += slow_s6(u.flatten(2)[:, :, order], mixer, k)
    y = torch.einsum("de,bel->bdl", mixer.out_proj.weight, total * F.silu(z.flatten(2)))
    torch.testing.assert_close(mixer(x).flatten(2), y, rtol=1e-8, atol=1e-9)


@given(dim=st.integers(1, 3), length=st.integers(1, 7), states=st.integers(1, 3), kernel=st.integers(1, 4))
@torch.no_grad()
def test_both_ways_is_the_sum_of_two_scans(dim, length, states, kernel):
    mixer, x = drawn(SelectiveTokenMixer(dim, states, kernel, orders="bi")), tokens(2, length, dim)
    u, z = (x @ mixer.in_proj.weight.T).mT.chunk(2, dim=1)
    u = F.silu(slow_conv(u, mixer.conv1d))
    y = slow_s6(u, mixer, 0) + slow_s6(u.flip(-1), mixer, 1).flip(-1)
    y = (y * F.silu(z)).mT @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), y, rtol=1e-8, atol=1e-9)


@given(count=st.integers(1, 4), channels=st.integers(1, 6), kernel=st.integers(1, 4), width=st.sampled_from([None, 2]))
@torch.no_grad()
def test_channel_mixer_is_its_equation(count, channels, kernel, width):
    mixer = drawn(SelectiveChannelMixer(num_tokens=count, width=width, d_state=2, d_conv=kernel))
    x = tokens(2, count, channels)
    s = x.mT if width is None else x.mT @ mixer.token_in.weight.T  # (B, D, width)
    gate = F.silu(s @ mixer.gate_proj.weight.T)
    u_f = F.silu(slow_conv((s @ mixer.in_proj_f.weight.T).mT, mixer.conv1d_f))
    u_b = F.silu(slow_conv((s.flip(1) @ mixer.in_proj_b.weight.T).mT, mixer.conv1d_b))
    y_f, y_b = slow_s6(u_f, mixer.ssm_f).mT, slow_s6(u_b, mixer.ssm_b).mT
    y = (y_f * gate + y_b.flip(1) * gate) @ mixer.out_proj.weight.T
    y = y if width is None else y @ mixer.token_out.weight.T
    torch.testing.assert_close(mixer(x), y.mT, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------ what follows


@torch.no_grad()
def test_causal_looks_back_alone():
    mixer, x = drawn(SelectiveTokenMixer(4, 3, orders="causal")), tokens(1, 9, 4)
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = mixer(x), mixer(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("kernel", [1, 4])
@torch.no_grad()
def test_steps_equal_the_whole(kernel):
    mixer, x = drawn(SelectiveTokenMixer(4, 3, kernel, orders="causal")), tokens(2, 9, 4)
    state, outputs = None, []
    for t in range(9):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x))


@pytest.mark.parametrize("orders", ["causal", "bi"])
@torch.no_grad()
def test_a_map_is_read_row_by_row(orders):
    mixer, x = drawn(SelectiveTokenMixer(4, 3, orders=orders)), tokens(2, 4, 3, 5)
    torch.testing.assert_close(mixer(x).flatten(2).mT, mixer(x.flatten(2).mT))


@torch.no_grad()
def test_tied_directions_are_equivariant_to_reversing_the_channels():
    mixer, x = drawn(SelectiveChannelMixer(num_tokens=5, d_state=3)), tokens(2, 5, 7)
    assert (mixer(x.flip(2)).flip(2) - mixer(x)).abs().max() > 1e-3
    for name in ("in_proj", "conv1d", "ssm"):
        getattr(mixer, f"{name}_b").load_state_dict(getattr(mixer, f"{name}_f").state_dict())
    torch.testing.assert_close(mixer(x.flip(2)).flip(2), mixer(x))


@torch.no_grad()
def test_one_channel_reduces_to_gate_and_passing():
    """With one position and no input into the states, each direction is D u: nothing of a scan is left."""
    mixer, x = drawn(SelectiveChannelMixer(num_tokens=5, d_state=3)), tokens(2, 5, 1)
    rank = mixer.ssm_f.rank
    for ssm in (mixer.ssm_f, mixer.ssm_b):
        ssm.x_proj.weight[rank:] = 0.0
    gate, y = F.silu(mixer.gate_proj.weight @ x), 0
    for way in "fb":
        conv = getattr(mixer, f"conv1d_{way}")
        u = getattr(mixer, f"in_proj_{way}").weight @ x
        y = y + getattr(mixer, f"ssm_{way}").D[:, None] * F.silu(conv.weight[:, :, -1] * u + conv.bias[:, None])
    torch.testing.assert_close(mixer(x), mixer.out_proj.weight @ (y * gate))


@torch.no_grad()
def test_a_width_equal_to_the_tokens_and_identity_maps_change_nothing():
    plain, mapped = (drawn(SelectiveChannelMixer(num_tokens=5, width=width, d_state=2)) for width in (None, 5))
    for name in ("token_in", "token_out"):
        getattr(mapped, name).weight.copy_(torch.eye(5))
    mapped.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(2, 5, 4)
    torch.testing.assert_close(mapped(x), plain(x))


@pytest.mark.parametrize("name", ["token", "causal", "channel"])
def test_gradients(name):
    mixer = drawn(
        {
            "token": lambda: SelectiveTokenMixer(2, 2),
            "causal": lambda: SelectiveTokenMixer(2, 2, orders="causal"),
            "channel": lambda: SelectiveChannelMixer(num_tokens=2, d_state=2),
        }[name]()
    )
    x = tokens(1, 2, 2, 3) if name == "token" else tokens(1, 5, 2) if name == "causal" else tokens(1, 2, 5)
    assert torch.autograd.gradcheck(mixer, (x.requires_grad_(),))


@torch.no_grad()
def test_token_maps_are_the_mean_steps():
    mixer, x = drawn(SelectiveTokenMixer(3, 2)), tokens(2, 3, 2, 4)
    u = F.silu(mixer.conv2d(torch.einsum("ed,bdhw->behw", mixer.in_proj.weight[:6], x))).flatten(2)
    steps = []
    for k in range(4):
        rows = mixer.x_proj.weight[5 * k]  # R = 1 row of R + 2 N
        for e in range(6):
            at = 6 * k + e
            steps.append(torch.log1p(torch.exp(mixer.dt_proj.weight[at] * (rows @ u) + mixer.dt_proj.bias[at])))
    torch.testing.assert_close(mixer.token_maps(x)["step"].flatten(1), torch.stack(steps).mean(0))
    sequence = SelectiveTokenMixer(3, 2, orders="causal").double()
    assert sequence.token_maps(tokens(2, 7, 3))["step"].shape == (2, 7)


@torch.no_grad()
def test_empty_batch_and_long_half_precision():
    assert SelectiveTokenMixer(4)(torch.zeros(0, 4, 3, 2)).shape == (0, 4, 3, 2)
    assert SelectiveChannelMixer(num_tokens=6)(torch.zeros(0, 6, 4)).shape == (0, 6, 4)
    torch.manual_seed(0)
    mixer, x = SelectiveTokenMixer(4, 4, orders="causal"), tokens(1, 4000, 4).float()
    exact = mixer(x)
    half = mixer.half()(x.half())
    assert half.dtype == torch.float16
    assert (half.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_starting_weights():
    torch.manual_seed(0)
    ssm = S6(64, d_state=4, dt_rank=2, lines=2, ways=2)
    step = F.softplus(ssm.dt_proj.bias)
    assert 1e-3 * 0.99 < step.min() < 3e-3 and 0.05 < step.max() < 0.101
    torch.testing.assert_close(ssm.rates(), -torch.arange(1.0, 5).expand(256, 4))
    assert torch.equal(ssm.D, torch.ones(256))
    assert ssm(torch.zeros(1, 2, 64, 3)).shape == (1, 2, 64, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SelectiveTokenMixer(8, orders="cross"), "orders must be one of causal, bi, cross2d, got 'cross'"),
        (lambda: SelectiveTokenMixer(8)(torch.zeros(1, 9, 8)), "use orders='causal' or 'bi'"),
        (lambda: SelectiveTokenMixer(8, orders="bi")(torch.zeros(1, 9, 7)), "with D=8 channels, got"),
        (lambda: SelectiveTokenMixer(8, d_conv=4), "odd on a map, got 4"),
        (lambda: SelectiveTokenMixer(0), "dim and expand"),
        (lambda: SelectiveTokenMixer(8, d_state=0), "d_state must be at least 1"),
        (lambda: SelectiveTokenMixer(8).step(torch.zeros(1, 8)), "has no steps; make the mixer with orders='causal'"),
        (lambda: SelectiveTokenMixer(8, orders="causal").step(torch.zeros(1, 3, 8)), r"one token \(B, 8\)"),
        (lambda: SelectiveChannelMixer(num_tokens=0), "num_tokens must be at least 1"),
        (lambda: SelectiveChannelMixer(num_tokens=49)(torch.zeros(1, 64, 8)), "made for 49 tokens, got 64"),
        (
            lambda: SelectiveChannelMixer(num_tokens=49)(torch.zeros(1, 8, 7, 7)),
            r"use x.flatten\(2\).transpose\(1, 2\)",
        ),
        (lambda: S6(4, ways=3), "ways must be 1 or 2"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
