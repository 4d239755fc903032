"""UniFormer's light video models: counts, token pruning over space and time, weights from images, checkpoints, bad input."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision import (
    UniFormer,
    UniFormerLight,
    UniFormerVideoLight,
    multi_view,
    token_maps,
    uniformer_video_s,
    uniformer_video_xs,
    uniformer_video_xxs,
)
from tokenry.vision.uniformer_blocks import GlobalBlock
from tokenry.vision.uniformer_light import Guided, PrunedBlock, pool_guide
from tokenry.vision.uniformer_video_weights import checkpoint_filter_fn, inflate

pytestmark = pytest.mark.method("uniformer-video")

TINY = {"depths": (1, 1, 3, 2), "dims": (8, 12, 16, 24), "head_dim": 8, "num_classes": 5}


def tiny(kind=UniFormerVideoLight, seed=0, **kwargs):
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


@pytest.mark.parametrize(
    ("make", "params", "gammas", "macs"),
    [
        (
            uniformer_video_xxs,
            9_833_896,
            6_720,
            {
                (4, 128): 1.0,
                (4, 160): 1.6,
                (8, 128): 2.0,
                (8, 160): 3.3,
                (16, 128): 4.2,
                (16, 160): 6.9,
                (32, 160): 15.4,
            },
        ),
        (uniformer_video_xs, 16_099_552, 9_344, {(32, 192): 34.2}),
    ],
)
def test_published_counts(make, params, gammas, macs):
    """Parameters of the authors' code; G multiply-accumulates of their table, which gives two or three digits."""
    model = make(device="meta").eval()
    assert count(model) == params
    assert count(make(device="meta", layer_scale=0.1)) == params + gammas
    for (frames, side), billions in macs.items():
        found = count_macs(model, torch.zeros(1, 3, frames, side, side, device="meta")) / 1e9
        assert found == pytest.approx(billions, rel=0.03)


# Pruning


def guided(size, batch=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, *size, generator=generator, dtype=torch.float64)
    cls = torch.randn(batch, 1, dim, generator=generator, dtype=torch.float64)
    return Guided(x, cls, torch.rand(batch, x[0, 0].numel(), generator=generator, dtype=torch.float64))


