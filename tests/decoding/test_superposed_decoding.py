"""Superposed decoding: the authors' own runs, the n-gram counts against their definition, batches, bad input."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from golden_case import GoldenCase, golden_cases
from tiny_causal import CONFIGS, VOCABULARY, tiny_causal, tokens
from tokenry.decoding import NGramModel, SuperposedDecoding

pytestmark = pytest.mark.method("superposed-decoding")


def ngrams(vocab_size=VOCABULARY, orders=5, seed=0):
    ids = torch.randint(3, vocab_size, (8, 200), generator=torch.Generator().manual_seed(seed))
    return NGramModel.from_documents(ids.tolist(), vocab_size, orders)


def drafts_of(model, inputs, strategy, **options):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "do_sample": False} | options
    return model.generate(**inputs, custom_generate=strategy, **options)


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("superposed-decoding"))
def test_golden(name):
    """Drafts, scores, perplexities, ended drafts and what the model is fed in every step."""
    case = GoldenCase("superposed-decoding", name)
    spec, out = case.spec, case.outputs
    model = LlamaForCausalLM(LlamaConfig(**spec["config"])).eval()
    model.load_state_dict(case.state_dict())
    assert sum(p.numel() for p in model.parameters()) == spec["params"]
    counted = None
    if spec["smoothing"] is not None:
        orders = len(spec["interpolation_lengths"])
        counted = NGramModel.from_documents(case.inputs["documents"].tolist(), spec["config"]["vocab_size"], orders)
    strategy = SuperposedDecoding(
        spec["n_drafts"],
        counted,
        alpha=spec["alpha"] or 0.0,
        temperature=spec["temperature"],
        top_tokens=spec["n_token_sample"],
        lambdas=spec["interpolation_weights"],
    )
    prompts = [case.inputs[f"prompt{i}"] for i in range(len(out["alive"]))]
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    alive, finished, fed = {}, {}, []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    table = model.get_input_embeddings().weight
    for row, prompt in enumerate(prompts):
        # All rows of the authors' batch end together, so a shorter prompt gets more new tokens.
        new = longest - len(prompt) + spec["max_gen_len"]
        fed.clear()
        got = drafts_of(model, prompt[None], strategy, max_new_tokens=new, eos_token_id=spec["eos_token_id"])
        assert strategy.stats.forward_passes == new == len(fed)
        assert torch.equal(got.alive_sequences[0], out["alive"][row])
        ended = out["finished_log_prob"][row] > -1e20
        assert torch.equal(got.finished_scores[0] > -torch.inf, ended)
        for slot in range(int(ended.sum())):
            text = out["finished"][row, slot]
            end = len(prompt) + text[len(prompt) :].tolist().index(spec["eos_token_id"]) + 1
            assert torch.equal(got.finished_sequences[0, slot, :end], text[:end])
            finished[row, slot] = got.finished_scores[0, slot]
        alive[row] = got.alive_scores[0]
        # Weights over the vocabulary of step t are fed as one vector in step t + 1; the prompt is fed as it is.
        first = len(prompt) - shortest
        expected = out["superposition_weights"][row, first : first + new - 1] @ table
        torch.testing.assert_close(torch.cat(fed[1:], 1)[0], expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    scores = torch.stack([alive[row] for row in range(len(prompts))])
    case.compare("alive_log_prob", scores, tolerance=1e-5)
    per_shortest = (-scores / (longest + spec["max_gen_len"] - shortest)).exp()
    torch.testing.assert_close(per_shortest, out["alive_perplexity"], rtol=1e-4, atol=0)
    for (row, slot), score in finished.items():
        torch.testing.assert_close(score, out["finished_log_prob"][row, slot], rtol=1e-5, atol=0)
    assert finished or spec["eos_token_id"] >= 50  # a stop token outside the vocabulary never comes


@pytest.mark.parametrize("name", CONFIGS)
def test_one_draft_is_greedy(name):
    model = tiny_causal(name)
    for inputs in (tokens(1, 5), left_padded()):
        strategy = SuperposedDecoding(1, top_tokens=2)
        plain = model.generate(**as_inputs(inputs), max_new_tokens=9, do_sample=False, eos_token_id=None)
        out = drafts_of(model, inputs, strategy, max_new_tokens=9, eos_token_id=None)
        assert torch.equal(out.sequences[:, 0], plain)
        assert not out.finished.any()
        assert strategy.stats.forward_passes == 9


def as_inputs(inputs):
    return inputs if isinstance(inputs, dict) else {"input_ids": inputs}


def left_padded():
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :8] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("counted", [True, False])
def test_a_left_padded_row_is_the_row_alone(name, counted):
    # Gemma 2's own eager attention gives NaN for padded rows in float64.
    model, inputs = tiny_causal(name, dtype=torch.float32 if name == "gemma2" else torch.float64), left_padded()
    strategy = SuperposedDecoding(3, ngrams() if counted else None, temperature=1.0)
    together = drafts_of(model, inputs, strategy)
    assert strategy.stats.forward_passes == 8
    for row in range(3):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        single = drafts_of(model, alone, strategy)
        assert torch.equal(together.sequences[row, :, 9:], single.sequences[0, :, alone.shape[1] :])
        torch.testing.assert_close(together.scores[row], single.scores[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("counted", [True, False])
def test_drafts_differ_and_are_ordered(k, counted):
    model, strategy = tiny_causal("llama"), SuperposedDecoding(k, ngrams() if counted else None, temperature=2.0)
    out = drafts_of(model, tokens(2, 6), strategy, max_new_tokens=7)
    assert out.sequences.shape == (2, k, 13)
    assert strategy.stats.forward_passes == 7
    for row in out.sequences:
        assert len({tuple(draft.tolist()) for draft in row}) == k
    for ordered in (out.perplexities, -out.alive_scores, -out.finished_scores):
        later = ordered[:, 1:] >= ordered[:, :-1]
        assert later.all()
    assert torch.equal(
        drafts_of(model, tokens(2, 6), strategy, max_new_tokens=7, return_dict_in_generate=False), out.sequences
    )


def test_what_is_fed_is_the_mixture():
    model, fed = tiny_causal("gemma2"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    out = drafts_of(model, tokens(1, 5), SuperposedDecoding(3, temperature=1.0), max_new_tokens=2, eos_token_id=None)
    first = out.alive_sequences[0, :, 5]  # after two steps parents may repeat: mix what the first step left
    assert len(fed) == 2 and fed[0] is None and fed[1].shape == (1, 1, 32)
    logits = model(tokens(1, 5)).logits[0, -1].float().softmax(-1)
    best = logits.topk(3)
    assert set(first.tolist()) <= set(best.indices.tolist())
    expected = (best.values / best.values.sum()) @ model.get_input_embeddings()(best.indices)
    torch.testing.assert_close(fed[1][0, 0], expected, rtol=1e-4, atol=1e-5)


def test_stops_where_all_best_drafts_are_told_to():
    class Four(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    strategy = SuperposedDecoding(2)
    out = drafts_of(
        tiny_causal("llama"),
        tokens(2, 5),
        strategy,
        max_new_tokens=20,
        stopping_criteria=StoppingCriteriaList([Four()]),
    )
    assert out.sequences.shape[2] == 9 and strategy.stats.forward_passes == 4


def test_a_sharp_temperature_leaves_every_draft_a_score():
    """Probabilities of the vocabulary would underflow at it."""
    out = drafts_of(tiny_causal("llama"), tokens(2, 6), SuperposedDecoding(3, temperature=1e-3), eos_token_id=None)
    assert torch.isfinite(out.alive_scores).all()
    assert all(len({tuple(draft.tolist()) for draft in row}) == 3 for row in out.alive_sequences)


def test_bf16_is_finite():
    model = tiny_causal("llama", dtype=torch.bfloat16)
    out = drafts_of(model, tokens(2, 6), SuperposedDecoding(3, ngrams()))
    assert torch.isfinite(out.alive_scores).all()


@given(
    documents=st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5).filter(lambda d: any(d)),
    orders=st.integers(1, 3),
    history=st.lists(st.integers(0, 4), min_size=3, max_size=5),
)
def test_ngrams_match_their_definition(documents, orders, history):
    model = NGramModel.from_documents(documents, vocab_size=5, orders=orders)
    everything = np.arange(5)[None]
    for order in range(1, orders + 1):
        grams = Counter(
            tuple(d[i : i + order + 1]) for d in documents for i in range(len(d) - order)
        )  # fmt: skip
        context = tuple(history[-order:])
        total = sum(n for gram, n in grams.items() if gram[:-1] == context)
        expected = [grams[(*context, v)] / total if total else 0.0 for v in range(5)]
        got = model.probabilities(np.array([history]), everything, order)[0]
        np.testing.assert_allclose(got, expected)


def test_ngrams_on_disk(tmp_path):
    model = ngrams()
    model.save(tmp_path / "counts")
    again = NGramModel.load(tmp_path / "counts")
    assert isinstance(again.keys[0], np.memmap)
    history, candidates = tokens(6, 5).numpy(), tokens(6, 9, seed=1).numpy()
    for order in range(1, 6):
        np.testing.assert_array_equal(
            again.probabilities(history, candidates, order), model.probabilities(history, candidates, order)
        )
    lengths = drafts_of(tiny_causal("llama"), tokens(1, 6), SuperposedDecoding(3, again)).sequences
    assert torch.equal(lengths, drafts_of(tiny_causal("llama"), tokens(1, 6), SuperposedDecoding(3, model)).sequences)
    (tmp_path / "counts" / "keys3.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="holds no n-gram model"):
        NGramModel.load(tmp_path / "counts")
    with pytest.raises(ValueError, match="holds no n-gram model"):
        NGramModel.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperposedDecoding(0), "num_drafts=0"),
        (lambda: SuperposedDecoding(3, temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: SuperposedDecoding(3, alpha=1.0), "alpha=1.0"),
        (lambda: SuperposedDecoding(3, top_tokens=5), "at least twice num_drafts=3"),
        (lambda: SuperposedDecoding(3, ngrams(orders=3)), "5 lambdas need contexts of up to 5"),
        (lambda: NGramModel.from_documents([], 5), "at least one document"),
        (lambda: NGramModel.from_documents([[]], 5), "at least one document"),
        (lambda: NGramModel.from_documents([[1, 7]], 5), "another tokenizer"),
        (lambda: NGramModel.from_documents([[1]], 5, orders=0), "at least one token"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (SuperposedDecoding(3, top_tokens=VOCABULARY + 1), {}, "more than the vocabulary"),
        (SuperposedDecoding(3, ngrams(vocab_size=2000)), {}, "vocabulary of 2000"),
        (SuperposedDecoding(3), {"do_sample": True}, "deterministic"),
        (SuperposedDecoding(3), {"num_beams": 2}, "num_drafts"),
        (SuperposedDecoding(3), {"use_cache": False}, "leave use_cache at True"),
    ],
)
def test_refuses_calls(strategy, options, message):
    with pytest.raises(ValueError, match=message):
        drafts_of(tiny_causal("llama"), tokens(1, 5), strategy, **options)


def test_refuses_prompts():
    for kind, ids, message in (
        ("llama", tokens(0, 5), "the batch is empty"),
        ("gpt2", tokens(1, 506), "506 tokens and 8 new ones take 513 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            drafts_of(
                tiny_causal(kind), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, SuperposedDecoding(3)
            )
