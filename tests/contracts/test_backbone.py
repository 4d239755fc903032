"""What every backbone keeps, tested for each entry of ``BACKBONES``: tiny forms of the registered models.

A new backbone gets these tests by being listed.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenry.vision  # registers the models
from tokenry.catalog import cards

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 32, 32), "img_size": 64}
AFF: dict[str, Any] = {"widths": (8, 8, 16, 16, 16), "depths": (1, 1, 1, 1, 1), "expand_ratio": 2.0}


@dataclass(frozen=True)
class Tiny:
    """A small form of a registered model.

    Attributes:
        slug: Its card.
        arguments: What makes it small.
        sizes: ``"any"``; ``"fixed"`` (``img_size`` alone); or the number that both sides must be multiples of.
        side: Side of the images in these tests; a multiple of ``sizes``.
        mobile: Whether it is exported to ONNX and run with onnxruntime.
        tokens: Whether features before pooling are tokens (B, N, C), as of timm's plain transformers, and not maps.
    """

    slug: str
    arguments: dict[str, Any] = field(default_factory=dict)
    sizes: int | str = "any"
    side: int = 64
    mobile: bool = False
    tokens: bool = False


# One line per backbone: registered name -> its small form.
BACKBONES: dict[str, Tiny] = {
    "poolformer_s12_exact": Tiny("poolformer", SMALL),
    "metaformer_pppa_s12_224": Tiny("poolformer", SMALL, "fixed"),
    "identityformer_s12": Tiny("metaformer-baselines", SMALL),
    "randformer_s12": Tiny("metaformer-baselines", SMALL, "fixed"),
    "affnet_t": Tiny("affnet", AFF),
    "cas_vit_xs": Tiny("cas-vit", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}, mobile=True),
    "tokenry_efficientvim_m1": Tiny(
        "efficientvim", {"dims": (16, 24, 32), "depths": (1, 2, 1), "state_dims": (9, 4, 2)}, mobile=True
    ),
    "gcvit_tiny2": Tiny(
        "gc-vit", {"depths": (2, 2, 2, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "img_size": 64}, "fixed"
    ),
    "stvit_small": Tiny(
        "stvit", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3), "head_width": 32}
    ),
    "stvit_r_swin_small": Tiny("stvit-r", {"depths": (1, 2, 6, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4)}),
    "stvit_r_swin_small_dense": Tiny(
        "stvit-r",
        {
            "depths": (1, 2, 6, 1),
            "embed_dim": 8,
            "num_heads": (1, 2, 2, 4),
            "window": 3,
            "samples": 2,
            "surroundings": (4, 5, 4),
            "feature_norms": False,
        },
    ),
    "stvit_deit_tiny": Tiny(
        "stvit-r",
        {"img_size": 64, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 5, "full_depth": 1},
        "fixed",
    ),
    "hrvmamba_nano": Tiny(
        "hrvmamba",
        {"width": 8, "stem_width": 8, "modules": (1, 1, 1), "blocks": 1, "neck_width": 4, "drop_path_rate": 0.0},
        32,
    ),
    "transnext_micro": Tiny(
        "transnext",
        {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3), "sr_ratios": (4, 4, 2, 1)},
    ),
    "uniformer_small": Tiny(
        "uniformer", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "head_dim": 8}, sizes=32, mobile=True
    ),
    "uniformer_xxs": Tiny("uniformer", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "head_dim": 8}, sizes=32),
    "dualtoken_vit_tiny": Tiny(
        "dualtoken-vit",
        {"depths": (1, 1, 1), "dims": (8, 12, 16), "num_heads": (1, 2, 2), "mlp_ratios": (2, 2, 2), "grid": 2},
        mobile=True,
    ),
    "maformer_small": Tiny(
        "maformer", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32), "img_size": 64, "window_size": 4}, "fixed"
    ),
    "sgformer_s": Tiny(
        "sg-former",
        {"depths": (2, 2, 2, 1), "dims": (8, 8, 16, 24), "num_heads": (2, 2, 4, 3), "pos_size": 16},
    ),
    "t2t_vit_7": Tiny(
        "t2t-vit",
        {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2, "token_dim": 8},
        "fixed",
        mobile=True,
        tokens=True,
    ),
    "t2t_vit_t_14": Tiny(
        "t2t-vit",
        {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2, "token_dim": 8},
        "fixed",
        tokens=True,
    ),
    "vim2_tiny": Tiny(
        "mambamixer",
        {"depths": (2, 1, 2, 1), "dims": (8, 8, 16, 16), "d_state": 4, "channel_width": 64, "img_size": 64},
        "fixed",
    ),
    "ms_mlp_tiny": Tiny("ms-mlp", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}, 32),
}
MIXED = {"token_mixers": ("aff", "sep_conv", "pool", "attention"), "head": "mlp", **SMALL}


def make(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    if name == "metaformer":
        return tokenry.vision.metaformer(**{"num_classes": 5, **MIXED, **kwargs})
    return timm.create_model(name, **{"num_classes": 5, **BACKBONES[name].arguments, **kwargs})


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.method(tiny.slug)) for n, tiny in BACKBONES.items()]
    + [pytest.param("metaformer", marks=pytest.mark.method("metaformer-baselines"))]
)
def name(request) -> str:
    return request.param


def tiny(name: str) -> Tiny:
    return BACKBONES.get(name, Tiny("metaformer-baselines", MIXED))


def side(name: str) -> int:
    return tiny(name).side


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_forward_is_head_of_features(name, batch):
    net, x = make(name).eval(), images(batch, 3, side(name), side(name))
    y = net(x)
    assert y.shape == (batch, 5) and y.isfinite().all()
    torch.testing.assert_close(net.forward_head(net.forward_features(x)), y)
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (batch, net.head_hidden_size)


@torch.no_grad()
def test_other_sizes(name):
    sizes, size = tiny(name).sizes, side(name)
    if sizes == "any":
        assert make(name).eval()(images(2, 3, size + 11, size + 32)).shape == (2, 5)
    elif sizes == "fixed":
        with pytest.raises(ValueError, match="img_size"):
            make(name).eval()(images(2, 3, 75, 96))
        wide = (size, 2 * size)
        assert make(name, img_size=wide).eval()(images(2, 3, *wide)).shape == (2, 5)
    else:
        with pytest.raises(ValueError, match=f"multiples of {sizes}"):
            make(name).eval()(images(2, 3, size + 11, size + sizes))
        assert make(name).eval()(images(2, 3, size, size + sizes)).shape == (2, 5)


@torch.no_grad()
def test_batch_entries_are_independent(name):
    net, x = make(name).eval(), images(3, 3, side(name), side(name))
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_is_deterministic(name):
    x = images(2, 3, side(name), side(name))
    assert torch.equal(make(name).eval()(x), make(name).eval()(x))


def test_every_trainable_parameter_gets_a_gradient(name):
    net = make(name).train()
    outputs = net(images(2, 3, side(name), side(name)))  # a tuple where a head is for training alone
    sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    missing = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_gradient_checkpointing_changes_nothing(name):
    plain, saving = make(name).eval(), make(name).eval()
    saving.set_grad_checkpointing(True)
    for net in (plain, saving):
        net(images(2, 3, side(name), side(name))).square().sum().backward()
    for (key, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=key)


@torch.no_grad()
def test_bfloat16_and_channels_last(name):
    net, x = make(name).eval(), images(2, 3, side(name), side(name))
    exact = net(x)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), exact, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x).float() - exact).abs().max() <= 0.1 * exact.abs().max() + 1e-2


@torch.no_grad()
def test_save_and_load(name, tmp_path):
    net, x = make(name).eval(), images(2, 3, side(name), side(name))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.manual_seed(1)
    other = make(name).eval()
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(net(x), other(x))


@torch.no_grad()
def test_features_only(name):
    net = make(name, features_only=True).eval()
    maps = net(images(1, 3, side(name), side(name)))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [-(-side(name) // reduction) for reduction in net.feature_info.reduction()] == [m.shape[2] for m in maps]
    last = make(name, features_only=True, out_indices=(1, 2)).eval()(images(1, 3, side(name), side(name)))
    assert len(last) == 2
    torch.testing.assert_close(last[0], maps[1])


@torch.no_grad()
def test_forward_intermediates(name):
    net, x = make(name).eval(), images(1, 3, side(name), side(name))
    last, maps = net.forward_intermediates(x, indices=2)
    assert len(maps) == 2 and last.ndim == (3 if tiny(name).tokens else 4)
    first = net.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(first) == 1
    torch.testing.assert_close(first[0], net.forward_intermediates(x, intermediates_only=True)[0])


@torch.no_grad()
def test_classifier_can_be_changed(name):
    net, x = make(name).eval(), images(1, 3, side(name), side(name))
    net.reset_classifier(7)
    assert net(x).shape == (1, 7) and isinstance(net.get_classifier(), nn.Module) and net.num_classes == 7
    net.reset_classifier(0)
    assert net(x).shape == (1, net.num_features)
    net.reset_classifier(0, "")
    assert net(x).ndim == (3 if tiny(name).tokens else 4)
    assert make(name, num_classes=0).eval()(x).shape == (1, net.num_features)


@torch.no_grad()
def test_other_channels(name):
    assert make(name, in_chans=1).eval()(images(1, 1, side(name), side(name))).shape == (1, 5)


@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    net, x = make(name).eval(), images(2, 3, side(name), side(name))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's exporter about torch itself
@pytest.mark.parametrize("name", [n for n, entry in BACKBONES.items() if entry.mobile])
@torch.no_grad()
def test_runs_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net, x = make(name).eval(), images(1, 3, side(name), side(name))
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x), rtol=1e-3, atol=1e-4)


def test_meta_device(name):
    assert all(p.is_meta for p in make(name, device="meta").parameters())


def test_wrong_input(name):
    for shape in ((1, 4), (3,), (1, 3, 2)):  # four channels, no batch, a clip
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            make(name)(images(*shape, side(name), side(name)))


@torch.no_grad()
def test_without_classes_takes_a_classifiers_checkpoint(name):
    whole, headless = make(name), make(name, num_classes=0)
    module = sys.modules[type(headless).__module__]
    convert = getattr(module, "checkpoint_filter_fn", tokenry.vision.checkpoint_filter_fn)
    headless.load_state_dict(convert(whole.state_dict(), headless))
    x = images(1, 3, side(name), side(name))
    torch.testing.assert_close(headless.eval().forward_features(x), whole.eval().forward_features(x))


def test_timm_lists_what_the_cards_name():
    named = [model for card in cards().values() for model in card.models]
    assert set(named) <= set(timm.list_models())
    for model in named:
        assert timm.get_pretrained_cfg(model).input_size[0] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1), "dims": (8,)}, "one positive entry per stage"),
        ({"dims": (8, 16), "depths": (1, 1), "layer_scale": [1.0]}, "layer_scale has 1 entries for 2 stages"),
        ({"norm": "batch"}, "norm must be 'layer'"),
        ({"act": "swish"}, "act must be one of"),
        ({"head": "big"}, "head must be 'linear' or 'mlp'"),
        ({"img_size": 2}, "leaves nothing for stage"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"global_pool": "max"}, "global_pool must be 'avg'"),
        ({"mixer_kwargs": {"window": 3}}, "takes no window"),
    ],
)
@pytest.mark.method("metaformer-baselines")
def test_metaformer_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenry.vision.metaformer(**arguments)
