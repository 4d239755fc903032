"""MAFormer: the block by hand, sizes, other image sizes, checkpoints, bad input."""

import pytest
import timm
import torch

from tokenry.vision.maformer import MAFBlock, MAFormer, checkpoint_filter_fn

pytestmark = pytest.mark.method("maformer")

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5, "window_size": 4}


def test_block_is_its_equations():
    torch.manual_seed(0)
    block, x = MAFBlock(8, (6, 4), 2, window_size=3), torch.randn(2, 6, 4, 8)
    local = x + block.local(block.norm1(x))
    local = local + block.local_mlp(block.norm2(local))
    overview = block.gld.fc(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2) + block.gld.pos
    z = local + block.fusion(local.flatten(1, 2), overview).view(2, 6, 4, 8)
    torch.testing.assert_close(block(x), z + block.mlp(block.norm3(z)))


@pytest.mark.parametrize(
    ("variant", "params"),
    [("maformer_small", 24_017_874), ("maformer_base", 54_650_605), ("maformer_large", 102_440_668)],
)
def test_parameter_counts(variant, params):
    assert sum(p.numel() for p in timm.create_model(variant, device="meta").parameters()) == params


@torch.no_grad()
def test_another_image_size():
    torch.manual_seed(0)
    model = MAFormer(img_size=64, **TINY).eval()
    with pytest.raises(ValueError, match="made for images of 64x64 pixels, got 96x64"):
        model(torch.zeros(1, 3, 96, 64))
    model.set_input_size((96, 64))
    assert model(torch.zeros(1, 3, 96, 64)).shape == (1, 5)
    assert model.stages[0].blocks[0].gld.fc.weight.shape == (24 * 16 // 2, 24 * 16)
    assert model.stages[1].blocks[0].gld.fc.weight.shape == (12 * 8 // 2, 12 * 8)
    with pytest.raises(ValueError, match="multiple of 32"):
        model.set_input_size(100)


def test_no_weight_decay_on_positions():
    names = MAFormer(img_size=64, **TINY).no_weight_decay()
    assert (
        "stages.0.blocks.0.gld.pos" in names and "stages.1.blocks.0.local.rel_pos.relative_position_bias_table" in names
    )


def test_checkpoints():
    model = MAFormer(img_size=64, **TINY)
    state = {"model": {f"module.{k}": v for k, v in model.state_dict().items()}}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    other = MAFormer(img_size=96, **TINY)
    with pytest.raises(ValueError, match="of another shape"):
        checkpoint_filter_fn(other.state_dict(), model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 100}, "multiple of 32 in both directions, got 100x100"),
        ({"depths": (1, 1)}, "four stages"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        MAFormer(**{"img_size": 64, **TINY, **arguments})
