"""Exact next-byte probabilities of a language model over tokens, without training it.

Phan, Amos, Gat, Havasi, Muckley, Ullrich, "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks
and Model Ensembles", ICLR 2025, arXiv:2410.09303.

    cover(x)     encodings t_1..t_k of texts that begin with the bytes x, of which only t_k reaches the end of x or beyond
    P(x)         = sum_{t in cover(x)} P(t)
    U(b)         = sum_{t in cover(x) that stick out, next byte b} P(t)
                 + sum_{t in cover(x) that end at x} P(t) sum_{v begins with b, t v is live} P(v | t)
    P(b | x)     = U(b) / sum_b' U(b')                    b: 256 bytes and the control tokens

A model's next token after a prompt is biased where the prompt ends inside a word: its last token says that nothing
longer came. The sum over covers takes that back. A cover is an encoding that ended at an earlier byte (a *front*) and
one more token. With the vocabulary sorted by bytes, the tokens that go on as x did are one range, so all covers of a
front are a vector and a range (N tokens that stand for text):

    front   tokens t,  log P(t) + log P(. | t) of shape (N,),  depth: bytes of x behind t,  low, high
    byte b  low, high narrow to the tokens whose byte at depth is b; those that end there are new fronts: one pass

Which tokens may follow an encoding is up to ``tokenry.tokenization.cover_encodings``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from tokenry.tokenization.byte_model import BEGIN, END, SYMBOLS, UNKNOWN, ByteModel
from tokenry.tokenization.cover_encodings import ByteVocabulary
from tokenry.tokenization.prefix_passes import Ids, PrefixPasses
from tokenry.tokenization.utf8_prefixes import whole_characters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ByteEnsemble", "ByteLM", "ByteState", "Cover", "Front"]

WINDOW = 32  # bytes of known text whose fronts are run in one pass


@dataclass(frozen=True)
class Cover:
    """One cover encoding.

    Attributes:
        ids: Its text tokens.
        rest: The bytes of its last token that stick out.
        logprob: log P of its tokens after the context.
    """

    ids: Ids
    rest: bytes
    logprob: float


@dataclass(frozen=True, eq=False)
class Front:
    """An encoding that ended ``depth`` bytes ago, and the tokens that go on as the text did.

    Attributes:
        ids: Its text tokens.
        logprob: log P of them.
        joint: ``(N,)`` ``logprob`` + log P of each text token next, in sorted order; -inf where it may not follow.
        special: ``(S,)`` the same for control tokens.
        depth: Bytes of the text behind it.
        low: First place of the tokens that go on as the text did.
        high: One past the last.
        checked: Whether it has been asked which tokens of the range may follow.
    """

    ids: Ids
    logprob: float
    joint: np.ndarray
    special: np.ndarray
    depth: int
    low: int
    high: int
    checked: bool = False


@dataclass(eq=False)
class ByteState:
    """A text that was read. ``advance`` makes another one and leaves this one valid.

    Attributes:
        data: Its bytes as the vocabulary writes them, with the dummy prefix.
        fronts: What its covers begin with; those of depth 0 end where the text ends.
        passes: The model's passes, shared by all states from one ``start``.
    """

    data: bytes
    fronts: tuple[Front, ...]
    passes: PrefixPasses = field(repr=False)


class ByteLM(ByteModel):
    """A causal language model over tokens, asked byte by byte.

    Args:
        model: Any causal language model of transformers whose layers attend to the whole context, in evaluation mode.
        tokenizer: Its fast tokenizer (kinds: ``tokenry.tokenization.cover_encodings``).
        mask: ``"exact"``: no probability for tokens that cannot follow, asked of the tokenizer. ``"fast"``: of the next
            token's whole distribution everything counts; faster for large vocabularies, and nearly the same.

    Raises:
        ValueError: Model and tokenizer do not fit, or one of them is of a kind that has no byte view.

    Example:
        >>> from tokenry.assets import load_model
        >>> lm = ByteLM(*load_model("draft"))
        >>> state = lm.start("import nump")
        >>> best = lm.next_byte_logprobs(state).argmax()
        >>> bool(lm.next_byte_logprobs(lm.advance(state, int(best))).exp().sum() > 0.99)
        True
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, mask: Literal["exact", "fast"] = "exact"
    ) -> None:
        if mask not in ("exact", "fast"):
            raise ValueError(f'mask must be "exact" or "fast", got {mask!r}')
        if model.training:
            raise ValueError("the model is in training mode, so dropout may be on; call model.eval() first")
        self.model, self.tokenizer, self.mask = model, tokenizer, mask
        self.vocabulary = ByteVocabulary(tokenizer)
        self.blank = self.vocabulary.blank
        head = model.get_output_embeddings()
        size = head.weight.shape[0] if head is not None else model.config.get_text_config(decoder=True).vocab_size
        largest = int(self.vocabulary.order.max(initial=0))
        if largest >= size:
            raise ValueError(
                f"the tokenizer has a token number {largest}, the model's output only {size}: they do not belong together"
            )
        self._special = np.array([index for index in self.vocabulary.special if index < size], dtype=np.int64)
        # Where each symbol stands in ``special``; one token that is several of them ends the text.
        self._symbols: dict[int, int] = {}
        places = {int(index): place for place, index in enumerate(self._special)}
        wanted = {END: tokenizer.eos_token_id, BEGIN: tokenizer.bos_token_id, UNKNOWN: tokenizer.unk_token_id}
        for symbol, index in wanted.items():
            if index in places:
                self._symbols[symbol] = places.pop(index)
        self._context = self._default_context()
        PrefixPasses(model, (0,))  # refuses models whose cache cannot be cut back

    def _default_context(self) -> Ids:
        """The control tokens that the tokenizer puts first, else the beginning-of-text token, else the end-of-text one."""
        tokenizer, first = self.tokenizer, []
        for index in tokenizer("a")["input_ids"]:
            if index in self.vocabulary.token_bytes:
                break
            first.append(index)
        own = [index for index in first if index != tokenizer.unk_token_id]
        likely = [index for index in (tokenizer.bos_token_id, tokenizer.eos_token_id) if index is not None]
        return tuple(own or likely[:1])

    def start(self, prompt: str | bytes = "", context: Sequence[int] | None = None) -> ByteState:
        """Read a prompt.

        Args:
            prompt: A text, or bytes, which may end inside a character.
            context: Token ids before the text, for example a chat's or a fill-in-the-middle prompt's. None: what the
                tokenizer puts before every text, else its beginning-of-text token.

        Raises:
            ValueError: The tokenizer does not keep the text, the text holds a special token, or there is no context.
        """
        return self._start(self.vocabulary.covered(prompt), context)

    def _start(self, data: bytes, context: Sequence[int] | None = None) -> ByteState:
        before = self._context if context is None else tuple(context)
        if not before:
            raise ValueError("the tokenizer has no token for the beginning or end of text; give context=[...token ids]")
        whole = data.decode(errors="ignore").encode()
        if not self.vocabulary.encodings(whole):
            lost = next((c for c in whole.decode() if not self.vocabulary.encodings(c.encode())), whole.decode())
            raise ValueError(f"the tokenizer's vocabulary cannot write {lost!r}; take it out of the prompt")
        cut = self.vocabulary.split(data)
        head = self.vocabulary.encodings(data[:cut])[0]
        passes = PrefixPasses(self.model, before)
        state = ByteState(data[:cut], (self._front(head, 0.0, passes.after([head])[head]),), passes)
        return self.advance(state, data[cut:])

    def _front(self, ids: Ids, logprob: float, after: Tensor) -> Front:
        row = after.numpy() + logprob
        order = self.vocabulary.order
        return Front(ids, logprob, row[order], row[self._special], 0, 0, len(order))

    def walk(self, state: ByteState, data: bytes) -> Iterator[ByteState]:
        """The states after each byte of ``data``; 32 bytes share a pass of the model.

        Raises:
            ValueError: No text goes on so.
        """
        for begin in range(0, len(data), WINDOW):
            window = data[begin : begin + WINDOW]
            known = self._ahead(state, window) if len(window) > 1 and state.fronts else {}
            for byte in window:
                state = self._step(state, byte, known)
                yield state

    def _ahead(self, state: ByteState, window: bytes) -> dict[Ids, Tensor]:
        """What the model says after all encodings that will end within the window."""
        cut = self.vocabulary.split(state.data)
        tail, size, head = state.data[cut:], 0, 0
        ids = state.fronts[0].ids
        while size < cut:  # all covers have these tokens
            size += len(self.vocabulary.token_bytes[ids[head]])
            head += 1
        wanted = {
            (*ids[:head], *encoding): None
            for end in range(1, len(window) + 1)
            for encoding in self.vocabulary.encodings(tail + window[:end])
        }
        return state.passes.after(list(wanted)) if wanted else {}

    def _step(self, state: ByteState, byte: int, known: dict[Ids, Tensor]) -> ByteState:
        words, kept, ended = self.vocabulary, [], {}
        for front in state.fronts:
            column = words.byte_at[front.low : front.high, front.depth]
            low = front.low + int(np.searchsorted(column, byte))
            high = front.low + int(np.searchsorted(column, byte, "right"))
            while low < high and words.length[low] == front.depth + 1:
                allowed = front.checked or words.follows(front.ids, low, low + 1)[0]
                if allowed and front.joint[low] > -math.inf:
                    ended[*front.ids, int(words.order[low])] = float(front.joint[low])
                low += 1
            if low < high:
                kept.append(replace(front, depth=front.depth + 1, low=low, high=high))
        if not kept and not ended:
            raise ValueError(
                f"no text goes on with byte {byte:#04x} after {state.data[-20:]!r}: next_byte_logprobs tells which bytes can"
            )
        unread = [ids for ids in ended if ids not in known]
        rows = known | (state.passes.after(unread) if unread else {})
        fronts = [self._front(ids, logprob, rows[ids]) for ids, logprob in ended.items()]
        return ByteState(state.data + bytes([byte]), (*kept, *fronts), state.passes)

    def _checked(self, state: ByteState) -> tuple[Front, ...]:
        """The fronts without tokens that may not follow."""
        if self.mask == "exact" and not all(front.checked for front in state.fronts):
            fronts = []
            for front in state.fronts:
                if not front.checked:
                    low, high = front.low, front.high
                    joint = front.joint.copy()
                    joint[low:high][~self.vocabulary.follows(front.ids, low, high)] = -math.inf
                    front = replace(front, joint=joint, checked=True)
                if front.depth == 0 or (front.joint[front.low : front.high] > -math.inf).any():
                    fronts.append(front)
            state.fronts = tuple(fronts)
        return state.fronts

    def next_byte_logprobs(self, state: ByteState) -> Tensor:
        """Log-probability of the next symbol.

        Returns:
            ``(259,)`` float64: 256 bytes, unknown token, beginning of text, end of text. They are normalised together with
            the other control tokens, whose share is missing from the sum.
        """
        fronts = self._checked(state)
        inside = self._begun(state)  # no control token stands inside a character
        ends = [front.special for front in fronts if front.depth == 0 and not inside]
        control = np.logaddexp.reduce(np.stack(ends)) if ends else np.full(len(self._special), -math.inf)
        parts = [front.joint[front.low : front.high] for front in fronts]
        top = max([control.max(initial=-math.inf), *(part.max(initial=-math.inf) for part in parts)])
        if top == -math.inf:
            raise ValueError(f"the model gives no continuation of {state.data[-20:]!r} a probability")
        mass = np.zeros(SYMBOLS)
        for front, part in zip(fronts, parts, strict=True):
            following = self.vocabulary.byte_at[front.low : front.high, front.depth]
            mass += np.bincount(following, weights=np.exp(part - top), minlength=SYMBOLS)
        others = np.exp(control - top)
        total = mass.sum() + others.sum()
        for symbol, place in self._symbols.items():
            mass[symbol] = others[place]
        return torch.from_numpy(mass / total).log()

    def covers(self, state: ByteState) -> list[Cover]:
        """All cover encodings of the text, likeliest first."""
        words, found = self.vocabulary, []
        for front in state.fronts:
            if front.depth == 0:
                found.append(Cover(front.ids, b"", front.logprob))
                continue
            allowed = front.joint[front.low : front.high] > -math.inf
            if not front.checked:
                allowed &= words.follows(front.ids, front.low, front.high)
            for place in (front.low + np.flatnonzero(allowed)).tolist():
                index = int(words.order[place])
                rest = words.token_bytes[index][front.depth :]
                found.append(Cover((*front.ids, index), rest, float(front.joint[place])))
        return sorted(found, key=lambda cover: -cover.logprob)

    def logprob(self, text: str | bytes, prompt: str = "") -> float:
        """Log-probability of ``text`` after ``prompt``: the sum over covers, in a few passes however long the text.

        ``byte_logprobs`` adds up to the same as far as the model gives nothing to encodings that the tokenizer never makes:
        those are left out of every next byte's probabilities, which are made to add up to one again.
        """
        data = self.vocabulary.covered(prompt)
        whole = data + self._behind(prompt, text)
        return self._total(whole) - (self._total(data) if data else 0.0)

    def _total(self, data: bytes) -> float:
        state = self._start(data)
        covers = np.array([cover.logprob for cover in self.covers(state)])
        head = self.vocabulary.encodings(data[: self.vocabulary.split(data)])[0]
        return float(np.logaddexp.reduce(covers)) + state.passes.logprob(head)

    def _behind(self, prompt: str, text: str | bytes) -> bytes:
        before = self.vocabulary.covered(prompt)
        whole = self.vocabulary.covered(prompt + text if isinstance(text, str) else prompt.encode() + text)
        if not whole.startswith(before):
            raise ValueError(f"the tokenizer writes {prompt!r} differently when {text!r} follows; move the cut")
        return whole[len(before) :]

    def _begun(self, state: ByteState) -> bytes:
        found = whole_characters(state.data)
        return found[1] if found is not None else b""


