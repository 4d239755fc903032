"""Token mixers by name, their layouts, and the conversion between layouts.

A token mixer is an ``nn.Module`` made as ``Mixer(dim, *, proj_drop=0.0, device=None, dtype=None, **its_own)`` whose
forward keeps the shape. It declares

    layout          "NCHW" (B, C, H, W), "NHWC" (B, H, W, C) or "NLC" (B, N, C)
    fixed_tokens    None, or the only number of tokens N = H * W that it takes

and the block around it converts, so a mixer of any paper runs inside any MetaFormer.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "InLayout",
    "Layout",
    "MixerFactory",
    "TokenMixer",
    "check_input",
    "convert_layout",
    "create_mixer",
    "for_timm",
    "layout_of",
    "list_mixers",
    "mixer_factory",
    "register_mixer",
]

# Name to where it is. Modules load on first use.
MIXERS: dict[str, str | type[nn.Module]] = {
    "aff": "tokenry.mixers.aff:AFFMixer",
    "aggregated_attention": "tokenry.mixers.aggregated_attention:AggregatedAttention",
    "attention": "tokenry.mixers.attention:AttentionMixer",
    "cat": "tokenry.mixers.cat:CATMixer",
    "channel_attention": "tokenry.mixers.channel_attention:ChannelGroupAttention",
    "cosine_attention": "tokenry.mixers.aggregated_attention:CosineAttention",
    "dss2d": "tokenry.mixers.dss2d:DSS2D",
    "dual_attention": "tokenry.mixers.dual_attention:DualAttention",
    "dual_token": "tokenry.mixers.dual_token:DualTokenMixer",
    "dynamic_local": "tokenry.mixers.dynamic_local:DynamicLocalAttention",
    "global_mhra": "tokenry.mixers.mhra:GlobalMHRA",
    "global_query": "tokenry.mixers.global_query:GlobalQueryAttention",
    "hsm_ssd": "tokenry.mixers.hsm_ssd:HSMSSD",
    "identity": "tokenry.mixers.identity:IdentityMixer",
    "local_mhra": "tokenry.mixers.mhra:LocalMHRA",
    "maf": "tokenry.mixers.maf:MAFMixer",
    "mix_shift": "tokenry.mixers.mix_shift:MixShift",
    "performer": "tokenry.mixers.performer:PerformerMixer",
    "pool": "tokenry.mixers.pool:PoolingMixer",
    "random": "tokenry.mixers.random:RandomMixer",
    "selective_channel": "tokenry.mixers.selective_channel:SelectiveChannelMixer",
    "selective_token": "tokenry.mixers.selective_token:SelectiveTokenMixer",
    "self_guided": "tokenry.mixers.self_guided:SelfGuidedMixer",
    "semantic_token": "tokenry.mixers.semantic_token:SemanticTokenMixer",
    "sep_conv": "tokenry.mixers.sep_conv:SepConvMixer",
    "sparse_channel": "tokenry.mixers.sparse_channel:SparseChannelAttention",
    "spatial_fc": "tokenry.mixers.spatial_fc:SpatialFCMixer",
    "super_token": "tokenry.mixers.super_token:SuperTokenAttention",
    "window_attention": "tokenry.mixers.window_attention:WindowAttentionMixer",
}


class Layout(StrEnum):
    """Order of the axes that a mixer takes and returns; equal to its plain string."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"layout must be 'NCHW', 'NHWC' or 'NLC', got {value!r}")


# By layout: number of axes, the one of the channels, what a mixer takes, and how to make that of something else.
TAKES: dict[str, tuple[int, int, str, str]] = {
    "NCHW": (
        4,
        1,
        "maps (B, C, H, W)",
        "for tokens (B, N, C) use x.transpose(1, 2).unflatten(2, (H, W)), or wrap it: InLayout(mixer, 'NLC', grid=(H, W))",
    ),
    "NHWC": (
        4,
        3,
        "maps (B, H, W, C)",
        "lay tokens out with x.unflatten(1, (H, W)), turn (B, C, H, W) with x.permute(0, 2, 3, 1), or wrap it: "
        "InLayout(mixer, 'NCHW')",
    ),
    "NLC": (
        3,
        2,
        "tokens (B, N, C)",
        "for a map (B, C, H, W) use x.flatten(2).transpose(1, 2), or wrap it: InLayout(mixer, 'NCHW')",
    ),
}


@runtime_checkable
class TokenMixer(Protocol):
    """What every token mixer declares."""

    layout: Layout | str
    fixed_tokens: int | None

    def __call__(self, x: Tensor, /) -> Tensor:
        """Mix tokens; the result has the shape of ``x``."""
        ...


MixerFactory = Callable[..., nn.Module]


def list_mixers() -> list[str]:
    """Names that ``create_mixer`` and ``metaformer(token_mixers=...)`` take.

    Example:
        >>> list_mixers()[:2], "pool" in list_mixers()
        (['aff', 'aggregated_attention'], True)
    """
    return sorted(MIXERS)


