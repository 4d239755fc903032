"""Small, real, freely licensed things that ship with Tokenry: two language models, a series, images, texts.

``LICENSES.md`` beside this file names the source and licence of each.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
