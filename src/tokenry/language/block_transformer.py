"""Block Transformer: a language model that attends between blocks of tokens and writes the tokens within a block cheaply.

Ho et al., "Block Transformer: Global-to-Local Language Modeling for Fast Inference", NeurIPS 2024, arXiv:2406.02657.

    e_i = [E_b(x_i1) ; ... ; E_b(x_iB)]                    block embedding                 (N, n, D), E_b: V x D/B
    h_i = BlockDecoder(e_1 ... e_i)                        global: causal over blocks      (N, n, D)
    p_i = W h_i + b                                        r prefix vectors                (N, n, r, D_t)
    x_(i+1) ~ Head(TokenDecoder(p_i, E(x_(i+1)1) ...))     local: causal inside one block  (N, n, B, V)

Both decoders are GPT-NeoX stacks. Only the block decoder remembers the past, one position for B tokens; the token
decoder sees r + B - 1 positions and forgets them when the block is full. A block is written from the state of the block
before it, so the first block of a sequence is never predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenry.language.block_generation import generate_blocks
from tokenry.language.block_transformer_cache import BlockTransformerCache
from tokenry.language.block_transformer_config import BlockTransformerConfig
from tokenry.layers.cache_argument import CACHE

__all__ = ["BlockTransformerForCausalLM", "loss_by_position"]


class BlockEmbedder(nn.Module):
    """One vector per block: its tokens' embeddings side by side, or a linear map of them."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.block_length = config.block_length
        width = config.embedding_size or config.hidden_size // config.block_length
        self.table = nn.Embedding(config.vocab_size, width)
        mixed = config.embedding_size is not None
        self.mix = nn.Linear(width * config.block_length, config.hidden_size) if mixed else nn.Identity()

    def forward(self, blocks: Tensor) -> Tensor:  # (N, n, B) -> (N, n, D)
        if blocks.shape[-1] != self.block_length:
            raise ValueError(
                f"config.block_length is {blocks.shape[-1]}, but the weights are made for blocks of {self.block_length} "
                "tokens; a model's block length is fixed: set it back"
            )
        return self.mix(self.table(blocks).flatten(2))


class BlockTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """Block Transformer with the interface of any causal language model of ``transformers``.

    ``logits[:, t]`` predicts token t + 1. The first B - 1 of them are zero: nothing stands before the first block. Blocks
    begin at position 0; ``generate`` puts pad tokens in front of the prompt so that a block ends where the prompt
    ends, which is how the authors do it.

    Importing this module makes ``AutoConfig`` and ``AutoModelForCausalLM`` know ``"block_transformer"``.

    Args:
        config: Its configuration.

    Example:
        >>> config = BlockTransformerConfig(vocab_size=50, hidden_size=32, block_layers=1, token_layers=1)
        >>> model = BlockTransformerForCausalLM(config).eval()
        >>> ids = torch.arange(10)[None]
        >>> model(ids).logits.shape
        torch.Size([1, 10, 50])
        >>> model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 16])
    """

    config_class = BlockTransformerConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["GPTNeoXLayer", "BlockEmbedder"]  # noqa: RUF012 - the base class declares it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.embedder = BlockEmbedder(config)
        self.block_decoder = GPTNeoXModel(config.block_decoder())
        self.block_decoder.set_input_embeddings(None)  # it is fed block embeddings
        token_width: Any = config.token_hidden_size
        self.expansion = nn.Linear(config.hidden_size, config.prefix_length * token_width)
        self.token_decoder = GPTNeoXModel(config.token_decoder())
        self.lm_head = nn.Linear(token_width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and (module is self.expansion or module is self.embedder.mix):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token decoder's table."""
        return self.token_decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token decoder's table (the block embedder has another)."""
        self.token_decoder.set_input_embeddings(value)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        table: Any = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.embedder.table = self._get_resized_embeddings(
            self.embedder.table, table.num_embeddings, mean_resizing=mean_resizing
        )
        return table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: BlockTransformerCache | None = None,
        past_key_values: BlockTransformerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token at every position.

        Args:
            input_ids: ``(N, T)``; with a cache only the tokens that it does not hold.
            attention_mask: ``(N, T)``, with a cache ``(N, cached + T)``: 0 for padding. Blocks of padding alone are not
                attended to; pad tokens inside a block are read like others, as in the authors' training.
            labels: ``(N, T)``, not shifted; -100, padding and the first block are left out of the loss.
            cache: What an earlier call returned; it is extended in place.
            past_key_values: The same, by its name before ``transformers`` 5.24.
            use_cache: Return a cache. None: only if one was given.
            logits_to_keep: Compute only the last so many logits, or those at these places; 0: all. With a cache and 1
                the token decoder runs on the last block alone.
            num_items_in_batch: Divide the summed loss by this instead of by the number of labels.
            return_dict: False returns a tuple.

        Raises:
            ValueError: Shapes do not fit, there is nothing to predict, or labels come without a mask.
        """
        cache = cache if cache is not None else past_key_values
        self._check(input_ids, attention_mask, labels, cache)
        if cache is None and use_cache:
            cache = BlockTransformerCache(self.config.block_length)
        if cache is None:
            hidden = self._hidden(input_ids, attention_mask)
        else:
            last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
            hidden = self._hidden_with_cache(input_ids, attention_mask, cache, last_only)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])  # (N, T, V)
        loss = None
        if labels is not None and attention_mask is not None:
            ignored = attention_mask == 0
            ignored[:, : self.config.block_length] = True
            loss = self.loss_function(
                logits,
                labels.masked_fill(ignored, -100),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        fields: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: cache}
        output = CausalLMOutputWithPast(**fields)
        return output if return_dict is not False else output.to_tuple()

    def block_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States ``(N, T // B, D)`` of the full blocks of ``input_ids`` ``(N, T)``, each of which writes the next block."""
        whole = input_ids.shape[1] // self.config.block_length * self.config.block_length
        return self._states(input_ids[:, :whole], attention_mask, None)

    def _states(self, tokens: Tensor, mask: Tensor | None, cache: BlockTransformerCache | None) -> Tensor:
        """Run the block decoder over further full blocks.

        ``tokens`` ``(N, k * B)``; ``mask`` covers all tokens from the first cached one on.
        """
        length = self.config.block_length
        blocks = tokens.view(tokens.shape[0], -1, length)  # (N, k, B)
        start = 0 if cache is None else cache.blocks.get_seq_length()
        end = start + blocks.shape[1]
        block_mask = None if cache is None else cache.block_mask
        if mask is not None:
            block_mask = mask[:, : end * length].view(-1, end, length).any(-1)  # (N, start + k)
        elif block_mask is not None:
            block_mask = F.pad(block_mask, (0, end - start), value=True)
        if block_mask is None:
            positions = torch.arange(start, end, device=tokens.device)[None]
        else:
            positions = (block_mask.cumsum(-1) - 1).clamp_min(0)[:, start:]  # padding in front shifts nothing
        past = {} if cache is None else {CACHE: cache.blocks}
        states = self.block_decoder(
            inputs_embeds=self.embedder(blocks),
            attention_mask=block_mask,
            position_ids=positions,
            use_cache=cache is not None,
            **past,
        ).last_hidden_state
        if cache is not None:
            cache.block_mask = block_mask
        return states  # (N, k, D)

    def _expand(self, states: Tensor) -> Tensor:  # (..., D) -> (..., r, D_t)
        return self.expansion(states).unflatten(-1, (self.config.prefix_length, -1))

    def _block_inputs(self, prefixes: Tensor, tokens: Tensor) -> Tensor:
        """What the token decoder reads: prefixes ``(M, r, D_t)`` and the first q tokens ``(M, q)`` of their block."""
        if self.config.token_strategy == "summation":
            before = F.pad(tokens, (1, 0), value=self._begin)
            return prefixes[:, : before.shape[1]] + self.token_decoder.embed_in(before)  # (M, 1 + q, D_t)
        return torch.cat([prefixes, self.token_decoder.embed_in(tokens)], 1)  # (M, r + q, D_t)

    @property
    def _begin(self) -> int:
        return self.config.bos_token_id if self.config.bos_token_id is not None else self.config.padding

    def _decode(self, prefixes: Tensor, following: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Run the token decoder on whole blocks, each by itself.

        Args:
            prefixes: ``(N, m, r, D_t)``.
            following: ``(N, at most m * B)`` the tokens of the blocks that they write.
            wanted: ``(N, at most m * B)``: blocks without a wanted token are left out. None: all.

        Returns:
            ``(N, m * B, D_t)``: what predicts each of these tokens.
        """
        rows, blocks, length = *prefixes.shape[:2], self.config.block_length
        whole = blocks * length
        tokens = F.pad(following, (0, whole - following.shape[1]), value=self.config.padding)
        tokens = tokens.reshape(-1, length)[:, :-1]  # (N * m, B - 1)
        prefixes = prefixes.flatten(0, 1)
        if wanted is None:
            hidden = self._decode_blocks(prefixes, tokens)
        else:
            chosen = F.pad(wanted, (0, whole - wanted.shape[1])).view(-1, length).any(-1).nonzero()[:, 0]
            found = self._decode_blocks(prefixes[chosen], tokens[chosen])
            hidden = found.new_zeros(rows * blocks, length, found.shape[-1]).index_copy(0, chosen, found)
        return hidden.reshape(rows, whole, -1)

    def _decode_blocks(self, prefixes: Tensor, tokens: Tensor) -> Tensor:  # -> (M, B, D_t)
        inputs = self._block_inputs(prefixes, tokens)
        hidden = self.token_decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return hidden[:, -self.config.block_length :]

    def _hidden(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """``(N, T, D_t)`` of a sequence from its beginning; zero where nothing is predicted."""
        length = self.config.block_length
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        prefixes = self._expand(self.block_states(input_ids, mask))  # (N, n, r, D_t)
        wanted = None
        if mask is not None and not torch.compiler.is_compiling():
            wanted = F.pad(mask[:, length:].bool(), (0, 1), value=True)  # the token behind the last one counts
        count = input_ids.shape[1] - length + 1
        hidden = self._decode(prefixes, input_ids[:, length:], wanted)[:, :count]
        return F.pad(hidden, (0, 0, length - 1, 0))

    def _hidden_with_cache(
        self, input_ids: Tensor, mask: Tensor | None, cache: BlockTransformerCache, last_only: bool
    ) -> Tensor:
        """``(N, T, D_t)`` of the new tokens, or ``(N, 1, D_t)`` of the last."""
        count = input_ids.shape[1]
        prefixes = cache.prefixes
        tokens = input_ids if cache.tokens is None else torch.cat([cache.tokens, input_ids], 1)
        if mask is not None and cache.fill:
            mask = F.pad(mask, (cache.fill, 0))
        last, states = self.extend(cache, input_ids, mask)
        if last_only or count == 1:
            return last
        following = tokens if prefixes is not None else tokens[:, self.config.block_length :]
        parts = [] if prefixes is None else [prefixes[:, None]]
        parts += [] if states is None else [self._expand(states)]
        hidden = self._decode(torch.cat(parts, 1), following)[:, : following.shape[1] + 1]
        return F.pad(hidden, (0, 0, max(count - hidden.shape[1], 0), 0))[:, -count:]

    def extend(
        self, cache: BlockTransformerCache, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Take tokens into the cache; the token decoder runs on the block being written and on no other.

        Args:
            cache: Extended in place.
            tokens: ``(N, T)``, at least one.
            mask: ``(N, cache.length + T)``: 0 for padding. None: nothing new is padding.

        Returns:
            ``(N, 1, D_t)`` that predicts the token after the last, and the states ``(N, k, D)`` of the blocks that became
            full, if any.
        """
        length = self.config.block_length
        pending = tokens if cache.tokens is None else torch.cat([cache.tokens, tokens], 1)
        whole = pending.shape[1] // length * length
        states = None
        if whole:
            states = self._states(pending[:, :whole], mask, cache)
            cache.prefixes, cache.local = self._expand(states[:, -1]), DynamicCache()
        if cache.prefixes is None:
            raise ValueError(
                f"{pending.shape[1]} tokens predict nothing: a block of {length} is read before the first prediction"
            )
        cache.tokens = pending[:, whole:]
        inputs = self._block_inputs(cache.prefixes, cache.tokens)
        new = inputs if whole else inputs[:, -tokens.shape[1] :]
        positions = torch.arange(inputs.shape[1] - new.shape[1], inputs.shape[1], device=new.device)[None]
        if self.config.prefixes_share_position and self.config.token_strategy == "prefix":
            positions = (positions - self.config.prefix_length + 1).clamp_min(0)
        hidden = self.token_decoder(
            inputs_embeds=new, position_ids=positions, use_cache=True, **{CACHE: cache.local}
        ).last_hidden_state
        return hidden[:, -1:], states

    def _check(
        self, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: BlockTransformerCache | None
    ) -> None:
        """Refuse what cannot work, before anything runs."""
        length = self.config.block_length
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (batch, tokens) with a token, got {tuple(input_ids.shape)}")
        if cache is not None and not isinstance(cache, BlockTransformerCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}; this model keeps one position per block: give a "
                f"BlockTransformerCache({length}), or leave it out and set use_cache=True"
            )
        tokens = input_ids.shape[1]
        needed = length + (labels is not None)
        if cache is None and tokens < needed:
            raise ValueError(
                f"{tokens} tokens leave nothing to predict: the first block of {length} is only read, so at least "
                f"{needed} tokens are needed{' with labels' if labels is not None else ''}"
            )
        covered = tokens + (0 if cache is None else cache.get_seq_length())
        if mask is not None and tuple(mask.shape) != (input_ids.shape[0], covered):
            raise ValueError(
                f"attention_mask must be {(input_ids.shape[0], covered)}, one number per token, cached ones included, got "
                f"{tuple(mask.shape)}"
            )
        if labels is None:
            return
        if cache is not None:
            raise ValueError("labels need the whole sequence: leave the cache out")
        if mask is None:
            raise ValueError(
                f"labels without attention_mask: padding (token {self.config.padding}) may be the end-of-text token as "
                "well, so only a mask says what is to be learnt; give torch.ones_like(input_ids) if there is no padding"
            )
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
            )

    def _sample(self, input_ids: Any, *prepared: Any, **more: Any) -> Any:
        return generate_blocks(self, input_ids, *prepared, **more)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate makes no cache: the model makes its own

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        possible = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if not possible or generation_config.is_assistant:
            raise ValueError(
                f"{generation_mode.value.replace('_', ' ')} keeps several continuations or takes tokens back, but this "
                "model throws its local cache away with each block; use greedy search or sampling (num_beams=1, no "
                "assistant_model, no prompt_lookup_num_tokens)"
            )


def loss_by_position(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, block_length: int) -> Tensor:
    """Mean cross-entropy of a block's first, second, ... token: ``(B,)``.

    Args:
        logits: ``(N, T, V)`` as the model returns them.
        input_ids: ``(N, T)``.
        attention_mask: ``(N, T)``; padding is left out, and so is the first block.
        block_length: B.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(input_ids.shape[0], -1)[:, block_length - 1 :]  # of tokens B, B + 1, ...
    counted = attention_mask[:, block_length:].to(losses.dtype)
    position = torch.arange(losses.shape[1], device=losses.device) % block_length
    totals = losses.new_zeros(2, block_length).index_add_(
        1, position, torch.stack([(losses * counted).sum(0), counted.sum(0)])
    )
    return totals[0] / totals[1]


AutoConfig.register("block_transformer", BlockTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(BlockTransformerConfig, BlockTransformerForCausalLM, exist_ok=True)
