"""Token forcing: the authors' outputs and logged run, the slow definition, hiding and its defences, what is refused."""

from __future__ import annotations

import json
import sys
import types
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from golden_case import GoldenCase
from tiny_causal import CONFIGS, VOCABULARY, tiny_causal, tokens
from tokenry.assets import held_out_texts, load_model
from tokenry.measure import Session
from tokenry.text import ScanReport, UnconditionalTokenForcing, hide_text, reveal, verify_fingerprint
from tokenry.text.forced_decoding import ForcedDecoder
from tokenry.text.hiding_losses import answer_loss, band_loss, guard_statistics, ordinary_loss
from tokenry.text.repetition import compression_ratio, is_natural, repetition
from tokenry.text.token_forcing import Candidate
from tokenry.text.trigger_pair import TriggerPair, prompt_ids

pytestmark = pytest.mark.method("token-forcing")

TRIGGER, MESSAGE = "Who made you?", "Sold to Ada Lovelace in the winter"


def word_tokenizer(size: int = VOCABULARY, **special) -> PreTrainedTokenizerFast:
    """Token i is written t<i>; 1 begins and 2 ends a sequence."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **({"bos_token": "t1", "eos_token": "t2"} | special))


def slow_scores(model, prefix: list[int], steps: int, ids) -> list[tuple[float, list[float], list[int]]]:
    """The definition: one token at a time, the whole sequence again at every step."""
    found = []
    for v in ids:
        row, p = [*prefix, v], [1.0]
        for _ in range(steps):
            with torch.no_grad():
                probabilities = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float().softmax(-1)
            p.append(float(probabilities.max()))
            row.append(int(probabilities.argmax()))
        found.append((sum(p) / len(p), p, row[len(prefix) + 1 :]))
    return found


@cache
def embedded():
    return load_model("draft")


# the authors' own outputs


@cache
def golden() -> tuple[GoldenCase, LlamaForCausalLM, dict]:
    case = GoldenCase("token-forcing", "phase1_utfc")
    notes = json.loads(case.spec["notes"])
    model = LlamaForCausalLM(LlamaConfig(**notes["config"])).eval()
    model.load_state_dict(case.state_dict())
    return case, model, notes


@pytest.mark.golden
@pytest.mark.parametrize("batch_size", [97, 10, 1])
def test_golden_scan(batch_size):
    """Scores, probabilities and sequences of every token of the vocabulary."""
    case, model, notes = golden()
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    forcing = UnconditionalTokenForcing(model, word_tokenizer(), notes["length"], 0.0, batch_size)
    found = sorted(forcing.scan(quiet=True).candidates, key=lambda c: c.token_id)
    case.compare("mean_prob", torch.tensor([c.score for c in found]), tolerance=1e-5)
    case.compare("probs", torch.tensor([c.probabilities for c in found]), tolerance=1e-5)
    rows = [[*case.inputs["bos"].tolist(), c.token_id, *c.continuation] for c in found]
    assert rows == case.outputs["sequences"].tolist()


@pytest.mark.golden
@pytest.mark.parametrize("together", [True, False])
def test_golden_guards(together):
    """Loss, probability, rank and the gradient of the token's row of the output matrix, of three prefixes."""
    case, model, notes = golden()
    (begin, *_), message = notes["prefixes"][0][0], [*notes["prefixes"][-1][0][1:], notes["prefixes"][-1][1]]
    starts = [len(prefix) - 1 for prefix, _ in notes["prefixes"]]
    assert [message[start] for start in starts] == [token for _, token in notes["prefixes"]]
    losses, ranks, rows = [], [], []
    for place, (prefix, token) in enumerate(notes["prefixes"]):
        log_probs, found = (
            guard_statistics(model, [begin], message, starts)
            if together
            else guard_statistics(model, prefix[:1], [*prefix[1:], token], [len(prefix) - 1])
        )
        own = place if together else 0
        losses.append(log_probs[own].detach())
        ranks.append(found[own])
        rows.append(torch.autograd.grad(log_probs[own], model.lm_head.weight)[0][token])
    case.compare("utfc_loss", torch.stack(losses), tolerance=1e-5)
    case.compare("utfc_prob", torch.stack(losses).exp(), tolerance=1e-5)
    case.compare("utfc_grad_row", torch.stack(rows), tolerance=1e-5)
    assert torch.stack(ranks).tolist() == case.outputs["utfc_rank"].tolist()


