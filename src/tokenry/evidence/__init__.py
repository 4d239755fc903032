"""Evidence: what was measured, never what is hoped. A method's state is computed from these records."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
