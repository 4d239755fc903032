"""Golden cases: outputs of the authors' own code, stored without its weights.

A case is ``<case>.json`` (what was run; name, shape and dtype of every filled tensor of the reference's state
dict; parameter count) and ``<case>.safetensors`` (inputs ``in.*`` and outputs ``out.*``). Weights come from a
fill rule that depends on a tensor's name and shape alone, so anyone can make them again:

    z = RandomState(crc32(name)).standard_normal(shape)
    running_mean: 0.1 z     running_var: 1 + 0.2 |z|     2-D and more: z / sqrt(numel / shape[0])
    1-D and 0-D: 0.1 z if the name ends in "bias", else 1 + 0.1 z
"""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
# Cases that the running test has read, with the largest error compared so far; evidence is made from it.
USED: dict[str, float | None] = {}


def fill(name: str, shape: list[int]) -> Tensor:
    """The value of the reference tensor ``name``."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("running_mean"):
        value = 0.1 * z
    elif name.endswith("running_var"):
        value = 1 + 0.2 * np.abs(z)
    elif len(shape) >= 2:
        value = z / math.sqrt(max(1, math.prod(shape) / shape[0]))
    elif name.endswith("bias"):
        value = 0.1 * z
    else:
        value = 1 + 0.1 * z
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@dataclass
class GoldenCase:
    """One stored case.

    Attributes:
        spec: The case's JSON: ``reference``, ``build``, ``params``, ``filled`` and further facts.
    """

    slug: str
    name: str
    worst: float = field(default=0.0, init=False)

    @cached_property
    def spec(self) -> dict[str, Any]:
        USED.setdefault(f"{self.slug}/{self.name}", None)
        return json.loads((GOLDEN / self.slug / f"{self.name}.json").read_text("utf-8"))

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / self.slug / f"{self.name}.safetensors")

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Stored inputs, and those that are made again from a seed and a shape, in either of the two ways to write it."""
        found = {k.removeprefix("in."): v for k, v in self._tensors.items() if k.startswith("in.")}
        rules = {name: rule["normal"] for name, rule in self.spec.get("generated_inputs", {}).items()}
        for name, rule in self.spec.get("input_rules", {}).items():
            seed, *shape = map(int, re.findall(r"\d+", rule))
            rules[name] = seed, shape
        for name, (seed, shape) in rules.items():
            found[name] = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
        return found

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {k.removeprefix("out."): v for k, v in self._tensors.items() if k.startswith("out.")}

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's own state dict, filled by the rule, under the reference's names."""
        return {n: fill(n, shape).to(getattr(torch, dtype)) for n, (shape, dtype) in self.spec["filled"].items()}

    def compare(self, name: str, actual: Tensor, *, tolerance: float = 1e-4) -> None:
        """Assert that ``actual`` equals the stored output: max abs error <= tolerance x the output's scale.

        The scale is the largest absolute value of the stored output (at least 1e-6).
        """
        expected = self.outputs[name]
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{self.slug}/{self.name} {name}: shape {tuple(actual.shape)}, the authors' is {tuple(expected.shape)}"
        )
        actual = actual.detach().to(torch.float32).cpu()
        expected = expected.to(torch.float32)
        assert torch.isfinite(actual).all() or not torch.isfinite(expected).all(), f"{name} is not finite"
        scale = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
        error = ((actual - expected).abs().max().item() if expected.numel() else 0.0) / scale
        self.worst = max(self.worst, error)
        USED[f"{self.slug}/{self.name}"] = self.worst
        assert error <= tolerance, (
            f"{self.slug}/{self.name} {name}: error {error:.2e} of scale {scale:.3g} > {tolerance:g}"
        )

    def compare_sample(self, name: str, actual: Tensor, *, places: int = 256, tolerance: float = 1e-4) -> None:
        """``compare`` for an output too large to be stored whole.

        Args:
            name: ``<name>.slice`` holds evenly spaced values, ``<name>.stat`` mean, deviation and largest absolute value.
            actual: All of it, in the stored layout.
            places: How many values.
            tolerance: Of the values.
        """
        flat = actual.reshape(-1)
        self.compare(f"{name}.slice", flat[:: max(1, flat.numel() // places)][:places], tolerance=tolerance)
        self.compare(f"{name}.stat", torch.stack([flat.mean(), flat.std(), flat.abs().max()]))


def golden_cases(slug: str) -> list[str]:
    """Names of the stored cases of a method."""
    found = sorted(path.stem for path in (GOLDEN / slug).glob("*.json"))
    assert found, f"no golden cases in {GOLDEN / slug}"
    return found
