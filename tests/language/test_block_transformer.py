"""Block Transformer: the authors' own runs, the equations slowly, the cache and generate against recomputation, bad input."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from golden_case import GoldenCase, golden_cases
from tiny_causal import tiny_causal
from tokenry.language import (
    VARIANTS,
    BlockTransformerCache,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    block_transformer_from,
    load_reference_checkpoint,
    loss_by_position,
    pack_documents,
)
from tokenry.language.block_transformer_checkpoint import checkpoint_filter_fn
from tokenry.layers.cache_argument import CACHE

pytestmark = pytest.mark.method("block-transformer")

V = 37


def tiny(dtype=torch.float64, attention="sdpa", **more):
    """A model whose weights are large enough for greedy text to be neither constant nor near a tie."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 48, "block_layers": 2, "token_layers": 2, "num_attention_heads": 4}
    config = BlockTransformerConfig(**(sizes | {"token_attention_heads": 4, "eos_token_id": None} | more))
    config._attn_implementation = attention
    model = BlockTransformerForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5 * 2)
    return model.to(dtype)


def tokens(rows, length, seed=0):
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, new=11, **more):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **more)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- the authors' code --------------------------------------------------------------------------------------------


def golden_model(case):
    given = case.spec["config"]
    config = BlockTransformerConfig(
        vocab_size=given["vocab"],
        block_length=given["block_length"],
        hidden_size=given["block_hidden"],
        token_hidden_size=given["token_hidden"],
        block_layers=given["block_layers"],
        token_layers=given["token_layers"],
        num_attention_heads=given["heads"],
        token_attention_heads=given["token_heads"],
        prefix_length=given["ratio"],
        token_strategy=given["strategy"],
        prefixes_share_position=True,
    )
    model = BlockTransformerForCausalLM(config).eval()
    theirs = {name: value.float() for name, value in case.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(theirs))
    return model


@pytest.mark.golden
@pytest.mark.parametrize("name", golden_cases("block-transformer"))
def test_golden(name):
    """Block states, logits, loss, loss by position, greedy ids and parameter counts of the authors' code."""
    case = GoldenCase("block-transformer", name)
    model, config = golden_model(case), case.spec["config"]
    unused = config["vocab"] * config["block_hidden"]  # the block decoder's token table, which nothing reads
    count = sum(p.numel() for p in model.parameters())
    assert count + unused == case.spec["params"]
    embeddings = [model.embedder.table, model.token_decoder.embed_in, model.lm_head]
    assert count - sum(m.weight.numel() for m in embeddings) == case.spec["params_without_embeddings"]

    given = case.inputs
    ids, mask = given["input_ids"].flatten(1), given["attention_mask"].flatten(1)
    assert torch.equal(given["attention_mask"].any(-1).long(), given["block_attention_mask"])
    with torch.no_grad():
        output, states = model(ids, attention_mask=mask, labels=ids), model.block_states(ids, mask)
    length = config["block_length"]
    logits = output.logits[:, length - 1 : -1].unflatten(1, (-1, length))
    real = given["attention_mask"][:, 1:, :, None]  # they store zeros where padding would be predicted
    if "logits" in case.outputs:
        case.compare("logits", logits * real)
        case.compare("block_hidden", states)
    else:
        case.compare("logits_head", logits[..., :48] * real)
        case.compare("logits_mean_std", torch.stack([logits.mean(-1), logits.std(-1)], -1) * real)
        case.compare("block_hidden", states[..., :48])
    case.compare("loss", output.loss[None])
    case.compare("loss_by_position", loss_by_position(output.logits, ids, mask, length))

    expected = case.outputs["generated"]  # their limit counts the padding in front
    assert case.spec["max_length"] - expected.shape[1] == -given["vanilla_prompt"].shape[1] % length
    out = model.generate(given["vanilla_prompt"], max_length=expected.shape[1], do_sample=False)
    assert torch.equal(out, expected)