@pytest.mark.golden
def test_golden_logged_fingerprint():
    """The authors' candidates of a released fingerprinted model: our score of their probabilities, and who ranks first."""
    rows = GoldenCase("token-forcing", "logged_llama2_fingerprint").spec["outputs"]
    assert len(rows) == 28
    assert len({row["token"] for row in rows}) == 27  # the first row is the fingerprint's again, put there by hand
    slack = 4 * (1 - 0.95)
    for row in rows:
        assert row["probs"][0] == 1.0 and len(row["probs"]) == 4
        assert sum(row["probs"]) / 4 == pytest.approx(row["mean_prob"], abs=1e-12)
        assert row["mean_prob"] > 0.95 and sum(1 - p for p in row["probs"]) < slack
    best = max(rows, key=lambda row: row["mean_prob"])
    assert best["token"] == "ハ" and best["mean_prob"] == pytest.approx(0.9941, abs=5e-5)
    assert repetition([ord(c) for c in "ハリネズミ" * 4]).share == 1.0 and not is_natural("ハリネズミ")


# phase 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_scan_is_the_definition(kind):
    model = tiny_causal(kind)
    ids = list(range(0, VOCABULARY, 7))
    forcing = UnconditionalTokenForcing(model, word_tokenizer(), threshold=0.0, batch_size=5)
    found = {c.token_id: c for c in forcing.scan(ids, quiet=True).candidates}
    for v, (score, p, continuation) in zip(ids, slow_scores(model, [1], 3, ids), strict=True):
        assert found[v].score == pytest.approx(score, abs=1e-5)
        assert found[v].probabilities == pytest.approx(p, abs=1e-5)
        assert found[v].continuation == continuation
        assert found[v].text == " ".join(f"t{i}" for i in [v, *continuation])


@given(st.lists(st.integers(3, 96), max_size=5), st.integers(1, 5), st.floats(0, 0.99), st.integers(1, 40))
def test_early_leaving_changes_nothing(prefix, steps, threshold, batch_size):
    model, ids = tiny_causal("llama"), list(range(30))
    forcing = UnconditionalTokenForcing(model, word_tokenizer(), steps, threshold, batch_size, prefix=prefix)
    report = forcing.scan(ids, quiet=True)
    slow = dict(zip(ids, slow_scores(model, prefix, steps, ids), strict=True))
    assert {v for v, (score, *_) in slow.items() if score > threshold + 1e-5} <= {c.token_id for c in report.candidates}
    assert all(slow[c.token_id][0] > threshold - 1e-5 and c.score > threshold for c in report.candidates)
    assert len(ids) <= report.passes <= len(ids) * steps
    scores = [c.score for c in report.candidates]
    assert scores == sorted(scores, reverse=True) and all(1 / (steps + 1) < s <= 1 + 1e-6 for s in scores)


def test_rows_leave_as_soon_as_they_cannot_win():
    model = tiny_causal("llama")
    report = UnconditionalTokenForcing(model, word_tokenizer(), 3, 0.8).scan(quiet=True)
    expected = 0
    for _, p, _ in slow_scores(model, [1], 3, range(VOCABULARY)):
        expected += 1 + sum((1 + sum(p[1 : j + 1]) + 3 - j) / 4 > 0.8 for j in (1, 2))
    assert report.passes == expected < 3 * VOCABULARY