def register_mixer(name: str, mixer: type[nn.Module]) -> type[nn.Module]:
    """Give a mixer class a name of its own.

    Args:
        name: New name; an existing one is refused.
        mixer: Class made as ``Mixer(dim, *, proj_drop, device, dtype, **its_own)``.

    Raises:
        ValueError: The name is taken, or the class declares no layout.
    """
    if name in MIXERS:
        raise ValueError(f"a mixer called {name!r} is registered already; choose another name")
    layout_of(mixer, required=True)
    MIXERS[name] = mixer
    return mixer


def _by_name(name: str) -> type[nn.Module]:
    if name not in MIXERS:
        raise ValueError(f"no token mixer is called {name!r}; there are {', '.join(list_mixers())}")
    target = MIXERS[name]
    if isinstance(target, str):
        module, attribute = target.split(":")
        return getattr(importlib.import_module(module), attribute)
    return target


def mixer_factory(mixer: str | MixerFactory) -> MixerFactory:
    """The class or callable behind a registered name; a class or callable is returned as it is.

    Raises:
        ValueError: An unknown name (the message lists all), or neither a name nor callable.
    """
    if isinstance(mixer, str):
        return _by_name(mixer)
    if not callable(mixer) or isinstance(mixer, nn.Module):
        raise ValueError(
            f"a token mixer is a registered name ({', '.join(list_mixers())}), a class or a callable (dim, **kw); "
            f"got {type(mixer).__name__}"
        )
    return mixer