PARAMETERS = {  # with the unused table; without embeddings and head
    "block_main_b4_5": (46_724_096, 4_871_168),
    "block_main_b4_19": (103_147_520, 19_441_664),
    "block_main_b4_85": (211_797_504, 86_238_720),
    "block_main_b4_300": (471_824_384, 304_412_672),
    "block_main_b4_800": (1_148_956_672, 814_133_248),
    "block_main_b4_1.2b": (1_551_822_848, 1_216_999_424),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_the_papers(name):
    config = VARIANTS[name].config()
    with torch.device("meta"):
        model = BlockTransformerForCausalLM(config)
    table = config.vocab_size * config.hidden_size
    count = sum(p.numel() for p in model.parameters())
    assert (count + table, count - 2 * table - table // 4) == PARAMETERS[name]


# --- the equations ------------------------------------------------------------------------------------------------


def slow_logits(model, ids):
    """One row: every block state from the blocks up to it, every token from its block's beginning, alone."""
    config, length = model.config, model.config.block_length
    out = torch.zeros(len(ids), config.vocab_size, dtype=torch.float64)
    for place in range(length - 1, len(ids)):  # predicts token place + 1
        block = (place + 1) // length
        seen = ids[: block * length].view(-1, length)
        embedded = torch.stack([torch.cat([model.embedder.table.weight[t] for t in row]) for row in seen])
        state = model.block_decoder(inputs_embeds=embedded[None]).last_hidden_state[0, -1]
        width = config.token_hidden_size
        expanded = model.expansion.weight @ state + model.expansion.bias
        prefixes = [expanded[i * width : (i + 1) * width] for i in range(config.prefix_length)]
        own = [model.token_decoder.embed_in.weight[t] for t in ids[block * length : place + 1]]
        if config.token_strategy == "summation":
            own = [model.token_decoder.embed_in.weight[config.bos_token_id], *own]
            sequence = [prefix + token for prefix, token in zip(prefixes, own, strict=False)]
        else:
            sequence = prefixes + own
        hidden = model.token_decoder(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0, -1]
        out[place] = model.lm_head.weight @ hidden
    return out


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.booleans(), st.integers(1, 2), st.integers(0, 9))
def test_equals_the_equations(length, prefixes, extra, summation, rows, seed):
    strategy = {"token_strategy": "summation", "prefix_length": length} if summation else {"prefix_length": prefixes}
    model = tiny(block_length=length, token_hidden_size=32, **strategy)
    ids = tokens(rows, length + extra, seed)
    with torch.no_grad():
        close(model(ids).logits, torch.stack([slow_logits(model, row) for row in ids]))


def test_a_projected_embedder_is_a_linear_map_of_the_side_by_side_embeddings():
    model = tiny(embedding_size=20)
    ids = tokens(1, 4)
    flat = model.embedder.table(ids).flatten()
    close(model.embedder(ids[None])[0, 0], model.embedder.mix.weight @ flat + model.embedder.mix.bias)


def test_the_loss_is_that_of_the_real_tokens_behind_the_first_block():
    model, ids = tiny(), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 9:] = 0, 0
    output = model(ids, attention_mask=mask, labels=ids)
    total, count = 0.0, 0
    for row in range(2):
        for place in range(4, 14):
            if mask[row, place]:
                total, count = total - output.logits[row, place - 1].log_softmax(-1)[ids[row, place]], count + 1
    torch.testing.assert_close(output.loss.double(), total / count)  # the library's loss is float32
    halved = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(halved, output.loss / 2)
    labels = ids.clone()
    labels[mask.bool()] = -100
    assert model(ids, attention_mask=mask, labels=labels).loss.isnan()  # nothing is left