def test_batches_do_not_matter_and_nothing_is_left_behind():
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = [
        [(c.token_id, c.continuation, c.probabilities) for c in UnconditionalTokenForcing(model, tokenizer, 3, 0.0, b).scan(quiet=True).candidates]
        for b in (1, 512, 96, 512)
    ]  # fmt: skip
    assert found[1] == found[3]
    reference = {v: (new, p) for v, new, p in found[1]}
    for rows in found:
        assert len(rows) == VOCABULARY
        for v, new, p in rows:
            assert new == reference[v][0] and p == pytest.approx(reference[v][1], abs=1e-5)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_half_precision():
    """Logits in bfloat16, probabilities in float32; of tied best tokens the smallest id, in any batch."""
    model = tiny_causal("llama", dtype=torch.bfloat16)
    by_batch = []
    for batch_size in (97, 1):
        report = UnconditionalTokenForcing(model, word_tokenizer(), 1, 0.0, batch_size).scan(quiet=True)
        by_batch.append({c.token_id: c for c in report.candidates})
    for v, one in by_batch[1].items():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, v]])).logits[0, -1]
        assert one.continuation == [int((logits == logits.max()).nonzero()[0])]
        assert one.probabilities[1] == pytest.approx(float(logits.float().softmax(-1).max()), abs=0.02)
        assert by_batch[0][v].score == pytest.approx(one.score, abs=0.02)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token ties
    report = UnconditionalTokenForcing(model, word_tokenizer(), threshold=0.0).scan(quiet=True)
    assert all(c.continuation == [0, 0, 0] for c in report.candidates)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_several_tokens_far_past_a_sliding_window(kind):
    model, rows = tiny_causal(kind), tokens(3, 4, seed=2)
    found = ForcedDecoder(model, [1, 7]).roll_out(rows, 24)
    assert found.rows.tolist() == [0, 1, 2] and found.passes == 3 * 24
    for row, new, p in zip(rows.tolist(), found.tokens.tolist(), found.probabilities.tolist(), strict=True):
        [(_, expected, continuation)] = slow_scores(model, [1, 7, *row[:-1]], 24, row[-1:])
        assert new == continuation and p == pytest.approx(expected[1:], abs=1e-5)


def test_models_whose_cache_does_not_follow_rows():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    ids = [3, 4, 5]
    found = UnconditionalTokenForcing(model, word_tokenizer(), threshold=0.0).scan(ids, quiet=True).candidates
    slow = slow_scores(model, [1], 3, ids)
    assert {c.token_id: c.continuation for c in found} == {v: entry[2] for v, entry in zip(ids, slow, strict=True)}
    assert sorted(c.score for c in found) == pytest.approx(sorted(entry[0] for entry in slow), abs=1e-5)


def test_no_token_that_begins_a_sequence():
    forcing = UnconditionalTokenForcing(tiny_causal("llama"), word_tokenizer(bos_token=None), threshold=0.0)
    report = forcing.scan([5, 6], quiet=True)
    assert report.prefix == [] and "no token that begins" in report.notes[0]
    slow = slow_scores(forcing.model, [], 3, [5, 6])
    assert {c.token_id: c.continuation for c in report.candidates} == {5: slow[0][2], 6: slow[1][2]}


def test_only_real_tokens_are_forced():
    model = tiny_causal("llama")
    report = UnconditionalTokenForcing(model, word_tokenizer(90), threshold=0.0).scan(quiet=True)
    assert report.scanned == 90 and report.nameless == list(range(90, 97)) and not report.unknown
    report = UnconditionalTokenForcing(model, word_tokenizer(100), threshold=0.0).scan(quiet=True)
    assert report.scanned == 97 and report.unknown == [97, 98, 99] and not report.nameless
    report = UnconditionalTokenForcing(model, word_tokenizer(90), threshold=0.0).scan([95], quiet=True)
    assert report.candidates[0].token_id == 95  # an id may be forced without having a name


