"""Labelled images of the user's own: a folder of classes or parquet files; files that cannot be read are named."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

__all__ = ["check_labelled_images", "class_folders", "decode_images", "read_labelled_images"]

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif"})


def _decode(source: object, side: int) -> np.ndarray:
    """One image as (side, side, 3) uint8, from a path, encoded bytes, or what a parquet file of images holds."""
    from PIL import Image

    if isinstance(source, dict):  # the usual pair of bytes and path
        source = source["bytes"]
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:  # type: ignore[arg-type]
        rgb = image.convert("RGB")
        return np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BILINEAR))


def decode_images(
    labelled: Iterable[tuple[object, int]], side: int, skipped: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images as one array, leaving out what cannot be read.

    Args:
        labelled: Pairs of a path, encoded bytes or a dict that holds bytes, and a label.
        side: Images are resized to ``side`` x ``side`` pixels.
        skipped: Gets a line ``name: reason`` for every image that is left out.

    Returns:
        uint8 (N, side, side, 3) and int64 (N,).

    Raises:
        ValueError: None of them can be read.
    """
    from PIL import UnidentifiedImageError

    images, kept, refused = [], [], []
    for position, (source, label) in enumerate(labelled):
        try:
            images.append(_decode(source, side))
            kept.append(label)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:  # what PIL raises for a broken file
            name = str(source) if isinstance(source, (str, Path)) else f"image {position}"
            refused.append(f"{name}: {str(error).splitlines()[0][:80]}")
    if not images:
        raise ValueError(
            f"none of {len(refused)} images can be read, the first: {refused[0] if refused else 'no image'}"
        )
    if skipped is not None:
        skipped += refused
    return np.stack(images), np.asarray(kept, dtype=np.int64)


def _read_parquet(path: Path, side: int, skipped: list[str] | None) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet as parquet

    names = parquet.read_schema(path).names
    if not {"image", "label"} <= set(names):
        raise ValueError(
            f"{path} has the columns {', '.join(names)}; needed: image (encoded bytes) and label (0, 1, ...)"
        )
    table = parquet.read_table(path, columns=["image", "label"])
    pairs = ((x.as_py(), int(y.as_py())) for x, y in zip(table["image"], table["label"], strict=True))
    return decode_images(pairs, side, skipped)


def check_labelled_images(source: str | Path) -> Path:
    """Refuse what ``read_labelled_images`` could not read, quickly.

    Raises:
        ValueError: Neither a parquet file, nor a folder with ``train.parquet`` and ``test.parquet``, nor a folder with
            at least two folders (classes) of at least five images each.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".parquet":
        return path
    if path.is_dir() and all((path / f"{split}.parquet").is_file() for split in ("train", "test")):
        return path
    if path.is_dir():
        counts = {k: len(v) for k, v in class_folders(path).items()}
        if len(counts) >= 2 and min(counts.values()) >= 5:
            return path
        found = ", ".join(f"{k}: {n}" for k, n in counts.items()) or "no folder with images"
        raise ValueError(f"{path} must hold at least two folders (classes) of at least five images each; found {found}")
    raise ValueError(
        f"no labelled images at {path}: give a folder with one folder of images per class, a folder with train.parquet "
        "and test.parquet, or a parquet file with the columns image and label"
    )


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class name to its images, sorted: ``folder/<class>/.../<image>``."""
    found = {
        sub.name: sorted(p for p in sub.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    }
    return {name: paths for name, paths in found.items() if paths}


def read_labelled_images(
    source: str | Path, *, side: int = 32, test_share: float = 0.2, seed: int = 0, skipped: list[str] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Labelled images of the user's own, split into training and test.

    Args:
        source: A folder with one folder of images per class, a folder with ``train.parquet`` and ``test.parquet``, or
            one parquet file; parquet columns are ``image`` (encoded bytes) and ``label``.
        side: Images are resized to ``side`` x ``side`` pixels.
        test_share: Share that is held out where the source has no split of its own.
        seed: Of that split.
        skipped: Gets a line ``name: reason`` for every image that cannot be read; the others are used.

    Returns:
        ``((train images, labels), (test images, labels))``, images uint8 (N, side, side, 3).

    Raises:
        ValueError: See ``check_labelled_images``.
    """
    path = check_labelled_images(source)
    if path.is_dir() and (path / "train.parquet").is_file():
        return _read_parquet(path / "train.parquet", side, skipped), _read_parquet(path / "test.parquet", side, skipped)
    if path.is_file():
        images, labels = _read_parquet(path, side, skipped)
    else:
        folders = class_folders(path)
        numbered = [(path, label) for label, paths in enumerate(folders.values()) for path in paths]
        images, labels = decode_images(numbered, side, skipped)
    order = np.random.default_rng(seed).permutation(len(labels))
    held = max(1, round(test_share * len(labels)))
    test, train = order[:held], order[held:]
    return (images[train], labels[train]), (images[test], labels[test])
