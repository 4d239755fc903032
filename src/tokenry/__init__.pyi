from . import assets as assets
from . import catalog as catalog
from . import claims as claims
from . import compare as compare
from . import decoding as decoding
from . import evidence as evidence
from . import kernels as kernels
from . import kvcache as kvcache
from . import language as language
from . import layers as layers
from . import measure as measure
from . import mixers as mixers
from . import report as report
from . import series as series
from . import text as text
from . import tokenization as tokenization
from . import training as training
from . import vision as vision
from .catalog import card as card
from .catalog import create as create
from .catalog import search as search

__version__: str