# --- who sees what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 3, 4, 6, 11, 13])
def test_a_token_is_seen_by_later_blocks_and_by_later_tokens_of_its_own(place):
    model, ids = tiny(), tokens(1, 18)
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % V
    changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 1e-9  # index t predicts token t + 1
    assert not changed[:place].any()
    within = changed[place : place // 4 * 4 + 3] if place >= 4 else changed[:0]
    later = changed[place // 4 * 4 + 3 :]
    assert within.all() and later.all()


def test_a_block_reaches_later_tokens_through_its_state_alone():
    model, ids = tiny(), tokens(1, 12)
    prefixes = model._expand(model.block_states(ids))[:, 1:2]  # the second block writes the third
    alone = model.lm_head(model._decode(prefixes, ids[:, 8:]))
    close(alone[:, :4], model(ids).logits[:, 7:11])


def test_rows_and_leading_padding_change_nothing():
    model, ids = tiny(), tokens(3, 13)
    plain = model(ids).logits
    order = torch.tensor([2, 0, 1])
    close(model(ids[order]).logits, plain[order])
    close(model(ids[1:2]).logits, plain[1:2])
    padded, mask = F.pad(ids, (8, 0)), F.pad(torch.ones_like(ids), (8, 0))
    close(model(padded, attention_mask=mask).logits[:, 11:], plain[:, 3:])


def test_blocks_of_padding_alone_are_left_out_and_change_nothing():
    model, ids = tiny(), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    calls = []
    original = model._decode_blocks
    model._decode_blocks = lambda prefixes, tokens: calls.append(len(tokens)) or original(prefixes, tokens)
    logits = model(ids, attention_mask=mask).logits
    # row 0: the block of tokens 4, 5 and the one behind the sequence; row 1: all four
    assert calls == [6]
    close(logits[1], model(ids[1:]).logits[0])
    close(logits[0, 3:6], model(ids[:1, :6]).logits[0, 3:])


# --- the cache ----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_pieces_with_a_cache_equal_the_whole(pieces, summation, share):
    strategy = {"token_strategy": "summation", "prefix_length": 4} if summation else {}
    model = tiny(prefixes_share_position=share and summation, **strategy)
    pieces = [4, *pieces]
    ids = tokens(2, sum(pieces))
    whole, at, cache = model(ids).logits, 0, None
    for size in pieces:
        output = model(ids[:, at : at + size], use_cache=True, **{CACHE: cache})
        close(output.logits, whole[:, at : at + size])
        at, cache = at + size, output[CACHE]
        assert cache.get_seq_length() == at
    last = model(ids[:, :at], use_cache=True, logits_to_keep=1)
    close(last.logits, whole[:, at - 1 : at])


def test_pieces_with_a_mask_equal_the_whole():
    model, ids = tiny(), tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True)
    second = model(ids[:, 10:], attention_mask=mask, **{CACHE: first[CACHE]})
    close(torch.cat([first.logits, second.logits], 1)[0], whole[0])
    close(torch.cat([first.logits, second.logits], 1)[1, 8:], whole[1, 8:])


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_bytes_are_those_of_the_formula(extra):
    model = tiny(torch.float32)
    cache = model(tokens(3, 20 + extra), use_cache=True)[CACHE]
    blocks, local = 2 * 2 * 5 * 48 * 4, 2 * 2 * (2 + extra) * 48 * 4  # keys and values x layers x positions x width x 4
    assert cache.nbytes == 3 * (blocks + local)
    assert len(cache) == 2 and cache.get_mask_sizes(1, 0)[0] == 6  # in blocks


def test_cropping_repeating_and_selecting():
    model, ids = tiny(), tokens(2, 11)
    cache = model(ids, use_cache=True)[CACHE]
    cache.crop(-2)
    assert cache.get_seq_length() == 9
    close(model(ids[:, 9:], **{CACHE: cache}).logits, model(ids).logits[:, 9:])
    with pytest.raises(ValueError, match="only the 3 tokens of the current block"):
        cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    more = torch.cat([ids, tokens(2, 3, seed=1)], 1).flip(0)
    close(model(more[:, 11:], **{CACHE: cache}).logits, model(more).logits[:, 11:])


# --- generate -----------------------------------------------------------------------------------------------------

STRATEGIES = [{}, {"token_strategy": "summation", "prefix_length": 4}, {"prefixes_share_position": True}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["prefix", "summation", "shared"])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_generate_equals_recomputation(strategy, length):
    model, ids = tiny(**strategy), tokens(2, length)
    out = greedy(model, ids)
    assert torch.equal(out, greedy(model, ids, use_cache=False))
    assert torch.equal(out[:, :length], ids) and out.shape[1] == length + 11
    fill = -length % 4
    if not model.config.prefixes_share_position:
        logits = model(F.pad(out, (fill, 0), value=model.config.pad_token_id)).logits
        assert torch.equal(logits[:, fill + length - 1 : -1].argmax(-1), out[:, length:])
    assert len(set(out[0, length:].tolist())) > 3


def test_generate_equals_the_librarys_loop_token_by_token():
    model, ids = tiny(), tokens(2, 8)
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for choice in (
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 9, "temperature": 1.5},
    ):
        torch.manual_seed(1)
        mine = model.generate(ids, **options, **choice)
        torch.manual_seed(1)
        theirs = model.generate(ids, custom_generate=GenerationMixin._sample, **options, **choice)
        assert torch.equal(mine.sequences, theirs.sequences)
        close(torch.stack(mine.scores), torch.stack(theirs.scores))
        close(torch.stack(mine.logits), torch.stack(theirs.logits))
        assert mine[CACHE].get_seq_length() == theirs[CACHE].get_seq_length() == 17


