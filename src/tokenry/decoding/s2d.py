"""Sorted Speculative Decoding (S2D): one draft model of several depths, which leaves early where it is sure.

Kavehzadeh et al., "S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models", 2024,
arXiv:2407.01955. Sorted fine-tuning: Kavehzadeh et al., "Sorted LLaMA", 2023, arXiv:2309.08968.

    h_b                hidden state after b layers of the draft                                       (B, N, D)
    sub-model j        p_j = softmax(head(norm(h_{e_j})))     exits e_1 < ... < e_n = depth           (B, N, V)
    sorted fine-tuning loss = mean over j of CE(p_j, next token): all sub-models, one pass, one set of weights
    drafted token      argmax p_j of the first j with max p_j >= tau_j; the last exit always answers
    draft              K such tokens in a row (and, if wanted, the runners-up beside each), verified in one pass of the target

The targets are left as they are: one draft serves all that share its vocabulary, each with thresholds tau and a K of its
own (``tokenry.decoding.draft_tuning``). Keys and values of tokens that left early are caught up on when a later token
goes deeper (``tokenry.decoding.nested_exits``). The draft is deterministic, so sampled text keeps the target's
distribution too (``tokenry.decoding.engine.acceptance``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tokenry.assets import model_path
from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.decoder_blocks import decoder_blocks, learned_positions, output_size
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.row_reader import check_reader
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.strategy import DraftStrategy
from tokenry.decoding.nested_exits import ModelPart, NestedRun, with_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SortedDraft", "SortedSpeculative"]

EMBEDDED = "sorted-draft"


class SortedDraft(nn.Module):
    """A causal language model whose first layers are language models too.

    All exits share the embeddings, the final norm and the head. The wrapped ``model`` is a plain transformers model: it
    is saved and loaded as one, with the exits in its configuration (``sorted_exits``).

    Args:
        model: Llama-, GPT-2-, GPT-NeoX- or OPT-shaped causal language model (Qwen, Gemma, Mistral, Phi are Llama-shaped).
        exits: Numbers of layers after which a sub-model ends, ascending; the last is the model's depth.

    Attributes:
        model: The wrapped model.
        exits: As given.

    Raises:
        ValueError: The exits do not fit the model, or the model's layers are not where they are looked for.

    Example:
        >>> from tokenry.assets import load_model
        >>> small, _ = load_model("small")
        >>> draft = SortedDraft.from_model(small, layers=3, exits=(1, 2, 3))
        >>> [tuple(logits.shape) for logits in draft.exit_logits(torch.tensor([[5, 6]]))]
        [(1, 2, 4096), (1, 2, 4096), (1, 2, 4096)]
    """

    def __init__(self, model: PreTrainedModel, exits: Sequence[int]) -> None:
        super().__init__()
        self.exits = _checked_exits(exits, len(decoder_blocks(model)))
        self.model: Any = model
        model.config.sorted_exits = list(self.exits)

    @classmethod
    def from_model(cls, target: PreTrainedModel, *, layers: int, exits: Sequence[int]) -> SortedDraft:
        """Copy the embeddings, the first layers, the norm and the head of a target: the start for sorted fine-tuning.

        Args:
            target: Llama-, GPT-2-, GPT-NeoX- or OPT-shaped causal language model; shares nothing with the copy.
            layers: Depth of the draft.
            exits: Numbers of layers after which a sub-model ends, ascending; the last is ``layers``.
        """
        every = decoder_blocks(target)
        if not 1 <= layers <= len(every):
            raise ValueError(
                f"layers={layers}: {type(target).__name__} has {len(every)}; take 1 to {len(every)} of them"
            )
        _checked_exits(exits, layers)
        model = copy.deepcopy(with_layers(target, every[:layers]))
        config = model.config.get_text_config(decoder=True)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return cls(model, exits).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path = EMBEDDED, **kwargs: Any) -> SortedDraft:
        """Load a draft that ``save_pretrained`` wrote.

        Args:
            folder: A folder, a hub id, or ``"sorted-draft"``: the embedded one (1.07 M parameters, exits after 1, 2
                and 3 layers, for the embedded models' vocabulary).
            **kwargs: Handed to ``AutoModelForCausalLM.from_pretrained``. ``dtype`` is float32 unless given.

        Raises:
            ValueError: The model there says nothing of exits.
        """
        embedded = str(folder) == EMBEDDED
        where = str(model_path("draft").with_name(EMBEDDED) if embedded else folder)
        bars = logging.is_progress_bar_enabled()
        if embedded:  # loads in a blink: no bar
            logging.disable_progress_bar()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(where, **({"dtype": torch.float32} | kwargs))
        finally:
            if bars:
                logging.enable_progress_bar()
        exits = getattr(model.config, "sorted_exits", None)
        if exits is None:
            raise ValueError(
                f"the configuration in {where!r} has no sorted_exits: it is no sorted draft. Make one with "
                "SortedDraft(model, exits) or SortedDraft.from_model(target, layers=, exits=)"
            )
        return cls(model, exits).eval()

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the model as a transformers model, its exits in ``config.json``."""
        self.model.save_pretrained(folder, **kwargs)

    def exit_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Logits ``(B, N, V)`` of every sub-model, shallowest first, in one pass over the layers.

        Args:
            input_ids: ``(B, N)``.
            attention_mask: ``(B, N)``, zero at padding. None: no padding.
        """
        if self.training and getattr(self.model.config, "layerdrop", 0.0):
            raise ValueError("layerdrop leaves out layers at random, exits included: set it to 0 in the configuration")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        options = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": False}
        hidden, found = None, []
        for first, last in zip((0, *self.exits), self.exits, strict=False):
            logits, hidden = ModelPart(self.model, first, last)(input_ids, hidden, **options)
            found.append(logits)
        return found

    def sorted_loss(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Mean over the sub-models of their next-token cross-entropy.

        Args:
            input_ids: ``(B, N)``.
            attention_mask: ``(B, N)``, zero at padding. None: no padding.
            labels: ``(B, N)`` as in transformers: not shifted, -100 where nothing counts. None: the input, padding apart.
        """
        return self(input_ids, attention_mask, labels)["loss"]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What ``transformers.Trainer`` asks for: ``loss`` (the sorted one) and the deepest sub-model's ``logits``."""
        if labels is None:
            labels = input_ids
            if attention_mask is not None:  # padding is neither predicted nor predicts
                labels = labels.masked_fill((attention_mask * attention_mask.roll(1, -1)) == 0, -100)
        every = self.exit_logits(input_ids, attention_mask)
        losses = [
            self.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1]) for logits in every
        ]
        return {"loss": torch.stack(losses).mean(), "logits": every[-1]}


