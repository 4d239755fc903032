"""Timing takes turns, sessions resume, exponents are right."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.measure import (
    Session,
    Timing,
    crossing,
    describe_machine,
    fit_exponent,
    interleave,
    mean_interval,
    package_versions,
    paired_interval,
    peak_extra_memory,
    standard_error,
    whole_file,
)


def test_interleaves_and_warms_up():
    calls = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert set(timings) == {"a", "b"} and len(timings["a"].seconds) == 3


def test_short_calls_are_repeated_until_they_can_be_timed():
    count = []
    timings = interleave({"a": lambda: count.append(1)}, repeats=1, warmup=0, min_seconds=0.01)
    assert len(count) > 10
    assert timings["a"].median < 0.01


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9))
def test_summary_is_ordered(seconds):
    timing = Timing.of(seconds)
    assert min(seconds) <= timing.low <= timing.median <= timing.high <= max(seconds)


def test_peak_extra_memory_sees_a_large_tensor():
    def work():
        torch.ones(64 * 2**20, dtype=torch.float32).sum().item()  # 256 MiB

    work()
    assert peak_extra_memory(work) > 180 * 2**20


@given(st.floats(-1, 3), st.floats(0.01, 100))
def test_exponent_of_a_power_law(power, factor):
    sizes = [8, 16, 32, 64, 128, 256]
    assert fit_exponent(sizes, [factor * s**power for s in sizes]) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize(("sizes", "costs"), [([1], [1]), ([1, 2], [1]), ([0, 1], [1, 1]), ([1, 2], [1, -1])])
def test_exponent_refuses_nonsense(sizes, costs):
    with pytest.raises(ValueError):
        fit_exponent(sizes, costs)


@pytest.mark.parametrize(("functions", "repeats"), [({}, 1), ({"a": int}, 0)])
def test_interleave_refuses_nonsense(functions, repeats):
    with pytest.raises(ValueError):
        interleave(functions, repeats=repeats)


def test_session_goes_on_where_it_was_killed(tmp_path):
    ran = []

    def run(name):
        ran.append(name)
        if name == "b" and ran.count("b") == 1:
            raise KeyboardInterrupt
        return {"name": name}

    for _ in range(2):
        try:
            with Session(tmp_path, {"seed": 0}, quiet=True) as session:
                results = [session.step(name, lambda name=name: run(name)) for name in "abc"]
        except KeyboardInterrupt:
            continue
    assert ran == ["a", "b", "b", "c"]
    assert results == [{"name": "a"}, {"name": "b"}, {"name": "c"}]


def test_session_survives_a_half_written_line(tmp_path):
    with Session(tmp_path, {}, quiet=True) as session:
        session.step("a", lambda: 1)
        path = session.path
    path.write_text(path.read_text() + '{"key": "b", "resu')
    with Session(tmp_path, {}, quiet=True) as session:
        assert session.step("a", lambda: 2) == 1
        assert not session.done("b")


def test_other_settings_never_reuse_steps(tmp_path):
    with Session(tmp_path, {"seed": 0}, quiet=True) as session:
        session.step("a", lambda: 0)
    with Session(tmp_path, {"seed": 1}, quiet=True) as session:
        assert session.step("a", lambda: 1) == 1


def test_machine_and_versions_are_plain_json():
    machine = describe_machine()
    assert machine.cores >= 1 and machine.memory_gib > 0
    assert {"python", "torch", "tokenry"} <= set(package_versions())
    json.dumps(package_versions())


def test_timer_is_a_clock():
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, repeats=2, warmup=0)["sleep"]
    assert 0.02 <= timing.median < 0.5


def test_crossing():
    sizes = [1.0, 10.0, 100.0, 1000.0]
    linear, quadratic = sizes, [s * s / 20 for s in sizes]
    assert crossing(sizes, linear, quadratic) == pytest.approx(20)
    assert crossing(sizes, quadratic, linear) is None
    assert crossing(sizes, [s / 100 for s in sizes], quadratic) == 1.0
    with pytest.raises(ValueError, match="two sizes"):
        crossing([1], [1], [2])


def test_a_mean_and_how_sure_it_is():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    error = standard_error(values)
    assert error == pytest.approx(torch.tensor(values).std().item() / 5**0.5)
    assert mean_interval(values) == pytest.approx((2.8, 1.96 * error))
    shifted = [value - 2.0 for value in values]
    assert paired_interval(values, shifted) == pytest.approx((2.0, 0.0))  # the cases' own spread does not count
    with pytest.raises(ValueError, match="at least two values, got 1"):
        mean_interval([1.0])
    with pytest.raises(ValueError):
        paired_interval([1.0, 2.0], [1.0])


def test_a_file_is_whole_or_what_it_was(tmp_path):
    file = tmp_path / "state.json"
    file.write_text("old")

    def write(text, stop):
        with whole_file(file) as unfinished:
            unfinished.write_text(text)
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", stop=True)
    assert file.read_text() == "old"
    write("new", stop=False)
    assert file.read_text() == "new" and [file] == list(tmp_path.iterdir())
