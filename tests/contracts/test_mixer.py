"""What every token mixer keeps, tested for all of ``list_mixers()``.

A new mixer gets these tests by being registered.
"""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.metaformer import MetaFormer as TimmMetaFormer

from tokenry.catalog import cards
from tokenry.mixers import (
    InLayout,
    Layout,
    TokenMixer,
    convert_layout,
    create_mixer,
    for_timm,
    layout_of,
    list_mixers,
    register_mixer,
)
from tokenry.mixers.registry import MIXERS, mixer_factory, size_keywords
from tokenry.vision import metaformer

DIM = 16
SIZES = [(6, 6), (5, 7), (1, 1), (2, 9)]
ANY_CHANNELS = {"identity", "pool", "random", "selective_channel", "spatial_fc"}  # no weight belongs to a channel
SLUGS = {mixer: card.slug for card in cards().values() for mixer in card.mixers}


def make(name: str, grid: tuple[int, int] = (6, 6), dim: int = DIM, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_mixer(name, dim, **size_keywords(mixer_factory(name), grid), **kwargs)


def tokens(mixer: torch.nn.Module, grid: tuple[int, int] = (6, 6), batch: int = 2, dim: int = DIM, seed: int = 0):
    x = torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(seed))
    return convert_layout(x, "NHWC", layout_of(mixer)).contiguous()


def named(names: list[str]) -> list:
    return [pytest.param(n, marks=pytest.mark.method(SLUGS.get(n, "metaformer-baselines"))) for n in names]


@pytest.fixture(params=named(list_mixers()))
def name(request) -> str:
    return request.param


def test_declares_its_interface(name):
    mixer = make(name)
    assert isinstance(mixer, TokenMixer)
    assert layout_of(mixer, required=True) in list(Layout)
    assert mixer.fixed_tokens is None or mixer.fixed_tokens == 36


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_keeps_shape_dtype_and_device(name, grid, batch):
    mixer = make(name, grid).eval()
    x = tokens(mixer, grid, batch)
    y = mixer(x)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.isfinite().all()


