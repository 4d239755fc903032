"""Drawing tokens: every kind of map, any timm model, likely mistakes."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tokenry.mixers import create_mixer
from tokenry.vision import draw_tokens, metaformer, token_maps

pytestmark = pytest.mark.method("metaformer-baselines")


class Shows(nn.Module):
    """A mixer that shows one map of a chosen kind."""

    layout, fixed_tokens = "NCHW", None

    def __init__(self, dim, kind="kept", **kwargs):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x

    def token_maps(self, x):
        column = torch.arange(x.shape[-1], device=x.device).expand(len(x), *x.shape[-2:])
        maps = {"kept": column < 2, "super_tokens": column // 2, "significance": column.float()}
        return {self.kind: maps[self.kind]}


def net(mixer="attention", **kwargs):
    torch.manual_seed(0)
    return metaformer(mixer, (1, 1), (8, 16), 3, 64, **kwargs).eval()


def photograph(width=64, height=64):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_attention_received_is_the_mean_of_the_definition():
    mixer, x = create_mixer("attention", 8, head_dim=4), torch.randn(2, 6, 8)
    q, k, _ = mixer.qkv(x).reshape(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    received = ((q @ k.transpose(-2, -1)) / 2).softmax(-1).mean((1, 2))
    shown = mixer.token_maps(x)["attention"]
    torch.testing.assert_close(shown, received)
    torch.testing.assert_close(shown.sum(-1), torch.ones(2))


def test_kinds_of_maps():
    image = photograph()
    pixels = np.asarray(image, dtype=float)
    kept = np.asarray(draw_tokens(net([Shows, Shows]), image, size=64, layer=0), dtype=float)
    assert np.array_equal(kept[:, :8], pixels[:, :8])  # two columns of 16 are kept
    assert (kept[:, 8:] <= pixels[:, 8:] * 0.4 + 1).all()
    segments = draw_tokens(net(Shows, mixer_kwargs={"kind": "super_tokens"}), image, size=64, layer=0, strength=1)
    segments = np.asarray(segments, dtype=float)
    assert (segments[:, 8] == 255).all()  # a border between two super tokens
    assert np.ptp(segments[:, 1:8].reshape(-1, 3), axis=0).max() == 0
    assert abs(segments[0, 0, 0] - pixels[:, :8, 0].mean()) <= 1
    heat = draw_tokens(net(Shows, mixer_kwargs={"kind": "significance"}), image, size=64, layer=0, strength=1)
    heat = np.asarray(heat, dtype=float).sum(-1)
    assert heat[:, -1].min() > heat[:, 0].max()


def test_chooses_layers_in_the_order_of_running():
    model = net("attention")
    found = token_maps(model, torch.randn(2, 3, 64, 32))
    assert [name for name, _ in found] == [f"stages.{i}.blocks.0.token_mixer" for i in range(2)]
    assert [maps["attention"].shape for _, maps in found] == [(2, 128), (2, 32)]
    assert not any(m._forward_hooks for m in model.modules())
    first, last = (np.asarray(draw_tokens(model, photograph(), layer=i, size=(64, 32))) for i in (0, -1))
    assert first.shape == last.shape == (64, 32, 3) and (first != last).any()


@pytest.mark.parametrize("name", ["resnet18", "poolformer_s12_exact"])
def test_influence_of_any_timm_model(name):
    model = timm.create_model(name, num_classes=2).eval()
    picture = np.asarray(draw_tokens(model, photograph(), layer=0, query=(0.0, 0.0), size=96, strength=1), dtype=float)
    light = picture.sum(-1)
    assert light[:32, :32].max() > light[64:, 64:].max()  # an early position sees its neighbourhood
    assert not any(p.grad is not None for p in model.parameters())


def test_kept_tokens_of_a_pruned_model():
    model = timm.create_model(
        "uniformer_xxs", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), head_dim=8, num_classes=2
    ).eval()
    (_, maps), (_, last) = [found for found in token_maps(model, torch.randn(2, 3, 64, 96)) if found[1]]
    assert maps["kept"].shape == (2, 4, 6) and maps["kept"].dtype == torch.bool
    assert maps["kept"].sum((1, 2)).tolist() == [12, 12] and last["kept"].sum((1, 2)).tolist() == [3, 3]
    assert draw_tokens(model, photograph(), size=64).size == (64, 64)


def test_windows_of_a_detection_form():
    model = timm.create_model("uniformer_small_h14", depths=(1, 1, 4, 1), dims=(8, 8, 16, 16), head_dim=8).eval()
    maps = dict(token_maps(model, torch.randn(2, 3, 64, 96)))
    assert maps["stages.2.blocks.0.mixer"]["attention"].shape == (2, 4, 6)  # in windows
    assert maps["stages.2.blocks.3.mixer"]["attention"].shape == (2, 24)  # global
    assert draw_tokens(model, photograph(), layer=0, size=64).size == (64, 64)


def test_training_mode_comes_back():
    model = net("attention").train()
    draw_tokens(model, photograph(), size=64)
    draw_tokens(model, photograph(), size=64, what="influence")
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_tokens(net(), "nowhere.png"), "no image at nowhere.png"),
        (lambda: draw_tokens(net(), torch.zeros(3, 8, 8)), "PIL image or a path"),
        (
            lambda: draw_tokens(net(), photograph(), what="super_tokens"),
            "shows 'super_tokens'; it shows attention, influ",
        ),
        (lambda: draw_tokens(net(), photograph(), layer=2), "within the 2 layers"),
        (lambda: draw_tokens(net(), photograph(), what="influence", layer=5), "within the 2 stages"),
        (lambda: draw_tokens(net(), photograph(), strength=2), "shares from 0 to 1"),
        (lambda: draw_tokens(nn.Conv2d(3, 3, 1), photograph(), size=8), "no mixer with token_maps"),
    ],
)
def test_likely_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
