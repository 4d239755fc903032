"""What every decoding strategy owes its user, on every eligible architecture.

A new strategy is listed in ``STRATEGIES``: a name and a call that makes it from the target model.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from tokenry.decoding import (
    DecodingOutput,
    DraftModelDecoding,
    DraftStrategy,
    DraftTree,
    ParallelPromptDecoding,
    ParallelPrompts,
    Proposal,
    SortedDraft,
    SortedSpeculative,
    TokenRecycling,
    collaborate,
)
from tokenry.layers.cache_argument import CACHE

VOCAB = 37
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0, 0]]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
TINY = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": SIZES,
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": SIZES | {"num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip


class RandomChain(DraftStrategy):
    """Draws a chain from known probabilities: the rule of speculative sampling with any proposer at all."""

    def propose(self, state):
        q = torch.linspace(1.0, 3.0, VOCAB, dtype=torch.float32)
        q = (q / q.sum()).expand(state.batch_size, 4, VOCAB)
        drawn = torch.multinomial(q[0, 0], 3 * state.batch_size, replacement=True).view(-1, 3)
        tokens = torch.cat([state.root, drawn], 1)
        return Proposal(DraftTree.chain(3), tokens, draft_probs=q if state.do_sample else None)


class Oracle(DraftStrategy):
    """Knows the greedy continuation: everything is accepted, so stops and limits always lie inside a tree."""

    def __init__(self, model):
        super().__init__()
        self.model, self.busy = model, False

    def propose(self, state):
        drafts = []
        for row, length in enumerate(state.lengths):
            ids = state.ids[row, :length][None]
            mask = torch.ones_like(ids)
            if state.start is not None:
                mask[:, : int(state.start[row])] = 0
            at = (mask.cumsum(-1) - 1).clamp_min(0)
            for _ in range(4):
                following = (
                    self.model(input_ids=ids, attention_mask=mask, position_ids=at)
                    .logits[:, -1]
                    .argmax(-1, keepdim=True)
                )
                ids, mask = torch.cat([ids, following], 1), torch.cat([mask, mask[:, :1] * 0 + 1], 1)
                at = torch.cat([at, at[:, -1:] + 1], 1)
            drafts.append(ids[:, -4:])
        return Proposal(DraftTree.chain(4), torch.cat([state.root, torch.cat(drafts)], 1))


def sorted_draft(model, *args, **kwargs):
    """Both layers of the target as a draft that may leave after the first: some tokens right, some wrong."""
    return SortedSpeculative(SortedDraft.from_model(model, layers=2, exits=(1, 2)), *args, **kwargs)


# State -> nodes (path, contribution, prompt tokens hung on it): every number of prompt tokens comes up.
PROMPT_TREES = {
    1: [([0], 0.4, 3), ([1], 0.1, 1), ([5], 0.1, 2)],
    2: [([0], 0.4, 2), ([2], 0.1, 1), ([0, 0], 0.1, 3), ([2, 4], 0.1, 1)],
    3: [([0], 0.4, 1), ([1], 0.1, 3), ([0, 1], 0.1, 2), ([0, 1, 0], 0.1, 1), ([0, 1, 9], 0.1, 2), ([7], 0.01, 1)],
}


def random_prompts(model):
    size = model.get_input_embeddings().weight.shape[1]
    prompts = ParallelPrompts(torch.randn(3, size, generator=torch.Generator().manual_seed(0)))
    prompts.accuracy = torch.tensor([[0.4, 0.2], [0.3, 0.1], [0.2, 0.1]])
    return prompts


def noisy(model):
    """A draft model that is right now and then."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for weight in draft.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator).to(weight)
    return draft


