"""UniFormer's relation aggregators: golden blocks, the equations one token at a time, identities, costs, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import GlobalMHRA, LocalMHRA, WindowMHRA
from tokenry.vision.uniformer import rename
from tokenry.vision.uniformer_blocks import GlobalBlock, LocalBlock

pytestmark = pytest.mark.method("uniformer")


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
        ("cblock", lambda: LocalBlock(16)),
        ("sablock", lambda: GlobalBlock(32, 16)),
        ("sablock_ls", lambda: GlobalBlock(32, 16, layer_scale=1e-6)),
        ("sablock_windows", lambda: GlobalBlock(16, 8, window=4)),
    ],
)
def test_golden_blocks(name, make, record_property):
    case, block = GoldenCase("uniformer", name), make().eval()
    renamed = rename({f"blocks1.0.{key}": value for key, value in case.state_dict().items()})
    missing, unknown = block.load_state_dict(
        {k.removeprefix("stages.0.blocks.0."): v for k, v in renamed.items()}, False
    )
    assert not unknown and all(key.endswith("num_batches_tracked") for key in missing)
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))
    case.compare("y", block(case.inputs["x"].contiguous(memory_format=torch.channels_last)))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


def slow_attention(mixer, x):
    """(N, C) -> (N, C): the global aggregator one head, one query and one key at a time."""
    tokens, dim = x.shape
    width = mixer.head_dim
    qkv = x @ mixer.qkv.weight.T + (0 if mixer.qkv.bias is None else mixer.qkv.bias)
    q, k, v = qkv.split(dim, dim=1)
    y = torch.zeros_like(x)
    for head in range(dim // width):
        part = slice(head * width, (head + 1) * width)
        for n in range(tokens):
            scores = [torch.dot(q[n, part], k[m, part]).item() / math.sqrt(width) for m in range(tokens)]
            total = sum(math.exp(s) for s in scores)
            for m in range(tokens):
                y[n, part] += math.exp(scores[m]) / total * v[m, part]
    return y @ mixer.proj.weight.T + mixer.proj.bias


@given(tokens=st.integers(1, 7), batch=st.integers(1, 2), head_dim=st.sampled_from([1, 2, 4]), bias=st.booleans())
@torch.no_grad()
def test_global_is_the_equation(tokens, batch, head_dim, bias):
    mixer = made(GlobalMHRA, 4, head_dim, bias)
    x = torch.randn(batch, tokens, 4, dtype=torch.float64)
    expected = torch.stack([slow_attention(mixer, one) for one in x])
    torch.testing.assert_close(mixer(x), expected)
    y, row = mixer.guided(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(row.sum(1), torch.ones(batch, dtype=torch.float64))


@torch.no_grad()
def test_the_guide_is_the_first_tokens_attention():
    mixer = made(GlobalMHRA, 4, 2)
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    q, k, _ = mixer.qkv(x)[0].split(4, dim=1)
    heads = [torch.softmax(q[0, part] @ k[:, part].T / math.sqrt(2), 0) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(mixer.guided(x)[1][0], sum(heads) / 2)


@given(height=st.integers(1, 5), width=st.integers(1, 5), kernel_size=st.sampled_from([1, 3, 5]))
@torch.no_grad()
def test_local_is_the_equation(height, width, kernel_size):
    mixer = made(LocalMHRA, 3, kernel_size)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    values = torch.einsum("oc,bchw->bohw", mixer.value.weight[:, :, 0, 0], x) + mixer.value.bias[:, None, None]
    mixed = mixer.affinity.bias.view(1, 3, 1, 1).repeat(1, 1, height, width)
    half = kernel_size // 2
    for i in range(height):
        for j in range(width):
            for u in range(height):
                for v in range(width):
                    if abs(u - i) <= half and abs(v - j) <= half:
                        mixed[:, :, i, j] += (
                            mixer.affinity.weight[:, 0, u - i + half, v - j + half] * values[:, :, u, v]
                        )
    expected = torch.einsum("oc,bchw->bohw", mixer.proj.weight[:, :, 0, 0], mixed) + mixer.proj.bias[:, None, None]
    torch.testing.assert_close(mixer(x), expected)


@given(height=st.integers(1, 6), width=st.integers(1, 6), window=st.integers(1, 4))
@torch.no_grad()
def test_windows_are_the_equation_on_zero_padded_pieces(height, width, window):
    mixer = made(WindowMHRA, 4, window, head_dim=2)
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for top in range(0, height, window):
        for left in range(0, width, window):
            piece = x[0, top : top + window, left : left + window]
            rows, columns = piece.shape[:2]
            padded = torch.zeros(window, window, 4, dtype=torch.float64)
            padded[:rows, :columns] = piece
            y = slow_attention(mixer, padded.flatten(0, 1)).view(window, window, 4)
            expected[0, top : top + rows, left : left + columns] = y[:rows, :columns]
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_a_window_as_large_as_the_map_is_global():
    window, everywhere = made(WindowMHRA, 8, 6, head_dim=4), made(GlobalMHRA, 8, 4)
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(window(x).flatten(1, 2), everywhere(x.flatten(1, 2)))
    larger = made(WindowMHRA, 8, 7, head_dim=4)  # padding takes part in the softmax, as in the authors' code
    assert (larger(x) - window(x)).abs().max() > 0.01
    shown, expected = window.token_maps(x)["attention"], everywhere.token_maps(x.flatten(1, 2))["attention"]
    torch.testing.assert_close(shown.flatten(1), expected)


def test_what_windows_show_is_laid_out_on_the_map():
    mixer, x = made(WindowMHRA, 8, 3, head_dim=4), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    shown = mixer.token_maps(x)["attention"]
    for top in (0, 3):
        for left in (0, 3, 6):
            window = shown[:, top : top + 3, left : left + 3]
            torch.testing.assert_close(window.sum((1, 2)), torch.ones(2, dtype=torch.float64))
            alone = mixer.token_maps(x[:, top : top + 3, left : left + 3])["attention"]
            torch.testing.assert_close(window, alone)


@torch.no_grad()
def test_local_reaches_two_tokens_far_and_global_everywhere():
    x = torch.zeros(1, 4, 9, 9, dtype=torch.float64)
    moved = x.clone()
    moved[0, :, 4, 4] = 1.0
    local = made(LocalMHRA, 4)
    changed = (local(moved) - local(x)).abs().amax(1)[0] > 1e-12
    assert changed[2:7, 2:7].all() and changed.sum() == 25
    attention = made(GlobalMHRA, 4)
    changed = (attention(moved.flatten(2).mT) - attention(x.flatten(2).mT)).abs().amax(2)[0] > 1e-12
    assert changed.all()


def test_costs_are_the_formulas():
    dim, side = 16, 6
    tokens = side * side
    local, attention = LocalMHRA(dim), GlobalMHRA(dim)
    assert sum(p.numel() for p in local.parameters()) == 2 * dim**2 + 28 * dim
    assert sum(p.numel() for p in attention.parameters()) == 4 * dim**2 + 4 * dim
    assert count_macs(local, torch.zeros(1, dim, side, side)) == tokens * (2 * dim**2 + 25 * dim)
    assert count_macs(attention, torch.zeros(1, tokens, dim)) == 4 * tokens * dim**2 + 2 * tokens**2 * dim


@pytest.mark.parametrize(("dim", "head_dim"), [(320, 64), (512, 64), (448, 64), (56, 8), (7, 1)])
def test_default_head_width_divides(dim, head_dim):
    assert GlobalMHRA(dim, device="meta").head_dim == head_dim


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalMHRA(56, 64), "head_dim=64 for dim=56; for example head_dim=8"),
        (lambda: GlobalMHRA(56, 0), "head_dim must divide"),
        (lambda: WindowMHRA(16, 0), "window must be at least 1 token wide, got 0"),
        (lambda: WindowMHRA(16, head_dim=3), "head_dim=3 for dim=16"),
        (lambda: LocalMHRA(16, kernel_size=4), "odd and positive, got 4; use 5"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
