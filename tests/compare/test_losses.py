"""The comparison of losses, tiny: rows, growth, notes, resume, bad input."""

from __future__ import annotations

import pytest

from tokenry.compare import compare
from tokenry.compare.kind import Options
from tokenry.compare.kinds.losses import Losses

TINY = {"tokens": 48, "vocab": 300, "dim": 16, "vocab_sweep": "100,200,400"}


def small(out=None, **kwargs):
    settings = {**TINY, **kwargs.pop("settings", {})}
    return compare("losses", out=out, quiet=True, **{"repeats": 2, "effort": "demo", "settings": settings, **kwargs})


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_rows_growth_and_notes(softcap):
    result = small(settings={"softcap": softcap})
    rows = {row["method"]: row for row in result.outcome.rows}
    assert list(rows) == ["dense", "cut", "cut, two passes", "cut, filtered"]
    assert rows["dense"]["ratio"] == 1 and rows["cut"]["slug"] == "cce"
    assert all(row["seconds"] > 0 and row["seconds_spread"] >= 0 for row in rows.values())
    assert rows["cut"]["error"] < 1e-5 and rows["cut, two passes"]["error"] < 1e-5
    time, memory = result.outcome.sweeps
    assert [x for x, _ in time.points["cut"]] == [100.0, 200.0, 400.0]
    assert set(memory.exponents) == set(rows)
    notes = "\n".join(result.outcome.notes)
    assert "liger" in notes and "CUDA" in notes and "48 tokens" in notes


def test_resume(tmp_path, monkeypatch):
    first = small(tmp_path)

    def runs(*args):
        raise AssertionError("a finished run measures nothing")

    monkeypatch.setattr(Losses, "_measure", runs)
    assert small(tmp_path).outcome.rows == first.outcome.rows


def test_a_choice_of_methods():
    result = small(methods=["cut"])
    assert [row["method"] for row in result.outcome.rows] == ["dense", "cut"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ["cutt"]}, "no method is called 'cutt'; known: dense"),
        ({"methods": ["cut, triton"]}, "cannot run on cpu: needs CUDA"),
        ({"methods": ["dense, compiled"]}, "leave --quick away"),
        ({"methods": ["liger"]}, "liger"),
        ({"settings": {"vocab": 1}}, "at least 2"),
        ({"settings": {"vocab": "many"}}, "setting vocab='many'"),
        ({"settings": {"softcap": -1.0}}, "softcap must be positive"),
        ({"settings": {"tokenz": 1}}, "no setting 'tokenz'"),
        ({"model": "small"}, "no model or data is asked for"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        Losses().check(Options(effort="demo", **options))