def pruned(dim=8, **kwargs):
    torch.manual_seed(0)
    block = PrunedBlock(dim, 4, frames=True, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
    return block.eval()


def slow_pruned(block, state):
    """The equations for one clip at a time, its tokens named by (frame, row, column)."""
    out = Guided(torch.zeros_like(state.map), torch.zeros_like(state.cls), state.guide.clone())
    embedded = block.pos_embed(state.map)
    _, _, frames, height, width = embedded.shape
    scale1, scale2 = (getattr(ls, "gamma", 1.0) for ls in (block.ls1, block.ls2))
    for b in range(len(embedded)):
        guide = state.guide[b].view(frames, height, width)
        places = [(t, i, j) for t in range(frames) for i in range(height) for j in range(width)]
        order = sorted(places, key=lambda p: -guide[p].item())
        kept, others = order[: int(len(order) * block.keep_ratio)], order[int(len(order) * block.keep_ratio) :]
        total = sum(guide[p] for p in others)
        merged = sum(guide[p] / total * embedded[b, :, *p] for p in others)
        tokens = torch.stack([state.cls[b, 0], *(embedded[b, :, *p] for p in kept), merged])[None]
        normed = block.norm1(tokens)
        attended, row = scale1 * block.mixer.attend(normed), block.mixer.guided(normed)[1][0]
        tokens = tokens + attended
        transformed = scale2 * block.mlp(block.norm2(tokens))
        tokens = tokens + transformed
        out.cls[b] = tokens[0, :1]
        for n, p in enumerate(kept, 1):
            out.map[b, :, *p] = tokens[0, n]
            out.guide[b].view(frames, height, width)[p] = (1 - block.trade_off) * guide[p] + block.trade_off * row[n]
        for p in others:
            out.map[b, :, *p] = embedded[b, :, *p] + (attended + transformed)[0, -1]
    return out


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 2),
    ratio=st.sampled_from([0.3, 0.5, 0.9]),
    scale=st.sampled_from([None, 0.1]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_pruned_block_is_the_equations(size, batch, ratio, scale, seed):
    block, state = pruned(keep_ratio=ratio, trade_off=0.3, layer_scale=scale), guided(size, batch, seed=seed)
    torch.testing.assert_close(tuple(block(state)), tuple(slow_pruned(block, state)))


@torch.no_grad()
def test_the_guide_is_averaged_inside_frames():
    guide = torch.rand(2, 3 * 4 * 6)
    pooled = pool_guide(guide, (3, 4, 6))
    torch.testing.assert_close(pooled.sum(1), guide.sum(1))
    expected = guide.view(2, 3, 2, 2, 3, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(pooled / pooled.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("scale", [None, 0.1])
@torch.no_grad()
def test_keeping_all_tokens_is_the_network_without_pruning(scale):
    model, x = tiny(keep_ratio=1.0, layer_scale=scale), clips(2, 3, 5, 32, 64)

    def plain(block, x, cls):  # attention and MLP on the class token and all others
        whole = GlobalBlock(x.shape[1], 8, mlp_ratio=3, layer_scale=scale, frames=True)
        whole.load_state_dict(block.state_dict())
        x = whole.pos_embed(x)
        tokens = torch.cat([cls, x.flatten(2).mT], 1)
        tokens = tokens + whole.ls1(whole.mixer.attend(whole.norm1(tokens)))
        tokens = tokens + whole.ls2(whole.mlp(whole.norm2(tokens)))
        return tokens[:, 1:].mT.unflatten(2, x.shape[2:]), tokens[:, :1]

    y = model.stages[1](model.stages[0](model.stem(x)))
    cls = model.stages[2].cls_token.expand(2, -1, -1)
    for stage in model.stages[2:]:
        y = stage.downsample(y)
        cls = stage.cls_upsample(cls) if hasattr(stage, "cls_upsample") else cls
        for block in stage.blocks:
            y, cls = plain(block, y, cls)
    expected = model.head.fc(model.norm(y).mean((2, 3, 4)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    half = tiny(layer_scale=scale)
    half.load_state_dict(model.state_dict())
    assert (half(x) - expected).abs().max() > 1e-5


@torch.no_grad()
def test_half_of_the_tokens_of_a_clip_are_kept_in_all_blocks_but_the_first():
    found = [maps["kept"] for _, maps in token_maps(tiny(), clips(2, 3, 8, 64, 64)) if "kept" in maps]
    assert [tuple(kept.shape[1:]) for kept in found] == [(4, 4, 4)] * 2 + [(4, 2, 2)] * 2
    assert all((kept.flatten(1).sum(1) == kept[0].numel() // 2).all() for kept in found)


# Frames


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@torch.no_grad()
def test_any_number_of_frames(frames):
    model, x = tiny(layer_scale=0.1), clips(2, 3, frames, 32, 64)
    y = model(x)
    assert y.shape == (2, 5) and y.isfinite().all()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2] for m in maps] == [(frames - 1) // 2 + 1] * 4  # the stem halves them, nothing else does
    torch.testing.assert_close(model(x[1:]), y[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(model([x]), y)


@torch.no_grad()
def test_order_of_frames_matters():
    model, x = tiny(), clips(1, 3, 8, 32, 32)
    assert (model(x) - model(x[:, :, [3, 0, 7, 5, 1, 6, 2, 4]])).abs().max() > 1e-3


# What a backbone keeps


@torch.no_grad()
def test_features_and_classifiers():
    x = clips(1, 3, 4, 64, 96)
    getter = uniformer_video_xxs(**TINY, features_only=True).eval()
    assert [tuple(m.shape) for m in getter(x)] == [
        (1, 8, 2, 16, 24), (1, 12, 2, 8, 12), (1, 16, 2, 4, 6), (1, 24, 2, 2, 3)
    ]  # fmt: skip
    some = uniformer_video_xxs(**TINY, features_only=True, out_indices=(1,)).eval()  # before there is a class token
    some.load_state_dict({k: v for k, v in getter.state_dict().items() if k in some.state_dict()})
    torch.testing.assert_close(some(x)[0], getter(x)[1])
    model = tiny()
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and [tuple(y.shape) for y in model.train()(x)] == [(1, 7), (1, 7)]
    model.eval().reset_classifier(0, "")
    assert model(x).shape == (1, 24, 2, 2, 3)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_training_gives_two_logits_and_every_parameter_a_gradient_with_and_without_checkpointing():
    x = clips(2, 3, 4, 64, 64)
    gradients = []
    for saving in (False, True):
        model = tiny(layer_scale=0.1).train()
        model.set_grad_checkpointing(saving)
        found = model(x)
        assert found.logits.shape == found.cls_logits.shape == (2, 5)
        sum(logits.square().sum() for logits in found).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def test_memory_order_bfloat16_and_autocast():
    model, x = tiny(layer_scale=0.1), clips(2, 3, 4, 64, 64)
    exact = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last_3d)), exact, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - exact).abs().max() <= 0.1 * exact.abs().max() + 1e-2
    assert torch.equal(model(x), exact)  # nothing is written in place


@torch.no_grad()
def test_compiles_without_graph_breaks():
    model, x = tiny(), clips(2, 3, 4, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_views_are_averaged_as_scores():
    model, views = tiny(), clips(2, 3, 3, 4, 32, 64)
    expected = sum(model(views[:, v, ..., left : left + 32]).softmax(1) / 6 for v in range(3) for left in (0, 32))
    torch.testing.assert_close(multi_view(model, views, crops=2), expected)


@pytest.mark.parametrize(
    ("make", "name", "frames", "side"),
    [(uniformer_video_xxs, "uniformer_video_xxs", 16, 128), (uniformer_video_xs, "uniformer_video_xs", 32, 192)],
)
def test_configurations(make, name, frames, side):
    model = make(device="meta")
    config = model.pretrained_cfg
    assert (model.num_frames, config["architecture"], config["input_size"]) == (frames, name, (3, side, side))
    assert config["num_classes"] == 400 and isinstance(model.get_submodule(config["first_conv"]), nn.Conv3d)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in tiny(drop_path_rate=0.6).stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


# Weights from images


@torch.no_grad()
def test_a_clip_of_one_frame_in_center_mode_is_the_image():
    image, clip = tiny(UniFormerLight), clips(2, 3, 2, 64, 64)
    video = tiny(seed=1).from_image_checkpoint(image.state_dict(), "center")
    expected = image(clip[:, :, 0])
    torch.testing.assert_close(video(clip[:, :, :1]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(video(clip), expected, rtol=1e-4, atol=1e-5)  # strides stop at the first of two frames


@torch.no_grad()
def test_a_still_clip_gives_the_image_in_the_local_stages_away_from_its_ends():
    image, picture = tiny(UniFormerLight), clips(1, 3, 32, 64)
    video = tiny(seed=1).from_image_checkpoint(image.state_dict())
    still = picture.unsqueeze(2).expand(-1, -1, 40, -1, -1)
    found = video.forward_intermediates(still, indices=[1], intermediates_only=True)[0]  # (1, 12, 20, 4, 8)
    expected = image.forward_intermediates(picture, indices=[1], intermediates_only=True)[0].unsqueeze(2)
    torch.testing.assert_close(found[:, :, 7:-7], expected.expand(-1, -1, 6, -1, -1), rtol=1e-4, atol=1e-5)
    assert (found[:, :, :1] - expected).abs().max() > 1e-2  # zeros lie outside the clip


@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_authors_image_checkpoint(scale):
    image = GoldenCase("uniformer", "uniformer_xxs_96").state_dict()
    own = uniformer_video_xxs(layer_scale=scale).from_image_checkpoint({"model": image}).state_dict()
    assert torch.equal(own["stem.0.conv.weight"], inflate(image["patch_embed1.proj.0.weight"], 3))
    assert torch.equal(own["stem.2.norm.running_var"], image["patch_embed1.proj.4.running_var"])
    assert torch.equal(own["stages.1.blocks.4.mixer.affinity.weight"], inflate(image["blocks2.4.attn.weight"], 5))
    assert torch.equal(own["stages.3.blocks.1.mixer.qkv.weight"], image["blocks4.1.attn.qkv.weight"])
    assert torch.equal(own["stages.2.cls_token"], image["cls_token"])
    assert torch.equal(own["norm_cls.weight"], image["norm_cls.weight"])
    assert (
        own["head.fc.weight"].shape == own["head_cls.weight"].shape == (400, 448)
    )  # its own: the image has 1000 classes
    gammas = [value for name, value in own.items() if name.endswith(".gamma")]
    assert len(gammas) == (0 if scale is None else 34) and all((value == scale).all() for value in gammas)


def test_classifiers_are_taken_over_where_the_classes_agree():
    image = tiny(UniFormerLight)
    same = tiny(seed=1).from_image_checkpoint(image.state_dict())
    assert torch.equal(same.head.fc.weight, image.head.fc.weight)
    assert torch.equal(same.head_cls.weight, image.head_cls.weight)


# Checkpoints of the authors' code


def authors_state(depths, dims, classes, scale):
    """Names and shapes as in their files, without values."""
    shapes = {"cls_token": (1, 1, dims[2]), "cls_upsample.weight": (dims[3], dims[2]), "cls_upsample.bias": (dims[3],)}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def batch_norm(name, dim):
        layer(name, dim)
        shapes.update(
            {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,), f"{name}.num_batches_tracked": ()}
        )

    layer("patch_embed1.proj.0", dims[0] // 2, 3, 3, 3, 3)
    batch_norm("patch_embed1.proj.1", dims[0] // 2)
    layer("patch_embed1.proj.3", dims[0], dims[0] // 2, 3, 3, 3)
    batch_norm("patch_embed1.proj.4", dims[0])
    for i in (1, 2, 3):
        layer(f"patch_embed{i + 1}.proj", dims[i], dims[i - 1], 1, 2, 2)
        layer(f"patch_embed{i + 1}.norm", dims[i])
    for i, dim in enumerate(dims):
        one = (1, 1, 1) if i < 2 else ()
        for j in range(depths[i]):
            block = f"blocks{i + 1}.{j}"
            layer(f"{block}.pos_embed", dim, 1, 3, 3, 3)
            for norm in ("norm1", "norm2"):
                (batch_norm if i < 2 else layer)(f"{block}.{norm}", dim)
            layer(f"{block}.mlp.fc1", 3 * dim, dim, *one)
            layer(f"{block}.mlp.fc2", dim, 3 * dim, *one)
            if i < 2:
                layer(f"{block}.conv1", dim, dim, *one)
                layer(f"{block}.conv2", dim, dim, *one)
                layer(f"{block}.attn", dim, 1, 5, 5, 5)
            else:
                layer(f"{block}.attn.qkv", 3 * dim, dim)
                layer(f"{block}.attn.proj", dim, dim)
            if scale:
                shapes.update({f"{block}.gamma_{n}": (1, dim, *one) if one else (dim,) for n in (1, 2)})
    batch_norm("norm", dims[3])
    layer("norm_cls", dims[3])
    layer("head", classes, dims[3])
    layer("head_cls", classes, dims[3])
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


XXS, XS = ((2, 5, 8, 2), (56, 112, 224, 448)), ((3, 5, 9, 3), (64, 128, 256, 512))


@pytest.mark.parametrize(("make", "sizes"), [(uniformer_video_xxs, XXS), (uniformer_video_xs, XS)])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_checkpoints_of_the_authors_load_strictly(make, sizes, scale):
    model, theirs = make(layer_scale=scale, device="meta"), authors_state(*sizes, 400, scale)
    assert count(model) == sum(v.numel() for k, v in theirs.items() if "running" not in k and "tracked" not in k)
    for wrapped in (theirs, {"model_state": theirs}):
        model.load_state_dict(checkpoint_filter_fn(wrapped, model), strict=True, assign=True)


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        (uniformer_video_xs, (*XXS, 400, None), r"as uniformer_video_xxs\(num_classes=...\)"),
        (
            uniformer_video_xxs,
            (*XXS, 400, 0.1),
            r"34 unknown .*uniformer_video_xxs\(layer_scale=0.1, num_classes=...\)",
        ),
        (uniformer_video_s, (*XS, 400, None), r"as uniformer_video_xs\("),
    ],
)
def test_another_models_checkpoint_is_refused(make, state, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(authors_state(*state), make(device="meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny().from_image_checkpoint(tiny(UniFormer).state_dict()), "tensors missing.*norm_cls"),
        (
            lambda: tiny(layer_scale=0.1).from_image_checkpoint(tiny(UniFormerLight, layer_scale=0.1).state_dict()),
            r"4 unknown \(stages.2.blocks.1.ls3.gamma",
        ),
        (lambda: tiny()(torch.zeros(1, 8, 3, 64, 64)), r"behind the frames: give x.transpose\(1, 2\)"),
        (lambda: tiny()(torch.zeros(3, 64, 64)), r"clips \(B, 3, T, H, W\), got 3 dimensions"),
        (lambda: tiny()(torch.zeros(1, 3, 8, 70, 96)), "multiples of 32, got 70x96"),
        (lambda: tiny(num_frames=0), "num_frames must be at least 1, got 0"),
        (lambda: tiny(keep_ratio=0.0), "keep_ratio is a share"),
        (lambda: tiny(head_dim=5), "head_dim=5 for dim=16"),
        (lambda: tiny(depths=(1, 1)), "four positive entries"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
