"""Make the picture of docs/drawing.md: super tokens and fields of influence over a photograph that scikit-learn ships.

python scripts/draw_token_pictures.py docs/images/tokens.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from tokenry.vision import draw_tokens

SIDE, GAP = 336, 6
# One row per entry: (model, what, layer, size at which the model runs)
ROWS = [
    [("stvit_small", "super_tokens", 0, 448), ("stvit_small", "super_tokens", 2, 448), ("stvit_small", "super_tokens", 7, 448)],
    [("resnet18", "influence", 3, 224), ("transnext_micro", "influence", 2, 224), ("davit_tiny", "influence", 2, 224)],
]  # fmt: skip


def main(target: Path) -> None:
    """Draw with untrained networks, side by side."""
    flower = Image.fromarray(load_sample_image("flower.jpg")).crop((120, 0, 547, 427))
    columns = max(len(row) for row in ROWS)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) - GAP, len(ROWS) * (SIDE + GAP) - GAP), "white")
    for i, row in enumerate(ROWS):
        for j, (name, what, layer, size) in enumerate(row):
            torch.manual_seed(0)
            own = {"zero_init_last": False} if name.startswith("resnet") else {}  # else its branches begin as nothing
            model = timm.create_model(name, num_classes=2, **own).eval()
            picture = draw_tokens(model, flower, what=what, layer=layer, size=size, query=(0.45, 0.45), strength=0.55)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (j * (SIDE + GAP), i * (SIDE + GAP)))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
