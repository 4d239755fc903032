"""Human texts and a model's continuations of their openings: the pairs that a detector is measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenry.assets import read_text_file
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["continue_texts", "cut_passages", "read_labelled", "read_texts"]

LABELS = {"human": 0, "machine": 1, "0": 0, "1": 1}


def _rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text_file(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number}, must be an object with a string under "text"')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no text")
    return rows


def read_texts(path: Path | str) -> list[str]:
    """Texts of a folder (every ``*.txt``) or of a JSONL file (field ``text``).

    Raises:
        ValueError: It is neither, or holds no text.
    """
    path = Path(path)
    if path.is_dir():
        found = [read_text_file(file) for file in sorted(path.glob("*.txt"))]
        if not found:
            raise ValueError(f"{path} holds no .txt file")
        return found
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder of .txt files or a JSONL file")
    return [row["text"] for row in _rows(path)]


def read_labelled(path: Path | str) -> tuple[list[str], list[int]]:
    """Texts and labels (0 human, 1 machine) of a folder with ``human/`` and ``machine/``, or of a JSONL file.

    A line of the JSONL is ``{"text": ..., "label": ...}``, the label ``human``, ``machine``, 0 or 1.

    Raises:
        ValueError: It is neither, a label is unknown, or one of the two classes is missing.
    """
    path = Path(path)
    if path.is_dir():
        texts: list[str] = []
        labels: list[int] = []
        for name in ("human", "machine"):
            if not (path / name).is_dir():
                raise ValueError(f"{path} has no folder {name}/: it needs human/ and machine/ with .txt files")
            found = read_texts(path / name)
            texts += found
            labels += [LABELS[name]] * len(found)
        return texts, labels
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give a folder with human/ and machine/, or a JSONL with text and label"
        )
    rows = _rows(path)
    for row in rows:
        if str(row.get("label")) not in LABELS:
            raise ValueError(f"{path}: label must be human, machine, 0 or 1, got {row.get('label')!r}")
    labels = [LABELS[str(row["label"])] for row in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"{path} holds only {'machine' if labels[0] else 'human'} texts; both kinds are needed")
    return [row["text"] for row in rows], labels


def cut_passages(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int) -> list[str]:
    """Cut texts into consecutive passages of ``tokens`` tokens; what is left over at the end of a text is dropped.

    Example:
        >>> from tokenry.assets import held_out_texts, load_model
        >>> len(cut_passages(load_model("small")[1], held_out_texts("english")[:3], tokens=180)) >= 3
        True
    """
    passages = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        passages += [tokenizer.decode(ids[i : i + tokens]) for i in range(0, len(ids) - tokens + 1, tokens)]
    return passages


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompt_tokens: int = 30,
    new_tokens: int = 170,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Continue the first ``prompt_tokens`` tokens of each text by sampling from the full softmax.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        texts: Each of at least ``prompt_tokens`` tokens.
        prompt_tokens: Tokens of the text that are kept.
        new_tokens: Tokens sampled after them; special tokens are never drawn.
        temperature: Divides the logits.
        seed: Seed of the draws.
        batch_size: Texts at a time.

    Returns:
        Opening and continuation of each text, as text.

    Raises:
        ValueError: A text shorter than the opening, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    encoded = [tokenizer(text, verbose=False)["input_ids"][:prompt_tokens] for text in texts]
    for place, ids in enumerate(encoded):
        if len(ids) < prompt_tokens:
            raise ValueError(f"text {place} has {len(ids)} tokens, but its opening should have {prompt_tokens}")
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long, device=model.device)
    found = []
    for begin in range(0, len(encoded), batch_size):
        ids = torch.tensor(encoded[begin : begin + batch_size], device=model.device)  # (B, prompt_tokens)
        step, past = ids, None
        for _ in range(new_tokens):
            out = model(input_ids=step, **{CACHE: past}, use_cache=True)
            past = out[CACHE]
            logits = out.logits[:, -1].float() / temperature  # (B, V)
            probs = logits.index_fill(-1, special[special < logits.shape[-1]], float("-inf")).softmax(-1)
            step = torch.multinomial(probs.cpu(), 1, generator=generator).to(ids.device)  # (B, 1)
            ids = torch.cat([ids, step], dim=-1)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found
