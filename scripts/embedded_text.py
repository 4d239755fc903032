"""The text behind the embedded models: what they are trained on, what is held out, and how well a model predicts it.

Public-domain English (State of the Union and inaugural addresses, King James Genesis, Shakespeare) and the source of the
running Python's standard library. Nothing else.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenry.assets.english import english_documents, is_held_out

CONTEXT = 1024  # tokens, of the embedded models
# Folders of the standard library.
NOT_READ = {"site-packages", "test", "tests", "lib2to3", "idlelib", "encodings", "turtledemo"}


def documents(english: Path) -> dict[str, list[str]]:
    """All texts as documents, each ``train_`` or ``held_out_`` (about 5 %, by its hash) ``english`` or ``code``.

    Args:
        english: Folder of ``*.txt.gz``.

    Raises:
        SystemExit: No text in the folder.
    """
    split: dict[str, list[str]] = {"train_english": [], "held_out_english": [], "train_code": [], "held_out_code": []}

    def put(kind: str, text: str) -> None:
        split[("held_out_" if is_held_out(text) else "train_") + kind].append(text)

    for text in english_documents(english):
        put("english", text)
    if not split["train_english"]:
        raise SystemExit(f"no *.txt.gz in {english}")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if NOT_READ & set(path.relative_to(library).parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if 200 < len(text) < 300_000:
            put("code", text)
    return split


def training_texts(split: dict[str, list[str]], seed: int) -> list[str]:
    """The training documents in an order of their own; English twice, as there is less of it."""
    texts = split["train_english"] * 2 + split["train_code"]
    random.Random(seed).shuffle(texts)
    return texts


@torch.no_grad()
def bits_per_byte(logits_of: Callable[[Tensor], list[Tensor]], tokenizer: Any, texts: list[str]) -> list[float]:
    """Mean bits per byte over whole documents, cut into windows of the context length.

    Args:
        logits_of: From ids ``(1, T)`` to logits ``(1, T, V)``, in float32; several where a network has several exits.
        tokenizer: Of the network.
        texts: The documents.

    Returns:
        A figure for each of the logits.
    """
    nats: Tensor | float = 0.0
    bytes_seen = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bytes_seen += len(text.encode())
        for start in range(0, len(ids), CONTEXT - 1):
            window = torch.tensor([[tokenizer.eos_token_id, *ids[start : start + CONTEXT - 1]]])
            losses = [F.cross_entropy(z[0, :-1], window[0, 1:], reduction="sum") for z in logits_of(window)]
            nats = nats + torch.stack(losses).double()
    return [round(each / math.log(2) / bytes_seen, 4) for each in torch.as_tensor(nats).tolist()]
