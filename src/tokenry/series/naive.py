"""Naive forecasts: repeat the last season. What every forecaster must beat.

y_t = x_{L - p + (t mod p)}          p: steps in a season; p = 1 repeats the last value
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.series.itransformer import ITransformerOutput

__all__ = ["SeasonalNaive"]


class SeasonalNaive(nn.Module):
    """Repeat the last season of the past. Has nothing to train; same call as ``ITransformerForPrediction``.

    Args:
        prediction_length: Steps forecast, S.
        season_length: Steps in a season. 1 repeats the last value.

    Raises:
        ValueError: A length below 1, or (when called) a past shorter than a season.

    Example:
        >>> import torch
        >>> past = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1)
        >>> SeasonalNaive(prediction_length=5, season_length=2)(past).prediction_outputs.flatten().tolist()
        [1.0, 2.0, 1.0, 2.0, 1.0]
    """

    any_variates = True  # for Forecaster: no weight depends on the number of variates

    def __init__(self, prediction_length: int, season_length: int = 24) -> None:
        super().__init__()
        if min(prediction_length, season_length) < 1:
            raise ValueError(f"lengths must be at least 1, got {prediction_length} and {season_length}")
        self.prediction_length, self.season_length = prediction_length, season_length

    def forward(
        self, past_values: Tensor, past_time_features: Tensor | None = None, future_values: Tensor | None = None
    ) -> ITransformerOutput:
        """Forecast ``(B, S, N)`` from ``past_values`` ``(B, L, N)``."""
        if past_values.shape[1] < self.season_length:
            raise ValueError(
                f"the past has {past_values.shape[1]} steps, fewer than one season of {self.season_length}; "
                "give a longer context or a shorter season"
            )
        season = past_values[:, -self.season_length :]  # (B, p, N)
        steps = torch.arange(self.prediction_length, device=season.device) % self.season_length
        forecast = season[:, steps]
        loss = None if future_values is None else F.mse_loss(forecast, future_values)
        return ITransformerOutput(loss=loss, prediction_outputs=forecast)
