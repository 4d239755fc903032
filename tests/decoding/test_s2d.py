"""S2D: stored reference runs, nested exits against full recomputation, drafting against its definition, tuning, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from golden_case import GoldenCase, fill, golden_cases
from tiny_causal import CONFIGS, VOCABULARY, tiny_causal, tokens
from tokenry.decoding import (
    PassLatency,
    SortedDraft,
    SortedSpeculative,
    check_same_vocabulary,
    draft_tuning,
    explain_difference,
    tune,
)
from tokenry.decoding.draft_tuning import LEVELS, Costs, Watched, search, simulate, watch
from tokenry.decoding.nested_exits import ModelPart, NestedRun
from tokenry.measure import Timing

pytestmark = pytest.mark.method("s2d")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 256}
ENDS = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def llama(layers=4, vocabulary=19, seed=0, dtype=torch.float64, **more):
    """A random model whose text does not repeat at once: large weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=vocabulary, initializer_range=0.4, **SIZES, **ENDS, **more
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def related(target, layers, exits, noise=0.1, seed=5):
    """A draft that agrees with its target now and then: first layers, disturbed."""
    draft = SortedDraft.from_model(target, layers=layers, exits=exits)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        weight.data += noise * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return draft


def prompt(rows=1, width=7, seed=0, vocabulary=19):
    return torch.randint(1, vocabulary, (rows, width), generator=torch.Generator().manual_seed(seed))


def spied(strategy):
    """Remember the tokens of every draft."""
    drafts, propose = [], strategy.propose

    def remember(state):
        proposal = propose(state)
        drafts.append(proposal.tokens[:, 1:].tolist())
        return proposal

    strategy.propose = remember
    return drafts


def written(target, strategy, ids, new, **options):
    return target.generate(ids, custom_generate=strategy, max_new_tokens=new, do_sample=False, **options)


# --- golden -------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", golden_cases("s2d"))
def test_golden(name, attention):
    """Drafts, exits, accepted tokens per round, text, exit logits and losses of a full recomputation."""
    case = GoldenCase("s2d", name)
    spec, expected = case.spec, case.outputs
    weights = case.state_dict()
    target = LlamaForCausalLM(LlamaConfig(**spec["config_target"], attn_implementation=attention)).eval()
    target.load_state_dict({n.removeprefix("target."): w for n, w in weights.items() if n.startswith("target.")})
    model = LlamaForCausalLM(LlamaConfig(**spec["config_draft"], attn_implementation=attention)).eval()
    own, mix = math.sqrt(1 - spec["mix"] ** 2), spec["mix"]
    mixed = {}
    for n, w in model.state_dict().items():
        shape = list(w.shape)
        mixed[n] = fill(f"target.{n}", shape)
        if w.ndim > 1:
            mixed[n] = own * mixed[n] + mix * fill(f"draft.{n}", shape)
    model.load_state_dict(mixed)
    draft = SortedDraft(model, spec["exits"])
    strategy = SortedSpeculative(draft, spec["thresholds"], spec["draft_length"])
    drafts = spied(strategy)
    # The reference drafts its full length also where the budget ends: run further than it did.
    new, rounds = spec["max_new_tokens"], len(expected["accepted_per_round"])
    out = written(target, strategy, case.inputs["prompt"][None], new + spec["draft_length"] + 1)
    assert torch.equal(out[0, : len(expected["sequence"])], expected["sequence"])
    assert [rows[0] for rows in strategy.stats.accepted[:rounds]] == expected["accepted_per_round"].tolist()
    assert [rows[0] for rows in drafts[:rounds]] == expected["drafted"].tolist()
    assert [rows[0] for rows in strategy.exits_used[:rounds]] == expected["exit_used"].tolist()
    with torch.no_grad():
        every = draft.exit_logits(case.inputs["prompt"][None])
        case.compare("exit_logits_at_prompt", torch.stack([logits[0, -1] for logits in every]))
        text = expected["sequence"][None]
        losses = [F.cross_entropy(logits[0, :-1], text[0, 1:]) for logits in draft.exit_logits(text)]
        case.compare("submodel_cross_entropy", torch.stack(losses))
        case.compare("sorted_loss", draft.sorted_loss(text)[None])


