"""The linear program: golden mixture, the whole program as a slow definition, invariants, bad input."""

import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tokenizers import pre_tokenizers

from golden_case import GoldenCase
from tokenry.assets import language_samples
from tokenry.tokenization import (
    MixtureInference,
    classify_tokens,
    count_pairs,
    draw_shares,
    fit_ranks,
    log10_mse,
    solve_mixture,
    train_bpe,
    train_known_mixture,
)
from tokenry.tokenization.known_mixtures import TokenEfficiency, controlled_splitter

pytestmark = pytest.mark.method("data-mixture-inference")


@pytest.fixture(scope="module")
def languages():
    return language_samples()


@pytest.fixture(scope="module")
def golden(languages):
    """The golden case: odd sentences of three languages under 60 merges."""
    spec = GoldenCase("data-mixture-inference", "mixture_3").spec
    merges = [tuple(merge) for merge in spec["inputs"]["merges"]]
    inference = MixtureInference(merges, pre_tokenizer=controlled_splitter())
    data = {name: languages[name][1::2] for name in spec["inputs"]["categories"]}
    samples = inference.count(data)
    return spec["outputs"], inference, data, samples, inference.solve(samples)


@pytest.mark.golden
def test_golden_counts(golden):
    expected, _, _, samples, _ = golden
    assert dict(zip(samples.categories, samples.counts.initial.tolist(), strict=True)) == expected["initial_pairs"]
    assert dict(zip(samples.categories, samples.bytes.tolist(), strict=True)) == expected["bytes"]
    for i, name in enumerate(samples.categories):
        changed = [samples.counts.changed(i, step) for step in range(60)]
        assert [len(step) for step in changed] == expected["n_changed"][name]
        assert len(changed[0]) == expected["distinct_initial_pairs"][name]
        for a, b, k in expected["top_initial"][name]:
            assert changed[0][a, b] == k
        for step, listed in expected["changed_counts"][name].items():  # the stored lists end after 40
            assert all(changed[int(step)][a, b] == k for a, b, k in listed)
            assert len(listed) == min(40, len(changed[int(step)]))


@pytest.mark.golden
def test_golden_shares(golden):
    expected, _, _, _, found = golden
    assert found.pair_proportions_ == pytest.approx(expected["alpha_pairs"], abs=2e-4)
    assert found.proportions_ == pytest.approx(expected["alpha_bytes"], abs=2e-4)
    assert found.objective_ == pytest.approx(expected["objective"], abs=1e-5)
    assert found.n_constraints_ < expected["constraints_full"] / 100
    assert found.violations_.sum() + sum(found.pair_slack_.values()) == pytest.approx(found.objective_)


def whole_program(counts, denominators):
    """All T x P inequalities at once."""
    n, steps, pairs = len(denominators), counts.steps, len(counts.pairs)
    table = np.zeros((steps, pairs, n))
    for i in range(n):
        now = np.zeros(pairs)
        where = {pair: p for p, pair in enumerate(counts.pairs)}
        for t in range(steps):
            for pair, k in counts.changed(i, t).items():
                now[where[pair]] = k
            table[t, :, i] = now / denominators[i]
    rows = []
    for t in range(steps):
        m = counts.merge_pair[t]
        if m < 0:
            continue
        for p in range(pairs):
            if p != m:
                row = np.zeros(n + steps + pairs)
                row[:n] = table[t, p] - table[t, m]
                row[n + t] = row[n + steps + p] = -1
                rows.append(row)
    cost = np.concatenate([np.zeros(n), np.ones(steps + pairs)])
    total = np.concatenate([np.ones(n), np.zeros(steps + pairs)])[None]
    upper = np.asarray(rows).reshape(-1, len(cost))
    bounds = [(0, 1)] * n + [(0, None)] * (steps + pairs)
    return linprog(cost, A_ub=upper, b_ub=np.zeros(len(rows)), A_eq=total, b_eq=[1], bounds=bounds, method="highs").fun


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 12))
def test_lazy_reaches_the_whole_program(seed, n, steps):
    random = np.random.default_rng(seed)
    categories = [
        Counter("".join(random.choice([*"abcd"], size=random.integers(2, 8))) for _ in range(30)) for _ in range(n)
    ]
    known, merges = [*"abcd"], []
    for _ in range(steps):
        pair = tuple(random.choice(known, 2).tolist())
        if pair not in merges:
            merges.append(pair)
            known.append("".join(pair))
    counts = count_pairs(categories, merges)
    denominators = counts.initial.astype(float)
    assert solve_mixture(counts, denominators).objective == pytest.approx(whole_program(counts, denominators), abs=1e-6)


