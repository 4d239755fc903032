"""``tokenry batch``: generate for a file of prompts, computing what they share once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import MofNCompleteColumn

from tokenry.cli.terminal import (
    AsJson,
    Device,
    Dtype,
    aside,
    check_device,
    check_dtype,
    console,
    print_json,
    progress_bar,
)

__all__ = ["batch"]

BEGIN = b'{"id": '  # of every line that is written


@dataclass(frozen=True)
class Request:
    """One line of the file."""

    line: int
    id: str | int
    ids: list[int]
    max_new_tokens: int


def read_request(number: int, text: str, tokenizer: Any, vocabulary: int, max_new_tokens: int) -> Request:
    """A line of the file.

    Raises:
        ValueError: What is wrong with it.
    """
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError('not an object; write {"prompt": "..."}')
    known = {"id", "prompt", "ids", "max_new_tokens"}
    if set(entry) - known:
        raise ValueError(f"unknown field {sorted(set(entry) - known)[0]!r}; known: {', '.join(sorted(known))}")
    if ("prompt" in entry) == ("ids" in entry):
        raise ValueError('give either "prompt" (text) or "ids" (token ids)')
    name = entry.get("id", number)
    if not isinstance(name, (str, int)):
        raise ValueError(f'"id" must be text or a whole number, got {name!r}')
    new = entry.get("max_new_tokens", max_new_tokens)
    if type(new) is not int or new < 1:
        raise ValueError(f'"max_new_tokens" must be a whole number of at least 1, got {new!r}')
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError(f'"prompt" must be text, got {entry["prompt"]!r:.40}')
        ids = tokenizer(entry["prompt"])["input_ids"]
    else:
        ids = entry["ids"]
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise ValueError('"ids" must be a list of whole numbers')
    if not ids:
        raise ValueError("the prompt has no tokens")
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"token {wrong[0]} is not in the model's vocabulary of {vocabulary:,}")
    return Request(number, name, ids, new)


def finished(out: Path) -> set[str | int]:
    """Ids that are in the output already; cuts off a last line that a killed run left incomplete.

    Raises:
        ValueError: The file holds something else, which is left as it is.
    """
    if not out.exists():
        return set()
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, for example {out / 'answers.jsonl'}")
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    half = data[whole:]
    try:
        ids = {json.loads(line)["id"] for line in data[:whole].decode("utf-8").splitlines()}
        if not half.startswith(BEGIN) and not BEGIN.startswith(half):
            raise ValueError(f"its last line begins with {half[:20]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--out {out} exists and holds something else ({error}); name another file") from error
    if half:
        with out.open("r+b") as file:
            file.truncate(whole)
    return ids


def batch(
    requests: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: "prompt" or "ids", and if wanted "id" and "max_new_tokens".', exists=True, dir_okay=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON lines, one per request, written as each one ends.")],
    model: Annotated[str, typer.Option(help="Folder or hub id; 'small' is embedded.")] = "small",
    max_new_tokens: Annotated[int, typer.Option(help="For lines that do not say.", min=1)] = 128,
    memory: Annotated[
        str | None, typer.Option(help="For keys and values: 8GiB, 500MB ... Default: half of what is free.")
    ] = None,
    tokens_per_pass: Annotated[int, typer.Option(help="Above this no prompt tokens join a pass.", min=1)] = 512,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate for a file of prompts: tokenry batch requests.jsonl --out out.jsonl. A killed run goes on where it was."""
    from tokenry.assets import load_model
    from tokenry.decoding import batch_generate, kv_bytes_per_token, plan_batch
    from tokenry.decoding.batchllm import parse_memory
    from tokenry.decoding.engine.decoder_blocks import learned_positions

    check_device(device)
    check_dtype(dtype)
    limit = None if memory is None else parse_memory(memory)
    if out.resolve() == requests.resolve():
        raise ValueError(f"--out {out} is the file of the requests; name another")
    done = finished(out)
    lines = requests.read_bytes().splitlines()
    if not any(line.strip() for line in lines):
        raise ValueError(f"{requests} has no lines")
    out.parent.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    embeddings: Any = network.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    positions = learned_positions(network.config)
    room = None if limit is None else limit // kv_bytes_per_token(network.config, network.dtype)
    todo: list[Request] = []
    broken: list[str] = []
    seen: set[str | int] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = read_request(number, line.decode("utf-8"), tokenizer, vocabulary, max_new_tokens)
            if request.id in seen:
                raise ValueError(f"id {request.id!r} is given twice")
            held = len(request.ids) + request.max_new_tokens - 1
            if positions is not None and held > positions:
                raise ValueError(
                    f"reaches {held:,} tokens, the model has {positions:,} positions; shorten the prompt or lower "
                    "max_new_tokens"
                )
            if room is not None and held > room:
                raise ValueError(f"needs keys and values of {held:,} tokens, --memory {memory} holds {room:,}")
        except (ValueError, UnicodeDecodeError) as error:
            broken.append(f"line {number}: {error}")
            continue
        seen.add(request.id)
        if request.id not in done:
            todo.append(request)
    for message in broken:
        aside(f"{requests}, {message}", style="yellow")
    summary: dict[str, Any] = {"requests": len(todo), "finished_before": len(seen) - len(todo), "broken": broken}
    if todo:
        plan = plan_batch([r.ids for r in todo], [r.max_new_tokens for r in todo])
        if not as_json:
            aside(str(plan))
        bars = progress_bar(MofNCompleteColumn(), quiet=as_json)
        with out.open("a", encoding="utf-8") as file, bars as progress:
            bar = progress.add_task("requests", total=len(todo))

            def write(index: int, ids: Any) -> None:
                request = todo[index]
                new = ids[len(request.ids) :].tolist()
                text = tokenizer.decode(new, skip_special_tokens=True)
                entry = {"id": request.id, "text": text, "ids": new, "prompt_tokens": len(request.ids)}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(bar)

            _, stats = batch_generate(
                network,
                [r.ids for r in todo],
                [r.max_new_tokens for r in todo],
                memory_limit=limit,
                max_tokens_per_pass=tokens_per_pass,
                on_result=write,
                do_sample=False,
            )
        summary |= stats.summary() | {"saved_tokens": plan.saved}
    if as_json:
        print_json(summary)
    else:
        said = f"{len(todo)} requests written to {out}"
        if summary["finished_before"]:
            said += f", {summary['finished_before']} were there already"
        if todo:
            said += f"; {summary['prefill_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens computed in {summary['seconds']:.1f} s"
        console.print(said, markup=False, highlight=False)
    if broken:
        raise typer.Exit(1)
