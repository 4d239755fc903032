"""What was a tokenizer trained on? Its ordered merge list tells, by a linear program.

Hayase, Liu, Choi, Oh, Smith, "Data Mixture Inference: What do BPE Tokenizers Reveal about their Training Data?",
2024, arXiv:2407.16607.

BPE merges the most frequent pair of its training text at every step. With f[i, p, t] the frequency of pair p in a
sample of category i when merge t is due (counts over the category's initial pairs), the shares a[i] must therefore make
merge m(t) the most frequent pair at every step, up to slack for single steps (v) and single pairs (u):

    minimise    sum_t v[t] + sum_p u[p]
    subject to  sum_i a[i] (f[i, m(t), t] - f[i, p, t]) + v[t] + u[p] >= 0     every step t, every pair p != m(t)
                sum_i a[i] = 1,   0 <= a <= 1,   v >= 0,   u >= 0

There are T x P inequalities; few of them bind. They are added as they are found violated, and the program is solved again
from the last basis, until none is violated: the result is that of the whole program.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sklearn.base import BaseEstimator

from tokenry.tokenization.merge_lists import MergeList, read_merge_list
from tokenry.tokenization.pair_counts import Merge, PairCounts, count_pairs

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["MixtureInference", "MixtureSolution", "Samples", "solve_mixture"]

DENOMINATORS = ("pairs", "bytes", "chars")
SCALE = 1000.0  # frequencies enter the program in per mille, which makes the solver's tolerance 1e-10 of a frequency
TOLERANCE = 1e-9  # a pair may exceed the true merge by this frequency unnoticed
PER_STEP = 3  # inequalities of one step that one round adds at most (paper: 10)
PER_ROUND = (
    3  # inequalities that one round adds at most, times the merges (paper: 100 in all; ten times slower at T = 1,000)
)
SMALL = 20_000  # bytes of a category below which its frequencies are too noisy


@dataclass(frozen=True, eq=False)
class Samples:
    """Texts of n categories, counted under one merge list.

    Attributes:
        categories: Their names.
        counts: Pair counts at every step.
        bytes: ``(n,)`` UTF-8 bytes of the texts as given.
        chars: ``(n,)`` characters of the texts as given.
    """

    categories: list[str]
    counts: PairCounts
    bytes: np.ndarray
    chars: np.ndarray


@dataclass(frozen=True, eq=False)
class MixtureSolution:
    """Optimum of the linear program.

    Attributes:
        shares: ``(n,)`` a, shares of the categories in units of the denominator.
        step_slack: ``(T,)`` v.
        pair_slack: Index of a pair to its u, where that is positive.
        objective: Sum of both slacks.
        n_constraints: Inequalities that were needed.
        n_rounds: How often the program was solved.
    """

    shares: np.ndarray
    step_slack: np.ndarray
    pair_slack: dict[int, float]
    objective: float
    n_constraints: int
    n_rounds: int


class _Program:
    """The linear program, growing by inequalities; HiGHS keeps the basis between solves."""

    def __init__(self, n: int, steps: int) -> None:
        import highspy

        class Quiet(highspy.Highs):
            """Says nothing, not even its name when it is made."""

            def enableCallbacks(self) -> None:
                self.setOptionValue("output_flag", False)
                super().enableCallbacks()

        self._optimal = highspy.HighsModelStatus.kOptimal
        self.model = Quiet()
        for option, value in (("threads", 1), ("solver", "simplex")):
            self.model.setOptionValue(option, value)
        empty = np.zeros(0)
        none = np.zeros(n, np.int32)
        self.model.addCols(n, np.zeros(n), np.zeros(n), np.ones(n), 0, none, np.zeros(0, np.int32), empty)
        self.model.addRows(
            1, np.ones(1), np.ones(1), n, np.zeros(1, np.int32), np.arange(n, dtype=np.int32), np.ones(n)
        )
        self.n, self.columns, self.steps = n, n, steps
        self.step_column: dict[int, int] = {}
        self.pair_column: dict[int, int] = {}

    def add(self, steps: np.ndarray, pairs: np.ndarray, lead: np.ndarray) -> None:
        """Add ``lead @ a + v[step] + u[pair] >= 0`` for k inequalities; lead: ``(k, n)``."""
        fresh = 0
        for names, known in ((steps, self.step_column), (pairs, self.pair_column)):
            for name in names.tolist():
                if name not in known:
                    known[name] = self.columns + fresh
                    fresh += 1
        start, nothing = np.zeros(fresh, np.int32), np.zeros(0, np.int32)
        self.model.addCols(
            fresh, np.ones(fresh), np.zeros(fresh), np.full(fresh, np.inf), 0, start, nothing, np.zeros(0)
        )
        self.columns += fresh
        k = len(steps)
        index = np.empty((k, self.n + 2), np.int32)
        index[:, : self.n] = np.arange(self.n)
        index[:, self.n] = [self.step_column[t] for t in steps.tolist()]
        index[:, self.n + 1] = [self.pair_column[p] for p in pairs.tolist()]
        values = np.concatenate([lead * SCALE, np.ones((k, 2))], axis=1)
        starts = np.arange(k, dtype=np.int32) * (self.n + 2)
        self.model.addRows(k, np.zeros(k), np.full(k, np.inf), index.size, starts, index.ravel(), values.ravel())

    def solve(self) -> tuple[np.ndarray, np.ndarray, dict[int, float]]:
        """Shares, step slack, pair slack.

        Raises:
            RuntimeError: The solver stopped without an optimum.
        """
        self.model.run()
        status = self.model.getModelStatus()
        if status != self._optimal:
            raise RuntimeError(
                f"the linear program was not solved: HiGHS says {self.model.modelStatusToString(status)!r} with "
                f"{self.columns} columns; try fewer merges (max_merges) or larger samples"
            )
        values = np.maximum(np.asarray(self.model.getSolution().col_value), 0.0)
        step_slack = np.zeros(self.steps)
        for step, column in self.step_column.items():
            step_slack[step] = values[column] / SCALE
        return values[: self.n], step_slack, {p: values[c] / SCALE for p, c in self.pair_column.items()}


class _RangeMinimum:
    """Smallest value of a window, and the first place below a bound, for many windows at once (sparse table)."""

    def __init__(self, values: np.ndarray) -> None:
        self.levels = [values]
        while len(self.levels[-1]) > (half := 1 << (len(self.levels) - 1)):
            last = self.levels[-1]
            self.levels.append(np.minimum(last[:-half], last[half:]))

    def first_below(self, start: np.ndarray, end: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """First index in ``[start, end)`` whose value is below ``bound``; ``end`` where there is none."""
        at = start.copy()
        for level in reversed(range(len(self.levels))):
            table, width = self.levels[level], 1 << level
            fits = at + width <= end
            clear = fits & (table[np.where(fits, at, 0)] >= bound)
            at[clear] += width
        return at


def _violated(
    counts: PairCounts, value: np.ndarray, cutoff: np.ndarray, known: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, pairs and rows of new violated inequalities, the earliest steps first, by the limits of one round.

    A row's ``value`` (E,) stands from its step to ``end`` (E,), and violates every step there whose cutoff (T,) is lower.
    """
    minimum = _RangeMinimum(cutoff)
    rows = np.flatnonzero(value > cutoff.min())
    low, steps = 0, len(cutoff)
    limit = max(300, PER_ROUND * steps)
    taken: list[np.ndarray] = []
    count = 0
    while low < steps and count < limit and len(rows):
        first = minimum.first_below(np.maximum(counts.step[rows], low), end[rows], value[rows])
        live = first < end[rows]
        rows, first = rows[live], first[live]
        if not len(rows):
            break
        order = np.argsort(first, kind="stable")
        batch = 4 * limit
        high = int(first[order[batch]]) + 1 if len(order) > batch else steps
        now = first < high
        near, begin = rows[now], first[now]
        span = np.minimum(end[near], high) - begin
        which = np.repeat(np.arange(len(near)), span)
        at = np.arange(span.sum()) - np.repeat(np.cumsum(span) - span, span) + begin[which]
        row = near[which]
        hit = value[row] > cutoff[at]
        at, row = at[hit], row[hit]
        new = ~np.isin(at * len(counts.pairs) + counts.pair[row], known)
        at, row = at[new], row[new]
        order = np.lexsort((-value[row], at))
        at, row = at[order], row[order]
        rank = np.arange(len(at)) - np.searchsorted(at, at)
        at, row = at[rank < PER_STEP], row[rank < PER_STEP]
        taken.append(np.stack([at, row]))
        count += len(at)
        low = high
    found = np.concatenate(taken, axis=1) if taken else np.zeros((2, 0), np.int64)
    found = found[:, :limit]
    return found[0], counts.pair[found[1]], found[1]


