"""Compare image backbones: speed at several sizes, memory, cost, and a linear probe of their features."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenry.catalog.entries import cards
from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep, skipped_images
from tokenry.measure.session import Session

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Backbones"]

PEERS = ["mobilevitv2_050", "mobilevit_xxs", "efficientvit_b0", "resnet18"]
OURS = [
    "affnet_et", "affnet_t", "affnet", "poolformer_s12", "identityformer_s12", "cas_vit_xs", "tokenry_efficientvim_m1",
    "uniformer_xxs", "t2t_vit_7", "dualtoken_vit_tiny", "hrvmamba_nano", "transnext_micro",
]  # fmt: skip
DEMO_METHODS = [
    "mobilevitv2_050", "affnet_et", "cas_vit_xs", "tokenry_efficientvim_m1", "mobilevit_xxs", "efficientvit_b0", "resnet18",
]  # fmt: skip


def _registered() -> Any:
    """Timm, with Tokenry's models in it."""
    import timm

    import tokenry.vision  # noqa: F401

    return timm


def _image_folder(folder: Path) -> dict[str, list[Path]]:
    """Class name to its images: ``folder/<class>/<image>``."""
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {str(folder)!r}; give a folder with one folder of images per class")
    from tokenry.vision.labelled_images import class_folders

    found = class_folders(folder)
    small = [name for name, paths in found.items() if len(paths) < 2]
    if len(found) < 2 or small:
        raise ValueError(
            f"data: {str(folder)!r} must hold at least two folders (classes) with at least two images each; found "
            + (", ".join(f"{name}: {len(paths)}" for name, paths in found.items()) or "no folder with images")
        )
    return found


