"""ViM2: counts, the joining of its blocks, image sizes, checkpoints, bad input."""

import pytest
import timm
import torch

from tokenry.measure import count_macs
from tokenry.mixers import SelectiveChannelMixer
from tokenry.vision import ViM2
from tokenry.vision.vim2 import VARIANTS, checkpoint_filter_fn

pytestmark = pytest.mark.method("mambamixer")

TINY = {"depths": (2, 3), "dims": (8, 12), "num_classes": 5, "img_size": 32, "d_state": 2}


def tiny(**kwargs):
    torch.manual_seed(0)
    net = ViM2(**{**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("variant", "params"), [("vim2_tiny", 22_714_016), ("vim2_small", 39_275_108), ("vim2_base", 63_386_180)]
)
def test_parameter_counts(variant, params):
    assert sum(p.numel() for p in timm.create_model(variant, device="meta").parameters()) == params
    assert set(VARIANTS) == {"vim2_tiny", "vim2_small", "vim2_base"}


def test_multiply_accumulates_of_a_token_mixer():
    """Maps in and out, convolution, maps of the four S6; the scan itself counts nothing."""
    mixer, x = tiny().stages[0].blocks[0].token_mixer, images(1, 8, 4, 4)
    inner, rank, states, places = 16, 1, 2, 16
    per_place = 3 * 8 * inner + 9 * inner + 4 * (inner * (rank + 2 * states) + rank * inner)
    assert count_macs(mixer, x) == places * per_place


@pytest.mark.parametrize("average", [True, False])
@torch.no_grad()
def test_a_stage_is_the_learned_sums_of_its_blocks(average):
    stage, x = tiny(average=average).stages[1], images(2, 8, 8, 8)
    v = stage.downsample(x)
    if average:
        a, b, th, g = (getattr(stage.average, name) for name in ("alpha", "beta", "theta", "gamma"))
        t, c = [v], [v]
        for i, block in enumerate(stage.blocks):
            into = sum(a[i][j] * t[j] + b[i][j] * c[j] for j in range(i + 1))
            t.append(block.token_mixer(block.norm1(into)))
            into = sum(th[i][j] * t[j] for j in range(i + 2)) + sum(g[i][j] * c[j] for j in range(i + 1))
            mixed = into
            if block.channel_mixer is not None:
                tokens = block.norm2(into).permute(0, 2, 3, 1).flatten(1, 2)
                mixed = block.channel_mixer(tokens).unflatten(1, into.shape[2:]).permute(0, 3, 1, 2)
            c.append(mixed)
        v = c[-1]
    else:
        for block in stage.blocks:
            v = block(v)
    torch.testing.assert_close(stage(x), v, rtol=1e-4, atol=1e-5)


def test_channel_mixers_stand_after_every_second_token_mixer():
    net = timm.create_model("vim2_tiny", device="meta")
    for stage, depth in zip(net.stages, (2, 2, 6, 2), strict=True):
        assert [block.channel_mixer is not None for block in stage.blocks] == [False, True] * (depth // 2)
    mixers = [stage.blocks[1].channel_mixer for stage in net.stages]
    assert all(isinstance(mixer, SelectiveChannelMixer) for mixer in mixers)
    assert [mixer.fixed_tokens for mixer in mixers] == [3136, 784, 196, 49]
    assert [mixer.gate_proj.in_features for mixer in mixers] == [196, 196, 196, 49]
    whole = timm.create_model("vim2_tiny", device="meta", channel_width=0)
    assert whole.stages[0].blocks[1].channel_mixer.gate_proj.in_features == 3136


@torch.no_grad()
def test_other_sizes_are_made_not_resized():
    assert tiny(img_size=(32, 64))(images(1, 3, 32, 64)).shape == (1, 5)
    assert tiny(patch_size=8)(images(1, 3, 32, 32)).shape == (1, 5)
    for kind in ("mlp", "none"):
        assert tiny(channel_mixer=kind)(images(1, 3, 32, 32)).shape == (1, 5)


def test_stochastic_depth_leaves_averaged_channel_mixers_alone():
    def rates(average):
        net = ViM2(**TINY, drop_path_rate=0.4, average=average, device="meta")
        blocks = [block for stage in net.stages for block in stage.blocks]
        return [[getattr(b.get_submodule(f"drop_path{i}"), "drop_prob", 0.0) for b in blocks] for i in (1, 2)]

    assert rates(False) == [pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])] * 2
    assert rates(True) == [pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]), [0.0] * 5]


def test_weight_decay_leaves_rates_and_sums_alone():
    names = tiny().no_weight_decay()
    assert "stages.0.blocks.0.token_mixer.A_log" in names and "stages.1.average.theta.2" in names
    assert "stages.0.blocks.1.channel_mixer.ssm_b.A_log" in names
    assert not [name for name in names if name.endswith(".weight")]


def test_checkpoints():
    net = tiny()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    assert set(checkpoint_filter_fn({"state_dict_ema": state}, net)) == set(net.state_dict())
    other = timm.create_model("vim2_base", device="meta").state_dict()
    with pytest.raises(ValueError, match=r"timm.create_model\('vim2_base'\)"):
        checkpoint_filter_fn({"model": other}, timm.create_model("vim2_tiny", device="meta"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ViM2((1, 1), (8,)), "one positive entry per stage"),
        (lambda: ViM2(**{**TINY, "img_size": 36}), "must be a multiple of 8"),
        (lambda: ViM2(**TINY, channel_mixer="attention"), "one of selective, mlp, none"),
        (lambda: ViM2(**TINY, channel_width=-1), "channel_width must be 0"),
        (lambda: tiny()(images(1, 3, 64, 64)), "made for images of 32x32 pixels, got 64x64"),
        (lambda: tiny()(images(1, 3, 4, 32, 32)), "five dimensions"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
