"""Files that are there in full or not at all, for what is written as a long run goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes the place of ``path`` when the block ends.

    A kill or an error inside leaves what ``path`` held before. The folder must be there.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "figures.json"
        >>> with whole_file(file) as unfinished:
        ...     _ = unfinished.write_text("[1, 2]")
        >>> file.read_text()
        '[1, 2]'
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")  # two processes may write the same file
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
