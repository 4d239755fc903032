"""Token Recycling: the authors' own runs, the table against its definition, the automatic tree, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from golden_case import GoldenCase, golden_cases
from tokenry.decoding import TREE_80, DraftTree, PassLatency, TokenRecycling, TokenRecyclingMatrix
from tokenry.decoding.engine.tree_size import TreeSizes
from tokenry.decoding.token_recycling import AUTO_NODES, by_use

pytestmark = pytest.mark.method("token-recycling")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.golden
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", golden_cases("token-recycling"))
def test_golden(name, attention):
    """Ids, accepted lengths per pass, final table and tree buffers of the authors' code, prompt after prompt."""
    case = GoldenCase("token-recycling", name)
    model = LlamaForCausalLM(LlamaConfig(**case.spec["config"], attn_implementation=attention)).eval()
    model.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    strategy = TokenRecycling(tree=case.spec["tree"], k=case.spec["top_k"])
    for i, new in enumerate(case.spec["new_tokens"]):
        prompt, expected = case.inputs[f"prompt{i}"], case.outputs[f"sequence{i}"]
        options = {"do_sample": False, "eos_token_id": case.spec["eos_token_id"]}
        # One more than the authors report: they do not count the last bonus token.
        out = model.generate(prompt[None], custom_generate=strategy, max_new_tokens=new + 1, **options)[0]
        assert torch.equal(out[: len(expected)], expected)
        assert torch.equal(out, case.outputs[f"greedy{i}"][: len(out)])
        accepted = [lengths[0] for lengths in strategy.stats.accepted]
        assert accepted == case.outputs[f"accept_lengths{i}"].tolist()
        assert sum(accepted) == new + 1
    assert torch.equal(strategy.matrix.table, case.outputs["adjacency"])
    tree = strategy.tree
    for mine, theirs in (
        (tree.ancestor.long(), "attention"),
        (tree.parent, "father_index"),
        (tree.rank, "candidate_index"),
        (tree.depth, "positions"),
        (tree.leaf_paths, "search_path"),
        (torch.tensor([begin for begin, _ in tree.levels[1:]] + [tree.size]), "level_starts"),
    ):
        assert torch.equal(mine, case.outputs[f"tree.{theirs}"])


def test_the_template_is_the_papers():
    case = GoldenCase("token-recycling", "llama2l_tree80")
    assert [list(path) for path in TREE_80] == case.spec["tree"]
    tree = DraftTree.from_paths(TREE_80)
    assert (tree.nodes, tree.max_depth) == (80, 6)
    assert [end - begin for begin, end in tree.levels] == [1, 8, 21, 25, 15, 8, 3]
    assert torch.equal(tree.ancestor.sum(-1), tree.depth + 1)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 99))
def test_write_is_last_writer_wins(tokens, k, seed):
    logits = torch.randn(len(tokens), 7, generator=torch.Generator().manual_seed(seed))
    matrix, expected = TokenRecyclingMatrix(7, k), torch.zeros(7, k, dtype=torch.long)
    for half in (slice(0, len(tokens) // 2), slice(len(tokens) // 2, None)):  # two passes
        if tokens[half]:
            matrix.write(torch.tensor(tokens[half]), logits[half])
    for token, row in zip(tokens, logits, strict=True):
        expected[token] = row.topk(k).indices
    assert torch.equal(matrix.table, expected)


@given(st.integers(0, 99))
def test_candidates_and_places_are_inverse(seed):
    matrix = TokenRecyclingMatrix(9, 4)
    generator = torch.Generator().manual_seed(seed)
    matrix.write(torch.arange(9), torch.randn(9, 9, generator=generator))
    before, rank = torch.randint(9, (2, 4), generator=generator), torch.tensor([0, 1, 2, 3])
    after = matrix.candidates(before, rank)
    assert torch.equal(matrix.places(before, after), rank.expand(2, 4))
    absent = torch.tensor([[next(t for t in range(9) if t not in row) for row in matrix.table.tolist()]])
    assert (matrix.places(torch.arange(9)[None], absent) == -1).all()


def test_save_load_reset(tmp_path):
    matrix = TokenRecyclingMatrix(50, 3, dtype=torch.int32)
    matrix.write(torch.tensor([4, 5]), torch.randn(2, 50))
    matrix.save(tmp_path / "m.safetensors")
    loaded = TokenRecyclingMatrix.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.table, matrix.table)
    assert (loaded.k, loaded.vocab_size, loaded.nbytes) == (3, 50, 600)
    loaded.reset()
    assert not loaded.table.any()


def _model(**more):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 23,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **more, eos_token_id=None, pad_token_id=0)).eval()


@pytest.mark.parametrize("tree", [None, 12, "auto"])
def test_only_rows_of_tokens_that_were_in_a_tree_change(tree):
    model = _model()
    strategy = TokenRecycling(TokenRecyclingMatrix(23, 8), tree=tree)
    strategy.matrix.table.fill_(5)
    ids = torch.randint(23, (1, 6), generator=torch.Generator().manual_seed(0))
    seen: set[int] = set()
    original = strategy.propose
    strategy.propose = lambda state: seen.update(p.tokens.unique().tolist()) or p if (p := original(state)) else p
    model.generate(ids, custom_generate=strategy, max_new_tokens=10, do_sample=False)
    changed = (strategy.matrix.table != 5).any(-1).nonzero().flatten().tolist()
    assert set(changed) <= seen


