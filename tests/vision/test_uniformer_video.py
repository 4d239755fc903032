"""UniFormer for video: golden models, counts, weights from images, features, sampling of frames, bad input."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenry
from golden_case import GoldenCase
from tokenry.claims.uniformer_video import moving_clips
from tokenry.measure import count_macs
from tokenry.vision import (
    UniFormer,
    UniFormerVideo,
    dense_sample,
    multi_view,
    segment_sample,
    uniformer_video_b,
    uniformer_video_s,
)
from tokenry.vision.uniformer_blocks import GlobalBlock
from tokenry.vision.uniformer_video import checkpoint_filter_fn, inflate
from tokenry.vision.uniformer_video_blocks import DividedBlock

pytestmark = pytest.mark.method("uniformer-video")

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "head_dim": 8, "num_classes": 5}


def tiny(kind=UniFormerVideo, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = kind(**{**TINY, **kwargs}).eval()
    for module in model.modules():  # statistics as after training
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def clips(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("uniformer_s_8x64", {}), ("uniformer_s_std_split", {"num_classes": 174, "split": True, "std": True})],
)
@torch.no_grad()
def test_golden_models(name, arguments, record_property):
    case, model = GoldenCase("uniformer-video", name), uniformer_video_s(**arguments).eval()
    model.load_state_dict(checkpoint_filter_fn({"model_state": case.state_dict()}, model))
    assert count(model) == case.spec["params"]
    case.compare("logits", model(case.inputs["x"]))
    case.compare("logits", model([case.inputs["x"]]))
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.parametrize(
    ("make", "params", "macs"),
    [
        (uniformer_video_s, 21_400_400, {8: 17.6, 16: 41.7, 32: 109.4}),
        (uniformer_video_b, 49_813_200, {8: 40.1}),
    ],
)
def test_published_counts(make, params, macs):
    model = make(device="meta").eval()
    assert count(model) == params
    for frames, billions in macs.items():
        found = count_macs(model, torch.zeros(1, 3, frames, 224, 224, device="meta")) / 1e9
        assert round(found, 1) == billions


# Frames


@pytest.mark.parametrize("arguments", [{}, {"split": True}, {"std": True}, {"blocks": "GLGL", "head_dim": 4}])
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@torch.no_grad()
def test_any_number_of_frames(arguments, frames):
    model, x = tiny(**arguments), clips(2, 3, frames, 32, 64)
    y = model(x)
    assert y.shape == (2, 5) and y.isfinite().all()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2] for m in maps] == [(frames - 1) // 2 + 1] * 4  # the stem halves them, nothing else does
    torch.testing.assert_close(model(x[1:]), y[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(model([x]), y) and torch.equal(model((x,)), y)


@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_order_of_frames_matters(split):
    model, x = tiny(split=split), clips(1, 3, 8, 32, 32)
    assert (model(x) - model(x[:, :, [3, 0, 7, 5, 1, 6, 2, 4]])).abs().max() > 1e-3


def test_number_of_frames_is_a_note():
    assert uniformer_video_s(device="meta").num_frames == 16
    assert tiny(num_frames=32).num_frames == 32 and count(tiny(num_frames=32)) == count(tiny())


# What a backbone keeps


@torch.no_grad()
def test_forward_is_head_of_features():
    model, x = tiny(), clips(2, 3, 4, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 24, 2, 2, 2)
    y = model(x)
    torch.testing.assert_close(model.forward_head(features), y)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3, 4)))
    torch.testing.assert_close(model.head.fc(pooled), y)


@torch.no_grad()
def test_features():
    x = clips(1, 3, 4, 64, 96)
    getter = uniformer_video_s(**TINY, features_only=True).eval()
    maps = getter(x)
    assert [tuple(m.shape) for m in maps] == [
        (1, 8, 2, 16, 24), (1, 12, 2, 8, 12), (1, 16, 2, 4, 6), (1, 24, 2, 2, 3)
    ]  # fmt: skip
    assert [m.shape[1] for m in maps] == getter.feature_info.channels()
    assert getter.feature_info.reduction() == [4, 8, 16, 32]
    some = uniformer_video_s(**TINY, features_only=True, out_indices=(1, 2)).eval()
    some.load_state_dict({k: v for k, v in getter.state_dict().items() if k in some.state_dict()})
    for one, other in zip(some(x), maps[1:3], strict=True):
        torch.testing.assert_close(one, other)
    last, found = tiny().forward_intermediates(x, indices=2)
    assert len(found) == 2 and last.shape == (1, 24, 2, 2, 3)


@torch.no_grad()
def test_classifier_can_be_changed():
    model, x = tiny(), clips(1, 3, 2, 32, 32)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.num_classes == 7 and isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model(x).shape == (1, 24)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 24, 1, 1, 1)
    assert tiny(in_chans=1)(x[:, :1]).shape == (1, 5)


@pytest.mark.parametrize("split", [False, True])
def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(split):
    x = clips(2, 3, 4, 32, 32)
    gradients = []
    for saving in (False, True):
        model = tiny(split=split).train()
        model.set_grad_checkpointing(saving)
        model(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def test_memory_order_bfloat16_and_autocast():
    model, x = tiny(), clips(2, 3, 4, 32, 32)
    exact = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last_3d)), exact, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - exact).abs().max() <= 0.1 * exact.abs().max() + 1e-2


@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_compiles_without_graph_breaks(split):
    model, x = tiny(split=split), clips(2, 3, 4, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_and_dropout_rates():
    model = tiny(drop_path_rate=0.4, pos_drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    block = model.stages[3].blocks[0]
    attention = block.mixer
    assert (model.pos_drop.p, attention.drop.p, block.mlp.drop1.p, attention.attn_drop) == (0.1, 0.2, 0.2, 0.3)
    divided = tiny(drop_path_rate=0.4, split=True).stages[3].blocks[0]
    assert divided.mixer.drop_path.drop_prob == divided.drop_path.drop_prob == pytest.approx(0.4)


def test_create_by_slug():
    model = tokenry.create("uniformer-video", **TINY, device="meta")
    assert isinstance(model, UniFormerVideo) and all(p.is_meta for p in model.parameters())
    assert model.pretrained_cfg["architecture"] == "uniformer_video_s"


# Divided attention


@torch.no_grad()
def test_a_split_block_starts_as_the_block_of_single_frames():
    torch.manual_seed(0)
    divided, whole = DividedBlock(16, 8), GlobalBlock(16, 8, frames=True)
    state = divided.state_dict()
    whole.load_state_dict(
        {
            key: state[key.replace("mixer", "mixer.spatial").replace("norm1", "mixer.spatial_norm")]
            for key in whole.state_dict()
        }
    )
    divided.pos_embed, whole.pos_embed = nn.Identity(), nn.Identity()
    x = clips(2, 16, 4, 3, 5)
    frames = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # clips of one frame
    torch.testing.assert_close(divided(x), whole(frames).squeeze(2).unflatten(0, (2, 4)).transpose(1, 2))


def test_the_models_temporal_attention_starts_silent():
    for block in tiny(split=True).stages[2].blocks:
        assert not block.mixer.temporal.qkv.weight.any() and (block.mixer.temporal.proj.weight == 1).all()
        assert block.mixer.spatial.qkv.weight.any()


# Weights from images


@torch.no_grad()
def test_a_still_clip_gives_the_image_in_the_local_stages_away_from_its_ends():
    image, picture = tiny(UniFormer), clips(1, 3, 32, 64)
    video = tiny(seed=1).from_image_checkpoint(image.state_dict())
    still = picture.unsqueeze(2).expand(-1, -1, 40, -1, -1)
    found = video.forward_intermediates(still, indices=[1], intermediates_only=True)[0]  # (1, 12, 20, 4, 8)
    expected = image.forward_intermediates(picture, indices=[1], intermediates_only=True)[0].unsqueeze(2)
    torch.testing.assert_close(found[:, :, 7:-7], expected.expand(-1, -1, 6, -1, -1), rtol=1e-4, atol=1e-5)
    assert (found[:, :, :1] - expected).abs().max() > 1e-2  # zeros lie outside the clip


@pytest.mark.parametrize("std", [False, True])
@torch.no_grad()
def test_center_mode_with_split_is_the_image_model_averaged_over_frames(std):
    image, clip = tiny(UniFormer), clips(2, 3, 7, 32, 64)
    video = tiny(split=True, std=std, seed=1).from_image_checkpoint(image.state_dict(), "center")
    frames = clip[:, :, ::2].transpose(1, 2)
    expected = image(frames.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(video(clip), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_the_authors_image_checkpoint(split):
    case = GoldenCase("uniformer", "uniformer_small_64")
    theirs = {"model": case.state_dict()}
    video = uniformer_video_s(split=split).from_image_checkpoint(theirs)
    own, image = video.state_dict(), theirs["model"]
    assert torch.equal(own["stem.proj.weight"], inflate(image["patch_embed1.proj.weight"], 3))
    assert torch.equal(own["stages.0.blocks.2.mixer.affinity.weight"], inflate(image["blocks1.2.attn.weight"], 5))
    pointwise = image["blocks2.0.mlp.fc1.weight"].unsqueeze(2)
    assert torch.equal(own["stages.1.blocks.0.mlp.fc1.weight"], pointwise)
    place = "mixer.spatial" if split else "mixer"
    assert torch.equal(own[f"stages.3.blocks.1.{place}.qkv.weight"], image["blocks4.1.attn.qkv.weight"])
    norm = "mixer.spatial_norm" if split else "norm1"
    assert torch.equal(own[f"stages.3.blocks.1.{norm}.weight"], image["blocks4.1.norm1.weight"])
    assert torch.equal(own["norm.running_var"], image["norm.running_var"])
    assert own["head.fc.weight"].shape == (400, 512)  # its own: the image model has 1000 classes


def test_the_classifier_is_taken_over_where_the_classes_agree():
    image = tiny(UniFormer)
    same, other = tiny(seed=1), tiny(seed=1, num_classes=4)
    fresh = other.head.fc.weight.detach().clone()
    assert torch.equal(same.from_image_checkpoint(image.state_dict()).head.fc.weight, image.head.fc.weight)
    assert torch.equal(other.from_image_checkpoint(image.state_dict()).head.fc.weight, fresh)
    kinetics = tiny(num_classes=9)
    started = tiny(seed=1).from_image_checkpoint(kinetics.state_dict()).state_dict()
    assert all(torch.equal(started[name], value) for name, value in kinetics.state_dict().items() if "head" not in name)
    labelling = tiny(UniFormer, token_labeling=True)  # a second classifier has no place here
    assert torch.equal(
        tiny(seed=1).from_image_checkpoint(labelling.state_dict()).head.fc.weight, labelling.head.fc.weight
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"depths": (1, 1, 3, 1)},
            r"14 unknown \(stages.2.blocks.2.*It has depths \(1, 1, 3, 1\) and dims \(8, 12, 16, 24\)",
        ),
        ({"depths": (1, 1, 1, 1)}, r"tensors missing \(stages.2.blocks.1.*It has depths \(1, 1, 1, 1\)"),
        ({"dims": (8, 12, 16, 32)}, r"of another shape.*dims \(8, 12, 16, 32\)"),
        ({"in_chans": 1}, r"stem.proj.weight \(8, 1, 3, 4, 4\), the model's is \(8, 3, 3, 4, 4\)"),
    ],
)
def test_another_images_checkpoint_is_refused(arguments, message):
    video = tiny()
    before = copy.deepcopy(video.state_dict())
    with pytest.raises(ValueError, match=message):
        video.from_image_checkpoint(UniFormer(**{**TINY, **arguments}).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in video.state_dict().items())
    with pytest.raises(ValueError, match="mode must be 'mean' or 'center'"):
        video.from_image_checkpoint(tiny(UniFormer).state_dict(), "centre")


def test_video_checkpoints():
    case = GoldenCase("uniformer-video", "uniformer_s_std_split")
    theirs = {f"module.{name}": torch.empty(shape, device="meta") for name, (shape, _) in case.spec["filled"].items()}
    fitting = uniformer_video_s(num_classes=174, split=True, std=True, device="meta")
    own = fitting.state_dict()
    for wrapping in (None, "model", "model_state", "state_dict"):
        converted = checkpoint_filter_fn(theirs if wrapping is None else {wrapping: theirs}, fitting)
        assert set(own) - set(converted) == {key for key in own if key.endswith("num_batches_tracked")}
    assert set(checkpoint_filter_fn(own, fitting)) == set(own)
    with pytest.raises(ValueError, match=r"as uniformer_video_s\(split=True, std=True, num_classes=...\)"):
        checkpoint_filter_fn(theirs, uniformer_video_b(device="meta"))


# Sampling


@given(
    n=st.integers(1, 60),
    frames=st.integers(1, 9),
    stride=st.integers(1, 5),
    number=st.integers(1, 5),
    train=st.booleans(),
)
def test_dense_clips_keep_their_pace_and_stay_inside(n, frames, stride, number, train):
    index = dense_sample(n, frames, stride, number, train)
    assert index.shape == (number, frames) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() <= n - 1
    for clip in index.tolist():
        assert clip == [min(clip[0] + stride * i, n - 1) for i in range(frames)]
    room = n - 1 - (frames - 1) * stride
    if room <= 0:
        assert not index[:, 0].any()  # a short video from its start on, the last frame repeated
    elif not train and number > 1:
        assert index[0, 0] == 0 and index[-1, -1] == n - 1
        gaps = index[:, 0].diff()
        assert gaps.max() - gaps.min() <= 1
    elif not train:
        assert abs(index[0, 0] - (n - 1 - index[0, -1])) <= 1


@given(n=st.integers(1, 60), frames=st.integers(1, 9), seed=st.integers(0, 99))
def test_segments_give_one_frame_each(n, frames, seed):
    middle = segment_sample(n, frames)
    drawn = segment_sample(n, frames, train=True, generator=torch.Generator().manual_seed(seed))
    for i in range(frames):
        low, high = round((n - 1) / frames * i), round((n - 1) / frames * (i + 1))
        assert middle[i] == (low + high) // 2 and low <= drawn[i] <= high
    assert (middle.diff() >= 0).all() and (drawn.diff() >= 0).all()


def test_random_frames_come_from_the_generator_and_reach_both_ends():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([segment_sample(5, 2, True, generator) for _ in range(60)])

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert set(draw(0)[:, 0].tolist()) == {0, 1, 2} and set(draw(0)[:, 1].tolist()) == {2, 3, 4}
    starts = dense_sample(6, 2, 3, clips=80, train=True, generator=torch.Generator().manual_seed(0))[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_views_are_averaged_as_scores(transposed):
    model, views = tiny(), clips(2, 3, 3, 4, 32, 96)
    expected = torch.zeros(2, 5)
    for v in range(3):
        for left in (0, 32, 64):
            expected += model(views[:, v, ..., left : left + 32]).softmax(1) / 9
    if transposed:
        turned = views.transpose(-1, -2)
        found = multi_view(lambda x: model(x.transpose(-1, -2)), turned, crops=3)
    else:
        found = multi_view(model, views, crops=3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(multi_view(model, views[:, :1]), model(views[:, 0, ..., 32:64]).softmax(1))


def test_moving_clips_move():
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    moving, labels = moving_clips(images, 40, False, np.random.default_rng(1))
    assert moving.shape == (40, 3, 8, 32, 32) and set(labels.tolist()) == {0, 1, 2, 3}
    for clip, label in zip(moving, labels.tolist(), strict=True):
        axis, sign = (-1, 1 if label == 0 else -1) if label < 2 else (-2, 1 if label == 2 else -1)
        pace = [p for p in (1, 2) if all(_shifted(clip[:, t], clip[:, t + 1], axis, sign * p) for t in range(7))]
        assert pace  # the picture moves right (0), left (1), down (2), up (3)
    shuffled, _ = moving_clips(images, 40, True, np.random.default_rng(1))
    assert shuffled.shape == moving.shape


def _shifted(before, after, axis, by):
    """Whether ``after`` shows what ``before`` shows, ``by`` pixels further along ``axis``."""
    length = before.shape[axis] - abs(by)
    return torch.equal(before.narrow(axis, max(-by, 0), length), after.narrow(axis, max(by, 0), length))


# Bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 64, 64), r"clips \(B, 3, T, H, W\), got 4 dimensions \(3, 8, 64, 64\); x.unsqueeze\(0\) makes"),
        ((64, 64), r"clips \(B, 3, T, H, W\), got 2 dimensions"),
        ((1, 8, 3, 64, 64), r"channels seem to be behind the frames: give x.transpose\(1, 2\)"),
        ((1, 8, 64, 64, 3), r"channels seem to be last: give x.permute\(0, 4, 1, 2, 3\)"),
        ((1, 4, 8, 64, 64), r"got \(1, 4, 8, 64, 64\); make the model with in_chans"),
        ((1, 3, 0, 64, 64), "at least one frame"),
        ((1, 3, 8, 70, 96), "multiples of 32, got 70x96; resize or pad them, for example to 64x96"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_a_list_of_two_pathways_is_refused():
    with pytest.raises(ValueError, match="got a list of 2: this model has one pathway"):
        tiny()([torch.zeros(1, 3, 4, 32, 32)] * 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(head_dim=32), "head_dim=32 for dim=16; for example head_dim=16"),
        (lambda: tiny(blocks="LLG"), "one letter per stage"),
        (lambda: tiny(blocks="LLXG"), "one letter per stage"),
        (lambda: tiny(depths=(1, 1)), "four positive entries"),
        (lambda: tiny(num_frames=0), "num_frames must be at least 1, got 0"),
        (lambda: tiny(num_classes=-1), "num_classes must be 0"),
        (lambda: dense_sample(0, 4, 1), "n must be at least 1, got 0"),
        (lambda: dense_sample(9, 4, 0), "stride must be at least 1"),
        (lambda: segment_sample(9, 0), "frames must be at least 1"),
        (lambda: multi_view(tiny(), torch.zeros(1, 3, 4, 32, 32)), r"use clips.unsqueeze\(1\)"),
        (
            lambda: multi_view(tiny(), torch.zeros(1, 1, 3, 4, 32, 32), crops=3),
            "3 crops of square clips 32x32 are all the same",
        ),
        (lambda: multi_view(tiny(), torch.zeros(1, 1, 3, 4, 32, 64), crops=0), "crops must be at least 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