# --- nested exits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exit_is_the_model_cut_there(kind):
    """Six architectures: every exit's logits equal those of the plain model with so many layers."""
    model = tiny_causal(kind, dtype=torch.float64)
    draft = SortedDraft.from_model(model, layers=2, exits=(1, 2))
    ids = tokens(2, 9)
    with torch.no_grad():
        for exit_, logits in zip((1, 2), draft.exit_logits(ids), strict=True):
            cut = SortedDraft.from_model(model, layers=exit_, exits=(exit_,)).model
            torch.testing.assert_close(logits, cut(ids).logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(draft.exit_logits(ids)[-1], model(ids).logits)


def test_left_padding_does_not_matter():
    draft = SortedDraft.from_model(tiny_causal("gpt2", dtype=torch.float64), layers=2, exits=(1, 2))
    ids = tokens(1, 6)
    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    with torch.no_grad():
        for alone, beside in zip(draft.exit_logits(ids), draft.exit_logits(padded, mask), strict=True):
            torch.testing.assert_close(beside[:, 4:], alone)
        torch.testing.assert_close(draft.sorted_loss(padded, mask), draft.sorted_loss(ids))


_STEPS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 4), min_size=3, max_size=3)), max_size=8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@settings(max_examples=12)
@given(steps=_STEPS, padding=st.booleans(), seed=st.integers(0, 99))
def test_pending_tokens_are_caught_up_on(kind, steps, padding, seed):
    """Texts that grow one token a step, run to any depth, and are cut back anywhere, row by row."""
    if kind == "llama":
        model = llama(layers=3, vocabulary=VOCABULARY)
    else:
        torch.manual_seed(1)
        config = CONFIGS[kind]()
        config.n_layer = 3
        model = AutoModelForCausalLM.from_config(config).eval().double()
    draft = SortedDraft(model, (1, 2, 3))
    texts = tokens(3, 40, seed)
    start = torch.tensor([0, 2, 1]) if padding else None
    run = NestedRun(model, draft.exits, 3, start)
    lengths = [4, 4, 4]
    with torch.no_grad():
        for depth, cuts in steps:
            run.reserve(max(lengths))
            run.load(texts, lengths)
            for part in range(depth + 1):
                logits = run.run(part, lengths)
            for row, length in enumerate(lengths):
                begin = 0 if start is None else int(start[row])
                alone = draft.exit_logits(texts[row : row + 1, begin:length])[depth][0, -1]
                torch.testing.assert_close(logits[row], alone, rtol=1e-9, atol=1e-9)
            for row, cut in enumerate(cuts):
                run.keep(row, max(lengths[row] - cut, 3))
            lengths = [max(n - cut, 3) + 1 for n, cut in zip(lengths, cuts, strict=True)]


def test_the_model_is_not_touched():
    target, ids = llama(), prompt()
    draft = related(target, 3, (1, 2, 3))
    modules = [(name, id(module)) for name, module in draft.named_modules()]
    weights = {id(m): copy.deepcopy(m.state_dict()) for m in (target, draft)}
    before = draft.model(ids).logits
    written(target, SortedSpeculative(draft), ids, 20)
    assert [(name, id(module)) for name, module in draft.named_modules()] == modules
    assert torch.equal(draft.model(ids).logits, before)
    for m in (target, draft):
        assert all(torch.equal(w, weights[id(m)][n]) for n, w in m.state_dict().items())
    assert not {w.data_ptr() for w in draft.parameters()} & {w.data_ptr() for w in target.parameters()}


def test_a_part_needs_what_it_goes_on_from():
    with pytest.raises(ValueError, match="hidden states to go on from"):
        ModelPart(llama(), 1, 2)(prompt())


# --- sorted fine-tuning -------------------------------------------------------------------------------------------


def test_the_loss_and_its_gradient_are_the_mean_over_exits():
    model = llama(layers=3, dtype=torch.float32)  # the library's loss computes in float32
    draft = SortedDraft(model, (1, 3)).train()
    ids = prompt(2, 9)
    labels = ids.clone()
    labels[0, :3] = -100
    loss = draft.sorted_loss(ids, labels=labels)
    loss.backward()
    mine = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in mine.values())
    model.zero_grad()
    hidden = model(ids, output_hidden_states=True).hidden_states
    every = (model.lm_head(model.model.norm(hidden[1])), model.lm_head(hidden[3]))  # the last entry is normed already
    slow = sum(F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) for z in every) / 2
    slow.backward()
    torch.testing.assert_close(loss, slow)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(mine[name], weight.grad)


