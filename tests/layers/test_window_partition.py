"""Windows of a map: every token where it belongs, and back; the padding, and which keys it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.layers import head_count, window_key_mask, window_merge, window_partition

pytestmark = pytest.mark.method("davit")
SIDE = st.integers(1, 9)


def slow_windows(x, window):
    """One token at a time."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window[0]), -(-width // window[1])
    out = torch.zeros(batch * rows * columns, window[0] * window[1], channels)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                n = (b * rows + i // window[0]) * columns + j // window[1]
                out[n, (i % window[0]) * window[1] + j % window[1]] = x[b, i, j]
    return out


@given(SIDE, SIDE, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_equals_slow_definition(height, width, batch, wh, ww):
    x = torch.randn(batch, 3, height, width).permute(0, 2, 3, 1)  # strides of a channels-first map
    windows = window_partition(x, (wh, ww))
    assert torch.equal(windows, slow_windows(x, (wh, ww)))
    assert torch.equal(window_merge(windows, (wh, ww), (height, width)), x)


@given(SIDE, SIDE, st.integers(1, 5), st.integers(1, 5))
def test_key_mask_marks_what_is_no_padding(height, width, wh, ww):
    mask = window_key_mask((height, width), (wh, ww))
    if height % wh == 0 and width % ww == 0:
        assert mask is None
    else:
        expected = slow_windows(torch.ones(1, height, width, 1), (wh, ww))[..., 0] > 0
        assert mask is not None and torch.equal(mask, expected) and mask.any(1).all()


def test_gradient_reaches_every_token():
    x = torch.randn(2, 5, 7, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: window_merge(window_partition(t, (2, 3)), (2, 3), (5, 7)).sin(), (x,))


@pytest.mark.parametrize(("shape", "window"), [((2, 6, 4), 2), ((1, 6, 6, 4), 0), ((1, 6, 6, 4), (2, 0))])
def test_partition_rejects(shape, window):
    with pytest.raises(ValueError, match=r"map \(B, H, W, C\) and a window of at least 1x1"):
        window_partition(torch.zeros(shape), window)


@pytest.mark.parametrize(("dim", "wanted", "near"), [(48, 5, 4), (48, 0, 1), (7, 3, 1), (8, 100, 8)])
def test_head_count_names_the_nearest(dim, wanted, near):
    with pytest.raises(
        ValueError, match=f"num_groups must divide dim={dim}, got num_groups={wanted}; use num_groups={near},"
    ):
        head_count(dim, wanted, name="num_groups")
