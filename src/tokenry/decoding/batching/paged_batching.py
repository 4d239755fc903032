"""BatchLLM's order and admission for ``model.generate_batch``, the paged continuous batching of transformers.

    order       the plan's, in place of the order of arrival
    prefix      one member of a group first; the others when its prompt is in the cache, so that they find it there
    admission   Σ_running pages(prompt + new tokens) <= pages of the cache: nobody has to be thrown out later

Pages are shared whole: with pages of 256 tokens, the library's default, a prefix of 200 is not shared at all. A smaller
``page_size`` shares more.
"""

from __future__ import annotations

import copy
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from tokenry.decoding.batching.prefix_groups import BatchPlan, as_tokens

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

__all__ = ["PlannedScheduler", "planned_scheduler"]


class PlannedScheduler(FIFOScheduler):
    """Starts requests by a plan. ``planned_scheduler`` makes a subclass that knows it.

    Attributes:
        place: Prompt to its place in the plan and the number of its group (-1: it shares no whole page).
        page_size: Tokens per page of the cache.
    """

    place: dict[tuple[int, ...], tuple[int, int]]
    page_size: int

    def add_waiting_request(self, state: RequestState) -> None:
        """Put a request where the plan has it."""
        super().add_waiting_request(state)
        order = list(self.waiting_requests_order)
        insort(order, order.pop(), key=lambda request: self._place(self.waiting_requests[request])[0])
        self.waiting_requests_order = deque(order)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """As the library's, with requests that have to wait hidden from it."""
        order, started = list(self.waiting_requests_order), self._may_start()
        self.waiting_requests_order = deque(order[:started])
        try:
            return super().schedule_batch(token_budget, cache_budget)
        finally:
            self.waiting_requests_order.extend(order[started:])

    def _place(self, state: RequestState) -> tuple[int, int]:
        return self.place.get(tuple(state.initial_tokens), (len(self.place), -1))

    def _pages(self, state: RequestState) -> int:
        return -(-(len(state.initial_tokens) + (state.max_new_tokens or 0)) // self.page_size)

    def _may_start(self) -> int:
        """How many of the waiting requests may start now."""
        running = list(self.active_requests.values())
        free = self.cache.num_blocks - sum(map(self._pages, running))
        leading = {self._place(state)[1] for state in running if state.status != RequestStatus.DECODING} - {-1}
        for number, request in enumerate(self.waiting_requests_order):
            state = self.waiting_requests[request]
            group = self._place(state)[1]
            free -= self._pages(state)
            if group in leading or (free < 0 and (number or running)):
                return number
            leading |= {group} - {-1}
        return len(self.waiting_requests_order)


@contextmanager
def planned_scheduler(
    requests: Sequence[Sequence[int]], plan: BatchPlan, config: ContinuousBatchingConfig
) -> Iterator[ContinuousBatchingConfig]:
    """Have ``generate_batch`` run requests by a plan.

    Args:
        requests: Token ids of every prompt.
        plan: Of these requests, from ``plan_batch``.
        config: Of the continuous batching.

    Yields:
        A copy of ``config`` that names the scheduler; valid inside.

    Example:
        >>> from tokenry.decoding import plan_batch
        >>> from transformers.generation.configuration_utils import ContinuousBatchingConfig
        >>> prompts = [[1, 2, 3], [1, 2, 4]]
        >>> with planned_scheduler(prompts, plan_batch(prompts, 8), ContinuousBatchingConfig(page_size=2)) as config:
        ...     config.scheduler_type.startswith("batchllm")
        True
    """
    if len(requests) != len(plan.prompt_tokens):
        raise ValueError(f"the plan is of {len(plan.prompt_tokens)} requests, got {len(requests)}")
    place: dict[tuple[int, ...], tuple[int, int]] = {}
    for number, group in enumerate(plan.groups):
        shares = len(group.prefix) >= config.page_size
        for request in group.members:
            place.setdefault(as_tokens(requests[request], request), (len(place), number if shares else -1))
    planned = type("PlannedScheduler", (PlannedScheduler,), {"place": place, "page_size": config.page_size})
    named = copy.copy(config)
    named.scheduler_type = f"batchllm-{id(planned)}"
    SCHEDULER_MAPPING[named.scheduler_type] = planned
    try:
        yield named
    finally:
        del SCHEDULER_MAPPING[named.scheduler_type]
