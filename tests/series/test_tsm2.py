"""TSM2: the layers from the equations, patches, features of the future, what the scans look at, bad input."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForTimeSeriesPrediction

from tokenry.series import Forecaster, TSM2Config, TSM2ForPrediction

pytestmark = pytest.mark.method("mambamixer")

SMALL = {"context_length": 16, "prediction_length": 5, "patch_length": 4, "patch_stride": 4, "d_model": 6, "d_state": 2}


def tiny(**settings) -> TSM2ForPrediction:
    """With weights away from their start."""
    torch.manual_seed(0)
    model = TSM2ForPrediction(TSM2Config(**{**SMALL, **settings})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def past(batch=2, series=3, steps=16, seed=1):
    return torch.randn(batch, steps, series, generator=torch.Generator().manual_seed(seed)) * 2 + 3


@pytest.mark.parametrize(("average", "last_sum"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("channel_mixer", ["selective", "mlp", "none"])
@torch.no_grad()
def test_the_layers_are_the_equations(channel_mixer, average, last_sum):
    model, x = tiny(channel_mixer=channel_mixer, average=average, last_sum=last_sum, num_input_channels=3), past()
    loc, scale = x.mean(1), (x.var(1, correction=0) + 1e-5).sqrt()
    v = torch.zeros(2, 3, 4, 6)  # (B, M, P, d)
    for b in range(2):
        for m in range(3):
            for p in range(4):
                values = (x[b, 4 * p : 4 * p + 4, m] - loc[b, m]) / scale[b, m]
                v[b, m, p] = model.embedding(values)

    def token(layer, v):
        part = model.token_mixers[layer]
        v = F.layer_norm(v, (4, 6), part.norm.weight, part.norm.bias)
        return torch.stack([torch.stack([part.mixer(v[b, m][None])[0] for m in range(3)]) for b in range(2)])

    def channel(layer, v):
        if channel_mixer == "none":
            return v
        part = model.channel_mixers[layer]
        v = F.layer_norm(v, (4, 6), part.norm.weight, part.norm.bias)
        out = torch.zeros_like(v)
        for b in range(2):
            for p in range(4):
                if channel_mixer == "selective":
                    out[b, :, p] = part.mixer(v[b, :, p].T[None])[0].T  # d features of M series in a row
                else:
                    for d in range(6):
                        out[b, :, p, d] = part.mixer(v[b, :, p, d])
        return out

    if average:
        weights = {name: getattr(model.average, name) for name in ("alpha", "beta", "theta", "gamma")}
        t, c = [v], [v]
        for layer in range(2):
            a, b, th, g = (weights[name][layer] for name in weights)
            into = sum(a[i] * t[i] + b[i] * c[i] for i in range(layer + 1))
            t.append(token(layer, into))
            into = sum(th[i] * t[i] for i in range(layer + 2)) + sum(g[i] * c[i] for i in range(layer + 1))
            c.append(channel(layer, into))
        v = c[-1]
        if last_sum:
            a, b = model.average.alpha[2], model.average.beta[2]
            v = sum(a[i] * t[i] + b[i] * c[i] for i in range(3))
    else:
        for layer in range(2):
            v = v + token(layer, v)
            v = v if channel_mixer == "none" else v + channel(layer, v)
    y = torch.stack([model.head(v[:, m].flatten(1)) * scale[:, m, None] + loc[:, m, None] for m in range(3)], dim=-1)
    torch.testing.assert_close(model(past_values=x).prediction_outputs, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("steps", "patches", "missing"), [(16, 4, 0), (17, 5, 3), (18, 5, 2), (4, 1, 0)])
@torch.no_grad()
def test_patches_that_do_not_come_out_even_repeat_the_last_value(steps, patches, missing):
    model = tiny(context_length=steps)
    assert model.config.num_patches == patches
    x = torch.arange(1.0, steps + 1).expand(1, 2, steps)
    cut = model._patches(x)
    assert cut.shape == (1, 2, patches, 4)
    assert cut[0, 0].flatten().tolist() == [*range(1, steps + 1), *[steps] * missing]


@torch.no_grad()
def test_series_look_at_each_other_only_through_the_channel_mixer():
    x = past()
    changed = x.clone()
    changed[..., 2] = past(seed=5)[..., 2]
    for kind, same in (("selective", False), ("mlp", False), ("none", True)):
        model = tiny(channel_mixer=kind, num_input_channels=3)
        before, after = (model(past_values=v).prediction_outputs[..., :2] for v in (x, changed))
        assert torch.allclose(before, after, atol=1e-6) == same, kind


@torch.no_grad()
def test_one_series_and_a_horizon_longer_than_the_past():
    y = tiny(prediction_length=40)(past_values=past(1, 1)).prediction_outputs
    assert y.shape == (1, 40, 1) and y.isfinite().all()


@torch.no_grad()
def test_instance_norm_makes_the_forecast_follow_shift_and_scale():
    model, x = tiny(), past()
    y = model(past_values=x).prediction_outputs
    torch.testing.assert_close(model(past_values=3 * x + 10).prediction_outputs, 3 * y + 10, rtol=1e-3, atol=1e-2)
    other = tiny(instance_norm=False)
    assert not torch.allclose(
        other(past_values=x + 10).prediction_outputs, other(past_values=x).prediction_outputs + 10
    )


def with_features(**settings):
    model = tiny(num_static_features=2, num_future_features=3, future_length=4, **settings)
    features = {"static_features": torch.randn(2, 3, 2), "future_features": torch.randn(2, 3, 4, 3)}
    return model, features


def test_what_is_known_besides_the_past_is_used_and_learned():
    torch.manual_seed(0)
    model, features = with_features()
    assert model.config.num_patches == 12  # [x | Z | S]
    y = model(past_values=past(), **features, future_values=torch.zeros(2, 5, 3))
    y.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    for name, value in features.items():
        changed = {**features, name: value + 1}
        assert not torch.allclose(model(past_values=past(), **changed).prediction_outputs, y.prediction_outputs)


def test_future_features_that_tell_the_future_are_learned():
    torch.manual_seed(0)
    model = TSM2ForPrediction(TSM2Config(**SMALL, num_future_features=1, dropout=0.0, instance_norm=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(150):
        future = torch.randn(16, 5, 2)
        told = future.transpose(1, 2).unsqueeze(3)  # (B, M, T_Z, 1)
        loss = model(past_values=torch.randn(16, 16, 2), future_features=told, future_values=future).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert sum(errors[-10:]) < 0.6 * sum(errors[:10])  # noise otherwise: nothing in the past tells it


def test_saves_and_loads_by_its_type(tmp_path):
    model = tiny(channel_mixer="mlp", num_input_channels=3)
    model.save_pretrained(tmp_path)
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    assert isinstance(again, TSM2ForPrediction)
    with torch.no_grad():
        assert torch.equal(again(past_values=past()).prediction_outputs, model(past_values=past()).prediction_outputs)
        assert isinstance(model(past_values=past(), return_dict=False), tuple)


def test_starting_weights_of_the_scans_survive_the_model_s_own():
    model = TSM2ForPrediction(TSM2Config(**{**SMALL, "d_model": 64, "d_state": 2}))
    mixers = [layer.mixer for layer in model.token_mixers]
    mixers += [ssm for layer in model.channel_mixers for ssm in (layer.mixer.ssm_f, layer.mixer.ssm_b)]
    for ssm in mixers:
        step = F.softplus(ssm.dt_proj.bias)
        assert 9e-4 < step.min() < 0.01 and 0.03 < step.max() < 0.11
        torch.testing.assert_close(-ssm.rates()[0], torch.tensor([1.0, 2.0]))
    assert model.average.beta[1].tolist() == [0.5, 1.0]


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for saving in (False, True):
        model = tiny(dropout=0.0).train()
        if saving:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(past_values=past(), future_values=torch.zeros(2, 5, 3)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_an_mlp_over_the_series_takes_their_number_from_the_table():
    forecaster = Forecaster("tsm2", context_length=16, prediction_length=4, channel_mixer="mlp")
    assert forecaster.build_model(5).config.num_input_channels == 5
    assert not forecaster.build_model(5).any_variates


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_length": 17}, "context_length=16 is shorter than a patch of patch_length=17"),
        ({"patch_stride": 0}, "patch_stride must be at least 1"),
        ({"num_future_features": -1}, "num_future_features must be 0"),
        ({"channel_mixer": "attention"}, "one of selective, mlp, none, got 'attention'"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_rejects_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TSM2Config(**{**SMALL, **settings})


def with_nan():
    x = past()
    x[0, 3, 1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, lambda: {"past_values": past(steps=20)}, "20 time steps, this model takes context_length=16"),
        ({}, lambda: {"past_values": past()[0]}, r"must be \(batch, time, series\)"),
        ({}, lambda: {"past_values": with_nan()}, "past_values hold NaN or infinity"),
        ({"channel_mixer": "mlp"}, lambda: {"past_values": past()}, "takes num_input_channels=7"),
        ({"num_static_features": 2}, lambda: {"past_values": past()}, "static_features are missing"),
        (
            {},
            lambda: {"past_values": past(), "future_features": torch.zeros(2, 3, 5, 1)},
            "future_features are given, and the model was made with num_future_features=0",
        ),
        (
            {"num_future_features": 1},
            lambda: {"past_values": past(), "future_features": torch.zeros(2, 3, 4, 1)},
            r"must be \(2, 3, 5, 1\), got \(2, 3, 4, 1\)",
        ),
        ({}, lambda: {"past_values": past(), "future_values": torch.zeros(2, 4, 3)}, "future_values must be"),
    ],
)
def test_rejects_input(settings, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)(**inputs())
