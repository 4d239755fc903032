from __future__ import annotations

import json

import pytest

from tokenry.compare import compare

pytestmark = pytest.mark.method("ems")
TINY = {
    "settings": {
        "budgets": "12", "window": 4, "context": 40, "following": 6, "passages": 3, "needles": 2,
        "timing_context": 48, "lengths": "32,48",
    },
    "repeats": 1,
    "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("kvcache")
    return out, compare("kvcache", out=out, methods=["EMS", "SnapKV-like (local)"], **TINY)


def test_rows(run):
    _, result = run
    full, ems, local = result.outcome.rows
    assert full["method"] == "full cache" and ems["method"] == "EMS (12)" and ems["slug"] == "ems"
    assert full["divergence"] == 0 and full["agreement"] == 100 and full["step"] == full["read"] == 1
    assert ems["divergence"] > 0 and local["against"] is not None
    assert ems["saved"] == pytest.approx(48 / 12)
    keys = {column.key for column in result.columns}
    assert all(keys - {"against"} <= set(row) for row in result.outcome.rows)
    by_depth, *growth = result.outcome.sweeps
    assert len(growth) == 3 and all(len(sweep.points["EMS"]) == 2 for sweep in growth)
    assert growth[2].exponents["EMS"] == pytest.approx(0, abs=1e-6)
    assert growth[2].exponents["full cache"] == pytest.approx(1, abs=1e-6)
    assert full["needle"] > 50 and full["needle"] >= local["needle"]
    assert [depth for depth, _ in by_depth.points["EMS"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert sum(found for _, found in by_depth.points["EMS"]) / 5 == pytest.approx(ems["needle"])
    assert "EMS" in result.outcome.examples and result.outcome.notes


def test_goes_on_where_it_was(run, monkeypatch):
    out, first = run
    monkeypatch.setattr("tokenry.compare.kinds.kvcache.load_model", lambda *a, **k: pytest.fail("did work again"))
    again = compare("kvcache", out=out, methods=["EMS", "SnapKV-like (local)"], **TINY)
    assert again.outcome == first.outcome


def test_own_texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(["one two three four five six seven eight nine ten " * 30]))
    tiny = {**TINY, "settings": {**TINY["settings"], "lengths": "32"}}
    result = compare("kvcache", data=str(path), methods=["sliding window"], **tiny)
    assert len(result.outcome.rows) == 2 and len(result.outcome.sweeps) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["ESM"]}, "no method is called 'ESM'"),
        ({"settings": {"budgets": "8", "window": 8}}, "smaller than budget 8"),
        ({"settings": {"budgets": "300", "context": 256}}, "keeps all of a context of 256"),
        ({"settings": {"budgets": "12", "window": 4, "context": 20}}, "must hold a needle"),
        ({"settings": {"budget": 8}}, "no setting 'budget'"),
        ({"settings": {"passages": 1}}, "passages must be at least 2"),
        ({"data": "/nowhere.txt"}, "no such file or folder"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        compare("kvcache", quiet=True, **options)


def test_rejects_texts_without_words(tmp_path):
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(ValueError, match="holds no text"):
        compare("kvcache", data=str(tmp_path), quiet=True)
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="JSON list of strings"):
        compare("kvcache", data=str(tmp_path / "b.json"), quiet=True)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="at least 2 are needed"):
        compare("kvcache", data=str(tmp_path / "short.txt"), **TINY)
