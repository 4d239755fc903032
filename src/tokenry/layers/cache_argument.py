"""The name under which the installed ``transformers`` takes and returns a key-value cache.

Release 5.24 renamed ``past_key_values`` to ``cache``, in models, in ``generate`` and in what they return. Our own calls
say ``model(..., **{CACHE: cache})`` and ``output[CACHE]``, which is right on both sides of the change and warns on neither.
"""

from __future__ import annotations

import transformers
from packaging.version import Version

__all__ = ["CACHE"]

CACHE: str = "cache" if Version(transformers.__version__) >= Version("5.24.0.dev0") else "past_key_values"
