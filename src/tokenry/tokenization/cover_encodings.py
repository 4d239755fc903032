r"""A tokenizer seen as bytes: sorted tokens, the encodings of a text that goes on, and which tokens may follow.

    t is live      some text that begins with the bytes of t is encoded as t, ...
    t covers x     t is live, x is a prefix of bytes(t), and bytes(t without its last token) is a proper prefix of x

Where no pre-tokenizer looks ahead, t is live exactly if enc(dec(t)) = t. GPT-2's pattern looks ahead: two blanks at the
end of a text are one word, before a letter they are two words. Then "a" and two blanks have two live encodings, so a text
is asked with several characters behind it, and one that ends inside a character with characters that may complete it.

Kinds that are understood: byte-level BPE with or without a pre-tokenizer (GPT-2, Llama-3, Qwen); BPE over characters in
the manner of SentencePiece, with or without byte fallback (Llama-2, Mistral); Unigram over characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenry.tokenization.merge_lists import byte_characters
from tokenry.tokenization.tokenizer_parts import (
    KINDS,
    bare_tokenizer,
    check_kind,
    flat_steps,
    has_dummy_prefix,
    unknown_id,
)
from tokenry.tokenization.utf8_prefixes import completions, whole_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ByteVocabulary"]

# What may stand behind a text: its end, letters that complete a contraction ('s, 're, 've, 'll), a digit, a sign, blanks.
FOLLOW = ("", "s", "e", "l", "1", "!", " ", "\n")
ANCHORS = re.compile(r"\(\?<|\\[bBGA]|(^|[|(])\^")  # what makes a pattern depend on what stands before
PROBE = "Aa  bC (x1234, y's)\n\tit'll go. "
CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in CHARACTERS.items()}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
ROW_BYTES = 64 << 20  # memory for remembered rows of ``follows``


class ByteVocabulary:
    """The byte view of a tokenizer.

    Args:
        tokenizer: A fast tokenizer of one of the kinds above.

    Attributes:
        blank: How the covered bytes write a blank: ``b" "``, or the bytes of "▁" where the vocabulary does.
        dummy: What the tokenizer puts before every text (``b""`` or a blank); the covered bytes begin with it.
        token_bytes: Bytes of each token id that stands for text.
        order: ``(N,)`` those ids, sorted by their bytes.
        length: ``(N,)`` number of bytes of each.
        byte_at: ``(N, longest)`` their bytes, 0 behind the end.
        special: Ids that stand for no text (control, unknown and added tokens), ascending.
        has_certain_cuts: Whether every encoding has a boundary before a blank that follows something else.

    Raises:
        ValueError: The tokenizer is of no supported kind, is not deterministic, or does not keep the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"a {type(tokenizer).__name__} is no fast tokenizer of transformers; load it with AutoTokenizer"
            )
        spec = json.loads(backend.to_str())
        model, steps = spec["model"], flat_steps(spec["pre_tokenizer"], "pretokenizers")
        check_kind(model)
        self._tokenizer, self._backend = tokenizer, backend
        self._by_bytes = any(step["type"] == "ByteLevel" for step in steps)
        self._fallback = bool(model.get("byte_fallback")) and not self._by_bytes
        self._splits = any(step["type"] not in ("Metaspace", "ByteLevel") or step.get("use_regex") for step in steps)
        self._looks_ahead = self._splits and self._by_bytes
        patterns = [json.dumps(step) for step in steps if step["type"] != "ByteLevel" or step.get("use_regex")]
        self._restarts = len(patterns) == 1 and not ANCHORS.search(
            json.loads(patterns[0]).get("pattern", {}).get("Regex", "")
        )
        self._inner = bare_tokenizer(spec)
        self._model = self._merging = self._inner.model
        if model.get("ignore_merges"):
            self._merging = bare_tokenizer(spec | {"model": model | {"ignore_merges": False}}).model
        spelled = not self._by_bytes and any("▁" in piece for piece in backend.get_vocab(with_added_tokens=False))
        self.blank = "▁".encode() if spelled else b" "
        self._read_pieces(unknown_id(model))
        self.dummy = self.blank if has_dummy_prefix(spec["normalizer"], steps) else b""
        # Tokens that only a look-up of the whole word finds (``ignore_merges``): longer words are merged without them.
        self._looked_up = {
            index for index, word in self.token_bytes.items()
            if self._merging is not self._model and self._bpe(word, self._merging) != (index,)
        }  # fmt: skip
        # In plain BPE an encoding is valid exactly if every two neighbours are.
        self._by_pairs = model["type"] == "BPE" and not self._splits and not self._looked_up
        self._check_lossless()
        self._find_cuts()
        self._row = lru_cache(maxsize=max(64, ROW_BYTES // max(1, len(self.order))))(self._compute_row)
        self.encodings = lru_cache(maxsize=1 << 12)(self._encodings)
        self._words_before = lru_cache(maxsize=1 << 14)(self._cut_words)
        self._context = lru_cache(maxsize=1 << 14)(self._last_word)

    def _read_pieces(self, unknown: int | None) -> None:
        added = self._tokenizer.added_tokens_decoder
        for token in added.values():
            if not token.special and (not token.content.strip() or token.content.isalnum()):
                raise ValueError(
                    f"the tokenizer has the text {token.content!r} as an added token, outside its model; a byte view of it "
                    f"would be wrong. Supported are {KINDS}"
                )
        self._added = {token.content for token in added.values()}
        special = {*added, *(i for i in [*self._tokenizer.all_special_ids, unknown] if i is not None)}
        self.token_bytes: dict[int, bytes] = {}
        self._byte_ids: dict[int, int] = {}
        for piece, index in self._backend.get_vocab(with_added_tokens=False).items():
            if index in special or not piece:
                continue
            if self._by_bytes:
                if all(character in BYTES for character in piece):  # others come out of no text
                    self.token_bytes[index] = bytes(BYTES[character] for character in piece)
            elif self._fallback and (match := BYTE_PIECE.fullmatch(piece)):
                self._byte_ids[int(match[1], 16)] = index
                self.token_bytes[index] = bytes([int(match[1], 16)])
            else:
                self.token_bytes[index] = piece.encode()
        if self.blank != b" ":  # blanks are replaced before the model sees them
            self.token_bytes = {index: word for index, word in self.token_bytes.items() if b" " not in word}
        self.special = sorted(special)
        ids = sorted(self.token_bytes, key=lambda index: (self.token_bytes[index], index))
        words = [self.token_bytes[index] for index in ids]
        self.order = np.array(ids, dtype=np.int64)
        self.length = np.array([len(word) for word in words], dtype=np.int64)
        self.byte_at = np.zeros((len(ids), int(self.length.max(initial=1))), dtype=np.uint8)
        for row, word in zip(self.byte_at, words, strict=True):
            row[: len(word)] = np.frombuffer(word, dtype=np.uint8)
        self._texts = [self._batchable(index, word) for index, word in zip(ids, words, strict=True)]

    def _batchable(self, index: int, word: bytes) -> str | None:
        """The token's text if nothing that comes behind it can change how it is encoded."""
        found = whole_characters(word)
        if found is None or found[1] or (word[0] > 0x7F and self._byte_ids.get(word[0]) == index):
            return None
        text = found[0]
        return None if self._looks_ahead and (text[-1].isspace() or "'" in text[-2:]) else text

    def _find_cuts(self) -> None:
        blank = self.blank.decode()
        inside = re.compile(rf"[^\s{blank}]{blank}")
        self._opens = {index: word.startswith(self.blank) for index, word in self.token_bytes.items()}
        self._closes: dict[int, bool] = {}
        certain = True
        for index, word in self.token_bytes.items():
            text = word.decode(errors="replace")
            self._closes[index] = not text.endswith((blank, "\ufffd")) and not text[-1].isspace()
            certain = certain and not inside.search(text)
        if certain and self._looks_ahead:
            for before in ("a", "1", "!", "'", "é"):
                for behind in FOLLOW:
                    ends = accumulate(len(word) for word in self._words(f"x{before} {behind}"))
                    certain = certain and len(f"x{before}".encode()) in ends
        self.has_certain_cuts = certain and (self._looks_ahead or not self._splits)

    def _words(self, text: str) -> list[bytes]:
        """The pre-tokenizer's words of a text."""
        if not text:
            return []
        pieces = self._inner.pre_tokenizer.pre_tokenize_str(text)
        return [bytes(BYTES[character] for character in piece) for piece, _ in pieces]

    def _check_lossless(self) -> None:
        known = PROBE
        if not self._by_bytes and not self._fallback:  # a small alphabet: only what it can write
            known = "".join(c for c in PROBE if self._encode(self._canonical(c)))
        if known:
            mine = self._encode(self.covered(known).decode())
            theirs = self._tokenizer(known, add_special_tokens=False)["input_ids"]
            if mine != tuple(theirs):
                raise ValueError(
                    f"the tokenizer encodes {known!r} as {theirs}, its model without normalizer and post-processor as {mine}: "
                    f"it is of none of the supported kinds, which are {KINDS}"
                )

    def _canonical(self, text: str) -> str:
        """The text as the model inside the tokenizer is given it."""
        backend = self._backend
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        if self._by_bytes:
            return (" " if self.dummy and not normal.startswith(" ") else "") + normal
        if backend.pre_tokenizer is not None and normal:
            return "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
        return normal

    def covered(self, text: str | bytes) -> bytes:
        """The bytes that encodings of ``text`` cover: with the dummy prefix, blanks as the vocabulary writes them.

        Args:
            text: A text, or its UTF-8 bytes, which may end inside a character.

        Raises:
            ValueError: The bytes are no UTF-8, the text holds a special token, or the tokenizer changes or loses some of it.
        """
        found = whole_characters(text.encode() if isinstance(text, str) else text)
        if found is None:
            raise ValueError(
                f"the prompt is not UTF-8: {text!r}; give a str, or bytes that end at most inside a character"
            )
        whole, part = found
        for name in self._added:
            if name and name in whole:
                raise ValueError(
                    f"the prompt holds the special token {name!r} at character {whole.index(name)}; bytes cannot say it. Leave "
                    "it out, or hand over the tokens before the text as context=[...ids]"
                )
        dummy, blank = self.dummy.decode(), self.blank.decode()
        if not whole:
            return self.dummy + part
        canonical = self._canonical(whole)
        kept = canonical.removeprefix(dummy) if dummy else canonical
        if blank != " " and blank in whole:
            at = whole.index(blank)
            raise ValueError(
                f"the prompt holds {blank!r} at character {at}, which this tokenizer cannot tell from a blank"
            )
        kept = kept.replace(blank, " ")
        if kept != whole:
            at = next(
                (i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), min(len(kept), len(whole))
            )
            raise ValueError(
                f"the tokenizer does not keep the text: at character {at}, {whole[at : at + 8]!r} becomes "
                f"{kept[at : at + 8]!r}. Supported are {KINDS}"
            )
        return canonical.encode() + part

    def split(self, data: bytes) -> int:
        """Where to cut a text so that its head has one encoding: before the last blank behind a non-blank, else 0."""
        if not self.has_certain_cuts:
            return 0
        found = whole_characters(data)
        text = found[0] if found else ""
        blank = self.blank.decode()
        last = 0
        for match in re.finditer(rf"(?<=[^\s{blank}]){blank}", text):
            last = match.start()
        return len(text[:last].encode())

    # Encodings ----------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> tuple[int, ...] | None:
        """The model's encoding; None if it cannot write all of the text."""
        ids = tuple(self._inner.encode(text, add_special_tokens=False).ids)
        return ids if all(i in self.token_bytes for i in ids) and self.bytes_of(ids) == text.encode() else None

    def _bpe(self, word: bytes, model: Any) -> tuple[int, ...]:
        if self._by_bytes:
            return tuple(token.id for token in model.tokenize("".join(CHARACTERS[byte] for byte in word)))
        return tuple(token.id for token in model.tokenize(word.decode()))

    def _encodings(self, data: bytes) -> tuple[tuple[int, ...], ...]:
        """All live encodings of ``data``, the tokenizer's own first; ``data`` starts at a text's start or a certain cut.

        None are found where no text begins so or the vocabulary cannot write it.
        """
        found = whole_characters(data)
        if found is None:
            return ()
        text, part = found
        if not self._by_bytes:
            ids = self._encode(text)
            if ids is None or any(byte not in self._byte_ids for byte in part):
                return ()
            return ((*ids, *(self._byte_ids[byte] for byte in part)),)
        if not self._looks_ahead:
            return (self._bpe(data, self._model),) if data else ((),)
        return tuple(dict.fromkeys(self._split_encodings(text, part)))

    def _split_encodings(self, text: str, part: bytes) -> Iterator[tuple[int, ...]]:
        for behind in completions(part) if part else FOLLOW:
            words, joined = self._words_before(text, behind)
            if part:
                words = (*words[:-1], words[-1] + part) if joined else (*words, part)
            ids = [token for word in words[:-1] for token in self._bpe(word, self._model)]
            for model in (self._model, self._merging) if self._looked_up else (self._model,):
                yield (*ids, *(token for word in words[-1:] for token in self._bpe(word, model)))

    def _cut_words(self, text: str, behind: str) -> tuple[tuple[bytes, ...], bool]:
        """The pre-tokenizer's words of ``text + behind`` as far as ``text`` goes, and whether the last one goes beyond."""
        words, room = [], len(text.encode())
        for word in self._words(text + behind):
            if not room:
                break
            words.append(word[:room])
            if len(word) > room:
                return tuple(words), True
            room -= len(word)
        return tuple(words), False

    def _is_live(self, ids: tuple[int, ...], data: bytes) -> bool:
        found = whole_characters(data)
        if self._looks_ahead and found is not None:
            return ids in self._split_encodings(*found)  # often the first
        return ids in self._encodings(data)

    def bytes_of(self, ids: tuple[int, ...]) -> bytes:
        """The bytes of text tokens."""
        return b"".join(self.token_bytes[index] for index in ids)

    def context(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The end of ``ids`` that decides which tokens may follow.

        In plain BPE that is the last token (with what it needs to be whole characters), else all from a certain cut, or the
        last word of a pre-tokenizer whatever comes behind it.
        """
        for start in range(len(ids) - 1, -1, -1):
            if self._by_pairs:
                if self.token_bytes[ids[start]][0] & 0xC0 != 0x80:
                    return ids[start:]
            elif start and self.has_certain_cuts and self._opens[ids[start]] and self._closes[ids[start - 1]]:
                ids = ids[start:]
                break
        return self._context(ids) if self._restarts and self._looks_ahead else ids

    def _last_word(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        found = whole_characters(self.bytes_of(ids))
        if found is None or found[1]:
            return ids
        ends = [set(accumulate(map(len, self._words_before(found[0], behind)[0]))) for behind in FOLLOW[1:]]
        size = len(found[0].encode())
        for behind, cuts in zip(FOLLOW[1:], ends, strict=True):
            if self._words_before(found[0], behind)[1]:
                cuts.discard(size)
        sure = {0}.union(set.intersection(*ends))
        at = size
        for start in range(len(ids), -1, -1):
            if at in sure:
                return ids[start:]
            at -= len(self.token_bytes[ids[start - 1]]) if start else 0
        return ids

    def follows(self, ids: tuple[int, ...], low: int = 0, high: int | None = None) -> np.ndarray:
        """Whether the tokens ``order[low:high]`` may come after a live encoding.

        Args:
            ids: The encoding's text tokens, without control tokens before them.
            low: First place in ``order``.
            high: One past the last; None: all.

        Returns:
            ``(high - low,)`` bool.
        """
        context, size = self.context(ids), len(self.order)
        high = size if high is None else high
        return (self._row if high - low == size else self._compute_row)(context, low, high)

    def _compute_row(self, context: tuple[int, ...], low: int, high: int) -> np.ndarray:
        before = self.bytes_of(context)
        found = whole_characters(before)
        allowed = np.zeros(high - low, dtype=bool)
        if found is None:
            return allowed
        text, part = found
        one_by_one = [place for place in range(low, high) if part or self._texts[place] is None]
        if part:  # only what goes on inside the character
            one_by_one = [place for place in one_by_one if 0x80 <= self.byte_at[place, 0] < 0xC0]
        else:
            places = [place for place in range(low, high) if self._texts[place] is not None]
            batch = self._inner.encode_batch_fast([f"{text}{self._texts[p]}" for p in places], add_special_tokens=False)
            expected = list(context)
            for place, encoding in zip(places, batch, strict=True):
                ids, index = encoding.ids, int(self.order[place])
                allowed[place - low] = ids[-1] == index and ids[:-1] == expected
                if ids[-1] in self._looked_up and not allowed[place - low]:
                    one_by_one.append(place)
        for place in one_by_one:
            index = int(self.order[place])
            allowed[place - low] = self._is_live((*context, index), before + self.token_bytes[index])
        return allowed
