"""Relation aggregators over space and time: golden blocks, the equations token by token, identities, costs, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.layers import ConvPosEnc, Pointwise3d
from tokenry.measure import count_macs
from tokenry.mixers import DividedMHRA3d, GlobalMHRA, GlobalMHRA3d, LocalMHRA3d, list_mixers
from tokenry.vision import metaformer
from tokenry.vision.uniformer_blocks import GlobalBlock, LocalBlock
from tokenry.vision.uniformer_video_blocks import DividedBlock
from tokenry.vision.uniformer_video_weights import inflate, rename_clip

pytestmark = pytest.mark.method("uniformer-video")

KINDS = [LocalMHRA3d, GlobalMHRA3d, DividedMHRA3d]


def made(kind, *args, **kwargs):
    """A mixer in float64 with weights of deviation 0.5."""
    mixer = kind(*args, dtype=torch.float64, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cblock3d", lambda: LocalBlock(8, frames=True)),
        ("sablock3d", lambda: GlobalBlock(16, 8, frames=True)),
        ("split_sablock3d", lambda: DividedBlock(16, 8)),
    ],
)
@torch.no_grad()
def test_golden_blocks(name, make, record_property):
    case, block = GoldenCase("uniformer-video", name), make().eval()
    renamed = rename_clip({f"blocks3.0.{key}": value for key, value in case.state_dict().items()})
    found = block.load_state_dict({k.removeprefix("stages.2.blocks.0."): v for k, v in renamed.items()}, False)
    assert not found.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    case.compare("y", block(x))
    case.compare("y", block(x.contiguous(memory_format=torch.channels_last_3d)))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.golden
def test_golden_inflation(record_property):
    case = GoldenCase("uniformer-video", "inflate")
    weight = case.inputs["w"]
    case.compare("mean3", inflate(weight, 3))
    case.compare("mean5", inflate(weight, 5, "mean"))
    case.compare("centre3", inflate(weight, 3, "center"))
    record_property("worst_error", case.worst)


def slow_attention(attention, x):
    """(N, C) -> (N, C): one head, one query and one key at a time."""
    tokens, dim = x.shape
    width = attention.head_dim
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(dim, dim=1)
    y = torch.zeros_like(x)
    for head in range(dim // width):
        part = slice(head * width, (head + 1) * width)
        for n in range(tokens):
            scores = [torch.dot(q[n, part], k[m, part]).item() / math.sqrt(width) for m in range(tokens)]
            total = sum(math.exp(s) for s in scores)
            for m in range(tokens):
                y[n, part] += math.exp(scores[m]) / total * v[m, part]
    return y @ attention.proj.weight.T + attention.proj.bias


sizes = {"frames": st.integers(1, 3), "height": st.integers(1, 3), "width": st.integers(1, 3)}


@given(**sizes)
@torch.no_grad()
def test_global_is_the_equation(frames, height, width):
    mixer, x = made(GlobalMHRA3d, 4, 2), torch.randn(2, 4, frames, height, width, dtype=torch.float64)
    for one, y in zip(x, mixer(x), strict=True):
        torch.testing.assert_close(y.flatten(1).T, slow_attention(mixer, one.flatten(1).T))


@given(**sizes)
@torch.no_grad()
def test_divided_is_the_equation(frames, height, width):
    mixer, x = made(DividedMHRA3d, 4, 2), torch.randn(1, 4, frames, height, width, dtype=torch.float64)
    a = x.clone()
    for i in range(height):
        for j in range(width):
            a[0, :, :, i, j] += slow_attention(mixer.temporal, mixer.temporal_norm(x[0, :, :, i, j].T)).T
    y = mixer(x)
    for t in range(frames):
        expected = slow_attention(mixer.spatial, mixer.spatial_norm(a[0, :, t].flatten(1).T))
        torch.testing.assert_close(y[0, :, t].flatten(1).T, expected)


@given(**sizes, kernel_size=st.sampled_from([1, 3, 5]))
@torch.no_grad()
def test_local_is_the_equation(frames, height, width, kernel_size):
    mixer, x = made(LocalMHRA3d, 2, kernel_size), torch.randn(1, 2, frames, height, width, dtype=torch.float64)
    values = torch.einsum("oc,bcthw->bothw", mixer.value.weight.flatten(1), x) + mixer.value.bias.view(2, 1, 1, 1)
    mixed = mixer.affinity.bias.view(1, 2, 1, 1, 1).repeat(1, 1, frames, height, width)
    half = kernel_size // 2
    places = [(t, i, j) for t in range(frames) for i in range(height) for j in range(width)]
    for n in places:
        for m in places:
            offset = [b - a + half for a, b in zip(n, m, strict=True)]
            if all(0 <= o < kernel_size for o in offset):
                mixed[(..., *n)] += mixer.affinity.weight[:, 0][(slice(None), *offset)] * values[(..., *m)]
    expected = torch.einsum("oc,bcthw->bothw", mixer.proj.weight.flatten(1), mixed) + mixer.proj.bias.view(2, 1, 1, 1)
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_divided_starts_as_attention_inside_frames():
    mixer, x = DividedMHRA3d(8, 4, dtype=torch.float64), torch.randn(2, 8, 5, 3, 2, dtype=torch.float64)
    frames = x.transpose(1, 2).flatten(0, 1)  # (10, 8, 3, 2)
    expected = mixer.spatial(mixer.spatial_norm(frames.flatten(2).mT)).mT.unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(mixer(x).flatten(3), expected)


def test_divided_can_leave_its_start():
    mixer = DividedMHRA3d(8, 4)
    mixer(torch.randn(1, 8, 3, 2, 2)).square().sum().backward()
    values = mixer.temporal.qkv.weight.grad[16:]
    assert values.abs().max() > 0


@torch.no_grad()
def test_reach():
    """Local: two tokens and two frames; global: all; divided: the place over time, then each of these frames."""
    x = torch.randn(1, 4, 7, 6, 6, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 3, 3, 3] += 1.0
    changed = {}
    for kind in KINDS:
        mixer = made(kind, 4)
        changed[kind] = (mixer(moved) - mixer(x)).abs().amax(1)[0] > 1e-12
    assert changed[LocalMHRA3d].sum() == 125 and changed[LocalMHRA3d][1:6, 1:6, 1:6].all()
    assert changed[GlobalMHRA3d].all() and changed[DividedMHRA3d].all()
    silent = DividedMHRA3d(4, dtype=torch.float64)
    frames = (silent(moved) - silent(x)).abs().amax((0, 1, 3, 4)) > 1e-12
    assert frames.tolist() == [t == 3 for t in range(7)]


@torch.no_grad()
def test_mean_inflation_gives_the_image_on_a_still_clip_away_from_its_ends():
    image = torch.nn.Conv2d(4, 4, 5, padding=2, groups=4, dtype=torch.float64)
    x = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    clip = x.unsqueeze(2).expand(-1, -1, 9, -1, -1)
    still = torch.nn.functional.conv3d(clip, inflate(image.weight, 5), image.bias, padding=2, groups=4)
    expected = image(x).unsqueeze(2).expand_as(still)
    torch.testing.assert_close(still[:, :, 2:-2], expected[:, :, 2:-2])
    assert (still - expected)[:, :, [0, 1, 7, 8]].abs().amax((0, 1, 3, 4)).min() > 1e-3
    center = torch.nn.functional.conv3d(clip, inflate(image.weight, 5, "center"), image.bias, padding=2, groups=4)
    torch.testing.assert_close(center, expected)


def test_costs_are_the_formulas():
    dim, frames, side = 16, 4, 3
    places, tokens = side * side, frames * side * side
    x = torch.zeros(1, dim, frames, side, side)
    local, whole, divided = (kind(dim) for kind in KINDS)
    assert sum(p.numel() for p in local.parameters()) == 2 * dim**2 + 128 * dim
    assert sum(p.numel() for p in whole.parameters()) == 4 * dim**2 + 4 * dim
    assert sum(p.numel() for p in divided.parameters()) == 2 * (4 * dim**2 + 4 * dim) + 4 * dim
    assert count_macs(local, x) == tokens * (2 * dim**2 + 125 * dim)
    assert count_macs(whole, x) == 4 * tokens * dim**2 + 2 * tokens**2 * dim
    assert count_macs(divided, x) == 8 * tokens * dim**2 + 2 * tokens * dim * (frames + places)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 8])
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 2, 9), (3, 5, 7)])
def test_shapes_gradients_and_memory_orders(kind, dim, size):
    mixer = kind(dim)
    x = torch.randn(3, dim, *size, requires_grad=True)
    kept = x.detach().clone()
    y = mixer(x)
    assert y.shape == x.shape and torch.equal(x, kept)
    torch.testing.assert_close(y[1:2], mixer(x[1:2]), rtol=1e-4, atol=1e-5)  # entries are independent
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last_3d)), y, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in mixer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_compiles_and_runs_in_bfloat16(kind):
    mixer, x = kind(8).eval(), torch.randn(2, 8, 3, 2, 4)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)
    half = kind(8, dtype=torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@torch.no_grad()
def test_received_attention_sums_to_one():
    mixer, x = made(GlobalMHRA3d, 4, 2), torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    received = mixer.token_maps(x)["attention"]
    assert received.shape == (2, 3, 2, 5)
    torch.testing.assert_close(received.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(received.flatten(1), GlobalMHRA.token_maps(mixer, x.flatten(2).mT)["attention"])


@pytest.mark.parametrize("last", [False, True])
def test_pointwise_is_a_convolution(last):
    layer, x = Pointwise3d(4, 6, dtype=torch.float64), torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.conv3d(x, layer.weight, layer.bias))
    assert y.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


@torch.no_grad()
def test_position_encoding_with_frames():
    layer, x = ConvPosEnc(3, frames=True), torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(layer(x), x + layer.proj(x))
    assert layer.proj.weight.shape == (3, 1, 3, 3, 3)


def test_they_are_no_image_mixers():
    assert not [name for name in list_mixers() if "3d" in name]
    with pytest.raises(ValueError, match=r"a map of clips \(B, C, T, H, W\) with C=8, got \(1, 8, 8, 8\); for images"):
        metaformer(LocalMHRA3d, depths=(1,), dims=(8,), num_classes=2)(torch.zeros(1, 3, 32, 32))


def test_an_image_network_refuses_clips():
    net = metaformer(["local_mhra"], depths=(1,), dims=(8,), num_classes=2)
    with pytest.raises(ValueError, match="five dimensions .* for video take a video model"):
        net(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalMHRA3d(56, 64), "head_dim=64 for dim=56; for example head_dim=8"),
        (lambda: DividedMHRA3d(16, 3), "head_dim=3 for dim=16"),
        (lambda: LocalMHRA3d(16, kernel_size=4), "odd and positive, got 4; use 5"),
        (lambda: GlobalMHRA3d(8)(torch.zeros(1, 10, 8)), r"\(B, C, T, H, W\) with C=8, got \(1, 10, 8\)"),
        (lambda: DividedMHRA3d(8)(torch.zeros(1, 8, 4, 4)), r"\(B, C, T, H, W\)"),
        (lambda: inflate(torch.zeros(1, 1, 3, 3), 3, "middle"), "mode must be 'mean' or 'center', got 'middle'"),
        (lambda: inflate(torch.zeros(4, 4), 3), r"a kernel \(O, I, H, W\) and at least 1 frame, got shape \(4, 4\)"),
        (lambda: inflate(torch.zeros(1, 1, 3, 3), 0), "at least 1 frame"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