def _local_model(model: str) -> str:
    """The name under which timm loads the user's own model with its weights."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").exists():
            raise ValueError(f"model: {model!r} holds no config.json; write one with timm.models.save_for_hf")
        return f"local-dir:{model}"
    if not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not _registered().is_model(model):
        raise ValueError(
            f"model: {model!r} is neither a folder, nor a timm name, nor a hub id; write hub ids as 'hf-hub:owner/name'"
        )
    return model


class Backbones(Comparison):
    """Any timm models beside Tokenry's own."""

    kind = "backbones"
    title = "Image backbones"
    question = "Which backbone gives the most for the time, on this machine and on these images?"
    baseline = "mobilevitv2_050"
    columns: ClassVar = [
        Column(key="params", title="Parameters", unit="M", better="lower"),
        Column(key="macs", title="Multiply-accumulates", unit="G", better="lower"),
        Column(key="rate_1", title="Speed, batch 1", unit="img/s", better="higher"),
        Column(key="rate_n", title="Speed, large batch", unit="img/s", better="higher"),
        Column(key="ratio", title="Speed against the baseline, large batch", unit="x", better="higher"),
        Column(key="memory", title="Peak of activations, large batch", unit="MiB", better="lower"),
        Column(key="exponent", title="Growth with pixels, N^", better="lower"),
        Column(key="accuracy", title="Linear probe", unit="%", better="higher"),
    ]
    plots: ClassVar = [
        Plot(
            title="Speed and features", y="accuracy", x="rate_n", log_x=True, caption="Up and to the right is better."
        ),
        Plot(title="Images per second, large batch", y="rate_n"),
    ]
    settings: ClassVar = {
        "size": 256,
        "batch": 32,
        "sizes": [128, 192, 256, 384],
        "channels_last": 0,
        "compile": 0,
        "pretrained": 0,
        "probe": 1,
        "probe_size": 64,
        "probe_images": 2000,
    }
    demo: ClassVar = {"size": 160, "batch": 4, "sizes": [96, 160, 256], "probe_images": 600}

    def methods(self) -> list[str]:
        """Tokenry's backbones and a few light peers; any other timm name is taken as well."""
        ours = [name for found in cards().values() for name in found.models]
        return list(dict.fromkeys([self.baseline, *PEERS, *OURS, *ours]))

    def default_methods(self, options: Options) -> list[str]:
        """A handful of light models."""
        return DEMO_METHODS if options.effort == "demo" else [*PEERS, *OURS]

    def chosen(self, options: Options) -> list[str]:
        """The named models, any of timm's, and the user's own."""
        names = options.methods or self.default_methods(options)
        timm = _registered()
        for name in names:
            if not timm.is_model(name):
                from rapidfuzz import process

                near = [found for found, _, _ in process.extract(name, timm.list_models(), limit=3)]
                raise ValueError(f"backbones: timm knows no model {name!r}; did you mean {', '.join(near)}?")
        own = [_local_model(options.model)] if options.model else []
        return list(dict.fromkeys([self.baseline, *own, *names]))

    def check(self, options: Options) -> None:
        """Refuse unknown models, sizes that are no sizes, and folders without classes."""
        super().check(options)
        for name in ("size", "batch", "probe_size", "probe_images"):
            if self.setting(options, name) < 1:
                raise ValueError(f"backbones: setting {name} must be at least 1, got {self.setting(options, name)}")
        if min(self.setting(options, "sizes")) < 1:
            raise ValueError(f"backbones: sizes must be positive, got {self.setting(options, 'sizes')}")
        if options.data is not None:
            _image_folder(Path(options.data))

    def run(self, options: Options, session: Session) -> Outcome:
        """Count, time at every size in turn, measure memory, probe."""
        names = self.chosen(options)
        bench = _Bench(self, options, names)
        size, batch = self.setting(options, "size"), self.setting(options, "batch")
        sizes = sorted({*self.setting(options, "sizes"), size})

        rows: dict[str, dict[str, Any]] = {}
        for name in names:
            rows[name] = {"method": name, **session.step(f"count/{name}", lambda name=name: bench.count(name, size))}
            slug = next((found.slug for found in cards().values() if name in found.models), None)
            rows[name] |= {"slug": slug} if slug else {}
        timed = {s: session.step(f"time/1x{s}", lambda s=s: bench.times(1, s)) for s in sizes}
        large = session.step(f"time/{batch}x{size}", lambda: bench.times(batch, size))
        for name in names:
            rows[name] |= _rates(timed[size].get(name), "rate_1", 1) | _rates(large.get(name), "rate_n", batch)
            if "median" in large.get(name, {}):
                key = f"memory/{name}/{batch}x{size}"
                rows[name]["memory"] = session.step(key, lambda name=name: bench.memory(name, batch, size))
            base = large[self.baseline].get("median")
            own = large[name].get("median")
            rows[name]["ratio"] = base / own if base and own else None
            if self.setting(options, "probe"):
                rows[name] |= session.step(f"probe/{name}", lambda name=name: bench.probe(name))
        sweep = self._sweep(names, timed)
        for name, exponent in sweep.exponents.items():
            rows[name]["exponent"] = exponent
        pixels = session.step("probe/pixels", bench.probe_pixels) if self.setting(options, "probe") else None
        notes = self._notes(options, rows, timed | {f"{batch}x{size}": large}, pixels)
        return Outcome(rows=list(rows.values()), sweeps=[sweep], notes=notes)

    def _sweep(self, names: list[str], timed: dict[int, dict[str, Any]]) -> Sweep:
        from tokenry.measure import fit_exponent

        points = {
            name: [
                (float(s * s), 1000 * found[name]["median"]) for s, found in timed.items() if "median" in found[name]
            ]
            for name in names
        }
        exponents = {name: fit_exponent(*zip(*some, strict=True)) for name, some in points.items() if len(some) > 1}
        return Sweep(
            title="Time of one image over its size",
            x="pixels",
            y="ms",
            points=points,
            exponents=exponents,
            caption="Batch 1. An exponent of 1 is linear in the number of pixels; at small sizes fixed costs hide the growth.",
        )

    def _notes(
        self, options: Options, rows: dict[str, dict[str, Any]], timed: dict[Any, Any], pixels: Any
    ) -> list[str]:
        size, batch = self.setting(options, "size"), self.setting(options, "batch")
        forms = {"channels_last": "channels last in memory", "compile": "compiled"}
        asked = [f", {form}" for name, form in forms.items() if self.setting(options, name)]
        notes = [
            f"Speed and memory at {size}x{size}; the large batch has {batch} images{''.join(asked)}. Fourier transforms are "
            "not counted as multiply-accumulates."
        ]
        for where, found in timed.items():
            for name, result in found.items():
                if "refused" in result:
                    notes.append(f"{name} does not run at {where}: {result['refused']}")
        for name, row in rows.items():
            if refused := row.pop("probe_refused", None):
                notes.append(f"{name} has no probe: {refused}")
        if pixels:
            weights = (
                "weights as loaded"
                if self.setting(options, "pretrained")
                else f"random weights{' except ' + options.model if options.model else ''}: the probe measures random features, "
                "how much the architecture alone keeps apart, not how well a trained network would do"
            )
            notes.append(
                f"Linear probe: ridge classifier on frozen features, {pixels['train']} images to fit, {pixels['test']} to "
                f"test, {pixels['classes']} classes (chance {100 / pixels['classes']:.0f} %), {weights}. The same probe on "
                f"the bare pixels: {pixels['accuracy']:.1f} %."
            )
            if pixels["skipped"]:
                notes.append(skipped_images(pixels["skipped"]))
        slower = [f"{n} ({r['ratio']:.2f}x)" for n, r in rows.items() if "slug" in r and r["ratio"] and r["ratio"] < 1]
        if slower:
            notes.append(f"Slower than {self.baseline} here: {', '.join(slower)}.")
        if options.effort == "demo":
            notes.append("Demonstration: few models, sizes and images; the full run measures more.")
        return notes


