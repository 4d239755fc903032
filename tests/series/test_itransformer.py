"""iTransformer: the authors' outputs, the equations one number at a time, the promises, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForTimeSeriesPrediction

from golden_case import GOLDEN, GoldenCase
from tokenry.assets import etth1, external
from tokenry.series import (
    ITransformerConfig,
    ITransformerForPrediction,
    Scaler,
    order_columns,
    split_rows,
    time_features,
    window_count,
)
from tokenry.series.itransformer import checkpoint_filter_fn

pytestmark = pytest.mark.method("itransformer")

CASES = {
    "etth1_96_96": {"prediction_length": 96, "d_model": 256},
    "flow_etth1_96_336": {"prediction_length": 336, "d_model": 128, "attention": "flow"},
    "nomark_solar_like": {"prediction_length": 192, "d_model": 512},
    "nonorm_constant_channel": {
        "prediction_length": 96, "d_model": 128, "num_hidden_layers": 3, "instance_norm": False,
    },
    "norm_constant_channel": {"prediction_length": 24, "d_model": 128},
}  # fmt: skip


def tiny(**settings) -> ITransformerForPrediction:
    config = {"context_length": 12, "prediction_length": 5, "d_model": 16, "num_attention_heads": 4} | settings
    torch.manual_seed(0)
    return ITransformerForPrediction(ITransformerConfig(**config)).eval()


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case = GoldenCase("itransformer", name)
    model = ITransformerForPrediction(ITransformerConfig(**CASES[name])).eval()
    model.load_state_dict(checkpoint_filter_fn(case.state_dict(), model), strict=True)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.no_grad():
        fast = model(case.inputs["x"], case.inputs.get("x_mark"))
        case.compare("y", fast.prediction_outputs)
        if "attn0" in case.outputs:
            full = model(case.inputs["x"], case.inputs["x_mark"], output_attentions=True)
            case.compare("attn0", full.attentions[0])
            case.compare("y", full.prediction_outputs)


def splits() -> dict:
    return json.loads((GOLDEN / "itransformer" / "splits.json").read_text())["sets"]


@pytest.mark.golden
@pytest.mark.parametrize("name", sorted(splits()))
def test_golden_splits(name):
    """Rows, window counts, scaler constants and edge rows of the authors' loaders."""
    import pandas as pd

    expected = splits()[name]
    rows = {"ETTh1": 17420, "ETTh2": 17420, "ETTm1": 69680, "ETTm2": 69680}.get(name)
    folder = external("forecasting")
    if name == "ETTh1":
        frame = etth1()
    elif folder is not None and (folder / f"{name}.csv.gz").exists():
        frame = pd.read_csv(folder / f"{name}.csv.gz", parse_dates=["date"])
    else:
        frame = None
    if frame is None and rows is None:
        pytest.skip(
            f"{name}.csv.gz does not ship with Tokenry: set TOKENRY_DATA to a folder that has forecasting/{name}.csv.gz"
        )
    context = expected.get("seq_len", 96)
    blocks = split_rows(len(frame) if frame is not None else rows, name, context)
    for split in ("train", "val", "test"):
        length = blocks[split].stop - blocks[split].start
        assert length == expected[f"{split}_rows"]
        for horizon, count in expected[split].items():
            assert window_count(length, context, int(horizon)) == count
    if frame is None:
        return
    frame = order_columns(frame)
    values = frame.drop(columns="date").to_numpy(float)
    scaler = Scaler.fit(values[blocks["train"].start : blocks["train"].stop])
    np.testing.assert_allclose(scaler.mean, expected["mean"], rtol=1e-9)
    np.testing.assert_allclose(scaler.scale, expected["std"], rtol=1e-9)
    test = scaler.transform(values)[blocks["test"].start : blocks["test"].stop]
    np.testing.assert_allclose(test[0], expected["first_test_window_first_row"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(test[-1], expected["last_row"], rtol=1e-6, atol=1e-9)
    marks = time_features(frame["date"])[blocks["test"].start]
    np.testing.assert_allclose(marks, expected["first_test_mark"], atol=1e-6)


def slow_forecast(model: ITransformerForPrediction, x: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
    """The equations, one window, one head, one pair of tokens at a time."""
    config, out = model.config, []
    for b in range(len(x)):
        mean, sd = x[b].mean(0), (x[b].var(0, correction=0) + 1e-5).sqrt()
        if not config.instance_norm:
            mean, sd = torch.zeros_like(mean), torch.ones_like(sd)
        tokens = [((x[b, :, n] - mean[n]) / sd[n]) for n in range(x.shape[2])]
        tokens += [] if marks is None else [marks[b, :, m] for m in range(marks.shape[2])]
        h = torch.stack([model.embedding.weight @ t + model.embedding.bias for t in tokens])
        for layer in model.layers:
            q, k, v = (h @ layer.attention.qkv.weight.T + layer.attention.qkv.bias).chunk(3, -1)
            width, heads = config.d_model // config.num_attention_heads, []
            for i in range(config.num_attention_heads):
                part = slice(i * width, (i + 1) * width)
                attend = slow_flow if config.attention == "flow" else slow_softmax
                heads.append(attend(q[:, part], k[:, part], v[:, part]))
            h = F.layer_norm(h + layer.attention.out(torch.cat(heads, -1)), h.shape[-1:], *layer.norm1.parameters())
            f = layer.ffn_out(F.gelu(layer.ffn_in(h)))
            h = F.layer_norm(h + f, h.shape[-1:], *layer.norm2.parameters())
        y = model.head(F.layer_norm(h, h.shape[-1:], *model.norm.parameters()))
        out.append(torch.stack([y[n] * sd[n] + mean[n] for n in range(x.shape[2])], -1))
    return torch.stack(out)


def slow_softmax(q, k, v):
    rows = []
    for i in range(len(q)):
        scores = torch.stack([q[i] @ k[j] / q.shape[1] ** 0.5 for j in range(len(k))])
        rows.append(sum(w * v[j] for j, w in enumerate(scores.softmax(0))))
    return torch.stack(rows)


def slow_flow(q, k, v, eps=1e-6):
    q, k = q.sigmoid(), k.sigmoid()
    incoming = [1 / ((q[i] + eps) @ (k.sum(0) + eps)) for i in range(len(q))]
    outgoing = [1 / ((k[j] + eps) @ (q.sum(0) + eps)) for j in range(len(k))]
    source, sink = sum(k[j] * outgoing[j] for j in range(len(k))), sum(q[i] * incoming[i] for i in range(len(q)))
    competition = torch.stack([(k[j] + eps) @ (sink + eps) for j in range(len(k))]).softmax(0) * len(k)
    rows = []
    for i in range(len(q)):
        allocation = torch.sigmoid((q[i] + eps) @ (source + eps) * len(q) / len(k))
        rows.append(allocation * incoming[i] * sum((q[i] @ k[j]) * v[j] * competition[j] for j in range(len(k))))
    return torch.stack(rows)


@given(
    batch=st.integers(1, 3),
    variates=st.integers(1, 6),
    features=st.integers(0, 4),
    attention=st.sampled_from(["full", "flow"]),
    norm=st.booleans(),
)
def test_matches_the_equations(batch, variates, features, attention, norm):
    model = tiny(attention=attention, instance_norm=norm).double()
    generator = torch.Generator().manual_seed(batch * 100 + variates * 10 + features)
    x = torch.randn(batch, 12, variates, dtype=torch.float64, generator=generator) * 3 + 1
    marks = torch.rand(batch, 12, features, dtype=torch.float64, generator=generator) - 0.5 if features else None
    with torch.no_grad():
        torch.testing.assert_close(model(x, marks).prediction_outputs, slow_forecast(model, x, marks))


@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_follows_a_change_of_unit(scale, shift):
    model = tiny().double()
    x = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 10
    with torch.no_grad():
        plain, changed = model(x).prediction_outputs, model(scale * x + shift).prediction_outputs
    torch.testing.assert_close(changed, scale * plain + shift, rtol=1e-3, atol=1e-3 * scale)


def test_one_variate_without_marks_is_a_net_of_its_own():
    """With one token, attention is its value map: nothing of queries and keys is left."""
    model = tiny()
    x = torch.randn(2, 12, 1)
    with torch.no_grad():
        before = model(x).prediction_outputs
        for layer in model.layers:
            layer.attention.qkv.weight[:32].normal_()
        torch.testing.assert_close(model(x).prediction_outputs, before)


def test_new_variate_acts_through_attention_alone():
    model = tiny()
    x = torch.randn(2, 12, 4)
    with torch.no_grad():
        more = model(x).prediction_outputs[..., :3]
        assert not torch.allclose(more, model(x[..., :3]).prediction_outputs)
        for layer in model.layers:
            layer.attention.out.weight.zero_()
        torch.testing.assert_close(model(x).prediction_outputs[..., :3], model(x[..., :3]).prediction_outputs)


def test_gap_is_told_by_the_mask():
    model = tiny()
    x = torch.randn(2, 12, 3)
    mask = torch.ones_like(x, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(x, past_observed_mask=mask).prediction_outputs, model(x).prediction_outputs)
        mask[0, 3:5, 1] = False
        one, other = x.clone(), x.clone()
        one[0, 3:5, 1], other[0, 3:5, 1] = float("nan"), 1e6
        a, b = (model(v, past_observed_mask=mask).prediction_outputs for v in (one, other))
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
        mask[:] = False
        assert model(x, past_observed_mask=mask).prediction_outputs.isfinite().all()


def test_parameters_follow_the_formula():
    for d, s, layers, ff in ((16, 5, 2, 16), (24, 7, 3, 40)):
        model = tiny(d_model=d, prediction_length=s, num_hidden_layers=layers, ffn_dim=ff)
        formula = d * 13 + layers * (4 * d * (d + 1) + ff * (d + 1) + d * (ff + 1) + 4 * d) + 2 * d + s * (d + 1)
        assert sum(p.numel() for p in model.parameters()) == formula


def test_round_trip_and_auto_class(tmp_path):
    model = tiny(attention="flow")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path).eval()
    assert isinstance(again, ITransformerForPrediction)
    x = torch.randn(2, 12, 3)
    assert torch.equal(model(x).prediction_outputs, again(x).prediction_outputs)


def test_checkpoint_of_data_parallel_and_own_names():
    case = GoldenCase("itransformer", "norm_constant_channel")
    plain = checkpoint_filter_fn(case.state_dict())
    wrapped = checkpoint_filter_fn({f"module.{name}": value for name, value in case.state_dict().items()})
    assert plain.keys() == wrapped.keys() == checkpoint_filter_fn(plain).keys()


def test_gradient_checkpointing_changes_nothing():
    model = tiny(dropout=0.0).train()
    x, y = torch.randn(2, 12, 3), torch.randn(2, 5, 3)
    plain = torch.autograd.grad(model(x, future_values=y).loss, list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for a, b in zip(plain, torch.autograd.grad(model(x, future_values=y).loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_tuple():
    assert isinstance(tiny()(torch.randn(1, 12, 2), return_dict=False), tuple)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 30, "num_attention_heads": 8}, "use d_model=32"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention": "prob"}, "'full' or 'flow'"),
    ],
)
def test_rejects_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        ITransformerConfig(**settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_values": torch.zeros(2, 13, 3)}, "context_length=12"),
        ({"past_values": torch.zeros(2, 12)}, "batch, time, variates"),
        ({"past_values": torch.zeros(2, 12, 0)}, "with a variate"),
        ({"past_values": torch.zeros(2, 12, 3).index_fill(2, torch.tensor([1]), float("nan"))}, "in variate 1"),
        ({"past_values": torch.zeros(2, 12, 3).index_fill(2, torch.tensor([2]), float("inf"))}, "in variate 2"),
        ({"past_values": torch.zeros(2, 12, 3), "past_time_features": torch.zeros(2, 11, 4)}, "past_time_features"),
        ({"past_values": torch.zeros(2, 12, 3), "past_observed_mask": torch.ones(2, 12, 1)}, "past_observed_mask"),
        ({"past_values": torch.zeros(2, 12, 3), "future_values": torch.zeros(2, 6, 3)}, "prediction_length"),
    ],
)
def test_rejects_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**inputs)


def test_rejects_attention_map_of_flow():
    with pytest.raises(ValueError, match="attention='full'"):
        tiny(attention="flow")(torch.zeros(1, 12, 2), output_attentions=True)
