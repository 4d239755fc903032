"""Weighted averages of earlier features: the reference's numbers, the equation term by term, chains, bad lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.layers import DenseAverage

pytestmark = pytest.mark.method("mambamixer")
NAMES = ("alpha", "beta", "theta", "gamma")


def filled(layers, **values):
    """Weights drawn, or all of a name from ``values``: a function of layer and length."""
    generator, average = torch.Generator().manual_seed(layers), DenseAverage(layers).double()
    for name in NAMES:
        for layer, parameter in enumerate(getattr(average, name), start=1):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values[name](layer, parameter.numel()) if values else drawn
    return average


@pytest.mark.golden
@torch.no_grad()
def test_golden():
    spec = GoldenCase("mambamixer", "weighted_averaging").spec

    def numbers(values):
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    stored, wanted = ({key: numbers(value) for key, value in spec[part].items()} for part in ("inputs", "outputs"))
    mixers = {
        name: [lambda v, w=w: torch.tanh(w @ v) for w in stored[key]]
        for name, key in (("token", "WT"), ("channel", "WC"))
    }
    average = DenseAverage(len(stored["WT"])).double()
    for name in NAMES:
        for parameter, value in zip(getattr(average, name), stored[name], strict=True):
            parameter.copy_(value)
    x = torch.tensor(spec["inputs"]["x"], dtype=torch.float64)
    inputs = {"x_token": [], "x_channel": []}
    tokens, channels = [x], [x]
    for layer in range(1, average.num_layers + 1):
        inputs["x_token"].append(average.token_input(layer, tokens, channels))
        tokens.append(mixers["token"][layer - 1](inputs["x_token"][-1]))
        inputs["x_channel"].append(average.channel_input(layer, tokens, channels))
        channels.append(mixers["channel"][layer - 1](inputs["x_channel"][-1]))
    found = {**inputs, "y_token": tokens, "y_channel": channels}
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(values), rtol=1e-12, atol=1e-12)
    assert torch.equal(average(x, mixers["token"], mixers["channel"]), channels[-1])


@given(layers=st.integers(1, 5), layer=st.integers(1, 5), size=st.integers(1, 4))
@torch.no_grad()
def test_is_the_sum_of_its_terms(layers, layer, size):
    layer = min(layer, layers)
    average, generator = filled(layers), torch.Generator().manual_seed(0)
    outputs = torch.randn(2, layer + 1, size, generator=generator, dtype=torch.float64)
    tokens, channels = list(outputs[0]), list(outputs[1, :layer])
    into = average.token_input(layer, tokens[:layer], channels)
    for j in range(size):
        total = sum(float(average.alpha[layer - 1][i]) * float(tokens[i][j]) for i in range(layer))
        total += sum(float(average.beta[layer - 1][i]) * float(channels[i][j]) for i in range(layer))
        assert float(into[j]) == pytest.approx(total, abs=1e-9)
    into = average.channel_input(layer, tokens, channels)
    for j in range(size):
        total = sum(float(average.theta[layer - 1][i]) * float(tokens[i][j]) for i in range(layer + 1))
        total += sum(float(average.gamma[layer - 1][i]) * float(channels[i][j]) for i in range(layer))
        assert float(into[j]) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_count_of_weights(layers):
    assert sum(p.numel() for p in DenseAverage(layers, device="meta").parameters()) == layers * (2 * layers + 3)


def last(layer, size):
    return torch.eye(size, dtype=torch.float64)[-1]


def none(layer, size):
    return torch.zeros(size, dtype=torch.float64)


LINEAR = [
    torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=torch.float64),
    torch.tensor([[1.0, 3.0], [0.0, -1.0]]).double(),
]
MIXERS = [lambda v: torch.tanh(LINEAR[0] @ v), lambda v: torch.sin(LINEAR[1] @ v)]
X = torch.tensor([0.3, -0.7], dtype=torch.float64)


@torch.no_grad()
def test_weights_of_the_newest_alone_are_a_plain_chain():
    token, channel = MIXERS
    chain = filled(3, alpha=none, beta=last, theta=last, gamma=none)
    y = X
    for _ in range(3):
        y = channel(token(y))
    torch.testing.assert_close(chain(X, [token] * 3, [channel] * 3), y)
    tokens_alone = filled(3, alpha=last, beta=none, theta=last, gamma=none)
    torch.testing.assert_close(tokens_alone(X, [token] * 3, [channel] * 3), channel(token(token(token(X)))))


@pytest.mark.parametrize("mixed", [None, [False, True, False, True], [False] * 4, [True, False, True, True]])
@pytest.mark.parametrize("last_sum", [False, True])
@torch.no_grad()
def test_starts_as_a_residual_net(mixed, last_sum):
    token, channel = MIXERS
    present = [True] * 4 if mixed is None else mixed
    y = X
    for here in present[:-1]:
        y = y + token(y)
        y = y + channel(y) if here else y
    y = y + token(y)
    if present[-1]:
        y = channel(y) + (y if last_sum else 0.0)  # without a last sum the last channel mixer stands alone
    start = DenseAverage(4, mixed, last_sum).double()
    torch.testing.assert_close(start(X, [token] * 4, [channel if here else torch.clone for here in present]), y)


@torch.no_grad()
def test_last_sum_takes_every_output_by_its_weight():
    token, channel = MIXERS
    average = DenseAverage(2, last_sum=True).double()
    assert sum(p.numel() for p in average.parameters()) == 14 + 6
    tokens, channels = [X], [X]
    for layer in (1, 2):
        tokens.append(token(average.token_input(layer, tokens, channels)))
        channels.append(channel(average.channel_input(layer, tokens, channels)))
    average.alpha[2].copy_(torch.tensor([1.0, 2.0, 3.0]))
    average.beta[2].copy_(torch.tensor([4.0, 5.0, 6.0]))
    y = 1 * X + 2 * tokens[1] + 3 * tokens[2] + 4 * X + 5 * channels[1] + 6 * channels[2]
    torch.testing.assert_close(average(X, [token] * 2, [channel] * 2), y)


def test_every_weight_gets_a_gradient():
    average = DenseAverage(3, last_sum=True)
    average(X.float(), [torch.tanh] * 3, [torch.sin] * 3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in average.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseAverage(0), "num_layers must be at least 1"),
        (lambda: DenseAverage(2, [True]), "one entry for each of 2 layers, got 1"),
        (lambda: DenseAverage(2).token_input(3, [X], [X]), "layer must be from 1 to 2, got 3"),
        (lambda: DenseAverage(2).channel_input(2, [X, X], [X, X]), "takes 3 outputs of token mixers and 2 of channel"),
        (lambda: DenseAverage(2).token_input(2, [X, X], [X]), "got 2 and 1"),
        (lambda: DenseAverage(2)(X, [torch.tanh], [torch.tanh]), "weights for 2 layers, got 1 token mixers"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
