"""Configuration of the Block Transformer, and the sizes that its paper trains."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import GPTNeoXConfig, PreTrainedConfig

__all__ = ["VARIANTS", "BlockTransformerConfig", "Variant"]


class Variant(NamedTuple):
    """One of the paper's sizes; both decoders are equally wide and have equally many heads.

    Attributes:
        hidden_size: Width D of both decoders.
        block_layers: Layers of the block decoder.
        token_layers: Layers of the token decoder.
        learning_rate: Peak learning rate of its training.
    """

    hidden_size: int
    block_layers: int
    token_layers: int
    learning_rate: float

    def config(self, **settings: Any) -> BlockTransformerConfig:
        """The configuration of this size, with other settings if wanted."""
        sizes = {name: value for name, value in self._asdict().items() if name != "learning_rate"}
        return BlockTransformerConfig(**(sizes | settings))


VARIANTS: dict[str, Variant] = {
    "block_main_b4_5": Variant(256, 3, 3, 1e-3),
    "block_main_b4_19": Variant(512, 3, 3, 1e-3),
    "block_main_b4_85": Variant(768, 6, 6, 6e-4),
    "block_main_b4_300": Variant(1024, 12, 12, 3e-4),
    "block_main_b4_800": Variant(2048, 8, 8, 3e-4),
    "block_main_b4_1.2b": Variant(2048, 12, 12, 2e-4),
}


class BlockTransformerConfig(PreTrainedConfig):
    """Configuration of ``BlockTransformerForCausalLM``. Defaults are those of the paper's ``block_main_b4_85``.

    Args:
        vocab_size: Tokens, V. Default 50304 (Pythia's, padded).
        block_length: Tokens per block, B. Fixed once trained. Default 4 (paper).
        hidden_size: Width of the block decoder, D.
        block_layers: Layers of the block decoder.
        token_layers: Layers of the token decoder.
        prefix_length: Vectors r that a block's state is expanded to. Default 2 (paper); ``"summation"`` needs B.
        token_strategy: How the token decoder is told the block's state: ``"prefix"`` (paper: r vectors in front of the
            block's tokens) or ``"summation"`` (one vector added to each; the paper's ablation).
        token_hidden_size: Width of the token decoder. None: ``hidden_size``.
        embedding_size: Width of the block embedder's table. None: D / B, and a block is its tokens' embeddings side by
            side (paper). A number: they are also mapped to D by a matrix, as in the paper's uptraining.
        num_attention_heads: Of the block decoder. None: heads of 32 up to a width of 256, of 64 up to 1536, else of
            128 (paper).
        token_attention_heads: Of the token decoder. None: by the same rule.
        rotary_pct: Share of a head's channels that are rotated.
        rope_theta: Base of the rotary positions.
        use_parallel_residual: Attention and feed-forward side by side. Default True (GPT-NeoX).
        hidden_act: Activation of the feed-forward nets, four times as wide as their decoder.
        layer_norm_eps: Of all layer norms.
        max_position_embeddings: Tokens of context in training; nothing breaks beyond.
        initializer_range: Standard deviation of starting weights; expansion and block matrix have their own.
        attention_dropout: On attention weights.
        hidden_dropout: On embeddings and on what layers add.
        prefixes_share_position: While generating, rotate all prefix vectors by position 0 and the tokens by 1, 2, ...: what
            the authors' generation code does, unlike their training. Default False: generation rotates as training does.
        use_cache: Keep keys and values between calls in ``generate``.
        bos_token_id: Read before a block's first token by ``"summation"``. Default 0, as the next two (Pythia).
        eos_token_id: End of text.
        pad_token_id: Fills blocks; its row of the tables is trained and read like any other.
        tie_word_embeddings: Must stay False.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> config = BlockTransformerConfig(hidden_size=256, block_layers=3, token_layers=3)
        >>> config.num_attention_heads, config.embedding_size
        (8, None)
    """

    model_type = "block_transformer"
    attribute_map = {"num_hidden_layers": "block_layers"}  # noqa: RUF012 - those whose keys and values are kept
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - the base class declares it

    vocab_size: int = 50304
    block_length: int = 4
    hidden_size: int = 768
    block_layers: int = 6
    token_layers: int = 6
    prefix_length: int = 2
    token_strategy: str = "prefix"
    token_hidden_size: int | None = None
    embedding_size: int | None = None
    num_attention_heads: int | None = None
    token_attention_heads: int | None = None
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    use_parallel_residual: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    prefixes_share_position: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the rest and refuse what cannot be built."""
        self.token_hidden_size = self.token_hidden_size or self.hidden_size
        self.num_attention_heads = self.num_attention_heads or heads_of(self.hidden_size)
        self.token_attention_heads = self.token_attention_heads or heads_of(self.token_hidden_size)
        super().__post_init__(**kwargs)
        names = ("vocab_size", "block_length", "hidden_size", "block_layers", "token_layers", "prefix_length")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embedding_size is None and self.hidden_size % self.block_length:
            near = -(-self.hidden_size // self.block_length) * self.block_length
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by block_length={self.block_length}, and a block is "
                f"its tokens' embeddings side by side: use hidden_size={near}, or set embedding_size"
            )
        for width, heads, what in (
            (self.hidden_size, self.num_attention_heads, "hidden_size and num_attention_heads"),
            (self.token_hidden_size, self.token_attention_heads, "token_hidden_size and token_attention_heads"),
        ):
            if heads < 1 or width % heads:
                raise ValueError(f"{what} must divide without rest, got {width} and {heads}")
        if self.token_strategy not in ("prefix", "summation"):
            raise ValueError(f"token_strategy must be 'prefix' or 'summation', got {self.token_strategy!r}")
        if self.token_strategy == "summation" and self.prefix_length != self.block_length:
            raise ValueError(
                f"token_strategy='summation' adds one vector to each token of a block: prefix_length must be "
                f"block_length={self.block_length}, got {self.prefix_length}"
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True: there are two token tables and an output of its own; leave it")
        for name in ("pad_token_id", "bos_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}={token} has no row in the tables of vocab_size={self.vocab_size} tokens")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class; the block length of a saved model cannot be overridden."""
        stored, wanted = config_dict.get("block_length"), kwargs.get("block_length")
        if None not in (stored, wanted) and stored != wanted:
            raise ValueError(
                f"block_length={wanted}: this checkpoint was trained with blocks of {stored} tokens, which its weights "
                "are made for; leave block_length out, or train a model of the other length"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def padding(self) -> int:
        """The token that fills blocks."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        ends = self.eos_token_id
        return (ends[0] if isinstance(ends, list) else ends) or 0

    def block_decoder(self) -> GPTNeoXConfig:
        """Of the block decoder, which has no token table."""
        positions = -(-self.max_position_embeddings // self.block_length)
        return self._neox(self.hidden_size, self.block_layers, self.num_attention_heads, 1, positions)

    def token_decoder(self) -> GPTNeoXConfig:
        """Of the token decoder."""
        positions = self.prefix_length + self.block_length - 1
        heads = self.token_attention_heads
        return self._neox(self.token_hidden_size, self.token_layers, heads, self.vocab_size, positions)

    def _neox(self, width: Any, layers: int, heads: Any, vocab_size: int, positions: int) -> GPTNeoXConfig:
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "max_position_embeddings": positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_pct,
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "attn_implementation": self._attn_implementation,
        }
        same = ("hidden_act", "layer_norm_eps", "initializer_range", "attention_dropout", "hidden_dropout")
        settings |= {name: getattr(self, name) for name in (*same, "use_parallel_residual")}
        return GPTNeoXConfig(**settings)


def heads_of(width: int) -> int:
    """The paper's number of heads for a width.

    Example:
        >>> [heads_of(width) for width in (256, 768, 2048)]
        [8, 12, 16]
    """
    return max(1, width // (32 if width <= 256 else 64 if width <= 1536 else 128))