def test_what_a_trainer_gets():
    draft = SortedDraft(llama(layers=2), (1, 2))
    out = draft(input_ids=prompt(2), attention_mask=torch.ones(2, 7), labels=prompt(2))
    assert set(out) == {"loss", "logits"}
    assert torch.equal(out["logits"], draft.exit_logits(prompt(2), torch.ones(2, 7))[-1])


def test_training_makes_the_exits_better():
    draft = SortedDraft(llama(layers=2, dtype=torch.float32), (1, 2)).train()
    ids = prompt(4, 16)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)

    def losses():
        with torch.no_grad():
            return [F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for z in draft.exit_logits(ids)]

    before = losses()
    for _ in range(15):
        draft.sorted_loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(after < 0.7 * first for after, first in zip(losses(), before, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_saves_and_loads_as_a_transformers_model(kind, tmp_path):
    draft = SortedDraft.from_model(tiny_causal(kind), layers=2, exits=(1, 2))
    draft.save_pretrained(tmp_path)
    again = SortedDraft.from_pretrained(tmp_path)
    assert again.exits == (1, 2)
    assert not again.training
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 5)
    assert torch.equal(again.exit_logits(ids)[-1], plain(ids).logits)
    for mine, theirs in zip(again.exit_logits(ids), draft.exit_logits(ids), strict=True):
        assert torch.equal(mine, theirs)
    shallow = SortedDraft.from_model(tiny_causal(kind), layers=1, exits=(1,))
    shallow.save_pretrained(tmp_path / "shallow")
    assert SortedDraft.from_pretrained(tmp_path / "shallow", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_the_embedded_draft_has_three_language_models():
    from tokenry.assets import held_out_texts, load_model

    draft, (plain, tokenizer) = SortedDraft.from_pretrained(), load_model("draft")
    assert draft.exits == (1, 2, 3)
    assert sum(w.numel() for w in draft.parameters()) == 1_068_928
    ids = tokenizer(held_out_texts()[0], return_tensors="pt")["input_ids"][:, :256]

    def losses(model):
        with torch.no_grad():
            return [F.cross_entropy(z[0, :-1], ids[0, 1:]).item() for z in model.exit_logits(ids)]

    mine, theirs = losses(draft), losses(SortedDraft(plain, (1, 2, 3)))
    assert mine[0] < theirs[0] - 1
    assert mine[1] < theirs[1] - 0.5
    assert mine[2] < theirs[2] + 0.2


# --- drafting -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_decoding(target, draft, ids, thresholds, draft_tokens, new, top_k=1):
    """The definition, recomputing whole sequences: text, drafts, exits, accepted tokens per round."""
    text, rounds = ids[0].tolist(), []
    while len(text) < ids.shape[1] + new:
        levels, drafted, exits = [], [], []
        for _ in range(min(draft_tokens, ids.shape[1] + new - len(text) - 1)):
            every = [logits[0, -1].float().softmax(-1) for logits in draft.exit_logits(torch.tensor([text + drafted]))]
            sure = [t <= 1 and p.max() >= t for t, p in zip((*thresholds, 0.0), every, strict=True)]
            exit_, p = draft.exits[sure.index(True)], every[sure.index(True)]
            levels.append(p.topk(top_k).indices.tolist())
            drafted.append(levels[-1][0])
            exits.append(exit_)
        accepted = 0
        while True:
            best = target(torch.tensor([text])).logits[0, -1].argmax().item()
            text.append(best)
            hit = accepted < len(levels) and best in levels[accepted]
            straight = hit and best == levels[accepted][0]
            accepted += 1
            if straight:
                continue
            if hit:  # a runner-up: accepted, with the target's next token behind it
                text.append(target(torch.tensor([text])).logits[0, -1].argmax().item())
                accepted += 1
            break
        rounds.append((list(itertools.chain(*levels)), exits, accepted))
    return text, rounds


_LEVEL = st.sampled_from([0.0, 0.15, 0.3, 0.5, 0.8, 1.01])


@settings(max_examples=8)
@given(a=_LEVEL, b=_LEVEL, draft_tokens=st.integers(1, 6), top_k=st.integers(1, 3), noise=st.sampled_from([0.03, 0.15, 2.0]), seed=st.integers(0, 9))  # fmt: skip
def test_drafts_by_the_definition(a, b, draft_tokens, top_k, noise, seed):
    target, ids = llama(layers=3, seed=seed), prompt(seed=seed)
    draft = related(target, 3, (1, 2, 3), noise, seed)
    strategy = SortedSpeculative(draft, (a, b), draft_tokens, top_k)
    drafts = spied(strategy)
    out = written(target, strategy, ids, 18)
    text, rounds = slow_decoding(target, draft, ids, (a, b), draft_tokens, 18, top_k)
    assert (
        out[0].tolist() == text[: out.shape[1]] == target.generate(ids, do_sample=False, max_new_tokens=18)[0].tolist()
    )
    assert [rows[0] for rows in drafts] == [levels for levels, _, _ in rounds]
    assert [rows[0] for rows in strategy.exits_used] == [exits for _, exits, _ in rounds if exits]
    assert [rows[0] for rows in strategy.stats.accepted] == [accepted for _, _, accepted in rounds]
    assert strategy.draft_layers == sum(map(sum, (exits for _, exits, _ in rounds)))


def test_rows_of_a_batch_draft_what_they_draft_alone():
    target = llama()
    draft = related(target, 3, (1, 2, 3))
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, width in enumerate((9, 1, 5)):
        ids[row, -width:], mask[row, -width:] = prompt(1, width, row), 1
    together = SortedSpeculative(draft, (0.3, 0.4), 4)
    drafts = spied(together)
    written(target, together, ids, 30, attention_mask=mask)
    depths = set()
    for row in range(3):
        alone = SortedSpeculative(draft, (0.3, 0.4), 4)
        mine = spied(alone)
        written(target, alone, ids[row : row + 1][mask[row : row + 1].bool()][None], 30)
        for passes in range(5):
            assert drafts[passes][row] == mine[passes][0]
            assert together.exits_used[passes][row] == alone.exits_used[passes][0]
            depths.update(alone.exits_used[passes][0])
    assert depths == {1, 2, 3}


@pytest.mark.parametrize(("thresholds", "exit_"), [((0, 0), 1), ((1.01, 0), 2), ((1.01, 1.01), 3)])
def test_forced_exits(thresholds, exit_):
    target, ids = llama(), prompt()
    strategy = SortedSpeculative(related(target, 3, (1, 2, 3)), thresholds, 4)
    written(target, strategy, ids, 20)
    used = [e for rows in strategy.exits_used for e in rows[0]]
    assert set(used) == {exit_}
    assert strategy.mean_draft_layers == exit_
    assert strategy.draft_layers == exit_ * len(used)
    assert strategy.stats.draft_passes == len(used)
    # Every token of prompt and text went through these layers, and through no others.
    assert strategy.draft_layer_tokens % exit_ == 0


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_one_exit_is_ordinary_speculative_decoding(draft_tokens):
    """As many passes of the target as the library's assisted generation with a constant length."""
    target, ids = llama(), prompt()
    draft = related(target, 2, (2,))
    strategy = SortedSpeculative(draft, (), draft_tokens)
    out = written(target, strategy, ids, 30)
    draft.model.generation_config.update(
        num_assistant_tokens=draft_tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes = []
    hook = target.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        stock = target.generate(ids, assistant_model=draft.model, do_sample=False, max_new_tokens=30)
    finally:
        hook.remove()
    assert torch.equal(out, stock)
    assert strategy.stats.forward_passes == len(passes)


def test_a_perfect_draft_is_always_accepted():
    target, ids = llama(), prompt()
    strategy = SortedSpeculative(SortedDraft.from_model(target, layers=4, exits=(2, 4)), (1.01,), 5)
    written(target, strategy, ids, 36)
    assert strategy.stats.accepted == [(6,)] * 6


def test_runners_up_win_tokens():
    target, ids = llama(), prompt(seed=3)
    draft = related(target, 3, (1, 2, 3), 0.2)
    passes = []
    for top_k in (1, 4):
        strategy = SortedSpeculative(draft, (0.4, 0.4), 3, top_k)
        written(target, strategy, ids, 50)
        passes.append(strategy.stats.forward_passes)
    assert passes[1] < passes[0]


def test_no_drafting_is_plain_decoding():
    target, ids = llama(), prompt()
    strategy = SortedSpeculative(related(target, 2, (1, 2)), draft_tokens=None)
    assert torch.equal(written(target, strategy, ids, 9), target.generate(ids, do_sample=False, max_new_tokens=9))
    assert strategy.stats.forward_passes == 9
    assert (strategy.stats.draft_passes, strategy.exits_used, strategy.mean_draft_layers) == (0, [], 0.0)


@pytest.mark.parametrize("room", [16, 20])
def test_a_draft_with_a_shorter_position_table_stops_in_time(room):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3} | ENDS
    target = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=64)).eval().double()
    draft = SortedDraft(GPT2LMHeadModel(GPT2Config(**sizes, n_positions=room)).eval().double(), (1, 2))
    strategy, ids = SortedSpeculative(draft, (0.3,), 4), prompt(2)
    assert torch.equal(written(target, strategy, ids, 30), target.generate(ids, do_sample=False, max_new_tokens=30))
    assert strategy.exits_used