def accepted_keywords(factory: MixerFactory) -> set[str] | None:
    """Names of the keywords that a mixer takes; None: any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_keyword(factory: MixerFactory, name: str) -> bool:
    """Whether a mixer names ``name`` among its parameters (``**kwargs`` alone does not count)."""
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def size_keywords(factory: MixerFactory, grid: tuple[int, int]) -> dict[str, Any]:
    """What a mixer wants to know of the maps it will see: ``num_tokens`` = H * W, ``input_size`` = (H, W), or nothing."""
    known: dict[str, Any] = {"num_tokens": grid[0] * grid[1], "input_size": grid}
    return {name: value for name, value in known.items() if takes_keyword(factory, name)}


def create_mixer(name: str, dim: int, *, layout: Layout | str | None = None, **kwargs: Any) -> nn.Module:
    """Make a registered token mixer.

    Args:
        name: One of ``list_mixers()``.
        dim: Channels C, at least 1.
        layout: Layout in which the caller wants to call it; another one than the mixer's own wraps it in
            ``InLayout``. None (default): the mixer's own.
        **kwargs: The mixer's own keywords, and ``proj_drop``, ``device``, ``dtype`` that all take.

    Raises:
        ValueError: Unknown name, keyword or layout, or ``dim`` below 1.

    Example:
        >>> import torch
        >>> pool = create_mixer("pool", 8, pool_size=5)
        >>> pool.layout, pool(torch.randn(2, 8, 7, 5)).shape
        (<Layout.NCHW: 'NCHW'>, torch.Size([2, 8, 7, 5]))
    """
    factory = _by_name(name)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a positive whole number of channels, got {dim!r}")
    accepted = accepted_keywords(factory)
    unknown = sorted(set(kwargs) - accepted) if accepted is not None else []
    if unknown:
        raise ValueError(
            f"mixer {name!r} takes no {', '.join(map(repr, unknown))}; its keywords: "
            f"{', '.join(sorted((accepted or set()) - {'dim'}))}"
        )
    for keyword, example in (("num_tokens", "H * W"), ("input_size", "(H, W)")):
        if takes_keyword(factory, keyword) and kwargs.get(keyword) is None:
            raise ValueError(
                f"mixer {name!r} works on a fixed number of tokens: give {keyword}={example} of the maps it will see"
            )
    mixer = factory(dim, **kwargs)
    return mixer if layout is None or Layout(layout) == layout_of(mixer) else InLayout(mixer, layout)


def layout_of(mixer: object, *, required: bool = False) -> Layout:
    """The layout that a mixer declares.

    Modules that declare none are taken to be NCHW, as in timm's MetaFormer; its own ``Attention`` is NLC.

    Raises:
        ValueError: It declares something else than one of the three, or nothing although ``required``.
    """
    declared = getattr(mixer, "layout", None)
    if declared is None:
        if required:
            raise ValueError(f"{mixer!r} declares no layout: set layout = 'NCHW', 'NHWC' or 'NLC' on the class")
        from timm.models.metaformer import Attention

        return Layout.NLC if isinstance(mixer, Attention) else Layout.NCHW
    return Layout(declared)


def check_input(mixer: nn.Module, x: Tensor, dim: int | None = None) -> None:
    """Refuse what a mixer cannot take, with one message for all mixers.

    Args:
        mixer: The mixer; its layout says how many axes there are and where the channels stand.
        x: Its input.
        dim: Channels C. None: any number.

    Raises:
        ValueError: Another number of axes or channels, or no floating-point numbers.

    Example:
        >>> import torch
        >>> from tokenry.mixers import PoolingMixer
        >>> check_input(PoolingMixer(), torch.zeros(2, 36, 8))
        Traceback (most recent call last):
            ...
        ValueError: PoolingMixer takes maps (B, C, H, W), got (2, 36, 8); for tokens ...
    """
    name, layout = type(mixer).__name__, cast("str", mixer.layout)
    axes, channels, takes, advice = TAKES[layout]
    if x.ndim != axes or (dim is not None and x.shape[channels] != dim):
        wanted = takes if dim is None else f"{takes} with C={dim}"
        raise ValueError(f"{name} takes {wanted}, got {tuple(x.shape)}; {advice}")
    if not x.is_floating_point():
        raise ValueError(f"{name} takes floating-point numbers, got {x.dtype}; convert with x.float()")


def convert_layout(
    x: Tensor, source: Layout | str, target: Layout | str, grid: tuple[int, int] | None = None
) -> Tensor:
    """Move the axes of ``x`` from one layout to another, as a view where strides allow.

    Args:
        x: Tokens in the layout ``source``.
        source: Its layout.
        target: The wanted layout.
        grid: (H, W); needed from NLC to a map. None: taken to be square.

    Raises:
        ValueError: N tokens do not fill the grid, or no grid is given and N is no square.

    Example:
        >>> import torch
        >>> convert_layout(torch.zeros(2, 8, 3, 5), "NCHW", "NLC").shape
        torch.Size([2, 15, 8])
    """
    source, target = Layout(source), Layout(target)
    if source == target:
        return x
    if source == Layout.NLC:
        tokens = x.shape[1]
        height, width = grid if grid is not None else (round(tokens**0.5),) * 2
        if height * width != tokens:
            given = "no grid was given and they are no square" if grid is None else f"the grid is {height}x{width}"
            raise ValueError(
                f"cannot lay {tokens} tokens out as a map: {given}; give grid=(H, W) with H * W = {tokens}"
            )
        x = x.unflatten(1, (height, width))  # (B, H, W, C)
    elif source == Layout.NCHW:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    if target == Layout.NLC:
        return x.flatten(1, 2)  # (B, N, C)
    return x.permute(0, 3, 1, 2) if target == Layout.NCHW else x


class InLayout(nn.Module):
    """A mixer called in another layout than its own.

    Args:
        mixer: The mixer.
        layout: Layout of this module's input and output.
        grid: (H, W) of the map behind NLC tokens. None: square.
    """

    def __init__(self, mixer: nn.Module, layout: Layout | str, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.mixer = mixer
        self.layout = Layout(layout)
        self.grid = grid

    @property
    def fixed_tokens(self) -> int | None:
        """That of the mixer."""
        return cast("int | None", getattr(self.mixer, "fixed_tokens", None))

    def forward(self, x: Tensor) -> Tensor:
        """Convert, mix, convert back."""
        own = layout_of(self.mixer)
        if self.layout == own:
            return self.mixer(x)
        grid = self.grid
        if grid is None and own == Layout.NLC:
            height, width = (x.shape[2], x.shape[3]) if self.layout == Layout.NCHW else (x.shape[1], x.shape[2])
            grid = (height, width)
        return convert_layout(self.mixer(convert_layout(x, self.layout, own, grid)), own, self.layout, grid)


def for_timm(mixer: str | MixerFactory, **its_own: Any) -> type[nn.Module]:
    """A class that timm's own ``MetaFormer(token_mixers=...)`` takes, for any mixer with any keywords.

    timm asks for a class (not a callable) that works on NCHW and is made with ``dim``, ``proj_drop``, ``device`` and
    ``dtype``.

    Args:
        mixer: Registered name, class or callable.
        **its_own: Keywords given to the mixer whenever it is made.

    Example:
        >>> from timm.models.metaformer import MetaFormer
        >>> net = MetaFormer(depths=(1, 1), dims=(8, 16), token_mixers=for_timm("sep_conv", kernel_size=3),
        ...                  res_scale_init_values=None)
    """
    factory = mixer_factory(mixer)

    class ForTimm(InLayout):
        def __init__(self, dim: int, **kwargs: Any) -> None:
            accepted = accepted_keywords(factory)
            given = kwargs if accepted is None else {k: v for k, v in kwargs.items() if k in accepted}
            super().__init__(factory(dim, **given, **its_own), Layout.NCHW)

    ForTimm.__name__ = ForTimm.__qualname__ = f"{getattr(factory, '__name__', 'Mixer')}ForTimm"
    return ForTimm