@torch.no_grad()
def test_does_not_change_its_input(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    kept = x.clone()
    mixer(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", named([n for n in list_mixers() if n != "identity"]))
@torch.no_grad()
def test_refuses_other_shapes(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    with pytest.raises(ValueError, match=r"\(B, "):
        mixer(x.unsqueeze(1))
    with pytest.raises(ValueError, match=r"\(B, "):
        mixer(x[0])
    if name not in ANY_CHANNELS:
        with pytest.raises(ValueError, match=f"C={DIM}|D={DIM}"):
            mixer(tokens(mixer, dim=DIM // 2))


@torch.no_grad()
def test_batch_entries_are_independent(name):
    mixer = make(name).eval()
    x = tokens(mixer, batch=4)
    torch.testing.assert_close(mixer(x)[2:3], mixer(x[2:3]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_is_deterministic(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    assert torch.equal(mixer(x), mixer(x))
    assert torch.equal(mixer(x), make(name).eval()(x))  # and so is its making


@torch.no_grad()
def test_bfloat16_and_autocast(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    exact = mixer(x)
    scale = exact.abs().max() + 1e-6
    half = copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert ((half.float() - exact).abs().max() / scale) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert ((mixer(x).float() - exact).abs().max() / scale) < 0.1


def test_every_trainable_parameter_gets_a_gradient(name):
    mixer = make(name).train()
    x = tokens(mixer).requires_grad_()
    mixer(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for key, parameter in mixer.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, key


@torch.no_grad()
def test_state_dict_round_trip(name, tmp_path):
    mixer = make(name).eval()
    torch.save(mixer.state_dict(), tmp_path / "mixer.pt")
    other = make(name).eval()
    for parameter in other.parameters():
        parameter.add_(1.0)
    other.load_state_dict(torch.load(tmp_path / "mixer.pt", weights_only=True))
    x = tokens(mixer)
    assert torch.equal(mixer(x), other(x))


@pytest.mark.parametrize("name", named([n for n in list_mixers() if hasattr(make(n), "token_maps")]))
@torch.no_grad()
def test_what_it_shows_can_be_drawn(name):
    mixer = make(name, (4, 9)).eval()
    x = tokens(mixer, (4, 9))
    maps = mixer.token_maps(x)
    assert maps
    for found in maps.values():
        assert len(found) == len(x) and found.ndim in (2, 3)
        assert not found.is_floating_point() or (found.isfinite().all() and (found >= 0).all())


@torch.no_grad()
def test_channels_last_memory(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    nchw = convert_layout(x, layout_of(mixer), "NCHW").contiguous()
    outputs = [
        InLayout(mixer, "NCHW")(nchw.contiguous(memory_format=memory))
        for memory in (torch.contiguous_format, torch.channels_last)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_layouts_agree(name):
    mixer = make(name, (4, 9)).eval()
    x = torch.randn(2, 4, 9, DIM)
    outputs = []
    for layout in Layout:
        y = InLayout(mixer, layout, grid=(4, 9))(convert_layout(x, "NHWC", layout))
        outputs.append(convert_layout(y, layout, "NHWC", (4, 9)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    mixer = make(name).eval()
    x = tokens(mixer)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_trains_inside_metaformer(name):
    net = metaformer(("identity", name), (1, 2), (8, 16), 3, 24, stem=(2, 2, 0), drop_path_rate=0.1, proj_drop_rate=0.1)
    net.set_grad_checkpointing()
    net.train()(torch.randn(2, 3, 24, 24)).square().sum().backward()
    missing = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@torch.no_grad()
def test_runs_inside_timms_metaformer(name):
    grid = size_keywords(mixer_factory(name), (8, 8))
    net = TimmMetaFormer(
        depths=(1,), dims=(DIM,), token_mixers=for_timm(name, **grid), res_scale_init_values=None, num_classes=2
    ).eval()
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    if layout_of(make(name)) == Layout.NCHW and not grid:  # the class itself, without a wrapper
        net = TimmMetaFormer(
            depths=(1,), dims=(DIM,), token_mixers=mixer_factory(name), res_scale_init_values=None, num_classes=2
        )
        assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_mixer("pol", 8), "no token mixer is called 'pol'; there are aff, "),
        (lambda: create_mixer("pool", 8, kernel=3), "takes no 'kernel'"),
        (lambda: create_mixer("sep_conv", 0), "positive whole number"),
        (lambda: create_mixer("random", 8), "give num_tokens"),
        (lambda: metaformer(["pool", "identity", "pool"], (1, 1), (8, 16)), "token_mixers has 3 entries for 2 stages"),
        (lambda: metaformer(torch.nn.Identity(), (1,), (8,)), "a registered name"),
        (lambda: register_mixer("pool", torch.nn.Identity), "registered already"),
        (lambda: register_mixer("mine", torch.nn.Identity), "declares no layout"),
        (lambda: for_timm("nothing"), "no token mixer is called"),
        (lambda: create_mixer("pool", 8, layout="CHW"), "layout must be 'NCHW', 'NHWC' or 'NLC', got 'CHW'"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_new_mixer_gets_a_name(monkeypatch):
    class Shift(torch.nn.Module):
        layout, fixed_tokens = "NHWC", None

        def __init__(self, dim, *, proj_drop=0.0, device=None, dtype=None):
            super().__init__()

        def forward(self, x):
            return x.roll(1, 1)

    monkeypatch.setattr("tokenry.mixers.registry.MIXERS", dict(MIXERS))
    register_mixer("shift", Shift)
    assert "shift" in list_mixers()
    assert metaformer("shift", (1,), (8,), 2, 32)(torch.randn(1, 3, 32, 32)).shape == (1, 2)


def test_any_callable_is_a_mixer():
    def depthwise(dim, **kwargs):
        return torch.nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    net = metaformer(
        [depthwise, torch.nn.Identity, lambda dim: torch.nn.AvgPool2d(3, 1, 1)], (1, 1, 1), (8, 16, 16), 2, 64
    )
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 2)