def _rates(found: dict[str, float] | None, key: str, batch: int) -> dict[str, float | None]:
    """Images per second with half the way between the quartiles, from the seconds of a batch."""
    if not found or "median" not in found:
        return {key: None}
    rate = batch / found["median"]
    return {key: rate, f"{key}_spread": (batch / found["low"] - batch / found["high"]) / 2}


class _Bench:
    """Models and images of one run, made when first needed, so that a finished run loads nothing."""

    def __init__(self, kind: Backbones, options: Options, names: list[str]) -> None:
        self.options = options
        self.names = names
        self.setting: Callable[[str], Any] = lambda name: kind.setting(options, name)
        self.own = _local_model(options.model) if options.model else None
        self.model = cache(self._model)
        self.fast = cache(self._fast)
        self.images = cache(self._images)
        self.skipped: list[str] = []

    def _model(self, name: str) -> Any:
        import torch

        timm = _registered()
        torch.manual_seed(self.options.seed)
        pretrained = name == self.own or (bool(self.setting("pretrained")) and timm.is_model_pretrained(name))
        model = timm.create_model(name, pretrained=pretrained).eval()
        model = model.to(self.options.device, getattr(torch, self.options.dtype))
        return model.to(memory_format=torch.channels_last) if self.setting("channels_last") else model

    def _fast(self, name: str) -> Callable[..., Any]:
        import torch

        # anew for every size: code for changing sizes takes minutes to make, and is not what a user of one size runs
        return torch.compile(self.model(name), dynamic=False) if self.setting("compile") else self.model(name)

    def _input(self, name: str, batch: int, size: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.options.seed)
        channels = getattr(self.model(name), "in_chans", 3)
        x = torch.randn(batch, channels, size, size, generator=generator)
        x = x.to(self.options.device, getattr(torch, self.options.dtype))
        return x.contiguous(memory_format=torch.channels_last) if self.setting("channels_last") else x

    def count(self, name: str, size: int) -> dict[str, float | None]:
        """Parameters in millions, multiply-accumulates in billions (None where the model refuses the size)."""
        from tokenry.measure import count_macs

        model = self.model(name)
        try:
            macs = count_macs(model, self._input(name, 1, size)) / 1e9
        except Exception as error:
            logging.getLogger(__name__).info("%s refuses %d: %s", name, size, error)
            macs = None
        return {"params": sum(p.numel() for p in model.parameters()) / 1e6, "macs": macs}

    def times(self, batch: int, size: int) -> dict[str, dict[str, Any]]:
        """Seconds of a forward pass of every model, in turn; or why one refuses."""
        import torch

        from tokenry.measure import interleave

        results: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], object]] = {}
        with torch.inference_mode():
            for name in self.names:
                x, call = self._input(name, batch, size), self.fast(name)
                try:
                    call(x)
                except Exception as error:  # whatever a model says of a size that it cannot take
                    results[name] = {"refused": _first_line(error)}
                    continue
                calls[name] = lambda call=call, x=x: call(x)
            if calls:
                repeats = min(3, self.options.repeats) if self.options.effort == "demo" else self.options.repeats
                timings = interleave(calls, repeats=repeats, device=self.options.device)
                results |= {n: {"median": t.median, "low": t.low, "high": t.high} for n, t in timings.items()}
        return results

    def memory(self, name: str, batch: int, size: int) -> float:
        """MiB that one forward pass holds at its peak, beside weights and input."""
        import torch

        from tokenry.measure import peak_activations, peak_extra_memory

        x, model = self._input(name, batch, size), self.model(name)
        with torch.inference_mode():
            if self.options.device.startswith("cuda"):
                return peak_extra_memory(lambda: model(x), device=self.options.device) / 2**20
            return peak_activations(lambda: model(x)) / 2**20

    def _images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Images (N, S, S, 3) uint8 and labels to fit, the same to test, number of classes."""
        import numpy as np
        from PIL import Image

        size, most = self.setting("probe_size"), self.setting("probe_images")
        if self.options.data is None:
            from tokenry.assets import cifar10_sample

            (x, y), (test_x, test_y) = cifar10_sample("train"), cifar10_sample("test")
            fit = min(len(x), max(1, most * 4 // 5))
            test = min(len(test_x), max(1, most - most * 4 // 5))
            x, y, test_x, test_y = x[:fit], y[:fit], test_x[:test], test_y[:test]
            x, test_x = (
                np.stack(
                    [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BILINEAR)) for one in some]
                )
                for some in (x, test_x)
            )
            return x, y, test_x, test_y, 10
        from tokenry.vision.labelled_images import decode_images

        classes = _image_folder(Path(self.options.data))
        rng = np.random.default_rng(self.options.seed)
        per_class = max(2, most // len(classes))
        parts: dict[str, list[tuple[Path, int]]] = {"fit": [], "test": []}
        for label, paths in enumerate(classes.values()):
            picked = [paths[i] for i in rng.permutation(len(paths))[:per_class]]
            held = max(1, len(picked) // 5)
            parts["test"] += [(path, label) for path in picked[:held]]
            parts["fit"] += [(path, label) for path in picked[held:]]
        (x, y), (test_x, test_y) = (decode_images(part, size, self.skipped) for part in parts.values())
        return x, y, test_x, test_y, len(classes)

    def _features(self, name: str, images: np.ndarray) -> np.ndarray:
        import torch

        model = self.model(name)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        batches = []
        with torch.inference_mode():
            for chunk in torch.from_numpy(images).split(100):
                x = ((chunk.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(
                    self.options.device, getattr(torch, self.options.dtype)
                )
                features = model.forward_head(model.forward_features(x), pre_logits=True)
                batches.append(features.flatten(1).float().cpu())
        return torch.cat(batches).double().numpy()

    def probe(self, name: str) -> dict[str, Any]:
        """Test accuracy in percent of a linear classifier on the model's frozen features."""
        x, y, test_x, test_y, _ = self.images()
        try:
            features, test_features = self._features(name, x), self._features(name, test_x)
        except Exception as error:
            return {"accuracy": None, "probe_refused": _first_line(error)}
        return {"accuracy": _linear_probe(features, y, test_features, test_y)}

    def probe_pixels(self) -> dict[str, Any]:
        """The same probe on the pixels themselves, about 16 x 16 of them."""
        x, y, test_x, test_y, classes = self.images()
        step = max(1, x.shape[1] // 16)
        pixels, test_pixels = (some[:, ::step, ::step].reshape(len(some), -1).astype(float) for some in (x, test_x))
        accuracy = _linear_probe(pixels, y, test_pixels, test_y)
        return {
            "accuracy": accuracy,
            "train": len(y),
            "test": len(test_y),
            "classes": classes,
            "skipped": self.skipped,
        }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _linear_probe(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Accuracy in percent of a ridge classifier on standardised features, its strength chosen on ``x`` alone."""
    import numpy as np
    from sklearn.linear_model import RidgeClassifierCV

    mean, std = x.mean(0), x.std(0)
    keep = std > 1e-12 * max(std.max(), 1e-300)
    x, test_x = ((some - mean)[:, keep] / std[keep] for some in (x, test_x))
    probe = RidgeClassifierCV(alphas=np.logspace(0, 5, 6)).fit(x, y)
    return 100.0 * float((probe.predict(test_x) == test_y).mean())
