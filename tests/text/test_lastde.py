"""Lastde: the authors' outputs, the slow definition, the detector, and what it refuses."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from golden_case import GoldenCase
from tokenry.assets import held_out_texts, load_model
from tokenry.text import (
    CRITERIA,
    BaselineDetector,
    LastdeDetector,
    TokenScorer,
    choose_threshold,
    continue_texts,
    diversity_entropy,
    lastde,
    lastde_plus_plus,
    multiscale_diversity_entropy,
    read_labelled,
    read_texts,
    token_log_probs,
    token_statistics,
)
from tokenry.text.lastde import AGGREGATIONS, aggregate

pytestmark = pytest.mark.method("lastde")


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("small")[1]


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    """A tiny random model with a short context, over the embedded tokenizer; its vocabulary is padded by 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 8,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text[:k] for text, k in zip(held_out_texts("english"), (300, 400, 330, 320), strict=False)]


# the authors' outputs


@pytest.mark.golden
@pytest.mark.parametrize("name", ["mde", "mde_docexample", "mde_edges"])
def test_golden_entropy(name: str) -> None:
    case = GoldenCase("lastde", name)
    log_likelihood = case.inputs["log_likelihood"][0].T  # (samples, n)
    for s, bins, scales in case.spec["settings"]:
        mde = multiscale_diversity_entropy(log_likelihood, s, bins, scales)
        case.compare(f"s{s}_e{bins}_t{scales}.de", mde.T, tolerance=1e-5)
        case.compare(f"s{s}_e{bins}_t{scales}.std", aggregate(mde), tolerance=1e-5)


@pytest.mark.golden
def test_golden_scores() -> None:
    case = GoldenCase("lastde", "scores")
    normal = np.random.RandomState(0).standard_normal((1, 100, 50)).astype(np.float32)
    logits, labels = 2 * torch.from_numpy(normal)[0], case.inputs["labels"][0].long()
    found = token_statistics(logits, labels, wanted=["log_probs", "ranks", "entropies"])
    for ours, theirs in {"likelihood": "likelihood", "rank": "rank", "log-rank": "logrank", "lrr": "lrr"}.items():
        case.compare(theirs, torch.tensor([CRITERIA[ours].score(found)]), tolerance=1e-5)
    case.compare("entropy", torch.tensor([CRITERIA["entropy"].score(found)]), tolerance=1e-5)
    l = found.log_probs
    sampled = logits.log_softmax(-1).gather(-1, case.inputs["samples"][0].long()).T
    case.compare("lastde_open", lastde(l).view(1), tolerance=1e-5)
    case.compare("lastde_s4_e8n_t15", lastde(l, 4, 8, 15).view(1, 1), tolerance=1e-5)
    case.compare("lastde_closed_s3_e1n_t15", lastde(l, 3, 1, 15).view(1, 1), tolerance=1e-5)
    case.compare("sampled_lastde", lastde(sampled, 4, 8, 15).view(1, -1), tolerance=1e-5)
    assert float(lastde_plus_plus(l, sampled)) == pytest.approx(float(case.outputs["discrepancy"]), abs=1e-5)


# the slow definition