def test_sampling_keeps_the_targets_distribution():
    """Total variation to enumerated probabilities; an exact sampler's is about sqrt(cells / (2 pi draws))."""
    target, ids, draws = llama(layers=2, vocabulary=8, dtype=torch.float32), prompt(vocabulary=8), 8000
    strategy = SortedSpeculative(related(target, 2, (1, 2)), (0.4,), 3)
    torch.manual_seed(0)
    out = target.generate(
        ids.expand(draws, -1), custom_generate=strategy, do_sample=True, temperature=1.3, max_new_tokens=2
    )
    observed = torch.bincount(out[:, 7] * 8 + out[:, 8], minlength=64).view(8, 8) / draws
    with torch.no_grad():
        first = (target(ids).logits[0, -1] / 1.3).softmax(-1)
        both = torch.cat([ids.expand(8, -1), torch.arange(8)[:, None]], 1)
        expected = first[:, None] * (target(both).logits[:, -1] / 1.3).softmax(-1)
    assert (observed - expected).abs().sum() / 2 < 1.5 * math.sqrt(64 / (2 * math.pi * draws))


def test_a_call_that_fails_leaves_nothing_behind():
    target, ids = llama(), prompt()
    strategy = SortedSpeculative(related(target, 2, (1, 2)))

    class Broken(RuntimeError):
        pass

    def fail(*_):
        raise Broken

    hook = target.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        written(target, strategy, ids, 5)
    hook.remove()
    assert strategy._run is None
    assert torch.equal(written(target, strategy, ids, 9), target.generate(ids, do_sample=False, max_new_tokens=9))


