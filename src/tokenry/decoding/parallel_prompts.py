"""Trained prompt embeddings with which a frozen model guesses several tokens ahead at once.

Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference", 2024,
arXiv:2405.18628.

    P               (m, H), the only parameters; P_j stands j places behind a token and predicts the one after its own
    teacher         p_j = the model's distribution after j tokens of its own greedy continuation
    loss            1/m sum_j 0.8^(j-1) KL(p_j || P_j's distribution), ordinary final norm and head, model frozen
    accuracy        acc[j, k] = how often the k-th guess of P_(j+1) is the token that the model writes there
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenry.decoding.engine.branches import Branches
from tokenry.decoding.prompt_tree import TOP_K
from tokenry.measure.whole_file import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ParallelPrompts"]

DISCOUNT = 0.8  # weight of a prompt token's loss against the one before it


class ParallelPrompts(nn.Module):
    """Trained prompt embeddings: the one parameter of the method, in PEFT's prompt-tuning file format.

    Args:
        start: The model to learn to predict ahead with (the embeddings then start as those of ``init_ids``), or the
            embeddings ``(m * ensemble, H)`` themselves.
        m: Prompt tokens: token j guesses j + 1 tokens ahead. Default 3 (paper). 0 is plain decoding.
        ensemble: Copies of each prompt token whose logits are averaged (the paper's ensemble prompts). Default 1; more
            copies mean wider passes.
        init_ids: Tokens whose embeddings P starts from, repeated as needed; the paper takes a sentence. Default:
            tokens spread over the vocabulary.

    Attributes:
        embeddings: ``(m * ensemble, H)``, copies of a token side by side.
        vocab_size: Tokens of the model they were made for; None if that is not known.
        accuracy: ``(m, 10)`` chance that the k-th guess of a token is right, once ``measure`` has run; None before.

    Raises:
        ValueError: The sizes do not fit or the embeddings are not floating point.

    Example:
        >>> from tokenry.assets import load_model
        >>> prompts = ParallelPrompts(load_model("draft")[0], m=3)
        >>> sum(p.numel() for p in prompts.parameters())
        384
    """

    def __init__(
        self,
        start: PreTrainedModel | Tensor,
        m: int = 3,
        *,
        ensemble: int = 1,
        init_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        if m < 0 or ensemble < 1:
            raise ValueError(f"m={m} prompt tokens and ensemble={ensemble} copies: m is 0 or more, ensemble 1 or more")
        given = start if isinstance(start, Tensor) else _embedding_matrix(start)
        if not given.is_floating_point():
            raise ValueError(
                f"prompt embeddings are trained and must be floating point, the model's are {given.dtype}: "
                "load the model without quantised embeddings"
            )
        if isinstance(start, Tensor):
            if given.ndim != 2 or given.shape[0] != m * ensemble:
                raise ValueError(
                    f"{m} prompt tokens of {ensemble} copies need embeddings ({m * ensemble}, hidden size), got "
                    f"{tuple(given.shape)}"
                )
        else:
            ids = torch.linspace(0, given.shape[0] - 1, m * ensemble).long() if init_ids is None else init_ids.flatten()
            given = given[ids.to(given.device).repeat(m * ensemble)[: m * ensemble]]
        self.m, self.ensemble = m, ensemble
        self.vocab_size = None if isinstance(start, Tensor) else _embedding_matrix(start).shape[0]
        self.embeddings = nn.Parameter(given.detach().clone().float())
        self.accuracy: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings, H."""
        return self.embeddings.shape[1]

    def check(self, model: PreTrainedModel, length: int) -> None:
        """Refuse a model that these embeddings were not made for, or texts that leave no room for them.

        Raises:
            ValueError: Says what does not fit.
        """
        matrix = _embedding_matrix(model)
        if matrix.shape[1] != self.hidden_size:
            raise ValueError(
                f"the prompt embeddings have width {self.hidden_size}, the model's token embeddings {matrix.shape[1]}: "
                "train prompts for this model (ParallelPrompts(model).fit)"
            )
        if self.vocab_size not in (None, matrix.shape[0]):
            raise ValueError(
                f"the prompt embeddings were made for a vocabulary of {self.vocab_size} tokens, the model has "
                f"{matrix.shape[0]}: train prompts for this model (ParallelPrompts(model).fit)"
            )
        if not matrix.is_floating_point():
            raise ValueError(f"the model's token embeddings are {matrix.dtype}; prompts need floating-point ones")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and length > limit - self.m:
            raise ValueError(
                f"{length} tokens and {self.m} prompt tokens behind them exceed the model's {limit} positions; give at "
                f"most {limit - self.m} tokens"
            )

    def logits(
        self, model: PreTrainedModel, ids: Tensor, cuts: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the prompt tokens predict behind the cuts of texts, and what the model does on its own greedy text.

        Args:
            model: In evaluation mode.
            ids: ``(B, N)``, left-padded.
            cuts: ``(K,)`` columns after which the prompt tokens are hung.
            mask: ``(B, N)``, 0 at padding.

        Returns:
            ``(B, K, m, V)`` logits of the prompt tokens, and of the model after 1 ... m greedy tokens (no gradient).
        """
        self.check(model, ids.shape[1])
        branches = Branches(model, ids, cuts, mask)
        own = branches.greedy(self.m)
        return branches.prompts(self.embeddings.view(self.m, self.ensemble, -1)), own

    def loss(self, model: PreTrainedModel, ids: Tensor, cuts: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of the prompt tokens' distributions from the model's own, ``1/m sum_j 0.8^(j-1) KL_j``.

        Args:
            model: In evaluation mode.
            ids: ``(B, N)``, left-padded.
            cuts: ``(K,)`` columns after which the prompt tokens are hung.
            mask: ``(B, N)``, 0 at padding.
        """
        guessed, own = self.logits(model, ids, cuts, mask)
        wide = torch.promote_types(own.dtype, torch.float32)
        log_p, log_q = own.to(wide).log_softmax(-1), guessed.to(wide).log_softmax(-1)
        distance = (log_p.exp() * (log_p - log_q)).sum(-1).mean((0, 1))  # (m,)
        return (distance * DISCOUNT ** torch.arange(self.m, device=distance.device)).mean()

    def fit(
        self,
        model: PreTrainedModel,
        data: Tensor | Sequence[Tensor],
        *,
        steps: int,
        batch_size: int = 16,
        cuts: int = 16,
        lr: float = 1e-2,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> list[float]:
        """Distil the model's own continuations into the prompt tokens; the model stays as it is.

        Args:
            model: The model to decode with later.
            data: Texts as token ids: ``(rows, N)`` or rows of different lengths. Best like what will be decoded.
            steps: Optimiser steps.
            batch_size: Texts per step. Default 16 (paper).
            cuts: Random places per text after which the prompts are trained; the paper has one, but all share the pass
                over the text.
            lr: Learning rate of AdamW, falling to zero along a cosine. Default 1e-2 (paper); no weight decay.
            seed: Which texts and cuts come when.
            checkpoint: File to save the run to every 50 steps, and to go on from if it is there.

        Returns:
            The loss of every step.

        Raises:
            ValueError: There is nothing to train, no text, or the checkpoint is of prompts of another shape.
        """
        rows = self._rows(model, data)
        optimizer = torch.optim.AdamW([self.embeddings], lr=lr, weight_decay=0.0)
        losses: list[float] = []
        file = Path(checkpoint) if checkpoint is not None else None
        if file is not None and file.exists():
            stored = torch.load(file, weights_only=True)
            if stored["embeddings"].shape != self.embeddings.shape:
                raise ValueError(
                    f"{file} holds a run with embeddings {tuple(stored['embeddings'].shape)}, these are "
                    f"{tuple(self.embeddings.shape)}; name another checkpoint file"
                )
            self.embeddings.data.copy_(stored["embeddings"])
            optimizer.load_state_dict(stored["optimizer"])
            losses = stored["losses"]
        was_training = model.training
        model.eval()
        try:
            for step in range(len(losses), steps):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
                loss = self.loss(model, *_batch([rows[i] for i in chosen], cuts, generator, self.embeddings.device))
                (self.embeddings.grad,) = torch.autograd.grad(loss, [self.embeddings])  # and of nothing else
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.step()
                losses.append(loss.item())
                if file is not None and (len(losses) % 50 == 0 or len(losses) == steps):
                    state = {"embeddings": self.embeddings.data, "optimizer": optimizer.state_dict(), "losses": losses}
                    with whole_file(file) as unfinished:
                        torch.save(state, unfinished)
        finally:
            model.train(was_training)
        self.accuracy = None  # of other embeddings
        return losses

    @torch.no_grad()
    def measure(
        self,
        model: PreTrainedModel,
        data: Tensor | Sequence[Tensor],
        *,
        batch_size: int = 16,
        cuts: int = 16,
        seed: int = 0,
    ) -> Tensor:
        """Measure how often the k-th guess of each prompt token is the model's own token, and remember the table.

        Args:
            model: The model to decode with.
            data: Texts like those that will be decoded, best with continuations of the model's own.
            batch_size: Texts per pass.
            cuts: Random places per text.
            seed: Which places.

        Returns:
            ``(m, 10)``, the table that ``sparse_trees`` takes.
        """
        rows, top = self._rows(model, data), min(TOP_K, _embedding_matrix(model).shape[0])
        generator = torch.Generator().manual_seed(seed)
        right, seen = torch.zeros(self.m, top, dtype=torch.float64), 0
        was_training = model.training
        model.eval()
        try:
            for first in range(0, len(rows), batch_size):
                batch = _batch(rows[first : first + batch_size], cuts, generator, self.embeddings.device)
                guessed, own = self.logits(model, *batch)
                hits = guessed.topk(top, -1).indices == own.argmax(-1, keepdim=True)  # (B, K, m, top)
                right += hits.sum((0, 1)).cpu()
                seen += hits.shape[0] * hits.shape[1]
        finally:
            model.train(was_training)
        self.accuracy = (right / seen).float()
        return self.accuracy

    def _rows(self, model: PreTrainedModel, data: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The texts, checked."""
        rows = [torch.as_tensor(row) for row in data]
        if self.m == 0:
            raise ValueError("m=0: there are no prompt tokens; make ParallelPrompts with m of at least 1")
        if not rows or any(row.ndim != 1 or not len(row) for row in rows):
            raise ValueError(
                "the texts are token ids, (rows, N) or a list of (N,) tensors with at least one token each; got shapes "
                f"{[tuple(row.shape) for row in rows[:4]]}"
            )
        self.check(model, max(map(len, rows)))
        return rows

    def save_pretrained(self, folder: str | Path, base_model: str = "") -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, and ``acceptance.json`` if measured.

        Args:
            folder: Made if missing.
            base_model: Name of the model, for the reader of the files.
        """
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        tensors = {"prompt_embeddings": self.embeddings.detach().cpu().contiguous()}
        save_file(tensors, str(where / "adapter_model.safetensors"), metadata={"format": "pt"})
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_virtual_tokens": self.m * self.ensemble,
            "token_dim": self.hidden_size,
            "num_special_tokens": self.m,
            "virtual_tokens_per_special_token": self.ensemble,
            "vocab_size": self.vocab_size,
        }
        (where / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        if self.accuracy is not None:
            table = [[round(p, 5) for p in row] for row in self.accuracy.tolist()]
            (where / "acceptance.json").write_text(json.dumps({"accuracy": table}) + "\n", "utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ParallelPrompts:
        """Read prompts that ``save_pretrained`` or PEFT's prompt tuning wrote.

        Raises:
            ValueError: The folder does not hold such files.
        """
        where = Path(folder)
        try:
            config = json.loads((where / "adapter_config.json").read_text("utf-8"))
            safe, pickled = where / "adapter_model.safetensors", where / "adapter_model.bin"
            tensors = load_file(str(safe)) if safe.exists() else torch.load(pickled, "cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ValueError(
                f"{where} holds no prompt embeddings: adapter_config.json and adapter_model.safetensors (or .bin) are "
                f"needed, {Path(error.filename).name} is missing"
            ) from error
        names = ("prompt_embeddings", "prompt_encoder.default.embedding.weight")
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None or config.get("peft_type") != "PROMPT_TUNING":
            raise ValueError(
                f"{where} holds peft_type {config.get('peft_type')!r} with tensors {sorted(tensors)}; prompts are of "
                f"type 'PROMPT_TUNING' with a tensor named {names[0]!r}"
            )
        copies = config.get("virtual_tokens_per_special_token", 1)
        prompts = cls(found, config.get("num_special_tokens", len(found) // copies), ensemble=copies)
        prompts.vocab_size = config.get("vocab_size")
        if (where / "acceptance.json").exists():
            table = json.loads((where / "acceptance.json").read_text("utf-8"))["accuracy"]
            prompts.accuracy = torch.tensor(table)
        return prompts


def _embedding_matrix(model: Any) -> Tensor:
    return model.get_input_embeddings().weight


def _batch(
    rows: Iterable[Tensor], cuts: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Left-padded texts ``(B, N)``, random cuts ``(K,)`` behind all padding, and the mask if there is padding."""
    rows = list(rows)
    width, shortest = max(map(len, rows)), min(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    places = torch.randperm(shortest, generator=generator)[:cuts].sort().values + width - shortest
    return ids.to(device), places.to(device), None if width == shortest else mask.to(device)
