"""The command line answers people and scripts."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tokenry.catalog import card, cards
from tokenry.claims.registry import Outcome
from tokenry.cli import app, main
from tokenry.compare import KINDS
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
    shown = runner.invoke(app, ["show", "ems"], env={"COLUMNS": "60"}).stdout
    assert all(line in shown.splitlines() for line in card("ems").snippet.strip().splitlines())  # none is cut or padded


def test_status_is_computed_from_records():
    def golden():
        return next(row for row in json.loads(call("status", "--json").stdout) if row["slug"] == "ems")["golden"]

    before = golden()
    save_user([Record(slug="ems", check="golden", id="a-case-of-mine", passed=False)])
    after = golden()
    assert (after["run"], after["passed"]) == (before["run"] + 1, before["passed"])
    shown = runner.invoke(app, ["status"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert (
        sum(line.startswith("ems ") for line in shown) == 1 and len(shown) < len(cards()) + 5
    )  # a line for each method
    assert not any("…" in line for line in shown)


def test_verify_fails_when_a_claim_does_not_show(monkeypatch):
    from tokenry import claims
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
        (["compare", "decoding", "--device", "nonsense"], "--device 'nonsense': PyTorch cannot use it here"),
        (["compare", "decoding", "--dtype", "float64"], "--dtype must be float32"),
        (["demo", "--kinds", "losses,nonsense"], "no comparison is called 'nonsense'"),
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


@pytest.mark.parametrize(
    ("arguments", "file", "says"),
    [
        (["report", "--run", "."], "result.json", "result.json is no result of `tokenry compare`: Invalid JSON"),
        (["status"], "mine.sqlite", "mine.sqlite holds no records that can be read"),
    ],
)
def test_broken_files_are_named(tmp_path, monkeypatch, capsys, arguments, file, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRY_EVIDENCE", "mine.sqlite")
    (tmp_path / file).write_text('{"kind": ' * 200)
    test_mistakes_are_one_sentence(monkeypatch, capsys, arguments, says)


def test_help_names_every_kind():
    said = " ".join(runner.invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert ", ".join(KINDS) in said


def test_a_claim_has_one_state():
    claim = card("ems").claims[0]
    record = Record(slug="ems", check=claim.kind, id=claim.id, passed=False, sentence="as measured")
    found = [
        Outcome("ems", claim, record=record),
        Outcome("ems", claim, error="gone"),
        Outcome("ems", claim, not_run="no GPU"),
    ]
    assert [(o.state, o.failed, o.sentence) for o in found] == [
        ("does not show", True, "as measured"),
        ("error", True, "gone"),
        ("not run", False, "no GPU"),
    ]


def test_verify_says_where_it_wrote(monkeypatch):
    from tokenry import claims
    from tokenry.claims import registry

    claim = next(c for c in card("ems").claims if c.runs == "cpu")
    record = Record(slug="ems", check=claim.kind, id=claim.id, passed=True, sentence="as measured")
    monkeypatch.setattr(claims, "verify", lambda *a, **k: iter([registry.Outcome("ems", claim, record=record)]))
    assert "recorded in" not in call("verify", "ems", "--record", "none").stdout
    assert "recorded in" in call("verify", "ems").stdout


def test_methods_whose_names_hold_commas(monkeypatch):
    from tokenry import compare

    class Asked(Exception):
        pass

    def asked(kind, **options):
        raise Asked(options["methods"])

    monkeypatch.setattr(compare, "compare", asked)
    done = call("compare", "decoding", "--methods", "prompt lookup,token recycling, hot,  batch_generate")
    assert done.exception.args == (["prompt lookup", "token recycling, hot", "batch_generate"],)


def test_the_page_shows_all_comparisons_of_a_folder(tmp_path):
    tiny = {
        "losses": ["tokens=16", "vocab=40", "dim=8", "vocab_sweep=20,40"],
        "mixers": ["epochs=1", "train_images=32"],
    }
    tiny["mixers"] += ["seeds=1", "dims=8", "depths=1", "sides=32,64"]
    for kind, settings in tiny.items():
        options = [part for setting in settings for part in ("--set", setting)]
        chosen = "cut" if kind == "losses" else "pool"
        done = call("compare", kind, "--quick", "--repeats", "1", "--methods", chosen, "--out", str(tmp_path), *options)
        assert done.exit_code == 0, done.output
    page = (tmp_path / "index.html").read_text("utf-8")
    assert all(f'data-view="compare-{kind}"' in page for kind in tiny)


def test_report(tmp_path):
    assert call("report", "--out", str(tmp_path)).exit_code == 0
    assert (tmp_path / "index.html").read_text("utf-8").startswith("<!doctype html>")


def test_brackets_in_an_error_are_no_markup(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tokenry", "compare", "decoding", "--set", "[/bold][red]x"])
    with pytest.raises(SystemExit):
        main.run()
    assert "[/bold][red]x" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for arguments in (["detect", str(text)], ["audit", "small"], ["batch", str(text), "--out", str(tmp_path / "out")]):
        with pytest.raises(ValueError, match="no CUDA device"):
            app([*arguments, "--device", "cuda"], standalone_mode=False)