def solve_mixture(counts: PairCounts, denominators: np.ndarray, *, skip: int = 0) -> MixtureSolution:
    """Solve the linear program by adding violated inequalities until none is left.

    Args:
        counts: Pair counts of n categories over T merges.
        denominators: ``(n,)`` what a category's counts are divided by.
        skip: Leave out the inequalities of the first ``skip`` steps (their merges are applied all the same).

    Returns:
        The optimum of the whole program, up to a frequency of 1e-9 in every inequality.

    Raises:
        RuntimeError: The solver failed; never a silent uniform answer.

    Example:
        >>> counts = count_pairs([{"ab": 9, "cd": 1}, {"ab": 1, "cd": 9}], [("a", "b"), ("c", "d")])
        >>> solve_mixture(counts, counts.initial).objective
        0.0
    """
    n, steps = len(denominators), counts.steps
    present = counts.merge_pair >= 0
    present[:skip] = False
    at = np.flatnonzero(present)
    merge_row = counts.row(counts.merge_pair[at], at)
    at, merge_row = at[merge_row >= 0], merge_row[merge_row >= 0]
    end = np.full(len(counts.pair), steps)
    same = counts.pair[1:] == counts.pair[:-1]
    end[:-1][same] = counts.step[1:][same]

    program = _Program(n, steps)
    shares, step_slack, pair_slack = np.full(n, 1.0 / n), np.zeros(steps), {}
    known = np.zeros(0, np.int64)
    rounds = 0
    while True:
        raw = counts.running(shares / denominators)
        cutoff = np.full(steps, np.inf)
        cutoff[at] = raw[merge_row] + step_slack[at] + TOLERANCE
        slack = np.zeros(len(counts.pairs))
        slack[list(pair_slack)] = list(pair_slack.values())
        new_steps, new_pairs, rows = _violated(counts, raw - slack[counts.pair], cutoff, known, end)
        if not len(new_steps):
            break
        leading = merge_row[np.searchsorted(at, new_steps)]
        lead = (counts.counts_at(leading) - counts.counts_at(rows)) / denominators
        program.add(new_steps, new_pairs, lead)
        known = np.concatenate([known, new_steps * len(counts.pairs) + new_pairs])
        shares, step_slack, pair_slack = program.solve()
        rounds += 1
    objective = float(step_slack.sum() + sum(pair_slack.values()))
    used = {p: u for p, u in pair_slack.items() if u > 0}
    return MixtureSolution(shares / shares.sum(), step_slack, used, objective, len(known), rounds)


