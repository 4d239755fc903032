"""Areas under the curve with intervals, and ``tokenry detect``."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from tokenry.assets import held_out_texts
from tokenry.cli.detect import judge
from tokenry.cli.main import app
from tokenry.text import auroc, auroc_gain, true_positive_rate

pytestmark = pytest.mark.method("lastde")
values = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@given(values, values)
def test_auroc_is_sklearns(human, machine):
    found = auroc([human], [machine], repeats=50)
    assert found.value == pytest.approx(roc_auc_score([0] * len(human) + [1] * len(machine), human + machine))
    assert 0 <= found.low <= found.high <= 1


def test_interval_covers_and_gain_is_paired():
    rng = np.random.default_rng(0)
    human, machine = rng.normal(0, 1, (3, 100)), rng.normal(1, 1, (3, 100))
    found = auroc(human, machine)
    assert found.low < 0.760 < found.high and 0.05 < found.high - found.low < 0.2  # P(N(1, 2) > 0) = 0.760
    same = auroc_gain(human, machine, human * 2, machine * 2)
    assert tuple(same) == (0, 0, 0)
    assert auroc_gain(human, machine + 2, human, machine).low > 0
    assert auroc([[0.0]], [[float("inf")]]).value == 1


def test_true_positive_rate_keeps_the_false_alarms():
    human = np.arange(100.0)
    assert true_positive_rate(human, [97.5, 98.5, 99.5, 150.0], 0.01) == 0.75
    assert true_positive_rate(human, [97.5, 98.5, 99.5, 150.0], 0.0) == 0.5


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="score is NaN"):
        auroc([[0.1]], [[float("nan")]])
    with pytest.raises(ValueError, match="at least one human"):
        auroc([[]], [[0.1]])


@pytest.fixture
def files(tmp_path):
    texts = held_out_texts("english")
    human = tmp_path / "human"
    human.mkdir()
    for place, text in enumerate(texts[:20]):
        (human / f"{place}.txt").write_text(text[:400])
    (tmp_path / "essay.txt").write_text(texts[30])
    (tmp_path / "note.txt").write_text("Too short.")
    return tmp_path


def test_detect_prints_json(files):
    given = [
        "detect",
        str(files / "essay.txt"),
        str(files / "note.txt"),
        "--scorer",
        "small",
        "--human",
        str(files / "human"),
    ]
    result = CliRunner().invoke(app, [*given, "--samples", "5", "--fpr", "0.1", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    essay, note = told["texts"]
    assert essay["verdict"] in ("machine-like", "not flagged") and essay["score"] < 10
    assert 50 < essay["tokens"] < essay["of"] and "judged on its first" in essay["note"]
    assert note["verdict"] == "not judged" and "20 are needed" in note["note"]
    assert any("evidence, not proof" in line for line in told["notes"])


def test_detect_prints_a_table(files):
    given = ["detect", str(files / "essay.txt"), "--human", str(files / "human"), "--variant", "likelihood"]
    result = CliRunner().invoke(app, [*given, "--max-tokens", "40"])
    assert result.exit_code == 0, result.output
    assert "threshold" in result.stdout and "evidence, not proof" in result.stdout


def test_detect_refuses(files):
    with pytest.raises(ValueError, match="--variant must be one of"):
        judge({"a": "text"}, ["text"] * 20, variant="roberta")
    with pytest.raises(ValueError, match="a is empty"):
        judge({"a": " "}, ["text"] * 20)
    with pytest.raises(ValueError, match="at least 20 human texts, got 1"):
        judge({"a": "text"}, ["text"])
    (files / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    result = CliRunner().invoke(app, ["detect", str(files / "latin.txt")])
    assert isinstance(result.exception, ValueError) and "is not UTF-8" in str(result.exception)
