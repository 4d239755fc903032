"""Counting pairs: the golden edge cases, and a slow definition word by word."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_case import GoldenCase
from tokenry.tokenization import count_pairs

pytestmark = pytest.mark.method("data-mixture-inference")


def merge_word(word, left, right, product):
    done, i = [], 0
    while i < len(word):
        if word[i : i + 2] == [left, right]:
            done.append(product)
            i += 2
        else:
            done.append(word[i])
            i += 1
    return done


def symbols(word, prefix="", suffix=""):
    parts = [prefix * (i > 0) + c for i, c in enumerate(word)]
    return [*parts[:-1], parts[-1] + suffix]


def slow_counts(words, merges, prefix="", suffix=""):
    """Pair counts before every merge, one word after the other, and the words at the end."""
    split = [(symbols(word, prefix, suffix), k) for word, k in words.items()]
    table = []
    for left, right in merges:
        pairs = Counter()
        for word, k in split:
            for pair in pairwise(word):
                pairs[pair] += k
        table.append(+pairs)
        split = [(merge_word(word, left, right, left + right.removeprefix(prefix)), k) for word, k in split]
    return table, split


def fast_table(counts, category):
    table, now = [], Counter()
    for step in range(counts.steps):
        now.update({pair: value - now[pair] for pair, value in counts.changed(category, step).items()})
        table.append(+now)
    return table


@pytest.mark.golden
def test_golden():
    spec = GoldenCase("data-mixture-inference", "pair_counts").spec
    merges = [tuple(merge) for merge in spec["inputs"]["merges"]]
    counts = count_pairs([spec["inputs"]["word_counts"]], merges)
    for step, expected in enumerate(spec["outputs"]["changed_before_step"]):
        assert counts.changed(0, step) == {(a, b): k for a, b, k in expected}


words = st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 9), min_size=1, max_size=8)


@st.composite
def merge_lists(draw, prefix="", suffix=""):
    known = [*"abc"]
    if prefix or suffix:
        known = sorted({p + c + s for p in ("", prefix) for c in "abc" for s in ("", suffix)})
    merges = []
    for _ in range(draw(st.integers(1, 8))):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if (left, right) not in merges:
            merges.append((left, right))
            known.append(left + right.removeprefix(prefix))
    return merges


@given(st.lists(words, min_size=1, max_size=3), merge_lists())
def test_matches_the_slow_definition(categories, merges):
    counts = count_pairs(categories, merges)
    for i, given_words in enumerate(categories):
        table, split = slow_counts(given_words, merges)
        assert fast_table(counts, i) == table
        left = Counter()
        for word, k in split:
            for symbol in word:
                left[symbol] += k
        row = counts.token_counts[[i]].toarray().ravel()
        assert {s: int(k) for s, k in zip(counts.symbols, row, strict=True) if k} == left
        assert counts.initial[i] == sum((len(word) - 1) * k for word, k in given_words.items())


@given(words, merge_lists(prefix="##", suffix="</w>"))
def test_prefix_and_suffix(given_words, merges):
    counts = count_pairs([given_words], merges, prefix="##", suffix="</w>")
    assert fast_table(counts, 0) == slow_counts(given_words, merges, "##", "</w>")[0]


@given(words, merge_lists())
def test_running_and_counts_at_agree(given_words, merges):
    counts = count_pairs([given_words, {"ab": 2, "bca": 1}], merges)
    weights = np.array([0.3, 2.0])
    rows = np.arange(len(counts.pair))
    np.testing.assert_allclose(counts.running(weights), counts.counts_at(rows) @ weights, atol=1e-9)


def test_absent_merges_leave_no_record():
    counts = count_pairs([{"ab": 1}], [("x", "y"), ("a", "b"), ("ab", "c")])
    assert counts.merge_pair.tolist()[0] == -1 and counts.merge_pair[1] >= 0
    assert counts.changed(0, 1) == {} and counts.changed(0, 2) == {("a", "b"): 0}


@pytest.mark.parametrize(
    ("words", "merges", "message"),
    [
        ([], [("a", "b")], "nothing to count"),
        ([{}], [("a", "b")], "nothing to count"),
        ([{"ab": 1}], [("a",)], "two non-empty"),
    ],
)
def test_rejects(words, merges, message):
    with pytest.raises(ValueError, match=message):
        count_pairs(words, merges)
