"""Weighted averages of all earlier features, in place of residual connections.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888.

For layers l = 1 ... n of a token mixer with output T_l and a channel mixer with output C_l, and T_0 = C_0 = x:

    input of token mixer l    = sum_{i<l}  alpha_{l,i} T_i + sum_{i<l} beta_{l,i}  C_i
    input of channel mixer l  = sum_{i<=l} theta_{l,i} T_i + sum_{i<l} gamma_{l,i} C_i

The weights are learned scalars as they are: no softmax, and they need not add up to one. There are n (2 n + 3) of them. No
output is thrown away before the last layer, so the memory of n layers grows with n^2 in inference and not in training,
where it is kept anyway.

The equations end with C_n, which has nothing around it: what the last channel mixer drops is lost. With ``last_sum`` the result
is one more sum, the input that a token mixer n + 1 would get (2 n + 2 further weights, not in the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DenseAverage"]


class DenseAverage(nn.Module):
    """The learned weights of n layers, and the averages that they make.

    Parameters are ``alpha.{l-1}`` (l numbers), ``beta.{l-1}`` (l), ``theta.{l-1}`` (l + 1), ``gamma.{l-1}`` (l). The paper leaves
    their start open. Here it is a residual net: the input of every mixer is the sum of x and of all mixers' outputs so far,
    each once, with alpha_{l,0} = beta_{l,0} = theta_{l,0} = gamma_{l,0} = 1/2, as T_0 and C_0 are both x. Without ``last_sum``
    the last channel mixer has nothing around it. A layer without a channel mixer hands its sum on as C_l; that stands for all
    before it then.

    Args:
        num_layers: Layers n.
        mixed: Which layers have a channel mixer that is no identity. It only matters for the start. None: all.
        last_sum: End with a sum of all outputs, ``alpha.{n}`` and ``beta.{n}`` (n + 1 numbers each). False (paper): with C_n.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: No layer; lists of another length than a layer has earlier outputs.

    Example:
        >>> average = DenseAverage(2)
        >>> sum(p.numel() for p in average.parameters())
        14
        >>> x, half = torch.ones(1, 3), torch.nn.Linear(3, 3)
        >>> average(x, [half, torch.tanh], [torch.relu, torch.sin]).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        num_layers: int,
        mixed: Sequence[bool] | None = None,
        last_sum: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.num_layers, self.last_sum = num_layers, last_sum
        self.mixed = [True] * num_layers if mixed is None else list(mixed)
        if len(self.mixed) != num_layers:
            raise ValueError(f"mixed needs one entry for each of {num_layers} layers, got {len(self.mixed)}")

        def weights(first: int, last: int) -> nn.ParameterList:
            sizes = range(first, last + 1)
            return nn.ParameterList(nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for size in sizes)

        sums = num_layers + last_sum
        self.alpha, self.beta = weights(1, sums), weights(1, sums)
        self.theta, self.gamma = weights(2, num_layers + 1), weights(1, num_layers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A residual net."""
        whole = 0  # C_whole is all that came before it
        for layer in range(len(self.alpha)):
            inputs = [(self.alpha, self.beta)]  # of the token mixer, or the last sum
            if layer < self.num_layers:
                inputs.append((self.theta, self.gamma))
            for tokens, channels in inputs:
                for weight, first in ((tokens[layer], whole + 1), (channels[layer], whole)):
                    weight[:first] = 0.0
                    weight[first:] = 1.0
                if whole == 0:
                    tokens[layer][0] = channels[layer][0] = 0.5
            if layer < self.num_layers and not self.mixed[layer]:
                whole = layer + 1

    def token_input(self, layer: int, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        """Input of token mixer ``layer`` (from 1) from ``tokens`` T_0 ... T_{l-1} and ``channels`` C_0 ... C_{l-1}.

        Layer n + 1 is the last sum, where there is one.
        """
        self._check(layer, len(self.alpha), tokens, channels, layer, layer)
        return _weighted(self.alpha[layer - 1], tokens) + _weighted(self.beta[layer - 1], channels)

    def channel_input(self, layer: int, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        """Input of channel mixer ``layer`` (from 1) from ``tokens`` T_0 ... T_l and ``channels`` C_0 ... C_{l-1}."""
        self._check(layer, self.num_layers, tokens, channels, layer + 1, layer)
        return _weighted(self.theta[layer - 1], tokens) + _weighted(self.gamma[layer - 1], channels)

    def _check(
        self, layer: int, layers: int, tokens: Sequence[Any], channels: Sequence[Any], most: int, less: int
    ) -> None:
        if not 1 <= layer <= layers:
            raise ValueError(f"layer must be from 1 to {layers}, got {layer}")
        if (len(tokens), len(channels)) != (most, less):
            raise ValueError(
                f"layer {layer} takes {most} outputs of token mixers and {less} of channel mixers, the input counted as "
                f"the first of both; got {len(tokens)} and {len(channels)}"
            )

    def forward(
        self,
        x: Tensor,
        token_mixers: Sequence[Callable[[Tensor], Tensor]],
        channel_mixers: Sequence[Callable[[Tensor], Tensor]],
    ) -> Tensor:
        """Run all layers: the last sum where there is one, or the last channel mixer's output.

        Args:
            x: The input of the first layer, of any shape that the mixers keep.
            token_mixers: One per layer.
            channel_mixers: One per layer; an identity where a layer has none.
        """
        if not len(token_mixers) == len(channel_mixers) == self.num_layers:
            raise ValueError(
                f"there are weights for {self.num_layers} layers, got {len(token_mixers)} token mixers and "
                f"{len(channel_mixers)} channel mixers"
            )
        tokens, channels = [x], [x]
        for layer, (mix_tokens, mix_channels) in enumerate(zip(token_mixers, channel_mixers, strict=True), start=1):
            tokens.append(mix_tokens(self.token_input(layer, tokens, channels)))
            channels.append(mix_channels(self.channel_input(layer, tokens, channels)))
        return self.token_input(self.num_layers + 1, tokens, channels) if self.last_sum else channels[-1]


def _weighted(weight: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The sum of the outputs, each times its number."""
    first, *rest = weight.unbind()
    total = outputs[0] * first
    for number, output in zip(rest, outputs[1:], strict=True):
        total = torch.addcmul(total, output, number)
    return total
