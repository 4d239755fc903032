"""The loop that trains small language models: what it minimises, and that a killed run ends where an unbroken one does."""

import copy

import pytest
import torch

from tokenry.claims import training_loop
from tokenry.claims.training_loop import muon_and_adamw, train_steps


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 11)
    )


def next_number(model, until=None):
    """Loss of predicting n + 1 (mod 11) from n; the step alone decides which n."""

    def loss(step):
        if step == until:
            raise Killed
        ids = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
        return torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 11)

    return loss


def test_it_learns_and_tells_how(network):
    said = []
    log = train_steps(network, next_number(network), steps=200, lr=5e-2, say=said.append)
    assert log["losses"][0] > 2 and log["losses"][-1] < 0.5
    assert len(log["losses"]) == len(said) == 21 and said[-1].startswith("step 200 of 200")
    assert network.training and log["seconds"] > 0


def test_a_killed_run_ends_as_an_unbroken_one(network, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 4)
    whole, said, file = copy.deepcopy(network), [], tmp_path / "run.pt"
    options = {"steps": 14, "lr": 1e-2, "say": said.append}
    expected = train_steps(whole, next_number(whole), **options)
    again = copy.deepcopy(network)
    with pytest.raises(Killed):
        train_steps(network, next_number(network, until=10), **options, checkpoint=file)
    log = train_steps(again, next_number(again), **options, checkpoint=file)
    assert "going on from step 8" in said
    assert log["losses"] == expected["losses"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_matrices_inside_go_to_muon_and_the_rest_to_adamw():
    network = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 4), "linear": torch.nn.Linear(4, 4)})
    network["frozen"] = torch.nn.Linear(4, 4).requires_grad_(False)
    muon, adamw = muon_and_adamw(network, 1e-3)
    assert [p is network["linear"].weight for p in muon.param_groups[0]["params"]] == [True]
    others = {id(p) for p in adamw.param_groups[0]["params"]}
    assert others == {id(network["embedding"].weight), id(network["linear"].bias)}