def slow_entropies(y: list[float], s: int, bins: int, scales: int) -> tuple[list[float], bool]:
    """Straight from the equations, in double precision; and whether a cosine lies too near a bin's edge to say."""
    entropies, doubtful = [], False
    for tau in range(1, scales + 1):
        z = [sum(y[j : j + tau]) / tau for j in range(len(y) - tau + 1)]
        orbits = [z[i : i + s] for i in range(len(z) - s + 1)]
        counts: dict[int, int] = {}
        for a, b in pairwise(orbits):
            norms = [max(math.sqrt(sum(v * v for v in o)), 1e-8) for o in (a, b)]
            position = (sum(u * v for u, v in zip(a, b, strict=True)) / (norms[0] * norms[1]) + 1) / 2 * bins
            doubtful |= abs(position - round(position)) < 1e-6 * bins
            k = min(int(position), bins - 1)
            counts[k] = counts.get(k, 0) + 1
        total = sum(counts.values())
        entropies.append(-sum(c / total * math.log(c / total) for c in counts.values()) / math.log(bins))
    return entropies, doubtful


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 400), st.integers(1, 8), st.integers(0, 60))
def test_entropy_is_the_definition(seed: int, s: int, bins: int, scales: int, more: int) -> None:
    y = torch.from_numpy(np.random.RandomState(seed).standard_normal(s + scales + more) * 2 - 1)
    expected, doubtful = slow_entropies(y.tolist(), s, bins, scales)
    found = multiscale_diversity_entropy(y, s, bins, scales)
    if not doubtful:
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    bound = [math.log(min(bins, len(y) - tau - s + 1)) / math.log(bins) for tau in range(1, scales + 1)]
    assert all(-1e-6 <= f <= b + 1e-5 for f, b in zip(found.tolist(), bound, strict=True))


@given(st.integers(0, 10**6), st.lists(st.integers(12, 60), min_size=1, max_size=5))
def test_ragged_batch_is_single_results(seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = -torch.rand(len(lengths), max(lengths), generator=generator) * 5
    bins = torch.tensor([10 * n for n in lengths])
    together = multiscale_diversity_entropy(y, 3, bins, 5, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        torch.testing.assert_close(together[row], multiscale_diversity_entropy(y[row, :n], 3, 10 * n, 5))


@given(st.integers(0, 10**6), st.sampled_from([0.25, 2.0, 64.0]))
def test_entropy_does_not_see_the_scale_of_the_sequence(seed: int, factor: float) -> None:
    y = -torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(seed)) * 5  # powers of two: exact
    torch.testing.assert_close(diversity_entropy(y, 3, 400), diversity_entropy(factor * y, 3, 400))


def test_scales_slide_instead_of_blocking() -> None:
    y = -torch.rand(50, generator=torch.Generator().manual_seed(0))
    both = multiscale_diversity_entropy(y, 3, 500, 2)
    torch.testing.assert_close(both[1], diversity_entropy((y[1:] + y[:-1]) / 2, 3, 500))
    assert not torch.isclose(both[1], diversity_entropy((y[::2] + y[1::2]) / 2, 3, 500))


@pytest.mark.parametrize("agg", list(AGGREGATIONS))
def test_aggregations(agg: str) -> None:
    mde = torch.tensor([0.2, 0.5, 0.9])
    std, span = np.std([0.2, 0.5, 0.9], ddof=1), 0.7
    norm = math.sqrt(0.04 + 0.25 + 0.81)
    expected = {"std": std, "expstd": math.exp(std), "range": span, "exprange": math.exp(span), "norm": norm}
    assert float(aggregate(mde, agg)) == pytest.approx(expected[agg], rel=1e-5)


def test_constant_probabilities_are_minus_infinity_and_say_so() -> None:
    with pytest.warns(RuntimeWarning, match="same at all scales"):
        assert float(lastde(torch.full((60,), -0.5))) == -math.inf
    with pytest.warns(RuntimeWarning, match="does not vary"):
        assert float(lastde_plus_plus(torch.full((60,), -0.5), -torch.rand(8, 60))) == -math.inf
    assert float(lastde(torch.full((60,), -0.5), agg="expstd")) == pytest.approx(-0.5)


# figures of the tokens


def test_token_statistics_are_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(9, 12, generator=generator), torch.randn(9, 10, generator=generator)
    labels = torch.randint(0, 10, (9,), generator=generator)
    uniforms = torch.rand(9, 4000, generator=generator)
    wanted = ["log_probs", "ranks", "entropies", "expected", "variances", "sampled"]
    found = token_statistics(logits, labels, reference_logits=other, wanted=wanted, uniforms=uniforms)
    log_p, q = logits[:, :10].double().log_softmax(-1), other.double().softmax(-1)
    for t in range(9):
        own = log_p[t, labels[t]]
        assert float(found.log_probs[t]) == pytest.approx(float(own), abs=1e-5)
        assert int(found.ranks[t]) == 1 + int((log_p[t] > own).sum())
        assert float(found.entropies[t]) == pytest.approx(float(-(log_p[t].exp() * log_p[t]).sum()), abs=1e-5)
        mean, square = float((q[t] * log_p[t]).sum()), float((q[t] * log_p[t] ** 2).sum())
        assert float(found.expected[t]) == pytest.approx(mean, abs=1e-5)
        assert float(found.variances[t]) == pytest.approx(square - mean**2, abs=1e-4)
        assert float(found.sampled[:, t].mean()) == pytest.approx(mean, abs=5 * math.sqrt((square - mean**2) / 4000))
    assert len(found.first(4)) == 4 and found.first(4).sampled.shape == (4000, 4)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(3, 7, 30, generator=torch.Generator().manual_seed(2)), torch.arange(21).view(3, 7)
    whole = token_log_probs(logits, labels)
    monkeypatch.setattr("tokenry.text.scoring.CHUNK", 60)
    torch.testing.assert_close(token_log_probs(logits, labels), whole)
    torch.testing.assert_close(whole, logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))


