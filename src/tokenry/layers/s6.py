"""S6: a selective scan with the maps that make its steps, inputs and outputs from the sequence itself.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.

    [t, B, C] = W_x u                       u: (E, L); t: (R, L), B and C: (N, L)
    y = selective_scan(u, W_t t, -exp(A_log), B, C, D, bias)            ``tokenry.kernels.selective_scan``

In K orders, every order has weights of its own; they stand one after the other along the first axis of each parameter, so
that one order alone has the names and shapes of a Mamba block: ``x_proj.weight (R + 2 N, E)``, ``dt_proj.weight (E, R)``,
``dt_proj.bias (E)``, ``A_log (E, N)``, ``D (E)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenry.kernels.selective_scan import selective_scan, selective_scan_step

__all__ = ["S6"]

MIN_STEP, MAX_STEP = 1e-3, 1e-1  # of the scan at the start (Mamba)


class S6(nn.Module):
    """A selective state space model over sequences.

    Args:
        inner: Channels E of the sequences.
        d_state: States N per channel. Default 16 (paper).
        dt_rank: Width R that the steps come from. Default ceil(E / 32), which is a sixteenth of Mamba's outer width.
        lines: Sequences scanned side by side, each with its own weights. Default 1.
        ways: 1: from the first position to the last. 2: also from the last to the first, with further weights.
        device: Torch device.
        dtype: Torch dtype. The scan computes in float32 (float64 for float64 input).

    Raises:
        ValueError: A size below 1, or another number of ways.

    Example:
        >>> S6(8, d_state=4)(torch.randn(2, 1, 8, 10)).shape
        torch.Size([2, 1, 8, 10])
    """

    def __init__(
        self,
        inner: int,
        d_state: int = 16,
        dt_rank: int | None = None,
        lines: int = 1,
        ways: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = -(-inner // 32) if dt_rank is None else dt_rank
        for name, value in {"inner": inner, "d_state": d_state, "dt_rank": rank, "lines": lines}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if ways not in (1, 2):
            raise ValueError(f"ways must be 1 or 2, got {ways}")
        self.inner, self.d_state, self.rank, self.lines, self.ways = inner, d_state, rank, lines, ways
        orders, dd = lines * ways, {"device": device, "dtype": dtype}
        self.x_proj = nn.Linear(inner, orders * (rank + 2 * d_state), bias=False, **dd)
        self.dt_proj = nn.Linear(rank, orders * inner, **dd)
        self.A_log = nn.Parameter(torch.empty(orders * inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(orders * inner, **dd))
        S6.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Mamba's starting weights: rates -1 to -N, steps spread evenly in the logarithm from 0.001 to 0.1, D of ones."""
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            step = torch.empty_like(self.dt_proj.bias, dtype=torch.float32)
            step.uniform_(math.log(MIN_STEP), math.log(MAX_STEP)).exp_()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus turns this into the step
            self.A_log.copy_(torch.arange(1.0, self.d_state + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def rates(self) -> Tensor:
        """The rates of decay, (K E, N), all negative, at least in float32."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def scan(self, u: Tensor, reverse: bool = False) -> Tensor:
        """Scan sequences.

        Args:
            u: (B, lines, E, L).
            reverse: For one way: from the last position to the first.

        Returns:
            (B, lines, E, L): where there are two ways, their sum.
        """
        rank, states, split = self.rank, self.d_state, (self.ways, self.lines, -1)
        weight = self.x_proj.weight.unflatten(0, split).transpose(0, 1).flatten(1, 2)  # (lines, ways (R + 2 N), E)
        made = (weight @ u).unflatten(2, (self.ways, -1)).transpose(1, 2)  # (B, ways, lines, R + 2 N, L)
        steps, enter, leave = made.split([rank, states, states], dim=3)
        delta = (self.dt_proj.weight.unflatten(0, split) @ steps).flatten(2, 3)  # (B, ways, lines E, L)
        rates, bias, skip = (t.chunk(self.ways) for t in (self.rates(), self.dt_proj.bias, self.D))
        sequences = u.flatten(1, 2)  # (B, lines E, L)
        outputs = [
            selective_scan(
                sequences, delta[:, way], rates[way], enter[:, way], leave[:, way], skip[way], bias[way],
                reverse=reverse if self.ways == 1 else way == 1,
            )
            for way in range(self.ways)
        ]  # fmt: skip
        return sum(outputs[1:], outputs[0]).unflatten(1, (self.lines, -1))

    def mean_step(self, u: Tensor) -> Tensor:
        """The steps that every position of (B, E, L) takes, averaged over channels and orders: (B, L).

        A long step lets a position overwrite the states, a short one passes it over.
        """
        made = (self.x_proj.weight @ u).unflatten(1, (self.lines * self.ways, -1))  # (B, K, R + 2 N, L)
        delta = self.dt_proj.weight.unflatten(0, (made.shape[1], -1)) @ made[:, :, : self.rank]  # (B, K, E, L)
        return nn.functional.softplus(delta.flatten(1, 2) + self.dt_proj.bias.unsqueeze(1)).mean(1)

    def scan_step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position of one sequence in one way: u (B, E) and state (B, E, N) -> y (B, E) and the next state."""
        steps, enter, leave = self.x_proj(u).split([self.rank, self.d_state, self.d_state], dim=1)
        delta = steps @ self.dt_proj.weight.T
        return selective_scan_step(state, u, delta, self.rates(), enter, leave, self.D, self.dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``scan``: (B, lines, E, L) -> (B, lines, E, L)."""
        return self.scan(x)