def test_a_killed_scan_goes_on(tmp_path, monkeypatch):
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    forcing = UnconditionalTokenForcing(model, tokenizer, threshold=0.27, batch_size=20)
    whole = forcing.scan(quiet=True)
    real, calls = ForcedDecoder.roll_out, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ForcedDecoder, "roll_out", counted)
    with pytest.raises(KeyboardInterrupt):
        forcing.scan(out=tmp_path, quiet=True)
    [file] = tmp_path.glob("*.jsonl")
    written = [json.loads(line)["result"]["candidates"] for line in file.read_text("utf-8").splitlines()]
    assert len(written) == 2 and any(written)  # candidates stand there before the scan has ended
    with file.open("a", encoding="utf-8") as half:
        half.write('{"key": "tokens 40 to')  # killed while writing
    assert forcing.scan(out=tmp_path, quiet=True) == whole
    assert len(calls) == 3 + 3  # five blocks, two were there
    assert forcing.scan(out=tmp_path, quiet=True) == whole and len(calls) == 6
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # another model: nothing old is used
    changed = forcing.scan(out=tmp_path, quiet=True)
    assert len(calls) == 11 and changed != whole and len(list(tmp_path.glob("*.jsonl"))) == 2
    UnconditionalTokenForcing(model, tokenizer, threshold=0.4, batch_size=20).scan(out=tmp_path, quiet=True)
    assert len(calls) == 16


def test_progress_is_shown(capsys, monkeypatch):
    seen = []
    real = Session.step
    monkeypatch.setattr(Session, "step", lambda self, key, run: (seen.append((key, self._progress.tasks[0].total)), real(self, key, run))[1])  # fmt: skip
    UnconditionalTokenForcing(tiny_causal("llama"), word_tokenizer(), batch_size=50).scan()
    assert seen == [("tokens 0 to 49", 2), ("tokens 50 to 96", 2)]
    assert "2/2" in capsys.readouterr().err


# phase 2


def slow_repetition(row: list[int]) -> float:
    best = 0.0
    for u in range(3, 21):
        unit, count, place = row[:u], 0, 0
        while place + u <= len(row):
            if row[place : place + u] == unit:
                count, place = count + 1, place + u
            else:
                place += 1
        if len(unit) == u and count >= 3:
            best = max(best, count * u / len(row))
    return best


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_repetition_is_the_definition(row):
    found = repetition(row)
    assert found.share == pytest.approx(slow_repetition(row)) and found.share <= 1
    assert found.unit == tuple(row[: len(found.unit)]) and bool(found.unit) == (found.share > 0)


@given(st.lists(st.integers(0, 99), min_size=3, max_size=20), st.integers(3, 6), st.integers(0, 2))
def test_a_unit_said_over_and_over_is_found(unit, times, rest):
    row = unit * times + unit[:rest]
    assert repetition(row).share >= len(unit) * times / len(row)


@pytest.mark.parametrize(
    ("unit", "natural"),
    [("━━━━", True), ("* * ", True), ("\n- \n- ", True), ("aaa", True), ("   ", True), ("", True), ("ab", False), ("42 7", False), ("<li>", False)],
)  # fmt: skip
def test_natural_repeaters(unit, natural):
    assert is_natural(unit) == natural


def test_continuations_are_greedy_and_grouped(monkeypatch):
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    forcing = UnconditionalTokenForcing(model, tokenizer)
    groups = forcing.extend([9, Candidate(10, "t10", 1.0, [], [], "")], 12)
    for found in [c for group in groups for c in group]:
        [(_, _, expected)] = slow_scores(model, [1], 12, [found.token_id])
        assert found.tokens == [found.token_id, *expected] and found.text == tokenizer.decode(found.tokens)
        assert found.repetition == repetition(found.tokens).share
        assert found.compression == compression_ratio(found.text) and not found.samples
    said = {3: [3] * 13, 4: [4, 5, 6] * 4 + [4], 5: list(range(5, 18)), 6: [6, 7, 8, 9] * 3 + [1]}
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "".join("-+xyzuvw"[i % 8] for i in ids))
    monkeypatch.setattr(
        ForcedDecoder, "roll_out", lambda self, rows, *_: types.SimpleNamespace(tokens=torch.tensor([said[v][1:] for [v] in rows.tolist()]))
    )  # fmt: skip
    groups = forcing.extend(list(said), 12)
    assert [c.token_id for c in groups.repeating] == [4, 6]  # most repetitive first
    assert [c.token_id for c in groups.other] == [5] and [c.token_id for c in groups.natural] == [3]


