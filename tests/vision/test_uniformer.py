"""UniFormer: golden models, counts, token labelling, detection form, token pruning, checkpoints, bad input."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.mixers import WindowMHRA
from tokenry.vision import UniFormer, UniFormerLight, uniformer_light
from tokenry.vision.token_labeling import TokenLabels, swap_box
from tokenry.vision.uniformer import checkpoint_filter_fn
from tokenry.vision.uniformer_blocks import GlobalBlock
from tokenry.vision.uniformer_light import Guided, PrunedBlock, pool_guide

pytestmark = pytest.mark.method("uniformer")

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "head_dim": 8, "num_classes": 5}


def tiny(kind=UniFormer, seed=0, **kwargs):
    torch.manual_seed(seed)
    return kind(**{**TINY, **kwargs}).eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def filter_of(name):
    return uniformer_light.checkpoint_filter_fn if name in uniformer_light.VARIANTS else checkpoint_filter_fn


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case_name", "name", "macs_side", "more"),
    [
        ("uniformer_small_64", "uniformer_small", 64, 0),
        ("uniformer_small_plus_train", "uniformer_small_plus", 224, 0),
        ("uniformer_small_tl_64", "uniformer_small_tl", None, 0),
        # what the authors take from the whole attention matrix, and the mean of the dropped tokens, are products here
        ("uniformer_xxs_96", "uniformer_xxs", 224, 224_224 + 351_232),
        ("uniformer_xs_64", "uniformer_xs", None, 0),
    ],
)
@torch.no_grad()
def test_golden_models(case_name, name, macs_side, more, record_property):
    case, model = GoldenCase("uniformer", case_name), timm.create_model(name)
    model.load_state_dict(filter_of(name)(case.state_dict(), model))
    assert count(model) == case.spec["params"]
    if macs_side is not None:
        assert count_macs(model.eval(), torch.zeros(1, 3, macs_side, macs_side)) == case.spec["macs"] + more
    model.train(case.spec["mode"] == "train")
    case.compare("logits", model(case.inputs["x"]))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.golden
@torch.no_grad()
def test_golden_detection_features(record_property):
    case, model = GoldenCase("uniformer", "uniformer_s_h14_features"), timm.create_model("uniformer_small_h14").eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert count(model) == case.spec["params"]
    x = torch.from_numpy(np.random.RandomState(22).standard_normal((1, 3, 96, 128)).astype(np.float32))
    maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
    getter = timm.create_model("uniformer_small_h14", features_only=True).eval()
    getter.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()})
    for i, (one, other) in enumerate(zip(maps, getter(x), strict=True)):
        case.compare(f"stage{i}", one[:, :8])
        torch.testing.assert_close(other, one)
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("uniformer_xxs", 10_215_280),
        ("uniformer_xs", 16_509_264),
        ("uniformer_small", 21_545_256),
        ("uniformer_small_plus", 24_032_552),
        ("uniformer_small_plus_dim64", 24_032_552),
        ("uniformer_base", 49_776_552),
        ("uniformer_base_ls", 49_796_520),
        ("uniformer_large_ls_tl", 100_103_888),
        ("uniformer_small_tl", 22_058_256),
        ("uniformer_small_tl_dim64", 22_058_256),
        ("uniformer_small_plus_tl", 24_545_552),
        ("uniformer_small_plus_tl_dim64", 24_545_552),
        ("uniformer_base_tl", 50_289_552),
        ("uniformer_base_tl_dim64", 50_289_552),
        ("uniformer_small_h14", 21_033_280),
    ],
)
def test_parameter_counts(name, params):
    assert count(timm.create_model(name, device="meta")) == params


@pytest.mark.parametrize(
    ("name", "head_dim"), [("uniformer_small", 64), ("uniformer_small_plus", 32), ("uniformer_small_tl", 32)]
)
def test_head_widths(name, head_dim):
    model = timm.create_model(name, device="meta")
    assert {m.head_dim for m in model.modules() if hasattr(m, "head_dim")} == {head_dim}


def test_hybrid_windows_leave_every_fourth_block_of_stage_3_global():
    model = timm.create_model("uniformer_base_h14", device="meta")
    inside = [isinstance(block.mixer, WindowMHRA) for block in model.stages[2].blocks]
    assert inside == [(i + 1) % 4 != 0 for i in range(20)]
    assert not any(isinstance(block.mixer, WindowMHRA) for block in model.stages[3].blocks)
    every = tiny(window=3).stages[2].blocks
    assert [block.mixer.window for block in every] == [3, 3]


@torch.no_grad()
def test_windows_as_large_as_the_map_change_nothing():
    x = torch.randn(1, 3, 96, 96)
    everywhere, windows = tiny(), tiny(window=6)
    torch.testing.assert_close(windows(x), everywhere(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layer_scale_is_each_models_own():
    scaled, plain = tiny(layer_scale=1e-6), tiny()
    assert not any("gamma" in key for key in plain.state_dict())
    assert {key.split(".")[1] for key in scaled.state_dict() if "gamma" in key} == {"2", "3"}
    both = tiny(layer_scale=1e-6, token_labeling=True)
    assert {key.split(".")[1] for key in both.state_dict() if "gamma" in key} == {"0", "1", "2", "3"}
    block = GlobalBlock(16, 8, layer_scale=0.0)
    x = torch.randn(1, 16, 3, 4)
    torch.testing.assert_close(block(x), block.pos_embed(x))


def test_stage_letters():
    kinds = [type(stage.blocks[0]).__name__ for stage in tiny(blocks="LGLG", head_dim=4).stages]
    assert kinds == ["LocalBlock", "GlobalBlock", "LocalBlock", "GlobalBlock"]


def test_stochastic_depth_and_dropout_rates():
    model = tiny(drop_path_rate=0.4, pos_drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    block = model.stages[3].blocks[0]
    assert (model.pos_drop.p, block.mixer.drop.p, block.mlp.drop1.p, block.mixer.attn_drop) == (0.1, 0.2, 0.2, 0.3)


# Token labelling


@torch.no_grad()
def test_token_labelling_adds_half_the_highest_logit_of_the_positions():
    model, x = tiny(token_labeling=True), torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)  # (2, 24, 2, 3)
    expected = model.head.fc(features.mean((2, 3))) + 0.5 * torch.stack(
        [model.head.aux(features[:, :, i, j]) for i in range(2) for j in range(3)]
    ).amax(0)
    torch.testing.assert_close(model(x), expected)
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "aux" not in k})
    assert (model(x) - plain(x)).abs().max() > 0.01


@given(
    batch=st.integers(1, 4),
    box=st.tuples(*[st.integers(0, 5)] * 4).map(lambda b: (min(b[0], b[2]), b[1], max(b[0], b[2]), b[3])),
)
def test_swapping_a_box_twice_restores_the_map(batch, box):
    x = torch.randn(batch, 2, 5, 6)
    kept = x.clone()
    mixed = swap_box(x, box)
    assert torch.equal(x, kept)
    assert torch.equal(swap_box(mixed, box), x)
    for n in range(batch):
        for i in range(5):
            for j in range(6):
                other = box[0] <= i < box[2] and box[1] <= j < box[3]
                assert torch.equal(mixed[n, :, i, j], x[batch - 1 - n if other else n, :, i, j])


def test_training_mixes_tokens_and_sorts_the_dense_logits_again(monkeypatch):
    """In a network that sees one position at a time the sorted dense logits are those of the images themselves."""
    model = tiny(token_labeling=True)
    for stage in model.stages:
        stage.blocks = nn.Sequential()
    x = torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        features = model.forward_features(x)  # (3, 24, 4, 4)
        dense = model.head.dense(features)
    monkeypatch.setattr("tokenry.vision.uniformer.rand_bbox", lambda *_: (8, 24, 0, 16))  # top, bottom, left, right
    model.train()
    model.norm.eval()  # batch statistics would look at all positions
    found = model(x)
    assert isinstance(found, TokenLabels) and found.box == (1, 0, 3, 2)
    torch.testing.assert_close(found.dense, dense)
    mixed = features.clone()
    mixed[:, :, 1:3, 0:2] = features.flip(0)[:, :, 1:3, 0:2]
    torch.testing.assert_close(found.logits, model.head.fc(mixed.mean((2, 3))), rtol=1e-4, atol=1e-5)
    assert (found.logits[0] - model.head.fc(features.mean((2, 3)))[0]).abs().max() > 1e-3


def test_token_labelling_trains_every_parameter_with_random_boxes():
    np.random.seed(0)
    model = tiny(token_labeling=True, layer_scale=1e-6).train()
    boxes = set()
    for _ in range(4):
        found = model(torch.randn(2, 3, 64, 64))
        assert found.logits.shape == (2, 5) and found.dense.shape == (2, 4, 5)
        boxes.add(found.box)
        (found.logits.square().sum() + found.dense.square().sum()).backward()
    assert len(boxes) > 1
    assert not [key for key, p in model.named_parameters() if p.grad is None]


@torch.no_grad()
def test_token_labelling_classifiers_are_replaced_together():
    model, x = tiny(token_labeling=True), torch.randn(1, 3, 64, 64)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.head.aux.out_features == 7
    model.train().reset_classifier(0)
    assert model(x).shape == (1, 24)
    maps = timm.create_model("uniformer_small_tl", features_only=True, **TINY)(x)
    assert [m.shape[1] for m in maps] == [8, 12, 16, 24]


# Token pruning


def guided(dim=8, side=(4, 3), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, *side, generator=generator, dtype=torch.float64)
    cls = torch.randn(batch, 1, dim, generator=generator, dtype=torch.float64)
    guide = torch.rand(batch, side[0] * side[1], generator=generator, dtype=torch.float64)
    return Guided(x, cls, guide)


def pruned(dim=8, seed=0, **kwargs):
    torch.manual_seed(seed)
    block = PrunedBlock(dim, 4, **{"dtype": torch.float64, **kwargs})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
    return block.eval()


def slow_pruned(block, state):
    """The equations for one image at a time: sort, keep, merge, update, put back."""
    maps, classes, guides = [], [], []
    embedded = block.pos_embed(state.map)
    for x, cls, guide in zip(embedded.flatten(2).mT, state.cls, state.guide, strict=True):
        keep = int(len(x) * block.keep_ratio)
        order = sorted(range(len(x)), key=lambda i: -guide[i].item())
        kept, others = order[:keep], order[keep:]
        total = sum(guide[i] for i in others)
        merged = sum(guide[i] / total * x[i] for i in others)
        tokens = torch.stack([cls[0], *(x[i] for i in kept), merged])[None]
        attended = block.mixer(block.norm1(tokens))
        row = block.mixer.guided(block.norm1(tokens))[1][0]
        tokens = tokens + block.ls1(attended)
        transformed = block.mlp(block.norm2(tokens))
        tokens = tokens + block.ls2(transformed)
        y, new = x.clone(), guide.clone()
        for place, i in enumerate(kept):
            y[i] = tokens[0, 1 + place]
            new[i] = (1 - block.trade_off) * guide[i] + block.trade_off * row[1 + place]
        for i in others:
            y[i] = x[i] + block.ls3(attended + transformed)[0, -1]
        maps.append(y.mT.unflatten(1, state.map.shape[2:]))
        classes.append(tokens[0, :1])
        guides.append(new)
    return Guided(torch.stack(maps), torch.stack(classes), torch.stack(guides))


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    batch=st.integers(1, 3),
    ratio=st.sampled_from([0.3, 0.5, 0.9]),
    scale=st.sampled_from([None, 0.1]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_pruned_block_is_the_equations(height, width, batch, ratio, scale, seed):
    block = pruned(keep_ratio=ratio, trade_off=0.3, layer_scale=scale)
    state = guided(side=(height, width), batch=batch, seed=seed)
    torch.testing.assert_close(tuple(block(state)), tuple(slow_pruned(block, state)))


@torch.no_grad()
def test_keeping_all_tokens_is_the_plain_block_with_a_class_token():
    block, plain, state = pruned(keep_ratio=1.0), GlobalBlock(8, 4, mlp_ratio=3, dtype=torch.float64), guided()
    plain.load_state_dict(block.state_dict())
    found = block(state)
    x = plain.pos_embed(state.map).flatten(2).mT
    tokens = torch.cat([state.cls, x], 1)
    tokens = tokens + plain.mixer(plain.norm1(tokens))
    tokens = tokens + plain.mlp(plain.norm2(tokens))
    torch.testing.assert_close(found.cls, tokens[:, :1])
    torch.testing.assert_close(found.map.flatten(2).mT, tokens[:, 1:])
    first = block(state._replace(guide=None))
    torch.testing.assert_close(found.guide, 0.5 * state.guide + 0.5 * first.guide)


@torch.no_grad()
def test_permuted_tokens_come_back_permuted():
    block, state = pruned(), guided()
    block.pos_embed = nn.Identity()
    found = block(state)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = Guided(state.map.flatten(2)[..., order].unflatten(2, (4, 3)), state.cls, state.guide[:, order])
    other = block(moved)
    torch.testing.assert_close(other.map.flatten(2), found.map.flatten(2)[..., order])
    torch.testing.assert_close(other.guide, found.guide[:, order])
    torch.testing.assert_close(other.cls, found.cls)


@torch.no_grad()
def test_the_fast_update_reaches_the_dropped_tokens_alone():
    block, state = pruned(layer_scale=1.0), guided()
    found = block(state)
    block.ls3.gamma.zero_()
    without = block(state)
    kept = torch.zeros(2, 12, dtype=torch.bool).scatter(1, state.guide.topk(6).indices, True)
    changed = (found.map - without.map).flatten(2).abs().amax(1) > 1e-9
    assert torch.equal(changed, ~kept)
    torch.testing.assert_close(without.map.flatten(2).mT[~kept], block.pos_embed(state.map).flatten(2).mT[~kept])


@torch.no_grad()
def test_pooled_guide_keeps_its_sum():
    guide = torch.rand(2, 24)
    pooled = pool_guide(guide, (4, 6))
    assert pooled.shape == (2, 6)
    torch.testing.assert_close(pooled.sum(1), guide.sum(1))
    torch.testing.assert_close(pooled[0, 0] / pooled[0, 1], guide[0, [0, 1, 6, 7]].sum() / guide[0, [2, 3, 8, 9]].sum())


@torch.no_grad()
def test_evaluation_writes_nothing_in_place():
    model, x = tiny(UniFormerLight), torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model(x)
    assert torch.equal(model(x), first)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    block, state = pruned(), guided()
    kept = [part.clone() for part in state]
    block(state)
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))


def test_light_model_returns_two_logits_in_training_and_one_in_evaluation():
    model, x = tiny(UniFormerLight).train(), torch.randn(2, 3, 64, 64)
    found = model(x)
    assert found.logits.shape == found.cls_logits.shape == (2, 5)
    found.cls_logits.square().sum().backward()
    assert model.head.fc.weight.grad is None and model.stages[2].cls_token.grad.abs().sum() > 0
    assert model.eval()(x).shape == (2, 5)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    model.train().reset_classifier(7)
    assert [tuple(y.shape) for y in model(x)] == [(2, 7), (2, 7)]
    model.reset_classifier(0)
    assert model(x).shape == (2, 24)


@torch.no_grad()
def test_a_map_of_one_position_is_pruned_to_none():
    assert (
        tiny(UniFormerLight)(torch.randn(1, 3, 32, 32)).isfinite().all()
    )  # stage 4 has one token: int(0.5) = 0 are kept


# Checkpoints and bad input


@pytest.mark.parametrize("wrapping", [None, "model", "state_dict", "state_dict_ema"])
def test_checkpoints_in_wrappings_and_of_ours(wrapping):
    case, model = GoldenCase("uniformer", "uniformer_small_64"), timm.create_model("uniformer_small", device="meta")
    theirs = {f"module.{name}": torch.empty(shape, device="meta") for name, (shape, _) in case.spec["filled"].items()}
    converted = checkpoint_filter_fn(theirs if wrapping is None else {wrapping: theirs}, model)
    own = model.state_dict()
    assert set(own) - set(converted) == {key for key in own if key.endswith("num_batches_tracked")}
    assert set(checkpoint_filter_fn(own, model)) == set(own)


@pytest.mark.parametrize(
    ("case_name", "name", "likely"),
    [
        ("uniformer_small_tl_64", "uniformer_small", "second classifier, aux_head.*token_labeling=True"),
        ("uniformer_small_64", "uniformer_small_plus", "looks like uniformer_small:"),
        ("uniformer_small_64", "uniformer_base_ls", "looks like uniformer_small:"),
        ("uniformer_s_h14_features", "uniformer_small", "looks like uniformer_small_h14"),
        ("uniformer_xs_64", "uniformer_xxs", "looks like uniformer_xs"),
    ],
)
def test_another_variants_checkpoint_is_refused(case_name, name, likely):
    case, model = GoldenCase("uniformer", case_name), timm.create_model(name, device="meta")
    theirs = {key: torch.empty(shape, device="meta") for key, (shape, _) in case.spec["filled"].items()}
    with pytest.raises(ValueError, match=likely):
        filter_of(name)(theirs, model)


@pytest.mark.parametrize("kind", [UniFormer, UniFormerLight])
def test_images_that_would_lose_pixels_are_refused(kind):
    with pytest.raises(ValueError, match=r"multiples of 32, got 70x96; resize or pad them, for example to 64x96"):
        tiny(kind)(torch.zeros(1, 3, 70, 96))
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        tiny(kind)(torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (UniFormer, {"head_dim": 32}, "head_dim=32 for dim=16; for example head_dim=16"),
        (UniFormerLight, {"head_dim": 5}, "head_dim=5 for dim=16"),
        (UniFormer, {"blocks": "LLG"}, "one letter per stage"),
        (UniFormer, {"blocks": "LLXG"}, "one letter per stage"),
        (UniFormer, {"depths": (1, 1)}, "four positive entries"),
        (UniFormerLight, {"dims": (8, 8, 0, 8)}, "four positive entries"),
        (UniFormer, {"window": 7, "hybrid_window": 14}, "give one"),
        (UniFormer, {"window": 0}, "window must be at least 1"),
        (UniFormer, {"feature_norms": True}, "num_classes=0"),
        (UniFormerLight, {"keep_ratio": 0.0}, "keep_ratio is a share"),
        (UniFormerLight, {"trade_off": 1.5}, "trade_off a weight from 0 to 1"),
        (UniFormer, {"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_bad_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(kind, **arguments)