def batch(lengths, seed=0):
    """Left-padded with a token of its own, as some tokenizers do."""
    width = max(lengths)
    rows = [tokens(1, n, seed + i)[0] for i, n in enumerate(lengths)]
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=V - 1) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return rows, ids, mask


@pytest.mark.parametrize("lengths", [(3, 7, 12), (5, 5, 1), (8, 4, 9)])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_a_left_padded_batch_equal_the_rows_alone(lengths, cached):
    model = tiny()
    rows, ids, mask = batch(lengths)
    out = greedy(model, ids, attention_mask=mask, use_cache=cached)
    for row, together in zip(rows, out, strict=True):
        assert torch.equal(greedy(model, row[None])[0, len(row) :], together[ids.shape[1] :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_and_attention(attention, dtype):
    model = tiny(dtype, attention)
    _, ids, mask = batch((3, 9))
    output = model(ids, attention_mask=mask, labels=ids)
    assert output.logits.dtype == dtype and output.logits[:, 8:].isfinite().all() and output.loss.isfinite()
    assert greedy(model, ids, attention_mask=mask).shape == (2, 20)


def test_attention_implementations_agree_and_can_be_set_later():
    model, (_, ids, mask) = tiny(torch.float32), batch((3, 9))
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    assert model.block_decoder.config._attn_implementation == model.token_decoder.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 8:], expected[:, 8:], rtol=1e-4, atol=1e-4)


def stops_at(model, ids, place):
    """A token that row 0 first writes at ``place``."""
    text = greedy(model, ids)[0, ids.shape[1] :].tolist()
    assert text[place] not in text[:place]
    return text[place]


@pytest.mark.parametrize("place", [0, 1, 4, 5])
def test_stop_tokens_within_a_block(place):
    model, ids = tiny(), tokens(1, 8)
    end = stops_at(model, ids, place)
    plain = greedy(model, ids)
    out = model.generate(
        ids, max_new_tokens=11, do_sample=False, eos_token_id=end, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(out.sequences, plain[:, : 8 + place + 1])
    assert len(out.scores) == place + 1
    assert out[CACHE].get_seq_length() == 8 + place  # all but the last, as in the library


def test_rows_that_finish_early_are_padded():
    model = tiny()
    ids = tokens(3, 8)
    end = stops_at(model, ids, 1)
    out = model.generate(ids, max_new_tokens=11, do_sample=False, eos_token_id=end, pad_token_id=7)
    plain = greedy(model, ids)
    for row, text in zip(out[:, 8:].tolist(), plain[:, 8:].tolist(), strict=True):
        count = text.index(end) + 1 if end in text else 11
        assert row == (text[:count] + [7] * 11)[: out.shape[1] - 8]
    assert out[0, 10:].tolist() == [7] * (out.shape[1] - 10)


class AfterTokens(StoppingCriteria):
    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.count)