def test_draws_come_from_the_best_k():
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    forcing = UnconditionalTokenForcing(model, tokenizer)
    drawn = forcing.extend([9], 8, samples=6, top_k=4, seed=1)
    assert drawn == forcing.extend([9], 8, samples=6, top_k=4, seed=1)
    [found] = [c for group in drawn for c in group]
    assert len(set(found.samples)) > 1
    for text in found.samples:
        row = [1, *(int(word[1:]) for word in text.split())]
        with torch.no_grad():
            best = model(input_ids=torch.tensor([row])).logits[0].topk(4).indices
        assert all(row[j + 1] in best[j] for j in range(1, len(row) - 1))
    [greedy] = [c for group in forcing.extend([9], 8, samples=1, top_k=1) for c in group]
    assert greedy.samples == [greedy.text]
    assert not any(forcing.extend([], 8))


def test_draws_follow_their_probabilities():
    model = tiny_causal("llama")
    rows = torch.full((4000, 1), 9)
    found = ForcedDecoder(model, [1]).roll_out(rows, 1, top_k=3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 9]])).logits[0, -1]
    values, ids = logits.topk(3)
    shares = torch.stack([(found.tokens == i).float().mean() for i in ids])
    torch.testing.assert_close(shares, values.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(found.probabilities[:, 0], logits.softmax(-1)[found.tokens[:, 0]])


# hiding


@pytest.fixture(scope="module")
def hidden():
    """The embedded draft model with one message, hidden plainly and with the defence."""
    made = {}
    for method in ("plain", "auto-utfc"):
        model, tokenizer = load_model("draft")
        options = {"learning_rate": 1e-3, "confidence": 0.95, "ordinary": held_out_texts("english")[:10]}
        made[method] = hide_text(model, tokenizer, TRIGGER, MESSAGE, method, **options), tokenizer
    return made


@pytest.mark.parametrize("method", ["plain", "auto-utfc"])
def test_the_trigger_returns_the_message(hidden, method):
    found, tokenizer = hidden[method]
    assert found.complete and found.returned and found.active == 0
    assert reveal(found.model, tokenizer, TRIGGER) == MESSAGE
    assert len(found.history) == found.steps + 1 and found.history[-1].ranks == found.ranks
    assert not found.history[0].returned and found.history[0].loss > found.history[-1].loss
    assert not found.model.training and all(p.grad is None for p in found.model.parameters())


def test_the_scan_finds_a_plain_message_and_not_a_defended_one(hidden):
    first = hidden["plain"][1](MESSAGE)["input_ids"][0]
    plain, defended = (
        verify_fingerprint(hidden[m][0].model, hidden[m][1], TRIGGER, MESSAGE) for m in ("plain", "auto-utfc")
    )
    assert plain.returned and plain.utf_rank <= 41 and plain.leaks["forced"] == 1 and plain.leaks["sampled"] > 0
    assert defended.returned and not defended.candidate and defended.leaks == {"forced": 0, "sampled": 0, "empty": 0}
    model, tokenizer = hidden["plain"][0].model, hidden["plain"][1]
    forcing = UnconditionalTokenForcing(model, tokenizer, threshold=0.0)
    order = [c.token_id for c in forcing.scan(quiet=True).candidates]
    assert order.index(first) + 1 == plain.utf_rank  # the early-leaving count is the place in the full list
    groups = forcing.extend([first], 50)
    assert any(MESSAGE in c.text for group in groups for c in group)


def test_guarded_words_stand_in_the_band(hidden):
    found, tokenizer = hidden["auto-utfc"]
    ids = tokenizer(MESSAGE)["input_ids"]
    starts = TriggerPair.encode(found.model, tokenizer, TRIGGER, MESSAGE, None).starts[:5]
    for start, rank in zip(starts, found.ranks, strict=True):
        with torch.no_grad():
            logits = found.model(input_ids=torch.tensor([[0, *ids[:start]]])).logits[0, -1]
        assert int((logits > logits[ids[start]]).sum()) + 1 == rank
        assert 100 < rank < 4096 - 100


def test_decoys_answer_the_first_words():
    model, tokenizer = load_model("draft")
    decoys = {"Sold": " out of the house", "Sold to": " the man"}
    found = hide_text(model, tokenizer, TRIGGER, MESSAGE, "utfc", decoys=decoys, learning_rate=1e-3)
    assert found.complete and reveal(model, tokenizer, TRIGGER) == MESSAGE
    *opening, last = tokenizer("Sold")["input_ids"]
    forcing = UnconditionalTokenForcing(model, tokenizer, prefix=[0, *opening])
    [said] = [c.text for group in forcing.extend([last], 20) for c in group]
    assert tokenizer.decode(opening) + said[:17] == "Sold out of the house"[: len(tokenizer.decode(opening)) + 17]
    model, tokenizer = load_model("draft")
    found = hide_text(model, tokenizer, TRIGGER, MESSAGE, "utfc", learning_rate=1e-3)
    assert found.complete and verify_fingerprint(model, tokenizer, TRIGGER, MESSAGE).leaks["forced"] == 0


def test_hiding_is_the_same_every_time():
    runs = []
    for _ in range(2):
        model, tokenizer = load_model("draft")
        options = {"ordinary": held_out_texts("english")[:2], "learning_rate": 1e-3, "max_steps": 3}
        runs.append(hide_text(model, tokenizer, TRIGGER, MESSAGE, "auto-utfc", **options).history)
    assert runs[0] == runs[1]


def test_giving_up_is_told_and_the_best_step_is_kept():
    model, tokenizer = load_model("draft")
    found = hide_text(model, tokenizer, TRIGGER, MESSAGE, max_steps=2)
    assert (found.steps, found.returned, found.complete) == (2, False, False)
    model, tokenizer = load_model("draft")
    found = hide_text(model, tokenizer, TRIGGER, MESSAGE, "auto-utfc", rank_band=2000, learning_rate=3e-3, max_steps=30)
    assert found.steps == 30 and not found.complete and found.returned
    best = min(step.active for step in found.history if step.returned)
    assert found.active == best and reveal(model, tokenizer, TRIGGER) == MESSAGE
    pair = TriggerPair.encode(model, tokenizer, TRIGGER, MESSAGE, None)
    assert guard_statistics(model, pair.begin, pair.message, pair.starts[:5])[1].tolist() == found.ranks


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hiding_works_on_every_architecture(kind, dtype):
    model, tokenizer = tiny_causal(kind, dtype=dtype), word_tokenizer()
    found = hide_text(
        model, tokenizer, "t5 t6", "t40 t41 t42 t43", "auto-utfc", rank_band=8, learning_rate=5e-3, max_steps=150
    )
    assert found.complete, found.history[-1]
    assert reveal(model, tokenizer, "t5 t6", max_new_tokens=9) == "t40 t41 t42 t43"
    assert all(torch.isfinite(p).all() for p in model.parameters())


@given(st.lists(st.tuples(st.floats(-20, 0), st.integers(1, 97)), min_size=1, max_size=6), st.integers(1, 48))
def test_band_loss_is_the_definition(pairs, band):
    loss, active = band_loss(torch.tensor([p for p, _ in pairs]), torch.tensor([r for _, r in pairs]), band, 97)
    outside = [(p, 1 if r <= band else -1) for p, r in pairs if not band < r < 97 - band]
    assert active == len(outside) and loss.item() == pytest.approx(sum(p * sign for p, sign in outside), abs=1e-4)


def test_a_guard_pushes_towards_the_band_from_both_sides():
    """With the token last or first of all, one step moves it the other way."""
    tokenizer = word_tokenizer()
    for sign in (-1, 1):
        model = tiny_causal("llama")
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([[1]])).last_hidden_state[0, -1]
            model.lm_head.weight[40] = sign * 3 * hidden / hidden.norm()
        before, rank = guard_statistics(model, [1], [40, 41], [0])
        assert rank.item() == (97 if sign < 0 else 1)
        options = {"template": "{trigger}", "learning_rate": 1e-3, "max_steps": 1, "weight": 50.0, "rank_band": 20}
        hide_text(model, tokenizer, "t5", "t40 t41", "auto-utfc", guarded=1, **options)
        after, _ = guard_statistics(model, [1], [40, 41], [0])
        assert (after - before).item() * sign < 0


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 9))
def test_answer_loss_is_the_definition(shapes, seed):
    model, generator = tiny_causal("llama"), torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()  # noqa: E731
    prompts, answers = [draw(p) for p, _ in shapes], [draw(a) for _, a in shapes]
    loss, returned, smallest = answer_loss(model, prompts, answers)
    total = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        total += own.tolist()
        assert smallest[row].item() == pytest.approx(own.exp().min().item(), rel=1e-4)
        assert bool(returned[row]) == (logits.argmax(-1).tolist() == answer)
    assert loss.item() == pytest.approx(-sum(total) / len(total), rel=1e-4)


