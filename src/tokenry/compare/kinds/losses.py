"""Compare losses of a large classifier: time and memory of loss and gradients, and how exact the gradients are."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, ClassVar

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.measure import Session, fit_exponent, interleave, peak_extra_memory

__all__ = ["Losses"]

SLUGS = {"cut": "cce", "cut, two passes": "cce", "cut, filtered": "cce", "cut, triton": "cce"}
PEERS = {"cut_cross_entropy": "cut-cross-entropy", "liger": "liger-kernel"}
MODULES = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel"}


class Losses(Comparison):
    """``tokenry compare losses``."""

    kind: ClassVar[str] = "losses"
    title: ClassVar[str] = "Losses for a large vocabulary"
    question: ClassVar[str] = "How much memory and time do a language model's loss and its gradients take?"
    baseline: ClassVar[str] = "dense"
    columns: ClassVar[list[Column]] = [
        Column(key="seconds", title="Loss + backward", unit="s", better="lower"),
        Column(key="ratio", title="Time against dense", unit="x", better="lower"),
        Column(key="memory", title="Peak extra memory", unit="MiB", better="lower", digits=4),
        Column(key="less", title="Memory saved", unit="x", better="higher"),
        Column(key="error", title="Gradient error against float64", better="lower", digits=2),
    ]
    plots: ClassVar[list[Plot]] = [
        Plot(
            title="Time against memory",
            x="memory",
            y="seconds",
            log_x=True,
            caption="Down and to the left is better. Loss and backward pass of one batch.",
        )
    ]
    settings: ClassVar[dict[str, Any]] = {
        "tokens": 2048,
        "vocab": 128_000,
        "dim": 256,
        "softcap": 0.0,
        "vocab_sweep": [8000, 16_000, 32_000, 64_000, 128_000],
    }
    demo: ClassVar[dict[str, Any]] = {"tokens": 512, "vocab": 64_000, "vocab_sweep": [8000, 16_000, 32_000]}

    def methods(self) -> list[str]:
        """Everything that can be compared."""
        return ["dense", "dense, compiled", "cut", "cut, two passes", "cut, filtered", "cut, triton", *PEERS]

    def default_methods(self, options: Options) -> list[str]:
        """What runs here; compiled code is left out of a demonstration, since compiling takes longer than all else."""
        return [name for name in self.methods() if self._missing(name, options) is None]

    def _missing(self, name: str, options: Options) -> str | None:
        """Why a method cannot run here."""
        cuda = options.device.startswith("cuda")
        if name == "dense, compiled":
            if options.effort == "demo":
                return "compiling takes too long for a demonstration; leave --quick away (effort='full')"
            if not cuda and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
                return "needs a C++ compiler"
        if name in PEERS:
            if importlib.util.find_spec(MODULES[name]) is None:
                return f"needs the package {PEERS[name]}, which is not installed"
            return None if cuda else "its kernels need CUDA"
        if name == "cut, triton":
            return None if cuda and importlib.util.find_spec("triton") else "needs CUDA >= 8.0 and triton"
        return None

    def _sizes(self, options: Options) -> tuple[int, int, int, list[int]]:
        """Tokens N, vocabulary V, dimension D, and the vocabularies of the growth."""
        n, v, d, sweep = (self.setting(options, name) for name in ("tokens", "vocab", "dim", "vocab_sweep"))
        return n, v, d, sweep

    def check(self, options: Options) -> None:
        """Refuse what cannot run, naming what is missing."""
        super().check(options)
        for name in options.methods or []:
            missing = self._missing(name, options)
            if missing:
                raise ValueError(f"losses: {name!r} cannot run on {options.device}: {missing}")
        n, v, d, sweep = self._sizes(options)
        if min(n, v, d, *sweep) < 2:
            raise ValueError(
                f"losses: tokens, vocab, dim and vocab_sweep must be at least 2; got {n}, {v}, {d}, {sweep}"
            )
        if self.setting(options, "softcap") < 0:
            raise ValueError("losses: softcap must be positive, or 0 for none")
        if options.model is not None or options.data is not None:
            raise ValueError(
                "losses: no model or data is asked for; set tokens, vocab, dim and softcap to your model's sizes"
            )

    def run(self, options: Options, session: Session) -> Outcome:
        """The table at one size, then the growth with the vocabulary."""
        names = self.chosen(options)
        n, v, d, sweep = self._sizes(options)
        table = session.step("table", lambda: self._measure(names, options, n, v, d, options.repeats, True))
        dense = table["dense"]
        rows = [
            {
                "method": name,
                **({"slug": SLUGS[name]} if name in SLUGS else {}),
                "seconds": found["seconds"],
                "seconds_spread": found["spread"],
                "ratio": found["seconds"] / dense["seconds"],
                "memory": found["memory"],
                "less": dense["memory"] / max(found["memory"], 1e-9),
                "error": found["error"],
            }
            for name, found in table.items()
        ]
        growth: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
        for size in sweep:
            part = session.step(
                f"vocabulary/{size}",
                lambda size=size: self._measure(names, options, n, size, d, min(options.repeats, 3), False),
            )
            for name, found in part.items():
                growth[name][size] = found
        sweeps = []
        for key, title in (("seconds", "time of loss and backward (s)"), ("memory", "peak extra memory (MiB)")):
            points = {
                name: [(float(size), max(cost[key], 1e-3)) for size, cost in sizes.items()]
                for name, sizes in growth.items()
            }
            sweeps.append(
                Sweep(
                    title=f"Growth of {title.split(' (')[0]} with the vocabulary",
                    x="vocabulary",
                    y=title,
                    points=points,
                    exponents={
                        name: fit_exponent([p[0] for p in pairs], [p[1] for p in pairs])
                        for name, pairs in points.items()
                        if len(pairs) >= 2
                    },
                    caption=f"{n} tokens, dimension {d}. Memory includes the gradients, which grow with the vocabulary.",
                )
            )
        return Outcome(rows=rows, sweeps=sweeps, notes=self._notes(options, rows, n, v, d))

    def _notes(self, options: Options, rows: list[dict[str, Any]], n: int, v: int, d: int) -> list[str]:
        notes = [
            f"{n} tokens, {v:,} vocabulary entries, dimension {d}, {options.dtype}; peaked inputs, as a trained model's. "
            "Memory is what loss and backward hold above the inputs, gradients included."
        ]
        if options.effort == "demo":
            notes.append(
                f"Demonstration; the full run measures {self.settings['tokens']} tokens and {self.settings['vocab']:,} entries."
            )
        notes += [
            f"{row['method']} is slower than the dense loss here ({row['ratio']:.2f}x)."
            for row in rows
            if row["ratio"] > 1.0
        ]
        absent = {name: self._missing(name, options) for name in self.methods()}
        notes += [f"Not run: {name}: {why}." for name, why in absent.items() if why and not options.methods]
        if not options.device.startswith("cuda"):
            notes.append(
                "On a CPU memory is the process's resident size, sampled: differences of a few MiB mean nothing."
            )
        return notes

    def _measure(
        self, names: list[str], options: Options, n: int, v: int, d: int, repeats: int, errors: bool
    ) -> dict[str, dict[str, float]]:
        import torch

        dtype = getattr(torch, options.dtype)
        softcap = self.setting(options, "softcap") or None
        generator = torch.Generator().manual_seed(options.seed)
        e0 = torch.randn(n, d, generator=generator)
        c0 = torch.randn(v, d, generator=generator) / d**0.5
        ranks = torch.randperm(v, generator=generator) + 1
        e0[:, 0], c0[:, 0] = 4.0, 2.0 - 0.35 * ranks.log()  # frequent entries have large logits everywhere
        y = (1 / ranks.float()).multinomial(n, replacement=True, generator=generator)
        e0, c0, y = e0.to(options.device, dtype), c0.to(options.device, dtype), y.to(options.device)
        losses = {name: _loss(name, softcap) for name in names}

        def run(name: str) -> Callable[[], tuple]:
            def call() -> tuple:
                e, c = e0.detach().requires_grad_(), c0.detach().requires_grad_()
                losses[name](e, c, y).backward()
                return e.grad, c.grad

            return call

        calls = {name: run(name) for name in names}
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        if errors:
            few = min(n, 256)  # float64 logits of all tokens would not fit everywhere
            e, c = e0[:few].double().requires_grad_(), c0.double().requires_grad_()
            truth = torch.autograd.grad(_loss("dense", softcap)(e, c, y[:few]), (e, c))
            for name in names:
                x, w = e0[:few].detach().requires_grad_(), c0.detach().requires_grad_()
                gradients = torch.autograd.grad(losses[name](x, w, y[:few]), (x, w))
                found[name]["error"] = max(
                    ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(gradients, truth, strict=True)
                )
            del e, c, truth
        times = interleave(calls, repeats=repeats, warmup=1, device=options.device)
        for name in names:
            found[name]["seconds"] = times[name].median
            found[name]["spread"] = times[name].spread
            found[name]["memory"] = max(0.01, peak_extra_memory(calls[name], device=options.device) / 2**20)
        return found


def _loss(name: str, softcap: float | None) -> Callable:
    """``loss(e, c, targets)`` of a method."""
    import torch
    from torch.nn import functional as F

    from tokenry.training import linear_cross_entropy

    def dense(e: Any, c: Any, y: Any) -> Any:
        logits = e @ c.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)

    def ours(**settings: Any) -> Callable:
        return lambda e, c, y: linear_cross_entropy(e, c, y, softcap=softcap, **settings)

    def two_passes(e: Any, c: Any, y: Any) -> Any:
        return linear_cross_entropy(e, c, y, softcap=softcap, impl="chunked", return_lse=True)[0]

    if name == "cut_cross_entropy":
        from cut_cross_entropy import linear_cross_entropy as authors  # type: ignore[import-not-found]

        return lambda e, c, y: authors(e, c, y, softcap=softcap)
    if name == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss(softcap=softcap)
        return lambda e, c, y: liger(c, e, y)
    return {
        "dense": lambda: dense,
        "dense, compiled": lambda: torch.compile(dense),
        "cut": lambda: ours(impl="chunked"),
        "cut, two passes": lambda: two_passes,
        "cut, filtered": lambda: ours(impl="chunked", filter_eps=2.0**-12),
        "cut, triton": lambda: ours(impl="triton"),
    }[name]()
