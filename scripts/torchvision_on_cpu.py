"""Let a CUDA build of torchvision load beside a CPU build of PyTorch.

The registry's torchvision wheels for Linux are CUDA builds. Beside a CPU build of PyTorch their compiled
operators cannot load, and ``import torchvision`` fails because it describes two of them (``nms``, ``qnms``) that
then do not exist; timm and transformers import torchvision, so they fail too. Everything written in Python
(transforms, image folders), which is all that is needed here, works once those operators have a name.

Run by ``make install`` with the environment's own python. When the import works, nothing is done. When it
does not, a start-up file is put into this environment alone that names the operators just before
torchvision is first imported.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''\
"""Name torchvision::nms and qnms before torchvision is imported (written by scripts/torchvision_on_cpu.py)."""

import sys


class _NameOperator:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _NameOperator())
'''


def imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def main() -> None:
    if imports():
        return
    folder = Path(sysconfig.get_paths()["purelib"])
    (folder / "_torchvision_on_cpu.py").write_text(HOOK)
    (folder / "_torchvision_on_cpu.pth").write_text("import _torchvision_on_cpu\n")
    if not imports():
        sys.exit("torchvision cannot be imported in this environment: run `python -c 'import torchvision'` to see why")
    print("torchvision: compiled operators are for CUDA; the Python parts are usable beside CPU PyTorch")


if __name__ == "__main__":
    main()