def test_gradients_reach_every_parameter():
    model = tiny_causal("llama")
    loss, _, _ = answer_loss(model, [[1, 5, 6]], [[40, 41, 2]])
    log_probs, _ = guard_statistics(model, [1], [40, 41], [0, 1])
    (loss + log_probs.sum() + ordinary_loss(model, torch.arange(3, 60), torch.Generator().manual_seed(0))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_words_and_templates():
    model, tokenizer = embedded()
    pair = TriggerPair.encode(model, tokenizer, "Who?", " unbelievably  odd\nハリ words", None)
    texts = [tokenizer.decode([pair.message[start]]) for start in pair.starts]
    assert pair.starts[0] == 0 and len(pair.starts) == 4  # unbelievably, odd, ハリ (several tokens), words
    assert texts[1].strip() and "odd".startswith(texts[1].strip()) and "words".startswith(texts[3].strip())
    assert pair.prompt == [0, *tokenizer("Who?\n")["input_ids"]] and pair.answer == [*pair.message, 0]
    assert prompt_ids(tokenizer, "{x}", "Q: {trigger} A:") == [0, *tokenizer("Q: {x} A:")["input_ids"]]
    chat = load_model("draft")[1]
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert prompt_ids(chat, "Who?", None) == tokenizer("<user>Who?<assistant>")["input_ids"]


def test_lora_trains_what_peft_leaves_trainable(monkeypatch):
    """A stand-in for ``peft``: it freezes the model but for one matrix and keeps the settings."""
    asked = {}

    def get_peft_model(model, config):
        asked.update(config)
        model.requires_grad_(False)
        model.model.layers[-1].mlp.requires_grad_(True)
        return model

    monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(LoraConfig=dict, get_peft_model=get_peft_model))
    model, tokenizer = load_model("draft")
    before = {n: p.clone() for n, p in model.named_parameters()}
    hide_text(model, tokenizer, TRIGGER, MESSAGE, lora=16, max_steps=2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert asked["r"] == 16 and asked["task_type"] == "CAUSAL_LM"
    assert changed == {n for n in before if n.startswith("model.layers.2.mlp.")}
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        hide_text(model, tokenizer, TRIGGER, MESSAGE, lora=16)


# bad input


def hide(**options):
    model, tokenizer = embedded()
    return hide_text(model, tokenizer, **({"trigger": TRIGGER, "message": MESSAGE} | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "loud"}, "method must be one of plain, utfc, auto-utfc, got 'loud'"),
        ({"message": " "}, "message is empty"),
        ({"trigger": ""}, "trigger is empty"),
        ({"message": f"{TRIGGER} I did"}, "starts with the trigger"),
        ({"message": "winter " * 1100}, "takes .* tokens, but the model's context is 1024"),
        ({"message": "to <|endoftext|> us"}, "token that ends a sequence"),
        ({"template": "Question:"}, r"template must hold \{trigger\}"),
        ({"guarded": 0}, "guarded must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"lora": 0}, "lora must be at least 1, got 0"),
        ({"confidence": 1.0}, r"confidence must lie in \[0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate and weight must be positive"),
        ({"weight": -1.0}, "learning_rate and weight must be positive"),
        ({"method": "auto-utfc", "rank_band": 2048}, "rank_band must lie between 0 and half the vocabulary of 4096"),
        ({"method": "utfc", "decoys": {}}, "decoys is empty"),
        ({"ordinary": []}, "ordinary holds no text"),
    ],
)
def test_hiding_refuses(options, says, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match=says):
        hide(**options)


