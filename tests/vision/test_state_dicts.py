"""Checkpoints of any network: wrappings, averaged weights, classifiers, and the name of the variant that they look like."""

import pytest
import timm
import torch

import tokenry.vision  # noqa: F401  registers the models
from tokenry.vision.affnet import VARIANTS
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model": {"a": torch.ones(1)}, "model_ema": state},
        lambda state: {"params": {"a": torch.ones(1)}, "params_ema": state},
        lambda state: {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
    ],
)
def test_wrappings_come_off(wrapped):
    state = {"a": torch.zeros(1), "module_list.b": torch.zeros(2)}
    found = unwrap(wrapped(state))
    assert found.keys() == state.keys() and all(found[name] is state[name] for name in state)


def test_a_model_without_classes_is_told_the_variant_too():
    state = timm.create_model("affnet_t", device="meta").state_dict()
    for classes in (0, 1000):
        model = timm.create_model("affnet_et", num_classes=classes, device="meta")
        with pytest.raises(
            ValueError, match=r"It looks like affnet_t: make the model with timm.create_model\('affnet_t'\)"
        ):
            check_shapes(without_head(state, model), model, VARIANTS)