class SortedSpeculative(DraftStrategy):
    """Lossless speculative decoding with a draft that decides token by token how deep to go.

    In a batch every pass of the draft runs all rows, and as many parts as its least certain row asks for. A row that was
    sure before keeps its token, so each row drafts what it would draft alone.

    Args:
        draft: A sorted draft with the target's vocabulary.
        thresholds: For every exit but the last: the probability at which its token is taken. Above 1 the exit is left
            out, at 0 it always answers. None: 0.5 for all.
        draft_tokens: Tokens drafted per pass of the target. None: none, which is plain decoding (``tune`` says so where
            drafting does not pay).
        top_k: Candidates at each drafted position: the drafted token goes on, its ``top_k - 1`` runners-up are leaves
            beside it. Default 1, a chain.

    Attributes:
        stats: ``DecodingStats`` of the last call; ``draft_passes`` counts passes of parts.
        exits_used: Of the last call, per pass of the target with a draft, row and drafted token: layers that answered it,
            0 for rows that are done.
        draft_layers: Of the last call: layers that passes of the draft have run. Alone (a batch of one) each drafted
            token counts its exit: what earlier tokens lack is caught up on in the same passes.
        draft_layer_tokens: The same times the tokens of a pass, the prompt included.

    Raises:
        ValueError: The arguments do not fit the draft; see the message.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model()
        >>> inputs = tokenizer("It is the", return_tensors="pt", return_token_type_ids=False)
        >>> strategy = SortedSpeculative(SortedDraft.from_pretrained(), thresholds=(0.6, 0.5), draft_tokens=3)
        >>> out = model.generate(**inputs, custom_generate=strategy, max_new_tokens=12)
        >>> torch.equal(out, model.generate(**inputs, do_sample=False, max_new_tokens=12))
        True
    """

    def __init__(
        self,
        draft: SortedDraft,
        thresholds: Sequence[float] | None = None,
        draft_tokens: int | None = 5,
        top_k: int = 1,
    ) -> None:
        super().__init__()
        if thresholds is None:
            thresholds = (0.5,) * (len(draft.exits) - 1)
        self.draft = draft
        self.thresholds = checked_thresholds(thresholds, draft.exits)
        if draft_tokens is not None and draft_tokens < 1:
            raise ValueError(
                f"draft_tokens={draft_tokens}: draft at least 1 token per pass, or none at all with draft_tokens=None"
            )
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: each drafted position needs at least 1 candidate; 1 drafts a chain")
        self.draft_tokens = draft_tokens
        self.top_k = top_k
        # Exits that can answer: those above 1 never do, and behind one at 0 nothing is reached.
        self.tested: list[tuple[int, float]] = []
        for exit_, threshold in zip(draft.exits, (*self.thresholds, 0.0), strict=True):
            if threshold <= 1:
                self.tested.append((exit_, threshold))
            if threshold <= 0:
                break
        self.exits_used: list[list[list[int]]] = []
        self.draft_layers = self.draft_layer_tokens = 0
        self._trees: dict[int, DraftTree] = {}
        self._run: NestedRun | None = None

    @property
    def mean_draft_layers(self) -> float:
        """Layers that answered a drafted token, on average over the last call."""
        used = [exit_ for rows in self.exits_used for row in rows for exit_ in row if exit_]
        return sum(used) / len(used) if used else 0.0

    def begin(self, state: DecodingState) -> None:
        """Check the draft against the target and make an empty run of it."""
        self.exits_used, self.draft_layers, self.draft_layer_tokens = [], 0, 0
        self._positions: int | None = None
        if self.draft_tokens is None:
            return
        model = self.draft.model
        check_pair(model, state.model)
        start = None if state.start is None else (state.start - state.before).clamp_min(0)
        self._run = NestedRun(model, [exit_ for exit_, _ in self.tested], state.batch_size, start)
        self._positions = learned_positions(model.config)

    def propose(self, state: DecodingState) -> Proposal:
        """Draft token after token, each as deep as it needs."""
        run, count = self._run, min(self.draft_tokens or 0, state.remaining - 1)
        if self._positions is not None:  # behind the end of its table the draft has nothing to say
            count = min(count, self._positions - max(state.lengths) + 1)
        if run is None or count < 1:
            return Proposal.plain(state)
        lengths = list(state.lengths)
        run.reserve(max(lengths) + count)
        run.load(state.ids.to(run.device), lengths)
        drafted, used = [], []
        for step in range(count):
            tokens, exits = self._next(lengths, state.finished)
            drafted.append(tokens)  # (B, k)
            used.append(exits)
            if step < count - 1:
                run.append(tokens[:, 0], lengths)
                lengths = [n + 1 for n in lengths]
        self.exits_used.append([list(row) for row in zip(*used, strict=True)])
        tokens = torch.cat([state.root, *(found.to(state.device) for found in drafted)], 1)  # (B, 1 + K k)
        return Proposal(self._tree(count).to(state.device), tokens)

    def _next(self, lengths: Sequence[int], finished: Sequence[bool]) -> tuple[Tensor, list[int]]:
        """One drafted token and its runners-up ``(B, k)``, and the layers that answered each row."""
        run = self._checked_run
        used = [0 if done else self.tested[-1][0] for done in finished]
        waiting = [not done for done in finished]
        tokens = torch.zeros(len(waiting), self.top_k, dtype=torch.long, device=run.device)
        for part, (exit_, threshold) in enumerate(self.tested):
            logits = run.run(part, lengths).float()  # (B, V)
            best = logits.topk(self.top_k) if self.top_k > 1 else logits.max(-1, keepdim=True)
            if len(waiting) == 1:
                tokens = best.indices
            else:  # rows that were sure before keep theirs
                tokens = torch.where(torch.tensor(waiting, device=run.device)[:, None], best.indices, tokens)
            if threshold <= 0:  # always answers: nothing to ask, nothing to wait for
                break
            confidence = (best.values[:, 0] - logits.logsumexp(-1)).exp()
            for row, sure in enumerate((confidence >= threshold).tolist()):
                if waiting[row] and sure:
                    waiting[row], used[row] = False, exit_
            if not any(waiting):
                break
        return tokens, used

    def _tree(self, count: int) -> DraftTree:
        if count not in self._trees:
            paths = [[0] * depth + [rank] for depth in range(count) for rank in range(self.top_k)]
            self._trees[count] = DraftTree.from_paths(paths)
        return self._trees[count]

    def observe(self, state: DecodingState, proposal: Proposal, logits: Tensor, accepted: Accepted) -> None:
        """Forget what the draft has run of rejected tokens."""
        if proposal.tree.size == 1:
            return
        run = self._checked_run
        for row, nodes in enumerate(accepted.nodes):
            if state.finished[row]:  # never read again: let its slots look done, so that no pass waits for them
                for filled in run.filled:
                    filled[row] = state.lengths[row] - 1
                continue
            straight = sum(node == 1 + i * self.top_k for i, node in enumerate(nodes[1:]))
            run.keep(row, state.lengths[row] - len(nodes) + straight)

    def end(self, state: DecodingState) -> None:
        """Note what the draft has cost and let go of its cache."""
        if self._run is not None:
            self.draft_layers, self.draft_layer_tokens = self._run.layer_passes, self._run.layer_tokens
            state.stats.draft_passes = self._run.passes
            self._run = None

    @property
    def _checked_run(self) -> NestedRun:
        if self._run is None:
            raise RuntimeError("the strategy was used before begin()")
        return self._run