def test_scores_do_not_depend_on_the_batch(model, tokenizer, texts: list[str]) -> None:
    scorer = TokenScorer(model, tokenizer, n_samples=5, seed=3)
    wanted = ["log_probs", "sampled"]
    together = scorer.statistics(texts, wanted=wanted, batch_size=3)
    for text, found in zip(texts, together, strict=True):
        alone = scorer.statistics([text], wanted=wanted)[0]
        torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.sampled, alone.sampled, rtol=1e-3, atol=1e-3)
        assert len(found) == len(tokenizer(text)["input_ids"]) - 1  # the first token only conditions
    again = TokenScorer(model, tokenizer, n_samples=5, seed=3).statistics(texts, wanted=wanted, batch_size=3)
    other = TokenScorer(model, tokenizer, n_samples=5, seed=4).statistics(texts, wanted=wanted, batch_size=3)
    torch.testing.assert_close(together[0].sampled, again[0].sampled, rtol=0, atol=0)
    assert not torch.equal(together[0].sampled, other[0].sampled)


def test_long_text_slides(model, tokenizer) -> None:
    text = held_out_texts("english")[0]
    ids = tokenizer(text)["input_ids"][:300]  # context 128: the first window, then windows that score 64 each
    found = TokenScorer(model, tokenizer).statistics_of_tokens([ids])[0]
    assert len(found) == 299
    with torch.inference_mode():
        for begin, end, scored in [(0, 128, 1), (64, 192, 128), (128, 256, 192), (172, 300, 256)]:
            window = torch.tensor([ids[begin:end]])
            expected = token_log_probs(model(window).logits[:, :-1], window[:, 1:])[0, scored - begin - 1 :]
            torch.testing.assert_close(found.log_probs[scored - 1 : end - 1], expected, rtol=1e-4, atol=1e-4)


# the detectors


def test_detector_scores_fits_predicts_explains(model, tokenizer, texts: list[str]) -> None:
    detector = LastdeDetector(model, tokenizer, n_samples=8, max_tokens=50)
    scores = detector.score(texts, batch_size=2)
    assert scores.shape == (4,) and np.isfinite(scores).all()
    np.testing.assert_allclose(scores, detector.score(texts, batch_size=4), rtol=1e-3, atol=1e-3)
    with pytest.raises(NotFittedError, match="call fit"):
        detector.predict(texts)
    order = np.argsort(scores)
    labels = np.zeros(4, dtype=int)
    labels[order[2:]] = 1
    assert detector.fit(texts, labels).predict(texts).tolist() == labels.tolist()
    assert detector.fit(texts, [0] * 4, false_positive_rate=0.25).predict(texts).sum() == 1
    told = detector.explain(texts[0])
    assert told.score == pytest.approx(scores[0], rel=1e-3, abs=1e-3)
    assert len(told.tokens) == len(told.log_probs) == 50 and len(told.diversity_entropy) == 15
    assert "not proof" in told.caution


