"""EfficientViM: golden cases, counts, the blend, the fusing head, checkpoints of the authors and of timm, bad input."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision import EfficientViM
from tokenry.vision.efficientvim import VARIANTS, Block, ResidualDepthwise, checkpoint_filter_fn

pytestmark = pytest.mark.method("efficientvim")

TINY = {"dims": (16, 24, 32), "depths": (1, 2, 1), "state_dims": (9, 4, 2), "num_classes": 7}


def drawn(module, seed=0):
    """The module with weights and statistics that are all away from their start, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise / (value.numel() / len(value)) ** 0.5 if value.ndim > 1 else 1 + 0.3 * noise)
    return module.eval()


def tiny(seed=0, **kwargs):
    return drawn(EfficientViM(**{**TINY, **kwargs}), seed)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.golden
@pytest.mark.parametrize(("case", "variant", "distillation"), [("m1_224", "m1", False), ("m2_dist_64", "m2", True)])
def test_golden(case, variant, distillation):
    case = GoldenCase("efficientvim", case)
    model = timm.create_model(f"tokenry_efficientvim_{variant}", distillation=distillation).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    x = case.inputs["x"]
    with torch.inference_mode():
        maps = model.forward_intermediates(x, intermediates_only=True)
        found = {f"stage{i}": m for i, m in enumerate(maps)}
        found |= {f"hidden{i}": h for i, h in enumerate(model.forward_features(x).hidden)}
        logits = model(x)
    compared = {"logits"}
    case.compare("logits", logits, tolerance=relative_to_deviation(case.outputs["logits"]))
    for name, value in found.items():
        case.compare_sample(name, value, tolerance=relative_to_deviation(case.outputs[f"{name}.slice"]))
        compared |= {f"{name}.slice", f"{name}.stat"}
    assert compared == set(case.outputs)
    assert count_macs(model, x[:1]) == case.spec["macs"]