class Kept(BaseStreamer):
    def __init__(self):
        self.calls, self.ended = [], 0

    def put(self, value):
        self.calls.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("count", [9, 12, 13])
def test_criteria_and_streamer(count):
    model, ids, streamer = tiny(), tokens(1, 8), Kept()
    out = greedy(model, ids, stopping_criteria=[AfterTokens(count)], streamer=streamer)
    assert torch.equal(out, greedy(model, ids)[:, :count])
    assert torch.equal(streamer.calls[0], ids) and streamer.ended == 1
    assert torch.cat(streamer.calls[1:]).tolist() == out[0, 8:].tolist()
    assert all(call.shape == (1,) for call in streamer.calls[1:])


def test_several_samples_per_prompt_repeat_with_the_seed():
    model, ids = tiny(), tokens(2, 5)

    def draw():
        torch.manual_seed(3)
        return model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=7)

    out = draw()
    assert out.shape == (6, 12) and torch.equal(out, draw())
    assert len({tuple(row) for row in out.tolist()}) == 6


@pytest.mark.parametrize("first", [5, 8, 9])
@pytest.mark.parametrize("whole", [True, False])
def test_a_later_call_goes_on_from_the_cache(first, whole):
    model, ids = tiny(), tokens(2, first)
    begun = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    cache, text = begun[CACHE], begun.sequences
    new = text if whole else text[:, -1:]
    mask = torch.ones(2, text.shape[1], dtype=torch.long)
    out = greedy(model, new, new=5, attention_mask=mask, **{CACHE: cache})
    assert torch.equal(out[:, -5:], greedy(model, ids)[:, -5:])


def test_an_empty_cache_is_filled():
    model, cache = tiny(), BlockTransformerCache(4)
    greedy(model, tokens(1, 6), **{CACHE: cache})
    assert cache.get_seq_length() == 16 and cache.fill == 2
    cache.reset()
    assert cache.get_seq_length() == cache.fill == cache.nbytes == 0


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for a number, and passes over the local decoder."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_little_is_read_per_block_and_the_prompt_costs_one_local_pass():
    model = tiny()
    counts = []
    for new in (8, 40):
        with Reads() as reads:
            greedy(model, tokens(2, 24), new=new)
        counts.append(reads.counts["_local_scalar_dense"])
    assert counts[1] - counts[0] <= 32 // 4  # once per block, where the release's masks need it
    passes = []
    hook = model.token_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    greedy(model, tokens(2, 24), new=6)
    hook.remove()
    assert passes == [(2, 2), (2, 1), (2, 1), (2, 1), (2, 2), (2, 1)]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"token_strategy": "summation", "prefix_length": 4}, {"embedding_size": 16}])
def test_gradients_reach_every_parameter(more):
    model, ids = tiny(**more).train(), tokens(2, 16)
    ids[0, 10:], ids[0, 3] = 0, 0
    mask = (torch.arange(16) < torch.tensor([[11], [16]])).long()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    again = model(ids, attention_mask=mask, labels=ids).loss
    again.backward()
    close(again, loss)
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        close(p.grad, gradient)