# Name -> (slug of the method, or None for the engine's own proposers; call that makes it from the target model).
STRATEGIES = {
    "token-recycling": ("token-recycling", lambda model: TokenRecycling(tree=TREE, k=4)),
    "token-recycling, 80 nodes": ("token-recycling", lambda model: TokenRecycling(tree=None)),
    "token-recycling, no nodes": ("token-recycling", lambda model: TokenRecycling(tree=0)),
    "token-recycling, warm": ("token-recycling", lambda model: TokenRecycling(tree=TREE, k=4, warm_from_prompt=True)),
    "token-recycling, auto": ("token-recycling", lambda model: TokenRecycling()),
    "fs-gen, oracle": ("fs-gen", lambda model: collaborate(model, "oracle")),
    "fs-gen, speculative": ("fs-gen", lambda model: collaborate(model, "speculative", draft_tokens=3)),
    "fs-gen, proxy": ("fs-gen", lambda model: collaborate(model, "proxy", tuned_model=model)),
    "s2d": ("s2d", lambda model: sorted_draft(model, draft_tokens=4)),
    "s2d, tree": ("s2d", lambda model: sorted_draft(model, (0.9,), 3, top_k=3)),
    "ppd": ("ppd", lambda model: ParallelPromptDecoding(random_prompts(model), PROMPT_TREES)),
    "ppd, auto": ("ppd", lambda model: ParallelPromptDecoding(random_prompts(model))),
    "ppd on a draft model": ("ppd", lambda model: DraftModelDecoding(noisy(model), 3, STRATEGIES["ppd"][1](model))),
    "drawn chain": (None, lambda model: RandomChain()),
    "oracle": (None, Oracle),
}


@pytest.fixture(autouse=True, scope="module")
def _tiny_models_want_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


_MADE: dict = {}


def tiny(name, dtype=torch.float64, **more):
    """A random model whose text does not repeat at once: large weights."""
    key = (name, dtype, *sorted(more.items()))
    if key not in _MADE:
        torch.manual_seed(1)
        special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        config = AutoConfig.for_model(name, vocab_size=VOCAB, initializer_range=0.35, **special, **(TINY[name] | more))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        _MADE[key] = model
    return _MADE[key]


def prompts(rows=1, width=9, seed=0):
    return torch.randint(2, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded(widths=(9, 1, 5), seed=0):
    ids = torch.zeros(len(widths), max(widths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, width in enumerate(widths):
        ids[row, -width:] = prompts(1, width, seed + row)
        mask[row, -width:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(model, inputs, **options):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    return model.generate(**inputs, do_sample=False, **options)


def drafted(strategy, model, inputs, **options):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    return model.generate(**inputs, custom_generate=strategy, **({"do_sample": False} | options))


every_strategy = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.method(slug) if slug else [])
        for name, (slug, make) in STRATEGIES.items()
    ],
)
every_model = pytest.mark.parametrize("name", TINY)


@every_strategy
@every_model
def test_greedy_text_is_the_models_own(make, name):
    model = tiny(name)
    strategy = make(model)
    for seed in (0, 1):  # the second prompt meets what the first has left behind
        ids = prompts(seed=seed)
        assert torch.equal(drafted(strategy, model, ids, max_new_tokens=24), plain(model, ids, max_new_tokens=24))
    stats = strategy.stats
    assert stats.tokens == 24
    assert stats.forward_passes == len(stats.accepted) == len(stats.nodes)
    assert 0 <= sum(a[0] for a in stats.accepted) - 24 <= max(stats.nodes)
    assert all(1 <= a[0] <= n for a, n in zip(stats.accepted, stats.nodes, strict=True))
    assert stats.mean_accepted_length == pytest.approx(24 / stats.forward_passes)


@every_strategy
@every_model
def test_a_left_padded_row_is_the_row_alone(make, name):
    model, inputs = tiny(name), padded()
    out = drafted(make(model), model, inputs, max_new_tokens=20)
    assert torch.equal(out, plain(model, inputs, max_new_tokens=20))
    for row in range(3):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        assert torch.equal(out[row, 9:], plain(model, alone, max_new_tokens=20)[0, alone.shape[1] :])


@every_strategy
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eager_attention(make, name):
    # Not float64: the library's eager softmax runs in float32, where float64's lowest number turns padding into NaN.
    model = tiny(name, torch.float32, attn_implementation="eager")
    for inputs in (prompts(), padded()):
        assert torch.equal(
            drafted(make(model), model, inputs, max_new_tokens=16), plain(model, inputs, max_new_tokens=16)
        )


@every_strategy
@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 6])
def test_few_tokens(make, new, width):
    model, ids = tiny("llama"), prompts(2, width)
    assert torch.equal(drafted(make(model), model, ids, max_new_tokens=new), plain(model, ids, max_new_tokens=new))


@every_strategy
def test_up_to_the_end_of_a_learned_position_table(make):
    model, ids = tiny("gpt2", n_positions=24), prompts(1, 9)
    assert torch.equal(drafted(make(model), model, ids, max_new_tokens=15), plain(model, ids, max_new_tokens=15))