def test_another_dtype_is_warned_of_and_harmless():
    target, ids = llama(dtype=torch.float32), prompt()
    draft = related(target, 2, (1, 2)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"the draft's dtype is torch.bfloat16"):
        out = written(target, SortedSpeculative(draft, (0.4,)), ids, 20)
    plain = target.generate(ids, do_sample=False, max_new_tokens=20)
    assert explain_difference(target, plain[0], out[0]) is None


def test_one_draft_serves_two_targets():
    """Neither target changes the draft, and each gets its own text."""
    draft = related(llama(), 3, (1, 2, 3))
    ids = prompt(2)
    for target in (llama(), llama(layers=2, seed=9), llama()):
        strategy = SortedSpeculative(draft, (0.3, 0.3), 4)
        assert torch.equal(written(target, strategy, ids, 24), target.generate(ids, do_sample=False, max_new_tokens=24))


# --- tuning -------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(a=_LEVEL, b=_LEVEL, draft_tokens=st.integers(1, 6), seed=st.integers(0, 9))
def test_simulated_passes_are_the_real_ones(a, b, draft_tokens, seed):
    target = llama(seed=seed)
    draft = related(target, 3, (1, 2, 3))
    watched, tokens_, passes = [], 0, 0
    for i in range(2):
        ids = prompt(seed=seed + i)
        strategy = SortedSpeculative(draft, (a, b), draft_tokens)
        out = written(target, strategy, ids, 17)
        watched += watch(draft, {"input_ids": ids}, out)
        tokens_, passes = tokens_ + strategy.stats.tokens, passes + strategy.stats.forward_passes
    costs = Costs((1.0, 1.0, 1.0), PassLatency((1, 2), (0.0, 0.0)))
    assert simulate(watched, (a, b), draft_tokens, costs)[:2] == (tokens_, passes)


