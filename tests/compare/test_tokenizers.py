"""The kind ``tokenizers``: tiny run, resume, the user's own files, bad input."""

import json

import pytest

from tokenry.assets import language_samples, model_path
from tokenry.compare import compare
from tokenry.compare.kinds.tokenizers import MIXTURE, NNLS, TC, TEE, Tokenizers

pytestmark = pytest.mark.method("data-mixture-inference")
TINY = {"mixtures": 3, "categories": 3, "merges": 60, "training_kb": 30, "sample_kb": 15, "sweep": [20, 40, 60]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("texts")
    for name in ("eng_Latn", "rus_Cyrl", "hin_Deva", "swh_Latn"):
        (found / f"{name}.txt").write_text("\n".join(language_samples()[name][:250]), "utf-8")
    return found


def run(folder, out=None, **options):
    options = {
        "settings": TINY,
        "repeats": 1,
        "effort": "demo",
        "data": str(folder),
        "model": str(model_path("small")),
    } | options
    return compare("tokenizers", out=out, quiet=True, **options)


def test_tiny_run_and_resume(folder, tmp_path, monkeypatch):
    result = run(folder, tmp_path)
    rows = {row["method"]: row for row in result.outcome.rows}
    assert list(rows) == ["uniform", "random", TC, TEE, NNLS, MIXTURE]
    assert rows[MIXTURE]["slug"] == "data-mixture-inference"
    assert rows[MIXTURE]["error"] < rows["uniform"]["error"] - 1
    assert rows["uniform"]["gain"] == 1 and rows["uniform"]["seconds"] is None
    assert all(rows[method]["seconds"] > 0 for method in (TC, TEE, NNLS, MIXTURE))
    time, error = result.outcome.sweeps
    assert [x for x, _ in time.points[MIXTURE]] == [20, 40, 60] and MIXTURE in time.exponents
    assert all(y > 0 for _, y in error.points[NNLS])
    ((title, text),) = result.outcome.examples.items()
    assert "small" in title and "eng_Latn" in text and "bytes/token" in text
    assert json.loads((tmp_path / "result.json").read_text())["kind"] == "tokenizers"

    def never(*args, **kwargs):
        raise AssertionError("a finished step ran again")

    for step in ("_mixture", "_time", "_grow", "_own"):
        monkeypatch.setattr(Tokenizers, step, never)
    again = run(folder, tmp_path)
    assert again.outcome.rows == result.outcome.rows and again.outcome.examples == result.outcome.examples


def test_only_the_named_methods(folder):
    result = run(folder, methods=[TC], model=None)
    assert [row["method"] for row in result.outcome.rows] == ["uniform", TC]
    assert not result.outcome.sweeps and not result.outcome.examples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["magic"]}, "no method is called 'magic'"),
        ({"settings": {"speed": 3}}, "no setting 'speed'"),
        ({"settings": {"mixtures": 2}}, "mixtures must be at least 3"),
        ({"settings": {"sweep": "5,10"}}, "sweep must be"),
        ({"settings": {"categories": 9}}, r"holds 4 \*.txt files"),
        ({"data": "/no/such/folder"}, "is not a folder"),
        ({"model": "/no/such/tokenizer.json"}, "there is no file"),
    ],
)
def test_rejects(folder, options, message):
    with pytest.raises(ValueError, match=message):
        run(folder, **options)


def test_refuses_a_nearly_empty_file(folder, tmp_path):
    for path in folder.glob("*.txt"):
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    (tmp_path / "tiny.txt").write_text("few words")
    with pytest.raises(ValueError, match=r"tiny\.txt has less than 2 KB"):
        run(tmp_path)
