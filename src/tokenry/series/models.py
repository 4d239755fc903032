"""The forecasting models by name, and how each is made.

A further model of the family is one more line of ``MODELS``; everything of ``Forecaster`` then works with it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["MODELS", "ModelKind"]


@dataclass(frozen=True)
class ModelKind:
    """How a model of the family is made from its name.

    Attributes:
        model: ``module:attribute`` of a module called with ``past_values`` (and, where its forward names it,
            ``past_time_features``) that returns an output with ``prediction_outputs`` ``(B, S, N)``.
        config: Of its configuration class; empty when the model takes keywords itself.
        settings: Defaults that differ from the configuration's.
        learning_rate: Adam's first step size.
    """

    model: str
    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4

    def build(self, given: Mapping[str, Any], settings: Mapping[str, Any]) -> nn.Module:
        """Make the model. ``given`` is taken where the model knows the name, ``settings`` must be known."""
        model = _load(self.model)
        made_by = _load(self.config) if self.config else model
        names = set(inspect.signature(made_by).parameters)
        unknown = [name for name in settings if name not in names]
        if unknown:
            raise ValueError(f"{model.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}")
        arguments = {**{k: v for k, v in given.items() if k in names}, **self.settings, **settings}
        return model(made_by(**arguments)) if self.config else model(**arguments)


def _load(entry_point: str) -> Any:
    module, name = entry_point.split(":")
    return getattr(importlib.import_module(module), name)


HERE = "tokenry.series"
ITRANSFORMER = (f"{HERE}.itransformer:ITransformerForPrediction", f"{HERE}.itransformer:ITransformerConfig")
TIME_TOKENS = (f"{HERE}.time_tokens:TimeTokenTransformer", f"{HERE}.time_tokens:TimeTokenTransformerConfig")
LINEAR = (f"{HERE}.linear:LinearForPrediction", f"{HERE}.linear:LinearForecastConfig")
TSM2 = (f"{HERE}.tsm2:TSM2ForPrediction", f"{HERE}.tsm2:TSM2Config")
# The small PatchTST that its authors use for ETT; the flattened head is theirs too.
PATCHTST = {
    "patch_length": 16, "patch_stride": 8, "d_model": 16, "num_attention_heads": 4, "ffn_dim": 128, "pooling_type": None,
    "attention_dropout": 0.3, "ff_dropout": 0.3, "positional_dropout": 0.3,
}  # fmt: skip

MODELS: dict[str, ModelKind] = {
    "itransformer": ModelKind(*ITRANSFORMER, {"d_model": 256}),
    "iflowformer": ModelKind(*ITRANSFORMER, {"d_model": 256, "attention": "flow"}),
    "time-tokens": ModelKind(*TIME_TOKENS, {"d_model": 256}),
    "rlinear": ModelKind(*LINEAR, {"variant": "rlinear"}, 5e-3),
    "nlinear": ModelKind(*LINEAR, {"variant": "nlinear"}, 5e-3),
    "dlinear": ModelKind(*LINEAR, {"variant": "dlinear"}, 5e-3),
    "patchtst": ModelKind("transformers:PatchTSTForPrediction", "transformers:PatchTSTConfig", PATCHTST, 1e-3),
    "tsm2": ModelKind(*TSM2, {}, 1e-3),
    "seasonal-naive": ModelKind(f"{HERE}.naive:SeasonalNaive"),
    "repeat-last": ModelKind(f"{HERE}.naive:SeasonalNaive", "", {"season_length": 1}),
}
