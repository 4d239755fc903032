"""Super token attention: golden cases, the definition, adjoints, borders, gradients, memory, bad input."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from drawn_weights import drawn
from golden_case import GoldenCase
from tokenry.measure import count_macs, peak_activations
from tokenry.mixers import SuperTokenAttention, fold_neighbours, gather_neighbours, super_token_map

pytestmark = pytest.mark.method("stvit")


def made(seed=0, dim=8, size=(5, 7), batch=1, scale=1.0, **kwargs):
    """A mixer with weights and associations far from uniform, and an input, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixer = drawn(SuperTokenAttention(dim, dtype=torch.float64, **kwargs), dim**-0.5, generator)
    return mixer, scale * torch.randn(batch, dim, *size, generator=generator, dtype=torch.float64)


def convert(state):
    """The authors' mixer calls its attention ``stoken_refine`` and keeps linear maps as 1x1 convolutions."""
    return {
        name.removeprefix("stoken_refine."): value.flatten(1) if value.ndim == 4 else value
        for name, value in state.items()
    }


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("sta_mixer_pad", {"stoken_size": 8, "num_heads": 2}),
        ("sta_mixer_iter3", {"stoken_size": (4, 8), "n_iter": 3, "num_heads": 3}),
        ("sta_mixer_full", {"stoken_size": 1, "num_heads": 3}),
    ],
)
def test_golden(name, kwargs):
    case = GoldenCase("stvit", name)
    x, expected = case.inputs["x"], case.outputs["y"]
    mixer = SuperTokenAttention(x.shape[1], **kwargs).eval()
    mixer.load_state_dict(convert(case.state_dict()))
    assert sum(p.numel() for p in mixer.parameters()) == case.spec["params"]
    # the outputs are large: 1e-4 of their deviation, not of their largest value
    case.compare("y", mixer(x), tolerance=1e-4 * (expected.std() / expected.abs().max()).item())


def slow_associate(x, cell, rounds):
    """Shares (H, W, rows, columns), also of padded pixels, and super tokens, one pixel and one neighbour at a time."""
    channels, height, width = x.shape
    rows, columns = -(-height // cell[0]), -(-width // cell[1])
    pixels = torch.zeros(channels, rows * cell[0], columns * cell[1], dtype=x.dtype)
    pixels[:, :height, :width] = x
    own = {
        (y, z): (y // cell[0], z // cell[1]) for y in range(pixels.shape[1]) for z in range(pixels.shape[2])
    }  # the cell that a pixel lies in
    tokens = torch.zeros(channels, rows, columns, dtype=x.dtype)
    for (y, z), (i, j) in own.items():
        tokens[:, i, j] += pixels[:, y, z] / (cell[0] * cell[1])
    for _ in range(rounds):
        shares = torch.zeros(*pixels.shape[1:], rows, columns, dtype=x.dtype)
        for (y, z), (i, j) in own.items():
            logits = {}
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    inside = 0 <= i + di < rows and 0 <= j + dj < columns
                    logits[i + di, j + dj] = (
                        (pixels[:, y, z] @ tokens[:, i + di, j + dj]).item() / channels**0.5 if inside else 0.0
                    )
            values = torch.tensor(list(logits.values()), dtype=x.dtype).softmax(0)
            for (a, b), share in zip(logits, values, strict=True):
                if 0 <= a < rows and 0 <= b < columns:
                    shares[y, z, a, b] = share
        mass = shares.sum((0, 1))
        tokens = torch.einsum("cyz,yzab->cab", pixels, shares) / mass
    return shares, tokens


def slow_mixer(mixer, x, cell):
    """The equations for one image, with the shares as one large map."""
    shares, tokens = slow_associate(x, cell, mixer.n_iter)
    width, flat = mixer.dim // mixer.num_heads, tokens.flatten(1).T  # (m, C)
    mixed = []
    for head in range(mixer.num_heads):
        w = mixer.qkv.weight.detach()[3 * width * head : 3 * width * (head + 1)]
        b = mixer.qkv.bias.detach()[3 * width * head : 3 * width * (head + 1)]
        q, k, v = (flat @ w.T + b).split(width, dim=1)
        mixed.append((q @ k.T / width**0.5).softmax(1) @ v)
    refined = torch.cat(mixed, 1) @ mixer.proj.weight.detach().T + mixer.proj.bias.detach()
    y = torch.einsum("mc,yzm->cyz", refined, shares.flatten(2))
    return y[:, : x.shape[1], : x.shape[2]]


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda c: c != (1, 1)),
    rounds=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
)
@pytest.mark.filterwarnings("ignore:a map of")
def test_matches_the_definition(size, cell, rounds, heads):
    mixer, x = made(
        size[0] * 10 + size[1], size=size, batch=2, stoken_size=cell, n_iter=rounds, num_heads=heads, scale=2.0
    )
    expected = torch.stack([slow_mixer(mixer, one, cell) for one in x])
    torch.testing.assert_close(mixer(x), expected, rtol=1e-7, atol=1e-9)


