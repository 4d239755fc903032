"""The CAT mixer and its gates: golden cases, the equations position by position, identities, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import CATMixer, ChannelGate, SpatialGate
from tokenry.vision.cas_vit import rename

pytestmark = pytest.mark.method("cas-vit")


def made(seed=0, dim=6, **kwargs):
    """A mixer in evaluation mode with norms that are no identities, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    mixer = CATMixer(dim, **kwargs).eval()
    with torch.no_grad():
        for name, value in [*mixer.named_parameters(), *mixer.named_buffers()]:
            if value.is_floating_point():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
                if name.endswith("running_var"):
                    value.square_().add_(0.5)
    return mixer, generator


@pytest.mark.golden
@pytest.mark.parametrize("name", ["mixer", "mixer_1x1"])
def test_golden_mixer(name):
    case = GoldenCase("cas-vit", name)
    state = {rename(key): value for key, value in case.state_dict().items()}
    mixer = CATMixer(state["qkv.weight"].shape[1], qkv_bias="qkv.bias" in state).eval()
    mixer.load_state_dict(state)
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    for key, x in case.inputs.items():
        case.compare("y" if "y" in case.outputs else key, mixer(x))


@pytest.mark.golden
def test_golden_gates():
    case = GoldenCase("cas-vit", "interactions")
    spatial, channel = SpatialGate(8).eval(), ChannelGate(8).eval()
    spatial.load_state_dict(part(case, "spatial", "0"))
    channel.load_state_dict(part(case, "channel", "1"))
    assert sum(p.numel() for m in (spatial, channel) for p in m.parameters()) == case.spec["params"]
    case.compare("spatial", spatial(case.inputs["x"]))
    case.compare("channel", channel(case.inputs["x"]))


def part(case, name, place):
    """The state of one gate, by way of its name inside a mixer."""
    found = {}
    for key, value in case.state_dict().items():
        if key.startswith(f"{name}."):
            ours = rename(f"oper_q.{place}.{key.removeprefix(f'{name}.')}")
            found[ours.removeprefix(f"gate_q.{name}.")] = value
    return found


def slow_depthwise(conv, t):
    """A depthwise 3x3 convolution with zeros around the map, one output at a time."""
    batch, channels, height, width = t.shape
    out = torch.zeros_like(t)
    for n in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    total = conv.bias[c].clone()
                    for u in (-1, 0, 1):
                        for v in (-1, 0, 1):
                            if 0 <= i + u < height and 0 <= j + v < width:
                                total += conv.weight[c, 0, u + 1, v + 1] * t[n, c, i + u, j + v]
                    out[n, c, i, j] = total
    return out