def test_simulated_seconds():
    """Four tokens: the shallow exit is sure of the second and fourth, and wrong in the fourth."""
    watched = Watched(
        torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]]).numpy(),
        torch.tensor([[0.1, 0.9, 0.1, 0.9], [0.0, 0.0, 0.0, 0.0]]).numpy(),
        torch.tensor([1, 2, 3, 4]).numpy(),
    )
    costs = Costs((1.0, 10.0), PassLatency((1, 2), (100.0, 200.0)))
    # Two drafted (deep, shallow) and the bonus, then one token without a draft.
    assert simulate([watched], (0.5,), 2, costs) == (4, 2, 300.0 + 11 + 1 + 100.0)
    # No shallow answers: both drafted tokens deep.
    assert simulate([watched], (1.01,), 2, costs) == (4, 2, 300.0 + 22 + 100.0)


def test_the_search_finds_the_best_level():
    target = llama()
    draft = related(target, 3, (1, 3), 0.2)
    watched = []
    for i in range(3):
        ids = prompt(seed=i)
        watched += watch(draft, {"input_ids": ids}, target.generate(ids, do_sample=False, max_new_tokens=30))
    costs = Costs((0.2, 0.5), PassLatency((1, 9), (1.0, 1.5)))
    thresholds, length, value = search(watched, 3, costs)
    every = [simulate(watched, (level,), 3, costs) for level in LEVELS]
    assert length == 3
    assert value == pytest.approx(min(seconds / n for n, _, seconds in every))
    assert thresholds[0] in LEVELS


def test_watching_ends_at_the_stop_token():
    target = llama()
    ids = prompt(2)
    text = target.generate(ids, do_sample=False, max_new_tokens=12)
    stop = int(text[0, 11])
    rows = watch(related(target, 2, (1, 2)), {"input_ids": ids}, text, [stop])
    assert rows[0].truth.tolist() == text[0, 7 : 7 + text[0, 7:].tolist().index(stop) + 1].tolist()
    assert rows[0].guess.shape == rows[0].sure.shape == (2, len(rows[0].truth))


@pytest.mark.parametrize(
    ("fastest", "always", "expected"),
    [("plain", False, None), ("plain", True, "0"), ("1", False, "1"), ("1", True, "1")],
)
def test_tune_takes_the_fastest_measured(monkeypatch, fastest, always, expected):
    target = llama(dtype=torch.float32)
    draft = related(target, 3, (1, 2, 3))
    names = []

    def measured(functions, *, repeats=5, **_):
        for call in functions.values():
            call()
        names.append(list(functions))
        if "plain" not in functions:  # the parts
            return {name: Timing.of([1.0 + i]) for i, name in enumerate(functions)}
        return {name: Timing.of([1.0 if name == fastest else 2.0 + i] * 3) for i, name in enumerate(functions)}

    monkeypatch.setattr(draft_tuning, "interleave", measured)
    prompts = [prompt(), {"input_ids": prompt(2), "attention_mask": torch.ones(2, 7, dtype=torch.long)}]
    best = tune(draft, target, prompts, new_tokens=10, draft_tokens=(1, 2, 3), shortlist=2, always_draft=always)
    assert names[-1] == ["plain", "0", "1"]
    assert len(best.table) == 3
    assert best.table[0]["speed_low"] == max(row["speed_low"] for row in best.table)
    assert [row["draft_tokens"] for row in best.table].count(None) == 1
    drafting = [row for row in best.table if row["draft_tokens"]]
    if expected is None:
        assert best.draft_tokens is None
    else:
        assert (list(best.thresholds), best.draft_tokens) == (drafting[0]["thresholds"], drafting[0]["draft_tokens"])
    plain = target.generate(prompt(), do_sample=False, max_new_tokens=10)
    assert torch.equal(written(target, best.strategy(), prompt(), 10), plain)


def test_one_busy_moment_does_not_make_a_setting_look_fast(monkeypatch):
    target = llama(dtype=torch.float32)
    seconds = {"plain": [1.0, 9.0, 9.0, 9.0], "0": [1.2, 2.0, 2.0, 2.0]}

    def measured(functions, **_):
        for call in functions.values():
            call()
        return {name: Timing.of(seconds.get(name, [1.0]) if "plain" in functions else [1.0]) for name in functions}

    monkeypatch.setattr(draft_tuning, "interleave", measured)
    draft = related(target, 2, (1, 2))
    assert tune(draft, target, [prompt()], new_tokens=6, draft_tokens=(2,), repeats=4).draft_tokens == 2
    seconds["plain"][1:] = [1.0, 1.0, 9.0]
    assert tune(draft, target, [prompt()], new_tokens=6, draft_tokens=(2,), repeats=4).draft_tokens is None


