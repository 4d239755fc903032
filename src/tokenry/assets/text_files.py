"""Text files of the user's: UTF-8, or a message that says which file is not."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_text_file"]


def read_text_file(path: Path | str) -> str:
    """The text of a UTF-8 file; a byte order mark is no part of it.

    Raises:
        ValueError: It is not UTF-8. (A file that is not there raises ``FileNotFoundError`` as everywhere.)
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,}); convert it first"
        ) from error