def test_starting_weights():
    model = BlockTransformerForCausalLM(BlockTransformerConfig(vocab_size=900, hidden_size=256, embedding_size=64))
    for weight, std in (
        (model.embedder.table.weight, 0.02),
        (model.embedder.mix.weight, 1 / 16),
        (model.expansion.weight, 1 / 16),
        (model.lm_head.weight, 0.02),
        (model.token_decoder.embed_in.weight, 0.02),
        (model.block_decoder.layers[3].mlp.dense_4h_to_h.weight, 0.02),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.expansion.bias.any() and not model.embedder.mix.bias.any()


def test_compiles_without_a_break():
    model, ids = tiny(torch.float32, block_layers=1, token_layers=1), tokens(2, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_save_load_and_resize(tmp_path):
    model, ids = tiny(torch.float32), tokens(1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, BlockTransformerForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BlockTransformerConfig)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="trained with blocks of 4 tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path, block_length=2)
    again.resize_token_embeddings(V + 3, mean_resizing=False)
    assert again.embedder.table.num_embeddings == again.config.vocab_size == V + 3
    torch.testing.assert_close(again(ids).logits[..., :V], model(ids).logits)
    assert again(torch.full((1, 5), V + 2)).logits.shape == (1, 5, V + 3)


def reference_weights(model):
    """The model's state dict under the authors' names, with what they store and nothing reads."""
    names = {
        "embedder.table.": "embedder.embeddings.",
        "embedder.mix.": "embedder.projection_layer.",
        "block_decoder.": "block_decoder.gpt_neox.",
        "token_decoder.": "token_decoder.gpt_neox.",
        "lm_head.": "token_decoder.embed_out.",
        "expansion.": "token_decoder.expansion_layer.",
    }
    found = {}
    for name, value in model.state_dict().items():
        start = next(ours for ours in names if name.startswith(ours))
        found[names[start] + name.removeprefix(start)] = value.clone()
    found["token_decoder.expansion_layer.weight"] = found["token_decoder.expansion_layer.weight"][..., None]
    mix = found.get("embedder.projection_layer.weight")
    if mix is not None:
        found["embedder.projection_layer.weight"] = mix.unflatten(1, (4, -1)).transpose(1, 2).contiguous()
    found["block_decoder.gpt_neox.embed_in.weight"] = torch.zeros(V, 48)
    found["block_decoder.gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    return found


@pytest.mark.parametrize("more", [{}, {"embedding_size": 12}, {"prefix_length": 3, "token_hidden_size": 32}])
def test_checkpoints_of_the_authors_code_load(tmp_path, more):
    model = tiny(torch.float32, num_attention_heads=None, token_attention_heads=None, **more)
    weights = reference_weights(model)
    save_file(weights, tmp_path / "model.safetensors")
    ids = tokens(2, 11)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(load_reference_checkpoint(path, eos_token_id=None)(ids).logits, model(ids).logits)
    assert checkpoint_filter_fn(model.state_dict()).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="block_length=8 .the weights have 4"):
        load_reference_checkpoint(tmp_path, block_length=8)
    weights["embedder.embeddings.weight"] = torch.zeros(V + 1, 12)
    with pytest.raises(ValueError, match=f"embedder has {V + 1} tokens and the token decoder {V}"):
        checkpoint_filter_fn(weights)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a Block Transformer: it lacks embedder.table.weight"):
        load_reference_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_reference_checkpoint(tmp_path / "nowhere")


def vanilla(**more):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(sizes | {"num_attention_heads": 4, "eos_token_id": 0} | more))).eval()


