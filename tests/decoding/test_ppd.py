"""Parallel Prompt Decoding: the authors' own runs and trees, prompts against their definition, budgets, bad input."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from golden_case import GoldenCase, golden_cases
from tiny_causal import CONFIGS, VOCABULARY, tiny_causal, tokens
from tokenry.assets import load_model, model_path
from tokenry.assets import prompts as held_out
from tokenry.decoding import (
    DecodingStats,
    DraftModelDecoding,
    ParallelPromptDecoding,
    ParallelPrompts,
    PassLatency,
    TokenRecycling,
    best_budget,
    sparse_trees,
)
from tokenry.decoding.prompt_budget import PAUSES, PromptBudget
from tokenry.decoding.prompt_tree import PromptTree, checked_trees
from tokenry.decoding.tree_search import expected_speed, stationary

pytestmark = pytest.mark.method("ppd")

RUNS = ["llama2l_tree20", "llama2l_tree60"]
FULL_ATTENTION = [kind for kind in CONFIGS if kind != "gemma2"]  # which has sliding windows
TREES = {
    1: [([0], 0.4, 2), ([1], 0.1, 1), ([5], 0.1, 3)],
    2: [([0], 0.4, 2), ([2], 0.1, 1), ([0, 0], 0.1, 3), ([2, 4], 0.1, 1)],
    3: [([0], 0.4, 1), ([1], 0.1, 3), ([0, 1], 0.1, 2), ([0, 1, 0], 0.1, 1), ([0, 1, 9], 0.1, 2)],
}
ACCURACY = [
    [0.483, 0.143, 0.074, 0.045, 0.031, 0.022, 0.017, 0.014, 0.012, 0.01],
    [0.279, 0.108, 0.066, 0.045, 0.034, 0.027, 0.022, 0.019, 0.017, 0.015],
    [0.192, 0.083, 0.055, 0.041, 0.033, 0.027, 0.023, 0.02, 0.018, 0.016],
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def some_prompts(model, m=3, ensemble=1, seed=0):
    size = model.get_input_embeddings().weight.shape[1]
    values = torch.randn(m * ensemble, size, generator=torch.Generator().manual_seed(seed))
    return ParallelPrompts(values, m, ensemble=ensemble)


def greedy(model, ids, new=24, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **options)


class Watch:
    """Notes logits, states and cache lengths of every pass."""

    def __init__(self, strategy):
        self.logits, self.states, self.cached, self.tokens = [], [], [], []
        observe = strategy.observe

        def watched(state, proposal, logits, accepted):
            observe(state, proposal, logits, accepted)
            self.logits.append(logits)
            self.tokens.append(proposal.tokens)
            self.states.append(list(strategy._states))
            self.cached.append(state.cached)

        strategy.observe = watched


# --- the authors' own ---------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", RUNS)
def test_golden(name, attention):
    """Ids, tokens and state of every pass, logits of the first two, and all buffers of the trees."""
    case = GoldenCase("ppd", name)
    weights = case.state_dict()
    embeddings = weights.pop("prompt_encoder.default.embedding.weight")
    model = LlamaForCausalLM(LlamaConfig(**case.spec["config"], attn_implementation=attention)).eval()
    model.load_state_dict(weights)
    prompts = ParallelPrompts(embeddings, case.spec["num_special_tokens"])
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    trees = {int(d): nodes for d, nodes in case.spec["tree"].items()}
    strategy = ParallelPromptDecoding(prompts, trees)
    watch = Watch(strategy)
    accepted = case.outputs["accepted_per_step"].tolist()
    # The first pass, with the root and the prompt tokens alone, is the authors' prefill. One token more than they
    # report: they do not count the last bonus.
    new = 1 + sum(accepted)
    out = greedy(model, case.inputs["prompt"][None], new, custom_generate=strategy)[0]
    assert torch.equal(out[:-1], case.outputs["sequence"])
    assert torch.equal(out, greedy(model, case.inputs["prompt"][None], new)[0])
    assert [count for (count,) in strategy.stats.accepted] == [1, *accepted]
    assert strategy.stats.prefill_passes == 0  # the prompt tokens behind the root are a chain: the prompt goes along
    # A state is known after every pass but the last.
    assert [d for (d,) in watch.states] == [3, *case.outputs["state_after_step"].tolist()[:-1]]
    case.compare("first.logits", watch.logits[0][:, :1])
    case.compare("first.prompt_logits", watch.logits[0][:, 1:])
    case.compare("first.tree_logits", watch.logits[1])
    root_and_guesses = case.outputs["buffers3.normal_token_indices"]
    leaves = case.outputs["buffers3.retrieve_indices"]  # of these, padded with -1, which the authors read as token 0
    drafted = watch.tokens[1][0, root_and_guesses][leaves].masked_fill(leaves < 0, 0)
    assert torch.equal(drafted, case.outputs["first.candidates"])

    for d, nodes in checked_trees(trees, 3).items():
        mine = PromptTree(checked_trees(trees, 3), {d})
        tree, size = mine.tree, 1 + 3 + sum(1 + node.prompts for node in nodes)
        flat = torch.where(tree.is_candidate, mine.guess + 1, 0)
        flat[0] = 0
        flat[mine.prompt_nodes] = mine.prompt_rows - 3
        candidates = tree.is_candidate.nonzero().flatten()
        for value, theirs in (
            (tree.ancestor.float(), "attn_mask"),
            (tree.depth, "position_ids"),
            (flat, "tree_indices"),
            (candidates, "normal_token_indices"),
        ):
            assert torch.equal(value, case.outputs[f"buffers{d}.{theirs}"]), theirs
        assert tree.size == size
        for rank, hung in case.spec["special_token_indices"][str(d)].items():
            node = candidates[int(rank)]
            assert mine.hung_nodes[node, : mine.hung_list[node], 0].tolist() == hung
        leaves = case.outputs[f"buffers{d}.retrieve_indices"]
        paths = {tuple(candidates[path[path >= 0]].tolist()) for path in leaves}
        guesses = {tuple(path) for path, may in zip(tree.path_lists, tree.is_candidate, strict=True) if may}
        assert paths == {p for p in guesses if not any(len(q) > len(p) and q[: len(p)] == p for q in guesses)}


@pytest.mark.golden
def test_golden_tree_search():
    case = GoldenCase("ppd", "tree_search")
    for limit in case.spec["inputs"]["limits"]:
        trees = sparse_trees(case.spec["inputs"]["accuracies"], limit)
        for d, expected in case.spec["outputs"][str(limit)].items():
            assert [(list(node.path), node.prompts) for node in trees[int(d)]] == [(p, n) for p, _, n in expected]
            assert [node.contribution for node in trees[int(d)]] == pytest.approx([c for _, c, _ in expected])


def test_every_case_is_read():
    assert golden_cases("ppd") == [*RUNS, "tree_search"]


# --- sparse trees -------------------------------------------------------------------------------------------------


def slow_trees(acc, budget):
    """All sizes, all paths, one prompt token taken at a time."""
    m, width = len(acc), len(acc[0])

    def best(depth, size):
        every = [p for n in range(1, depth + 1) for p in itertools.product(range(width), repeat=n)]
        product = {
            p: round(float(torch.tensor([acc[j][i] for j, i in enumerate(p)], dtype=torch.float64).prod()), 5)
            for p in every
        }
        chosen = sorted(every, key=lambda p: -product[p])[:size]  # stable: shorter first, then by index
        return {p: product[p] - sum(product[c] for c in chosen if c[:-1] == p) for p in chosen}, sum(
            product[p] for p in chosen
        )

    sizes = [[min(width, budget // 2)], *[range(max(1, budget // (m + 1)), budget // 2 + 1)] * (m - 1)]
    winner, value = None, -1.0
    for choice in itertools.product(*sizes):
        made = [best(d, size) for d, size in enumerate(choice, 1)]
        f = [0.0, *(matches for _, matches in made)]
        chain, trees = [[0.0] * m + [1.0]], {}
        for d, (ends, _) in enumerate(made, 1):
            hung = dict.fromkeys(ends, m)
            while sum(hung.values()) > max(budget - len(ends), len(ends)):
                loss = {p: ends[p] * (f[n] - f[n - 1]) for p, n in hung.items() if n > 1}
                hung[min(loss, key=loss.__getitem__)] -= 1
            row = [1 - sum(ends.values())] + [0.0] * m
            for p, n in hung.items():
                row[n] += ends[p]
            chain.append(row)
            trees[d] = [(p, ends[p], n) for p, n in hung.items()]
        share = torch.matrix_power(torch.tensor(chain, dtype=torch.float64) * 0.5 + torch.eye(m + 1) * 0.5, 4096)[0]
        gained = round(float(share @ torch.tensor(f, dtype=torch.float64)), 9)
        if gained > value:
            winner, value = trees, gained
    return winner, value


@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_sparse_trees_are_the_slow_search(data, m, width):
    rows = [data.draw(st.lists(st.integers(1, 200), min_size=width, max_size=width)) for _ in range(m)]
    acc = [sorted((x / 1000 for x in row), reverse=True) for row in rows]
    budget = data.draw(st.integers(m + 2, 12))
    expected, _ = slow_trees(acc, budget)
    mine = sparse_trees(torch.tensor(acc, dtype=torch.float64), budget)
    assert {d: [(n.path, n.prompts) for n in nodes] for d, nodes in mine.items()} == {
        d: [(p, n) for p, _, n in nodes] for d, nodes in expected.items()
    }


@pytest.mark.parametrize(("m", "budget"), [(1, 3), (2, 4), (3, 5), (3, 11), (5, 7), (5, 40), (8, 60), (3, 105)])
def test_trees_of_any_number_of_prompts_keep_the_budget(m, budget):
    acc = [[p * 0.8**j for p in ACCURACY[0]] for j in range(m)]
    trees = checked_trees(sparse_trees(acc, budget), m)
    for d, nodes in trees.items():
        assert sum(1 + node.prompts for node in nodes) <= budget
        no_match = 1 - sum(acc[0][node.path[0]] for node in nodes if len(node.path) == 1)
        assert sum(node.contribution for node in nodes) + no_match == pytest.approx(1, abs=1e-4 * len(nodes))
        tree = PromptTree(trees, {d}).tree
        assert tree.size == 1 + m + sum(1 + node.prompts for node in nodes)


def test_a_table_that_is_always_right_has_a_value():
    assert len(sparse_trees([[1.0, 0.0], [1.0, 0.0]], 6)[2]) >= 2


def test_expected_speed_is_what_a_simulated_text_shows():
    trees, draw = sparse_trees(ACCURACY, 20), random.Random(0)
    latency = PassLatency((1, 4, 24), (1.0, 1.2, 2.0))
    state, tokens, seconds = 3, 0, 0.0
    for _ in range(60_000):
        nodes = {node.path: node.prompts for node in trees[state]}
        seconds += latency.at(1 + 3 + len(nodes) + sum(nodes.values()))
        path: tuple[int, ...] = ()
        while len(path) < state:
            rank = draw.choices(range(11), [*ACCURACY[len(path)], 1 - sum(ACCURACY[len(path)])])[0]
            if (*path, rank) not in nodes:
                break
            path = (*path, rank)
        tokens += 1 + len(path)
        state = nodes.get(path, 3)
    expected, cost = expected_speed(trees, latency)
    assert tokens / 60_000 == pytest.approx(expected, rel=0.01)
    assert seconds / 60_000 == pytest.approx(cost, rel=0.01)


def test_stationary():
    assert stationary(torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)).tolist() == pytest.approx(
        [1 / 3, 2 / 3]
    )


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [((1.0, 1.01), 105, 285), ((1.0, 96.0), 0, 0), ((1.0, 3.5), 5, 60)]
)
def test_the_budget_follows_the_latency_curve(monkeypatch, seconds, least, most):
    asked = []
    monkeypatch.setattr(
        "tokenry.decoding.tree_search.pass_latency",
        lambda model, rows: asked.append((model, rows)) or PassLatency((1, 96), seconds),
    )
    assert least <= best_budget("model", ACCURACY, batch_size=3) <= most
    assert asked == [("model", 3)]


# --- extended trees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("states", [{0}, {1}, {3}, {1, 2}, {0, 3}, {1, 2, 3}])
def test_extended_tree_from_its_definition(states, copies):
    trees = checked_trees(TREES, 3)
    shape = PromptTree(trees, states, copies)
    hung = {(): 3}
    for d in states - {0}:
        for path, _, n in trees[d]:
            hung[path] = max(hung.get(path, 0), n)
    rank = shape.tree.rank_list
    found = {tuple(rank[i] for i in path[1:]): node for node, path in enumerate(shape.tree.path_lists)}
    assert {p for p in found if all(i >= 0 for i in p)} == set(hung)
    assert shape.tree.size == len(hung) + copies * sum(hung.values())
    rows = dict(zip(shape.prompt_nodes.tolist(), shape.prompt_rows.tolist(), strict=True))
    for path, n in hung.items():
        node = found[path]
        assert shape.tree.is_candidate[node]
        assert shape.hung[node] == shape.hung_list[node] == n
        if path:
            assert shape.guess[node] == 10 * (len(path) - 1) + path[-1]
        for v in range(copies):
            chain = shape.hung_nodes[node, :n, v].tolist()
            assert [rows[i] for i in chain] == [j * copies + v for j in range(n)]
            for j, i in enumerate(chain):  # sees its node's path and its own copy's earlier tokens, nothing else
                assert shape.tree.path_lists[i] == shape.tree.path_lists[node] + chain[: j + 1]
                assert not shape.tree.is_candidate[i]


# --- prompts ------------------------------------------------------------------------------------------------------


def slow_logits(model, prompts, row, cut):
    """One place of one text: the whole prefix again for every token."""
    prefix, own, ids = row[: cut + 1], [], row[: cut + 1]
    for _ in range(prompts.m):
        ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        own.append(model(input_ids=ids[None]).logits[0, -1])
    guessed = 0
    for v in range(prompts.ensemble):
        embeds = torch.cat([model.get_input_embeddings()(prefix), prompts.embeddings[v :: prompts.ensemble]])
        guessed = guessed + model(inputs_embeds=embeds[None]).logits[0, -prompts.m :] / prompts.ensemble
    return guessed, torch.stack(own)


@pytest.mark.parametrize("ensemble", [1, 2])
@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_logits_are_those_of_each_place_alone(kind, ensemble):
    model = tiny_causal(kind, dtype=torch.float64)
    prompts = some_prompts(model, 3, ensemble).double()
    lengths, width, cuts = (7, 10), 10, torch.tensor([3, 6, 9])
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    guessed, own = prompts.logits(model, ids, cuts, mask)
    for i, row in enumerate(rows):
        for k, cut in enumerate((cuts - (width - len(row))).tolist()):
            expected, expected_own = slow_logits(model, prompts, row, cut)
            torch.testing.assert_close(guessed[i, k], expected)
            torch.testing.assert_close(own[i, k], expected_own)
    apart = prompts.logits(model, ids[1:], cuts)  # a batch of one, no mask
    torch.testing.assert_close(apart[0], guessed[1:])


def test_loss_is_the_equation_and_reaches_the_prompts_alone():
    model = tiny_causal("gpt2", dtype=torch.float64)  # Llama norms in float32
    prompts = some_prompts(model).double()
    row, cuts = tokens(1, 9)[0], torch.tensor([2, 7])
    loss = prompts.loss(model, row[None], cuts)
    expected = 0.0
    for cut in cuts.tolist():
        guessed, own = slow_logits(model, prompts, row, cut)
        for j in range(3):
            p, q = own[j].softmax(-1), guessed[j].softmax(-1)
            expected += 0.8**j / 3 * (p * (p.log() - q.log())).sum() / len(cuts)
    torch.testing.assert_close(loss, expected)
    assert [name for name, _ in prompts.named_parameters()] == ["embeddings"]
    assert prompts.embeddings.numel() == 3 * model.config.hidden_size
    (gradient,) = torch.autograd.grad(loss, [prompts.embeddings])
    assert (gradient != 0).any(-1).all()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        moved = ParallelPrompts(prompts.embeddings.detach() + sign * 1e-5 * direction).double()
        moved.embeddings.data.copy_(prompts.embeddings.detach() + sign * 1e-5 * direction)
        ends.append(moved.loss(model, row[None], cuts).item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_fit_learns_goes_on_and_leaves_the_model_alone(tmp_path):
    model = tiny_causal("llama").train()
    before = copy.deepcopy(model.state_dict())
    data = [tokens(1, n, seed=n)[0] for n in (5, 12, 9)]
    start = some_prompts(model)
    options = {"batch_size": 3, "cuts": 4, "lr": 0.03}
    straight = copy.deepcopy(start)
    losses = straight.fit(model, data, steps=100, **options)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    file = tmp_path / "run.pt"
    halves = copy.deepcopy(start)

    calls = itertools.count()

    def stop(*_):
        if next(calls) == 300:  # passes of the model: in the middle of step 60
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        halves.fit(model, data, steps=100, checkpoint=file, **options)
    hook.remove()
    resumed = copy.deepcopy(start)
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(0))
    assert resumed.fit(model, data, steps=100, checkpoint=file, **options) == losses
    hook.remove()
    assert len(ran) == 50 * 5  # a text, three greedy tokens and the prompts per step
    assert torch.equal(resumed.embeddings, straight.embeddings)
    with pytest.raises(ValueError, match=r"holds a run with embeddings \(3, 32\), these are \(1, 32\)"):
        some_prompts(model, 1).fit(model, data, steps=100, checkpoint=file, **options)


def test_measure_counts_right_guesses():
    model = tiny_causal("gpt2")
    prompts, data = some_prompts(model, 2), tokens(5, 8)
    table = prompts.measure(model, data, batch_size=2, cuts=8)
    expected = torch.zeros(2, 10)
    for row in data:
        for cut in range(8):
            guessed, own = slow_logits(model, prompts, row, cut)
            for j in range(2):
                for k, token in enumerate(guessed[j].topk(10).indices.tolist()):
                    expected[j, k] += token == own[j].argmax()
    torch.testing.assert_close(table, expected / 40)
    assert prompts.accuracy is table
    assert prompts.embeddings.grad is None


def test_bf16_is_finite():
    model = tiny_causal("llama", dtype=torch.bfloat16)
    prompts = some_prompts(model)
    prompts.loss(model, tokens(2, 6), torch.tensor([2, 5])).backward()
    assert torch.isfinite(prompts.embeddings.grad).all()


def test_starts_from_embeddings_of_a_sentence():
    model = tiny_causal("llama")
    matrix = model.get_input_embeddings().weight
    prompts = ParallelPrompts(model, 3, init_ids=torch.tensor([[5, 7]]))
    assert torch.equal(prompts.embeddings, matrix[[5, 7, 5]])
    assert ParallelPrompts(model, 2).embeddings.data_ptr() != matrix.data_ptr()


@pytest.mark.parametrize("ensemble", [1, 2])
def test_save_and_load_in_pefts_format(tmp_path, ensemble):
    model = tiny_causal("llama")
    prompts = some_prompts(model, 3, ensemble)
    prompts.measure(model, tokens(2, 9))
    prompts.save_pretrained(tmp_path / "a", base_model="llama")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"], config["token_dim"]) == (
        "PROMPT_TUNING",
        3 * ensemble,
        32,
    )
    loaded = ParallelPrompts.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.embeddings, prompts.embeddings)
    assert (loaded.m, loaded.ensemble) == (3, ensemble)
    torch.testing.assert_close(loaded.accuracy, prompts.accuracy, atol=1e-5, rtol=0)
    # As a state dict of PEFT, in torch's own file, without the fields that only this method writes.
    (tmp_path / "b").mkdir()
    weights = {"prompt_encoder.default.embedding.weight": prompts.embeddings.detach()}
    torch.save(weights, tmp_path / "b" / "adapter_model.bin")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    plain = ParallelPrompts.from_pretrained(tmp_path / "b")
    assert torch.equal(plain.embeddings, prompts.embeddings)
    assert (plain.m, plain.accuracy) == (3 * ensemble, None)


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FULL_ATTENTION)
@pytest.mark.parametrize("value", ["random", "zero", "huge"])
def test_text_is_the_models_own_whatever_the_prompts(kind, value):
    model = tiny_causal(kind, dtype=torch.float64)
    prompts = some_prompts(model)
    prompts.embeddings.data.mul_({"random": 1.0, "zero": 0.0, "huge": 1e4}[value])
    ids = tokens(1, 7)
    assert torch.equal(greedy(model, ids, custom_generate=ParallelPromptDecoding(prompts, TREES)), greedy(model, ids))


def test_prompts_change_no_candidates_logits():
    model, ids, seen = tiny_causal("llama", dtype=torch.float64), tokens(1, 7), []
    for seed in (0, 1):
        strategy = ParallelPromptDecoding(some_prompts(model, seed=seed), TREES)
        watch = Watch(strategy)
        greedy(model, ids, 3, custom_generate=strategy)
        seen.append(watch)
    first, second = (watch.logits[0][0] for watch in seen)
    torch.testing.assert_close(first[0], second[0])  # the root's
    assert not torch.allclose(first[1:], second[1:])  # the prompt tokens' own
    assert seen[0].cached[0] == [7]  # the prompt and nothing else


def test_rows_in_different_states_share_a_pass():
    model = tiny_causal("llama", dtype=torch.float64)
    ids = tokens(6, 7)
    strategy = ParallelPromptDecoding(some_prompts(model), TREES)
    watch = Watch(strategy)
    out = greedy(model, ids, 40, custom_generate=strategy)
    assert torch.equal(out, greedy(model, ids, 40))
    assert any(len(set(states)) > 1 for states in watch.states), watch.states
    assert strategy.stats.mean_accepted_length > 1.1
    for row in range(6):
        assert torch.equal(out[row : row + 1], greedy(model, ids[row : row + 1], 40, custom_generate=strategy))
    again = ParallelPromptDecoding(some_prompts(model), TREES)
    assert torch.equal(greedy(model, ids, 40, custom_generate=again), out)


def test_equal_copies_guess_like_one():
    model, ids = tiny_causal("llama", dtype=torch.float64), tokens(1, 7)
    one = some_prompts(model)
    two = ParallelPrompts(one.embeddings.detach().repeat_interleave(2, 0), 3, ensemble=2)
    runs = []
    for made in (one, two):
        strategy = ParallelPromptDecoding(made, TREES)
        assert torch.equal(greedy(model, ids, 40, custom_generate=strategy), greedy(model, ids, 40))
        runs.append(strategy.stats.accepted)
    assert runs[0] == runs[1]
    assert len(runs[0]) < 40


def test_without_prompts_it_is_plain_decoding():
    model, ids = tiny_causal("llama"), tokens(1, 7)
    strategy = ParallelPromptDecoding(some_prompts(model, 0))
    assert torch.equal(greedy(model, ids, custom_generate=strategy), greedy(model, ids))
    assert strategy.stats.mean_accepted_length == 1.0


def test_a_vocabulary_below_ten_tokens():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).double().eval()
    prompts, ids = some_prompts(model), torch.tensor([[1, 2, 3]])
    assert torch.equal(greedy(model, ids, custom_generate=ParallelPromptDecoding(prompts, TREES)), greedy(model, ids))
    assert prompts.measure(model, ids).shape == (3, 6)


def test_the_embedded_prompts_win_passes():
    model, tokenizer = load_model("small")
    strategy = ParallelPromptDecoding(ParallelPrompts.from_pretrained(model_path("small") / "parallel_prompts"), 20)
    for text in held_out()[::20]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = greedy(model, ids, 32, custom_generate=strategy)
        assert torch.equal(out, greedy(model, ids, 32))
        assert strategy.stats.mean_accepted_length > 1.3


# --- the automatic budget -----------------------------------------------------------------------------------------


def timed_budget(seconds, rows=1):
    """Plain passes have been timed already."""
    budget = PromptBudget(ACCURACY, PassLatency((1, 24), (1.0, seconds)))
    budget.begin(rows)
    assert budget.choose([False] * rows) == 0
    for _ in range(3):
        budget.took(0, 1.0)
    return budget


def test_a_budget_must_pay():
    assert timed_budget(1.2).choose()
    dear = timed_budget(9.0)
    assert not any(dear.choose() for _ in range(200))


def test_the_budget_goes_down_to_nothing_and_comes_back():
    budget = timed_budget(1.5)
    plan = budget.choose()
    assert plan
    for _ in range(40):  # nothing matches
        budget.learn(plan, 0, 3, 0)
        if not (plan := budget.choose()):
            break
    assert plan == 0
    pauses = 0
    while not budget.choose():
        pauses += 1
    assert pauses == 3 + PAUSES[0]  # three of them look whether the machine has become slower
    chosen = []
    for _ in range(120):  # everything matches: nothing is given up, but plain passes are timed now and then
        chosen.append(budget.choose())
        budget.learn(chosen[-1], 0, 3 if chosen[-1] else 0, 2)
    assert 0 < chosen.count(0) < 10
    assert budget.success([0]) > 1


def test_in_a_batch_the_slowest_running_row_decides():
    budget = timed_budget(1.2, rows=2)
    plan = budget.choose([False, False])
    for _ in range(20):
        budget.learn(plan, 0, 3, 2)
        budget.learn(plan, 1, 3, 0)
    assert budget.choose([False, True])
    assert budget.choose([False, False]) == 0


def test_passes_that_cost_too_much_are_given_up():
    budget = timed_budget(1.2)
    seen = []
    for _ in range(60):
        seen.append(plan := budget.choose())
        budget.took(plan, 9.0 if plan else 1.0)
        budget.learn(plan, 0, 3 if plan else 0, 1)
    assert 50 <= seen.count(0) < 60  # three passes tell, for the other plans too, and three more after the pause


def test_a_busy_machine_slows_all_passes_alike():
    budget = timed_budget(1.2)
    seen = []
    for load in [1.0] * 60 + [5.0] * 120:
        seen.append(plan := budget.choose())
        budget.took(plan, load * (1.2 if plan else 1.0))
        budget.learn(plan, 0, 3 if plan else 0, 1)
    assert seen[-100:].count(0) < 15


def test_automatic_trees_on_a_model():
    model = tiny_causal("llama")
    prompts = some_prompts(model)
    prompts.accuracy = torch.tensor(ACCURACY)  # a promise that random prompts do not keep
    strategy = ParallelPromptDecoding(prompts)
    for rows in (1, 3):
        ids = tokens(rows, 7)
        assert torch.equal(greedy(model, ids, 120, custom_generate=strategy), greedy(model, ids, 120))
    assert strategy.stats.nodes.count(1) > len(strategy.stats.nodes) / 3
    assert strategy.stats.nodes[0] == 1
    assert strategy.stats.prefill_passes == 0


# --- on a draft model ---------------------------------------------------------------------------------------------


def noisy(model, scale):
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for weight in draft.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator).to(weight)
    return draft


@pytest.mark.parametrize("inner", ["plain", "prompts", "recycling"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_draft_model_with_drafts_of_its_own(inner, rows):
    model = tiny_causal("llama", dtype=torch.float64)
    draft = noisy(model, 0.005)
    own = {
        "plain": lambda: None,
        "prompts": lambda: ParallelPromptDecoding(some_prompts(model), TREES),
        "recycling": lambda: TokenRecycling(tree=12),
    }
    ids = tokens(rows, 7)
    strategy = DraftModelDecoding(draft, 4, own[inner]())
    assert torch.equal(greedy(model, ids, 40, custom_generate=strategy), greedy(model, ids, 40))
    stats: DecodingStats = strategy.stats
    counts = Counter(count for pass_ in stats.accepted for count in pass_)
    assert min(counts) <= 1 < 3 <= max(counts) <= 5, counts  # some drafts fail at once, some later
    assert stats.draft_passes > 0


def test_a_draft_that_is_the_target_is_always_right():
    model, ids = tiny_causal("llama", dtype=torch.float64), tokens(1, 7)
    strategy = DraftModelDecoding(model, 4)
    greedy(model, ids, 30, custom_generate=strategy)
    assert {count for (count,) in strategy.stats.accepted} == {5}
    assert strategy.stats.draft_passes == 5 * len(strategy.stats.accepted)


def test_the_drafts_cache_is_what_a_fresh_reading_gives():
    """After every rewind the draft goes on as if it had read the committed text anew."""
    model = tiny_causal("llama", dtype=torch.float64)
    draft = noisy(model, 0.005)
    strategy, seen = DraftModelDecoding(draft, 4), []
    propose = strategy.propose

    def watched(state):
        proposal = propose(state)
        for row, length in enumerate(state.lengths):
            if not proposal.tree.nodes:
                continue
            fresh = greedy(draft, state.ids[row, :length][None], proposal.tree.nodes)[0, length:]
            seen.append(torch.equal(proposal.tokens[row, 1:], fresh) or state.finished[row])
        return proposal

    strategy.propose = watched
    greedy(model, tokens(3, 7), 25, custom_generate=strategy)
    assert all(seen)
    assert len(seen) > 30


# --- bad input ----------------------------------------------------------------------------------------------------


def decode(prompts, ids=None, trees=TREES, kind="llama", **more):
    model = tiny_causal(kind)
    strategy = ParallelPromptDecoding(prompts, trees)
    greedy(model, tokens(1, 5) if ids is None else ids, 2, custom_generate=strategy, **more)


def three(width=32):
    return ParallelPrompts(torch.zeros(3, width))


def tree_with(*nodes):
    return lambda: ParallelPromptDecoding(three(), {**TREES, 2: list(nodes)})


def measured(table):
    prompts = three()
    prompts.accuracy = torch.tensor(table)
    return prompts


BAD = {
    "hidden size": (lambda: decode(three(48)), "width 48, the model's token embeddings 32"),
    "count": (lambda: ParallelPrompts(torch.zeros(3, 8), 2), r"embeddings \(2, hidden size\), got \(3, 8\)"),
    "negative": (lambda: ParallelPrompts(tiny_causal("llama"), -1), "m=-1"),
    "integers": (lambda: ParallelPrompts(torch.zeros(3, 8, dtype=torch.int8)), "floating point, the model's are torch.int8"),
    "no parent": (tree_with(([0], 0.1, 1), ([1, 0], 0.1, 1)), r"state 2: path \[1, 0\] has no parent"),
    "guess": (tree_with(([10], 0.1, 1)), r"path \[10\] has a guess outside 0 to 9"),
    "too many prompts": (tree_with(([0], 0.1, 4)), "has 4 prompt tokens; a node needs 1 to 3"),
    "no prompts": (tree_with(([0], 0.1, 0)), "has 0 prompt tokens"),
    "too deep": (tree_with(([0], 0.1, 1), ([0, 0], 0.1, 1), ([0, 0, 0], 0.1, 1)), "needs 1 to 2 guesses"),
    "twice": (tree_with(([0], 0.1, 1), ([0], 0.1, 2)), "holds a path twice"),
    "missing state": (lambda: ParallelPromptDecoding(three(), {2: TREES[2]}), r"got \[2\]"),
    "word": (lambda: ParallelPromptDecoding(three(), "big"), "'big'"),
    "not measured": (lambda: ParallelPromptDecoding(three()), "call prompts.measure"),
    "budget": (lambda: ParallelPromptDecoding(measured(ACCURACY), 4), "budget=4 nodes per pass are too few for 3"),
    "table": (lambda: sparse_trees([[0.9, 0.3]], 5), "row 0 of the accuracy table holds 0.3 to 0.9 with sum 1.2"),
    "ragged table": (lambda: sparse_trees([[0.9], [0.3, 0.1]], 5), r"got rows of \[1, 2\]"),
    "long prompt": (
        lambda: decode(three(), torch.ones(1, 510, dtype=torch.long)),
        "510 tokens and 3 prompt tokens behind them exceed the model's 512 positions",
    ),
    "nothing to train": (lambda: some_prompts(tiny_causal("llama"), 0).fit(tiny_causal("llama"), tokens(1, 4), steps=1), "m=0"),
    "no text": (lambda: three().fit(tiny_causal("llama"), [], steps=1), "at least one token each"),
    "nothing to measure": (lambda: some_prompts(tiny_causal("llama"), 0).measure(tiny_causal("llama"), tokens(1, 4)), "m=0"),
    "empty row": (lambda: three().measure(tiny_causal("llama"), torch.zeros(2, 0)), "at least one token each"),
    "long text": (
        lambda: three().fit(tiny_causal("llama"), torch.ones(1, 511, dtype=torch.long), steps=1),
        "at most 509 tokens",
    ),
    "sliding windows": (
        lambda: three().loss(tiny_causal("gemma2"), tokens(1, 5), torch.tensor([1])),
        "DynamicSlidingWindowLayer",
    ),
    "no drafts": (lambda: DraftModelDecoding(tiny_causal("llama"), 0), "draft_tokens=0"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_a_model_of_another_vocabulary(tmp_path):
    ParallelPrompts(tiny_causal("llama")).save_pretrained(tmp_path)
    loaded = ParallelPrompts.from_pretrained(tmp_path)
    loaded.check(tiny_causal("llama"), 5)
    other = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=f"vocabulary of {VOCABULARY} tokens, the model has 50"):
        loaded.check(LlamaForCausalLM(other), 5)


def test_refuses_quantised_embeddings():
    model = tiny_causal("llama")
    model.get_input_embeddings().weight = torch.nn.Parameter(
        model.get_input_embeddings().weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="torch.int8"):
        ParallelPrompts(model)
    with pytest.raises(ValueError, match="torch.int8"):
        three().check(model, 5)


def test_refuses_a_draft_of_another_vocabulary():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    strategy = DraftModelDecoding(LlamaForCausalLM(config).eval())
    with pytest.raises(ValueError, match=f"output has 50 tokens, the target's {VOCABULARY}"):
        greedy(tiny_causal("llama"), tokens(1, 5), 3, custom_generate=strategy)


def test_refuses_a_draft_that_takes_no_mask():
    draft = copy.deepcopy(tiny_causal("llama"))
    draft.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot take the mask of a draft tree"):
        greedy(tiny_causal("llama"), tokens(1, 5), 3, custom_generate=DraftModelDecoding(draft))


def test_refuses_a_foreign_folder(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        ParallelPrompts.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"adapter_model.bin is missing"):
        ParallelPrompts.from_pretrained(tmp_path)
    save_file({"lora_A": torch.zeros(2)}, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"peft_type 'LORA' with tensors \['lora_A'\]"):
        ParallelPrompts.from_pretrained(tmp_path)
