"""The machine and the package versions that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path

import psutil
from pydantic import BaseModel

__all__ = ["Machine", "describe_machine", "package_versions"]

PACKAGES = ("tokenry", "torch", "timm", "transformers", "tokenizers", "scipy", "triton")


class Machine(BaseModel):
    """What a figure was measured on."""

    system: str
    processor: str
    cores: int
    memory_gib: float
    device: str = "cpu"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: str = "cpu") -> Machine:
    """Describe this machine. ``device`` is ``"cpu"`` or a torch device such as ``"cuda"``, which is named in full."""
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        device=device,
    )


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, as installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(name)
            if module is not None:
                versions[name] = getattr(module, "__version__", "unknown")
    return versions
