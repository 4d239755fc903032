"""What can be asked for the next byte: probabilities of a text, and text drawn byte by byte."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenry.tokenization.utf8_prefixes import whole_characters

__all__ = ["BEGIN", "END", "SYMBOLS", "UNKNOWN", "ByteModel", "sample_byte"]

UNKNOWN, BEGIN, END, SYMBOLS = 256, 257, 258, 259  # behind the 256 bytes; how many symbols there are


class ByteModel(ABC):
    """What can be asked for the next byte.

    Attributes:
        blank: How a blank is written: ``b" "``, or the three bytes of "▁".
    """

    blank: bytes

    @abstractmethod
    def start(self, prompt: str | bytes = "") -> Any:
        """Read a prompt."""

    @abstractmethod
    def next_byte_logprobs(self, state: Any) -> Tensor:
        """Log-probabilities of the next symbol, ``(259,)``: 256 bytes, unknown token, beginning of text, end of text."""

    @abstractmethod
    def walk(self, state: Any, data: bytes) -> Iterator[Any]:
        """The states after each byte of ``data``."""

    def advance(self, state: Any, data: int | bytes) -> Any:
        """The state after one byte, or after several.

        Args:
            state: From ``start`` or ``advance``.
            data: A byte, or bytes with blanks written as ``blank``.

        Raises:
            ValueError: No text goes on so.
        """
        for after in self.walk(state, bytes([data]) if isinstance(data, int) else data):
            state = after
        return state

    def byte_logprobs(self, text: str | bytes, prompt: str = "") -> Tensor:
        """Log-probability of each byte of ``text`` after ``prompt`` and what came before it.

        Args:
            text: A text, or its UTF-8 bytes.
            prompt: What is given.

        Returns:
            ``(n,)`` float64; n counts bytes as the vocabulary writes them.
        """
        state = self.start(prompt)
        data = self._behind(prompt, text)
        found = []
        for byte, after in zip(data, self.walk(state, data), strict=True):
            found.append(self.next_byte_logprobs(state)[byte])
            state = after
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)

    @abstractmethod
    def _behind(self, prompt: str, text: str | bytes) -> bytes:
        """The bytes that ``text`` adds to ``prompt``."""

    @abstractmethod
    def _begun(self, state: Any) -> bytes:
        """The bytes of a character that is not complete yet."""

    def logprob(self, text: str | bytes, prompt: str = "") -> float:
        """Log-probability of ``text`` after ``prompt``."""
        return self.byte_logprobs(text, prompt).sum().item()

    def generate(
        self,
        prompt: str | bytes | Any = "",
        max_new_bytes: int = 128,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """Write on, byte by byte, until the text ends or ``max_new_bytes`` are written.

        Args:
            prompt: A text, bytes that may end inside a character, or a state.
            max_new_bytes: At most so many; a character that is not complete by then is held back.
            temperature: Probabilities to the power of its inverse (paper: plus 1e-7); below 0.1 the likeliest byte.
            top_p: Draw from the likeliest bytes whose predecessors hold at most this share.
            generator: Source of chance; None: torch's own.

        Returns:
            Pieces of text as they are known, never a part of a character; one that the prompt began is written whole.
        """
        if max_new_bytes < 0:
            raise ValueError(f"max_new_bytes must not be negative, got {max_new_bytes}")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
        state = self.start(prompt) if isinstance(prompt, str | bytes) else prompt
        return self._pieces(state, max_new_bytes, temperature, top_p, generator)

    def _pieces(
        self, state: Any, count: int, temperature: float, top_p: float, generator: torch.Generator | None
    ) -> Iterator[str]:
        pending = self._begun(state)
        for left in range(count, 0, -1):
            byte = sample_byte(self.next_byte_logprobs(state), temperature, top_p, generator)
            if byte >= UNKNOWN:
                return
            pending += bytes([byte])
            found = whole_characters(pending)
            if found is not None and found[0]:
                yield found[0].replace(self.blank.decode(), " ")
                pending = found[1]
            if left > 1:
                state = self.advance(state, byte)


def sample_byte(
    logprobs: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """Draw a symbol from ``(259,)`` log-probabilities; unknown and beginning of text are never drawn.

    Example:
        >>> logprobs = torch.full((259,), -torch.inf)
        >>> logprobs[[97, 98]] = torch.tensor([0.9, 0.1]).log()
        >>> sample_byte(logprobs, temperature=0.0), sample_byte(logprobs, top_p=0.5)
        (97, 97)
    """
    p = logprobs.exp()
    p[[UNKNOWN, BEGIN]] = 0
    if temperature < 0.1:
        return int(p.argmax())
    p = torch.where(p > 0, (p + 1e-7) ** (1 / temperature), 0.0)  # what is impossible stays so
    p, order = (p / p.sum()).sort(descending=True)
    p = torch.where(p.cumsum(0) - p <= top_p, p, 0.0)
    return int(order[torch.multinomial(p, 1, generator=generator)])
