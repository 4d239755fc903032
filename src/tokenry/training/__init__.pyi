from .cce import PRESETS as PRESETS
from .cce import LinearCrossEntropy as LinearCrossEntropy
from .cce import VocabParallel as VocabParallel
from .cce import linear_cross_entropy as linear_cross_entropy
from .cce import z_loss as z_loss
from .cce_patch import patch_model as patch_model
