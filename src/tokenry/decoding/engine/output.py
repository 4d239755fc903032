"""What ``generate`` returns with ``return_dict_in_generate=True``, and the scores it was asked to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.statistics import DecodingStats

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["DecodingOutput", "KeptScores"]


@dataclass
class DecodingOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``: the library's fields and the counts."""

    decoding_stats: DecodingStats | None = None


class KeptScores:
    """Scores and logits of the emitted tokens, where ``generate`` was asked for them."""

    def __init__(self, config: GenerationConfig) -> None:
        dictionary = bool(config.return_dict_in_generate)
        self.wanted = {
            "scores": dictionary and bool(config.output_scores),
            "logits": dictionary and bool(config.output_logits),
        }
        self.rows: dict[str, list[list[Tensor]]] = {name: [] for name, wanted in self.wanted.items() if wanted}

    def add(self, logits: Tensor, accepted: Accepted, counts: list[int]) -> None:
        """Keep what belongs to each row's first ``counts[b]`` tokens of a pass."""
        for name, rows in self.rows.items():
            if name == "scores" and accepted.scores is not None:
                found = torch.stack(accepted.scores, 1)  # (B, A, V)
            else:
                index = accepted.paths[..., None].expand(-1, -1, logits.shape[-1])
                found = logits.gather(1, index).float()
            if not rows:
                rows.extend([] for _ in counts)
            for row, values, count in zip(rows, found, counts, strict=True):
                row.extend(values[:count].unbind(0))

    def stacked(self, name: str, steps: int) -> tuple[Tensor, ...] | None:
        """Per emitted token ``(B, V)``; zeros where a row was done already."""
        if not self.wanted[name]:
            return None
        rows = self.rows[name]
        nothing = torch.zeros_like(rows[0][0])
        return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(steps))