def test_permuting_categories_permutes_the_shares(golden):
    _, inference, data, _, found = golden
    turned = MixtureInference(**inference.get_params()).fit(dict(reversed(data.items())))
    assert turned.proportions_ == pytest.approx(found.proportions_, abs=1e-6)


def test_copies_of_a_corpus_change_nothing(golden):
    _, inference, data, _, found = golden
    copied = dict(data, rus_Cyrl=data["rus_Cyrl"] * 3)
    assert MixtureInference(**inference.get_params()).fit(copied).proportions_ == pytest.approx(
        found.proportions_, abs=1e-6
    )


def test_training_text_as_sample_needs_no_slack(languages):
    """The samples are the training text: the true shares explain every merge."""
    texts = {"a": languages["eng_Latn"][:300], "b": languages["deu_Latn"][:200]}
    tokenizer = train_bpe([text for given in texts.values() for text in given], 60)
    found = MixtureInference.from_tokenizer(tokenizer).fit(texts)
    sizes = {name: sum(len(text.encode()) for text in given) for name, given in texts.items()}
    truth = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    assert found.objective_ < 1e-6
    assert log10_mse(found.proportions_, truth) < -3.5


def test_known_mixture_beats_every_guess(languages):
    names = ["eng_Latn", "hin_Deva", "rus_Cyrl", "swh_Latn"]
    known = train_known_mixture({name: languages[name] for name in names}, [0.4, 0.1, 0.2, 0.3], merges=150)
    assert sum(known.shares.values()) == pytest.approx(1)
    inference = MixtureInference.from_tokenizer(known.tokenizer)
    samples = inference.count(known.samples)
    error = log10_mse(inference.solve(samples).proportions_, known.shares)
    guess = dict.fromkeys(names, 1 / 4)
    assert error < -3.5
    assert error < log10_mse(guess, known.shares) - 1.5
    assert error < log10_mse(classify_tokens(samples), known.shares) - 1
    assert sum(fit_ranks(samples).values()) == pytest.approx(1)
    assert min(TokenEfficiency().efficiency(samples, known.samples)) > 0


def test_halves_of_a_category_sum_to_the_whole(golden, languages):
    _, inference, data, _, found = golden
    texts = data["rus_Cyrl"]
    halves = {name: data[name] for name in ("eng_Latn", "deu_Latn")} | {"one": texts[0::2], "two": texts[1::2]}
    split = MixtureInference(**inference.get_params()).fit(halves).proportions_
    assert split["one"] + split["two"] == pytest.approx(found.proportions_["rus_Cyrl"], abs=0.03)


@pytest.mark.parametrize("denominator", ["bytes", "chars"])
def test_denominators_agree(golden, denominator):
    _, inference, _, samples, found = golden
    other = MixtureInference(**inference.get_params() | {"denominator": denominator}).solve(samples)
    assert other.proportions_ == pytest.approx(found.proportions_, abs=1e-5)


def test_skipped_merges_ask_nothing(golden):
    _, inference, _, samples, _ = golden
    found = MixtureInference(**inference.get_params() | {"skip_merges": 40}).solve(samples)
    assert not found.violations_[:40].any()


def test_shares_are_drawn_uniformly():
    random = np.random.default_rng(0)
    shares = np.stack([draw_shares(3, random) for _ in range(4000)])
    assert shares.min() > 0
    np.testing.assert_allclose(shares.sum(1), 1)
    # uniform on the simplex: P(share > 1/2) = 1/4 for each of three; normalised uniforms give about 0.17
    np.testing.assert_allclose((shares > 0.5).mean(0), 0.25, atol=0.025)


TEXT = ["the cat and the hat of the man " * 900]
GERMAN = ["der mann und der hund von der frau " * 900]
MERGES = [("t", "h"), ("th", "e"), ("d", "e"), ("de", "r")]