def _checked_exits(exits: Sequence[int], depth: int) -> tuple[int, ...]:
    found = tuple(int(e) for e in exits)
    if not found or found[0] < 1 or any(a >= b for a, b in pairwise(found)) or found[-1] != depth:
        raise ValueError(
            f"exits={found} must ascend from at least 1 to the depth of the draft, which is {depth}: for example "
            f"exits={tuple(sorted({max(1, depth // 3), max(1, 2 * depth // 3), depth}))}"
        )
    return found


def checked_thresholds(thresholds: Sequence[float], exits: Sequence[int]) -> tuple[float, ...]:
    """Thresholds for every exit but the last, or a ``ValueError``."""
    found = tuple(float(t) for t in thresholds)
    if len(found) != len(exits) - 1:
        raise ValueError(
            f"{len(found)} thresholds for exits {tuple(exits)}: give {len(exits) - 1}, one for each exit but the last, "
            "which always answers"
        )
    if any(not t >= 0 for t in found):
        raise ValueError(f"thresholds={found} are probabilities: 0 takes every token, above 1 leaves the exit out")
    return found


def check_pair(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Refuse a draft that cannot work for this target; warn of one that works badly."""
    sizes = [output_size(model) for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft's output has {sizes[0]} tokens, the target's {sizes[1]}: they must share one vocabulary. Make "
            "the draft from this target or a relative (SortedDraft.from_model); check_same_vocabulary compares ids"
        )
    check_reader(draft)
    for name in ("dtype", "device"):
        mine, theirs = getattr(draft, name), getattr(target, name)
        if mine != theirs:
            warnings.warn(
                f"the draft's {name} is {mine}, the target's {theirs}: the text stays right, but drafts are slower or "
                f"accepted less often; draft.to({theirs}) changes that",
                stacklevel=2,
            )