def test_detector_is_an_estimator(tokenizer) -> None:
    detector = LastdeDetector("small", tokenizer, variant="lastde", scales=7)
    copy = clone(detector)
    assert copy.get_params()["scales"] == 7 and copy.get_params()["variant"] == "lastde"
    assert copy.set_params(agg="norm").agg == "norm"


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_baselines_score(criterion: str, model, tokenizer, texts: list[str]) -> None:
    detector = BaselineDetector(model, tokenizer, criterion, n_samples=8)
    assert np.isfinite(detector.score(texts)).all()


def test_analytic_and_sampled_agree(model, tokenizer, texts: list[str]) -> None:
    sampled = BaselineDetector(model, tokenizer, "fast-detectgpt", n_samples=4000).score(texts)
    analytic = BaselineDetector(model, tokenizer, "fast-detectgpt-analytic").score(texts)
    np.testing.assert_allclose(sampled, analytic, atol=0.15 * (1 + np.abs(analytic).max()))


def test_reference_model_may_be_another(model, tokenizer, texts: list[str]) -> None:
    config = LlamaConfig.from_dict({**model.config.to_dict(), "vocab_size": len(tokenizer)})
    other = LlamaForCausalLM(config).eval()
    alone = LastdeDetector(model, tokenizer, n_samples=8).score(texts)
    both = LastdeDetector(model, tokenizer, n_samples=8, reference_model=other).score(texts)
    assert np.isfinite(both).all() and not np.allclose(alone, both)


def test_continuations_start_with_their_text(model, tokenizer, texts: list[str]) -> None:
    found = continue_texts(model, tokenizer, texts, prompt_tokens=10, new_tokens=5, seed=1, batch_size=3)
    assert found == continue_texts(model, tokenizer, texts, prompt_tokens=10, new_tokens=5, seed=1, batch_size=3)
    for text, new in zip(texts, found, strict=True):
        opening = tokenizer.decode(tokenizer(text)["input_ids"][:10])
        assert new.startswith(opening) and len(new) > len(opening)


@given(st.lists(st.tuples(st.floats(-9, 9, width=16), st.integers(0, 1)), min_size=2, max_size=20))
def test_youden_is_the_best_threshold(pairs: list[tuple[float, int]]) -> None:
    scores, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    if len(set(labels)) < 2:
        return

    def youden(threshold: float) -> float:
        rates = [sum(s > threshold for s, l in pairs if l == c) / labels.count(c) for c in (0, 1)]
        return rates[1] - rates[0]

    best = max(map(youden, [*scores, min(scores) - 1]))
    assert youden(choose_threshold(scores, labels)) == pytest.approx(best)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=40), st.floats(0, 0.99))
def test_false_positive_rate_is_kept(scores: list[float], rate: float) -> None:
    threshold = choose_threshold(scores, [0] * len(scores), rate)
    assert sum(s > threshold for s in scores) <= rate * len(scores) + 1e-6


# bad input


