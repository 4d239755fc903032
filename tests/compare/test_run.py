"""Every kind of comparison: known, described, and strict about its options."""

import pytest

from tokenry.compare import KINDS, Column, Comparison, Options, Outcome, compare, comparison, run


@pytest.mark.parametrize("kind", KINDS)
def test_kind_describes_itself(kind):
    found = comparison(kind)
    assert found.kind == kind and found.question.endswith("?") and found.title
    assert found.baseline in found.methods()
    keys = {column.key for column in found.columns}
    assert all(plot.y in keys and plot.x in {*keys, None} for plot in found.plots)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_refuses_unknown_names(kind):
    with pytest.raises(ValueError, match=r"no (method|model).*'nonsense'; (known|did you mean)"):
        compare(kind, methods=["nonsense"], quiet=True)
    with pytest.raises(ValueError, match="no setting 'nonsense'; settings:"):
        compare(kind, settings={"nonsense": 1}, quiet=True)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kinds: decoding"):
        comparison("nonsense")


class Toy(Comparison):
    kind, title, question, baseline = "toy", "Toy", "Which is larger?", "one"
    columns = [Column(key="value", title="value", better="higher")]
    settings = {"factor": 1.0, "sizes": [1, 2]}

    def methods(self):
        return ["one", "two"]

    def run(self, options, session):
        factor = self.setting(options, "factor")
        values = {"one": 1, "two": 2}
        return Outcome(
            rows=[{"method": m, "value": session.step(m, lambda m=m: values[m] * factor)} for m in self.chosen(options)]
        )


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(run.KINDS, "toy", f"{__name__}:Toy")
    monkeypatch.setattr(run, "comparison", lambda kind: Toy())


def test_result_is_written_and_read_back(toy, tmp_path):
    result = compare("toy", out=tmp_path, methods=["two"], settings={"factor": "3"}, quiet=True)
    assert [row["method"] for row in result.outcome.rows] == ["one", "two"]  # the baseline is always there
    assert result.outcome.rows[1]["value"] == 6.0
    again = run.Result.model_validate_json((tmp_path / "result.json").read_text())
    assert again.outcome == result.outcome and again.machine == result.machine


def test_settings_take_the_type_of_their_default():
    assert Toy().setting(Options(settings={"sizes": "3,4,5"}), "sizes") == [3, 4, 5]
    with pytest.raises(ValueError, match="factor='x'"):
        Toy().check(Options(settings={"factor": "x"}))


def test_changed_data_is_measured_again(toy, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("first")

    def go():
        before = len(list(tmp_path.glob("run/steps-*")))
        compare("toy", out=tmp_path / "run", data=str(data), quiet=True)
        return len(list(tmp_path.glob("run/steps-*"))) - before

    assert (go(), go()) == (1, 0)
    data.write_text("another")
    assert go() == 1


def test_names_that_hold_commas_stay_whole():
    class Commas(Toy):
        def methods(self):
            return ["one", "one, cold", "two, and, more"]

    assert Commas().named("one,one, cold ,two,and,more,,x") == ["one", "one, cold", "two, and, more", "x"]


def test_wrong_options_are_one_sentence(toy):
    with pytest.raises(ValueError, match=r"^toy: dtype='float64': Input should be"):
        compare("toy", dtype="float64")
    with pytest.raises(ValueError, match=r"^toy: there is no option 'effrt'; options: model, data"):
        compare("toy", effrt="demo")


def test_options_are_strict():
    with pytest.raises(ValueError):
        Options(repeats=0)
    with pytest.raises(ValueError):
        Options(no_such_option=1)