@every_strategy
def test_stop_tokens_end_rows_one_by_one(make):
    model, inputs = tiny("llama"), padded()
    free = plain(model, inputs, max_new_tokens=24)[:, 9:]
    for stops in ([int(free[0, 7])], [int(free[0, 2]), int(free[1, 11])], [int(free[2, 0])]):
        options = {"max_new_tokens": 24, "eos_token_id": stops, "pad_token_id": 0}
        assert torch.equal(drafted(make(model), model, inputs, **options), plain(model, inputs, **options))


class _Sum(StoppingCriteria):
    """Stops a row when its last two tokens add up to a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] + input_ids[:, -2]) % 5 == 0


@every_strategy
def test_own_stopping_criteria_are_asked_on_real_prefixes(make):
    model = tiny("llama")
    for seed in range(3):
        ids = prompts(seed=seed)
        options = {"max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([_Sum()])}
        assert torch.equal(drafted(make(model), model, ids, **options), plain(model, ids, **options))
    inputs = padded()
    options = {
        "max_new_tokens": 24,
        "stopping_criteria": StoppingCriteriaList([_Sum()]),
        "eos_token_id": [VOCAB - 1],
        "pad_token_id": 0,
    }
    assert torch.equal(drafted(make(model), model, inputs, **options), plain(model, inputs, **options))


def letters():
    vocabulary = {"<pad>": 0} | {chr(ord("a") + i): i + 1 for i in range(26)} | {str(i): i + 27 for i in range(10)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@every_strategy
def test_stop_strings(make):
    model, ids, tokenizer = tiny("llama"), prompts(), letters()
    free = tokenizer.decode(plain(model, ids, max_new_tokens=24)[0, 9:])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [free[6:8]])])
    options = {"max_new_tokens": 24, "stopping_criteria": criteria}
    assert torch.equal(drafted(make(model), model, ids, **options), plain(model, ids, **options))


class _Parity(LogitsProcessor):
    """Forbids the half of the vocabulary that the prefix's length and the row's number choose."""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(scores))[:, None] + input_ids.shape[1]
        return scores.masked_fill((torch.arange(VOCAB)[None] + rows) % 3 == 0, -torch.inf)


PROCESSORS = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "bad words": {"bad_words_ids": [[5], [7, 8], [30], [31, 4, 2]]},
    "min length": {"min_new_tokens": 9, "eos_token_id": list(range(2, 20)), "pad_token_id": 0},
    "no repeats": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [3, 9, 11]},
    "forced end": {"forced_eos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0},
    "own": {"logits_processor": LogitsProcessorList([_Parity()])},
}


@every_strategy
@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
def test_logits_processors_see_each_nodes_own_prefix(make, options):
    model = tiny("llama")
    for inputs in (prompts(seed=3), padded(seed=5)):
        mine = drafted(make(model), model, inputs, max_new_tokens=20, **options)
        assert torch.equal(mine, plain(model, inputs, max_new_tokens=20, **options))


@every_strategy
def test_return_dict(make):
    model, ids = tiny("llama"), prompts()
    options = {
        "max_new_tokens": 14,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    mine, theirs = drafted(make(model), model, ids, **options), plain(model, ids, **options)
    assert isinstance(mine, DecodingOutput)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert mine.decoding_stats.tokens == 14
    for name in ("scores", "logits"):
        assert len(mine[name]) == 14
        torch.testing.assert_close(torch.stack(mine[name]), torch.stack(theirs[name]))
    assert mine[CACHE].get_seq_length() == theirs[CACHE].get_seq_length() == 9 + 14 - 1
    for a, b in zip(mine[CACHE].layers, theirs[CACHE].layers, strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)


@every_strategy
def test_goes_on_from_a_cache(make):
    model, ids = tiny("llama"), prompts()
    strategy = make(model)
    first = drafted(strategy, model, ids, max_new_tokens=8, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompts(seed=9)[:, :3]], 1)
    mine = drafted(strategy, model, longer, max_new_tokens=10, **{CACHE: first[CACHE]})
    assert torch.equal(mine, plain(model, longer, max_new_tokens=10))
    given = DynamicCache(config=model.config)
    drafted(strategy, model, ids, max_new_tokens=8, **{CACHE: given})
    assert given.get_seq_length() == 9 + 8 - 1
    assert torch.equal(
        plain(model, longer, max_new_tokens=10, **{CACHE: given}), plain(model, longer, max_new_tokens=10)
    )


class Recorder:
    """A streamer that remembers."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


