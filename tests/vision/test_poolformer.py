"""PoolFormer: the pooling and spatial mixers, the block, the models, against the authors' outputs and the equations."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenry.vision  # registers the models
from golden_case import GoldenCase
from tokenry.mixers import PoolingMixer, SpatialFCMixer
from tokenry.vision import MetaFormerBlock, load_checkpoint, metaformer, poolformer

pytestmark = pytest.mark.method("poolformer")


def slow_pooling(x: torch.Tensor, k: int) -> torch.Tensor:
    """The equation, one position at a time."""
    out, r = torch.zeros_like(x), k // 2
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = x[:, :, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1]
            out[:, :, i, j] = window.mean((2, 3)) - x[:, :, i, j]
    return out


@pytest.mark.golden
@pytest.mark.parametrize(("name", "pool_size"), [("pooling_mixer", 3), ("pooling_mixer_k5", 5)])
def test_golden_mixer(name, pool_size):
    case = GoldenCase("poolformer", name)
    for key, x in case.inputs.items():
        case.compare("y" if key == "x" else key, PoolingMixer(pool_size=pool_size)(x))


@pytest.mark.golden
def test_golden_block():
    case = GoldenCase("poolformer", "block")
    from tokenry.layers import GroupNorm1

    block = MetaFormerBlock(16, PoolingMixer(), GroupNorm1, layer_scale=1e-5)
    weights = {k.replace("layer_scale_", "layer_scale"): v for k, v in case.state_dict().items()}
    own = {k: v.shape for k, v in block.state_dict().items()}
    block.load_state_dict({k: v.reshape(own[k]) for k, v in weights.items()})
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    case.compare("y", block(case.inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("poolformer_s12_64", "poolformer_s12_exact"),
        ("poolformer_m36_96", "poolformer_m36_exact"),
        ("metaformer_ppff_s12_224", "metaformer_ppff_s12_224"),
        ("metaformer_ppaa_s12_224", "metaformer_ppaa_s12_224"),
    ],
)
@torch.no_grad()
def test_golden_model(name, model):
    case = GoldenCase("poolformer", name)
    net = load_checkpoint(timm.create_model(model).eval(), case.state_dict())
    assert sum(p.numel() for p in net.parameters()) == case.spec["params"]
    case.compare("logits", net(case.inputs["x"]))


@pytest.mark.golden
@torch.no_grad()
def test_golden_features():
    case = GoldenCase("poolformer", "poolformer_s12_features")
    net = poolformer("s12", features_only=True, feature_norms=True).eval()
    load_checkpoint(net, case.state_dict())
    assert sum(p.numel() for p in net.parameters()) == case.spec["params"]
    for i, feature in enumerate(net(case.inputs["x"])):
        case.compare(f"stage{i}", feature[:, :8])


@torch.no_grad()
def test_timm_stages_are_the_authors_and_its_head_is_not():
    case = GoldenCase("poolformer", "poolformer_s12_64")
    exact = load_checkpoint(poolformer("s12").eval(), case.state_dict())
    theirs = load_checkpoint(timm.create_model("poolformer_s12").eval(), case.state_dict())
    x = case.inputs["x"]
    torch.testing.assert_close(exact.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)
    assert (exact(x) - theirs(x)).abs().max() > 1e-4


PARAMETERS = {
    "poolformer_s12_exact": 11_915_176, "poolformer_s24_exact": 21_388_968, "poolformer_s36_exact": 30_862_760,
    "poolformer_m36_exact": 56_172_520, "poolformer_m48_exact": 73_473_448, "metaformer_id_s12": 11_915_176,
    "metaformer_pppa_s12_224": 14_038_440, "metaformer_ppaa_s12_224": 16_535_592,
    "metaformer_pppf_s12_224": 11_919_978, "metaformer_ppff_s12_224": 12_150_474,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    net = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@given(h=st.integers(1, 9), w=st.integers(1, 9), k=st.sampled_from([1, 3, 5]))
def test_matches_the_equation(h, w, k):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h * 10 + w))
    torch.testing.assert_close(PoolingMixer(pool_size=k)(x), slow_pooling(x, k))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(PoolingMixer(pool_size=k)(channels_last), slow_pooling(x, k))


def test_gradient():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PoolingMixer(), (x,))


def test_symmetries():
    x, mixer = torch.randn(2, 3, 9, 11), PoolingMixer()
    assert mixer(torch.full((1, 2, 5, 4), 3.0)).abs().max() == 0  # also at the border: only real positions count
    torch.testing.assert_close(mixer(x.flip(-1)), mixer(x).flip(-1))
    torch.testing.assert_close(mixer(x.roll(2, -1))[..., 4:-4], mixer(x).roll(2, -1)[..., 4:-4])


def test_spatial_fc_is_one_matrix_for_all_channels():
    mixer, x = SpatialFCMixer(num_tokens=6), torch.randn(2, 6, 5)
    expected = torch.einsum("mn,bnc->bmc", mixer.fc.weight, x)
    torch.testing.assert_close(mixer(x), expected)


@torch.no_grad()
def test_layer_scale_zero_leaves_the_convolutions_alone():
    net = metaformer(
        "pool", (1, 2), (8, 16), 3, 32, norm="group1", layer_scale=0.0, res_scale=None, embed_norm=False
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.forward_features(x), net.stages[1].downsample(net.stem(x)))


def test_layer_scale_and_initial_values():
    net = poolformer("s12")
    block = net.stages[0].blocks[0]
    assert block.layer_scale1.unique().tolist() == [pytest.approx(1e-5)]
    assert poolformer("s36", device="meta").stages[0].blocks[0].res_scale1 is None
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.stem.conv.bias.abs().max() > 0  # torch's own initialisation of the embeddings


def test_drop_path_grows_over_all_blocks():
    net = timm.create_model("poolformer_s12_exact", drop_path_rate=0.11, device="meta")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in net.stages for b in s.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize("pool_size", [0, -1, 2, 4])
def test_rejects_even_windows(pool_size):
    with pytest.raises(ValueError, match="odd and positive"):
        PoolingMixer(8, pool_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: poolformer("s13"), "size must be one of"),
        (lambda: poolformer("s12", pool_size=2), "odd and positive"),
        (lambda: SpatialFCMixer(num_tokens=0), "at least 1"),
        (lambda: SpatialFCMixer(num_tokens=4)(torch.zeros(1, 5, 2)), "made for 4 tokens"),
        (lambda: tiny_pos()(torch.zeros(1, 3, 64, 64)), "position map"),
        (lambda: poolformer("s12", device="meta")(torch.zeros(1, 3, 31, 40, device="meta")), "at least 32 pixels"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


tiny_pos = partial(metaformer, ("pool", "attention"), (1, 1), (8, 32), 2, 32, pos_embed=(1,))


def test_reset_classifier_works():
    net = tiny_pos()
    net.reset_classifier(7)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert tokenry.vision.metaformer is metaformer
