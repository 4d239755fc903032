"""Semantic tokens: golden cases, the slow definition, identities, sizes, drawing, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.layers import SwinBlock
from tokenry.layers.window_surroundings import pool_cells
from tokenry.mixers import DenseSemanticTokenMixer, RecoverBlock, SemanticTokenMixer, SemanticTokens, SurroundingsBlock
from tokenry.mixers.dense_semantic_token import fixed_cells

pytestmark = pytest.mark.method("stvit-r")


def loaded(module, case):
    """A block with the authors' weights."""
    own = {}
    for name, value in case.state_dict().items():
        name = name.replace("layer_scale_1", "ls1.gamma").replace("layer_scale_2", "ls2.gamma")
        name = name.replace("conv_pos.proj.0", "conv_pos.proj")
        if ".kv." in name:
            own[name.replace(".kv.", ".k.")], own[name.replace(".kv.", ".v.")] = value.chunk(2)
        else:
            own[name] = value
    module.load_state_dict(own)
    assert sum(p.numel() for p in module.parameters()) == case.spec["params"]
    return module.eval()


def random_weights(module, seed=0):
    """Weights large enough that every branch counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    return module.eval()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "settings"),
    [("semantic_block", {}), ("semantic_block_shortcut_convpos", {"shortcut": True, "conv_pos": True})],
)
@torch.inference_mode()
def test_golden_semantic_tokens(name, settings, record_property):
    case = GoldenCase("stvit-r", name)
    block = loaded(SemanticTokens(32, 4, **settings), case)
    case.compare("y", block(case.inputs["x"].transpose(1, 2).unflatten(2, (14, 14))))
    record_property("worst_error", case.worst)


@pytest.mark.golden
@torch.inference_mode()
def test_golden_recover_block(record_property):
    case = GoldenCase("stvit-r", "recover_block")
    block = loaded(RecoverBlock(32, 4), case)
    case.compare("y", block(case.inputs["x"], case.inputs["s"]))
    record_property("worst_error", case.worst)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "surroundings"), [("dense_semantic_block", 14), ("dense_gather_block", 21)])
@torch.inference_mode()
def test_golden_surroundings(name, surroundings, record_property):
    case = GoldenCase("stvit-r", name)
    block = loaded(SurroundingsBlock(32, 4, window=3, key_window=7, surroundings=surroundings), case)
    x = case.inputs["x"].unflatten(1, (14, 31))
    if "s" in case.inputs:
        s = case.inputs["s"].unflatten(1, (6, 15))[:, :, :14]  # the last column is padding's
    else:
        s = pool_cells(x, fixed_cells(14, 7, 3), fixed_cells(31, 7, 3))
    case.compare("y", block(s, x))
    record_property("worst_error", case.worst)


def attention(block, queries, keys):
    """softmax(q k^T / sqrt(d)) v Wo of one sequence (n, C) over another, head by head."""
    q, k, v = block.attn.q(queries), block.attn.k(keys), block.attn.v(keys)
    d, heads = q.shape[1] // block.attn.num_heads, []
    for h in range(block.attn.num_heads):
        part = slice(h * d, (h + 1) * d)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1) @ v[:, part])
    return block.attn.proj(torch.cat(heads, 1))


def slow_semantic_tokens(block, x):
    """The equation, window by window: (C, H, W) -> (M, C)."""
    _, height, width = x.shape
    w, r, m = block.window, block.samples, block.margin
    rows, columns = -(-height // w), -(-width // w)
    raster = x.new_zeros(rows * r, columns * r, len(x))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, (i + 1) * height // rows
            left, right = j * width // columns, (j + 1) * width // columns
            c = F.adaptive_max_pool2d(x[None, :, top:bottom, left:right], (r, r))[0]
            if block.conv_pos is not None:
                c = block.conv_pos(c[None])[0]
            c = c.flatten(1).T
            around = x[:, max(top - m, 0) : bottom + m, max(left - m, 0) : right + m].flatten(1).T
            a = block.ls1(attention(block, block.norm1(c), block.norm1(torch.cat([c, around]))))
            s = c + a if block.shortcut else a
            s = s + block.ls2(block.mlp(block.norm2(s)))
            raster[i * r : (i + 1) * r, j * r : (j + 1) * r] = s.unflatten(0, (r, r))
    return raster.flatten(0, 1)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 16), width=st.integers(1, 16), window=st.integers(1, 7), samples=st.integers(1, 4),
    margin=st.integers(0, 4), shortcut=st.booleans(), conv_pos=st.booleans(), batch=st.integers(1, 2),
)  # fmt: skip
@torch.no_grad()
def test_is_its_equation(height, width, window, samples, margin, shortcut, conv_pos, batch):
    samples = min(samples, window)
    block = random_weights(
        SemanticTokens(8, 2, window=window, samples=samples, margin=margin, shortcut=shortcut, conv_pos=conv_pos)
    )
    x = torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(height * 17 + width))
    y = block(x)
    assert y.shape[1] == math.prod(block.grid((height, width)))
    for image, tokens in zip(x, y, strict=True):
        torch.testing.assert_close(tokens, slow_semantic_tokens(block, image), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unit_is_its_six_blocks():
    unit = random_weights(SemanticTokenMixer(8, 2))
    x = torch.randn(2, 8, 14, 14)
    swin = unit.swin(x.permute(0, 2, 3, 1))
    image, s = swin.flatten(1, 2), unit.generate(swin.permute(0, 3, 1, 2))
    assert s.shape == (2, 36, 8)
    s = unit.gather(s, torch.cat([s, image], 1))
    groups = [[r * 6 + c for r in range(i, i + 3) for c in range(j, j + 3)] for i in (0, 3) for j in (0, 3)]
    local = s.clone()
    for group in groups:
        local[:, group] = unit.within(s[:, group])
    image = unit.recover(image, unit.among(local))
    torch.testing.assert_close(unit(x), image.transpose(1, 2).unflatten(2, (14, 14)))


def slow_surroundings(block, x, context):
    """Window by window, (H, W, C) asking (H', W', C); what is outside of a map is not there at all."""
    w, k, y = block.window, block.key_window, x.clone()
    before = (block.surroundings - k) // 2
    after = block.surroundings - k - before
    for i in range(-(-x.shape[0] // w)):
        for j in range(-(-x.shape[1] // w)):
            own = slice(i * w, (i + 1) * w), slice(j * w, (j + 1) * w)
            seen = context[
                max(i * k - before, 0) : (i + 1) * k + after, max(j * k - before, 0) : (j + 1) * k + after
            ].flatten(0, 1)
            a = attention(block, block.norm1(x[own].flatten(0, 1)), block.norm1(seen))
            y[own] += block.ls1(a).view_as(y[own])
    return y + block.ls2(block.mlp(block.norm2(y)))


def slow_dense_unit(unit, x):
    """The six blocks on one map (C, H, W), written as the equations."""
    w, r = unit.window, unit.samples
    x = unit.swin(x.permute(1, 2, 0)[None])[0]
    cells = [[], []]  # along both axes, the positions of each cell that has any
    for axis in (0, 1):
        for start in range(0, x.shape[axis], w):
            for i in range(r):
                places = range(start + i * w // r, start + math.ceil((i + 1) * w / r))
                cells[axis].append([place for place in places if place < x.shape[axis]])
    rows, columns = ([cell for cell in found if cell] for found in cells)
    s = torch.stack([torch.stack([x[row][:, column].amax((0, 1)) for column in columns]) for row in rows])
    s = slow_surroundings(unit.generate, s, x)
    s = slow_surroundings(unit.gather, s, x)
    s = slow_surroundings(unit.within, s, s)
    s = unit.among(s.flatten(0, 1)[None])[0].view_as(s)
    return slow_surroundings(unit.recover, x, s).permute(2, 0, 1)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 16), width=st.integers(1, 16), window=st.integers(1, 7), samples=st.integers(1, 4),
    wider=st.tuples(st.integers(0, 7), st.integers(0, 12), st.integers(0, 5)), batch=st.integers(1, 2),
)  # fmt: skip
@torch.no_grad()
def test_dense_unit_is_its_equation(height, width, window, samples, wider, batch):
    samples = min(samples, window)
    surroundings = (window + wider[0], window + wider[1], samples + wider[2])
    unit = random_weights(
        DenseSemanticTokenMixer(8, 2, window=window, samples=samples, surroundings=surroundings), seed=3
    )
    x = torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(height * 17 + width))
    y = unit(x)
    for image, found in zip(x, y, strict=True):
        torch.testing.assert_close(found, slow_dense_unit(unit, image), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_dense_unit_looks_no_further_than_its_surroundings():
    unit = random_weights(DenseSemanticTokenMixer(8, 2))
    unit.among.ls1.gamma.zero_()  # the one block that looks at everything
    x = torch.randn(1, 8, 7, 140)
    other = x.clone()
    other[..., 133:] = torch.randn(1, 8, 7, 7)  # the last of 20 windows
    changed = (unit(x) - unit(other)).abs().amax((0, 1, 2)).unflatten(0, (20, 7)).amax(1) > 1e-6
    # recovery sees four windows to each side, and what made their tokens saw a whole one more at most
    assert changed[15:].all() and not changed[:14].any()


@torch.no_grad()
def test_dense_unit_recovers_as_the_classifiers_where_it_sees_everything():
    dense, plain = random_weights(DenseSemanticTokenMixer(8, 2)), SemanticTokenMixer(8, 2).eval()
    plain.load_state_dict(dense.state_dict())  # equal names and shapes
    x, s = torch.randn(2, 14, 14, 8), torch.randn(2, 6, 6, 8)
    expected = plain.recover(x.flatten(1, 2), s.flatten(1, 2)).view_as(x)
    torch.testing.assert_close(dense.recover(x, s), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_layer_scale_1_recovery_is_its_mlp():
    block, x = random_weights(RecoverBlock(8, 2)), torch.randn(2, 49, 8)
    block.ls1.gamma.zero_()
    torch.testing.assert_close(block(x, torch.randn(2, 9, 8)), x + block.ls2(block.mlp(block.norm2(x))))


@torch.no_grad()
def test_semantic_tokens_follow_their_windows():
    block, x = random_weights(SemanticTokens(8, 2, margin=0)), torch.randn(1, 8, 14, 14)
    swapped = torch.cat([x[..., 7:], x[..., :7]], -1)
    raster, other = (block(y).unflatten(1, (6, 6)) for y in (x, swapped))
    torch.testing.assert_close(other, torch.cat([raster[:, :, 3:], raster[:, :, :3]], 2))


@torch.no_grad()
def test_new_unit_is_nearly_its_swin_block():
    torch.manual_seed(0)
    unit, x = SemanticTokenMixer(16).eval(), torch.randn(1, 16, 14, 14)
    swin = unit.swin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert 0 < (unit(x) - swin).abs().max() < 1e-3


@pytest.mark.parametrize(("size", "shift"), [((14, 14), 3), ((14, 14), 0), ((7, 14), 3), ((7, 7), 3)])
@torch.no_grad()
def test_swin_block_is_timms_where_windows_fit(size, shift):
    ours = random_weights(SwinBlock(8, 2, shift=shift))
    theirs = SwinTransformerBlock(8, size, 2, window_size=7, shift_size=shift).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_swin_block_never_sees_padding(shift):
    block, x = random_weights(SwinBlock(8, 2, window=4, shift=shift)), torch.randn(1, 6, 9, 8)
    size, moved = (6, 9), x.roll((-shift, -shift), (1, 2))
    normed, y = block.norm1(moved), torch.zeros_like(x)
    bias = block.attn._get_rel_pos_bias()[0]  # (heads, 16, 16)
    q, k, v = block.attn.qkv(normed).unflatten(-1, (3, 2, 4)).unbind(3)
    for i in range(6):
        for j in range(9):
            near = [
                (a, b) for a in range(i // 4 * 4, min(i // 4 * 4 + 4, 6)) for b in range(j // 4 * 4, min(j // 4 * 4 + 4, 9))
                if (a >= size[0] - shift) == (i >= size[0] - shift) and (b >= size[1] - shift) == (j >= size[1] - shift)
            ]  # fmt: skip
            for head in range(2):
                logits = torch.stack([
                    q[0, i, j, head] @ k[0, a, b, head] / 2 + bias[head, i % 4 * 4 + j % 4, a % 4 * 4 + b % 4] for a, b in near
                ])  # fmt: skip
                values = torch.stack([v[0, a, b, head] for a, b in near])
                y[0, i, j, head * 4 : head * 4 + 4] = logits.softmax(0) @ values
    y = x + block.attn.proj(y).roll((shift, shift), (1, 2))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drawing_shows_where_tokens_look():
    block, x = random_weights(SemanticTokens(8, 2)), torch.randn(2, 8, 14, 20)
    found = block.token_maps(x)["semantic"]
    assert found.shape == (2, 14, 20) and (found >= 0).all()
    assert (found.sum((1, 2)) < 6).all() and (
        found.sum((1, 2)) > 3
    ).all()  # six windows share out 1 each, less the centres'
    # one window: its keys are the nine centres and then the whole map
    small = torch.randn(1, 8, 5, 6)
    c = block.pool(small.permute(0, 2, 3, 1))
    keys = block.norm1(torch.cat([c[0], small[0].flatten(1).T]))
    q, k = block.attn.q(block.norm1(c[0])), block.attn.k(keys)
    weights = [(q[:, h * 4 : h * 4 + 4] @ k[:, h * 4 : h * 4 + 4].T / 2).softmax(-1) for h in range(2)]
    expected = torch.stack(weights).mean((0, 1))[9:].view(1, 5, 6)
    torch.testing.assert_close(block.token_maps(small)["semantic"], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticTokens(8, samples=8), "samples must be from 1 to the window's side of 7, got 8"),
        (lambda: SemanticTokens(8, samples=0), "samples must be from 1"),
        (lambda: SemanticTokens(8, margin=-1), "margin must be 0 or more tokens, got -1"),
        (lambda: SemanticTokens(8, 3), "num_heads must divide dim=8, got num_heads=3; use num_heads=2"),
        (lambda: SemanticTokenMixer(8, window=2), "samples must be from 1 to the window's side of 2, got 3"),
        (lambda: SemanticTokenMixer(8, drop_path=[0.1, 0.2]), "each of the six blocks, got 2"),
        (lambda: DenseSemanticTokenMixer(8, samples=8), "samples must be from 1 to the window's side of 7, got 8"),
        (lambda: DenseSemanticTokenMixer(8, surroundings=(14, 21)), r"sides of three windows, got \(14, 21\)"),
        (lambda: DenseSemanticTokenMixer(8, surroundings=(14, 6, 27)), "surroundings of 6 do not hold the window of 7"),
        (lambda: DenseSemanticTokenMixer(8, drop_path=[0.1, 0.2]), "each of the six blocks, got 2"),
        (lambda: DenseSemanticTokenMixer(8)(torch.zeros(1, 14, 14, 8)), r"with C=8, got \(1, 14, 14, 8\)"),
        (lambda: SwinBlock(8, window=4, shift=4), "shift from 0 to window - 1, got 4 and 4"),
        (lambda: SemanticTokens(8)(torch.zeros(1, 196, 8)), r"maps \(B, C, H, W\) with C=8, got \(1, 196, 8\)"),
        (lambda: SemanticTokenMixer(8)(torch.zeros(1, 14, 14, 8)), r"with C=8, got \(1, 14, 14, 8\)"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mixer", [SemanticTokenMixer, DenseSemanticTokenMixer])
def test_rates_reach_the_six_blocks(mixer):
    unit = mixer(8, drop_path=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], proj_drop=0.2, attn_drop=0.1)
    blocks = [unit.swin, unit.generate, unit.gather, unit.within, unit.among, unit.recover]
    rates = [getattr(getattr(b, "drop_path", None) or b.drop_path1, "drop_prob", 0.0) for b in blocks]
    assert rates == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert all(b.mlp.drop2.p == 0.2 for b in blocks) and {b.attn.attn_drop for b in blocks[1:]} == {0.1}
