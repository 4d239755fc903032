"""Linear forecasters: one linear map from the past to the future, shared by all variates.

Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, arXiv:2205.13504 (DLinear,
NLinear); Li et al., "Revisiting Long-term Time Series Forecasting", 2023, arXiv:2305.10721 (RLinear).

    nlinear:  y = W (x - x_L) + b + x_L
    rlinear:  y = (W (x - mean) / sd + b) sd + mean             mean, sd of the window
    dlinear:  y = W_t trend(x) + b_t + W_s (x - trend(x)) + b_s,      trend = moving average of 25 steps

Small, fast, and on several data sets better than most transformers: the baselines to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from tokenry.series.itransformer import EPS, ITransformerOutput

__all__ = ["LinearForPrediction", "LinearForecastConfig"]


class LinearForecastConfig(PreTrainedConfig):
    """Configuration of ``LinearForPrediction``.

    Args:
        variant: ``"rlinear"``, ``"nlinear"`` or ``"dlinear"``.
        context_length: Time steps of the past, L.
        prediction_length: Time steps forecast, S.
        kernel_size: Steps of DLinear's moving average, odd. Default 25 (paper).

    Raises:
        ValueError: A value out of range.
    """

    model_type = "tokenry_linear_forecast"

    variant: str = "rlinear"
    context_length: int = 96
    prediction_length: int = 96
    kernel_size: int = 25

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse what cannot be built."""
        super().__post_init__(**kwargs)
        if self.variant not in ("rlinear", "nlinear", "dlinear"):
            raise ValueError(f"variant must be 'rlinear', 'nlinear' or 'dlinear', got {self.variant!r}")
        if min(self.context_length, self.prediction_length) < 1:
            raise ValueError("context_length and prediction_length must be at least 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}; use {max(self.kernel_size, 0) | 1}")


class LinearForPrediction(PreTrainedModel):
    """Forecast by a linear map over time. Same call as ``ITransformerForPrediction``.

    Example:
        >>> import torch
        >>> model = LinearForPrediction(LinearForecastConfig(context_length=24, prediction_length=12))
        >>> model(past_values=torch.randn(2, 24, 5)).prediction_outputs.shape
        torch.Size([2, 12, 5])
    """

    config_class = LinearForecastConfig
    main_input_name = "past_values"
    any_variates = True  # for Forecaster: no weight depends on the number of variates

    def __init__(self, config: LinearForecastConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.context_length, config.prediction_length)
        if config.variant == "dlinear":
            self.trend = nn.Linear(config.context_length, config.prediction_length)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self, past_values: Tensor, past_time_features: Tensor | None = None, future_values: Tensor | None = None
    ) -> ITransformerOutput:
        """Forecast ``(B, S, N)`` from ``past_values`` ``(B, L, N)``; time features are not used.

        Raises:
            ValueError: Another length than ``context_length``.
        """
        if past_values.ndim != 3 or past_values.shape[1] != self.config.context_length:
            raise ValueError(
                f"past_values must be (batch, context_length={self.config.context_length}, variates), "
                f"got {tuple(past_values.shape)}"
            )
        x = past_values.transpose(1, 2)  # (B, N, L)
        loc, scale = x[..., -1:], torch.ones_like(x[..., -1:])
        if self.config.variant == "rlinear":
            var, loc = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
            scale = (var + EPS).sqrt()
        if self.config.variant == "dlinear":
            half = self.config.kernel_size // 2
            trend = F.avg_pool1d(F.pad(x, (half, half), mode="replicate"), self.config.kernel_size, stride=1)
            forecast = self.linear(x - trend) + self.trend(trend)
            loc, scale = torch.zeros_like(loc), torch.ones_like(scale)
        else:
            forecast = self.linear((x - loc) / scale) * scale + loc
        forecast = forecast.transpose(1, 2)  # (B, S, N)
        loss = None if future_values is None else F.mse_loss(forecast, future_values)
        return ITransformerOutput(
            loss=loss, prediction_outputs=forecast, loc=loc.transpose(1, 2), scale=scale.transpose(1, 2)
        )
