"""MS-MLP: golden cases, counts, checkpoints, bad input."""

import pytest
import timm
import torch

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision.ms_mlp import MSMLP, VARIANTS, checkpoint_filter_fn

pytestmark = pytest.mark.method("ms-mlp")


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "variant"),
    [("ms_mlp_tiny_64", "ms_mlp_tiny"), ("ms_mlp_tiny_224", "ms_mlp_tiny"), ("ms_mlp_base_96", "ms_mlp_base")],
)
@torch.inference_mode()
def test_golden_models(name, variant):
    case = GoldenCase("ms-mlp", name)
    model = timm.create_model(variant).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": case.state_dict()}, model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    case.compare("logits", model(x))
    if "macs" in case.spec:
        # the authors' count has the 1x1 depthwise convolutions, which are products of numbers here
        assert count_macs(model, x) == pytest.approx(case.spec["macs"], rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "params"), [("ms_mlp_tiny", 28_656_232), ("ms_mlp_small", 50_303_752), ("ms_mlp_base", 88_696_792)]
)
def test_parameter_counts(variant, params):
    assert sum(p.numel() for p in timm.create_model(variant, device="meta").parameters()) == params


def test_stochastic_depth_grows_linearly():
    model = MSMLP((1, 1, 2, 1), (8, 8, 8, 8), drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_another_variants_checkpoint_is_named():
    tiny = timm.create_model("ms_mlp_tiny", device="meta")
    with pytest.raises(ValueError, match=r"timm.create_model\('ms_mlp_base'\)"):
        state = timm.create_model("ms_mlp_base", device="meta").state_dict()
        checkpoint_filter_fn(state, tiny)
    assert set(VARIANTS) == {"ms_mlp_tiny", "ms_mlp_small", "ms_mlp_base"}


def test_rejects():
    model = MSMLP((1, 1, 1, 1), (8, 8, 8, 8), num_classes=2)
    with pytest.raises(ValueError, match="multiples of 32, got 64x65; resize or pad them, for example to 64x64"):
        model(torch.zeros(1, 3, 64, 65))
    with pytest.raises(ValueError, match="five dimensions"):
        model(torch.zeros(1, 3, 4, 64, 64))
    with pytest.raises(ValueError, match="four stages"):
        MSMLP((1, 1), (8, 8))
