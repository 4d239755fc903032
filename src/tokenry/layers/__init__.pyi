from .cache_argument import CACHE as CACHE
from .mlp import ChannelMLP as ChannelMLP
from .mlp import MLPHead as MLPHead
from .norms import GroupNorm1 as GroupNorm1
from .star_relu import SquaredReLU as SquaredReLU
from .star_relu import StarReLU as StarReLU
from .star_relu import squared_relu as squared_relu
from .star_relu import star_relu as star_relu
