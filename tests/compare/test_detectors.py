"""The comparison of detectors, tiny: rows, resume, the user's own texts, bad input."""

import json

import pytest

from tokenry.assets import held_out_texts
from tokenry.compare import compare
from tokenry.compare.kind import Options
from tokenry.compare.kinds import detectors
from tokenry.compare.run import comparison

pytestmark = pytest.mark.method("lastde")
SMALL = {"humans": 4, "tokens": 40, "samples": 5, "timed": 2, "lengths": "30,40"}


def small(tmp_path=None, **kwargs):
    settings = {**SMALL, **kwargs.pop("settings", {})}
    given = {"methods": ["fast-detectgpt", "lastde", "lastde++"], "repeats": 1, "settings": settings, **kwargs}
    return compare("detectors", out=tmp_path, quiet=True, **given)


@pytest.mark.filterwarnings("ignore:only .* scored tokens")
def test_rows_sweep_and_resume(tmp_path, monkeypatch):
    result = small(tmp_path)
    rows = {row["method"]: row for row in result.outcome.rows}
    assert list(rows) == ["likelihood", "fast-detectgpt", "lastde", "lastde++"]
    assert rows["likelihood"]["ratio"] == 1.0 and rows["lastde++"]["slug"] == "lastde"
    for row in rows.values():
        assert 0 <= row["auroc_low"] <= row["auroc"] <= row["auroc_high"] <= 1
        assert row["seconds"] > 0 and 0 <= row["tpr"] <= 100
    (sweep,) = result.outcome.sweeps
    assert [x for x, _ in sweep.points["lastde++"]] == [30.0, 40.0] and "lastde++" in sweep.exponents
    assert any("not proof" in note for note in result.outcome.notes)

    def loads(*args):
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr(detectors._Bench, "_model", loads)
    assert small(tmp_path).outcome == result.outcome


@pytest.mark.filterwarnings("ignore:only .* scored tokens")
def test_own_texts(tmp_path):
    texts = held_out_texts("english")
    lines = [{"text": text[:400], "label": label} for text, label in zip(texts, [0, 1, 0, 1], strict=False)]
    lines.append({"text": "short", "label": "human"})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = small(data=str(path), methods=["log-rank"])
    assert [row["method"] for row in result.outcome.rows] == ["likelihood", "log-rank"]
    assert any("1 texts were shorter" in note for note in result.outcome.notes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ["roberta"]}, "no method is called 'roberta'"),
        ({"settings": {"tokens": 10}}, "tokens must be at least 30, got 10"),
        ({"settings": {"temperature": 0}}, "temperature must be positive"),
        ({"settings": {"lengths": "5,40"}}, "lengths must be at least 30"),
        ({"settings": {"texts": 3}}, "no setting 'texts'"),
        ({"data": "/no/such/folder"}, "does not exist"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        comparison("detectors").check(Options(**options))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        comparison("detectors").check(Options(model=str(tmp_path)))
