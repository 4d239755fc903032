"""Load the embedded assets."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "MODELS",
    "cifar10_sample",
    "etth1",
    "external",
    "held_out_texts",
    "language_samples",
    "load_model",
    "model_path",
    "prompts",
]

HERE = Path(__file__).parent
MODELS = ("small", "draft", "retriever")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def external(name: str) -> Path | None:
    """Folder ``name`` of the larger data sets that do not ship with Tokenry, or None.

    They are looked for in the folder that the environment variable ``TOKENRY_DATA`` names.
    """
    root = os.environ.get("TOKENRY_DATA")
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def model_path(name: str = "small") -> Path:
    """Folder of an embedded language model: ``"small"`` (about 7 M parameters), ``"draft"`` or ``"retriever"`` (1 M)."""
    if name not in MODELS:
        raise ValueError(f"no embedded model is called {name!r}; there are {', '.join(MODELS)}")
    return HERE / "models" / name


def load_model(
    name: str | Path = "small", *, dtype: str | torch.dtype = "float32", device: str = "cpu", **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal language model and its tokenizer, ready for inference.

    Args:
        name: ``"small"``, ``"draft"`` or ``"retriever"``, a draft trained to find passkeys in its context (embedded;
            Llama architecture, 1,024 tokens of context, one tokenizer), or any local folder or hub id.
        dtype: Torch dtype or its name. The embedded weights are stored in bfloat16.
        device: Torch device.
        **kwargs: Handed to ``AutoModelForCausalLM.from_pretrained``, for example ``attn_implementation``.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        ValueError: There is no model or no tokenizer, a file of theirs cannot be read, or they do not belong together.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where = str(model_path(str(name))) if name in MODELS else str(name)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    bars = logging.is_progress_bar_enabled()
    if name in MODELS:  # these load in a blink: no bar
        logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where)
        if not tokenizer("a")["input_ids"]:  # what transformers makes of a folder without any tokenizer file
            raise ValueError("there is no tokenizer: save one there too, tokenizer.save_pretrained(...)")
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=wanted, **kwargs)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:  # a file that is cut off is any of them
        raise ValueError(
            f"cannot load a causal language model from {where!r}: {str(error).rstrip('. ')}. Give a folder written by "
            f"save_pretrained, a hub id, or one of the embedded models {', '.join(MODELS)}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer in {where!r} has {tokenizer.vocab_size:,} tokens, the model {rows:,}: they do not belong "
            "together; save the model's own tokenizer there"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def prompts() -> list[str]:
    """Forty held-out prompts of about 64 tokens each: twenty of English prose and verse, twenty of Python."""
    return json.loads((HERE / "text" / "prompts.json").read_text("utf-8"))


def held_out_texts(kind: Literal["english", "code"] = "english") -> list[str]:
    """Text that the embedded models never saw: passages of public-domain English or of Python's own library."""
    if kind not in ("english", "code"):
        raise ValueError(f"kind must be 'english' or 'code', got {kind!r}")
    with gzip.open(HERE / "text" / f"held_out_{kind}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def language_samples() -> dict[str, list[str]]:
    """Sentences of eight languages in five scripts, 120 to 330 KB each; sentence k says the same in all of them.

    Returns:
        FLORES code (``"eng_Latn"``) to its 1,004 sentences (SIB-200, whose text is FLORES-200).
    """
    found = {}
    for path in sorted((HERE / "text" / "languages").glob("*.txt.xz")):
        found[path.name.removesuffix(".txt.xz")] = lzma.decompress(path.read_bytes()).decode("utf-8").splitlines()
    return found


def etth1() -> pd.DataFrame:
    """ETTh1: 17,420 hours of seven transformer readings, first column ``date`` (Zhou et al. 2021)."""
    import pandas as pd

    return pd.read_csv(HERE / "series" / "ETTh1.csv.gz", parse_dates=["date"])


def cifar10_sample(split: Literal["train", "test"] = "train") -> tuple[np.ndarray, np.ndarray]:
    """A sample of CIFAR-10: images ``(N, 32, 32, 3)`` uint8 and labels ``(N,)``; 1,600 to train, 400 to test."""
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    table = parquet.read_table(HERE / "images" / f"cifar10_{split}.parquet")
    images = [np.asarray(Image.open(io.BytesIO(blob.as_py()))) for blob in table["image"]]
    return np.stack(images), np.asarray(table["label"])
