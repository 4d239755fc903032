from .registry import Context as Context
from .registry import Measurement as Measurement
from .registry import NotRunnable as NotRunnable
from .registry import measures as measures
from .registry import verify as verify