def test_a_hot_table_accepts_more():
    model = _model()
    strategy = TokenRecycling(tree=None)
    ids = torch.randint(23, (1, 6), generator=torch.Generator().manual_seed(1))
    lengths = []
    for _ in range(2):
        model.generate(ids, custom_generate=strategy, max_new_tokens=40, do_sample=False)
        lengths.append(strategy.stats.mean_accepted_length)
    assert 1 < lengths[0] < lengths[1]


def test_warm_from_prompt_fills_the_prompts_rows():
    model = _model()
    ids = torch.tensor([[3, 4, 5, 6]])
    strategy = TokenRecycling(tree=0, warm_from_prompt=True)
    model.generate(ids, custom_generate=strategy, max_new_tokens=1, do_sample=False)
    expected = model(input_ids=ids).logits[0].topk(8).indices
    assert torch.equal(strategy.matrix.table[[3, 4, 5]], expected[:3])


# --- the automatic size -------------------------------------------------------------------------------------------


def test_prefixes_by_use_are_trees():
    paths = by_use(TREE_80)
    for nodes in AUTO_NODES:
        tree = DraftTree.from_paths(sorted(paths[:nodes], key=lambda path: (len(path), path)))
        assert tree.nodes == nodes


@given(st.lists(st.integers(-1, 7), min_size=30, max_size=120))
def test_simulated_passes_equal_a_slow_simulation(ranks):
    paths = by_use(TREE_80)
    sizes = TreeSizes(paths, PassLatency((1, 81), (1.0, 1.0)), (0, 5, 28))
    sizes.begin(1)
    for chunk in range(0, len(ranks), 7):
        sizes.learn(0, ranks[chunk : chunk + 7])
    for size, nodes in ((1, 5), (2, 28)):
        members, at, wins = set(paths[:nodes]), 0, []
        depth = max(map(len, members))
        while at + depth <= len(ranks):
            won = 1 + max((d for d in range(1, depth + 1) if tuple(ranks[at : at + d]) in members), default=0)
            wins.append(won)
            at += won
        mean = weight = 0.0
        for won in wins:
            weight = weight * 0.94 + 1
            mean += (won - mean) / weight
        assert sizes.wins[0][size] == pytest.approx(mean if wins else 1.0)


@pytest.mark.parametrize(("right", "cost", "expected"), [(1.0, 1.1, 6), (0.0, 1.1, 0), (1.0, 9.0, 0)])
def test_chooses_by_what_a_tree_wins_and_costs(right, cost, expected):
    sizes = TreeSizes(by_use([[0] * d for d in range(1, 7)]), PassLatency((1, 2, 7), (1.0, cost, cost)), (0, 1, 6))
    sizes.learn(0, [0 if right else -1] * 60)
    assert sizes.nodes[sizes.choose()] == expected


def test_in_a_batch_the_slowest_row_decides():
    sizes = TreeSizes([[0]], PassLatency((1, 2), (1.0, 1.1)), (0, 1))
    sizes.begin(2)
    sizes.learn(0, [0] * 40)
    sizes.learn(1, [-1] * 40)
    assert sizes.choose([False, False]) == 0
    assert sizes.choose([False, True]) == 1


def test_a_busy_moment_does_not_look_like_an_expensive_tree():
    sizes = TreeSizes([[0]], PassLatency((1, 2), (1.0, 1.2)), (0, 1))
    for load in (1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0):
        sizes.took(1 if load == 5.0 else 0, load * (1.2 if load == 5.0 else 1.0))
    assert sizes.cost(1) / sizes.cost(0) < 2.5


# --- bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "k": (lambda: TokenRecycling(k=0), "k is the number of candidates"),
    "wide matrix": (lambda: TokenRecyclingMatrix(5, 8), "1 <= k <= vocab_size=5"),
    "dtype": (lambda: TokenRecyclingMatrix(50, dtype=torch.float32), "int64 or torch.int32"),
    "no parent": (lambda: TokenRecycling(tree=[[0], [1, 0]]), r"\[1, 0\] has no parent"),
    "index": (lambda: TokenRecycling(tree=[[0], [4]], k=4), r"\[4\] has an index of 4, but rows have k=4"),
    "twice": (lambda: TokenRecycling(tree=[[0], [0]]), "given twice"),
    "word": (lambda: TokenRecycling(tree="big"), "'big'"),
    "too many": (lambda: TokenRecycling(tree=81), "0 to 80 nodes"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_a_matrix_of_another_vocabulary():
    strategy = TokenRecycling(TokenRecyclingMatrix(22))
    with pytest.raises(ValueError, match="22 rows, the model's output has 23"):
        _model().generate(torch.tensor([[1, 2]]), custom_generate=strategy, max_new_tokens=2)


def test_refuses_a_foreign_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(2)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="holds no token recycling matrix"):
        TokenRecyclingMatrix.load(tmp_path / "x.safetensors")
