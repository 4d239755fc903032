"""CAS-ViT: golden cases, counts, two heads, merged norms, the detection form, checkpoints, bad input."""

import pytest
import timm
import torch
from torch import nn

from golden_case import GoldenCase
from tokenry.layers import ConvNorm, fuse_norm_conv
from tokenry.measure import count_macs
from tokenry.vision.cas_vit import VARIANTS, Block, CASViT, checkpoint_filter_fn, rename

pytestmark = pytest.mark.method("cas-vit")

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "num_classes": 10}


def tiny(**kwargs):
    torch.manual_seed(0)
    return CASViT(**{**TINY, **kwargs}).eval()


def trained(**kwargs):
    """A tiny model whose norms have seen images."""
    net = tiny(**kwargs).train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            net(torch.randn(4, 3, 64, 64))
    return net.eval()


def loaded(model, case):
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    return model


@pytest.mark.golden
def test_golden_block():
    case = GoldenCase("cas-vit", "block")
    block = Block(16).eval()
    inside = {rename(f"network.0.0.{name}"): value for name, value in case.state_dict().items()}
    block.load_state_dict({name.removeprefix("stages.0.blocks.0."): value for name, value in inside.items()})
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"]))
    with torch.no_grad():
        for module in block.modules():
            if hasattr(module, "fuse"):
                module.fuse()
        case.compare("y", block(case.inputs["x"]))


@pytest.mark.golden
def test_golden_tiny_in_evaluation():
    case = GoldenCase("cas-vit", "rcvit_tiny_eval")
    model = loaded(tiny(), case)
    case.compare("logits", model(case.inputs["x"]))
    case.compare("logits", model.fuse()(case.inputs["x"]))


@pytest.mark.golden
def test_golden_both_heads():
    case = GoldenCase("cas-vit", "rcvit_xs_train")
    model = loaded(timm.create_model("rcvit_xs"), case).train()
    model.set_distilled_training()
    head, dist_head = model(case.inputs["x"])
    case.compare("head", head)
    case.compare("dist_head", dist_head)
    assert count_macs(model.eval(), torch.zeros(1, 3, 224, 224)) == case.spec["macs"]


@pytest.mark.golden
def test_golden_one_head():
    case = GoldenCase("cas-vit", "rcvit_m_train_nodist")
    model = loaded(timm.create_model("cas_vit_m", distilled=False), case).train()
    case.compare("logits", model(case.inputs["x"]))


@pytest.mark.golden
def test_golden_detection_form():
    case = GoldenCase("cas-vit", "rcvit_s_features_train")
    net = timm.create_model("cas_vit_s", features_only=True, feature_norms=True)
    loaded(net.model, case)
    for i, found in enumerate(net.train()(case.inputs["x"])):
        case.compare(f"stage{i}", found[:, :8])


@pytest.mark.parametrize(
    ("size", "params", "single"),
    [
        ("xs", 3_200_700, 2_979_700),
        ("s", 5_764_224, 5_507_224),
        ("m", 12_421_520, 12_036_520),
        ("t", 21_763_120, 21_250_120),
    ],
)
def test_parameter_counts(size, params, single):
    for name in (f"cas_vit_{size}", f"rcvit_{size}"):
        for distilled, expected in ((True, params), (False, single)):
            model = timm.create_model(name, distilled=distilled, device="meta")
            assert sum(p.numel() for p in model.parameters()) == expected


def test_two_heads():
    net, x = tiny(), torch.randn(2, 3, 64, 64)
    first, second = net.get_classifier()
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(net(x), (first(pooled) + second(pooled)) / 2)
    assert net.train()(x).shape == (2, 10)  # a tensor in training too, unless asked for otherwise
    net.set_distilled_training()
    head, dist_head = net(x)
    assert head.shape == dist_head.shape == (2, 10)
    assert not torch.equal(head, dist_head)
    (head.sum() + dist_head.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 10)
    net.set_distilled_training(False)
    assert net.train()(x).shape == (2, 10)


def test_both_heads_are_replaced():
    net, x = tiny(), torch.randn(2, 3, 64, 64)
    net.reset_classifier(3)
    assert [layer.out_features for layer in net.get_classifier()] == [3, 3]
    net.set_distilled_training()
    assert [logits.shape for logits in net.train()(x)] == [(2, 3), (2, 3)]
    net.eval().reset_classifier(0)
    torch.testing.assert_close(net(x), net.forward_features(x).mean((2, 3)))
    assert isinstance(tiny(distilled=False).get_classifier(), nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True, "distilled": False}])
