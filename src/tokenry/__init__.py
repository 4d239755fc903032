"""Tokenry: published methods for tokens, behind the interfaces you already use, each one verified.

``import tokenry`` loads nothing heavy: families (``tokenry.decoding``, ``tokenry.vision``, ...) load on first use.

    >>> import tokenry
    >>> [hit.slug for hit in tokenry.search("shrink the kv cache")][:1]
    ['ems']
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