def _texts(name: str, given: Iterable[str] | str | Path) -> Iterator[str]:
    """The texts of one category: an iterable of texts, one text, or a file."""
    if isinstance(given, Path):
        if not given.is_file():
            raise ValueError(f"category {name!r}: there is no file {given}")
        with given.open(encoding="utf-8", errors="strict", newline="") as file:
            while block := file.read(1 << 20):
                yield block + file.readline()
    elif isinstance(given, str):
        yield given
    else:
        for text in given:
            if not isinstance(text, str):
                raise ValueError(f"category {name!r}: texts must be str, got {type(text).__name__}")
            yield text


class MixtureInference(BaseEstimator):
    """Infer the proportions of categories in a BPE tokenizer's training text from its merges.

    Args:
        merges: The merges in the order in which they were learned.
        pre_tokenizer: A ``tokenizers`` pre-tokenizer or a function from text to words. It must be the tokenizer's own.
            None: byte-level with GPT-2's pattern.
        normalizer: A ``tokenizers`` normalizer or a function from text to text. None: none.
        denominator: What counts are divided by: ``"pairs"`` (paper), ``"bytes"`` or ``"chars"`` of the category.
        max_merges: Use the first so many merges. None: all. A few hundred suffice for samples of 100 KB;
            more need larger samples (paper: 30,000 with 1 GB).
        skip_merges: Apply the first so many merges without asking them: what were the later ones trained on?
        continuing_subword_prefix: What the vocabulary writes before symbols inside a word; usually nothing.
        end_of_word_suffix: What it writes behind the last symbol of a word; usually nothing.

    Attributes:
        proportions_: Category to its share of the training bytes.
        pair_proportions_: Category to its share of the training text's symbol pairs.
        objective_: Slack that was needed; 0 means that the samples explain every merge.
        violations_: ``(T,)`` slack of each step.
        pair_slack_: Pair to its slack, where positive.
        n_constraints_: Inequalities that were needed.
        n_rounds_: How often the program was solved.
        missing_merges_: Merges that occur in no category, which are left out.
        categories_: Names in the order given.

    Example:
        >>> merges = [("t", "h"), ("th", "e"), ("s", "c"), ("sc", "h")]
        >>> data = {"english": "the then there " * 2000, "german": "schon schade schule " * 2000}
        >>> words = lambda text: text.split()
        >>> found = MixtureInference(merges, pre_tokenizer=words).fit(data)
        >>> sorted(found.proportions_)
        ['english', 'german']
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        pre_tokenizer: PreTokenizer | Callable[[str], Iterable[str]] | None = None,
        normalizer: Normalizer | Callable[[str], str] | None = None,
        denominator: Literal["pairs", "bytes", "chars"] = "pairs",
        max_merges: int | None = None,
        skip_merges: int = 0,
        continuing_subword_prefix: str = "",
        end_of_word_suffix: str = "",
    ) -> None:
        self.merges = merges
        self.pre_tokenizer = pre_tokenizer
        self.normalizer = normalizer
        self.denominator = denominator
        self.max_merges = max_merges
        self.skip_merges = skip_merges
        self.continuing_subword_prefix = continuing_subword_prefix
        self.end_of_word_suffix = end_of_word_suffix

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> MixtureInference:
        """Read merges, pre-tokenizer and normalizer from a tokenizer.

        Args:
            tokenizer: Path of a ``tokenizer.json``, of the folder that holds it, or of a ``.tiktoken`` file of a known
                encoding; a ``tokenizers.Tokenizer``; a ``PreTrainedTokenizerFast``; a ``tiktoken.Encoding``; a ``MergeList``.
            **kwargs: Further arguments of the class; ``pre_tokenizer`` and ``normalizer`` replace those that were read.

        Raises:
            ValueError: Not a BPE tokenizer, or not a tokenizer at all.
        """
        limit = kwargs.get("max_merges")
        found = tokenizer if isinstance(tokenizer, MergeList) else read_merge_list(tokenizer, limit=limit)
        read = {
            "pre_tokenizer": found.pre_tokenizer,
            "normalizer": found.normalizer,
            "continuing_subword_prefix": found.continuing_subword_prefix,
            "end_of_word_suffix": found.end_of_word_suffix,
        }
        return cls(found.merges, **{**read, **kwargs})

    def count(self, data: Mapping[str, Iterable[str] | str | Path]) -> Samples:
        """Count the categories' texts under the merges: the first half of ``fit``.

        Args:
            data: Category to its texts: an iterable of texts, one text as a string, or the ``Path`` of a file.

        Raises:
            ValueError: Fewer than two categories, one without text, or merges that cannot be in this order.
        """
        merges = self._checked_merges()
        if not isinstance(data, Mapping) or len(data) < 2:
            raise ValueError(
                f"data must map at least two categories to their texts, got {_describe(data)}; with one category its "
                "share is 1 whatever the merges are"
            )
        pre, normalize = self._callables()
        words: list[Counter[str]] = []
        sizes = np.zeros((2, len(data)), np.int64)
        for i, (name, given) in enumerate(data.items()):
            counter: Counter[str] = Counter()
            for text in _texts(name, given):
                sizes[:, i] += len(text.encode("utf-8", "surrogatepass")), len(text)
                counter.update(pre(normalize(text)))
            del counter[""]
            if not counter:
                raise ValueError(f"category {name!r} has no text: give it some, or leave the category out")
            if sizes[0, i] < SMALL:
                warnings.warn(
                    f"category {name!r} has {sizes[0, i]:,} bytes of text; below {SMALL:,} its share is a rough guess",
                    stacklevel=3,
                )
            words.append(counter)
        counts = count_pairs(words, merges, prefix=self.continuing_subword_prefix, suffix=self.end_of_word_suffix)
        self._check_counts(list(data), counts)
        return Samples(list(data), counts, sizes[0], sizes[1])

    def solve(self, samples: Samples) -> MixtureInference:
        """Find the shares that explain the merges best: the second half of ``fit``."""
        self._checked_merges()
        counts = samples.counts
        denominators = {"pairs": counts.initial, "bytes": samples.bytes, "chars": samples.chars}[self.denominator]
        solution = solve_mixture(counts, denominators.astype(float), skip=self.skip_merges)
        by_bytes, by_pairs = (solution.shares * size / denominators for size in (samples.bytes, counts.initial))
        self.categories_ = samples.categories
        self.proportions_ = _named(samples.categories, by_bytes)
        self.pair_proportions_ = _named(samples.categories, by_pairs)
        self.objective_ = solution.objective
        self.violations_ = solution.step_slack
        self.pair_slack_ = {counts.pairs[p]: u for p, u in solution.pair_slack.items()}
        self.n_constraints_ = solution.n_constraints
        self.n_rounds_ = solution.n_rounds
        self.missing_merges_ = [tuple(self.merges[t]) for t in np.flatnonzero(counts.merge_pair < 0)]
        return self

    def fit(self, data: Mapping[str, Iterable[str] | str | Path], y: object = None) -> MixtureInference:
        """Infer the proportions.

        Args:
            data: Category to its texts: an iterable of texts, one text as a string, or the ``Path`` of a file. Only
                what a category's text is like matters, not how much of it there is.
            y: Not used.

        Returns:
            Itself, with ``proportions_``.

        Raises:
            ValueError: Fewer than two categories, one without text or without any merge in it, merges out of order.
            RuntimeError: The solver failed.
        """
        return self.solve(self.count(data))

    def _checked_merges(self) -> list[Merge]:
        if self.denominator not in DENOMINATORS:
            raise ValueError(f"denominator must be one of {', '.join(DENOMINATORS)}, got {self.denominator!r}")
        listed = len(self.merges)
        if not listed:
            raise ValueError("the merge list is empty: there is nothing to infer from")
        wanted = listed if self.max_merges is None else self.max_merges
        if not 1 <= wanted <= listed:
            raise ValueError(f"max_merges is {wanted}, but the list has {listed} merges; use 1 to {listed}")
        if not 0 <= self.skip_merges < wanted:
            raise ValueError(
                f"skip_merges must be at least 0 and less than the {wanted} merges used, got {self.skip_merges}"
            )
        merges = [tuple(merge) for merge in self.merges[:wanted]]
        check_order(merges, self.continuing_subword_prefix, self.end_of_word_suffix)
        return merges

    def _callables(self) -> tuple[Callable[[str], Iterable[str]], Callable[[str], str]]:
        pre, normalizer = self.pre_tokenizer, self.normalizer
        if pre is None:
            from tokenizers.pre_tokenizers import ByteLevel

            pre = ByteLevel(add_prefix_space=False)
        if hasattr(pre, "pre_tokenize_str"):
            split = pre.pre_tokenize_str
            words: Callable[[str], Iterable[str]] = lambda text: [word for word, _ in split(text)]  # noqa: E731
        elif callable(pre):
            words = pre
        else:
            raise ValueError(
                f"pre_tokenizer must be a tokenizers pre-tokenizer or a function, got {type(pre).__name__}"
            )
        if normalizer is None:
            return words, str
        normalize = getattr(normalizer, "normalize_str", normalizer)
        if not callable(normalize):
            raise ValueError(
                f"normalizer must be a tokenizers normalizer or a function, got {type(normalizer).__name__}"
            )
        return words, normalize

    def _check_counts(self, names: list[str], counts: PairCounts) -> None:
        merged = np.zeros(len(counts.pairs), bool)
        merged[counts.merge_pair[counts.merge_pair >= 0]] = True
        rows = merged[counts.pair]
        shared = np.asarray(abs(counts.change[rows]).sum(axis=0)).ravel()
        for name, seen in zip(names, shared, strict=True):
            if not seen:
                raise ValueError(
                    f"category {name!r} has no pair in common with the merges: its share cannot be told. Is the "
                    "pre-tokenizer the tokenizer's own (byte-level or not)? Else leave the category out"
                )
        missing = np.flatnonzero(counts.merge_pair < 0)
        if len(missing) > 0.05 * counts.steps:
            some = ", ".join("".join(self.merges[t]) for t in missing[:5])
            warnings.warn(
                f"{len(missing)} of {counts.steps} merges occur in no category (for example {some}): a category is missing, "
                "the samples are too small for so many merges, or the pre-tokenizer is not the tokenizer's own",
                stacklevel=4,
            )


def check_order(merges: Sequence[Merge], prefix: str = "", suffix: str = "") -> None:
    """Refuse a merge list in which a merge needs a symbol that no earlier merge produced.

    Raises:
        ValueError: With the first such merge.
    """
    produced: set[str] = set()
    for rank, (left, right) in enumerate(merges):
        for part in (left, right):
            bare = part.removeprefix(prefix).removesuffix(suffix) if part not in produced else ""
            if len(bare) > 1 and not _is_byte_token(bare):
                raise ValueError(
                    f"merge {rank} ({left!r}, {right!r}) needs {part!r}, which no earlier merge produces: the merges must "
                    "stand in the order in which they were learned; lists converted from SentencePiece are put right by "
                    "drop_redundant_merges"
                )
        produced.add(left + right.removeprefix(prefix))


def _is_byte_token(symbol: str) -> bool:
    return len(symbol) == 6 and symbol.startswith("<0x") and symbol.endswith(">")


def _named(names: list[str], shares: np.ndarray) -> dict[str, float]:
    total = shares / shares.sum()
    return {name: float(share) for name, share in zip(names, total, strict=True)}


def _describe(data: object) -> str:
    return f"{len(data)} ({', '.join(map(repr, data))})" if isinstance(data, Mapping) else type(data).__name__
