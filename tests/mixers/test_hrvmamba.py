"""DSS2D and its deformable convolution: golden cases, the equations direction by direction, identities, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.kernels.scan_orders import CROSS, cross_merge, cross_scan
from tokenry.kernels.selective_scan import selective_scan_reference
from tokenry.layers import MultiScaleDWConv
from tokenry.mixers import DSS2D, DCNv4
from tokenry.vision.hrvmamba import rename_block

pytestmark = pytest.mark.method("hrvmamba")


def made(dim=16, seed=0, **kwargs):
    """A mixer all of whose parameters matter."""
    torch.manual_seed(seed)
    mixer = DSS2D(dim, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name == "A_logs":
                parameter.uniform_(-1, 1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@pytest.mark.golden
@pytest.mark.parametrize(("name", "dim"), [("dss2d_mixer", 32), ("dss2d_mixer_base", 80)])
def test_golden(name, dim):
    case = GoldenCase("hrvmamba", name)
    mixer = DSS2D(dim, dcn_pointwise=True).eval()
    own = mixer.state_dict()
    renamed = {rename_block(f"op.{k}").removeprefix("token_mixer."): v for k, v in case.state_dict().items()}
    mixer.load_state_dict({k: v.view(own[k].shape) for k, v in renamed.items()})
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    case.compare("y", mixer(case.inputs["x"]))


@given(
    height=st.integers(1, 5), width=st.integers(1, 5), dim=st.sampled_from([8, 32]), d_state=st.integers(1, 3),
    deformable=st.booleans(), squeeze=st.booleans(), offset_conv=st.booleans(), pointwise=st.booleans(),
)  # fmt: skip
@torch.no_grad()
def test_equals_the_equations(height, width, dim, d_state, deformable, squeeze, offset_conv, pointwise):
    mixer = made(
        dim, d_state=d_state, deformable=deformable, squeeze_excite=squeeze, offset_conv=offset_conv, dcn_pointwise=pointwise
    )  # fmt: skip
    x = torch.randn(2, dim, height, width, generator=torch.Generator().manual_seed(height * 10 + width))
    u = F.silu(mixer.conv(mixer.in_proj(x)))
    outputs = []
    for k, s in enumerate(cross_scan(u, CROSS).unbind(1)):  # one direction at a time, reversed ones by reversed copies
        t, B, C = (mixer.x_proj_weight[k] @ s).split([mixer.rank, d_state, d_state], dim=1)
        inner = u.shape[1]
        own = slice(k * inner, (k + 1) * inner)
        y = selective_scan_reference(
            s, mixer.dt_projs_weight[k] @ t, -mixer.A_logs[own].exp(), B, C, mixer.Ds[own], mixer.dt_projs_bias[k]
        )
        outputs.append(y)
    y = cross_merge(torch.stack(outputs, 1), height, width, CROSS)  # (B, E, L)
    y = F.layer_norm(y.transpose(1, 2), y.shape[1:2], mixer.out_norm.weight, mixer.out_norm.bias).transpose(1, 2)
    if squeeze:
        gate = F.relu(F.linear(y.mean(2), mixer.se.fc1.weight.flatten(1)))
        y = y * torch.sigmoid(F.linear(gate, mixer.se.fc2.weight.flatten(1))).unsqueeze(-1)
    expected = (mixer.out_proj.weight.flatten(1) @ y).unflatten(2, (height, width))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_a_turn_of_the_map_swaps_opposite_directions():
    mixer, u = made(8), torch.randn(1, 16, 4, 5)
    other = made(8)
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        parameter = getattr(other, name)
        parameter.copy_(getattr(mixer, name).unflatten(0, (4, -1))[[2, 3, 0, 1]].flatten(0, 1))
    torch.testing.assert_close(other.scan(u.flip(2, 3)), mixer.scan(u).flip(2, 3), rtol=1e-4, atol=1e-5)


def test_every_position_reaches_every_other():
    mixer, x = made(8), torch.randn(1, 8, 6, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, :, 2, 3].sum(), x)
    assert (grad.abs().sum(1) > 0).all()


def test_steps_and_rates_start_in_their_range():
    mixer = DSS2D(32, d_state=3)
    steps = F.softplus(mixer.dt_projs_bias)
    assert steps.min() > 0.00099 and steps.max() < 0.101
    torch.testing.assert_close(mixer.A_logs[7].exp(), torch.tensor([1.0, 2.0, 3.0]))
    assert (mixer.Ds == 1).all()


def test_the_offsets_come_from_a_convolution_at_multiples_of_80():
    with torch.device("meta"):
        assert [DSS2D(dim).conv.offset_mask_dw is not None for dim in (32, 80, 160)] == [False, True, True]


@torch.no_grad()
def test_deformable_convolution_without_pointwise_maps_has_only_offsets():
    names = {k for k, _ in DCNv4(8, 2).named_parameters()}
    assert names == {"offset_mask.weight", "offset_mask.bias"}
    assert {k.split(".")[0] for k, _ in DCNv4(8, 2, pointwise=True).named_parameters()} == {
        "offset_mask", "value_proj", "output_proj"
    }  # fmt: skip


@torch.no_grad()
def test_float64_stays_float64():
    mixer, x = made(8).double(), torch.randn(1, 8, 4, 5, dtype=torch.float64)
    assert mixer(x).dtype == torch.float64
    torch.testing.assert_close(mixer(x).float(), made(8)(x.float()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_kernels_are_dealt_out_in_turn():
    layer, x = MultiScaleDWConv(8), torch.randn(2, 8, 5, 6)
    parts = [F.gelu(conv(x[:, 2 * i : 2 * i + 2])) for i, conv in enumerate(layer.convs)]
    y = layer(x)
    for i, part in enumerate(parts):
        torch.testing.assert_close(y[:, i::4], part)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DSS2D(40), "do not divide into ceil"),
        (lambda: DSS2D(8, d_state=0), "d_state and ssm_ratio"),
        (lambda: DSS2D(8, ssm_ratio=0.05), "d_state and ssm_ratio"),
        (lambda: DSS2D(8)(torch.zeros(1, 16, 4, 4)), r"with C=8, got \(1, 16, 4, 4\)"),
        (lambda: DSS2D(8)(torch.zeros(1, 16, 8)), r"takes maps \(B, C, H, W\)"),
        (lambda: DCNv4(8, 3), "groups must divide the 8 channels, got 3"),
        (lambda: MultiScaleDWConv(6), "multiple of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dim_that_does_not_divide_names_one_that_does():
    with pytest.raises(ValueError, match=r"such as (\d+)") as error:
        DSS2D(40)
    DSS2D(int(str(error.value).split("such as ")[1].split(",")[0]))
