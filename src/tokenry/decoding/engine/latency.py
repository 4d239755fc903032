"""How long a verification pass takes on this machine, by the number of nodes.

A tree pays when the tokens it wins outweigh what its pass costs more than a pass over one token. That cost is a
property of the machine and the model: it is measured once, in fractions of a second, and kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch
from transformers import DynamicCache

from tokenry.decoding.engine.draft_cache import DraftCache
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.layers.cache_argument import CACHE
from tokenry.measure.machine import describe_machine
from tokenry.measure.whole_file import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PassLatency", "pass_latency"]

SIZES = (1, 2, 4, 8, 16, 32, 64, 96)
CONTEXT = 128


@dataclass(frozen=True)
class PassLatency:
    """Seconds of a pass by the number of its nodes, root included.

    Example:
        >>> PassLatency((1, 4), (0.002, 0.005)).at(2)
        0.003
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, size: int) -> float:
        """Seconds of a pass over ``size`` nodes: linear between measured sizes and beyond the largest."""
        if size in self.sizes:
            return self.seconds[self.sizes.index(size)]
        right = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        x0, x1 = self.sizes[right - 1], self.sizes[right]
        y0, y1 = self.seconds[right - 1], self.seconds[right]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)

    def ratio(self, size: int) -> float:
        """Cost of a pass over ``size`` nodes in passes over one."""
        return self.at(size) / self.at(1)


def cache_folder() -> Path:
    """Where curves are kept; ``TOKENRY_CACHE`` names another folder."""
    return Path(os.environ.get("TOKENRY_CACHE") or platformdirs.user_cache_dir("tokenry")) / "pass-latency"


def _fingerprint(model: PreTrainedModel, batch_size: int) -> str:
    """Everything that the curve depends on."""
    machine = describe_machine("cuda" if model.device.type == "cuda" else "cpu")
    config = {
        k: v for k, v in model.config.to_dict().items() if isinstance(v, (int, float, str)) and k != "_name_or_path"
    }
    facts = [
        machine.model_dump(),
        torch.__version__,
        torch.get_num_threads(),
        str(model.dtype),
        model.config._attn_implementation,
        sum(p.numel() for p in model.parameters()),
        config,
        batch_size,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def pass_latency(model: PreTrainedModel, batch_size: int = 1, *, refresh: bool = False) -> PassLatency:
    """The latency curve of a model on this machine, measured on first use and then read from disk.

    Args:
        model: Causal language model.
        batch_size: Rows of a pass.
        refresh: Measure again.

    Returns:
        Seconds for 1 to 96 nodes behind 128 cached tokens (fewer, if the model's context is shorter).
    """
    path = cache_folder() / f"{_fingerprint(model, batch_size)}.json"
    if not refresh and path.exists():
        try:
            stored = json.loads(path.read_text("utf-8"))
            return PassLatency(tuple(stored["sizes"]), tuple(stored["seconds"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            pass  # a damaged file is measured again
    curve = measure_passes(model, batch_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps({"sizes": curve.sizes, "seconds": curve.seconds}), "utf-8")
    except OSError:
        pass  # a read-only home costs a measurement per process, nothing else
    return curve


@torch.no_grad()
def measure_passes(model: PreTrainedModel, batch_size: int = 1, repeats: int = 5) -> PassLatency:
    """Measure the curve: passes of all sizes take turns, the fastest of each counts, the curve never falls."""
    device = model.device
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    context = max(1, min(CONTEXT, limit // 4))
    sizes = tuple(s for s in SIZES if context + s <= limit) or (1,)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch_size, context + max(sizes)), generator=generator).to(device)
    library = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :context], **{CACHE: library}, use_cache=True)
    cache = DraftCache(library)
    cache.adopt(context + max(sizes))
    trees = [DraftTree([-1] + [0] * (size - 1), device=device) for size in sizes]
    best = [float("inf")] * len(sizes)
    for turn in range(repeats + 1):
        for i, (size, tree) in enumerate(zip(sizes, trees, strict=True)):
            mask = tree.mask(context, model.dtype) if size > 1 else None
            began = time.perf_counter()
            cache.prepare(size)
            logits = model(
                input_ids=tokens[:, context : context + size],
                attention_mask=mask,
                position_ids=(context + tree.depth).expand(batch_size, -1),
                **{CACHE: library},
                use_cache=True,
            ).logits
            logits[0, -1, :1].tolist()  # waits for the device
            if turn:  # the first turn warms up
                best[i] = min(best[i], time.perf_counter() - began)
    for i in range(1, len(best)):
        best[i] = max(best[i], best[i - 1])
    return PassLatency(sizes, tuple(best)) if len(sizes) > 1 else PassLatency((1, 2), (best[0], 2 * best[0]))
