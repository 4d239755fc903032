"""Counts: multiply-accumulates against known figures, living memory against arithmetic."""

import pytest
import timm
import torch
from torch import nn

import tokenry.vision  # noqa: F401  registers the models
from golden_case import GoldenCase
from tokenry.measure import count_macs, peak_activations


def test_macs_of_known_layers():
    assert count_macs(nn.Linear(8, 4), torch.zeros(3, 8)) == 3 * 8 * 4
    assert count_macs(nn.Conv2d(3, 5, 3, padding=1), torch.zeros(2, 3, 7, 7)) == 2 * 49 * 5 * 3 * 9
    x = torch.zeros(2, 3, 4, dtype=torch.complex64)
    assert count_macs(lambda z: z @ z.mT, x) == 4 * 2 * 3 * 3 * 4


def test_macs_of_a_network_are_the_authors():
    macs = count_macs(timm.create_model("affnet_et").eval(), torch.zeros(1, 3, 256, 256))
    assert macs == GoldenCase("affnet", "affnet_et_64").spec["macs"]


@pytest.mark.parametrize("count", [1, 256])
def test_peak_counts_what_lives_at_once(count):
    x = torch.zeros(count)
    assert peak_activations(lambda: None) == 0
    assert peak_activations(lambda: x.add_(1).view(-1)) == 0
    assert peak_activations(lambda: x + 1) == 4 * count
    assert peak_activations(lambda: ((x + 1) + 1) + 1) == 8 * count
    assert peak_activations(lambda: [x + 1, x + 2, x + 3]) == 12 * count