def many(n: int) -> Tensor:
    return -torch.rand(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lastde(many(8)), "8 scored tokens, but 9 are needed"),
        (lambda: lastde(torch.full((30,), float("nan"))), "half precision"),
        (lambda: lastde(many(30), agg="mean"), "agg must be one of std"),
        (lambda: lastde(many(30), scales=1), "at least 2 scales"),
        (lambda: lastde(many(30), bins_per_token=0.01), "at least 2 are needed"),
        (lambda: lastde_plus_plus(many(30), torch.rand(5, 29)), r"sampled must be \(S, 30\)"),
        (lambda: multiscale_diversity_entropy(many(30), 3, 1, 5), "bins must be at least 2"),
        (lambda: multiscale_diversity_entropy(torch.arange(30), 3, 10, 5), "floating point"),
        (lambda: token_log_probs(torch.zeros(4, 9), torch.zeros(3, dtype=torch.long)), "do not fit"),
        (lambda: token_log_probs(torch.zeros(1, 9), torch.tensor([9])), "model's own tokenizer"),
        (lambda: token_log_probs(torch.full((1, 9), float("nan")), torch.tensor([1])), "half precision"),
        (lambda: LastdeDetector("small", variant="lastde+"), "variant must be one of"),
        (lambda: LastdeDetector("small", agg="median"), "agg must be one of"),
        (lambda: LastdeDetector("small", embed_size=1), "embed_size must be at least 2"),
        (lambda: LastdeDetector("small", n_samples=1), "n_samples must be at least 2"),
        (lambda: LastdeDetector("small", max_tokens=12), "max_tokens must be at least 20"),
        (lambda: BaselineDetector("small", criterion="perplexity"), "criterion must be one of"),
        (lambda: choose_threshold([1.0, 2.0], [0, 0]), "no machine text"),
        (lambda: choose_threshold([1.0, 2.0], [1, 1]), "no human text"),
        (lambda: choose_threshold([1.0, 2.0], [0, 2]), "labels must be 0"),
    ],
)
def test_bad_input(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_bad_texts(model, tokenizer) -> None:
    detector = LastdeDetector(model, tokenizer, n_samples=4)
    with pytest.raises(ValueError, match="list of strings, got one string"):
        detector.score("a text")
    with pytest.raises(ValueError, match="text 1 is empty"):
        detector.score(["a text", "  "])
    with pytest.raises(ValueError, match="text 0 is a list"):
        detector.score([["a", "text"]])
    with pytest.raises(ValueError, match="scored tokens, but 20 are needed"):
        detector.score(["Far too short."])
    with pytest.raises(ValueError, match="each text needs one"):
        detector.fit(["a", "b"], [0])
    with pytest.warns(UserWarning, match="unreliable"):
        detector.score([held_out_texts("english")[0][:120]])


def test_two_tokenizers_are_refused(model, tokenizer) -> None:
    other = load_model("small")[1]
    other.add_tokens(["<another>"])
    detector = LastdeDetector(model, tokenizer, reference_model=model, reference_tokenizer=other)
    with pytest.raises(ValueError, match=r"4096 tokens.*4097 tokens.*differ"):
        detector.score(["Some text to score."])
    with pytest.raises(ValueError, match="give the tokenizer"):
        LastdeDetector(model).score(["Some text to score."])


def test_overflowing_half_precision_is_named(model, tokenizer, texts: list[str]) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.model.norm.weight, float("inf"))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="logits hold NaN"):
        warnings.simplefilter("ignore")
        LastdeDetector(broken, tokenizer).score(texts)


def test_reading_texts(tmp_path) -> None:
    for name, label in (("human", "a person"), ("machine", "a machine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(label)
    assert read_labelled(tmp_path) == (["a person", "a machine"], [0, 1])
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "x", "label": "human"}\n\n{"text": "y", "label": 1}\n')
    assert read_labelled(lines) == (["x", "y"], [0, 1]) and read_texts(lines) == ["x", "y"]
    for content, says in {
        '{"text": "x", "label": "cat"}': "label must be human, machine",
        '{"text": "x", "label": 0}': "only human texts",
        '{"txt": "x"}': 'string under "text"',
        "text": "not JSON",
        "": "holds no text",
    }.items():
        lines.write_text(content)
        with pytest.raises(ValueError, match=says):
            read_labelled(lines)
    with pytest.raises(ValueError, match="does not exist"):
        read_labelled(tmp_path / "none")
    with pytest.raises(ValueError, match="no folder human"):
        read_labelled(tmp_path / "human")
    with pytest.raises(ValueError, match=r"no \.txt file"):
        read_texts(tmp_path)
