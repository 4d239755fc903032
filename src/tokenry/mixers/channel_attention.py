"""Attention between channels: every token is one sample, a group's channels look at each other.

Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv:2204.03645.

    q, k, v = x Wq, x Wk, x Wv                    per group of d = C / g channels; x: (B, N, C), q, k, v: (B, g, N, d)
    A       = softmax(k^T v / sqrt(d))            (B, g, d, d); the softmax runs over v's channels
    y       = (A q^T)^T Wo                        (B, N, C)

The scores are sums over all tokens, so the field is global at a cost linear in N. They are not divided by N: larger maps
make a sharper softmax, and a map in which every token stands twice is another input. Any order of the tokens gives the
same A. Cost: 4 C^2 + 4 C parameters, 4 N C^2 + 2 N C^2 / g multiply-accumulates.

Not to be mixed up with XCiT's attention (q^T k of normalised columns, a temperature) and Florence-2's (q^T k / sqrt(N)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["ChannelGroupAttention", "channel_attention", "channel_attention_maps", "channel_weights"]

# Fused attention kernels take heads of up to so many channels; here the tokens stand where the channels of a head do.
FUSED_LIMIT = 256


def channel_weights(k: Tensor, v: Tensor) -> Tensor:
    """The attention between channels, ``softmax(k^T v / sqrt(d))``.

    Args:
        k: Keys ``(..., N, d)``.
        v: Values ``(..., N, d)``.

    Returns:
        ``(..., d, d)``; rows sum to 1.
    """
    return torch.softmax((k * k.shape[-1] ** -0.5).transpose(-2, -1) @ v, dim=-1)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, *, fused: bool = False) -> Tensor:
    """Attention between the channels of each group.

    Args:
        q: Queries ``(B, g, N, d)``.
        k: Keys, of the same shape.
        v: Values, of the same shape.
        fused: Call ``scaled_dot_product_attention`` with the roles exchanged (query k^T, key v^T, value q^T) instead of
            two matrix products. The d x d scores are small, so there is little for it to save.

    Returns:
        ``(B, g, N, d)``.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
        >>> same = channel_attention(q, k, v, fused=True)
        >>> torch.allclose(channel_attention(q, k, v), same, atol=1e-5)
        True
    """
    if fused:
        turned_k, turned_v, turned_q = (part.transpose(-2, -1) for part in (k, v, q))
        scale = k.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(turned_k, turned_v, turned_q, scale=scale).transpose(-2, -1)
    return q @ channel_weights(k, v).transpose(-2, -1)


class ChannelGroupAttention(nn.Module):
    """Mix tokens through attention between channels, in groups.

    Linear maps start as truncated normal 0.02, biases as 0.

    Args:
        dim: Channels C.
        num_groups: Groups g; must divide ``dim``. None: groups of 32 channels (the paper's models) where 32 divides
            ``dim``, else one group. A group of one channel would mix nothing.
        qkv_bias: Whether queries, keys and values have a bias. Default True (authors' models).
        fused: Compute through ``scaled_dot_product_attention``; for maps of up to 256 tokens. Default False.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_groups`` does not divide ``dim``; an input that is not ``(B, N, C)``; ``fused`` and more tokens
            than its kernels take.

    Example:
        >>> mixer = ChannelGroupAttention(64)
        >>> mixer.num_groups, mixer(torch.randn(2, 35, 64)).shape
        (2, torch.Size([2, 35, 64]))
    """

    layout = Layout.NLC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_groups: int | None = None,
        *,
        qkv_bias: bool = True,
        fused: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_groups = head_count(dim, num_groups, name="num_groups")
        self.fused = fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        check_input(self, x, self.dim)
        if self.fused and x.shape[1] > FUSED_LIMIT:
            raise ValueError(
                f"fused attention between channels takes up to {FUSED_LIMIT} tokens (they stand where the kernels expect the "
                f"channels of a head), got {x.shape[1]}; make the mixer with fused=False"
            )
        q, k, v = _split(self.qkv(x), self.num_groups)
        y = channel_attention(q, k, v, fused=self.fused)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_groups={self.num_groups}"


def _split(qkv: Tensor, groups: int) -> tuple[Tensor, ...]:
    """(B, N, 3 C) -> queries, keys and values (B, g, N, d)."""
    return qkv.unflatten(-1, (3, groups, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@torch.no_grad()
def channel_attention_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the channel attentions of a model attend to, for looking at.

    Args:
        model: Any module with ``ChannelGroupAttention`` in it, or timm's ``davit_*`` (not its ``davit_*_fl``, whose
            attention is another one).
        x: The model's input, for example images (B, 3, H, W).

    Returns:
        Name of each such attention, in the order in which they run, to its weights ``(B, g, d, d)``.

    Raises:
        ValueError: The model has none.

    Example:
        >>> import timm
        >>> model = timm.create_model("davit_tiny", num_classes=0, depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2))
        >>> maps = channel_attention_maps(model.eval(), torch.randn(1, 3, 32, 32))
        >>> {name: tuple(weights.shape) for name, weights in maps.items()}
        {'stages.0.blocks.0.1.attn': (1, 1, 32, 32), 'stages.1.blocks.0.1.attn': (1, 2, 32, 32)}
    """
    from timm.models.davit import ChannelAttention

    maps: dict[str, Tensor] = {}

    def watch(name: str, groups: int) -> Any:
        def keep(module: nn.Module, _inputs: tuple[Tensor], qkv: Tensor) -> None:
            _, k, v = _split(qkv, groups)
            maps[name] = channel_weights(k, v)

        return keep

    hooks = [
        module.qkv.register_forward_hook(
            watch(name, module.num_groups if isinstance(module, ChannelGroupAttention) else module.num_heads)
        )
        for name, module in model.named_modules()
        if isinstance(module, (ChannelGroupAttention, ChannelAttention))
    ]
    if not hooks:
        raise ValueError(
            f"{type(model).__name__} has no channel attention: give a model with ChannelGroupAttention in it, or timm's "
            "davit_tiny ... davit_giant"
        )
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return maps