class ByteEnsemble(ByteModel):
    """The mean of several models' next-byte probabilities; their vocabularies may differ.

    Args:
        models: ``ByteLM``s that write blanks alike.
        weights: One positive weight each. None: equal.

    Example:
        >>> from tokenry.assets import load_model
        >>> both = ByteEnsemble([ByteLM(*load_model("draft")), ByteLM(*load_model("small"))], weights=[1, 3])
        >>> "".join(both.generate("    def __in", 8, temperature=0.0))
        'it__(sel'
    """

    def __init__(self, models: Sequence[ByteLM], weights: Sequence[float] | None = None) -> None:
        if not models:
            raise ValueError("an ensemble needs at least one model")
        blanks = sorted({model.blank.decode() for model in models})
        if len(blanks) > 1:
            raise ValueError(f"the models write blanks differently ({blanks}), so their bytes cannot be averaged")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or min(weights) <= 0:
            raise ValueError(f"need one positive weight for each of {len(models)} models, got {weights}")
        self.models, self.blank = list(models), models[0].blank
        self.weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def start(self, prompt: str | bytes = "") -> tuple[ByteState, ...]:
        """Read a prompt with every model."""
        return tuple(model.start(prompt) for model in self.models)

    def next_byte_logprobs(self, state: tuple[ByteState, ...]) -> Tensor:
        """Log of the weighted mean of the members' probabilities, each made to add up to one over the 259 symbols."""
        each = torch.stack([m.next_byte_logprobs(s) for m, s in zip(self.models, state, strict=True)])  # (M, 259)
        return (each.log_softmax(-1) + self.weights.log()[:, None]).logsumexp(0)

    def walk(self, state: tuple[ByteState, ...], data: bytes) -> Iterator[tuple[ByteState, ...]]:
        """The states after each byte of ``data``."""
        return zip(*(m.walk(s, data) for m, s in zip(self.models, state, strict=True)), strict=True)

    def _behind(self, prompt: str, text: str | bytes) -> bytes:
        return self.models[0]._behind(prompt, text)

    def _begun(self, state: tuple[ByteState, ...]) -> bytes:
        return self.models[0]._begun(state[0])
