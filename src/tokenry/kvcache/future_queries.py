"""What the next queries will probably look like, from those so far.

Queries without their positions are taken as normally distributed, with mean μ and covariance Σ of the queries read so
far; those to come are the same, rotated to the coming positions. Two moments per query head are kept, never the
queries: ``D + D²`` numbers, whatever the length of the text.

Parts of a text are added by the update of Chan, Golub and LeVeque (1979), which centres each part on its own mean: a
difference of large numbers would lose the variance of models whose queries have a large mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tokenry.kvcache.rotation import Rotation

__all__ = ["SINKS", "FutureQueries", "QueryMoments", "add_queries", "query_moments", "read_queries"]

SINKS = 4  # the first tokens of a text: most attention goes to them and their own queries are outliers
BLOCK = 1024  # queries that are turned back at once


class QueryMoments(NamedTuple):
    """Mean and spread of queries without their positions, all float32.

    Attributes:
        count: ``[B]``: queries counted.
        mean: ``[B, Hq, D]``.
        scatter: ``[B, Hq, D, D]``: sum of outer products of the centred queries; divided by the count, the covariance.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor


def query_moments(query: Tensor, counted: Tensor) -> QueryMoments:
    """Moments of the queries that count.

    Args:
        query: ``[B, Hq, Q, D]``.
        counted: ``[B, Q]`` bool.

    Example:
        >>> import torch
        >>> found = query_moments(torch.tensor([[[[1.0], [3.0], [9.0]]]]), torch.tensor([[True, True, False]]))
        >>> found.mean.item(), found.scatter.item()
        (2.0, 2.0)
    """
    weight = counted[:, None, :, None].float()  # [B, 1, Q, 1]
    count = counted.sum(-1).float()
    mean = (query.float() * weight).sum(2) / count.clamp_min(1)[:, None, None]
    centred = (query.float() - mean[:, :, None]) * weight
    return QueryMoments(count, mean, centred.transpose(2, 3) @ centred)


def add_queries(known: QueryMoments | None, new: QueryMoments) -> QueryMoments:
    """Moments of two parts of a text together."""
    if known is None:
        return new
    count = known.count + new.count
    share = (new.count / count.clamp_min(1))[:, None, None]
    step = new.mean - known.mean
    between = step[..., :, None] * step[..., None, :] * (known.count[:, None, None] * share)[..., None]
    return QueryMoments(count, known.mean + share * step, known.scatter + new.scatter + between)


@dataclass(frozen=True)
class FutureQueries:
    """Forecast of a layer's next queries.

    Attributes:
        moments: Of the queries so far.
        rotation: How the model rotates them; None: not at all.
        position: Of the next token, padding counted.
        scaling: Factor on the model's scores.
    """

    moments: QueryMoments
    rotation: Rotation | None
    position: int
    scaling: float

    def ahead(self, count: int) -> tuple[Tensor, Tensor]:
        """Mean ``[B, Hq, D]`` and covariance ``[B, Hq, D, D]`` over the next ``count`` positions."""
        mean = self.moments.mean
        covariance = self.moments.scatter / self.moments.count.clamp_min(1)[:, None, None, None]
        if self.rotation is None:
            return mean, covariance
        turn = self.rotation.average(self.position, count, mean)
        return mean @ turn, turn.T @ covariance @ turn


def read_queries(
    known: QueryMoments | None, query: Tensor, valid: Tensor, rotation: Rotation | None, first: int
) -> QueryMoments | None:
    """Add the queries of one attention call.

    Args:
        known: Moments before it.
        query: ``[B, Hq, Q, D]``, rotated to the positions from ``first`` on.
        valid: ``[B, S]`` bool of the stored entries, the queries' own last: False for padding.
        rotation: Of the model.
        first: Position of the first query.
    """
    length = query.shape[-2]
    number = valid.cumsum(-1)[:, -length:]  # 1 for the first real token
    counted = valid[:, -length:] & (number > SINKS)
    for at in range(0, length, BLOCK):
        block = query[:, :, at : at + BLOCK].float()
        block = block if rotation is None else rotation.undo(block, first + at)
        known = add_queries(known, query_moments(block, counted[:, at : at + BLOCK]))
    return known