@given(size=st.tuples(st.integers(2, 9), st.integers(2, 9)), rounds=st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:a map of")
def test_association_and_its_map_match_the_definition(size, rounds):
    cell = (3, 2)
    mixer, x = made(size[0] * 10 + size[1], size=size, stoken_size=cell, n_iter=rounds, scale=2.0)
    shares, tokens = slow_associate(x[0], cell, rounds)
    q, s = mixer.associate(x)
    torch.testing.assert_close(s[0], tokens, rtol=1e-7, atol=1e-9)
    assert q.shape == (1, tokens[0].numel(), 6, 9)
    torch.testing.assert_close(q.sum(-1), torch.ones(q.shape[:3], dtype=q.dtype))
    found = super_token_map(q, size, mixer.cell_size(*size))
    assert torch.equal(found[0], shares.flatten(2).argmax(-1)[: size[0], : size[1]])


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), channels=st.integers(1, 4), batch=st.integers(1, 3))
def test_fold_is_the_adjoint_of_gather(rows, columns, channels, batch):
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    s = torch.randn(batch, channels, rows, columns, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(batch, rows * columns, 9, channels, generator=generator, dtype=torch.float64)
    gathered = gather_neighbours(s)
    folded = fold_neighbours(g, (rows, columns))
    torch.testing.assert_close((gathered * g).sum(), (s * folded).sum())
    torch.testing.assert_close(torch.autograd.grad(gathered, s, g)[0], folded)
    middle = gathered[:, :, 4].transpose(1, 2).unflatten(2, (rows, columns))
    assert torch.equal(middle, s)


def test_mass_is_one_per_pixel_less_what_the_border_loses():
    mixer, x = made(size=(8, 12), stoken_size=4)
    q, _ = mixer.associate(x)
    mass = fold_neighbours(q.sum(2)[..., None], (2, 3))
    inside = gather_neighbours(torch.ones(1, 1, 2, 3, dtype=q.dtype))[..., 0]  # (1, m, 9)
    lost = (q * (1 - inside)[:, :, None]).sum()
    assert lost > 1
    torch.testing.assert_close(mass.sum(), 8 * 12 - lost)


def test_super_tokens_of_equal_pixels_are_that_pixel():
    mixer, x = made(size=(12, 8), stoken_size=4, n_iter=2)
    same = x[:, :, :1, :1].expand_as(x)
    _, s = mixer.associate(same)
    torch.testing.assert_close(s, same[..., :3, :2])


def test_padding_is_zeros_below_and_on_the_right():
    mixer, x = made(size=(7, 10), stoken_size=4)
    torch.testing.assert_close(mixer(x), mixer(F.pad(x, (0, 2, 0, 1)))[..., :7, :10])
    assert (mixer(x) - mixer(F.pad(x, (2, 0, 1, 0)))[..., 1:, 2:]).abs().max() > 1e-3


def test_gradient_takes_the_pixels_not_the_shares():
    mixer, x = made(size=(8, 10), stoken_size=(4, 3), n_iter=2)
    x.requires_grad_()
    q, s = mixer.associate(x)
    assert not q.requires_grad and s.requires_grad
    (gradient,) = torch.autograd.grad(mixer(x).square().sum(), x)

    # The same with the shares as constants: every pixel (padding too) times its share, over the sum of the shares.
    mass = fold_neighbours(q.sum(2)[..., None], (2, 4))
    cells = F.pad(x, (0, 2)).unflatten(3, (4, 3)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(1, 8, 12, 8)
    tokens = fold_neighbours(q.transpose(2, 3) @ cells, (2, 4)) / mass
    torch.testing.assert_close(tokens, s)
    full = SuperTokenAttention(8, stoken_size=1, dtype=torch.float64)
    full.load_state_dict(mixer.state_dict())
    y = q @ gather_neighbours(full(tokens))
    y = y.reshape(1, 2, 4, 4, 3, 8).permute(0, 5, 1, 3, 2, 4).reshape(1, 8, 8, 12)[..., :10]
    torch.testing.assert_close(y, mixer(x))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient)


def test_gradients_of_the_weights():
    mixer, x = made(dim=4, size=(4, 5), stoken_size=2, num_heads=2)

    def call(*values):
        return torch.func.functional_call(mixer, dict(zip(dict(mixer.named_parameters()), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, tuple(p.detach().requires_grad_() for p in mixer.parameters()))


def test_cells_of_one_are_plain_attention():
    mixer, x = made(size=(4, 5), batch=2, stoken_size=1, num_heads=2)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    order = torch.arange(24).view(2, 3, 4).transpose(0, 1).flatten()  # q, k, v inside a head -> heads inside q, k, v
    with torch.no_grad():
        attention.in_proj_weight.copy_(mixer.qkv.weight[order])
        attention.in_proj_bias.copy_(mixer.qkv.bias[order])
        attention.out_proj.load_state_dict(mixer.proj.state_dict())
    tokens = x.flatten(2).transpose(1, 2)
    expected, weights = attention(tokens, tokens, tokens)
    torch.testing.assert_close(mixer(x), expected.transpose(1, 2).unflatten(2, (4, 5)))
    torch.testing.assert_close(mixer.token_maps(x)["attention"], weights.mean(1).unflatten(1, (4, 5)))


def test_super_tokens_follow_an_edge():
    """A bright area that ends inside a cell: its pixels leave that cell for the one that is all bright."""
    mixer = SuperTokenAttention(2, stoken_size=4)
    x = torch.zeros(1, 2, 4, 8)
    x[:, 0, :, :5], x[:, 1, :, 5:] = 4.0, 4.0  # one channel per area; the edge is one pixel into the right cell
    expected = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).expand(1, 4, 8)
    assert torch.equal(mixer.token_maps(x)["super_tokens"], expected)


def test_memory_is_linear_in_the_pixels():
    """At 16 super tokens, four times the pixels take four times the memory, and far less than one number per pair."""
    peaks = {}
    for side in (32, 64, 128):
        mixer, x = SuperTokenAttention(8, stoken_size=side // 4), torch.randn(1, 8, side, side)
        with torch.no_grad():
            peaks[side] = peak_activations(lambda mixer=mixer, x=x: mixer(x))
    assert 3.5 < peaks[64] / peaks[32] < 4.1 and 3.8 < peaks[128] / peaks[64] < 4.1
    # 1,024 super tokens: a map of pixels x super tokens alone would take 4 * 128^2 * 1024 bytes
    fine, x = SuperTokenAttention(8, stoken_size=4), torch.randn(1, 8, 128, 128)
    with torch.no_grad():
        assert peak_activations(lambda: fine(x)) < 0.25 * 4 * 128**2 * 1024


def test_multiply_accumulates():
    """What the docstring says: 27 N C, the attention among m super tokens, 18 N C more for a second round."""
    x, tokens, dim, m = torch.randn(1, 8, 16, 16), 256, 8, 16
    attention = 4 * m * dim**2 + 2 * m**2 * dim
    for rounds in (1, 2):
        mixer = SuperTokenAttention(8, stoken_size=4, n_iter=rounds)
        assert count_macs(mixer, x) == (9 + 18 * rounds) * tokens * dim + attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_associates_in_float32(dtype):
    mixer, x = made(size=(9, 8), stoken_size=4, n_iter=2, scale=3.0)
    mixer, x = mixer.to(dtype), x.to(dtype)
    for given_x, context in ((x, False), (x.float(), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=context):
            q, s = mixer.associate(given_x)
        exact_q, exact_s = mixer.float().associate(x.float())
        assert torch.equal(q, exact_q) and torch.equal(s, exact_s)
    exact = mixer(x.float())
    half = mixer.to(dtype)(x)
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_default_cells_adapt_to_the_map():
    mixer = SuperTokenAttention(8)
    assert [mixer.cell_size(*size) for size in ((56, 56), (16, 15), (9, 6), (2, 1), (1, 1))] == [
        (8, 8), (8, 8), (5, 3), (1, 1), (1, 1),
    ]  # fmt: skip
    assert SuperTokenAttention(8, stoken_size=(4, 6)).cell_size(56, 1) == (4, 6)


def test_heads_and_dropout():
    assert [SuperTokenAttention(dim).num_heads for dim in (16, 64, 96, 320)] == [1, 1, 1, 5]
    mixer, x = made(size=(8, 8), stoken_size=4, proj_drop=1.0)
    assert mixer(x).abs().max() > 0
    assert torch.equal(mixer.train()(x), torch.zeros_like(x))
    mixer, x = made(size=(8, 8), stoken_size=4, attn_drop=0.5)
    assert torch.equal(mixer(x), mixer(x))
    assert not torch.equal(mixer.train()(x), mixer(x))


def test_a_single_cell_warns():
    x = torch.randn(1, 8, 5, 8)
    with pytest.warns(UserWarning, match=r"5x8 is a single cell of stoken_size=\(8, 8\): its 8 neighbours lie outside"):
        SuperTokenAttention(8, stoken_size=8)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SuperTokenAttention(8)(x)
        SuperTokenAttention(8, stoken_size=(8, 4))(x)
        SuperTokenAttention(8, stoken_size=1)(x[..., :1, :1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim=8, got num_heads=3; use num_heads=2"),
        ({"num_heads": 0}, "got num_heads=0"),
        ({"stoken_size": 0}, "side of a cell or .*, at least 1, got 0; the authors' are 8, 4 and 1"),
        ({"stoken_size": (4, -1)}, r"got \(4, -1\)"),
        ({"stoken_size": (4, 4, 4)}, r"got \(4, 4, 4\)"),
        ({"n_iter": 0}, "n_iter must be at least 1, got 0"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SuperTokenAttention(8, **kwargs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 49, 8), r"\(B, C, H, W\) with C=8, got \(2, 49, 8\)"),
        (torch.zeros(2, 6, 6, 8), "C=8"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.long), r"int64; convert with x.float\(\)"),
    ],
)
def test_rejects_inputs(x, message):
    mixer = SuperTokenAttention(8)
    for call in (mixer, mixer.associate, mixer.token_maps):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_nothing_is_associated_in_cells_of_one():
    with pytest.raises(ValueError, match="cells of 1x1 are plain self-attention"):
        SuperTokenAttention(8, stoken_size=1).associate(torch.zeros(1, 8, 4, 4))
