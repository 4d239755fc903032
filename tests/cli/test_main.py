"""The command line answers people and scripts."""

import json

import pytest
from typer.testing import CliRunner

from tokenry.cli import app, main
from tokenry.evidence import Record, save_user

runner = CliRunner()


def call(*arguments):
    return runner.invoke(app, list(arguments))


def test_list():
    assert "token-recycling" in call("list").stdout
    slugs = [card["slug"] for card in json.loads(call("list", "--family", "decoding", "--json").stdout)]
    assert "token-recycling" in slugs and "ems" not in slugs


def test_search():
    hits = json.loads(call("search", "shrink the kv cache", "--json").stdout)
    assert hits[0]["slug"] == "ems"
    assert call("search", "zzzzqqqqxxxx").exit_code == 1


def test_show():
    found = json.loads(call("show", "ems", "--json").stdout)
    assert found["card"]["slug"] == "ems" and found["card"]["claims"]
    assert "EMSCache" in call("show", "ems").stdout


def test_status_is_computed_from_records():
    def golden():
        return next(row for row in json.loads(call("status", "--json").stdout) if row["slug"] == "ems")["golden"]

    before = golden()
    save_user([Record(slug="ems", check="golden", id="a-case-of-mine", passed=False)])
    after = golden()
    assert (after["run"], after["passed"]) == (before["run"] + 1, before["passed"])
    assert "ems" in call("status").stdout


def test_verify_fails_when_a_claim_does_not_show(monkeypatch):
    from tokenry import claims
    from tokenry.catalog import card
    from tokenry.claims import registry

    claim = next(c for c in card("ems").claims if c.runs == "cpu")

    def outcomes(passed):
        record = Record(slug="ems", check=claim.kind, id=claim.id, passed=passed, sentence="as measured")
        return lambda *a, **k: iter([registry.Outcome("ems", claim, record=record)])

    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(claims, "verify", outcomes(passed))
        assert call("verify", "ems", "--record", "none").exit_code == code
        answer = call("verify", "ems", "--record", "none", "--json")
        assert json.loads(answer.stdout)[0]["state"] == ("shows" if passed else "does not show")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "emz"], "no method is called 'emz'"),
        (["compare", "nonsense"], "no comparison is called"),
        (["compare", "decoding", "--methods", "nonsense"], "no method is called 'nonsense'"),
        (["compare", "decoding", "--set", "nonsense"], "name=value"),
        (["list", "--family", "nonsense"], "families:"),
        (["verify", "nonsense"], "no method is called"),
        (["report", "--run", "no-such-folder"], "holds no result.json"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr("sys.argv", ["tokenry", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert says in " ".join(error.split()) and "Traceback" not in error


def test_report(tmp_path):
    assert call("report", "--out", str(tmp_path)).exit_code == 0
    assert (tmp_path / "index.html").read_text("utf-8").startswith("<!doctype html>")
