"""Counts that do not depend on the machine: passes, multiply-accumulates, and bytes of living tensors at their peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Passes", "count_macs", "count_passes", "peak_activations"]


@dataclass
class Passes:
    """How often a module was called; the field is ``number``."""

    number: int = 0


@contextmanager
def count_passes(model: nn.Module) -> Generator[Passes]:
    """Count the calls of a module, for methods that count nothing themselves.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 4)
        >>> with count_passes(layer) as passes:
        ...     _ = layer(torch.zeros(3, 8)), layer(torch.zeros(1, 8))
        >>> passes.number
        2
    """
    passes = Passes()

    def count(*_: object) -> None:
        passes.number += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def count_macs(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention in one forward pass.

    A complex product counts as four. Fourier transforms, norms and activations are not counted. The model is run once in its
    present mode, without gradients.

    Args:
        model: Any module.
        *inputs: What it is called with.

    Example:
        >>> import torch
        >>> count_macs(torch.nn.Linear(8, 4), torch.zeros(3, 8))
        96
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def product(x: Any, y: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(x.shape) * y.shape[-1] * (4 if x.is_complex() else 1)

    def added(bias: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> int:
        return product(x, y)

    for count in (product, added):
        count._get_raw = True  # type: ignore[attr-defined]
    aten = torch.ops.aten
    mapping = {aten.mm: product, aten.bmm: product, aten.addmm: added, aten.baddbmm: added}
    # the counter does not know the CPU's fused attention: have it written out as two products
    whole = sdpa_kernel(SDPBackend.MATH)
    # the counter's hooks want a graph behind every tensor that asks for a gradient, parameters handed to a module included
    asking = [p for p in getattr(model, "parameters", list)() if p.requires_grad]  # a plain function has none
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with whole, FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            model(*inputs)
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def peak_activations(call: Callable[[], object]) -> int:
    """Bytes of the tensors that ``call`` makes and holds at the same time, at their peak.

    Counted operation by operation, so it is exact and the same on every machine, where the resident size of a process
    hides what the allocator keeps. Memory that one operation uses inside itself is not seen, nor are weights and inputs.

    Args:
        call: Run once, eagerly.

    Example:
        >>> import torch
        >>> x = torch.zeros(256)
        >>> peak_activations(lambda: (x + 1).mul_(2).sum())  # one copy of x and one number
        1028
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Living(TorchDispatchMode):
        peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.held: dict[int, tuple[StorageWeakRef, int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = func(*args, **kwargs)
            self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    if storage._cdata not in given and storage._cdata not in self.held:
                        self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.peak = max(self.peak, sum(size for _, size in self.held.values()))
            return out

    with Living() as living:
        call()
    return living.peak
