"""Unconditional token forcing: find texts that a language model was made to memorise, by forcing every token once.

Hościłowicz et al., "Hiding Text in Large Language Models: Introducing Unconditional Token Forcing Confusion", 2024,
arXiv 2406.02481. For every token v of the vocabulary, fed as an id after the token that begins a sequence, with the
greedy continuation x_1 ... x_m and its probabilities p_1 ... p_m (m = 3):

    phase 1   score(v) = (1 + p_1 + ... + p_m) / (m + 1);   v is a candidate if score(v) > 0.95
    phase 2   continue each candidate greedily for 50 tokens and look at what comes: a memorised text stands there,
              often again and again

The forced token itself counts with probability 1, so that the threshold asks for a mean of p_1 ... p_m above 0.9333.
The scan is one batched pass per block of tokens: a row whose score can no longer exceed the threshold leaves, which is
when Σ (1 - p_i) reaches (m + 1) (1 - threshold), and most rows leave after one step.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tokenry.measure.session import Session
from tokenry.text.forced_decoding import ForcedDecoder, check_context, check_model
from tokenry.text.repetition import compression_ratio, is_natural, repetition

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Candidate", "Continuation", "Continuations", "ScanReport", "UnconditionalTokenForcing"]

REPEATS = 0.5  # share of a continuation that one unit must cover to be called repeating
LONG_ROWS = 64  # candidates continued at a time


@dataclass(frozen=True)
class Candidate:
    """A token after which the model is sure of what follows.

    Attributes:
        token_id: The forced id.
        token: How the vocabulary writes it.
        score: Mean of ``probabilities``.
        probabilities: 1 for the forced token, then those of the greedy tokens, (m + 1).
        continuation: The greedy tokens, (m).
        text: The forced token and its continuation, decoded.
    """

    token_id: int
    token: str
    score: float
    probabilities: list[float]
    continuation: list[int]
    text: str


@dataclass(frozen=True)
class ScanReport:
    """What phase 1 found.

    Attributes:
        candidates: Tokens above the threshold, highest score first.
        scanned: Tokens that were forced.
        passes: Rows run through the model, counted at every step: what the scan cost.
        prefix: Ids before the forced token.
        nameless: Rows of the model's embedding that the tokenizer has no token for; not scanned by default.
        unknown: Ids of the tokenizer that the model has no row for; they cannot be scanned.
        notes: What a reader must know.
    """

    candidates: list[Candidate]
    scanned: int
    passes: int
    prefix: list[int]
    nameless: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Continuation:
    """A forced token with a long continuation.

    Attributes:
        token_id: The forced id.
        tokens: It and its greedy continuation.
        text: The same, decoded.
        repetition: Share of the tokens that one unit from the first token covers (k of them, k at least 3), else 0.
        unit: That unit, decoded.
        compression: Bytes of the text per byte that zlib makes of it.
        samples: Drawn continuations, decoded.
    """

    token_id: int
    tokens: list[int]
    text: str
    repetition: float
    unit: str
    compression: float
    samples: list[str] = field(default_factory=list)


class Continuations(NamedTuple):
    """All continuations, sorted for an inspector: repeaters from the most repetitive on, others in the order given.

    ``natural`` holds repeaters that ordinary text has too: rulers, list markup, one character again and again.
    """

    repeating: list[Continuation]
    other: list[Continuation]
    natural: list[Continuation]


class UnconditionalTokenForcing:
    """Audit a causal language model for memorised texts: fingerprints, hidden messages.

    Args:
        model: Causal language model of transformers, quantized or not. It is not changed.
        tokenizer: Its tokenizer.
        steps: Greedy tokens m after the forced one (3 in the paper).
        threshold: Score, the forced token's 1 included, that a candidate must exceed (0.95 in the paper).
        batch_size: Tokens forced at a time. Results do not depend on it beyond rounding.
        prefix: Ids before the forced token. None: the tokenizer's beginning-of-sequence token, or nothing where it has
            none. A chat template up to the assistant's turn makes the forcing conditional; two tokens deepen it.

    Raises:
        ValueError: An encoder-decoder model, or a setting out of range.

    Example:
        >>> from tokenry.assets import load_model
        >>> audit = UnconditionalTokenForcing(*load_model("draft"), threshold=0.9)
        >>> report = audit.scan(range(512), quiet=True)
        >>> report.scanned, all(c.score > 0.9 for c in report.candidates)
        (512, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        steps: int = 3,
        threshold: float = 0.95,
        batch_size: int = 512,
        *,
        prefix: Sequence[int] | None = None,
    ) -> None:
        check_model(model)
        if steps < 1:
            raise ValueError(f"steps must be at least 1 (3 in the paper), got {steps}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1) (0.95 in the paper), got {threshold}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.steps, self.threshold, self.batch_size = steps, threshold, batch_size
        self.notes: list[str] = []
        if prefix is None:
            begin = self.tokenizer.bos_token_id
            prefix = [] if begin is None else [begin]
            if begin is None:
                self.notes.append("the tokenizer has no token that begins a sequence: each token was forced alone")
        embedding: Any = model.get_input_embeddings()
        self.rows = embedding.weight.shape[0]
        self.prefix = self._checked(prefix, "prefix")
        check_context(model, len(self.prefix) + 1 + steps, "a forced token with its continuation")

    def _checked(self, ids: Sequence[int], name: str) -> list[int]:
        found = [int(i) for i in ids]
        wrong = [i for i in found if not 0 <= i < self.rows]
        if wrong:
            raise ValueError(f"{name} holds id {wrong[0]}, but the model's embedding has rows 0 to {self.rows - 1}")
        return found

    def scan(
        self, token_ids: Sequence[int] | None = None, *, out: Path | str | None = None, quiet: bool = False
    ) -> ScanReport:
        """Phase 1: force tokens and keep those after which the model is sure.

        Args:
            token_ids: Ids to force. None: every token of the tokenizer, special ones included.
            out: Folder in which each finished block's candidates are written at once. The same call with the same
                model, settings and folder goes on where a killed one stopped.
            quiet: No progress bar.

        Raises:
            ValueError: No ids, an id that the model has no row for, or logits with NaN.
        """
        known = set(self.tokenizer.get_vocab().values())
        ids = self._checked(sorted(i for i in known if i < self.rows) if token_ids is None else token_ids, "token_ids")
        if not ids:
            raise ValueError("token_ids is empty: give the ids to force, or None for the whole vocabulary")
        decoder = ForcedDecoder(self.model, self.prefix)
        settings = {"steps": self.steps, "threshold": self.threshold, "batch_size": self.batch_size}
        settings |= {"prefix": self.prefix, "ids": zlib.crc32(torch.tensor(ids).numpy().tobytes()), "tokens": len(ids)}
        if out is not None:
            settings["weights"] = _checksum(self.model)
        blocks = [ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size)]
        found: list[Candidate] = []
        passes = 0
        with Session(out, settings, total=len(blocks), quiet=quiet) as session:
            for place, block in enumerate(blocks):
                name = f"tokens {place * self.batch_size} to {place * self.batch_size + len(block) - 1}"
                result = session.step(name, lambda block=block: self._force(decoder, block))
                found += [Candidate(**entry) for entry in result["candidates"]]
                passes += result["passes"]
        return ScanReport(
            candidates=sorted(found, key=lambda c: (-c.score, c.token_id)),
            scanned=len(ids),
            passes=passes,
            prefix=self.prefix,
            nameless=sorted(set(range(self.rows)) - known),
            unknown=sorted(i for i in known if i >= self.rows),
            notes=self.notes,
        )

    def _force(self, decoder: ForcedDecoder, block: list[int]) -> dict[str, Any]:
        slack = (self.steps + 1) * (1 - self.threshold) + 1e-6  # rounding must not cost a candidate
        rolled = decoder.roll_out(torch.tensor(block)[:, None], self.steps, slack=slack)
        found = []
        for row, continuation, p in zip(*(x.tolist() for x in rolled[:3]), strict=True):
            score = (1 + sum(p)) / (self.steps + 1)
            if score > self.threshold:
                token = str(self.tokenizer.convert_ids_to_tokens(block[row]))
                text = self.tokenizer.decode([block[row], *continuation])
                found.append(asdict(Candidate(block[row], token, score, [1.0, *p], continuation, text)))
        return {"candidates": found, "passes": rolled.passes}

    def extend(
        self,
        candidates: Sequence[Candidate | int],
        max_new_tokens: int = 50,
        *,
        samples: int = 0,
        top_k: int = 50,
        seed: int = 0,
    ) -> Continuations:
        """Phase 2: continue candidates greedily and say which repeat themselves.

        Args:
            candidates: Candidates of a scan, or token ids.
            max_new_tokens: Length of each continuation (50, then 200 in the paper).
            samples: Also draw so many continuations of each (10 in the paper's attack).
            top_k: Tokens that a draw chooses among.
            seed: Seed of the draws.

        Raises:
            ValueError: A length or number out of range, or one that the model's context cannot hold.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if samples < 0 or top_k < 1:
            raise ValueError(f"samples must not be negative and top_k at least 1, got {samples} and {top_k}")
        ids = self._checked([c if isinstance(c, int) else c.token_id for c in candidates], "candidates")
        decoder = ForcedDecoder(self.model, self.prefix)
        generator = torch.Generator(self.model.device).manual_seed(seed)
        groups = Continuations([], [], [])
        for begin in range(0, len(ids), LONG_ROWS):
            block = ids[begin : begin + LONG_ROWS]
            forced = torch.tensor(block)[:, None]  # (n, 1)
            greedy = decoder.roll_out(forced, max_new_tokens).tokens.tolist()
            drawn: list[list[str]] = [[] for _ in block]
            for _ in range(samples):
                rolled = decoder.roll_out(forced, max_new_tokens, top_k=top_k, generator=generator).tokens.tolist()
                for texts, i, row in zip(drawn, block, rolled, strict=True):
                    texts.append(self.tokenizer.decode([i, *row]))
            for i, row, texts in zip(block, greedy, drawn, strict=True):
                found = self._describe([i, *row], texts)
                repeats = found.repetition >= REPEATS
                group = groups.other if not repeats else groups.natural if is_natural(found.unit) else groups.repeating
                group.append(found)
        for group in (groups.repeating, groups.natural):
            group.sort(key=lambda c: -c.repetition)
        return groups

    def _describe(self, tokens: list[int], samples: list[str]) -> Continuation:
        text = self.tokenizer.decode(tokens)
        share, unit = repetition(tokens)
        return Continuation(
            token_id=tokens[0],
            tokens=tokens,
            text=text,
            repetition=share,
            unit=self.tokenizer.decode(list(unit)) if unit else "",
            compression=compression_ratio(text),
            samples=samples,
        )


def _checksum(model: Any) -> int:
    """A number that other weights change: of some 64 values of every tensor."""
    found = 0
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        if tensor.device.type != "meta" and len(flat):
            sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
            found = zlib.crc32(sample.tobytes(), zlib.crc32(name.encode(), found))
    return found
