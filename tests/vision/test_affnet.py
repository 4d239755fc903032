"""AFFNet: golden cases, counts, features at chosen strides, checkpoints, bad input."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from golden_case import GoldenCase
from tokenry.mixers import AFFMixer
from tokenry.vision.affnet import NORMS, AFFNet, AFFStage, Block, checkpoint_filter_fn

pytestmark = pytest.mark.method("affnet")

TINY = {"widths": (8, 8, 16, 16, 16), "depths": (1, 2, 1, 1, 1), "expand_ratio": 2.0, "num_classes": 10}


def tiny(**kwargs):
    torch.manual_seed(0)
    return AFFNet(**{**TINY, **kwargs}).eval()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["block", "affblock", "affblock_layer_norm"])
def test_golden_blocks(name):
    case = GoldenCase("affnet", name)
    norm = NORMS["layer_norm" if name.endswith("layer_norm") else "layer_norm_2d"]
    make = Block if name == "block" else AFFStage
    model = make(32, partial(AFFMixer), norm_layer=norm).eval()
    model.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    case.compare("y", model(case.inputs["x"]))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "variant", "act"),
    [("affnet_et_64", "affnet_et", "silu"), ("affnet_64", "affnet", "silu"), ("affnet_t_relu_96", "affnet_t", "relu")],
)
def test_golden_models(name, variant, act):
    case = GoldenCase("affnet", name)
    model = timm.create_model(variant, act_layer=act).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    case.compare("logits", model(case.inputs["x"]))  # with gradients on: nothing is done in place
    with torch.inference_mode():
        case.compare("logits", model(case.inputs["x"]))


@pytest.mark.parametrize(
    ("variant", "params"),
    [
        ("affnet_et", 1_436_264),
        ("affnet_t", 2_654_232),
        ("affnet", 5_568_696),
        ("affnet_base", 17_178_104),
        ("affnet_large", 46_068_088),
    ],
)
def test_parameter_counts(variant, params):
    assert sum(p.numel() for p in timm.create_model(variant, device="meta").parameters()) == params


@pytest.mark.parametrize(
    ("output_stride", "reductions"), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16, 16]), (8, [2, 4, 8, 8, 8])]
)
def test_features(output_stride, reductions):
    model = timm.create_model("affnet_et", features_only=True, output_stride=output_stride).eval()
    maps = model(torch.zeros(1, 3, 64, 96))
    assert model.feature_info.reduction() == reductions
    assert [tuple(m.shape) for m in maps] == [
        (1, width, 64 // r, 96 // r) for width, r in zip((32, 48, 64, 104, 144), reductions, strict=True)
    ]


def test_dilation_computes_the_same_at_the_old_positions():
    """A dilated network without filters and norms over space sees, at every second position, what the strided one sees."""
    strided, dilated = (
        tiny(use_filter=False, norm_layer="layer_norm", output_stride=s, widths=(8, 8, 16, 16, 24)) for s in (32, 16)
    )
    dilated.load_state_dict(strided.state_dict())
    strided.stages[4].blocks, dilated.stages[4].blocks = nn.Sequential(), nn.Sequential()
    x = torch.randn(1, 3, 64, 64)
    expected, actual = (m.forward_intermediates(x, intermediates_only=True)[-1] for m in (strided, dilated))
    torch.testing.assert_close(actual[..., ::2, ::2], expected)


def test_one_convolution_with_fixed_statistics_equals_two_steps():
    model = tiny().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.train()(x)  # moves the statistics
    model.eval()
    folded = model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = type("OtherNorm", (nn.BatchNorm2d,), {})  # takes the way of an unknown norm
    torch.testing.assert_close(model(x), folded)


def test_checkpointing_changes_no_gradient():
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_intermediates_stop_early_and_prune():
    model = tiny()
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    torch.testing.assert_close(final, model.forward_features(x))
    (third,) = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(third, maps[2])
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2
    torch.testing.assert_close(model.forward_intermediates(x, [1], intermediates_only=True)[0], maps[1])


def test_options():
    x = torch.randn(1, 3, 32, 32)
    model = tiny()
    without = tiny(use_filter=False)
    assert not any(isinstance(m, AFFMixer) for m in without.modules())
    other = tiny(fourier="matmul")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    assert tiny(drop_path_rate=0.2).stages[4].blocks[0].global_rep[0].drop_path.drop_prob == pytest.approx(0.2)
    assert tiny(in_chans=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_takes_a_training_checkpoint():
    model = tiny()
    wrapped = {"model_state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    other = tiny()
    other.load_state_dict(checkpoint_filter_fn(wrapped, other))
    with pytest.raises(ValueError, match="hidden_factor"):
        checkpoint_filter_fn(model.state_dict(), tiny(hidden_factor=2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"widths": (8, 8, 16, 20, 16)}, "dim=20, num_blocks=8; use num_blocks=5"),
        ({"widths": (8, 8, 16)}, "5 widths"),
        ({"output_stride": 4}, "8, 16 or 32"),
        ({"norm_layer": "batch_norm"}, "layer_norm_2d, layer_norm"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_rejects_inputs(shape):
    model = tiny()
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        model.forward_intermediates(torch.zeros(shape))


def test_rejects_layout_and_missing_weights():
    with pytest.raises(ValueError, match="NCHW"):
        tiny().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("affnet_et", pretrained=True)
