"""Records survive writing, replace their elders, and are computed from runs."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from tokenry.evidence import (
    Record,
    all_records,
    latest,
    project_records,
    records,
    save_project,
    save_user,
    user_records,
)
from tokenry.measure import describe_machine


def record(**changes):
    return Record(**({"slug": "ems", "check": "claim", "id": "a", "passed": True, "value": 1.5} | changes))


def test_round_trip_through_both_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PROJECT", tmp_path / "project")
    monkeypatch.setenv("TOKENRY_EVIDENCE", str(tmp_path / "mine.sqlite"))
    one = record()
    save_project([one])
    save_user([record(id="b")])
    assert project_records() == [one]
    assert [r.id for r in user_records()] == ["b"]
    assert [r.id for r in all_records()] == ["a", "b"]


def test_newer_replaces_older_but_another_device_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PROJECT", tmp_path)
    old = record(date=datetime.now(UTC) - timedelta(days=1), value=1.0)
    gpu = record(machine=describe_machine().model_copy(update={"device": "H200"}), value=9.0)
    save_project([old, gpu])
    save_project([record(value=2.0)])
    assert sorted(r.value for r in project_records()) == [2.0, 9.0]


def test_latest_does_not_depend_on_order():
    older, newer = (
        record(date=datetime(2026, 1, 1, tzinfo=UTC)),
        record(date=datetime(2026, 2, 1, tzinfo=UTC), passed=False),
    )
    assert latest([older, newer]) == latest([newer, older]) == [newer]


def test_unknown_checks_are_refused():
    with pytest.raises(ValidationError):
        record(check="hope")


def test_project_records_are_readable():
    for found in project_records():
        assert found.date <= datetime.now(UTC) + timedelta(days=1)
        assert found.versions and found.machine.cores >= 1
