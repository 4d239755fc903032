"""The usual way round: a transformer with one token per time step, the baseline that iTransformer inverts.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, applied to series as in Zhou et al.,
"Informer", AAAI 2021, arXiv:2012.07436: all variates of a time step are mixed into one token, positions are
sinusoidal. The future enters as S tokens that hold a position and no values.

    h_t = W x_t + U marks_t + position_t  (t <= L);  position_t  (t > L)
    y_t = V LN(blocks(h))_t               (t > L)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tokenry.series.itransformer import EPS, ITransformerConfig, ITransformerOutput, VariateBlock

__all__ = ["TimeTokenTransformer", "TimeTokenTransformerConfig"]


class TimeTokenTransformerConfig(ITransformerConfig):
    """Configuration of ``TimeTokenTransformer``: that of iTransformer, and what its weights depend on.

    Args:
        num_input_channels: Variates, N; fixed, since all of them make one token.
        num_time_features: Time features, M.
        instance_norm: Scale windows as iTransformer does. Default False (the vanilla transformer of the paper).
    """

    model_type = "tokenry_time_token_transformer"

    num_input_channels: int = 7
    num_time_features: int = 4
    instance_norm: bool = False


class TimeTokenTransformer(PreTrainedModel):
    """Forecast with time steps as tokens. Same blocks and same call as ``ITransformerForPrediction``.

    Example:
        >>> import torch
        >>> config = TimeTokenTransformerConfig(context_length=24, prediction_length=12, d_model=16, num_input_channels=5)
        >>> TimeTokenTransformer(config)(torch.randn(2, 24, 5)).prediction_outputs.shape
        torch.Size([2, 12, 5])
    """

    config_class = TimeTokenTransformerConfig
    main_input_name = "past_values"

    def __init__(self, config: TimeTokenTransformerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Linear(config.num_input_channels, config.d_model)
        self.marks = nn.Linear(config.num_time_features, config.d_model, bias=False)
        self.layers = nn.ModuleList(VariateBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.num_input_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()

    def _positions(self, like: Tensor) -> Tensor:  # (L + S, D)
        steps = self.config.context_length + self.config.prediction_length
        half = (self.config.d_model + 1) // 2
        rates = 10000 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
        angles = torch.arange(steps, device=like.device, dtype=torch.float32)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, : self.config.d_model].to(like.dtype)

    def forward(
        self, past_values: Tensor, past_time_features: Tensor | None = None, future_values: Tensor | None = None
    ) -> ITransformerOutput:
        """Forecast ``(B, S, N)`` from ``past_values`` ``(B, L, N)``.

        Raises:
            ValueError: Another length or another number of variates than configured.
        """
        wanted = (self.config.context_length, self.config.num_input_channels)
        if past_values.ndim != 3 or tuple(past_values.shape[1:]) != wanted:
            raise ValueError(f"past_values must be (batch, {wanted[0]}, {wanted[1]}), got {tuple(past_values.shape)}")
        loc, scale = torch.zeros_like(past_values[:, :1]), torch.ones_like(past_values[:, :1])
        if self.config.instance_norm:
            var, loc = torch.var_mean(past_values, dim=1, correction=0, keepdim=True)
            scale = (var + EPS).sqrt()
        known = self.embedding((past_values - loc) / scale)  # (B, L, D)
        if past_time_features is not None:
            known = known + self.marks(past_time_features.to(known.dtype))
        hidden = F.pad(known, (0, 0, 0, self.config.prediction_length)) + self._positions(known)  # (B, L + S, D)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden, _ = layer(hidden, hidden.shape[1])
        forecast = self.head(self.norm(hidden[:, self.config.context_length :])) * scale + loc  # (B, S, N)
        loss = None if future_values is None else F.mse_loss(forecast, future_values)
        return ITransformerOutput(loss=loss, prediction_outputs=forecast, loc=loc, scale=scale)
