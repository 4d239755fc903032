"""Shared by all tests: poisoned memory, one thread per worker, Hypothesis without deadlines, evidence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import settings

import golden_case

settings.register_profile("dev", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("dev")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two workers, and the processes that tests start, on two cores: threads that wait for each other cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels on the CPU; read when triton is first imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", type=Path, help="append outcomes of golden and property tests to this JSONL file")
    parser.addoption("--network", action="store_true", help="also run tests that need the network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none on this machine"))
    if not config.getoption("--network"):
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="needs the network; run with --network"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run side by side, one thread each: tiny tensors only lose by more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty`` holds NaN, so that a read of what was never written shows."""
    import torch
    from torch.utils import _device

    _device._device_constructors()  # remembers the real functions, which torch.device("meta") intercepts by identity
    real_empty, real_empty_like, real_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    def compiling() -> bool:
        return torch.compiler.is_compiling()

    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: real_empty(*a, **k) if compiling() else poison(real_empty(*a, **k))
    )
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda *a, **k: real_empty_like(*a, **k) if compiling() else poison(real_empty_like(*a, **k)),
    )
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *a, **k: real_new_empty(self, *a, **k) if compiling() else poison(real_new_empty(self, *a, **k)),
    )


@pytest.fixture(autouse=True)
def _own_evidence(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never write into the user's evidence."""
    monkeypatch.setenv("TOKENRY_EVIDENCE", str(tmp_path_factory.getbasetemp() / "evidence.sqlite"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    golden_case.USED.clear()  # before all fixtures: those shared by a module read cases too


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    path = item.config.getoption("--evidence")
    if path is None or not (report.when == "call" or (report.when == "setup" and report.outcome == "failed")):
        return
    for marker in item.iter_markers("method"):
        line = {
            "slug": marker.args[0],
            "check": "golden" if item.get_closest_marker("golden") else "properties",
            "test": item.nodeid,
            "outcome": report.outcome,
            "seconds": round(call.duration, 3),
            "time": time.time(),
            "cases": dict(golden_case.USED) if report.when == "call" else {},
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
