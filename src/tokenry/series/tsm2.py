"""TSM2: a forecaster that selects over time and over series, without attention.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888.

    x: (M, T)   each series scaled by its own mean and deviation, cut into P patches, each a linear map of its values: (M, P, d)
    T_l(v) = SelectiveTokenMixer( LN(v) )           causal, over the patches of every series
    C_l(v) = SelectiveChannelMixer( LN(v) )         over the series, both ways, at every patch; width d
    h = DenseAverage(T_1, C_1, ..., T_n, C_n)(x)    learned sums of all earlier outputs in place of residuals; h is one more
    y = W h + b                                     (M, P d) -> (M, S), scaled back

What is known besides the past is put behind it before the patches are cut, [x | Z | S] (M, 3 T): features of future steps
Z (M, T_Z, C_Z), mixed by a selective channel mixer over the features, and static features S (M, C_S), each by a linear map to T.

The paper leaves open, and this is what was taken: patches of 16 every 8 steps (PatchTST's), the last value repeated where they
do not come out even; d; the channel mixer at every patch, so that no weight belongs to a series; layer norm over time and
feature axes together; the scaling of windows, which is not in its text but which figures like its own need; and h, which is a
sum of all outputs and not the last channel mixer's alone, behind which little of a single series is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tokenry.layers.dense_average import DenseAverage
from tokenry.layers.mlp import ChannelMLP
from tokenry.layers.s6 import S6
from tokenry.mixers.selective_channel import SelectiveChannelMixer
from tokenry.mixers.selective_token import SelectiveTokenMixer
from tokenry.series.itransformer import EPS, ITransformerOutput

__all__ = ["TSM2Config", "TSM2ForPrediction"]

CHANNEL_MIXERS = ("selective", "mlp", "none")


class TSM2Config(PreTrainedConfig):
    """Configuration of ``TSM2ForPrediction``.

    Args:
        context_length: Time steps of the past, T; the model takes exactly as many. Default 512 (paper).
        prediction_length: Time steps forecast, S. Default 96; the paper's tables also use 192, 336 and 720.
        num_input_channels: Series, M. Only for ``channel_mixer="mlp"``, whose weights depend on it. Default 7.
        patch_length: Values of a patch. Default 16 (open in the paper).
        patch_stride: Steps from one patch to the next. Default 8 (open in the paper).
        d_model: Width of a patch, d. Default 32 (open in the paper).
        num_hidden_layers: Pairs of a token mixer and a channel mixer. Default 2.
        d_state: States per channel of the scans. Default 16 (paper).
        d_conv: Kernel of the convolutions before the scans. Default 4 (paper).
        expand: Inner width of the mixers over d. Default 2 (paper).
        channel_mixer: ``"selective"`` (paper); ``"mlp"``, an MLP over the series, or ``"none"``, for comparison.
        average: Learned sums of all earlier outputs (paper). False: residual connections.
        last_sum: The last map reads a learned sum of all outputs. False: the last channel mixer's output alone, where the
            paper's equations end. Only with ``average``. Default True.
        dropout: On patches, on the outputs of the mixers, and before the last map. Default 0.1.
        instance_norm: Scale every window of every series by its own mean and deviation. Default True.
        num_static_features: Numbers known of every series, C_S. Default 0: none.
        num_future_features: Numbers known of every future step, C_Z. Default 0: none.
        future_length: Future steps that they are known for, T_Z. None: ``prediction_length``.

    Raises:
        ValueError: A value out of range; a past shorter than a patch.

    Example:
        >>> TSM2Config(context_length=100, patch_length=16, patch_stride=8).num_patches
        12
    """

    model_type = "tsm2"
    attribute_map = {"hidden_size": "d_model"}  # noqa: RUF012 - the base class declares it

    context_length: int = 512
    prediction_length: int = 96
    num_input_channels: int = 7
    patch_length: int = 16
    patch_stride: int = 8
    d_model: int = 32
    num_hidden_layers: int = 2
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2.0
    channel_mixer: str = "selective"
    average: bool = True
    last_sum: bool = True
    dropout: float = 0.1
    instance_norm: bool = True
    num_static_features: int = 0
    num_future_features: int = 0
    future_length: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in ``future_length`` and refuse what cannot be built."""
        self.future_length = self.prediction_length if self.future_length is None else self.future_length
        super().__post_init__(**kwargs)
        names = (
            "context_length", "prediction_length", "num_input_channels", "patch_length", "patch_stride", "d_model",
            "num_hidden_layers", "d_state", "d_conv", "future_length",
        )  # fmt: skip
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_static_features", "num_future_features"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (none) or more, got {getattr(self, name)}")
        if self.context_length < self.patch_length:
            raise ValueError(
                f"context_length={self.context_length} is shorter than a patch of patch_length={self.patch_length}; give a "
                "longer past or shorter patches"
            )
        if self.channel_mixer not in CHANNEL_MIXERS:
            raise ValueError(f"channel_mixer must be one of {', '.join(CHANNEL_MIXERS)}, got {self.channel_mixer!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def num_patches(self) -> int:
        """P: as many as cover the past and what is put behind it."""
        parts = 1 + (self.num_future_features > 0) + (self.num_static_features > 0)
        return -(-(parts * self.context_length - self.patch_length) // self.patch_stride) + 1


class PatchMixer(GradientCheckpointingLayer):
    """Norm and token mixer, or norm and channel mixer, on (B, M, P, d).

    Args:
        config: The model's.
        kind: ``"token"``, or one of the channel mixers but ``"none"``.
    """

    def __init__(self, config: TSM2Config, kind: str) -> None:
        super().__init__()
        self.kind = kind
        own: dict[str, Any] = {
            "d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand, "proj_drop": config.dropout,
        }  # fmt: skip
        self.norm = nn.LayerNorm([config.num_patches, config.d_model])
        if kind == "token":
            self.mixer: nn.Module = SelectiveTokenMixer(config.d_model, orders="causal", **own)
        elif kind == "selective":
            self.mixer = SelectiveChannelMixer(num_tokens=config.d_model, **own)
        else:
            self.mixer = ChannelMLP(config.num_input_channels, drop=config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, P, d) -> (B, M, P, d)."""
        batch, _, patches, _ = x.shape
        x = self.norm(x)
        if self.kind == "token":
            return self.mixer(x.flatten(0, 1)).unflatten(0, (batch, -1))
        if self.kind == "mlp":
            return self.mixer(x.transpose(1, 3)).transpose(1, 3)
        x = self.mixer(x.permute(0, 2, 3, 1).flatten(0, 1))  # (B P, d, M)
        return x.unflatten(0, (batch, patches)).permute(0, 3, 1, 2)


class TSM2ForPrediction(PreTrainedModel):
    """Forecast ``prediction_length`` steps of any number of series from ``context_length`` steps.

    The interface is that of ``PatchTSTForPrediction`` in transformers. Importing this module makes
    ``AutoModelForTimeSeriesPrediction.from_pretrained`` know it. The order of the series matters: they are a sequence.

    Example:
        >>> import torch
        >>> config = TSM2Config(context_length=48, prediction_length=12, d_model=8, num_future_features=2)
        >>> model = TSM2ForPrediction(config).eval()
        >>> model(past_values=torch.randn(2, 48, 5), future_features=torch.randn(2, 5, 12, 2)).prediction_outputs.shape
        torch.Size([2, 12, 5])
    """

    config_class = TSM2Config
    main_input_name = "past_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PatchMixer"]  # noqa: RUF012 - the base class declares it

    def __init__(self, config: TSM2Config) -> None:
        super().__init__(config)
        layers = config.num_hidden_layers
        self.embedding = nn.Linear(config.patch_length, config.d_model)
        self.token_mixers = nn.ModuleList(PatchMixer(config, "token") for _ in range(layers))
        self.channel_mixers = nn.ModuleList(
            nn.Identity() if config.channel_mixer == "none" else PatchMixer(config, config.channel_mixer)
            for _ in range(layers)
        )
        mixed = [config.channel_mixer != "none"] * layers
        self.average = DenseAverage(layers, mixed, config.last_sum) if config.average else None
        self.head = nn.Linear(config.num_patches * config.d_model, config.prediction_length)
        self.dropout = nn.Dropout(config.dropout)
        if config.num_future_features:
            steps = int(config.future_length or config.prediction_length)
            self.future_mixer = SelectiveChannelMixer(
                num_tokens=steps, d_state=config.d_state, d_conv=config.d_conv, expand=config.expand
            )
            self.future_map = nn.Linear(steps * config.num_future_features, config.context_length)
        if config.num_static_features:
            self.static_map = nn.Linear(config.num_static_features, config.context_length)
        self.post_init()

    @property
    def any_variates(self) -> bool:
        """For Forecaster: whether no weight depends on the number of series."""
        return self.config.channel_mixer != "mlp"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv1d | S6 | DenseAverage):
            module.reset_parameters()  # of a mixer after its parts

    def forward(
        self,
        past_values: Tensor,
        static_features: Tensor | None = None,
        future_features: Tensor | None = None,
        future_values: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ITransformerOutput | tuple:
        """Forecast.

        Args:
            past_values: ``(B, T, M)``, in any unit when ``instance_norm`` is on.
            static_features: ``(B, M, C_S)``, known of every series; needed when configured.
            future_features: ``(B, M, T_Z, C_Z)``, known of every future step; needed when configured.
            future_values: ``(B, S, M)``; the loss is the mean squared error to them.
            return_dict: False returns a tuple.

        Returns:
            ``ITransformerOutput`` (without attentions).

        Raises:
            ValueError: A shape that does not fit, features missing or not configured, or values that are not finite
                (checked when not compiled, and on a GPU only outside training).
        """
        self._check(past_values, static_features, future_features, future_values)
        x = past_values.transpose(1, 2)  # (B, M, T)
        loc, scale = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.config.instance_norm:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
            deviation = (var + EPS).sqrt()
            x, loc, scale = ((wide - mean) / deviation).to(x.dtype), mean.to(x.dtype), deviation.to(x.dtype)
        known = [x]
        if future_features is not None:
            z = self.future_mixer(future_features.flatten(0, 1).to(x.dtype))  # (B M, T_Z, C_Z)
            known.append(self.future_map(z.flatten(1)).unflatten(0, x.shape[:2]))
        if static_features is not None:
            known.append(self.static_map(static_features.to(x.dtype)))
        hidden = self.dropout(self.embedding(self._patches(torch.cat(known, dim=-1))))  # (B, M, P, d)
        if self.average is not None:
            hidden = self.average(hidden, self.token_mixers, self.channel_mixers)
        else:
            for mix_tokens, mix_channels in zip(self.token_mixers, self.channel_mixers, strict=True):
                hidden = hidden + mix_tokens(hidden)
                hidden = hidden if isinstance(mix_channels, nn.Identity) else hidden + mix_channels(hidden)
        forecast = self.head(self.dropout(hidden.flatten(2))) * scale + loc  # (B, M, S)
        forecast = forecast.transpose(1, 2)
        loss = None if future_values is None else F.mse_loss(forecast, future_values.to(forecast.dtype))
        output = ITransformerOutput(
            loss=loss, prediction_outputs=forecast, loc=loc.transpose(1, 2), scale=scale.transpose(1, 2)
        )
        return output if return_dict is not False else output.to_tuple()

    def _patches(self, x: Tensor) -> Tensor:
        """(B, M, T') -> (B, M, P, patch_length), the last value repeated where the last patch is not full."""
        config = self.config
        missing = (config.num_patches - 1) * config.patch_stride + config.patch_length - x.shape[-1]
        if missing > 0:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
        return x.unfold(-1, config.patch_length, config.patch_stride)

    def _check(self, past: Tensor, static: Tensor | None, known: Tensor | None, future: Tensor | None) -> None:
        config = self.config
        if past.ndim != 3 or past.shape[2] == 0:
            raise ValueError(f"past_values must be (batch, time, series) with a series, got {tuple(past.shape)}")
        batch, steps, series = past.shape
        if steps != config.context_length:
            raise ValueError(
                f"past_values has {steps} time steps, this model takes context_length={config.context_length}; give that "
                "many, or train a model of another length"
            )
        if not self.any_variates and series != config.num_input_channels:
            raise ValueError(
                f"past_values has {series} series; with channel_mixer='mlp' the model takes "
                f"num_input_channels={config.num_input_channels}, with 'selective' any number"
            )
        wanted = {
            "static_features": (static, (batch, series, config.num_static_features)),
            "future_features": (known, (batch, series, config.future_length, config.num_future_features)),
        }
        for name, (given, shape) in wanted.items():
            if (given is not None) != (shape[-1] > 0):
                state = "missing" if given is None else "given"
                raise ValueError(f"{name} are {state}, and the model was made with num_{name}={shape[-1]}")
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(given.shape)}")
        shape = (batch, config.prediction_length, series)
        if future is not None and tuple(future.shape) != shape:
            raise ValueError(f"future_values must be {shape} (batch, time, series), got {tuple(future.shape)}")
        if torch.compiler.is_compiling() or (self.training and past.is_cuda):
            return  # the check below would make the host wait for the device
        for name, values in {"past_values": past, "static_features": static, "future_features": known}.items():
            if values is not None and not values.isfinite().all():
                raise ValueError(f"{name} hold NaN or infinity; fill the gaps (frame.interpolate()) first")


AutoConfig.register("tsm2", TSM2Config, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(TSM2Config, TSM2ForPrediction, exist_ok=True)
