"""How many heads (or groups) of channels an attention has, where the user may leave it open."""

from __future__ import annotations

__all__ = ["head_count"]


def head_count(dim: int, wanted: int | None, *, name: str = "num_heads", head_dim: int = 32) -> int:
    """The number of heads that ``dim`` channels are split into, checked.

    Args:
        dim: Channels C.
        wanted: Number of heads; it must divide ``dim``. None: heads of ``head_dim`` channels where that divides ``dim``,
            else one head.
        name: What the caller's keyword is called, for the message.
        head_dim: Usual width of a head. Default 32.

    Raises:
        ValueError: ``wanted`` is below 1 or does not divide ``dim``; the message names the nearest that does.

    Example:
        >>> head_count(96, None), head_count(48, None), head_count(48, 4)
        (3, 1, 4)
    """
    if wanted is None:
        return dim // head_dim if dim % head_dim == 0 else 1
    if wanted < 1 or dim % wanted:
        near = next(heads for heads in range(min(max(wanted, 1), dim), 0, -1) if dim % heads == 0)
        raise ValueError(f"{name} must divide dim={dim}, got {name}={wanted}; use {name}={near}, or another dim")
    return wanted
