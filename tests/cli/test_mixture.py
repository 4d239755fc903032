"""``tokenry mixture``."""

import json

import pytest
from typer.testing import CliRunner

from tokenry.assets import held_out_texts, language_samples, model_path
from tokenry.cli import app, run

pytestmark = pytest.mark.method("data-mixture-inference")
runner = CliRunner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "english.txt").write_text("\n".join(held_out_texts("english")[:60]), "utf-8")
    (folder / "code.txt").write_text("\n".join(held_out_texts("code")[:60]), "utf-8")
    (folder / "spanish.txt").write_text("\n".join(language_samples()["spa_Latn"][:300]), "utf-8")
    return folder


def call(*arguments):
    return runner.invoke(app, ["mixture", *map(str, arguments)])


def test_files_and_json(texts, tmp_path):
    out = tmp_path / "out.json"
    tokenizer = model_path("small") / "tokenizer.json"
    named = [f"{name}={texts / name}.txt" for name in ("english", "code", "spanish")]
    done = call(tokenizer, "--data", *named, "--merges", 150, "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["merges"] == 150
    shares = found["proportions"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["spanish"] < 0.1 < min(shares["english"], shares["code"])
    assert "english" in done.stdout and "%" in done.stdout
    again = call(model_path("small"), "--data", texts, "--merges", 150, "--json")
    assert json.loads(again.stdout)["proportions"] == pytest.approx(shares, abs=1e-6)


def test_rejects(texts, tmp_path, monkeypatch, capsys):
    tokenizer = model_path("small")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"plain\n\xcd\xfa")
    for arguments, message in [
        ((tokenizer, "--data", "english.txt"), "write name=file"),
        ((tokenizer, "--data", f"a={texts}/none.txt"), "there is no file"),
        ((tokenizer, "--data", f"a={texts}/code.txt", f"a={texts}/english.txt"), "given twice"),
        ((tokenizer, "--data", f"a={texts}/code.txt"), "at least two categories"),
        ((tmp_path / "none.json", "--data", texts), "there is no file"),
        ((tokenizer, "--data", tmp_path / "empty"), "no *.txt files"),
        ((tokenizer, "--data", f"a={texts}/code.txt", f"b={tmp_path}/binary.txt"), "binary.txt is not UTF-8 text"),
        ((tokenizer, "--data", texts, "--merges", 0), "--merges must be at least 1"),
        ((tokenizer, "--data", texts, "--denominator", "words"), "denominator must be one of"),
    ]:
        monkeypatch.setattr("sys.argv", ["tokenry", "mixture", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in said
        assert message in " ".join(said.split()), said
