"""Multi-scale attention fusion: every token looks, through attention, at a shorter sequence learned from all tokens.

Sun et al., "MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition", Neurocomputing
2024, arXiv:2209.01620. On a map of M = H * W tokens, Y (B, M, C):

    local     Y_L = window_attention(Y)                                    windows of 7 x 7, relative position bias
    global    Y_G = W Y + b + pos                                          W: (P M, M), shared by all channels; P = 0.5
    fusion    softmax( (Y_L W_P) (Y_G W_J)^T / sqrt(d) ) (Y_G W_U) W_O     per head of width d

The global stream (Global Learning with Down-sampling, GLD) is neither pooling nor a strided convolution: W is a dense
matrix along the token axis. So its parameters grow with M^2, the map's size is fixed, and a block is not linear in M.

The paper's code is not public. As a mixer in another block, which has the residual, the norm and the MLP, this is local
attention plus fusion: ``Y_L + fusion(Y_L, Y_G)``. ``tokenry.vision.maformer`` has the paper's whole block.

Cost at C channels: 8 C^2 + P M^2 parameters and little more; N 8 C^2 + 2 N w^2 C + 3 P N^2 C multiply-accumulates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.cross_attention import CrossAttention
from tokenry.mixers.registry import Layout, check_input
from tokenry.mixers.window_attention import WindowAttentionMixer

__all__ = ["GLD", "MAFMixer"]


def _resize_matrix(source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """(target tokens, source tokens): bilinear resizing of a map, as a matrix; its rows sum to one."""
    tokens = source[0] * source[1]
    units = torch.eye(tokens).view(1, tokens, *source)
    return F.interpolate(units, target, mode="bilinear", antialias=True)[0].flatten(1).T


class GLD(nn.Module):
    """Global learning with down-sampling: a learned dense map along the token axis, and a position for each result.

    Args:
        dim: Channels C.
        input_size: (H, W) of the map; M = H * W.
        ratio: P: floor(P M) tokens come out, at least one. Default 0.5 (paper).
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``ratio`` is not above 0 and at most 1.

    Example:
        >>> GLD(8, (4, 6))(torch.randn(2, 24, 8)).shape
        torch.Size([2, 12, 8])
    """

    def __init__(
        self,
        dim: int,
        input_size: tuple[int, int],
        ratio: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
        self.input_size, self.ratio = input_size, ratio
        tokens = input_size[0] * input_size[1]
        self.fc = nn.Linear(tokens, max(1, int(tokens * ratio)), device=device, dtype=dtype)
        self.pos = nn.Parameter(torch.zeros(self.fc.out_features, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as averages over neighbouring tokens plus a little noise: small random weights give almost empty tokens."""
        nn.init.zeros_(self.fc.bias)
        nn.init.trunc_normal_(self.pos, std=0.02)
        out, tokens = self.fc.weight.shape
        if self.fc.weight.is_meta:
            return
        with torch.no_grad():
            pooled = F.adaptive_avg_pool1d(torch.eye(tokens)[None], out)[0].T  # (P M, M)
            self.fc.weight.copy_(pooled + 0.02 * torch.randn(out, tokens) / tokens**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, C) -> (B, P M, C)."""
        return torch.matmul(self.fc.weight, x) + self.fc.bias[:, None] + self.pos

    def set_input_size(self, input_size: tuple[int, int]) -> None:
        """Resample the map and the positions to another size, as one resizes a picture.

        Tokens that come in are resized to the old map, what comes out from the old (P H, W) map to the new one; both steps
        are folded into the weights.

        Raises:
            ValueError: P H is no whole number, in which case what comes out is no map.
        """
        if input_size == self.input_size:
            return
        grids = []
        for height, width in (self.input_size, input_size):
            rows = height * self.ratio
            if rows != int(rows) or rows < 1:
                raise ValueError(
                    f"resampling needs a whole number of rows: ratio {self.ratio} of {height} is {rows:g}; make the mixer anew "
                    "for the size, or choose sizes whose height times ratio is whole"
                )
            grids.append((int(rows), width))
        like = self.fc.weight
        inner = _resize_matrix(input_size, self.input_size).to(like)  # (M, M')
        outer = _resize_matrix(grids[0], grids[1]).to(like)  # (P M', P M)
        weight, bias = outer @ like.detach() @ inner, outer @ self.fc.bias.detach()
        self.pos = nn.Parameter(outer @ self.pos.detach())
        self.fc = nn.Linear(inner.shape[1], len(outer), device=like.device, dtype=like.dtype)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.copy_(bias)
        self.input_size = input_size


class MAFMixer(nn.Module):
    """Mix tokens by window attention and by attention over a learned overview of all tokens.

    Args:
        dim: Channels C.
        num_heads: Heads of both attentions; must divide ``dim``. None: heads of 32 channels where that divides, else one.
        input_size: (H, W) of the maps; needed, as the overview's matrix has a row per token.
        window_size: Side of a window. Default 7. Padding, where the window does not divide the map, is masked.
        ratio: Tokens of the overview over tokens of the map. Default 0.5 (paper).
        attn_drop: Dropout rate of the fusion's weights in training. Default 0.
        proj_drop: Dropout rate of both outputs. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Heads that do not divide ``dim``; no size; a map of another size.

    Example:
        >>> MAFMixer(32, input_size=(9, 5))(torch.randn(2, 9, 5, 32)).shape
        torch.Size([2, 9, 5, 32])
    """

    layout = Layout.NHWC

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        input_size: tuple[int, int] | None = None,
        window_size: int = 7,
        ratio: float = 0.5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size is None or min(input_size) < 1:
            raise ValueError(f"give input_size=(H, W) of the maps, at least 1x1, got {input_size}")
        self.local = WindowAttentionMixer(
            dim, num_heads, window_size=window_size, rel_bias=True, mask_padding=True, proj_drop=proj_drop, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.gld = GLD(dim, input_size, ratio, device=device, dtype=dtype)
        self.fusion = CrossAttention(dim, num_heads, attn_drop, proj_drop, device=device, dtype=dtype)

    @property
    def fixed_tokens(self) -> int:
        """H * W."""
        return self.gld.input_size[0] * self.gld.input_size[1]

    def set_input_size(self, input_size: tuple[int, int]) -> None:
        """Resample the overview to maps of another size."""
        self.gld.set_input_size(input_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.local.dim)
        check_map(x, self.gld.input_size)
        local = self.local(x).flatten(1, 2)  # (B, N, C)
        return (local + self.fusion(local, self.gld(x.flatten(1, 2)))).view(x.shape)


def check_map(x: Tensor, input_size: tuple[int, int]) -> None:
    """Refuse a map (B, H, W, C) of another size than the overview was made for."""
    if tuple(x.shape[1:3]) != tuple(input_size):
        raise ValueError(
            f"the mixer was made for maps of {input_size[0]}x{input_size[1]} tokens, got {x.shape[1]}x{x.shape[2]}; call "
            "set_input_size((H, W)), or make it with input_size of your maps"
        )
