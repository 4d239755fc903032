"""Reading merge lists of real tokenizer formats."""

import base64
import gzip
import json

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tokenry.assets import external, held_out_texts, model_path
from tokenry.tokenization import MixtureInference, drop_redundant_merges, merges_from_ranks, read_merge_list, train_bpe
from tokenry.tokenization.merge_lists import PATTERNS, byte_characters, byte_level_splitter

pytestmark = pytest.mark.method("data-mixture-inference")
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"


@pytest.fixture(scope="module")
def trained():
    return train_bpe(held_out_texts("code")[:40], 300)


def ranks_of(tokenizer):
    """A tokenizer's vocabulary as tiktoken ranks."""
    back = {character: byte for byte, character in byte_characters().items()}
    listed = [bytes([b]) for b in range(256)]
    for left, right in read_merge_list(tokenizer).merges:
        listed.append(bytes(back[c] for c in left + right))
    return {token: rank for rank, token in enumerate(listed)}


def test_ranks_give_the_merges_back(trained):
    merges = read_merge_list(trained).merges
    ranks = ranks_of(trained)
    assert merges_from_ranks(ranks) == merges
    assert merges_from_ranks(ranks, limit=20) == merges[:20]
    encoding = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert read_merge_list(encoding).merges == merges


@given(st.text(st.sampled_from("aB1 \n\r\t'sé中,.!२"), max_size=30))
def test_splitter_cuts_as_tiktoken_does(text):
    back = {character: byte for byte, character in byte_characters().items()}
    words = [bytes(back[c] for c in word) for word, _ in byte_level_splitter(PATTERN).pre_tokenize_str(text)]
    assert words == [word.encode() for word in regex.findall(PATTERN, text)]


def test_all_ways_to_hand_in_a_tokenizer_agree(tmp_path, trained):
    merges = read_merge_list(trained).merges
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, str(path), tmp_path, tmp_path / "packed.json.gz"):
        assert read_merge_list(source).merges == merges
    fast = PreTrainedTokenizerFast(tokenizer_file=str(model_path("small") / "tokenizer.json"))
    assert read_merge_list(fast).merges == read_merge_list(model_path("small")).merges
    assert MixtureInference.from_tokenizer(fast, max_merges=10).max_merges == 10


def test_tiktoken_file(tmp_path, trained):
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks_of(trained).items()]
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(b"\n".join(lines))
    assert read_merge_list(path).merges == read_merge_list(trained).merges
    unknown = tmp_path / "mine.tiktoken"
    unknown.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"none of .*cl100k_base"):
        read_merge_list(unknown)
    path.write_text("not base64 at all\n")
    with pytest.raises(ValueError, match="not a tiktoken file"):
        read_merge_list(path)
    assert "o200k_base" in PATTERNS


def every_split(merges):
    """What a SentencePiece conversion lists: each split of each token into two known parts, by the parts' ids."""
    products = ["".join(merge) for merge in merges]
    known = {c for p in products for c in p} | set(products)
    found = []
    for product in products:
        for i in range(1, len(product)):
            if product[:i] in known and product[i:] in known:
                found.append((product[:i], product[i:]))
    return found


def test_redundant_merges():
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁t", "h")]
    listed = every_split(merges)
    assert len(listed) > len(merges)
    assert drop_redundant_merges(listed) == merges
    spaces = [("▁", "▁"), ("▁▁", "▁"), ("a", "b")]
    assert drop_redundant_merges(spaces, remove_whitespace_runs=True) == [("a", "b")]


def test_mirror_keeps_the_longer_left_part():
    listed = [("a", "a"), ("aa", "a"), ("a", "aa")]
    assert drop_redundant_merges(listed) == [("a", "a"), ("aa", "a")]


def test_sentencepiece_conversion_is_cleaned_and_split(tmp_path):
    merges = every_split([("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁t", "h")])
    tokens = sorted({part for merge in merges for part in (*merge, "".join(merge))})
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    found = read_merge_list(path)
    assert found.redundant == len(merges) - 5 and len(found.merges) == 5
    assert [w for w, _ in found.pre_tokenizer.pre_tokenize_str("the end, 12\nx")] == [
        "▁the",
        "▁end",
        ",",
        "▁",
        "1",
        "2",
        "x",
    ]


@pytest.mark.skipif(external("tokenizer-vocabs") is None, reason="needs TOKENRY_DATA/tokenizer-vocabs")
@pytest.mark.parametrize(("name", "kept"), [("llama2", 29612), ("mistral-7b-v0.1", 28446)])
def test_released_conversions(name, kept):
    folder = external("tokenizer-vocabs")
    found = read_merge_list(folder / f"{name}.tokenizer.json.xz")
    assert len(found.merges) == kept == len({a + b for a, b in found.merges})
    MixtureInference.from_tokenizer(found)._checked_merges()


def saved(tmp_path, model, **extra):
    tokenizer = Tokenizer(model)
    spec = json.loads(tokenizer.to_str()) | extra
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return path


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="no merge order to read"):
        read_merge_list(saved(tmp_path, models.Unigram([("a", -1.0)], 0, False)))
    with pytest.raises(ValueError, match="no merge order to read"):
        read_merge_list(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(ValueError, match="has no pre-tokenizer"):
        read_merge_list(saved(tmp_path, models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    with pytest.raises(ValueError, match="there is no file"):
        read_merge_list(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        read_merge_list(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot read merges from a int"):
        read_merge_list(7)
    with pytest.raises(ValueError, match="255 of 256 bytes"):
        merges_from_ranks({b"a": 0})
