"""``tokenry upscale``."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tokenry.assets import cifar10_sample
from tokenry.cli import app
from tokenry.cli.main import run
from tokenry.vision import load_dlgsanet, upscale_image
from tokenry.vision.dlgsanet import DLGSANet
from tokenry.vision.dlgsanet_pretrained import DLGSANetForImageSuperResolution

pytestmark = pytest.mark.method("dlgsanet")
runner = CliRunner()


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save({"params_ema": DLGSANet(2, dim=12, groups=1, blocks=1).state_dict()}, tmp_path / "x2.pth")
    return tmp_path / "x2.pth"


@pytest.fixture
def call(tmp_path, weights):
    def upscale(*arguments):
        return runner.invoke(
            app, ["upscale", *map(str, arguments), "--checkpoint", str(weights), "--out", str(tmp_path / "out")]
        )

    return upscale


@pytest.fixture
def pictures(tmp_path):
    photographs = [Image.fromarray(x) for x in cifar10_sample("test")[0][:3]]
    (tmp_path / "in").mkdir()
    photographs[0].save(tmp_path / "in" / "ship.png", icc_profile=b"a profile")
    photographs[1].convert("L").save(tmp_path / "in" / "gray.jpg")
    photographs[2].putalpha(100)
    photographs[2].save(tmp_path / "in" / "alpha.webp", lossless=True)
    return tmp_path / "in"


def test_a_folder_of_save_pretrained(pictures, weights, tmp_path):
    model = DLGSANetForImageSuperResolution.from_checkpoint(weights, tlc=False)
    model.save_pretrained(tmp_path / "folder")
    arguments = ["--checkpoint", str(tmp_path / "folder"), "--out", str(tmp_path / "out")]
    done = runner.invoke(app, ["upscale", str(pictures / "ship.png"), *arguments])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out" / "ship_x2.png") as result, Image.open(pictures / "ship.png") as picture:
        assert np.array_equal(np.asarray(result), np.asarray(upscale_image(model.dlgsanet, picture)))


def test_pictures_of_the_library(call, pictures, weights, tmp_path):
    done = call(pictures, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [entry["out"] for entry in found["written"]] == [
        str(tmp_path / "out" / f"{name}_x2.png") for name in ("alpha", "gray", "ship")
    ]
    assert found["existing"] == found["skipped"] == []
    model = load_dlgsanet(weights)
    for entry, mode in zip(found["written"], ("RGBA", "L", "RGB"), strict=True):
        with Image.open(entry["out"]) as result, Image.open(entry["image"]) as picture:
            assert (result.mode, result.size) == (mode, (entry["width"], entry["height"])) == (mode, (64, 64))
            assert np.array_equal(result, upscale_image(model, picture))
    with Image.open(tmp_path / "out" / "ship_x2.png") as result:
        assert result.info["icc_profile"] == b"a profile"
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_broken_pictures_are_named_and_the_rest_is_written(call, pictures, tmp_path):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    Image.new("I;16", (9, 9)).save(pictures / "deep.png")
    half = (pictures / "ship.png").read_bytes()
    (pictures / "half.png").write_bytes(half[: len(half) // 2])
    done = call(pictures, pictures / "missing.png")
    assert done.exit_code == 1
    assert "3 pictures written" in done.stdout and "4 skipped" in done.stdout
    for name in ("broken.jpg", "deep.png", "half.png", "missing.png"):
        assert f"{name}" in done.stderr
    assert "cannot be read as a picture" in done.stderr and "8 bits a channel" in done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_goes_on_and_overwrites(call, pictures, tmp_path, monkeypatch):
    assert call(pictures).exit_code == 0
    (tmp_path / "out" / "gray_x2.png").unlink()
    done = call(pictures)
    assert "1 pictures written" in done.stdout and "2 were there already" in done.stdout
    done = call(pictures, "--overwrite", "--json")
    assert len(json.loads(done.stdout)["written"]) == 3


def test_two_pictures_of_one_name(call, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "ship.bmp")
    done = call(pictures / "ship.png", tmp_path / "other" / "ship.bmp")
    assert done.exit_code == 1 and "rename one of them" in done.stderr
    with Image.open(tmp_path / "out" / "ship_x2.png") as result:
        assert result.size == (64, 64)


def test_tiles(call, pictures, tmp_path, monkeypatch):
    assert call(pictures / "ship.png", "--tile", 0).exit_code == 0
    whole = (tmp_path / "out" / "ship_x2.png").read_bytes()
    assert call(pictures / "ship.png", "--tile", 16, "--overlap", 8, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "ship_x2.png").read_bytes() != whole


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("in", "--scale", "4"), "enlarges 2 times; leave --scale away"),
        (("in", "--tile", "20"), "at least twice --overlap, got 20 and 32"),
        (("empty",), "holds no pictures; known endings: .bmp"),
        (("in", "--checkpoint", "nothing.pth"), "there is no checkpoint at nothing.pth"),
    ],
)
def test_mistakes(arguments, says, pictures, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", "x2.pth", *arguments] if "--checkpoint" not in arguments else arguments
    monkeypatch.setattr("sys.argv", ["tokenry", "upscale", *given])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "upscaled").exists()
