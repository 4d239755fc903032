"""The comparison of mixers, tiny: rows, resume, a folder and a parquet file of the user's own, bad input."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from tokenry.compare import compare
from tokenry.compare.kind import Options
from tokenry.compare.kinds import mixers
from tokenry.compare.run import comparison
from tokenry.vision.labelled_images import read_labelled_images

TINY = {"dims": "8,8", "depths": "1,1", "epochs": 1, "train_images": 64, "sides": "32,48", "sweep_dim": 8, "seeds": 2}


def small(out=None, **kwargs):
    settings = {**TINY, **kwargs.pop("settings", {})}
    return compare(
        "mixers",
        out=out,
        quiet=True,
        **{"methods": ["pool", "random"], "repeats": 1, "effort": "demo", "settings": settings, **kwargs},
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(level - 30, level + 30, (40, 36, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_rows_resume_and_notes(tmp_path, monkeypatch):
    result = small(tmp_path)
    identity, pool, random = result.outcome.rows
    assert (identity["method"], pool["slug"], random["slug"]) == ("identity", "poolformer", "metaformer-baselines")
    assert identity["gain"] == 0 and identity["ratio"] == 1
    assert pool["params"] == identity["params"] and pool["macs"] == identity["macs"]
    assert random["frozen"] == pytest.approx((64**2 + 16**2) / 1e3)
    assert pool["accuracy_spread"] >= 0 and pool["rate"] > 0 and pool["memory"] > 0
    (sweep,) = result.outcome.sweeps
    assert [x for x, _ in sweep.points["pool"]] == [64.0, 144.0]
    assert set(sweep.exponents) == {"pool", "random"}
    assert any("made anew for every size" in note for note in result.outcome.notes)

    def runs(*args):
        raise AssertionError("a finished run makes no network")

    monkeypatch.setattr(mixers._Bench, "network", runs)
    monkeypatch.setattr(mixers._Bench, "mixer", runs)
    assert small(tmp_path).outcome == result.outcome


def test_growth_and_crossings():
    kind = mixers.Mixers()
    sizes = [16.0, 64.0, 256.0, 1024.0]
    points = {
        "identity": [(n, 1e-3) for n in sizes],
        "attention": [(n, n * n / 6400) for n in sizes],
        "pool": [(n, n / 100) for n in sizes],
        "random": [(n, 10 * n * n) for n in sizes[:2]],
    }
    growth = kind._growth(
        kind._sweep(
            list(points),
            {int(4 * n**0.5): {k: dict(v).get(n, 0) / 1e3 for k, v in points.items() if n in dict(v)} for n in sizes},
        )
    )
    assert "linear: pool (1.00); quadratic: random (2.00), attention (2.00)" in growth[0]
    assert growth[1].endswith("pool 64.") and growth[2].endswith("random.")


def test_fixed_mixers_stop_where_their_weights_grow_too_large():
    bench = mixers._Bench(mixers.Mixers(), Options())
    assert bench.fits("random", 256) and not bench.fits("random", 512) and bench.fits("pool", 512)
    assert bench.memory("random", 512) is None


def test_a_folder_of_images(folder):
    (folder / "dark" / "broken.png").write_bytes(b"no image")
    result = small(data=str(folder), methods=["pool"], settings={"seeds": 1, "side": 16, "sides": "16,32"})
    assert "16 images to train, 4 to test, 2 classes" in result.outcome.notes[0]
    assert any("One seed" in note for note in result.outcome.notes)
    assert any("1 image(s) cannot be read" in note and "broken.png" in note for note in result.outcome.notes)


def test_parquet_files(folder, tmp_path):
    (x, y), (_, test_y) = read_labelled_images(folder, side=16)
    assert x.shape == (16, 16, 16, 3) and set(y) | set(test_y) == {0, 1}

    def encoded(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    table = pa.table({"image": [encoded(one) for one in x], "label": y})
    parquet.write_table(table, tmp_path / "all.parquet")
    (a, _), (b, _) = read_labelled_images(tmp_path / "all.parquet", side=16)
    assert len(a) + len(b) == 16
    for split in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    (a, labels), _ = read_labelled_images(tmp_path, side=16)
    assert np.array_equal(a, x) and np.array_equal(labels, y)
    parquet.write_table(pa.table({"pixels": [b""]}), tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match="needed: image"):
        read_labelled_images(tmp_path / "wrong.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["pooling"]}, "no method is called 'pooling'; known: identity; aff"),
        ({"settings": {"depth": 3}}, "mixers has no setting 'depth'"),
        ({"settings": {"epochs": 0}}, "epochs must be at least 1"),
        ({"settings": {"dims": "8"}}, "one positive entry per stage"),
        ({"settings": {"sides": "4,32"}}, "at least 8 pixels"),
        ({"settings": {"sides": "32"}}, "at least two sizes"),
        ({"model": "x"}, "no model is asked for"),
        ({"data": "/nowhere"}, "no labelled images at"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        comparison("mixers").check(Options(**options))


def test_a_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="no folder with images"):
        comparison("mixers").check(Options(data=str(tmp_path)))
