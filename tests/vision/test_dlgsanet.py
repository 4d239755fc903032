"""DLGSANet: golden cases, counts, checkpoints, bad input."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file

from golden_case import GoldenCase
from tokenry.measure import count_macs
from tokenry.vision import DLGSANet, load_dlgsanet
from tokenry.vision.dlgsanet import GatedFFN, checkpoint_filter_fn

pytestmark = pytest.mark.method("dlgsanet")
SMALL = {"dim": 12, "groups": 2, "blocks": 1}


def small(upscale=2, **kwargs):
    torch.manual_seed(0)
    return DLGSANet(upscale, **{**SMALL, **kwargs}).eval()


def authors_names(state_dict):
    """Ours back to theirs, written out independently of the filter."""
    theirs = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts = ["overlap_embed", "0", "proj", *parts[1:]]
        elif parts[0] == "conv":
            parts = ["deep_feature_extraction", "2", *parts[1:]]
        elif parts[0] == "groups" and parts[2] == "conv":
            parts = ["deep_feature_extraction", parts[1], "body", "2", parts[3]]
        elif parts[0] == "groups":
            group, block, part, *rest = parts[1], parts[3], parts[4], *parts[5:]
            place = int(block) % 2
            if part.startswith("norm"):
                part = [f"norm{int(part[4]) + 2 * place}", "body"]
            elif part == "ffn":
                part = [("IDynamic_ffn", "restormer_ffn")[place]]
            elif place:
                part, rest = ["restormer_attn"], [rest[0].replace("proj_out", "project_out"), *rest[1:]]
            else:
                inner = {"proj_in": "conv0", "proj_out": "conv1", "reduce": "conv.conv1.0", "dwconv": "conv.conv1.1", "expand": "conv.conv2.0"}  # fmt: skip
                part, rest = ["IDynamicDWConv"], [inner[rest[0]], *rest[1:]]
            parts = ["deep_feature_extraction", group, "body", block, *part, *rest]
        theirs[".".join(parts)] = value
    return theirs


@pytest.mark.golden
def test_golden_ffn(record_property):
    case = GoldenCase("dlgsanet", "gdfn")
    ffn = GatedFFN(24)
    ffn.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in ffn.parameters()) == case.spec["params"]
    case.compare("y", ffn(case.inputs["x"]))
    record_property("worst_error", case.worst)


def sliced(y, count):
    flat = y.flatten()
    return flat[:: max(1, flat.numel() // count)][:count]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "upscale"), [("tiny_x4", 4), ("tiny_x2_small_input", 2)])
def test_golden_models(name, upscale, record_property):
    case = GoldenCase("dlgsanet", name)
    model = DLGSANet(upscale).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model))
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    seen = {}
    for key, index in (("local1", 0), ("global1", 1)):
        model.groups[0].blocks[index].register_forward_hook(lambda m, i, y, key=key: seen.update({key: y}))
    with torch.no_grad():
        seen["sr"] = model(case.inputs["x"])
        kept = {key: seen[key] for key in ("local1", "global1", "sr")}
        kept["sr_global"] = model.train()(case.inputs["x"])
    for key, y in kept.items():
        case.compare(f"{key}.slice", sliced(y, 4096 if key.startswith("sr") else 1024))
        # mean, deviation and largest size are numbers of order 1 to 100 each
        case.compare(f"{key}.stat", torch.stack([y.mean(), y.std(correction=0), y.abs().max()]))
    if name == "tiny_x4":  # 56x60 pixels are more than a window of 48
        assert (kept["sr"] - kept["sr_global"]).abs().max() > 0.1
    record_property("worst_error", case.worst)
    record_property("params", case.spec["params"])


@pytest.mark.parametrize(
    ("variant", "params"),
    [
        ("tiny", (565_710, 572_205, 581_298)),
        ("light", (745_188, 751_683, 760_776)),
        ("base", (4_733_724, 4_745_889, 4_762_920)),
    ],
)
def test_parameter_counts(variant, params):
    for upscale, count in zip((2, 3, 4), params, strict=True):
        assert sum(p.numel() for p in DLGSANet(upscale, variant, device="meta").parameters()) == count


def test_macs_grow_with_the_pixels():
    """33.4 G at 320x180 pixels of Tiny x4; the claim ``size`` measures there."""
    macs = count_macs(DLGSANet(4).eval(), torch.zeros(1, 3, 18, 32))
    assert 100 * macs / 1e9 == pytest.approx(33.4, abs=0.05)


@pytest.mark.parametrize("upscale", [2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (11, 7)])
def test_sizes_and_batches(upscale, size):
    model = small(upscale)
    x = torch.rand(3, 3, *size)
    y = model(x)
    assert y.shape == (3, 3, upscale * size[0], upscale * size[1])
    torch.testing.assert_close(model(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)


def test_a_batch_larger_than_a_window():
    model = small(4)
    x = torch.rand(2, 3, 50, 49)
    torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), copy.deepcopy(model).train()(x))
    assert torch.equal(small(4, tlc=False)(x), small(4).train()(x))


def test_gradients_reach_every_parameter():
    model = small().train()
    model(torch.rand(2, 3, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_and_compile():
    model = small()
    x = torch.rand(1, 3, 12, 10)
    y = model(x)
    assert (copy.deepcopy(model).bfloat16()(x.bfloat16()).float() - y).abs().max() < 0.05 * y.abs().max()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)


def test_names_of_the_authors(tmp_path):
    model = small(3)
    theirs = authors_names(model.state_dict())
    assert all(name.startswith(("overlap_embed", "deep_feature_extraction", "upsample")) for name in theirs)
    wrong = {name: torch.zeros_like(value) for name, value in theirs.items()}
    torch.save({"params": wrong, "params_ema": {f"module.{k}": v for k, v in theirs.items()}}, tmp_path / "net_g.pth")
    save_file(theirs, tmp_path / "net_g.safetensors")
    x = torch.rand(1, 3, 9, 8)
    for source in (tmp_path / "net_g.pth", str(tmp_path / "net_g.safetensors"), {"params": theirs}, model.state_dict()):
        loaded = load_dlgsanet(source)
        assert loaded.settings == {"upscale": 3, **SMALL} and not loaded.training
        assert torch.equal(loaded(x), model(x))
    assert "eval: whole map" in repr(load_dlgsanet(theirs, tlc=False))


def test_refuses_other_checkpoints(tmp_path):
    model = small()
    with pytest.raises(ValueError, match=r"DLGSANet\(upscale=3, dim=12, groups=2, blocks=1\), the model has upscale=2"):
        checkpoint_filter_fn(small(3).state_dict(), model)
    with pytest.raises(ValueError, match=r"not DLGSANet's"):
        load_dlgsanet({"conv1.weight": torch.zeros(1)})
    damaged = model.state_dict()
    del damaged["groups.1.blocks.0.mixer.reduce.bias"]
    with pytest.raises(ValueError, match=r"1 tensors missing \(groups.1.blocks.0.mixer.reduce.bias\)"):
        load_dlgsanet(damaged)
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        load_dlgsanet(tmp_path / "nothing.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            load_dlgsanet(tmp_path / name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DLGSANet(5), "upscale must be 2, 3 or 4, got 5"),
        (lambda: DLGSANet(2, "huge"), "one of tiny, light, base, got 'huge'"),
        (lambda: DLGSANet(2, dim=32), "multiple of 6, got 32"),
        (lambda: DLGSANet(2, blocks=0), "at least 1, got 3 and 0"),
        (lambda: small()(255 * torch.rand(1, 3, 9, 9)), r"in \[0, 1\], got values up to 2.*; divide by 255"),
        (lambda: small()(torch.zeros(1, 3, 9, 9, dtype=torch.uint8)), r"uint8; use x.float\(\) / 255"),
        (
            lambda: small()(torch.rand(1, 1, 9, 9)),
            r"RGB images \(B, 3, H, W\), got \(1, 1, 9, 9\); repeat a gray channel",
        ),
        (lambda: small()(torch.rand(1, 4, 9, 9)), "take alpha away"),
        (lambda: small()(torch.rand(3, 9, 9)), r"\(3, 9, 9\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_warns_of_images_smaller_than_the_kernels():
    with pytest.warns(UserWarning, match="6x9 pixels is smaller than the 7x7 kernels"):
        assert small()(torch.rand(1, 3, 6, 9)).shape == (1, 3, 12, 18)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small()(torch.rand(1, 3, 7, 9))
