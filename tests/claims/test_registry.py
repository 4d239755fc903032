"""Claims: measured, failed, not runnable; each is told apart."""

import pytest

from tokenry.catalog import card
from tokenry.claims import Measurement, NotRunnable, registry, verify

SLUG = "ems"


@pytest.fixture
def claim(monkeypatch):
    """The first runnable claim of a card, with a measurement that the test puts in."""
    found = next(c for c in card(SLUG).claims if c.runs == "cpu")
    registry.measurement_of(card(SLUG), found)

    def put(function):
        monkeypatch.setitem(registry._MEASURES, (SLUG, found.id), function)
        return next(iter(verify([SLUG], claims=[found.id], quiet=True)))

    return put


def test_a_measured_claim_becomes_a_record(claim):
    outcome = claim(lambda context: Measurement(True, "1 of 1 (must be 1)", value=1.0, details={"seed": context.seed}))
    assert outcome.record.passed and outcome.record.value == 1.0 and outcome.record.slug == SLUG
    assert not outcome.error and not outcome.not_run


def test_a_claim_whose_effect_does_not_show_is_recorded_as_such(claim):
    assert claim(lambda context: Measurement(False, "0 of 1")).record.passed is False


def test_an_error_is_an_outcome(claim):
    def broken(context):
        raise RuntimeError("out of paper")

    outcome = claim(broken)
    assert "out of paper" in outcome.error and outcome.record is None


def test_missing_data_is_not_a_failure(claim, monkeypatch):
    monkeypatch.delenv("TOKENRY_DATA", raising=False)
    outcome = claim(lambda context: context.data("no-such-data"))
    assert "set TOKENRY_DATA" in outcome.not_run and outcome.record is None

    def cannot(context):
        raise NotRunnable("needs a moon")

    assert claim(cannot).not_run == "needs a moon"


def test_claims_without_a_machine_say_why():
    outcomes = {
        o.claim.id: o for c in card(SLUG).claims if c.runs == "none" for o in verify([SLUG], claims=[c.id], quiet=True)
    }
    assert outcomes
    assert all(o.not_run == o.claim.why_not and o.record is None for o in outcomes.values())


def test_unknown_names_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no method is called"):
        list(verify(["emz"]))
    with pytest.raises(ValueError, match="no such claim"):
        list(verify([SLUG], claims=["no-such-claim"]))


def test_measurements_resume(claim, tmp_path, monkeypatch):
    found = next(c for c in card(SLUG).claims if c.runs == "cpu")
    ran = []

    def measure(context):
        value = context.session.step("heavy", lambda: ran.append(1) or 3)
        return Measurement(True, "three", value=value)

    monkeypatch.setitem(registry._MEASURES, (SLUG, found.id), measure)
    for _ in range(2):
        outcome = next(iter(verify([SLUG], claims=[found.id], folder=tmp_path, quiet=True)))
    assert ran == [1] and outcome.record.value == 3