def relative_to_deviation(expected):
    """A wrong gate moves the logits by a few percent alone: hold errors against the deviation, not the largest value."""
    return 1e-4 * (expected.std() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("variant", "distillation", "params"),
    [
        ("m1", False, 6_679_458),
        ("m1", True, 7_643_462),
        ("m2", True, 15_315_846),
        ("m3", False, 16_604_174),
        ("m4", False, 19_606_505),
    ],
)
def test_parameter_counts(variant, distillation, params):
    model = timm.create_model(f"tokenry_efficientvim_{variant}", distillation=distillation, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


def test_the_start_is_an_even_blend_and_a_small_head():
    model = timm.create_model("tokenry_efficientvim_m1")
    block = model.stages[0].blocks[0]
    torch.testing.assert_close(block.alpha.sigmoid(), torch.full((4, 128), 0.500025))
    assert all((n.weight == 1).all() for n in model.modules() if isinstance(n, nn.BatchNorm2d))
    assert all(fc.weight.std().item() == pytest.approx(0.02, rel=0.1) and not fc.bias.any() for fc in model.head.fc)
    assert block.mixer.A.min() >= 1 and block.mixer.A.max() <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_folded_depthwise_convolution_is_the_residual(dtype):
    layer = drawn(ResidualDepthwise(6)).to(dtype)
    x, gain = images(2, 6, 5, 7).to(dtype), torch.rand(6, dtype=dtype)
    inner = layer.norm(layer.conv(x))
    torch.testing.assert_close(layer(x), x + inner, rtol=1e-5, atol=1e-5)
    given = [gain.clone().requires_grad_() for _ in range(2)]
    folded, share = layer(x, given[0]), given[1][:, None, None]
    plain = (1 - share) * x + share * inner
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), g)[0] for y, g in zip((folded, plain), given, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_in_training_the_norm_sees_the_batch():
    layer = ResidualDepthwise(6).train()
    x = images(2, 6, 5, 7)
    expected = x + F.batch_norm(layer.conv(x), None, None, layer.norm.weight, layer.norm.bias, training=True)
    torch.testing.assert_close(layer(x), expected)
    assert layer.norm.num_batches_tracked == 1


def test_alpha_closes_and_opens_the_branches():
    block, x = drawn(Block(8, 4)), images(2, 8, 5, 7)
    with torch.no_grad():
        block.alpha.fill_(-torch.inf)
        assert torch.equal(block(x)[0], x)
        block.alpha[3].fill_(torch.inf)
        torch.testing.assert_close(block(x)[0], block.ffn(x))  # the residual is scaled too: nothing of x is left
        block.alpha[3].fill_(-torch.inf)
        block.alpha[1].fill_(torch.inf)
        torch.testing.assert_close(block(x)[0], block.mixer(block.norm(x)))


@pytest.mark.parametrize("size", [(96, 160), (16, 16), (17, 33), (16, 200)])
@torch.no_grad()
def test_any_size_from_16_pixels(size):
    net, x = tiny(), images(1, 3, *size)
    maps = net.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // r) for side in size) for r in (16, 32, 64)]
    torch.testing.assert_close(net(x.transpose(2, 3)), transposed(net)(x), rtol=1e-3, atol=1e-4)


def transposed(net):
    """The network with every kernel turned, which sees a turned image as the first saw the image."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
    return net


@torch.no_grad()
def test_the_head_is_the_learned_mean_of_all_stages():
    net, x = tiny(), images(2, 3, 64, 96)
    features, head = net.forward_features(x), net.head
    assert [tuple(h.shape) for h in features.hidden] == [(2, 16, 9), (2, 24, 4), (2, 32, 2)]
    shares = head.weights.exp() / head.weights.exp().sum()
    expected = shares[3] * head.fc[3](features.map.mean((2, 3)))
    for i, h in enumerate(features.hidden):
        mean, variance = h.mean(1, keepdim=True), h.var(1, keepdim=True, correction=0)
        norm = head.norms[i]
        normed = (h - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
        expected += shares[i] * head.fc[i](normed.mean(2))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    head.weights.copy_(torch.tensor([-torch.inf] * 3 + [0.0]))  # fusion off
    torch.testing.assert_close(net(x), head.fc[3](features.map.mean((2, 3))))


@torch.no_grad()
def test_distillation_gives_a_pair_in_training_and_its_mean_in_evaluation():
    net, x = tiny(distillation=True), images(2, 3, 64, 64)
    mean = net(x)
    net.head.training = True  # the norms stay as they are
    first, second = net(x)
    torch.testing.assert_close(mean, (first + second) / 2)
    assert (first - second).abs().max() > 0.1
    pair = net.train().distillation_logits(x)
    assert [tuple(z.shape) for z in pair] == [(2, 7), (2, 7)]
    net.reset_classifier(3)
    assert [tuple(z.shape) for z in net(x)] == [(2, 3), (2, 3)]


def test_both_heads_learn():
    net = EfficientViM(**TINY, distillation=True).train()
    first, second = net(images(2, 3, 64, 64))
    (F.cross_entropy(first, torch.tensor([0, 1])) + F.cross_entropy(second, torch.tensor([2, 3]))).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.rsplit(".", 1)[-1] for name in without} == {"A"}


@pytest.mark.parametrize("distillation", [False, True])
@torch.no_grad()
def test_timms_weights_give_timms_logits(distillation):
    name = "efficientvim_m1_dist" if distillation else "efficientvim_m1"
    small = {"embed_dim": TINY["dims"], "depths": TINY["depths"], "state_dim": TINY["state_dims"], "num_classes": 7}
    theirs = drawn(timm.create_model(name, **small))
    ours = EfficientViM(**TINY, distillation=distillation).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    x = images(2, 3, 80, 112)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_timms_own_names_stay_timms():
    assert type(timm.create_model("efficientvim_m1", device="meta")).__module__ == "timm.models.efficientvim"


@torch.no_grad()
def test_checkpoints_of_all_kinds_load():
    net, x = tiny(), images(1, 3, 64, 64)
    state = net.state_dict()
    others = {
        "plain": state,
        "wrapped": {"model": state, "epoch": 3},
        "averaged": {"model": tiny(1).state_dict(), "model_ema": state},
        "parallel": {f"module.{name}": value for name, value in state.items()},
    }
    for kind, checkpoint in others.items():
        other = EfficientViM(**TINY).eval()
        other.load_state_dict(checkpoint_filter_fn(checkpoint, other))
        assert torch.equal(other(x), net(x)), kind
    bare = EfficientViM(**{**TINY, "num_classes": 0}).eval()
    bare.load_state_dict(checkpoint_filter_fn(state, bare))
    assert torch.equal(bare(x), net.forward_head(net.forward_features(x), pre_logits=True))


def test_without_classes_every_trainable_parameter_is_used():
    for net in (
        EfficientViM(**{**TINY, "num_classes": 0}),
        timm.create_model("tokenry_efficientvim_m1", features_only=True),
    ):
        outputs = net.train()(images(2, 3, 96, 96))
        sum(y.sum() for y in (outputs if isinstance(outputs, list) else [outputs])).backward()
        assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    net = EfficientViM(**{**TINY, "num_classes": 0})
    net.reset_classifier(5)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        name for name, _ in net.named_parameters() if name.endswith("mixer.A")
    }


def test_released_names_of_the_squeeze_excite():
    """The released files were written with an older timm, whose layers have other names."""
    case = GoldenCase("efficientvim", "m1_224")
    model = timm.create_model("tokenry_efficientvim_m1", device="meta")
    old = {
        name.replace("conv.2.fc1", "conv.2.conv_reduce").replace("conv.2.fc2", "conv.2.conv_expand"): value
        for name, value in case.state_dict().items()
    }
    state = checkpoint_filter_fn(old, model)
    assert torch.equal(state["stages.2.downsample.se.fc1.weight"], old["stages.1.downsample.conv.2.conv_reduce.weight"])


def test_a_checkpoint_of_another_kind_is_refused_by_name():
    plain, distilled = (
        timm.create_model("tokenry_efficientvim_m1", distillation=d, device="meta") for d in (False, True)
    )
    with pytest.raises(ValueError, match=r"head\.weights_dist, head\.fc_dist\.0\.weight.*distillation=True"):
        checkpoint_filter_fn(distilled.state_dict(), plain)
    with pytest.raises(ValueError, match="looks like tokenry_efficientvim_m1"):
        checkpoint_filter_fn(plain.state_dict(), distilled)
    for variant in set(VARIANTS) - {"tokenry_efficientvim_m1"}:
        other = timm.create_model(variant, distillation=True, device="meta").state_dict()
        with pytest.raises(ValueError, match=f"looks like {variant}"):
            checkpoint_filter_fn(other, distilled)


@torch.no_grad()
def test_bfloat16_stays_near():
    net, x = tiny(), images(2, 3, 64, 96)
    exact = net(x)
    assert (net.bfloat16()(x.bfloat16()).float() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_small_images_take_a_smaller_stem():
    net, x = tiny(stem_stride=4), images(2, 3, 32, 32)
    assert net.feature_info[-1]["reduction"] == 16 and net(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_dims": (9, 0, 2)}, "state_dim=0"),
        ({"depths": (1, 1)}, "one positive entry per stage"),
        ({"depths": (1, 0, 1)}, "one positive entry per stage"),
        ({"stem_stride": 12}, "power of two"),
        ({"dims": (4, 8, 16)}, "twice the first width 4"),
        ({"global_pool": "max"}, "global_pool must be 'avg'"),
        ({"global_pool": ""}, "with num_classes=7"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_rejects_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientViM(**{**TINY, **arguments})


def test_rejects_images():
    net = tiny()
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 15x64"):
        net(images(1, 3, 15, 64))
    with pytest.raises(ValueError, match="more than 64 pixels, or call .eval"):
        net.train()(images(1, 3, 64, 48))
    assert net(images(1, 3, 64, 65)).shape == (1, 7)


def test_rejects_a_pair_where_there_is_none():
    with pytest.raises(ValueError, match="distillation=True"):
        tiny().train().distillation_logits(images(2, 3, 64, 64))
    with pytest.raises(ValueError, match="averaged to one"):
        tiny(distillation=True).distillation_logits(images(2, 3, 64, 64))
    net = tiny()
    with pytest.raises(ValueError, match="3 stages, got those of 0"):
        net.forward_head(net.forward_features(images(2, 3, 64, 64)).map)
