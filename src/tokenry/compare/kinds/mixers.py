"""Compare token mixers: each one trained in the same small MetaFormer, and its cost over the resolution."""

from __future__ import annotations

import statistics
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from tokenry.catalog.entries import cards
from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep, skipped_images
from tokenry.measure.session import Session

if TYPE_CHECKING:
    from torch import nn

    from tokenry.vision.image_training import Images

__all__ = ["Mixers"]

PATCH = 4  # pixels per token side in the first stage
RIVAL = "attention"  # where the others become cheaper is told against it
LARGEST_FIXED = 4096  # tokens; weights of mixers with a fixed number of tokens grow with its square
DEMO_METHODS = [
    "pool", "sep_conv", "attention", "aff", "cat", "mix_shift", "hsm_ssd", "super_token", "aggregated_attention",
    "dual_attention",
]  # fmt: skip


class Mixers(Comparison):
    """Every registered mixer in one skeleton."""

    kind = "mixers"
    title = "Token mixers"
    question = "In one small MetaFormer, on these images: which mixer learns most, and what does it cost?"
    baseline = "identity"
    columns: ClassVar = [
        Column(key="accuracy", title="Test accuracy", unit="%", better="higher"),
        Column(key="gain", title="Over the baseline", unit="points", better="higher", digits=2),
        Column(key="params", title="Parameters", unit="k", better="lower"),
        Column(key="frozen", title="of them frozen", unit="k"),
        Column(key="macs", title="Multiply-accumulates per image", unit="M", better="lower"),
        Column(key="rate", title="Network's speed", unit="img/s", better="higher"),
        Column(key="ratio", title="Speed against the baseline", unit="x", better="higher"),
        Column(key="exponent", title="Mixer's growth with tokens, N^", better="lower", digits=2),
        Column(key="memory", title="Mixer's peak at the largest size", unit="MiB", better="lower"),
    ]
    plots: ClassVar = [
        Plot(title="Accuracy and speed", y="accuracy", x="rate", log_x=True, caption="Up and to the right is better."),
        Plot(title="Points over no mixing at all", y="gain"),
    ]
    settings: ClassVar = {
        "seeds": 3,
        "epochs": 10,
        "train_images": 10_000,
        "dims": [32, 64],
        "depths": [2, 4],
        "side": 32,
        "batch": 64,
        "lr": 2e-3,
        "sides": [32, 64, 128, 256, 512],
        "sweep_dim": 64,
    }
    demo: ClassVar = {
        "seeds": 1, "epochs": 8, "train_images": 1600, "dims": [16, 32], "depths": [1, 2], "sides": [32, 64, 128, 256],
    }  # fmt: skip

    def methods(self) -> list[str]:
        """All registered mixers, the identity first."""
        from tokenry.mixers import list_mixers

        return [self.baseline, *(name for name in list_mixers() if name != self.baseline)]

    def default_methods(self, options: Options) -> list[str]:
        """All; in a demonstration one of each sort."""
        known = self.methods()
        return [name for name in DEMO_METHODS if name in known] if options.effort == "demo" else known

    def check(self, options: Options) -> None:
        """Refuse unknown mixers, sizes that leave no tokens, data without labels."""
        super().check(options)
        if options.model is not None:
            raise ValueError("mixers: no model is asked for; the skeleton is set by dims, depths and side")
        for name in ("seeds", "epochs", "train_images", "batch", "sweep_dim"):
            if self.setting(options, name) < 1:
                raise ValueError(f"mixers: setting {name} must be at least 1, got {self.setting(options, name)}")
        dims, depths = self.setting(options, "dims"), self.setting(options, "depths")
        if len(dims) != len(depths) or min(*dims, *depths) < 1:
            raise ValueError(f"mixers: dims and depths need one positive entry per stage, got {dims} and {depths}")
        smallest = PATCH * 2 ** (len(dims) - 1)
        if min(self.setting(options, "side"), *self.setting(options, "sides")) < smallest:
            raise ValueError(f"mixers: side and sides must be at least {smallest} pixels with {len(dims)} stages")
        if len(self.setting(options, "sides")) < 2:
            raise ValueError("mixers: sides needs at least two sizes to show growth")
        if options.data is not None:
            from tokenry.vision.labelled_images import check_labelled_images

            check_labelled_images(options.data)

    def run(self, options: Options, session: Session) -> Outcome:
        """Count, train with every seed, time side by side, sweep the resolution."""
        bench = _Bench(self, options)
        names = self.chosen(options)
        seeds = [options.seed + i for i in range(self.setting(options, "seeds"))]
        rows: dict[str, dict[str, Any]] = {}
        images = "larger/" if bench.source != options.data else ""  # steps with other images are other steps
        facts = session.step(f"{images}data", bench.facts)
        for name in names:
            slug = next((found.slug for found in cards().values() if name in found.mixers), None)
            rows[name] = {"method": name, **({"slug": slug} if slug else {})}
            rows[name] |= session.step(f"count/{name}", lambda name=name: bench.count(name, facts["classes"]))
        trained: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for seed in seeds:
            for name in names:
                result = session.step(f"{images}train/{name}/seed{seed}", lambda n=name, s=seed: bench.train(n, s))
                trained[name].append(result)
        speed = session.step("speed", lambda: bench.speed(names, facts["classes"]))
        sides = self.setting(options, "sides")
        times = {side: session.step(f"sweep/{side}", lambda side=side: bench.sweep(names, side)) for side in sides}
        sweep = self._sweep(names, times)
        for name in names:
            accuracies = [result["accuracy"] for result in trained[name]]
            gains = [a["accuracy"] - b["accuracy"] for a, b in zip(trained[name], trained[self.baseline], strict=True)]
            rows[name] |= {
                "accuracy": statistics.mean(accuracies),
                "gain": statistics.mean(gains),
                "train_seconds": statistics.mean(result["seconds"] for result in trained[name]),
                **speed[name],
                "ratio": speed[name]["rate"] / speed[self.baseline]["rate"],
                "exponent": sweep.exponents.get(name),
                "memory": session.step(f"memory/{name}", lambda name=name: bench.memory(name, max(sides))),
            }
            if len(seeds) > 1:
                rows[name] |= {"accuracy_spread": statistics.stdev(accuracies), "gain_spread": statistics.stdev(gains)}
        return Outcome(
            rows=list(rows.values()), sweeps=[sweep], notes=[*self._notes(options, rows, facts), *self._growth(sweep)]
        )

    def _sweep(self, names: list[str], times: dict[int, dict[str, float]]) -> Sweep:
        from tokenry.measure import fit_exponent

        points = {
            name: [
                (float((side // PATCH) ** 2), 1000 * found[name])
                for side, found in sorted(times.items())
                if name in found
            ]
            for name in names
        }
        # handing a tensor on takes no time that could grow
        exponents = {
            n: fit_exponent(*zip(*some, strict=True))
            for n, some in points.items()
            if n != self.baseline and len(some) > 1
        }
        return Sweep(
            title="Time of one mixer over the resolution",
            x="tokens",
            y="ms",
            points=points,
            exponents=exponents,
            caption=f"One image, one mixer; {min(times)} to {max(times)} pixels a side, {PATCH} pixels per token. 1 is linear "
            "in the number of tokens, 2 quadratic.",
        )

    def _growth(self, sweep: Sweep) -> list[str]:
        """Which mixers are linear, which quadratic, and from where on they cost less than attention."""
        from tokenry.measure import crossing

        kinds: dict[str, list[str]] = {"linear": [], "between": [], "quadratic": []}
        for name, exponent in sorted(sweep.exponents.items(), key=lambda pair: pair[1]):
            kind = "linear" if exponent < 1.25 else "quadratic" if exponent > 1.75 else "between"
            kinds[kind].append(f"{name} ({exponent:.2f})")
        told = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        notes = [f"Growth with the number of tokens, by the measured exponent. {'; '.join(told)}."] if told else []
        if RIVAL not in sweep.points:
            return notes
        theirs = dict(sweep.points[RIVAL])
        cheaper = []
        for name in sweep.exponents:
            shared = [(x, y) for x, y in sweep.points[name] if x in theirs]
            if name != RIVAL and len(shared) > 1:
                sizes, costs = zip(*shared, strict=True)
                size = crossing(sizes, costs, [theirs[x] for x in sizes])
                cheaper.append((size or float("inf"), name))
        early = [f"{name} {size:.0f}" for size, name in sorted(cheaper) if size < float("inf")]
        never = [name for size, name in sorted(cheaper) if size == float("inf")]
        if early:
            notes.append(f"Cheaper than {RIVAL} for good from so many tokens on: {', '.join(early)}.")
        if never:
            notes.append(f"Not cheaper than {RIVAL} at any size measured: {', '.join(never)}.")
        return notes

    def _notes(self, options: Options, rows: dict[str, dict[str, Any]], facts: dict[str, Any]) -> list[str]:
        seeds = self.setting(options, "seeds")
        notes = [
            f"{facts['train']} images to train, {facts['test']} to test, {facts['classes']} classes (chance "
            f"{100 / facts['classes']:.0f} %), {self.setting(options, 'epochs')} epochs, {seeds} seed(s); stages of "
            f"{self.setting(options, 'dims')} channels and {self.setting(options, 'depths')} blocks. The same data, order, "
            "steps and rates for all; nothing is tuned for any of them.",
            "Mixers with a fixed number of tokens are made anew for every size; their weights grow with its square, so they are "
            f"measured up to {LARGEST_FIXED} tokens alone.",
        ]
        if facts["skipped"]:
            notes.append(skipped_images(facts["skipped"]))
        noise = 100 * (0.25 / facts["test"]) ** 0.5
        if seeds == 1:
            notes.append(
                f"One seed: differences under about {2 * noise:.0f} points are within the noise of the test images."
            )
        worse = [f"{n} ({r['gain']:+.1f})" for n, r in rows.items() if n != self.baseline and r["gain"] <= 0]
        if worse:
            notes.append(f"No better here than not mixing at all: {', '.join(worse)}.")
        if options.effort == "demo":
            notes.append("Demonstration: a very small network, briefly trained; the full run measures more.")
        return notes


class _Bench:
    """Data and networks of one run, made when first needed, so that a finished run loads nothing."""

    def __init__(self, kind: Mixers, options: Options) -> None:
        self.options = options
        self.setting = lambda name: kind.setting(options, name)
        self.images = cache(self._images)
        self.skipped: list[str] = []

    @property
    def source(self) -> str | None:
        """The user's data; without, and in a full run, the larger set where it is at hand; None: the embedded sample."""
        from tokenry.assets import external

        larger = external("cifar10") if self.options.data is None and self.options.effort == "full" else None
        return str(larger) if larger else self.options.data

    def _images(self) -> Images:
        from tokenry.assets import cifar10_sample
        from tokenry.vision.image_training import Images
        from tokenry.vision.labelled_images import read_labelled_images

        side, most, source = self.setting("side"), self.setting("train_images"), self.source
        if source is None and side == 32:
            train, test = cifar10_sample("train"), cifar10_sample("test")
        elif source is None:
            raise ValueError(f"mixers: the embedded images have 32 pixels a side; side={side} needs data of your own")
        else:
            train, test = read_labelled_images(source, side=side, seed=self.options.seed, skipped=self.skipped)
        return Images.of((train[0][:most], train[1][:most]), test, self.options.device)

    def facts(self) -> dict[str, Any]:
        """How many images and classes, and which images could not be read."""
        images = self.images()
        return {
            "train": len(images.train),
            "test": len(images.test),
            "classes": images.num_classes,
            "skipped": self.skipped,
        }

    def network(self, name: str, classes: int) -> nn.Module:
        """The skeleton with one mixer in all stages."""
        from tokenry.vision import metaformer

        return metaformer(
            name,
            depths=self.setting("depths"),
            dims=self.setting("dims"),
            num_classes=classes,
            img_size=self.setting("side"),
            stem=(PATCH, PATCH, 0),
        )

    def mixer(self, name: str, side: int) -> tuple[nn.Module, Any]:
        """One mixer and its input (B, C, H, W) at a resolution of ``side`` pixels."""
        import torch

        from tokenry.mixers import create_mixer
        from tokenry.mixers.registry import mixer_factory, size_keywords

        torch.manual_seed(self.options.seed)
        dim, tokens = self.setting("sweep_dim"), side // PATCH
        fixed = size_keywords(mixer_factory(name), (tokens, tokens))
        mixer = create_mixer(name, dim, layout="NCHW", **fixed).eval()
        where = {"device": self.options.device, "dtype": getattr(torch, self.options.dtype)}
        x = torch.randn(1, dim, tokens, tokens, **where)
        return mixer.to(**where), x.contiguous(memory_format=torch.channels_last)

    def count(self, name: str, classes: int) -> dict[str, float]:
        """Thousands of parameters, and of those frozen; millions of multiply-accumulates per image."""
        import torch

        from tokenry.measure import count_macs

        net, side = self.network(name, classes).eval(), self.setting("side")
        return {
            "params": sum(p.numel() for p in net.parameters()) / 1e3,
            "frozen": sum(p.numel() for p in net.parameters() if not p.requires_grad) / 1e3,
            "macs": count_macs(net, torch.zeros(1, 3, side, side)) / 1e6,
        }

    def train(self, name: str, seed: int) -> dict[str, float]:
        """Test accuracy after training with one seed."""
        from tokenry.vision.image_training import Training, train_classifier

        images = self.images()
        training = Training(epochs=self.setting("epochs"), batch=self.setting("batch"), lr=self.setting("lr"))
        return train_classifier(lambda: self.network(name, images.num_classes), images, training, seed).as_dict()

    def speed(self, names: list[str], classes: int) -> dict[str, dict[str, float]]:
        """Images per second of every network, in turn."""
        import torch

        from tokenry.measure import interleave

        where = {"device": self.options.device, "dtype": getattr(torch, self.options.dtype)}
        batch, side = self.setting("batch"), self.setting("side")
        x = torch.randn(batch, 3, side, side, **where)
        nets = {name: self.network(name, classes).to(**where).eval() for name in names}
        with torch.inference_mode():
            times = interleave(
                {name: lambda net=net: net(x) for name, net in nets.items()},
                repeats=self.options.repeats,
                device=self.options.device,
                min_seconds=0.01,
            )
        return {
            name: {"rate": batch / t.median, "rate_spread": (batch / t.low - batch / t.high) / 2}
            for name, t in times.items()
        }

    def sweep(self, names: list[str], side: int) -> dict[str, float]:
        """Seconds of every mixer alone at one resolution, in turn."""
        import torch

        from tokenry.measure import interleave

        made = {name: self.mixer(name, side) for name in names if self.fits(name, side)}
        with torch.inference_mode():
            times = interleave(
                {name: lambda mixer=mixer, x=x: mixer(x) for name, (mixer, x) in made.items()},
                repeats=min(self.options.repeats, 3),
                device=self.options.device,
                min_seconds=0.005,
            )
        return {name: timing.median for name, timing in times.items()}

    def fits(self, name: str, side: int) -> bool:
        """Whether a mixer can be made for that many tokens."""
        from tokenry.mixers.registry import mixer_factory, size_keywords

        tokens = (side // PATCH) ** 2
        return tokens <= LARGEST_FIXED or not size_keywords(mixer_factory(name), (1, tokens))

    def memory(self, name: str, side: int) -> float | None:
        """MiB that one call of the mixer holds at its peak, beside weights and input; None where it cannot be made."""
        import torch

        from tokenry.measure import peak_activations, peak_extra_memory

        if not self.fits(name, side):
            return None
        mixer, x = self.mixer(name, side)
        with torch.inference_mode():
            if self.options.device.startswith("cuda"):
                return peak_extra_memory(lambda: mixer(x), device=self.options.device) / 2**20
            return peak_activations(lambda: mixer(x)) / 2**20
