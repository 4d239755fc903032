"""Tiles without seams, PSNR and SSIM, folders, training that goes on."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.signal import convolve2d
from torch import nn

from tokenry.assets import cifar10_sample
from tokenry.vision import DLGSANet, upscale_image
from tokenry.vision.super_resolution import (
    bicubic_downscale,
    bicubic_upscale,
    evaluate,
    luma,
    psnr,
    quantize,
    ssim,
    upscale_tensor,
)
from tokenry.vision.super_resolution_training import SuperResolutionTraining, train_super_resolution

pytestmark = pytest.mark.method("dlgsanet")


def photographs(count, side=64):
    """Photographs, enlarged from the embedded sample: uint8 (3, side, side)."""
    images = torch.from_numpy(cifar10_sample("test")[0][:count]).permute(0, 3, 1, 2).float()
    large = nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return list(large.clamp(0, 255).round().to(torch.uint8))


def network(upscale=2, **kwargs):
    torch.manual_seed(0)
    return DLGSANet(upscale, **{"dim": 12, "groups": 1, "blocks": 1, **kwargs}).eval()


class Short(nn.Module):
    """Enlarges twice and sees two pixels in every direction, zeros outside: a tile must know that much around it."""

    upscale = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 5, padding=2)

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.conv(x), 2)


@given(h=st.integers(1, 40), w=st.integers(17, 60), tile=st.integers(16, 50), overlap=st.sampled_from([8, 12, 16]))
def test_tiles_are_exact_where_the_network_sees_less_than_what_is_thrown_away(h, w, tile, overlap):
    if tile < 2 * overlap:
        tile = 2 * overlap
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h))
    model = Short()
    whole, tiled = upscale_tensor(model, x, tile=0), upscale_tensor(model, x, tile=tile, overlap=overlap)
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-6)


def test_no_seam():
    """Tiles change a picture slowly if at all: no step between neighbouring columns, as tiles put side by side make."""
    model = network()
    x = photographs(1, 96)[0][None].float() / 255

    def columns(
        y,
    ):  # mean step from one column to the next, inside the picture, after the pattern of the shuffle is averaged
        return nn.functional.avg_pool2d(y, 2)[..., 10:-10].diff(dim=-1).abs().mean((0, 1, 2))

    whole = upscale_tensor(model, x, tile=0)
    picture = columns(whole).mean()
    changed = {
        overlap: columns(upscale_tensor(model, x, tile=64, overlap=overlap) - whole).max() for overlap in (0, 32)
    }
    assert 0 < changed[32] < 0.05 * picture
    assert changed[0] > picture


def test_large_images_are_tiled_by_themselves(monkeypatch):
    monkeypatch.setattr("tokenry.vision.super_resolution.WHOLE", 30 * 30)
    monkeypatch.setattr("tokenry.vision.super_resolution.TILE", 32)
    seen = []
    upscale_tensor(Short(), torch.rand(1, 3, 30, 30), overlap=8, on_tile=lambda *at: seen.append(at))
    assert seen == [(1, 1)]
    upscale_tensor(Short(), torch.rand(1, 3, 40, 50), overlap=8, on_tile=lambda *at: seen.append(at))
    assert seen[1:] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(("tile", "overlap"), [(20, 16), (-1, 0), (32, -2)])
def test_refuses_tiles(tile, overlap):
    with pytest.raises(ValueError, match="at least twice as wide as the overlap"):
        upscale_tensor(Short(), torch.rand(1, 3, 40, 40), tile=tile, overlap=overlap)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGB", "RGB"),
        ("L", "L"),
        ("1", "L"),
        ("LA", "LA"),
        ("RGBA", "RGBA"),
        ("P", "RGB"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
    ],
)
def test_every_kind_of_picture(mode, expected):
    picture = Image.fromarray(photographs(1, 16)[0].permute(1, 2, 0).numpy()).convert(mode)
    larger = upscale_image(network(), picture)
    assert larger.mode == expected and larger.size == (32, 32)


def test_gray_is_gray_and_transparency_is_kept():
    model = network()
    gray = Image.fromarray(photographs(1, 16)[0].permute(1, 2, 0).numpy()).convert("L")
    assert np.array_equal(upscale_image(model, gray), upscale_image(model, gray.convert("RGB")).convert("L"))
    half = gray.convert("RGBA")
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 8 + [255] * 8]), 16, 0)))
    larger = upscale_image(model, half)
    alpha = np.asarray(larger.getchannel("A"))
    assert (alpha[:, :12] == 0).all() and (alpha[:, 20:] == 255).all()
    assert np.array_equal(larger.convert("RGB"), upscale_image(model, half.convert("RGB")))
    palette = gray.convert("P")
    palette.info["transparency"] = 0
    assert upscale_image(model, palette).mode == "RGBA"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_refuses_more_than_8_bits(mode):
    with pytest.raises(ValueError, match="8 bits a channel"):
        upscale_image(network(), Image.new(mode, (9, 9)))


def slow_ssim(a, b):
    """SSIM of two planes by scipy's full two-dimensional convolution."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blurred(x):
        return convolve2d(x, window, mode="valid")

    ma, mb = blurred(a), blurred(b)
    va, vb, vab = blurred(a * a) - ma * ma, blurred(b * b) - mb * mb, blurred(a * b) - ma * mb
    c1, c2 = 6.5025, 58.5225
    return (((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def test_measures_are_their_definitions():
    full = torch.stack(photographs(3, 40)).float() / 255
    other = quantize(full + 0.05 * torch.randn(full.shape, generator=torch.Generator().manual_seed(0)))
    levels = (full * 255).round().numpy().astype(np.float64)
    planes = 16 + (65.481 * levels[:, 0] + 128.553 * levels[:, 1] + 24.966 * levels[:, 2]) / 255
    np.testing.assert_allclose(luma(full)[:, 0], planes, atol=1e-4)
    a, b = luma(full)[:, 0].numpy(), luma(other)[:, 0].numpy()
    for border in (0, 4):
        inner = (slice(border, 40 - border), slice(border, 40 - border))
        found = psnr(full, other, border), ssim(full, other, border)
        for i in range(3):
            mean_square = ((a[i][inner] - b[i][inner]) ** 2).mean()
            assert found[0][i].item() == pytest.approx(10 * math.log10(255**2 / mean_square))
            assert found[1][i].item() == pytest.approx(slow_ssim(a[i][inner], b[i][inner]))


def test_measures_of_known_differences():
    gray = torch.full((1, 3, 20, 20), 0.5)
    assert psnr(gray, gray).item() == math.inf and ssim(gray, gray).item() == pytest.approx(1.0)
    # one level of 255 in all channels is 219 / 255 of a level of luma
    assert psnr(gray, gray + 1 / 255).item() == pytest.approx(20 * math.log10(255 * 255 / 219), abs=1e-3)
    framed = gray.clone()
    framed[..., :4, :] = framed[..., -4:, :] = framed[..., :4] = framed[..., -4:] = 0
    assert psnr(framed, gray, border=4).item() == math.inf


def test_bicubic():
    """Reducing with antialiasing leaves nothing of a pattern that is too fine; enlarging keeps a gradient."""
    stripes = torch.tensor([0.0, 1.0]).repeat(16).expand(1, 3, 32, 32)
    assert (bicubic_downscale(stripes, 2)[..., 2:-2] - 0.5).abs().max() < 0.01
    ramp = torch.linspace(0.1, 0.9, 20).expand(1, 3, 20, 20)
    assert bicubic_upscale(ramp, 3)[..., 9:-9].diff(dim=-1).std() < 1e-5
    levels = bicubic_downscale(torch.rand(1, 3, 8, 8), 2) * 255
    torch.testing.assert_close(levels, levels.round())
    with pytest.raises(ValueError, match="multiples of 2, got 9x8"):
        bicubic_downscale(torch.rand(1, 3, 9, 8), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 8)), "must share a shape"),
        (lambda: psnr(torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 9), 5), "leaves nothing of images of 9x9"),
        (lambda: psnr(torch.rand(1, 1, 9, 9), torch.rand(1, 1, 9, 9)), "expected RGB images"),
        (lambda: ssim(torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 9)), "11 pixels a side inside the border, got 9x9"),
    ],
)
def test_measures_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def folder(tmp_path):
    for i, pixels in enumerate(photographs(2, 49)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    Image.new("RGB", (12, 40)).save(tmp_path / "narrow.png")
    (tmp_path / "notes.txt").write_text("no picture", "utf-8")
    return tmp_path


def test_evaluates_a_folder(folder):
    model, seen = network(3), []
    found = evaluate(model, folder, on_image=lambda *at: seen.append(at))
    assert [score.name for score in found.images] == ["0.png", "1.png"] and seen == [(i, 4) for i in range(1, 5)]
    assert len(found.skipped) == 2
    assert "broken.jpg" in found.skipped[0] and "cannot be read" in found.skipped[0]
    assert "narrow.png: 40x12 pixels are too few" in found.skipped[1]
    full = photographs(2, 49)[0][None, :, :48, :48].float() / 255
    small = bicubic_downscale(full, 3)
    score = found.images[0]
    assert score.psnr == pytest.approx(psnr(quantize(upscale_tensor(model, small)), full, 3).item())
    assert score.bicubic_psnr == pytest.approx(psnr(quantize(bicubic_upscale(small, 3)), full, 3).item())
    assert score.bicubic_ssim == pytest.approx(ssim(quantize(bicubic_upscale(small, 3)), full, 3).item())
    assert found.mean("psnr") == pytest.approx((found.images[0].psnr + found.images[1].psnr) / 2)


def test_evaluates_given_small_images(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for i, name in enumerate(("0", "1x3")):
        full = photographs(2, 49)[i][None, :, :48, :48].float() / 255
        pixels = bicubic_downscale(full, 3)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
        Image.fromarray(pixels).save(small / f"{name}.png")
    assert evaluate(network(3), folder, small=small).images == evaluate(network(3), folder).images
    Image.new("RGB", (5, 5)).save(small / "1x3.png")
    found = evaluate(network(3), folder, small=small)
    assert any("1x3.png has 5x5 pixels, not a 3th of 48x48" in line for line in found.skipped)


def test_refuses_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        evaluate(network(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="no picture of .* can be used: there is none"):
        evaluate(network(), tmp_path)


SHORT = SuperResolutionTraining(steps=9, batch=2, patch=8, save_every=3)


def test_training_lowers_the_loss_and_returns_an_evaluating_model():
    model = network()
    losses = train_super_resolution(
        model, photographs(4), SuperResolutionTraining(steps=40, batch=4, patch=12, save_every=10)
    )
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0] and not model.training


def test_a_killed_training_goes_on_to_the_same_result(tmp_path):
    images = photographs(3, 40)
    straight, killed, again = network(), network(), network()
    expected = train_super_resolution(straight, images, SHORT, seed=1)

    def kill(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_super_resolution(killed, images, SHORT, seed=1, folder=tmp_path, on_step=kill)
    steps = []
    losses = train_super_resolution(
        again, images, SHORT, seed=1, folder=tmp_path, on_step=lambda step, loss: steps.append(step)
    )
    assert steps == [4, 5, 6, 7, 8, 9] and losses == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9] and [line["loss"] for line in lines] == expected
    assert torch.equal(
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)["params"]["stem.weight"], straight.stem.weight
    )
    with pytest.raises(ValueError, match="name another folder"):
        train_super_resolution(network(), images, SHORT, seed=2, folder=tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "got none"),
        ([torch.zeros(3, 40, 40)], r"\(3, H, W\) uint8, number 0"),
        (
            [torch.zeros(3, 40, 12, dtype=torch.uint8)],
            "16 pixels a side for patches of 8 at scale 2, number 0 has 40x12",
        ),
    ],
)
def test_training_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        train_super_resolution(network(), images, SHORT)
