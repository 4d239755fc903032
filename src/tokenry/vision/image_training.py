"""Train a small image classifier for a minute: what experiments and comparisons of backbones and mixers share.

AdamW with one-cycle cosine rates, label smoothing, random flips and shifts. Not a recipe for good networks; the same
for all, so that differences are the networks' own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Images",
    "Trained",
    "Training",
    "accuracy",
    "train_classifier",
]


@dataclass(frozen=True)
class Images:
    """Labelled images, normalised by the training images' mean and deviation.

    Attributes:
        train: (N, 3, H, W) float32.
        train_labels: (N,) int64.
        test: (M, 3, H, W) float32.
        test_labels: (M,) int64.
        num_classes: Number of classes.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int

    @classmethod
    def of(
        cls,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        device: torch.device | str = "cpu",
    ) -> Images:
        """From uint8 arrays (N, H, W, 3) and labels (N,)."""
        (train_images, train_labels), (test_images, test_labels) = train, test
        if len(train_images) == 0 or len(test_images) == 0:
            raise ValueError(f"need images to train and to test, got {len(train_images)} and {len(test_images)}")
        numbers = torch.from_numpy(np.ascontiguousarray(train_images)).float()
        mean, deviation = numbers.mean((0, 1, 2)), numbers.std((0, 1, 2)).clamp(min=1.0)

        def prepare(images: np.ndarray) -> Tensor:
            scaled = (torch.from_numpy(np.ascontiguousarray(images)).float() - mean) / deviation
            return scaled.permute(0, 3, 1, 2).to(device)  # channels-last in memory

        labels = [torch.tensor(np.asarray(y), dtype=torch.long, device=device) for y in (train_labels, test_labels)]
        classes = int(max(y.max() for y in labels)) + 1
        return cls(prepare(train_images), labels[0], prepare(test_images), labels[1], classes)


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        lr: Highest rate of AdamW.
        weight_decay: Its weight decay, on matrices alone.
        shift: Random shifts of up to so many pixels.
        dtype: ``"bfloat16"`` computes linear maps and convolutions in it (autocast).
    """

    epochs: int = 6
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    shift: int = 2
    dtype: str = "float32"


@dataclass(frozen=True)
class Trained:
    """What came out: test accuracy in percent, the last epoch's training loss, seconds."""

    accuracy: float
    loss: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        """As plain JSON."""
        return asdict(self)


def _augment(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Flip each image with probability 1/2; move the whole batch by a random offset, repeating the edge."""
    flip = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    if shift:
        down, right = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        height, width = x.shape[-2:]
        x = F.pad(x, (shift,) * 4, mode="replicate")[..., down : down + height, right : right + width]
    return x


def _autocast(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor, *, batch: int = 500, dtype: str = "float32") -> float:
    """Share of images whose highest logit is their label, in percent."""
    model.eval()
    with _autocast(x.device, dtype):
        right = [(model(x[i : i + batch]).argmax(-1) == labels[i : i + batch]).sum() for i in range(0, len(x), batch)]
    return 100.0 * torch.stack(right).sum().item() / len(x)


def train_classifier(make: Callable[[], nn.Module], images: Images, training: Training, seed: int) -> Trained:
    """Train a network from scratch and test it.

    Args:
        make: Makes the network; called after the seed is set.
        images: The data.
        training: How.
        seed: Of the weights, the order of the images and the augmentation.
    """
    torch.manual_seed(seed)
    model = make().to(images.train.device).train()
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=training.lr)
    count, device = len(images.train), images.train.device
    steps = training.epochs * math.ceil(count / training.batch)
    warmup = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))
    )
    began, loss_sum = time.perf_counter(), torch.zeros((), device=device)
    for _ in range(training.epochs):
        loss_sum.zero_()
        order = torch.randperm(count, generator=generator).to(device)
        for index in order.split(training.batch):
            x = _augment(images.train[index], training.shift, generator)
            with _autocast(device, training.dtype):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), images.train_labels[index], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach() * len(index)
    seconds = time.perf_counter() - began
    return Trained(
        accuracy(model, images.test, images.test_labels, dtype=training.dtype), loss_sum.item() / count, seconds
    )
