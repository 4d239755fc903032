"""``tokenry audit``."""

import json

import pytest
from typer.testing import CliRunner

from tokenry.assets import load_model
from tokenry.cli import app
from tokenry.cli.main import run
from tokenry.text import UnconditionalTokenForcing
from tokenry.text.forced_decoding import ForcedDecoder

pytestmark = pytest.mark.method("token-forcing")
runner = CliRunner()


def call(*arguments):
    return runner.invoke(app, ["audit", *map(str, arguments)])


def test_json_is_the_library_s_answer():
    done = call("draft", "--threshold", 0.8, "--max-new-tokens", 12, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    forcing = UnconditionalTokenForcing(*load_model("draft"), threshold=0.8)
    report = forcing.scan(quiet=True)
    assert found["model"] == "draft" and found["scanned"] == 4096 and found["passes"] == report.passes
    assert [(c["token_id"], c["score"]) for c in found["candidates"]] == [
        (c.token_id, c.score) for c in report.candidates
    ]
    said = {c["token_id"]: c["text"] for group in ("repeating", "other", "natural") for c in found[group]}
    assert said == {c.token_id: c.text for group in forcing.extend(report.candidates, 12) for c in group}
    assert len(said) == len(report.candidates) > 0


def test_table_and_going_on(tmp_path, monkeypatch):
    arguments = ("draft", "--threshold", 0.8, "--max-new-tokens", 12, "--batch-size", 1024, "--out", tmp_path)
    first = call(*arguments)
    assert first.exit_code == 0, first.output
    text = " ".join(first.stdout.split())
    assert "4096 tokens forced" in text and "not proof" in text and "COM" in text
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    monkeypatch.setattr(UnconditionalTokenForcing, "_force", lambda *_: pytest.fail("scanned again"))
    again = call(*arguments)
    assert again.exit_code == 0 and again.stdout == first.stdout


def test_text_before_the_forced_token(monkeypatch):
    seen = []
    real = ForcedDecoder.__init__
    monkeypatch.setattr(ForcedDecoder, "__init__", lambda self, model, prefix: (seen.append(list(prefix)), real(self, model, prefix))[1])  # fmt: skip
    assert call("draft", "--before", "DUKE", "--batch-size", 2048, "--steps", 1, "--json").exit_code == 0
    assert seen[0] == [0, *load_model("draft")[1]("DUKE")["input_ids"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("draft", "--dtype", "int8"), "--dtype must be"),
        (("draft", "--threshold", "1.5"), "threshold must lie in"),
        (("draft", "--batch-size", "0"), "greater than or equal to 1"),
        (("no-such-folder-here",), "cannot load a causal language model"),
    ],
)
def test_rejects(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tokenry", "audit", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run()
    assert says in " ".join(capsys.readouterr().err.split())
