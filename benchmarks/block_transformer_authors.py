"""The authors' Block Transformer as a process of its own, because it needs transformers 4.39.

Started by ``decoding_reference.py``, not by hand. Standard input has one JSON line per call, ``{"call": "generate", ...}``,
standard output one line ``{"done": ...}`` when it is over. Weights, inputs and results go through files that the calls name.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch


def build(sizes: dict[str, Any]) -> torch.nn.Module:
    """Their model, prefix strategy, with random weights large enough that greedy text has no near-ties."""
    for package in ("block_decoder", "embedder", "token_decoder"):  # their __init__ files load every other backbone
        made = types.ModuleType(f"model.{package}")
        made.__path__ = [str(Path(sys.argv[1]) / "model" / package)]
        sys.modules[made.__name__] = made
    from model.block_decoder.gpt_neo_x import GPTNeoXBlockDecoder
    from model.block_transformer import BlockTransformer
    from model.embedder.lookup import LookupConfig, LookupEmbedder
    from model.token_decoder.gpt_neo_x import GPTNeoXTokenDecoder
    from transformers import GPTNeoXConfig

    sys.modules["model.token_decoder"].T5TokenDecoder = type(None)  # their forward asks whether it is one
    width, length = sizes["hidden_size"], sizes["block_length"]

    def config(layers: int) -> GPTNeoXConfig:
        return GPTNeoXConfig(
            vocab_size=sizes["vocab_size"], hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=sizes["heads"], max_position_embeddings=sizes["positions"], bos_token_id=0, eos_token_id=0,
            attn_implementation="eager",
        )  # fmt: skip

    torch.manual_seed(0)
    table = LookupConfig(
        vocab_size=sizes["vocab_size"], hidden_size=width // length, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    token_decoder = GPTNeoXTokenDecoder(
        config(sizes["layers"]), length, 1, width, "expansion_layer", 2, decoding_strategy="prefix"
    )
    token_decoder.generation_config.eos_token_id = None  # as in their timing script: every row goes on to the end
    model = BlockTransformer(
        LookupEmbedder(table, length, 1, "concat", width),
        GPTNeoXBlockDecoder(config(sizes["layers"]), n_embedding_tokens=1),
        token_decoder,
        use_token_decoding_loss=True,
        decoding_strategy="prefix",
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5 * 2)
    return model


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # their code prints
    torch.set_num_threads(1)
    model: Any = None
    inputs: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["call"] == "build":
            model = build(asked["sizes"])
            torch.save(model.state_dict(), asked["weights"])
        elif asked["call"] == "input":
            inputs = torch.load(asked["file"], weights_only=True)
        elif asked["call"] == "forward":
            blocks = inputs["ids"].unflatten(1, (-1, model.block_length))
            with torch.no_grad():
                loss = model(blocks, torch.ones_like(blocks), torch.ones_like(blocks[..., 0]), labels=blocks)["loss"]
        elif asked["call"] == "generate":
            ids = model.generate(inputs["ids"], torch.ones_like(inputs["ids"]), max_length=asked["length"])
        if "result" in asked:
            torch.save(loss if asked["call"] == "forward" else ids, asked["result"])
        print(json.dumps({"done": asked["call"]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
