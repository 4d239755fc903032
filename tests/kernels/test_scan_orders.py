"""Scan orders: permutations of a map's tokens, and merge as the adjoint of scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.kernels.scan_orders import BIDIRECTIONAL, CAUSAL, CROSS, cross_merge, cross_scan, scan_order

pytestmark = pytest.mark.method("hrvmamba")
EVERY = (*CROSS, "serpentine", "serpentine_reversed")


@pytest.mark.golden
def test_golden():
    case = GoldenCase("hrvmamba", "op_cross_scan_merge")
    x = case.inputs["x"]
    case.compare("xs", cross_scan(x), tolerance=0.0)
    case.compare("y", cross_merge(cross_scan(x) * case.inputs["w"], *x.shape[-2:]))


@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_merge_is_the_adjoint_of_scan(height, width, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)
    for orders in (CROSS, BIDIRECTIONAL, CAUSAL, EVERY, torch.stack([torch.randperm(height * width, generator=g)] * 2)):
        s = torch.randn(2, len(orders), 3, height * width, generator=g, dtype=torch.float64)
        left = (cross_scan(x, orders) * s).sum()
        right = (x.flatten(2) * cross_merge(s, height, width, orders)).sum()
        torch.testing.assert_close(left, right)


@given(height=st.integers(1, 6), width=st.integers(1, 6))
def test_names_and_permutations_agree(height, width):
    x = torch.arange(2.0 * height * width).view(1, 2, height, width)
    order = torch.stack([scan_order(name, height, width) for name in EVERY])
    assert torch.equal(order.sort(dim=-1).values, torch.arange(height * width).expand_as(order))
    scanned = cross_scan(x, EVERY)
    assert torch.equal(scanned, cross_scan(x, order))
    assert torch.equal(cross_merge(scanned, height, width, EVERY), cross_merge(scanned, height, width, order))


def test_neighbours_stay_neighbours_in_a_serpentine():
    places = scan_order("serpentine", 4, 5)
    rows, columns = places // 5, places % 5
    assert (rows.diff().abs() + columns.diff().abs() == 1).all()


def test_half_a_turn_swaps_directions():
    x = torch.randn(1, 2, 3, 4)
    turned = cross_scan(x.flip(2, 3))
    assert torch.equal(turned, cross_scan(x)[:, [2, 3, 0, 1]])


def test_bad_input():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="an order must be one of"):
        cross_scan(x, ("diagonal",))
    with pytest.raises(ValueError, match="12\\) for a map of 3x4, got \\(2, 10"):
        cross_scan(x, torch.zeros(2, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="4 orders of a map of 2x4"):
        cross_merge(cross_scan(x), 2, 4)
    with pytest.raises(ValueError, match="expected a map"):
        cross_scan(x[0])
