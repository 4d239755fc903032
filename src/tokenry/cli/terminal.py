"""What all commands share: options with one meaning, JSON, plain lines beside the result, a progress bar."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["AsJson", "Device", "Dtype", "aside", "check_device", "check_dtype", "console", "print_json", "progress_bar"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

console = Console()  # results; what is said beside them goes to standard error


def print_json(value: object) -> None:
    """Indented, other scripts as they are; dates and paths as text."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def aside(text: str, *, word: str = "", style: str = "") -> None:
    """A line on standard error, printed as it is: brackets in it are no markup.

    Args:
        text: The line.
        word: What stands before it: ``error``, ``warning``.
        style: Rich style of the word; of the line where there is no word.
    """
    line = Text.assemble((f"{word}:", style), " ", text) if word else Text(text, style)
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def progress_bar(count: ProgressColumn, *, quiet: bool) -> Progress:
    """A bar on standard error: description, how far, time gone, time left.

    Args:
        count: Column that says how far: ``MofNCompleteColumn()``, ``TaskProgressColumn()``.
        quiet: No bar, for ``--json``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or cannot use here.

    Raises:
        ValueError: There is no such device.
    """
    if device == "cpu":
        return
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here; leave --device away to use the CPU")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # each backend refuses in its own way
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {device!r}: PyTorch cannot use it here ({said}); give cpu, cuda, cuda:1, ..."
        ) from error


def check_dtype(dtype: str) -> None:
    """Refuse the name of a dtype that no model is loaded in.

    Raises:
        ValueError: Another name.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
