"""One self-contained page: search over all methods, a page for each, and the comparisons as pictures."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
