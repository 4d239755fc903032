"""iTransformer: forecast many series at once with one token per series.

Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting", ICLR 2024,
arXiv:2310.06625.

    x~ = (x - mean_t x) / sqrt(var_t x + 1e-5)            (B, L, N), each variate by its own window
    h  = W_e [x~ ; marks]^T + b_e                         (B, N + M, D): a token is a whole series
    h  = LN(h + Attention(h));  h = LN(h + FFN(h))        per layer, post-norm
    y  = (W_p LN(h) + b_p)^T                              (B, S, N + M), marks dropped
    y  = y sqrt(var_t x + 1e-5) + mean_t x

Attention runs over variates, so its map says which series were used for which. No weight depends on the number
of variates, and there is no position among them: a fitted model takes more, fewer or other variates, and
permuting them permutes the forecast. The order of time lives in the embedding, whose length is therefore fixed.
``attention="flow"`` replaces the softmax by flow attention (iFlowformer), linear in the number of variates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from tokenry.kernels.flow_attention import flow_attention

__all__ = ["ITransformerConfig", "ITransformerForPrediction", "ITransformerOutput", "checkpoint_filter_fn"]

EPS = 1e-5  # inside the root of the instance normalization


class ITransformerConfig(PreTrainedConfig):
    """Configuration of ``ITransformerForPrediction``.

    Args:
        context_length: Time steps of the past, L; the model takes exactly as many. Default 96 (paper).
        prediction_length: Time steps forecast, S. Default 96; the paper's tables also use 192, 336 and 720.
        d_model: Width of a token. Default 512 (paper: 128 to 512, by data set).
        num_hidden_layers: Default 2 (paper: 2 to 4).
        num_attention_heads: Default 8 (paper).
        ffn_dim: Hidden width of the feed-forward net. None: ``d_model`` (paper).
        dropout: One rate for embedding, attention weights, attention output and feed-forward. Default 0.1 (paper).
        attention: ``"full"`` (softmax) or ``"flow"`` (linear in the number of variates, iFlowformer).
        instance_norm: Scale every window of every variate by its own mean and deviation. Default True (paper).

    Raises:
        ValueError: A value out of range.

    Example:
        >>> ITransformerConfig(d_model=64).ffn_dim
        64
    """

    model_type = "itransformer"
    attribute_map = {"hidden_size": "d_model"}  # noqa: RUF012 - the base class declares it

    context_length: int = 96
    prediction_length: int = 96
    d_model: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    ffn_dim: int | None = None
    dropout: float = 0.1
    attention: str = "full"
    instance_norm: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in ``ffn_dim`` and refuse what cannot be built."""
        self.ffn_dim = self.d_model if self.ffn_dim is None else self.ffn_dim
        super().__post_init__(**kwargs)
        names = (
            "context_length",
            "prediction_length",
            "d_model",
            "num_hidden_layers",
            "num_attention_heads",
            "ffn_dim",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_attention_heads:
            raise ValueError(
                f"d_model must be a multiple of num_attention_heads, got {self.d_model} and {self.num_attention_heads}; "
                f"use d_model={-(-self.d_model // self.num_attention_heads) * self.num_attention_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.attention not in ("full", "flow"):
            raise ValueError(f"attention must be 'full' or 'flow', got {self.attention!r}")


@dataclass
class ITransformerOutput(ModelOutput):
    """What ``ITransformerForPrediction`` returns.

    Attributes:
        loss: Mean squared error to ``future_values``, if they were given.
        prediction_outputs: ``(B, S, N)``.
        attentions: One ``(B, H, N + M, N + M)`` per layer, if asked for; variates first, then time features.
        loc: Mean of each window, ``(B, 1, N)``.
        scale: Its deviation, ``(B, 1, N)``.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None


class VariateAttention(nn.Module):
    """Multi-head attention over tokens, with the three input maps in one matrix."""

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.kind, self.dropout = config.num_attention_heads, config.attention, config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor, keep: int, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        batch, tokens, width = hidden.shape
        q, k, v = self.qkv(hidden).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        rate = self.dropout if self.training else 0.0
        weights = None
        if self.kind == "flow":
            mixed = flow_attention(q, k, v)[:, :, :keep]
        elif output_attentions:
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, H, T, T)
            mixed = (F.dropout(weights, rate) @ v)[:, :, :keep]
        else:
            mixed = F.scaled_dot_product_attention(q[:, :, :keep], k, v, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).reshape(batch, -1, width)), weights  # (B, keep, D)


class VariateBlock(GradientCheckpointingLayer):
    """Attention over variates and a feed-forward net within each, post-norm."""

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.attention = VariateAttention(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        width = config.ffn_dim or config.d_model
        self.ffn_in = nn.Linear(config.d_model, width)
        self.ffn_out = nn.Linear(width, config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, keep: int, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """All tokens are attended to; the first ``keep`` are carried on."""
        mixed, weights = self.attention(hidden, keep, output_attentions)
        hidden = self.norm1(hidden[:, :keep] + self.dropout(mixed))
        update = self.ffn_out(self.dropout(F.gelu(self.ffn_in(hidden))))
        return self.norm2(hidden + self.dropout(update)), weights


class ITransformerForPrediction(PreTrainedModel):
    """Forecast ``prediction_length`` steps of any number of variates from ``context_length`` steps.

    The interface is that of ``PatchTSTForPrediction`` in transformers. Importing this module makes
    ``AutoModelForTimeSeriesPrediction.from_pretrained`` know it. Starting weights are torch's own, as in the paper.

    Example:
        >>> import torch
        >>> config = ITransformerConfig(context_length=24, prediction_length=12, d_model=16)
        >>> model = ITransformerForPrediction(config).eval()
        >>> model(past_values=torch.randn(2, 24, 5)).prediction_outputs.shape
        torch.Size([2, 12, 5])
    """

    config_class = ITransformerConfig
    main_input_name = "past_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VariateBlock"]  # noqa: RUF012 - the base class declares it
    any_variates = True  # for Forecaster: no weight depends on the number of variates

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Linear(config.context_length, config.d_model)
        self.layers = nn.ModuleList(VariateBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.prediction_length)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()

    def forward(
        self,
        past_values: Tensor,
        past_time_features: Tensor | None = None,
        past_observed_mask: Tensor | None = None,
        future_values: Tensor | None = None,
        output_attentions: bool = False,
        return_dict: bool | None = None,
    ) -> ITransformerOutput | tuple:
        """Forecast.

        Args:
            past_values: ``(B, L, N)``, in any unit when ``instance_norm`` is on.
            past_time_features: ``(B, L, M)``, for example hour and weekday in [-0.5, 0.5]
                (``tokenry.series.time_features``). Each becomes one more token.
            past_observed_mask: ``(B, L, N)``, true where a value was observed. Others, NaN among them, count as
                the variate's mean over what was observed.
            future_values: ``(B, S, N)``; the loss is the mean squared error to them.
            output_attentions: Also return the attention maps (full attention only).
            return_dict: False returns a tuple.

        Returns:
            ``ITransformerOutput``.

        Raises:
            ValueError: A shape that does not fit, another length than ``context_length``, or values that are not
                finite (checked when not compiled, and on a GPU only outside training).
        """
        self._check(past_values, past_time_features, past_observed_mask, future_values, output_attentions)
        series, loc, scale = self._normalize(past_values, past_observed_mask)  # (B, N, L)
        variates = series.shape[1]
        tokens = series
        if past_time_features is not None:
            tokens = torch.cat([series, past_time_features.transpose(1, 2).to(series.dtype)], dim=1)  # (B, N + M, L)
        hidden = self.dropout(self.embedding(tokens))  # (B, N + M, D)

        maps = []
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            keep = variates if last and not output_attentions else hidden.shape[1]  # marks end with the last layer
            hidden, weights = layer(hidden, keep, output_attentions)
            maps.append(weights)
        forecast = self.head(self.norm(hidden[:, :variates])) * scale + loc  # (B, N, S)
        forecast = forecast.transpose(1, 2)

        loss = None if future_values is None else F.mse_loss(forecast, future_values.to(forecast.dtype))
        output = ITransformerOutput(
            loss=loss,
            prediction_outputs=forecast,
            attentions=tuple(maps) if output_attentions else None,
            loc=loc.transpose(1, 2),
            scale=scale.transpose(1, 2),
        )
        return output if return_dict is not False else output.to_tuple()

    def _normalize(self, past_values: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Series ``(B, N, L)`` with their location and scale ``(B, N, 1)``; statistics at least in float32."""
        series = past_values.transpose(1, 2)
        kind = series.dtype
        series = series.to(torch.promote_types(kind, torch.float32))
        if observed is None:
            var, mean = torch.var_mean(series, dim=-1, correction=0, keepdim=True)
        else:
            seen = observed.transpose(1, 2).bool()
            count = seen.sum(-1, keepdim=True).clamp(min=1)
            mean = torch.where(seen, series, 0).sum(-1, keepdim=True) / count
            series = torch.where(seen, series, mean)
            var = (series - mean).square().sum(-1, keepdim=True) / count
        if not self.config.instance_norm:
            return series.to(kind), torch.zeros_like(mean, dtype=kind), torch.ones_like(var, dtype=kind)
        mean = mean.detach()
        scale = (var + EPS).sqrt()
        return ((series - mean) / scale).to(kind), mean.to(kind), scale.to(kind)

    def _check(
        self, past: Tensor, marks: Tensor | None, mask: Tensor | None, future: Tensor | None, attentions: bool
    ) -> None:
        config = self.config
        if past.ndim != 3 or past.shape[2] == 0:
            raise ValueError(f"past_values must be (batch, time, variates) with a variate, got {tuple(past.shape)}")
        if past.shape[1] != config.context_length:
            raise ValueError(
                f"past_values has {past.shape[1]} time steps, this model takes context_length={config.context_length}: "
                "its embedding is a linear map of that length. Give that many steps, or train a model of another length"
            )
        if marks is not None and (marks.ndim != 3 or marks.shape[:2] != past.shape[:2]):
            raise ValueError(
                f"past_time_features must be (batch, time, features) with the batch and time of past_values "
                f"{tuple(past.shape[:2])}, got {tuple(marks.shape)}"
            )
        if mask is not None and mask.shape != past.shape:
            raise ValueError(
                f"past_observed_mask must have the shape of past_values {tuple(past.shape)}, got {tuple(mask.shape)}"
            )
        wanted = (past.shape[0], config.prediction_length, past.shape[2])
        if future is not None and tuple(future.shape) != wanted:
            raise ValueError(
                f"future_values must be {wanted} (batch, prediction_length, variates), got {tuple(future.shape)}"
            )
        if attentions and config.attention == "flow":
            raise ValueError(
                "flow attention never forms the map between variates; use attention='full' for output_attentions"
            )
        if torch.compiler.is_compiling() or (self.training and past.is_cuda):
            return  # the check below would make the host wait for the device
        finite = past.isfinite() if mask is None else past.isfinite() | ~mask.bool()
        if not finite.all():
            bad = (~finite).any(0).any(0).nonzero().flatten().tolist()
            raise ValueError(
                f"past_values holds NaN or infinity in variate {', '.join(map(str, bad[:10]))}; fill the gaps, "
                "or mark them false in past_observed_mask"
            )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Turn a state dict of the authors' code (``iTransformer`` or ``iFlowformer``) into this module's.

    A state dict that already has this module's names passes unchanged.

    Args:
        state_dict: As their ``checkpoint.pth`` holds it, with or without the ``module.`` of ``DataParallel``.
        model: Not needed; for the signature that timm uses.

    Example:
        >>> import torch
        >>> list(checkpoint_filter_fn({"projector.weight": torch.zeros(2, 3)}))
        ['head.weight']
    """
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    found: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        new = name.replace("enc_embedding.value_embedding", "embedding").replace("projector", "head")
        new = new.replace("encoder.norm", "norm").replace("encoder.attn_layers", "layers")
        new = new.replace("attention.out_projection", "attention.out")
        new = new.replace("conv1", "ffn_in").replace("conv2", "ffn_out")
        match = re.fullmatch(r"(.*attention\.)(query|key|value)_projection\.(weight|bias)", name)
        if match is None:
            found[new] = value.squeeze(-1) if ".conv" in name and value.ndim == 3 else value
        elif match[2] == "query":
            parts = [state_dict[f"{match[1]}{part}_projection.{match[3]}"] for part in ("query", "key", "value")]
            prefix = match[1].replace("encoder.attn_layers", "layers")
            found[f"{prefix}qkv.{match[3]}"] = torch.cat(parts)
    return found


AutoConfig.register("itransformer", ITransformerConfig, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(ITransformerConfig, ITransformerForPrediction, exist_ok=True)
