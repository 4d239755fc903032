"""The engine's parts against slow definitions: tree, masks, compaction, acceptance, cache, latency."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tiny_causal import tiny_causal, tokens
from tokenry.decoding import (
    DraftTree,
    PassLatency,
    TokenRecycling,
    accept_greedy,
    accept_walk,
    explain_difference,
    pass_latency,
)
from tokenry.decoding.engine.draft_cache import DraftCache
from tokenry.decoding.engine.latency import cache_folder
from tokenry.kernels import TreeMask, compact_path, compact_rows, tree_mask
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("token-recycling")


@st.composite
def parents(draw, most=12):
    size = draw(st.integers(1, most))
    return [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]


def ancestors(parent, node):
    found = [node]
    while parent[found[-1]] >= 0:
        found.append(parent[found[-1]])
    return found[::-1]


@given(parents())
def test_tree_is_what_its_parents_say(parent):
    tree = DraftTree(parent)
    assert tree.is_chain == (parent == list(range(-1, len(parent) - 1)))
    for node in range(len(parent)):
        path = ancestors(parent, node)
        assert tree.path_lists[node] == path
        assert tree.ancestor[node].nonzero().flatten().tolist() == sorted(path)
        assert tree.depth[node] == len(path) - 1
    leaves = [i for i in range(len(parent)) if i not in parent]
    assert [[n for n in row if n >= 0] for row in tree.leaf_paths.tolist()] == [ancestors(parent, i) for i in leaves]
    again = DraftTree.from_paths(tree.paths)
    assert torch.equal(again.parent, tree.parent)
    kept = tree.keep(tree.nodes // 2)
    assert torch.equal(kept.ancestor, tree.ancestor[: kept.size, : kept.size])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftTree([]), "node 0 is the root"),
        (lambda: DraftTree([-1, 1]), "node 1 has parent 1"),
        (lambda: DraftTree([-1, 0], rank=[0]), "one entry per node"),
        (lambda: DraftTree.from_paths([[0], []]), "at least one index"),
        (lambda: DraftTree.from_paths([[-1]]), "none below 0"),
        (lambda: DraftTree.chain(-1), "0 or more"),
        (lambda: DraftTree.chain(2).keep(3), "cannot keep 3"),
        (lambda: DraftTree([-1, 0, 1, 0]).levels, "breadth-first"),
    ],
)
def test_tree_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(parents(6), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=3))
def test_masks_equal_the_definition(parent, rows):
    tree = DraftTree(parent)
    start = torch.tensor([a for a, _ in rows])
    cached = torch.tensor([a + n for a, n in rows])
    length = int(cached.max())
    mask = tree_mask(tree.ancestor, cached, start, length, torch.float32)
    assert mask.shape == (len(rows), 1, tree.size, length + tree.size)
    for b, (first, n) in enumerate(rows):
        for i in range(tree.size):
            for j in range(length + tree.size):
                may = first <= j < first + n if j < length else j - length in ancestors(parent, i)
                assert mask[b, 0, i, j] == (0.0 if may else torch.finfo(torch.float32).min)
    sliced = TreeMask(tree.ancestor, torch.float32)
    for n in (length, 0, 300, 5):
        expected = tree_mask(tree.ancestor, torch.tensor([n]), torch.tensor([0]), n, torch.float32)
        assert torch.equal(sliced(n), expected)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 4))
def test_compaction_equals_moving_one_by_one(seed, rows, kept):
    generator = torch.Generator().manual_seed(seed)
    slab = torch.randn(4, rows, 2, 12, 3, generator=generator)
    source = torch.stack([torch.randperm(6, generator=generator)[:kept].sort().values + 6 for _ in range(rows)])
    begin = torch.randint(0, 7, (rows,), generator=generator)
    target = begin[:, None] + torch.arange(kept)
    expected = slab.clone()
    for b in range(rows):
        for j in range(kept):
            expected[:, b, :, target[b, j]] = slab[:, b, :, source[b, j]]
    compact_rows(slab, source, target)
    assert torch.equal(slab, expected)
    path = source[0] - 6
    expected = slab.clone()
    expected[..., 6 : 6 + kept, :] = slab[..., 6 + path, :]
    compact_path(slab, 6, path)
    assert torch.equal(slab, expected)


def slow_greedy(parent, tokens, best):
    """Deepest chain of matches below the root."""
    chains = [ancestors(parent, i) for i in range(len(parent))]
    standing = [c for c in chains if all(tokens[n] == best[parent[n]] for n in c[1:])]
    longest = max(standing, key=len)
    return [best[n] for n in longest]


@given(parents(), st.integers(0, 999))
def test_greedy_acceptance(parent, seed):
    generator = torch.Generator().manual_seed(seed)
    tree = DraftTree(parent)
    tokens = torch.randint(3, (4, tree.size), generator=generator)
    best = torch.randint(3, (4, tree.size), generator=generator)
    # Equal contexts have equal logits: nodes on equal token paths choose alike.
    for b in range(4):
        chosen = {}
        for i in range(tree.size):
            key = tuple(tokens[b, n].item() for n in ancestors(parent, i)[1:])
            best[b, i] = chosen.setdefault(key, best[b, i].item())
    logits = torch.nn.functional.one_hot(best, 3).float()
    fast = accept_greedy(tree, tokens, logits)
    walked = accept_walk(tree, tokens, logits, lambda scores, came, depth: scores, do_sample=False)
    for b in range(4):
        expected = slow_greedy(parent, tokens[b].tolist(), best[b].tolist())
        assert fast.tokens[b] == expected
        # With equal siblings the walk follows the first: the same text, in more passes perhaps.
        assert walked.tokens[b] == expected[: len(walked.tokens[b])]
        for found in (fast, walked):
            assert found.paths[b, : found.counts[b]].tolist() == found.nodes[b]


def test_nodes_that_are_no_candidates_are_never_accepted():
    tree = DraftTree([-1, 0, 1], is_candidate=[True, True, False])
    logits = torch.zeros(1, 3, 4)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert accept_greedy(tree, tokens, logits).counts == [2]
    assert accept_greedy(tree, tokens, logits, torch.tensor([[True, False, False]])).counts == [1]
    assert accept_walk(tree, tokens, logits, lambda s, c, d: s, do_sample=False).counts == [2]


@pytest.mark.parametrize("kind", ["deterministic", "duplicates", "drawn chain", "drawn children"])
def test_one_step_of_sampling_has_the_models_distribution(kind):
    """First emitted token of 40,000 rows against p, whatever the draft was."""
    torch.manual_seed(0)
    rows, p = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    tree = DraftTree.chain(2) if kind == "drawn chain" else DraftTree([-1, 0, 0, 1])
    if kind.startswith("drawn"):
        tokens = torch.multinomial(q, rows * tree.size, replacement=True).view(rows, -1)
        probs = q.expand(rows, tree.size, 4)
    else:
        tokens, probs = torch.tensor([[0, 1, 1 if kind == "duplicates" else 2, 0]]).expand(rows, -1), None
    logits = p.log().expand(rows, tree.size, 4)
    found = accept_walk(tree, tokens, logits, lambda s, c, d: s, do_sample=True, draft_probs=probs)
    first = torch.bincount(found.emitted[:, 0], minlength=4) / rows
    assert (first - p).abs().sum() / 2 < 0.01
    second = [row[1] for row in found.tokens if len(row) > 1]
    counts = torch.bincount(torch.tensor(second), minlength=4) / len(second)
    assert (counts - p).abs().sum() / 2 < 0.02


def tiny(**more):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 23,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | more), eos_token_id=None, pad_token_id=0)).eval()


@torch.no_grad()
def test_cache_keeps_what_was_accepted():
    model, ids = tiny().double(), torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = DynamicCache(config=model.config)
    model(input_ids=ids, **{CACHE: expected}, use_cache=True)
    library = DynamicCache(config=model.config)
    model(input_ids=ids[:, :6], **{CACHE: library}, use_cache=True)
    cache = DraftCache(library)
    cache.adopt(6)  # no room: it must grow
    tree = DraftTree([-1, 0, 0, 2, 3])
    tokens = torch.stack([ids[:, 6], ids[:, 6] * 0 + 1, ids[:, 7], ids[:, 8], ids[:, 8] * 0], 1)
    cache.prepare(tree.size)
    model(
        input_ids=tokens,
        attention_mask=tree.mask(6, torch.float64),
        position_ids=(6 + tree.depth).expand(2, -1),
        **{CACHE: library},
        use_cache=True,
    )
    cache.keep_path([0, 2, 3], torch.tensor([0, 2, 3]))
    cache.release()
    for mine, theirs in zip(library.layers, expected.layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_latency_is_measured_once_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    model = tiny(max_position_embeddings=64)
    curve = pass_latency(model)
    assert curve.sizes[0] == 1
    assert list(curve.seconds) == sorted(curve.seconds)
    assert pass_latency(model) == curve
    (file,) = cache_folder().glob("*.json")
    assert json.loads(file.read_text())["sizes"] == list(curve.sizes)
    file.write_text("{")
    assert pass_latency(model).sizes == curve.sizes
    pass_latency(model, 2)
    assert len(list(cache_folder().glob("*.json"))) == 2
    assert PassLatency((1, 3, 5), (1.0, 2.0, 4.0)).at(7) == 6.0
    assert PassLatency((1, 3, 5), (1.0, 2.0, 4.0)).ratio(2) == 1.5


def test_explains_a_difference():
    model, ids = tiny(), torch.tensor([1, 2, 3, 4])
    other = torch.tensor([1, 2, 5, 4])
    found = explain_difference(model, ids, other)
    assert (found.position, found.tokens) == (2, (3, 5))
    with torch.no_grad():
        best = copy.deepcopy(model).double()(ids[None, :2]).logits[0, -1].sort(descending=True).values
    assert found.gap == pytest.approx((best[0] - best[1]).item())
    nearest = best[0].float()
    ulp = (nearest.nextafter(torch.tensor(torch.inf)) - nearest).item()
    assert found.ulps == pytest.approx(found.gap / ulp)
    assert explain_difference(model, ids, ids) is None
    assert explain_difference(model, ids, ids[:3]).tokens == (4, -1)


def test_refuses_an_empty_batch_and_what_the_position_table_does_not_reach():
    model = tiny_causal("gpt2")
    for ids, new, message in (
        (tokens(0, 5), 3, "the batch is empty"),
        (tokens(1, 505), 9, "a prompt of 505 tokens and 9 new ones take 513 positions, GPT2LMHeadModel has 512"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), custom_generate=TokenRecycling(tree=0), max_new_tokens=new
            )
