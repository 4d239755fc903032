"""The comparison of backbones, tiny: rows, resume, refusals, a folder of the user's own, bad input."""

import numpy as np
import pytest
from PIL import Image

from tokenry.compare import compare
from tokenry.compare.kind import Options
from tokenry.compare.kinds import backbones
from tokenry.compare.run import comparison

SMALL = {"size": 64, "batch": 2, "sizes": "32,64", "probe_size": 32, "probe_images": 60}


def small(tmp_path=None, **kwargs):
    settings = {**SMALL, **kwargs.pop("settings", {})}
    return compare(
        "backbones",
        out=tmp_path,
        quiet=True,
        **{"methods": ["affnet_et"], "repeats": 1, "settings": settings, **kwargs},
    )


def test_rows_sweep_and_notes(tmp_path, monkeypatch):
    result = small(tmp_path)
    base, ours = result.outcome.rows
    assert (base["method"], ours["method"], ours["slug"]) == ("mobilevitv2_050", "affnet_et", "affnet")
    assert ours["params"] == pytest.approx(1.436264)
    assert ours["macs"] == pytest.approx(0.0233, abs=2e-3)
    for row in (base, ours):
        assert row["rate_1"] > 0 and row["rate_n"] > 0 and 0 <= row["accuracy"] <= 100
        assert 0.1 < row["memory"] < 100
    assert base["ratio"] == 1.0
    (sweep,) = result.outcome.sweeps
    assert [x for x, _ in sweep.points["affnet_et"]] == [1024.0, 4096.0]
    assert any("random features" in note and "bare pixels" in note for note in result.outcome.notes)

    def loads(*args):
        raise AssertionError("a finished run makes no model")

    monkeypatch.setattr(backbones._Bench, "_model", loads)
    again = small(tmp_path)
    assert again.outcome == result.outcome


def test_a_model_that_refuses_a_size_is_reported():
    result = small(methods=["vit_tiny_patch16_224"], settings={"probe_size": 32})
    row = result.outcome.rows[1]
    assert row["rate_1"] is None and row["macs"] is None and row["accuracy"] is None
    assert any("vit_tiny_patch16_224 does not run at 64" in note for note in result.outcome.notes)
    assert any("vit_tiny_patch16_224 has no probe" in note for note in result.outcome.notes)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(level, 20, (24, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_own_images(folder):
    result = small(
        data=str(folder), methods=["mobilevitv2_050"], dtype="bfloat16", settings={"channels_last": 1, "sizes": "64"}
    )
    note = next(n for n in result.outcome.notes if n.startswith("Linear probe"))
    assert "20 images to fit, 4 to test, 2 classes (chance 50 %)" in note
    assert note.endswith("bare pixels: 100.0 %.")
    assert "exponent" not in result.outcome.rows[0]


def test_images_that_cannot_be_read_are_named(folder):
    for name in ("dark", "light"):
        (folder / name / "broken.png").write_bytes(b"no image")
    result = small(data=str(folder), methods=["mobilevitv2_050"], settings={"sizes": "64"})
    (note,) = [n for n in result.outcome.notes if "cannot be read" in n]
    assert note.startswith("2 image(s)") and "light/broken.png: cannot identify image file" in note


def test_without_probe():
    result = small(methods=["mobilevitv2_050"], settings={"probe": 0})
    assert "accuracy" not in result.outcome.rows[0]
    assert not any("probe" in note for note in result.outcome.notes)


def test_defaults_depend_on_effort():
    kind = comparison("backbones")
    assert kind.chosen(Options(effort="demo"))[0] == kind.baseline
    assert set(kind.chosen(Options())) > {"affnet_et", "identityformer_s12", "resnet18"}
    assert kind.setting(Options(), "batch") == 32 > kind.setting(Options(effort="demo"), "batch")
    assert kind.setting(Options(effort="demo"), "sizes") == kind.demo["sizes"]
    assert kind.setting(Options(effort="demo", settings={"size": "96"}), "size") == 96
    assert {"affnet", "poolformer_s12"} <= set(kind.methods())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["affnet_xl"]}, "knows no model 'affnet_xl'; did you mean affnet"),
        ({"settings": {"resolution": 64}}, "no setting 'resolution'"),
        ({"settings": {"sizes": "64,big"}}, "sizes='64,big'"),
        ({"settings": {"sizes": "64,0"}}, "sizes must be positive"),
        ({"settings": {"batch": 0}}, "batch must be at least 1, got 0"),
        ({"data": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all'"),
        ({"model": "owner/name"}, "write hub ids as 'hf-hub:owner/name'"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        comparison("backbones").check(Options(**options))


def test_rejects_folders_that_are_no_data_and_no_model(tmp_path, folder):
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="at least two folders"):
        comparison("backbones").check(Options(data=str(tmp_path / "flat")))
    for path in list((folder / "light").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="light: 1"):
        comparison("backbones").check(Options(data=str(folder)))
    with pytest.raises(ValueError, match=r"no config\.json"):
        comparison("backbones").check(Options(model=str(tmp_path)))