def slow_gates(gates, t):
    """The spatial gate, one position at a time, then the channel gate, one channel at a time."""
    spatial, channel = gates
    norm = spatial.depthwise.norm
    hidden = slow_depthwise(spatial.depthwise.conv, t)
    out = torch.zeros_like(t)
    for n in range(t.shape[0]):
        for i in range(t.shape[2]):
            for j in range(t.shape[3]):
                h = (hidden[n, :, i, j] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
                h = (h * norm.weight + norm.bias).clamp(min=0)
                out[n, :, i, j] = t[n, :, i, j] * torch.sigmoid((spatial.gate.weight[0, :, 0, 0] * h).sum())
    gated = torch.zeros_like(out)
    for n in range(t.shape[0]):
        means = torch.stack([out[n, c].mean() for c in range(t.shape[1])])
        for c in range(t.shape[1]):
            gated[n, c] = out[n, c] * torch.sigmoid((channel.gate.weight[c, :, 0, 0] * means).sum())
    return gated


@torch.no_grad()
def slow_mixer(mixer, x):
    """The equations of the mixer, in float64."""
    mixer, x = mixer.double(), x.double()
    qkv = torch.zeros(x.shape[0], 3 * x.shape[1], *x.shape[2:], dtype=torch.float64)
    for o in range(qkv.shape[1]):
        for c in range(x.shape[1]):
            qkv[:, o] += mixer.qkv.weight[o, c, 0, 0] * x[:, c]
        if mixer.qkv.bias is not None:
            qkv[:, o] += mixer.qkv.bias[o]
    dim = x.shape[1]
    q, k, v = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
    context = slow_depthwise(mixer.dwc, slow_gates(mixer.gate_q, q) + slow_gates(mixer.gate_k, k))
    return slow_depthwise(mixer.proj, context * v)


@given(h=st.integers(1, 4), w=st.integers(1, 4), batch=st.integers(1, 2), dim=st.integers(1, 3), bias=st.booleans())
def test_matches_the_equation(h, w, batch, dim, bias):
    mixer, generator = made(h * 10 + w, dim, qkv_bias=bias)
    x = torch.randn(batch, dim, h, w, generator=generator)
    y = mixer(x)
    torch.testing.assert_close(y.double(), slow_mixer(mixer, x), rtol=1e-4, atol=1e-5)


@given(h=st.integers(1, 7), w=st.integers(1, 7))
@torch.no_grad()
def test_gates_lie_between_zero_and_one(h, w):
    mixer, generator = made(h * 10 + w)
    spatial, channel = mixer.gate_q
    t = torch.randn(2, 6, h, w, generator=generator, dtype=torch.float64)
    over_positions = spatial.double()(t) / t
    over_channels = channel.double()(t) / t
    for gate in (over_positions, over_channels):
        assert ((gate > 0) & (gate < 1)).all()
    torch.testing.assert_close(over_positions, over_positions[:, :1].expand_as(t))  # the same for all channels
    torch.testing.assert_close(over_channels, over_channels[..., :1, :1].expand_as(t))  # the same for all positions


@torch.no_grad()
def test_open_gates_leave_the_plain_product():
    mixer, generator = made()
    mixer.qkv.weight.abs_()
    for spatial, channel in (mixer.gate_q, mixer.gate_k):
        spatial.depthwise.norm.bias.fill_(100.0)  # positive after the ReLU at every position
        spatial.gate.weight.fill_(100.0)
        channel.gate.weight.fill_(1000.0)  # q and k are positive here, and so are their means
    x = torch.rand(2, 6, 5, 4, generator=generator) + 0.1
    q, k, v = mixer.project(x)
    assert torch.equal(mixer(x), mixer.proj(mixer.dwc(q + k) * v))


@torch.no_grad()
def test_is_linear_in_the_values():
    mixer, generator = made()
    mixer.proj.bias.zero_()
    x = torch.randn(2, 6, 5, 4, generator=generator)
    before = mixer(x)
    mixer.qkv.weight[12:] *= 2
    assert torch.equal(mixer(x), 2 * before)


@torch.no_grad()
def test_projects_as_one_convolution():
    mixer, generator = made(qkv_bias=True)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    torch.testing.assert_close(torch.cat(mixer.project(x), 1), mixer.qkv(x))


@torch.no_grad()
def test_the_mean_is_taken_after_the_spatial_gate():
    mixer, generator = made()
    spatial, channel = mixer.gate_q
    t = torch.randn(1, 6, 4, 4, generator=generator)
    torch.testing.assert_close(mixer.gate_q(t), channel(spatial(t)))
    assert not torch.allclose(mixer.gate_q(t), spatial(channel(t)))


@pytest.mark.parametrize("dim", [1, 7, 16])
def test_parameters_and_cost_are_as_stated(dim):
    mixer = CATMixer(dim).eval()
    assert sum(p.numel() for p in mixer.parameters()) == 5 * dim**2 + 46 * dim
    for height, width in ((5, 3), (10, 6)):
        macs = count_macs(mixer, torch.zeros(1, dim, height, width))
        assert macs == height * width * (3 * dim**2 + 38 * dim) + 2 * dim**2


@pytest.mark.parametrize("train", [False, True])
def test_gradient(train):
    mixer, generator = made(dim=3)
    mixer = mixer.double().train(train)
    for module in mixer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(2, 3, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    parameters = tuple(p.detach().clone().requires_grad_() for p in mixer.parameters())
    names = [name for name, _ in mixer.named_parameters()]

    def of_parameters(*values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of_parameters, parameters)


@torch.no_grad()
def test_fixed_statistics_equal_the_norm_as_a_step_of_its_own():
    spatial = made()[0].gate_q[0].double()
    t = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    before = spatial(t)
    hidden = spatial.depthwise.norm(spatial.depthwise.conv(t)).relu()
    torch.testing.assert_close(before, t * spatial.gate(hidden).sigmoid())
    spatial.depthwise.fuse()
    assert isinstance(spatial.depthwise.norm, nn.Identity)
    torch.testing.assert_close(spatial(t), before)


def test_training_with_one_position_is_explained():
    mixer = CATMixer(4)
    with pytest.raises(ValueError, match=r"one position in a batch of one, got \(1, 4, 1, 1\): give two images"):
        mixer(torch.randn(1, 4, 1, 1))
    assert mixer(torch.randn(2, 4, 1, 1)).shape == (2, 4, 1, 1)
    assert mixer(torch.randn(1, 4, 1, 2)).shape == (1, 4, 1, 2)
    assert mixer.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


def test_dropout():
    dropped = CATMixer(4, proj_drop=1.0)
    x = torch.randn(2, 4, 3, 3)
    assert (dropped(x) == 0).all()
    assert not (dropped.eval()(x) == 0).any()


@pytest.mark.parametrize("dim", [0, -3])
def test_rejects_widths(dim):
    with pytest.raises(ValueError, match=f"dim must be at least 1 channel, got {dim}"):
        CATMixer(dim)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 49, 8), r"\(B, C, H, W\) with C=8, got \(2, 49, 8\)"),
        (torch.zeros(2, 6, 6, 8), "C=8"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.uint8), r"uint8; convert with x.float\(\)"),
    ],
)
def test_rejects_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        CATMixer(8)(x)
