"""The decoding comparison, tiny: figures, resuming, the user's own prompts and model, bad input."""

from __future__ import annotations

import shutil

import pytest
import torch

from tokenry.assets import model_path
from tokenry.compare import compare
from tokenry.compare.kind import Options
from tokenry.compare.kinds.decoding import Decoding, read_prompts
from tokenry.compare.kinds.decoding_contenders import CONTENDERS, GREEDY

SMALL = {"prompts": 1, "new_tokens": 8, "sweep": "4,8"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_compares_and_resumes(tmp_path, monkeypatch):
    options = {"out": tmp_path, "quiet": True, "repeats": 2, "effort": "demo", "settings": SMALL}
    result = compare("decoding", **options)
    rows = {row["method"]: row for row in result.outcome.rows}
    assert result.outcome.rows[0]["method"] == GREEDY
    assert rows[GREEDY]["speed"] == 1.0
    assert rows[GREEDY]["accepted"] == pytest.approx(1.0)
    lossless = {contender.name for contender in CONTENDERS if contender.lossless}
    assert set(rows) == {contender.name for contender in CONTENDERS}
    assert all(row["identical"] == 100 for name, row in rows.items() if name in lossless)
    assert all(row["perplexity"] == rows[GREEDY]["perplexity"] for name, row in rows.items() if name in lossless)
    assert all(row["perplexity"] >= 1 for row in rows.values())
    assert rows["zero-node tree"]["accepted"] == 1.0
    assert rows["token recycling, hot"]["accepted"] >= 1.0
    assert set(result.outcome.sweeps[0].exponents) == set(rows)
    assert "Prompt" in result.outcome.examples
    monkeypatch.setattr(Decoding, "_bench", lambda *a: pytest.fail("a finished run loaded the model again"))
    assert compare("decoding", **options).outcome.rows == result.outcome.rows


def test_own_model_and_prompts_in_a_batch(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 4096,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=0, pad_token_id=1)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("first prompt\n\nthe second one is longer\nthird\n")
    result = compare(
        "decoding",
        quiet=True,
        repeats=1,
        effort="demo",
        model=str(tmp_path / "model"),
        data=str(tmp_path / "prompts.txt"),
        methods=["token recycling, auto", "prompt lookup", "assisted generation"],
        settings=SMALL | {"prompts": 3, "batch_size": 2},
    )
    assert [row["method"] for row in result.outcome.rows] == [GREEDY, "token recycling, auto"]
    assert all(row["identical"] == 100 for row in result.outcome.rows)
    notes = " ".join(result.outcome.notes)
    assert "a batch of one only" in notes
    assert "draft model with the same tokenizer" in notes


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_what_learns_never_sees_the_measured_prompts(tmp_path, count):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(count)))
    for data in (None, str(tmp_path / "prompts.txt")):
        chosen, warm, *_ = Decoding()._plan(Options(data=data))
        assert chosen and warm and not set(chosen) & set(warm)


@pytest.mark.parametrize(
    "text", ['["a b", "c"]', '{"prompt": "a b"}\n{"prompt": "c", "n": 1}\n', "a b\nc\n", '[{"text": "a b"}, "c"]']
)
def test_reads_prompts(tmp_path, text):
    (tmp_path / "p").write_text(text)
    assert read_prompts(str(tmp_path / "p")) == ["a b", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.txt"}, "not a file"),
        ({"methods": ["magic"]}, "no method is called 'magic'"),
        ({"settings": {"speed": 1}}, "no setting 'speed'"),
        ({"settings": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"settings": {"prompts": 0}}, "prompts must be at least 1"),
        ({"settings": {"sweep": "0,8"}}, "sweep must be numbers from 1 up"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        compare("decoding", quiet=True, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "p is empty"),
        (b"[]", "p is an empty list"),
        (b'["a", 2]', "every entry must be a text, or an object with 'prompt'; entry 2 of 2 is 2"),
        (b"{broken", "looks like JSON but is not"),
        (b'[{"question": "x"}]', r"entry 1 of 1 is {\"question\""),
        (b"\xcd\xfa", "p is not UTF-8 text"),
    ],
)
def test_refuses_files(tmp_path, content, message):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "p"))


def test_models_that_cannot_be_used_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(model_path("draft"), folder)
    foreign = Tokenizer(models.BPE({"a": 0} | {f"t{i}": i for i in range(1, 5000)}, []))
    PreTrainedTokenizerFast(tokenizer_object=foreign, eos_token="a").save_pretrained(folder)
    options = {"quiet": True, "model": str(folder), "methods": ["prompt lookup"], "effort": "demo"}
    with pytest.raises(ValueError, match=r"has 5,000 tokens, the model 4,096: they do not belong together"):
        compare("decoding", **options)
    shutil.copytree(model_path("draft"), folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50_000])
    with pytest.raises(ValueError, match="cannot load a causal language model from .*: .*incomplete"):
        compare("decoding", **options)


def test_a_small_context(tmp_path):
    """Prompts are cut and said to be; sizes without room are left out of the growth; no room at all is refused."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 4096}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "model")
    options = {"quiet": True, "repeats": 1, "effort": "demo", "model": str(tmp_path / "model")}
    options |= {"data": str(tmp_path / "prompts.txt"), "methods": ["prompt lookup"]}
    (tmp_path / "prompts.txt").write_text("one two three four five six seven eight nine ten " * 30 + "\nshort\n")
    with pytest.raises(ValueError, match="there is no tokenizer"):
        compare("decoding", **options)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "model")
    result = compare("decoding", **options, settings={"new_tokens": 8, "sweep": "4,40,200"})
    notes = " ".join(result.outcome.notes)
    assert "1 prompt(s) were cut" in notes and "200 new tokens do not fit" in notes
    assert [size for size, _ in result.outcome.sweeps[0].points[GREEDY]] == [4, 40]
    with pytest.raises(
        ValueError, match="leave no room for a prompt in the model's context of 64 tokens; lower new_tokens to 47"
    ):
        compare("decoding", **options, settings={"new_tokens": 64})
