from .embedded import MODELS as MODELS
from .embedded import cifar10_sample as cifar10_sample
from .embedded import etth1 as etth1
from .embedded import external as external
from .embedded import held_out_texts as held_out_texts
from .embedded import load_model as load_model
from .embedded import model_path as model_path
from .embedded import prompts as prompts