@every_strategy
def test_streams_every_token_in_order(make):
    model = tiny("llama")
    for inputs, options in ((prompts(), {}), (padded(), {"eos_token_id": list(range(2, 9)), "pad_token_id": 0})):
        recorder, theirs = Recorder(), Recorder()
        out = drafted(make(model), model, inputs, max_new_tokens=12, token_streamer=recorder, **options)
        expected = plain(model, inputs, max_new_tokens=12, streamer=theirs, **options)
        assert recorder.ended == 1
        assert torch.equal(out, expected)
        assert len(recorder.values) == len(theirs.values)
        assert all(torch.equal(a, b) for a, b in zip(recorder.values, theirs.values, strict=True))


@pytest.mark.parametrize("name", ["token-recycling", "token-recycling, no nodes", "ppd", "drawn chain"])
def test_sampling_keeps_the_models_distribution(name):
    """Total variation between 20,000 drawn pairs of tokens and their enumerated probabilities.

    The expected distance of an exact sampler is about sqrt(cells / (2 pi draws)); 1.5 times that is allowed.
    """
    model, draws, warm = tiny("llama", torch.float32), 20_000, 0.6
    strategy, ids = STRATEGIES[name][1](model), prompts(width=4)
    drafted(strategy, model, ids, max_new_tokens=30)
    chunks = [
        drafted(strategy, model, ids.expand(1000, -1), do_sample=True, temperature=warm, top_k=6, max_new_tokens=2)
        for _ in range(draws // 1000)
    ]
    pairs = torch.cat(chunks)[:, 4:6]
    observed = (
        torch.zeros(VOCAB, VOCAB).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(draws), accumulate=True) / draws
    )

    def probabilities(sequences):
        logits = model(input_ids=sequences).logits[:, -1].float() / warm
        lowest = logits.topk(6).values[:, -1:]
        return logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)

    with torch.no_grad():
        first = probabilities(ids)[0]
        second = probabilities(torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1))
    expected = first[:, None] * second
    cells = int((expected > 0).sum())
    distance = (observed - expected).abs().sum().item() / 2
    assert observed[expected == 0].sum() == 0
    assert distance < 1.5 * math.sqrt(cells / (2 * math.pi * draws))


@every_strategy
def test_sampled_rows_of_return_sequences(make):
    model, ids = tiny("llama"), prompts()
    out = drafted(make(model), model, ids, do_sample=True, num_return_sequences=5, max_new_tokens=9)
    assert out.shape == (5, 18)
    assert len({tuple(row) for row in out.tolist()}) > 1


@every_strategy
def test_bfloat16_differs_only_at_near_ties(make):
    """Where the text first differs, the two best logits must lie within 2 units in the last place of bfloat16."""
    model, ids = tiny("llama", torch.bfloat16), prompts(seed=2)
    mine = drafted(make(model), model, ids, max_new_tokens=24)[0]
    theirs = plain(model, ids, max_new_tokens=24)[0]
    if torch.equal(mine, theirs):
        return
    at = int((mine != theirs).nonzero()[0])
    with torch.no_grad():
        best = model(input_ids=theirs[None, :at]).logits[0, -1].float().topk(2).values
    ulp = 2.0 ** (math.floor(math.log2(best[0].abs().item())) - 7)
    assert best[0] - best[1] <= 2 * ulp + 1e-9


REFUSED = {
    "beams": ({"num_beams": 2}, "num_beams=2"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "static cache": ({"cache_implementation": "static"}, "cannot be rolled back"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
}


@every_strategy
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_cannot_do(make, options, message):
    model = tiny("llama", attn_implementation="eager") if "output_attentions" in options else tiny("llama")
    with pytest.raises(ValueError, match=message):
        drafted(make(model), model, prompts(), max_new_tokens=4, **options)


def test_refuses_models_it_cannot_verify():
    strategy = TokenRecycling(tree=TREE)
    sliding = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mistral", vocab_size=VOCAB, sliding_window=8, num_key_value_heads=2, **SIZES)
    )
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        drafted(strategy, sliding, prompts(), max_new_tokens=4)
    alibi = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="position_ids"):
        drafted(strategy, alibi, prompts(), max_new_tokens=4)
    model = tiny("llama", torch.float32, n=1)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        strategy(model, prompts())
    with pytest.raises(ValueError, match="right padding"):
        inputs = {k: v.flip(1) for k, v in padded().items()}
        drafted(strategy, tiny("llama"), inputs, max_new_tokens=4)
    with pytest.raises(ValueError, match="inputs_embeds"):
        tiny("llama").generate(inputs_embeds=torch.zeros(1, 3, 32).double(), custom_generate=strategy, max_new_tokens=4)
