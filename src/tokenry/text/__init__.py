"""Corpus-level applications: detection of generated text, mixtures of agents, graph RAG."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
