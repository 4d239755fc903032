from .machine import Machine as Machine
from .machine import describe_machine as describe_machine
from .machine import package_versions as package_versions
from .session import Session as Session
from .timing import Timing as Timing
from .timing import fit_exponent as fit_exponent
from .timing import interleave as interleave
from .timing import peak_extra_memory as peak_extra_memory