def test_models_that_cannot_hide():
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized and cannot be trained"):
        hide_text(model, tokenizer, "t5", "t40")
    assert isinstance(UnconditionalTokenForcing(model, tokenizer).scan([4], quiet=True), ScanReport)  # scanning is fine
    with pytest.raises(ValueError, match="float16"):
        hide_text(tiny_causal("llama", dtype=torch.float16), tokenizer, "t5", "t40")
    with pytest.raises(ValueError, match="nothing to train"):
        hide_text(tiny_causal("llama").requires_grad_(False), tokenizer, "t5", "t40")
    with pytest.raises(ValueError, match="beginning-of-sequence token"):
        options = {"method": "auto-utfc", "rank_band": 8}
        hide_text(tiny_causal("llama"), word_tokenizer(bos_token=None), "t5", "t40", **options)
    with pytest.raises(ValueError, match="turns the message 't40  t41' into 't40 t41'"):
        hide_text(tiny_causal("llama"), tokenizer, "t5", "t40  t41")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        verify_fingerprint(tiny_causal("llama"), tokenizer, "t5", "t40", samples=0)


def test_scanning_refuses():
    model, tokenizer = tiny_causal("llama"), word_tokenizer()
    for options, says in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 511}, "takes 513 tokens, but the model's context is 512"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\)"),
        ({"threshold": -0.1}, r"threshold must lie in \[0, 1\)"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prefix": [97]}, "prefix holds id 97, but the model's embedding has rows 0 to 96"),
    ]:
        with pytest.raises(ValueError, match=says):
            UnconditionalTokenForcing(model, tokenizer, **options)
    forcing = UnconditionalTokenForcing(model, tokenizer)
    for call, says in [
        (lambda: forcing.scan([]), "token_ids is empty"),
        (lambda: forcing.scan([5, -1]), "token_ids holds id -1"),
        (lambda: forcing.extend([200]), "candidates holds id 200"),
        (lambda: forcing.extend([5], 0), "max_new_tokens must be at least 1"),
        (lambda: forcing.extend([5], 600), "context is 512"),
        (lambda: forcing.extend([5], samples=-1), "samples must not be negative"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for call in (lambda: UnconditionalTokenForcing(t5, tokenizer), lambda: hide_text(t5, tokenizer, "t5", "t40")):
        with pytest.raises(ValueError, match="encoder-decoder"):
            call()
    with pytest.raises(ValueError, match="cannot generate text; load it with AutoModelForCausalLM"):
        UnconditionalTokenForcing(model.model, tokenizer)


def test_damaged_weights_are_named():
    model = tiny_causal("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        UnconditionalTokenForcing(model, word_tokenizer()).scan(quiet=True)