def test_uptraining_begins_with_the_vanilla_weights():
    source = vanilla()
    model = block_transformer_from(source, block_length=3)
    assert (model.config.block_layers, model.config.token_layers) == (2, 3)
    ids = tokens(2, 6)
    embedded = source.get_input_embeddings()(ids).view(2, 2, 3, -1)
    torch.testing.assert_close(model.embedder(ids.view(2, 2, 3)), embedded.mean(2))
    states = torch.randn(2, 32)
    torch.testing.assert_close(model._expand(states), states[:, None].expand(2, 2, 32))
    mine = [*model.block_decoder.layers, *model.token_decoder.layers]
    for a, b in zip(mine, source.gpt_neox.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert torch.equal(model.lm_head.weight, source.get_output_embeddings().weight)
    # a block of one token, two prefixes: the upper layers see the same state twice, and attention leaves it as it is
    one = block_transformer_from(source, block_length=1, prefix_length=1, block_layers=4)
    hidden = source.gpt_neox(ids, output_hidden_states=True).hidden_states[4]
    torch.testing.assert_close(one.block_states(ids), one.block_decoder.final_layer_norm(hidden))
    assert block_transformer_from(source, block_layers=1).config.token_layers == 4


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_packing(sizes, block, blocks, seed):
    documents = [[100 * (i + 1) + j for j in range(n)] for i, n in enumerate(sizes)]
    rows = list(
        pack_documents(
            documents, block_length=block, row_length=block * blocks, eos_token_id=1, pad_token_id=1, seed=seed
        )
    )
    again = list(
        pack_documents(
            documents, block_length=block, row_length=block * blocks, eos_token_id=1, pad_token_id=1, seed=seed
        )
    )
    assert len(rows) == len(again) and all(
        torch.equal(a, b) for x, y in zip(rows, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    ids = [t for row, _ in rows for t in row.tolist()]
    mask = [m for _, row in rows for m in row.tolist()]
    real = [t for t, m in zip(ids, mask, strict=True) if m]
    expected = [t for document in documents if document for t in [*document, 1]]
    assert real == expected[: len(real)] and all(t == 1 for t, m in zip(ids, mask, strict=True) if not m)
    for start in range(0, len(ids), block):  # at most one document in a block, and never padding alone
        inside = {t // 100 for t in ids[start : start + block] if t >= 100}
        assert len(inside) <= 1 and any(mask[start : start + block])


def test_documents_begin_at_every_place_of_a_block():
    sizes = {"block_length": 4, "row_length": 8, "eos_token_id": 1, "pad_token_id": 0}
    ids = [t for row, _ in pack_documents([[5, 6, 6]] * 200, **sizes) for t in row.tolist()]
    found = Counter(i % 4 for i, t in enumerate(ids) if t == 5)
    assert set(found) == {0, 1, 2, 3} and min(found.values()) > 25


def test_the_trainer_goes_on_after_a_kill(tmp_path, capsys):
    script = Path(__file__).parents[2] / "scripts" / "train_block_transformer.py"
    spec = importlib.util.spec_from_file_location("train_block_transformer", script)
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    (tmp_path / "a.txt").write_text("\n\n".join(f"A line about the number {i} and its neighbour." for i in range(60)))
    common = ["--text", str(tmp_path), "--hidden-size", "32", "--block-layers", "1", "--token-layers", "1"]
    common += ["--row-length", "32", "--rows", "2", "--steps", "6", "--save-every", "2", "--warmup", "2"]
    trainer.main([*common, "--out", str(tmp_path / "whole")])
    trainer.main([*common, "--out", str(tmp_path / "killed"), "--stop-after", "3"])
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    trainer.main([*common, "--out", str(tmp_path / "killed")])
    whole, killed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    for a, b in zip(whole.parameters(), killed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "step 6 of 6" in capsys.readouterr().out


# --- bad input ----------------------------------------------------------------------------------------------------


def config(**more):
    return lambda: BlockTransformerConfig(**more)


def changed_block_length():
    model = tiny()
    model.config.block_length = 2
    return model(tokens(1, 8))


ONES = torch.ones(1, 8, dtype=torch.long)
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
GAP = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
BAD = {
    "too short": (lambda: tiny()(tokens(1, 3)), "3 tokens leave nothing to predict.*at least 4"),
    "too short for labels": (
        lambda: tiny()(tokens(1, 4), attention_mask=ONES[:, :4], labels=tokens(1, 4)),
        "at least 5 tokens are needed with labels",
    ),
    "too short for a cache": (
        lambda: tiny()(tokens(1, 3), **{CACHE: BlockTransformerCache(4)}),
        "3 tokens predict nothing",
    ),
    "labels without mask": (
        lambda: tiny()(tokens(1, 8), labels=tokens(1, 8)),
        "labels without attention_mask.*ones_like",
    ),
    "labels and cache": (
        lambda: tiny()(tokens(1, 8), attention_mask=ONES, labels=tokens(1, 8), **{CACHE: BlockTransformerCache(4)}),
        "leave the cache out",
    ),
    "label shape": (
        lambda: tiny()(tokens(1, 8), attention_mask=ONES, labels=tokens(1, 7)),
        r"shape of input_ids \(1, 8\), got \(1, 7\)",
    ),
    "mask shape": (lambda: tiny()(tokens(1, 9), attention_mask=ONES), r"must be \(1, 9\)"),
    "no tokens": (lambda: tiny()(tokens(1, 0)), r"with a token, got \(1, 0\)"),
    "one dimension": (lambda: tiny()(tokens(1, 8)[0]), r"\(batch, tokens\)"),
    "foreign cache": (lambda: tiny()(tokens(1, 8), **{CACHE: object()}), "the cache is a object"),
    "changed block length": (changed_block_length, "block_length is 2, but the weights are made for blocks of 4"),
    "width": (config(hidden_size=30), "hidden_size=30 is not divisible by block_length=4.*hidden_size=32"),
    "heads": (config(num_attention_heads=7), "hidden_size and num_attention_heads must divide"),
    "layers": (config(token_layers=0), "token_layers must be at least 1, got 0"),
    "strategy": (config(token_strategy="cross_attention"), "'prefix' or 'summation', got 'cross_attention'"),
    "summation": (config(token_strategy="summation"), "prefix_length must be block_length=4, got 2"),
    "padding token": (config(pad_token_id=50304), "pad_token_id=50304 has no row"),
    "tied": (config(tie_word_embeddings=True), "tie_word_embeddings=True"),
    "right padding": (
        lambda: greedy(tiny(), tokens(2, 4), attention_mask=RIGHT),
        "gaps or right padding.*padding_side",
    ),
    "gap": (lambda: greedy(tiny(), tokens(2, 4), attention_mask=GAP), "gaps or right padding"),
    "beams": (lambda: greedy(tiny(), tokens(1, 4), num_beams=2), "beam search keeps several continuations"),
    "lookup": (
        lambda: greedy(tiny(), tokens(1, 4), prompt_lookup_num_tokens=3),
        "assisted generation.*takes tokens back",
    ),
    "assistant": (lambda: greedy(tiny(), tokens(1, 4), assistant_model=tiny()), "assisted generation"),
    "attentions": (
        lambda: greedy(tiny(), tokens(1, 4), output_attentions=True, return_dict_in_generate=True),
        "output_attentions=True: the two decoders",
    ),
    "cache kind": (
        lambda: greedy(tiny(), tokens(1, 4), cache_implementation="static"),
        "cache_implementation='static'",
    ),
    "devices": (lambda: greedy(tiny(), tokens(1, 4), synced_gpus=True), "synced_gpus"),
    "foreign cache in generate": (
        lambda: greedy(tiny(), tokens(1, 4), **{CACHE: tiny_cache()}),
        "must be a BlockTransformerCache",
    ),
    "nothing new": (
        lambda: greedy(tiny(), tokens(1, 8), **{CACHE: filled()}),
        "the cache holds 8 tokens and the prompt has 8",
    ),
    "uptraining a Llama": (lambda: block_transformer_from(tiny_causal("llama")), "got LlamaForCausalLM"),
    "uptraining with too many layers": (lambda: block_transformer_from(vanilla(), block_layers=5), "1 to 4 can be"),
    "uptraining other layers": (lambda: block_transformer_from(vanilla(intermediate_size=64)), "intermediate_size=64"),
    "row length": (
        lambda: pack_documents([], block_length=4, row_length=10, eos_token_id=0, pad_token_id=0),
        "row_length=10 must be a multiple of block_length=4",
    ),
}


def tiny_cache():
    return tiny_causal("gpt_neox")(tokens(1, 4), use_cache=True)[CACHE]


def filled():
    return tiny()(tokens(1, 8), use_cache=True)[CACHE]


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
