"""Which frames of a video a clip takes, and scores averaged over several views of it.

    dense      frames t, t + s, t + 2s, ...: a stretch of the video at an even pace (Kinetics)
    segment    the video in equal parts, one frame of each: the whole of it (Something-Something)
    score      mean over clips and crops of softmax(model(view))

Frames are indices into a video of ``n`` frames: reading them is the work of torchvision, PyAV or decord, which decode only
what is asked for. Where a video is shorter than the clip, its last frame is repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["dense_sample", "multi_view", "segment_sample"]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def dense_sample(
    n: int,
    frames: int,
    stride: int,
    clips: int = 1,
    train: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frame numbers of clips at an even pace.

    The authors' loader spreads the frames over ``frames * stride`` frames of the video instead, a pace that is longer by a
    fraction of a frame.

    Args:
        n: Frames of the video.
        frames: Frames of a clip.
        stride: Step from one to the next.
        clips: How many clips. In evaluation they are spread evenly, the first at the start and the last at the end of the
            video; one clip lies in the middle.
        train: Random starts instead.
        generator: Of the random starts.

    Returns:
        (clips, frames), int64.

    Raises:
        ValueError: A count is below 1.

    Example:
        >>> dense_sample(10, frames=4, stride=2, clips=2)
        tensor([[0, 2, 4, 6],
                [3, 5, 7, 9]])
        >>> dense_sample(5, frames=4, stride=2)
        tensor([[0, 2, 4, 4]])
    """
    _check_counts(n=n, frames=frames, stride=stride, clips=clips)
    room = max(n - 1 - (frames - 1) * stride, 0)  # the last possible start
    if train:
        starts = torch.randint(0, room + 1, (clips,), generator=generator)
    elif clips == 1:
        starts = torch.tensor([room // 2])
    else:
        starts = torch.arange(clips) * room // (clips - 1)
    return (starts[:, None] + stride * torch.arange(frames)).clamp(max=n - 1)


def segment_sample(n: int, frames: int, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Frame numbers of one clip that covers the whole video.

    Segment i goes from ``round(i w)`` to ``round((i + 1) w)``, w = (n - 1) / frames, both ends included (authors' code).

    Args:
        n: Frames of the video.
        frames: Segments, and frames of the clip. More than ``n`` repeats some.
        train: A random frame of each segment, instead of the middle one.
        generator: Of the random frames.

    Returns:
        (frames,), int64, never falling.

    Raises:
        ValueError: A count is below 1.

    Example:
        >>> segment_sample(9, frames=4)
        tensor([1, 3, 5, 7])
    """
    _check_counts(n=n, frames=frames)
    edges = torch.linspace(0, n - 1, frames + 1, dtype=torch.float64).round().long()
    low, high = edges[:-1], edges[1:]
    if not train:
        return (low + high) // 2
    return low + (torch.rand(frames, generator=generator, dtype=torch.float64) * (high - low + 1)).long()


def multi_view(model: Callable[[Tensor], Tensor], clips: Tensor, crops: int = 1) -> Tensor:
    """Class scores of videos, averaged over clips in time and crops in space.

    Args:
        model: Takes (N, C, T, S, S) and returns logits (N, K); in evaluation mode.
        clips: (B, V, C, T, H, W): V clips of each video. S = min(H, W).
        crops: Square crops along the longer side, from one end to the other; one lies in the middle.

    Returns:
        (B, K): probabilities, the mean of the softmax over the V * crops views.

    Raises:
        ValueError: Clips of another shape; several crops of square clips, which would all be the same.

    Example:
        >>> multi_view(lambda x: x.mean((2, 3, 4)), torch.zeros(2, 4, 3, 8, 32, 48), crops=3).shape
        torch.Size([2, 3])
    """
    if clips.ndim != 6:
        raise ValueError(
            f"expected clips (B, V, C, T, H, W), got {tuple(clips.shape)}; for one clip per video use clips.unsqueeze(1)"
        )
    _check_counts(crops=crops)
    batch, views, _, _, height, width = clips.shape
    side, room = min(height, width), abs(height - width)
    if crops > 1 and not room:
        raise ValueError(
            f"{crops} crops of square clips {height}x{width} are all the same; give the frames' whole width, or crops=1"
        )
    starts = [room // 2] if crops == 1 else [i * room // (crops - 1) for i in range(crops)]
    axis = -2 if height > width else -1
    flat = clips.flatten(0, 1)  # (B V, C, T, H, W)
    scores = [model(flat.narrow(axis, start, side)).softmax(-1) for start in starts]
    return torch.stack(scores).mean(0).unflatten(0, (batch, views)).mean(1)
