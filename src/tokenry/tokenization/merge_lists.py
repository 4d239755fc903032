"""Merge lists of real tokenizers: ``tokenizer.json``, tiktoken ranks, conversions from SentencePiece.

Three forms are met. A ``tokenizer.json`` lists the merges in order. A tiktoken file ranks tokens only; the merge behind the
token of rank k is what is left when its bytes are merged with the ranks below k down to two parts. A conversion from
SentencePiece lists every split of every token as a merge; one per token is the real one.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import lzma
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenry.tokenization.pair_counts import Merge

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["MergeList", "drop_redundant_merges", "merges_from_ranks", "read_merge_list"]

# Patterns that split text before BPE, by the name of the encoding (README files of the releases).
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "p50k_edit": _GPT2,
    "cl100k_base": _CL100K,
    "llama3": _CL100K,
    "o200k_base": _O200K,
    "llama4": _O200K,
}


@dataclass(frozen=True, eq=False)
class MergeList:
    """What BPE did to text, in order.

    Attributes:
        merges: The merges, each a pair of symbols.
        pre_tokenizer: The tokenizer's own way to split text into words before BPE.
        normalizer: The tokenizer's own way to clean text before that; None for none.
        continuing_subword_prefix: Written before symbols inside a word.
        end_of_word_suffix: Written behind the last symbol of a word.
        redundant: How many merges were dropped because another merge makes the same token.
    """

    merges: list[Merge]
    pre_tokenizer: PreTokenizer
    normalizer: Normalizer | None = None
    continuing_subword_prefix: str = ""
    end_of_word_suffix: str = ""
    redundant: int = 0


def byte_characters() -> dict[int, str]:
    """The 256 printable characters that stand for bytes in byte-level BPE.

    Example:
        >>> byte_characters()[ord(" ")]
        'Ġ'
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _last_two(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """Merge a token's bytes with the ranks below its own until nothing more merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], below))
        if ranks.get(parts[best] + parts[best + 1], below) >= below:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def merges_from_ranks(ranks: Mapping[bytes, int], *, limit: int | None = None) -> list[Merge]:
    """Merges behind tiktoken ranks, as byte-level symbols.

    Args:
        ranks: Token to rank; the 256 single bytes are among them.
        limit: Only the first so many merges. None: all.

    Returns:
        The merges in order. A token that does not come down to two parts was not made by a merge and is left out.

    Raises:
        ValueError: A byte has no rank.

    Example:
        >>> ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
        >>> merges_from_ranks(ranks)
        [('t', 'h'), ('th', 'e')]
    """
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of 256 bytes have no rank (first {lacking[0]}): not a byte-level BPE vocabulary"
        )
    characters = byte_characters()
    merges: list[Merge] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if limit is not None and len(merges) >= limit:
            break
        if len(token) < 2:
            continue
        parts = _last_two(token, ranks, rank)
        if len(parts) == 2:
            left, right = ("".join(map(characters.__getitem__, part)) for part in parts)
            merges.append((left, right))
    return merges


def drop_redundant_merges(merges: Sequence[Merge], *, remove_whitespace_runs: bool = False) -> list[Merge]:
    """One merge per token, for lists converted from SentencePiece, which hold every split of every token.

    Tokens are taken in the order in which they last appear as a product. Of a token's splits the one is kept whose parts
    were made earliest: the ascending ranks of all merges that build them, compared in lexicographic order. A part that is
    not built yet ranks last. Of a split and its mirror the one with the longer left part is kept.

    Args:
        merges: The list as converted.
        remove_whitespace_runs: Also drop tokens that are a run of one of ▁, newline, tab: some releases (Gemma) added
            them by hand.

    Example:
        >>> drop_redundant_merges([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])
        [('a', 'b'), ('b', 'c'), ('ab', 'c')]
    """
    splits: dict[str, list[Merge]] = {}
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        product = left + right
        if remove_whitespace_runs and len(set(product)) == 1 and product[0] in "▁\n\t":
            continue
        splits.setdefault(product, []).append((left, right))
        rank[product] = i
    built: dict[str, tuple[float, ...]] = {}  # ascending ranks of the merges that make a token, its own included
    kept: list[Merge] = []

    def cost(part: str) -> tuple[float, ...]:
        return () if part not in rank else built.get(part, (float("inf"),))

    for product in sorted(rank, key=rank.__getitem__):
        candidates = splits[product]
        pairs = set(candidates)
        best = min(
            (pair for pair in candidates if not (len(pair[0]) < len(pair[1]) and pair[::-1] in pairs)),
            key=lambda pair: sorted((*cost(pair[0]), *cost(pair[1]))),
        )
        built[product] = tuple(sorted((*cost(best[0]), *cost(best[1]), rank[product])))
        kept.append(best)
    return kept


def byte_level_splitter(pattern: str) -> PreTokenizer:
    """Split text by a tiktoken pattern, then write bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    # Oniguruma reads {1,3}+ as a repeated repeat and $ as the end of a line; tiktoken means possessive and end of text.
    plain = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
    plain = re.sub(r"(?<!\\)\$", r"\\z", plain)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(plain), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece_splitter() -> PreTokenizer:
    """Words as SentencePiece's BPE trainer sees them: cut before spaces, around digits, and around punctuation."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n\t]+"), "removed"),
            pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{M}\p{N}]+"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _from_ranks(ranks: Mapping[bytes, int], pattern: str, limit: int | None) -> MergeList:
    return MergeList(merges_from_ranks(ranks, limit=limit), byte_level_splitter(pattern))


def _from_tiktoken_file(path: Path, limit: int | None) -> MergeList:
    name = path.name.split(".")[0]
    pattern = PATTERNS.get(name)
    if pattern is None:
        raise ValueError(
            f"{path.name}: a .tiktoken file does not hold its splitting pattern, and {name!r} is none of "
            f"{', '.join(PATTERNS)}; give a tiktoken.Encoding instead"
        )
    try:
        lines = (line.split() for line in _read_bytes(path).splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{path} is not a tiktoken file (lines of 'base64 rank'): {error}") from error
    return _from_ranks(ranks, pattern, limit)


def _from_json(text: str, where: str) -> MergeList:
    from tokenizers import Tokenizer

    try:
        spec: dict[str, Any] = json.loads(text)
        model = spec["model"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a tokenizer.json: {error!r}") from error
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE" or not model.get("merges"):
        raise ValueError(f"{where} holds a {kind} model: there is no merge order to read; only BPE tokenizers have one")
    tokenizer = Tokenizer.from_str(text)
    listed = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    merges: list[Merge] = [(merge[0], merge[1]) for merge in listed]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    products = {left + right.removeprefix(prefix) for left, right in merges}
    redundant = len(merges) - len(products)
    if redundant:
        merges = drop_redundant_merges(merges)
    pre, normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    if any("▁" in left for left, _ in merges[:200]):
        # Converted from SentencePiece: at run time it does not split, in training it did.
        pre, normalizer = sentencepiece_splitter(), None
    elif pre is None:
        raise ValueError(f"{where} has no pre-tokenizer: give the one it was trained with as pre_tokenizer=")
    return MergeList(merges, pre, normalizer, prefix, suffix, redundant)


def read_merge_list(tokenizer: Any, *, limit: int | None = None) -> MergeList:
    """Merges, pre-tokenizer and normalizer of a tokenizer.

    Args:
        tokenizer: Path of a ``tokenizer.json``, of the folder that holds it, or of a ``.tiktoken`` file named after its
            encoding (each also ``.xz`` or ``.gz``); a ``tokenizers.Tokenizer``; a ``PreTrainedTokenizerFast``; a
            ``tiktoken.Encoding``.
        limit: tiktoken only: work out so many merges and no more.

    Raises:
        ValueError: There is no such file, or it has no merges.

    Example:
        >>> from tokenry.assets import model_path
        >>> read_merge_list(model_path("small")).merges[0]
        ('Ġ', 'Ġ')
    """
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give a tokenizer.json, its folder, or a .tiktoken file")
        if ".tiktoken" in path.suffixes:
            return _from_tiktoken_file(path, limit)
        try:
            text = _read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        return _from_json(text, str(path))
    if hasattr(tokenizer, "_mergeable_ranks") and hasattr(tokenizer, "_pat_str"):
        return _from_ranks(tokenizer._mergeable_ranks, tokenizer._pat_str, limit)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        return _from_json(backend.to_str(), f"the {type(tokenizer).__name__}")
    raise ValueError(
        f"cannot read merges from a {type(tokenizer).__name__}: give a path, a tokenizers.Tokenizer, a "
        "PreTrainedTokenizerFast or a tiktoken.Encoding"
    )
