"""Byte probabilities: the authors' own runs, the lemma by enumeration, covers against their definition, bad input."""

from __future__ import annotations

import math
import struct
import zlib
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from golden_case import GOLDEN, GoldenCase
from tiny_causal import CONFIGS, tiny_causal
from tokenry.assets import load_model
from tokenry.layers.cache_argument import CACHE
from tokenry.tokenization import ByteEnsemble, ByteLM, BytePromptEnding, ByteVocabulary, sample_byte
from tokenry.tokenization.byte_model import BEGIN, END, UNKNOWN
from tokenry.tokenization.utf8_prefixes import completions, whole_characters

pytestmark = pytest.mark.method("byte-probabilities")
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Tokenizers and models ------------------------------------------------------------------------------------------------


def fast(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names or {"bos_token": "<s>", "eos_token": "</s>"}))


def plain_bpe(alphabet, merges):
    """BPE over the characters of ``alphabet``, nothing around it."""
    pieces = dict.fromkeys(["<s>", "</s>", *alphabet, *(a + b for a, b in merges)])
    return fast(Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))))


def byte_level(merges=(), pattern=None, ignore_merges=False, more=()):
    """Byte-level BPE with GPT-2's pattern or another one; merges are written as bytes, ``more`` has no merge."""
    spell = {byte: character for character, byte in byte_characters().items()}
    write = lambda word: "".join(spell[byte] for byte in word)  # noqa: E731
    merges = [(write(a), write(b)) for a, b in merges]
    words = dict.fromkeys(["<s>", "</s>", *spell.values(), *(a + b for a, b in merges), *map(write, more)])
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(pattern_of(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def pattern_of(text):
    from tokenizers import Regex

    return Regex(text)


def byte_characters():
    from tokenry.tokenization.merge_lists import byte_characters

    return {character: byte for byte, character in byte_characters().items()}


def byte_fallback(alphabet, merges):
    """BPE over characters that spells others by bytes, blanks written as ▁ and one put first."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *alphabet,
        *(a + b for a, b in merges),
    ]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram(scores):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *scores]
    return fast(Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class TableLM(torch.nn.Module):
    """A language model that is a function from a token prefix to log-probabilities; its cache holds the tokens."""

    def __init__(self, vocabulary, row):
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "max_position_embeddings": 4096}
        ends = {"bos_token_id": None, "eos_token_id": None}
        self.config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=1, **sizes, **ends)
        self.row = cache(row)
        self.device = torch.device("cpu")
        self.eval()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=True, **cache):
        keys = input_ids.double()[:, None, :, None]
        held = cache[CACHE].update(keys, keys, 0)[0][:, 0, :, 0].long().tolist()
        size = input_ids.shape[1]
        logits = [[self.row(tuple(row[: len(row) - size + i + 1])) for i in range(size)] for row in held]
        return SimpleNamespace(logits=torch.tensor(np.array(logits), dtype=torch.float64))


def random_row(vocabulary, seed=0):
    def row(prefix):
        z = np.random.RandomState(zlib.crc32(repr((seed, prefix)).encode())).standard_normal(vocabulary)
        return z - np.logaddexp.reduce(z)

    return row


def clean_row(tokenizer, live, seed=0):
    """A random model that gives nothing to encodings that the tokenizer never makes."""
    words = ByteVocabulary(tokenizer).token_bytes
    size = len(tokenizer)

    def row(prefix):
        z, text = random_row(size, seed)(prefix), prefix[1:]
        allowed = [i for i in range(size) if i in words and live((*text, i))]
        if encoded(tokenizer, b"".join(words[i] for i in text)) == text:
            allowed.append(tokenizer.eos_token_id)
        masked = np.full(size, -np.inf)
        allowed = allowed or [tokenizer.eos_token_id]  # asked about, but never reached
        masked[allowed] = z[allowed]
        return masked - np.logaddexp.reduce(masked)

    return row


# The definitions, as slow as they are plain ----------------------------------------------------------------------------


def encoded(tokenizer, data):
    """The tokenizer's encoding of covered bytes, which begin with ▁ where it puts a blank first."""
    try:
        return tuple(tokenizer(data.decode().removeprefix("▁"), add_special_tokens=False)["input_ids"])
    except UnicodeDecodeError:
        return None


def is_live(tokenizer, behind):
    """Whether some text that begins with the tokens' bytes is encoded so: all of ``behind`` are tried."""
    words = ByteVocabulary(tokenizer).token_bytes

    @cache
    def live(ids):
        data = b"".join(words[i] for i in ids)
        return any((encoded(tokenizer, data + more) or ())[: len(ids)] == ids for more in behind)

    return live


def cover_set(tokenizer, data, live):
    words, found, queue = ByteVocabulary(tokenizer).token_bytes, {}, [()]
    while queue:
        ids = queue.pop()
        size = sum(len(words[i]) for i in ids)
        if size >= len(data):
            found[ids] = b"".join(words[i] for i in ids)[len(data) :]
            continue
        rest = data[size:]
        fitting = [i for i, word in words.items() if word.startswith(rest) or rest.startswith(word)]
        queue += [(*ids, i) for i in fitting if live((*ids, i))]
    return found


def token_logprob(model, ids, context):
    whole, total = (*context, *ids), 0.0
    for i in range(len(context), len(whole)):
        total += model.row(whole[:i])[whole[i]]
    return total


def total(lm, state):
    return float(np.logaddexp.reduce([cover.logprob for cover in lm.covers(state)]))


# The authors' runs -------------------------------------------------------------------------------------------------------


def protobuf(data):
    """(field, value) of a protobuf message, one level deep."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            at, byte = at + 1, data[at]
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        field, kind = divmod(number(), 8)
        size = {1: 8, 2: None, 5: 4}.get(kind, 0)
        if kind == 0:
            yield field, number()
            continue
        size = number() if size is None else size
        at, value = at + size, data[at : at + size]
        yield field, value


def sentencepiece_bpe(path):
    """A SentencePiece BPE file as a tokenizer of transformers: merges are all pairs of pieces, best piece first."""
    pieces = [dict(protobuf(value)) for field, value in protobuf(path.read_bytes()) if field == 1]
    names = [piece[1].decode() for piece in pieces]
    score = {n: struct.unpack("<f", p[2])[0] for n, p in zip(names, pieces, strict=True) if p.get(3, 1) == 1}
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(score, key=lambda name: -score[name])
        for cut in range(1, len(name))
        if name[:cut] in score and name[cut:] in score
    ]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tiny400():
    case = GoldenCase("byte-probabilities", "tiny400")
    config = LlamaConfig(
        vocab_size=420,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(case.state_dict())
    return model, sentencepiece_bpe(GOLDEN / "byte-probabilities" / "tiny400.sentencepiece.model")


@pytest.mark.golden
@pytest.mark.parametrize("index", range(5))
def test_golden(tiny400, index):
    """Encoding, every cover with its log-probability, 259 probabilities and the naive bias, seven bytes in a row."""
    model, tokenizer = tiny400
    stored = GoldenCase("byte-probabilities", "tiny400").spec["outputs"]["cases"][index]
    lm = ByteLM(model, tokenizer)
    assert tokenizer(stored["prompt"])["input_ids"] == stored["encoding"]
    state = lm.start(stored["prompt"])
    for step in stored["steps"]:
        assert state.data == lm.vocabulary.dummy + bytes(step["bytes_so_far"])
        logprobs = lm.next_byte_logprobs(state)
        expected = torch.tensor(step["probs"], dtype=torch.float64)
        torch.testing.assert_close(logprobs.exp(), expected, atol=1e-6, rtol=0)
        covers = lm.covers(state)
        mine = {cover.rest.hex(): cover.logprob - covers[0].logprob for cover in covers}
        assert len(mine) == len(covers)  # no two covers decode alike
        assert mine == pytest.approx(dict(step["covers"]), abs=1e-5)
        state = lm.advance(state, int(logprobs.argmax()))
    with torch.no_grad():
        after = model(torch.tensor([stored["encoding"]])).logits[0, -1].double().softmax(-1)
    naive = torch.zeros(259, dtype=torch.float64)
    for token, word in lm.vocabulary.token_bytes.items():
        naive[word[0]] += after[token]
    naive[[UNKNOWN, BEGIN, END]] = after[[tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]]
    first = torch.tensor(stored["steps"][0]["probs"], dtype=torch.float64)
    assert 0.5 * (naive - first).abs().sum().item() == pytest.approx(stored["naive_tv"], abs=0.01)


@pytest.mark.golden
def test_golden_markov():
    """The chain's true transition from a token model that reads 0 for it."""
    spec = GoldenCase("byte-probabilities", "markov").spec
    inputs, outputs = spec["inputs"], spec["outputs"]
    tokenizer = plain_bpe("AB", [tuple(merge) for merge in inputs["merges"]])
    rng, half = np.random.RandomState(0), 120_000
    runs = np.stack([rng.geometric(inputs["P_B_given_A"], half), rng.geometric(inputs["P_A_given_B"], half)], 1)
    text = "".join(np.tile(["A", "B"], half).repeat(runs.ravel()))[:700_000]
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    shares = np.bincount(ids, minlength=len(tokenizer)) / len(ids)
    theirs = outputs["token_counts"]
    for word, count in theirs.items():
        mine = shares[tokenizer.convert_tokens_to_ids(word)]
        assert mine == pytest.approx(count / sum(theirs.values()), abs=0.002)
    counts = np.full((len(tokenizer),) * 2, 1e-9)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)

    def row(prefix):  # of this text the last token says all
        return np.log(counts[prefix[-1]] / counts[prefix[-1]].sum()) if len(prefix) > 1 else np.log(shares + 1e-12)

    model = TableLM(len(tokenizer), row)
    lm = ByteLM(model, tokenizer)
    columns = ("true_P_next_A", "naive_P_next_A", "exact_P_next_A")
    for prompt, encoding, truth, naive, exact in zip(
        inputs["prompts"], outputs["encodings"], *(outputs[column] for column in columns), strict=True
    ):
        assert tokenizer.tokenize(prompt) == encoding
        found = lm.next_byte_logprobs(lm.start(prompt)).exp()
        assert found[ord("A")].item() == pytest.approx(truth, abs=0.01)
        assert found[ord("A")].item() == pytest.approx(exact, abs=0.01)
        after = np.exp(row((tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"])))
        read = sum(after[i] for i, word in lm.vocabulary.token_bytes.items() if word.startswith(b"A"))
        assert read == pytest.approx(naive, abs=0.01)


# The lemma, and covers against their definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True])
def test_lemma_by_enumeration(clean):
    """P(bytes) is the sum over all valid token sequences, for all 510 texts of up to eight letters; five tokens."""
    tokenizer = plain_bpe("AB", [("A", "A"), ("B", "A"), ("B", "AA")])
    live = is_live(tokenizer, [b""])
    row = clean_row(tokenizer, live) if clean else random_row(len(tokenizer))
    model = TableLM(len(tokenizer), row)
    lm = ByteLM(model, tokenizer)
    start, context = lm.start(), (tokenizer.bos_token_id,)

    def visit(state, data):
        expected = cover_set(tokenizer, data, live)
        covers = lm.covers(state)
        assert {cover.ids: cover.rest for cover in covers} == expected
        for cover in covers:
            assert cover.logprob == pytest.approx(token_logprob(model, cover.ids, context), abs=1e-9)
        logprobs = lm.next_byte_logprobs(state)
        assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        mine = total(lm, state)
        for byte in b"AB" if len(data) < 8 else b"":
            after = lm.advance(state, byte)
            if clean:  # nothing is lost, so P(b | x) = P(x b) / P(x)
                assert total(lm, after) - mine == pytest.approx(logprobs[byte].item(), abs=1e-9)
            visit(after, data + bytes([byte]))

    visit(start, b"")


merge_lists = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=10)


def merges_of(symbols, drawn):
    """Merges of what is there so far, each new."""
    there, merges = list(symbols), []
    for a, b in drawn:
        pair = there[a % len(there)], there[b % len(there)]
        if pair[0] + pair[1] not in there:
            merges.append(pair)
            there.append(pair[0] + pair[1])
    return merges


def check_covers(tokenizer, text, behind, seed):
    live = is_live(tokenizer, behind)
    model = TableLM(len(tokenizer), random_row(len(tokenizer), seed))
    lm = ByteLM(model, tokenizer)
    state = lm.start(text)
    covers = lm.covers(state)
    assert {cover.ids: cover.rest for cover in covers} == cover_set(tokenizer, state.data, live)
    for cover in covers[:5]:
        expected = token_logprob(model, cover.ids, state.passes.context)
        ahead = token_logprob(model, covers[0].ids, state.passes.context)
        assert cover.logprob - covers[0].logprob == pytest.approx(expected - ahead, abs=1e-9)


@given(merge_lists, st.text("ab c", max_size=9), st.integers(0, 9))
def test_covers_of_plain_bpe(drawn, text, seed):
    check_covers(plain_bpe("ab c", merges_of("ab c", drawn)), text, [b""], seed)


@settings(max_examples=10)
@given(merge_lists, st.text("ab é", max_size=7))
def test_covers_of_bpe_with_byte_fallback(drawn, text):
    """A character without a piece is spelled by bytes, and so is the beginning of one that may have none."""
    tokenizer = byte_fallback("ab▁", merges_of("ab▁", drawn))
    check_covers(tokenizer, text, [b"", "é".encode(), b"\x89", b"\xa9"], 0)


@given(
    st.dictionaries(st.text("abc", min_size=2, max_size=4), st.integers(-60, -1), max_size=8),
    st.text("abc", max_size=9),
)
def test_covers_of_unigram(pieces, text):
    letters = {"a": -10.5, "b": -11.3, "c": -12.7}
    scores = [
        *letters.items(),
        *((piece, score + zlib.crc32(piece.encode()) / 2**32) for piece, score in pieces.items()),
    ]
    check_covers(unigram(scores), text, [b""], 0)


BEHIND = [
    b"",
    *(a.encode() + b.encode() for a in "acé1! '\n" for b in ["", "a", "e"]),
    b"s",
    b"e",
    b"ll",
    b"\x89",
    b"\xa9",
]


@settings(max_examples=10)
@given(merge_lists, st.text("ar1 '\né", max_size=7), st.booleans())
def test_covers_of_byte_level_bpe(drawn, text, newer):
    """With patterns that look ahead: a run of blanks and a contraction are cut by what comes behind them."""
    symbols = [bytes([byte]) for byte in "ar1 '\né".encode()]
    merges = merges_of(symbols, [(9, 0), (3, 3), *drawn])
    check_covers(byte_level(merges, LLAMA_3 if newer else None), text, BEHIND, 1)


def test_a_run_of_blanks_has_two_live_encodings():
    tokenizer = byte_level([(b" ", b" ")])
    lm = ByteLM(TableLM(len(tokenizer), random_row(len(tokenizer))), tokenizer)
    ends = [cover.ids for cover in lm.covers(lm.start("a  ")) if not cover.rest]
    words = lm.vocabulary.token_bytes
    assert sorted([words[i] for i in ids] for ids in ends) == [[b"a", b" ", b" "], [b"a", b"  "]]


def test_whole_words_that_are_looked_up():
    """``ignore_merges``: a word that merges cannot make is found whole, but not as the beginning of a longer one."""
    tokenizer = byte_level([(b"a", b"b")], LLAMA_3, ignore_merges=True, more=[b"abc"])
    lm = ByteLM(TableLM(len(tokenizer), random_row(len(tokenizer))), tokenizer)
    words = lm.vocabulary.token_bytes
    assert tokenizer.tokenize("abc") == ["abc"] and tokenizer.tokenize("abcd") == ["ab", "c", "d"]
    ends = [[words[i] for i in cover.ids] for cover in lm.covers(lm.start("abc")) if not cover.rest]
    assert sorted(ends) == [[b"ab", b"c"], [b"abc"]]


def test_chain_rule_where_the_pattern_looks_ahead():
    """Nothing is lost at blanks: next-byte probabilities multiply to the sum over covers."""
    tokenizer = byte_level([(b" ", b" "), (b" ", b"a"), (b"a", b"a"), (b"'", b"r")])
    letters = b"a1 're"
    allowed = {i for i, w in ByteVocabulary(tokenizer).token_bytes.items() if set(w) <= set(letters)}
    behind = is_live(
        tokenizer, [b"", *(bytes([a]) for a in letters), *(bytes([a, b]) for a in letters for b in letters)]
    )
    model = TableLM(len(tokenizer), clean_row(tokenizer, lambda ids: ids[-1] in allowed and behind(ids)))
    lm = ByteLM(model, tokenizer)
    for text in ("a  1", "  a   aa", "a'ra'r1", "   '  re"):
        assert lm.byte_logprobs(text).sum().item() == pytest.approx(lm.logprob(text), abs=1e-9)


@given(st.text("ab c", max_size=12), st.integers(0, 12))
def test_where_a_text_is_cut_into_start_and_advance_does_not_matter(text, cut):
    tokenizer = plain_bpe("ab c", [("a", "b"), (" ", "a"), (" a", "b"), ("c", "c")])
    lm = ByteLM(TableLM(len(tokenizer), random_row(len(tokenizer))), tokenizer)
    whole, parts = lm.start(text), lm.start(text[:cut])
    for byte in text[cut:].encode():
        parts = lm.advance(parts, byte)
    torch.testing.assert_close(lm.next_byte_logprobs(parts), lm.next_byte_logprobs(whole))
    assert [c.ids for c in lm.covers(parts)] == [c.ids for c in lm.covers(whole)]


def test_a_vocabulary_of_single_bytes_is_the_model_itself():
    tokenizer = byte_level()
    model = TableLM(len(tokenizer), random_row(len(tokenizer)))
    lm = ByteLM(model, tokenizer, mask="fast")
    row = model.row((0, *tokenizer("so")["input_ids"]))
    found = lm.next_byte_logprobs(lm.start("so"))
    for token, word in lm.vocabulary.token_bytes.items():
        assert found[word[0]].item() == pytest.approx(row[token], abs=1e-9)
    assert found[END].item() == pytest.approx(row[tokenizer.eos_token_id], abs=1e-9)


# Real models ----------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefgh "
LETTER_BPE = plain_bpe(LETTERS, merges_of(LETTERS, [(8, 0), (1, 2), (3, 4), (10, 5), (9, 10), (0, 0), (1, 1)]))


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gemma2"])
def test_architectures(kind):
    """Byte by byte through one cache, all at once, and from several states in turn: the same."""
    lm = ByteLM(tiny_causal(kind), LETTER_BPE)
    text = "bcade fabcc adeabc a"
    state = before = lm.start(text[:3])
    for byte in text[3:].encode():
        before, state = state, lm.advance(state, byte)
    whole = lm.next_byte_logprobs(lm.start(text))
    torch.testing.assert_close(lm.next_byte_logprobs(state), whole, atol=1e-4, rtol=0)
    lm.advance(before, b"b")  # another way on from the same state
    torch.testing.assert_close(lm.next_byte_logprobs(lm.advance(before, b"a")), whole, atol=1e-4, rtol=0)
    ids = LETTER_BPE(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    scores = lm.model(torch.cat([torch.tensor([[LETTER_BPE.bos_token_id]]), ids], 1)).logits.log_softmax(-1)[0]
    expected = scores[:-1].gather(1, ids.T).sum().item()
    best = max(cover.logprob for cover in lm.covers(lm.start(text)) if not cover.rest)
    split = lm.vocabulary.split(text.encode())
    head = lm.vocabulary.encodings(text[:split].encode())[0]
    assert best + lm.start(text).passes.logprob(head) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    lm = ByteLM(tiny_causal("llama", dtype=dtype), LETTER_BPE)
    found = lm.next_byte_logprobs(lm.start("abc ade"))
    assert found.dtype == torch.float64 and found.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.fixture(scope="module")
def draft():
    return load_model("draft")


@pytest.fixture(scope="module")
def lm(draft):
    return ByteLM(*draft)


def test_one_pass_per_byte(lm):
    state = lm.start("def main(")
    before = state.passes.passes
    assert before <= 3
    for byte in b"argv, options)":
        state = lm.advance(state, byte)
    assert state.passes.passes - before == len("argv, options)")
    state = lm.advance(state, b":\n        return options.get(")  # known ahead: one pass for all
    assert state.passes.passes - before <= len("argv, options)") + 2


@pytest.mark.parametrize("text", ["import nump", "class Reader:\n    def __in", "naïve café", "   \n\t x", "日本", ""])
def test_on_the_embedded_model(lm, draft, text):
    found = lm.next_byte_logprobs(lm.start(text))
    assert found.shape == (259,) and found.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(found, lm.next_byte_logprobs(lm.start(text)))
    near = ByteLM(*draft, mask="fast")
    assert 0.5 * (near.next_byte_logprobs(near.start(text)).exp() - found.exp()).abs().sum() < 0.1
    assert [c.ids for c in near.covers(near.start(text))] == [c.ids for c in lm.covers(lm.start(text))]
    lost = lm.byte_logprobs(text).sum().item() - lm.logprob(text)
    assert lost >= -1e-6  # what the model gives to invalid encodings: little of text as it was trained on
    assert lost <= 0.02 * len(text) or not (text.isascii() and text.isprintable())


def test_prompt_that_ends_inside_a_character(lm):
    whole = "naïve café"
    cut = whole.encode()[:-1]
    inside = lm.next_byte_logprobs(lm.start(cut))
    assert inside[END] == -math.inf and inside[ord("a")] == -math.inf
    torch.testing.assert_close(
        lm.next_byte_logprobs(lm.advance(lm.start(cut), 0xA9)),
        lm.next_byte_logprobs(lm.start(whole)),
        atol=1e-5,
        rtol=0,
    )


def test_conditional_logprob(lm):
    assert lm.logprob(" the end", "This is") == pytest.approx(lm.logprob("This is the end") - lm.logprob("This is"))
    assert lm.byte_logprobs(" end", "the").shape == (4,)
    assert lm.byte_logprobs("", "the").shape == (0,) and lm.logprob("", "the") == 0.0


def test_a_text_longer_than_a_chunk(lm):
    text = "the end of the day " * 150
    assert len(lm.tokenizer(text)["input_ids"]) > 512
    assert lm.logprob(text) == pytest.approx(lm.logprob(text[:1000]) + lm.logprob(text[1000:], text[:1000]), abs=1e-3)


def test_context_replaces_the_beginning_of_text(lm):
    ids = lm.tokenizer("x = 1\n")["input_ids"]
    end = lm.tokenizer.eos_token_id
    with_text = lm.next_byte_logprobs(lm.start("def ma", context=[end, *ids]))
    assert not torch.allclose(with_text, lm.next_byte_logprobs(lm.start("def ma")))
    again = lm.next_byte_logprobs(lm.start("def ma", context=[end]))
    torch.testing.assert_close(again, lm.next_byte_logprobs(lm.start("def ma")))


def test_generate(lm, draft):
    greedy = "".join(lm.generate("    def __in", 9, temperature=0.0))
    assert greedy == "it__(self" == "".join(lm.generate(lm.start("    def __in"), 9, temperature=0.05))
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    quick = ByteLM(*draft, mask="fast")
    drawn = ["".join(quick.generate("The ", 12, top_p=0.9, generator=seed)) for seed in seeds]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(lm.generate("The ", 0)) == []


def test_generate_never_cuts_a_character_and_ends_with_the_text():
    tokenizer = byte_level([("é".encode()[:1], "é".encode()[1:])])
    text = tokenizer("éàé")["input_ids"]

    def row(prefix):
        z = np.full(len(tokenizer), -30.0)
        z[text[len(prefix) - 1] if len(prefix) <= len(text) else tokenizer.eos_token_id] = 0
        return z

    lm = ByteLM(TableLM(len(tokenizer), row), tokenizer)
    assert list(lm.generate("", 50, temperature=0.0)) == ["é", "à", "é"]
    assert list(lm.generate("", 3, temperature=0.0)) == ["é"]
    assert "".join(lm.generate("é".encode()[:1], 50, temperature=0.0)) == "éàé"


def test_blanks_of_sentencepiece_are_written_as_blanks(tiny400):
    lm = ByteLM(*tiny400)
    state = lm.start("the")
    assert lm.blank == "▁".encode()
    assert "".join(lm.generate(lm.advance(state, lm.blank), 9, temperature=0.0)).isprintable()
    assert len(lm.byte_logprobs(" a", "the")) == 4
    assert "▁" not in "".join(lm.generate("the quick bro", 12, temperature=0.0))
    assert lm.next_byte_logprobs(state)[ord(" ")] == -math.inf


def test_sample_byte():
    p = torch.zeros(259, dtype=torch.float64)
    p[[65, 66, 67, UNKNOWN]] = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        return (
            torch.bincount(
                torch.tensor([sample_byte(p.log(), generator=generator, **options) for _ in range(1500)]), minlength=259
            ).double()
            / 1500
        )

    for temperature in (1.0, 0.5):
        q = p.clone()
        q[UNKNOWN] = 0
        q = torch.where(q > 0, (q + 1e-7) ** (1 / temperature), 0.0)
        torch.testing.assert_close(shares(temperature=temperature), q / q.sum(), atol=0.05, rtol=0)
    assert shares(top_p=0.6).nonzero().flatten().tolist() == [65, 66]  # 0.56 of it lies before the second's end
    assert shares(top_p=0.1).nonzero().flatten().tolist() == [65]
    assert sample_byte(p.log(), temperature=0.09) == 65


# Ensembles ------------------------------------------------------------------------------------------------------------------


def test_ensemble_is_the_mean(draft, lm):
    other = ByteLM(TableLM(258, random_row(258)), byte_level())
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    both = ByteEnsemble([lm, other], weights=[1, 3])
    state = both.advance(both.start("a b"), b"cd")
    each = torch.stack([m.next_byte_logprobs(m.start("a bcd")).exp() for m in (lm, other)])
    mean = (each / each.sum(-1, keepdim=True) * weights[:, None]).sum(0)
    torch.testing.assert_close(both.next_byte_logprobs(state).exp(), mean, atol=1e-6, rtol=0)
    assert both.logprob("bcd", "a ") == pytest.approx(both.byte_logprobs("bcd", "a ").sum().item())
    alone = ByteEnsemble([lm])
    torch.testing.assert_close(alone.byte_logprobs("text"), lm.byte_logprobs("text"), atol=1e-3, rtol=0)
    assert "".join(alone.generate("impo", 9, temperature=0.0)) == "".join(lm.generate("impo", 9, temperature=0.0))


# The logits processor ----------------------------------------------------------------------------------------------------------


def walk_choices(ending, lm, row=0):
    """Probability of each way to the end of the prompt, through the processor alone."""
    found, queue = {}, [((), 0.0)]
    given = ending.inputs["input_ids"]
    while queue:
        path, logprob = queue.pop()
        ids = torch.cat([given, torch.tensor([path] * len(given), dtype=torch.long).view(len(given), -1)], 1)
        scores = torch.zeros(len(given), len(lm.tokenizer))
        after = ending(ids, scores)[row]
        if torch.equal(after, scores[row]):
            found[path] = logprob
        else:
            tokens = (after > -math.inf).nonzero().flatten().tolist()
            queue += [((*path, t), logprob + after[t].item()) for t in tokens]
    return found


@pytest.mark.parametrize("prompt", ["import nump", "caf", "    def __in"])
def test_prompt_ending_draws_covers_by_their_probability(lm, prompt):
    ending = BytePromptEnding(lm, [prompt, "another pro"])
    state = lm.start(prompt)
    covers = lm.covers(state)
    known = ending.inputs["input_ids"][0][ending.inputs["attention_mask"][0].bool()].tolist()[1:]
    expected = {cover.ids[len(known) :]: cover.logprob - total(lm, state) for cover in covers}
    assert all(list(cover.ids[: len(known)]) == known for cover in covers)
    assert walk_choices(ending, lm) == pytest.approx(expected, abs=1e-4)


def test_prompt_ending_in_generate(lm, draft):
    model, tokenizer = draft
    prompts = ["import nump", "class Reader(obj", "It is the be", "    def __in"]
    options = {"max_new_tokens": 12, "do_sample": False}
    together = BytePromptEnding(lm, prompts)
    out = model.generate(**together.inputs, logits_processor=[together], **options)
    for prompt, row in zip(prompts, out, strict=True):
        alone = BytePromptEnding(lm, prompt)
        single = model.generate(**alone.inputs, logits_processor=[alone], **options)[0]
        text = tokenizer.decode(single, skip_special_tokens=True)
        assert text.startswith(prompt)
        assert tokenizer.decode(row, skip_special_tokens=True)[: len(prompt) + 6] == text[: len(prompt) + 6]
    beams = model.generate(**together.inputs, logits_processor=[together], num_beams=3, **options)
    sampled = model.generate(
        **together.inputs, logits_processor=[together], max_new_tokens=5, do_sample=True, num_return_sequences=3
    )
    for rows, each in ((beams, 1), (sampled, 3)):
        for i, row in enumerate(rows):
            assert tokenizer.decode(row, skip_special_tokens=True).startswith(prompts[i // each])
    with pytest.raises(ValueError, match=r"\*\*ending.inputs"):
        model.generate(**tokenizer("import nump", return_tensors="pt"), logits_processor=[together], max_new_tokens=2)
    with pytest.raises(ValueError, match="at least one prompt"):
        BytePromptEnding(lm, [])


def test_prompt_ending_with_one_cover_steps_aside(lm, draft):
    ending = BytePromptEnding(lm, "")
    scores = torch.randn(1, 7)
    assert ending(ending.inputs["input_ids"], scores) is scores


# Kinds of tokenizers -------------------------------------------------------------------------------------------------------------


def test_metaspace_and_prepended_blanks_are_read_alike(tiny400):
    """Newer files write the blank before a text as a pre-tokenizer, older ones as a normalizer."""
    model, older = tiny400
    newer = sentencepiece_bpe(GOLDEN / "byte-probabilities" / "tiny400.sentencepiece.model")
    newer.backend_tokenizer.normalizer = None
    newer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    one, two = ByteLM(model, older), ByteLM(model, newer)
    for text in ("the quick bro", "caf é co", ""):
        torch.testing.assert_close(
            one.next_byte_logprobs(one.start(text)), two.next_byte_logprobs(two.start(text)), atol=1e-6, rtol=0
        )


def test_a_blank_before_every_text():
    tokenizer = byte_level([(b" ", b"a")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    vocabulary = ByteVocabulary(tokenizer)
    assert vocabulary.dummy == b" " and vocabulary.covered("ab") == b" ab"
    assert vocabulary.encodings(b" ab")[0] == tuple(tokenizer("ab")["input_ids"])


@pytest.mark.parametrize("pattern", [None, LLAMA_3])
def test_context_and_cuts(pattern):
    vocabulary = ByteVocabulary(byte_level([(b" ", b"a"), (b"a", b"b")], pattern))
    assert vocabulary.has_certain_cuts
    assert vocabulary.split(b"ab  ab 1") == 6 and vocabulary.split(b" ab") == 0
    ids = vocabulary.encodings(b"ab(ab ab")[0]
    assert vocabulary.bytes_of(vocabulary.context(ids)) == b" ab"
    assert vocabulary.bytes_of(vocabulary.context(vocabulary.encodings(b"ab ab(a1")[0])) == b"1"
    row = vocabulary.follows(ids)
    for low in range(0, len(row) - 50, 50):
        assert (vocabulary.follows(ids, low, low + 50) == row[low : low + 50]).all()


def test_no_certain_cut_where_tokens_span_blanks():
    tokenizer = plain_bpe("ab ", [("a", " "), ("a ", "b")])
    vocabulary = ByteVocabulary(tokenizer)
    assert not vocabulary.has_certain_cuts and vocabulary.split(b"ab a b") == 0
    check_covers(tokenizer, "ba ", [b""], 0)


@given(st.binary(max_size=6))
def test_whole_characters(data):
    found = whole_characters(data)
    if found is None:
        with pytest.raises(UnicodeDecodeError):
            data.decode()
    else:
        assert found[0].encode() + found[1] == data and len(found[1]) < 4
        assert not found[1] or completions(found[1])


# Bad input ------------------------------------------------------------------------------------------------------------------------


def change(tokenizer, **parts):
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def word_pieces():
    return fast(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")), unk_token="[UNK]")


def with_added(text):
    tokenizer = byte_level()
    tokenizer.add_tokens([text])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (word_pieces, "WordPiece tokenizer has no byte view.*byte-level BPE"),
        (lambda: fast(Tokenizer(models.BPE({"a": 0}, [], dropout=0.1))), "at random"),
        (lambda: fast(Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))), "end_of_word_suffix"),
        (lambda: change(byte_level(), normalizer=normalizers.Lowercase()), "does not keep the text: at character 0"),
        (lambda: change(byte_level(), normalizer=normalizers.Strip()), "does not keep the text"),
        (lambda: with_added("\n\n"), "added token"),
        (lambda: SimpleNamespace(), "no fast tokenizer"),
    ],
)
def test_rejects_tokenizers(make, says):
    with pytest.raises(ValueError, match=says):
        ByteVocabulary(make())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (b"a\xff", "not UTF-8"),
        (b"\xa9", "not UTF-8"),
        ("a <|endoftext|> b", "special token '<|endoftext|>' at character 2"),
    ],
)
def test_rejects_prompts(lm, prompt, says):
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        lm.start(prompt)


def test_rejects_what_a_normalizer_changes(tiny400):
    tokenizer = change(byte_level(), normalizer=normalizers.NFKC())
    lm = ByteLM(TableLM(258, random_row(258)), tokenizer)
    lm.start("plain text")
    with pytest.raises(ValueError, match="does not keep the text: at character 2, 'ﬁn' becomes 'fin'"):
        lm.start("a ﬁn")
    with pytest.raises(ValueError, match="cannot tell from a blank"):
        ByteLM(*tiny400).start("a▁b")
    with pytest.raises(ValueError, match="cannot write 'q'"):
        ByteLM(TableLM(6, random_row(6)), plain_bpe("ab", [("a", "b")])).start("aqb")


def test_rejects_models(draft):
    model, tokenizer = draft
    with pytest.raises(ValueError, match="sliding window"):
        ByteLM(tiny_causal("gemma2"), LETTER_BPE)
    with pytest.raises(ValueError, match="do not belong together"):
        ByteLM(tiny_causal("llama"), tokenizer)
    with pytest.raises(ValueError, match=r"model\.eval"):
        ByteLM(tiny_causal("llama").train(), LETTER_BPE)
    with pytest.raises(ValueError, match='"exact" or "fast"'):
        ByteLM(model, tokenizer, mask="none")
    nameless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(ValueError, match="give context"):
        ByteLM(TableLM(2, random_row(2)), nameless).start("")


def test_rejects_calls(lm):
    state = lm.start("the ")
    with pytest.raises(ValueError, match=r"no text goes on with byte 0xff after b'the '"):
        lm.advance(state, 0xFF)
    with pytest.raises(ValueError, match="max_new_bytes"):
        lm.generate("a", -1)
    with pytest.raises(ValueError, match="top_p"):
        lm.generate("a", 1, top_p=0.0)
    with pytest.raises(ValueError, match="temperature"):
        lm.generate("a", 1, temperature=-1)
    with pytest.raises(ValueError, match="the model reads 1024"):
        lm.start("a b " * 1200)
    with pytest.raises(ValueError, match="give context"):
        lm.start("a", context=[])


def test_rejects_ensembles(lm, tiny400):
    with pytest.raises(ValueError, match="at least one model"):
        ByteEnsemble([])
    with pytest.raises(ValueError, match="blanks differently"):
        ByteEnsemble([lm, ByteLM(*tiny400)])
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="one positive weight"):
            ByteEnsemble([lm, lm], weights=weights)
