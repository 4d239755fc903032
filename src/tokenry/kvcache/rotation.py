"""Take the positions out of a model's queries, and put an average of coming positions in.

An attention function sees queries that are already rotated to their positions (rotary embedding). What a query will
look like later needs the query without its position, and the mean of the rotations of the positions to come:

    q = R_p^T (R_p q)          R̄ = 1/n Σ_{m = p .. p + n - 1} R_m

The rotation is linear, so the model's own function and the model's own frequencies do both: given ``cos`` and ``-sin``
it turns back, given the identity matrix and a mean of ``cos`` and of ``sin`` it returns R̄. No layout (halves,
interleaved, a part of each head) has to be known here. A constant that is added to all positions cancels, so places in
the cache may stand for positions.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rotation", "rotation_of"]

NAME = "apply_rotary_pos_emb"
MOVING = {"dynamic", "longrope"}  # frequencies that change with the length of the text


class Rotation:
    """How a model rotates its queries.

    Args:
        apply: ``apply(q, k, cos, sin)``, the model's own.
        angles: Positions ``[1, n]`` to ``cos`` and ``sin``, each ``[1, n, d]`` with ``d`` at most the head size.
    """

    def __init__(
        self, apply: Callable[..., tuple[Tensor, Tensor]], angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.apply, self.angles = apply, angles

    def _angles(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles(torch.arange(first, first + count, device=device)[None])
        scale = (cos[:, :1].square() + sin[:, :1].square()).sqrt()  # some models lengthen queries as they turn them
        return cos / scale, sin / scale

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part = cos.shape[-1]
        turned = self.apply(x[..., :part], x[..., :part], cos, sin)[0]
        return torch.cat([turned, x[..., part:]], dim=-1)

    def undo(self, query: Tensor, first: int) -> Tensor:
        """Queries ``[B, H, Q, D]`` at the positions from ``first`` on, without their positions."""
        cos, sin = self._angles(first, query.shape[-2], query.device)
        return self._turn(query, cos, -sin)

    def average(self, first: int, count: int, like: Tensor) -> Tensor:
        """Mean rotation to ``count`` positions from ``first`` on, ``[D, D]``; rows times it are rotated."""
        cos, sin = (x.mean(1, keepdim=True) for x in self._angles(first, count, like.device))
        dim = like.shape[-1]
        return self._turn(torch.eye(dim, device=like.device)[None, None], cos, sin)[0, 0]


def rotation_of(module: nn.Module) -> Rotation | None:
    """The rotation that an attention module of ``transformers`` applies; None: it applies none.

    Raises:
        ValueError: It rotates in a way that cannot be undone from outside: only in some layers, with another function
            than the usual one, or with frequencies that change with the length.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    config, kind = module.config, type(module).__name__
    names = forward.__code__.co_names
    if NAME not in names:
        if getattr(config, "rope_parameters", None) or any("rotary" in name or "rope" in name for name in names):
            raise ValueError(f"{kind} rotates its queries, but not by {NAME}; take a cache that scores without queries")
        return None
    apply = forward.__globals__[NAME]
    if list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"] or _conditional(forward):
        raise ValueError(
            f"{kind} does not rotate its queries in every layer, or not in the usual way, so their positions cannot be "
            "taken out; take a cache that scores without queries"
        )
    own = [
        found
        for name, found in forward.__globals__.items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name and isinstance(found, type)
    ]
    if len(own) != 1:
        raise ValueError(f"{kind} has {len(own)} rotary embeddings beside it and one is needed; take another cache")
    embedding = own[0](config)
    types = embedding.rope_type
    if MOVING & set(types.values() if isinstance(types, dict) else [types]):
        raise ValueError(f"{kind} changes its frequencies with the length of the text ({types}); take another cache")
    layered = "layer_type" in inspect.signature(inspect.unwrap(type(embedding).forward)).parameters
    kwargs = {"layer_type": "full_attention"} if layered else {}

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        return embedding.to(positions.device)(positions.new_zeros(1, dtype=torch.float32), positions, **kwargs)

    return Rotation(apply, angles)


@functools.cache
def _conditional(forward: Callable[..., Any]) -> bool:
    """Whether the rotation stands under an ``if``: then some layers go without."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    return any(isinstance(x, ast.Name) and x.id == NAME for branch in branches for x in ast.walk(branch))
