"""Take the bias of a prompt that ends inside a word out of ``generate``.

Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles",
ICLR 2025, arXiv:2410.09303.

A prompt x is taken back to the tokens that all its cover encodings share; from there the covers decide (t: tokens so far):

    P(next token v | t, x) = sum of P(c) over covers c of x that begin with t v / sum of P(c) over those that begin with t

Once a cover is complete, the prompt's last byte is written (and what sticks out behind it), and tokens are generated as
always. Sampled so, text follows the model's distribution given the prompt's bytes; nothing runs byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor

from tokenry.tokenization.byte_probabilities import ByteLM
from tokenry.tokenization.prefix_passes import Ids, shared_beginning

__all__ = ["BytePromptEnding"]


class BytePromptEnding(LogitsProcessor):
    """A logits processor that is exact in bytes until the prompt is written, and then steps aside.

    Args:
        lm: Model and tokenizer.
        prompts: One prompt or several: texts, or bytes, which may end inside a character.
        context: Token ids before each prompt; as in ``ByteLM.start``.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask`` ``(B, L)`` for ``generate``, padded on the left. They end where the
            covers part, so the prompt's last bytes are missing and come with the first new tokens.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model()
        >>> ending = BytePromptEnding(ByteLM(model, tokenizer), "import nump")
        >>> out = model.generate(**ending.inputs, logits_processor=[ending], max_new_tokens=4, do_sample=False)
        >>> tokenizer.decode(out[0], skip_special_tokens=True).startswith("import nump")
        True
    """

    def __init__(
        self, lm: ByteLM, prompts: str | bytes | Sequence[str | bytes], context: Sequence[int] | None = None
    ) -> None:
        prompts = [prompts] if isinstance(prompts, str | bytes) else list(prompts)
        if not prompts:
            raise ValueError("give at least one prompt")
        rows: list[Ids] = []
        self._choices: list[dict[Ids, tuple[Tensor, Tensor]]] = []
        device = lm.model.device
        for prompt in prompts:
            state = lm.start(prompt, context)
            covers = lm.covers(state)
            known = shared_beginning([cover.ids for cover in covers])
            rows.append((*state.passes.context, *covers[0].ids[:known]))
            joint: dict[Ids, dict[int, float]] = {}
            for cover in covers:
                for end in range(known, len(cover.ids)):
                    node = joint.setdefault(cover.ids[known:end], {})
                    token = cover.ids[end]
                    node[token] = float(np.logaddexp(node.get(token, -np.inf), cover.logprob))
            self._choices.append(
                {
                    path: (torch.tensor(list(node), device=device), torch.tensor(list(node.values()), device=device))
                    for path, node in joint.items()
                }
            )
        self._width = max(map(len, rows))
        self._deepest = max((len(path) for paths in self._choices for path in paths), default=-1)
        padding = lm.tokenizer.pad_token_id
        fill = rows[0][0] if padding is None else padding
        filled = [[fill] * (self._width - len(row)) + list(row) for row in rows]
        mask = [[0] * (self._width - len(row)) + [1] * len(row) for row in rows]
        self.inputs = {
            "input_ids": torch.tensor(filled, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Scores ``(B, V)`` of the next token; several rows per prompt (beams, several samples) are allowed.

        Raises:
            ValueError: ``input_ids`` do not begin with ``inputs``.
        """
        new = input_ids.shape[1] - self._width
        if new > self._deepest:
            return scores
        each, left = divmod(len(input_ids), len(self._choices))
        given = self.inputs["input_ids"].to(input_ids.device)
        if new < 0 or left or not torch.equal(input_ids[:, : self._width], given.repeat_interleave(each, 0)):
            raise ValueError(
                "generate was given other tokens than this processor's: call "
                "model.generate(**ending.inputs, logits_processor=[ending], ...)"
            )
        scores = scores.clone()
        for row, path in enumerate(input_ids[:, self._width :].tolist()):
            choice = self._choices[row // each].get(tuple(path))
            if choice is not None:
                tokens, joint = choice
                scores[row] = -torch.inf
                scores[row, tokens] = joint.log_softmax(-1).to(scores)
        return scores
