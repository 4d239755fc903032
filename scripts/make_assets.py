"""Make the embedded texts, images and series from the source data.

    python scripts/make_assets.py --data FOLDER

``FOLDER`` holds ``english-public-domain``, ``multilingual-sib200``, ``cifar10`` and ``forecasting`` (see
``src/tokenry/assets/LICENSES.md`` for where they come from). The held-out texts are those that
``embedded_text.py`` holds out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pyarrow.parquet as parquet

from embedded_text import documents

ASSETS = Path(__file__).parent.parent / "src/tokenry/assets"
LANGUAGES = ("arb_Arab", "deu_Latn", "eng_Latn", "hin_Deva", "rus_Cyrl", "spa_Latn", "swh_Latn", "zho_Hans")
PASSAGE = 1500  # characters of a held-out passage: about 400 tokens


def passages(texts: list[str], count: int) -> list[str]:
    """``count`` passages, at most four from one document, each beginning at a line."""
    found = []
    for text in texts:
        starts = [
            text.find("\n", at) + 1 for at in range(0, max(1, len(text) - PASSAGE - 200), max(PASSAGE, len(text) // 4))
        ]
        found += [text[s : s + PASSAGE] for s in starts[:4] if len(text[s : s + PASSAGE].strip()) > PASSAGE * 0.8]
    step = max(1, len(found) // count)
    return found[::step][:count]


def write_json_gz(path: Path, value: object) -> None:
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.write(json.dumps(value, ensure_ascii=False).encode())


def write_languages(source: Path, target: Path) -> None:
    """The sentences of each language, one a line."""
    target.mkdir(parents=True, exist_ok=True)
    for name in LANGUAGES:
        rows = lzma.decompress((source / f"{name}.tsv.xz").read_bytes()).decode().splitlines()[1:]
        text = "".join(row.split("\t")[3] + "\n" for row in rows)
        (target / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    for folder in ("text", "images", "series"):
        (ASSETS / folder).mkdir(parents=True, exist_ok=True)
    split = documents(data / "english-public-domain")
    prompts = []
    for kind in ("english", "code"):
        texts = passages(split[f"held_out_{kind}"], 160)
        write_json_gz(ASSETS / "text" / f"held_out_{kind}.json.gz", texts)
        prompts += [text[: 240 if kind == "english" else 200] for text in texts[:: len(texts) // 20][:20]]
    (ASSETS / "text" / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, per_class in (("train", 160), ("test", 40)):
        table = parquet.read_table(data / "cifar10" / f"{name}.parquet")
        seen = [0] * 10
        rows = []
        for row, label in enumerate(table["label"].to_pylist()):
            if seen[label] < per_class:
                seen[label] += 1
                rows.append(row)
        parquet.write_table(table.take(rows), ASSETS / "images" / f"cifar10_{name}.parquet", compression="zstd")
    write_languages(data / "multilingual-sib200", ASSETS / "text" / "languages")
    shutil.copyfile(data / "forecasting/ETTh1.csv.gz", ASSETS / "series/ETTh1.csv.gz")


if __name__ == "__main__":
    main()