def plain(text):
    return text.split()


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, {"a": TEXT}, r"at least two categories.*got 1 \('a'\)"),
        ({}, TEXT, "at least two categories.*got list"),
        ({}, {"a": TEXT, "b": []}, "category 'b' has no text"),
        ({}, {"a": TEXT, "b": ["  "]}, "category 'b' has no text"),
        ({}, {"a": TEXT, "b": [3]}, "category 'b': texts must be str, got int"),
        ({}, {"a": TEXT, "b": ["привет мир " * 3000]}, "category 'b' has no pair in common"),
        ({"max_merges": 5}, {"a": TEXT, "b": GERMAN}, "max_merges is 5, but the list has 4"),
        ({"max_merges": 0}, {"a": TEXT, "b": GERMAN}, "max_merges is 0"),
        ({"skip_merges": 4}, {"a": TEXT, "b": GERMAN}, "skip_merges"),
        ({"merges": MERGES[1:]}, {"a": TEXT, "b": GERMAN}, r"merge 0 .* needs 'th', which no earlier merge"),
        ({"merges": []}, {"a": TEXT, "b": GERMAN}, "merge list is empty"),
        ({"denominator": "words"}, {"a": TEXT, "b": GERMAN}, "denominator must be one of pairs, bytes, chars"),
        ({"unseen": "drop"}, {"a": TEXT, "b": GERMAN}, "unseen must be 'raise' or 'keep'"),
        ({"pre_tokenizer": 3}, {"a": TEXT, "b": GERMAN}, "pre_tokenizer must be"),
        ({"normalizer": 3}, {"a": TEXT, "b": GERMAN}, "normalizer must be"),
    ],
)
def test_rejects(options, data, message):
    with pytest.raises(ValueError, match=message):
        MixtureInference(**{"merges": MERGES, "pre_tokenizer": plain} | options).fit(data)


def test_an_unseen_category_can_be_kept():
    """Its commonest pair must stay below the merges, so that its share has an upper bound."""
    data = {"a": TEXT, "b": GERMAN, "c": ["привет мир " * 3000]}
    found = MixtureInference(MERGES, pre_tokenizer=plain, unseen="keep").fit(data)
    assert found.proportions_["c"] < 0.6


def test_warns_of_little_text():
    with pytest.warns(UserWarning, match=r"category 'b' has 3[45] bytes"):
        MixtureInference(MERGES, pre_tokenizer=plain).fit({"a": TEXT, "b": "der mann und der hund von der frau "})


def test_warns_of_missing_merges():
    merges = [*MERGES, ("q", "x"), ("q", "z")]
    inference = MixtureInference(merges, pre_tokenizer=plain)
    with pytest.warns(UserWarning, match=r"2 of 6 merges occur in no category \(for example qx, qz\)"):
        inference.fit({"a": TEXT, "b": GERMAN})
    assert inference.missing_merges_ == [("q", "x"), ("q", "z")]


def test_solver_failure_is_an_error(golden, monkeypatch):
    _, _, _, samples, _ = golden
    import highspy

    monkeypatch.setattr(highspy.Highs, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="was not solved: HiGHS says"):
        solve_mixture(samples.counts, samples.counts.initial.astype(float))


def test_files_and_strings_are_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT[0], "utf-8")
    inference = MixtureInference(MERGES, pre_tokenizer=plain)
    first = inference.fit({"a": path, "b": GERMAN[0]}).proportions_
    assert first == inference.fit({"a": TEXT, "b": GERMAN}).proportions_
    with pytest.raises(ValueError, match="there is no file"):
        inference.fit({"a": tmp_path / "b.txt", "b": GERMAN})


def test_says_nothing(golden, capfd):
    _, _, _, samples, _ = golden
    solve_mixture(samples.counts, samples.counts.initial.astype(float))
    assert capfd.readouterr().out == ""


def test_default_pre_tokenizer_is_byte_level():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [("Ġ", "t"), ("h", "e"), ("e", "r")]
        a = MixtureInference(words).fit({"a": TEXT, "b": GERMAN}).proportions_
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert a == MixtureInference(words, pre_tokenizer=splitter).fit({"a": TEXT, "b": GERMAN}).proportions_


def test_helpers_reject():
    with pytest.raises(ValueError, match="sum to 1"):
        train_known_mixture({"a": TEXT * 2, "b": GERMAN * 2}, [0.5, 0.6])
    with pytest.raises(ValueError, match="at least two texts"):
        train_known_mixture({"a": TEXT, "b": GERMAN}, [0.5, 0.5])
    with pytest.raises(ValueError, match="categories differ"):
        log10_mse({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="n must be between"):
        draw_shares(0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="as many efficiencies"):
        TokenEfficiency().fit([], [])