def test_fused_equals_unfused(kwargs):
    net, x = trained(**kwargs), torch.randn(2, 3, 75, 64)
    before, count = net(x), sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert net.fuse() is net
    after = net(x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert count == 2 + 3 + 4 * 5 + 1
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 1  # the closing norm, behind no convolution
    assert torch.equal(net.fuse()(x), after)


@torch.no_grad()
def test_timm_fuses_too():
    net, x = trained(), torch.randn(2, 3, 64, 64)
    fused = timm.utils.reparameterize_model(net)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 1


@torch.no_grad()
def test_features_are_normed_on_request():
    torch.manual_seed(0)
    net = timm.create_model("cas_vit_xs", features_only=True, feature_norms=True, **TINY).eval()
    x = torch.randn(2, 3, 64, 96)
    plain = net.model.forward_intermediates(x, intermediates_only=True)
    for i, found in enumerate(net(x)):
        torch.testing.assert_close(found, net.model.feature_norms[i](plain[i]))
    some = timm.create_model("cas_vit_xs", features_only=True, feature_norms=True, out_indices=(0, 1), **TINY)
    assert len(some.model.feature_norms) == len(some.model.stages) == 2
    without = timm.create_model("cas_vit_xs", features_only=True, **TINY)
    assert without.model.feature_norms is None


def test_stochastic_depth_grows_to_the_last_block():
    net = tiny(depths=(1, 2, 1, 1), drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in net.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@torch.no_grad()
def test_dropped_paths_leave_the_local_branch():
    block, x = Block(8, drop_path=0.999999).train(), torch.randn(4, 8, 5, 5)
    torch.manual_seed(0)
    y = block(x)
    torch.testing.assert_close(y, x + block.local(x))


def test_takes_wrapped_and_averaged_checkpoints():
    net, other = tiny(), tiny()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    older = {name: torch.zeros_like(value) for name, value in state.items()}
    for file in ({"model": state}, {"state_dict": state}, {"model": older, "model_ema": state}, state):
        for value in other.state_dict().values():
            value.zero_()
        other.load_state_dict(checkpoint_filter_fn(file, other))
        assert torch.equal(other.head.fc_dist.weight, net.head.fc_dist.weight)
        assert torch.equal(other.stem[0].conv.weight, net.stem[0].conv.weight)


def test_a_detection_form_starts_from_a_classifier():
    net = tiny()
    detector = timm.create_model("cas_vit_xs", features_only=True, feature_norms=True, **TINY).model
    state = checkpoint_filter_fn(net.state_dict(), detector)
    assert not any(name.startswith(("head.", "norm.")) for name in state)
    detector.load_state_dict(state)
    assert torch.equal(detector.stages[3].blocks[0].mlp.fc1.weight, net.stages[3].blocks[0].mlp.fc1.weight)
    assert (detector.feature_norms[0].weight == 1).all()
    with torch.no_grad():
        detector.feature_norms[0].weight.fill_(2.0)
    again = timm.create_model("cas_vit_xs", features_only=True, feature_norms=True, **TINY).model
    again.load_state_dict(checkpoint_filter_fn(detector.state_dict(), again))
    assert (again.feature_norms[0].weight == 2).all()


def test_a_model_without_classifier_takes_a_classifiers_weights():
    bare = tiny(num_classes=0)
    bare.load_state_dict(checkpoint_filter_fn(tiny().state_dict(), bare))


def test_a_file_of_the_authors_loads_through_timm(tmp_path):
    case = GoldenCase("cas-vit", "rcvit_tiny_eval")
    torch.save({"model": case.state_dict()}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    net = timm.create_model("cas_vit_xs", pretrained=True, pretrained_cfg_overlay=overlay, **TINY).eval()
    case.compare("logits", net(case.inputs["x"]))
    detector = timm.create_model(
        "cas_vit_xs",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        features_only=True,
        feature_norms=True,
        **TINY,
    )
    assert torch.equal(detector.model.stages[0].blocks[0].norm1.bias, net.stages[0].blocks[0].norm1.bias)


def test_refuses_other_checkpoints():
    with pytest.raises(
        ValueError, match=r"second head .* distilled=True, or leave out head.fc_dist.bias, head.fc_dist"
    ):
        checkpoint_filter_fn(tiny().state_dict(), tiny(distilled=False))
    with pytest.raises(ValueError, match="one head and the model two: make the model with distilled=False"):
        checkpoint_filter_fn(tiny(distilled=False).state_dict(), tiny())
    with torch.device("meta"):
        for heads in (True, False):
            small = CASViT(**VARIANTS["cas_vit_s"], distilled=heads)
            with pytest.raises(ValueError, match="looks like cas_vit_s: make the model"):
                checkpoint_filter_fn(small.state_dict(), CASViT(distilled=heads))


def test_a_single_small_training_image_is_explained():
    net, small = tiny().train(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"single training image of 32x32 .* two images or more"):
        net(small)
    assert net(torch.randn(1, 3, 32, 33)).shape == (1, 10)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert net.eval()(small).shape == (1, 10)
    frozen = tiny().train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert frozen(small).shape == (1, 10)


def test_rejects_small_images():
    with pytest.raises(ValueError, match="at least 32 pixels a side, got 31x64"):
        tiny()(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1), "dims": (8, 8, 8)}, r"one positive entry per stage, got \(1, 1\) and \(8, 8, 8\)"),
        ({"depths": (), "dims": ()}, "one positive entry per stage"),
        ({"depths": (1, 0, 1, 1)}, "one positive entry per stage"),
        ({"dims": (8, 0, 8, 8)}, "one positive entry per stage"),
        ({"dims": (1, 8, 8, 8)}, "at least 2 channels"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_rejects_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_one_head_has_no_distilled_training():
    with pytest.raises(ValueError, match="the model has one head; make it with distilled=True"):
        tiny(distilled=False).set_distilled_training()


def test_norms_merge_only_where_it_is_exact():
    with pytest.raises(ValueError, match=r"call .eval\(\) before .fuse"):
        tiny().train().fuse()
    norm = nn.BatchNorm2d(4).eval()
    for conv in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, groups=2)):
        with pytest.raises(ValueError, match="1x1 convolution without padding or groups"):
            fuse_norm_conv(norm, conv)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_and_its_norm(bias):
    torch.manual_seed(0)
    layer, x = ConvNorm(4, 6, 3, stride=2, groups=2, bias=bias).double(), torch.randn(3, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.norm(layer.conv(x)))  # in training; this moves the statistics
    layer.norm.bias.uniform_()
    layer.eval()
    expected = layer.norm(layer.conv(x))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.fuse()(x), expected)
