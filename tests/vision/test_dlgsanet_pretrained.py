"""DLGSANet as a transformers model: saved and loaded, the authors' checkpoints, image processor, training, bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageToImage,
    Swin2SRImageProcessor,
)

from golden_case import GoldenCase
from tokenry.vision import DLGSANet, load_dlgsanet, upscale_image
from tokenry.vision.dlgsanet_pretrained import DLGSANetConfig, DLGSANetForImageSuperResolution

pytestmark = pytest.mark.method("dlgsanet")
SMALL = {"dim": 12, "groups": 2, "blocks": 1}


def small(upscale=2, **kwargs):
    torch.manual_seed(0)
    return DLGSANetForImageSuperResolution(DLGSANetConfig(upscale=upscale, **{**SMALL, **kwargs})).eval()


@pytest.mark.golden
@torch.inference_mode()
def test_golden(record_property):
    case = GoldenCase("dlgsanet", "tiny_x2_small_input")
    model = DLGSANetForImageSuperResolution.from_checkpoint({"params_ema": case.state_dict()})
    assert model.config.upscale == 2 and model.num_parameters() == case.spec["params"]
    found = model(case.inputs["x"]).reconstruction
    assert torch.equal(found, load_dlgsanet(case.state_dict())(case.inputs["x"]))
    case.compare("sr.slice", found.flatten()[:: max(1, found.numel() // 4096)][:4096])
    case.compare("sr.stat", torch.stack([found.mean(), found.std(correction=0), found.abs().max()]))
    record_property("worst_error", case.worst)


@pytest.mark.parametrize("tlc", [True, False])
@torch.inference_mode()
def test_save_and_load(tlc, tmp_path):
    model = small(3, tlc=tlc)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))  # no starting values
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dlgsanet"
    x = torch.rand(2, 3, 80, 20)  # larger than a window
    for loaded in (
        DLGSANetForImageSuperResolution.from_pretrained(tmp_path),
        AutoModelForImageToImage.from_pretrained(tmp_path),
    ):
        assert type(loaded) is DLGSANetForImageSuperResolution and not loaded.training
        assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    assert AutoConfig.from_pretrained(tmp_path).tlc is tlc
    half = AutoModelForImageToImage.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(x.bfloat16()).reconstruction.dtype == torch.bfloat16
    # the folder is a checkpoint of the plain network too
    network = load_dlgsanet(tmp_path)
    assert torch.equal(network(x), model(x).reconstruction)
    assert ("eval: whole map" in repr(network)) is not tlc
    assert "eval: whole map" in repr(load_dlgsanet(tmp_path, tlc=False))


def test_starts_as_the_plain_network():
    model = small()
    torch.manual_seed(0)
    plain = DLGSANet(2, **SMALL)
    assert model.dlgsanet.state_dict().keys() == plain.state_dict().keys()
    for name, value in model.dlgsanet.state_dict().items():
        expected = plain.state_dict()[name]
        if "temperature" in name or "norm" in name:
            assert torch.equal(value, expected), name
        else:  # other random values from the same range
            assert value.abs().max() <= expected.shape[1:].numel() ** -0.5 if value.ndim > 1 else value.isfinite().all()


@torch.inference_mode()
def test_image_processor_of_swin2sr(tmp_path):
    Swin2SRImageProcessor(do_pad=False).save_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    processor, model = AutoImageProcessor.from_pretrained(tmp_path), AutoModelForImageToImage.from_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8))
    found = model(**processor(picture, return_tensors="pt")).reconstruction
    assert found.shape == (1, 3, 26, 34)
    pixels = (found[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, np.asarray(upscale_image(model.dlgsanet, picture)))


def test_training_lowers_the_loss():
    model = small().train()
    y = torch.rand(8, 3, 1, 1).expand(8, 3, 24, 24)
    x = y[:, :, ::2, ::2]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        found = model(pixel_values=x, labels=y)
        torch.testing.assert_close(found.loss, (found.reconstruction - y).abs().mean())
        optimizer.zero_grad()
        found.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(found.loss.item())
    assert losses[-1] < losses[0]


@torch.inference_mode()
def test_tuples():
    model, x = small(), torch.rand(1, 3, 8, 8)
    (found,) = model(x, return_dict=False)
    assert torch.equal(found, model(x).reconstruction)
    assert len(model(x, labels=torch.zeros(1, 3, 16, 16), return_dict=False)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(5), "upscale must be 2, 3 or 4, got 5"),
        (lambda: small(dim=32), "multiple of 6, got 32"),
        (
            lambda: small()(torch.rand(1, 3, 8, 8), labels=torch.rand(1, 3, 8, 8)),
            r"2 times as large as pixel_values, \(1, 3, 16, 16\), got \(1, 3, 8, 8\)",
        ),
        (lambda: small()(255 * torch.rand(1, 3, 8, 8)), "divide by 255"),
        (lambda: small()(torch.rand(1, 1, 8, 8)), r"RGB images \(B, 3, H, W\)"),
        (lambda: DLGSANetForImageSuperResolution.from_checkpoint("nothing.pth"), "there is no checkpoint at nothing"),
        (lambda: load_dlgsanet("tests"), "a folder of save_pretrained"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
