"""Cut Cross-Entropy inside a transformers causal language model.

While ``labels`` are given, the model's head is not run: the hidden states that it would have been given go into
``linear_cross_entropy`` together with the head's weight, and the output carries ``loss`` and ``logits=None``. This
holds for every architecture whose head is one linear layer, called once, followed by nothing but a factor or a softcap.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.training.cce import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PatchedModel", "patch_model"]

FIXED = ("ignore_index", "reduction", "shift", "return_lse", "softcap", "vocab_parallel")


class PatchedModel:
    """What ``patch_model`` returns: already in force, a context manager that takes it off again at its end."""

    def __init__(self, model: PreTrainedModel, train_only: bool, settings: dict[str, Any]) -> None:
        self.model = model
        self._head: nn.Linear = model.get_output_embeddings()  # type: ignore[assignment]
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._train_only, self._settings = train_only, settings
        self._factor: float | None = None  # what the model multiplies its logits with; measured at the first call
        self._own = model.__dict__.get("forward")  # a forward already set on the instance, if any
        self._original = model.forward

        @functools.wraps(self._original)  # the Trainer reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        model.forward = forward  # type: ignore[method-assign]
        model._cce_patch = self  # type: ignore[assignment]

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the model its own ``forward`` back. A second call does nothing."""
        if self.model.__dict__.pop("_cce_patch", None) is None:
            return
        if self._own is None:
            del self.model.forward
        else:
            self.model.forward = self._own  # type: ignore[method-assign]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        labels: Any = kwargs.get("labels")
        shifted: Any = kwargs.get("shift_labels")
        if (labels is None and shifted is None) or (self._train_only and not self.model.training):
            return self._original(*args, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        items = kwargs.pop("num_items_in_batch", None)
        ignore = kwargs.pop("ignore_index", -100)
        kwargs.update(labels=None, return_dict=True)
        kwargs.pop("shift_labels", None)
        hidden, output = self._without_head(args, kwargs)
        factor = 1.0 if self._factor is None else self._factor
        kept = kwargs.get("logits_to_keep", 0)
        if shifted is None and _keeps_all(kept):
            wanted, shift = labels, 1
        else:  # the label that belongs to each hidden state that was kept
            wanted, shift = F.pad(labels, (0, 1), value=ignore)[..., 1:] if shifted is None else shifted, 0
            if not _keeps_all(kept):
                wanted = wanted[:, slice(-kept, None) if isinstance(kept, int) else kept]
        loss: Any = linear_cross_entropy(
            hidden if factor == 1.0 else hidden * factor,
            self._head.weight,
            wanted.to(hidden.device),
            None if self._head.bias is None else self._head.bias * factor,
            ignore_index=ignore,
            softcap=self._softcap,
            reduction="mean" if items is None else "sum",
            shift=shift,
            **self._settings,
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        output = type(output)(**{**output, "loss": loss, "logits": None})
        wants_dict = self.model.config.return_dict if as_dict is None else as_dict
        return output if wants_dict else output.to_tuple()

    def _without_head(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run the model with a head that keeps its input and returns two probe values a token."""
        caught: list[Tensor] = []
        probe = torch.tensor([1.0, -2.0])

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return probe.to(hidden).expand(*hidden.shape[:-1], 2)

        had = self._head.__dict__.get("forward")
        self._head.forward = catch  # type: ignore[method-assign]
        try:
            output = self._original(*args, **kwargs)
        finally:
            if had is None:
                del self._head.forward
            else:
                self._head.forward = had
        if len(caught) != 1:
            raise ValueError(
                f"{type(self.model).__name__} called its head {len(caught)} times instead of once; cce cannot stand in"
            )
        if self._factor is None:
            self._factor = self._measured_factor(output.logits.reshape(-1, 2)[0].float().cpu(), probe)
        return caught[0], output

    def _measured_factor(self, seen: Tensor, probe: Tensor) -> float:
        """What happens to logits after the head: a factor, then the softcap. Anything else is refused."""
        if self._softcap is not None:
            seen = self._softcap * torch.atanh(seen / self._softcap)
        factor = (seen / probe).tolist()
        if not abs(factor[0] - factor[1]) <= 2e-2 * abs(factor[0]):  # half-precision models round
            raise ValueError(
                f"{type(self.model).__name__} does more with its logits than a factor and final_logit_softcapping "
                f"(1 and -2 became {seen.tolist()}); use linear_cross_entropy in its forward by hand"
            )
        return 1.0 if abs(factor[0] - 1) < 2e-2 else factor[0]


def _keeps_all(kept: int | Tensor) -> bool:
    return isinstance(kept, int) and kept == 0


def patch_model(model: PreTrainedModel, *, train_only: bool = False, **settings: Any) -> PatchedModel:
    """Let a transformers causal language model compute its loss without logits.

    The change is on this one object and is taken off by leaving the ``with`` block or by ``.restore()``. Without
    labels the model runs as ever. ``num_items_in_batch`` (which the Trainer hands over for gradient accumulation),
    ``logits_to_keep``, ``shift_labels``, Gemma's softcap, a head with a bias and tied weights are honoured.

    Args:
        model: Any causal language model whose head is one ``nn.Linear``.
        train_only: Only while ``model.training``; evaluation then returns logits as before.
        **settings: ``impl``, ``filter_eps``, ``accum_e_fp32``, ... of ``linear_cross_entropy``.

    Returns:
        A context manager whose ``as`` value is the model. It is in force at once, with or without ``with``.

    Raises:
        ValueError: The model has no linear head, is patched already, or a setting is unknown.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **config))
        >>> ids = torch.arange(12)[None]
        >>> usual = model(ids, labels=ids).loss
        >>> with patch_model(model):
        ...     torch.allclose(model(ids, labels=ids).loss, usual)
        True
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear head (get_output_embeddings() is {type(head).__name__}); "
            "give a ...ForCausalLM model whose head is not quantized or wrapped"
        )
    if "_cce_patch" in model.__dict__:
        raise ValueError("this model is patched already; leave the other `with` block or call .restore() first")
    known = set(linear_cross_entropy.__kwdefaults__ or {}) - set(FIXED)
    if set(settings) - known:
        wrong = ", ".join(sorted(set(settings) - known))
        raise ValueError(f"cannot set {wrong} on a model; settings: {', '.join(sorted(known))}")
    return PatchedModel(model, train_only, settings)
