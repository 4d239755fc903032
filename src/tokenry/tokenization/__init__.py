"""Look into tokenizers: what they were trained on, and a model's probabilities byte by byte behind them."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
