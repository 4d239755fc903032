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
from tokenry.tokenization.mixture_program import solve_mixture
from tokenry.tokenization.pair_counts import Merge, PairCounts, count_pairs

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["MixtureInference", "Samples"]

DENOMINATORS = ("pairs", "bytes", "chars")
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


def _texts(name: str, given: Iterable[str] | str | Path) -> Iterator[str]:
    """The texts of one category: an iterable of texts, one text, or a file."""
    if isinstance(given, Path):
        if not given.is_file():
            raise ValueError(f"category {name!r}: there is no file {given}")
        with given.open(encoding="utf-8", errors="strict", newline="") as file:
            try:
                while block := file.read(1 << 20):
                    yield block + file.readline()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"category {name!r}: {given} is not UTF-8 text ({error.reason}); convert it first"
                ) from error
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
        unseen: A category that has no pair in common with the merges is refused (``"raise"``) or kept (``"keep"``): the
            merges then only bound its share from above.

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
        unseen: Literal["raise", "keep"] = "raise",
    ) -> None:
        self.merges = merges
        self.pre_tokenizer = pre_tokenizer
        self.normalizer = normalizer
        self.denominator = denominator
        self.max_merges = max_merges
        self.skip_merges = skip_merges
        self.continuing_subword_prefix = continuing_subword_prefix
        self.end_of_word_suffix = end_of_word_suffix
        self.unseen = unseen

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
        read: dict[str, Any] = {
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
        self.missing_merges_ = [tuple(self.merges[t]) for t in np.flatnonzero(counts.merge_pair < 0).tolist()]
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
        if self.unseen not in ("raise", "keep"):
            raise ValueError(f"unseen must be 'raise' or 'keep', got {self.unseen!r}")
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
        entries = counts.change.tocoo()
        shared = np.bincount(entries.col[merged[counts.pair][entries.row]], minlength=len(names))
        for name, seen in zip(names, shared, strict=True):
            if not seen and self.unseen == "raise":
                raise ValueError(
                    f"category {name!r} has no pair in common with the merges: its share cannot be told. Is the "
                    "pre-tokenizer the tokenizer's own (byte-level or not)? Else use more merges, leave the category out, or set unseen='keep'"
                )
        missing = np.flatnonzero(counts.merge_pair < 0).tolist()
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