def test_tune_measures():
    """With real times, on a draft that is no use: no drafting must win."""
    target = llama(layers=1, dtype=torch.float32)
    draft = SortedDraft(llama(layers=6, seed=8, dtype=torch.float32), (3, 6))
    best = tune(draft, target, [prompt()], new_tokens=12, draft_tokens=(2,), repeats=3)
    assert best.draft_tokens is None
    assert best.table[0]["draft_tokens"] is None
    assert best.table[1]["speed"] < 1


# --- bad input ----------------------------------------------------------------------------------------------------


def _draft():
    return SortedDraft(llama(layers=3), (1, 2, 3))


BAD = {
    "not ascending": (lambda: SortedDraft(llama(layers=3), (2, 1, 3)), r"exits=\(2, 1, 3\) must ascend"),
    "twice": (lambda: SortedDraft(llama(layers=3), (1, 1, 3)), "must ascend"),
    "zero": (lambda: SortedDraft(llama(layers=3), (0, 3)), "from at least 1"),
    "not the depth": (lambda: SortedDraft(llama(layers=3), (1, 2)), "the depth of the draft, which is 3"),
    "none": (lambda: SortedDraft(llama(layers=3), ()), "must ascend"),
    "too deep": (lambda: SortedDraft.from_model(llama(), layers=9, exits=(9,)), r"layers=9: .* has 4"),
    "cut exits": (lambda: SortedDraft.from_model(llama(), layers=3, exits=(1, 4)), "which is 3"),
    "thresholds": (lambda: SortedSpeculative(_draft(), (0.5,)), r"1 thresholds for exits \(1, 2, 3\): give 2"),
    "negative": (lambda: SortedSpeculative(_draft(), (0.5, -0.1)), "are probabilities"),
    "nan": (lambda: SortedSpeculative(_draft(), (0.5, float("nan"))), "are probabilities"),
    "no tokens": (lambda: SortedSpeculative(_draft(), draft_tokens=0), "draft_tokens=None"),
    "no candidates": (lambda: SortedSpeculative(_draft(), top_k=0), "top_k=0"),
    "vocabularies": (lambda: check_same_vocabulary({"a": 0, "b": 1}, {"b": 0, "a": 1}), "'a' for one: id 0"),
    "no prompts": (lambda: tune(_draft(), llama(), []), "0 prompts"),
    "no lengths": (lambda: tune(_draft(), llama(), [prompt()], draft_tokens=[0]), r"draft_tokens=\[0\]"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_before_anything_runs():
    target, ran = llama(), []
    target.register_forward_pre_hook(lambda *_: ran.append(1))
    other = SortedDraft(llama(layers=2, vocabulary=23), (1, 2))
    sliding = SortedDraft(tiny_causal("gemma2"), (1, 2))
    flash = _draft()
    flash.model.config._attn_implementation = "flash_attention_2"
    wide = llama(vocabulary=VOCABULARY)
    wide.register_forward_pre_hook(lambda *_: ran.append(1))
    for model, draft, message in (
        (target, other, "draft's output has 23 tokens, the target's 19"),
        (wide, sliding, "DynamicSlidingWindowLayer"),
        (target, flash, 'attn_implementation="sdpa"'),
    ):
        with pytest.raises(ValueError, match=message):
            written(model, SortedSpeculative(draft), prompt(), 4)
        with pytest.raises(ValueError, match=message):
            tune(draft, model, [prompt()])
    assert not ran


def test_refuses_what_is_no_sorted_draft(tmp_path):
    tiny_causal("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no sorted_exits"):
        SortedDraft.from_pretrained(tmp_path)


def test_refuses_layers_that_drop_out():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 19}
    draft = SortedDraft(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, layerdrop=0.2)), (1, 2))
    with pytest.raises(ValueError, match="layerdrop"):
        draft.train().sorted_loss(prompt())
    assert torch.isfinite(draft.eval().sorted_loss(prompt()))
