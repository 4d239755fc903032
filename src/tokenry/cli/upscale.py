"""``tokenry upscale``: enlarge pictures with a super-resolution checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TaskProgressColumn

from tokenry.cli.terminal import AsJson, Device, aside, check_device, console, print_json, progress_bar
from tokenry.measure import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["upscale"]


def pictures(given: list[Path]) -> list[Path]:
    """The files among what was given, and the pictures of the folders among it."""
    from tokenry.vision.labelled_images import IMAGE_ENDINGS

    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
            if not inside:
                raise ValueError(f"{path} holds no pictures; known endings: {', '.join(sorted(IMAGE_ENDINGS))}")
            found += inside
        else:
            found.append(path)
    return found


def save(image: Image, path: Path, profile: bytes | None) -> None:
    """Write a PNG; a kill leaves no half of it under this name."""
    with whole_file(path) as unfinished:
        image.save(unfinished, format="PNG", icc_profile=profile)


def upscale(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Weights of DLGSANet (.pth or .safetensors, or a folder of save_pretrained), the authors' or yours."
        ),
    ],
    scale: Annotated[
        int | None, typer.Option(help="2, 3 or 4: the checkpoint must have this scale. Default: whatever it has.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results, NAME_x2.png and so on.")] = Path("upscaled"),
    tile: Annotated[
        int | None, typer.Option(help="Side of the tiles in pixels; 0: never cut. Default: 384 above 512x512 pixels.")
    ] = None,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make results anew that are there already.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Enlarge pictures: tokenry upscale *.jpg --checkpoint tiny_x2.pth. A killed run goes on where it was."""
    from tokenry.vision.dlgsanet import load_dlgsanet
    from tokenry.vision.super_resolution import read_image, upscale_image

    check_device(device)
    paths = pictures(images)
    model = load_dlgsanet(checkpoint).to(device)
    if scale is not None and scale != model.upscale:
        raise ValueError(f"--scale {scale}, but {checkpoint} enlarges {model.upscale} times; leave --scale away")
    if tile is not None and 0 < tile < 2 * overlap:
        raise ValueError(f"--tile must be 0 or at least twice --overlap, got {tile} and {overlap}")
    out.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    skipped: list[str] = []
    existing: list[str] = []
    taken: set[Path] = set()
    with progress_bar(TaskProgressColumn(), quiet=as_json) as progress:
        bar = progress.add_task("", total=len(paths))
        for number, path in enumerate(paths):
            progress.update(bar, description=f"{path.name} ({number + 1}/{len(paths)})", completed=number)
            target = out / f"{path.stem}_x{model.upscale}.png"
            try:
                if target in taken:
                    raise ValueError(f"{path}: another picture is written to {target} already; rename one of them")
                taken.add(target)
                if target.exists() and not overwrite:
                    existing.append(str(target))
                    continue
                picture = read_image(path)

                def advance(done: int, total: int, number: int = number) -> None:
                    progress.update(bar, completed=number + done / total)

                result = upscale_image(model, picture, tile=tile, overlap=overlap, on_tile=advance)
                # a palette's or a printer's profile does not fit what has become RGB
                profile = picture.info.get("icc_profile") if picture.mode in ("L", "LA", "RGB", "RGBA") else None
                save(result, target, profile)
            except ValueError as error:
                said = str(error) if str(path) in str(error) else f"{path}: {error}"
                skipped.append(said)
                aside(said, style="yellow")
                continue
            written.append({"image": str(path), "out": str(target), "width": result.width, "height": result.height})
        progress.update(bar, completed=len(paths))
    if as_json:
        print_json({"written": written, "existing": existing, "skipped": skipped})
    else:
        said = f"{len(written)} pictures written to {out}, {model.upscale} times as large"
        said += f", {len(existing)} were there already (--overwrite makes them anew)" if existing else ""
        said += f", {len(skipped)} skipped" if skipped else ""
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if skipped:
        raise typer.Exit(1)
